"""Cells as QuPath's own GeoJSON: a cell object each, with nucleus, measurements and class, in pixels of the image.

QuPath (from 0.4 on) reads the file by *File › Import objects from file*, and writes the like.
"""

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from cellquilt.core.parquet import arrow_array
from cellquilt.core.transforms import GLOBAL, Affine
from cellquilt.formats.cells import TABLE, FeatureWriter, SlideCells, texts
from cellquilt.geometry.geojson import geometry_json, joined, string_json
from cellquilt.geometry.polygonize import simple_rings

FILE = "cells.geojson"
#: Colours of classes in turn (Okabe and Ito's palette, which colour-blind people can tell apart).
_COLOURS = (
    *([86, 180, 233], [230, 159, 0], [0, 158, 115], [204, 121, 167]),
    *([0, 114, 178], [213, 94, 0], [240, 228, 66], [130, 130, 130]),
)
_PASSES, _FAILS = "Cell", "Cell: failed QC"


def write_qupath(cells: SlideCells, folder: Path) -> None:
    """Write ``cells.geojson``.

    Parameters
    ----------
    cells
        The slide's cells. Their table, if there is one, gives measurements and classes.
    folder
        Folder to write to.
    """
    write_features(cells, folder / FILE, GLOBAL, _Properties(cells), simple=False)


def write_features(
    cells: SlideCells, path: Path, system: str, properties: "_Properties | None", *, simple: bool
) -> None:
    """Write cells with their nuclei as a FeatureCollection of QuPath's.

    Parameters
    ----------
    cells
        The slide's cells; those without an outline are left out.
    path
        File to write.
    system
        Coordinate system of the file.
    properties
        What else to say of each cell; None says nothing.
    simple
        Write only the largest part of an outline, and without holes.
    """
    matrix = cells.map_of(system)
    of_nuclei: Affine | None = None if cells.nuclei is None else cells.map_of(system, cells.nuclei)
    with FeatureWriter(path) as writer:
        for rows, rings in cells.parts(matrix):
            whole = np.flatnonzero(rings.n_parts() > 0)
            rows, rings = rows[whole], rings if whole.size == rows.size else rings.take(whole)
            there, nuclei = np.zeros(rows.size, dtype=bool), None
            if of_nuclei is not None:
                there, nuclei = cells.nuclei_of(rows, of_nuclei)
            if simple:
                rings, nuclei = simple_rings(rings), None if nuclei is None else simple_rings(nuclei)
            nucleus: pa.Array = pa.nulls(rows.size, pa.string())
            if nuclei is not None and there.any():
                found = joined(',"nucleusGeometry":', geometry_json(nuclei))
                place = np.where(there, np.cumsum(there) - 1, 0)
                nucleus = pc.if_else(arrow_array(there), found.take(arrow_array(place)), "")
            said = properties.of(rows) if properties is not None else ""
            names = cells.ids.take(arrow_array(rows))
            head = joined('{"type":"Feature","id":"', _uuids(cells.store.name, cells.numbers[rows]), '"')
            shape = joined(',"geometry":', geometry_json(rings), pc.fill_null(nucleus, ""))
            rest = joined(',"properties":{"objectType":"cell","name":', string_json(names), said, "}}")
            writer.write(joined(head, shape, rest))


def _uuids(sample: str, numbers: NDArray[np.int64]) -> pa.Array:
    """(n,) string, an id for each cell as QuPath has them (UUID, version 8): of the sample's name and the number."""
    octets = np.empty((numbers.size, 16), dtype=np.uint8)
    octets[:, :8] = np.frombuffer(hashlib.sha256(sample.encode()).digest()[:8], np.uint8)
    octets[:, 8:] = numbers.astype(">u8").view(np.uint8).reshape(-1, 8)
    octets[:, 6] = octets[:, 6] & 0x0F | 0x80
    octets[:, 8] = 0x80
    digits = np.frombuffer(b"0123456789abcdef", np.uint8)
    text = np.full((numbers.size, 36), ord("-"), dtype=np.uint8)
    places = np.delete(np.arange(36), [8, 13, 18, 23])
    text[:, places[::2]], text[:, places[1::2]] = digits[octets >> 4], digits[octets & 15]
    ends = np.arange(numbers.size + 1, dtype=np.int32) * 36
    return pa.Array.from_buffers(pa.string(), numbers.size, [None, pa.py_buffer(ends), pa.py_buffer(text)])


