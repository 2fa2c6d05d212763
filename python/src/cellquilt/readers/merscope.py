"""Vizgen MERSCOPE: mosaics by stain and z-plane, transcripts in µm, the machine's own cells.

A region's folder holds ``images/mosaic_<stain>_z<plane>.tif``, ``images/micron_to_mosaic_pixel_transform.csv``,
``detected_transcripts.csv`` and, if the machine segmented, ``cell_boundaries.parquet`` (or, from before 2023,
``cell_boundaries/feature_data_<fov>.hdf5``).
"""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import shapely

from cellquilt.core.errors import CellquiltError
from cellquilt.core.log import LOG
from cellquilt.core.shapes import ShapesTable
from cellquilt.core.transforms import GLOBAL, MICRONS, Affine, identity
from cellquilt.readers.base import ImageSource, PointsSource, Reader, Request, Slide, choose_planes, project
from cellquilt.readers.channels import natural_key
from cellquilt.readers.tiff import TiffImage, unique_names
from cellquilt.readers.transcript_table import TranscriptTable

IMAGE, TRANSCRIPTS, CELLS = "morphology", "transcripts", "vendor_cells"
_TRANSFORM = "micron_to_mosaic_pixel_transform.csv"
_MOSAIC = re.compile(r"mosaic_(?P<stain>.+)_z(?P<z>\d+)\.tiff?", re.IGNORECASE)
_TABLES = ("detected_transcripts.parquet", "detected_transcripts.csv", "detected_transcripts.csv.gz")
_CELLS = ("cell_boundaries.parquet", "cellpose_micron_space.parquet")


def open_merscope(request: Request) -> Slide:
    """Open a region's folder; see `Reader`."""
    folder, source = request.path, request.source
    if not folder.is_dir():
        raise CellquiltError("merscope-no-folder", f"{source} is no folder", "name the region's folder")
    images = folder / "images"
    to_px = read_transform(images / _TRANSFORM, source)
    transforms = {GLOBAL: identity(), MICRONS: np.linalg.inv(to_px)}
    slide = Slide()
    mosaics = _mosaics(images, source)
    slide.images[IMAGE] = _image(request, mosaics, transforms, slide)
    step = float(request.settings["z_step_um"])
    table_path = request.transcripts or next((folder / name for name in _TABLES if (folder / name).is_file()), None)
    if table_path is None:
        raise CellquiltError(
            "merscope-no-transcripts",
            f"{source} has no {' or '.join(_TABLES)}",
            "complete the folder; for images alone use technology ome_tif",
        )
    settings = request.settings
    table = TranscriptTable(
        table_path,
        f"{source}/{table_path.name}",
        x=settings["x_column"] or "global_x",
        y=settings["y_column"] or "global_y",
        gene=settings["gene_column"] or "gene",
    )
    in_um = {MICRONS: identity(), GLOBAL: to_px}
    slide.points[TRANSCRIPTS] = PointsSource(
        in_um, lambda: table.batches(z_step_um=step, min_qv=settings["min_qv"]), table.about_rows
    )
    cells = next((folder / name for name in _CELLS if (folder / name).is_file()), None)
    hdf5 = sorted((folder / "cell_boundaries").glob("*.hdf5"), key=lambda path: natural_key(path.name))
    if cells is not None:
        slide.shapes[CELLS] = lambda: _parquet_cells(cells, f"{source}/{cells.name}", in_um)
    elif hdf5:
        slide.shapes[CELLS] = lambda: _hdf5_cells(hdf5, source, in_um)
    slide.inputs += [images / _TRANSFORM, table_path, *([cells] if cells else hdf5)]
    slide.facts["z_step_um"] = step
    return slide


READER = Reader("merscope", "MERSCOPE", open_merscope)


