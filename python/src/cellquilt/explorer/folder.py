"""Writing an Explorer folder, whole or in parts; a write that is killed leaves the earlier folder as it was."""

import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cellquilt.core.atomic import atomic_path
from cellquilt.core.errors import CellquiltError
from cellquilt.core.log import LOG
from cellquilt.core.xenium import ANALYSIS, CELLS, EXPERIMENT, IMAGE, MATRIX, TRANSCRIPTS
from cellquilt.explorer.bundle import FILES, write_bundle
from cellquilt.explorer.cells import NAMES, write_cells, write_names
from cellquilt.explorer.image import write_image
from cellquilt.explorer.manifest import write_manifest
from cellquilt.explorer.rules import validate
from cellquilt.explorer.simplify import MAX_VERTICES
from cellquilt.explorer.slide import ViewedSlide
from cellquilt.explorer.table import write_groups, write_matrix
from cellquilt.explorer.transcripts import write_transcripts

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Letter → the files that it stands for.
LETTERS = {
    "i": (IMAGE,),
    "t": (TRANSCRIPTS,),
    "c": (MATRIX,),
    "b": (CELLS, NAMES),
    "o": (ANALYSIS,),
    "m": (EXPERIMENT,),
    "p": FILES,
}
_MEANINGS = "image, transcripts, counts, boundaries, observations, manifest, Parquet tables"


def letters_of(mode: str | None, *, tables: bool = False) -> set[str]:
    """The parts to write.

    Parameters
    ----------
    mode
        ``+`` and letters: these; ``-`` and letters: all others; None: all. The tables (p) only where they are named.
    tables
        Whether all is the tables, too.

    Raises
    ------
    CellquiltError
        ``explorer-mode``.
    """
    whole = set(LETTERS) - (set() if tables else {"p"})
    if mode is None:
        return whole
    named = set(mode[1:])
    if mode[:1] not in ("+", "-") or not named or named - set(LETTERS):
        raise CellquiltError(
            "explorer-mode",
            f'mode is "{mode}"; + or - and some of the letters {"".join(LETTERS)} were expected ({_MEANINGS})',
            "for example -it for all but image and transcripts, +o for the groups of cells only",
        )
    return named if mode[0] == "+" else whole - named


def write_folder(
    slide: ViewedSlide,
    folder: Path,
    *,
    mode: str | None = None,
    layer: str | None = None,
    columns: Sequence[str] = (),
    max_vertices: int = MAX_VERTICES,
    compression: str = "deflate",
    tables: bool = False,
    run_name: str | None = None,
    overwrite: bool = False,
) -> dict[str, int]:
    """Write a slide as an Explorer folder, or parts of it anew.

    Returns
    -------
    dict
        What `validate` found in the folder.

    Raises
    ------
    CellquiltError
        ``explorer-mode``, ``explorer-vertices``, ``output-exists`` without `mode` and `overwrite`,
        ``explorer-invalid``, and those of the parts.
    """
    wanted = letters_of(mode, tables=tables)
    if not 5 <= max_vertices <= 255:
        raise CellquiltError(
            "explorer-vertices", f"max_vertices is {max_vertices}; 5 to 255 were expected",
            f"the viewer's own polygons have {MAX_VERTICES}",
        )  # fmt: skip
    _ = slide.size_px, slide.pixel_um  # what is wrong with the slide is said before anything is made
    memory = slide.memory_mb

    def write(aside: Path) -> None:
        cells = slide.cells is not None
        steps: dict[str, tuple[bool, Callable[[], Any]]] = {
            "i": (True, lambda: write_image(slide, aside / IMAGE, compression=compression)),
            "t": (
                slide.points is not None,
                lambda: write_transcripts(slide, aside / TRANSCRIPTS, memory_mb=memory),
            ),
            "b": (cells, lambda: _write_boundaries(slide, aside, max_vertices)),
            "c": (
                cells and slide.table is not None,
                lambda: write_matrix(slide, aside / MATRIX, layer=layer, memory_mb=memory),
            ),
            "o": (cells and slide.table is not None, lambda: write_groups(slide, aside / ANALYSIS, columns=columns)),
            "p": (True, lambda: write_bundle(slide, aside, max_vertices=max_vertices, memory_mb=memory)),
            "m": (True, lambda: write_manifest(slide, aside, run_name=run_name)),
        }  # fmt: skip
        for letter, (there, step) in steps.items():  # the manifest last: it names the others
            if letter in wanted and there:
                step()
            elif letter in wanted and mode is not None:
                LOG.warning("%s has nothing for %s", slide.store.name, ", ".join(LETTERS[letter]))

    gone = {name for letter in wanted for name in LETTERS[letter]}
    found = rewrite(folder, gone, write, overwrite=overwrite or mode is not None, partial=mode is not None)
    said = ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in found.items())
    LOG.info("%s: written for Xenium Explorer: %s", slide.store.name, said)
    return found


def _write_boundaries(slide: ViewedSlide, folder: Path, max_vertices: int) -> None:
    write_cells(slide, folder / CELLS, max_vertices=max_vertices)
    write_names(slide, folder / NAMES)


def rewrite(
    folder: Path, names: set[str], write: Callable[[Path], object], *, overwrite: bool, partial: bool = True
) -> dict[str, int]:
    """Make a folder anew, with some files written and the others as they were; checked, then swapped.

    Parameters
    ----------
    folder
        The folder.
    names
        Files that `write` makes, or leaves out.
    write
        Gets a folder that has all others.
    overwrite
        Whether there may be an earlier folder.
    partial
        Whether files may be missing.
    """
    if folder.exists() and not folder.is_dir():
        raise CellquiltError("explorer-no-folder", f"{folder} is a file; a folder was expected", "name another one")
    with atomic_path(folder, overwrite=overwrite) as aside:
        aside.mkdir()
        if folder.is_dir():
            for entry in sorted(folder.iterdir()):
                if entry.name not in names:
                    _keep(entry, aside / entry.name)
        write(aside)
        with _named(aside, folder):
            found = validate(aside, partial=partial)
    return found


@contextmanager
def _named(aside: Path, folder: Path) -> "Iterator[None]":
    """Errors speak of the folder as the user knows it."""
    try:
        yield
    except CellquiltError as error:
        raise CellquiltError(
            error.code, error.message.replace(str(aside), str(folder)),
            error.hint or "what stood there before is untouched; write all parts from one store",
        ) from error  # fmt: skip


def _keep(source: Path, target: Path) -> None:
    """A file or folder as it is: by hard links where the file system can."""
    if source.is_symlink():
        target.symlink_to(os.readlink(source))
    elif source.is_dir():
        target.mkdir()
        for entry in sorted(source.iterdir()):
            _keep(entry, target / entry.name)
    else:
        try:
            os.link(source, target)
        except OSError:
            shutil.copy2(source, target)
