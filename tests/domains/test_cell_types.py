"""Clusters and cell types on simulated slides whose types are known."""

import json

import anndata
import cellquilt as cq
import numpy as np
import pandas as pd
import pytest
from cellquilt.aggregation.columns import read_columns
from cellquilt.celltypes.clusters import find_clusters
from cellquilt.celltypes.measured import measured, scaled_intensities
from cellquilt.celltypes.phenotypes import phenotype, read_signatures
from cellquilt.celltypes.transfer import transfer_labels
from cellquilt.core.errors import CellquiltError
from cellquilt.core.settings import SETTINGS
from cellquilt.simulate.proteins import PROTEINS
from cellquilt.simulate.tables import cell_tables
from click.testing import CliRunner
from sklearn.metrics import adjusted_rand_score

LINEAGE = {name: types for name, types in PROTEINS.items() if types}
FAILING = 7


@pytest.fixture(scope="module")
def slides():
    """Two slides of counts; the first one's last cells fail QC."""
    first, second = cell_tables(2, 600, seed=3)
    first.obs["passes_qc"] = np.arange(first.n_obs) < first.n_obs - FAILING
    return first, second


@pytest.fixture(scope="module")
def proteins():
    return cell_tables(1, 800, kind="protein", seed=1)[0]


def signatures(without=()):
    types = sorted({one for of in LINEAGE.values() for one in of} - set(without))
    return {one: [name for name, of in LINEAGE.items() if one in of] for one in types}


def truth(table, unknown=()):
    found = table.obs["cell_type"].astype(str).to_numpy()
    return np.where(np.isin(found, list(unknown)), "unknown", found)


@pytest.fixture(scope="module")
def clustered(slides):
    return find_clusters(slides[0])


def test_clusters_are_those_of_scanpy_called_by_hand(slides, clustered):
    import scanpy as sc

    clusters, _ = clustered
    own = slides[0][:-FAILING].copy()
    sc.pp.normalize_total(own)
    sc.pp.log1p(own)
    sc.pp.pca(own, n_comps=50, random_state=0)
    sc.pp.neighbors(own, n_neighbors=15, random_state=0)
    sc.tl.leiden(own, resolution=1.0, flavor="igraph", n_iterations=2, directed=False, random_state=0)
    assert adjusted_rand_score(own.obs["leiden"], clusters[:-FAILING].astype(str)) == 1
    assert clusters[-FAILING:].isna().all()
    known = truth(slides[0])[:-FAILING]
    assert adjusted_rand_score(known, clusters[:-FAILING].astype(str)) > 0.9


def test_clusters_are_named_by_size_and_marked_by_what_they_express(slides, clustered):
    clusters, markers = clustered
    sizes = np.bincount(clusters.codes[clusters.codes >= 0])
    assert (np.diff(sizes) <= 0).all()
    assert list(markers.columns) == [
        "cluster", "gene", "rank", "effect", "difference", "auc", "mean", "share_in", "share_out",
    ]  # fmt: skip
    assert set(markers["cluster"]) == set(clusters.categories)
    assert markers.groupby("cluster", observed=True).size().le(10).all()
    first = markers[markers["rank"] == 1]
    assert (first["auc"] > 0.8).all()
    # By brute force: the gene is in so many cells of the cluster, and of the others.
    counts = slides[0].to_df()[:-FAILING]
    for row in first.itertuples():
        inside = np.asarray(clusters[:-FAILING] == row.cluster)
        assert row.share_in == pytest.approx((counts.loc[inside, row.gene] > 0).mean())
        assert row.share_out == pytest.approx((counts.loc[~inside, row.gene] > 0).mean())


def test_clusters_of_proteins_are_cell_types(proteins):
    table = anndata.AnnData(np.zeros((proteins.n_obs, 0), dtype=np.int32), obs=proteins.obs[[]])
    table.obsm["intensities"] = proteins.to_df()
    clusters, markers = find_clusters(table)
    assert adjusted_rand_score(truth(proteins), clusters.astype(str)) > 0.8
    assert set(markers["gene"]) <= set(PROTEINS)


