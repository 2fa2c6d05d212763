"""The format's own rules, checked on a folder: do all files say the same of cells, genes and transcripts?"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellquilt.core.errors import CellquiltError, SeveralErrors
from cellquilt.core.xenium import ANALYSIS, CELLS, EXPERIMENT, IMAGE, MATRIX, SUMMARY, TRANSCRIPTS
from cellquilt.core.zarr_zip import ZarrZipFile

_PER_TILE = {
    "valid": ("uint8", 1), "status": ("uint8", 1), "location": ("float32", 3), "gene_identity": ("uint16", 1),
    "quality_score": ("float32", 1), "codeword_identity": ("uint16", 2), "uuid": ("uint32", 2), "id": ("uint32", 2),
}  # fmt: skip
#: Tiles of a level that are read, spread over it; all are counted.
_READ_TILES = 32


def validate(folder: Path | str, *, partial: bool = False) -> dict[str, int]:
    """Check an Explorer folder.

    Parameters
    ----------
    folder
        The folder with ``experiment.xenium``.
    partial
        Files may be missing: the folder is not written whole yet.

    Returns
    -------
    dict
        What was found: cells, nuclei, features, transcripts, groupings, channels, levels of image and transcripts.

    Raises
    ------
    CellquiltError
        ``explorer-invalid`` with every rule that is broken; ``explorer-no-folder``.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CellquiltError("explorer-no-folder", f"{folder} is no folder", "name the folder with experiment.xenium")
    check = _Check(folder, partial)
    for step in (check.cells, check.matrix, check.groups, check.transcripts, check.image, check.manifest):
        try:
            check.broken.extend(step())
        except CellquiltError:
            raise
        except Exception as error:  # whatever zarr, zipfile and tifffile raise on damaged files
            check.broken.append(f"{check.reading} cannot be read: {type(error).__name__}: {error}")
    if check.broken:
        errors = [CellquiltError("explorer-invalid", text) for text in check.broken]
        raise SeveralErrors("explorer-invalid", f"{folder} breaks rules of the viewer's format", errors)
    return check.found


