"""Simulated cell tables: what they say about cells is the simulator's truth, and as asked for."""

import subprocess
import sys

import cellquilt as cq
import numpy as np
import pandas as pd
import pytest
from cellquilt.core.errors import CellquiltError
from cellquilt.simulate.cells import TYPE_NAMES, composition
from cellquilt.simulate.parameters import make_parameters
from cellquilt.simulate.proteins import PROTEINS
from cellquilt.simulate.slide import Slide
from cellquilt.simulate.tables import _area, cell_tables


def dense(table) -> np.ndarray:
    return table.X.toarray() if hasattr(table.X, "toarray") else np.asarray(table.X)


def log_means(table, genes) -> np.ndarray:
    return np.log(dense(table[:, genes]).mean(axis=0) + 0.01)


def test_contents() -> None:
    tables = cq.simulate.cell_tables(slides=2, n_cells=400, seed=3)
    assert [table.shape for table in tables] == [(400, 259)] * 2
    for number, table in enumerate(tables):
        assert set(table.obs["sample"]) == {f"slide_{number}"}
        assert set(table.obs["condition"]) == {"control"}
        assert table.obs_names.is_unique
        assert list(table.obs["domain_true"].cat.categories) == [f"domain_{k}" for k in range(8)]
        assert table.obs["domain_true"].nunique() == 8
        assert table.obsm["spatial"].dtype == np.float64
        assert table.X.dtype == np.float32
        assert (table.X.data == np.round(table.X.data)).all()
        extent = np.ptp(table.obsm["spatial"], axis=0)
        assert extent == pytest.approx([np.sqrt(400 * 180)] * 2, rel=0.15)
    assert not set(tables[0].obs_names) & set(tables[1].obs_names)


def test_a_domain_is_a_mixture_of_types() -> None:
    table = cell_tables(n_cells=20_000, n_domains=6, rare_niches=1, domain_contrast=1.0, seed=1)[0]
    found = pd.crosstab(table.obs["domain_true"], table.obs["cell_type"], normalize="index")[TYPE_NAMES].to_numpy()
    # Packing favours some sizes of cells, so types are compared between domains.
    wanted = composition(6)
    ratio = np.log(found / found.mean(axis=0)) - np.log(wanted / wanted.mean(axis=0))
    assert np.abs(ratio).max() < 0.5
    for a in range(6):
        assert (found[a] > 0.01).all()
        for b in range(a):
            assert np.abs(found[a] - found[b]).sum() > 0.4


def test_no_two_domains_are_composed_alike() -> None:
    favoured = [frozenset(np.flatnonzero(row > base)) for row in composition(8) for base in [composition(8).mean(0)]]
    assert len(set(favoured)) == 8


def test_layers_follow_each_other_and_niches_are_islands() -> None:
    table = cell_tables(n_cells=8000, n_domains=8, thin_layers=1, rare_niches=2, seed=2)[0]
    # Shares are those of space: a domain of large cells has fewer of them.
    area = table.obs.groupby("domain_true", observed=False)["area_um2"].sum().to_numpy()
    share = area / area.sum()
    layers = np.array([1, 1, 1, 0.5, 1, 1])
    assert share[:6] == pytest.approx(0.92 * layers / layers.sum(), rel=0.35)
    assert share[6:] == pytest.approx([0.04, 0.04], rel=0.5)
    assert share[3] < 0.7 * np.median(share[:6])
    from scipy.spatial import cKDTree

    pairs = cKDTree(table.obsm["spatial"]).query_pairs(12.0, output_type="ndarray")
    code = table.obs["domain_true"].cat.codes.to_numpy().astype(int)[pairs]
    of_layers = (code < 6).all(axis=1)
    assert (np.abs(np.diff(code[of_layers], axis=1)) <= 1).mean() > 0.99
    assert (code[:, 0] == code[:, 1]).mean() > 0.75


