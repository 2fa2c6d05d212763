"""qc.json: every number against one computed by hand, the verdict, the assembled store, the table of samples."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import shapely
import yaml
from cellquilt.core.errors import CellquiltError
from cellquilt.core.points import PointsWriter
from cellquilt.core.privacy import scrub
from cellquilt.core.settings import Settings
from cellquilt.core.store import Store
from cellquilt.report.borders import border_check
from cellquilt.report.cells import count_sums
from cellquilt.report.qc import THRESHOLDS, compute_qc, judge, load_thresholds, qc_json, read_qc, sum_transcripts
from cellquilt.report.samples import COLUMNS
from cellquilt.report.stage import assemble_slide, samples_table
from cellquilt.report.view import View
from synthetic_slide import N_CELLS, POINT_TRANSFORMS, make_parts, resolve_facts, transcripts, with_record

ROOT = Path(__file__).resolve().parents[2]
CONTRACT = """
n_transcripts n_inside_image n_assigned n_in_nucleus n_counted n_control n_cells n_cells_pass
median_transcripts_per_cell median_genes_per_cell median_area_um2 tissue_area_um2 transcripts_per_100um2
control_rate_in_cells control_rate_outside border_cell_density_ratio conflict_rate n_cut share_assigned_by_z
patches seconds peak_rss_mb verdict reasons sample
"""


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return make_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def qc(parts):
    return compute_qc(View(parts))


def test_all_keys_of_the_contract_are_there(qc):
    assert [key for key in CONTRACT.split() if key not in qc] == []


def test_cells(qc):
    assert qc["n_cells"] == N_CELLS
    assert qc["n_cells_pass"] == 100
    assert qc["cells_by_qc_reason"] == {"min_transcripts": 5}
    assert qc["median_area_um2"] == 100.0
    # 53 cells with A, B and C, 52 with A and B
    assert qc["median_transcripts_per_cell"] == 3.0
    assert qc["median_genes_per_cell"] == 3.0


def test_transcripts(qc):
    counted = 105 + 105 + 53
    assert qc["n_counted"] == counted
    assert qc["n_transcripts"] == counted + 5 + 3 + 10 + 20 + 7
    assert qc["n_inside_image"] == qc["n_transcripts"] - 7
    assert qc["n_assigned"] == counted + 5 + 3
    assert qc["n_in_nucleus"] == 105 + 5 + 3
    assert qc["n_control"] == 15
    assert qc["n_countable_inside_image"] == counted + 20
    assert qc["share_assigned"] == pytest.approx((counted + 8) / (counted + 38))
    assert qc["n_counts_differing"] == 0


def test_controls_are_compared_inside_and_outside_cells(qc):
    # Inside: 5 of 263 counted + 5 controls; outside: 10 of 10 + 20. Rows of low quality and outside the image are out.
    assert qc["control_rate_in_cells"] == pytest.approx(5 / 268)
    assert qc["control_rate_outside"] == pytest.approx(10 / 30)


def test_areas_and_densities(qc):
    assert qc["tissue_area_um2"] == 300 * 150
    assert qc["transcripts_per_100um2"] == pytest.approx(100 * 283 / 45_000)


def test_border_density_is_corrected_by_area(qc):
    # Inner sides at x = 280 and 320 px: the zone of ± 20 px spans 260-340 px, 40 µm × 150 µm; it holds the columns of
    # cells at 270 and 310 px.
    assert qc["n_border_cells"] == 14
    assert qc["border_area_um2"] == pytest.approx(6000)
    assert qc["n_interior_cells"] == 91
    assert qc["interior_area_um2"] == pytest.approx(39_000)
    assert qc["border_cell_density_ratio"] == pytest.approx(1.0)
    assert sum(ring["n_cells"] for ring in qc["border_profile"]) == N_CELLS
    assert sum(ring["area_um2"] for ring in qc["border_profile"]) == pytest.approx(45_000)


def test_share_by_plane(qc):
    rows = transcripts().to_pandas()
    inside = rows.x < 300
    for plane in (0, 1):
        here = rows[inside & (rows.z_plane == plane)]
        assert qc["share_assigned_by_z"][str(plane)] == pytest.approx(here.cell_id.notna().mean())
        assert qc["transcripts_by_z"][str(plane)] == len(here)


def test_patches_time_and_memory(qc):
    assert qc["conflict_rate"] == pytest.approx(7 / 105)
    assert qc["n_cut"] == 0
    assert qc["patches"] == {"n": 2, "n_failed": 0, "n_missing": 0, "failed": []}
    expected = {"convert": 2.5, "tissue": 0.5, "patchify": 1.0, "segment": 10.0, "resolve": 1.5, "aggregate": 2.0}
    assert qc["seconds"] == {**expected, "total": 17.5}
    assert qc["peak_rss_mb"]["segment"] == 700.0
    assert qc["peak_rss_mb"]["max"] == 700.0


def test_reading_back_keeps_every_key(qc, tmp_path):
    (tmp_path / "qc.json").write_text(qc_json(qc))
    assert sorted(read_qc(tmp_path / "qc.json")) == sorted(qc)


def test_json_is_sorted_finite_and_repeatable(qc, parts):
    text = qc_json(qc)
    assert list(json.loads(text)) == sorted(json.loads(text))
    assert text == qc_json(compute_qc(View(parts)))
    assert "NaN" not in text
    assert "Infinity" not in text


def test_the_slide_gets_a_warning_with_reasons_in_plain_words(qc):
    assert qc["verdict"] == "WARN"
    assert [reason["check"] for reason in qc["reasons"]] == ["few_transcripts_per_cell"]
    assert qc["reasons"][0]["text"] == "A median of 3 counted transcripts a cell (usual: at least 10)."
    assert qc["reasons"][0]["advice"]


def test_an_image_without_transcripts_has_no_transcript_numbers(tmp_path):
    qc = compute_qc(View(make_parts(tmp_path, points=False)))
    for key in CONTRACT.split()[:6]:
        assert qc[key] is None, key
    assert qc["median_transcripts_per_cell"] is None
    assert qc["control_rate_in_cells"] is None
    assert qc["share_assigned_by_z"] is None
    assert qc["n_cells"] == N_CELLS
    assert qc["verdict"] == "PASS"


def test_an_empty_slide_is_judged_not_divided_by_zero(tmp_path):
    qc = compute_qc(View(make_parts(tmp_path, empty=True)))
    assert (qc["n_cells"], qc["n_transcripts"], qc["n_counted"]) == (0, 0, 0)
    assert qc["tissue_area_um2"] == 0.0
    for key in ("median_area_um2", "transcripts_per_100um2", "share_assigned", "border_cell_density_ratio"):
        assert qc[key] is None, key
    assert qc["verdict"] == "FAIL"
    assert [reason["check"] for reason in qc["reasons"]] == ["no_cells"]


def test_one_patch_has_no_border(parts):
    assert compute_qc(View([part for part in parts if "patches" not in part.name]))["n_border_cells"] is None
    windows = np.array([[0.0, 0, 100, 100]])
    assert border_check(windows, (100, 100), None, np.array([[50.0, 50.0]]), 1.0) is None


def test_doubled_and_lost_cells_show_in_the_ratio():
    rng = np.random.default_rng(3)
    xy = rng.uniform(0, 2000, (40_000, 2))
    windows = np.array([[0, 0, 1020, 2000], [980, 0, 2000, 2000]], dtype=float)
    near = (np.abs(xy[:, 0] - 980) <= 10) | (np.abs(xy[:, 0] - 1020) <= 10)

    def ratio(points):
        return border_check(windows, (2000, 2000), None, points, 1.0).ratio

    by_chance = ratio(xy)
    assert by_chance == pytest.approx(1.0, abs=0.11)  # 800 cells in the zone: 3 standard deviations
    assert ratio(np.concatenate([xy, xy[near]])) == pytest.approx(2 * by_chance)
    assert ratio(xy[~near | (np.arange(len(xy)) % 2 == 0)]) == pytest.approx(by_chance / 2, abs=0.05)


def test_borders_are_counted_in_tissue_and_patches_only():
    # Tissue covers the right half; the left patch was left out, so that only the right patch's left side is a border.
    tissue = np.array([shapely.box(400, 0, 1000, 1000)], dtype=object)
    found = border_check(
        np.array([[500.0, 0, 1000, 1000]]), (1000, 1000), tissue, np.array([[505.0, 5], [450, 5]]), 1.0
    )
    assert found.border_um2 == pytest.approx(10 * 1000)
    assert found.n_border == 1
    assert found.interior_um2 == pytest.approx(490 * 1000)
    assert found.ratio is None  # no cell in the interior


def test_failed_patches_are_named_and_judged(parts, tmp_path):
    patches = resolve_facts()["patches"]
    patches[1]["error"] = {"code": "patch-failed", "message": "cannot read '/planted folder/x.npy'", "hint": ""}
    qc = compute_qc(View(with_record(parts, tmp_path, "resolve", facts={"patches": patches})))
    assert qc["patches"]["n_failed"] == 1
    assert qc["patches"]["failed"][0]["index"] == 1
    assert qc["patches"]["failed"][0]["error"]["message"] == "cannot read 'x.npy'"
    assert qc["verdict"] == "FAIL"
    assert qc["reasons"][0]["check"] == "patches_failed"


def test_patches_that_never_came_back_fail_the_slide(parts, tmp_path):
    one = resolve_facts()["patches"][:1]
    qc = compute_qc(View(with_record(parts, tmp_path, "resolve", facts={"patches": one})))
    assert (qc["patches"]["n"], qc["patches"]["n_missing"], qc["verdict"]) == (2, 1, "FAIL")


def test_continuous_z_is_taken_in_steps_of_a_micron(tmp_path):
    z = np.linspace(0, 9.99, 1000)
    rows = pa.table({"x": np.ones(1000), "y": np.ones(1000), "z": z, "cell_id": pa.array(["a"] * 500 + [None] * 500)})
    with PointsWriter(tmp_path / "points", POINT_TRANSFORMS) as writer:
        writer.write(rows)
    sums = sum_transcripts(tmp_path / "points", (10, 10))
    assert sums.z_unit == "um"
    assert list(sums.by_z) == list(range(11))[: len(sums.by_z)]
    assert sum(total for total, _ in sums.by_z.values()) == 1000
    assert sums.by_z[2][1] == sums.by_z[2][0]
    assert sums.by_z[8][1] == 0


def test_counts_that_disagree_fail_the_slide(qc):
    verdict, reasons = judge({**qc, "n_counts_differing": 4}, load_thresholds())
    assert verdict == "FAIL"
    assert reasons[0]["text"].startswith("The cell table and the transcripts disagree by 4 counts")


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ({"x": 5}, "PASS"),
        ({"x": 2}, "PASS"),  # at the limit
        ({"x": 1.9}, "WARN"),
        ({"x": 0}, "FAIL"),
        ({"x": 11}, "WARN"),
        ({"x": None}, "PASS"),
        ({}, "PASS"),
        ({"x": 0, "n": 5}, "FAIL"),
    ],
)
def test_limits(numbers, expected):
    checks = [{"check": "c", "metric": "x", "warn_below": 2, "fail_below": 1, "warn_above": 10, "text": "{value}"}]
    assert judge(numbers, checks)[0] == expected


def test_a_check_waits_for_enough_cells():
    checks = [{"check": "c", "metric": "x", "warn_below": 2, "only_if": {"n": 400}, "text": "{value}"}]
    assert judge({"x": 0, "n": 399}, checks)[0] == "PASS"
    assert judge({"x": 0, "n": 400}, checks)[0] == "WARN"
    assert judge({"x": 0, "n": None}, checks)[0] == "PASS"


def test_reasons_come_with_the_worst_first():
    checks = [
        {"check": "a", "metric": "x", "warn_below": 2, "text": "a"},
        {"check": "b", "metric": "x", "fail_below": 2, "text": "b"},
    ]
    verdict, reasons = judge({"x": 1}, checks)
    assert (verdict, [reason["check"] for reason in reasons]) == ("FAIL", ["b", "a"])


def test_every_shipped_check_names_a_number_of_qc_json_and_says_what_to_do(qc):
    checks = load_thresholds()
    for check in checks:
        assert check["metric"] in qc, check["check"]
        assert check["advice"], check["check"]
        assert all(key in qc for key in check.get("only_if", {}))
    assert len({check["check"] for check in checks}) == len(checks)


def test_the_file_in_assets_is_the_one_that_counts():
    shown = ROOT / "assets" / "qc_thresholds.yml"
    assert shown.read_bytes() == THRESHOLDS.read_bytes()


@pytest.mark.parametrize(
    ("text", "code", "part"),
    [
        ("a: 1", "qc-thresholds-invalid", "not a list"),
        ("- check: x", "qc-thresholds-invalid", "check 1: lacks metric, text"),
        ("- {check: x, metric: y, text: z}", "qc-thresholds-invalid", "has no limit"),
        ("- {check: x, metric: y, text: z, warn_under: 1}", "qc-thresholds-invalid", "unknown key warn_under"),
        ("- {check: x, metric: y, text: z, warn_below: low}", "qc-thresholds-invalid", "warn_below is 'low'"),
        ("- {check: x, metric: y, text: '{sample}', warn_below: 1}", "qc-thresholds-invalid", "may hold"),
        ("- [", "qc-thresholds-unreadable", "cannot be read"),
    ],
)
def test_a_wrong_file_of_limits_is_named(tmp_path, text, code, part):
    path = tmp_path / "limits.yml"
    path.write_text(text)
    with pytest.raises(CellquiltError) as caught:
        load_thresholds(path)
    assert caught.value.code == code
    assert part in caught.value.message


def test_count_sums_equal_the_matrix_whatever_the_pieces(tmp_path, monkeypatch):
    import anndata
    import scipy.sparse
    import zarr
    from cellquilt.report import cells

    rng = np.random.default_rng(1)
    dense = rng.poisson(0.4, (50, 7))
    dense[[0, 1, 20, 49]] = 0
    matrix = scipy.sparse.csr_matrix(dense)
    anndata.AnnData(matrix).write_zarr(tmp_path / "a.zarr")
    group = zarr.open_group(str(tmp_path / "a.zarr"), mode="r")["X"]
    for entries in (1, 7, 10_000):
        monkeypatch.setattr(cells, "_ENTRIES", entries)
        sums, nonzero, columns = count_sums(group)
        assert np.array_equal(sums, dense.sum(axis=1))
        assert np.array_equal(nonzero, np.count_nonzero(dense, axis=1))
        assert np.array_equal(columns, dense.sum(axis=0))


def test_memory_does_not_grow_with_the_transcripts(parts, monkeypatch):
    from cellquilt.report import qc as module

    seen = []
    original = module.iter_points

    def watched(*args):
        for batch in original(*args):
            seen.append(batch.num_rows)
            yield batch

    whole = compute_qc(View(parts))
    monkeypatch.setattr(module, "iter_points", watched)
    monkeypatch.setattr(module, "_BATCH_ROWS", 50)
    assert compute_qc(View(parts)) == whole
    assert max(seen) <= 50


# --- assemble


@pytest.fixture(scope="module")
def assembled(parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("assembled")
    assemble_slide(parts, folder / "s1.zarr", qc=folder / "qc.json", settings=Settings())
    return folder


def test_assemble_publishes_a_store_that_spatialdata_reads(assembled):
    import spatialdata

    sdata = spatialdata.read_zarr(assembled / "s1.zarr")
    table = sdata.tables["table"]
    points = sdata.points["transcripts"].compute()
    counted = points[points.cell_id.notna() & ~points.is_control & points.passes_qv]
    per_cell = counted.groupby("cell_id").size().reindex(table.obs_names, fill_value=0)
    assert np.array_equal(np.asarray(table.X.sum(axis=1)).ravel(), per_cell.to_numpy())


def test_attributes_say_how_it_was_made(assembled):
    attributes = Store(assembled / "s1.zarr").attributes
    assert attributes["verdict"] == "WARN"
    assert attributes["seeds"] == {"seed": 7}
    assert attributes["checksums"] == {"nuclei.npz": "c0ffee"}
    assert attributes["parameters"]["patch_width_px"] == 300
    assert attributes["given"] == ["patch_width_px", "pixel_size_um", "seed"]
    assert attributes["command"][0] == "cellquilt convert SLIDE --sample s1 --output s1.zarr --pixel-size-um 0.5"
    assert [record["stage"] for record in attributes["records"]] == [
        "convert",
        "tissue",
        "patchify",
        "resolve",
        "aggregate",
    ]


def test_qc_of_the_assembled_store_is_that_of_its_parts(assembled):
    assert (assembled / "qc.json").read_text() == qc_json(compute_qc(View([assembled / "s1.zarr"])))


def test_nothing_is_replaced_without_being_told(assembled, parts):
    before = (assembled / "qc.json").read_bytes()
    with pytest.raises(CellquiltError) as caught:
        assemble_slide(parts, assembled / "s1.zarr", qc=assembled / "qc.json", settings=Settings())
    assert caught.value.code == "output-exists"
    assemble_slide(parts, assembled / "s1.zarr", qc=assembled / "qc.json", settings=Settings(), overwrite=True)
    assert (assembled / "qc.json").read_bytes() == before
    assert sorted(path.name for path in assembled.iterdir()) == ["qc.json", "s1.zarr"]


def test_no_place_or_person_in_what_is_published(parts, tmp_path):
    folder = tmp_path / "planted home" / "planted_user"
    parts = with_record(parts, folder, "convert", cellpose_model=f"{folder}/models/liver.pt")
    assemble_slide(parts, tmp_path / "s1.zarr", qc=tmp_path / "qc.json", settings=Settings())
    published = [tmp_path / "qc.json", tmp_path / "s1.zarr" / "zarr.json"]
    attributes = Store(tmp_path / "s1.zarr").attributes
    assert attributes["parameters"]["cellpose_model"] == "liver.pt"
    assert "planted" not in json.dumps(attributes) + published[0].read_text()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/anna/slide 1/x.tif", "x.tif"),
        ("file:///home/anna/x.tif", "x.tif"),
        ("~/x.tif", "x.tif"),
        ("C:\\Users\\anna\\x.tif", "x.tif"),
        ("cannot open /home/anna/x.tif: no such file", "cannot open x.tif: no such file"),
        ("OSError('/home/an na/x.tif')", "OSError('x.tif')"),
        ("https://anna:secret@example.org/x", "https://example.org/x"),
        ("3 µm/px and/or 1/2", "3 µm/px and/or 1/2"),
        ("per 100 /µm²", "per 100 /µm²"),
        ("liver_1", "liver_1"),
        ("", ""),
    ],
)
def test_scrub(text, expected):
    assert scrub(text) == expected
    assert scrub({"a": [text, 1, None]}) == {"a": [expected, 1, None]}


def test_scrub_knows_this_folder_with_blanks(tmp_path, monkeypatch):
    folder = tmp_path / "planted home" / "work dir"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    assert scrub(f"cannot open {folder}/x.tif at all") == "cannot open x.tif at all"


# --- samples.tsv


def _rows(path):
    lines = path.read_text().splitlines()
    return [dict(zip(lines[0].split("\t"), line.split("\t"), strict=True)) for line in lines[1:]]


def test_samples_keep_their_order_and_failed_ones_stay(assembled, tmp_path):
    samples_table([assembled / "qc.json"], "b2,s1,a0", tmp_path / "samples.tsv")
    rows = _rows(tmp_path / "samples.tsv")
    assert [row["sample"] for row in rows] == ["b2", "s1", "a0"]
    assert [row["status"] for row in rows] == ["failed", "done", "failed"]
    done = rows[1]
    assert done["verdict"] == "WARN"
    assert done["n_cells"] == "105"
    assert done["share_assigned"] == f"{271 / 301:.6g}"
    assert done["seconds"] == "17.5"
    assert done["reasons"] == "few_transcripts_per_cell"
    assert {rows[0][column] for column in COLUMNS if column not in ("sample", "status")} == {""}


def test_checksums_and_the_table_for_multiqc(assembled, tmp_path):
    first = json.loads((assembled / "qc.json").read_text())
    other = {**first, "sample": "s2", "n_cells": 7, "checksums": {"nuclei.npz": "ab", "a b.tif": "cd"}}
    (tmp_path / "other.json").write_text(json.dumps(other))
    qcs = [tmp_path / "other.json", assembled / "qc.json"]
    samples_table(qcs, "s1,s2", tmp_path / "samples.tsv", checksums=tmp_path / "sums.tsv", multiqc=tmp_path)
    rows = [line.split("\t") for line in (tmp_path / "sums.tsv").read_text().splitlines()]
    assert rows[0] == ["sample", "file", "sha256"]
    assert rows[1:] == sorted(
        [["s1", name, value] for name, value in first["checksums"].items()]
        + [["s2", "a b.tif", "cd"], ["s2", "nuclei.npz", "ab"]]
    )
    lines = (tmp_path / "cellquilt_samples_mqc.tsv").read_text().splitlines()
    head = {key: json.loads(value) for key, value in (line[2:].split(": ", 1) for line in lines if line[0] == "#")}
    table = [line.split("\t") for line in lines if line[0] != "#"]
    assert set(head["headers"]) == set(table[0][1:])
    assert [dict(zip(table[0], row, strict=True))["n_cells"] for row in table[1:]] == ["105", "7"]


def test_samples_without_any_result(tmp_path):
    samples_table([], "a,b", tmp_path / "samples.tsv")
    assert [row["status"] for row in _rows(tmp_path / "samples.tsv")] == ["failed", "failed"]


def test_samples_refuse_strangers_twins_and_garbage(assembled, tmp_path):
    def code(qcs, names):
        with pytest.raises(CellquiltError) as caught:
            samples_table(qcs, names, tmp_path / "samples.tsv")
        return caught.value.code

    garbage = tmp_path / "qc.json"
    garbage.write_text("{}")
    assert code([assembled / "qc.json"], "s2") == "sample-unknown"
    assert code([assembled / "qc.json"] * 2, "s1") == "sample-duplicate"
    assert code([garbage], "s1") == "qc-unreadable"
    assert not (tmp_path / "samples.tsv").exists()


def test_thresholds_are_valid_yaml_of_plain_entries():
    for entry in yaml.safe_load(THRESHOLDS.read_text()):
        assert re.fullmatch(r"[a-z_]+", entry["check"])
        assert os.sep not in entry["text"]
