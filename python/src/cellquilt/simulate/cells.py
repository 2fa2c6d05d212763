"""Cells of a slide: where they sit, how they are shaped, what they are.

Candidates sit on a jittered lattice. Where two are closer than they may press against each other, the one of higher
rank stays: a few synchronous rounds of "keep local winners, drop their neighbours", which is the greedy packing of a
random order, yet decided from a bounded neighbourhood. So a window knows its cells from a margin of fixed width
alone.
"""

import math
from dataclasses import dataclass

import numba
import numpy as np

from cellquilt.simulate.parameters import Parameters
from cellquilt.simulate.randomness import STREAM_CELL, STREAM_PAIR, normal, place_key, start, uniform, unit
from cellquilt.simulate.tissue import HOLE, NECROTIC, TissueMap, state_at

LATTICE_UM = 5.5  # below the smallest usual distance of two cells
MAX_RADIUS_UM = 16.0  # no outline reaches farther from its cell's centre; × size
MAX_DIAMETER_UM = 30.0
MIN_DIAMETER_UM = 4.0
ROUNDS = 3
ANGLES = 64  # points of an outline

# name, diameter and its standard deviation in µm, elongation (length / width), nucleus / cell diameter, frequency
CELL_TYPES: tuple[tuple[str, float, float, float, float, float], ...] = (
    ("hepatocyte", 19.0, 2.8, 1.15, 0.40, 3.0),
    ("cholangiocyte", 12.0, 1.6, 1.25, 0.52, 1.0),
    ("stellate", 11.0, 2.0, 1.70, 0.52, 1.0),
    ("endothelial", 9.5, 1.6, 1.90, 0.55, 1.5),
    ("kupffer", 12.5, 2.0, 1.35, 0.48, 1.0),
    ("t_cell", 8.0, 0.9, 1.08, 0.70, 1.0),
    ("b_cell", 8.5, 0.9, 1.05, 0.70, 1.0),
    ("neutrophil", 8.5, 1.4, 1.15, 0.55, 0.6),
)
TYPE_NAMES = [row[0] for row in CELL_TYPES]
_SHAPES = np.array([row[1:5] for row in CELL_TYPES])

# Types that a domain is rich in; no two domains have the same.
_FAVOURED = ((0, 4), (1, 7), (2, 2), (3, 5), (4, 6), (5, 1), (6, 3), (7, 2))

NO_NUCLEUS, IN_PLANE, OUT_OF_FOCUS = 0, 1, 2


@dataclass(frozen=True)
class Cells:
    """Cells in the order of their sites (row by row), the same in every window.

    Attributes
    ----------
    ids
        (n,) int64 number of the cell on its slide, from 1, with gaps.
    site
        (n, 2) int64 lattice column and row.
    xy
        (n, 2) float64 centre in µm.
    kind, domain, nucleus
        (n,) int8 cell type, domain, and `NO_NUCLEUS`, `IN_PLANE` or `OUT_OF_FOCUS`.
    necrotic
        (n,) bool.
    outline
        (n, ANGLES) float32 radius of the free cell in µm at equal angles.
    nucleus_xy, nucleus_outline
        The same of nuclei.
    brightness, richness
        (n,) float64 factors on the nuclear stain and on the number of transcripts.
    """

    ids: np.ndarray
    site: np.ndarray
    xy: np.ndarray
    kind: np.ndarray
    domain: np.ndarray
    nucleus: np.ndarray
    necrotic: np.ndarray
    outline: np.ndarray
    nucleus_xy: np.ndarray
    nucleus_outline: np.ndarray
    brightness: np.ndarray
    richness: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)


def composition(n_domains: int, contrast: float = 1.0) -> np.ndarray:
    """Share of candidates of every type in every domain: (n_domains, n_types) float64, rows sum to 1.

    Every domain is rich in its own one or two types and poor in the others; types and domains are the same on all
    slides.
    """
    base = np.array([row[5] for row in CELL_TYPES])
    weights = np.tile(base, (n_domains, 1))
    for domain in range(n_domains):
        weights[domain, list(_FAVOURED[domain])] *= 5.0**contrast
    return weights / weights.sum(axis=1, keepdims=True)


def packing(parameters: Parameters) -> float:
    """Least distance of two centres as a share of the sum of their radii."""
    return 0.78 - 0.38 * parameters.overlap


