"""Proseg without the real binary: what it is asked, what is refused, what its ends mean, and a recorded output.

`tests/slow/test_proseg.py` runs the real one.
"""

import gzip
import itertools
import shutil
import stat
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pcsv
import pyarrow.parquet as pq
import pytest
import shapely
from cellquilt.cli import main
from cellquilt.core.errors import CellquiltError
from cellquilt.core.settings import Settings
from cellquilt.core.shapes import read_geoparquet, write_geoparquet
from cellquilt.patches.transcripts import TranscriptBundle
from cellquilt.segment.molecules import read_results
from cellquilt.segment.proseg import plan, segment_bundle
from cellquilt.segment.proseg.command import arguments, extra_options, find_proseg
from cellquilt.segment.proseg.memory import estimate_gb, transcripts_that_fit
from cellquilt.segment.proseg.outcome import cause
from cellquilt.segment.proseg.read import border_columns
from cellquilt.segment.proseg.transcripts import Contents, look, write_table
from transcript_bundles import write_transcript_bundle

GENES = ["Actb", 'comma, "quote"', "β-catenin", "NegControlLike"]
WIDTH = 40.0


def molecules(n: int = 400, seed: int = 0, x0: float = 0.0, n_cells: int = 4, nuclei: bool = True) -> dict:
    """Transcripts of four round cells on a square, the inner ones with a prior cell, and some between."""
    rng = np.random.default_rng(seed)
    centres = np.array([[10, 10], [30, 10], [10, 30], [30, 30]], dtype=float)[:n_cells]
    cell = rng.integers(0, n_cells, n)
    spread = rng.normal(0, 3, (n, 2))
    xy = np.clip(centres[cell] + spread, 0.1, WIDTH - 0.1)
    inner = np.hypot(*spread.T) < 3
    return {
        "transcript_id": np.sort(rng.choice(10 * n, n, replace=False)).astype(np.uint64) + np.uint64(2**33),
        "x_um": xy[:, 0] + x0,
        "y_um": xy[:, 1],
        "z_um": rng.integers(0, 3, n).astype(float),
        "gene": np.where(rng.random(n) < 0.7, cell % len(GENES), rng.integers(0, len(GENES), n)),
        "prior_cell": np.where(inner, cell + 1, 0),
        "in_nucleus": inner & nuclei,
    }


def write_bundle(folder: Path, *patches: dict, prior: dict | None = None, left: float = 0.0) -> Path:
    engine = plan(Settings())
    return write_transcript_bundle(folder, patches, width=WIDTH, genes=GENES, engine=engine, prior=prior, left=left)


def fake(folder: Path, body: str, version: str = "proseg 3.2.0") -> Path:
    """An executable that answers with a version, and else does what the shell script says."""
    path = folder / "fake-proseg"
    path.write_text(f'#!/bin/bash\n[ "$1" = --version ] && {{ echo "{version}"; exit 0; }}\n{body}\n')
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def segment(tmp_path: Path, bundle: Path, body: str, **settings):
    path = fake(tmp_path, body)
    return segment_bundle(bundle, tmp_path / "out.result", settings={"proseg_executable": str(path), **settings})


def options(line: list[str]) -> dict[str, str]:
    return {name: value for name, value in itertools.pairwise(line) if name.startswith("-")}


# --- what it is asked


def values(**given) -> dict:
    return {**plan(Settings(given)), "threads": 2}


def test_every_column_and_every_output_is_named(tmp_path):
    line = arguments(values(), tmp_path, n_planes=9, with_nuclei=True)
    told = options(line)
    assert line[0] == str(tmp_path / "transcripts.csv")
    assert [told[f"--{axis}-column"] for axis in "xyz"] == ["x", "y", "z"]
    assert told["--cell-id-unassigned"] == "0"
    assert (told["--compartment-column"], told["--compartment-nuclear"]) == ("compartment", "1")
    assert (told["--samples"], told["--burnin-samples"], told["--recorded-samples"]) == ("200", "200", "100")
    assert (told["--voxel-size"], told["--burnin-voxel-size"], told["--voxel-layers"]) == ("1", "2", "4")
    assert told["--nthreads"] == "2"
    assert "--overwrite" not in line
    without = arguments(values(), tmp_path, n_planes=9, with_nuclei=False)
    assert not [word for word in without if word.startswith("--compartment")]


