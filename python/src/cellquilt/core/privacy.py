"""Keep where and by whom a slide was processed, and files that are no part of it, out of what is published."""

import os
import re
from pathlib import Path
from typing import Any

from cellquilt.core.errors import CellquiltError

_QUOTED = re.compile(r"""(['"`])((?:file://)?(?:/|~/|[A-Za-z]:\\)[^'"`\n]*)\1""")
# Two components at least: "/µm²" in prose is no path.
_BARE = re.compile(r"""(?<![\w.:/~])(?:file://)?(?:~|[A-Za-z]:)?(?:[/\\][^\s'"`,;:()\[\]{}<>/\\]+){2,}[/\\]?""")
_WHOLE = re.compile(r"^(?:file://)?(?:/|~/|[A-Za-z]:\\)[^\n]*$")
_URL = re.compile(r"\b[a-z][a-z0-9+.-]*://[^\s/@]+@", re.IGNORECASE)


def scrub(value: Any) -> Any:
    """Plain data without absolute paths: of each only the last component stays.

    Parameters
    ----------
    value
        Strings, numbers, lists and dicts, nested at will. Text keeps all that is not an absolute path; credentials in
        an address go, too.

    Returns
    -------
    Any
        The same structure.

    Examples
    --------
    >>> scrub({"model": "/data/models/liver.pt", "error": "cannot read '/scratch/a b/x.tif': truncated"})
    {'model': 'liver.pt', 'error': "cannot read 'x.tif': truncated"}
    """
    if isinstance(value, Path):
        return scrub(str(value))
    if isinstance(value, str):
        return _scrub_text(value)
    if isinstance(value, dict):
        return {str(key): scrub(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [scrub(item) for item in value]
    return value


def _scrub_text(text: str) -> str:
    for folder in _own_folders():
        text = text.replace(folder, "")
    if _WHOLE.match(text):
        return _last(text)
    text = _URL.sub(lambda found: found.group().split("//")[0] + "//", text)
    text = _QUOTED.sub(lambda found: f"{found.group(1)}{_last(found.group(2))}{found.group(1)}", text)
    return _BARE.sub(lambda found: _last(found.group()), text)


def _last(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def _own_folders() -> list[str]:
    """Folders whose names may hold blanks, which no pattern finds the end of; the longest first."""
    folders = {f"{Path.cwd()}/", f"{Path.home()}/"}
    return sorted((folder for folder in folders if folder.count("/") > 2), key=lambda folder: (-len(folder), folder))


def refuse_links_outside(folder: Path) -> None:
    """Refuse a folder that is to be copied whole if a symbolic link in it leads out of it.

    Who made the folder may not have been allowed to read what the link leads to; who copies it may be.

    Raises
    ------
    CellquiltError
        ``link-outside``.
    """
    root = Path(os.path.realpath(folder))
    for place, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = Path(place, name)
            if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(root):
                raise CellquiltError(
                    "link-outside",
                    f"{folder}: {path.relative_to(root)} is a link to something outside",
                    "put the file itself there",
                )
