"""A whole slide through Baysor, patch by patch: prior cells, patches, segmentation, one cell a transcript, counts."""

import cellquilt as cq
import numpy as np
import pandas as pd
import pytest

pytest_plugins = ["baysor_doors"]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    """A simulated slide with the machine's own cells."""
    folder = tmp_path_factory.mktemp("simulated") / "slides"
    cq.simulate(folder, format="xenium", width_px=1024, height_px=1024)
    return folder / "slide_0"


def test_counts_are_those_of_the_molecules(door, slide):
    sdata = cq.io.xenium(slide)
    cq.segmentation.vendor(sdata)
    cq.make_transcript_patches(sdata, patch_width_um=140, patch_overlap_um=30)
    cq.segmentation.baysor(sdata, **{name.removeprefix("baysor_"): value for name, value in door.settings.items()})
    cq.aggregate(sdata)
    n_patches = len(sdata.shapes["transcripts_patches"])
    assert n_patches >= 4
    transcripts = sdata.points["transcripts"].compute()
    assert transcripts["transcript_id"].is_unique
    counted = transcripts[transcripts["cell_id"].notna() & ~transcripts["is_control"] & transcripts["passes_qv"]]
    table = sdata.tables["table"]
    cells = pd.Index(table.obs["cell_id"])
    expected = np.zeros(table.shape, dtype=np.int64)
    rows, columns = cells.get_indexer(counted["cell_id"]), table.var_names.get_indexer(counted["gene"].astype(str))
    assert rows.min() >= 0
    np.add.at(expected, (rows, columns), 1)
    assert (table.X.toarray() == expected).all()
    # The machine's cells were the prior, so most transcripts are where the machine has them.
    good = transcripts[~transcripts["is_control"] & transcripts["passes_qv"]]
    assert good["cell_id"].notna().mean() > 0.9
    assert set(sdata.shapes["baysor_boundaries"].index) == set(cells)
    assert sdata.shapes["cell_boundaries"].geometry.is_valid.all()
    assert abs(len(cells) - len(sdata.shapes["vendor_cells"])) < 0.1 * len(cells)
