"""Every machine's export, as the simulator writes it, through the pipeline: what is published is the truth's."""

import csv
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapely
import spatialdata
from cellquilt.core.points import iter_points
from cellquilt.core.shapes import read_shapes
from cellquilt.simulate import simulate
from runner import Nextflow

pytestmark = pytest.mark.slow

PIXEL = 0.4
#: Machine → settings of its row; those without cells of their own get the true ones.
MACHINES: dict[str, dict[str, str]] = {
    "merscope": {},
    "xenium": {},
    "cosmx": {"pixel_size_um": str(PIXEL)},
    "visium_hd": {},
    "phenocycler": {"prior_cells": "cells.parquet"},
    "macsima": {"prior_cells": "cells.parquet"},
    "hyperion": {"prior_cells": "cells.parquet"},
    "molecular_cartography": {"prior_cells": "cells.parquet", "pixel_size_um": str(PIXEL)},
}
WITH_TRANSCRIPTS = ("merscope", "xenium", "cosmx", "molecular_cartography")


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """One run of one slide a machine; the folder has `sim/<machine>/slide_0` and `results`."""
    folder = tmp_path_factory.mktemp("machines")
    columns = ["sample", "technology", "path", "prior_cells", "prior_cells_unit", "pixel_size_um", "fullres_image"]
    with (folder / "sheet.csv").open("w", newline="") as file:
        sheet = csv.DictWriter(file, columns)
        sheet.writeheader()
        for machine, more in MACHINES.items():
            simulate(folder / "sim" / machine, width_px=256, slides=1, seed=3, format=machine, pixel_size_um=PIXEL)
            slide = folder / "sim" / machine / "slide_0"
            row = {"sample": machine, "technology": machine, "path": slide, **more}
            if "prior_cells" in more:
                row |= {"prior_cells": slide / "truth" / "cells.parquet", "prior_cells_unit": "px"}
            if machine == "visium_hd":  # an input of Space Ranger's, often not beside its output
                (image,) = (slide / "microscope_image").iterdir()
                row["fullres_image"] = image.rename(folder / f"the scan{image.suffix}").name
            sheet.writerow(row)
    run = Nextflow(folder).pipeline("--input", "sheet.csv", "--segmentation", "vendor")
    assert run.code == 0, run.out + run.err
    return folder


def truth(folder: Path, machine: str, name: str) -> pd.DataFrame:
    return pq.read_table(folder / "sim" / machine / "slide_0" / "truth" / f"{name}.parquet").to_pandas()


def store(folder: Path, machine: str) -> Path:
    return folder / "results" / machine / f"{machine}.zarr"


def outlines(folder: Path, machine: str) -> np.ndarray:
    """The published cells in pixels of the image; the microns of some machines are a stage's."""
    sdata = spatialdata.read_zarr(store(folder, machine))
    return np.asarray(spatialdata.transform(sdata["cell_boundaries"], to_coordinate_system="global").geometry)


@pytest.mark.parametrize("machine", MACHINES)
def test_cells_are_the_true_ones(published, machine):
    found = outlines(published, machine)
    known = shapely.from_wkb(truth(published, machine, "cells")["geometry"])
    ours, theirs = shapely.STRtree(known).query(found, "intersects")
    shared = shapely.area(shapely.intersection(found[ours], known[theirs]))
    union = shapely.area(found[ours]) + shapely.area(known[theirs]) - shared
    best = np.zeros(len(known))
    np.maximum.at(best, theirs, shared / union)
    assert len(found) == len(known) > 30
    assert (best > 0.9).mean() > 0.95, np.sort(best)[:5]


@pytest.mark.parametrize("machine", WITH_TRANSCRIPTS)
def test_counts_are_those_of_the_true_transcripts(published, machine):
    known = truth(published, machine, "transcripts_truth")
    kept = pa.concat_tables(iter_points(store(published, machine) / "points" / "transcripts")).unify_dictionaries()
    assert kept.num_rows == len(known) > 3_000
    table = spatialdata.read_zarr(store(published, machine)).tables["table"]
    if machine == "xenium":  # its export says how sure each is
        export = published / "sim" / machine / "slide_0" / "transcripts.parquet"
        known = known[pq.read_table(export, columns=["qv"])["qv"].to_numpy() >= 20]
    genes = known[known["gene"].isin(table.var_names)]
    places = shapely.points(genes["x"] / PIXEL, genes["y"] / PIXEL)
    row, cell = shapely.STRtree(outlines(published, machine)).query(places, "intersects")
    expected = pd.crosstab(table.obs_names[cell], genes["gene"].astype(str).to_numpy()[row])
    expected = expected.reindex(index=table.obs_names, columns=table.var_names, fill_value=0)
    off = np.abs(table.X.toarray() - expected.to_numpy()).sum()
    assert table.X.sum() > 1_000
    # Machines round positions, so that a few lie on the other side of a border.
    assert off <= 0.002 * table.X.sum()


def test_bins_are_counted_in_cells(published):
    from cellquilt.simulate.bins import count_in_bins
    from cellquilt.simulate.visium_hd import ANGLE_DEG

    known = count_in_bins(published / "sim" / "visium_hd" / "slide_0" / "truth", angle_deg=ANGLE_DEG)
    sdata = spatialdata.read_zarr(store(published, "visium_hd"))
    table = sdata.tables["table"]
    assert list(sdata.images) == ["tissue"]
    assert sdata.tables["bins"].X.sum() == known.counts.sum()
    inside = 0.5 * known.counts.sum()
    assert inside < table.X.sum() < known.counts.sum()
    vendor = sdata.tables["vendor_table"]
    names = read_shapes(store(published, "visium_hd") / "shapes" / "cell_boundaries").columns["vendor_id"].astype(str)
    assert np.array_equal(table.X.toarray(), vendor[names, table.var_names].X.toarray())


@pytest.mark.parametrize("machine", ["phenocycler", "macsima", "hyperion"])
def test_intensities_are_the_true_ones(published, machine):
    known = truth(published, machine, "intensities")
    known = known.set_index(known.pop("cell_id").astype(str)).drop(columns="n_pixels")
    names = read_shapes(store(published, machine) / "shapes" / "cell_boundaries").columns["vendor_id"].astype(str)
    means = spatialdata.read_zarr(store(published, machine)).tables["table"].obsm["intensities"]
    assert list(means.columns) == list(known.columns)
    np.testing.assert_allclose(means.to_numpy(), known.loc[names].to_numpy(), rtol=1e-5)
