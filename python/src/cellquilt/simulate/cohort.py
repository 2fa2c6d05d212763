"""A simulated cohort: several slides and the sheet that runs them."""

import csv
from pathlib import Path
from typing import Any, Literal

from cellquilt.core.atomic import atomic_path
from cellquilt.core.errors import CellquiltError, did_you_mean
from cellquilt.simulate.cosmx import write_cosmx
from cellquilt.simulate.hyperion import write_hyperion
from cellquilt.simulate.macsima import write_macsima
from cellquilt.simulate.molecular_cartography import write_molecular_cartography
from cellquilt.simulate.parameters import make_parameters
from cellquilt.simulate.phenocycler import write_phenocycler
from cellquilt.simulate.proteins import PROTEINS
from cellquilt.simulate.slide import Slide
from cellquilt.simulate.visium_hd import write_visium_hd
from cellquilt.simulate.writer import TIFF_TILE, What, write_merscope, write_ome_tif
from cellquilt.simulate.xenium import VERSIONS, write_xenium

Format = Literal[
    "ome_tif",
    "merscope",
    "xenium",
    "cosmx",
    "visium_hd",
    "phenocycler",
    "macsima",
    "hyperion",
    "molecular_cartography",
]
_WRITERS = {
    "ome_tif": write_ome_tif,
    "merscope": write_merscope,
    "xenium": write_xenium,
    "cosmx": write_cosmx,
    "visium_hd": write_visium_hd,
    "phenocycler": write_phenocycler,
    "macsima": write_macsima,
    "hyperion": write_hyperion,
    "molecular_cartography": write_molecular_cartography,
}
#: Formats that are nothing but images of DAPI and proteins.
_PROTEINS = ("phenocycler", "macsima", "hyperion")
#: Formats whose reader must be told where they come without an image → how.
_WITHOUT_IMAGE = {"xenium": "xenium_image", "cosmx": "cosmx_image", "visium_hd": "visium_hd_image"}


