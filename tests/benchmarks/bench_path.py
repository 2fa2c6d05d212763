"""The whole image path on one channel, every task in a process of its own as the pipeline has it.

``path-*``: convert, tissue, patchify, segment (``generic``), resolve, aggregate, assemble at growing widths; time and
peak memory of each stage. ``path-fixed`` is the same on an image of 256 pixels: what the processes cost by themselves.

``cellpose-4k*``: the same with Cellpose, end to end against Sopa on the same file with the same engine, diameter,
thresholds, patch width and overlap, two cores each, without Sopa's own preprocessing (which would cost it time):

- ``cellpose-4k``: our shipped network as it comes (narrow), Sopa the same weights padded to the stock width (its
  outputs are the same within rounding); Sopa's command line as documented, all patches in one process, two threads;
- ``cellpose-4k-stock``: the same, but ours reads the padded file too: the network's work is equal;
- ``cellpose-4k-tasks``: as ``stock``, but Sopa too takes patches as tasks, two processes of one thread at a time.

Ours always runs two tasks of one thread at a time. The image is a simulated slide of 4096 pixels, repeated where it is
wider.
"""

import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from harness import OURS, PEER, Case, Comparison, run_process

ROOT = Path(__file__).resolve().parents[2]
#: Python with cellpose 3 and cellquilt.
CELLPOSE = Path(os.environ.get("CELLQUILT_CELLPOSE_PYTHON", ROOT / ".venv" / "cellpose3" / "bin" / "python"))
CORES = 2
DRAWN_PX = 4096
TIFF_TILE = 512
PIXEL_UM = 0.2125
CHANNEL = "DAPI"
DIAMETER_PX = 36  # about what the simulated nuclei measure
PATCH_PX, OVERLAP_PX = 2048, 4 * DIAMETER_PX

_GENERIC: dict[str, Any] = {"method": "generic"}
_CELLPOSE: dict[str, Any] = {"method": "cellpose", "pixels": 4096, "weights": "stock", "peer_tasks": False}
_QUICK = {"pixels": 1792, "patch_px": 840}


def _against_sopa(name: str, **sizes: Any) -> Case:
    return Case(name, {**_CELLPOSE, **sizes}, _QUICK, target=2.0, basis="wall_s", limit_s=1800.0)


CASES = (
    Case("path-fixed", {**_GENERIC, "pixels": 256}, peer=False, max_peak_mb=1500.0),
    *(
        Case(f"path-{k}k", {**_GENERIC, "pixels": k * 1024}, {"pixels": k * 128}, max_peak_mb=1500.0, peer=False)
        for k in (4, 8, 16, 32)
    ),
    _against_sopa("cellpose-4k", weights="shipped"),
    _against_sopa("cellpose-4k-stock"),
    _against_sopa("cellpose-4k-tasks", peer_tasks=True),
)


# --- input


def draw(pixels: int) -> Any:
    """(n, n) uint16 of a simulated slide, n at most `DRAWN_PX`."""
    import numpy as np
    from cellquilt.simulate import Slide, make_parameters

    width = min(pixels, DRAWN_PX)
    slide = Slide(make_parameters(width_px=width, pixel_size_um=PIXEL_UM, seed=1))
    plane = np.empty((width, width), dtype=np.uint16)
    for window in slide.windows(1024):
        y0, y1, x0, x1 = window
        plane[y0:y1, x0:x1] = np.squeeze(slide.image(slide.tile(window), channels=(CHANNEL,)))
    return plane


