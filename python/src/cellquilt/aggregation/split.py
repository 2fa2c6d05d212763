"""A slide split into its regions: one store each, as if it had been a slide of its own.

A cell is of the region that its centroid lies in, a transcript of the region of its cell; one in no cell of that which
it lies in itself. Images are cut to the region's bounds, and pixels count from there: whole ones, so that outlines keep
their coordinates to the last bit. µm stay those of the whole slide, cells keep their ids.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import shapely
from numpy.typing import NDArray

from cellquilt.aggregation.columns import CellColumns
from cellquilt.aggregation.stage import write_table
from cellquilt.core.atomic import atomic_path, refuse_existing
from cellquilt.core.errors import CellquiltError
from cellquilt.core.images import Image, ImageWriter
from cellquilt.core.log import LOG
from cellquilt.core.parquet import arrow_array
from cellquilt.core.points import PointsWriter, batch_rows, count_points, iter_points, points_transforms, xy
from cellquilt.core.record import Record, versions
from cellquilt.core.regions import region_sample
from cellquilt.core.settings import Settings
from cellquilt.core.shapes import ShapesFile, ShapesTable, copy_shapes, read_shapes, write_shapes
from cellquilt.core.store import Store, new_store
from cellquilt.core.transforms import GLOBAL, MICRONS, Affine, apply, translation
from cellquilt.geometry.locate import PolygonIndex
from cellquilt.geometry.polygons import Rings

if TYPE_CHECKING:
    from anndata import AnnData

#: Shapes element with a slide's regions, and column of a table with the region of each cell.
REGIONS, REGION_NAME = "regions", "region_name"
#: After a region's name, of the store with what lies in it.
SUFFIX = ".slide.zarr"
_TISSUE, _CELLS, _NUCLEI = "region_of_interest", "cell_boundaries", "nucleus_boundaries"
_PATCHES = "_patches"
_POINTS, _TABLE = "transcripts", "table"
#: Of the whole slide; of a region they are not known.
_OF_WHOLE = {
    "resolve": ("conflict_rate", "n_conflicts", "n_cut", "n_merged", "overlap_ratio_histogram", "n_segmented"),
    "aggregate": ("dropped_by_reason",),
}


@dataclass(frozen=True)
class _Region:
    """One region: its row, its slide's name, its outline and its window (y0, y1, x0, x1) in pixels of the slide."""

    number: int
    name: str
    sample: str
    polygon: shapely.Geometry
    window: tuple[int, int, int, int]

    @property
    def offset(self) -> tuple[float, float]:
        """What x and y in pixels of the slide lose in those of the region, as what is added."""
        return -float(self.window[2]), -float(self.window[0])

    @property
    def shift(self) -> Affine:
        """From pixels of the slide to those of the region."""
        return translation(*self.offset)

    def moved(self, geometry: NDArray[np.object_]) -> NDArray[np.object_]:
        """Outlines in pixels of the slide as outlines in pixels of the region."""
        return np.asarray(shapely.transform(geometry, lambda xy: xy + self.offset), dtype=object)


class _Parts:
    """A slide's stores seen as one: of two elements of one name the later one counts."""

    def __init__(self, parts: Sequence[Path]) -> None:
        self.stores = [Store(part) for part in parts]
        self.sample = self.stores[0].name

    def names(self, kind: str) -> list[str]:
        return sorted({name for store in self.stores for name in store.names(kind)})

    def find(self, kind: str, name: str) -> Path | None:
        return next((store.element(kind, name) for store in reversed(self.stores) if store.has(kind, name)), None)

    def need(self, kind: str, name: str) -> Path:
        return self.find(kind, name) or self.stores[-1].element(kind, name)


