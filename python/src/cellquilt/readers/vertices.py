"""Outlines from tables with a row a vertex, as machines write them."""

import numpy as np
import shapely
from numpy.typing import NDArray


def polygons_of_vertices(
    key: NDArray[np.int64], xy: NDArray[np.float64]
) -> tuple[NDArray[np.int64] | slice, NDArray[np.int64], NDArray[np.object_]]:
    """The polygon of each run of vertices; runs of one key that lie apart are one, first come first.

    Parameters
    ----------
    key
        (n,) number of the outline that each vertex belongs to.
    xy
        (n, 2) finite coordinates; whether the last vertex repeats the first does not matter.

    Returns
    -------
    order : numpy.ndarray or slice
        Of the rows, that brings equal keys together.
    starts : numpy.ndarray
        (m,) where each outline begins in that order.
    geometry : numpy.ndarray
        (m,) polygons; None where there are fewer than three corners.
    """
    order, starts = runs(key)
    xy = xy[order]
    counts = np.diff(np.append(starts, len(xy)))
    closed = (xy[starts] == xy[starts + counts - 1]).all(axis=1)
    corners = counts - closed >= 3
    ring = np.repeat(np.cumsum(corners) - 1, counts)
    used = np.repeat(corners, counts)
    geometry = np.full(len(starts), None, dtype=object)
    geometry[corners] = shapely.polygons(shapely.linearrings(xy[used], indices=ring[used]))
    return order, starts, geometry


def runs(key: NDArray[np.int64]) -> tuple[NDArray[np.int64] | slice, NDArray[np.int64]]:
    """The order of rows that brings equal keys together, first come first, and where each key begins in it."""
    starts = np.flatnonzero(np.diff(key, prepend=key[:1] - 1))
    _, first, inverse = np.unique(key[starts], return_index=True, return_inverse=True)
    if len(first) == len(starts):
        return slice(None), starts  # together already, as machines write them
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    number = np.repeat(rank[inverse], np.diff(np.append(starts, len(key))))
    order = np.argsort(number, kind="stable")
    return order, np.flatnonzero(np.diff(number[order], prepend=-1))
