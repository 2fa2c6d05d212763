"""Transcripts of cells and of the ambient, place by place."""

import functools
import math
from dataclasses import dataclass

import numba
import numpy as np

from cellquilt.simulate.cells import LATTICE_UM, Cells
from cellquilt.simulate.expression import Expression
from cellquilt.simulate.parameters import Parameters
from cellquilt.simulate.randomness import (
    STREAM_AMBIENT,
    STREAM_FOV,
    STREAM_TRANSCRIPTS,
    normal,
    place_key,
    poisson,
    start,
    uniform,
    unit,
)
from cellquilt.simulate.tissue import HOLE, TissueMap

ORIGINS = ("cell", "diffused", "ambient")


@dataclass(frozen=True)
class Transcripts:
    """Transcripts and their truth, one row each.

    Attributes
    ----------
    xy
        (n, 2) float64 µm.
    plane
        (n,) int8 z-plane.
    gene
        (n,) int32 index into the panel.
    cell
        (n,) int64 number of the cell it came from; 0 for the ambient.
    in_nucleus
        (n,) bool: it lies in a true nucleus of the plane.
    origin
        (n,) int8 index into `ORIGINS`.
    """

    xy: np.ndarray
    plane: np.ndarray
    gene: np.ndarray
    cell: np.ndarray
    in_nucleus: np.ndarray
    origin: np.ndarray

    def __len__(self) -> int:
        return len(self.gene)


