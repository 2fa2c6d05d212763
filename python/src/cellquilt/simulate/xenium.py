"""Writing a simulated slide as a Xenium bundle, as the machine's software (XOA) 1 to 4 lays it out.

What the bundle says is the truth: the machine's cells are the true ones, a transcript's ``cell_id`` is the true cell
that it lies in. Quality values are drawn, so that a share falls below 20. Layouts are those of 10x's description of
the outputs: "Understanding Xenium Outputs", versions 1.9, 2.0 and 3.0, and XOA 4's file names.
"""

import copy
import dataclasses
import json
import string
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import shapely

from cellquilt.core.log import progress
from cellquilt.core.parquet import arrow_array, write_parquet
from cellquilt.core.tiff_pyramid import write_pyramid
from cellquilt.core.xenium import CELLS, EXPERIMENT, MIN_QV, SUMMARY, UNASSIGNED, xenium_ids
from cellquilt.core.zarr_zip import ZarrZip
from cellquilt.simulate.cells import reach_um
from cellquilt.simulate.slide import Slide, Tile, Window
from cellquilt.simulate.transcripts import Transcripts
from cellquilt.simulate.writer import TIFF_TILE, Spool, TableStream, TruthWriter, What, tile_outlines

#: Versions of the machine's software that there are layouts of, and what each calls itself.
VERSIONS = {1: "xenium-1.9.2.0", 2: "xenium-2.0.1.0", 3: "xenium-3.3.0.1", 4: "xenium-4.0.1.0"}
LOW_QUALITY = 0.15  # share of transcripts of genes below the quality value of 20; of controls it is three times that
_OME = "http://www.openmicroscopy.org/Schemas/OME/2016-06"


class Stain(NamedTuple):
    """A channel of the bundle: its name, its file in XOA 4, and the simulated stain and plane that it shows.

    The simulator has two stains; the kit's interior stains are the second one in planes of their own.
    """

    name: str
    file: str
    channel: str
    plane: int | None


_STAINS = (
    Stain("DAPI", "dapi", "DAPI", None),
    Stain("ATP1A1/CD45/E-Cadherin", "atp1a1_cd45_e-cadherin", "Cellbound", None),
    Stain("18S", "18s", "Cellbound", 1),
    Stain("AlphaSMA/Vimentin", "alphasma_vimentin", "Cellbound", 5),
)


class Control(NamedTuple):
    """A kind of control: how its features are called, its feature type, its category, the column that counts it."""

    pattern: str
    feature_type: str
    category: str
    column: str


_PROBE = Control("NegControlProbe_{:05d}", "Negative Control Probe", "negative_control_probe", "control_probe_counts")
_CODEWORD = Control(
    "NegControlCodeword_{:04d}", "Negative Control Codeword", "negative_control_codeword", "control_codeword_counts"
)
_UNUSED = Control(
    "UnassignedCodeword_{:04d}", "Unassigned Codeword", "unassigned_codeword", "unassigned_codeword_counts"
)
_OLD = Control("DeprecatedCodeword_{:04d}", "Deprecated Codeword", "deprecated_codeword", "deprecated_codeword_counts")
_GENOMIC = Control("Intergenic_Region_{:d}", "Genomic Control", "genomic_control_probe", "genomic_control_counts")
_CONTROLS = {
    1: (
        _PROBE,
        _CODEWORD,
        Control("antisense_GENE{:d}", _PROBE.feature_type, _PROBE.category, _PROBE.column),
        Control("BLANK_{:04d}", "Blank Codeword", _UNUSED.category, _UNUSED.column),
    ),
    2: (_PROBE, _CODEWORD, _UNUSED, _OLD),
    3: (_PROBE, _CODEWORD, _UNUSED, _OLD, _GENOMIC),
    4: (_PROBE, _CODEWORD, _UNUSED, _OLD, _GENOMIC),
}


