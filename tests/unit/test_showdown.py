"""The showdown's measures on results that can be counted by hand, its killing of processes, and its page."""

import importlib
import json
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import shapely

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
MODULES = (
    "showdown_measures",
    "showdown_runs",
    "showdown_page",
    "showdown",
    "harness",
    "bench_path",
    "domains_cohorts",
)


@pytest.fixture(scope="module")
def load():
    sys.path.insert(0, str(FOLDER))
    try:
        yield importlib.import_module
    finally:
        sys.path.remove(str(FOLDER))
        for name in MODULES:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def measures(load):
    return load("showdown_measures")


def squares(*corners: tuple[float, float], width: float = 10.0) -> np.ndarray:
    return np.array([shapely.box(x, y, x + width, y + width) for x, y in corners], dtype=object)


def result(measures, polygons: np.ndarray, table: list[list[int]], **parts: bytes):
    matrix = scipy.sparse.csr_matrix(np.array(table))
    genes = np.array([f"g{k}" for k in range(matrix.shape[1])])
    return measures.Result(polygons, matrix, genes, np.zeros((0, 4)), parts)


def test_a_transcript_in_two_cells_is_counted_twice(measures):
    outlines = squares((0, 0), (5, 0), (40, 0))
    xy = np.array([[2, 5], [7, 5], [8, 5], [12, 5], [45, 5], [30, 5.0]])
    pairs = measures.inside(xy, outlines)
    assert sorted(zip(*(part.tolist() for part in pairs), strict=True)) == [
        (0, 0), (1, 0), (1, 1), (2, 0), (2, 1), (3, 1), (4, 2),
    ]  # fmt: skip
    # Counted in each cell that they lie in: 3, 3 and 1. Two transcripts are in two cells.
    both = measures.counting(result(measures, outlines, [[3], [3], [1]]), pairs)
    assert both == {"counted": 7, "in_cells": 5, "in_several": 2, "twice": 2}
    # Dealt to one of them each.
    one = measures.counting(result(measures, outlines, [[1], [3], [1]]), pairs)
    assert (one["twice"], one["in_several"]) == (0, 2)
    nothing = measures.counting(result(measures, outlines[:0], []), measures.inside(xy, outlines[:0]))
    assert nothing == {"counted": 0, "in_cells": 0, "in_several": 0, "twice": 0}


def test_points_are_asked_in_parts_and_come_out_the_same(measures, monkeypatch):
    rng = np.random.default_rng(3)
    outlines, xy = squares(*rng.uniform(0, 90, (30, 2))), rng.uniform(0, 100, (500, 2))
    whole = measures.inside(xy, outlines)
    corner = np.array([shapely.bounds(outline)[:2] for outline in outlines])
    by_hand = ((xy[:, None] >= corner) & (xy[:, None] <= corner + 10)).all(axis=2)
    assert len(whole[0]) == by_hand.sum()
    assert by_hand[whole].all()
    monkeypatch.setattr(measures, "_POINTS_AT_ONCE", 7)
    parts = measures.inside(xy, outlines)
    assert set(zip(*parts, strict=True)) == set(zip(*whole, strict=True))


def test_placement_against_the_truth(measures):
    # Found cells 0 and 1 are true cells 5 and 6; found cell 2 is none.
    match = np.array([5, 6, -1])
    true_cell = np.array([5, 5, 6, 6, -1, 5, 7])
    pairs = (np.array([0, 1, 2, 3, 4, 5]), np.array([0, 1, 1, 1, 0, 2]))
    score = measures.placement(pairs, true_cell, match)
    # Right are 0, 2, 3; of six counts three are not. Six transcripts came from cells.
    assert score == {"contamination": pytest.approx(3 / 6), "in_right_cell": pytest.approx(3 / 6)}
    again = (np.append(pairs[0], 0), np.append(pairs[1], 1))  # 0 is counted in the neighbour, too
    assert measures.placement(again, true_cell, match) == {
        "contamination": pytest.approx(4 / 7),
        "in_right_cell": pytest.approx(3 / 6),
    }
    none = (np.zeros(0, np.int64), np.zeros(0, np.int64))
    assert measures.placement(none, true_cell, match) == {"contamination": 0.0, "in_right_cell": 0.0}


def test_only_the_better_copy_matches_a_true_cell(measures):
    found, true = squares((0, 0), (2, 0), (50, 50)), squares((0, 0), (100, 100))
    assert measures.matched(found, true).tolist() == [0, -1, -1]
    assert measures.doubles(found) == {"overlapping": 1, "doubles": 1}
    assert measures.doubles(squares((0, 0), (8, 0), (30, 0))) == {"overlapping": 1, "doubles": 0}
    assert measures.doubles(squares((0, 0), (10, 0))) == {"overlapping": 0, "doubles": 0}  # they only touch


def test_recall_at_borders_is_told_apart(measures):
    true = squares((45, 0), (45, 50), (0, 0), (0, 50))
    sides = np.array([[50.0, 0, 50, 100]])
    score = measures.found_at_borders(true[[0, 2, 3]], true, sides, 4.0)
    assert score == {"n_near": 2, "recall_near": 0.5, "recall_far": 1.0}
    assert measures.found_at_borders(true, true, np.zeros((0, 4)), 4.0)["n_near"] == 0


