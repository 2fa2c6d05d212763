"""Groups of samples: exact tests by brute force, honest rates of false findings, effect sizes, shares, many tests."""

import itertools
import math

import numpy as np
import pytest
from cellquilt.core.errors import CellquiltError
from cellquilt.statistics.compositions import centred_log_ratios, median_log_ratios
from cellquilt.statistics.groups import compare_groups, is_confounded, labellings, pairs_of
from cellquilt.statistics.multiplicity import benjamini_hochberg
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

SIX = np.repeat([False, True], 6)


def brute_force(values: np.ndarray, in_b: np.ndarray) -> tuple[float, int]:
    """Two-sided p of the difference of means over all ways to choose the second group."""
    n, k = len(values), int(in_b.sum())

    def difference(rows: tuple[int, ...]) -> float:
        chosen = np.zeros(n, dtype=bool)
        chosen[list(rows)] = True
        return abs(values[chosen].mean() - values[~chosen].mean())

    every = [difference(rows) for rows in itertools.combinations(range(n), k)]
    observed = abs(values[in_b].mean() - values[~in_b].mean())
    return float(np.mean([one >= observed - 1e-12 for one in every])), len(every)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), n_a=st.integers(3, 5), n_b=st.integers(3, 5), ties=st.booleans())
def test_p_is_that_of_all_labellings(seed, n_a, n_b, ties):
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 4, n_a + n_b).astype(float) if ties else rng.normal(size=n_a + n_b)
    in_b = rng.permutation(np.repeat([False, True], [n_a, n_b]))
    found = compare_groups(values[:, None], in_b)
    want, number = brute_force(values, in_b)
    assert found.p[0] == pytest.approx(1.0 if np.ptp(values) == 0 else want)
    assert (found.exact, found.n_permutations) == (True, number)
    assert found.p[0] >= found.smallest_p - 1e-12
    assert found.difference[0] == pytest.approx(values[in_b].mean() - values[~in_b].mean())


def test_it_is_scipys_exact_test():
    values = np.random.default_rng(0).normal(size=12)
    want = stats.permutation_test(
        (values[SIX], values[~SIX]), lambda a, b: abs(a.mean() - b.mean()), n_resamples=np.inf, alternative="greater"
    )
    assert compare_groups(values[:, None], SIX).p[0] == pytest.approx(want.pvalue)


def test_neither_order_nor_scale_nor_the_names_of_groups_matter():
    rng = np.random.default_rng(1)
    values = rng.normal(size=(12, 4))
    found = compare_groups(values, SIX)
    order = rng.permutation(12)
    for other in (
        compare_groups(values[order], SIX[order]),
        compare_groups(values * 3 - 7, SIX),
        compare_groups(values, ~SIX),
    ):
        assert np.allclose(found.p, other.p)
        assert np.allclose(found.p_max_t, other.p_max_t)
        assert np.allclose(np.abs(found.hedges_g), np.abs(other.hedges_g))


def test_effect_sizes_by_hand():
    a, b = np.array([1.0, 2, 4, 5]), np.array([6.0, 7, 9])
    found = compare_groups(np.concatenate([a, b])[:, None], [False] * 4 + [True] * 3)
    pooled = math.sqrt(((a - a.mean()) ** 2).sum() + ((b - b.mean()) ** 2).sum()) / math.sqrt(5)
    assert found.hedges_g[0] == pytest.approx((b.mean() - a.mean()) / pooled * (1 - 3 / (4 * 5 - 1)))
    assert (found.n_a, found.n_b, found.smallest_p) == (4, 3, 1 / 35)
    constant = compare_groups(np.ones((8, 1)), [False] * 4 + [True] * 4)
    assert (constant.p[0], constant.difference[0]) == (1, 0)
    assert np.isnan(constant.hedges_g[0])


