"""The tasks of a run, as `subworkflows/` starts them, and how much each gets; from what the slides hold."""

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from cellquilt.core.regions import read_features
from cellquilt.core.settings import TABLES, TRANSCRIPT_METHODS, Settings, methods_of
from cellquilt.core.sheet import Row
from cellquilt.costs.contents import Contents

#: Expected diameter (µm) where a method measures it on the slide.
_DIAMETER_UM = 8.5
#: Bytes of a cell in a patch's result, of image and of transcript methods, and of one of its latents.
_RESULT_BYTES, _MOLECULE_BYTES, _LATENT_BYTES = 140, 1500, 20
#: Channels from which on an image alone is enough for domains.
_MARKERS = 10
#: Share of a bundle's transcripts that lie in its halo, too.
_HALO_SHARE = 1.1
#: Processes that use all of several CPUs, as their label says.
_CPUS = {"SEGMENT_BAYSOR": 2, "SEGMENT_PROSEG": 2}


@dataclass(frozen=True)
class Task:
    """Tasks of one process that are alike.

    Attributes
    ----------
    process
        Its name.
    sizes
        What each gets, see `core.sizes`.
    count
        How many there are.
    cpus
        Of each.
    gpu
        Whether it runs on one.
    memory_setting_mb
        The setting ``memory_mb``.
    """

    process: str
    sizes: Mapping[str, int] = field(default_factory=dict)
    count: int = 1
    cpus: int = 1
    gpu: bool = False
    memory_setting_mb: int = 1500


@dataclass(frozen=True)
class Bundles:
    """What is cut out of a slide for one method, in bytes on disk, and the tasks that get it."""

    tasks: tuple[Task, ...]
    pixels: int = 0
    transcripts: int = 0


def tasks_of_sample(row: Row, settings: Settings, found: Contents) -> list[Task]:
    """The tasks of one sample; what the whole cohort has in common is in `tasks_of_cohort`.

    Parameters
    ----------
    row
        The sample.
    settings
        Its values in force.
    found
        What it holds.
    """
    return [*_tasks(row, settings, found)]