def split_slide(
    parts: Sequence[Path],
    output: Path,
    *,
    settings: Settings,
    regions: Path | None = None,
    columns: Path | None = None,
    overwrite: bool = False,
) -> list[Path]:
    """Split a slide whose cells were counted into one store a region.

    Parameters
    ----------
    parts
        The slide's store; or its raw store and what the steps added.
    output
        Folder to make, with ``<sample>_<region>.slide.zarr`` of each region. Of transcripts, shapes, images and the
        table ``table`` it has what is of the region; bins, labels and other tables are left out.
    settings
        Groups ``convert`` (``regions_unit``) and ``resources``.
    regions
        GeoJSON with the regions; None: the slide's own element ``regions``, which `cellquilt convert` leaves.
    columns
        Where to write the region of each of the slide's cells, for the whole slide's table (`cellquilt assemble`).
    overwrite
        Replace what stands there.

    Returns
    -------
    list of pathlib.Path
        The stores, in the order of the regions.

    Raises
    ------
    CellquiltError
        ``element-missing`` if the slide has no table or no regions, and what `readers.regions.read_regions` refuses.
    """
    slide = _Parts(parts)
    record = Record("split", slide.sample, settings.of_stage("split"))
    refuse_existing(output, overwrite)
    shapes = _shapes_of(slide, regions, str(settings["regions_unit"]))
    images = {name: Image(slide.need("images", name)) for name in slide.names("images")}
    found = _regions(slide.sample, shapes, next(iter(images.values()), None))
    table = _read_table(slide)
    cells = ShapesFile(slide.need("shapes", _CELLS))
    to_pixels = np.linalg.inv(cells.transforms[MICRONS])
    index = PolygonIndex(Rings.from_shapely(shapes.geometry))
    of_cell = index.locate_columns(*apply(to_pixels, np.asarray(table.obsm["spatial"])[:, :2]).T)
    totals = {"cells": np.bincount(of_cell + 1, minlength=len(found) + 1)}
    of_shapes = _of_shapes(slide, index)
    with atomic_path(output, overwrite=overwrite) as folder, ExitStack() as made:
        folder.mkdir()
        stores = [made.enter_context(new_store(folder / f"{one.sample}{SUFFIX}", sample=one.sample)) for one in found]
        points = slide.find("points", _POINTS)
        if points is not None:
            totals["transcripts"] = _split_points(points, found, stores, index, (table, of_cell), settings)
        for one, store in zip(found, stores, strict=True):
            _split_shapes(slide, store, one, of_shapes, table.obs_names[of_cell == one.number].to_numpy().astype(str))
            for name, image in images.items():
                _cut_image(image, store.new_element("images", name), one, int(settings["threads"]))
            write_table(store, _rows(table, of_cell == one.number, one), _TABLE)
            for made_by in _records(slide, one):
                store.add_record(made_by)
            own = Record("split", one.sample, record.parameters, started=record.started)
            own.facts |= {"parent": slide.sample, "region": one.name, "window_px": list(one.window)}
            own.facts |= {f"n_{kind}": int(counts[one.number + 1]) for kind, counts in totals.items()}
            store.add_record(own.finish())
    facts: dict[str, Any] = {f"n_{kind}_outside": int(counts[0]) for kind, counts in totals.items()}
    facts["regions"] = [
        {"name": one.name, "sample": one.sample, **{f"n_{kind}": int(n[one.number + 1]) for kind, n in totals.items()}}
        for one in found
    ]
    LOG.info("%s: %d regions, %d of %d cells in none", slide.sample, len(found), facts["n_cells_outside"], table.n_obs)
    if columns is not None:
        _columns(slide.sample, table, of_cell, found, record, facts).write(columns, overwrite=overwrite)
    return [output / f"{one.sample}{SUFFIX}" for one in found]


def _shapes_of(slide: _Parts, path: Path | None, unit: str) -> ShapesTable:
    from cellquilt.readers.regions import read_regions

    if path is None:
        return read_shapes(slide.need("shapes", REGIONS))
    names = slide.names("images")
    if names:
        image = Image(slide.need("images", names[0]))
        size, to_um = (int(image.shape[1]), int(image.shape[2])), image.transforms[MICRONS]
    else:
        size, to_um = None, ShapesFile(slide.need("shapes", _CELLS)).transforms[MICRONS]
    frame = {GLOBAL: np.eye(3), MICRONS: to_um}
    if unit == "um":
        frame = {GLOBAL: np.linalg.inv(to_um), MICRONS: np.eye(3)}
    return read_regions(path, frame, size)


def _regions(sample: str, shapes: ShapesTable, image: Image | None) -> list[_Region]:
    bounds = shapely.bounds(shapes.geometry).reshape(-1, 4)
    low, high = np.floor(bounds[:, :2]), np.ceil(bounds[:, 2:])
    if image is not None:
        low, high = np.maximum(low, 0), np.minimum(high, [image.shape[2], image.shape[1]])
    windows = np.column_stack([low[:, 1], high[:, 1], low[:, 0], high[:, 0]]).astype(np.int64)
    names = shapes.columns["name"].astype(str)
    return [
        _Region(number, str(names[number]), region_sample(sample, str(shapes.ids[number])), polygon, tuple(window))
        for number, (polygon, window) in enumerate(zip(shapes.geometry, windows.tolist(), strict=True))
    ]


def _read_table(slide: _Parts) -> "AnnData":
    import anndata

    element = slide.need("tables", _TABLE)
    try:
        return anndata.read_zarr(element)
    except Exception as error:  # whatever zarr and anndata raise on damaged files
        raise CellquiltError(
            "table-unreadable", f"{element} cannot be read: {type(error).__name__}: {error}", "run `aggregate` again"
        ) from error