def test_windows_show_a_border_of_every_tool_where_most_nuclei_lie_on_it(measures):
    ours, peer = np.array([[200.0, 0, 200, 400]]), np.array([[215.0, 0, 215, 400]])
    nuclei = squares((195, 300), (196, 320), (210, 340), (195, 40), (10, 10), (20, 20))
    windows = measures.choose_windows([ours, peer], nuclei, (400, 400), 100, 2)
    assert len(windows) == 2
    (y0, y1, x0, x1), second = windows
    assert (y1 - y0, x1 - x0) == (100, 100)
    assert y0 <= 300 < 350 <= y1
    assert x0 < 200 < 215 < x1
    assert second[1] <= y0  # the other nucleus on a border, and the two do not overlap
    assert measures.choose_windows([ours, np.zeros((0, 4))], nuclei, (400, 400), 100, 2) == []


def test_order_of_cells_is_told_from_other_cells(measures):
    outlines = squares((0, 0), (20, 0))
    before = result(measures, outlines, [[1], [2]], counts=b"12", outlines=b"ab")
    other_order = result(measures, outlines[::-1], [[2], [1]], counts=b"21", outlines=b"ba")
    assert measures.differing(before, before) == []
    assert measures.differing(before, other_order) == ["counts", "outlines"]
    assert measures.same_but_for_order(before, other_order)
    assert not measures.same_but_for_order(before, result(measures, outlines[::-1], [[1], [2]]))
    assert not measures.same_but_for_order(before, result(measures, outlines[:1], [[1]]))


def test_transcripts_of_a_bundle_are_those_that_can_be_counted(measures, tmp_path):
    from cellquilt.simulate import simulate

    simulate(tmp_path / "sim", width_px=256, seed=2, format="xenium", channels=("DAPI",))
    bundle = tmp_path / "sim" / "slide_0"
    about = json.loads((bundle / "truth" / "simulation.json").read_text())
    every = measures.read_transcripts(bundle, about["genes"] + about["controls"], 0.0, 0.2125)
    assert len(every.xy) == about["n_transcripts"]
    assert every.xy.max() <= 256.1
    assert set(every.cell) <= set(range(-1, about["n_cells"]))
    some = measures.read_transcripts(bundle, about["genes"][:5], 20.0, 0.2125)
    assert 0 < len(some.xy) < len(every.xy)


def test_a_kill_reaches_every_process_and_says_what_was_used(load, tmp_path):
    runs = load("showdown_runs")
    work = tmp_path / "work"
    work.mkdir()
    # A process that starts another, in a process group of its own, that works and outlives it.
    script = (
        "import os, subprocess, sys, time\n"
        "subprocess.Popen([sys.executable, '-c', "
        '\'import os; os.setpgid(0, 0); open("child", "w").write(str(os.getpid()))\\nwhile True: pass\'])\n'
        "time.sleep(600)\n"
    )
    child = work / "child"
    began = time.monotonic()
    ready = lambda: child.is_file() and bool(child.read_text()) and time.monotonic() > began + 1  # noqa: E731
    taken = runs.Watch(work).run([sys.executable, "-c", script], log=tmp_path / "log", kill_when=ready)
    assert taken.killed
    assert taken.cpu_s > 0.05
    assert taken.together_mb > 5
    state = Path(f"/proc/{child.read_text()}/stat")
    assert not state.exists() or " Z " in state.read_text()  # gone, or dead and not yet waited for


def test_a_run_to_its_end_is_measured_and_a_failure_is_said(load, tmp_path):
    runs = load("showdown_runs")
    work = tmp_path / "work"
    work.mkdir()
    script = "import time\nopen('out', 'wb').write(bytes(5000))\nx = bytearray(80 << 20)\ntime.sleep(0.8)"
    taken = runs.Watch(work).run([sys.executable, "-c", script], log=tmp_path / "log")
    assert not taken.killed
    assert taken.wall_s >= 0.8
    assert min(taken.largest_mb, taken.together_mb) > 80
    assert taken.peak_bytes == 5000
    (work / "same").hardlink_to(work / "out")
    assert runs.disk_use(work, work / "not there") == (5000, 1)
    failed = runs.Watch(work, {"WORD": "a word"})
    with pytest.raises(runs.ProcessFailed, match="a word"):
        failed.run([sys.executable, "-c", "import os, sys; sys.exit(os.environ['WORD'])"], log=tmp_path / "log")
    with pytest.raises(runs.ProcessFailed, match="before it could be killed"):
        runs.Watch(work).run([sys.executable, "-c", ""], log=tmp_path / "log", kill_when=lambda: False)


def taken(**more) -> dict:
    return {"wall_s": 10.0, "cpu_s": 20.0, "largest_mb": 500.0, "together_mb": 900.0, "peak_bytes": 10**7, **more}


