"""Writing a simulated slide as a MACSima experiment: cycles of a nuclear stain and two antibodies, a file an image."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

from cellquilt.readers.tiff import unique_names
from cellquilt.simulate.markers import BLANK, NUCLEI, make_planes
from cellquilt.simulate.slide import Slide
from cellquilt.simulate.writer import TIFF_TILE, What

_OME = "http://www.openmicroscopy.org/Schemas/OME/2016-06"
_WELL, _ROI = "B-1", 1
_DYES = ("FITC", "PE")


class _Scan(NamedTuple):
    """An image: cycle, scan type, fluorochrome, antigen, clone, and the channel that it shows."""

    cycle: int
    kind: str
    fluor: str
    antigen: str
    clone: str
    channel: str

    @property
    def name(self) -> str:
        """What readers call it, but for numbers of those that come again."""
        return f"{self.antigen}_background" if self.kind == "B" else self.antigen

    @property
    def file(self) -> str:
        clone = f"_C-{self.clone}" if self.clone else ""
        return (
            f"C-{self.cycle:03d}_S-000_{self.kind}_{self.fluor}_R-01_W-{_WELL}_ROI-{_ROI:02d}"
            f"_A-{self.antigen}{clone}.tif"
        )


def write_macsima(slide: Slide, folder: Path, name: str, what: What, more: Mapping[str, Any]) -> dict[str, Any]:
    """Write a slide as a folder of OME-TIFFs as software 1 writes them, with ``truth/`` beside them.

    Each cycle has DAPI and two antibodies; after the first, FITC is bleached and imaged again: background alone.

    Returns
    -------
    dict
        The slide's `simulation.json`.
    """
    import tifffile

    scans = _scans(what.proteins)
    names = unique_names([scan.name for scan in scans])
    planes = make_planes(slide, folder, name, what, [scan.channel for scan in scans], names=names)
    for scan, spool in zip(scans, planes.spools, strict=True):
        tifffile.imwrite(
            folder / scan.file, spool.tiles(), shape=spool.shape, dtype=spool.dtype, tile=(TIFF_TILE, TIFF_TILE),
            compression=what.compression, photometric="minisblack", metadata=None,
            description=_xml(scan, spool.shape, slide.parameters.pixel_size_um).encode(),
        )  # fmt: skip
        spool.remove()
    return planes.truth.close({**more, "proteins": list(what.proteins)})


def _scans(proteins: tuple[str, ...]) -> list[_Scan]:
    """In the order of cycles, then of names, as readers put them."""
    scans = [_Scan(1, "B", _DYES[0], _DYES[0], "", BLANK)]
    n_cycles = max(1, -(-len(proteins) // len(_DYES)))
    scans += [_Scan(cycle, "S", NUCLEI, NUCLEI, "", NUCLEI) for cycle in range(1, n_cycles + 1)]
    for k, protein in enumerate(proteins):
        scans.append(_Scan(1 + k // 2, "S", _DYES[k % 2], protein, f"REA{100 + k}", protein))
    return sorted(scans, key=lambda scan: (scan.cycle, scan.name))


def _xml(scan: _Scan, shape: tuple[int, int], pixel_um: float) -> str:
    root = ElementTree.Element("OME", {"xmlns": _OME, "Creator": "cellquilt"})
    image = ElementTree.SubElement(root, "Image", {"ID": "Image:0"})
    pixels = ElementTree.SubElement(
        image,
        "Pixels",
        {
            "ID": "Pixels:0", "DimensionOrder": "XYZCT", "Type": "uint16", "SizeX": str(shape[1]),
            "SizeY": str(shape[0]), "SizeZ": "1", "SizeC": "1", "SizeT": "1", "PhysicalSizeX": str(pixel_um),
            "PhysicalSizeXUnit": "µm", "PhysicalSizeY": str(pixel_um), "PhysicalSizeYUnit": "µm",
        },
    )  # fmt: skip
    ElementTree.SubElement(pixels, "Channel", {"ID": "Channel:0:0", "SamplesPerPixel": "1"})
    ElementTree.SubElement(pixels, "TiffData", {"IFD": "0", "PlaneCount": "1"})
    plane = {"TheZ": "0", "TheT": "0", "TheC": "0", "PositionX": "0", "PositionY": "0"}
    ElementTree.SubElement(pixels, "Plane", plane)
    notes = ElementTree.SubElement(ElementTree.SubElement(root, "StructuredAnnotations"), "MapAnnotation")
    notes.set("ID", "Annotation:0")
    values = ElementTree.SubElement(notes, "Value")
    stain = {"Biomarker": scan.antigen, "Clone": scan.clone} if scan.clone else {"Dye": scan.antigen}
    for key, value in {
        "SoftwareVersion": "1.0.0",
        **stain,
        "Fluorochrome": scan.fluor,
        "ExposureTime": "120.0",
        "Cycle": str(scan.cycle),
        "RoiId": str(_ROI),
        "ScanType": scan.kind,
    }.items():
        ElementTree.SubElement(values, "M", {"K": key}).text = value
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=False)
