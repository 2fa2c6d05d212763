"""What a run will take: sizes that stores record, the table of costs, tasks, hours, memory, disk and money."""

import csv
import gzip
import json
import re
import subprocess
import sys
from pathlib import Path

import cellquilt
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from cellquilt.core.errors import CellquiltError
from cellquilt.core.images import level_shapes
from cellquilt.core.settings import Settings
from cellquilt.core.sizes import measured, recorded, size_of
from cellquilt.core.store import Store
from cellquilt.costs import Costs, costs_of
from cellquilt.costs.plan import Task
from cellquilt.costs.prices import PRICES, read_prices
from cellquilt.costs.table import TABLE, cpu_seconds, memory_mb, minutes, peak_mb, table
from cellquilt.patches.bundle import Bundle
from cellquilt.readers.base import convert_slide
from cellquilt.readers.transcript_table import TranscriptTable
from cellquilt.segment.stages import find_tissue, patchify_image, patchify_transcripts
from cellquilt.simulate import simulate
from cellquilt.simulate.demo import make_demo_input
from traces import took

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "tests" / "data"
GENERIC = {"segmentation": "generic", "patch_width_px": 256, "patches_per_task": 2}


@pytest.fixture(scope="module")
def slides(tmp_path_factory) -> Path:
    """A sheet of a small simulated slide, its raw store, and its bundles."""
    folder = tmp_path_factory.mktemp("slides")
    simulate(folder / "sim", width_px=512, seed=3)
    slide = folder / "sim" / "slide_0"
    convert_slide(
        slide / "image.ome.tif", technology="ome_tif", transcripts=slide / "transcripts.parquet",
        output=folder / "s.raw.zarr", settings=Settings(),
    )  # fmt: skip
    find_tissue(folder / "s.raw.zarr", settings=Settings(tissue_mode="none"), output=folder / "s.tissue.zarr")
    patchify_image(
        folder / "s.raw.zarr", settings=Settings(GENERIC), tissue=folder / "s.tissue.zarr", bundles=folder / "bundles",
        output=folder / "s.patches.zarr",
    )  # fmt: skip
    return folder


def sheet(folder: Path, *rows: dict[str, str]) -> Path:
    path = folder / "sheet.csv"
    columns = list(dict.fromkeys(["sample", "technology", "path", *(name for row in rows for name in row)]))
    with path.open("w", newline="") as file:
        out = csv.DictWriter(file, columns)
        out.writeheader()
        out.writerows(rows)
    return path


def simulated(slides: Path, sample: str, **more: str) -> dict[str, str]:
    slide = slides / "sim" / "slide_0"
    return {
        "sample": sample,
        "technology": "ome_tif",
        "path": str(slide / "image.ome.tif"),
        "transcripts": str(slide / "transcripts.parquet"),
        **more,
    }


# --- what stores say of themselves


def test_stores_and_bundles_record_how_much_they_hold(slides):
    raw = slides / "s.raw.zarr"
    n = pq.read_metadata(slides / "sim/slide_0/transcripts.parquet").num_rows
    assert recorded(raw) == Store(raw).attributes["size"] == {"pixels": 2 * 512 * 512, "transcripts": n}
    assert recorded(slides / "s.patches.zarr") == {"cells": 4}
    bundles = sorted((slides / "bundles").iterdir())
    assert len(bundles) == 2
    for bundle in bundles:
        shapes = [json.loads(path.read_text())["shape"] for path in bundle.glob("*/zarr.json")]
        pixels = [int(np.prod(shape)) for shape in shapes]
        assert recorded(bundle) == {"pixels": sum(pixels), "patch_pixels": max(pixels)}
    assert size_of([raw, *bundles])["pixels"] == 2 * 512 * 512 + sum(recorded(bundle)["pixels"] for bundle in bundles)


def test_bundles_of_transcripts_record_how_many_they_hold(slides, tmp_path):
    settings = Settings(transcripts_per_patch=10_000, transcripts_patches_per_task=2, transcripts_patch_overlap_um=5)
    bundles = patchify_transcripts(
        slides / "s.raw.zarr", settings=settings, bundles=tmp_path / "bundles", output=tmp_path / "p.zarr"
    )
    for bundle in bundles:
        held = [pq.read_metadata(path).num_rows for path in bundle.glob("*/transcripts.parquet")]
        assert recorded(bundle) == {"transcripts": sum(held), "patch_transcripts": max(held)}


def test_what_cannot_be_read_counts_as_nothing(tmp_path):
    (tmp_path / "broken.zarr").mkdir()
    (tmp_path / "broken.zarr" / "zarr.json").write_text("[]")
    assert recorded(tmp_path / "broken.zarr") == {}
    assert size_of([tmp_path / "missing", tmp_path / "broken.zarr"]) == {"bytes": 2}
    assert measured(tmp_path) == {}