def simulate(
    output: Path | str,
    *,
    width_px: int = 2048,
    height_px: int | None = None,
    pixel_size_um: float = 0.2125,
    slides: int = 1,
    preset: str = "default",
    seed: int = 0,
    n_genes: int | None = None,
    panels: int = 1,
    panel_overlap: float = 0.7,
    batch_effect: float = 0.25,
    format: Format = "ome_tif",
    image: bool = True,
    with_transcripts: bool = True,
    image_only: bool = False,
    labels: bool = False,
    channels: tuple[str, ...] = ("DAPI", "Cellbound"),
    planes: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6),
    proteins: tuple[str, ...] = ("CD3", "CD20", "CD68", "CK18"),
    xenium_version: int = 3,
    compression: str | None = None,
    tile_px: int = 2048,
    name: str = "slide",
    overwrite: bool = False,
    **parameters: Any,
) -> Path:
    """Make slides whose cells, nuclei, cell types, domains and transcripts are known.

    Parameters
    ----------
    output
        Folder to make: one folder a slide, and ``sheet.csv``, ready for ``--input``.
    width_px, height_px, pixel_size_um
        The canvas; square unless `height_px` is given.
    slides
        Number of slides. They share cell types, domains and genes; each has its own tissue.
    preset
        ``default``, ``easy`` or ``hard`` (`parameters.PRESETS`).
    seed
        The same seed and arguments give the same bytes.
    n_genes
        Genes of the panel; by default the calibrated ones.
    panels, panel_overlap
        Number of gene panels, dealt to the slides in turn, and the share of genes that all have.
    batch_effect
        Standard deviation of the log of a slide's factor on a gene; the first slide has none.
    format
        ``ome_tif``: image, transcript table and truth. ``merscope``: a vendor folder with mosaics of every plane.
        ``xenium``, ``cosmx``, ``visium_hd``: a vendor's folder.
        ``phenocycler``, ``macsima``, ``hyperion``: images of DAPI and proteins. ``molecular_cartography``: DAPI and
        transcripts.
    image, with_transcripts, image_only
        What to leave out; `image_only` is short for `with_transcripts=False`.
    labels
        Write true label images too (``truth/cells_labels.tif``, ``truth/nuclei_labels.tif``; uint32, the cells'
        numbers).
    channels, planes
        Stains, and z-planes of the ``merscope`` format. With ``Cellbound`` a ``xenium`` bundle has the four stains of
        the segmentation kit.
    proteins
        Stains of the formats that show proteins, of `proteins.PROTEINS`; their means by cell are in
        ``truth/intensities.parquet``.
    xenium_version
        Version of the machine's software whose bundle is written: 1, 2, 3 or 4.
    compression
        tifffile's name of a compression of the images, for example ``"zlib"``.
    tile_px
        Width of the tiles that are made at a time, a multiple of 256: bounds the memory, changes nothing but the
        order of rows.
    name
        Slides are called ``<name>_0``, ``<name>_1``, …
    overwrite
        Replace `output`.
    **parameters
        Anything of `parameters.Parameters`.

    Returns
    -------
    pathlib.Path
        The sheet.

    Raises
    ------
    CellquiltError
        ``output-exists``, ``simulate-preset``, ``simulate-parameter`` or ``simulate-value``.
    """
    output = Path(output)
    with_transcripts = with_transcripts and not image_only
    _check(format, slides, panels, tile_px, channels, xenium_version)
    _check_proteins(format, proteins, image)
    if height_px is not None:
        parameters["height_px"] = height_px
    made = make_parameters(
        preset, width_px=width_px, pixel_size_um=pixel_size_um, seed=seed, n_genes=n_genes, **parameters
    )
    what = What(
        image, with_transcripts, labels, tile_px, compression, tuple(planes), tuple(channels), xenium_version,
        tuple(proteins),
    )  # fmt: skip
    write = _WRITERS[format]
    rows = []
    with atomic_path(output, overwrite=overwrite) as folder:
        folder.mkdir(parents=True)
        for number in range(slides):
            slide = Slide(made, number, panels=panels, panel_overlap=panel_overlap, batch_effect=batch_effect)
            sample = f"{name}_{number}"
            more = {"preset": preset, "panel": number % panels, "format": format, "sample": sample}
            write(slide, folder / sample, sample, what, more)
            row = _row(sample, format, with_transcripts, number % panels, number)
            if format == "molecular_cartography":  # whose files do not say it
                row["pixel_size_um"] = f"{pixel_size_um:g}"
            # A folder without its image is no accident here.
            rows.append(row if image or format not in _WITHOUT_IMAGE else {**row, _WITHOUT_IMAGE[format]: "none"})
        with (folder / "sheet.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    return output / "sheet.csv"


def _row(sample: str, format: str, with_transcripts: bool, panel: int, number: int) -> dict[str, str]:
    generic = format == "ome_tif"
    files = {"ome_tif": "/image.ome.tif", "phenocycler": f"/{sample}.qptiff"}
    return {
        "sample": sample,
        "technology": format,
        "path": f"{sample}{files.get(format, '')}",
        "transcripts": f"{sample}/transcripts.parquet" if generic and with_transcripts else "",
        "truth": f"{sample}/truth",
        "panel": f"panel_{panel}",
        "batch": f"batch_{number}",
    }


def _check(format: str, slides: int, panels: int, tile_px: int, channels: tuple[str, ...], xenium_version: int) -> None:
    from cellquilt.simulate.image import CHANNELS

    if format not in _WRITERS:
        raise CellquiltError("simulate-value", f'format is "{format}"', did_you_mean(format, _WRITERS))
    if xenium_version not in VERSIONS:
        known = ", ".join(map(str, VERSIONS))
        raise CellquiltError("simulate-value", f"xenium_version is {xenium_version}; expected one of {known}")
    if slides < 1 or panels < 1:
        raise CellquiltError("simulate-value", f"slides is {slides}, panels is {panels}; expected at least 1 of each")
    if tile_px < TIFF_TILE or tile_px % TIFF_TILE:
        raise CellquiltError("simulate-value", f"tile_px is {tile_px}; expected a multiple of {TIFF_TILE}")
    for channel in channels:
        if channel not in CHANNELS:
            raise CellquiltError("simulate-value", f'unknown channel "{channel}"', did_you_mean(channel, CHANNELS))


def _check_proteins(format: str, proteins: tuple[str, ...], image: bool) -> None:
    if not image and format in (*_PROTEINS, "molecular_cartography"):
        raise CellquiltError("simulate-value", f"format is {format} and image is False", "it has no other form")
    if format in _PROTEINS and (not 1 <= len(proteins) <= len(PROTEINS) or len(set(proteins)) < len(proteins)):
        raise CellquiltError(
            "simulate-value", f"proteins are {len(proteins)}; expected 1 to {len(PROTEINS)}, each of them once"
        )
    for protein in proteins:
        if protein not in PROTEINS:
            raise CellquiltError("simulate-value", f'unknown protein "{protein}"', did_you_mean(protein, PROTEINS))