def write_image(path: Path, pixels: int) -> None:
    """A tiled OME-TIFF of the drawn image, repeated, never in memory as a whole."""
    import numpy as np
    import tifffile

    drawn = draw(pixels)

    def tiles() -> Iterator[Any]:
        for y in range(0, pixels, TIFF_TILE):
            for x in range(0, pixels, TIFF_TILE):
                top, left = y % DRAWN_PX, x % DRAWN_PX
                tile = drawn[top : top + TIFF_TILE, left : left + TIFF_TILE]
                if tile.shape != (TIFF_TILE, TIFF_TILE):
                    tile = np.pad(tile, [(0, TIFF_TILE - side) for side in tile.shape])
                yield tile

    size = {"PhysicalSizeX": PIXEL_UM, "PhysicalSizeXUnit": "µm", "PhysicalSizeY": PIXEL_UM, "PhysicalSizeYUnit": "µm"}
    with tifffile.TiffWriter(path, bigtiff=pixels > 32_000, ome=True) as tiff:
        tiff.write(
            tiles(),
            shape=(pixels, pixels),
            dtype=drawn.dtype,
            tile=(TIFF_TILE, TIFF_TILE),
            metadata={"axes": "YX", "Channel": {"Name": [CHANNEL]}, **size},
        )


_WRITE_STOCK = """
import sys, torch
from cellquilt.segment.cellpose import SHIPPED_FILE
from cellquilt.segment.cpnet import load_state_dict
torch.save({name: torch.from_numpy(value) for name, value in load_state_dict(SHIPPED_FILE).items()}, sys.argv[1])
"""
_LOAD_ENGINE = """
import sys
from cellquilt.segment.cellpose import CellposeSegmenter
CellposeSegmenter({"generation": "3", "model": sys.argv[1], "threads": 1})
"""


def make_input(sizes: dict[str, Any], folder: Path) -> None:
    """The image, and the weights as a stock file."""
    write_image(folder / "image.ome.tif", sizes["pixels"])
    if sizes["method"] == "cellpose":
        if not CELLPOSE.exists():
            raise FileNotFoundError(f'{CELLPOSE} is missing: make setup STAGES="core cellpose3"')
        command = [CELLPOSE, "-c", _WRITE_STOCK, folder / "nuclei.pt"]
        run_process(command, name="weights", log=folder / "weights.log")


def prepare(sizes: dict[str, Any], folder: Path, tool: str) -> None:
    """Nothing: both start from the file."""


def load(sizes: dict[str, Any], folder: Path, tool: str) -> Callable[[], list[dict[str, Any]]]:
    """All stages; gives what each took."""
    work = folder / tool
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    path = OurPath(sizes, folder, work) if tool == OURS else PeerPath(sizes, folder, work)
    return path.run


def at_once(jobs: list[Callable[[], dict[str, Any]]]) -> list[dict[str, Any]]:
    """Run jobs, as many at a time as there are cores to use."""
    with ThreadPoolExecutor(CORES) as pool:
        return list(pool.map(lambda job: job(), jobs))


