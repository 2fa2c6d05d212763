"""Bring an image or shapes into the place of others: from landmarks seen in both, or by a matrix that is known."""

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cellquilt.core.errors import CellquiltError, did_you_mean, did_you_mean_file
from cellquilt.core.transforms import MICRONS, Affine, apply, length_scale
from cellquilt.spatial.elements import element_of, maps_of

if TYPE_CHECKING:
    from spatialdata import SpatialData

#: Kind of map → landmarks that it takes. A similarity moves, turns and scales; an affine map shears and mirrors, too.
MODELS = {"similarity": 2, "affine": 3}
#: Landmarks lie on a line if they spread less than this across it, of what they spread along it.
_FLAT = 1e-3
_COLUMNS = ("moving_x", "moving_y", "fixed_x", "fixed_y")


@dataclass(frozen=True)
class Alignment:
    """A map between two elements, and how well it fits.

    Attributes
    ----------
    matrix
        (3, 3) from coordinates of the moving element to those of the fixed one.
    error_um
        (n,) distance of each landmark, once mapped, to where it is in the fixed element; empty without landmarks.
    left_out_um
        (n,) the same with a map made of the other landmarks: how far off places between landmarks are likely to be. NaN
        where too few are left.
    """

    matrix: Affine
    error_um: NDArray[np.float64]
    left_out_um: NDArray[np.float64]

    @property
    def rms_um(self) -> float:
        """Root mean square of the errors; NaN where as many landmarks as the map needs fit in any case."""
        some = np.isfinite(self.left_out_um).any() if self.error_um.size else False
        return float(np.sqrt((self.error_um**2).mean())) if some else float("nan")


def fit_landmarks(moving: ArrayLike, fixed: ArrayLike, model: str = "affine", *, um_per_unit: float = 1.0) -> Alignment:
    """The map by which landmarks fit best (least squares).

    Parameters
    ----------
    moving, fixed
        (n, 2) the same landmarks in two elements, x and y.
    model
        ``similarity`` (two landmarks or more; moves, turns and scales) or ``affine`` (three or more).
    um_per_unit
        Length in µm of a unit of the fixed coordinates, for the errors.

    Raises
    ------
    CellquiltError
        ``alignment-model-unknown``, ``landmarks-invalid``, ``landmarks-too-few``, ``landmarks-collinear``.
    """
    if model not in MODELS:
        raise CellquiltError("alignment-model-unknown", f'unknown map "{model}"', did_you_mean(model, MODELS))
    a, b = _landmarks(moving, "moving"), _landmarks(fixed, "fixed")
    if len(a) != len(b):
        raise CellquiltError(
            "landmarks-invalid", f"{len(a)} moving landmarks and {len(b)} fixed ones", "each is needed in both"
        )
    least = MODELS[model]
    if len(a) < least:
        hint = "set more, or take a similarity" if model == "affine" and len(a) == 2 else "set more"
        raise CellquiltError("landmarks-too-few", f"{len(a)} landmarks; the {model} map takes {least} at least", hint)
    for what, xy in (("moving", a), ("fixed", b)):
        spread = np.linalg.svd(xy - xy.mean(axis=0), compute_uv=False)
        if spread[0] == 0 or (model == "affine" and spread[1] < _FLAT * spread[0]):
            where = "in one place" if spread[0] == 0 else "on a line"
            raise CellquiltError(
                "landmarks-collinear",
                f"the {what} landmarks lie {where}",
                "set them far apart, in corners of the tissue",
            )
    matrix = _fit(a, b, model)
    error = np.linalg.norm(apply(matrix, a) - b, axis=1) * um_per_unit
    left_out = np.full(len(a), np.nan)
    if len(a) > least:
        for k in range(len(a)):
            others = np.arange(len(a)) != k
            flat = np.linalg.svd(a[others] - a[others].mean(axis=0), compute_uv=False)
            if flat[0] > 0 and (model == "similarity" or flat[1] >= _FLAT * flat[0]):
                found = apply(_fit(a[others], b[others], model), a[k : k + 1]) - b[k]
                left_out[k] = np.linalg.norm(found) * um_per_unit
    return Alignment(matrix, error, left_out)