def test_counts_are_those_of_the_simulated_transcripts() -> None:
    """The same slide with its label image and its single transcripts: depth and profile agree."""
    slide = Slide(make_parameters("default", width_px=1500, seed=5))
    tile = slide.tile((0, 1500, 0, 1500))
    index = tile.owned.index
    assert _area(slide.parameters, tile.cells)[index].sum() == pytest.approx(tile.owned.area_um2.sum(), rel=0.06)
    transcripts = slide.transcripts(tile)
    inside = transcripts.gene[(transcripts.cell > 0) & (transcripts.gene < 259)]
    n = int(1.5 * len(index))
    table = cell_tables(n_cells=n, n_domains=4, rare_niches=0, thin_layers=0, seed=5, domain_contrast=1.0)[0]
    assert dense(table).sum() / n == pytest.approx(len(inside) / len(index), rel=0.15)
    profile = np.bincount(inside, minlength=259)
    order = {gene: k for k, gene in enumerate(slide.expression.genes)}
    expected = profile[[order[gene] for gene in table.var_names]]
    assert np.corrcoef(np.log1p(dense(table).sum(axis=0)), np.log1p(expected))[0, 1] > 0.97


def test_dispersion() -> None:
    given = {"n_cells": 3000, "seed": 1, "cell_type_contrast": 0.0}
    poisson, spread = (dense(cell_tables(dispersion=phi, **given)[0]) for phi in (0.0, 2.0))
    assert spread.mean() == pytest.approx(poisson.mean(), rel=0.03)
    many = poisson.mean(axis=0) > 3
    assert (spread.var(axis=0)[many] > 1.8 * poisson.var(axis=0)[many]).all()


@pytest.mark.parametrize(("kind", "n"), [("counts", 259), ("protein", 30)])
def test_panels(kind, n) -> None:
    tables = cell_tables(slides=6, n_cells=60, kind=kind, panels=3, panel_overlap=0.5, seed=1)
    panels = [set(table.var_names) for table in tables]
    assert panels[:3] == panels[3:]
    shared = set.intersection(*panels)
    assert len(shared) == round(0.5 * n)
    assert len(set.union(*panels)) == n
    assert all(a & b == shared for a, b in [(panels[0], panels[1]), (panels[1], panels[2]), (panels[0], panels[2])])
    assert [table.obs["panel"].iloc[0] for table in tables] == ["panel_0", "panel_1", "panel_2"] * 2
    assert len({frozenset(table.var_names) for table in cell_tables(slides=2, n_cells=60, kind=kind)}) == 1


@pytest.mark.parametrize("kind", ["counts", "protein"])
def test_batch_effect(kind) -> None:
    def spread(batch_effect: float) -> float:
        a, b = cell_tables(slides=2, n_cells=2500, kind=kind, batch_effect=batch_effect, seed=4)
        strong = a.var_names[dense(a).mean(axis=0) > 0.5]
        return float(np.std(log_means(a, strong) - log_means(b, strong)))

    assert spread(0.0) < 0.25
    assert spread(0.6) > 2 * spread(0.0)
    assert spread(0.6) == pytest.approx(0.6, rel=0.35)


def test_proteins_are_those_of_the_types_with_background_and_spill() -> None:
    table = cell_tables(n_cells=4000, kind="protein", seed=1)[0]
    assert list(table.var_names) == list(PROTEINS)
    values = pd.DataFrame(dense(table), columns=table.var_names)
    assert (values >= 0).all(axis=None)
    mean = values.groupby(table.obs["cell_type"].to_numpy()).mean()
    for name, types in PROTEINS.items():
        if types:
            assert mean.loc[list(types), name].min() > 2 * mean[name].drop(list(types)).max()
    assert (values.mean() > 20).all()
    # T cells among B cells look more like them than T cells elsewhere.
    b_share = pd.crosstab(table.obs["domain_true"], table.obs["cell_type"], normalize="index")["b_cell"]
    t_cells = table.obs["cell_type"].to_numpy() == "t_cell"
    cd20 = values["CD20"][t_cells].groupby(table.obs["domain_true"].to_numpy()[t_cells]).mean()
    assert np.corrcoef(cd20, b_share[cd20.index])[0, 1] > 0.5


