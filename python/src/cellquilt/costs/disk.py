"""How much room a sample takes on disk."""

from cellquilt.core.settings import TABLES, Settings, methods_of
from cellquilt.core.sheet import Row
from cellquilt.costs.contents import Contents
from cellquilt.costs.plan import image_bundles, image_of, molecules_of, transcript_bundles

#: Bytes on disk, measured: of a byte of pixels with and without its pyramid, of a byte of pixels in a bundle, of a
#: transcript in the raw store, with its cell, and in a bundle, of a cell's outlines and of its row of the table.
_PIXEL, _BUNDLE_PIXEL = 0.78 * 1.31, 0.8
_TRANSCRIPT, _TRANSCRIPT_WITH_CELL, _BUNDLE_TRANSCRIPT = 10.0, 11.0, 18.0
_CELL, _TABLE_CELL, _RESULT_CELL = 450, 900, 140
#: Reports and what a task leaves in its folder.
_REPORT, _TASK = 3_000_000, 20_000


def disk_of(row: Row, settings: Settings, found: Contents, n_tasks: int) -> tuple[int, int]:
    """Bytes of a sample in the work folder and among the results, without ``--cleanup``."""
    if row.technology in TABLES:
        return round(1.2 * found.raw_bytes), round(1.1 * found.raw_bytes)
    methods = methods_of(settings)
    image = found.pixels * found.item_bytes * _PIXEL
    work = image + found.transcripts * _TRANSCRIPT + found.vendor_cells * _CELL + n_tasks * _TASK
    published = float(_REPORT)
    if settings["preview"]:
        return round(work), round(published)
    for method in dict.fromkeys(filter(None, map(image_of, methods))):
        if method != "vendor":
            pixels = image_bundles(settings, found, method).pixels
            work += pixels * found.item_bytes * _BUNDLE_PIXEL + found.cells * (_RESULT_CELL + 2 * _CELL)
    for method in filter(None, map(molecules_of, methods)):
        work += transcript_bundles(settings, found, method).transcripts * 2 * _BUNDLE_TRANSCRIPT
        work += found.cells * 2 * _CELL
    own = found.transcripts * _TRANSCRIPT_WITH_CELL + found.cells * (2 * _CELL + _TABLE_CELL)
    work += own + (len(methods) - 1) * found.cells * (_CELL + _TABLE_CELL)
    published += image + own + found.vendor_cells * _CELL + (len(methods) - 1) * found.cells * (_CELL + _TABLE_CELL)
    return round(work), round(published)