@pytest.mark.parametrize(
    ("given", "n_planes", "expected"),
    [
        ({"proseg_samples": 30}, 9, {"--samples": "30", "--recorded-samples": "30"}),
        ({"proseg_voxel_size_um": 0.5}, 9, {"--voxel-size": "0.5", "--burnin-voxel-size": "2"}),
        ({"proseg_voxel_size_um": 0.7}, 9, {"--burnin-voxel-size": "2.1"}),
        ({"proseg_voxel_size_um": 3}, 9, {"--burnin-voxel-size": "3"}),
        ({}, 1, {"--voxel-layers": "1"}),
        ({"proseg_voxel_layers": 7}, 3, {"--voxel-layers": "3"}),
        ({"proseg_args": "--prior-weight 2 --recorded-samples=7"}, 9, {"--prior-weight": "2"}),
    ],
)
def test_numbers_become_options(tmp_path, given, n_planes, expected):
    line = arguments(values(**given), tmp_path, n_planes=n_planes, with_nuclei=False)
    assert expected.items() <= options(line).items()
    names = [word.split("=")[0] for word in line if word.startswith("--")]
    assert len(names) == len(set(names))


def few(n_genes: int, counts: list[int], area_um2: float = 1e4) -> Contents:
    none = np.empty(0)
    counts = np.sort(np.append(counts, np.ones(n_genes - len(counts), int)))[::-1]
    return Contents(int(counts.sum()), counts, 4, area_um2, np.zeros(2), none, none.reshape(0, 4), none.astype(bool))


@pytest.mark.parametrize(
    ("n_genes", "counts", "area_um2", "factored"),
    [
        (300, [2000, 2000, 2000], 1e4, True),
        (300, [2000, 2000], 1e4, False),  # proseg would end with a panic, as it does in the next three
        (300, [400, 300, 200], 1e4, False),
        (300, [2000, 2000, 2000], 1e8, False),
        (201, [2000] * 200, 1e4, False),
        (150, [2000] * 100, 1e4, False),
    ],
)
def test_factors_are_sought_only_where_proseg_can_find_some(tmp_path, n_genes, counts, area_um2, factored):
    assert few(n_genes, counts, area_um2).can_be_factored == factored
    line = arguments(values(), tmp_path, n_planes=4, with_nuclei=False, factored=factored)
    assert ("--no-factorization" in line) != factored


def test_bundles_carry_what_a_result_depends_on():
    made = plan(Settings(proseg_executable="/x/proseg", proseg_voxel_layers=7))
    assert made["method"] == "proseg"
    assert (made["proseg_voxel_size_um"], made["proseg_voxel_layers"], made["proseg_samples"]) == (1.0, 7, 200)
    assert "proseg_executable" not in made


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("--output-counts x.mtx.gz", "--output-counts"),
        ("--samples 3", "use proseg_samples"),
        ("-x a", "-x"),
        ("--merscope", "--merscope"),
        ("--prior-weight '2", "quotes"),
    ],
)
def test_options_that_are_decided_here_are_refused(text, says):
    with pytest.raises(CellquiltError, match="proseg-args") as caught:
        plan(Settings(proseg_args=text))
    assert says in str(caught.value)
    assert extra_options("--prior-weight 2 --dispersion '0.5'") == ["--prior-weight", "2", "--dispersion", "0.5"]