def test_absent_domain() -> None:
    whole = cell_tables(slides=2, n_cells=1200, seed=6)
    tables = cell_tables(slides=2, n_cells=1200, seed=6, absent={1: [0, 3, 7]})
    assert set(tables[0].obs["domain_true"]) == {f"domain_{k}" for k in range(8)}
    assert set(tables[1].obs["domain_true"]) == {f"domain_{k}" for k in (1, 2, 4, 5, 6)}
    assert (tables[0].obs == whole[0].obs).all(axis=None)


def test_conditions() -> None:
    tables = cell_tables(
        slides=8, n_cells=500, panels=2, conditions=["healthy", "ill"], condition_niche=True, seed=2, rare_niches=1
    )
    conditions = [table.obs["condition"].iloc[0] for table in tables]
    assert conditions == ["healthy", "healthy", "ill", "ill"] * 2
    assert [("domain_7" in set(table.obs["domain_true"])) for table in tables] == [c == "ill" for c in conditions]
    named = cell_tables(slides=3, n_cells=50, conditions=["a", "b", "b"])
    assert [table.obs["condition"].iloc[0] for table in named] == ["a", "b", "b"]


@pytest.mark.parametrize("kind", ["counts", "protein"])
def test_presets_differ_in_depth_and_crowding(kind) -> None:
    easy, hard = (cell_tables(n_cells=1500, preset=preset, kind=kind, seed=1)[0] for preset in ("easy", "hard"))
    assert np.ptp(easy.obsm["spatial"]) > 1.4 * np.ptp(hard.obsm["spatial"])
    assert dense(easy).sum() > 1.2 * dense(hard).sum()


@pytest.mark.parametrize("kind", ["counts", "protein"])
def test_same_seed_same_table(kind) -> None:
    given = {"slides": 2, "n_cells": 300, "kind": kind, "panels": 2, "conditions": ["a", "b"]}
    one, again, other = (cell_tables(seed=seed, **given)[1] for seed in (5, 5, 6))
    assert dense(one).tobytes() == dense(again).tobytes()
    assert one.obsm["spatial"].tobytes() == again.obsm["spatial"].tobytes()
    assert one.obs.equals(again.obs)
    assert list(one.var_names) == list(again.var_names)
    assert dense(one).sum() != dense(other).sum()
    # More slides change nothing on the first ones.
    more = cell_tables(seed=5, **{**given, "slides": 3})[1]
    assert dense(one).tobytes() == dense(more).tobytes()


def test_needs_no_torch() -> None:
    code = "import sys, cellquilt as cq; cq.simulate.cell_tables(n_cells=20); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"kind": "rna"}, 'kind is "rna"'),
        ({"slides": 0}, "slides is 0"),
        ({"rare_niches": 8}, "rare_niches is 8"),
        ({"thin_layers": 7}, "thin_layers is 7"),
        ({"kind": "protein", "n_genes": 31}, "n_genes is 31"),
        ({"conditions": "control"}, "conditions is 'control'"),
        ({"absent": {1: [0]}}, "absent has 1"),
        ({"absent": {0: [0, 1, 2, 3, 4, 5, 6]}}, "absent leaves slide 0 without a layer"),
        ({"n_domains": 9}, "n_domains is 9"),
        ({"domain_shares": (1.0, 0.0)}, "domain_shares has 2 numbers"),
    ],
)
def test_mistakes_are_named(given, said) -> None:
    with pytest.raises(CellquiltError, match=said) as caught:
        cell_tables(**{"n_cells": 50, **given})
    assert caught.value.code == "simulate-value"
