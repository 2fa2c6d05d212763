"""The resolve step: from the patches' results, or the machine's own cells, to nuclei and cells with ids."""

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray

from cellquilt.core.errors import CellquiltError
from cellquilt.core.log import LOG
from cellquilt.core.record import Record
from cellquilt.core.settings import TRANSCRIPT_METHODS, Settings
from cellquilt.core.shapes import GeoParquetFile, ShapesTable, mapped, read_shapes, write_outlines, write_shapes
from cellquilt.core.store import PATCH_RESULTS, Store, result_of
from cellquilt.core.transforms import Affine, length_scale
from cellquilt.geometry.outlines import rings_of
from cellquilt.geometry.packed import PackedPolygons
from cellquilt.geometry.polygons import Rings
from cellquilt.resolve.choose import Windows, raster_order, resolve_cells
from cellquilt.resolve.nuclei import expand_nuclei

#: What the log says besides the number of cells, where it is not zero.
_COUNTS = {
    "n_merged": "merged from cut copies",
    "n_cut": "cut in every copy",
    "n_fragments": "fragments at patch borders dropped",
    "n_vanished": "left without area",
    "n_contested": "transcripts claimed by several cells",
    "n_not_segmented": "transcripts in no patch that was segmented",
}
#: What nuclei grow by where the user says nothing.
DEFAULT_GROWTH_UM = 5.0


def resolve_slide(
    raw: Path,
    patch_results: Sequence[Path] = (),
    *,
    settings: Settings,
    method: str | None = None,
    prior: Path | None = None,
    output: Path | None = None,
    overwrite: bool = False,
) -> Path:
    """Make `nucleus_boundaries` and `cell_boundaries` of a slide.

    Cells of a transcript-based method have the cell of every transcript with them; see `resolve.transcripts`. Where
    they started from cells with a nucleus they have that nucleus, and the cells that they started from are kept under
    the name of their own method, for example as `cellpose_boundaries`.

    Parameters
    ----------
    raw
        The slide's store: its image gives pixel size and extent, its `vendor_cells`, or else the user's `prior_cells`,
        the cells of method ``vendor``.
    patch_results
        GeoParquet files of the patches' cells, in any order; of a transcript-based method, its tasks' folders.
    settings
        Group ``resolve`` and the method.
    method
        The method whose results are taken from the store; default: that of the settings.
    prior
        Store with the cells that a transcript-based method started from; default: the slide's own.
    output
        Delta store to make; None adds the elements to `raw`.
    overwrite
        Replace what stands there.

    Returns
    -------
    pathlib.Path
        The store with the result.

    Raises
    ------
    CellquiltError
        ``no-patch-results``, ``vendor-cells-missing``, or what the store says.
    """
    store = Store(raw)
    method = method or settings["segmentation"]
    stage = "resolve_transcripts" if method in TRANSCRIPT_METHODS else "resolve"
    record = Record("resolve", store.name, settings.of_stage(stage))
    results = list(patch_results)
    if not results and method != "vendor":
        results = _results_in(store, method)
    if results and all(path.is_dir() for path in results):
        return _resolve_transcripts(
            store, Store(raw if prior is None else prior), results, settings, record, output, overwrite
        )
    if method == "vendor":
        found = _vendor_cells(store, settings)
        facts: dict[str, Any] = {"method": "vendor", "n_cut": 0, "conflict_rate": 0.0, "patches": []}
    else:
        found, facts = _from_patches(store, results, settings)
    order, ids = _numbers(store.name, found.outlines["cell_boundaries"])
    _tell(store.name, record, facts, len(ids))

    with result_of(store, output, overwrite=overwrite) as delta:
        for name, outlines in sorted(found.outlines.items()):
            there = np.ones(len(order), dtype=bool)
            if not isinstance(outlines, PackedPolygons):
                there = ~shapely.is_missing(outlines[order])
            columns = {name: values[order[there]] for name, values in found.columns.items()}
            write_outlines(
                delta.new_element("shapes", name), outlines.take(order[there]), ids[there], columns, found.transforms
            )
        delta.add_record(record.finish())
    return output or store.path


