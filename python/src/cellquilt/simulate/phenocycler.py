"""Writing a simulated slide as the scanner's QPTIFF: pages of channels, smaller levels, pictures of the glass slide."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from cellquilt.simulate.markers import NUCLEI, halved, make_planes
from cellquilt.simulate.slide import Slide
from cellquilt.simulate.writer import TIFF_TILE, What

#: What stands in fields about the slide and who scanned it: a reader must not let it out.
PRIVATE = "Jane Q Patient 1234"
_FLUORS = ("DAPI", "Atto550", "Alexa647", "Alexa750")
_SMALLEST_LEVEL_PX = 256


def write_phenocycler(slide: Slide, folder: Path, name: str, what: What, more: Mapping[str, Any]) -> dict[str, Any]:
    """Write a slide as ``<name>.qptiff``, with ``truth/`` beside it.

    Pages in the scanner's order: all channels, a thumbnail in colours, all channels at every smaller level, the
    overview and the label, which shows a name. XML on each page tells what it is, with a biomarker for channels.

    Returns
    -------
    dict
        The slide's `simulation.json`.
    """
    import tifffile

    planes = make_planes(slide, folder, name, what, [NUCLEI, *what.proteins])
    levels = [planes.spools]
    while max(levels[-1][0].shape) > _SMALLEST_LEVEL_PX and min(levels[-1][0].shape) > 1:
        number = len(levels)
        levels.append([halved(spool, folder / f".{k}_{number}.spool") for k, spool in enumerate(levels[-1])])
    pixel = slide.parameters.pixel_size_um
    thumbnail = np.full((40, 30, 3), 90, np.uint8)
    with tifffile.TiffWriter(folder / f"{name}.qptiff", bigtiff=True) as tiff:

        def channels(level: int) -> None:
            kind = "FullResolution" if level == 0 else "ReducedResolution"
            for k, (channel, spool) in enumerate(zip(planes.channels, levels[level], strict=True)):
                tiff.write(
                    spool.tiles(), shape=spool.shape, dtype=spool.dtype, tile=(TIFF_TILE, TIFF_TILE),
                    compression=what.compression, photometric="minisblack", metadata=None,
                    resolution=(1e4 / pixel / 2**level,) * 2, resolutionunit="CENTIMETER",
                    description=_xml(kind, channel, _FLUORS[k % len(_FLUORS)]), software="PerkinElmer-QPI",
                    subfiletype=min(level, 1),
                )  # fmt: skip

        def picture(kind: str) -> None:
            tiff.write(
                thumbnail, photometric="rgb", metadata=None, description=_xml(kind), software="PerkinElmer-QPI",
                subfiletype=1 if kind == "Thumbnail" else 0,
            )  # fmt: skip

        channels(0)
        picture("Thumbnail")
        for level in range(1, len(levels)):
            channels(level)
        picture("Overview")
        picture("Label")
    for spool in (spool for spools in levels for spool in spools):
        spool.remove()
    return planes.truth.close({**more, "proteins": list(what.proteins)})


def _xml(kind: str, channel: str = "", fluor: str = "") -> str:
    root = ElementTree.Element("PerkinElmer-QPI-ImageDescription")
    fields = {
        "DescriptionVersion": "5",
        "AcquisitionSoftware": "Fusion",
        "ImageType": kind,
        "SlideID": PRIVATE,
        "Barcode": PRIVATE,
        "OperatorName": PRIVATE,
        "ComputerName": PRIVATE,
        "Name": fluor,
        "Biomarker": channel,
    }
    for key, value in fields.items():
        if value:
            ElementTree.SubElement(root, key).text = value
    text = ElementTree.tostring(root, encoding="us-ascii").decode("ascii")
    return f'<?xml version="1.0" encoding="utf-16"?>\r\n{text}'