def test_max_t_is_the_share_of_labellings_with_any_statistic_as_large():
    values = np.random.default_rng(2).normal(size=(8, 5))
    values[:, 0] += 2.5 * np.repeat([0, 1], 4)
    in_b = np.repeat([False, True], 4)
    found = compare_groups(values, in_b)
    labels, _ = labellings(in_b, np.zeros(8, dtype=np.int64), 9999, 0)
    t = np.array([np.abs(stats.ttest_ind(values[row == 1], values[row == 0]).statistic) for row in labels])
    observed = np.abs(stats.ttest_ind(values[in_b], values[~in_b]).statistic)
    want = (t.max(axis=1)[:, None] >= observed - 1e-9).mean(axis=0)
    assert np.allclose(found.p_max_t, want)
    assert (found.p_max_t >= found.p).all()
    # In pieces, as for many genes, it is the same.
    many = np.repeat(values, 3000, axis=1)
    assert np.allclose(compare_groups(many, in_b).p_max_t[::3000], want)


def test_random_labellings_are_seeded_and_near_the_exact_ones():
    values = np.random.default_rng(3).normal(size=(12, 3))
    exact = compare_groups(values, SIX)
    some = compare_groups(values, SIX, n_permutations=500, seed=5)
    assert (exact.exact, some.exact, some.n_permutations) == (True, False, 501)
    assert np.array_equal(some.p, compare_groups(values, SIX, n_permutations=500, seed=5).p)
    assert not np.array_equal(some.p, compare_groups(values, SIX, n_permutations=500, seed=6).p)
    assert np.abs(some.p - exact.p).max() < 0.08
    assert some.p.min() >= some.smallest_p == 1 / 501
    labels, _ = labellings(SIX, np.zeros(12, dtype=np.int64), 500, 5)
    assert np.array_equal(labels[0], SIX)
    assert (labels.sum(axis=1) == 6).all()


def test_labels_stay_in_their_batch():
    in_b = np.array([0, 0, 1, 1, 0, 1, 1], dtype=bool)
    batch = np.array([0, 0, 0, 0, 1, 1, 1])
    labels, exact = labellings(in_b, batch, 9999, 0)
    assert exact
    assert len(labels) == len(np.unique(labels, axis=0)) == math.comb(4, 2) * math.comb(3, 2)
    assert (labels[:, :4].sum(axis=1) == 2).all()
    assert (labels[:, 4:].sum(axis=1) == 2).all()


def test_batches_that_differ_do_not_hide_a_difference():
    rng = np.random.default_rng(4)
    in_b = np.tile([False, True], 6)
    batch = np.repeat(["x", "y"], 6)
    values = 0.5 * rng.normal(size=(12, 1)) + 10 * (batch == "y")[:, None] + 2 * in_b[:, None]
    assert compare_groups(values, in_b).p[0] > 0.3
    within = compare_groups(values, in_b, batch)
    assert within.p[0] == pytest.approx(2 / 400)
    assert within.difference[0] == pytest.approx(
        np.mean([values[(batch == k) & in_b].mean() - values[(batch == k) & ~in_b].mean() for k in "xy"])
    )


def test_groups_that_are_the_batches_have_no_p_value():
    values = np.random.default_rng(5).normal(size=(12, 2))
    batch = np.repeat(["x", "y"], 6)
    found = compare_groups(values, SIX, batch)
    assert found.why_no_p == "confounded with batch"
    assert np.isnan(found.p).all()
    assert np.isfinite(found.hedges_g).all()
    assert is_confounded(SIX, np.repeat(["p", "q", "r", "s"], 3))
    # Every sample a batch of its own says nothing about batches.
    own = compare_groups(values, SIX, [f"slide {k}" for k in range(12)])
    assert np.allclose(own.p, compare_groups(values, SIX).p)


def test_fewer_than_three_samples_have_effect_sizes_only():
    found = compare_groups(np.arange(6.0)[:, None], [False, False, True, True, True, True])
    assert np.isnan([found.p[0], found.p_max_t[0], found.smallest_p]).all()
    assert found.difference[0] == pytest.approx(3)
    assert "fewer than 3" in found.why_no_p


def null_cohort(rng: np.random.Generator, n_samples: int, n_domains: int = 6) -> np.ndarray:
    """Cells of each domain in samples of one kind: samples differ (Dirichlet), and so do cells (multinomial)."""
    shares = rng.dirichlet(20 * np.linspace(1, 3, n_domains) / n_domains, n_samples)
    return np.array([rng.multinomial(1500, share) for share in shares])