@dataclass(frozen=True)
class _Found:
    """Cells before they are numbered.

    Attributes
    ----------
    outlines
        Name of the element → (n,) outlines; None for cells without a nucleus.
    columns
        Column name → (n,) array, for every element.
    transforms
        Coordinate system → (3, 3) map from the outlines' coordinates.
    """

    outlines: dict[str, NDArray[np.object_] | PackedPolygons]
    columns: dict[str, np.ndarray]
    transforms: dict[str, Affine]


def _tell(sample: str, record: Record, facts: dict[str, Any], n_cells: int) -> None:
    record.facts.update(facts, n_cells=n_cells)
    counts = "".join(f", {facts[key]} {what}" for key, what in _COUNTS.items() if facts.get(key))
    LOG.info("%s: %d cells%s", sample, n_cells, counts)


def _resolve_transcripts(
    store: Store,
    prior: Store,
    results: Sequence[Path],
    settings: Settings,
    record: Record,
    output: Path | None,
    overwrite: bool,
) -> Path:
    from cellquilt.resolve.transcripts import resolve_molecules

    frame = _image_frame(store)[0] if store.names("images") else None
    with tempfile.TemporaryDirectory() as scratch:
        found = resolve_molecules(store, results, frame, settings, Path(scratch))
        ids = _ids(store.name, len(found.geometry))
        others = _of_prior(prior, found.facts["tasks"], ids, found.columns["prior_cell"])
        _tell(store.name, record, found.facts, len(ids))
        with result_of(store, output, overwrite=overwrite) as delta:
            element = delta.new_element("shapes", "cell_boundaries")
            write_outlines(element, found.geometry, ids, found.columns, found.transforms)
            for name, table in sorted(others.items()):
                write_shapes(delta.new_element("shapes", name), table)
            found.put_beside(element)
            if prior.path != store.path:  # how the cells came about that these started from
                for earlier in prior.records:
                    delta.add_record(earlier)
            delta.add_record(record.finish())
    return output or store.path


def _of_prior(
    prior: Store, tasks: Sequence[dict[str, Any]], ids: np.ndarray, prior_cell: NDArray[np.integer]
) -> dict[str, ShapesTable]:
    """The cells that a method started from, under their method's name, and the nuclei of those that became cells."""
    said = [task.get("facts", {}).get("prior", {}) for task in tasks]
    element = str(said[0].get("name")) if said and said[0].get("from") == "shapes" else ""
    if element not in ("cell_boundaries", "nucleus_boundaries") or not prior.has("shapes", element):
        return {}
    made_by = [record["facts"].get("method") for record in prior.records if record["stage"] == "resolve"]
    kept = {}
    if made_by and made_by[-1] and prior.has("shapes", "cell_boundaries"):
        kept = {f"{made_by[-1]}_boundaries": read_shapes(prior.element("shapes", "cell_boundaries"))}
    if not prior.has("shapes", "nucleus_boundaries"):
        return kept
    nuclei = read_shapes(prior.element("shapes", "nucleus_boundaries"))
    started_from = read_shapes(prior.element("shapes", element)).ids
    # Of several cells that started from one (a copy a patch that all were kept), the first has the nucleus.
    numbers, rows = np.unique(prior_cell, return_index=True)
    rows = np.sort(rows[numbers > 0])
    wanted = started_from[prior_cell[rows] - 1]
    _, at, of_wanted = np.intersect1d(nuclei.ids, wanted, return_indices=True)
    order = np.argsort(of_wanted)
    own = nuclei.take(at[order])
    own.ids = ids[rows[of_wanted[order]]]
    return {**kept, "nucleus_boundaries": own}


