"""The report: what it says and shows, that it stands alone, that it never reads a whole image, that it names no one."""

import base64
import io
import json
import re
import socket
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import shapely
from cellquilt.core.errors import CellquiltError
from cellquilt.core.images import Image, ImageWriter, open_image
from cellquilt.core.settings import Settings
from cellquilt.report import pictures, plots
from cellquilt.report.page import render
from cellquilt.report.qc import compute_qc, qc_json
from cellquilt.report.stage import assemble_slide, report_slide, samples_table
from cellquilt.report.summary import summary_table
from cellquilt.report.view import View
from cellquilt.report.zooms import choose_zooms, outlines
from synthetic_slide import N_CELLS, make_parts, resolve_facts, with_record

_VOID = {"meta", "link", "img", "br", "input", "hr"}
#: Made by hand in the form of `truth_scores`.
SCORES = {
    "cells": {
        "n_true": 110,
        "n_found": 105,
        "mean_iou": 0.81,
        "f1_0.5": 0.912,
        "precision_0.5": 0.93,
        "recall_0.5": 0.9,
    },
    "nuclei": {
        "n_true": 108,
        "n_found": 105,
        "mean_iou": 0.84,
        "f1_0.5": 0.951,
        "precision_0.5": 0.96,
        "recall_0.5": 0.94,
    },
    "transcripts": {"share_in_true_cell": 0.8, "share_assigned": 0.85, "precision": 0.9, "ari": 0.77},
}


