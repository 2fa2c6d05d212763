"""The aggregate step: transcripts and channels of a slide into its cells."""

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from cellquilt.aggregation.bins import count_bins
from cellquilt.aggregation.channels import ChannelTable, measure_outlines
from cellquilt.aggregation.counts import Counts, TranscriptCounter, count_transcripts, points_with_cells
from cellquilt.core import zarr_json
from cellquilt.core.assignment import (
    ASSIGNMENT,
    Assignment,
    AssignmentWriter,
    copy_assignment,
    expected_counts,
    has_assignment,
)
from cellquilt.core.bins import BINS_CELLS, Bins, find_bins
from cellquilt.core.errors import CellquiltError
from cellquilt.core.images import Image, open_image
from cellquilt.core.labels import write_labels
from cellquilt.core.log import LOG, progress
from cellquilt.core.points import PointsWriter, batch_rows, count_points, iter_points, points_columns, points_transforms
from cellquilt.core.record import Record
from cellquilt.core.settings import Settings, element_name
from cellquilt.core.shapes import copy_shapes
from cellquilt.core.store import Store, result_of
from cellquilt.core.transforms import GLOBAL
from cellquilt.geometry.locate import PolygonIndex
from cellquilt.geometry.outlines import Outlines

if TYPE_CHECKING:
    from anndata import AnnData
    from scipy.sparse import csr_matrix

    from cellquilt.aggregation.table import CellTable

POINTS = "transcripts"
#: Columns of transcripts that counting needs.
_COUNTED = ("transcript_id", "x", "y", "gene", "is_control", "passes_qv", "z_plane")


