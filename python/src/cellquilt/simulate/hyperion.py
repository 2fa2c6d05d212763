"""Writing a simulated slide as MCD Viewer exports a Hyperion region: a float OME-TIFF a channel."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cellquilt.simulate.markers import NUCLEI, make_planes
from cellquilt.simulate.slide import Slide
from cellquilt.simulate.writer import TIFF_TILE, What, ome_metadata

#: Isotopes of the lanthanides that antibodies carry, in the order of masses.
_METALS = (
    "141Pr", "142Nd", "143Nd", "144Nd", "145Nd", "146Nd", "147Sm", "148Nd", "149Sm", "150Nd", "151Eu", "152Sm",
    "153Eu", "154Sm", "155Gd", "156Gd", "158Gd", "159Tb", "160Gd", "161Dy", "162Dy", "163Dy", "164Dy", "165Ho",
    "166Er", "167Er", "168Er", "169Tm", "170Er", "171Yb",
)  # fmt: skip
_INTERCALATOR = ("191Ir", "DNA1")


def write_hyperion(slide: Slide, folder: Path, name: str, what: What, more: Mapping[str, Any]) -> dict[str, Any]:
    """Write a slide as ``<isotope>_<marker>.ome.tiff``, with ``truth/`` beside the files.

    The iridium of the DNA intercalator shows the simulator's DAPI. The machine's pixels are 1 µm wide: simulate with
    ``pixel_size_um=1`` to have such.

    Returns
    -------
    dict
        The slide's `simulation.json`.
    """
    import tifffile

    names = [*what.proteins, _INTERCALATOR[1]]
    planes = make_planes(slide, folder, name, what, [*what.proteins, NUCLEI], names=names)
    metals = [*_METALS[: len(what.proteins)], _INTERCALATOR[0]]
    for metal, marker, spool in zip(metals, planes.channels, planes.spools, strict=True):
        metadata = ome_metadata(f"{name}_{metal}", slide.parameters.pixel_size_um, [f"{metal}_{marker}"])
        with tifffile.TiffWriter(folder / f"{metal}_{marker}.ome.tiff", ome=True) as tiff:
            tiff.write(
                (tile.astype(np.float32) for tile in spool.tiles()), shape=(1, *spool.shape), dtype=np.float32,
                tile=(TIFF_TILE, TIFF_TILE), compression=what.compression, photometric="minisblack",
                metadata=metadata, software="cellquilt",
            )  # fmt: skip
        spool.remove()
    return planes.truth.close({**more, "proteins": list(what.proteins)})