def reach_um(parameters: Parameters) -> float:
    """No cell reaches farther from its centre."""
    return MAX_RADIUS_UM * parameters.size


def cells_in(parameters: Parameters, seed: int, tissue: TissueMap, x0: float, y0: float, x1: float, y1: float) -> Cells:
    """All cells whose centre lies in a window (µm) around or on the canvas.

    Parameters
    ----------
    seed
        Seed of the slide.
    tissue
        The slide's map.
    x0, y0, x1, y1
        Window in µm.
    """
    step = LATTICE_UM * parameters.size
    squeeze = packing(parameters)
    conflict_um = squeeze * MAX_DIAMETER_UM * parameters.size
    margin = conflict_um * (2 * ROUNDS - 1) + 2 * step
    i0, i1 = math.floor((x0 - margin) / step), math.ceil((x1 + margin) / step)
    j0, j1 = math.floor((y0 - margin) / step), math.ceil((y1 + margin) / step)
    cumulative = np.cumsum(composition(parameters.n_domains, parameters.domain_contrast), axis=1)
    candidates, kind, domain, state = _candidates(
        seed,
        i0,
        i1,
        j0,
        j1,
        step,
        parameters.size,
        cumulative,
        _SHAPES,
        tissue.seed,
        tissue.numbers,
        tissue.domain_cuts,
        tissue.niche_cuts,
    )
    kept = _pack(candidates, state, squeeze, math.ceil(conflict_um / step) + 1, ROUNDS)
    kept &= candidates[..., 5] < parameters.density
    neighbour = _nearest(candidates, kept, math.ceil(conflict_um / step) + 1)
    inside = kept & (candidates[..., 0] >= x0) & (candidates[..., 0] < x1)
    inside &= (candidates[..., 1] >= y0) & (candidates[..., 1] < y1)
    rows, columns = np.nonzero(inside)
    picked = candidates[rows, columns]
    site = np.column_stack([columns + i0, rows + j0]).astype(np.int64)
    kinds = kind[rows, columns]
    necrotic = state[rows, columns] == NECROTIC
    outline, nucleus_xy, nucleus_outline, nucleus, brightness, richness = _shape(
        seed, site, picked, kinds, necrotic, _SHAPES, neighbour[rows, columns], parameters.size, parameters.no_nucleus,
        parameters.brightness_spread, parameters.overlap, parameters.pairing,
    )  # fmt: skip
    return Cells(
        _ids(parameters, site), site, picked[:, :2].copy(), kinds, domain[rows, columns], nucleus, necrotic, outline,
        nucleus_xy, nucleus_outline, brightness, richness,
    )  # fmt: skip


def _ids(parameters: Parameters, site: np.ndarray) -> np.ndarray:
    """Number sites row by row over the canvas and the margin from which cells can reach in."""
    step = LATTICE_UM * parameters.size
    pad = math.ceil(reach_um(parameters) / step) + 2
    columns = math.ceil(parameters.width_px * parameters.pixel_size_um / step) + 2 * pad
    return (site[:, 1] + pad) * columns + site[:, 0] + pad + 1


@numba.njit(cache=True, nogil=True)
def _candidates(seed, i0, i1, j0, j1, step, size, cumulative, shapes, map_seed, numbers, domain_cuts, niche_cuts):
    """Candidates of lattice sites, and their kind, domain and state.

    Numbers are (rows, columns, 6): x, y, radius, rank, elongation, thinning number.
    """
    out = np.empty((j1 - j0, i1 - i0, 6))
    kind = np.zeros((j1 - j0, i1 - i0), np.int8)
    domain = np.zeros((j1 - j0, i1 - i0), np.int8)
    state = np.zeros((j1 - j0, i1 - i0), np.int8)
    rng = np.empty(1, np.uint64)
    for j in range(j0, j1):
        for i in range(i0, i1):
            start(rng, place_key(seed, STREAM_CELL, i, j))
            x = (i + 0.5 + 0.9 * (uniform(rng) - 0.5)) * step
            y = (j + 0.5 + 0.9 * (uniform(rng) - 0.5)) * step
            s, d = state_at(map_seed, numbers, domain_cuts, niche_cuts, x, y)
            pick = uniform(rng)
            k = 0
            while k < cumulative.shape[1] - 1 and pick >= cumulative[d, k]:
                k += 1
            diameter = shapes[k, 0] + shapes[k, 1] * normal(rng)
            diameter = min(max(diameter, 4.6), 28.0) * size
            elongation = 1.0 + (shapes[k, 2] - 1.0) * (0.5 + uniform(rng))
            row = out[j - j0, i - i0]
            row[0], row[1], row[2] = x, y, 0.5 * diameter
            # Big cells first, mostly: small ones then fill the gaps between them, as in tissue.
            row[3] = uniform(rng) + 0.035 * diameter / size
            row[4] = elongation
            row[5] = uniform(rng)
            kind[j - j0, i - i0], domain[j - j0, i - i0], state[j - j0, i - i0] = k, d, s
    return out, kind, domain, state


