"""The two ends of segmentation: cutting a slide into bundles for a method, and segmenting a bundle."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cellquilt.core.atomic import atomic_path
from cellquilt.core.errors import CellquiltError
from cellquilt.core.log import LOG
from cellquilt.patches.bundle import Bundle, write_bundles
from cellquilt.patches.grid import (
    DEFAULT_OVERLAP_DIAMETERS,
    DEFAULT_WIDTH_PX,
    Grid,
    Patch,
    check_overlap,
    grid_of_windows,
    make_grid,
)
from cellquilt.patches.normalize import estimate_normalization
from cellquilt.segment import engine as engines
from cellquilt.segment.engine import PatchLabels, Plan, Segmenter, length_px, setting

if TYPE_CHECKING:
    from cellquilt.core.images import Image
    from cellquilt.segment.tissue import Tissue

#: Tissue around a chosen window that is segmented with it, in expected diameters: cells on its border are whole.
WINDOW_HALO_DIAMETERS = 1.5


def make_image_patches(
    image: "Image",
    output: Path,
    *,
    method: str,
    settings: Mapping[str, Any] | None = None,
    sample: str = "sample",
    tissue: "Tissue | None" = None,
    windows: Sequence[tuple[int, int, int, int]] | None = None,
) -> tuple[Grid, Plan, list[Path]]:
    """Cut a slide into patch bundles for a segmentation method.

    Parameters
    ----------
    image
        The slide.
    output
        Folder for the bundles.
    method
        Name of the method.
    settings
        Values by the names of the settings table (``patch_*``, ``normalize*``, the method's own, ``seed``).
    sample
        The sample's name.
    tissue
        Its tissue; None takes the whole image.
    windows
        Segment only these (y0, y1, x0, x1), each as a patch with `WINDOW_HALO_DIAMETERS` around it, all in one bundle,
        as the whole slide would be segmented there.

    Returns
    -------
    grid : Grid
        ``grid.polygons()`` are the ``image_patches``.
    plan : Plan
        What the method decided.
    bundles : list of pathlib.Path
        At least one.

    Raises
    ------
    CellquiltError
        ``patch-overlap-small``, ``channel-missing`` and what the method refuses.
    """
    settings = settings or {}
    regions = None if tissue is None else tissue.polygons
    plan = engines.plan(method, image, settings, regions)
    grid = patch_grid(image, plan, settings, regions, windows)
    normalization = estimate_normalization(
        image,
        list(plan.channels),
        mode=setting(settings, "normalize"),
        regions=regions,
        low=setting(settings, "normalize_low"),
        high=setting(settings, "normalize_high"),
        field_um=setting(settings, "normalize_field_um"),
        seed=setting(settings, "seed"),
        joint=plan.joint,
    )
    bundles = write_bundles(
        image,
        grid,
        output,
        sample=sample,
        channels=plan.channels,
        normalization=normalization,
        engine={"method": plan.method, "nuclear": plan.nuclear, **plan.settings},
        lattice=plan.lattice,
        patches_per_task=setting(settings, "patches_per_task") if windows is None else max(len(windows), 1),
    )
    return grid, plan, bundles


def patch_grid(
    image: "Image",
    plan: Plan,
    settings: Mapping[str, Any],
    regions: np.ndarray | None = None,
    windows: Sequence[tuple[int, int, int, int]] | None = None,
) -> Grid:
    """The patches of a slide, by its shape and pixel size and what a method decided; see `make_image_patches`."""
    shape = (int(image.shape[1]), int(image.shape[2]))
    if windows is not None:
        halo = int(np.ceil(WINDOW_HALO_DIAMETERS * plan.diameter_px))
        return grid_of_windows(shape, windows, halo_px=halo, lattice=plan.lattice)
    width = length_px(settings, "patch_width", image.pixel_size_um, default=False)
    overlap = length_px(settings, "patch_overlap", image.pixel_size_um, default=False)
    if overlap is None:
        overlap = DEFAULT_OVERLAP_DIAMETERS * plan.diameter_px
    else:
        check_overlap(overlap, plan.diameter_px, pixel_size_um=image.pixel_size_um)
    return make_grid(
        shape,
        width_px=DEFAULT_WIDTH_PX if width is None else max(round(width), 1),
        overlap_px=int(np.ceil(overlap)),
        lattice=plan.lattice,
        regions=regions,
    )


def segment_bundle(
    bundle_path: Path,
    output: Path,
    *,
    settings: Mapping[str, Any] | None = None,
    weights: Path | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Segment the patches of a bundle.

    Parameters
    ----------
    bundle_path
        The bundle.
    output
        The patch result to write: GeoParquet with a row an object (`patch`, `label`, `cut`, `depth_px`, geometry in
        global pixels), sorted by patch and label; the record is its metadata ``cellquilt``.
    settings
        ``on_patch_error``, ``min_area_um2`` and, for the loaded engine, ``threads``, ``memory_mb`` and the method's
        ``gpu``, ``batch_size`` and path of the model; what the slide decided stands in the bundle.
    weights
        File or folder with the model's weights, where it is an input of the task.
    overwrite
        Replace an existing output.

    Returns
    -------
    dict
        The record.

    Raises
    ------
    CellquiltError
        ``patch-failed`` with the patch's position if a patch fails and ``on_patch_error`` is ``fail``, and what the
        method's `load` refuses.
    """
    from cellquilt.core.record import Record
    from cellquilt.core.shapes import write_geoparquet

    settings = settings or {}
    bundle = Bundle(bundle_path)
    engine = bundle.engine
    method = engine["method"]
    for key in ("threads", "memory_mb", "gpu", "batch_size"):
        value = settings.get(key if key in ("threads", "memory_mb") else f"{method}_{key}")
        if value is not None and key in engine:
            engine[key] = value
    given = weights or settings.get(engines.model_setting(method) or "")
    if given is not None and (weights is not None or Path(given).name == engine.get("model")):
        engine["model"] = str(given)  # the bundle has only its name
    bundle.attributes["engine"] = engine
    record = Record("segment", bundle.sample, {"method": method, **_public(engine)})
    keep_going = setting(settings, "on_patch_error") == "skip"
    least_px = setting(settings, "min_area_um2") / (bundle.pixel_size_um**2)
    patches: list[dict[str, Any]] = []
    parts: list[dict[str, np.ndarray]] = []
    if len(bundle):
        segmenter: Segmenter = engines.load(method, bundle)
        for result in segmenter.segment(bundle):
            patches.append(_entry(result))
            if result.error is not None:
                if not keep_going:
                    raise _patch_failed(result, bundle) from result.error
                LOG.warning("%s", _patch_failed(result, bundle))
                continue
            started = time.perf_counter()
            assert result.labels is not None
            part = patch_objects(result.patch, result.labels, bundle.shape, least_px)
            parts.append(part)
            patches[-1]["n_cells"] = len(part["geometry"])
            patches[-1]["seconds"] = round(result.seconds + time.perf_counter() - started, 3)
        record.facts.update(segmenter.facts)
    columns = _join(parts)
    geometry = columns.pop("geometry")
    record.facts["n_objects"] = len(geometry)
    record.facts["n_failed"] = sum(1 for item in patches if item["error"] is not None)
    document = {**record.finish(), "method": method, "bundle": bundle.attributes["bundle"], "patches": patches}
    with atomic_path(output, overwrite=overwrite) as aside:
        write_geoparquet(aside, geometry, columns, metadata=document)
    return document


def _public(engine: Mapping[str, Any]) -> dict[str, Any]:
    """Settings for the record; of a path only the file's name, results must not name folders of a machine."""
    return {key: Path(value).name if key == "model" else value for key, value in engine.items() if key != "method"}


def _entry(result: PatchLabels) -> dict[str, Any]:
    y0, y1, x0, x1 = result.patch.window
    error = None
    if result.error is not None:
        own = isinstance(result.error, CellquiltError)
        error = result.error.as_dict() if own else {"code": "patch-failed", "message": repr(result.error), "hint": ""}  # type: ignore[attr-defined]
    return {
        "index": result.patch.index,
        "y0": y0,
        "y1": y1,
        "x0": x0,
        "x1": x1,
        "n_cells": 0,
        "seconds": round(result.seconds, 3),
        "error": error,
    }


def _patch_failed(result: PatchLabels, bundle: Bundle) -> CellquiltError:
    y0, y1, x0, x1 = result.patch.window
    cause = result.error.message if isinstance(result.error, CellquiltError) else repr(result.error)
    message = f"sample {bundle.sample}, patch {result.patch.index} (y {y0}-{y1}, x {x0}-{x1}): {cause}"
    if isinstance(result.error, CellquiltError) and result.error.code == "gpu-out-of-memory":
        return CellquiltError("gpu-out-of-memory", message, result.error.hint)  # not the patch's fault
    return CellquiltError("patch-failed", message, "--on_patch_error skip goes on without the patch and says so")


def patch_objects(
    patch: Patch, labels: np.ndarray, shape: tuple[int, int], least_area_px: float = 0.0
) -> dict[str, np.ndarray]:
    """Outlines of a patch's labels.

    Parameters
    ----------
    patch
        The patch.
    labels
        (h, w) int32 of its window.
    shape
        (height, width) of the slide: sides of the window that are not the slide's cut cells.
    least_area_px
        Smaller objects are left out.

    Returns
    -------
    dict
        Columns ``patch`` int32, ``label`` int32, ``cut`` bool (touches an inner side), ``depth_px`` float32 (distance
        of the bounding box to the nearest inner side, inf without one), ``geometry`` (the largest part, holes filled).
    """
    import shapely

    from cellquilt.geometry.polygonize import labels_to_polygons, simple_cells

    y0, y1, x0, x1 = patch.window
    ids, outlines = labels_to_polygons(labels, (x0, y0))
    # Whether a label is cut is asked before small parts are left out: they may hang together beyond the border.
    bounds = shapely.bounds(outlines).reshape(-1, 4)
    top, bottom, left, right = patch.inner_sides(shape)
    far = np.full(len(ids), np.inf)
    distance = np.minimum.reduce(
        [
            bounds[:, 0] - x0 if left else far,
            x1 - bounds[:, 2] if right else far,
            bounds[:, 1] - y0 if top else far,
            y1 - bounds[:, 3] if bottom else far,
        ]
    )
    geometry = np.asarray(simple_cells(outlines), dtype=object)
    keep = shapely.area(geometry) >= max(least_area_px, 1.0) if len(ids) else np.zeros(0, dtype=bool)
    return {
        "patch": np.full(int(keep.sum()), patch.index, dtype=np.int32),
        "label": np.asarray(ids, dtype=np.int32)[keep],
        "cut": (distance <= 0)[keep],
        "depth_px": distance[keep].astype(np.float32),
        "geometry": geometry[keep],
    }


def _join(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    empty: dict[str, np.ndarray] = {
        "patch": np.empty(0, np.int32),
        "label": np.empty(0, np.int32),
        "cut": np.empty(0, bool),
        "depth_px": np.empty(0, np.float32),
        "geometry": np.empty(0, object),
    }
    return {name: np.concatenate([first, *(part[name] for part in parts)]) for name, first in empty.items()}