def read_transform(path: Path, source: str) -> Affine:
    """The map from microns to mosaic pixels.

    Parameters
    ----------
    path
        Three lines of three numbers, separated by blanks or commas.
    source
        The slide's name for messages.

    Returns
    -------
    numpy.ndarray
        (3, 3) affine map; rotation, flips and different scales of x and y are allowed.

    Raises
    ------
    CellquiltError
        ``merscope-no-transform``, ``transform-invalid``.
    """
    name = f"{source}/images/{path.name}"
    hint = "it must be the 3 × 3 matrix from microns to pixels that the machine wrote"
    if not path.is_file():
        raise CellquiltError("merscope-no-transform", f"{name} does not exist", hint)
    try:
        rows = [re.split(r"[,;\s]+", line.strip()) for line in path.read_text().splitlines() if line.strip()]
        matrix = np.array([[float(value) for value in row] for row in rows])
    except (ValueError, UnicodeDecodeError) as error:
        raise CellquiltError("transform-invalid", f"{name} is no matrix of numbers: {error}", hint) from error
    problem = ""
    if matrix.shape != (3, 3):
        problem = f"has the shape {' × '.join(map(str, matrix.shape))}"
    elif not np.isfinite(matrix).all():
        problem = "has values that are not finite"
    elif not np.allclose(matrix[2], [0, 0, 1], atol=1e-9):
        problem = f"has the last line {matrix[2].tolist()} instead of 0 0 1"
    elif abs(np.linalg.det(matrix)) < 1e-12:
        problem = "is singular"
    if problem:
        raise CellquiltError("transform-invalid", f"{name} {problem}", hint)
    return matrix


def _mosaics(images: Path, source: str) -> dict[str, dict[int, Path]]:
    """Stain → plane → file; DAPI first, then by name, whatever the order in the folder."""
    found: dict[str, dict[int, Path]] = {}
    for path in sorted(images.iterdir(), key=lambda path: path.name) if images.is_dir() else []:
        match = _MOSAIC.fullmatch(path.name)
        if match:
            found.setdefault(match["stain"], {})[int(match["z"])] = path
    if not found:
        raise CellquiltError(
            "merscope-no-images", f"{source}/images has no mosaic_<stain>_z<plane>.tif", "complete the folder"
        )
    stains = sorted(found, key=lambda stain: (stain.upper() != "DAPI", natural_key(stain)))
    return {stain: dict(sorted(found[stain].items())) for stain in stains}


def _image(
    request: Request, mosaics: dict[str, dict[int, Path]], transforms: dict[str, Affine], slide: Slide
) -> ImageSource:
    source, how = request.source, str(request.settings["z"])
    everywhere = sorted({plane for planes in mosaics.values() for plane in planes})
    chosen = choose_planes(how, everywhere, source)
    for stain, planes in mosaics.items():
        missing = [plane for plane in chosen if plane not in planes]
        if missing:
            raise CellquiltError(
                "merscope-planes-missing",
                f"{source} has no plane {', '.join(map(str, missing))} of stain {stain}; other stains have",
                "complete the folder, or choose a plane that all stains have with z",
            )
    memory = int(request.settings["memory_mb"]) // (len(mosaics) * len(chosen))
    files = [
        [_open_mosaic(request, planes[plane], memory) for plane in chosen] for planes in mosaics.values()
    ]  # by stain, by plane
    first = files[0][0]
    for file in [file for stain in files for file in stain]:
        if file.shape != first.shape or file.dtype != first.dtype:
            raise CellquiltError(
                "merscope-mosaics-differ",
                f"{file.name} has {file.shape[2]} × {file.shape[3]} pixels of {file.dtype}, {first.name} "
                f"{first.shape[2]} × {first.shape[3]} of {first.dtype}",
                "all mosaics of a region must be alike",
            )
    slide.inputs += [planes[plane] for planes in mosaics.values() for plane in chosen]
    slide.facts.update({"z": how, "z_planes": chosen, "stains": list(mosaics)})

    def read(channel: int, y0: int, y1: int, x0: int, x1: int) -> np.ndarray:
        stack = files[channel]
        return project(lambda k: stack[k].read(0, 0, y0, y1, x0, x1), range(len(stack)), how)

    return ImageSource(
        (len(mosaics), first.shape[2], first.shape[3]),
        first.dtype,
        list(mosaics),
        transforms,
        first.window_px,
        read,
    )


def _open_mosaic(request: Request, path: Path, memory_mb: int) -> TiffImage:
    file = request.resources.enter_context(
        TiffImage(path, f"{request.source}/images/{path.name}", memory_mb=max(memory_mb, 50))
    )
    if file.shape[:2] != (1, 1):
        raise CellquiltError(
            "merscope-mosaic-channels",
            f"{file.name} holds {file.shape[0]} channels and {file.shape[1]} planes, one of each expected",
            "name one file a stain and plane",
        )
    return file