def worth(**more) -> dict:
    numbers = {"n_cells": 100, "counted": 5000, "in_cells": 5000, "in_several": 0, "twice": 0, "recounted": 5000}
    scores = {"contamination": 0.1, "in_right_cell": 0.4, "overlapping": 0, "doubles": 0, "mean_iou": 0.7}
    return {**numbers, **scores, "f1_0.5": 0.9, "f1_0.75": 0.6, "n_true": 101, **more}


def tool(**more) -> dict:
    kill = {"killed": taken(), "resumed": taken(), "done_before": 4, "kept": 4, "of": 9, "unit": "tasks"}
    return {
        "cost": taken(work=[10**6, 40], output=[2 * 10**6, 60], store=[10**6, 30]),
        "kill": {**kill, "differs": [], "same_but_for_order": True},
        "grown_cost": taken(),
        "nuclei": worth(),
        "cells": worth(),
        "borders": {"n_near": 30, "recall_near": 0.9, "recall_far": 0.91},
        **more,
    }


def domain_run(ari: float, **more) -> dict:
    slides = {"slide_0": {"ari": ari}, "slide_1": {"ari": ari}}
    return {"seed": 0, **taken(), "ari": ari, "n_found": 8, "slides": slides, "versions": {"x": "1"}, **more}


@pytest.fixture
def data() -> dict:
    square = {"uri": "data:image/png;base64,", "width": 10, "height": 10, "x_um": 1, "y_um": 2, "scale": "<g></g>"}
    panels = [{"name": name, "cells": "M1 1z", "sides": ""} for name in ("truth", "cellquilt", "sopa")]
    setup = {
        "width_px": 2048,
        "pixel_um": 0.2,
        "patch_px": 512,
        "peer_patch_px": 640,
        "overlap_px": 144,
        "patches_per_task": 3,
    }
    return {
        "size": "small",
        "date": "2030-01-02",
        "machine": {"processor": "a processor", "cores": 2, "memory_gb": 8, "system": "Linux"},
        "input": {"n_cells": 100, "n_nuclei": 90, "n_transcripts": 12345, "genes": 259},
        "loads": [0.1, 9.0],
        "note": "A remark.",
        "versions": {"cellquilt": "1.0"},
        "peer_versions": {"sopa": "2.2.11"},
        "setup": {**setup, "diameter_px": 36},
        "tools": {
            "cellquilt": tool(),
            "sopa": tool(nuclei=worth(twice=77), apart=worth(twice=5678), cost={**tool()["cost"], "wall_s": 3.0}),
        },
        "domains": {"ours": [domain_run(0.5)], "novae": [domain_run(0.6, cpu_s=99.0)]},
        "pictures": [{**square, "panels": panels}],
    }


def test_page_hides_nothing_in_which_the_peer_is_ahead(load, data):
    page = load("showdown_page")
    table = page.rows(data)
    best = {(row["group"], row["name"]): row["best"] for row in table}
    assert best["Transcripts in nuclei", "counted twice"] == ["cellquilt"]
    assert best["Cost, uninterrupted", "time"] == ["sopa"]
    assert best["Outlines of nuclei", "F1 at IoU 0.5"] == []  # the same
    assert page.behind(table, page.domain_rows(data)) == [
        "Cost, uninterrupted, time: sopa 3 s; cellquilt 10 s.",
        "Domains, ARI: novae 0.6; cellquilt 0.5.",
    ]
    html = page.render(data)
    for said in (
        "novae 0.6",
        "sopa 3 s",
        "other work ran on it",
        "12,345",
        "2030-01-02",
        "sopa 2.2.11",
        "77",
        "5,678 twice",
    ):
        assert said in html, said
    assert "http" not in html.replace("http-equiv", "")  # nothing from elsewhere
    assert "| Transcripts in nuclei: counted twice | 0 | 77 |" in page.summary(data)


def test_page_of_our_half_says_that_it_is_one(load, data):
    page = load("showdown_page")
    del data["tools"]["sopa"], data["domains"]["novae"]
    html = page.render({**data, "peer_versions": None})
    assert "only our half was run" in html
    assert "its domains were not run" in html
    assert all(row["best"] == [] for row in page.rows(data))


@pytest.mark.parametrize(
    ("kill", "verdict"),
    [
        ({}, "yes, every byte"),
        ({"differs": ["cell ids"]}, "no: other order or names, the same counts and outlines"),
        ({"differs": ["counts"], "same_but_for_order": False}, "no"),
    ],
)
def test_verdict_after_a_kill(load, data, kill, verdict):
    data["tools"]["sopa"]["kill"] |= kill
    assert [line["verdict"] for line in load("showdown_page").kill_rows(data)] == ["yes, every byte", verdict]


def test_stages_that_have_run_are_kept(load, tmp_path, capsys):
    showdown = load("showdown")
    first = showdown.Showdown(tmp_path, showdown.SIZES["tiny"], None, None)
    assert first.once("a stage", lambda: {"n": (1, 2)}) == {"n": [1, 2]}
    second = showdown.Showdown(
        tmp_path, showdown.SIZES["tiny"], None, None, json.loads((tmp_path / "state.json").read_text())
    )
    assert second.once("a stage", lambda: 1 / 0) == {"n": [1, 2]}