def test_only_the_most_variable_genes_if_asked(slides):
    clusters, _ = find_clusters(slides[0], n_top_genes=60, n_markers=1)
    assert adjusted_rand_score(truth(slides[0])[:-FAILING], clusters[:-FAILING].astype(str)) > 0.7


@pytest.mark.slow
def test_many_cells_whose_neighbours_are_found_approximately():
    """From 4096 cells on; twice the same."""
    (table,) = cell_tables(1, 4200, seed=5)
    first, second = (find_clusters(table)[0] for _ in range(2))
    assert first.codes.tolist() == second.codes.tolist()
    assert adjusted_rand_score(truth(table), first.astype(str)) > 0.9


def test_one_cluster_has_no_markers(slides):
    clusters, markers = find_clusters(slides[0][:200], resolution=1e-6)
    assert list(clusters.categories) == ["0"]
    assert len(markers) == 0
    assert "gene" in markers


def test_a_gain_or_a_few_bright_cells_change_no_level(proteins):
    values = proteins.to_df().to_numpy()[:, :5]
    levels = scaled_intensities(values)
    assert levels.min() >= 0
    assert levels.max() <= 1
    np.testing.assert_allclose(scaled_intensities(values * 37.5), levels, atol=1e-5)
    bright = np.concatenate([values, values.max(axis=0, keepdims=True) * 1000])
    assert np.abs(scaled_intensities(bright)[:-1] - levels).max() < 0.1


@pytest.mark.parametrize("left_out", ["kupffer", "t_cell"])
def test_markers_name_cells_and_leave_others_unknown(proteins, left_out):
    found = phenotype(proteins, signatures([left_out]))
    known = truth(proteins, [left_out])
    named = found["cell_type"].astype(str).to_numpy()
    assert (named == known)[known != "unknown"].mean() > 0.9
    assert (named == known)[known == "unknown"].mean() > 0.9
    assert found["cell_type"].cat.categories[-1] == "unknown"
    assert found["cell_type_score"].between(0, 1).all()


def test_markers_of_genes(slides):
    table = slides[1]
    means = table.to_df().groupby(table.obs["cell_type"], observed=True).mean()
    best = {kind: means.loc[kind].div(means.drop(kind).max() + 0.05).nlargest(6).index for kind in means.index}
    found = phenotype(table, {kind: list(genes) for kind, genes in best.items()}, min_score=0.2, min_margin=0.02)
    assert (found["cell_type"].astype(str).to_numpy() == truth(table)).mean() > 0.85


def levels_of(rows, names):
    """A slide whose levels are 0 and 1, so that scores are known by hand."""
    pattern = np.array(rows, dtype=np.float64)
    values = np.repeat(np.where(pattern > 0, 1000.0, 10.0), 25, axis=0)
    return anndata.AnnData(values, var=pd.DataFrame(index=names))


def test_scores_by_hand():
    table = levels_of([[1, 1, 0], [1, 0, 0], [1, 1, 1], [0, 0, 0]], ["A", "B", "N"])
    types = {"both": ["A", "B"], "alone": {"positive": ["A"], "negative": ["B", "N"]}}
    found = phenotype(table, types, kind="protein").iloc[::25]
    assert found["cell_type"].tolist() == ["both", "alone", "both", "unknown"]
    np.testing.assert_allclose(found["cell_type_score"], [1, 1, 1, 0], atol=1e-6)
    # As good for two types is unknown; a margin of 0 takes the first.
    tied = {"x": ["A"], "y": ["A", "B"]}
    assert phenotype(table, tied, kind="protein")["cell_type"].iloc[0] == "unknown"
    assert phenotype(table, tied, kind="protein", min_margin=0)["cell_type"].iloc[0] == "x"