def test_a_patch_task_gets_little_more_than_its_own_pixels(slides):
    for path in (slides / "bundles").iterdir():
        bundle = Bundle(path)
        windows = [(y1 - y0) * (x1 - x0) for y0, y1, x0, x1 in (patch.window for patch in bundle.patches)]
        own = sum(windows) * len(bundle.channels) * np.dtype("uint16").itemsize
        assert sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) <= 2 * own


def test_a_bundle_has_few_files_and_a_large_sample_too(slides):
    for bundle in (slides / "bundles").iterdir():
        assert sum(path.is_file() for path in bundle.rglob("*")) == 1 + 2 * 2  # a patch: its pixels, its description
    most = 1 + Settings()["patches_per_task"] * (1 + 5)
    assert most <= 50  # with five channels
    # An image has a file a chunk and channel, and a description a level.
    shapes = level_shapes(512, 512)
    files = [path for path in (slides / "s.raw.zarr/images/image").rglob("*") if path.is_file()]
    assert len(files) == 1 + len(shapes) + 2 * len(shapes)
    chunks = sum(-(-height // 2048) * -(-width // 2048) for height, width in level_shapes(16384, 16384))
    assert 5 * chunks < 500


@pytest.mark.parametrize("suffix", ["csv", "csv.gz", "parquet"])
def test_rows_of_a_table_are_told_without_reading_it(tmp_path, suffix, monkeypatch):
    rng = np.random.default_rng(0)
    n = 30_000
    x, y = rng.random(n) * 1000, rng.random(n) * 1000
    path = tmp_path / f"t.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.table({"x": x, "y": y, "gene": ["a"] * n}), path)
    else:
        text = "x,y,gene\n" + "".join(
            f"{a:.4f},{b:.4f},Gene{i % 97}\n" for i, (a, b) in enumerate(zip(x, y, strict=True))
        )
        (path.write_bytes(gzip.compress(text.encode())) if suffix.endswith("gz") else path.write_text(text))
    monkeypatch.setattr("cellquilt.readers.transcript_table._SAMPLE_BYTES", 100_000)
    found = TranscriptTable(path).about_rows()
    assert found == (n if suffix == "parquet" else pytest.approx(n, rel=0.05))


# --- the table


def processes() -> set[str]:
    """All processes and the names under which subworkflows include them."""
    found = {re.search(r"^process (\w+)", path.read_text(), re.M)[1] for path in (ROOT / "modules").glob("*/main.nf")}
    graph = "".join(path.read_text() for path in (ROOT / "subworkflows").glob("*.nf"))
    included = re.findall(r" as ([A-Z]\w+)", graph)
    return found | {name for name in included if not name.startswith("PREVIEW_")}


def test_every_process_has_an_entry_with_where_it_is_from():
    assert set(table()["processes"]) == processes() | {"OTHERS"}
    for name, costs in table()["processes"].items():
        numbers = [costs["memory"]["base_mb"], costs["cpu"]["base_s"]]
        for part in (costs["memory"]["streamed_mb"], costs["memory"]["held_mb"], costs["cpu"]["per_million_s"]):
            numbers += part.values()
        assert all(number >= 0 for number in numbers), name
        assert re.search(
            r"bench_resources\.py, \d{4}-\d\d-\d\d: \d+ tasks|not measured|reads headers", costs["measured"]
        )


def test_every_process_asks_by_what_it_gets():
    for path in (ROOT / "modules").glob("*/main.nf"):
        text = path.read_text()
        assert text.count("Resources.memory(task, ") == text.count("Resources.time(task, ") == 1, path


def test_no_task_asks_for_a_fortune():
    huge = {"pixels": 10**12, "transcripts": 10**10, "cells": 10**8, "bytes": 10**12, "patch_transcripts": 10**10}
    for process in table()["processes"]:
        assert 512 <= memory_mb(process, {}) <= 8 << 10, process
        assert memory_mb(process, huge, attempt=3) <= 128 << 10, process
        assert 60 <= minutes(process, {}) <= minutes(process, huge, attempt=3) <= 7 * 24 * 60, process
        assert memory_mb(process, {}, attempt=2) == 2 * memory_mb(process, {}), process
    # A slide of 128k × 128k pixels: what is streamed is bounded by the setting.
    slide = {"pixels": 5 * 131072**2, "transcripts": 10**9}
    for process in ("TISSUE", "PATCHIFY", "AGGREGATE", "ASSEMBLE", "CONVERT"):
        assert memory_mb(process, slide) <= 6 << 10, process
    assert memory_mb("AGGREGATE", slide, 20_000) > memory_mb("AGGREGATE", slide, 1500)


def test_the_files_in_assets_and_the_page_are_those_that_count():
    assert (ROOT / "assets/resources.json").read_bytes() == TABLE.read_bytes()
    assert (ROOT / "assets/prices.yml").read_bytes() == PRICES.read_bytes()
    page = (ROOT / "docs/resources.md").read_text()
    for name, costs in table()["processes"].items():
        row = next(line for line in page.splitlines() if line.startswith(f"| `{name}` |"))
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[1] == f"{costs['memory']['base_mb']:g}", name
        assert cells[4] == f"{costs['cpu']['base_s']:g}", name


# --- the estimate


def test_tasks_are_those_that_the_pipeline_starts(slides, tmp_path):
    found = cellquilt.estimate(
        sheet(tmp_path, simulated(slides, "a"), simulated(slides, "b", compare="vendor")), **GENERIC
    )
    assert found.samples["a"].tasks == {
        "AGGREGATE": 1, "ASSEMBLE": 1, "CONVERT": 1, "EXPLORER": 1, "PATCHIFY": 1, "REPORT": 1, "RESOLVE": 1,
        "SEGMENT_GENERIC": 2, "TISSUE": 1,
    }  # fmt: skip
    assert found.samples["b"].tasks == {**found.samples["a"].tasks, "AGGREGATE": 2, "COMPARE": 1, "RESOLVE": 2}
    assert found.total.tasks["SAMPLES"] == 1
    assert sum(found.total.tasks.values()) == 10 + 13 + 1


@pytest.mark.parametrize(
    ("parameters", "more"),
    [
        ({"segmentation": "proseg"}, {"PATCHIFY_TRANSCRIPTS": 1, "SEGMENT_PROSEG": 1, "RESOLVE_TRANSCRIPTS": 1}),
        (
            {"segmentation": "cellpose,baysor", "transcripts_per_patch": 5000, "export": "vpt"},
            {"TISSUE": 1, "PATCHIFY": 1, "SEGMENT_CELLPOSE": 1, "RESOLVE": 1, "PATCHIFY_TRANSCRIPTS": 1,
             "SEGMENT_BAYSOR": 5, "RESOLVE_TRANSCRIPTS": 1, "EXPORT": 1},
        ),
        (
            {"segmentation": "cellpose", "cellpose_generation": "4", "domains": "train"},
            {"TISSUE": 1, "PATCHIFY": 1, "SEGMENT_CELLPOSE4": 1, "RESOLVE": 1, "DOMAINS_PREPARE": 1,
             "DOMAINS_EMBED": 1, "DOMAINS_TRAIN": 1, "DOMAINS_ASSIGN": 1, "DOMAINS_REPORT": 1},
        ),
        ({"segmentation": "stardist"}, {"TISSUE": 1, "PATCHIFY": 1, "SEGMENT_STARDIST": 1, "RESOLVE": 1}),
    ],
)  # fmt: skip
def test_tasks_of_other_methods(slides, tmp_path, parameters, more):
    found = cellquilt.estimate(sheet(tmp_path, simulated(slides, "a")), **parameters)
    always = {"CONVERT": 1, "AGGREGATE": 1, "ASSEMBLE": 1, "REPORT": 1, "EXPLORER": 1, "SAMPLES": 1}
    n = pq.read_metadata(slides / "sim/slide_0/transcripts.parquet").num_rows
    if "SEGMENT_BAYSOR" in more:
        more = {**more, "SEGMENT_BAYSOR": -(-n // 5000)}
    assert found.total.tasks == {**always, **more}


def test_no_pixel_and_no_transcript_is_read(slides, tmp_path, monkeypatch):
    def read(*_: object, **__: object) -> None:
        raise AssertionError("read")

    monkeypatch.setattr("cellquilt.readers.tiff.TiffImage.read", read)
    monkeypatch.setattr("cellquilt.readers.transcript_table.TranscriptTable.batches", read)
    found = cellquilt.estimate(sheet(tmp_path, simulated(slides, "a")), **GENERIC)
    slide = slides / "sim" / "slide_0"
    files = (slide / "image.ome.tif", slide / "transcripts.parquet")
    assert found.total.raw_bytes == sum(path.stat().st_size for path in files)


@pytest.mark.slow
def test_the_estimate_of_the_demo_is_that_of_its_trace(tmp_path):
    # Recorded by scripts/demo.sh on two cores, beside much other work: so it is the CPU time used that is compared.
    with (DATA / "demo_trace.tsv").open(newline="") as file:
        tasks, cpu_s, peak_mb = took(csv.DictReader(file, delimiter="\t"))
    found = cellquilt.estimate(make_demo_input(tmp_path / "input"), domains="train", domains_n=4, explorer=False)
    assert found.total.tasks == tasks
    assert cpu_s / 2 < 3600 * found.total.cpu_h < 2 * cpu_s
    assert peak_mb / 2 < found.total.peak_mb < 2 * peak_mb


def test_hours_memory_and_gpus_add_up():
    tasks = [
        Task("SEGMENT_CELLPOSE", {"pixels": 10**8, "patch_pixels": 10**7}, 3),
        Task("SEGMENT_CELLPOSE", {"pixels": 10**8, "patch_pixels": 10**7}, 1, cpus=2, gpu=True),
        Task("RESOLVE", {"bytes": 10**7}),
    ]
    found = costs_of(tasks)
    patch, resolve = cpu_seconds("SEGMENT_CELLPOSE", tasks[0].sizes), cpu_seconds("RESOLVE", tasks[2].sizes)
    assert found.tasks == {"RESOLVE": 1, "SEGMENT_CELLPOSE": 4}
    assert found.cpu_h == pytest.approx((3 * patch + 2 * patch / 15 + resolve) / 3600)
    assert found.gpu_h == pytest.approx(patch / 15 / 3600)
    assert found.peak_mb == pytest.approx(peak_mb("SEGMENT_CELLPOSE", tasks[0].sizes))
    assert found.memory_mb == memory_mb("SEGMENT_CELLPOSE", tasks[0].sizes)
    twice = Costs()
    twice.add(found)
    twice.add(found)
    assert (twice.cpu_h, twice.peak_mb) == (pytest.approx(2 * found.cpu_h), found.peak_mb)


def test_money_is_hours_and_room_by_the_prices(slides, tmp_path):
    prices = tmp_path / "prices.yml"
    prices.write_text("currency: EUR\ndate: 2026-01\noffers: {ours: {cpu_h: 2, storage_gb_month: 1}, free: {}}\n")
    found = cellquilt.estimate(sheet(tmp_path, simulated(slides, "a")), prices=prices, **GENERIC)
    assert found.money["free"]["total"] == 0
    assert found.money["ours"]["cpu"] == pytest.approx(2 * found.total.cpu_h)
    assert found.money["ours"]["total"] == pytest.approx(2 * found.total.cpu_h + found.total.published_bytes / 1e9)
    assert "EUR  ours" in str(found)
    assert "2026-01" in str(found)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("[", "cannot be read"),
        ("currency: USD", "has no offers"),
        ("offers: {x: {cpu: 1}}", 'offer "x" may have cpu_h'),
        ("offers: {x: {cpu_h: cheap}}", "cpu_h is 'cheap', a number from 0 on was expected"),
        ("offers: {x: {cpu_h: -1}}", "cpu_h is -1"),
    ],
)
def test_wrong_prices_are_named(tmp_path, text, part):
    (tmp_path / "mine.yml").write_text(text)
    with pytest.raises(CellquiltError, match=re.escape(part)) as caught:
        read_prices(tmp_path / "mine.yml")
    assert caught.value.code == "prices-invalid"
    assert "mine.yml" in caught.value.message


def test_a_slide_that_cannot_be_opened_is_named(tmp_path):
    (tmp_path / "x.tif").write_bytes(b"no image at all")
    with pytest.raises(CellquiltError, match='sample "bad"') as caught:
        cellquilt.estimate(sheet(tmp_path, {"sample": "bad", "technology": "ome_tif", "path": "x.tif"}))
    assert caught.value.code == "not-a-tiff"


def test_the_command_prints_a_table_or_json(slides, tmp_path):
    path = sheet(tmp_path, simulated(slides, "a"))
    command = [sys.executable, "-m", "cellquilt", "estimate", str(path), "segmentation=generic", "patch_width_px=256"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert re.search(r"^total +\d+ ", shown, re.M)
    request = [
        "--settings",
        json.dumps({"sheet": str(path), **GENERIC}),
        "--json",
        "--json-output",
        str(tmp_path / "e.json"),
    ]
    asked = subprocess.run([*command[:4], *request], capture_output=True, text=True, check=True).stdout
    assert json.loads(asked) == json.loads((tmp_path / "e.json").read_text())
    assert json.loads(asked)["total"]["tasks"]["SEGMENT_GENERIC"] == 2


def test_a_table_of_cells_costs_its_domains_only(tmp_path):
    import anndata

    table_ = anndata.AnnData(np.ones((50, 3), dtype=np.float32))
    table_.write_h5ad(tmp_path / "cells.h5ad")
    row = {"sample": "t", "technology": "anndata", "path": "cells.h5ad"}
    found = cellquilt.estimate(sheet(tmp_path, row), domains="zeroshot")
    assert found.total.tasks == {
        "DOMAINS_ANNOTATE": 1, "DOMAINS_ASSIGN": 1, "DOMAINS_EMBED": 1, "DOMAINS_PREPARE": 1, "DOMAINS_REPORT": 1,
        "SAMPLES": 1,
    }  # fmt: skip
