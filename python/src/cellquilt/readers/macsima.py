"""Miltenyi MACSima: a folder of TIFFs, one a stain and cycle, registered to each other.

What a file shows stands in the annotations of its OME-XML (software 0 and 1 use different names), and in its name, as
``C-001_S-000_S_FITC_R-01_W-B-1_ROI-01_A-CD3_C-REA1151.tif``: cycle, scan type (S stain, B and AFB bleached, AF
autofluorescence), fluorochrome, well, region, antigen, clone. Channels are in the order of cycles, then of names.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from cellquilt.core.errors import CellquiltError
from cellquilt.readers.base import Reader, Request, Slide
from cellquilt.readers.channels import (
    ChannelFile,
    choose_region,
    need_folder,
    no_images,
    open_tiff,
    refuse_transcripts,
    some,
    stack_files,
    tiff_files,
    warn,
)
from cellquilt.readers.tiff import TiffImage

IMAGE = "image"
_ANTIGEN = re.compile(r"_A-(?P<name>.+?)(?:_C-.*)?$")
_CYCLE = re.compile(r"(?:(?:^|_)C(?:YC)?-|^)([0-9]{1,4})_")
_SCAN = re.compile(r"_(?:ST-)?(S|B|AFB?)_")
_FLUOR = re.compile(r"_(?:S|B|AFB?)_([^_]+)_R-")
_FIELD = re.compile(r"_F-([0-9]+)_")
_WELL = re.compile(r"_W-([A-Za-z]+-?\d+)_")
_ROI = re.compile(r"_ROI-?(\d+)")
#: What a scan of bleached tissue is called, before and after the first stain.
_BLEACHED = ("B", "AFB", "BleachCycle")
_NO_ANTIGEN = "None"
_LAST = 1 << 30  # cycle of files that have none


@dataclass
class _Stain:
    """What a file shows. `known` tells whether the machine says so, or only the OME-XML's channel."""

    path: Path
    image: TiffImage
    name: str
    cycle: int
    well: str
    roi: str
    position: tuple[float, float] | None
    known: bool

    @property
    def region(self) -> str:
        return "_".join(part for part in (self.well, f"ROI-{self.roi}" if self.roi else "") if part)


def open_macsima(request: Request) -> Slide:
    """Open an experiment's folder; see `Reader`."""
    refuse_transcripts(request, "MACSima")
    folder = need_folder(request, "MACSima", "its TIFFs")
    paths = tiff_files(folder, below=True)
    if not paths:
        raise no_images(request, "*.tif or *.tiff", "name the folder of processed images")
    _refuse_fields(request, paths)
    stains = [_stain(path, open_tiff(request, path)) for path in paths]
    slide = Slide()
    known = [stain for stain in stains if stain.known]
    if known and len(known) < len(stains):
        others = [stain.path.relative_to(folder).as_posix() for stain in stains if not stain.known]
        warn(slide, f"{request.source}: left out, for nothing says which stain they show: {some(others)}")
    stains = known or stains
    nameless = [stain.path.relative_to(folder).as_posix() for stain in stains if not stain.name]
    if nameless:
        raise CellquiltError(
            "macsima-names-unknown",
            f"{request.source}: neither the OME-XML nor the name says which stain it is: {some(nameless)}",
            "names look like C-001_S-000_S_FITC_R-01_W-B-1_ROI-01_A-CD3_C-REA1151.tif; of any other folder of "
            "TIFFs make one OME-TIFF",
        )
    stains = _of_region(stains, request, slide)
    stains.sort(key=lambda stain: (stain.cycle, stain.name, stain.path.as_posix()))
    offsets = _offsets(stains, slide, request.source)
    files = [ChannelFile(stain.name, stain.image, offset) for stain, offset in zip(stains, offsets, strict=True)]
    slide.images[IMAGE] = stack_files(files, request, slide)
    slide.facts["cycles"] = [stain.cycle if stain.cycle != _LAST else None for stain in stains]
    return slide


READER = Reader("macsima", "MACSima", open_macsima)


def _refuse_fields(request: Request, paths: list[Path]) -> None:
    fields = {found[1] for path in paths if (found := _FIELD.search(path.name))}
    if len(fields) > 1:
        raise CellquiltError(
            "macsima-raw",
            f"{request.source} holds {len(fields)} fields of view, such as {paths[0].name}",
            "these are raw images: name the folder of processed ones, where each file is a whole region",
        )


