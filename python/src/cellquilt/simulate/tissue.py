"""The map of a slide: tissue outline, empty and necrotic regions, domains.

Every map is a smooth noise field cut at quantiles. The quantiles are taken on a fixed grid over the whole canvas, so
the shares come out as asked for on this canvas, and the answer at a place does not depend on tiles.
"""

import math
from dataclasses import dataclass

import numba
import numpy as np

from cellquilt.simulate.parameters import Parameters
from cellquilt.simulate.randomness import (
    STREAM_DOMAIN,
    STREAM_EMPTY,
    STREAM_NECROSIS,
    STREAM_NICHE,
    STREAM_OUTLINE,
    two_octaves,
)

EMPTY_UM = 45.0
NECROSIS_UM = 90.0
NICHE_SHARE = 0.04  # of the canvas, each, where no shares are given
_GRID = 96  # places along either side of the canvas on which the quantiles are taken

GLASS, HOLE, NECROTIC, LIVE = 0, 1, 2, 3


@dataclass(frozen=True)
class TissueMap:
    """Thresholds of the noise fields of one slide; `at` answers for any place.

    Attributes
    ----------
    numbers
        (10,) float64: width and height in µm, outline's half axes and exponent, its on/off, thresholds of empty and
        necrotic regions, domain length, niche length.
    domain_cuts
        (n_layers - 1,) float64, rising.
    niche_cuts
        (n_niches,) float64: niche k lies where its own field reaches this and no later niche lies. Niches are the
        domains after the layers.
    """

    seed: int
    numbers: np.ndarray
    domain_cuts: np.ndarray
    niche_cuts: np.ndarray

    def at(self, x_um: np.ndarray, y_um: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """State (`GLASS`, `HOLE`, `NECROTIC`, `LIVE`) and domain index of places.

        Parameters
        ----------
        x_um, y_um
            (n,) float64 places.

        Returns
        -------
        state, domain
            (n,) int8 and (n,) int8.
        """
        x, y = np.asarray(x_um, float), np.asarray(y_um, float)
        return _states(self.seed, self.numbers, self.domain_cuts, self.niche_cuts, x, y)


def tissue_map(parameters: Parameters, seed: int) -> TissueMap:
    """The map of one slide (its own seed)."""
    width = parameters.width_px * parameters.pixel_size_um
    height = parameters.height_px * parameters.pixel_size_um
    fraction = parameters.tissue_fraction
    # A superellipse |x/a|^p + |y/b|^p < 1 covers 4ab Γ(1+1/p)² / Γ(1+2/p); p = 4 leaves rounded corners.
    exponent = 4.0 if fraction < 0.9 else 24.0
    share = math.gamma(1 + 1 / exponent) ** 2 / math.gamma(1 + 2 / exponent)
    stretch = math.sqrt(fraction / share)
    steps = (np.arange(_GRID) + 0.5) / _GRID
    x, y = np.tile(steps * width, _GRID), np.repeat(steps * height, _GRID)

    def cut(stream: int, length: float, quantile: float | np.ndarray) -> np.ndarray:
        return np.quantile(_field(seed, stream, length, x, y), quantile)

    empty = cut(STREAM_EMPTY, EMPTY_UM, parameters.empty_fraction) if parameters.empty_fraction > 0 else -1.0
    necrotic = (
        cut(STREAM_NECROSIS, NECROSIS_UM, parameters.necrotic_fraction) if parameters.necrotic_fraction > 0 else -1
    )
    n_layers = parameters.n_domains - parameters.n_niches
    if parameters.domain_shares is None:
        parts = np.arange(1, n_layers) / n_layers
        niche_shares = np.full(parameters.n_niches, NICHE_SHARE)
    else:
        layers = np.array(parameters.domain_shares[:n_layers], dtype=float)
        parts = np.minimum(np.cumsum(layers)[:-1] / layers.sum(), 1.0)
        niche_shares = np.array(parameters.domain_shares[n_layers:], dtype=float)
    domain_cuts = np.atleast_1d(cut(STREAM_DOMAIN, parameters.domain_um, parts))
    domain_cuts[parts == 0] = -np.inf
    domain_cuts[parts == 1] = np.inf
    niche_cuts = np.array(
        [cut(STREAM_NICHE + k, parameters.niche_um, 1 - share) for k, share in enumerate(niche_shares.tolist())]
    )
    niche_cuts[niche_shares == 0] = np.inf
    numbers = np.array(
        [width, height, width / 2 * stretch, height / 2 * stretch, exponent, float(fraction < 1), empty, necrotic,
         parameters.domain_um, parameters.niche_um]
    )  # fmt: skip
    return TissueMap(seed, numbers.astype(np.float64), domain_cuts.astype(np.float64), niche_cuts.astype(np.float64))


@numba.njit(cache=True, nogil=True)
def _field(seed, stream, length, x, y):
    out = np.empty(len(x))
    for k in range(len(x)):
        out[k] = two_octaves(seed, stream, x[k], y[k], length)
    return out


@numba.njit(cache=True, nogil=True)
def state_at(seed, numbers, domain_cuts, niche_cuts, x, y):
    """State and domain of one place (µm); see `TissueMap`."""
    domain = 0
    if len(domain_cuts) > 0:
        value = two_octaves(seed, STREAM_DOMAIN, x, y, numbers[8])
        while domain < len(domain_cuts) and value >= domain_cuts[domain]:
            domain += 1
    for k in range(len(niche_cuts)):
        if two_octaves(seed, STREAM_NICHE + k, x, y, numbers[9]) >= niche_cuts[k]:
            domain = len(domain_cuts) + 1 + k
    if numbers[5] > 0:
        if numbers[2] <= 0:
            return GLASS, domain
        u = abs(x - numbers[0] / 2) / numbers[2]
        v = abs(y - numbers[1] / 2) / numbers[3]
        ragged = 1.0 + 0.3 * (two_octaves(seed, STREAM_OUTLINE, x, y, 60.0) - 0.5)
        if u ** numbers[4] + v ** numbers[4] > ragged:
            return GLASS, domain
    if two_octaves(seed, STREAM_EMPTY, x, y, EMPTY_UM) < numbers[6]:
        return HOLE, domain
    if two_octaves(seed, STREAM_NECROSIS, x, y, NECROSIS_UM) < numbers[7]:
        return NECROTIC, domain
    return LIVE, domain


@numba.njit(cache=True, nogil=True)
def _states(seed, numbers, domain_cuts, niche_cuts, x, y):
    state = np.empty(len(x), np.int8)
    domain = np.empty(len(x), np.int8)
    for k in range(len(x)):
        state[k], domain[k] = state_at(seed, numbers, domain_cuts, niche_cuts, x[k], y[k])
    return state, domain
