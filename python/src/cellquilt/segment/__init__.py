"""Segmentation: tissue, methods, and the array call for those who only want masks."""

from typing import Any

import numpy as np


def nuclei_labels(image: np.ndarray, diameter: float | None = None, **settings: Any) -> np.ndarray:
    """Segment the nuclei of an image in memory with the shipped model.

    Parameters
    ----------
    image
        (h, w), or (c, h, w) whose first channel is the nuclear stain; any real dtype.
    diameter
        Expected diameter in pixels; default: estimated.
    settings
        ``flow_threshold``, ``cellprob_threshold``, ``threads``, ``batch_size``, ``gpu``, ``model``.

    Returns
    -------
    numpy.ndarray
        (h, w) int32, 0 = background, numbered in raster order of the first pixels.

    Raises
    ------
    CellquiltError
        ``image-shape`` for anything but a plane or channels first, ``engine-missing`` without ``cellquilt[cellpose3]``.
    """
    from cellquilt.segment.arrays import nuclei_labels as run

    return run(image, diameter, **settings)