def _image_frame(store: Store) -> tuple[dict[str, Affine], tuple[int, int]]:
    from cellquilt.core.images import open_image

    image = open_image(store.path)
    return image.transforms, (image.shape[1], image.shape[2])


def _results_in(store: Store, method: str) -> list[Path]:
    kind = "*.result" if method in TRANSCRIPT_METHODS else "*.parquet"
    files = sorted((store.path / PATCH_RESULTS / method).glob(kind))
    if not files:
        raise CellquiltError(
            "no-patch-results",
            f"{store.path} holds no results of {method}",
            f"run `cellquilt segment {method} {store.path}` first",
        )
    return files


def _from_patches(store: Store, files: Sequence[Path], settings: Settings) -> tuple[_Found, dict[str, Any]]:
    geometry, columns, patches, tasks = _read_results(files)
    transforms, (height, width) = _image_frame(store)
    resolution = resolve_cells(
        geometry,
        columns["patch"],
        columns["cut"],
        columns["depth_px"],
        threshold=settings["resolve_threshold"],
        rule=settings["resolve_rule"],
        windows=Windows.of(patches, (height, width)),
    )
    expand_um, nuclear = growth_um(tasks[0] if tasks else {}, settings)
    outlines: dict[str, NDArray[np.object_] | PackedPolygons] = {"cell_boundaries": resolution.geometry}
    if nuclear:
        reach_px = expand_um / length_scale(transforms["microns"])
        outlines["nucleus_boundaries"] = resolution.geometry
        outlines["cell_boundaries"] = expand_nuclei(resolution.geometry, reach_px, bounds=(height, width))
    kept = {"patch": columns["patch"][resolution.source], "merged": resolution.merged, "cut": resolution.cut}
    facts = {
        "method": settings["segmentation"],
        "expand_um": expand_um,
        "n_segmented": len(geometry),
        **resolution.facts(),
        "patches": patches,
        "tasks": tasks,
    }
    return _Found(outlines, kept, transforms), facts


def growth_um(task: dict[str, Any], settings: Settings) -> tuple[float, bool]:
    """How far objects grow to cells (µm), and whether they are nuclei.

    Parameters
    ----------
    task
        Record of a segmentation task; its parameter ``nuclear`` says what the method finds.
    settings
        ``expand_um``, where the user says it.
    """
    nuclear = bool(task.get("parameters", {}).get("nuclear", True))
    if settings["expand_um"] is not None:
        return settings["expand_um"], nuclear
    return (DEFAULT_GROWTH_UM if nuclear else 0.0), nuclear


def _read_results(
    files: Sequence[Path],
) -> tuple[PackedPolygons, dict[str, np.ndarray], list[dict[str, Any]], list[dict[str, Any]]]:
    """Cells of all patches in the order of (patch, label), the patches' records and the tasks' records."""
    columns: dict[str, list[np.ndarray]] = {"patch": [], "label": [], "cut": [], "depth_px": []}
    patches: list[dict[str, Any]] = []
    tasks: list[dict[str, Any]] = []

    def parts() -> Iterator[Rings]:
        for path in files:
            file = GeoParquetFile(path)
            missing = [name for name in columns if name not in file.schema.names]
            if missing:
                raise CellquiltError("patch-result-invalid", f"{path} lacks the columns {', '.join(missing)}")
            for batch in file.batches():
                for name, values in columns.items():
                    values.append(batch.column(name).to_numpy(zero_copy_only=False))
                yield rings_of(file, batch.column(file.geometry))
            patches.extend(file.metadata.get("patches", []))
            tasks.append({key: value for key, value in file.metadata.items() if key != "patches"})

    geometry = PackedPolygons.of(parts())
    stacked = {name: np.concatenate(values) if values else np.zeros(0) for name, values in columns.items()}
    order = np.lexsort((stacked["label"], stacked["patch"]))
    patches.sort(key=lambda patch: patch["index"])
    tasks.sort(key=lambda task: json.dumps(task, sort_keys=True))
    return geometry.take(order), {name: values[order] for name, values in stacked.items()}, patches, tasks