def _shapes(
    ids: list[str], planes: np.ndarray, geometry: np.ndarray, name: str, transforms: dict[str, Affine]
) -> ShapesTable:
    """Vendor cells of all planes; a cell that is on several gets ``<id>_z<plane>`` on each."""
    there = np.array([shape is not None and not shape.is_empty for shape in geometry], dtype=bool)
    if not there.all():
        LOG.warning("%s: %d of %d cells have no outline and are left out", name, (~there).sum(), len(there))
    entity = np.asarray(ids, dtype=str)[there]
    planes, geometry = planes[there].astype(np.int32), geometry[there]
    _, inverse, counts = np.unique(entity, return_inverse=True, return_counts=True)
    several = counts[inverse] > 1 if len(entity) else np.zeros(0, dtype=bool)
    final = [f"{one}_z{z}" if many else str(one) for one, z, many in zip(entity, planes, several, strict=True)]
    return ShapesTable(
        np.asarray(unique_names(final), dtype=str),
        geometry,
        {"entity_id": entity, "z_plane": planes},
        transforms,
        {"source": name, "n_without_outline": int((~there).sum())},
    )


def _parquet_cells(path: Path, name: str, transforms: dict[str, Affine]) -> ShapesTable:
    hint = "give the file as the machine wrote it, or leave it out of the folder"
    try:
        names = pq.read_schema(path).names
    except (pa.ArrowInvalid, OSError) as error:
        raise CellquiltError("merscope-cells-unreadable", f"{name} cannot be read: {error}", hint) from error
    missing = [column for column in ("EntityID", "ZIndex", "Geometry") if column not in names]
    if missing:
        raise CellquiltError(
            "merscope-cells-unreadable", f"{name} has no column {missing[0]}; columns: {', '.join(names)}", hint
        )
    try:
        table = pq.read_table(path, columns=["EntityID", "ZIndex", "Geometry"])
        geometry = shapely.from_wkb(table.column("Geometry").to_numpy(zero_copy_only=False))
    except (pa.ArrowInvalid, OSError, shapely.errors.GEOSException, TypeError) as error:
        raise CellquiltError("merscope-cells-unreadable", f"{name} cannot be read: {error}", hint) from error
    ids = [str(value) for value in table.column("EntityID").to_pylist()]
    planes = table.column("ZIndex").to_numpy(zero_copy_only=False)
    return _shapes(ids, planes, np.asarray(geometry, dtype=object), name, transforms)


def _hdf5_cells(paths: list[Path], source: str, transforms: dict[str, Affine]) -> ShapesTable:
    name = f"{source}/cell_boundaries"
    rows = [row for path in paths for row in _hdf5_rows(path, f"{name}/{path.name}")]
    geometry = np.empty(len(rows), dtype=object)
    geometry[:] = [shape for _, _, shape in rows]
    return _shapes([row[0] for row in rows], np.array([row[1] for row in rows], np.int64), geometry, name, transforms)


def _hdf5_rows(path: Path, name: str) -> Iterator[tuple[str, int, shapely.Geometry]]:
    """(id, plane, polygon) of one field of view: a group a cell, in it a group a plane, in it the parts."""
    try:
        import h5py
    except ImportError as error:
        raise CellquiltError("package-missing", f"{name} needs the package h5py", "install cellquilt[sdata]") from error
    try:
        with h5py.File(path) as file:
            cells = file.get("featuredata", {})
            for cell in sorted(cells):
                planes = sorted((key for key in cells[cell] if re.fullmatch(r"zIndex_\d+", key)), key=natural_key)
                for key in planes:
                    parts = cells[cell][key]
                    rings = [np.asarray(parts[part]["coordinates"])[0] for part in sorted(parts, key=natural_key)]
                    polygons = [shapely.Polygon(ring[:, :2]) for ring in rings if len(ring) >= 3]
                    if polygons:
                        shape = polygons[0] if len(polygons) == 1 else shapely.union_all(polygons)
                        yield cell, int(key.removeprefix("zIndex_")), shape
    except (OSError, KeyError, IndexError, ValueError) as error:
        raise CellquiltError(
            "merscope-cells-unreadable", f"{name} cannot be read: {error}", "copy it again from the machine"
        ) from error