def _tasks(row: Row, settings: Settings, found: Contents) -> Iterator[Task]:
    if row.technology in TABLES:
        yield _task(settings, "DOMAINS_PREPARE", found.input or {})
        yield _task(settings, "DOMAINS_EMBED", {"cells": found.cells})
        yield _task(settings, "DOMAINS_ANNOTATE", {**(found.input or {}), "cells": found.cells})
        return
    methods = methods_of(settings)
    images = list(dict.fromkeys(image for image in map(image_of, methods) if image))
    yield _task(settings, "CONVERT", found.input or {})
    if settings["preview"]:
        yield _task(settings, "TISSUE", found.raw)
        yield _task(settings, "PREVIEW", found.raw)
        return
    if [image for image in images if image != "vendor"]:
        yield _task(settings, "TISSUE", found.raw)
    for image in images:
        if image != "vendor":
            yield _task(settings, "PATCHIFY", found.raw)
            yield from image_bundles(settings, found, image).tasks
        yield _task(
            settings, "RESOLVE", _plus(found.raw, bytes=0 if image == "vendor" else _RESULT_BYTES * found.cells)
        )
    for method in methods:
        if molecules_of(method):
            prior = _plus(found.raw, cells=2 * found.cells if image_of(method) else 0)
            yield _task(settings, "PATCHIFY_TRANSCRIPTS", prior)
            yield from transcript_bundles(settings, found, molecules_of(method)).tasks
            yield _task(settings, "RESOLVE_TRANSCRIPTS", _plus(prior, bytes=_MOLECULE_BYTES * found.cells))
        yield _task(settings, "AGGREGATE", _plus(found.raw, cells=2 * cells_of(method, found)))
    cells = cells_of(methods[0], found)
    parts = _plus(found.raw, transcripts=found.transcripts, cells=(2 + len(methods)) * cells)
    store = _plus(found.raw, cells=(2 + 2 * len(methods) - 1) * cells)
    if row.regions is not None:
        n_regions = len(read_features(row.regions))
        yield _task(settings, "SPLIT", parts)
        yield Task("ASSEMBLE", {name: count // n_regions for name, count in parts.items()}, n_regions)
        yield Task("REPORT", {name: count // n_regions for name, count in store.items()}, n_regions)
    of_cells = {"transcripts": found.transcripts, "cells": cells}
    if settings["cluster"]:
        yield _task(settings, "CLUSTER", of_cells)
    if settings["annotate_markers"] or settings["annotate_reference"]:
        yield _task(settings, "ANNOTATE", of_cells)
    yield _task(settings, "ASSEMBLE", parts)
    if len(methods) > 1:
        yield _task(settings, "COMPARE", store)
    yield _task(settings, "REPORT", store)
    if settings["export"]:
        yield _task(settings, "EXPORT", store)
    if settings["explorer"]:
        yield _task(settings, "EXPLORER", store)
    if settings["stats"]:
        yield _task(settings, "STATS", {"cells": cells})
    if settings["domains"] != "none":
        yield _task(settings, "DOMAINS_PREPARE", of_cells)
        if has_domains(found):
            yield _task(settings, "DOMAINS_EMBED", {"cells": cells})


def tasks_of_cohort(settings: Settings, cells: int, n_slides: int) -> list[Task]:
    """The tasks that all samples have in common.

    Parameters
    ----------
    settings
        Values of the run.
    cells
        Cells of all samples.
    n_slides
        How many there are.
    """
    if settings["preview"]:
        return []
    tasks = [_task(settings, "SAMPLES", {})]
    if settings["stats"] and n_slides:
        tasks.append(_task(settings, "STATS_COHORT", {}))
    if settings["domains"] != "none" and n_slides:
        if settings["domains"] != "zeroshot":
            train = _task(settings, "DOMAINS_TRAIN", {"cells": cells})
            tasks.append(_on_gpu(train) if settings["domains_recipe"] == "published" else train)
        tasks.append(_task(settings, "DOMAINS_ASSIGN", {"bytes": _LATENT_BYTES * cells}))
        tasks.append(_task(settings, "DOMAINS_REPORT", {"cells": 4 * cells}))
    return tasks


def has_domains(found: Contents) -> bool:
    """Whether there is enough measured in a slide's cells to find domains from."""
    return bool(found.transcripts) or not found.pixels or len(found.channels) >= _MARKERS


def cells_of(method: str, found: Contents) -> int:
    """Cells to expect of a method."""
    return found.vendor_cells if method == "vendor" and found.vendor_cells else found.cells


def image_bundles(settings: Settings, found: Contents, method: str) -> Bundles:
    """The bundles of a method for the image: all of the slide is taken to be tissue."""
    from cellquilt.segment.run import patch_grid

    module = importlib.import_module(f"cellquilt.segment.{method}")
    known: dict[str, Any] = dict(settings.given)
    if method != "generic" and not known.get(f"{method}_diameter_um") and not known.get(f"{method}_diameter_px"):
        known[f"{method}_diameter_um"] = _DIAMETER_UM
    values = Settings(known)
    plan = module.plan(found, values)
    patches = patch_grid(found, plan, values).patches  # type: ignore[arg-type]
    sizes = [len(plan.channels) * (y1 - y0) * (x1 - x0) for y0, y1, x0, x1 in (patch.context for patch in patches)]
    count = max(1, -(-len(sizes) // settings["patches_per_task"]))
    each = {"pixels": sum(sizes) // count, "patch_pixels": max(sizes, default=0)}
    generation = "4" if method == "cellpose" and settings["cellpose_generation"] == "4" else ""
    task = _task(settings, f"SEGMENT_{method.upper()}{generation}", each, count)
    if method in ("cellpose", "stardist") and settings[f"{method}_gpu"]:
        task = _on_gpu(task)
    return Bundles((task,), pixels=sum(sizes))


def transcript_bundles(settings: Settings, found: Contents, method: str) -> Bundles:
    """The bundles of a method for the transcripts, about: how many there are depends on where the transcripts lie."""
    engine = importlib.import_module(f"cellquilt.segment.{method}").plan(settings)
    limit = engine.get(f"{method}_max_transcripts") or 1_000_000
    limit = min(limit, settings["transcripts_per_patch"] or limit)
    patches = -(-found.transcripts // max(limit, 1)) if found.transcripts > limit else 1
    width = settings["transcripts_patch_width_um"]
    if width is not None:
        patches = 1 if width <= 0 else _patches_of_width(found, float(width))
    held = round(found.transcripts * (_HALO_SHARE if patches > 1 else 1))
    count = max(1, -(-patches // settings["transcripts_patches_per_task"]))
    each = {"transcripts": held // count, "patch_transcripts": held // patches}
    task = Task(
        f"SEGMENT_{method.upper()}", each, count, _CPUS[f"SEGMENT_{method.upper()}"], False, settings["memory_mb"]
    )
    return Bundles((task,), transcripts=held)


def _patches_of_width(found: Contents, width_um: float) -> int:
    _, height, length = found.shape
    pixel = found.pixel_size_um or 1.0
    across, along = (max(1, -(-side * pixel // width_um)) for side in (height, length))
    return int(across * along)


def _task(settings: Settings, process: str, sizes: Mapping[str, int], count: int = 1) -> Task:
    return Task(process, sizes, count, memory_setting_mb=settings["memory_mb"])


def _on_gpu(task: Task) -> Task:
    return Task(task.process, task.sizes, task.count, 2, True, task.memory_setting_mb)


def _plus(sizes: Mapping[str, int], **more: int) -> dict[str, int]:
    return {name: sizes.get(name, 0) + more.get(name, 0) for name in (*sizes, *(set(more) - set(sizes)))}


def molecules_of(method: str) -> str:
    return next((part for part in method.split("+") if part in TRANSCRIPT_METHODS), "")


def image_of(method: str) -> str:
    return next((part for part in method.split("+") if part not in TRANSCRIPT_METHODS), "")