def test_the_table_holds_every_transcript_and_survives_any_name(tmp_path):
    columns = molecules(x0=12_345.25)
    bundle = TranscriptBundle(write_bundle(tmp_path / "b.zarr", columns))
    record = {**bundle.patches[0], "x0": 12_345.25}
    contents = look(bundle, record)
    assert (contents.n, contents.n_genes, contents.n_planes) == (400, 4, 3)
    assert contents.prior_cells.tolist() == [1, 2, 3, 4]
    write_table(tmp_path, bundle, record, contents)
    table = pcsv.read_csv(tmp_path / "transcripts.csv")
    assert np.array_equal(table.column("transcript_id").to_numpy().astype(np.uint64), columns["transcript_id"])
    assert np.array_equal(table.column("gene").to_numpy(), columns["gene"])
    assert np.array_equal(table.column("cell").to_numpy(), columns["prior_cell"])
    assert np.array_equal(table.column("compartment").to_numpy(), columns["in_nucleus"].astype(int))
    for axis, name in enumerate(("x", "y")):
        written = table.column(name).to_numpy() + contents.origin[axis]
        assert np.abs(written - columns[f"{name}_um"]).max() < 1e-5


def test_a_handful_of_transcripts_is_flat(tmp_path):
    bundle = TranscriptBundle(write_bundle(tmp_path / "b.zarr", molecules(20)))
    contents = look(bundle, bundle.patches[0])
    assert contents.n_planes == 1
    write_table(tmp_path, bundle, bundle.patches[0], contents)
    assert not np.any(pcsv.read_csv(tmp_path / "transcripts.csv").column("z").to_numpy())


def test_a_prior_cell_without_transcripts_in_a_nucleus_counts_as_nucleus(tmp_path):
    columns = molecules()
    columns["in_nucleus"] &= columns["prior_cell"] != 2
    bundle = TranscriptBundle(write_bundle(tmp_path / "b.zarr", columns))
    contents = look(bundle, bundle.patches[0])
    assert contents.nuclear.tolist() == [False, True, False, True, True]
    write_table(tmp_path, bundle, bundle.patches[0], contents)
    compartment = pcsv.read_csv(tmp_path / "transcripts.csv").column("compartment").to_numpy()
    assert compartment[columns["prior_cell"] == 2].all()


def test_memory_grows_with_what_is_given(tmp_path):
    small, large = (
        look(bundle := TranscriptBundle(write_bundle(tmp_path / f"{n}.zarr", molecules(n))), bundle.patches[0])
        for n in (400, 4000)
    )
    assert estimate_gb(small, 1, 3) < estimate_gb(large, 1, 3) < estimate_gb(large, 0.5, 3)
    assert 1_000_000 < transcripts_that_fit(10, 1, 4) < transcripts_that_fit(20, 1, 4)
    assert plan(Settings(proseg_memory_gb=20))["proseg_max_transcripts"] == transcripts_that_fit(20, 1, 4)
    assert plan(Settings(proseg_max_transcripts=5000))["proseg_max_transcripts"] == 5000


# --- the executable


@pytest.mark.parametrize("version", ["proseg 2.0.6", "proseg 3.0.2", "proseg 4.0.0", "what?", ""])
def test_other_versions_are_refused(tmp_path, version):
    with pytest.raises(CellquiltError, match="proseg-version") as caught:
        find_proseg(str(fake(tmp_path, "", version)))
    assert version in str(caught.value)
    assert "3.2.0" in caught.value.hint


def test_it_is_found_by_setting_path_cargo_and_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("CELLQUILT_CACHE", str(tmp_path / "cache"))
    with pytest.raises(CellquiltError, match="engine-missing"):
        find_proseg(None)
    for place in ("cache/proseg-3.2.0/bin", ".cargo/bin", "on-path"):
        (tmp_path / place).mkdir(parents=True)
        fake(tmp_path, "").rename(tmp_path / place / "proseg")
        monkeypatch.setenv("PATH", f"{tmp_path / 'on-path'}:/usr/bin:/bin")
        assert find_proseg(None).path == tmp_path / place / "proseg"
    assert find_proseg(str(fake(tmp_path, ""))).path.name == "fake-proseg"
    with pytest.raises(CellquiltError, match="engine-missing"):
        find_proseg(str(tmp_path / "nowhere"))