def aggregate_slide(
    store: Path,
    *,
    settings: Settings,
    cells: Path | None = None,
    metadata: Mapping[str, str] | None = None,
    name: str = "",
    output: Path | None = None,
    overwrite: bool = False,
) -> Path:
    """Make the table of a slide, and its transcripts with their cells.

    Parameters
    ----------
    store
        The slide: image, transcripts or bins; all may be missing.
    settings
        Group ``aggregate``.
    cells
        Store with ``cell_boundaries``; None takes the slide's own.
    metadata
        Columns of the sheet that are no settings; they go into ``obs``.
    name
        Method that made the cells, where it is compared with the one whose cells are the slide's: the result then is
        the table ``table_<name>``, and ``<name>_boundaries`` that say themselves which transcripts are in them
        (`core.assignment`), and no transcripts.
    output
        Delta store to make; None adds the elements to `store`.
    overwrite
        Replace what stands there.

    Returns
    -------
    pathlib.Path
        The store with the result.

    Notes
    -----
    Where the segmentation method itself said which transcripts are a cell's, that counts and not the outlines; these
    tell only for transcripts that were not segmented: controls and those of low quality.

    Raises
    ------
    CellquiltError
        ``element-missing`` if there are no cells; ``z-plane-unknown`` if planes are asked for and not known;
        ``assignment-mismatch`` if the cells are of other transcripts.
    """
    from cellquilt.aggregation.table import build_table

    slide, source = Store(store), Store(store if cells is None else cells)
    record = Record("aggregate", slide.name, settings.of_stage("aggregate"))
    if metadata:
        record.facts["metadata"] = dict(metadata)
    place = source.element("shapes", "cell_boundaries")
    outlines = Outlines(place)
    nuclei = None
    if source.has("shapes", "nucleus_boundaries") and not name:
        nuclei = Outlines(source.element("shapes", "nucleus_boundaries"))
    said = _Said(place, len(outlines)) if has_assignment(place) else None
    region = f"{element_name(name)}_boundaries" if name else "cell_boundaries"
    image = open_image(slide.path) if slide.names("images") else None
    channels = None
    if image is not None and settings["average_intensities"]:
        to_pixels = outlines.transforms[GLOBAL]
        channels = measure_outlines(
            image, outlines, to_pixels=to_pixels, memory_mb=settings["memory_mb"], threads=settings["threads"]
        )

    def table_of(counts: Counts | None, cells: Outlines, channels: ChannelTable | None) -> "CellTable":
        return build_table(
            slide.name,
            cells,
            counts,
            channels,
            statistics=("mean", "min", "max"),
            metadata=metadata,
            region=region,
            min_transcripts=settings["min_transcripts"],
            min_area_um2=settings["min_cell_area_um2"],
            max_area_um2=settings["max_cell_area_um2"],
            drop_failed=settings["drop_failed"],
        )

    has_points = slide.has("points", POINTS)
    bins = find_bins(slide, settings["bins_key"], otherwise=not has_points)
    has_points = has_points and bins is None
    fresh = has_points and "cell_id" not in points_columns(slide.element("points", POINTS))
    extends = [("points", POINTS)] if fresh and not name else []
    with result_of(slide, output, overwrite=overwrite, extends=extends) as delta:
        counts = None
        if settings["drop_failed"]:
            # Which cells fail is known after counting; what is published is counted again for the cells that are left.
            if bins is not None:
                counts, _ = _count_bins(bins, outlines, settings)
            if has_points:
                counts = count_transcripts(
                    _batches(slide, settings), _counter(slide, outlines, nuclei, image, said, settings)
                )
            first = table_of(counts, outlines, channels)
            record.facts["dropped_by_reason"] = first.failed
            paired = nuclei is not None and np.isin(nuclei.ids, outlines.ids).all()
            outlines, channels = outlines.take(first.kept), None if channels is None else channels.take(first.kept)
            if nuclei is not None and paired:  # others are of another method, whose cells these are not
                nuclei = nuclei.take(np.isin(nuclei.ids, outlines.ids))
                copy_shapes(nuclei.element, delta.new_element("shapes", "nucleus_boundaries"), nuclei.kept)
            if said is not None:
                said.keep(first.kept)
        if settings["drop_failed"] or name:
            copy_shapes(place, delta.new_element("shapes", region), outlines.kept)
            if said is not None and not name:
                copy_assignment(place, delta.new_element("shapes", region), said.rows)
        if has_points:
            counter = _counter(slide, outlines, nuclei, image, said, settings)
            if name:
                _publish_assignment(slide, delta.new_element("shapes", region), counter, settings)
            else:
                _publish_points(slide, delta, outlines.ids, counter, settings)
            counts = counter.finish()
            if said is not None:
                counts.expected = said.expected(counts.genes, len(outlines))
        if bins is not None:
            counts, owners = _count_bins(bins, outlines, settings)
            labels = f"{element_name(name)}_{BINS_CELLS}" if name else BINS_CELLS
            write_labels(delta.new_element("labels", labels), owners, bins.transforms)
        if counts is not None:
            record.facts.update(counts.qc)
        built = table_of(counts, outlines, channels)
        write_table(delta, built.adata, f"table_{element_name(name)}" if name else "table")
        n_pass = int(built.adata.obs["passes_qc"].sum())
        record.facts.update(n_cells=len(outlines), n_cells_pass=n_pass, failed_by_reason=built.failed)
        if name:
            delta.add_compared({name: [*source.records, record.finish()]})
        else:
            delta.add_record(record.finish())
    LOG.info("%s: %d cells%s, %d pass QC", slide.name, len(outlines), f" by {name}" if name else "", n_pass)
    return output or slide.path


class _Said:
    """What the segmentation method said about transcripts, in the rows of the cells that are left."""

    def __init__(self, element: Path, n_cells: int) -> None:
        self.element, self.rows = element, np.arange(n_cells)
        self._reader: Assignment | None = None

    def keep(self, kept: np.ndarray) -> None:
        """Leave out cells, (n,) bool."""
        self.rows = np.where(kept, np.cumsum(kept) - 1, -1)

    def reader(self) -> Assignment:
        """To read along with the points, once."""
        self._reader = Assignment(self.element, self.rows)
        return self._reader

    def expected(self, genes: list[str], n_cells: int) -> "csr_matrix | None":
        """Expected counts, when all points were read."""
        if self._reader is not None:
            self._reader.finish()
        return expected_counts(self.element, genes, n_cells, self.rows)


