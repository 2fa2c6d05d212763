"""Segmentation of SpatialData objects, and of plain arrays."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cellquilt.notebook import add_delta, keyword_settings, prior_store, recall, remember, scratch, store_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from spatialdata import SpatialData

    from cellquilt.core.settings import Settings


def tissue(sdata: "SpatialData", *, mode: str | None = None) -> None:
    """Find the tissue: the shapes element ``region_of_interest``.

    Parameters
    ----------
    sdata
        The slide.
    mode
        ``auto``, ``staining``, ``saturation`` (H&E) or ``none``.
    """
    from cellquilt.segment.stages import find_tissue

    with scratch() as folder:
        settings = recall(sdata, keyword_settings("tissue", {"mode": mode}))
        find_tissue(store_of(sdata), settings=settings, output=folder / "tissue.zarr")
        add_delta(sdata, folder / "tissue.zarr")


def cellpose(
    sdata: "SpatialData",
    channels: "Sequence[str] | None" = None,
    diameter: float | None = None,
    *,
    diameter_um: float | None = None,
    model: str | None = None,
    generation: str | None = None,
    flow_threshold: float | None = None,
    cellprob_threshold: float | None = None,
    gpu: bool | None = None,
    batch_size: int | None = None,
    expand_um: float | None = None,
    on_patch_error: str | None = None,
) -> None:
    """Segment with Cellpose: ``nucleus_boundaries`` (nuclear models), ``cell_boundaries`` and ``cellpose_boundaries``.

    Parameters
    ----------
    sdata
        The slide.
    channels
        One channel, or cytoplasm then nucleus; default: the nuclear stain.
    diameter
        Expected diameter in pixels; `diameter_um` is the same in µm. Default: estimated once.
    model
        The shipped model ``nuclei``, or the path of a model file.
    generation
        Generation of the library, ``3`` (CPnet models) or ``4`` (SAM).
    flow_threshold, cellprob_threshold, gpu, batch_size
        As in Cellpose.
    expand_um
        Growth of nuclei to cells in µm; default: 5 for nuclear models, 0 for others.
    on_patch_error
        ``fail``, or ``skip`` a patch that the engine fails on.
    """
    keywords = {
        "channels": list(channels) if channels is not None else None,
        "diameter": diameter,
        "diameter_um": diameter_um,
        "model": model,
        "generation": generation,
        "flow_threshold": flow_threshold,
        "cellprob_threshold": cellprob_threshold,
        "gpu": gpu,
        "batch_size": batch_size,
        "expand_um": expand_um,
        "on_patch_error": on_patch_error,
    }
    _segment(sdata, "cellpose", keywords)


def stardist(
    sdata: "SpatialData",
    model_type: str | None = None,
    channels: "Sequence[str] | None" = None,
    *,
    local_model: "str | Path | None" = None,
    prob_thresh: float | None = None,
    nms_thresh: float | None = None,
    diameter: float | None = None,
    diameter_um: float | None = None,
    scale: float | None = None,
    gpu: bool | None = None,
    expand_um: float | None = None,
    on_patch_error: str | None = None,
) -> None:
    """Segment with StarDist: ``nucleus_boundaries`` (nuclear models), ``cell_boundaries`` and ``stardist_boundaries``.

    Parameters
    ----------
    sdata
        The slide.
    model_type, local_model
        The shipped model ``nuclei``, the folder of a model, or a name of StarDist's registry such as
        ``2D_versatile_he``, which is fetched where its hub can be reached.
    channels
        As many as the model takes; default: the nuclear stain, or all three colours.
    prob_thresh, nms_thresh
        As in StarDist; default: the model's own.
    diameter
        Expected diameter in pixels; `diameter_um` is the same in µm.
    scale
        Scale of the image that the network sees; default: from the diameters, where the model's is known.
    gpu
        Use a GPU.
    expand_um
        Growth of nuclei to cells in µm; default: 5 for nuclear models, 0 for others.
    on_patch_error
        ``fail``, or ``skip`` a patch that the engine fails on.

    Raises
    ------
    CellquiltError
        ``engine-missing`` without StarDist, ``weights-missing`` and ``weights-unreadable`` for a model that is not
        there or is none, ``stardist-channels`` for another number of channels than the model takes.
    """
    keywords = {
        "model_type": model_type if local_model is None else str(local_model),
        "channels": list(channels) if channels is not None else None,
        "prob_thresh": prob_thresh,
        "nms_thresh": nms_thresh,
        "diameter": diameter,
        "diameter_um": diameter_um,
        "scale": scale,
        "gpu": gpu,
        "expand_um": expand_um,
        "on_patch_error": on_patch_error,
    }
    _segment(sdata, "stardist", keywords)


def generic(
    sdata: "SpatialData",
    function: str,
    channels: "Sequence[str] | None" = None,
    *,
    diameter_um: float | None = None,
    kwargs: dict[str, Any] | None = None,
    expand_um: float | None = None,
    on_patch_error: str | None = None,
) -> None:
    """Segment with any importable function ``(C, Y, X) image -> (Y, X) labels``.

    Parameters
    ----------
    sdata
        The slide.
    function
        ``module:function``.
    channels
        Channels that the function gets; default: the nuclear stain.
    diameter_um
        Expected diameter in µm; sets the halo of the patches.
    kwargs
        Further keyword arguments of the function.
    expand_um
        Growth of nuclei to cells in µm.
    on_patch_error
        ``fail``, or ``skip`` a patch that the function fails on.
    """
    import json

    keywords = {
        "function": function,
        "channels": list(channels) if channels is not None else None,
        "diameter_um": diameter_um,
        "kwargs": json.dumps(kwargs, sort_keys=True) if kwargs is not None else None,
        "expand_um": expand_um,
        "on_patch_error": on_patch_error,
    }
    _segment(sdata, "generic", keywords)


def proseg(
    sdata: "SpatialData",
    prior: str | None = None,
    *,
    prior_shapes_key: str | None = None,
    burnin_samples: int | None = None,
    samples: int | None = None,
    voxel_size_um: float | None = None,
    voxel_layers: int | None = None,
    max_transcripts: int | None = None,
    memory_gb: float | None = None,
    args: str | None = None,
    command_line_suffix: str | None = None,
    executable: str | None = None,
    timeout_min: float | None = None,
    threads: int | None = None,
    on_patch_error: str | None = None,
) -> None:
    """Segment transcripts with Proseg: ``cell_boundaries``, ``proseg_boundaries``, and the cell of every transcript.

    Parameters
    ----------
    sdata
        A slide with transcripts and prior cells or nuclei.
    prior, prior_shapes_key
        Where prior cells are from, as in `make_transcript_patches`; ``auto`` takes nuclei or cells that are there.
    burnin_samples, samples
        Iterations with large, then with small voxels.
    voxel_size_um, voxel_layers
        Width of the small voxels, and how many layers of them there are.
    max_transcripts, memory_gb
        What one run may hold; a slide with more is cut into tiles that overlap.
    args, command_line_suffix
        Further options of proseg as on its command line.
    executable
        The executable; default: ``proseg`` on PATH, in ~/.cargo/bin or in the cache.
    timeout_min
        Stop a run after so many minutes.
    threads
        Threads of a run.
    on_patch_error
        ``fail``, or ``skip`` a tile that proseg fails on.

    Raises
    ------
    CellquiltError
        ``engine-missing`` without proseg, ``proseg-prior-missing`` without prior cells.
    """
    keywords = {
        "prior": prior_shapes_key if prior is None else prior,
        "burnin_samples": burnin_samples,
        "samples": samples,
        "voxel_size_um": voxel_size_um,
        "voxel_layers": voxel_layers,
        "max_transcripts": max_transcripts,
        "memory_gb": memory_gb,
        "args": command_line_suffix if args is None else args,
        "executable": executable,
        "timeout_min": timeout_min,
        "threads": threads,
        "on_patch_error": on_patch_error,
    }
    _segment_transcripts(sdata, "proseg", keywords)


def baysor(
    sdata: "SpatialData",
    prior: str | None = None,
    *,
    prior_shapes_key: str | None = None,
    scale_um: float | None = None,
    min_molecules_per_cell: int | None = None,
    prior_confidence: float | None = None,
    n_clusters: int | None = None,
    iterations: int | None = None,
    force_2d: bool | None = None,
    config: "dict[str, Any] | str | Path | None" = None,
    via: str | None = None,
    executable: str | None = None,
    timeout_min: float | None = None,
    threads: int | None = None,
    on_patch_error: str | None = None,
) -> None:
    """Segment transcripts with Baysor: ``cell_boundaries``, ``baysor_boundaries``, and the cell of every transcript.

    Parameters
    ----------
    sdata
        A slide with transcripts, and prior cells or a scale.
    prior, prior_shapes_key
        Where prior cells are from, as in `make_transcript_patches`; ``auto`` takes nuclei or cells that are there.
    scale_um
        Expected radius of a cell in µm; default: from the prior cells.
    min_molecules_per_cell
        Fewest transcripts of a cell.
    prior_confidence
        From 0 (prior cells are ignored) to 1 (never contradicted).
    n_clusters, iterations, force_2d
        As in Baysor.
    config
        Further settings of Baysor: a dict of sections, or its TOML file; the parameters here win over it.
    via, executable
        ``executable`` (which one), ``julia`` in this process, or ``auto``.
    timeout_min
        Stop the executable on a patch after so many minutes.
    threads
        Threads of Julia.
    on_patch_error
        ``fail``, or ``skip`` a patch that Baysor fails on.

    Raises
    ------
    CellquiltError
        ``engine-missing`` without Baysor, ``baysor-scale-missing`` with neither prior cells nor a scale,
        ``baysor-config`` for settings that it does not know.
    """
    import json

    keywords = {
        "prior": prior_shapes_key if prior is None else prior,
        "scale_um": scale_um,
        "min_molecules_per_cell": min_molecules_per_cell,
        "prior_confidence": prior_confidence,
        "n_clusters": n_clusters,
        "iterations": iterations,
        "force_2d": force_2d,
        "config": json.dumps(config, sort_keys=True) if isinstance(config, dict) else config and str(config),
        "via": via,
        "executable": executable,
        "timeout_min": timeout_min,
        "threads": threads,
        "on_patch_error": on_patch_error,
    }
    _segment_transcripts(sdata, "baysor", keywords)


def vendor(sdata: "SpatialData", *, z: str | None = None) -> None:
    """Take the machine's own cells as ``cell_boundaries``.

    Parameters
    ----------
    sdata
        A slide with ``vendor_cells``.
    z
        Plane whose outlines count, where there are several.
    """
    settings = recall(sdata, keyword_settings("convert", {"z": z, "segmentation": "vendor"}))
    _resolve(sdata, [], settings)


def nuclei_labels(image: "np.ndarray", diameter: float | None = None) -> "np.ndarray":
    """Masks of the nuclei in one image, with the shipped model; for those who only want masks.

    Parameters
    ----------
    image
        (Y, X) array of any real dtype: one nuclear stain.
    diameter
        Expected diameter in pixels; default: estimated from the image.

    Returns
    -------
    numpy.ndarray
        (Y, X) int32 labels, 0 = background.
    """
    from cellquilt.segment import nuclei_labels as implementation

    return implementation(image, diameter)


def cells_by(store: Path, method: str, settings: "Settings", folder: Path) -> Path:
    """Cells of a slide by a method or a chain of two, as the pipeline makes them: by nothing but the machine's output.

    Parameters
    ----------
    store
        The slide; what earlier steps made of it does not count, but for the tissue.
    method
        For example ``vendor`` or ``cellpose+proseg``.
    settings
        Of all steps.
    folder
        For what the steps hand on.

    Returns
    -------
    pathlib.Path
        A store with ``cell_boundaries``.
    """
    from cellquilt.core.settings import Settings
    from cellquilt.core.store import as_converted
    from cellquilt.resolve.stage import resolve_slide

    cells: Path | None = None
    raw = as_converted(store, folder / "raw.zarr")
    for part in method.split("+"):
        own = Settings({**settings.given, "segmentation": part})
        results = [] if part == "vendor" else _patch_results(raw, part, own, folder / part, cells)
        prior, cells = cells, folder / f"{part}.zarr"
        resolve_slide(raw, results, settings=own, prior=prior, output=cells)
    assert cells is not None
    return cells


def _patch_results(
    store: Path, method: str, settings: "Settings", folder: Path, cells: Path | None = None
) -> "list[Path]":
    """Cut a slide into patches (their element is in ``patches.zarr`` of the folder) and segment them."""
    import importlib
    from functools import partial

    from cellquilt.core.log import progress
    from cellquilt.core.settings import TRANSCRIPT_METHODS
    from cellquilt.segment.run import segment_bundle
    from cellquilt.segment.stages import patchify_image, patchify_transcripts

    folder.mkdir(exist_ok=True)
    of_transcripts = method in TRANSCRIPT_METHODS
    patchify = partial(patchify_transcripts, method=method, cells=cells) if of_transcripts else patchify_image
    bundles = patchify(store, settings=settings, bundles=folder / "bundles", output=folder / "patches.zarr")
    suffix = "cells.parquet"
    if of_transcripts:
        segment_bundle, suffix = importlib.import_module(f"cellquilt.segment.{method}").segment_bundle, "result"
    results = []
    for bundle in progress(bundles, method):
        results.append(folder / f"{bundle.stem}.{suffix}")
        segment_bundle(bundle, results[-1], settings=settings)
    return results


def _segment(sdata: "SpatialData", method: str, keywords: dict[str, Any]) -> None:
    settings = recall(sdata, {**keyword_settings(method, keywords), "segmentation": method})
    with scratch() as folder:
        results = _patch_results(store_of(sdata), method, settings, folder)
        add_delta(sdata, folder / "patches.zarr")
        _resolve(sdata, results, settings, also=f"{method}_boundaries")
    remember(sdata, {"segmentation": method})


def _segment_transcripts(sdata: "SpatialData", method: str, keywords: dict[str, Any]) -> None:
    settings = recall(sdata, keyword_settings(method, keywords))
    with scratch() as folder:
        prior = prior_store(sdata, settings["prior"], folder)
        results = _patch_results(store_of(sdata), method, settings, folder, prior)
        add_delta(sdata, folder / "patches.zarr")
        _resolve(sdata, results, settings)
    sdata.shapes[f"{method}_boundaries"] = sdata.shapes["cell_boundaries"]


def _resolve(sdata: "SpatialData", results: "Sequence[Path]", settings: "Settings", also: str = "") -> None:
    from cellquilt.resolve.stage import resolve_slide

    with scratch() as folder:
        resolve_slide(store_of(sdata), results, settings=settings, output=folder / "cells.zarr")
        add_delta(sdata, folder / "cells.zarr")
    if also:
        # The name by which later steps of Sopa's users ask for this method's own outlines.
        own = "nucleus_boundaries" if "nucleus_boundaries" in sdata.shapes else "cell_boundaries"
        sdata.shapes[also] = sdata.shapes[own]
