"""Numbers taken from a real region, and how well a simulated slide meets them.

`calibration.json` beside this file holds what was measured on the MERSCOPE mouse liver region of Vizgen's
vizgen-postprocessing tests (Apache-2.0): gene means, transcripts per µm², share in nuclei, control rate and z
profile; and three constants of the simulator that were fitted to them. No data are shipped, only these numbers.
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cellquilt.core.errors import CellquiltError

_FILE = Path(__file__).with_name("calibration.json")
TOLERANCE = 0.2
_LEAST_COUNT = 50  # genes with fewer real transcripts have a Poisson error beyond the tolerance themselves


@dataclass(frozen=True)
class Calibration:
    """Measured numbers and fitted constants.

    Attributes
    ----------
    genes
        Real gene names, most abundant first.
    gene_counts
        (n,) int64 transcripts of them in the region.
    controls
        Names of controls.
    density_um2
        Transcripts of all kinds per µm².
    nuclear_share
        Share of them inside the outlines of nuclei of the middle plane.
    control_rate
        Share of controls.
    z_profile
        (7,) float64 share of every plane.
    z_step_um
        Distance of planes.
    rate_um2, enrichment
        Fitted: transcripts per µm² of cytoplasm, and density in nuclei over it.
    area_shares
        Fitted: (n_domains, n_types) share of the RNA-bearing area that cells of a type in a domain fill on a default
        slide.
    """

    genes: list[str]
    gene_counts: np.ndarray
    controls: list[str]
    density_um2: float
    nuclear_share: float
    control_rate: float
    z_profile: np.ndarray
    z_step_um: float
    rate_um2: float
    enrichment: float
    area_shares: np.ndarray

    @property
    def gene_shares(self) -> np.ndarray:
        """(n,) float64, sum 1."""
        return self.gene_counts / self.gene_counts.sum()


@functools.cache
def calibration() -> Calibration:
    """The numbers shipped with the package."""
    document = json.loads(_FILE.read_text())
    measured, fitted = document["measured"], document["fitted"]
    return Calibration(
        list(measured["gene_counts"]),
        np.array(list(measured["gene_counts"].values()), np.int64),
        list(measured["controls"]),
        measured["density_um2"],
        measured["nuclear_share"],
        measured["control_rate"],
        np.array(measured["z_profile"]),
        measured["z_step_um"],
        fitted["rate_um2"],
        fitted["enrichment"],
        np.array(fitted["area_shares"]),
    )


def measure_region(folder: Path | str, nuclear_stain: str = "DAPI", plane: int = 3) -> dict[str, Any]:
    """Measure a real MERSCOPE region as `calibration.json` was measured.

    Parameters
    ----------
    folder
        Vendor folder with ``images/`` and ``detected_transcripts.csv``.
    nuclear_stain, plane
        Mosaic that outlines nuclei: smoothed (σ 3 px) and cut at Otsu's threshold.

    Returns
    -------
    dict
        ``density_um2`` over the rectangle that the transcripts span, ``nuclear_share`` of the transcripts inside the
        image, ``control_rate``, ``z_profile``, ``gene_counts`` (most abundant first) and ``controls``.

    Raises
    ------
    CellquiltError
        ``calibration-data-missing`` if a file is missing.
    """
    import pyarrow.csv
    import tifffile
    from scipy import ndimage
    from skimage.filters import threshold_otsu

    folder = Path(folder)
    image_file = folder / "images" / f"mosaic_{nuclear_stain}_z{plane}.tif"
    table_file = folder / "detected_transcripts.csv"
    matrix_file = folder / "images" / "micron_to_mosaic_pixel_transform.csv"
    for file in (image_file, table_file, matrix_file):
        if not file.is_file():
            raise CellquiltError("calibration-data-missing", f"{file} is missing", "give a MERSCOPE region folder")
    table = pyarrow.csv.read_csv(table_file)
    x, y = (table.column(f"global_{axis}").to_numpy() for axis in "xy")
    planes = table.column("global_z").to_numpy().astype(int)
    genes = np.asarray(table.column("gene").to_pylist(), dtype=str)
    matrix = np.loadtxt(matrix_file)
    column, row = np.floor(matrix[:2, :2] @ np.vstack([x, y]) + matrix[:2, 2:]).astype(int)
    image = ndimage.gaussian_filter(tifffile.imread(image_file).astype(float), 3)
    nuclei = image > threshold_otsu(image)
    inside = (column >= 0) & (row >= 0) & (column < image.shape[1]) & (row < image.shape[0])
    control = np.char.startswith(genes, "Blank-")
    names, counts = np.unique(genes[~control], return_counts=True)
    order = np.lexsort((names, -counts))
    profile = np.bincount(planes, minlength=7) / len(planes)
    return {
        "n_transcripts": len(x),
        "density_um2": float(len(x) / (np.ptp(x) * np.ptp(y))),
        "nuclear_share": float(nuclei[row[inside], column[inside]].mean()),
        "control_rate": float(control.mean()),
        "z_profile": [round(float(share), 5) for share in profile],
        "gene_counts": {str(names[k]): int(counts[k]) for k in order},
        "controls": sorted({str(name) for name in genes[control]}),
    }


def measure_slide(slide: Path | str) -> dict[str, Any]:
    """Measure a simulated slide (a folder written with transcripts) in the same way.

    Parameters
    ----------
    slide
        Folder of one slide, with ``transcripts.parquet`` and ``truth/``.

    Returns
    -------
    dict
        As `measure_region`; nuclei are the true ones, the area is the canvas.
    """
    import pyarrow.parquet as pq

    slide = Path(slide)
    document = json.loads((slide / "truth" / "simulation.json").read_text())
    parameters = document["parameters"]
    area = parameters["width_px"] * parameters["height_px"] * parameters["pixel_size_um"] ** 2
    z_step = document["z_step_um"]
    names: list[str] = document["genes"] + document["controls"]
    place = {name: k for k, name in enumerate(names)}
    counts = np.zeros(len(names), np.int64)
    profile = np.zeros(document["n_planes"], np.int64)
    nuclear = 0
    with (
        pq.ParquetFile(slide / "truth" / "transcripts_truth.parquet") as truth,
    ):
        for batch in truth.iter_batches(columns=["in_nucleus", "gene", "z"]):
            genes = batch.column("gene").dictionary_encode()
            codes = np.array([place[name] for name in genes.dictionary.to_pylist()], dtype=np.int64)
            counts += np.bincount(codes[genes.indices.to_numpy()], minlength=len(names))
            planes = np.rint(batch.column("z").to_numpy() / z_step).astype(int)
            profile += np.bincount(planes, minlength=len(profile))
            nuclear += int(np.count_nonzero(batch.column("in_nucleus").to_numpy(zero_copy_only=False)))
    total = int(counts.sum())
    n_genes = len(document["genes"])
    return {
        "n_transcripts": total,
        "density_um2": total / area,
        "nuclear_share": nuclear / max(total, 1),
        "control_rate": float(counts[n_genes:].sum() / max(total, 1)),
        "z_profile": (profile / max(total, 1)).tolist(),
        "gene_counts": dict(zip(names[:n_genes], counts[:n_genes].tolist(), strict=True)),
        "controls": document["controls"],
    }


@dataclass(frozen=True)
class CalibrationRow:
    """One line of the comparison; `ratio` is simulated / measured, `ok` says whether it lies within the tolerance."""

    name: str
    measured: float
    simulated: float

    @property
    def ratio(self) -> float:
        return self.simulated / self.measured if self.measured else float("nan")

    @property
    def ok(self) -> bool:
        return abs(self.ratio - 1) <= TOLERANCE


def calibration_table(slide: Path | str, region: Path | str | None = None) -> list[CalibrationRow]:
    """Measured and simulated numbers side by side.

    Parameters
    ----------
    slide
        Folder of a simulated slide.
    region
        Real MERSCOPE region; None takes the numbers shipped with the package.

    Returns
    -------
    list of CalibrationRow
        Density, nuclear share, control rate, each z-plane's share, then the density (per 1000 µm²) of every gene with
        at least 50 real transcripts, most abundant first.
    """
    real = _shipped() if region is None else measure_region(region)
    simulated = measure_slide(slide)
    rows = [
        CalibrationRow("transcripts per µm²", real["density_um2"], simulated["density_um2"]),
        CalibrationRow("share in nuclei", real["nuclear_share"], simulated["nuclear_share"]),
        CalibrationRow("control rate", real["control_rate"], simulated["control_rate"]),
    ]
    for plane, (a, b) in enumerate(zip(real["z_profile"], simulated["z_profile"], strict=True)):
        rows.append(CalibrationRow(f"share in plane z{plane}", a, b))
    real_area = real["n_transcripts"] / real["density_um2"]
    simulated_area = simulated["n_transcripts"] / simulated["density_um2"] if simulated["n_transcripts"] else 1.0
    for gene, count in real["gene_counts"].items():
        if count >= _LEAST_COUNT and gene in simulated["gene_counts"]:
            mean = 1000 * simulated["gene_counts"][gene] / simulated_area
            rows.append(CalibrationRow(f"{gene} per 1000 µm²", 1000 * count / real_area, mean))
    return rows


def _shipped() -> dict[str, Any]:
    return json.loads(_FILE.read_text())["measured"]


def format_table(rows: list[CalibrationRow]) -> str:
    """The comparison as aligned text."""
    lines = [f"{'':28} {'measured':>10} {'simulated':>10} {'ratio':>6}"]
    for row in rows:
        mark = "" if row.ok else "  beyond 20 %"
        lines.append(f"{row.name:28} {row.measured:10.4g} {row.simulated:10.4g} {row.ratio:6.2f}{mark}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """``python -m cellquilt.simulate.calibration SLIDE [REGION]``: print the comparison of a simulated slide."""
    import sys

    given = sys.argv[1:] if arguments is None else arguments
    if len(given) not in (1, 2):
        raise SystemExit("usage: python -m cellquilt.simulate.calibration SLIDE [REGION]")
    print(format_table(calibration_table(given[0], given[1] if len(given) == 2 else None)))


if __name__ == "__main__":
    main()