def _vendor_cells(store: Store, settings: Settings) -> _Found:
    """The machine's cells, or those that the user brought, in pixels of the main image; nuclei where it has them."""
    name = next((name for name in ("vendor_cells", "prior_cells") if store.has("shapes", name)), None)
    if name is None:
        raise CellquiltError(
            "vendor-cells-missing",
            f"{store.name}: the machine's output holds no cells",
            "choose another --segmentation, such as cellpose, or give prior_cells",
        )
    table = read_shapes(store.element("shapes", name))
    if "z_plane" in table.columns:
        table = table.take(table.columns["z_plane"] == _plane(table.columns["z_plane"], store.chosen_z(settings)))
    to_global = table.transforms["global"]
    try:
        transforms, _ = _image_frame(store)
    except CellquiltError:
        transforms = {"global": np.eye(3), "microns": table.transforms["microns"] @ np.linalg.inv(to_global)}
    outlines: dict[str, NDArray[np.object_] | PackedPolygons] = {"cell_boundaries": mapped(table.geometry, to_global)}
    if name == "vendor_cells" and store.has("shapes", "vendor_nuclei"):
        nuclei = read_shapes(store.element("shapes", "vendor_nuclei"))
        outlines["nucleus_boundaries"] = _nuclei_of(table, nuclei, mapped(nuclei.geometry, nuclei.transforms["global"]))
    return _Found(outlines, {"vendor_id": table.ids}, transforms)


def _nuclei_of(cells: ShapesTable, nuclei: ShapesTable, outlines: NDArray[np.object_]) -> NDArray[np.object_]:
    """(n_cells,) the nucleus of each cell, None where it has none; several are one outline of several parts."""
    found = np.full(len(cells), None, dtype=object)
    names = np.asarray(cells.columns.get("entity_id", cells.ids)).astype(str)
    of = np.asarray(nuclei.columns.get("entity_id", nuclei.ids)).astype(str)
    by_name = np.argsort(names, kind="stable")
    place = np.minimum(np.searchsorted(names[by_name], of), max(len(names) - 1, 0))
    known = names[by_name][place] == of if len(names) else np.zeros(len(of), dtype=bool)
    cell, outlines = by_name[place[known]], outlines[known]
    first = np.unique(cell, return_index=True)[1]
    found[cell[first]] = outlines[first]
    further = np.setdiff1d(np.arange(len(cell)), first)
    if further.size:
        several = np.unique(cell[further])
        parts = np.flatnonzero(np.isin(cell, several))
        parts = parts[np.argsort(cell[parts], kind="stable")]
        polygons, owner = shapely.get_parts(outlines[parts], return_index=True)
        group = np.searchsorted(several, cell[parts][owner])
        found[several] = shapely.make_valid(shapely.multipolygons(polygons, indices=group), method="structure")
    return found


def _plane(planes: np.ndarray, z: str) -> int:
    """The plane whose outlines count: the chosen one, or for a projection the middle one that has cells."""
    there = np.unique(planes)
    if z.isdigit():
        if int(z) not in there:
            raise CellquiltError(
                "z-plane-missing", f"z is {z}; the machine has cells on planes {', '.join(map(str, there.tolist()))}"
            )
        return int(z)
    return int(there[len(there) // 2]) if len(there) else 0


def _numbers(sample: str, cells: NDArray[np.object_] | PackedPolygons) -> tuple[NDArray[np.int64], np.ndarray]:
    """The cells in raster order of their centroids, as positions, and the ids that they have in that order."""
    order = raster_order(cells)
    return order, _ids(sample, len(order))


def _ids(sample: str, n: int) -> np.ndarray:
    return np.asarray([f"{sample}-{number}" for number in range(1, n + 1)], dtype=str)