# --- what is refused, and what needs no run


@pytest.mark.parametrize(
    ("column", "value", "code"), [("x_um", np.nan, "not-finite"), ("y_um", np.inf, ""), ("z_um", np.nan, "")]
)
def test_transcripts_without_a_place_are_named(tmp_path, column, value, code):
    columns = molecules()
    columns[column][7] = value
    bundle = write_bundle(tmp_path / "b.zarr", columns)
    with pytest.raises(CellquiltError, match="no finite position") as caught:
        segment(tmp_path, bundle, "exit 0")
    assert str(columns["transcript_id"][7]) in str(caught.value)
    assert code in str(caught.value.__cause__)


def test_no_prior_at_all_is_refused(tmp_path):
    bundle = write_bundle(tmp_path / "b.zarr", molecules(), prior={"from": "none", "name": "", "n_cells": 0})
    with pytest.raises(CellquiltError, match="proseg-prior-missing"):
        segment(tmp_path, bundle, "exit 0")


@pytest.mark.parametrize("patches", [[], [molecules(0)], [{**molecules(), "prior_cell": np.zeros(400, int)}]])
def test_where_no_cell_can_be_nothing_runs(tmp_path, patches):
    """No patch, no transcripts, or a patch without prior cells: no cells, and all transcripts are in none."""
    bundle = write_bundle(tmp_path / "b.zarr", *patches, prior={"from": "shapes", "name": "cells", "n_cells": 9})
    record = segment(tmp_path, bundle, "exit 1")
    result = read_results([tmp_path / "out.result"])
    assert len(result.geometry) == record["facts"]["n_objects"] == 0
    tables = list(result.transcripts)
    labels = np.concatenate([np.empty(0, int), *(table.column("label").to_numpy() for table in tables)])
    assert labels.size == sum(len(columns["x_um"]) for columns in patches)
    assert not labels.any()


def test_an_existing_output_is_refused_before_anything_runs(tmp_path):
    bundle = write_bundle(tmp_path / "b.zarr", molecules())
    (tmp_path / "out.result").mkdir()
    with pytest.raises(CellquiltError, match="output-exists"):
        segment(tmp_path, bundle, f"touch {tmp_path}/ran")
    assert not (tmp_path / "ran").exists()


# --- how it ends

PANIC = """
thread 'main' panicked at src/sampler/transcripts.rs:174:13:
index out of bounds: the len is 0 but the index is 0
note: run with `RUST_BACKTRACE=1` environment variable to display a backtrace
"""


def test_the_cause_is_in_prosegs_own_words():
    assert cause(PANIC) == "index out of bounds: the len is 0 but the index is 0 (src/sampler/transcripts.rs:174:13)"
    assert cause("error: unexpected argument '--lap' found\n\nUsage: ...") == "unexpected argument '--lap' found"
    assert cause("Using 1 threads\nRead dataset:\n") == "Using 1 threads / Read dataset:"
    assert cause("") == "it said nothing"


@pytest.mark.parametrize(
    ("body", "code", "says"),
    [
        (f"cat >&2 <<'END'\n{PANIC}END\nexit 101", "proseg-failed", "the len is 0"),
        ("echo 'error: unexpected argument' >&2; exit 2", "proseg-args", "unexpected argument"),
        ("echo \"thread 'main' panicked at a:1:\" >&2; echo 'No space left on device' >&2; exit 101", "disk-full", ""),
        ("kill -SEGV $$", "proseg-failed", "signal 11"),
        ("exit 0", "proseg-output", "cannot be read"),
    ],
)
def test_a_bad_end_is_the_patchs_error(tmp_path, body, code, says):
    bundle = write_bundle(tmp_path / "b.zarr", molecules())
    with pytest.raises(CellquiltError, match="patch-failed") as caught:
        segment(tmp_path, bundle, body)
    assert caught.value.__cause__.code == code
    assert says in caught.value.message
    assert "sample liver, patch 0" in caught.value.message
    assert not (tmp_path / "out.result").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.zarr", "fake-proseg", "out.result.log"]


