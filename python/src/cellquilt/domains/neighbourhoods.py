"""Neighbourhoods of cells in the graph: cells within some hops, cells at a number of hops, and batches of them.

A neighbourhood of cell i is all cells within `hops` edges of it, i included, with all edges between them. A batch is
the neighbourhoods of some cells, one after the other, as one graph of separate parts: what the encoder takes.
"""

from dataclasses import dataclass

import numba
import numpy as np
from numpy.typing import NDArray

from cellquilt.geometry.neighbours import SpatialGraph
from cellquilt.geometry.polygons import offsets_of


@dataclass(frozen=True)
class Hops:
    """For every cell a set of other cells, as rows of a sparse matrix.

    Attributes
    ----------
    indptr
        (n + 1,) int64.
    indices
        (n_entries,) int32, ascending in each row.
    """

    indptr: NDArray[np.int64]
    indices: NDArray[np.int32]


@dataclass(frozen=True)
class Batch:
    """Neighbourhoods as one graph of separate parts.

    Attributes
    ----------
    ptr
        (n_parts + 1,) int64: part p has the nodes ``ptr[p]:ptr[p + 1]``.
    cells
        (n_nodes,) int64 the cell that each node is.
    indptr, indices
        (n_nodes + 1,) int64 and (n_edges,) int64: the nodes that each node gets messages from, itself not among them.
    distance_um
        (n_edges,) float32.
    """

    ptr: NDArray[np.int64]
    cells: NDArray[np.int64]
    indptr: NDArray[np.int64]
    indices: NDArray[np.int64]
    distance_um: NDArray[np.float32]


def within(graph: SpatialGraph, hops: int) -> Hops:
    """Cells within so many edges of each cell, itself included (for 1 hop or more)."""
    return Hops(*_reached(graph.indptr, graph.indices, hops, True))


def at(graph: SpatialGraph, hops: int) -> Hops:
    """Cells at exactly so many edges from each cell."""
    return Hops(*_reached(graph.indptr, graph.indices, hops, False))


def make_batch(graph: SpatialGraph, near: Hops, cells: NDArray[np.integer]) -> Batch:
    """The neighbourhoods of some cells.

    Parameters
    ----------
    graph
        The slide's graph.
    near
        What `within` gives.
    cells
        (n_parts,) whose neighbourhoods; in any order, also several times.
    """
    cells = np.asarray(cells, dtype=np.int64)
    ptr = offsets_of(near.indptr[cells + 1] - near.indptr[cells])
    members, indptr, indices, distance = _parts(
        graph.indptr, graph.indices, graph.distance_um, near.indptr, near.indices, cells, ptr
    )
    return Batch(ptr, members, indptr, indices, distance)


@numba.njit(cache=True, nogil=True)
def _reached(indptr, indices, hops, all_nearer):
    n = indptr.size - 1
    level = np.full(n, -1, dtype=np.int64)  # the last cell that reached this one
    offsets = np.zeros(n + 1, dtype=np.int64)
    out = np.empty(max(16 * n, 16), dtype=np.int32)
    queue = np.empty(n, dtype=np.int32)
    size = 0
    for i in range(n):
        queue[0] = i
        level[i] = i
        start, end = 0, 1
        for _ in range(hops):
            new = end
            for k in range(start, end):
                c = queue[k]
                for e in range(indptr[c], indptr[c + 1]):
                    j = indices[e]
                    if level[j] != i:
                        level[j] = i
                        queue[new] = j
                        new += 1
            start, end = end, new
        first = 0 if all_nearer else start
        number = end - first
        if size + number > out.size:
            larger = np.empty(max(2 * out.size, size + number), dtype=np.int32)
            larger[:size] = out[:size]
            out = larger
        out[size : size + number] = np.sort(queue[first:end])
        size += number
        offsets[i + 1] = size
    return offsets, out[:size].copy()


@numba.njit(cache=True, nogil=True)
def _parts(indptr, indices, distance, near_indptr, near_indices, cells, ptr):
    n_nodes = ptr[-1]
    members = np.empty(n_nodes, dtype=np.int64)
    out_indptr = np.zeros(n_nodes + 1, dtype=np.int64)
    n = 0
    for p in range(cells.size):
        for k in range(near_indptr[cells[p]], near_indptr[cells[p] + 1]):
            members[n] = near_indices[k]
            n += 1
    most = 0
    for k in range(n_nodes):
        most += indptr[members[k] + 1] - indptr[members[k]]
    out_indices = np.empty(most, dtype=np.int64)
    out_distance = np.empty(most, dtype=np.float32)
    n_edges = 0
    for p in range(cells.size):
        a, b = ptr[p], ptr[p + 1]
        for v in range(a, b):
            # Both lists ascend: one walk along them finds the neighbours that are in the part.
            k = a
            for e in range(indptr[members[v]], indptr[members[v] + 1]):
                j = indices[e]
                while k < b and members[k] < j:
                    k += 1
                if k < b and members[k] == j:
                    out_indices[n_edges] = k
                    out_distance[n_edges] = distance[e]
                    n_edges += 1
            out_indptr[v + 1] = n_edges
    return members, out_indptr, out_indices[:n_edges].copy(), out_distance[:n_edges].copy()
