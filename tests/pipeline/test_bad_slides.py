"""Faults through Nextflow: every sample is accounted for, with the message that the command line gives."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import spatialdata
import tifffile
from cellquilt.cli import main
from cellquilt.simulate import simulate

pytestmark = pytest.mark.slow

GENERIC = ("--segmentation", "generic", "--generic_function", "cellquilt.segment.generic:rainfall")


@pytest.fixture
def sheet(tmp_path) -> Path:
    """Two samples that come through, one of them without a cell, and six that fail, each of its own fault."""
    folder = tmp_path / "input"
    simulate(folder / "sim", width_px=128, seed=1)
    slide = folder / "sim" / "slide_0"
    image, table = slide / "image.ome.tif", slide / "transcripts.parquet"
    (folder / "cut.ome.tif").write_bytes(image.read_bytes()[:9000])
    tifffile.imwrite(folder / "plain.tif", tifffile.imread(image), photometric="minisblack")
    (folder / "nan.csv").write_text("x,y,gene\n1,2,A\nnan,2,B\n")
    metadata = {"axes": "YX", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}
    tifffile.imwrite(folder / "empty.ome.tif", np.zeros((128, 128), np.uint16), ome=True, metadata=metadata)
    (folder / "odd.py").write_text("def raises(image):\n    raise RuntimeError('no fuel')\n")
    rows = {
        "good": {},
        "empty": {"path": folder / "empty.ome.tif"},
        "truncated": {"path": folder / "cut.ome.tif"},
        "no_pixel_size": {"path": folder / "plain.tif"},
        "nan": {"transcripts": folder / "nan.csv"},
        "no_gene": {"gene_column": "gne"},
        "no_vendor_cells": {"segmentation": "vendor"},
        "engine": {"generic_function": "odd:raises"},
    }
    with (folder / "sheet.csv").open("w", newline="") as file:
        columns = ["sample", "technology", "path", "transcripts", "gene_column", "segmentation", "generic_function"]
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for sample, more in rows.items():
            writer.writerow({"sample": sample, "technology": "ome_tif", "path": image, "transcripts": table, **more})
    return folder / "sheet.csv"


#: Sample → stage that fails, code, and words of the cause.
FAILED = {
    "truncated": ("CONVERT", "tiff-truncated", ["cut.ome.tif", "9000 bytes"]),
    "no_pixel_size": ("CONVERT", "pixel-size-unknown", ["plain.tif"]),
    "nan": ("CONVERT", "transcripts-nan", ["nan.csv", "row 2", '"x"']),
    "no_gene": ("CONVERT", "transcripts-column-missing", ["transcripts.parquet", '"gne"']),
    "no_vendor_cells": ("RESOLVE", "vendor-cells-missing", ["no_vendor_cells"]),
    "engine": ("SEGMENT_GENERIC", "patch-failed", ["sample engine", "no fuel"]),
}


def by_command_line(capsys, row: dict[str, str], folder: Path) -> str:
    """What `cellquilt convert` says about a row of the sheet."""
    options = [f"--gene-column={row['gene_column']}"] if row["gene_column"] else []
    with pytest.raises(SystemExit) as stop:
        main([
            "convert", row["path"], "--technology", row["technology"], "--transcripts", row["transcripts"],
            "--sample", row["sample"], "-o", str(folder / f"{row['sample']}.zarr"), *options,
        ])  # fmt: skip
    assert stop.value.code == 1
    err = capsys.readouterr().err
    return err[err.index("error: [") :]


def test_every_sample_has_its_outcome_and_both_doors_say_the_same(nextflow, sheet, capsys, tmp_path):
    run = nextflow.pipeline("--input", sheet, *GENERIC, PYTHONPATH=str(sheet.parent))
    assert run.code != 0
    results = nextflow.folder / "results"
    with (results / "samples.tsv").open(newline="") as file:
        rows = {row["sample"]: row for row in csv.DictReader(file, delimiter="\t")}
    with sheet.open(newline="") as file:
        given = {row["sample"]: row for row in csv.DictReader(file)}
    assert list(rows) == list(given)

    assert {sample for sample, row in rows.items() if row["status"] == "done"} == {"good", "empty"}
    for sample, (stage, code, words) in FAILED.items():
        row = rows[sample]
        assert (row["status"], row["stage"], row["error"]) == ("failed", stage, code), row
        assert [word for word in words if word not in row["cause"]] == []
        assert row["hint"]
        assert f"failed: {sample} in {stage}" in run.out
        if stage == "CONVERT":
            said = by_command_line(capsys, given[sample], tmp_path / "out")
            # The pipeline leaves the folders out of names, and says so.
            assert said == f"error: [{code}] {row['cause']}\n  hint: {row['hint']}\n".replace("…/", "")
    assert not list((tmp_path / "out").iterdir())
    assert "Traceback" not in run.out + run.err

    # Nothing of a failed sample is published; what is published is whole.
    folders = {path.name for path in results.iterdir() if path.is_dir()}
    assert folders == {"good", "empty", "pipeline_info", "multiqc"}
    for sample, has_cells in (("good", True), ("empty", False)):
        qc = json.loads((results / sample / "qc.json").read_text())
        sdata = spatialdata.read_zarr(results / sample / f"{sample}.zarr")
        assert sdata.tables["table"].n_obs == qc["n_cells"] == int(rows[sample]["n_cells"])
        assert (qc["n_cells"] > 0) == has_cells
        assert (results / sample / "report.html").stat().st_size > 1000
    assert rows["empty"]["verdict"] == "FAIL"
    shutil.rmtree(nextflow.folder / "work")