def test_a_patch_that_fails_may_be_skipped(tmp_path):
    bundle = write_bundle(tmp_path / "b.zarr", molecules(), molecules(x0=WIDTH))
    record = segment(tmp_path, bundle, "echo 'thread main panicked' >&2; exit 101", on_patch_error="skip")
    assert record["facts"]["n_failed"] == 2
    result = read_results([tmp_path / "out.result"])
    assert [patch["error"]["code"] for patch in result.patches] == ["proseg-failed"] * 2
    assert list(result.transcripts) == []
    assert "=== patch 1 ===" in (tmp_path / "out.result.log").read_text()


@pytest.mark.parametrize(
    "body",
    ["kill -KILL $$", "exit 137", "echo 'memory allocation of 17179869184 bytes failed' >&2; kill -ABRT $$"],
)
def test_killed_for_memory_ends_the_task_even_if_patches_may_be_skipped(tmp_path, body):
    bundle = write_bundle(tmp_path / "b.zarr", molecules())
    with pytest.raises(MemoryError):
        segment(tmp_path, bundle, body, on_patch_error="skip")


def test_the_command_ends_with_137_when_memory_runs_out(tmp_path, capsys):
    bundle = write_bundle(tmp_path / "b.zarr", molecules())
    path = fake(tmp_path, "kill -KILL $$")
    with pytest.raises(SystemExit) as stop:
        main(["segment", "proseg", str(bundle), "-o", str(tmp_path / "r"), "--proseg-executable", str(path)])
    assert stop.value.code == 137
    assert "in proseg, sample liver, patch 0" in capsys.readouterr().err


