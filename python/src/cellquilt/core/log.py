"""Logging and progress: bars on a terminal, plain lines with a percentage elsewhere."""

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TextIO

LOG = logging.getLogger("cellquilt")


class _Stderr(logging.StreamHandler):
    """Writes to what stderr is at the moment: it may have been replaced, and the old one closed, since set-up."""

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, _: TextIO) -> None:
        pass


def setup_logging(verbose: bool = False) -> None:
    """Send the package's log to stderr, one plain line a message (idempotent)."""
    if not LOG.handlers:
        handler = _Stderr()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
        LOG.addHandler(handler)
        LOG.propagate = False
    LOG.setLevel(logging.DEBUG if verbose else logging.INFO)


def progress[T](items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """Pass `items` on and show how far they are.

    A click progress bar on a terminal; elsewhere a log line at most every 10 seconds, so that the log of a batch job
    stays readable.
    """
    count = total if total is not None else len(items)  # type: ignore[arg-type]
    if sys.stderr.isatty() and count > 1:
        import click

        with click.progressbar(items, length=count, label=what, file=sys.stderr) as bar:
            yield from bar
        return
    last = time.monotonic()
    for done, item in enumerate(items):
        now = time.monotonic()
        if now - last >= 10:
            LOG.info("%s: %d of %d (%d %%)", what, done, count, 100 * done // max(count, 1))
            last = now
        yield item