def test_cells_that_fail_have_no_type(slides):
    table = slides[0]
    genes = list(table.var_names[:2])
    found = phenotype(table, {"a": [genes[0]], "b": [genes[1]]})
    assert found["cell_type"].isna().sum() == FAILING
    assert found["cell_type_score"].isna().sum() == FAILING


def test_types_from_a_reference(slides):
    first, second = slides
    found = transfer_labels(second, first, "cell_type")
    assert (found["cell_type"].astype(str).to_numpy() == truth(second)).mean() > 0.9
    assert found["cell_type_confidence"].between(0, 1).all()
    # Neither the order of the reference's genes nor genes that only one has change much.
    other = first[:, list(first.var_names[:20:-1])]
    again = transfer_labels(second, other, "cell_type", scaling="each")
    assert (again["cell_type"].astype(str).to_numpy() == truth(second)).mean() > 0.9
    strict = transfer_labels(second, first, "cell_type", min_confidence=1.0)
    assert (strict["cell_type"] == "unknown").mean() == pytest.approx((found["cell_type_confidence"] < 1).mean())


def test_votes_are_those_of_the_nearest_cells(slides):
    """By brute force in scanpy's components of the reference."""
    import scanpy as sc

    reference, target = slides[1][:150].copy(), slides[0][:40]
    found = transfer_labels(target, reference, "cell_type", n_neighbors=5, n_pcs=10, min_confidence=0)
    both = []
    for table in (reference, target):
        logs = table.copy()
        sc.pp.normalize_total(logs)
        sc.pp.log1p(logs)
        both.append(logs.to_df().to_numpy().astype(np.float64))
    mean, spread = both[0].mean(axis=0), both[0].std(axis=0)
    a, b = ((part - mean) / np.where(spread > 1e-6, spread, 1) for part in both)
    _, _, axes = np.linalg.svd(a, full_matrices=False)
    a, b = a @ axes[:10].T, b @ axes[:10].T
    near = np.argsort(((b[:, None] - a[None]) ** 2).sum(axis=2), axis=1)[:, :5]
    known = truth(reference)[near]
    share = np.array([pd.Series(row).value_counts().iloc[0] / 5 for row in known])
    np.testing.assert_allclose(found["cell_type_confidence"], share, atol=1e-6)


