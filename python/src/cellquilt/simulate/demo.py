"""The demo's input: a real micrograph of nuclei and two simulated slides of different gene panels, with a sheet."""

import csv
from pathlib import Path

import numpy as np

from cellquilt.core.atomic import atomic_path
from cellquilt.core.errors import CellquiltError

#: The micrograph comes without a pixel size. Its nuclei are about 110 pixels wide, which is about 14 µm in life.
MICROGRAPH_PIXEL_UM = 0.125
_SLIDE_PX = 1536


def micrograph() -> np.ndarray:
    """The micrograph: fluorescent nuclei of human cells, shipped by the package mahotas.

    Returns
    -------
    numpy.ndarray
        (1024, 1344) uint8.

    Raises
    ------
    CellquiltError
        ``demo-micrograph`` if mahotas is not installed.
    """
    try:
        import mahotas.demos
    except ImportError as error:
        raise CellquiltError(
            "demo-micrograph", "the demo's micrograph comes with the package mahotas", "run `make setup`"
        ) from error
    return np.asarray(mahotas.demos.load("nuclear"))[:, :, 0]


def make_demo_input(output: Path, *, seed: int = 0) -> Path:
    """Write the demo's input, unless it is there.

    Parameters
    ----------
    output
        Folder to make.
    seed
        Seed of the simulated slides.

    Returns
    -------
    pathlib.Path
        The sheet.
    """
    sheet = Path(output) / "sheet.csv"
    if sheet.is_file():
        return sheet
    import tifffile

    from cellquilt.simulate import simulate

    with atomic_path(output, overwrite=True) as aside:
        aside.mkdir(parents=True)
        tifffile.imwrite(
            aside / "nuclei.ome.tif",
            micrograph(),
            ome=True,
            tile=(256, 256),
            metadata={
                "axes": "YX",
                "Channel": {"Name": ["DAPI"]},
                "PhysicalSizeX": MICROGRAPH_PIXEL_UM,
                "PhysicalSizeXUnit": "µm",
                "PhysicalSizeY": MICROGRAPH_PIXEL_UM,
                "PhysicalSizeYUnit": "µm",
            },
        )
        simulate(
            aside / "simulated",
            width_px=_SLIDE_PX,
            slides=2,
            panels=2,
            seed=seed,
            name="simulated",
            domain_contrast=1.5,
        )
        with (aside / "sheet.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["sample", "technology", "path", "transcripts", "truth", "origin"])
            writer.writerow(["micrograph", "ome_tif", "nuclei.ome.tif", "", "", "real"])
            for slide in ("simulated_0", "simulated_1"):
                inside = Path("simulated") / slide
                files = [inside / name for name in ("image.ome.tif", "transcripts.parquet", "truth")]
                writer.writerow([slide, "ome_tif", *files, "simulated"])
    return sheet