def _count_bins(bins: Bins, outlines: Outlines, settings: Settings) -> tuple[Counts, np.ndarray]:
    return count_bins(
        bins,
        outlines,
        rule=settings["bins_rule"],
        expand_um=settings["bins_expand_um"],
        memory_mb=settings["memory_mb"],
        threads=settings["threads"],
    )


def _batches(slide: Store, settings: Settings, only: Collection[str] = ()) -> Iterator[pa.Table]:
    """The transcripts as they were before: what an earlier run added is made anew. All columns, or `only` some."""
    element = slide.element("points", POINTS)
    added = ("cell_id", "in_nucleus") if any(record["stage"] == "aggregate" for record in slide.records) else ()
    columns = [name for name in points_columns(element) if name not in added and (not only or name in only)]
    return iter_points(element, columns, batch_rows(settings["memory_mb"]))


def _counter(
    slide: Store,
    outlines: Outlines,
    nuclei: Outlines | None,
    image: Image | None,
    said: _Said | None,
    settings: Settings,
) -> TranscriptCounter:
    """A counter in the cells' own coordinates."""
    transforms = points_transforms(slide.element("points", POINTS))
    to_image = transforms[GLOBAL]
    to_cells = np.linalg.inv(outlines.transforms[GLOBAL]) @ to_image
    return TranscriptCounter(
        PolygonIndex(outlines.rings()),
        to_cells,
        nuclei=None if nuclei is None else PolygonIndex(nuclei.rings()),
        planes=_planes(slide, settings),
        image_shape=None if image is None else (image.shape[1], image.shape[2]),
        to_image=to_image,
        assignment=None if said is None else said.reader().next,
        threads=settings["threads"],
        memory_mb=settings["memory_mb"],
    )


def _planes(slide: Store, settings: Settings) -> list[int] | None:
    """The planes whose transcripts count, None for all."""
    if settings["count_z"] == "all":
        return None
    z = slide.chosen_z(settings)
    if not z.isdigit():
        raise CellquiltError(
            "z-plane-unknown",
            f"{slide.name}: count_z is same, but the image is the projection {z}, not one plane",
            "set z to a plane's index, or count_z to all",
        )
    return [int(z)]


def _publish_points(
    slide: Store, delta: Store, ids: np.ndarray, counter: TranscriptCounter, settings: Settings
) -> None:
    """Write every transcript with its cell, and count on the way."""
    transforms = points_transforms(slide.element("points", POINTS))
    with PointsWriter(delta.new_element("points", POINTS), transforms) as writer:
        for batch in _in_view(slide, points_with_cells(_batches(slide, settings), counter, ids), settings):
            writer.write(batch)


def _publish_assignment(slide: Store, element: Path, counter: TranscriptCounter, settings: Settings) -> None:
    """Have the cells' element say which transcripts are in them, and count on the way."""
    with AssignmentWriter(element / ASSIGNMENT) as writer:
        for batch in _in_view(slide, _batches(slide, settings, _COUNTED), settings):
            writer.write(batch.column("transcript_id").to_numpy().astype(np.uint64), counter.add(batch).cell)


def _in_view(slide: Store, batches: Iterator[pa.Table], settings: Settings) -> Iterator[pa.Table]:
    total = count_points(slide.element("points", POINTS))
    return progress(batches, "transcripts", -(-total // batch_rows(settings["memory_mb"])))


def write_table(delta: Store, table: "AnnData", name: str) -> None:
    """Write a table of cells as spatialdata's own writer does; into a store that is being made."""
    import warnings

    element = delta.new_element("tables", name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table.write_zarr(element)
    # A table without rows annotates nothing: spatialdata takes no other.
    attributes = table.uns.get("spatialdata_attrs", {"region": None, "region_key": None, "instance_key": None})
    zarr_json.update_attributes(
        element, {"spatialdata-encoding-type": "ngff:regions_table", "version": "0.2", **attributes}
    )