@numba.njit(cache=True, nogil=True)
def _pack(candidates, state, squeeze, reach, rounds):
    """Which candidates stay: (rows, columns) bool. Exact but for (2 rounds - 1) conflict lengths along the border."""
    height, width = state.shape
    status = np.zeros((height, width), np.int8)  # 0 undecided, 1 kept, 2 dropped
    for j in range(height):
        for i in range(width):
            if state[j, i] <= HOLE:
                status[j, i] = 2
    for turn in range(rounds):
        before = status.copy()
        for j in range(height):
            for i in range(width):
                if before[j, i] == 0 and _wins(candidates, before, j, i, squeeze, reach):
                    status[j, i] = 1
        if turn == rounds - 1:
            break
        before = status.copy()
        for j in range(height):
            for i in range(width):
                if before[j, i] == 0 and _beside_kept(candidates, before, j, i, squeeze, reach):
                    status[j, i] = 2
    return status == 1


@numba.njit(cache=True, nogil=True)
def _wins(candidates, status, j, i, squeeze, reach):
    height, width = status.shape
    me = candidates[j, i]
    for jj in range(max(0, j - reach), min(height, j + reach + 1)):
        for ii in range(max(0, i - reach), min(width, i + reach + 1)):
            if status[jj, ii] != 0 or (ii == i and jj == j):
                continue
            other = candidates[jj, ii]
            if other[3] > me[3]:
                distance = squeeze * (me[2] + other[2])
                if (me[0] - other[0]) ** 2 + (me[1] - other[1]) ** 2 < distance * distance:
                    return False
    return True


@numba.njit(cache=True, nogil=True)
def _beside_kept(candidates, status, j, i, squeeze, reach):
    height, width = status.shape
    me = candidates[j, i]
    for jj in range(max(0, j - reach), min(height, j + reach + 1)):
        for ii in range(max(0, i - reach), min(width, i + reach + 1)):
            if status[jj, ii] == 1:
                other = candidates[jj, ii]
                distance = squeeze * (me[2] + other[2])
                if (me[0] - other[0]) ** 2 + (me[1] - other[1]) ** 2 < distance * distance:
                    return True
    return False


@numba.njit(cache=True, nogil=True)
def _nearest(candidates, kept, reach):
    """Nearest other kept candidate of every kept one, at most about `reach` lattice steps away.

    Returns (rows, columns, 6) float64: distance (inf if there is none), direction x and y, its radius, and how many
    lattice columns and rows away it is.
    """
    height, width = kept.shape
    out = np.zeros((height, width, 6))
    for j in range(height):
        for i in range(width):
            if not kept[j, i]:
                continue
            best = np.inf
            bj = bi = -1
            for jj in range(max(0, j - reach), min(height, j + reach + 1)):
                for ii in range(max(0, i - reach), min(width, i + reach + 1)):
                    if kept[jj, ii] and not (ii == i and jj == j):
                        dx = candidates[j, i, 0] - candidates[jj, ii, 0]
                        dy = candidates[j, i, 1] - candidates[jj, ii, 1]
                        if dx * dx + dy * dy < best:
                            best = dx * dx + dy * dy
                            bj, bi = jj, ii
            row = out[j, i]
            row[0] = math.sqrt(best)
            if bj >= 0:
                row[1] = (candidates[bj, bi, 0] - candidates[j, i, 0]) / row[0]
                row[2] = (candidates[bj, bi, 1] - candidates[j, i, 1]) / row[0]
                row[3] = candidates[bj, bi, 2]
                row[4], row[5] = bi - i, bj - j
    return out


