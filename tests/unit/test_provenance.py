"""`cellquilt provenance`: what a store says of how it was made is enough to make the same table again."""

import csv
import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from cellquilt.cli import main
from cellquilt.core.errors import CellquiltError
from cellquilt.core.settings import Settings
from cellquilt.core.sheet import check_input
from cellquilt.core.store import Store, new_store
from cellquilt.readers import convert_slide
from cellquilt.readers.base import describe_file
from cellquilt.report import remake
from cellquilt.report.provenance import commands
from cellquilt.report.stage import assemble_slide
from cellquilt.simulate import simulate

SETTINGS = {
    "segmentation": "generic",
    "generic_diameter_um": 8,
    "generic_channels": ["DAPI"],
    "patch_width_px": 128,
    "seed": 3,
    "expand_um": 2.5,
    "min_transcripts": 40,
    "average_intensities": False,
    "qc_thresholds": None,
}
METADATA = {"age": "7", "condition": "it's; $(odd)"}  # the pipeline hands them over in the order of their names


def make(source: Path, folder: Path) -> Path:
    """A published store, by the steps of the pipeline: each adds a part of its own, ASSEMBLE puts them together."""
    from cellquilt.aggregation.stage import aggregate_slide
    from cellquilt.resolve.stage import resolve_slide
    from cellquilt.segment.stages import find_tissue, patchify_image, segment_source

    settings = Settings(SETTINGS)
    raw, tissue, patches, cells, table = (
        folder / f"liver.{name}.zarr" for name in ("raw", "tissue", "patches", "cells", "table")
    )
    convert_slide(
        source / "image.ome.tif",
        technology="ome_tif",
        sample="liver",
        transcripts=source / "transcripts.parquet",
        output=raw,
        settings=settings,
        source=f"/data/planted/{source.name}/image.ome.tif",
    )
    find_tissue(raw, settings=settings, output=tissue)
    bundles = patchify_image(raw, settings=settings, tissue=tissue, bundles=folder / "bundles", output=patches)
    found = [
        segment_source(bundle, method="generic", settings=settings, output=bundle.with_suffix(".cells.parquet"))[0]
        for bundle in bundles
    ]
    resolve_slide(raw, found, settings=settings, output=cells)
    aggregate_slide(raw, settings=settings, cells=cells, metadata=METADATA, output=table)
    parts = [raw, tissue, patches, cells, table]
    return assemble_slide(parts, folder / "liver.zarr", settings=settings, qc=folder / "qc.json")