def environment(threads: int) -> dict[str, str]:
    """Variables that hold a process to so many threads."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
    return {**dict.fromkeys(names, str(threads)), "PYTHONNOUSERSITE": "1"}


# --- ours


class OurPath:
    """The pipeline's tasks by the same scripts."""

    def __init__(self, sizes: dict[str, Any], folder: Path, work: Path) -> None:
        self.sizes, self.folder, self.work = sizes, folder, work
        self.settings: dict[str, Any] = {"segmentation": sizes["method"]}
        self.weights: list[str | Path] = []
        if sizes["method"] == "cellpose":
            patch = sizes.get("patch_px", PATCH_PX)
            self.settings |= {
                "cellpose_diameter_px": DIAMETER_PX,
                "cellpose_flow_threshold": 0.4,
                "cellpose_cellprob_threshold": 0.0,
                "patch_width_px": patch,
                "patch_overlap_px": OVERLAP_PX,
                "patches_per_task": math.ceil(self.n_patches(patch) / CORES),
                "expand_um": 0.0,
            }
            if sizes["weights"] == "stock":
                self.weights = ["--weights", folder / "nuclei.pt"]

    def n_patches(self, patch: int) -> int:
        """How many patches Cellpose's tiling gives."""
        from cellquilt.patches.grid import Lattice, make_grid
        from cellquilt.segment.cellpose import NUCLEI_DIAMETER_PX

        lattice = Lattice(tile=224, overlap=0.1, rescale=NUCLEI_DIAMETER_PX / DIAMETER_PX)
        shape = (self.sizes["pixels"], self.sizes["pixels"])
        return len(make_grid(shape, width_px=patch, overlap_px=OVERLAP_PX, lattice=lattice).patches)

    def task(self, script: str, *arguments: str | Path, python: Path | None = None, name: str = "") -> dict[str, Any]:
        """One task as the pipeline starts it."""
        command = [python or sys.executable, ROOT / "bin" / f"{script}.py", *arguments]
        log = self.work / f"{name or script}.log"
        command += ["--settings", json.dumps(self.settings)]
        return run_process(command, name=script, log=log, environment=environment(1))

    def run(self) -> list[dict[str, Any]]:
        """All tasks."""
        place = {part: self.work / f"slide.{part}.zarr" for part in ("raw", "tissue", "patches", "cells", "table")}
        image, bundles = self.folder / "image.ome.tif", self.work / "bundles"
        raw = place["raw"]
        convert = ("--technology", "ome_tif", "--sample", "slide", "--output", raw)
        stages = [
            self.task("convert", image, *convert),
            self.task("tissue", raw, "--output", place["tissue"]),
            self.task(
                "patchify", raw, "--tissue", place["tissue"], "--bundles", bundles, "--output", place["patches"],
                *self.weights,
            ),
        ]  # fmt: skip
        stages += at_once([lambda bundle=bundle: self.segment(bundle) for bundle in sorted(bundles.iterdir())])
        results = sorted(self.work.glob("*.cells.parquet"))
        parts = [raw, place["tissue"], place["patches"], place["cells"], place["table"]]
        return [
            *stages,
            self.task("resolve", raw, *results, "--output", place["cells"]),
            self.task("aggregate", raw, "--cells", place["cells"], "--output", place["table"]),
            self.task("assemble", *parts, "--output", self.work / "slide.zarr", "--qc", self.work / "qc.json"),
        ]

    def segment(self, bundle: Path) -> dict[str, Any]:
        """One bundle's task."""
        method = self.sizes["method"]
        return self.task(
            "segment", method, bundle, "--output", self.work / f"{bundle.stem}.cells.parquet", *self.weights,
            python=CELLPOSE if method == "cellpose" else None, name=bundle.stem,
        )  # fmt: skip


# --- sopa


class PeerPath:
    """Sopa's command line, step by step as its documentation has it."""

    def __init__(self, sizes: dict[str, Any], folder: Path, work: Path) -> None:
        self.sizes, self.folder, self.work = sizes, folder, work
        self.store = work / "slide.zarr"

    def command(
        self, stage: str, *arguments: str | Path | float, threads: int = CORES, name: str = ""
    ) -> dict[str, Any]:
        """One command."""
        command = [Path(sys.executable).parent / "sopa", *(str(argument) for argument in arguments)]
        log = self.work / f"{name or stage}.log"
        return run_process(command, name=stage, log=log, environment=environment(threads))

    def run(self) -> list[dict[str, Any]]:
        """All commands."""
        image, store = self.folder / "image.ome.tif", self.store
        # Ours says how wide a patch is without its overlap, Sopa with it.
        patch = self.sizes.get("patch_px", PATCH_PX) + OVERLAP_PX
        width = ("--patch-width-pixel", patch, "--patch-overlap-pixel", OVERLAP_PX)
        stages = [
            self.command("convert", "convert", image, "--technology", "ome_tif", "--sdata-path", store),
            self.command("patchify", "patchify", "image", store, *width),
        ]
        if self.sizes["peer_tasks"]:
            n = int((store / ".sopa_cache" / "patches_file_image").read_text())
            jobs = [lambda i=i: self.segment("--patch-index", i, threads=1, name=f"patch_{i}") for i in range(n)]
            stages += at_once(jobs)
            stages.append(self.command("resolve", "resolve", "cellpose", store))
        else:  # this resolves as well
            stages.append(self.segment())
        return [*stages, self.command("aggregate", "aggregate", store, "--aggregate-channels")]

    def segment(self, *more: str | float, threads: int = CORES, name: str = "") -> dict[str, Any]:
        """Cellpose on one patch, or on all."""
        return self.command(
            "segment", "segmentation", "cellpose", self.store, "--diameter", DIAMETER_PX, "--channels", CHANNEL,
            "--flow-threshold", 0.4, "--cellprob-threshold", 0, "--clip-limit", 0, "--gaussian-sigma", 0,
            "--pretrained-model", self.folder / "nuclei.pt", *more, threads=threads, name=name,
        )  # fmt: skip


