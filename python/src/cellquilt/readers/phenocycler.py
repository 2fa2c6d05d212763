"""Akoya PhenoCycler (CODEX): the scanner's ``.qptiff``, or a TIFF that QuPath or ImageJ made of it.

A QPTIFF holds a page a channel at full resolution, smaller levels of the same, and pictures of the glass slide: a
thumbnail, an overview and the label. Every page says in XML what it is. Of that text only names of channels are kept:
others name the slide, its barcode and who scanned it.
"""

import math
import re
from pathlib import Path
from xml.etree import ElementTree

from cellquilt.core.errors import CellquiltError
from cellquilt.readers.base import Reader, Request, Slide
from cellquilt.readers.channels import (
    contents_of,
    distinct_names,
    refuse_transcripts,
    some,
    tiff_files,
    whole_file,
)
from cellquilt.readers.tiff import TiffImage

IMAGE = "image"
_QPI = "PerkinElmer-QPI-ImageDescription"
#: What a page of channels is called; all others are smaller copies or pictures of the glass slide.
_FULL = "FullResolution"
#: Where a channel's name stands, the first that is not empty. The scan's profile, deeper down, tells of all channels.
_NAMES = ("Biomarker", "Name", "Fluor", "ExcitationFilter//Name", "Responsivity//Name")


def open_phenocycler(request: Request) -> Slide:
    """Open the scanner's file; see `Reader`."""
    refuse_transcripts(request, "PhenoCycler")
    path = _file(request)
    name = request.source if path == request.path else f"{request.source}/{path.name}"
    image = request.resources.enter_context(TiffImage(path, name, memory_mb=int(request.settings["memory_mb"])))
    slide = Slide(inputs=[path])
    names = image.channel_names
    pages = [_page(text, name) for text in image.descriptions()]
    described = [page for page in pages if page is not None]
    if described:
        _refuse_other_pages(described, name)
        if len(described) == len(names) and names[:3] != ["r", "g", "b"]:
            names = [_channel_name(page) or old for page, old in zip(described, names, strict=True)]
        if image.pixel_size_um is None and (size := _pixel_size(described[0])) is not None:
            image.pixel_size_um, image.pixel_size_from = (size, size), "PixelSizeMicrons"
    slide.facts["names_from"] = "qptiff" if described else "tiff"
    slide.images[IMAGE] = whole_file(image, distinct_names(names, slide, name), request, slide)
    return slide


READER = Reader("phenocycler", "PhenoCycler", open_phenocycler)


def _file(request: Request) -> Path:
    """The file itself, or the only one of a folder; a QPTIFF comes before TIFFs."""
    if request.path.is_file():
        return request.path
    scans = sorted(path for path in request.path.iterdir() if path.suffix.lower() == ".qptiff" and path.is_file())
    found = scans or tiff_files(request.path)
    if not found:
        raise CellquiltError(
            "machine-no-images",
            f"{request.source} has no .qptiff and no .tif; {contents_of(request.path)}",
            "name the scanner's file, or the folder that holds it",
        )
    if len(found) > 1:
        raise CellquiltError(
            "phenocycler-several",
            f"{request.source} holds {len(found)} slides: {some([path.name for path in found])}",
            "name the file of the one that is meant; a TIFF a channel is technology macsima or hyperion",
        )
    return found[0]


def _page(text: str, name: str) -> ElementTree.Element | None:
    """What a page of a QPTIFF says of itself; None for other TIFFs."""
    if _QPI not in text:
        return None
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise CellquiltError(
            "phenocycler-xml-invalid", f"{name}: the description of a page has a document type", "export it again"
        )
    try:
        return ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError) as error:
        raise CellquiltError(
            "phenocycler-xml-invalid",
            f"{name}: the description of a page cannot be parsed: {error}",
            "copy it again from the scanner, or export it from QuPath as OME-TIFF",
        ) from error


def _refuse_other_pages(pages: list[ElementTree.Element], name: str) -> None:
    kinds = sorted({kind for page in pages if (kind := (page.findtext("ImageType") or _FULL).strip()) != _FULL})
    if kinds:
        raise CellquiltError(
            "phenocycler-not-full",
            f"the largest image of {name} is {some(kinds)}, {_FULL} was expected",
            "export the scan itself: a picture of the glass slide is no data",
        )


def _channel_name(page: ElementTree.Element) -> str:
    for place in _NAMES:
        for element in page.findall(place):
            text = re.sub(r"\s+", " ", element.text or "").strip()
            if text:
                return text
    return ""


def _pixel_size(page: ElementTree.Element) -> float | None:
    try:
        size = float(page.findtext(".//PixelSizeMicrons") or "nan")
    except ValueError:
        return None
    return size if math.isfinite(size) and size > 0 else None
