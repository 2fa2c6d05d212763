"""The report of a cohort's domains: what it says, that it stands alone and names no one; pictures; the command line."""

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import anndata
import cellquilt as cq
import click
import numpy as np
import pandas as pd
import pytest
from cellquilt.cli import main
from cellquilt.core.errors import CellquiltError
from cellquilt.core.transforms import round_length
from cellquilt.domains import analysis, plots
from cellquilt.domains.hierarchy import Hierarchy
from cellquilt.domains.maps import PALETTE, domain_colours, domain_raster
from cellquilt.report.cohort import report_cohort
from cellquilt.report.figures import figure_svg
from test_domains_analysis import SETS, make_table
from test_report import Page

TREE = Hierarchy.of(np.random.default_rng(0).normal(size=(20, 4)))
NAMES = [f"D{node}" for node in np.unique(TREE.nodes_at(4)).tolist()]


@pytest.fixture(scope="module")
def tables() -> list[anndata.AnnData]:
    """Six slides of two conditions, named as nodes of a tree, with a truth."""
    found = []
    for k in range(6):
        table = make_table(k, sample=f"slide {k} <b>", graph=True)
        table.obs["domain_true"] = table.obs["domain"]
        table.obs["domain"] = table.obs["domain"].cat.rename_categories(
            dict(zip(["D9", "D10", "D11", "D12"], NAMES, strict=True))
        )
        table.obs["condition"] = ["control", "treated"][k % 2]
        found.append(table)
    return found