def test_200_null_cohorts_give_3_to_7_percent():
    """6 against 6 samples: the largest rate that the test can have at 0.05 is 46 of 924 labellings, 4.98 %."""
    rng = np.random.default_rng(0)
    each, any_of_them, cells = [], [], []
    for _ in range(200):
        numbers = null_cohort(rng, 12)
        found = compare_groups(median_log_ratios(numbers), SIX)
        each.append(found.p)
        any_of_them.append(found.p_max_t.min())
        table = np.array([numbers[~SIX].sum(axis=0), numbers[SIX].sum(axis=0)])
        cells.append(stats.chi2_contingency(table).pvalue)
    assert 0.03 <= np.mean(np.array(each) < 0.05) <= 0.07
    assert 0.03 <= np.mean(np.array(any_of_them) < 0.05) <= 0.07
    # With cells as the unit nearly every null cohort "differs".
    assert np.mean(np.array(cells) < 0.05) > 0.95


@pytest.mark.parametrize(("n", "rate"), [(3, 0.0), (4, 2 / 70), (5, 12 / 252), (6, 46 / 924)])
def test_rate_of_false_findings_is_what_the_docs_say(n, rate):
    """3,000 null numbers at once, samples independent."""
    rng = np.random.default_rng(n)
    values = rng.normal(size=(2 * n, 3000))
    found = compare_groups(values, np.repeat([False, True], n))
    assert np.mean(found.p < 0.05) == pytest.approx(rate, abs=3.5 * math.sqrt(rate * (1 - rate) / 3000) + 1e-12)


def test_rate_of_false_findings_within_batches():
    """3 + 3 samples in each of two batches that differ: 20 of 400 labellings."""
    rng = np.random.default_rng(8)
    batch = np.repeat(["x", "y"], 6)
    values = rng.normal(size=(12, 3000)) + 5 * (batch == "y")[:, None]
    found = compare_groups(values, np.tile([False, True], 6), batch)
    assert np.mean(found.p <= 0.05) == pytest.approx(0.05, abs=0.014)


def test_pairs_of_conditions():
    assert pairs_of(["b", "a", "c", "a"]) == [("a", "b"), ("a", "c"), ("b", "c")]
    assert pairs_of(["b", "a", "c"], "b") == [("b", "a"), ("b", "c")]
    with pytest.raises(CellquiltError, match="nothing to compare"):
        pairs_of(["a", "a"])
    with pytest.raises(CellquiltError, match='did you mean "control"') as caught:
        pairs_of(["control", "treated"], "contrl")
    assert caught.value.code == "reference-unknown"


def test_log_ratios():
    numbers = np.array([[10, 20, 30], [0, 5, 100]])
    found = centred_log_ratios(numbers)
    assert np.allclose(found.sum(axis=1), 0)
    assert found[0, 1] - found[0, 0] == pytest.approx(np.log2(20.5 / 10.5))
    assert np.allclose(centred_log_ratios(numbers * 7, 0.5 * 7), found)


def test_one_domain_that_appears_moves_no_other():
    rng = np.random.default_rng(6)
    numbers = rng.poisson(300, (12, 8)).astype(float)
    numbers[:, 7] = np.where(SIX, 60, 0)
    robust = compare_groups(median_log_ratios(numbers), SIX)
    assert robust.p[7] == pytest.approx(2 / 924)
    assert np.abs(robust.difference[:7]).max() < 0.15
    # Against the geometric mean all others seem to fall by nearly twofold.
    centred = compare_groups(centred_log_ratios(numbers), SIX)
    assert (centred.difference[:7] < -0.7).all()
    assert np.allclose(centred.p[:7], 2 / 924)


def test_benjamini_hochberg_is_scipys():
    p = np.random.default_rng(7).uniform(size=50) ** 2
    assert np.allclose(benjamini_hochberg(p), stats.false_discovery_control(p))
    with_nan = np.insert(p, 3, np.nan)
    assert np.allclose(np.delete(benjamini_hochberg(with_nan), 3), stats.false_discovery_control(p))
    assert np.isnan(benjamini_hochberg(with_nan)[3])
    assert benjamini_hochberg(np.full((2, 2), 0.5)).shape == (2, 2)
