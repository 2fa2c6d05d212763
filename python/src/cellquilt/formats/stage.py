"""The export step: a slide's cells as the files of other programs."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cellquilt.core.atomic import atomic_path, refuse_existing
from cellquilt.core.errors import CellquiltError, did_you_mean
from cellquilt.core.log import LOG
from cellquilt.core.settings import EXPORTS, Settings
from cellquilt.core.store import Store

if TYPE_CHECKING:
    from cellquilt.formats.cells import SlideCells


def export_slide(
    store: Path, output: Path, formats: Sequence[str] = (), *, settings: Settings, overwrite: bool = False
) -> list[Path]:
    """Write the cells of a store as other programs read them.

    Parameters
    ----------
    store
        The published store, or one that `resolve` and `aggregate` have added to.
    output
        Folder; each format has a folder of its name in it.
    formats
        Some of ``xeniumranger``, ``vpt``, ``qupath``. Default: what the setting ``export`` says.
    settings
        Group ``export``.
    overwrite
        Replace what stands there.

    Returns
    -------
    list of pathlib.Path
        The folders written.

    Raises
    ------
    CellquiltError
        ``export-unknown``, ``export-missing``, ``export-no-cells``, ``output-exists`` and what a format needs.
    """
    from cellquilt.formats.cells import SlideCells

    wanted = list(dict.fromkeys([*formats] or settings["export"] or []))
    if not wanted:
        raise CellquiltError("export-missing", "no format is named", f"name one of {', '.join(EXPORTS)}")
    for name in wanted:
        if name not in EXPORTS:
            raise CellquiltError("export-unknown", f'unknown export "{name}"', did_you_mean(name, EXPORTS))
    folders = [Path(output) / name for name in wanted]
    for folder in folders:
        refuse_existing(folder, overwrite)
    cells = SlideCells(Store(store))
    for name, folder in zip(wanted, folders, strict=True):
        with atomic_path(folder, overwrite=overwrite) as aside:
            aside.mkdir()
            _write(name, cells, aside, settings["memory_mb"])
        LOG.info("%s: %d cells for %s", cells.store.name, len(cells), name)
    return folders


def _write(name: str, cells: "SlideCells", folder: Path, memory_mb: int) -> None:
    if name == "xeniumranger":
        from cellquilt.formats.xeniumranger import write_xeniumranger

        write_xeniumranger(cells, folder, memory_mb=memory_mb)
    elif name == "vpt":
        from cellquilt.formats.vpt import write_vpt

        write_vpt(cells, folder, memory_mb=memory_mb)
    else:
        from cellquilt.formats.qupath import write_qupath

        write_qupath(cells, folder)
