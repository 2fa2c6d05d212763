"""What domains say: shares, borders, genes, conditions, pathways and trees, by hand and by scipy."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import anndata
import cellquilt as cq
import numpy as np
import pandas as pd
import pytest
from cellquilt.core.errors import CellquiltError
from cellquilt.domains import analysis, metrics
from cellquilt.domains.hierarchy import Hierarchy
from cellquilt.geometry.neighbours import neighbour_graph
from scipy import stats
from scipy.cluster.hierarchy import cophenet, is_valid_linkage
from scipy.sparse import csr_matrix

DOMAINS = ("D9", "D10", "D11", "D12")
GENES = [f"g{k}" for k in range(24)]


def make_table(
    seed: int = 0, n: int = 300, sample: str = "", genes: Sequence[str] = GENES, graph: bool = False, depth: float = 1.0
) -> anndata.AnnData:
    """Stripes of four domains, five genes of each; a tenth of the cells has no domain."""
    rng = np.random.default_rng(seed)
    xy = rng.uniform(0, 200, (n, 2))
    stripe = (xy[:, 0] // 50).astype(int)
    mean = np.full((4, len(GENES)), 1.0)
    mean[np.arange(4)[:, None], np.arange(20).reshape(4, 5)] = 5.0
    counts = pd.DataFrame(rng.poisson(depth * mean[stripe]).astype(np.float32), columns=GENES)
    out = anndata.AnnData(csr_matrix(counts[list(genes)].to_numpy()))
    out.var_names, out.obs_names = list(genes), [f"{seed}-{k}" for k in range(n)]
    out.obsm["spatial"] = xy
    names = np.array(DOMAINS, dtype=object)[stripe]
    names[rng.random(n) < 0.1] = None
    out.obs["domain"] = pd.Categorical(names)
    out.obs["sample"] = sample or f"s{seed}"
    if graph:
        cq.spatial_neighbors(out)
    return out


@pytest.fixture(scope="module")
def cohort() -> list[anndata.AnnData]:
    """Three slides with graphs."""
    return [make_table(k, graph=True) for k in range(3)]


def same(a: pd.DataFrame, b: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(a, b, check_exact=False, rtol=1e-9)


# --- shares


def test_proportions_by_pandas(cohort):
    found = analysis.proportions(cohort)
    assert list(found.columns) == ["slide", "domain", "n_cells", "share"]
    assert list(found["domain"][:4]) == list(DOMAINS)  # D9 before D10
    for table in cohort:
        own = found[found["slide"] == table.obs["sample"].iloc[0]].set_index("domain")
        want = table.obs["domain"].value_counts()
        assert own["n_cells"].to_dict() == want.to_dict()
        assert np.allclose(own["share"], own["n_cells"] / want.sum())
    _, shares, _ = metrics.domain_shares(cohort, "domain")
    table = found.pivot(index="slide", columns="domain", values="share")
    assert np.allclose(table[sorted(DOMAINS)], shares)


def test_one_table_of_all_slides_is_the_same(cohort):
    together = anndata.concat(cohort)
    together.obs["condition"] = "x"
    found = analysis.proportions(together, slide_key="sample", condition_key="condition")
    assert (found.pop("condition") == "x").all()
    same(found, analysis.proportions(cohort))


def test_a_domain_that_a_slide_lacks_and_a_slide_without_domains():
    one, other, none = make_table(0), make_table(1), make_table(2)
    other.obs["domain"] = other.obs["domain"].cat.remove_categories(["D12"])
    none.obs["domain"] = pd.Categorical([None] * none.n_obs)
    found = analysis.proportions([one, other, none]).set_index(["slide", "domain"])
    assert found.loc[("s1", "D12"), "n_cells"] == found.loc[("s1", "D12"), "share"] == 0
    assert found.loc["s2", "share"].isna().all()
    assert found.loc["s1", "share"].sum() == pytest.approx(1)


# --- borders


def test_edges_are_counted_one_by_one(cohort):
    found = analysis.architecture(cohort)
    for s, table in enumerate(cohort):
        want = np.zeros((4, 4), dtype=int)
        names = table.obs["domain"].astype(object).to_numpy()
        for i, j in zip(*table.obsp["spatial_distances"].nonzero(), strict=True):
            if i < j and names[i] in DOMAINS and names[j] in DOMAINS:
                a, b = sorted((DOMAINS.index(names[i]), DOMAINS.index(names[j])))
                want[a, b] += 1
                want[b, a] += a != b
        assert np.array_equal(found.edges[s], want)
    assert found.edges[0][0, 3] == 0  # stripes far apart
    assert found.ratio()[0, 0] > 2 > 1 > found.ratio()[0, 2]


def test_expected_edges_are_the_mean_over_shuffled_domains(cohort):
    table = cohort[0].copy()
    found = analysis.architecture(table)
    rng = np.random.default_rng(0)
    kept = table.obs["domain"].notna().to_numpy()
    rows, columns = table.obsp["spatial_distances"].nonzero()
    inner = (rows < columns) & kept[rows] & kept[columns]
    rows, columns = rows[inner], columns[inner]
    codes = table.obs["domain"].cat.reorder_categories(DOMAINS).cat.codes.to_numpy().astype(int)
    total = np.zeros((4, 4))
    for _ in range(600):
        codes[kept] = rng.permutation(codes[kept])
        both = np.bincount(codes[rows] * 4 + codes[columns], minlength=16).reshape(4, 4)
        total += both + both.T - np.diag(np.diag(both))
    assert np.allclose(found.expected[0], total / 600, rtol=0.03)
    assert np.triu(found.expected[0]).sum() == pytest.approx(np.triu(found.edges[0]).sum())


def test_continuity_is_fide(cohort):
    found = analysis.architecture(cohort)
    for table in cohort:
        name = table.obs["sample"].iloc[0]
        assert found.continuity(name) == pytest.approx(metrics.fide_score(table, "domain"))


def test_architecture_as_a_table(cohort):
    found = analysis.architecture(cohort)
    table = found.to_frame()
    assert list(dict.fromkeys(table["slide"])) == ["s0", "s1", "s2", "cohort"]
    whole = table[table["slide"] == "cohort"].set_index(["domain_a", "domain_b"])
    assert whole.loc[("D9", "D10"), "n_edges"] == found.edges.sum(axis=0)[0, 1]
    assert whole.loc["D10", "border_share"].sum() == pytest.approx(1)
    assert whole.loc[("D9", "D10"), "paga"] == whole.loc[("D10", "D9"), "paga"] > 0
    assert whole.loc[("D9", "D12"), "paga"] == 0


# --- genes


def logs(table: anndata.AnnData) -> np.ndarray:
    counts = table.X.toarray().astype(np.float64)
    total = counts.sum(axis=1, keepdims=True)
    return np.log1p(counts / total * np.median(total))


def test_one_slide_is_as_scipy_says():
    table = make_table(3)
    table = table[table.obs["domain"].notna().to_numpy()].copy()
    found = analysis.gene_statistics(table)
    values = logs(table)
    for k, domain in enumerate(found.domains):
        inside = (table.obs["domain"] == domain).to_numpy()
        a, b = values[inside], values[~inside]
        order = [GENES.index(gene) for gene in found.genes]
        test = stats.mannwhitneyu(a, b, method="asymptotic", use_continuity=False)
        assert np.allclose(found.auc[k], (test.statistic / (len(a) * len(b)))[order], atol=1e-6)
        assert np.allclose(np.log(found.p_descriptive[k]), np.log(test.pvalue[order]), rtol=1e-4, atol=1e-4)
        assert np.allclose(found.difference[k], (a.mean(axis=0) - b.mean(axis=0))[order], atol=1e-5)
        pooled = np.sqrt((a.var(axis=0) * len(a) + b.var(axis=0) * len(b)) / (len(values) - 2))
        assert np.allclose(found.effect[k], ((a.mean(axis=0) - b.mean(axis=0)) / pooled)[order], atol=1e-5)
        assert np.allclose(found.share_in[k], (a > 0).mean(axis=0)[order])
        assert np.allclose(found.mean[k], a.mean(axis=0)[order], atol=1e-5)
    groups = [values[(table.obs["domain"] == domain).to_numpy()] for domain in found.domains]
    within = sum(((group - group.mean(axis=0)) ** 2).sum(axis=0) for group in groups)
    total = ((values - values.mean(axis=0)) ** 2).sum(axis=0)
    assert np.allclose(found.explained, (1 - within / total)[order], atol=1e-5)


def test_genes_of_domains_are_found_and_ranked_by_effect():
    found = analysis.gene_statistics([make_table(k) for k in range(3)])
    by_gene = found.by_gene()
    assert set(by_gene["gene"][:20]) == set(GENES[:20])
    top = by_gene.set_index("gene")["top_domain"]
    assert all(top[f"g{k}"] == DOMAINS[k // 5] for k in range(20))
    assert by_gene["variability"].is_monotonic_decreasing
    by_domain = found.by_domain()
    first = by_domain[by_domain["domain"] == "D10"]
    assert set(first["gene"][:5]) == set(GENES[5:10])
    assert first["effect"].is_monotonic_decreasing
    assert first["rank"].tolist() == list(range(1, 25))
    assert "p_descriptive" in by_domain
    assert "p" not in by_domain


def test_order_of_cells_slides_and_genes_does_not_matter():
    tables = [make_table(k) for k in range(2)]
    rng = np.random.default_rng(0)
    turned = [table[rng.permutation(table.n_obs)][:, rng.permutation(table.n_vars)].copy() for table in tables[::-1]]
    same(analysis.spatially_variable_genes(tables), analysis.spatially_variable_genes(turned))
    same(analysis.variable_genes_by_domain(tables), analysis.variable_genes_by_domain(turned))


def test_a_batch_makes_no_gene_variable():
    """A gene that one slide has tenfold, and domains of very different shares: pooled it would look spatial."""
    rng = np.random.default_rng(0)
    tables = []
    for k, share in enumerate((0.9, 0.1)):
        table = make_table(k, n=600)
        table.obs["domain"] = np.where(rng.random(600) < share, "A", "B")
        counts = table.X.toarray()
        counts[:, 23] = rng.poisson(20 if k == 0 else 2, 600)
        table.X = csr_matrix(counts)
        tables.append(table)
    own = analysis.spatially_variable_genes(tables).set_index("gene")
    assert abs(own.loc["g23", "difference"]) < 0.1
    assert own.loc["g23", "explained"] < 0.01
    pooled = anndata.concat(tables)
    assert analysis.spatially_variable_genes(pooled).set_index("gene").loc["g23", "difference"] > 0.8


def test_null_p_values_are_even():
    rng = np.random.default_rng(1)
    table = anndata.AnnData(csr_matrix(rng.poisson(2, (600, 300)).astype(np.float32)))
    table.obs["domain"] = rng.choice(["A", "B", "C"], 600)
    found = analysis.gene_statistics(table)
    assert stats.kstest(found.p_descriptive[0], "uniform").pvalue > 0.01


def test_panels_may_differ_and_dense_is_as_sparse():
    one, other = make_table(0, genes=GENES[:16]), make_table(1, genes=GENES[8:])
    found = analysis.gene_statistics([one, other])
    assert dict(zip(found.genes, found.n_slides, strict=True)) == {
        g: 2 if 8 <= k < 16 else 1 for k, g in enumerate(GENES)
    }
    alone = analysis.gene_statistics(one)
    at = [found.genes.index(gene) for gene in GENES[:8]], [alone.genes.index(gene) for gene in GENES[:8]]
    assert np.allclose(found.auc[:, at[0]], alone.auc[:, at[1]])
    dense = one.copy()
    dense.X = one.X.toarray()
    same(analysis.spatially_variable_genes(dense), alone.by_gene())


def test_logarithms_and_layers_are_taken_as_they_are():
    table = make_table(2)
    logged = table.copy()
    logged.X = csr_matrix(logs(table))
    logged.layers["raw"] = table.X
    want = analysis.spatially_variable_genes(table)
    assert np.allclose(analysis.spatially_variable_genes(logged)["difference"], want["difference"], atol=1e-5)
    same(analysis.spatially_variable_genes(logged, layer="raw"), want)


def test_intensities_are_taken_over_the_markers_median():
    rng = np.random.default_rng(0)
    table = make_table(0)
    codes = table.obs["domain"].cat.codes.to_numpy()
    values = rng.lognormal(5, 0.4, (table.n_obs, 24)) * np.where((codes == 1)[:, None] & (np.arange(24) < 3), 4, 1)
    table.X = values.astype(np.float32)
    found = analysis.gene_statistics(table)
    scaled = table.copy()
    scaled.X = (values * np.linspace(1, 50, 24)).astype(np.float32)
    assert np.allclose(found.difference, analysis.gene_statistics(scaled).difference, atol=1e-4)
    assert set(found.by_gene()["gene"][:3]) == {"g0", "g1", "g2"}


# --- conditions


def conditions(n: int = 6, effect: float = 0.0, seed: int = 0) -> list[anndata.AnnData]:
    """2 n samples of two conditions; `effect` is how much more of domain A the treated have."""
    rng = np.random.default_rng(seed)
    tables = []
    for k in range(2 * n):
        treated = k % 2 == 1
        share = rng.dirichlet(np.linspace(30, 60, 7))
        share[0] *= 1 + effect * treated
        table = anndata.AnnData(obs=pd.DataFrame({"sample": [f"p{k}"] * 400}, index=[f"{k}-{c}" for c in range(400)]))
        table.obs["domain"] = pd.Categorical(rng.choice(list("ABCDEFG"), 400, p=share / share.sum()))
        table.obs["condition"] = "treated" if treated else "control"
        table.obs["batch"] = f"b{k // 2 % 2}"
        tables.append(table)
    return tables


def test_a_domain_that_grows_is_found_and_the_others_do_not_shrink():
    found = analysis.compare_conditions(conditions(effect=1.5), "condition")
    first = found.iloc[0]
    assert (first["domain"], first["condition_a"], first["condition_b"]) == ("A", "control", "treated")
    assert first["p"] == first["smallest_p"] == pytest.approx(2 / 924)
    assert first["p_max_t"] < 0.05
    assert first["difference"] == pytest.approx(first["mean_b"] - first["mean_a"])
    assert first["log2_ratio"] == pytest.approx(np.log2(2.5), abs=0.5)
    assert (found["p_max_t"][1:] > 0.05).all()
    assert found["log2_ratio"][1:].abs().max() < 0.5
    assert (found["n_permutations"] == 924).all()


def test_slides_of_one_sample_are_one_unit():
    tables = conditions()
    halves = [part for table in tables for part in (table[:200].copy(), table[200:].copy())]
    same(analysis.compare_conditions(halves, "condition", "sample"), analysis.compare_conditions(tables, "condition"))
    together = anndata.concat(tables)
    same(analysis.compare_conditions(together, "condition", "sample"), analysis.compare_conditions(tables, "condition"))


def test_reference_and_all_pairs():
    tables = conditions(3)
    for table in tables[:2]:
        table.obs["condition"] = "other"
    found = analysis.compare_conditions(tables, "condition", reference="treated")
    assert list(dict.fromkeys(zip(found["condition_a"], found["condition_b"], strict=True))) == [
        ("treated", "control"),
        ("treated", "other"),
    ]
    assert len(analysis.compare_conditions(tables, "condition")) == 3 * 7


def test_few_samples_give_effect_sizes_and_a_warning(caplog):
    with caplog.at_level(logging.WARNING, "cellquilt"):
        found = analysis.compare_conditions(conditions(2), "condition")
    assert found["p"].isna().all()
    assert found["p_max_t"].isna().all()
    assert found["hedges_g"].notna().all()
    assert (found["note"] == "fewer than 3 samples in a group").all()
    assert "2 and 2 samples" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "cellquilt"):
        found = analysis.compare_conditions(conditions(3), "condition")
    assert found["p"].notna().all()
    assert "no p-value can be below 0.1" in caplog.text


def test_confounded_with_batch_is_said(caplog):
    tables = conditions()
    crossed = analysis.compare_conditions(tables, "condition", batch_key="batch")
    assert crossed["p"].notna().all()
    for table in tables:
        table.obs["batch"] = "one" if table.obs["condition"].iloc[0] == "control" else "two"
    with caplog.at_level(logging.WARNING, "cellquilt"):
        found = analysis.compare_conditions(tables, "condition", batch_key="batch")
    assert "confounded" in caplog.text
    assert found["p"].isna().all()
    assert (found["note"] == "confounded with batch").all()


@pytest.mark.slow
def test_200_null_cohorts_through_the_function():
    rng = np.random.default_rng(10)
    n = 12 * 60
    obs = pd.DataFrame({"sample": np.repeat([f"p{k}" for k in range(12)], 60)}, index=[str(k) for k in range(n)])
    obs["condition"] = np.repeat(["a", "b"], n // 2)
    table = anndata.AnnData(obs=obs)
    p = []
    for _ in range(200):
        shares = rng.dirichlet([20, 30, 40], 12)
        table.obs["domain"] = pd.Categorical(np.concatenate([rng.choice(["A", "B", "C"], 60, p=s) for s in shares]))
        found = analysis.compare_conditions(table, "condition", "sample").set_index("domain")
        p.append(found.loc["B", "p"])
    assert 0.03 <= np.mean(np.array(p) < 0.05) <= 0.07


def with_conditions(n: int = 4, genes: Sequence[str] = GENES) -> list[anndata.AnnData]:
    tables = []
    for k in range(2 * n):
        table = make_table(k, genes=genes, depth=1 + 0.3 * (k % 3))
        counts = table.X.toarray()
        if k % 2:
            inside = (table.obs["domain"] == "D10").to_numpy()
            counts[inside, 22] = np.random.default_rng(k).poisson(6, inside.sum())
        table.X = csr_matrix(counts)
        table.obs["condition"] = "ab"[k % 2]
        tables.append(table)
    return tables


def test_pseudobulk_by_hand():
    tables = with_conditions()
    found = analysis.compare_conditions(tables, "condition", what="expression")
    rows = found.set_index(["domain", "gene"])
    planted = rows.loc[("D10", "g22")]
    assert planted["p"] == planted["p_max_t"] == pytest.approx(2 / 70)
    assert planted["log2_ratio"] > 2
    assert (rows["p_max_t"] < 0.05).sum() < 4
    bulk = {"a": [], "b": []}
    for table in tables:
        sums = np.asarray(table[(table.obs["domain"] == "D11").to_numpy()].X.sum(axis=0, dtype=np.float64)).ravel()
        bulk[table.obs["condition"].iloc[0]].append(np.log2((sums[3] + 0.5) / (sums.sum() + 1) * 1e4))
    row = rows.loc[("D11", "g3")]
    assert row["mean_a"] == pytest.approx(np.mean(bulk["a"]))
    assert row["log2_ratio"] == pytest.approx(np.mean(bulk["b"]) - np.mean(bulk["a"]))
    assert len(found) == 4 * 24


def test_genes_of_some_panels_are_compared_among_the_samples_that_have_them():
    tables = with_conditions(6)
    for k in (0, 1, 2, 3):
        tables[k] = tables[k][:, :20].copy()
    found = analysis.compare_conditions(tables, "condition", what="expression").set_index(["domain", "gene"])
    assert found.loc[("D10", "g22"), ["n_a", "n_b"]].tolist() == [4, 4]
    assert found.loc[("D10", "g3"), ["n_a", "n_b"]].tolist() == [6, 6]
    assert found.loc[("D10", "g22"), "p"] == pytest.approx(2 / 70)


def test_samples_with_few_cells_of_a_domain_are_left_out():
    tables = with_conditions()
    rare = tables[0].obs["domain"].astype(object).to_numpy().copy()
    rare[np.flatnonzero(rare == "D12")[5:]] = "D9"
    tables[0].obs["domain"] = pd.Categorical(rare)
    found = analysis.compare_conditions(tables, "condition", what="expression")
    assert set(found.loc[found["domain"] == "D12", "n_a"]) == {3}
    assert set(found.loc[found["domain"] == "D11", "n_a"]) == {4}


# --- pathways

SETS = {"first": [*GENES[:5], "elsewhere"], "second": [gene.upper() for gene in GENES[5:10]], "small": ["g1", "none"]}


def test_pathways_are_high_where_their_genes_are():
    found = analysis.pathway_scores([make_table(k) for k in range(2)], SETS)
    table = found.by_domain()
    assert table.idxmax().to_dict() == {"first": "D9", "second": "D10"}
    sets = found.sets.set_index("pathway")
    assert sets["n_genes"].to_dict() == {"first": 6, "second": 5, "small": 2}
    assert sets["n_used"].to_dict() == {"first": 5, "second": 5, "small": 1}
    assert sets["scored"].to_dict() == {"first": True, "second": True, "small": False}
    assert sets.loc["second", "genes"] == "g5, g6, g7, g8, g9"


def test_what_else_a_panel_measures_changes_no_score():
    tables = [make_table(0), make_table(1, genes=GENES[:12])]
    found = analysis.pathway_scores(tables, SETS)
    trimmed = analysis.pathway_scores([tables[0][:, GENES[:12]].copy(), tables[1]], SETS)
    same(found.scores, trimmed.scores)


def test_scores_of_cells_have_the_domains_means():
    table = make_table(0)
    found = analysis.pathway_scores(table, SETS, key_added="pathways")
    cells = table.obsm["pathways"]
    assert list(cells.columns) == ["first", "second"]
    assert cells.isna().all(axis=1).equals(table.obs["domain"].isna())
    means = cells.groupby(table.obs["domain"], observed=True).mean()
    wanted = found.scores.pivot(index="domain", columns="pathway", values="score")
    assert np.allclose(means.loc[wanted.index, wanted.columns], wanted, atol=1e-5)
    assert np.allclose(cells.mean(), 0, atol=1e-5)


def test_gene_sets_from_files(tmp_path):
    (tmp_path / "a.gmt").write_text("first\tabout\tg1\tg2\n\nsecond\thttp\tg3\n")
    assert analysis.read_gene_sets(tmp_path / "a.gmt") == {"first": ["g1", "g2"], "second": ["g3"]}
    (tmp_path / "a.json").write_text(json.dumps({"x": ["g1"], "y": {"geneSymbols": ["g2"], "pmid": "1"}}))
    assert analysis.read_gene_sets(tmp_path / "a.json") == {"x": ["g1"], "y": ["g2"]}


# --- trees


def test_the_tree_of_all_prototypes_is_scipys():
    hierarchy = Hierarchy.of(np.random.default_rng(0).normal(size=(12, 5)))
    found = analysis.dendrogram(hierarchy, [f"D{k}" for k in range(12)])
    assert is_valid_linkage(found.links)
    original = np.column_stack([hierarchy.merges, hierarchy.heights, found.links[:, 3]])
    order = [int(name[1:]) for name in found.domains]
    full = np.zeros((12, 12))
    full[np.triu_indices(12, 1)] = cophenet(found.links)
    want = np.zeros((12, 12))
    want[np.triu_indices(12, 1)] = cophenet(original)
    full, want = full + full.T, want + want.T
    assert np.allclose(full, want[np.ix_(order, order)])


def test_the_tree_above_a_level_and_above_some_domains():
    hierarchy = Hierarchy.of(np.random.default_rng(1).normal(size=(30, 5)))
    nodes = np.unique(hierarchy.nodes_at(7))
    whole = analysis.dendrogram(hierarchy, level=7)
    assert sorted(whole.domains) == sorted(f"D{node}" for node in nodes)
    assert np.allclose(np.sort(whole.links[:, 2]), np.sort(hierarchy.heights[-6:]))
    some = analysis.dendrogram(hierarchy, whole.domains[:4])
    assert some.domains == whole.domains[:4]  # those that are drawn side by side stay so
    assert len(some.links) == 3
    assert is_valid_linkage(some.links)
    assert some.links[-1, 3] == 4
    assert analysis.dendrogram(hierarchy, [whole.domains[2]]).links.shape == (0, 4)


# --- files


def test_tables_are_read_one_by_one(tmp_path, cohort):
    for table in cohort:
        table.write_h5ad(tmp_path / f"{table.obs['sample'].iloc[0]}.h5ad")
    cohort[0].write_zarr(tmp_path / "s0.zarr")
    paths = [tmp_path / "s0.zarr", tmp_path / "s1.h5ad", tmp_path / "s2.h5ad"]
    tables = analysis.read_tables(paths)
    same(analysis.proportions(tables), analysis.proportions(cohort))
    same(analysis.architecture(tables).to_frame(), analysis.architecture(cohort).to_frame())
    same(analysis.spatially_variable_genes(tables), analysis.spatially_variable_genes(cohort))
    assert len(tables[1:]) == 2


def test_a_table_is_called_as_its_file_and_a_store_has_its_table(tmp_path):
    import spatialdata

    table = make_table(0)
    del table.obs["sample"]
    table.write_h5ad(tmp_path / "liver 1.h5ad")
    assert set(analysis.proportions(analysis.read_tables(tmp_path / "liver 1.h5ad"))["slide"]) == {"liver 1"}
    own = make_table(1)
    spatialdata.SpatialData(tables={"table": own, "other": make_table(2)}).write(tmp_path / "s.zarr")
    same(analysis.proportions(analysis.read_tables([tmp_path / "s.zarr"])), analysis.proportions(own))
    with pytest.raises(CellquiltError, match='did you mean "other"') as caught:
        analysis.proportions(analysis.read_tables([tmp_path / "s.zarr"], "othe"))
    assert caught.value.code == "table-missing"


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".parquet", ".json"])
def test_tables_are_written_and_read_back(tmp_path, cohort, suffix):
    found = analysis.proportions(cohort)
    path = analysis.write_table(found, tmp_path / f"out{suffix}")
    read = {
        ".csv": pd.read_csv,
        ".tsv": lambda p: pd.read_csv(p, sep="\t"),
        ".parquet": pd.read_parquet,
        ".json": lambda p: pd.read_json(p, orient="records"),
    }[suffix]
    pd.testing.assert_frame_equal(read(path), found, check_dtype=False)
    with pytest.raises(CellquiltError, match="exists already"):
        analysis.write_table(found, path)


def test_nothing_is_changed_that_was_given(cohort):
    table = cohort[0].copy()
    before = table.copy()
    table.obs["condition"] = before.obs["condition"] = "x"
    analysis.analyse_cohort([table, *cohort[1:]], gene_sets=SETS)
    pd.testing.assert_frame_equal(table.obs, before.obs)
    assert np.array_equal(table.X.toarray(), before.X.toarray())
    assert list(table.obsm) == list(before.obsm)


@pytest.mark.parametrize("sizes", [(1, 2, 3), (0, 5), (50, 1), (2, 2, 2, 2, 2, 2)])
@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_slides_of_hardly_any_cells(sizes, empty):
    rng = np.random.default_rng(0)
    tables = []
    for k, n in enumerate(sizes):
        table = anndata.AnnData(csr_matrix(rng.poisson(0 if empty else 2, (n, 6)).astype(np.float32)))
        table.obs_names, table.var_names = [f"{k}-{c}" for c in range(n)], GENES[:6]
        table.obsm["spatial"] = rng.uniform(0, 50, (n, 2))
        table.obs["sample"], table.obs["condition"] = f"s{k}", "ab"[k % 2]
        table.obs["domain"] = pd.Categorical(np.arange(n) % 2)
        table.obsp["spatial_distances"] = neighbour_graph(table.obsm["spatial"]).to_csr()
        tables.append(table)
    several = {"condition_key": "condition"} if min(sizes) else {}
    found = analysis.analyse_cohort(tables, gene_sets={"x": GENES[:3]}, **several)
    assert found.proportions["n_cells"].sum() == found.metrics["n_cells"].sum() == sum(sizes)
    assert found.architecture.sizes.sum() == sum(sizes)
    assert ((found.genes.auc >= 0) & (found.genes.auc <= 1) | np.isnan(found.genes.auc)).all()
    assert (found.genes.auc == 0.5).any() or not empty
    assert np.isfinite(found.pathways.scores["score"]).all()


def test_slides_within_one_table_are_as_tables_of_their_own(cohort):
    together = anndata.concat(cohort, pairwise=True)
    found = analysis.analyse_cohort(together, slide_key="sample", gene_sets=SETS)
    for name, table in analysis.analyse_cohort(cohort, gene_sets=SETS).tables().items():
        same(found.tables()[name], table)


# --- bad input


def changed(**columns: object) -> anndata.AnnData:
    table = make_table(0)
    for name, value in columns.items():
        table.obs[name] = value
    return table


def twice() -> anndata.AnnData:
    table = make_table(0)
    table.var_names = ["g1", "g1", *GENES[2:]]
    return table


def _condition_mixed() -> list[anndata.AnnData]:
    tables = conditions(3)
    tables[0].obs["condition"] = ["control"] * 200 + ["treated"] * 200
    return tables


def _batch_missing() -> list[anndata.AnnData]:
    tables = conditions(3)
    tables[1].obs["batch"] = None
    return tables


def _two_conditions_of_one_sample() -> list[anndata.AnnData]:
    tables = conditions(3)
    tables[1].obs["sample"] = "p0"
    return tables


def _one_condition() -> list[anndata.AnnData]:
    return conditions(3)[::2]


def _no_shared_genes() -> list[anndata.AnnData]:
    tables = with_conditions(3)
    return [table[:, :12].copy() if k < 2 else table[:, 12:].copy() for k, table in enumerate(tables)]


BAD = [
    (lambda: analysis.proportions([]), "tables-missing"),
    (lambda: analysis.proportions(make_table(), "domian"), "domains-missing"),
    (lambda: analysis.proportions(changed(domain=None)), "domains-empty"),
    (lambda: analysis.proportions(make_table(), slide_key="slid"), "slide-key-unknown"),
    (lambda: analysis.proportions(changed(slide=[None] * 5 + ["s"] * 295), slide_key="slide"), "slide-unnamed"),
    (lambda: analysis.proportions([make_table(0), make_table(0)]), "slide-twice"),
    (lambda: analysis.proportions(make_table(), condition_key="condition"), "condition-missing"),
    (lambda: analysis.proportions(changed(condition=np.nan), condition_key="condition"), "condition-missing"),
    (lambda: analysis.proportions(changed(c=["a"] * 9 + ["b"] * 291), condition_key="c"), "condition-mixed"),
    (lambda: analysis.architecture(make_table()), "graph-missing"),
    (lambda: analysis.architecture(_one_domain()), "domains-too-few"),
    (lambda: analysis.gene_statistics(changed(domain="D1")), "domains-too-few"),
    (lambda: analysis.gene_statistics(make_table(), layer="raw"), "layer-unknown"),
    (lambda: analysis.gene_statistics(make_table()[:, :0].copy()), "genes-missing"),
    (lambda: analysis.gene_statistics(twice()), "genes-twice"),
    (lambda: analysis.gene_statistics(_with_value(-1)), "expression-negative"),
    (lambda: analysis.gene_statistics(_with_value(np.nan)), "expression-not-finite"),
    (lambda: analysis.gene_statistics(make_table(), kind="spots"), "expression-unknown"),
    (lambda: analysis.compare_conditions(conditions(3), "condition", what="proportion"), "comparison-unknown"),
    (lambda: analysis.compare_conditions(conditions(3), "group"), "condition-missing"),
    (lambda: analysis.compare_conditions(_condition_mixed(), "condition"), "condition-mixed"),
    (lambda: analysis.compare_conditions(_two_conditions_of_one_sample(), "condition", "sample"), "condition-mixed"),
    (lambda: analysis.compare_conditions(_batch_missing(), "condition", batch_key="batch"), "batch-missing"),
    (lambda: analysis.compare_conditions(_one_condition(), "condition"), "conditions-too-few"),
    (lambda: analysis.compare_conditions(conditions(3), "condition", reference="placebo"), "reference-unknown"),
    (lambda: analysis.compare_conditions(_no_shared_genes(), "condition", what="expression"), "genes-none-shared"),
    (lambda: analysis.pathway_scores(make_table(), {"a": ["TP53", "MYC", "KRAS"]}), "gene-sets-no-overlap"),
    (lambda: analysis.pathway_scores(make_table(), Path("/nowhere/sets.gmt")), "gene-sets-missing"),
    (lambda: analysis.dendrogram(Hierarchy.of(np.eye(5)), ["L1", "L2"]), "domains-not-of-tree"),
    (lambda: analysis.dendrogram(Hierarchy.of(np.eye(5)), ["D0", "D8"]), "domains-not-of-tree"),
    (lambda: analysis.dendrogram(Hierarchy.of(np.eye(5)), level=9), "level-unknown"),
    (lambda: analysis.read_tables([]), "tables-missing"),
    (lambda: analysis.read_tables("nowhere.h5ad"), "table-missing"),
    (lambda: analysis.write_table(pd.DataFrame(), "out.xlsx"), "format-unknown"),
]


def _one_domain() -> anndata.AnnData:
    table = make_table(0, graph=True)
    table.obs["domain"] = "D1"
    return table


def _with_value(value: float) -> anndata.AnnData:
    table = make_table(0)
    table.X.data[3] = value
    return table


@pytest.mark.parametrize(("call", "code"), BAD)
def test_mistakes_are_named(call, code):
    with pytest.raises(CellquiltError) as caught:
        call()
    assert caught.value.code == code
    assert caught.value.message


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.gmt", "only a name\n"),
        ("a.gmt", ""),
        ("b.gmt", "a\tx\tg1\na\tx\tg2\n"),
        ("a.json", "{"),
        ("a.json", '{"a": 3}'),
        ("a.json", "[]"),
        ("a.txt", "a"),
        ("c.gmt", b"\xff\xfe\x00"),
    ],
)
def test_damaged_gene_sets(tmp_path, name, text):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CellquiltError) as caught:
        analysis.read_gene_sets(path)
    assert caught.value.code == "gene-sets-invalid"
    assert name in caught.value.message


def test_damaged_tables(tmp_path):
    (tmp_path / "a.h5ad").write_bytes(b"no HDF5")
    (tmp_path / "a.txt").write_text("")
    (tmp_path / "folder").mkdir()
    for name, code in (("a.h5ad", "table-unreadable"), ("a.txt", "table-unreadable"), ("folder", "store-unreadable")):
        with pytest.raises(CellquiltError) as caught:
            analysis.proportions(analysis.read_tables(tmp_path / name))
        assert caught.value.code == code