@pytest.fixture(scope="module")
def written(tables, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cohort")
    (folder / "about.json").write_text(json.dumps({"weights": "/home/someone/models/liver", "training": {"epochs": 7}}))
    report_cohort(
        tables,
        folder / "report.html",
        condition_key="condition",
        gene_sets=SETS,
        hierarchy=TREE,
        about=folder / "about.json",
        tables=folder / "domains",
    )
    return folder


@pytest.fixture(scope="module")
def page(written) -> Page:
    return Page((written / "report.html").read_text())


def test_the_page_stands_alone_and_names_no_one(written, page):
    html = (written / "report.html").read_text()
    assert len(html) < 2_000_000
    assert all(link.startswith(("data:image/", "#")) for link in page.links)
    assert not re.search(r"url\((?!#)|@import|<script(?! type=\"application/json\")", html)
    assert "http" not in html
    assert len(page.ids) == len(set(page.ids))
    assert page.unlabelled == []
    assert "/home/" not in html
    assert "someone" not in html


def test_it_says_what_was_found(page, tables):
    text = page.text
    cells = sum(table.n_obs for table in tables)
    assert f"{cells:,}" in text
    assert "Spatial domains of 6 slides" in text
    assert "slide 3 <b>" in text
    assert "The p-values are descriptive" in text
    assert "rewards domains that were merged into one" in text
    assert "control against treated: 3 and 3 samples, compared with all 20 ways" in text
    assert "Adjusted Rand index" in text
    assert "small (1 of 2)" in text
    assert "epochs" in text
    assert "radius um" in text
    assert "numpy" in text
    for section in ("maps", "proportions", "architecture", "genes", "conditions", "pathways", "hierarchy", "metrics"):
        assert section in page.ids
        assert f"#{section}" in page.links


def test_numbers_for_machines_are_those_of_the_tables(written, tables):
    html = (written / "report.html").read_text()
    found = re.search(r'<script type="application/json" id="cellquilt-report">(.*?)</script>', html, re.DOTALL)
    data = json.loads(found.group(1))
    shares = pd.read_csv(written / "domains" / "proportions.csv")
    assert data["domains"] == list(dict.fromkeys(shares["domain"]))
    for slide, rows in shares.groupby("slide"):
        assert data["n_cells"][slide] == dict(zip(rows["domain"], rows["n_cells"], strict=True))
    assert data["agreement"]["ari"] == pytest.approx(1)
    assert sorted(data["dendrogram"]["domains"]) == sorted(NAMES)
    assert {path.name for path in (written / "domains").iterdir()} == {
        *("architecture.csv", "conditions_genes.csv", "conditions_proportions.csv", "genes_by_domain.csv"),
        *("metrics.csv", "pathway_scores.csv", "pathway_sets.csv", "proportions.csv", "variable_genes.csv"),
    }


def test_the_same_bytes_again_from_files(written, tables, tmp_path):
    paths = []
    for k, table in enumerate(tables):
        table.write_h5ad(tmp_path / f"{k}.h5ad")
        paths.append(tmp_path / f"{k}.h5ad")
    options = {"condition_key": "condition", "gene_sets": SETS, "hierarchy": TREE, "about": written / "about.json"}
    report_cohort(analysis.read_tables(paths), tmp_path / "report.html", **options)
    assert (tmp_path / "report.html").read_bytes() == (written / "report.html").read_bytes()


def test_nothing_is_left_of_a_report_that_failed(tables, tmp_path):
    with pytest.raises(CellquiltError, match="no column"):
        report_cohort(tables, tmp_path / "report.html", condition_key="conditions")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "report.html").write_text("mine")
    with pytest.raises(CellquiltError, match="exists already"):
        report_cohort(tables, tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text() == "mine"


def test_what_tables_lack_is_said_and_the_rest_is_shown(tmp_path):
    bare = []
    for k in range(2):
        table = make_table(k)
        bare.append(anndata.AnnData(obs=table.obs, obsm=dict(table.obsm)))
    bare[1].obs["domain"] = pd.Categorical([None] * bare[1].n_obs)
    report_cohort(bare, tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text())
    assert "No architecture: s0 has no graph of cells." in page.text
    assert "No genes: s0 has no expression." in page.text
    assert {"architecture", "genes", "conditions", "pathways", "hierarchy"}.isdisjoint(page.ids)


def test_one_slide_of_one_domain(tmp_path):
    table = make_table(0, graph=True)
    table.obs["domain"] = "D1"
    table.obs["condition"] = "x"
    report_cohort(table, tmp_path / "report.html")
    text = Page((tmp_path / "report.html").read_text()).text
    assert "Spatial domains of 1 slide " in text
    assert "All cells are of one domain" in text
    with pytest.raises(CellquiltError, match="nothing to compare"):
        report_cohort(table, tmp_path / "other.html", condition_key="condition")


@pytest.mark.parametrize(("text", "code"), [(None, "about-missing"), ("{", "about-invalid"), ("[1]", "about-invalid")])
def test_what_is_known_of_the_run_must_be_json(tables, tmp_path, text, code):
    if text is not None:
        (tmp_path / "about.json").write_text(text)
    with pytest.raises(CellquiltError) as caught:
        report_cohort(tables[:2], tmp_path / "report.html", about=tmp_path / "about.json")
    assert caught.value.code == code


# --- pictures


def test_every_place_has_the_colour_of_its_nearest_cell():
    rng = np.random.default_rng(0)
    xy, codes = rng.uniform(0, 300, (400, 2)) + np.array([1000, -50]), rng.integers(-1, 3, 400)
    raster = domain_raster(xy, codes, most_px=90)
    assert max(raster.codes.shape) == 90
    nearest = np.linalg.norm(xy[:, None] - xy, axis=2) + np.diag(np.full(400, np.inf))
    reach = 1.5 * np.median(nearest.min(axis=1))
    low = xy.min(axis=0) - reach
    for row, column in rng.integers(0, min(raster.codes.shape), (200, 2)):
        place = low + (np.array([column, row]) + 0.5) * raster.um
        distance = np.linalg.norm(xy - place, axis=1)
        want = codes[distance.argmin()] if distance.min() < max(reach, 1.25 * raster.um) else -2
        assert raster.codes[row, column] == want


def test_a_million_cells_are_drawn_in_pixels():
    xy = np.random.default_rng(0).uniform(0, 10_000, (200_000, 2))
    raster = domain_raster(xy, (xy[:, 0] > 5000).astype(int), most_px=300)
    assert raster.codes.shape[1] == 300
    assert (raster.codes[:, :149] == 0).mean() > 0.99
    assert (raster.codes[:, 151:] == 1).mean() > 0.99
    colours = raster.colours(["#0072b2", "#e69f00"])
    assert colours[150, 10].tolist() == [0, 0x72, 0xB2, 255]
    empty = domain_raster(np.empty((0, 2)), np.empty(0, np.int64)).colours(["#0072b2"])
    assert empty.tolist() == [[[0, 0, 0, 0]]]


def test_figures_say_what_they_need(monkeypatch, tables):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(CellquiltError, match="matplotlib") as caught:
        plots.proportions(analysis.proportions(tables))
    assert caught.value.code == "package-missing"


def test_scale_bars_are_round():
    assert [round_length(most) for most in (7, 5, 4.99, 2000, 0.3, 1)] == [5, 5, 2, 2000, 0.2, 1]


def lab(colours: np.ndarray, sight: np.ndarray) -> np.ndarray:
    """CIELAB of (n, 3) sRGB as an eye sees them."""
    linear = np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array(
        [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.072175], [0.0193339, 0.119192, 0.9503041]]
    )
    xyz = np.clip(linear @ sight.T, 0, 1) @ to_xyz.T / (0.95047, 1, 1.08883)
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], axis=1)


