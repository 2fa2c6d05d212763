"""Two groups of samples compared by exchanging the samples' labels.

Cells of one sample are no independent observations, so what is permuted is which sample is in which group: all ways to
do so where they are few, a seeded choice of them elsewhere. Where samples come from several batches, labels are
exchanged within batches only and differences are those within batches.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cellquilt.core.errors import CellquiltError, did_you_mean

#: Samples that a group must have for a p-value.
MIN_SAMPLES = 3
#: Numbers of a permutation's statistics held at a time.
_ENTRIES = 8_000_000
#: Statistics this much below the observed one still count as equal to it: rounding must not break ties.
_TIE = 1e-9


@dataclass(frozen=True)
class GroupComparison:
    """Two groups compared in m numbers.

    Attributes
    ----------
    n_a, n_b
        Samples in each group.
    difference
        (m,) float64: mean of group b less mean of group a; with batches, within them.
    hedges_g
        (m,) float64: the difference over the standard deviation within groups, corrected for few samples; NaN where
        nothing varies within the groups.
    p
        (m,) float64, two-sided; NaN where `why_no_p` says why.
    p_max_t
        (m,) float64: adjusted so that the chance of even one false finding among the m is at most that.
    n_permutations
        Labellings that the observed one was compared with, itself among them.
    exact
        Whether these are all that there are.
    smallest_p
        No p-value of this design can be smaller.
    why_no_p
        Empty if there are p-values.
    """

    n_a: int
    n_b: int
    difference: NDArray[np.float64]
    hedges_g: NDArray[np.float64]
    p: NDArray[np.float64]
    p_max_t: NDArray[np.float64]
    n_permutations: int
    exact: bool
    smallest_p: float
    why_no_p: str = ""


def is_confounded(in_b: ArrayLike, batch: Sequence[str] | NDArray) -> bool:
    """Whether no batch of several samples holds both groups: batches and groups cannot be told apart.

    Batches of one sample each are the samples themselves and confound nothing.
    """
    labels = np.asarray(in_b, dtype=bool)
    codes = np.unique(np.asarray(batch), return_inverse=True)[1]
    number = np.bincount(codes)
    inside = np.bincount(codes, weights=labels)
    mixed = (inside > 0) & (inside < number)
    return bool(number.max(initial=0) > 1 and not mixed.any())


def compare_groups(
    values: NDArray[np.floating],
    in_b: ArrayLike,
    batch: Sequence[str] | NDArray | None = None,
    *,
    n_permutations: int = 9999,
    seed: int = 0,
) -> GroupComparison:
    """Compare two groups of samples in several numbers.

    The statistic is t (pooled; with batches, of a model with one level a batch). Of one number alone it orders the
    permutations as the difference of means does; over several it puts them on one scale, which max-T needs.

    Parameters
    ----------
    values
        (n_samples, m), finite.
    in_b
        (n_samples,) bool: which samples are in the second group.
    batch
        (n_samples,) names of batches.
    n_permutations
        All labellings are tried if there are no more than this and the observed one; else so many random ones.
    seed
        Of the random ones.

    Returns
    -------
    GroupComparison
        With fewer than `MIN_SAMPLES` samples in a group, or groups that are the batches, without p-values.

    Notes
    -----
    A permutation test is exact: if no label matters, p ≤ α in at most a share α of experiments. With few samples p
    takes few values and the test is conservative: 4 against 4 samples reach p < 0.05 in 2.9 % of null experiments (2 of
    70 labellings), 5 against 5 in 4.8 %, 6 against 6 in 5.0 %, and 3 against 3 never do.
    """
    labels = np.asarray(in_b, dtype=bool)
    y = np.asarray(values, dtype=np.float64)
    n, m = y.shape
    n_b = int(labels.sum())
    n_a = n - n_b
    if not n_a or not n_b:
        raise ValueError("both groups need a sample")
    why = ""
    if min(n_a, n_b) < MIN_SAMPLES:
        why = f"fewer than {MIN_SAMPLES} samples in a group"
    codes = np.zeros(n, dtype=np.int64)
    if batch is not None:
        found = np.unique(np.asarray(batch), return_inverse=True)[1]
        if is_confounded(labels, batch):
            why = "confounded with batch"
        elif found.max() + 1 < n:
            codes = found
    centred = y - _batch_means(y, codes)
    spread = np.sqrt((centred**2).sum(axis=0))
    spread[spread <= 1e-12 * np.maximum(np.abs(y).max(axis=0, initial=0), 1e-300)] = 0
    observed = labels - _batch_means(labels[:, None].astype(np.float64), codes).ravel()
    sxx = float((observed**2).sum())
    unit = np.divide(centred, spread, out=np.zeros_like(centred), where=spread > 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        difference = observed @ centred / sxx
        correlation = np.clip(observed @ unit / math.sqrt(sxx), -1, 1)
        freedom = n - int(codes.max(initial=0)) - 2
        within = spread * np.sqrt((1 - correlation**2) / freedom) if freedom > 0 else np.full(m, np.nan)
        g = np.where(within > 1e-12 * np.abs(difference), difference / within, np.nan)
    g *= 1 - 3 / (4 * freedom - 1) if freedom > 0 else np.nan
    nothing = np.full(m, np.nan)
    if why:
        return GroupComparison(n_a, n_b, difference, g, nothing, nothing.copy(), 0, False, math.nan, why)
    permuted, exact = labellings(labels, codes, n_permutations, seed)
    p, p_max_t = _p_values(permuted, unit, np.abs(observed @ unit))
    mirrored = all(2 * int(labels[codes == k].sum()) == int((codes == k).sum()) for k in _mixed(labels, codes))
    smallest = (2 if exact and mirrored else 1) / len(permuted)
    return GroupComparison(n_a, n_b, difference, g, p, p_max_t, len(permuted), exact, smallest)


def pairs_of(conditions: Sequence[str] | NDArray, reference: str | None = None) -> list[tuple[str, str]]:
    """Pairs of conditions to compare: all, in the order of their names, or each other one with `reference`.

    Raises
    ------
    CellquiltError
        ``conditions-too-few``, ``reference-unknown``.
    """
    names = sorted(set(map(str, conditions)))
    if len(names) < 2:
        said = f'all samples are "{names[0]}"' if names else "there are no samples"
        raise CellquiltError("conditions-too-few", f"{said}; nothing to compare", "two conditions are needed")
    if reference is None:
        return list(itertools.combinations(names, 2))
    if reference not in names:
        raise CellquiltError(
            "reference-unknown", f'no sample has the condition "{reference}"', did_you_mean(reference, names)
        )
    return [(reference, name) for name in names if name != reference]


def labellings(
    in_b: NDArray[np.bool_], batch: NDArray[np.int64], n_permutations: int, seed: int
) -> tuple[NDArray[np.float64], bool]:
    """Ways to label the samples that leave the numbers of labels in each batch as they are.

    Parameters
    ----------
    in_b
        (n,) the observed labels.
    batch
        (n,) numbers of batches, from 0.
    n_permutations
        How many random ones, where there are more than that and one.
    seed
        Of the random ones.

    Returns
    -------
    labels : numpy.ndarray
        (n_labellings, n) float64 of 0 and 1, the observed one among them (the first where they are random).
    exact : bool
        Whether these are all.
    """
    members = [np.flatnonzero(batch == k) for k in range(int(batch.max(initial=0)) + 1)]
    of_b = [int(in_b[rows].sum()) for rows in members]
    number = math.prod(math.comb(rows.size, k) for rows, k in zip(members, of_b, strict=True))
    if number <= n_permutations + 1:
        parts = [_choices(rows.size, k) for rows, k in zip(members, of_b, strict=True)]
        out = np.zeros((number, in_b.size))
        before, after = 1, number
        for rows, part in zip(members, parts, strict=True):
            after //= len(part)
            out[:, rows] = np.tile(np.repeat(part, after, axis=0), (before, 1))
            before *= len(part)
        return out, True
    rng = np.random.default_rng(seed)
    out = np.zeros((n_permutations + 1, in_b.size))
    out[0] = in_b
    for rows, k in zip(members, of_b, strict=True):
        order = rng.random((n_permutations, rows.size)).argsort(axis=1)
        part = np.zeros((n_permutations, rows.size))
        np.put_along_axis(part, order[:, :k], 1, axis=1)
        out[1:, rows] = part
    return out, False


def _choices(n: int, k: int) -> NDArray[np.float64]:
    """All ways to choose k of n: (comb(n, k), n) of 0 and 1."""
    chosen = np.array(list(itertools.combinations(range(n), k)), dtype=np.int64).reshape(math.comb(n, k), k)
    out = np.zeros((len(chosen), n))
    np.put_along_axis(out, chosen, 1, axis=1)
    return out


def _mixed(labels: NDArray[np.bool_], codes: NDArray[np.int64]) -> list[int]:
    """Batches that hold both groups."""
    number, inside = np.bincount(codes), np.bincount(codes, weights=labels)
    return np.flatnonzero((inside > 0) & (inside < number)).tolist()


def _batch_means(y: NDArray[np.float64], codes: NDArray[np.int64]) -> NDArray[np.float64]:
    """(n, m) mean of the sample's batch."""
    member = np.eye(int(codes.max(initial=0)) + 1)[codes]
    return member @ ((member.T @ y) / member.sum(axis=0)[:, None])


def _p_values(
    labels: NDArray[np.float64], unit: NDArray[np.float64], observed: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Shares of labellings whose statistic is as large: of each number itself, and of the largest of all."""
    m = unit.shape[1]
    block = max(1, _ENTRIES // len(labels))
    p, largest = np.empty(m), np.zeros(len(labels))
    for start in range(0, m, block):
        part = slice(start, start + block)
        # The numbers are centred within batches, so labels need not be.
        found = np.abs(labels @ unit[:, part])
        p[part] = (found >= observed[part] - _TIE).mean(axis=0)
        np.maximum(largest, found.max(axis=1), out=largest)
    largest.sort()
    return p, (len(labels) - np.searchsorted(largest, observed - _TIE)) / len(labels)