def align(
    sdata: "SpatialData",
    moving: str,
    fixed: str,
    *,
    landmarks: "Path | str | tuple[ArrayLike, ArrayLike] | None" = None,
    matrix: "Path | str | ArrayLike | None" = None,
    model: str = "affine",
) -> Alignment:
    """Give an element its place in all coordinate systems of another, as an H&E beside the stain of nuclei.

    Parameters
    ----------
    sdata
        Object with both; the moving element's transformations are set there, and nothing is written.
    moving, fixed
        Names of images, labels, shapes or points.
    landmarks
        (n, 2) moving and (n, 2) fixed ones, in the elements' own coordinates (of images pixels); or a CSV file of the
        columns ``moving_x``, ``moving_y``, ``fixed_x``, ``fixed_y``.
    matrix
        (3, 3) map from the moving element's own coordinates to those of the fixed one instead, or a text file of it.
    model
        ``affine`` or ``similarity``; for landmarks.

    Raises
    ------
    CellquiltError
        ``element-unknown``, ``alignment-missing``, ``landmarks-unreadable``, ``he-matrix-invalid``, and what
        `fit_landmarks` raises.
    """
    from spatialdata.transformations import Affine as SpatialAffine
    from spatialdata.transformations import set_transformation

    element, place = element_of(sdata, moving), maps_of(sdata, fixed)
    if (landmarks is None) == (matrix is None):
        raise CellquiltError("alignment-missing", "one of landmarks and matrix was expected", "give one of them")
    um = length_scale(place[MICRONS]) if MICRONS in place else 1.0
    if landmarks is not None:
        a, b = read_landmarks(Path(landmarks)) if isinstance(landmarks, str | Path) else landmarks
        found = fit_landmarks(a, b, model, um_per_unit=um)
    else:
        from cellquilt.readers.he_image import check_matrix, read_matrix

        values: Any = matrix
        known = read_matrix(Path(values)) if isinstance(values, str | Path) else check_matrix(values, "matrix")
        found = Alignment(known, np.zeros(0), np.zeros(0))
    transforms = {
        system: SpatialAffine(map_ @ found.matrix, input_axes=("x", "y"), output_axes=("x", "y"))
        for system, map_ in place.items()
    }
    set_transformation(element, transforms, set_all=True)
    return found


def read_landmarks(path: Path) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(n, 2) moving and (n, 2) fixed landmarks from a CSV file with the columns that `align` names.

    Raises
    ------
    CellquiltError
        ``landmarks-unreadable``.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
        absent = [name for name in _COLUMNS if not rows or name not in rows[0]]
        if absent:
            raise ValueError(f"no column {', '.join(absent)}" if rows else "no rows")
        values = np.array([[float(row[name]) for name in _COLUMNS] for row in rows])
    except (OSError, ValueError, TypeError) as error:
        hint = did_you_mean_file(path) or f"a CSV file of the columns {', '.join(_COLUMNS)}"
        raise CellquiltError("landmarks-unreadable", f"{path} holds no landmarks: {error}", hint) from error
    return values[:, :2], values[:, 2:]


def _landmarks(values: ArrayLike, what: str) -> NDArray[np.float64]:
    try:
        xy = np.asarray(values, dtype=np.float64)
    except (ValueError, TypeError):
        xy = np.zeros(0)
    if xy.ndim != 2 or xy.shape[1] != 2 or not np.isfinite(xy).all():
        raise CellquiltError("landmarks-invalid", f"the {what} landmarks are no (n, 2) numbers", "give x and y of each")
    return xy


def _fit(a: NDArray[np.float64], b: NDArray[np.float64], model: str) -> Affine:
    """Least squares about the middle, so that large coordinates cost no precision."""
    middle_a, middle_b = a.mean(axis=0), b.mean(axis=0)
    u, v = a - middle_a, b - middle_b
    if model == "affine":
        linear = np.linalg.lstsq(u, v, rcond=None)[0].T
    else:  # turned and scaled, as one complex number
        p, q = u[:, 0] + 1j * u[:, 1], v[:, 0] + 1j * v[:, 1]
        turn = (np.conj(p) * q).sum() / (np.abs(p) ** 2).sum()
        linear = np.array([[turn.real, -turn.imag], [turn.imag, turn.real]])
    out = np.eye(3)
    out[:2, :2] = linear
    out[:2, 2] = middle_b - linear @ middle_a
    return out