class _Check:
    """The rules, file by file; each yields what is broken."""

    def __init__(self, folder: Path, partial: bool) -> None:
        self.folder, self.partial = folder, partial
        self.reading = ""
        self.found: dict[str, int] = {}
        self.broken: list[str] = []
        self._numbers: NDArray | None = None
        self._size: tuple[int, int] | None = None
        self._pixel_um: float | None = None

    def _open(self, name: str) -> ZarrZipFile | None:
        self.reading = name
        return ZarrZipFile(self.folder / name) if (self.folder / name).exists() else None

    def cells(self) -> Iterator[str]:
        root = self._open(CELLS)
        if root is None:
            return
        attrs, numbers, summary = root.attributes(), root.array("cell_id"), root.array("cell_summary")
        n = len(numbers)
        self._numbers, self.found["cells"] = numbers, n
        if attrs["number_cells"] != n:
            yield f"{CELLS}: number_cells is {attrs['number_cells']}, there are {n}"
        if len(np.unique(numbers, axis=0)) != n:
            yield f"{CELLS}: cell_id holds a number twice"
        if list(root.attributes("cell_summary")["column_names"]) != list(SUMMARY) or summary.shape != (n, len(SUMMARY)):
            yield f"{CELLS}: cell_summary has the shape {summary.shape}, ({n}, {len(SUMMARY)}) was expected"
            return
        if (summary[:, 2] < 0).any() or (summary[:, 5] < 0).any():
            yield f"{CELLS}: cell_summary holds an area below 0"
        for key, name in enumerate(attrs["polygon_set_names"]):
            parts = ("cell_index", "vertices", "num_vertices", "method")
            cell, vertices, n_vertices, method = (root.array(f"polygon_sets/{key}/{part}") for part in parts)
            self.found["nuclei" if name == "nucleus" else f"{name}_polygons"] = len(cell)
            if not len(cell) == len(vertices) == len(n_vertices) == len(method):
                yield f"{CELLS}: the arrays of polygon_sets/{key} ({name}) are not of one length"
                continue
            if (cell >= n).any():
                yield f"{CELLS}: polygon_sets/{key} names cell {cell.max()} of {n}"
                continue
            if name == "cell" and len(np.unique(cell)) != len(cell):
                yield f"{CELLS}: polygon_sets/{key} has two outlines of one cell"
            wide = vertices.shape[1] // 2 if vertices.ndim == 2 else 0
            if vertices.shape[1] % 2 or (len(cell) and not ((n_vertices >= 4) & (n_vertices <= wide)).all()):
                yield f"{CELLS}: polygon_sets/{key} has polygons of {n_vertices.min()} to {n_vertices.max()} corners"
                continue
            corners = vertices.reshape(len(cell), wide, 2).astype(np.float64)
            if not np.isfinite(corners).all():
                yield f"{CELLS}: polygon_sets/{key} has corners that are no numbers"
            last = corners[np.arange(len(cell)), n_vertices - 1]
            if (last != corners[:, 0]).any():
                yield f"{CELLS}: polygon_sets/{key} has a polygon that is not closed"
            count = np.bincount(cell, minlength=n)
            if name == "nucleus" and (count > summary[:, 7]).any():
                yield f"{CELLS}: there are more nuclei of a cell than cell_summary says"

    def matrix(self) -> Iterator[str]:
        root = self._open(MATRIX)
        if root is None:
            return
        attrs, numbers = root.attributes("cell_features"), root.array("cell_features/cell_id")
        n, starts = len(numbers), root.array("cell_features/indptr").astype(np.int64)
        names = attrs["feature_keys"]
        self.found["features"] = len(names)
        if not len(names) == len(attrs["feature_ids"]) == len(attrs["feature_types"]) == attrs["number_features"]:
            yield f"{MATRIX}: names, ids and types of features are not {attrs['number_features']} each"
        if len(starts) != len(names) + 1 or starts[0] != 0 or (np.diff(starts) < 0).any():
            yield f"{MATRIX}: indptr does not fit {len(names)} features"
            return
        indices, (data, _) = root.array("cell_features/indices"), root.header("cell_features/data")
        if not data[0] == len(indices) == starts[-1]:
            yield f"{MATRIX}: {data[0]} values, {starts[-1]} announced"
            return
        if len(indices) and indices.max() >= n:
            yield f"{MATRIX}: an index names cell {indices.max()} of {n}"
        if attrs["number_cells"] != n:
            yield f"{MATRIX}: number_cells is {attrs['number_cells']}, there are {n}"
        if self._numbers is not None and not np.array_equal(self._numbers, numbers):
            yield f"{MATRIX}: its cells are others than those of {CELLS}"

    def groups(self) -> Iterator[str]:
        root = self._open(ANALYSIS)
        if root is None:
            return
        attrs = root.attributes("cell_groups")
        names, n_groupings = attrs["group_names"], attrs["number_groupings"]
        self.found["groupings"] = n_groupings
        if not len(names) == len(attrs["grouping_names"]) == n_groupings:
            yield f"{ANALYSIS}: number_groupings is {n_groupings}, {len(names)} are named"
            return
        for k, name in enumerate(attrs["grouping_names"]):
            indices = root.array(f"cell_groups/{k}/indices")
            starts = root.array(f"cell_groups/{k}/indptr").astype(np.int64)
            if len(starts) != len(names[k]) or (np.diff(starts) < 0).any() or (len(starts) and starts[0] != 0):
                yield f"{ANALYSIS}: {name} has {len(names[k])} groups and {len(starts)} starts"
            n = len(indices) if self._numbers is None else len(self._numbers)
            if not np.array_equal(np.sort(indices), np.arange(n)):
                yield f"{ANALYSIS}: {name} has {len(indices)} cells in groups; each of {n} must be in one"

    def transcripts(self) -> Iterator[str]:
        root = self._open(TRANSCRIPTS)
        if root is None:
            return
        attrs, grids = root.attributes(), root.attributes("grids")
        n_genes = attrs["number_genes"]
        self.found["transcripts"], self.found["transcript_levels"] = attrs["number_rnas"], grids["number_levels"]
        if (
            not len(attrs["gene_names"])
            == len(attrs["codeword_gene_mapping"])
            == n_genes
            == len(attrs["gene_index_map"])
        ):
            yield f"{TRANSCRIPTS}: number_genes is {n_genes}, {len(attrs['gene_names'])} are named"
        if len(grids["grid_keys"]) != grids["number_levels"]:
            yield f"{TRANSCRIPTS}: {grids['number_levels']} levels announced, {len(grids['grid_keys'])} listed"
            return
        if sum(grids["grid_number_objects"][0]) != attrs["number_rnas"]:
            listed = sum(grids["grid_number_objects"][0])
            yield f"{TRANSCRIPTS}: number_rnas is {attrs['number_rnas']}, the tiles of level 0 list {listed}"
        size = float(grids["grid_size"][0])
        for level, (keys, counts) in enumerate(zip(grids["grid_keys"], grids["grid_number_objects"], strict=True)):
            if len(keys) != len(counts) or len(set(keys)) != len(keys):
                yield f"{TRANSCRIPTS}: level {level} lists {len(keys)} tiles and {len(counts)} numbers"
                continue
            step = max(len(keys) // _READ_TILES, 1)
            for key, n in list(zip(keys, counts, strict=True))[::step]:
                yield from self._tile(root, f"grids/{level}/{key}", n, n_genes)
                place = root.array(f"grids/{level}/{key}/location")[:, :2] / (size * 2**level)
                corner = np.array([int(part) for part in key.split(",")])
                if ((place < corner - 1e-4) | (place > corner + 1 + 1e-4)).any():
                    yield f"{TRANSCRIPTS}: grids/{level}/{key} holds a transcript that lies elsewhere"
        starts = root.array("density/gene/indptr")
        (data, _), (indices, _) = (root.header(f"density/gene/{part}") for part in ("data", "indices"))
        if len(starts) != n_genes * root.attributes("density/gene")["rows"] + 1:
            yield f"{TRANSCRIPTS}: density/gene/indptr has {len(starts)} values"
        elif not int(starts[-1]) == data[0] == indices[0]:
            yield f"{TRANSCRIPTS}: density/gene announces {int(starts[-1])} values"
        if root.header("gene_category")[0][0] != n_genes:
            yield f"{TRANSCRIPTS}: gene_category is of {root.header('gene_category')[0][0]} genes"

    @staticmethod
    def _tile(root: ZarrZipFile, name: str, n: int, n_genes: int) -> Iterator[str]:
        for part, (kind, wide) in _PER_TILE.items():
            shape, dtype = root.header(f"{name}/{part}")
            if shape != (n, wide) or dtype != np.dtype(kind):
                yield f"{TRANSCRIPTS}: {name}/{part} is {dtype} {shape}, {kind} ({n}, {wide}) was expected"
        if n and int(root.array(f"{name}/gene_identity").max()) >= n_genes:
            yield f"{TRANSCRIPTS}: {name} names a gene that there is not"

    def image(self) -> Iterator[str]:
        from xml.etree import ElementTree

        import tifffile

        self.reading = IMAGE
        if not (self.folder / IMAGE).exists():
            return
        with tifffile.TiffFile(self.folder / IMAGE) as tiff:
            root = ElementTree.fromstring(tiff.ome_metadata or "<none/>")
            pixels = next((element for element in root.iter() if element.tag.endswith("}Pixels")), None)
            if pixels is None:
                yield f"{IMAGE}: has no OME-XML"
                return
            series = tiff.series[0]
            names = [element for element in pixels if element.tag.endswith("}Channel")]
            self.found["channels"], self.found["image_levels"] = len(names), len(series.levels)
            self._pixel_um = float(pixels.get("PhysicalSizeX", "nan"))
            shape = series.shape if len(series.shape) == 3 else (1, *series.shape)
            self._size = (int(shape[-2]), int(shape[-1]))
            if len(names) != shape[0]:
                yield f"{IMAGE}: {shape[0]} planes, {len(names)} channels named"
            for level, at in enumerate(series.levels):
                page: Any = at.pages[0]
                wanted = (self._size[0] >> level, self._size[1] >> level)
                if (page.imagelength, page.imagewidth) != wanted:
                    yield f"{IMAGE}: level {level} has {page.imagelength} × {page.imagewidth} pixels, not {wanted}"
                if not page.is_tiled:
                    yield f"{IMAGE}: level {level} has no tiles"
                x = page.tags["XResolution"].value
                um = 1e4 * x[1] / x[0]
                right = self._pixel_um * 2**level
                if abs(um / right - 1) > 1e-3:
                    yield f"{IMAGE}: level {level} says that a pixel is {um:.5g} µm wide, not {right:.5g}"

    def manifest(self) -> Iterator[str]:
        self.reading = EXPERIMENT
        path = self.folder / EXPERIMENT
        if not path.exists():
            if not self.partial:
                yield f"there is no {EXPERIMENT}"
            return
        document = json.loads(path.read_text(encoding="utf-8"))
        named = {**document["images"], **document["xenium_explorer_files"]}
        for key, name in named.items():
            if not (self.folder / name).exists():
                yield f"{EXPERIMENT}: {key} is {name}, which is not there"
        if not self.partial and "morphology_filepath" not in document["images"]:
            yield f"{EXPERIMENT}: names no image"
        if self._pixel_um is not None and abs(document["pixel_size"] / self._pixel_um - 1) > 1e-6:
            yield f"{EXPERIMENT}: pixel_size is {document['pixel_size']}, that of {IMAGE} {self._pixel_um}"
        if self._numbers is not None and document["num_cells"] != len(self._numbers):
            yield f"{EXPERIMENT}: num_cells is {document['num_cells']}, {CELLS} has {len(self._numbers)}"
