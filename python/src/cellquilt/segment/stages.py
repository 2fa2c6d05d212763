"""The steps before resolve, as tasks: from store to tissue, from store to bundles, from bundle to patch results."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cellquilt.core.bins import BINS
from cellquilt.core.errors import CellquiltError
from cellquilt.core.log import LOG
from cellquilt.core.record import Record
from cellquilt.core.settings import Settings
from cellquilt.core.shapes import ShapesTable, read_shapes, write_shapes
from cellquilt.core.store import PATCH_RESULTS, Store, add_delta, result_of

if TYPE_CHECKING:
    from cellquilt.patches.transcripts import Cutting
    from cellquilt.segment.tissue import Tissue

TISSUE = "region_of_interest"
PATCHES = "image_patches"
TRANSCRIPT_PATCHES = "transcripts_patches"


def find_tissue(store: Path, *, settings: Settings, output: Path | None = None, overwrite: bool = False) -> Path:
    """Find the tissue of a slide: the shapes element ``region_of_interest``.

    Parameters
    ----------
    store
        The slide.
    settings
        Group ``tissue``.
    output
        Delta store to make; None adds the element to `store`.
    overwrite
        Replace what stands there.

    Returns
    -------
    pathlib.Path
        The store with the result.
    """
    from cellquilt.core.images import open_image
    from cellquilt.segment.tissue import tissue_polygons

    slide = Store(store)
    record = Record("tissue", slide.name, settings.of_stage("tissue"))
    image = open_image(slide.path)
    tissue = tissue_polygons(image, mode=settings["tissue_mode"])
    record.facts.update(tissue.as_dict())
    LOG.info("%s: %d regions of tissue, %.0f µm²", slide.name, len(tissue.polygons), tissue.area_um2)
    ids = np.asarray([f"region-{number}" for number in range(1, len(tissue.polygons) + 1)], dtype=str)
    shapes = ShapesTable(ids, tissue.polygons, {}, image.transforms, tissue.as_dict())
    with result_of(slide, output, overwrite=overwrite) as delta:
        write_shapes(delta.new_element("shapes", TISSUE), shapes)
        delta.add_record(record.finish())
    return output or slide.path


def patchify_image(
    store: Path,
    *,
    settings: Settings,
    tissue: Path | None = None,
    bundles: Path | None = None,
    weights: Path | None = None,
    output: Path | None = None,
    overwrite: bool = False,
) -> list[Path]:
    """Cut a slide into patches: the shapes element ``image_patches``, and the bundles.

    Parameters
    ----------
    store
        The slide.
    settings
        Groups ``patch``, ``segmentation`` and the method's own.
    tissue
        Store with ``region_of_interest``; None takes the slide's own, or the whole image.
    bundles
        Folder for the bundles; None makes none.
    weights
        File of the model, where it was staged under another name than the setting says.
    output
        Delta store to make; None adds the element to `store`.
    overwrite
        Replace what stands there.

    Returns
    -------
    list of pathlib.Path
        The bundles.
    """
    import tempfile

    from cellquilt.core.images import open_image
    from cellquilt.segment.engine import with_model
    from cellquilt.segment.run import make_image_patches

    slide = Store(store)
    if tissue is not None:
        Store(tissue).element("shapes", TISSUE)  # named by the user: not having it is a mistake
    if weights is not None and not weights.exists():
        raise CellquiltError("weights-missing", f"{weights} does not exist", "check --weights")
    record = Record("patchify", slide.name, settings.of_stage("patchify"))
    image = open_image(slide.path)
    values = with_model(settings, settings["segmentation"], weights)
    with tempfile.TemporaryDirectory() as scratch:
        grid, plan, paths = make_image_patches(
            image,
            bundles or Path(scratch) / "bundles",
            method=settings["segmentation"],
            settings=values,
            sample=slide.name,
            tissue=tissue_of(slide if tissue is None else Store(tissue)),
        )
    polygons = grid.polygons()
    record.facts.update(
        {"n_patches": len(polygons), "n_bundles": len(paths), "diameter_px": plan.diameter_px, **plan.facts}
    )
    LOG.info("%s: %d patches in %d bundles", slide.name, len(polygons), len(paths))
    ids = np.asarray([f"patch-{patch.index}" for patch in grid.patches], dtype=str)
    index = np.asarray([patch.index for patch in grid.patches], dtype=np.int32)
    shapes = ShapesTable(ids, polygons, {"patch": index}, image.transforms)
    with result_of(slide, output, overwrite=overwrite) as delta:
        write_shapes(delta.new_element("shapes", PATCHES), shapes)
        delta.add_record(record.finish())
    return paths if bundles is not None else []


def patchify_transcripts(
    store: Path,
    *,
    settings: Settings,
    method: str | None = None,
    cells: Path | None = None,
    bundles: Path | None = None,
    output: Path | None = None,
    overwrite: bool = False,
) -> list[Path]:
    """Cut the transcripts of a slide into patches: the shapes element ``transcripts_patches``, and the bundles.

    Parameters
    ----------
    store
        The slide.
    settings
        Groups ``transcripts``, ``segmentation`` and the method's own.
    method
        One of `TRANSCRIPT_METHODS` that the bundles are for; None makes bundles for any.
    cells
        Store with the shapes of the prior; None takes the slide's own.
    bundles
        Folder for the bundles; None makes none.
    output
        Delta store to make; None adds the element to `store`.
    overwrite
        Replace what stands there.

    Returns
    -------
    list of pathlib.Path
        The bundles.

    Raises
    ------
    CellquiltError
        ``element-missing`` if there are no transcripts, and what the prior, the cutting or the method refuses.
    """
    import importlib
    import tempfile

    import shapely

    from cellquilt.core.images import open_image
    from cellquilt.core.points import points_transforms
    from cellquilt.patches.priors import find_nucleus, find_prior
    from cellquilt.patches.transcripts import MIN_PRIOR_TRANSCRIPTS, POINTS, write_transcript_bundles

    slide = Store(store)
    if not slide.has("points", POINTS) and slide.has("tables", BINS):
        raise CellquiltError(
            "bins-no-transcripts",
            f"{slide.name} has bins and no transcripts, which {method or 'this step'} is to cut into patches",
            "convert it again with visium_hd_transcripts, which writes each count as a transcript in its bin",
        )
    points = slide.element("points", POINTS)
    record = Record("patchify_transcripts", slide.name, settings.of_stage("patchify_transcripts"))
    engine: dict[str, Any] = {"method": None}
    if method:
        engine = importlib.import_module(f"cellquilt.segment.{method}").plan(settings)
    place = {"cells": None if cells is None else Store(cells), "threads": settings["threads"]}
    prior = find_prior(
        slide,
        points,
        name=settings["prior"],
        unassigned=settings["prior_unassigned"],
        memory_mb=settings["memory_mb"],
        **place,
    )
    with tempfile.TemporaryDirectory() as scratch:
        made = write_transcript_bundles(
            points,
            bundles or Path(scratch) / "bundles",
            sample=slide.name,
            engine=engine,
            prior=prior,
            nucleus=find_nucleus(slide, points, prior, **place),
            cutting=_cutting(settings, engine),
            pixel_size_um=open_image(slide.path).pixel_size_um if slide.names("images") else None,
            memory_mb=settings["memory_mb"],
            min_prior_transcripts=engine.get("min_prior_transcripts", MIN_PRIOR_TRANSCRIPTS),
        )
    record.facts.update(made.facts)
    _log_patches(slide.name, made.facts)
    windows = np.array([[patch[side] for side in ("x0", "y0", "x1", "y1")] for patch in made.records]).reshape(-1, 4)
    columns: dict[str, np.ndarray] = {
        "patch": np.array([patch["index"] for patch in made.records], dtype=np.int32),
        "n_transcripts": np.array([patch["n_transcripts"] for patch in made.records], dtype=np.int64),
        "sparse": np.array([patch["sparse"] for patch in made.records], dtype=bool),
    }
    ids = np.asarray([f"patch-{patch['index']}" for patch in made.records], dtype=str)
    boxes = np.asarray(shapely.box(*windows.T), dtype=object)
    with result_of(slide, output, overwrite=overwrite) as delta:
        shapes = ShapesTable(ids, boxes, columns, points_transforms(points))
        write_shapes(delta.new_element("shapes", TRANSCRIPT_PATCHES), shapes)
        delta.add_record(record.finish())
    return made.bundles if bundles is not None else []


def _cutting(settings: Settings, engine: dict[str, Any]) -> "Cutting":
    """How to cut; a method that knows how much it can hold has a limit of its own for a patch."""
    from cellquilt.patches.transcripts import Cutting

    limit = engine.get(f"{engine['method']}_max_transcripts") or Cutting.transcripts_per_patch
    return Cutting(
        min(limit, settings["transcripts_per_patch"] or limit),
        settings["transcripts_patch_width_um"],
        settings["transcripts_patch_overlap_um"],
        settings["min_transcripts_per_patch"],
        settings["transcripts_patches_per_task"],
    )


def _log_patches(sample: str, facts: dict[str, Any]) -> None:
    prior = facts["prior"]
    source = f"{prior['n_cells']} prior cells from {prior['name']}" if prior["n_cells"] else "no prior cells"
    LOG.info(
        "%s: %d of %d transcripts in %d patches, %s",
        sample,
        facts["n_to_segment"],
        facts["n_transcripts"],
        facts["n_patches"],
        source,
    )
    if not facts["n_to_segment"]:
        LOG.warning("%s: there are no transcripts to segment", sample)
    if facts["n_without_coordinates"]:
        LOG.warning("%s: %d transcripts have no coordinates", sample, facts["n_without_coordinates"])
    if facts["n_sparse_patches"]:
        n, held = facts["n_sparse_patches"], facts["n_transcripts_in_sparse_patches"]
        LOG.warning("%s: %d patches of few transcripts, %d in all", sample, n, held)
    if facts["n_full_patches"]:
        n, most = facts["n_full_patches"], facts["largest_patch"]
        LOG.warning(
            "%s: %d patches are too narrow to cut and hold more transcripts than they should, up to %d", sample, n, most
        )
    if prior["n_cells"] and not facts["n_with_prior"]:
        LOG.warning("%s: no transcript lies in a prior cell of %s", sample, prior["name"])
    elif facts["n_prior_with_transcripts"] < prior["n_cells"] / 2:
        LOG.warning(
            "%s: only %d of %d prior cells of %s hold a transcript; are they in the right unit and place?",
            sample, facts["n_prior_with_transcripts"], prior["n_cells"], prior["name"],
        )  # fmt: skip


def tissue_of(store: Store) -> "Tissue | None":
    """The tissue that a store knows, None if it knows none."""
    from cellquilt.segment.tissue import Tissue

    if not store.has("shapes", TISSUE):
        return None
    shapes = read_shapes(store.element("shapes", TISSUE))
    facts = shapes.metadata
    return Tissue(shapes.geometry, facts.get("mode", ""), facts.get("level", 0), facts.get("tissue_area_um2", 0.0))


def segment_source(
    source: Path,
    *,
    method: str,
    settings: Settings,
    weights: Path | None = None,
    output: Path | None = None,
    overwrite: bool = False,
) -> list[Path]:
    """Segment a bundle, or all patches of a store.

    Parameters
    ----------
    source
        A bundle, or a slide's store.
    method
        The method; a bundle must have been cut for it.
    settings
        Groups ``segmentation`` and the method's own.
    weights
        File of the model, where it was staged under another name than the setting says.
    output
        The patch result to write; None keeps a store's results in the store, for ``cellquilt resolve``.
    overwrite
        Replace what stands there.

    Returns
    -------
    list of pathlib.Path
        The patch results.
    """
    from cellquilt.segment.run import segment_bundle

    if _is_bundle(source):
        if output is None:
            raise CellquiltError("usage", "a bundle's result needs a place", "add --output")
        segment_bundle(source, output, settings=settings, weights=weights, overwrite=overwrite)
        return [output]
    settings = Settings({**settings.given, "segmentation": method})
    return _segment_store(
        Store(source),
        method,
        partial(patchify_image, source, settings=settings, weights=weights),
        partial(segment_bundle, settings=settings, weights=weights),
        "cells.parquet",
        overwrite,
    )


def segment_transcripts(
    source: Path, *, method: str, settings: Settings, output: Path | None = None, overwrite: bool = False
) -> list[Path]:
    """Segment a bundle of transcript patches, or all transcripts of a store.

    Parameters
    ----------
    source
        A bundle, or a slide's store.
    method
        One of `TRANSCRIPT_METHODS`.
    settings
        Groups ``segmentation``, the method's own and, for a store, ``transcripts``.
    output
        The result to write; None keeps a store's results in the store, for ``cellquilt resolve``.
    overwrite
        Replace what stands there.

    Returns
    -------
    list of pathlib.Path
        The results; see `segment.molecules`.
    """
    import importlib

    module = importlib.import_module(f"cellquilt.segment.{method}")
    if _is_bundle(source):
        if output is None:
            raise CellquiltError("usage", "a bundle's result needs a place", "add --output")
        module.segment_bundle(source, output, settings=settings, overwrite=overwrite)
        return [output]
    return _segment_store(
        Store(source),
        method,
        partial(patchify_transcripts, source, settings=settings, method=method),
        partial(module.segment_bundle, settings=settings),
        "result",
        overwrite,
    )


def _segment_store(
    slide: Store,
    method: str,
    cut: Callable[..., list[Path]],
    segment: Callable[[Path, Path], Any],
    suffix: str,
    overwrite: bool,
) -> list[Path]:
    """Patchify and segment a whole store in this process; the results stay in its hidden folder."""
    import tempfile

    from cellquilt.core.atomic import atomic_path
    from cellquilt.core.log import progress

    target = slide.path / PATCH_RESULTS / method
    hidden_there = target.parent.exists()
    try:
        with tempfile.TemporaryDirectory() as scratch, atomic_path(target, overwrite=overwrite) as aside:
            patches = Path(scratch) / "patches.zarr"
            bundles = cut(bundles=Path(scratch) / "bundles", output=patches)
            aside.mkdir()
            for bundle in progress(bundles, method):
                segment(bundle, aside / f"{bundle.stem}.{suffix}")
            # Only now: a patch that fails leaves the store as it was.
            add_delta(slide.path, patches, overwrite=True)
    except BaseException:
        if not hidden_there:
            shutil.rmtree(target.parent, ignore_errors=True)
        raise
    return sorted(target.glob(f"*.{suffix}"))


def _is_bundle(source: Path) -> bool:
    from cellquilt.core import zarr_json

    return zarr_json.is_group(source) and "bundle" in zarr_json.read_attributes(source).get("cellquilt", {})