def test_a_run_that_hangs_is_stopped_with_all_its_children(tmp_path):
    bundle = write_bundle(tmp_path / "b.zarr", molecules())
    started = time.monotonic()
    with pytest.raises(CellquiltError, match="patch-failed") as caught:
        segment(tmp_path, bundle, f"sleep 60 & echo $! > {tmp_path}/child; wait", proseg_timeout_min=0.01)
    assert caught.value.__cause__.code == "proseg-timeout"
    assert time.monotonic() - started < 10
    child = int((tmp_path / "child").read_text())
    deadline = time.monotonic() + 5
    while _alive(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _alive(child)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


# --- a recorded output: what proseg 3.2.0 made of `molecules(x0=1000.25)`

RECORDED = Path(__file__).parents[1] / "data" / "proseg_3.2.0"


def replay(tmp_path: Path, change=None, **settings):
    """Segment the recorded molecules, with the recorded output in proseg's place, perhaps changed."""
    output = tmp_path / "recorded"
    shutil.copytree(RECORDED, output)
    if change is not None:
        change(output)
    bundle = write_bundle(tmp_path / "b.zarr", molecules(x0=1000.25), left=1000.25)
    body = f'while [ $# -gt 0 ]; do [ "$1" = --output-path ] && cp -r {output}/. "$2"; shift; done'
    record = segment(tmp_path, bundle, body, **settings)
    return record, read_results([tmp_path / "out.result"])


def test_the_cell_of_every_transcript_comes_back(tmp_path):
    record, result = replay(tmp_path)
    columns = molecules(x0=1000.25)
    table = pa.concat_tables(result.transcripts)
    assert np.array_equal(table.column("transcript_id").to_numpy(), columns["transcript_id"])
    label = table.column("label").to_numpy()
    said = pq.read_table(RECORDED / "transcripts.parquet")
    expected = dict(zip(said.column("transcript_id").to_pylist(), said.column("assignment").to_pylist(), strict=True))
    theirs = [expected[i] for i in columns["transcript_id"].tolist()]
    assert label.tolist() == [0 if cell is None else cell + 1 for cell in theirs]
    assert np.array_equal(np.bincount(label, minlength=5)[1:], result.cells["n_transcripts"])
    # Proseg numbered the cells by when they came: the cell of each is known by most of its transcripts' prior cells.
    prior = columns["prior_cell"]
    for number, cell in zip(result.cells["label"], result.cells["prior_cell"], strict=True):
        assert np.bincount(prior[(label == number) & (prior > 0)]).argmax() == cell
    assert sorted(result.cells["prior_cell"].tolist()) == [1, 2, 3, 4]
    assert record["versions"]["proseg"] == "3.2.0"
    assert result.patches[0]["n_too_far"] == result.patches[0]["n_without_outline"] == 0


def test_outlines_are_where_the_machine_saw_the_transcripts(tmp_path):
    _, result = replay(tmp_path)
    columns = molecules(x0=1000.25)
    label = pa.concat_tables(result.transcripts).column("label").to_numpy()
    place = shapely.points(columns["x_um"], columns["y_um"])
    for number, outline in zip(result.cells["label"], result.geometry, strict=True):
        assert outline.geom_type == "Polygon"
        assert outline.is_valid
        assert shapely.distance(outline, place[label == number]).mean() < 0.5
    raw, _, _ = read_geoparquet(RECORDED / "proseg-output.zarr" / "shapes" / "cell_boundaries" / "shapes.parquet")
    largest = [max(part.area for part in shapely.get_parts(shape)) for shape in raw]
    assert shapely.area(result.geometry).tolist() == pytest.approx(largest)
    assert not result.cells["cut"].any()
    assert np.isinf(result.cells["depth_um"]).all()


def test_expected_counts_have_the_genes_names(tmp_path):
    _, result = replay(tmp_path)
    with gzip.open(RECORDED / "expected.mtx.gz", "rt") as stream:
        lines = [line.split() for line in stream.read().splitlines()[2:]]
    order = pq.read_table(RECORDED / "genes.parquet").column("gene").to_pylist()
    theirs = {(int(cell), GENES[int(order[int(gene) - 1])]): float(value) for cell, gene, value in lines}
    rows = result.expected.to_pylist()
    ours = {(row["label"], row["gene"]): row["value"] for row in rows}
    assert ours == pytest.approx(theirs)
    assert len(rows) == len(ours)
    assert [(row["label"], GENES.index(row["gene"])) for row in rows] == sorted(
        (row["label"], GENES.index(row["gene"])) for row in rows
    )
    assert sum(ours.values()) == pytest.approx(result.cells["n_transcripts"].sum(), rel=0.1)


def test_the_same_output_gives_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        replay(tmp_path / name)
    for file in ("transcripts.parquet", "expected.parquet"):
        assert (tmp_path / "a/out.result" / file).read_bytes() == (tmp_path / "b/out.result" / file).read_bytes()


def rewrite(file: str, **columns):
    """A change of some columns of a recorded table; a function gets the column as a list."""

    def change(output: Path) -> None:
        table = pq.read_table(output / file)
        for name, function in columns.items():
            at, kind = table.schema.get_field_index(name), table.schema.field(name).type
            table = table.set_column(at, name, pa.array(function(table.column(name).to_pylist()), kind))
        pq.write_table(table, output / file)

    return change


def matrix(text: str):
    def change(output: Path) -> None:
        with gzip.open(output / "counts.mtx.gz", "wt") as stream:
            stream.write(f"%%MatrixMarket matrix coordinate real general\n{text}\n")

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (matrix("4 4 1\n1 1 3"), "counts 3 transcripts"),
        (matrix("4 4 0"), "counts 0 transcripts"),
        (matrix("9 4 1\n1 1 3"), "9 cells and 4 genes"),
        (rewrite("transcripts.parquet", assignment=lambda column: [None, *column[1:]]), "but assigns"),
        (rewrite("transcripts.parquet", assignment=lambda column: [7, *column[1:]]), "cells that there are not"),
        (rewrite("transcripts.parquet", transcript_id=lambda column: [5, *column[1:]]), "were not given"),
        (rewrite("transcripts.parquet", transcript_id=lambda column: [column[1], *column[1:]]), "twice"),
        (rewrite("cells.parquet", cell=lambda column: column[::-1]), "numbers cells"),
        (lambda output: (output / "genes.parquet").unlink(), "genes.parquet"),
        (lambda output: (output / "counts.mtx.gz").write_bytes(b"x"), "cannot be read"),
        (lambda output: (output / "transcripts.parquet").write_bytes(b"PAR1"), "cannot be read"),
    ],
)
def test_an_output_that_means_something_else_is_refused(tmp_path, change, says):
    with pytest.raises(CellquiltError, match="patch-failed") as caught:
        replay(tmp_path, change)
    assert caught.value.__cause__.code == "proseg-output"
    assert says in caught.value.message
    assert not (tmp_path / "out.result").exists()


