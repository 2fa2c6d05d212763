"""What `cellquilt provenance` writes makes the pipeline publish the same slide again; and no folder is in a result."""

import json
import shlex
import subprocess
import sys

import anndata
import pandas as pd
import pytest
from cellquilt.core.store import Store
from cellquilt.simulate import simulate
from leaks import leaks

pytestmark = pytest.mark.slow


def test_a_slide_made_by_the_pipeline_is_made_again_from_its_own_store(nextflow):
    folder = nextflow.folder
    simulate(folder / "planted raw data", width_px=320)
    source = folder / "planted raw data" / "slide_0"
    (folder / "sheet.csv").write_text(
        "sample,technology,path,transcripts,expand_um,condition\n"
        f"liver,ome_tif,{source}/image.ome.tif,{source}/transcripts.parquet,2.5,it's; $(odd)\n"
    )
    given = ("--segmentation", "generic", "--generic_diameter_um", "8", "--patch_width_px", "128", "--seed", "3")
    assert nextflow.pipeline("--input", "sheet.csv", *given).code == 0
    (folder / "results").rename(folder / "first")
    store = folder / "first" / "liver" / "liver.zarr"
    assert leaks(folder / "first" / "liver", str(folder)) == []

    told = subprocess.run(
        [sys.executable, "-m", "cellquilt", "provenance", store, "--path", source / "image.ome.tif", "--transcripts",
         source / "transcripts.parquet", "--sheet", "again.csv", "--params-file", "params.json"],
        cwd=folder, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert json.loads((folder / "params.json").read_text())["expand_um"] == 2.5
    line = next(line.strip() for line in told.splitlines() if line.strip().startswith("nextflow run main.nf"))
    words = shlex.split(line)[3:]
    assert words[-2:] == ["--outdir", "results"]
    assert nextflow.pipeline(*words[:-2]).code == 0

    again = folder / "results" / "liver" / "liver.zarr"
    one, two = (anndata.read_zarr(path / "tables" / "table") for path in (store, again))
    assert one.n_obs > 10
    pd.testing.assert_frame_equal(one.obs, two.obs)
    assert (one.X != two.X).nnz == 0
    attributes = [Store(path).attributes for path in (store, again)]
    for key in ("technology", "inputs", "metadata", "parameters", "seeds", "checksums", "command"):
        assert attributes[0][key] == attributes[1][key], key