def write_xenium(slide: Slide, folder: Path, name: str, what: What, more: Mapping[str, Any]) -> dict[str, Any]:
    """Write a slide as a Xenium bundle, with ``truth/`` beside the machine's files.

    ``experiment.xenium``, ``transcripts.parquet``, ``cell_boundaries.parquet``, ``nucleus_boundaries.parquet``,
    ``cells.parquet``, ``cells.zarr.zip`` (masks), ``cell_feature_matrix.h5``, and the image: ``morphology_focus/``
    with a pyramid a stain, for XOA 1 ``morphology_focus.ome.tif`` and ``morphology_mip.ome.tif``. Outlines have all
    their corners, where the machine keeps 25; a hole in a cell, which the format cannot say, is filled.

    Returns
    -------
    dict
        The slide's `simulation.json`.

    Notes
    -----
    The memory grows with the cells and the entries of the matrix, not with the pixels or the transcripts.
    """
    folder.mkdir(parents=True)
    version = what.xenium_version
    slide = _with_controls(slide, version)
    truth = TruthWriter(folder / "truth", slide, what.transcripts)
    images = _Images(slide, folder, name, what)
    cells = _Cells(slide, folder, version)
    transcripts_out = _TranscriptTable(slide, folder / "transcripts.parquet", version) if what.transcripts else None
    for window in progress(slide.windows(what.tile_px), f"simulate {name}"):
        tile = slide.tile(window)
        transcripts = slide.transcripts(tile) if transcripts_out is not None else None
        outlines = tile_outlines(tile.masks.cells, tile)
        truth.write(tile, outlines, transcripts)
        cells.write(tile, window, outlines)
        if transcripts_out is not None and transcripts is not None:
            cells.count(*transcripts_out.write(tile, transcripts))
        images.write(tile, window)
    if transcripts_out is not None:
        transcripts_out.close()
    files = images.close(what.compression)
    cells.close()
    n_transcripts = 0 if transcripts_out is None else transcripts_out.n_passing
    _write_experiment(slide, folder, name, version, files, cells.n_cells, n_transcripts)
    return truth.close({**more, "xenium_version": version, "min_qv": MIN_QV})


