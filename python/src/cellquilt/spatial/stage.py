"""The step of spatial statistics: a slide's store, or a table of cells, to a folder of tables."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cellquilt.core.atomic import refuse_existing
from cellquilt.core.log import LOG
from cellquilt.core.settings import Settings
from cellquilt.spatial.files import TableFiles
from cellquilt.spatial.summary import slide_statistics

if TYPE_CHECKING:
    from cellquilt.spatial.summary import SlideStatistics

#: Rings of the co-occurrence.
_RINGS = 10


def stats_slide(
    store: Path, output: Path, *, settings: Settings, table: str = "table", overwrite: bool = False
) -> "SlideStatistics":
    """Measure a slide's cells in space and write what is found.

    Parameters
    ----------
    store
        SpatialData store, AnnData store or ``.h5ad`` with the slide's cells; nothing is read of what was measured in
        them.
    output
        Folder to write.
    settings
        Group ``stats``.
    table
        Name of the table of a SpatialData store.
    overwrite
        Replace what stands there.

    Raises
    ------
    CellquiltError
        What `slide_statistics` raises, ``output-exists``, ``table-missing``, ``table-unreadable``.
    """
    refuse_existing(output, overwrite)
    cells = TableFiles([store], table, places_only=True)[0]
    found = slide_statistics(
        cells,
        settings["stats_cell_type"],
        settings["stats_domain"],
        radius=settings["stats_radius"],
        edges_um=np.linspace(0, settings["stats_reach_um"], _RINGS + 1).tolist(),
        min_cells=settings["stats_min_cells"],
        n_permutations=settings["stats_permutations"],
        seed=settings["stats_seed"],
        threads=settings["threads"],
    )
    found.write(output, overwrite=overwrite)
    LOG.info("%s: %d cells, %s", found.sample, found.about["n_cells"], ", ".join(found.tables) or "nothing to measure")
    for note in found.about["notes"]:
        LOG.warning("%s: %s", found.sample, note)
    return found
