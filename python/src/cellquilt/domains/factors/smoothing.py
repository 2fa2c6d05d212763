"""Means over neighbours, and means that stop where the tissue changes."""

from typing import Any

import numba
import numpy as np
from numpy.typing import NDArray

from cellquilt.geometry.neighbours import SpatialGraph


def neighbour_mean(graph: SpatialGraph, x: NDArray[np.float32]) -> NDArray[np.float32]:
    """(n, size) mean of each cell and its neighbours."""
    kernel: Any = _weighted
    return kernel(graph.indptr, graph.indices, x, x, np.float32(0.0))  # type: ignore[no-any-return]


def place_mean(graph: SpatialGraph, x: NDArray[np.float32]) -> NDArray[np.float32]:
    """(n, size) mean over the cells within two edges, the nearer ones counting more."""
    return neighbour_mean(graph, neighbour_mean(graph, x))


def within_borders(graph: SpatialGraph, x: NDArray[np.float32], sharpness: float, steps: int) -> NDArray[np.float32]:
    """(n, size) means over neighbours, again and again, in which those count that are alike.

    A neighbour at the distance d in the space of `x` counts ``exp(-sharpness d²)``, the cell itself 1 (a bilateral
    filter, Tomasi and Manduchi 1998, on a graph).
    """
    kernel: Any = _weighted
    for _ in range(steps):
        x = kernel(graph.indptr, graph.indices, x, x, np.float32(sharpness))
    return x


def squared_steps(graph: SpatialGraph, x: NDArray[np.float32]) -> NDArray[np.float32]:
    """(n_edges,) squared distance of each cell to each of its neighbours in the space of `x`."""
    kernel: Any = _squares
    return kernel(graph.indptr, graph.indices, x)  # type: ignore[no-any-return]


@numba.njit(cache=True, nogil=True, parallel=True)
def _weighted(indptr, indices, alike, x, sharpness):
    n, size = x.shape
    out = np.empty_like(x)
    for i in numba.prange(n):
        total = np.float32(1.0)
        for c in range(size):
            out[i, c] = x[i, c]
        for e in range(indptr[i], indptr[i + 1]):
            j = indices[e]
            far = np.float32(0.0)
            for c in range(alike.shape[1]):
                step = alike[i, c] - alike[j, c]
                far += step * step
            weight = np.exp(-sharpness * far)
            total += weight
            for c in range(size):
                out[i, c] += weight * x[j, c]
        for c in range(size):
            out[i, c] /= total
    return out


@numba.njit(cache=True, nogil=True, parallel=True)
def _squares(indptr, indices, x):
    out = np.empty(indices.size, dtype=np.float32)
    for i in numba.prange(indptr.size - 1):
        for e in range(indptr[i], indptr[i + 1]):
            far = np.float32(0.0)
            for c in range(x.shape[1]):
                step = x[i, c] - x[indices[e], c]
                far += step * step
            out[e] = far
    return out
