"""Plane affine maps between pixels and microns, and their SpatialData (NGFF) spelling.

Every map is a 3 × 3 float64 matrix acting on column vectors (x, y, 1). Pixel (i, j) covers [i, i + 1) × [j, j + 1).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cellquilt.core import zarr_json
from cellquilt.core.errors import CellquiltError

Affine = np.ndarray  # shape (3, 3), float64

GLOBAL = "global"  # pixels of the main image
MICRONS = "microns"


def identity() -> Affine:
    """The map that changes nothing."""
    return np.eye(3)


def scale(factor: float) -> Affine:
    """Multiply x and y by one factor."""
    return np.diag([factor, factor, 1.0])


def translation(x: float, y: float) -> Affine:
    """Add (x, y)."""
    matrix = np.eye(3)
    matrix[:2, 2] = x, y
    return matrix


def apply(matrix: Affine, xy: np.ndarray) -> np.ndarray:
    """Map points.

    Parameters
    ----------
    matrix
        (3, 3) affine map.
    xy
        (n, 2) float coordinates.

    Returns
    -------
    numpy.ndarray
        (n, 2) float64.
    """
    x, y = np.asarray(xy, dtype=np.float64).T
    out = np.empty((len(x), 2))
    for row, column in zip(matrix[:2], out.T, strict=True):  # no matrix product: its threads cost more than it does
        np.multiply(x, row[0], out=column)
        column += row[1] * y
        column += row[2]
    return out


def length_scale(matrix: Affine) -> float:
    """By how much the map stretches lengths: the square root of its determinant's size."""
    return float(np.sqrt(abs(np.linalg.det(matrix[:2, :2]))))


def round_length(most: float) -> float:
    """The largest of 1, 2, 5, 10, … (and their tenths) that is at most `most`, for scale bars."""
    magnitude = 10.0 ** np.floor(np.log10(max(most, 1e-6)))
    return float(max(step * magnitude for step in (1, 2, 5) if step * magnitude <= max(most, 1e-6) * (1 + 1e-9)))


def _axes(names: Sequence[str]) -> list[dict[str, str]]:
    return [
        {"name": name, "type": "channel"} if name == "c" else {"name": name, "type": "space", "unit": "unit"}
        for name in names
    ]


def to_ngff(transforms: Mapping[str, Affine], axes: Sequence[str]) -> list[dict[str, Any]]:
    """Spell maps as SpatialData writes them in an element's metadata.

    Parameters
    ----------
    transforms
        Target coordinate system → (3, 3) map from the element's own x, y.
    axes
        The element's axes in storage order, for example ``("c", "y", "x")`` or ``("x", "y", "z")``.
    """
    return [_one_ngff(name, matrix, axes) for name, matrix in transforms.items()]


def _one_ngff(name: str, matrix: Affine, axes: Sequence[str]) -> dict[str, Any]:
    ends = {
        "input": {"name": "".join(axes), "axes": _axes(axes)},
        "output": {"name": name, "axes": _axes(axes)},
    }
    if np.array_equal(matrix, np.eye(3)):
        return {"type": "identity", **ends}
    full = np.eye(len(axes) + 1)
    position = {"x": axes.index("x"), "y": axes.index("y")}
    for row, out_axis in enumerate("xy"):
        for column, in_axis in enumerate("xy"):
            full[position[out_axis], position[in_axis]] = matrix[row, column]
        full[position[out_axis], -1] = matrix[row, 2]
    return {"type": "affine", "affine": full[:-1].tolist(), **ends}


def from_ngff(entries: Sequence[Mapping[str, Any]]) -> dict[str, Affine]:
    """Read the maps of an element's metadata back; identity, scale, translation, affine and their sequences."""
    return {entry["output"]["name"]: _matrix(entry) for entry in entries}


def _matrix(entry: Mapping[str, Any]) -> Affine:
    axes = [axis["name"] for axis in entry["input"]["axes"]]
    x, y = axes.index("x"), axes.index("y")
    matrix = np.eye(3)
    match entry["type"]:
        case "identity":
            pass
        case "scale":
            matrix[0, 0], matrix[1, 1] = entry["scale"][x], entry["scale"][y]
        case "translation":
            matrix[0, 2], matrix[1, 2] = entry["translation"][x], entry["translation"][y]
        case "affine":
            full = np.asarray(entry["affine"], dtype=np.float64)
            outputs = [axis["name"] for axis in entry["output"]["axes"]]  # spatialdata's may be in another order
            for row, axis in enumerate("xy"):
                matrix[row] = full[outputs.index(axis)][[x, y, -1]]
        case "sequence":
            for step in entry["transformations"]:
                matrix = _matrix(step) @ matrix
        case unknown:
            raise ValueError(f"transformation of type {unknown!r} is not supported")
    return matrix


def element_transforms(element: Path) -> dict[str, Affine]:
    """The maps of a shapes or points element on disk.

    Raises
    ------
    CellquiltError
        ``element-unreadable`` if its metadata is damaged.
    """
    try:
        return from_ngff(zarr_json.read_attributes(element)["coordinateTransformations"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CellquiltError(
            "element-unreadable", f"{element} has no readable zarr.json: {error!r}", "make the store anew"
        ) from error
