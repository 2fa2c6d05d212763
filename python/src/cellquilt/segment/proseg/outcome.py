"""What the way a run of proseg ended means."""

import re

from cellquilt.core.errors import CellquiltError
from cellquilt.segment.executable import Ended

_REFUSED_ARGUMENTS = 2
_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_PANIC = re.compile(r"^thread '.*' .*panicked at ")
_LAST_LINES = 5


def check_ended(ended: Ended, what: str) -> None:
    """Turn an unhappy end into an error.

    Parameters
    ----------
    ended
        How the run ended.
    what
        What was segmented, for the message.

    Raises
    ------
    MemoryError
        If proseg was killed or ran out of memory: another try with more may succeed.
    CellquiltError
        ``proseg-args`` if it refused its options, ``disk-full``, or ``proseg-failed``, with proseg's own words.
    """
    if ended.code == 0:
        return
    if ended.out_of_memory:
        raise MemoryError(f"in proseg, {what}")
    words = cause(ended.said)
    if ended.code == _REFUSED_ARGUMENTS:
        raise CellquiltError("proseg-args", f"proseg refused its options: {words}", "check proseg_args")
    if "StorageFull" in ended.said or "No space left on device" in ended.said:
        raise CellquiltError(
            "disk-full", f"no space left for what proseg writes: {words}", "free some space beside the output"
        )
    raise CellquiltError(
        "proseg-failed",
        f"proseg {ended.how}: {words}",
        "the log beside the output has all that proseg said; it has no seed, another try may go well",
    )


def cause(said: str) -> str:
    """What went wrong in proseg's words: its panic or error, else its last lines."""
    lines = [line.strip() for line in _ANSI.sub("", said).splitlines() if line.strip()]
    start = next((number for number, line in enumerate(lines) if _PANIC.match(line)), None)
    if start is not None:
        words = []
        for line in lines[start + 1 :]:
            if line.startswith("note: ") or _PANIC.match(line) or line == "stack backtrace:":
                break
            words.append(line)
        where = lines[start].split("panicked at ", 1)[1].rstrip(":")
        return f"{' / '.join(words[:_LAST_LINES]) or 'panic'} ({where})"
    start = next((number for number, line in enumerate(lines) if line.startswith("error: ")), None)
    if start is not None:
        return lines[start].removeprefix("error: ")
    return " / ".join(lines[-_LAST_LINES:]) or "it said nothing"