def _rows(table: "AnnData", kept: NDArray[np.bool_], region: _Region) -> "AnnData":
    """The region's rows, with its slide's name."""
    import pandas as pd

    own = table[kept].copy()
    for column, value in (("sample", region.sample), (REGION_NAME, region.name)):
        own.obs[column] = pd.Categorical.from_codes(np.zeros(own.n_obs, dtype=np.int8), [value])
    if not own.n_obs:  # as in `aggregation.table`: spatialdata takes no annotation without a row
        own.uns.pop("spatialdata_attrs", None)
    return own


def _columns(
    sample: str, table: "AnnData", of_cell: NDArray[np.int64], regions: Sequence[_Region], record: Record,
    facts: Mapping[str, Any],
) -> CellColumns:  # fmt: skip
    import pandas as pd

    names = pd.Categorical.from_codes(of_cell, [one.name for one in regions])
    columns = pd.DataFrame({REGION_NAME: names}, index=table.obs_names)
    return CellColumns(sample, "split", columns, parameters=record.parameters, facts=facts, versions=versions())


def _split_points(
    element: Path, regions: Sequence[_Region], stores: Sequence[Store], index: PolygonIndex,
    cells: "tuple[AnnData, NDArray[np.int64]]", settings: Settings,
) -> NDArray[np.int64]:  # fmt: skip
    """Write each region's transcripts, in their order; how many are in none, and in each."""
    transforms = points_transforms(element)
    to_pixels = transforms[GLOBAL]
    # A region more for transcripts whose cell is in none.
    ids = pa.array(cells[0].obs_names.astype(str).tolist(), pa.string())
    waiting: list[list[pa.Table]] = [[] for _ in regions]
    counts = np.zeros(len(regions) + 1, dtype=np.int64)
    rows = batch_rows(settings["memory_mb"])
    held = 0
    with ExitStack() as made:
        writers = [
            made.enter_context(
                PointsWriter(
                    store.new_element("points", _POINTS), {**transforms, GLOBAL: one.shift @ to_pixels}
                )
            )
            for one, store in zip(regions, stores, strict=True)
        ]  # fmt: skip

        def flush() -> None:
            for writer, tables in zip(writers, waiting, strict=True):
                if tables:
                    writer.write(pa.concat_tables(tables).unify_dictionaries().combine_chunks())
                    tables.clear()

        for batch in iter_points(element, batch_rows=rows):
            of_row = index.locate_columns(*apply(to_pixels, xy(batch)).T)
            if "cell_id" in batch.column_names:
                cell = pc.index_in(batch.column("cell_id"), value_set=ids)
                known = cell.is_valid().to_numpy()
                of_row[known] = cells[1][cell.drop_null().to_numpy()]
            counts += np.bincount(of_row + 1, minlength=len(regions) + 1)
            for number in np.unique(of_row[of_row >= 0]).tolist():
                waiting[number].append(batch.filter(arrow_array(of_row == number)))
            held += batch.num_rows
            if held >= rows:
                flush()
                held = 0
        flush()
        empty = next(iter_points(element, batch_rows=1), None) if count_points(element) else None
        for writer in writers:
            if not writer.n_rows and empty is not None:
                writer.write(empty.slice(0, 0))
    return counts


def _of_shapes(slide: _Parts, index: PolygonIndex) -> dict[str, NDArray[np.int64]]:
    """Of outlines that are no cell's in the table, (n,) the region that their centroids lie in, -1 for none."""
    found = {}
    for name in slide.names("shapes"):
        if name in (REGIONS, _TISSUE, _CELLS, _NUCLEI) or name.endswith(_PATCHES):
            continue
        file = ShapesFile(slide.need("shapes", name))
        centres = [
            shapely.get_coordinates(shapely.centroid(shapely.from_wkb(wkb.to_numpy(zero_copy_only=False))))
            for wkb in file.wkb()
        ]
        xy_px = apply(file.transforms[GLOBAL], np.concatenate([np.zeros((0, 2)), *centres]))
        found[name] = index.locate_columns(*xy_px.T)
    return found


