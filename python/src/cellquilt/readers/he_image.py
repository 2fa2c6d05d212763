"""An image of the same tissue that was aligned with the slide, such as H&E after the run: a TIFF and a matrix."""

import re
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from cellquilt.core.errors import CellquiltError
from cellquilt.core.log import LOG
from cellquilt.core.transforms import GLOBAL, MICRONS, Affine, length_scale
from cellquilt.readers.base import ImageSource
from cellquilt.readers.tiff import TiffImage

#: Pixels of a microscope are this wide (µm); else the matrix is of another direction or unit.
_USUAL_PX_UM = (0.02, 20.0)
_HINT = "three rows of three numbers, the last 0, 0, 1, from pixels of the image to pixels of the slide's main image"


def read_matrix(path: Path) -> Affine:
    """Read a plane affine map: a text file of three rows of three numbers, between commas, semicolons, tabs or blanks.

    Returns
    -------
    numpy.ndarray
        (3, 3) float64.

    Raises
    ------
    CellquiltError
        ``he-matrix-invalid``.
    """

    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise CellquiltError("he-matrix-invalid", f"{path.name}: cannot be read as text: {error}", _HINT) from None
    rows = [[field for field in re.split(r"[,;\s]+", line) if field] for line in text.splitlines() if line.strip()]
    if [len(row) for row in rows] != [3, 3, 3]:
        found = ", ".join(str(len(row)) for row in rows) or "no"
        raise CellquiltError("he-matrix-invalid", f"{path.name}: has rows of {found} numbers", _HINT)
    return check_matrix(rows, path.name)


def check_matrix(values: ArrayLike, name: str) -> Affine:
    """Numbers as a plane affine map that can be inverted.

    Parameters
    ----------
    values
        (3, 3), the last row 0, 0, 1.
    name
        What to call it in messages.

    Raises
    ------
    CellquiltError
        ``he-matrix-invalid``.
    """

    def invalid(what: str) -> CellquiltError:
        return CellquiltError("he-matrix-invalid", f"{name}: {what}", _HINT)

    try:
        matrix: Affine = np.array(values, dtype=np.float64)
    except (ValueError, TypeError) as error:
        raise invalid(str(error)) from None
    if matrix.shape != (3, 3):
        raise invalid(f"is of shape {matrix.shape}")
    if not np.isfinite(matrix).all():
        raise invalid("has values that are no numbers")
    if not np.allclose(matrix[2], [0, 0, 1], atol=1e-9):
        raise invalid(f"the last row is {matrix[2].tolist()}; only affine maps are known")
    if abs(np.linalg.det(matrix[:2, :2])) < 1e-12:
        raise invalid("the map cannot be inverted")
    return matrix


def open_he_image(
    image: Path,
    matrix: Path | None = None,
    *,
    main_to_um: Affine | None,
    resources: ExitStack,
    name: str | None = None,
    memory_mb: int = 1500,
) -> ImageSource:
    """Open an aligned image: nothing but its metadata is read before windows are asked for.

    Parameters
    ----------
    image
        The TIFF, of one z-plane.
    matrix
        File with the (3, 3) map from its pixels to those of the slide's main image, as Xenium Explorer exports it; to
        µm for slides without a main image. None: the image begins at the slide's origin, and says how large its pixels
        are.
    main_to_um
        (3, 3) map from pixels of the main image to µm; None for slides that have no image.
    resources
        Closes the file.
    name
        What to call it in messages.
    memory_mb
        Memory for decoded parts.

    Returns
    -------
    ImageSource
        Its maps are to ``microns`` and, for slides with a main image, to ``global``, the pixels of that.

    Raises
    ------
    CellquiltError
        ``he-matrix-invalid``, ``he-planes``, ``pixel-size-unknown``, and what `TiffImage` raises.
    """
    opened = resources.enter_context(TiffImage(image, name or image.name, memory_mb=memory_mb))
    channels, n_planes, height, width = opened.shape
    if n_planes > 1:
        raise CellquiltError("he-planes", f"{opened.name} has {n_planes} planes", "write one plane to its own file")
    if matrix is not None:
        to_main = read_matrix(matrix)
        to_um = to_main if main_to_um is None else main_to_um @ to_main
        px_um = length_scale(to_um)
        if not _USUAL_PX_UM[0] <= px_um <= _USUAL_PX_UM[1]:
            unit = "µm" if main_to_um is None else "pixels of the main image"
            raise CellquiltError(
                "he-matrix-invalid", f"{matrix.name}: pixels of {opened.name} would be {px_um:.3g} µm wide",
                f"is it the map from its pixels to {unit}, and not the other way?",
            )  # fmt: skip
    elif opened.pixel_size_um is None:
        raise CellquiltError(
            "pixel-size-unknown", f"{opened.name} does not say how large its pixels are", "give he_matrix"
        )
    else:
        to_um = np.diag([*opened.pixel_size_um, 1.0])
        LOG.info("%s has no matrix: it begins at the slide's origin, pixels are %g × %g µm", opened.name,
                 *opened.pixel_size_um)  # fmt: skip
    transforms = {MICRONS: to_um}
    if main_to_um is not None:
        transforms = {GLOBAL: np.linalg.inv(main_to_um) @ to_um, **transforms}

    def read(channel: int, y0: int, y1: int, x0: int, x1: int) -> np.ndarray:
        return opened.read(channel, 0, y0, y1, x0, x1)

    return ImageSource(
        (channels, height, width), opened.dtype, opened.channel_names, transforms, opened.window_px, read,
        opened.interleaved,
    )  # fmt: skip