def _of_region(stains: list[_Stain], request: Request, slide: Slide) -> list[_Stain]:
    regions = sorted({stain.region for stain in stains if stain.region})
    given = request.settings["vendor_region"]
    if len(regions) < 2 and given is None:
        return stains
    region = choose_region(given, regions, request, "regions")
    slide.facts["vendor_region"] = region
    homeless = [stain.path.name for stain in stains if not stain.region]
    if homeless:
        warn(slide, f"{request.source}: left out, for nothing says which region they show: {some(homeless)}")
    return [stain for stain in stains if stain.region == region]


def _offsets(stains: list[_Stain], slide: Slide, source: str) -> list[tuple[int, int]]:
    """Where files lie that are not of one size: by their positions in pixels, or all at the corner."""
    if len({stain.image.shape[2:] for stain in stains}) == 1:
        return [(0, 0)] * len(stains)
    positions = [stain.position or (0.0, 0.0) for stain in stains]
    top, left = min(y for y, _ in positions), min(x for _, x in positions)
    offsets = [(round(y - top), round(x - left)) for y, x in positions]
    largest = max(max(offset) for offset in offsets)
    sides = max(max(stain.image.shape[2:]) for stain in stains)
    if largest > sides:
        raise CellquiltError(
            "machine-images-differ",
            f"{source}: by their OME-XML, images lie {largest} pixels apart and are at most {sides} pixels wide",
            "all channels of a slide must show the same place; remove what is not part of it",
        )
    warn(slide, f"{source}: images are not of one size; where one does not reach, it is 0")
    return offsets


# --- what a file says


def _stain(path: Path, image: TiffImage) -> _Stain:
    stem = re.sub(r"(?:\.ome)?\.tiff?$", "", path.name, flags=re.IGNORECASE)
    root = _parse(image.description)
    notes = dict(_annotations(root)) if root is not None else {}
    name = notes.get("Biomarker") or notes.get("Dye") or notes.get("Reagent", "").partition("__")[0]
    antigen = _ANTIGEN.search(stem)
    known = bool(name or antigen)
    if not name:
        name = antigen["name"] if antigen else _channel(root)
    if name == _NO_ANTIGEN:  # the tissue's own light
        name = notes.get("Fluorochrome") or _first(_FLUOR, stem) or name
    scan = notes.get("ScanType") or notes.get("MICS cycle type") or _first(_SCAN, stem)
    if name and scan in _BLEACHED:
        name += "_background"
    cycle = _whole(notes.get("Cycle") or notes.get("MICS cycle ID") or _first(_CYCLE, stem))
    roi = _whole(notes.get("RoiId") or notes.get("ROI ID") or _first(_ROI, stem))
    return _Stain(
        path=path,
        image=image,
        name=name,
        cycle=_LAST if cycle is None else cycle,
        well=notes.get("Well") or _first(_WELL, stem),
        roi="" if roi is None else str(roi),
        position=_position(root),
        known=known,
    )


def _first(pattern: re.Pattern[str], text: str) -> str:
    found = pattern.search(text)
    return found[1] if found else ""


def _whole(text: str) -> int | None:
    return int(text) if re.fullmatch(r"[0-9]{1,9}", text.strip()) else None


def _parse(description: str) -> ElementTree.Element | None:
    """OME-XML; of a description that is none, nothing: the file may be read without it."""
    if "<OME" not in description or "<!DOCTYPE" in description or "<!ENTITY" in description:
        return None
    try:
        return ElementTree.fromstring(description.encode())
    except ElementTree.ParseError:
        return None


def _tag(element: ElementTree.Element) -> str:
    return element.tag.rpartition("}")[2]


def _annotations(root: ElementTree.Element) -> Iterator[tuple[str, str]]:
    """Key and value of the file's annotations, with the first reagent and well; of a key's values the first."""
    seen: set[str] = set()
    for element in root.iter():
        kind = _tag(element)
        if kind == "M":
            key, value = element.get("K", ""), (element.text or "").strip()
        elif kind == "Reagent":
            key, value = "Reagent", element.get("Name", "")
        elif kind == "Well":
            key, value = "Well", element.get("ExternalIdentifier", "")
        else:
            continue
        if value and key not in seen:
            seen.add(key)
            yield key, value


def _channel(root: ElementTree.Element | None) -> str:
    channels = [] if root is None else [element for element in root.iter() if _tag(element) == "Channel"]
    return (channels[0].get("Name") or "") if len(channels) == 1 else ""


def _position(root: ElementTree.Element | None) -> tuple[float, float] | None:
    """(y, x) of the first plane in pixels."""
    plane = None if root is None else next((element for element in root.iter() if _tag(element) == "Plane"), None)
    try:
        found = None if plane is None else (float(plane.get("PositionY", "")), float(plane.get("PositionX", "")))
    except ValueError:
        return None
    return found if found and all(abs(value) < 1e9 for value in found) else None