def _with_controls(slide: Slide, version: int) -> Slide:
    """The slide with its controls called as the machine calls them, all kinds in turn."""
    panel = slide.expression
    kinds = _CONTROLS[version]
    names = [kinds[k % len(kinds)].pattern.format(k // len(kinds) + 1) for k in range(panel.n_controls)]
    renamed = copy.copy(slide)
    renamed.expression = dataclasses.replace(panel, genes=[*panel.genes[: -panel.n_controls], *names])
    return renamed


def _features(slide: Slide, version: int) -> list[Control | None]:
    """The kind of every feature of the panel; None for genes."""
    panel, kinds = slide.expression, _CONTROLS[version]
    genes: list[Control | None] = [None] * (len(panel.genes) - panel.n_controls)
    return genes + [kinds[k % len(kinds)] for k in range(panel.n_controls)]


# --- image


class _Images:
    """The bundle's images, spooled while tiles are made and written as pyramids at the end."""

    def __init__(self, slide: Slide, folder: Path, name: str, what: What) -> None:
        self.slide, self.folder, self.name, self.version = slide, folder, name, what.xenium_version
        kit = "Cellbound" in what.channels and self.version > 1
        self.stains = (_STAINS if kit else _STAINS[:1]) if what.image else ()
        if self.version == 1:
            self.files = ["morphology_focus.ome.tif", "morphology_mip.ome.tif"] if what.image else []
        else:
            new = self.version >= 4
            names = (
                f"ch{k:04d}_{stain.file}" if new else f"morphology_focus_{k:04d}" for k, stain in enumerate(self.stains)
            )
            self.files = [f"morphology_focus/{file}.ome.tif" for file in names]
        self.spools = [
            Spool(folder / f".image_{k}.spool", slide.canvas, np.dtype(np.uint16)) for k in range(len(self.files))
        ]

    def write(self, tile: Tile, window: Window) -> None:
        """Add a tile."""
        for k, stain in enumerate(self.stains):
            self.spools[k].write(window, self.slide.image(tile, (stain.channel,), stain.plane)[0])
        if self.version == 1 and self.spools:  # a projection of two planes, where the machine takes all
            planes = [self.slide.image(tile, ("DAPI",), plane)[0] for plane in (2, 4)]
            self.spools[1].write(window, np.maximum(*planes))

    def close(self, compression: str | None) -> list[str]:
        """Write the files.

        Returns
        -------
        list of str
            Their names in the bundle.
        """
        for file in self.files:
            (self.folder / file).parent.mkdir(exist_ok=True)
        # In XOA 1 each file is an image of its own; later one image is spread over the files.
        groups = [[k] for k in range(len(self.files))] if self.version == 1 else [list(range(len(self.files)))]
        for group in groups:
            names = [Path(self.files[k]).name for k in group]
            for place, k in enumerate(group):
                xml = self._ome(names, place, [self.stains[k if self.version > 1 else 0].name for k in group])
                spool = self.spools[k]
                write_pyramid(
                    self.folder / self.files[k], spool.tiles(), spool.shape, spool.dtype,
                    tile_px=TIFF_TILE, compression=compression, description=xml,
                )  # fmt: skip
                spool.remove()
        return self.files

    def _ome(self, files: list[str], place: int, channels: list[str]) -> str:
        """OME-XML of one file of a set: it tells of all channels, and in which file each lies."""
        height, width = self.slide.canvas
        pixel = str(self.slide.parameters.pixel_size_um)
        ids = [f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, f'cellquilt-simulation/{self.name}/{f}')}" for f in files]
        root = ElementTree.Element("OME", {"xmlns": _OME, "UUID": ids[place], "Creator": "cellquilt"})
        image = ElementTree.SubElement(root, "Image", {"ID": "Image:0", "Name": self.name})
        pixels = ElementTree.SubElement(
            image,
            "Pixels",
            {
                "ID": "Pixels:0", "DimensionOrder": "XYZCT", "Type": "uint16", "SizeX": str(width),
                "SizeY": str(height), "SizeZ": "1", "SizeC": str(len(files)), "SizeT": "1", "PhysicalSizeX": pixel,
                "PhysicalSizeXUnit": "µm", "PhysicalSizeY": pixel, "PhysicalSizeYUnit": "µm",
            },
        )  # fmt: skip
        for k, channel in enumerate(channels):
            entry = {"ID": f"Channel:{k}", "Name": channel, "SamplesPerPixel": "1"}
            ElementTree.SubElement(pixels, "Channel", entry)
        for k, file in enumerate(files):
            data = ElementTree.SubElement(pixels, "TiffData", {"FirstC": str(k), "IFD": "0", "PlaneCount": "1"})
            ElementTree.SubElement(data, "UUID", {"FileName": file}).text = ids[k]
        return ElementTree.tostring(root, encoding="us-ascii", xml_declaration=True).decode("ascii")


# --- transcripts


class _TranscriptTable:
    """`transcripts.parquet`, with the machine's columns and types of its version."""

    def __init__(self, slide: Slide, path: Path, version: int) -> None:
        self.slide, self.version = slide, version
        text = pa.binary() if version == 1 else pa.string()
        fields = [
            ("transcript_id", pa.uint64()), ("cell_id", text), ("overlaps_nucleus", pa.uint8()),
            ("feature_name", text), ("x_location", pa.float32()), ("y_location", pa.float32()),
            ("z_location", pa.float32()), ("qv", pa.float32()), ("fov_name", text),
            ("nucleus_distance", pa.float32()),
        ]  # fmt: skip
        if version >= 2:
            fields.append(("codeword_index", pa.int32()))
        if version >= 3:
            fields += [("codeword_category", text), ("is_gene", pa.bool_())]
        self._stream = TableStream(path, pa.schema(fields))
        kinds = _features(slide, version)
        self._is_gene = np.array([kind is None for kind in kinds])
        self._category = [kind.category if kind else "predesigned_gene" for kind in kinds]
        self.n_passing = 0

    def write(self, tile: Tile, transcripts: Transcripts) -> tuple[np.ndarray, np.ndarray]:
        """Append a tile's transcripts.

        Returns
        -------
        cell, gene : numpy.ndarray
            (m,) number of the true cell and index into the panel, of those that lie in a cell and pass.
        """
        slide, n = self.slide, len(transcripts)
        pixel = slide.parameters.pixel_size_um
        height, width = tile.masks.cells.shape
        x, y = transcripts.xy.T
        column = np.clip(np.floor(x / pixel).astype(np.int64) - tile.origin[1], 0, width - 1)
        row = np.clip(np.floor(y / pixel).astype(np.int64) - tile.origin[0], 0, height - 1)
        cell = np.concatenate([[0], tile.cells.ids])[tile.masks.cells[row, column]]
        qv = _quality(slide.seed, transcripts, self._is_gene[transcripts.gene])
        passing = qv >= MIN_QV
        found, code = np.unique(cell, return_inverse=True)
        names = np.where(found > 0, xenium_ids(found), UNASSIGNED)
        values = {
            # The machine's numbers begin anew in every field of view and leave room for it above.
            "transcript_id": np.arange(self._stream.n_rows, self._stream.n_rows + n, dtype=np.uint64) + (1 << 48),
            "cell_id": self._text(code, names.tolist()),
            "overlaps_nucleus": transcripts.in_nucleus.astype(np.uint8),
            "feature_name": self._text(transcripts.gene, slide.expression.genes),
            "x_location": x.astype(np.float32),
            "y_location": y.astype(np.float32),
            "z_location": (transcripts.plane * slide.calibration.z_step_um).astype(np.float32),
            "qv": qv,
            "fov_name": self._fields_of_view(x, y),
            "nucleus_distance": self._nucleus_distance(tile, row, column),
            "codeword_index": transcripts.gene.astype(np.int32),
            "codeword_category": self._text(transcripts.gene, self._category),
            "is_gene": self._is_gene[transcripts.gene],
        }
        self._stream.write(values)
        self.n_passing += int(passing.sum())
        counted = passing & (cell > 0)
        return cell[counted], transcripts.gene[counted].astype(np.int64)

    def _text(self, codes: np.ndarray, names: list[str]) -> pa.Array:
        words = pa.DictionaryArray.from_arrays(pa.array(codes, pa.int32()), pa.array(names, pa.string()))
        return words.cast(pa.string()).cast(pa.binary() if self.version == 1 else pa.string())

    def _fields_of_view(self, x: np.ndarray, y: np.ndarray) -> pa.Array:
        size = self.slide.parameters.fov_um
        places = np.floor(np.column_stack([y, x]) / size).astype(np.int64)
        found, code = np.unique(places, axis=0, return_inverse=True)
        letters = string.ascii_uppercase
        names = [f"{letters[row // 26 - 1] if row >= 26 else ''}{letters[row % 26]}{column}" for row, column in found]
        return self._text(code.ravel(), names)

    def _nucleus_distance(self, tile: Tile, row: np.ndarray, column: np.ndarray) -> np.ndarray:
        """µm to the nearest nucleus, at most the reach of a cell: the tile does not know of nuclei farther away."""
        from scipy import ndimage

        outside = tile.masks.nuclei == 0
        parameters = self.slide.parameters
        most = reach_um(parameters)
        if outside.all():
            return np.full(len(row), most, np.float32)
        distance = ndimage.distance_transform_edt(outside)[row, column] * parameters.pixel_size_um
        return np.minimum(distance, most).astype(np.float32)

    def close(self) -> None:
        """Finish the file."""
        self._stream.__exit__(None, None, None)


def _quality(seed: int, transcripts: Transcripts, is_gene: np.ndarray) -> np.ndarray:
    """Quality values: (n,) float32 in [0, 40], from a hash of place and feature, so that no tiling changes them."""
    place = np.round(transcripts.xy * 1000).astype(np.int64).astype(np.uint64)
    key = place[:, 0] << np.uint64(32) ^ place[:, 1] << np.uint64(6) ^ transcripts.plane.astype(np.uint64)
    first = _uniform(key ^ np.uint64(seed & (2**63 - 1)))
    second = _uniform(key + transcripts.gene.astype(np.uint64) ^ np.uint64((seed * 3 + 1) & (2**63 - 1)))
    low = first < np.where(is_gene, LOW_QUALITY, 3 * LOW_QUALITY)
    # Above 20 most transcripts have the highest value there is.
    return np.where(low, MIN_QV * second, np.minimum(40.0, MIN_QV + 60.0 * second)).astype(np.float32)


def _uniform(key: np.ndarray) -> np.ndarray:
    """Numbers in [0, 1) from (n,) uint64 keys: the finalizer of SplitMix64."""
    key = (key ^ (key >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    key = (key ^ (key >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((key ^ (key >> np.uint64(31))) >> np.uint64(11)) / float(1 << 53)


# --- cells


class _Cells:
    """Outlines, masks, the table of cells and the matrix."""

    def __init__(self, slide: Slide, folder: Path, version: int) -> None:
        self.slide, self.folder, self.version = slide, folder, version
        fields = [
            ("cell_id", pa.binary() if version == 1 else pa.string()),
            ("vertex_x", pa.float32()),
            ("vertex_y", pa.float32()),
        ]
        schema = pa.schema(fields if version == 1 else [*fields, ("label_id", pa.int32())])
        self._outlines = [TableStream(folder / f"{kind}_boundaries.parquet", schema) for kind in ("cell", "nucleus")]
        self._masks = [
            Spool(folder / f".{kind}_mask.spool", slide.canvas, np.dtype(np.uint32)) for kind in ("nucleus", "cell")
        ]
        self._rows: list[np.ndarray] = []
        self._counts: list[tuple[np.ndarray, np.ndarray]] = []
        self._n_outlines = [0, 0]
        self.n_cells = 0

    def write(self, tile: Tile, window: Window, outlines: np.ndarray) -> None:
        """Append a tile's own cells."""
        index = tile.owned.index
        ids = tile.cells.ids[index]
        has_nucleus = tile.owned.nucleus_area_um2 > 0
        nuclei = tile_outlines(tile.masks.nuclei, tile)
        self._write_outlines(0, ids, outlines)
        self._write_outlines(1, ids[has_nucleus], nuclei[has_nucleus])
        pixel = self.slide.parameters.pixel_size_um
        centres = shapely.get_coordinates(shapely.centroid(outlines)).reshape(-1, 2) * pixel
        nucleus_centres = np.full((len(ids), 2), np.nan)
        found = shapely.get_coordinates(shapely.centroid(nuclei[has_nucleus])).reshape(-1, 2)
        nucleus_centres[has_nucleus] = found * pixel
        areas = tile.owned.area_um2, np.where(has_nucleus, tile.owned.nucleus_area_um2, np.nan)
        self._rows.append(np.column_stack([ids, centres, areas[0], nucleus_centres, areas[1]]))
        self.n_cells += len(ids)
        numbers = np.concatenate([[0], tile.cells.ids]).astype(np.uint32)
        for spool, labels in zip(self._masks, (tile.masks.nuclei, tile.masks.cells), strict=True):
            spool.write(window, numbers[tile.crop(labels)])

    def _write_outlines(self, kind: int, ids: np.ndarray, outlines: np.ndarray) -> None:
        rings = shapely.get_exterior_ring(outlines)
        xy, ring = shapely.get_coordinates(rings, return_index=True)
        xy = xy * self.slide.parameters.pixel_size_um
        names = pa.array(xenium_ids(ids).tolist() if len(ids) else [], pa.string()).take(pa.array(ring))
        values: dict[str, Any] = {"vertex_x": xy[:, 0].astype(np.float32), "vertex_y": xy[:, 1].astype(np.float32)}
        values["cell_id"] = names.cast(pa.binary()) if self.version == 1 else names
        values["label_id"] = (ring + self._n_outlines[kind] + 1).astype(np.int32)
        self._n_outlines[kind] += len(ids)
        self._outlines[kind].write(values)

    def count(self, cell: np.ndarray, gene: np.ndarray) -> None:
        """Count transcripts in cells, of any tile."""
        keys, counts = np.unique(cell * len(self.slide.expression.genes) + gene, return_counts=True)
        self._counts.append((keys, counts))

    def close(self) -> None:
        """Write what needs all cells."""
        for stream in self._outlines:
            stream.__exit__(None, None, None)
        rows = np.concatenate(self._rows)
        order = np.argsort(rows[:, 0])
        sorted_ids = rows[order, 0].astype(np.int64)
        matrix = self._matrix(sorted_ids, order)
        self._write_table(rows, matrix)
        self._write_matrix(rows[:, 0].astype(np.int64), matrix)
        self._write_zarr(rows, sorted_ids, order)

    def _matrix(self, sorted_ids: np.ndarray, order: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Cell (row of the table), feature and count of every entry, sorted by both."""
        n_features = len(self.slide.expression.genes)
        keys = np.concatenate([np.zeros(0, np.int64), *(part[0] for part in self._counts)])
        counts = np.concatenate([np.zeros(0, np.int64), *(part[1] for part in self._counts)])
        cell, feature = order[np.searchsorted(sorted_ids, keys // n_features)] if len(keys) else keys, keys % n_features
        found, inverse = np.unique(cell * n_features + feature, return_inverse=True)
        totals = np.bincount(inverse, weights=counts, minlength=len(found)).astype(np.int64)
        return found // n_features, found % n_features, totals

    def _write_table(self, rows: np.ndarray, matrix: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
        cell, feature, counts = matrix
        kinds = _features(self.slide, self.version)
        column_of = np.array([kind.column if kind else "transcript_counts" for kind in kinds])
        ids = pa.array(xenium_ids(rows[:, 0].astype(np.int64)).tolist(), pa.string())
        columns: dict[str, pa.Array] = {
            "cell_id": ids.cast(pa.binary()) if self.version == 1 else ids,
            "x_centroid": arrow_array(rows[:, 1]),
            "y_centroid": arrow_array(rows[:, 2]),
        }
        for name in ("transcript_counts", *dict.fromkeys(kind.column for kind in _CONTROLS[self.version])):
            mine = column_of[feature] == name
            columns[name] = arrow_array(np.bincount(cell[mine], counts[mine], len(rows)).astype(np.int64))
        columns["total_counts"] = arrow_array(np.bincount(cell, counts, len(rows)).astype(np.int64))
        columns["cell_area"] = arrow_array(rows[:, 3])
        columns["nucleus_area"] = arrow_array(rows[:, 6])
        if self.version >= 3:
            columns["nucleus_count"] = arrow_array((~np.isnan(rows[:, 6])).astype(np.int32))
            columns["segmentation_method"] = pa.array(["Simulated truth"] * len(rows), pa.string())
        write_parquet(self.folder / "cells.parquet", pa.table(columns))

    def _write_matrix(self, ids: np.ndarray, matrix: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
        import h5py

        cell, feature, counts = matrix
        genes = self.slide.expression.genes
        kinds = _features(self.slide, self.version)
        starts = np.concatenate([[0], np.cumsum(np.bincount(cell, minlength=len(ids)))])
        features = {
            "id": [f"SIM{k:011d}" if kind is None else genes[k] for k, kind in enumerate(kinds)],
            "name": genes,
            "feature_type": [kind.feature_type if kind else "Gene Expression" for kind in kinds],
            "genome": ["Unknown"] * len(genes),
            "_all_tag_keys": ["genome"],
        }
        with h5py.File(self.folder / "cell_feature_matrix.h5", "w") as file:
            group = file.create_group("matrix")
            group["barcodes"] = np.char.encode(xenium_ids(ids))
            group["data"], group["indices"] = counts.astype(np.int32), feature.astype(np.int64)
            group["indptr"], group["shape"] = starts.astype(np.int64), np.array([len(genes), len(ids)], np.int32)
            for name, values in features.items():
                group[f"features/{name}"] = np.char.encode(np.asarray(values, dtype=str))

    def _write_zarr(self, rows: np.ndarray, sorted_ids: np.ndarray, order: np.ndarray) -> None:
        """`cells.zarr.zip`: masks whose labels are places in the tables of outlines, and what belongs to them."""
        ids = np.column_stack([rows[:, 0], np.ones(len(rows))]).astype(np.uint32)
        with_nucleus = np.flatnonzero(~np.isnan(rows[:, 6]))
        rank = np.zeros(len(rows), np.uint32)
        rank[with_nucleus] = np.arange(1, len(with_nucleus) + 1)
        labels = {"0": rank, "1": np.arange(1, len(rows) + 1, dtype=np.uint32)}
        if self.version == 1:
            labels["0"] = labels["1"]  # a nucleus has its cell's label
        names = list(SUMMARY[: 8 if self.version >= 2 else 7])
        summary = np.column_stack([rows[:, 1:], np.zeros(len(rows))])
        if self.version >= 2:
            summary = np.column_stack([summary, ~np.isnan(rows[:, 6])])
        with ZarrZip(self.folder / CELLS) as store:
            store.group("", {"major_version": 6 if self.version > 1 else 5, "number_cells": len(rows)})
            store.array("cell_id", ids, {})
            store.array("cell_summary", summary.astype(np.float64), {"column_names": names})
            store.group("masks", {})
            for (key, label), spool in zip(labels.items(), self._masks, strict=True):
                label_of = np.zeros(len(sorted_ids) + 1, np.uint32)
                label_of[1:] = label[order]
                _write_mask(store, f"masks/{key}", spool, np.concatenate([[0], sorted_ids]), label_of)
                spool.remove()
            if self.version == 1:
                store.array("seg_mask_value", labels["1"], {})
            else:
                store.group("polygon_sets", {})
                for key, cells in {"0": with_nucleus, "1": np.arange(len(rows))}.items():
                    store.group(f"polygon_sets/{key}", {})
                    store.array(f"polygon_sets/{key}/cell_index", cells.astype(np.uint32), {})


def _write_mask(store: ZarrZip, path: str, spool: Spool, known: np.ndarray, label_of: np.ndarray) -> None:
    """Add a mask tile by tile, its numbers (`known`, ascending) replaced by labels."""
    store.header(path, spool.shape, (TIFF_TILE, TIFF_TILE), spool.dtype, {})
    for k, numbers in enumerate(spool.tiles()):
        if numbers.any():
            place = np.searchsorted(known, numbers)
            store.chunk(path, (k // spool.columns, k % spool.columns), label_of[place])


def _write_experiment(
    slide: Slide, folder: Path, name: str, version: int, files: list[str], n_cells: int, n_transcripts: int
) -> None:
    """`experiment.xenium`."""
    pixel = slide.parameters.pixel_size_um
    area = slide.canvas[0] * slide.canvas[1] * pixel**2
    kinds = ("morphology_focus_filepath", "morphology_mip_filepath")[: 2 if version == 1 else 1]
    panel = slide.expression
    document = {
        "major_version": 5 if version == 1 else version + 3,
        "minor_version": 0,
        "patch_version": 0,
        "run_name": "simulation",
        "run_start_time": "2024-01-01T00:00:00Z",
        "region_name": name,
        "preservation_method": "FFPE",
        "num_cells": n_cells,
        "transcripts_per_cell": n_transcripts / max(n_cells, 1),
        "transcripts_per_100um": 100.0 * n_transcripts / area,
        "cassette_name": name,
        "slide_id": f"{slide.number:07d}",
        "panel_design_id": "simulated",
        "panel_name": "Simulated panel",
        "panel_organism": "Mouse",
        "panel_tissue_type": "Liver",
        "panel_num_targets_predesigned": len(panel.genes) - panel.n_controls,
        "panel_num_targets_custom": 0,
        "pixel_size": pixel,
        "z_step_size": slide.calibration.z_step_um,
        "instrument_sn": "SIMULATED",
        "instrument_sw_version": VERSIONS[version].removeprefix("xenium-"),
        "analysis_sw_version": VERSIONS[version],
        "experiment_uuid": str(uuid.uuid5(uuid.NAMESPACE_URL, f"cellquilt-simulation/{name}")),
        "images": dict(zip(kinds, files, strict=False)),
        "xenium_explorer_files": {"cells_zarr_filepath": CELLS},
    }
    (folder / EXPERIMENT).write_text(json.dumps(document, indent=1) + "\n")
