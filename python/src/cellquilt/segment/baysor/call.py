"""One call of Baysor: what it is asked, and what the way it ended means. The same for both doors."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from cellquilt.core.errors import CellquiltError
from cellquilt.segment.executable import Ended

MOLECULES, CONFIG, OUTPUT = "molecules.csv", "config.toml", "segmentation.csv"
PRIOR = "prior_cell"
#: The version's file of outlines, beside `OUTPUT`.
POLYGONS = {"0.6": "segmentation_polygons.json", "0.7": "segmentation_polygons_2d.json"}
CELL_STATS = "segmentation_cell_stats.csv"
INSTALL = "install Baysor 0.7.1 and put it on PATH, name it with baysor_executable, or use the stage's container"

# Outlines as a GeometryCollection: the other format leaves out cells with few vertices. Counts as text: Baysor's writer
# of loom files fails after all its work where there are as many cells as genes; we count by molecules anyhow.
# Neighbourhood colours are for pictures that nobody looks at here; only 0.6 can do without.
_FLAGS = {
    "0.6": ("--save-polygons=GeoJSON", "--count-matrix-format=tsv", "--no-ncv-estimation"),
    "0.7": ("--polygon-format=GeometryCollection", "--count-matrix-format=tsv"),
}
_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_ERROR = re.compile(r"^\s*(?:ERROR|Error|CommandError): ")


class Door(Protocol):
    """A way to Baysor.

    Attributes
    ----------
    contract
        One of `config.CONTRACTS`.
    facts
        Plain data for the record: at least ``version`` and ``door``.
    """

    contract: str
    facts: dict[str, Any]

    def run(self, arguments: Sequence[str], log: Path) -> Ended:
        """Run Baysor with the arguments of its command line; what it says goes to the file `log`."""
        ...


def version_in(text: str) -> str:
    """The version that stands on a line of its own, without anything else; empty if none does."""
    found = re.search(r"^\s*v?(\d+\.\d+\S*)\s*$", text, re.MULTILINE)
    return found[1] if found else ""


def contract_of(version: str) -> str:
    """The contract of a version, for example ``"0.7"`` of ``"0.7.1"``."""
    return ".".join(version.split(".")[:2])


def arguments(contract: str, folder: Path, *, prior: bool) -> list[str]:
    """Arguments of ``baysor`` to segment `MOLECULES` of a folder into the same folder.

    Parameters
    ----------
    contract
        One of `config.CONTRACTS`.
    folder
        Holds `MOLECULES` and `CONFIG`.
    prior
        Whether the column `PRIOR` is there and counts.
    """
    options = [f"--config={folder / CONFIG}", f"--output={folder / OUTPUT}", *_FLAGS[contract]]
    return ["run", *options, str(folder / MOLECULES), *([f":{PRIOR}"] if prior else [])]


def check_end(ended: Ended, what: str) -> None:
    """Turn an end that is none into an error.

    Parameters
    ----------
    ended
        How Baysor ended.
    what
        What was segmented, for the message.

    Raises
    ------
    MemoryError
        If Baysor was killed or ran out of memory: another try with more may succeed.
    CellquiltError
        ``baysor-failed`` with Baysor's own words.
    """
    if ended.code == 0:
        return
    if ended.out_of_memory or "OutOfMemoryError" in ended.said:
        raise MemoryError(f"in Baysor, {what}")
    raise CellquiltError("baysor-failed", f"Baysor {ended.how}: {cause(ended.said)}", _hint(ended.said))


def cause(log: str) -> str:
    """What went wrong in Baysor's words: its error, else the last lines of its log."""
    # Progress bars rewrite their line.
    lines = [line.rstrip() for line in _ANSI.sub("", log).splitlines() if line.strip()]
    start = next((number for number, line in enumerate(lines) if _ERROR.match(line)), None)
    if start is None:
        return " / ".join(line.strip() for line in lines[-5:]) or "it said nothing"
    words = [_ERROR.sub("", lines[start])]
    if not lines[start].lstrip().startswith("CommandError"):  # after which comes Baysor's help
        stop = next((n for n in range(start, len(lines)) if lines[n].startswith("Stacktrace")), len(lines))
        words += [line.strip() for line in lines[start + 1 : min(stop, start + 4)]]
    return " / ".join(words)


def _hint(log: str) -> str:
    if "Not enough prior cells" in log:
        return "give baysor_scale_um"
    return "the log beside the output has all that Baysor said"