# --- both


def finish(result: list[dict[str, Any]], sizes: dict[str, Any], folder: Path, tool: str) -> dict[str, Any]:
    """Stages (tasks of one stage together), peak memory, time per megapixel, number of cells."""
    stages = by_stage(result)
    cells = _cells(folder, tool)
    line: dict[str, Any] = {
        # The process that starts the tasks is no part of the path.
        "peak_mb": max(stage["peak_mb"] for stage in stages),
        "stages": stages,
        "cells_out": len(cells),
        "cpu_s_per_mpx": round(sum(stage["cpu_s"] for stage in stages) / (sizes["pixels"] ** 2 / 1e6), 3),
    }
    if sizes["method"] == "cellpose" and tool == OURS:
        model = folder / "nuclei.pt" if sizes["weights"] == "stock" else "nuclei"
        engine = run_process([CELLPOSE, "-c", _LOAD_ENGINE, model], name="engine", log=folder / "engine.log")
        line["engine_mb"] = engine["peak_mb"]
    _keep(folder, tool)
    return line


def by_stage(tasks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tasks of one stage together: sums of time, the largest peak."""
    stages: dict[str, dict[str, Any]] = {}
    for task in tasks:
        stage = stages.setdefault(
            task["stage"], {"stage": task["stage"], "tasks": 0, "cpu_s": 0.0, "wall_s": 0.0, "peak_mb": 0.0}
        )
        stage["tasks"] += 1
        stage["cpu_s"] = round(stage["cpu_s"] + task["cpu_s"], 3)
        stage["wall_s"] = round(stage["wall_s"] + task["wall_s"], 3)
        stage["peak_mb"] = max(stage["peak_mb"], task["peak_mb"])
    return list(stages.values())


_ELEMENTS = {OURS: "cell_boundaries", PEER: "cellpose_boundaries"}


def _cells(folder: Path, tool: str) -> Any:
    """(n,) polygons in pixels."""
    import pyarrow.parquet as pq
    import shapely

    element = folder / tool / "slide.zarr" / "shapes" / _ELEMENTS[tool]
    table = pq.read_table(element / "shapes.parquet", columns=["geometry"])
    return shapely.from_wkb(table.column("geometry").to_numpy(zero_copy_only=False))


def _keep(folder: Path, tool: str) -> None:
    """Keep the cells only: the next run needs the place."""
    import numpy as np
    import shapely

    np.save(folder / f"{tool}.cells.npy", np.asarray(shapely.to_wkb(_cells(folder, tool)), dtype=object))
    shutil.rmtree(folder / tool)


def compare(sizes: dict[str, Any], folder: Path) -> Comparison:
    """Number of cells, and how many are the same (IoU from 0.5 and from 0.9 on)."""
    import numpy as np
    import shapely

    ours, peer = (shapely.from_wkb(np.load(folder / f"{tool}.cells.npy", allow_pickle=True)) for tool in (OURS, PEER))
    ours, peer = (np.asarray(shapely.make_valid(cells)) for cells in (ours, peer))
    a, b = shapely.STRtree(peer).query(ours, predicate="intersects")
    shared = shapely.area(shapely.intersection(ours[a], peer[b]))
    iou = shared / (shapely.area(ours[a]) + shapely.area(peer[b]) - shared)
    f1 = {least: 2 * int((iou >= least).sum()) / max(1, len(ours) + len(peer)) for least in (0.5, 0.9)}
    text = f"{len(ours)} cells against {len(peer)}; F1 {f1[0.5]:.3f} at IoU 0.5, {f1[0.9]:.3f} at 0.9"
    # Not the same by design: Sopa normalises each patch by itself, merges copies and smooths outlines.
    return Comparison(None if f1[0.5] >= 0.9 else False, text)
