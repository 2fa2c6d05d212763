"""Resolve Biosciences Molecular Cartography: a folder of regions, each a table of transcripts and its images.

``<id>_results.txt`` holds x, y (pixels), z (plane) and gene between tabs, without a header; ``<id>_<stain>.tiff`` are
the images. The last part of an id (``32800-1377_A2-1``) is the region's name.
"""

import re
from pathlib import Path

import numpy as np

from cellquilt.core.errors import CellquiltError
from cellquilt.core.transforms import GLOBAL, MICRONS, identity
from cellquilt.readers.base import PointsSource, Reader, Request, Slide
from cellquilt.readers.channels import (
    ChannelFile,
    choose_region,
    contents_of,
    natural_key,
    need_folder,
    open_tiff,
    same_size,
    stack_files,
    stem_of,
    tiff_files,
)
from cellquilt.readers.transcript_table import TranscriptTable

IMAGE, TRANSCRIPTS = "image", "transcripts"
_RESULTS = "_results.txt"
_COLUMNS = ("x", "y", "z_plane", "gene")


def open_molecular_cartography(request: Request) -> Slide:
    """Open a region of a folder; see `Reader`."""
    folder = need_folder(request, "Molecular Cartography", f"<id>{_RESULTS}")
    slide = Slide()
    ids = _ids(folder)
    if not ids:
        raise CellquiltError(
            "molecular-cartography-no-results",
            f"{request.source} has no <id>{_RESULTS}; {contents_of(folder)}",
            "complete the folder; for images alone use technology ome_tif",
        )
    name = _choose(request, ids, slide)
    paths = _images(folder, name, ids)
    if not paths:
        raise CellquiltError(
            "molecular-cartography-no-images",
            f"{request.source} has no {name}_<stain>.tiff; {contents_of(folder)}",
            "complete the folder; for transcripts alone use technology transcripts",
        )
    files = [ChannelFile(stain, open_tiff(request, path)) for stain, path in paths]
    slide.images[IMAGE] = stack_files(files, request, slide)
    same_size(files)
    _points(request, folder / f"{name}{_RESULTS}", slide)
    return slide


READER = Reader("molecular_cartography", "Molecular Cartography", open_molecular_cartography)


def _ids(folder: Path) -> list[str]:
    found = [path.name for path in folder.iterdir() if path.name.endswith(_RESULTS) and path.is_file()]
    return sorted(
        (name.removesuffix(_RESULTS) for name in found if not name.startswith(".") and name != _RESULTS),
        key=natural_key,
    )


def _choose(request: Request, ids: list[str], slide: Slide) -> str:
    """The id of the region that is asked for: by its whole id, or its last part where that is one region's."""
    last = [name.rpartition("_")[2] for name in ids]
    regions = [short if last.count(short) == 1 else name for short, name in zip(last, ids, strict=True)]
    given = request.settings["vendor_region"]
    if given in ids:
        given = regions[ids.index(given)]
    region = choose_region(given, regions, request, "regions")
    slide.facts["vendor_region"] = region
    return ids[regions.index(region)]


def _images(folder: Path, name: str, ids: list[str]) -> list[tuple[str, Path]]:
    """Stain and file of a region's images, DAPI first, then by name. Of ids that begin alike, the longest one's."""
    found = []
    for path in tiff_files(folder):
        stem = stem_of(path)
        owners = [other for other in ids if stem.startswith(f"{other}_")]
        if owners and max(owners, key=len) == name:
            found.append((stem[len(name) + 1 :], path))
    return sorted(found, key=lambda entry: (entry[0].upper() != "DAPI", natural_key(entry[0]), entry[1].name))


def _points(request: Request, results: Path, slide: Slide) -> None:
    settings = request.settings
    path = request.transcripts or results
    table = TranscriptTable(
        path,
        f"{request.source}/{path.name}" if path == results else path.name,
        x=settings["x_column"],
        y=settings["y_column"],
        z=settings["z_column"],
        gene=settings["gene_column"],
        header=() if request.transcripts else _header(path, f"{request.source}/{path.name}"),
    )
    to_um = slide.images[IMAGE].transforms[MICRONS]
    unit = None if request.transcripts and settings["transcripts_unit"] == "um" else to_um
    step = float(settings["z_step_um"])
    slide.points[TRANSCRIPTS] = PointsSource(
        {MICRONS: identity(), GLOBAL: np.linalg.inv(to_um)},
        lambda: table.batches(to_um=unit, z_step_um=step, min_qv=settings["min_qv"]),
        table.about_rows,
    )
    slide.inputs.append(path)
    slide.facts["z_step_um"] = step


def _header(path: Path, name: str) -> tuple[str, ...]:
    """Names of the columns; none where the file has a header of its own."""
    with path.open("rb") as file:
        line = file.readline(1 << 16).decode("utf-8-sig", errors="replace").rstrip("\r\n")
    fields = re.split(r"\t", line)
    if fields[0].strip() and not re.fullmatch(r"\s*[-+]?[0-9.]+(?:[eE][-+]?[0-9]+)?\s*", fields[0]):
        return ()
    if line and len(fields) < len(_COLUMNS):
        raise CellquiltError(
            "molecular-cartography-results",
            f"{name} has {len(fields)} columns between tabs, expected x, y, z and gene",
            "copy it again from the machine",
        )
    return _COLUMNS