def _split_shapes(
    slide: _Parts, store: Store, region: _Region, of_shapes: Mapping[str, NDArray[np.int64]], cells: NDArray[Any]
) -> None:
    to_um = ShapesFile(slide.need("shapes", _CELLS)).transforms[MICRONS]
    frame = {GLOBAL: np.eye(3), MICRONS: to_um @ np.linalg.inv(region.shift)}
    outline = region.moved(np.array([region.polygon], dtype=object))
    names = np.array([region.name], dtype=object)
    write_shapes(
        store.new_element("shapes", REGIONS), ShapesTable(np.array([store.name]), outline, {"name": names}, frame)
    )
    tissue, geometry = slide.find("shapes", _TISSUE), outline
    if tissue is not None:
        cut = shapely.intersection(region.moved(read_shapes(tissue).geometry), outline[0])
        geometry = np.array([part for part in shapely.get_parts(cut) if part.area], dtype=object)
    ids = np.array([f"region-{number}" for number in range(1, len(geometry) + 1)], dtype=str)
    write_shapes(store.new_element("shapes", _TISSUE), ShapesTable(ids, geometry, {}, frame))
    for name in slide.names("shapes"):
        element, target = slide.need("shapes", name), store.new_element("shapes", name)
        if name in (_CELLS, _NUCLEI):
            _copy(element, target, region, np.isin(ShapesFile(element).ids(), cells))
        elif name in of_shapes:
            _copy(element, target, region, of_shapes[name] == region.number)
        elif name.endswith(_PATCHES):
            patches = read_shapes(element)
            y0, y1, x0, x1 = region.window
            inside = shapely.intersection(patches.geometry, shapely.box(x0, y0, x1, y1))
            there = shapely.area(inside) > 0
            kept = patches.take(there)
            write_shapes(target, ShapesTable(kept.ids, region.moved(inside[there]), kept.columns, frame, kept.metadata))


def _copy(element: Path, target: Path, region: _Region, kept: NDArray[np.bool_]) -> None:
    """Some rows in pixels of the region; outlines in other coordinates stay as they are, and only their map changes."""
    transforms = ShapesFile(element).transforms
    if not np.array_equal(transforms[GLOBAL], np.eye(3)):
        copy_shapes(element, target, kept, transforms={**transforms, GLOBAL: region.shift @ transforms[GLOBAL]})
        return
    back = np.linalg.inv(region.shift)
    others = {name: matrix @ back for name, matrix in transforms.items() if name != GLOBAL}
    copy_shapes(element, target, kept, offset=region.offset, transforms={GLOBAL: np.eye(3), **others})


def _cut_image(image: Image, element: Path, region: _Region, threads: int) -> None:
    """Write what of an image lies in the region's window; nothing if nothing does."""
    y0, y1, x0, x1 = region.window
    corners = apply(np.linalg.inv(image.transforms[GLOBAL]), np.array([[x0, y0], [x1, y0], [x0, y1], [x1, y1]]))
    low = np.maximum(np.floor(corners.min(axis=0) + 1e-6), 0).astype(np.int64)
    high = np.minimum(np.ceil(corners.max(axis=0) - 1e-6), [image.shape[2], image.shape[1]]).astype(np.int64)
    width, height = (high - low).tolist()
    if width <= 0 or height <= 0:
        return
    left, top = low.tolist()
    own = translation(left, top)
    transforms = {name: matrix @ own for name, matrix in image.transforms.items()}
    transforms[GLOBAL] = region.shift @ transforms[GLOBAL]
    shape = (image.shape[0], height, width)
    with ImageWriter(
        element, shape, image.dtype, image.channels, transforms,
        chunk_px=image.chunk_px + image.chunk_px % 2, compression="zstd", threads=threads,
    ) as writer:  # fmt: skip
        step = writer.chunk_px
        for channel in range(image.shape[0]):
            for y in range(0, height, step):
                for x in range(0, width, step):
                    bottom, right = min(y + step, height), min(x + step, width)
                    pixels = image.read(top + y, top + bottom, left + x, left + right, channels=[channel])
                    writer.write(pixels[0], y, x, channel)


def _records(slide: _Parts, region: _Region) -> list[dict[str, Any]]:
    """How the slide was made, without what it took: that is the slide's, and would count once a region."""
    found = []
    for made in (record for store in slide.stores for record in store.records):
        facts = {
            name: value for name, value in made.get("facts", {}).items() if name not in _OF_WHOLE.get(made["stage"], ())
        }
        if "patches" in facts:
            facts["patches"] = [_patch(patch, region) for patch in facts["patches"] if _meets(patch, region.window)]
        if "tasks" in facts:
            facts["tasks"] = [{**task, "seconds": 0.0, "peak_rss_mb": 0.0} for task in facts["tasks"]]
        found.append({**made, "facts": facts, "seconds": 0.0, "peak_rss_mb": 0.0})
    return found


def _meets(patch: Mapping[str, Any], window: tuple[int, int, int, int]) -> bool:
    y0, y1, x0, x1 = window
    return bool(patch["x0"] < x1 and patch["x1"] > x0 and patch["y0"] < y1 and patch["y1"] > y0)


def _patch(patch: Mapping[str, Any], region: _Region) -> dict[str, Any]:
    y0, y1, x0, x1 = region.window
    return {
        **patch,
        "y0": max(patch["y0"], y0) - y0, "y1": min(patch["y1"], y1) - y0,
        "x0": max(patch["x0"], x0) - x0, "x1": min(patch["x1"], x1) - x0,
    }  # fmt: skip