#: Machado et al. 2009, full severity.
SIGHTS = {
    "normal": np.eye(3),
    "protan": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "deutan": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]]
    ),
}


@pytest.mark.parametrize("sight", SIGHTS)
@pytest.mark.parametrize(("n", "apart"), [(10, 26), (20, 16)])
def test_domains_can_be_told_apart_by_colour_blind_readers(sight, n, apart):
    colours = np.array([[int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)] for colour in PALETTE[:n]])
    seen = lab(colours, SIGHTS[sight])
    distance = np.linalg.norm(seen[:, None] - seen, axis=2)
    assert distance[np.triu_indices(n, 1)].min() > apart


def test_a_domain_has_one_colour_everywhere(tables):
    colours = domain_colours(NAMES)
    figure = plots.domain_maps(tables[:2], columns=2)
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == NAMES
    drawn = figure.axes[0].images[0].get_array().reshape(-1, 4)
    there = {f"#{red:02x}{green:02x}{blue:02x}" for red, green, blue, alpha in np.unique(drawn, axis=0) if alpha}
    assert set(colours.values()) <= there
    assert any("µm" in text.get_text() for text in figure.axes[0].texts)


def test_figures_are_small_whole_svg(tables):
    found = analysis.analyse_cohort(tables, condition_key="condition", gene_sets=SETS)
    draw = {
        "proportions": lambda: plots.proportions(found.proportions),
        "conditions": lambda: plots.shares_by_condition(found.proportions),
        "adjacency": lambda: plots.adjacency(found.architecture),
        "paga": lambda: plots.paga(found.architecture, found.architecture.slides[2]),
        "genes": lambda: plots.genes(found.genes),
        "pathways": lambda: plots.pathways(found.pathways.by_domain()),
        "dendrogram": lambda: plots.dendrogram(analysis.dendrogram(TREE, NAMES)),
    }
    for name, figure in draw.items():
        text = figure_svg(figure(), f"a <figure> of {name}")
        root = ET.fromstring(text)
        assert root.get("aria-label") == f"a <figure> of {name}"
        assert len(text) < 120_000
        assert "#010203" not in text
        assert figure_svg(figure(), f"a <figure> of {name}") == text
        words = " ".join(root.itertext())
        for domain in NAMES if name != "conditions" else []:
            assert domain in words
    bars = [patch for patch in draw["proportions"]().axes[0].patches if patch.get_width() > 0]
    assert len(bars) == 6 * 4
    assert sum(patch.get_width() for patch in bars) == pytest.approx(6)


def test_many_domains_and_long_names_still_draw():
    rng = np.random.default_rng(0)
    table = make_table(0, n=600, graph=True)
    table.obs["domain"] = [f"a domain with a very long name {k}" for k in rng.integers(0, 30, 600)]
    found = analysis.analyse_cohort(table)
    for figure in (plots.proportions(found.proportions), plots.adjacency(found.architecture), plots.genes(found.genes)):
        assert "<svg" in figure_svg(figure, "many")


# --- command line


