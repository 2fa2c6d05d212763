"""Atomic writes: a result is either whole under its name or not there at all."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cellquilt.core.errors import CellquiltError


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.{os.getpid()}.partial")


def refuse_existing(target: Path, overwrite: bool) -> None:
    """Refuse to write where something stands, before any work is done for it.

    Raises
    ------
    CellquiltError
        ``output-exists``.
    """
    if target.exists() and not overwrite:
        raise CellquiltError("output-exists", f"{target} exists already", "choose another --output or add --overwrite")


def _remove(path: Path) -> None:
    """Remove a file or folder if it is there; never fails, for it also runs while an error is on its way."""
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def atomic_path(target: Path | str, *, overwrite: bool = False) -> Iterator[Path]:
    """A path beside `target` to write a file or a folder to; renamed to `target` on success, removed on failure.

    Parameters
    ----------
    target
        The file or folder to make.
    overwrite
        Replace what stands there. The old one stays until the new one is complete.

    Raises
    ------
    CellquiltError
        ``output-exists`` if the target exists and `overwrite` is not set; ``disk-full``, ``output-not-writable`` and
        ``input-not-readable`` when the file system refuses.
    """
    target = Path(target)
    refuse_existing(target, overwrite)
    aside = _aside(target)
    try:
        _make_folder(target)
        _remove(aside)
        yield aside
        if target.exists():
            old = target.with_name(f".{target.name}.{os.getpid()}.old")
            target.rename(old)
            aside.rename(target)
            _remove(old)
        else:
            aside.rename(target)
    except OSError as error:
        raise as_user_error(error, target) from error
    finally:
        _remove(aside)


def _make_folder(target: Path) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.exists()  # refuses names that are too long
    except (FileExistsError, NotADirectoryError) as error:
        raise CellquiltError(
            "output-not-writable", f"cannot write {target}: {error.filename} is no folder", "choose another --output"
        ) from error


def as_user_error(error: OSError, target: Path) -> OSError | CellquiltError:
    """Turn the operating system's refusals that a user can mend into errors that say how."""
    import errno

    # What is made aside for a whole that is itself made aside: the user knows the whole's name only.
    target = target.with_name(re.sub(r"^\.(.+)\.\d+\.partial$", r"\1", target.name))
    # Copying a folder gathers what went wrong with each file as text.
    gathered = re.search(r"\[Errno (\d+)\]", str(error)) if isinstance(error, shutil.Error) else None
    if gathered:
        return as_user_error(OSError(int(gathered[1]), os.strerror(int(gathered[1]))), target)
    if error.errno == errno.ENAMETOOLONG:
        return CellquiltError(
            "output-not-writable", f"cannot write {target}: {error.strerror}", "choose a shorter name"
        )
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CellquiltError(
            "disk-full", f"no space left while writing {target}", "free some space or point the output elsewhere"
        )
    refused = error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
    if refused and isinstance(error.filename, str | os.PathLike) and not _is_beside(Path(error.filename), target):
        return CellquiltError(
            "input-not-readable", f"cannot read {error.filename}: {error.strerror}", "check the file's permissions"
        )
    if refused:
        return CellquiltError(
            "output-not-writable", f"cannot write {target}: {error.strerror}", "check the folder's permissions"
        )
    return error


def _is_beside(path: Path, target: Path) -> bool:
    """Whether a path is the target's, what is written aside for it, or a folder above."""
    path, target = path.absolute(), target.absolute()
    aside = _aside(target)
    return path in (target, aside) or aside in path.parents or path in target.parents