@pytest.fixture(scope="module")
def slide(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("raw data")
    simulate(folder / "simulated", width_px=320)
    return folder / "simulated" / "slide_0"


@pytest.fixture(scope="module")
def published(slide, tmp_path_factory) -> Path:
    return make(slide, tmp_path_factory.mktemp("published"))


def run(capsys, *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


def files_of(slide: Path) -> list[object]:
    return ["--path", slide / "image.ome.tif", "--transcripts", slide / "transcripts.parquet"]


def table_of(store: Path):
    import anndata

    return anndata.read_zarr(store / "tables" / "table")


def test_the_commands_it_prints_make_the_same_table(published, slide, tmp_path, monkeypatch, capsys):
    code, out, _ = run(capsys, "provenance", published, *files_of(slide), "--json")
    assert code == 0
    lines = json.loads(out)["commands"]
    assert [line.split()[1] for line in lines] == ["convert", "tissue", "segment", "resolve", "aggregate"]
    monkeypatch.chdir(tmp_path)
    for line in lines:
        words = shlex.split(line)
        assert words[0] == "cellquilt"
        code, _, err = run(capsys, *words[1:])
        assert code == 0, err
    one, two = table_of(published), table_of(tmp_path / "liver.zarr")
    assert one.n_obs > 10
    assert one.X.sum() > 1000
    pd.testing.assert_frame_equal(one.obs, two.obs)
    pd.testing.assert_frame_equal(one.var, two.var)
    assert (one.X != two.X).nnz == 0
    assert np.array_equal(one.obsm["spatial"], two.obsm["spatial"])
    assert set(one.obs["condition"].astype(str)) == {METADATA["condition"]}
    points = "points/transcripts/points.parquet"
    assert pq.read_table(published / points).equals(pq.read_table(tmp_path / "liver.zarr" / points))
    for name in ("cell_boundaries", "nucleus_boundaries"):
        outlines = f"shapes/{name}/shapes.parquet"
        assert (published / outlines).read_bytes() == (tmp_path / "liver.zarr" / outlines).read_bytes()


def test_sheet_and_parameters_are_what_the_pipeline_takes(published, slide, tmp_path, capsys):
    sheet, parameters = tmp_path / "sheet.csv", tmp_path / "params.json"
    code, out, _ = run(
        *(capsys, "provenance", published, *files_of(slide), "--sheet", sheet, "--params-file", parameters)
    )
    assert code == 0
    assert f"nextflow run main.nf --input {sheet} -params-file {parameters} --outdir results" in out
    assert "The same as recorded: image.ome.tif, transcripts.parquet" in out
    rows, _ = check_input(sheet, json.loads(parameters.read_text()))
    (row,) = rows
    assert (row.sample, row.technology, row.metadata) == ("liver", "ome_tif", METADATA)
    again = Settings(json.loads(parameters.read_text()))
    wanted = Settings(SETTINGS)
    assert {name: again[name] for name in again} == {name: wanted[name] for name in wanted}
    code, _, err = run(capsys, "provenance", published, "--sheet", sheet)
    assert code == 1
    assert "[output-exists]" in err


def test_without_files_the_sheet_has_their_names(published, tmp_path, capsys):
    run(capsys, "provenance", published, "--sheet", tmp_path / "sheet.csv")
    with open(tmp_path / "sheet.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert row == {
        "sample": "liver", "technology": "ome_tif", "path": "image.ome.tif", "transcripts": "transcripts.parquet",
        "condition": METADATA["condition"], "age": "7",
    }  # fmt: skip


def test_the_text_says_what_differs_and_with_full_everything(published, capsys):
    _, short, _ = run(capsys, "provenance", published)
    _, full, _ = run(capsys, "provenance", published, "--full")
    for text in ("liver: cellquilt 0.1.0, ome_tif", "image.ome.tif (path)", "seed = 3", "expand_um = 2.5", "numpy 2"):
        assert text in short
        assert text in full
    assert "resolve_threshold" not in short
    assert "resolve_threshold = 0.5" in full


def test_inputs_are_recorded_by_column_name_size_and_checksum(published, slide):
    attributes = Store(published).attributes
    assert attributes["technology"] == "ome_tif"
    assert attributes["metadata"] == METADATA
    for column, file in (("path", "image.ome.tif"), ("transcripts", "transcripts.parquet")):
        assert {"column": column, **describe_file(slide / file)} in attributes["inputs"]
        assert attributes["checksums"][file] == describe_file(slide / file)["sha256"]
    assert "planted" not in json.dumps(attributes)
    assert str(slide.parent) not in json.dumps(attributes)


def test_what_is_recorded_depends_on_no_time_and_no_place(published, slide, tmp_path):
    elsewhere = shutil.copytree(slide, tmp_path / "other place")
    again = Store(make(elsewhere, tmp_path / "b")).attributes
    once = Store(published).attributes
    for attributes in (once, again):
        for record in attributes["records"]:
            assert {key for key in record if "second" in key} == {"seconds"}
        assert [key for key in attributes if "time" in key or "date" in key] == []
    keep = ("version", "technology", "inputs", "metadata", "parameters", "given", "seeds", "checksums", "command")
    assert {key: once[key] for key in keep} == {key: again[key] for key in keep}


def test_a_file_that_is_another_one_is_refused(published, slide, tmp_path, capsys):
    other = tmp_path / "image.ome.tif"
    data = bytearray((slide / "image.ome.tif").read_bytes())
    data[-1] ^= 1
    other.write_bytes(data)
    code, _, err = run(capsys, "provenance", published, "--path", other)
    assert code == 1
    assert "[record-input-differs]" in err
    code, _, err = run(capsys, "provenance", published, "--path", tmp_path / "nowhere.tif")
    assert code == 1
    assert "[record-input-missing]" in err


def test_files_of_a_folder_are_known_by_their_place_in_it(tmp_path):
    bundle = tmp_path / "liver_1"
    (bundle / "images").mkdir(parents=True)
    (bundle / "images" / "a.tif").write_bytes(b"pixels")
    (bundle / "transcripts.parquet").write_bytes(b"rows")
    inputs = [
        {"column": "path", **describe_file(bundle / "images" / "a.tif"), "name": "images/a.tif"},
        {"column": "path", **describe_file(bundle / "transcripts.parquet")},
    ]
    facts = {"sources": {"path": "liver_1"}, "inputs": inputs}
    origin = remake.Origin("s", records=[{"stage": "convert", "parameters": {}, "facts": facts}])
    moved = bundle.rename(tmp_path / "elsewhere")
    assert remake.check_inputs(origin, {"path": moved}) == ["images/a.tif", "transcripts.parquet"]
    assert remake.check_inputs(origin, {}) == []
    (moved / "images" / "a.tif").unlink()
    with pytest.raises(CellquiltError) as caught:
        remake.check_inputs(origin, {"path": moved})
    assert caught.value.code == "record-input-missing"


def test_a_folder_has_one_checksum_of_its_files_and_their_places(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name / "a").mkdir(parents=True)
        (tmp_path / name / "a" / "x").write_bytes(b"12")
        (tmp_path / name / "y").write_bytes(b"3")
    one, two = describe_file(tmp_path / "one"), describe_file(tmp_path / "two")
    assert one["bytes"] == 3
    assert one["sha256"] == two["sha256"]
    (tmp_path / "two" / "y").rename(tmp_path / "two" / "z")
    assert describe_file(tmp_path / "two")["sha256"] != one["sha256"]


def record(stage: str, method: str | None = None, facts: dict | None = None, **parameters) -> dict:
    if method is not None:
        parameters["segmentation"] = method
    return {"stage": stage, "parameters": parameters, "facts": facts or {}}


def test_commands_of_a_chain_segment_twice_and_replace_the_prior():
    records = [
        record("convert", technology="xenium", min_qv=10.0),
        record("tissue"),
        record("patchify", "cellpose", cellpose_diameter_um=9.0, proseg_samples=7, stardist_gpu=True),
        record("patchify_transcripts", "proseg", proseg_samples=7, cellpose_diameter_um=9.0),
        record("resolve", "cellpose", expand_um=3.0),
        record("resolve", "proseg"),
        record("aggregate", count_z="same", drop_failed=True, average_intensities=False),
    ]
    assert commands(records, "s", {"path": "a b/it's"}) == [
        "cellquilt convert 'a b/it'\"'\"'s' --technology xenium --sample s --output s.zarr --min-qv 10.0",
        "cellquilt tissue s.zarr",
        "cellquilt segment cellpose s.zarr --cellpose-diameter-um 9.0",
        "cellquilt resolve cellpose s.zarr --expand-um 3.0",
        "cellquilt segment proseg s.zarr --proseg-samples 7",
        "cellquilt resolve proseg s.zarr --overwrite",
        "cellquilt aggregate s.zarr --no-average-intensities --count-z same --drop-failed",
    ]


def test_commands_of_vendor_cells_and_of_transcripts_alone():
    vendor = [record("convert", technology="xenium"), record("resolve", "vendor"), record("aggregate")]
    assert [line.split()[1:3] for line in commands(vendor, "s", {"path": "x"})] == [
        ["convert", "x"], ["resolve", "vendor"], ["aggregate", "s.zarr"],
    ]  # fmt: skip
    alone = [record("convert", technology="transcripts"), record("patchify_transcripts", "proseg", prior="cell_id"),
             record("resolve", "proseg")]  # fmt: skip
    assert commands(alone, "s", {"transcripts": "t.csv", "prior_cells": "p"}) == [
        "cellquilt convert --transcripts t.csv --prior-cells p --technology transcripts --sample s --output s.zarr",
        "cellquilt segment proseg s.zarr --prior cell_id",
        "cellquilt resolve proseg s.zarr",
    ]


def test_the_chain_and_the_compared_methods_are_parameters_again():
    records = [record("resolve", "cellpose"), record("resolve", "proseg")]
    origin = remake.Origin("s", records=records, compared=["vendor", "cellpose"])
    assert origin.given == {"segmentation": "cellpose,proseg", "compare": "vendor,cellpose"}


def test_a_store_that_says_nothing_is_refused(tmp_path, capsys):
    with new_store(tmp_path / "empty.zarr", sample="s"):
        pass
    code, _, err = run(capsys, "provenance", tmp_path / "empty.zarr")
    assert code == 1
    assert "[record-missing]" in err
    code, _, err = run(capsys, "provenance", tmp_path / "nowhere.zarr")
    assert code == 1
    assert "[store-missing]" in err
    (tmp_path / "x.h5ad").write_bytes(b"no HDF5")
    code, _, err = run(capsys, "provenance", tmp_path / "x.h5ad")
    assert code == 1
    assert "[table-unreadable]" in err
