"""Continuity, divergence and entropy by hand, by scikit-learn, and as novae gives them."""

import anndata
import cellquilt as cq
import numpy as np
import pandas as pd
import pytest
from cellquilt.core.errors import CellquiltError
from cellquilt.domains import metrics
from sklearn.metrics import f1_score


def table(seed: int = 0, n: int = 300, slides: int = 2) -> anndata.AnnData:
    rng = np.random.default_rng(seed)
    out = anndata.AnnData(np.ones((n, 1), np.float32))
    out.obsm["spatial"] = rng.uniform(0, 150, (n, 2))
    out.obs["slide"] = [f"s{k}" for k in rng.integers(0, slides, n)]
    names = np.array(["a", "b", "c"])[(out.obsm["spatial"][:, 0] // 50).astype(int)].astype(object)
    names[rng.random(n) < 0.1] = None
    out.obs["domain"] = pd.Categorical(names)
    cq.spatial_neighbors(out, slide_key="slide")
    return out


def test_continuity_is_the_f1_of_the_ends_of_edges():
    found = table()
    scores = []
    for slide in ("s0", "s1"):
        part = found[(found.obs["slide"] == slide).to_numpy()]
        i, j = part.obsp["spatial_distances"].nonzero()
        codes = part.obs["domain"].cat.codes.to_numpy()
        known = (codes[i] >= 0) & (codes[j] >= 0)
        scores.append(f1_score(codes[i][known], codes[j][known], average=None))
    want = np.mean([score.mean() for score in scores])
    assert metrics.fide_score(found, "domain", "slide") == pytest.approx(want)
    assert metrics.fide_score(found, "domain", "slide", n_classes=6) == pytest.approx(want / 2)
    assert 0.6 < want < 0.95
    found.obs["random"] = np.random.default_rng(1).permutation(found.obs["domain"])
    assert metrics.fide_score(found, "random", "slide") < 0.5


def test_shares_divergence_and_entropy():
    one, other = table(0, slides=1), table(1, slides=1)
    one.obs["domain"] = ["a"] * 150 + ["b"] * 150
    other.obs["domain"] = ["a"] * 300
    domains, shares, slides = metrics.domain_shares([one, other], "domain", "slide")
    assert (domains, shares.tolist(), slides) == (["a", "b"], [[0.5, 0.5], [1, 0]], ["s0", "s0"])
    mean = -(0.75 * np.log2(0.75) + 0.25 * np.log2(0.25))
    assert metrics.jensen_shannon_divergence([one, other], "domain") == pytest.approx(mean - 0.5)
    assert metrics.jensen_shannon_divergence([one, one.copy()], "domain") == pytest.approx(0)
    assert metrics.mean_normalized_entropy([one, other], 4, "domain") == pytest.approx((1 + 0) / 2 / 2)
    want = metrics.fide_score(one, "domain", n_classes=2)
    assert metrics.heuristic(one, "domain", 2) == pytest.approx(want)


def test_agreement_does_not_heed_names():
    found = table()
    found.obs["same"] = found.obs["domain"].map({"a": "x", "b": "y", "c": "z"})
    assert metrics.agreement(found, "same", "domain") == {"ari": pytest.approx(1), "nmi": pytest.approx(1)}
    found.obs["other"] = np.random.default_rng(0).permutation(found.obs["domain"])
    assert abs(metrics.agreement(found, "other", "domain")["ari"]) < 0.05


def test_as_novae_says():
    """Numbers of novae.monitor 1.1.2 on this table (without cells that have no domain, as one slide)."""
    found = table(3, slides=1)
    found = found[found.obs["domain"].notna().to_numpy()].copy()
    cq.spatial_neighbors(found)
    assert metrics.fide_score(found, "domain", n_classes=4) == pytest.approx(NOVAE["fide"], abs=1e-6)
    assert metrics.heuristic(found, "domain", 4) == pytest.approx(NOVAE["heuristic"], abs=1e-6)
    halves = [found[:100].copy(), found[100:].copy()]
    assert metrics.jensen_shannon_divergence(halves, "domain") == pytest.approx(NOVAE["jsd"], abs=1e-6)
    assert metrics.mean_normalized_entropy(halves, 4, "domain") == pytest.approx(NOVAE["entropy"], abs=1e-6)


NOVAE = {"fide": 0.67457997, "heuristic": 0.53446104, "jsd": 0.01097355, "entropy": 0.78687889}


@pytest.mark.parametrize(
    ("call", "code"),
    [
        (lambda t: metrics.fide_score(t, "domains"), "domains-missing"),
        (lambda t: metrics.fide_score(t, "domain", n_classes=1), "n-classes-too-few"),
        (lambda t: metrics.fide_score(t, "domain", "slides"), "slide-key-unknown"),
        (lambda t: metrics.fide_score(anndata.AnnData(t.X, t.obs), "domain"), "graph-missing"),
    ],
)
def test_mistakes_are_named(call, code):
    with pytest.raises(CellquiltError) as caught:
        call(table())
    assert caught.value.code == code