@numba.njit(cache=True, nogil=True)
def _outline(out, rng, radius, elongation, angle, wobble, limit):
    """Fill (ANGLES,) radii of an ellipse of the given mean radius with a few waves on it."""
    wide = radius * math.sqrt(elongation)
    narrow = radius / math.sqrt(elongation)
    phases = np.empty(4)
    heights = np.empty(4)
    for k in range(4):
        heights[k] = wobble * normal(rng) / (k + 2.0) * 2.0
        phases[k] = 2.0 * math.pi * uniform(rng)
    for t in range(len(out)):
        theta = 2.0 * math.pi * t / len(out)
        c, s = math.cos(theta - angle), math.sin(theta - angle)
        r = wide * narrow / math.sqrt((narrow * c) ** 2 + (wide * s) ** 2)
        waves = 1.0
        for k in range(4):
            waves += heights[k] * math.cos((k + 2) * theta + phases[k])
        out[t] = min(max(r * max(waves, 0.6), 0.5), limit)


@numba.njit(cache=True, nogil=True)
def _shape(seed, site, picked, kind, necrotic, shapes, neighbour, size, no_nucleus, spread, overlap, pairing):
    n = len(site)
    outline = np.empty((n, ANGLES), np.float32)
    nucleus_outline = np.empty((n, ANGLES), np.float32)
    nucleus_xy = np.empty((n, 2))
    nucleus = np.empty(n, np.int8)
    brightness = np.empty(n)
    richness = np.empty(n)
    rng = np.empty(1, np.uint64)
    for k in range(n):
        start(rng, place_key(seed, STREAM_CELL + 1000, site[k, 0], site[k, 1]))
        radius, elongation = picked[k, 2], picked[k, 4]
        angle = math.pi * uniform(rng)
        _outline(outline[k], rng, radius, elongation, angle, 0.07, MAX_DIAMETER_UM / 2 * size)
        inner = radius * shapes[kind[k], 3] * (1.0 + 0.1 * normal(rng))
        # The nucleus is rounder than its cell and lies along it.
        inner_elongation = 1.0 + 0.6 * (elongation - 1.0) + 0.12 * uniform(rng)
        # It ends at the border to the nearest neighbour, or beyond it with `overlap`.
        distance = neighbour[k, 0]
        border = np.inf
        if distance < np.inf:
            border = max(0.5 * (distance + radius - neighbour[k, 3]), 0.3 * distance) + 0.3 * overlap * distance
        inner = min(max(inner, 1.7 * size), border / math.sqrt(inner_elongation))
        inner = max(inner, 1.4 * size)
        _outline(
            nucleus_outline[k], rng, inner, inner_elongation, angle + 0.2 * normal(rng), 0.03, 0.9 * radius + inner
        )
        shift = 0.15 * max(radius / math.sqrt(elongation) - inner, 0.0)
        nucleus_xy[k, 0] = picked[k, 0] + shift * normal(rng)
        nucleus_xy[k, 1] = picked[k, 1] + shift * normal(rng)
        # Some pairs of neighbours have their nuclei side by side; both cells draw the same number for their pair.
        i, j = int(2 * site[k, 0] + neighbour[k, 4]), int(2 * site[k, 1] + neighbour[k, 5])
        pair = unit(place_key(seed, STREAM_PAIR, i, j))
        if border < np.inf and pair < pairing:
            pull = min(max(border - inner, 0.0), max(0.9 * radius - inner, 0.0))
            nucleus_xy[k, 0] = picked[k, 0] + pull * neighbour[k, 1]
            nucleus_xy[k, 1] = picked[k, 1] + pull * neighbour[k, 2]
        lost = uniform(rng)
        if necrotic[k] or lost < 0.5 * no_nucleus:
            nucleus[k] = NO_NUCLEUS
        elif lost < no_nucleus:
            nucleus[k] = OUT_OF_FOCUS
        else:
            nucleus[k] = IN_PLANE
        brightness[k] = math.exp(spread * normal(rng) - 0.5 * spread * spread)
        richness[k] = math.exp(0.3 * normal(rng) - 0.045) * (0.1 if necrotic[k] else 1.0)
    return outline, nucleus_xy, nucleus_outline, nucleus, brightness, richness
