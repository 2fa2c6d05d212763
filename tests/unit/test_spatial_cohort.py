"""A slide's statistics in one folder, conditions compared by samples, the verbs, the pages, and mistakes."""

import json
import re
from pathlib import Path

import anndata
import cellquilt as cq
import numpy as np
import pandas as pd
import pytest
from cellquilt import CellquiltError
from cellquilt.cli.spatial import stats
from cellquilt.core.settings import Settings
from cellquilt.core.shapes import read_geoparquet
from cellquilt.report.spatial import spatial_context, write_cohort_page
from cellquilt.spatial.stage import stats_slide
from click.testing import CliRunner
from scipy.sparse import csr_matrix

TABLES = {
    *("co_occurrence", "composition", "distances", "enrichment", "network", "niches", "niches_by_domain"),
}


def make_table(seed: int, sample: str = "s1", condition: str = "x", n: int = 250, mix: float = 0.8) -> anndata.AnnData:
    """Two domains side by side; types prefer one by `mix`."""
    rng = np.random.default_rng(seed)
    xy = rng.random((n, 2)) * 160
    domain = (xy[:, 0] > 80).astype(int)
    kind = np.where(rng.random(n) < mix, domain, rng.integers(0, 3, n))
    obs = pd.DataFrame(
        {
            "cell_type": pd.Categorical(np.array(["B", "T", "rare"])[kind]),
            "domain": pd.Categorical(np.array(["D2", "D10"])[domain]),
            "sample": sample,
            "condition": condition,
            "batch": "1",
            "area_um2": rng.random(n),
        },
        index=[f"{sample}-{k}" for k in range(n)],
    )
    return anndata.AnnData(csr_matrix(rng.poisson(1.0, (n, 5))), obs=obs, obsm={"spatial": xy})


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Eight slides of two conditions: types mix more in one."""
    where = tmp_path_factory.mktemp("stats")
    found = []
    for k in range(8):
        table = make_table(k, f"s{k}", "ab"[k % 2], mix=(0.9, 0.3)[k % 2])
        found.append(cq.spatial.slide_statistics(table, n_permutations=9).write(where / f"s{k}"))
    return found


# --- of a slide


def test_all_there_is_is_measured_and_read_back(tmp_path):
    table = make_table(0)
    before = table.obs.copy()
    found = cq.spatial.slide_statistics(table, n_permutations=19)
    assert set(found.tables) == TABLES
    assert found.about["metadata"] == {"batch": "1", "condition": "x"}
    assert (found.about["cell_type_key"], found.about["domain_key"]) == ("cell_type", "domain")
    pd.testing.assert_frame_equal(table.obs, before)
    assert not table.obsp  # the graph is ours, the table stays
    again = cq.spatial.SlideStatistics.read(found.write(tmp_path / "s"))
    for name, own in found.tables.items():
        pd.testing.assert_frame_equal(again.tables[name], own, check_dtype=False)
    outlines, columns, _ = read_geoparquet(tmp_path / "s/niches.parquet")
    assert columns.column("domain").to_pylist() == ["D2", "D10"]  # natural order
    assert found.tables["niches"]["area_um2"].tolist() == pytest.approx([o.area for o in outlines])


def test_the_same_bytes_whatever_the_threads(tmp_path):
    for threads in (1, 3):
        found = cq.spatial.slide_statistics(make_table(1), n_permutations=9, threads=threads)
        found.write(tmp_path / str(threads))
    for path in sorted((tmp_path / "1").iterdir()):
        assert path.read_bytes() == (tmp_path / "3" / path.name).read_bytes(), path.name


def test_the_table_s_own_graph_is_used():
    table = make_table(2)
    cq.spatial_neighbors(table, radius=20)
    short = cq.spatial.neighbourhood_enrichment(table, n_permutations=0)
    cq.spatial_neighbors(table, radius=80)
    assert short.edges.sum() < cq.spatial.neighbourhood_enrichment(table, n_permutations=0).edges.sum()


def test_what_lacks_is_noted():
    table = make_table(3)
    del table.obs["domain"]
    found = cq.spatial.slide_statistics(table, n_permutations=0)
    assert set(found.tables) == {"enrichment", "distances", "co_occurrence"}
    assert found.about["notes"] == ['no domains: obs has no column "domain"']
    del table.obs["cell_type"]
    bare = cq.spatial.slide_statistics(table)
    assert not bare.tables
    assert "no cell types" in bare.about["notes"][0]
    table.obs["leiden"] = "one"
    one = cq.spatial.slide_statistics(table, n_permutations=0)
    assert set(one.tables) == {"distances"}
    assert "no enrichment: all cells are of one cell type, one" in one.about["notes"]


def test_of_few_cells_there_is_nothing_to_measure():
    found = cq.spatial.slide_statistics(make_table(0)[:2].copy())
    assert not found.tables
    assert found.about["notes"] == ["2 cells: there is nothing to measure between them"]


def test_unreachable_pairs_are_named():
    table = make_table(4)
    table.obsm["spatial"][:5] += 5000
    table.obs["cell_type"] = table.obs["cell_type"].astype(str)
    table.obs.iloc[:5, 0] = "island"
    found = cq.spatial.slide_statistics(table, n_permutations=0)
    (note,) = found.about["notes"]
    assert "without a way along the graph" in note
    assert "island" in note
    own = found.tables["distances"].query("unit == 'hops' and source == 'island' and target == 'T'")
    assert own["n_unreachable"].tolist() == [5]
    assert own["mean"].isna().all()


# --- of a cohort


def test_conditions_that_differ_are_told_apart(folders):
    found = cq.spatial.cohort_statistics(folders, "condition")
    assert set(found.compared["n_a"]) == {3, 4}
    assert found.compared["smallest_p"].min() == 2 / 70
    mixed = found.compared.query("quantity == 'enrichment' and a == 'B' and b == 'T'").iloc[0]
    assert mixed["p"] == 2 / 70
    assert mixed["difference"] > 1
    of_sample = found.values.query("quantity == 'enrichment' and a == 'B' and b == 'T'")
    assert of_sample["sample"].tolist() == [f"s{k}" for k in range(8)]
    table = (
        cq.spatial.SlideStatistics.read(folders[0])
        .tables["enrichment"]
        .query("of == 'cell_type' and a == 'B' and b == 'T'")
    )
    expected = np.log2((table["n_edges"] + 0.5) / (table["expected"] + 0.5)).iloc[0]
    assert of_sample["value"].iloc[0] == pytest.approx(expected)


def test_the_order_of_slides_changes_nothing(folders):
    one = cq.spatial.cohort_statistics(folders, "condition")
    two = cq.spatial.cohort_statistics(folders[::-1], "condition")
    pd.testing.assert_frame_equal(one.values, two.values)
    pd.testing.assert_frame_equal(one.compared, two.compared)


def test_under_three_samples_a_group_there_are_no_p_values(folders):
    found = cq.spatial.cohort_statistics(folders[:5], "condition")
    assert found.compared["p"].isna().all()
    assert found.compared["difference"].notna().any()
    assert set(found.compared["note"]) == {"fewer than 3 samples in a group"}


def test_of_one_condition_nothing_is_compared(folders):
    found = cq.spatial.cohort_statistics(folders, "batch")
    assert found.compared is None
    assert found.notes[0] == 'nothing to compare: batch is "1" in all samples'
    assert len(found.values) == len(cq.spatial.cohort_statistics(folders).values)


def test_slides_of_a_patient_are_one_sample(folders):
    slides = [cq.spatial.SlideStatistics.read(folder) for folder in folders]
    for k, slide in enumerate(slides):
        slide.about["metadata"]["patient"] = f"p{k % 2 + 2 * (k // 4)}"
    found = cq.spatial.cohort_statistics(slides, "condition", "patient")
    assert found.values["sample"].unique().tolist() == ["p0", "p1", "p2", "p3"]
    key = ("enrichment", "B", "T")
    each = cq.spatial.cohort_statistics(folders).values.set_index(["sample", "quantity", "a", "b"])["value"]
    own = found.values.set_index(["sample", "quantity", "a", "b"])["value"]
    assert own[("p0", *key)] == pytest.approx(np.mean([each[("s0", *key)], each[("s2", *key)]]))


@pytest.mark.slow
def test_null_cohorts_find_what_chance_finds():
    """200 cohorts of slides that do not differ: p < 0.05 in 3 to 7 % of comparisons."""
    pool = [
        cq.spatial.slide_statistics(make_table(100 + k, f"s{k}", n=100, mix=0.5), n_permutations=0) for k in range(40)
    ]
    rng = np.random.default_rng(5)
    p = []
    for _ in range(200):
        chosen = rng.choice(len(pool), 12, replace=False)
        slides = []
        for place, k in enumerate(chosen):
            about = {**pool[k].about, "metadata": {"condition": "ab"[place % 2]}}
            slides.append(cq.spatial.SlideStatistics(about, {"enrichment": pool[k].tables["enrichment"]}))
        p.append(cq.spatial.cohort_statistics(slides, "condition").compared["p"].to_numpy())
    assert all(len(own) == 6 for own in p)
    share = np.mean(np.concatenate(p) < 0.05)
    assert 0.03 <= share <= 0.07, share


# --- the verbs, and the pages


def run(*args):
    return CliRunner().invoke(stats, [str(arg) for arg in args], catch_exceptions=True)


def test_the_verbs_do_what_the_api_does(tmp_path, folders):
    make_table(0).write_h5ad(tmp_path / "t.h5ad")
    done = run(tmp_path / "t.h5ad", "-o", tmp_path / "s", "--permutations", "19", "--threads", "2")
    assert done.exit_code == 0, done.exception
    cq.spatial.slide_statistics(make_table(0), n_permutations=19).write(tmp_path / "api")
    for path in sorted((tmp_path / "api").iterdir()):
        assert path.read_bytes() == (tmp_path / "s" / path.name).read_bytes(), path.name
    done = run("cohort", *folders, "--condition-key", "condition", "-o", tmp_path / "c", "--html", tmp_path / "c.html")
    assert done.exit_code == 0, done.exception
    assert {path.name for path in (tmp_path / "c").iterdir()} == {"spatial.csv", "conditions_spatial.csv"}
    written = pd.read_csv(tmp_path / "c/conditions_spatial.csv", keep_default_na=False, na_values=[""])
    assert len(written) == len(cq.spatial.cohort_statistics(folders, "condition").compared)


def test_what_was_measured_is_not_read(tmp_path):
    """A matrix that cannot be read is no obstacle, nor is its size."""
    table = make_table(0)
    table.write_zarr(tmp_path / "t.zarr")
    for path in sorted((tmp_path / "t.zarr/X").rglob("*")):
        if path.is_file():
            path.write_bytes(b"damaged")
    found = stats_slide(tmp_path / "t.zarr", tmp_path / "s", settings=Settings({"stats_permutations": 0}))
    assert found.about["n_cells"] == table.n_obs


def test_pages_show_it(tmp_path, folders):
    context = spatial_context(folders[0])
    assert len(context["charts"]) == 5
    assert context["curves"]
    assert context["network"]
    assert [row["domain"] for row in context["niches"]["rows"]] == ["D2", "D10"]
    assert len(context["niches"]["map"]["paths"]) == 2
    for chart in context["charts"]:
        assert chart["svg"].count("<svg") == chart["svg"].count("</svg>") == 1
        assert "nan" not in chart["svg"]
    found = cq.spatial.cohort_statistics(folders, "condition")
    page = write_cohort_page(found, [f"s{k}" for k in range(8)], tmp_path / "c.html").read_text()
    assert "Spatial statistics of 8 slides" in page
    assert "a against b: 4 and 4 samples" in page
    assert not re.search(r'(?:src|href)="(?:https?:|/)', page)
    assert "NaN" not in page
    assert page == write_cohort_page(found, [f"s{k}" for k in range(8)], tmp_path / "d.html").read_text()


# --- what users get wrong


def with_(change):
    def table():
        own = make_table(0, n=40)
        change(own)
        return own

    return table


def _nan(table):
    table.obsm["spatial"][3, 1] = np.nan


def _one_type(table):
    table.obs["cell_type"] = "B"


def _no_type(table):
    table.obs["cell_type"] = pd.Categorical([None] * table.n_obs)


def _pixels(table):
    table.obsm["spatial"] *= 1000


def _no_places(table):
    del table.obsm["spatial"]


def _nothing(table):
    pass


@pytest.mark.parametrize(("change", "call", "code", "said"), [
    (_nothing, lambda t: cq.spatial.neighbourhood_enrichment(t, "cell_typ"),
     "column-unknown", 'did you mean "cell_type"'),
    (_nothing, lambda t: cq.spatial.slide_statistics(t, domain_key="domian"),
     "column-unknown", 'did you mean "domain"'),
    (_nan, lambda t: cq.spatial.co_occurrence(t), "coordinates-invalid", "s1-3"),
    (_nan, lambda t: cq.spatial.slide_statistics(t), "coordinates-invalid", "s1-3"),
    (_no_places, lambda t: cq.spatial.group_distances(t), "coordinates-missing", "spatial"),
    (_one_type, lambda t: cq.spatial.neighbourhood_enrichment(t), "groups-too-few", '"B"'),
    (_one_type, lambda t: cq.spatial.co_occurrence(t), "groups-too-few", '"B"'),
    (_no_type, lambda t: cq.spatial.neighbourhood_enrichment(t), "groups-empty", "cell_type"),
    (_nothing, lambda t: cq.spatial.niche_geometry(t[:0].copy()), "table-empty", "no cells"),
    (_pixels, lambda t: cq.spatial.neighbourhood_enrichment(t), "coordinates-not-um", "µm"),
    (_nothing, lambda t: cq.spatial.neighbourhood_enrichment(t, n_permutations=-1), "permutations-invalid", "-1"),
    (_nothing, lambda t: cq.spatial.group_distances(t, unit="px"), "unit-unknown", "hops"),
    (_nothing, lambda t: cq.spatial.co_occurrence(t, edges_um=[10]), "rings-invalid", "10"),
    (_nothing, lambda t: cq.spatial.co_occurrence(t, edges_um=[0, 20, 10]), "rings-invalid", "ascending"),
    (_nothing, lambda t: cq.spatial.neighbourhood_enrichment(t, radius=-5.0), "radius-invalid", "-5"),
])  # fmt: skip
def test_mistakes_with_a_slide_are_named(change, call, code, said):
    with pytest.raises(CellquiltError) as caught:
        call(with_(change)())
    assert caught.value.code == code
    assert said in str(caught.value)


def test_a_column_of_cells_names_no_groups():
    table = make_table(0, n=400)
    table.obs["cell_id"] = table.obs_names
    with pytest.raises(CellquiltError, match="groups-too-many"):
        cq.spatial.neighbourhood_enrichment(table, "cell_id")


@pytest.mark.parametrize(("options", "code", "said"), [
    ({"condition_key": "conditon"}, "condition-missing", 'did you mean "condition"'),
    ({"condition_key": "condition", "reference": "c"}, "reference-unknown", '"c"'),
    ({"condition_key": "condition", "batch_key": "bach"}, "batch-missing", 'did you mean "batch"'),
    ({"condition_key": "condition", "sample_key": "batch"}, "condition-mixed", "condition is a in one slide"),
    ({"sample_key": "patient"}, "column-unknown", "patient"),
])  # fmt: skip
def test_mistakes_with_a_cohort_are_named(folders, options, code, said):
    with pytest.raises(CellquiltError) as caught:
        cq.spatial.cohort_statistics(folders, **options)
    assert caught.value.code == code
    assert said in str(caught.value)


def test_folders_of_something_else_are_refused(tmp_path, folders):
    with pytest.raises(CellquiltError, match="slide-twice"):
        cq.spatial.cohort_statistics([folders[0], folders[0]])
    with pytest.raises(CellquiltError, match="tables-missing"):
        cq.spatial.cohort_statistics([])
    with pytest.raises(CellquiltError, match="stats-unreadable"):
        cq.spatial.cohort_statistics([tmp_path / "none"])
    (tmp_path / "about.json").write_text(json.dumps({"sample": "s"}))
    with pytest.raises(CellquiltError, match="something else"):
        cq.spatial.cohort_statistics([tmp_path])
    assert Path(folders[0]).is_dir()