@pytest.fixture(scope="module")
def files(tables, tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("files")
    for k, table in enumerate(tables):
        table.write_h5ad(folder / f"{k}.h5ad")
    (folder / "sets.json").write_text(json.dumps(SETS))
    return [str(folder / f"{k}.h5ad") for k in range(len(tables))]


def run(*words: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(["domains", *words])
    return stop.value.code or 0


def test_commands_write_what_the_functions_return(files, tables, tmp_path):
    sets = str(Path(files[0]).with_name("sets.json"))
    out = {name: str(tmp_path / f"{name}.csv") for name in ("p", "a", "g", "d", "c", "e", "w", "s")}
    assert run("proportions", *files, "--condition-key", "condition", "-o", out["p"]) == 0
    assert run("architecture", *files, "-o", out["a"]) == 0
    assert run("genes", *files, "-o", out["g"]) == 0
    assert run("genes", *files, "--by-domain", "-o", out["d"]) == 0
    assert run("compare", *files, "--condition-key", "condition", "-o", out["c"]) == 0
    assert run("compare", *files, "--condition-key", "condition", "--what", "expression", "-o", out["e"]) == 0
    assert run("pathways", *files, "--gene-sets", sets, "--sets", out["s"], "-o", out["w"]) == 0
    statistics = analysis.gene_statistics(tables)
    scores = analysis.pathway_scores(tables, SETS)
    wanted = {
        "p": analysis.proportions(tables, condition_key="condition"),
        "a": analysis.architecture(tables).to_frame(),
        "g": statistics.by_gene(),
        "d": statistics.by_domain(),
        "c": analysis.compare_conditions(tables, "condition"),
        "e": analysis.compare_conditions(tables, "condition", what="expression"),
        "w": scores.scores,
        "s": scores.sets,
    }
    for name, want in wanted.items():
        read = pd.read_csv(out[name], keep_default_na=False, na_values=[""])
        if "note" in want:
            want = want.assign(note=np.nan)  # there is nothing to say, and nothing in the file
        pd.testing.assert_frame_equal(read, want, check_dtype=False, check_exact=False, rtol=1e-12)


def test_report_by_command(files, tmp_path):
    page = tmp_path / "cohort" / "report.html"
    words = [
        "report",
        *files,
        "--condition-key",
        "condition",
        "--tables-output",
        str(tmp_path / "out"),
        "-o",
        str(page),
    ]
    assert run(*words) == 0
    assert "Spatial domains of 6 slides" in page.read_text()
    assert (tmp_path / "out" / "conditions_proportions.csv").is_file()
    assert run(*words) == 1  # it stands there already


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["proportions", "none.h5ad", "-o", "o.csv"], "table-missing"),
        (["proportions", "FILES", "-o", "o.xlsx"], "format-unknown"),
        (["proportions", "FILES", "--domain-key", "domian", "-o", "o.csv"], "domains-missing"),
        (["compare", "FILES", "--condition-key", "none", "-o", "o.csv"], "condition-missing"),
        (["compare", "FILES", "--condition-key", "condition", "--what", "genes", "-o", "o.csv"], "comparison-unknown"),
        (["pathways", "FILES", "--gene-sets", "none.gmt", "-o", "o.csv"], "gene-sets-missing"),
        (["compare", "FILES", "-o", "o.csv"], "usage"),
    ],
)
def test_mistakes_on_the_command_line(files, tmp_path, monkeypatch, capsys, words, code):
    monkeypatch.chdir(tmp_path)
    assert run(*[part for word in words for part in (files if word == "FILES" else [word])]) != 0
    assert f"[{code}]" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_defaults_of_commands_are_those_of_the_functions():
    import inspect

    from cellquilt.cli.domains_analysis import COMMANDS

    functions = {
        "proportions": analysis.proportions,
        "architecture": analysis.architecture,
        "genes": analysis.gene_statistics,
        "compare": analysis.compare_conditions,
        "pathways": analysis.pathway_scores,
        "report": report_cohort,
    }
    for command in COMMANDS:
        signature = inspect.signature(functions[command.name]).parameters
        for option in command.params:
            if option.name in signature and option.name != "tables" and not option.required:
                default = option.get_default(click.Context(command))
                assert (default if isinstance(default, str | int) else None) == signature[option.name].default, (
                    command.name,
                    option.name,
                )


def test_help_is_instant():
    code = (
        "import sys; from click.testing import CliRunner; from cellquilt.cli.domains import domains;"
        "CliRunner().invoke(domains, ['--help']); sys.exit(bool({'anndata', 'matplotlib', 'torch'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_public_names():
    assert cq.domains.analysis.proportions is analysis.proportions
    assert cq.domains.plots.domain_maps is plots.domain_maps