class _Properties:
    """Measurements and class of cells, from their table."""

    def __init__(self, cells: SlideCells) -> None:
        from cellquilt.core.transforms import MICRONS, length_scale
        from cellquilt.report.cells import read_cells
        from cellquilt.report.view import View

        self._class: tuple[NDArray[np.int64], list[str]] | None = None
        self._measured: dict[str, NDArray] = {}
        if MICRONS in cells.outlines.transforms:
            scale = length_scale(cells.outlines.transforms[MICRONS])
            self._measured["Area µm^2"] = cells.outlines.traits.areas * scale**2
        if not cells.store.has("tables", TABLE):
            return
        known = read_cells(View([cells.store.path]))
        row = cells.rows_of(pa.array(known.ids.tolist(), pa.string()))
        order = np.full(len(cells), -1, dtype=np.int64)
        order[row[row >= 0]] = np.flatnonzero(row >= 0)
        there = order >= 0

        def by_cell(values: NDArray) -> NDArray:
            out = np.full(len(cells), np.nan)
            out[there] = np.asarray(values, dtype=np.float64)[order[there]]
            return out

        if known.has_counts:
            self._measured["Transcripts"] = by_cell(known.transcripts)
            self._measured["Genes"] = by_cell(known.genes)
        if known.intensities is not None:
            for channel in known.intensities.columns:
                self._measured[f"{channel}: Mean"] = by_cell(known.intensities[channel].to_numpy())
        codes, names = _classes(cells, known.passes_qc)
        self._class = (np.where(there, codes[np.maximum(order, 0)], len(names)), names)

    def of(self, rows: NDArray[np.int64]) -> pa.Array:
        """(n,) string, what follows the name in the properties of some cells."""
        parts = []
        for name, values in self._measured.items():
            here = values[rows]
            # JSON knows no NaN: what was not measured is left out.
            number = texts(np.round(np.where(np.isfinite(here), here, 0.0), 4) + 0.0)
            key = string_json(pa.array([name]))[0].as_py()
            entry = joined(f"{key}:", number)
            parts.append(pc.if_else(arrow_array(np.isfinite(here)), entry, pa.scalar(None, pa.string())))
        said = pa.repeat(pa.scalar("", pa.string()), rows.size)
        if parts:
            listed = pc.binary_join_element_wise(*parts, ",", null_handling="skip")
            said = joined(',"measurements":{', listed, "}")
        if self._class is not None:
            codes, names = self._class
            texts_of = [
                f',"classification":{{"name":{string_json(pa.array([name]))[0].as_py()},'
                f'"color":{_COLOURS[k % len(_COLOURS)]}}}'
                for k, name in enumerate(names)
            ]
            chosen = pa.array([*texts_of, ""], pa.string()).take(arrow_array(codes[rows]))
            said = joined(chosen, said)
        return said


def _classes(cells: SlideCells, passes: NDArray[np.bool_]) -> tuple[NDArray[np.int64], list[str]]:
    """Class of each row of the table, (n,) int64, and the classes' names: cell types if known, else whether it passes.

    Cells without a type have the number after the last.
    """
    import zarr
    from anndata.io import read_elem

    obs = zarr.open_group(str(cells.store.element("tables", TABLE)), mode="r")["obs"]
    if "cell_type" not in obs:  # type: ignore[operator]
        return np.where(passes, 0, 1), [_PASSES, _FAILS]
    import pandas as pd

    codes, names = pd.factorize(pd.Series(read_elem(obs["cell_type"])), sort=True)  # type: ignore[index]
    return np.where(codes < 0, len(names), codes), [str(name) for name in names]
