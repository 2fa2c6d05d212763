"""Labels: SpatialData label elements of one plane, written whole and read in windows."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellquilt.core import zarr_json
from cellquilt.core.errors import CellquiltError
from cellquilt.core.transforms import Affine, from_ngff, to_ngff

AXES = ("y", "x")
_CHUNK_PX = 2048


def write_labels(element: Path, labels: NDArray[np.integer], transforms: Mapping[str, Affine]) -> None:
    """Write a labels element.

    Parameters
    ----------
    element
        Folder to make, for example ``store/labels/bins_grid``.
    labels
        (h, w) integers, 0 is background.
    transforms
        Coordinate system → (3, 3) map from pixels; pixel (i, j) covers [i, i + 1) × [j, j + 1).

    Notes
    -----
    One level only: labels cannot be averaged.
    """
    import zarr

    multiscale = {
        "name": element.name,
        "axes": [{"name": axis, "type": "space"} for axis in AXES],
        "datasets": [
            {
                "path": "s0",
                "coordinateTransformations": [
                    {"type": "scale", "scale": [1.0, 1.0]},
                    {"type": "translation", "translation": [0.0, 0.0]},
                ],
            }
        ],
        "coordinateTransformations": to_ngff(transforms, AXES),
    }
    attributes = {
        "ome": {
            "version": "0.5-dev-spatialdata",
            "multiscales": [multiscale],
            "image-label": {"version": "0.5"},
        },
        "spatialdata_attrs": {"version": "0.3"},
    }
    zarr_json.write_group(element, attributes)
    array = zarr.create_array(
        store=str(element / "s0"),
        shape=labels.shape,
        dtype=labels.dtype,
        chunks=tuple(min(_CHUNK_PX, size) for size in labels.shape),
        dimension_names=AXES,
    )
    array[:] = labels


class Labels:
    """A labels element on disk.

    Parameters
    ----------
    element
        Its folder.

    Attributes
    ----------
    shape
        (height, width).
    transforms
        Coordinate system → (3, 3) map from pixels.

    Raises
    ------
    CellquiltError
        ``labels-unreadable``.
    """

    def __init__(self, element: Path) -> None:
        import zarr

        self.element = element
        try:
            multiscale = zarr_json.read_attributes(element)["ome"]["multiscales"][0]
            self._array: Any = zarr.open_array(element / multiscale["datasets"][0]["path"], mode="r")
            self.transforms = from_ngff(multiscale["coordinateTransformations"])
            height, width = self._array.shape
        except (OSError, KeyError, IndexError, TypeError, ValueError) as error:
            raise CellquiltError(
                "labels-unreadable", f"{element} is not a plane label image: {error}", "make the store anew"
            ) from error
        self.shape = (int(height), int(width))

    def read(self, y0: int, y1: int, x0: int, x1: int) -> NDArray[np.integer]:
        """(y1 - y0, x1 - x0) labels of a window."""
        return np.asarray(self._array[y0:y1, x0:x1])

    def read_all(self) -> NDArray[np.integer]:
        """(h, w) labels."""
        return self.read(0, self.shape[0], 0, self.shape[1])
