"""How sure domains are, how many there are, and latents of batches brought together."""

import logging

import anndata
import cellquilt as cq
import numpy as np
import pytest
from cellquilt.core.errors import CellquiltError
from cellquilt.domains.correction import batch_effect_correction
from cellquilt.domains.metrics import mixing
from cellquilt.domains.model import Model
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import adjusted_rand_score, roc_auc_score


def trained(seed: int = 0, n_domains: int = 8, **given) -> tuple[list[anndata.AnnData], Model]:
    tables = cq.simulate.cell_tables(**{"slides": 4, "n_cells": 1000, "seed": seed, **given})
    cq.spatial_neighbors(tables)
    model = Model.train(tables, n_domains=n_domains, seed=seed)
    model.compute_representations(tables)
    model.assign_domains(tables, n_domains=n_domains)
    return tables, model


@pytest.fixture(scope="module")
def cohort() -> tuple[list[anndata.AnnData], Model]:
    return trained(seed=7)


def together(tables, key: str) -> np.ndarray:
    return np.concatenate([np.asarray(table.obs[key].astype(str)) for table in tables])


def latents(tables, key: str = "niche_latent") -> np.ndarray:
    return np.concatenate([table.obsm[key] for table in tables])


def test_probable_and_stable_cells_are_more_often_right(cohort):
    tables, model = cohort
    model.domain_confidence(tables)
    for table in tables:
        probable = table.obsm["domain_probabilities"]
        assert list(probable.columns) == sorted(probable.columns, key=lambda name: int(name[1:]))
        np.testing.assert_allclose(probable.sum(axis=1), 1, atol=1e-5)
        most = probable.idxmax(axis=1).to_numpy()
        assert (most == table.obs["domain"].astype(str)).mean() > 0.85
    ours, truth = together(tables, "domain"), together(tables, "domain_true")
    named = {name: max(set(truth), key=lambda true: ((ours == name) & (truth == true)).sum()) for name in set(ours)}
    right = np.array([named[name] for name in ours]) == truth
    for key in ("domain_confidence", "domain_stability"):
        value = np.concatenate([table.obs[key] for table in tables])
        assert ((value >= 0) & (value <= 1)).all()
        print(f"\n{key}: area under the curve of being right {roc_auc_score(right, value):.3f}")
        assert roc_auc_score(right, value) > 0.6
    before = [table.obs["domain_stability"].copy() for table in tables]
    model.domain_confidence(tables)
    assert all(np.array_equal(a, table.obs["domain_stability"]) for a, table in zip(before, tables, strict=True))


def test_the_recommended_number_of_domains_is_near_the_true_one(cohort):
    tables, model = cohort
    found = model.stable_levels(tables, levels=range(2, 15), bootstraps=5)
    print("\n", dict(zip(found.levels.tolist(), found.stability.round(2).tolist(), strict=True)), found.recommended)
    assert 4 <= found.recommended <= 11
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(5, 6)) * 6
    clear = (centres[rng.integers(0, 5, 2000)] + rng.normal(size=(2000, 6))).astype(np.float32)
    from cellquilt.domains.stability import stable_levels

    assert stable_levels(clear, "euclidean", levels=range(2, 10)).recommended == 5


def shifted(tables, size: float, seed: int = 0) -> None:
    """A batch effect in the latents that the model did not see."""
    rng = np.random.default_rng(seed)
    spread = latents(tables).std(axis=0)
    for table in tables:
        table.obsm["niche_latent"] = (table.obsm["niche_latent"] + size * spread * rng.normal(size=spread.size)).astype(
            np.float32
        )


def test_batches_are_mixed_and_domains_stay():
    tables, _ = trained(seed=3, conditions=("control", "case"), condition_niche=True, slides=6)
    domains, truth = together(tables, "domain"), together(tables, "domain_true")
    shifted(tables, 0.5)
    sample = together(tables, "sample")
    batch_effect_correction(tables, "sample")
    before, after = latents(tables), latents(tables, "niche_latent_corrected")
    mixed = [mixing(x, sample) for x in (before, after)]
    predicted = [
        LogisticRegression(max_iter=500).fit(x[::2], sample[::2]).score(x[1::2], sample[1::2]) for x in (before, after)
    ]
    print(f"\nmixing {np.round(mixed, 2)} of 6, slide predicted {np.round(predicted, 2)}")
    assert mixed[1] > mixed[0] + 0.3
    assert predicted[1] < predicted[0] - 0.1
    from sklearn.cluster import KMeans

    scores = []
    for x in (before, after):
        labels = KMeans(8, n_init=10, random_state=0).fit_predict(x)
        scores.append(adjusted_rand_score(truth, labels))
    print(f"agreement with the truth {np.round(scores, 3)}")
    assert scores[1] > scores[0] - 0.02
    assert len(set(domains)) == 8


def test_a_niche_of_one_condition_stays_apart():
    tables, _ = trained(seed=5, conditions=("control", "case"), condition_niche=True, slides=6, rare_niches=0)
    truth, condition = together(tables, "domain_true"), together(tables, "condition")
    only = [name for name in np.unique(truth) if len(set(condition[truth == name])) == 1]
    assert only
    batch_effect_correction(tables, "sample")
    for key in ("niche_latent", "niche_latent_corrected"):
        x = latents(tables, key)
        niche = np.isin(truth, only)
        model = LogisticRegression(max_iter=1000, class_weight="balanced").fit(x[::2], niche[::2])
        score = roc_auc_score(niche[1::2], model.decision_function(x[1::2]))
        print(f"\n{key}: the niche against all others {score:.3f}")
        assert score >= 0.95


def test_confounded_conditions_are_pointed_out(cohort, caplog):
    tables = [table.copy() for table in cohort[0]]
    for number, table in enumerate(tables):
        table.obs["condition"], table.obs["run"] = f"c{number % 2}", f"r{number % 2}"
    caplog.set_level(logging.WARNING)
    batch_effect_correction(tables, "run", condition_key="condition")
    assert "confounded" in caplog.text
    # Nothing of the condition is taken away.
    np.testing.assert_allclose(
        latents(tables, "niche_latent_corrected").mean(axis=0), latents(tables).mean(axis=0), atol=1e-4
    )
    caplog.clear()
    for number, table in enumerate(tables):
        table.obs["run"] = f"r{number // 2}"
    batch_effect_correction(tables, "run", condition_key="condition")
    assert "confounded" not in caplog.text


def test_what_lacks_is_named(cohort):
    tables, model = cohort
    for call, code in (
        (lambda: batch_effect_correction(tables, "slide"), "column-unknown"),
        (lambda: batch_effect_correction(bare(tables[0]), "sample"), "latents-missing"),
        (lambda: model.domain_confidence(bare(tables[0])), "latents-missing"),
        (lambda: model.stable_levels(bare(tables[0])), "latents-missing"),
        (lambda: model.stable_levels(tables[0][:30].copy()), "too-few-cells"),
    ):
        with pytest.raises(CellquiltError) as caught:
            call()
        assert caught.value.code == code


def bare(table: anndata.AnnData) -> anndata.AnnData:
    out = table.copy()
    del out.obsm["niche_latent"]
    return out


def test_mixing_is_one_apart_and_the_number_of_slides_together():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(900, 4))
    slides = np.repeat(["a", "b", "c"], 300)
    assert mixing(x, slides) == pytest.approx(3, abs=0.25)
    assert mixing(x + 100 * np.unique(slides, return_inverse=True)[1][:, None], slides) == pytest.approx(1, abs=1e-6)