def test_transcripts_that_are_left_out_are_in_no_cell_and_counted(tmp_path):
    def leave_out(output: Path) -> None:
        table = pq.read_table(output / "transcripts.parquet")
        free = pc.is_null(table.column("assignment"))
        first = free.to_pylist().index(True)
        pq.write_table(pa.concat_tables([table[:first], table[first + 1 :]]), output / "transcripts.parquet")

    _, result = replay(tmp_path, leave_out)
    assert result.patches[0]["n_too_far"] == 1
    assert pa.concat_tables(result.transcripts).num_rows == 400


def test_a_cell_without_outline_is_left_out_and_said_so(tmp_path, caplog):
    def empty(output: Path) -> None:
        file = output / "proseg-output.zarr" / "shapes" / "cell_boundaries" / "shapes.parquet"
        geometry, table, _ = read_geoparquet(file)
        geometry[0] = shapely.MultiPolygon()
        write_geoparquet(file, geometry, {"cell": table.column("cell").to_numpy()})

    _, result = replay(tmp_path, empty)
    assert len(result.geometry) == 3
    assert result.patches[0]["n_without_outline"] == 1
    label = pa.concat_tables(result.transcripts).column("label").to_numpy()
    assert set(np.unique(label)) == {0, *result.cells["label"].tolist()}
    assert set(result.expected.column("label").to_pylist()) == set(result.cells["label"].tolist())


def test_cells_near_an_inner_side_are_cut_by_their_prior_too():
    """Windows from 0 to 45 with an inner side on the right: the box of cell and prior, up to one large voxel."""
    record = {"index": 0, "x0": 0.0, "y0": 0.0, "x1": 45.0, "y1": 40.0, "core": [0.0, 0.0, 40.0, 40.0]}
    outlines = np.array([shapely.box(x, 5, x + 4, 9) for x in (20.0, 38.0, 39.5, 30.0)], dtype=object)
    boxes = np.array([[20, 5, 24, 9], [38, 5, 42, 9], [39, 5, 43, 9], [30, 5, 44.5, 9]])
    contents = Contents(1, np.ones(1), 1, 1.0, np.zeros(2), np.array([1, 2, 3, 4]), boxes, np.zeros(5, bool))
    found = border_columns(outlines, np.array([1, 2, 3, 4]), record, contents, 2.0)
    assert found["depth_um"].tolist() == pytest.approx([21, 3, 1.5, 0.5])
    assert found["cut"].tolist() == [False, False, True, True]
