"""Random orders of cells for permutation tests: the same ones for any number of threads.

Every permutation has a generator of its own, made from the seed and the permutation's number (SplitMix64; Steele, Lea
and Flood, OOPSLA 2014), so that who computes which, and in what order, changes nothing.
"""

import numba
import numpy as np
from numpy.typing import NDArray

#: Permutations handed out at a time have at least this many in a thread.
AT_LEAST = 4


@numba.njit(inline="always")
def _next(state):
    """Advance a generator, (1,) uint64, and give 64 random bits."""
    state[0] += np.uint64(0x9E3779B97F4A7C15)
    z = state[0]
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@numba.njit(cache=True, nogil=True)
def shuffle(values, seed, number):
    """Put the entries of an array into a random order (Fisher and Yates), that of a seed and a permutation's number."""
    state = np.empty(1, dtype=np.uint64)
    state[0] = np.uint64(seed)
    state[0] = _next(state) ^ (np.uint64(number) * np.uint64(0xD1342543DE82EF95))
    for i in range(values.size - 1, 0, -1):
        # The upper 32 bits scaled to 0..i: what this favours is beyond the 32nd bit.
        j = np.int64(((_next(state) >> np.uint64(32)) * np.uint64(i + 1)) >> np.uint64(32))
        values[i], values[j] = values[j], values[i]


def two_sided(observed: NDArray, permuted: NDArray, centre: NDArray) -> NDArray[np.float64]:
    """Share of the permutations, the observed one among them, that lie as far from the centre.

    Parameters
    ----------
    observed
        Any shape.
    permuted
        (n_permutations, *shape); what is NaN counts as not as far.
    centre
        Of the same shape as `observed`: the mean under the null hypothesis.

    Returns
    -------
    numpy.ndarray
        float64, NaN where the observed number is.
    """
    far = np.abs(observed - centre)
    # Rounding must not break ties.
    with np.errstate(invalid="ignore"):
        as_far = (np.abs(permuted - centre) >= far * (1 - 1e-9) - 1e-12).sum(axis=0)
    return np.where(np.isfinite(far), (1 + as_far) / (1 + len(permuted)), np.nan)


def compact(codes: NDArray[np.integer]) -> NDArray:
    """Numbers of groups in as few bytes as hold them: what is shuffled then stays in the processor's cache."""
    most = int(codes.max(initial=0))
    return np.ascontiguousarray(codes, dtype=np.uint8 if most < 2**8 else np.uint16 if most < 2**16 else np.int32)