def pixels_of(labels: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels of every label, label by label in raster order.

    Returns
    -------
    start : numpy.ndarray
        (n + 2,) int64; label k has pixels ``start[k]`` to ``start[k + 1]``.
    pixels : numpy.ndarray
        (m,) int64 flat indices.
    """
    return _pixels_of(labels.ravel(), n)


@numba.njit(cache=True, nogil=True)
def _pixels_of(flat, n):
    starts = np.zeros(n + 2, np.int64)
    for k in range(len(flat)):
        if flat[k] > 0:
            starts[flat[k] + 1] += 1
    for k in range(n + 1):
        starts[k + 1] += starts[k]
    out = np.empty(starts[n + 1], np.int64)
    at = starts.copy()
    for k in range(len(flat)):
        if flat[k] > 0:
            out[at[flat[k]]] = k
            at[flat[k]] += 1
    return starts, out


def transcripts_of(
    parameters: Parameters,
    seed: int,
    cells: Cells,
    owned: np.ndarray,
    nuclei: np.ndarray,
    cell_labels: np.ndarray,
    origin: tuple[int, int],
    expression: Expression,
    rate_um2: float,
    enrichment: float,
    z_profile: np.ndarray,
    control_rate: float,
) -> Transcripts:
    """Transcripts that come from the cells of a window, wherever they end up on the canvas.

    Parameters
    ----------
    owned
        (m,) int64 indices of the cells whose transcripts are wanted.
    cell_labels, nuclei
        (h, w) int32 masks with 1 + index; the owned cells lie whole in them.
    origin
        (y0, x0) of the masks in pixels.
    rate_um2
        Transcripts of all genes per µm² of cytoplasm at relative rate 1.
    enrichment
        Density in nuclei over that in cytoplasm.
    z_profile
        (n_planes,) float64 shares.
    control_rate
        Share of controls.
    """
    totals = expression.rates.sum(axis=2)
    cumulative = np.cumsum(expression.rates, axis=2) / np.maximum(totals, 1e-300)[..., None]
    nucleus_start, nucleus_pixels = pixels_of(nuclei, len(cells))
    cell_start, cell_pixels = pixels_of(cell_labels, len(cells))
    pixel = parameters.pixel_size_um
    mean_cytoplasm = np.empty(len(owned))
    mean_nucleus = np.empty(len(owned))
    area = np.diff(cell_start)[owned + 1] * pixel**2
    nucleus_area = np.diff(nucleus_start)[owned + 1] * pixel**2
    factor = rate_um2 * cells.richness[owned] * totals[cells.domain[owned], cells.kind[owned]]
    factor = factor * parameters.density_factor * (1.0 - parameters.ambient)
    mean_cytoplasm[:] = factor * (area - nucleus_area)
    mean_nucleus[:] = factor * nucleus_area * enrichment
    x, y, plane, gene, cell, left = _sample_cells(
        seed, owned, cells.site, cells.kind, cells.domain, mean_cytoplasm, mean_nucleus, nucleus_start, nucleus_pixels,
        cell_start, cell_pixels, nuclei.ravel(), nuclei.shape[1], origin[0], origin[1], pixel, cumulative,
        expression.n_controls, control_rate, np.cumsum(z_profile), parameters.diffusion, parameters.diffusion_um,
    )  # fmt: skip
    return _finish(parameters, seed, x, y, plane, gene, cells.ids[cell], left.astype(np.int8), nuclei, origin)


def ambient_of(
    parameters: Parameters,
    seed: int,
    tissue: TissueMap,
    window: tuple[int, int, int, int],
    nuclei: np.ndarray,
    origin: tuple[int, int],
    expression: Expression,
    density_um2: float,
    z_profile: np.ndarray,
    control_rate: float,
) -> Transcripts:
    """Ambient transcripts of the lattice squares whose corner lies in a window (y0, y1, x0, x1 in pixels)."""
    pixel = parameters.pixel_size_um
    step = LATTICE_UM
    y0, y1, x0, x1 = (value * pixel for value in window)
    rows = np.arange(int(np.floor(y0 / step)), int(np.ceil(y1 / step)) + 1)
    columns = np.arange(int(np.floor(x0 / step)), int(np.ceil(x1 / step)) + 1)
    # The first square of the canvas begins at its corner or before; it belongs to the window that holds the corner.
    rows = rows[(rows * step >= y0) & (rows * step < y1)]
    columns = columns[(columns * step >= x0) & (columns * step < x1)]
    i, j = (grid.ravel().astype(np.int64) for grid in np.meshgrid(columns, rows))
    state, _ = tissue.at((i + 0.5) * step, (j + 0.5) * step)
    mean = expression.ambient.sum() * density_um2 * parameters.ambient * parameters.density_factor * step**2
    means = np.where(state == 0, 0.1, np.where(state == HOLE, 0.5, 1.0)) * mean
    cumulative = np.cumsum(expression.ambient) / max(float(expression.ambient.sum()), 1e-300)
    x, y, plane, gene = _sample_ambient(
        seed, i, j, means, step, cumulative, expression.n_controls, control_rate, np.cumsum(z_profile)
    )
    none = np.zeros(len(x), np.int64)
    return _finish(parameters, seed, x, y, plane, gene, none, np.full(len(x), 2, np.int8), nuclei, origin)


def _finish(parameters, seed, x, y, plane, gene, cell, left, nuclei, origin) -> Transcripts:  # type: ignore[no-untyped-def]
    """Round to nanometres, drop what left the canvas or fell into a lost field of view, look up nuclei."""
    pixel = parameters.pixel_size_um
    x, y = np.round(x, 3), np.round(y, 3)
    keep = (x >= 0) & (y >= 0) & (x < parameters.width_px * pixel) & (y < parameters.height_px * pixel)
    if parameters.fov_dropout > 0:
        keep &= ~lost_fields(parameters, seed, x, y)
    x, y = x[keep], y[keep]
    column = np.clip(np.floor(x / pixel).astype(np.int64) - origin[1], 0, nuclei.shape[1] - 1)
    row = np.clip(np.floor(y / pixel).astype(np.int64) - origin[0], 0, nuclei.shape[0] - 1)
    return Transcripts(
        np.column_stack([x, y]), plane[keep], gene[keep], cell[keep], nuclei[row, column] > 0, left[keep]
    )


def lost_fields(parameters: Parameters, seed: int, x_um: np.ndarray, y_um: np.ndarray) -> np.ndarray:
    """Whether places lie in a field of view that was lost: (n,) bool."""
    return _lost(seed, parameters.fov_um, lost_below(parameters, seed), x_um, y_um)


@functools.lru_cache(maxsize=64)
def lost_below(parameters: Parameters, seed: int) -> float:
    """Fields whose number (`field_number`) lies below this were lost: as many as the share asked for, rounded.

    A chance for every field by itself would now and then lose a small slide altogether.
    """
    width = math.ceil(parameters.width_px * parameters.pixel_size_um / parameters.fov_um)
    height = math.ceil(parameters.height_px * parameters.pixel_size_um / parameters.fov_um)
    n_lost = round(parameters.fov_dropout * width * height)
    return float(np.sort(np.append(_field_numbers(seed, width, height), 2.0))[n_lost]) if n_lost else 0.0


@numba.njit(cache=True, nogil=True)
def _field_numbers(seed, width, height):
    out = np.empty(width * height)
    for j in range(height):
        for i in range(width):
            out[j * width + i] = field_number(seed, i, j)
    return out


@numba.njit(cache=True, nogil=True)
def _lost(seed, fov_um, below, x, y):
    out = np.empty(len(x), np.bool_)
    for k in range(len(x)):
        out[k] = field_number(seed, int(np.floor(x[k] / fov_um)), int(np.floor(y[k] / fov_um))) < below
    return out


@numba.njit(cache=True, nogil=True)
def field_number(seed, i, j):
    """Number in [0, 1) of the field of view in column i and row j; the lowest are lost."""
    return unit(place_key(seed, STREAM_FOV + 1000, i, j))


@numba.njit(cache=True, nogil=True)
def _draw(rng, cumulative):
    """Index drawn from a cumulative distribution."""
    value = uniform(rng)
    low, high = 0, len(cumulative) - 1
    while low < high:
        middle = (low + high) // 2
        if value < cumulative[middle]:
            high = middle
        else:
            low = middle + 1
    return low


@numba.njit(cache=True, nogil=True)
def _sample_cells(
    seed, owned, site, kind, domain, mean_cytoplasm, mean_nucleus, nucleus_start, nucleus_pixels, cell_start,
    cell_pixels, nuclei, width, y0, x0, pixel, cumulative, n_controls, control_rate, z_cumulative, diffusion,
    diffusion_um,
):  # fmt: skip
    rng = np.empty(1, np.uint64)
    total = 0
    for m in range(len(owned)):
        start(rng, place_key(seed, STREAM_TRANSCRIPTS, site[owned[m], 0], site[owned[m], 1]))
        total += poisson(rng, mean_nucleus[m]) + poisson(rng, mean_cytoplasm[m])
    x = np.empty(total)
    y = np.empty(total)
    plane = np.empty(total, np.int8)
    gene = np.empty(total, np.int32)
    cell = np.empty(total, np.int64)
    left = np.zeros(total, np.bool_)
    n_genes = cumulative.shape[2]
    at = 0
    for m in range(len(owned)):
        k = owned[m]
        start(rng, place_key(seed, STREAM_TRANSCRIPTS, site[k, 0], site[k, 1]))
        n_nucleus = poisson(rng, mean_nucleus[m])
        n_all = n_nucleus + poisson(rng, mean_cytoplasm[m])
        first, last = cell_start[k + 1], cell_start[k + 2]
        for t in range(n_all):
            if t < n_nucleus:
                low, high = nucleus_start[k + 1], nucleus_start[k + 2]
                place = nucleus_pixels[low + int(uniform(rng) * (high - low))]
            else:
                place = cell_pixels[first + int(uniform(rng) * (last - first))]
                while nuclei[place] != 0:
                    place = cell_pixels[first + int(uniform(rng) * (last - first))]
            px = (place % width + x0 + uniform(rng)) * pixel
            py = (place // width + y0 + uniform(rng)) * pixel
            if uniform(rng) < diffusion:
                px += diffusion_um * normal(rng)
                py += diffusion_um * normal(rng)
                left[at] = True
            x[at], y[at] = px, py
            plane[at] = _draw(rng, z_cumulative)
            if uniform(rng) < control_rate:
                gene[at] = n_genes + int(uniform(rng) * n_controls)
            else:
                gene[at] = _draw(rng, cumulative[domain[k], kind[k]])
            cell[at] = k
            at += 1
    return x, y, plane, gene, cell, left


@numba.njit(cache=True, nogil=True)
def _sample_ambient(seed, i, j, means, step, cumulative, n_controls, control_rate, z_cumulative):
    rng = np.empty(1, np.uint64)
    total = 0
    for m in range(len(i)):
        start(rng, place_key(seed, STREAM_AMBIENT, i[m], j[m]))
        total += poisson(rng, means[m])
    x = np.empty(total)
    y = np.empty(total)
    plane = np.empty(total, np.int8)
    gene = np.empty(total, np.int32)
    at = 0
    for m in range(len(i)):
        start(rng, place_key(seed, STREAM_AMBIENT, i[m], j[m]))
        for _ in range(poisson(rng, means[m])):
            x[at] = (i[m] + uniform(rng)) * step
            y[at] = (j[m] + uniform(rng)) * step
            plane[at] = _draw(rng, z_cumulative)
            if uniform(rng) < control_rate:
                gene[at] = len(cumulative) + int(uniform(rng) * n_controls)
            else:
                gene[at] = _draw(rng, cumulative)
            at += 1
    return x, y, plane, gene