class Page(HTMLParser):
    """Collects text, links and ids, and refuses tags that do not close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.links: list[str] = []
        self.ids: list[str] = []
        self.unlabelled: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        if tag not in _VOID:
            self.open.append(tag)
        self.links += [values[name] for name in ("href", "src") if values.get(name)]
        self.ids += [values["id"]] if "id" in values else []
        drawn = (tag == "svg" and not values.get("aria-label") and not values.get("aria-hidden")) or (
            tag == "img" and not values.get("alt")
        )
        if drawn:
            self.unlabelled.append(str(values))
        if tag == "th":
            assert values.get("scope"), "a table heading without scope"

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in _VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "script" not in self.open and "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return make_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def html(parts):
    view = View(parts)
    return render(view, compute_qc(view), SCORES)


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


def test_the_page_stands_alone_and_is_small(page, html):
    assert len(html) < 5_000_000
    assert all(link.startswith(("data:image/", "#")) for link in page.links)
    assert "@import" not in html
    assert not re.search(r"url\((?!#)", html)
    assert "http" not in html.replace("http-equiv", "")
    assert len(page.ids) == len(set(page.ids))


def test_links_inside_the_page_lead_somewhere(page):
    inner = [link[1:] for link in page.links if link.startswith("#")]
    assert inner
    assert [link for link in inner if link not in page.ids] == []


def test_pictures_are_described(page):
    assert page.unlabelled == []


@pytest.mark.parametrize(
    "words",
    [
        "WARN Usable, but look at the points below first.",
        "A median of 3 counted transcripts a cell (usual: at least 10).",
        "What to do:",
        "105 100 pass the filters",  # cells
        "308 263 counted in cells",
        "90.0% of the transcripts inside the image",
        "Tissue 45,000 µm²",
        "1.87% 33.33% outside",  # controls
        "Counted in a cell 263 85.4%",
        "Outside the image 7 2.3%",
        "min_transcripts 5 4.8%",
        "A 105 39.9%",
        "Within 10 µm of a border 14 6,000 23.3",
        "Elsewhere 91 39,000 23.3",
        "density ratio 1.000",
        "Pairs that were the same cell 7",
        "Time and memory: 17.5 s in all, 700 MB at most",
        "segment 2 10.0",
        "patch_width_px 300",
        "nuclei.npz c0ffee",
        "cellquilt convert SLIDE --sample s1 --output s1.zarr --pixel-size-um 0.5",
        "Cells: 105 found, 110 true, mean overlap 0.81",
        "F1 0.912",
        "of the assigned transcripts are in the cell they came from",
        "600 × 400 px of 0.5 µm",
    ],
)
def test_the_numbers_are_there(page, words):
    assert words in page.text


def test_given_parameters_come_apart_from_defaults(page):
    given, rest = page.text.split("parameters at their defaults")
    for name in ("patch_width_px", "pixel_size_um", "seed"):
        assert f"{name} " in given.split("Parameters that are not at their default")[1]
    assert "resolve_threshold" in rest


def test_outlines_of_cells_and_nuclei_are_drawn_where_they_are(html):
    # The window on the border holds whole cells: squares of 20 px around centres, nuclei of 10 px.
    zoom = re.search(r'<path class="l-cells" d="([^"]*)"', html).group(1)
    assert zoom.count("M") >= 9
    assert set(re.findall(r"[hv]-?(\d+)", zoom)) == {"20"}
    nuclei = re.search(r'<path class="l-nuclei" d="([^"]*)"', html).group(1)
    assert set(re.findall(r"[hv]-?(\d+)", nuclei)) == {"10"}


def test_the_data_in_the_page_is_the_qc(html, parts):
    embedded = re.search(r'id="cellquilt-report">(.*?)</script>', html, re.DOTALL).group(1)
    data = json.loads(embedded)
    assert data["qc"] == json.loads(qc_json(compute_qc(View(parts))))
    assert data["accuracy"]["cells"]["f1_0.5"] == 0.912
    assert "<" not in embedded


def test_the_same_slide_gives_the_same_page(html, parts):
    view = View(parts)
    assert render(view, compute_qc(view), SCORES) == html


def test_no_place_person_or_machine(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "planted-host")
    for name in ("USER", "LOGNAME", "HOSTNAME"):
        monkeypatch.setenv(name, "planted-name")
    monkeypatch.setenv("HOME", str(tmp_path / "planted-home"))
    folder = tmp_path / "planted home" / "planted_user"
    patches = resolve_facts()["patches"]
    patches[1]["error"] = {"code": "patch-failed", "message": f"cannot read '{folder}/x.npy'", "hint": ""}
    planted = with_record(parts, folder, "resolve", facts={"patches": patches}, cellpose_model=f"{folder}/liver.pt")
    view = View(planted)
    text = render(view, compute_qc(view))
    assert "planted" not in text
    assert "liver.pt" in text
    assert "cannot read &#39;x.npy&#39;" in text
    assert str(tmp_path) not in text
    assert str(Path(pictures.__file__).parents[3]) not in text


def test_failed_patches_are_listed_and_drawn(parts, tmp_path):
    patches = resolve_facts()["patches"]
    patches[1]["error"] = {"code": "patch-failed", "message": "boom", "hint": "try less"}
    view = View(with_record(parts, tmp_path, "resolve", facts={"patches": patches}))
    text = render(view, compute_qc(view))
    assert "1 0–400 280–600 boom try less patch-failed" in Page(text).text
    assert 'class="l-failed" d="M280.0 0.0H600.0V400.0H280.0z"' in text
    assert "FAIL Do not use this result" in Page(text).text


def test_a_name_cannot_break_the_page(parts):
    view = View(parts)
    qc = {**compute_qc(view), "cells_by_qc_reason": {"</script><b>x": 1}}
    text = render(view, qc)
    Page(text)
    assert "<b>x" not in text


def test_an_empty_slide_says_so(tmp_path):
    view = View(make_parts(tmp_path, empty=True))
    page = Page(render(view, compute_qc(view)))
    assert "FAIL" in page.text
    assert "No cells were found." in page.text
    assert "No cells were found, so there is nothing to draw." in page.text
    assert "The transcript table is empty." in page.text
    assert "nan" not in page.text.lower().split()


def test_a_slide_without_transcripts_says_so(tmp_path):
    view = View(make_parts(tmp_path, points=False))
    page = Page(render(view, compute_qc(view)))
    assert "This sample has no transcripts" in page.text
    assert "Transcripts a cell" not in page.text
    assert "genes a cell" not in page.text.lower()


def test_one_patch_says_why_there_is_no_border_check(parts, tmp_path):
    one = resolve_facts()["patches"][:1]
    facts = {"patches": one, "overlap_ratio_histogram": [0] * 20, "n_conflicts": 0, "conflict_rate": 0.0}
    kept = [part for part in parts if "patches" not in part.name]
    view = View(with_record(kept, tmp_path, "resolve", facts=facts))
    assert "segmented in one piece" in Page(render(view, compute_qc(view))).text


def test_a_store_without_table_or_image_still_has_a_report(parts):
    view = View([part for part in parts if part.name.split(".")[1] in ("tissue", "cells")])
    qc = compute_qc(view)
    assert qc["n_cells"] == N_CELLS
    assert qc["median_area_um2"] == 100.0
    assert "Cell density" in Page(render(view, qc)).text


# --- never a whole image


@pytest.fixture(scope="module")
def wide_image(tmp_path_factory):
    """(1, 3000, 5000): a ramp along x, so that means of blocks are known."""
    element = tmp_path_factory.mktemp("wide") / "store" / "images" / "image"
    row = np.arange(5000, dtype=np.uint16)
    with ImageWriter(element, (1, 3000, 5000), np.dtype(np.uint16), ["DAPI"], {}, chunk_px=1024) as writer:
        for y in range(0, 3000, 1024):
            for x in range(0, 5000, 1024):
                block = np.broadcast_to(row[x : x + 1024], (1, min(1024, 3000 - y), min(1024, 5000 - x)))
                writer.write(np.ascontiguousarray(block), y, x)
    return open_image(element.parents[1])


def test_the_overview_is_a_mean_of_pixels(wide_image):
    small, step = pictures.read_reduced(wide_image, max_px=500)
    assert max(small.shape) <= 500
    centres = (np.arange(small.shape[2]) + 0.5) * step - 0.5
    assert np.abs(small[0, 10, :-1] - centres[:-1]).max() < 1.0


def test_no_read_holds_a_whole_image(wide_image, monkeypatch):
    seen = []
    original = Image.read

    def watched(self, y0, y1, x0, x1, **more):
        found = original(self, y0, y1, x0, x1, **more)
        seen.append((more.get("level", 0), found.shape))
        return found

    monkeypatch.setattr(Image, "read", watched)
    monkeypatch.setattr(pictures, "_BLOCK_PX", 256)
    pictures.read_reduced(wide_image, max_px=600)
    assert max(np.prod(shape) for _, shape in seen) <= 256 * 256
    assert min(level for level, _ in seen) > 0


def test_a_whole_report_reads_small_windows_only(parts, monkeypatch):
    seen = []
    original = Image.read

    def watched(self, *window, **more):
        found = original(self, *window, **more)
        seen.append(found.shape)
        return found

    monkeypatch.setattr(Image, "read", watched)
    monkeypatch.setattr(pictures, "_BLOCK_PX", 128)
    monkeypatch.setattr("cellquilt.report.zooms.ZOOM_UM", 80.0)
    view = View(parts)
    render(view, compute_qc(view))
    assert max(shape[1] * shape[2] for shape in seen) <= 160 * 160


# --- pieces


def test_colours_of_a_map():
    image = pictures.colour_map(np.array([[0.0, 5.0, 10.0, np.nan, 20.0]]), 10.0)
    assert image[0, 0, :3].tolist() == pictures.STOPS[0].tolist()
    assert image[0, 1, :3].tolist() == pictures.STOPS[3].tolist()
    assert image[0, 2].tolist() == [*pictures.STOPS[-1].tolist(), 255]
    assert image[0, 3, 3] == 0
    assert image[0, 4].tolist() == image[0, 2].tolist()


def test_channels_to_show():
    class Named:
        channels = ("CD45", "Hoechst 33342", "PanCK", "CD3")

    assert pictures.choose_channels(Named()).names == ("Hoechst 33342", "CD45")
    assert pictures.choose_channels(Named(), ["CD3"]).names == ("Hoechst 33342", "CD3")
    Named.channels = ("r", "g", "b")
    assert pictures.choose_channels(Named()).bright_field


def test_pictures_are_what_they_say():
    from PIL import Image as Picture

    pixels = np.zeros((4, 6, 4), dtype=np.uint8)
    pixels[..., 0], pixels[..., 3] = 200, 255
    kind, data = pictures.data_uri(pixels, lossless=True).split(",")
    assert kind == "data:image/png;base64"
    assert np.array_equal(np.asarray(Picture.open(io.BytesIO(base64.b64decode(data)))), pixels)


def test_paths_keep_outlines():
    square = np.array([shapely.box(10, 20, 30, 40)], dtype=object)
    assert pictures.path_of(square, origin=(10, 20)) == "M20 0v20h-20v-20z"
    hole = shapely.Polygon([(0, 0), (9, 0), (9, 9), (0, 9)], [[(3, 3), (6, 3), (6, 6), (3, 6)]])
    assert pictures.path_of(np.array([hole], dtype=object)).count("M") == 2
    both = shapely.MultiPolygon([hole, shapely.box(20, 0, 30.5, 10)])
    path = pictures.path_of(np.array([both], dtype=object))
    assert path.count("M") == 3
    assert "30.5 10.0" in path


def test_mask_has_holes():
    ring = shapely.Polygon([(0, 0), (40, 0), (40, 40), (0, 40)], [[(10, 10), (30, 10), (30, 30), (10, 30)]])
    mask = pictures.mask_of(np.array([ring], dtype=object), (10, 10), 4.0)
    assert mask[0, 0]
    assert not mask[5, 5]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (float("nan"), "–"),
        (0, "0"),
        (1234567, "1,234,567"),
        (0.01234, "0.0123"),
        (12.34, "12.3"),
        (123.4, "123"),
    ],
)
def test_numbers_as_people_read_them(value, text):
    assert plots.number(value) == text


def test_ticks_are_round_and_inside():
    for low, high in ((0, 1), (0, 0.037), (0, 1234.5), (0, 7)):
        marks = plots.ticks(low, high)
        assert 3 <= len(marks) <= 8
        assert low <= marks[0]
        assert marks[-1] <= high * (1 + 1e-9)
    assert plots.ticks(3, 3) == [3]


def _heights(svg: str, name: str) -> list[float]:
    return [float(height) for height in re.findall(rf'class="{name}"[^>]*height="([\d.]+)"', svg)]


def test_histogram_bars_are_the_counts():
    svg = plots.histogram(np.array([1, 1, 1, 3, 3, 9]), "x", integer=True, flagged=np.array([1, 0, 0, 0, 0, 0], bool))
    tall, short = _heights(svg, "bar")[0], _heights(svg, "bar-bad")[0]
    assert tall == pytest.approx(2 * short, rel=0.01)
    assert "3 cells, 1 of them do not pass" in svg
    assert "median 2" in svg
    assert plots.histogram(np.array([np.nan]), "x") == ""


def test_overlap_histogram_tells_copies_from_neighbours():
    svg = plots.overlap_histogram([5, *[0] * 18, 7], 0.5)
    assert "7 are the same cell" in svg
    assert len(_heights(svg, "bar-soft")) == 1
    assert plots.overlap_histogram([0, 0], 0.5) == ""


def test_border_profile_shows_doubled_cells():
    rings = [
        {"from_um": 0.0, "to_um": 10.0, "n_cells": 200, "area_um2": 1e4},
        {"from_um": 10.0, "to_um": None, "n_cells": 900, "area_um2": 9e4},
    ]
    low, high = sorted(_heights(plots.border_profile(rings), "bar"))
    assert high == pytest.approx(2 * low, rel=0.01)


def test_windows_to_look_at():
    rng = np.random.default_rng(0)
    dense = rng.uniform((0, 0), (200, 200), (400, 2))
    thin = rng.uniform((0, 0), (2000, 1000), (300, 2))
    sides = np.array([[1000.0, 0, 1000, 1000]])
    zooms = choose_zooms(np.concatenate([dense, thin]), (1000, 2000), 200, sides)
    by_name = {zoom.name: zoom for zoom in zooms}
    assert by_name["dense"].window == (0, 200, 0, 200)
    assert by_name["dense"].n_cells >= 400
    assert by_name["border"].window[2:] == (900, 1100)
    assert by_name["sparse"].n_cells < 12
    assert choose_zooms(np.zeros((0, 2)), (1000, 2000), 200, sides) == []
    assert zooms == choose_zooms(np.concatenate([dense, thin]), (1000, 2000), 200, sides)


def test_a_window_larger_than_the_slide_fits():
    zooms = choose_zooms(np.array([[5.0, 5.0]]), (50, 80), 50, np.zeros((0, 4)))
    assert [zoom.window for zoom in zooms] == [(0, 50, 0, 50)]


def test_only_the_outlines_wanted_are_read(parts):
    element = View(parts).find("shapes", "cell_boundaries")
    found = list(outlines(element, np.array(["s1-2", "s1-105", "elsewhere"])))
    assert sum(map(len, found)) == 2
    assert shapely.bounds(found[0][0]).tolist() == [60, 20, 80, 40]


# --- stage and summary


@pytest.fixture(scope="module")
def outdir(parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    store, qc = folder / "s1" / "s1.zarr", folder / "s1" / "qc.json"
    assemble_slide(parts, store, qc=qc, settings=Settings())
    view = View([store])
    (folder / "s1" / "report.html").write_text(render(view, compute_qc(view), SCORES))
    samples_table([qc], "s1,lost", folder / "samples.tsv")
    return folder


def test_report_from_a_store_alone(outdir, tmp_path):
    report_slide(outdir / "s1" / "s1.zarr", tmp_path / "r.html", settings=Settings())
    with_file = report_slide(
        outdir / "s1" / "s1.zarr", tmp_path / "q.html", qc=outdir / "s1" / "qc.json", settings=Settings()
    )
    assert with_file.read_text() == (tmp_path / "r.html").read_text()
    with pytest.raises(CellquiltError) as caught:
        report_slide(outdir / "s1" / "s1.zarr", tmp_path / "r.html", settings=Settings())
    assert caught.value.code == "output-exists"


def test_a_qc_file_of_another_version_will_do(outdir, tmp_path):
    short = tmp_path / "qc.json"
    short.write_text(json.dumps({"sample": "s1", "verdict": "PASS", "n_cells": 105, "patches": {"n": 2}}))
    text = Page(report_slide(outdir / "s1" / "s1.zarr", tmp_path / "r.html", qc=short, settings=Settings()).read_text())
    assert "PASS All checks passed." in text.text
    short.write_text(json.dumps({"sample": "s1", "verdict": "GOOD"}))
    with pytest.raises(CellquiltError) as caught:
        report_slide(outdir / "s1" / "s1.zarr", tmp_path / "r.html", qc=short, settings=Settings(), overwrite=True)
    assert caught.value.code == "qc-unreadable"


def test_summary(outdir):
    lines = summary_table(outdir).splitlines()
    assert lines[0].split() == "sample cells transcripts in cells verdict time F1 nuclei F1 cells".split()  # noqa: SIM905
    assert lines[2].split() == ["s1", "105", "308", "90.0%", "WARN", "18", "s", "0.951", "0.912"]
    assert lines[3].split() == ["lost", "–", "–", "–", "failed", "–", "–", "–"]
    assert f"report of s1: {outdir}/s1/report.html" in lines
    assert "lost failed" in lines


def test_domains_in_the_tables(outdir, tmp_path):
    qc = json.loads((outdir / "s1" / "qc.json").read_text())
    for name, more in {
        "with": {"n_domains": 4},
        "without": {
            "domains_missing": {
                "code": "genes-missing",
                "stage": "DOMAINS_PREPARE",
                "message": "there are no genes",
                "hint": "h",
            }
        },
        "table": {"verdict": None, "n_transcripts": None, "share_assigned": None, "n_domains": 3},
    }.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({**qc, **more, "sample": name}))
    samples_table(sorted(tmp_path.glob("*.json")), "with,without,table", tmp_path / "samples.tsv")
    head, *rows = [line.split("\t") for line in (tmp_path / "samples.tsv").read_text().splitlines()]
    assert [row[head.index("error")] for row in rows] == ["", "genes-missing", ""]
    lines = summary_table(tmp_path).splitlines()
    assert lines[0].split()[-1] == "domains"
    assert [line.split()[-1] for line in lines[2:5]] == ["4", "–", "3"]
    assert "without: domains missing: there are no genes" in lines


def test_summary_names_the_cause_of_a_failure(tmp_path):
    samples_table([], "a", tmp_path / "samples.tsv")
    table = tmp_path / "samples.tsv"
    head, row = table.read_text().splitlines()
    cells = row.split("\t")
    cells[head.split("\t").index("stage")] = "CONVERT"
    cells[head.split("\t").index("cause")] = "image is truncated"
    table.write_text(f"{head}\n" + "\t".join(cells) + "\n")
    assert "a failed in CONVERT: image is truncated" in summary_table(tmp_path)
    with pytest.raises(CellquiltError) as caught:
        summary_table(tmp_path / "nowhere")
    assert caught.value.code == "results-missing"