BAD = [
    ("annotate-markers", lambda t, r: phenotype(t, {}), "no cell types"),
    ("annotate-markers", lambda t, r: phenotype(t, {"a": []}), '"a" has no positive marker'),
    ("annotate-markers", lambda t, r: phenotype(t, {"a": {"positive": ["x"], "negative": ["x"]}}), "positive and neg"),
    ("annotate-markers", lambda t, r: phenotype(t, {"a": {"positiv": ["x"]}}), 'unknown key "positiv"'),
    ("annotate-markers", lambda t, r: phenotype(t, {"a": "x"}), "no list of names"),
    ("annotate-markers", lambda t, r: phenotype(t, {"unknown": ["x"]}), "rename the type"),
    ("annotate-marker-unknown", lambda t, r: phenotype(t, {"a": ["Kdrr"]}), 'did you mean "Kdr"'),
    ("annotate-label", lambda t, r: transfer_labels(t, r, "celltype"), 'did you mean "cell_type"'),
    ("annotate-label", lambda t, r: transfer_labels(t, r, "area_um2"), "different for each cell"),
    ("annotate-label", lambda t, r: transfer_labels(t, r, "sample"), "1 types"),
    ("annotate-genes", lambda t, r: transfer_labels(t, r[:, :5], "cell_type"), "share 5 of"),
    ("too-few-cells", lambda t, r: find_clusters(t[:8]), "8 cells"),
    ("genes-missing", lambda t, r: find_clusters(t[:, :0].copy()), "no genes and no intensities"),
    ("expression-negative", lambda t, r: find_clusters(anndata.AnnData(-np.ones((20, 4)))), "X has -1"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_mistakes_are_named(slides, case):
    code, call, text = BAD[case]
    with pytest.raises(CellquiltError) as caught:
        call(slides[1], slides[0])
    assert caught.value.code == code
    assert text in str(caught.value)


def test_names_that_differ_by_case_are_told(slides):
    other = slides[0].copy()
    other.var_names = [name.upper() for name in other.var_names]
    with pytest.raises(CellquiltError, match="upper and lower case"):
        transfer_labels(slides[1], other, "cell_type")


FILES = {
    "a.csv": "cell_type,positive,negative\nT, CD3;CD8 ,CD20\nB,CD20,\n",
    "a.tsv.csv": "cell_type\tpositive\nT\tCD3;CD8\n",
    "a.json": '{"T": ["CD3"], "B": {"positive": ["CD20"], "negative": ["CD3"]}}',
}
BAD_FILES = {
    "x.csv": ("type,positive\nT,CD3\n", "no column cell_type"),
    "twice.csv": ("cell_type,positive\nT,CD3\nT,CD8\n", '"T" is there twice'),
    "empty.csv": ("", "no column cell_type"),
    "none.csv": ("cell_type,positive\n", "no cell types"),
    "noname.csv": ("cell_type,positive\n,CD3\n", "row 2 names no cell type"),
    "long.csv": ("cell_type,positive\nT,CD3,CD8\n", "row 2 has too many fields"),
    "broken.json": ('{"T": [', "no JSON"),
    "twice.json": ('{"T": ["CD3"], "T": ["CD8"]}', '"T" is there twice'),
    "list.json": ("[1]", "no cell types"),
}


def test_files_with_markers(tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    found = read_signatures(tmp_path / "a.csv")
    assert found["T"].positive == ("CD3", "CD8")
    assert found["T"].negative == ("CD20",)
    assert found["B"].negative == ()
    assert read_signatures(tmp_path / "a.tsv.csv")["T"].positive == ("CD3", "CD8")
    assert read_signatures(tmp_path / "a.json")["B"].negative == ("CD3",)


@pytest.mark.parametrize("name", sorted(BAD_FILES))
def test_bad_files_with_markers(tmp_path, name):
    text, message = BAD_FILES[name]
    (tmp_path / name).write_text(text)
    with pytest.raises(CellquiltError) as caught:
        read_signatures(tmp_path / name)
    assert name in str(caught.value)
    assert message in str(caught.value)


def run(*args):
    """A command as users type it; its error, if any, is returned."""
    from cellquilt.cli import _cellquilt

    result = CliRunner().invoke(_cellquilt, [str(part) for part in args])
    return result.exception


def test_command_line_writes_the_same_bytes_twice(slides, tmp_path):
    table = slides[0][:150].copy()
    table.obs["passes_qc"] = np.arange(150) < 140
    table.write_h5ad(tmp_path / "a.h5ad")
    for name in ("one", "two"):
        out = tmp_path / f"{name}.parquet"
        assert (
            run("cluster", tmp_path / "a.h5ad", "-o", out, "--markers", tmp_path / f"{name}.tsv", "--resolution", 2)
            is None
        )
    assert (tmp_path / "one.parquet").read_bytes() == (tmp_path / "two.parquet").read_bytes()
    found = read_columns(tmp_path / "one.parquet")
    clusters, markers = find_clusters(table, resolution=2.0)
    assert found.columns["cluster"].array.astype(str).tolist() == clusters.astype(str).tolist()
    assert found.columns["cluster"].isna().sum() == 10
    assert found.columns.index.tolist() == table.obs_names.tolist()
    pd.testing.assert_frame_equal(found.tables["cluster_markers"], markers, check_dtype=False)
    assert found.parameters["cluster_resolution"] == 2
    assert pd.read_csv(tmp_path / "one.tsv", sep="\t")["gene"].tolist() == markers["gene"].tolist()
    error = run("cluster", tmp_path / "a.h5ad")
    assert error.code == "table-not-in-store"


def test_command_line_annotates_a_store_and_says_what_it_did(slides, tmp_path):
    from cellquilt.core.store import Store, consolidate, new_store

    first, second = slides[0].copy(), slides[1][:100].copy()
    second.obs = second.obs[["area_um2"]]
    first.write_h5ad(tmp_path / "reference.h5ad")
    with new_store(tmp_path / "s.zarr", sample="s") as store:
        second.write_zarr(store.new_element("tables", "table"))
        consolidate(store.path)
    options = ("--reference", tmp_path / "reference.h5ad", "--label", "cell_type")
    assert run("annotate", "transfer", tmp_path / "s.zarr", *options) is None
    table = anndata.read_zarr(tmp_path / "s.zarr/tables/table")
    assert (table.obs["cell_type"].astype(str).to_numpy() == truth(slides[1])[:100]).mean() > 0.9
    record = Store(tmp_path / "s.zarr").records[-1]
    assert record["stage"] == "annotate"
    assert sum(record["facts"]["cell_types"].values()) == 100
    assert "reference.h5ad" in record["parameters"]["annotate_reference"]
    assert str(tmp_path) not in json.dumps(record)
    assert len(record["facts"]["checksums"]["annotate_reference"]) == 64
    assert run("annotate", "transfer", tmp_path / "s.zarr", "--label", "cell_type").code == "annotate-nothing"
    assert run("annotate", "transfer", tmp_path / "s.zarr", *options[:2]).code == "annotate-label"


def test_nothing_to_cluster_is_said_where_that_is_allowed(slides, tmp_path):
    slides[0][:5].copy().write_h5ad(tmp_path / "few.h5ad")
    assert run("cluster", tmp_path / "few.h5ad", "-o", tmp_path / "x.parquet").code == "too-few-cells"
    assert run("cluster", tmp_path / "few.h5ad", "-o", tmp_path / "x.parquet", "--allow-none") is None
    found = read_columns(tmp_path / "x.parquet")
    assert found.columns["cluster"].isna().all()
    assert found.facts["cluster_missing"]["code"] == "too-few-cells"


def test_api_gives_tables_their_columns(slides, proteins, clustered):
    first, second = (table.copy() for table in slides)
    cq.cluster(first)
    assert first.obs["cluster"].astype(str).tolist() == clustered[0].astype(str).tolist()
    assert len(first.uns["cluster_markers"]) == len(clustered[1])
    del second.obs["cell_type"]
    cq.annotate.transfer(second, slides[0], "cell_type", n_neighbors=5)
    assert second.obs["cell_type"].astype(str).eq(truth(slides[1])).mean() > 0.9
    marked = proteins.copy()
    cq.annotate.markers(marked, signatures(), min_score=0.4)
    assert marked.obs["cell_type"].astype(str).eq(truth(proteins)).mean() > 0.9


@pytest.mark.parametrize(
    ("group", "call", "without"),
    [
        ("cluster", cq.cluster, {"cluster"}),
        ("annotate", (cq.annotate.markers, cq.annotate.transfer), set()),
    ],
)
def test_api_takes_every_setting_of_its_group(group, call, without):
    import inspect

    calls = call if isinstance(call, tuple) else (call,)
    known = {name: one for part in calls for name, one in inspect.signature(part).parameters.items()}
    for setting in SETTINGS:
        if setting.group == group and setting.name not in without:
            assert setting.api_name in known
            assert known[setting.api_name].default in (None, inspect.Parameter.empty)


def test_measured_takes_intensities_where_there_are_no_genes(proteins):
    table = anndata.AnnData(np.zeros((proteins.n_obs, 0)), obs=proteins.obs[[]])
    table.obsm["intensities"] = proteins.to_df()
    found = measured(table)
    assert found.kind == "protein"
    assert found.raw.var_names.tolist() == proteins.var_names.tolist()
