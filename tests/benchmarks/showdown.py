"""One slide through cellquilt and through sopa, both killed half-way and resumed; two gene panels through cellquilt and
novae; one page about it. ``make showdown PEER=/path/to/python NOVAE=/path/to/python SIZE=small``; docs/showdown.md.

Every stage that has run is kept in ``state.json`` of the output folder, and a call that comes again goes on from there.
"""

import argparse
import csv
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import domains_cohorts
from bench_path import _WRITE_STOCK, CELLPOSE, CHANNEL, DIAMETER_PX, OVERLAP_PX, PIXEL_UM, environment
from harness import run_process
from showdown_runs import Taken, Watch, disk_use

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
OURS, PEER, NOVAE = "cellquilt", "sopa", "novae"
CORES = 2
MIN_QV = 20.0
GROWTH_UM = 5.0
FLOW_THRESHOLD, CELLPROB_THRESHOLD = 0.4, 0.0
DOMAINS_PYTHON = ROOT / ".venv" / "domains" / "bin" / "python"


@dataclass(frozen=True)
class Size:
    """How large a showdown is.

    Attributes
    ----------
    width_px
        Width of the square slide.
    density_factor
        Factor on the simulator's transcripts.
    patch_px, peer_patch_px, patches_per_task
        Width of a patch without its overlap, ours and sopa's: ours rounds it to whole tiles of the network, so they are
        chosen to give both the same number of patches. How many of them a task of ours takes.
    cohort_cells, seeds
        Cells of each of the two slides of different panels, and seeds of both methods.
    """

    width_px: int
    density_factor: float
    patch_px: int
    peer_patch_px: int
    patches_per_task: int
    cohort_cells: int
    seeds: tuple[int, ...]


#: The full slide has about 69,000 cells and 23 million transcripts.
SIZES = {
    "tiny": Size(1280, 1.0, 256, 384, 2, 600, (0,)),
    "small": Size(2048, 1.0, 640, 640, 2, 800, (0,)),
    "full": Size(16384, 1.0, 2048, 2048, 8, 10_000, (0, 1, 2)),
}


@dataclass
class Showdown:
    """A showdown's folder and what has been done in it.

    Attributes
    ----------
    folder
        The output folder.
    size
        How large it is.
    peer, novae
        Pythons that have sopa and novae; None leaves that part out.
    state
        What the stages gave, by name.
    """

    folder: Path
    size: Size
    peer: Path | None
    novae: Path | None
    state: dict[str, Any] = field(default_factory=dict)

    @property
    def bundle(self) -> Path:
        """The simulated Xenium bundle."""
        return self.folder / "input" / "slide_0"

    @property
    def weights(self) -> Path:
        """The nuclei model that both read."""
        return self.folder / "nuclei.pt"

    def once(self, name: str, do: Callable[[], Any]) -> Any:
        """Do a stage, unless it is done; its answer."""
        if name not in self.state:
            print(f"{datetime.now():%H:%M:%S} {name}", flush=True)
            self.state[name] = do()
            self.state[name] = json.loads(json.dumps(self.state[name]))
            self.write("state.json", self.state)
        return self.state[name]

    def write(self, name: str, document: Any) -> None:
        """Put a JSON document into the folder, whole or not at all."""
        aside = self.folder / f".{name}"
        aside.write_text(json.dumps(document, indent=1) + "\n")
        aside.replace(self.folder / name)

    def make_input(self) -> dict[str, Any]:
        """The slide and the weights."""
        from cellquilt.simulate import simulate

        simulate(
            self.folder / "input", width_px=self.size.width_px, pixel_size_um=PIXEL_UM, seed=6, format="xenium",
            channels=(CHANNEL,), density_factor=self.size.density_factor, overwrite=True,
        )  # fmt: skip
        command = [CELLPOSE, "-c", _WRITE_STOCK, self.weights]
        run_process(command, name="weights", log=self.folder / "weights.log")
        about = json.loads((self.bundle / "truth" / "simulation.json").read_text())
        return {key: about[key] for key in ("n_cells", "n_nuclei", "n_transcripts")} | {"genes": len(about["genes"])}


# --- ours


@dataclass
class OurRun:
    """The pipeline in a folder of its own."""

    showdown: Showdown
    name: str

    @property
    def folder(self) -> Path:
        """Where it runs."""
        return self.showdown.folder / OURS / self.name

    def store(self, results: str = "results") -> Path:
        """What it publishes."""
        return self.folder / results / "slide" / "slide.zarr"

    def start(self, log: str, *more: object, results: str = "results", growth_um: float = 0.0, **how: Any) -> Taken:
        """One call of Nextflow."""
        size = self.showdown.size
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "sheet.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("sample", "technology", "path"), ("slide", "xenium", self.showdown.bundle)])
        command = [
            ROOT / "scripts" / "nextflow", "run", ROOT / "main.nf", "--input", "sheet.csv", "--outdir", results,
            "--segmentation", "cellpose", "--cellpose_model", self.showdown.weights,
            "--cellpose_diameter_px", DIAMETER_PX, "--cellpose_flow_threshold", FLOW_THRESHOLD,
            "--cellpose_cellprob_threshold", CELLPROB_THRESHOLD, "--patch_width_px", size.patch_px,
            "--patch_overlap_px", OVERLAP_PX, "--patches_per_task", size.patches_per_task,
            "--tissue_mode", "none", "--min_qv", MIN_QV, "--expand_um", growth_um, *more,
        ]  # fmt: skip
        return Watch(self.folder).run(command, log=self.showdown.folder / f"{OURS}-{log}.log", **how)

    def trace(self, results: str = "results") -> list[dict[str, str]]:
        """Nextflow's own record of the last call."""
        with (self.folder / results / "pipeline_info" / "trace.txt").open(newline="") as file:
            return list(csv.DictReader(file, delimiter="\t"))

    def segmented(self) -> int:
        """Segmentation tasks that have ended."""
        done = 0
        for code in self.folder.glob("work/*/*/.exitcode"):
            done += "SEGMENT_CELLPOSE" in (code.parent / ".command.run").read_text(errors="replace")[:2000]
        return done


def our_whole(showdown: Showdown) -> dict[str, Any]:
    """Uninterrupted."""
    run = OurRun(showdown, "whole")
    shutil.rmtree(run.folder, ignore_errors=True)
    taken = run.start("whole")
    work, output = disk_use(run.folder / "work", run.folder / ".nextflow"), disk_use(run.folder / "results")
    tasks = [task["process"].split(":")[-1] for task in run.trace()]
    return {**asdict(taken), "work": work, "output": output, "tasks": len(tasks), "steps": _counted(tasks),
            "store": disk_use(run.store())}  # fmt: skip


def our_killed(showdown: Showdown) -> dict[str, Any]:
    """Killed when half of the segmentation tasks are done, and resumed."""
    run = OurRun(showdown, "killed")
    shutil.rmtree(run.folder, ignore_errors=True)
    half = max(showdown.state["ours.whole"]["steps"]["SEGMENT_CELLPOSE"] // 2, 1)
    killed = run.start("killed", kill_when=lambda: run.segmented() >= half)
    done = sum(code.read_text().strip() == "0" for code in run.folder.glob("work/*/*/.exitcode"))
    resumed = run.start("resumed", "-resume")
    kept = sum(task["status"] == "CACHED" for task in run.trace())
    return {
        "killed": asdict(killed),
        "resumed": asdict(resumed),
        "done_before": done,
        "kept": kept,
        "of": len(run.trace()),
        "unit": "tasks",
    }


def our_grown(showdown: Showdown) -> dict[str, Any]:
    """The same nuclei, grown to cells; what was computed before is used again."""
    run = OurRun(showdown, "whole")
    return asdict(run.start("grown", "-resume", results="grown", growth_um=GROWTH_UM))


# --- sopa


@dataclass
class PeerRun:
    """Sopa's command line in a folder of its own, step by step as its documentation has it."""

    showdown: Showdown
    name: str

    @property
    def folder(self) -> Path:
        """Where it runs."""
        return self.showdown.folder / PEER / self.name

    @property
    def store(self) -> Path:
        """Its store."""
        return self.folder / "slide.zarr"

    @property
    def results(self) -> list[Path]:
        """Files of the patches that are segmented."""
        return sorted(self.store.glob(".sopa_cache/cellpose_boundaries/*.parquet"))

    def commands(self) -> dict[str, list[object]]:
        """All commands, in order."""
        size = self.showdown.size
        width = size.peer_patch_px + OVERLAP_PX  # with it, where ours says how wide a patch is without
        return {
            "convert": ["convert", self.showdown.bundle, "--technology", "xenium", "--sdata-path", self.store,
                        "--kwargs", str({"qv_threshold": int(MIN_QV)})],
            "patchify": ["patchify", "image", self.store, "--patch-width-pixel", width,
                         "--patch-overlap-pixel", OVERLAP_PX],
            "segment": ["segmentation", "cellpose", self.store, "--diameter", DIAMETER_PX, "--channels", CHANNEL,
                        "--flow-threshold", FLOW_THRESHOLD, "--cellprob-threshold", CELLPROB_THRESHOLD,
                        "--clip-limit", 0, "--gaussian-sigma", 0, "--pretrained-model", self.showdown.weights],
            "aggregate": ["aggregate", self.store, "--aggregate-channels"],
        }  # fmt: skip

    def start(self, arguments: list[object], log: str, **how: Any) -> Taken:
        """One command."""
        self.folder.mkdir(parents=True, exist_ok=True)
        assert self.showdown.peer is not None
        command = [self.showdown.peer.parent / "sopa", *arguments]
        return Watch(self.folder, environment(CORES)).run(
            command, log=self.showdown.folder / f"{PEER}-{self.name}-{log}.log", **how
        )

    def chain(self, *steps: str, suffix: str = "") -> tuple[Taken, dict[str, Any]]:
        """Some of the commands."""
        commands, total, by_step = self.commands(), Taken(), {}
        for step in steps:
            taken = self.start(commands[step], step + suffix)
            by_step[step] = asdict(taken)
            total = total.then(taken)
        return total, by_step

    @property
    def patches(self) -> int:
        """Number of patches."""
        return int((self.store / ".sopa_cache" / "patches_file_image").read_text())


def peer_whole(showdown: Showdown) -> dict[str, Any]:
    """Uninterrupted."""
    run = PeerRun(showdown, "whole")
    shutil.rmtree(run.folder, ignore_errors=True)
    before, first = run.chain("convert", "patchify")
    patches = run.patches
    after, then = run.chain("segment", "aggregate")
    cache = run.store / ".sopa_cache"
    work, everything = disk_use(cache), disk_use(run.folder)
    output = (everything[0] - work[0], everything[1] - work[1])
    return {**asdict(before.then(after)), "work": work, "output": output, "tasks": len(first | then),
            "patches": patches, "steps": first | then, "store": output}  # fmt: skip


def peer_killed(showdown: Showdown) -> dict[str, Any]:
    """Killed when half of the patches are segmented; the same command again, and the one after it."""
    run = PeerRun(showdown, "killed")
    shutil.rmtree(run.folder, ignore_errors=True)
    before, _ = run.chain("convert", "patchify")
    patches = run.patches
    killed = run.start(run.commands()["segment"], "segment", kill_when=lambda: len(run.results) >= patches // 2)
    done, moment = len(run.results), time.time()
    old: list[int] = [0]

    def look() -> None:
        found = run.results
        if len(found) == patches or not old[0]:
            old[0] = sum(path.stat().st_mtime < moment for path in found)

    again = run.start(run.commands()["segment"], "segment-again", on_look=look)
    last, _ = run.chain("aggregate")
    return {
        "killed": asdict(before.then(killed)),
        "resumed": asdict(again.then(last)),
        "done_before": done,
        "kept": min(old[0], done),
        "of": patches,
        "unit": "patches",
    }


#: Growth by Sopa's functions: its command line grows cells for the means of channels alone, not for transcripts.
_GROW = """
import sys, sopa, spatialdata
from spatialdata.models import ShapesModel
from spatialdata.transformations import get_transformation
store, ratio = sys.argv[1], float(sys.argv[2])
sdata = spatialdata.read_zarr(store)
nuclei = sdata.shapes["cellpose_boundaries"]
places = get_transformation(nuclei, get_all=True)
for name, apart in (("grown", False), ("apart", True)):
    cells = sopa.shapes.expand_radius(nuclei, ratio, no_overlap=apart)
    cells = cells[~cells.is_empty]  # it may leave nothing of a cell, and then cannot count
    cells.attrs.pop("transform", None)
    sdata.shapes[name] = ShapesModel.parse(cells, transformations=dict(places))
    sdata.write_element(name)
    sopa.aggregate(sdata, shapes_key=name, aggregate_channels=False, key_added=f"table_{name}")
"""


def peer_grown(showdown: Showdown) -> dict[str, Any]:
    """The same nuclei, grown as far as ours: by its default, and without overlaps."""
    import numpy as np
    import shapely
    from showdown_measures import read_result

    whole, run = PeerRun(showdown, "whole"), PeerRun(showdown, "grown")
    shutil.rmtree(run.folder, ignore_errors=True)
    nuclei = read_result(whole.store, "cellpose_boundaries", (showdown.size.width_px,) * 2).outlines
    # Its growth is a share of the mean radius of all cells.
    ratio = GROWTH_UM / PIXEL_UM / float(np.sqrt(shapely.area(nuclei) / math.pi).mean())
    run.folder.mkdir(parents=True)
    shutil.copytree(whole.store, run.store)
    command = [showdown.peer, "-c", _GROW, run.store, ratio]
    taken = Watch(run.folder, environment(CORES)).run(command, log=showdown.folder / f"{PEER}-grown.log")
    return {**asdict(taken), "ratio": round(ratio, 6)}


# --- domains


def domains(showdown: Showdown, method: str, python: Path) -> list[dict[str, Any]]:
    """Domains of two slides of different panels by one method, a run a seed."""
    from domains_quality import scores

    cells = showdown.size.cohort_cells
    make = domains_cohorts.simulated(slides=2, panels=2, panel_overlap=0.6, n_cells=cells, seed=101)
    cohort = domains_cohorts.Cohort("two_panels", "2 slides of 2 panels", "counts", 8, make)
    home = domains_cohorts.write(cohort, showdown.folder)
    lines = []
    for seed in showdown.size.seeds:
        output = showdown.folder / f"domains-{method}-{seed}.json"
        threads = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "PYTHONHASHSEED": str(seed)}
        command = [python, HERE / "domains_methods.py", method, home, output, "--seed", seed]
        watch = Watch(showdown.folder / "two_panels", threads)
        taken = watch.run(command, log=output.with_suffix(".log"))
        document = json.loads(output.read_text())
        found = scores(home, document["labels"])
        lines.append({"seed": seed, **asdict(taken), **found, "versions": document["versions"]})
    return lines


# --- all of it


def _counted(names: list[str]) -> dict[str, int]:
    return {name: names.count(name) for name in dict.fromkeys(names)}


def package_version(python: Path, *packages: str) -> dict[str, str]:
    """Versions of packages in an environment."""
    code = "import importlib.metadata as m, sys; print('\\n'.join(m.version(name) for name in sys.argv[1:]))"
    found = subprocess.run([str(python), "-c", code, *packages], capture_output=True, text=True, check=True)
    return dict(zip(packages, found.stdout.split(), strict=True))


def machine() -> dict[str, Any]:
    """The machine without its name."""
    model = platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return {"processor": model, "cores": CORES, "memory_gb": round(memory), "system": platform.system()}


def run(showdown: Showdown) -> dict[str, Any]:
    """All stages that are still to be done; everything that the page shows, as plain data."""
    from showdown_page import measure

    once = showdown.once
    once("machine", machine)
    once("input", showdown.make_input)
    once("loads.begin", lambda: list(os.getloadavg()))
    once("ours.whole", lambda: our_whole(showdown))
    once("ours.killed", lambda: our_killed(showdown))
    once("ours.grown", lambda: our_grown(showdown))
    once("domains.ours", lambda: domains(showdown, "cellquilt", DOMAINS_PYTHON))
    once("ours.versions", lambda: package_version(CELLPOSE, "cellpose", "torch") | {"nextflow": _nextflow(showdown)})
    if showdown.peer is not None:
        peer = showdown.peer
        once("peer.versions", lambda: package_version(peer, "sopa", "cellpose", "spatialdata", "torch"))
        once("peer.whole", lambda: peer_whole(showdown))
        once("peer.killed", lambda: peer_killed(showdown))
        once("peer.grown", lambda: peer_grown(showdown))
    if showdown.novae is not None:
        novae = showdown.novae
        once("domains.novae", lambda: domains(showdown, "novae", novae))
    once("loads.end", lambda: list(os.getloadavg()))
    once("date", lambda: datetime.now(UTC).date().isoformat())
    return measure(showdown)


def _nextflow(showdown: Showdown) -> str:
    for line in (showdown.folder / f"{OURS}-whole.log").read_text().splitlines():
        if "version" in line:
            return line.split("version")[1].split()[0]
    return "?"


def main() -> None:
    """Run what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, help="a Python that has sopa 2.2.11 and cellpose 3")
    parser.add_argument("--novae", type=Path, help="a Python that has novae 1.1.2")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--output", type=Path, default=ROOT / "showdown")
    parser.add_argument("--note", default="", help="a remark on the run, for the page")
    parser.add_argument("--fresh", action="store_true", help="begin anew")
    given = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])  # of all processes that are started from here
    if given.fresh:
        shutil.rmtree(given.output, ignore_errors=True)
    output = given.output.absolute()
    output.mkdir(parents=True, exist_ok=True)
    # Absolute, not resolved: an environment's Python is a link.
    peer, novae = (python and python.absolute() for python in (given.peer, given.novae))
    showdown = Showdown(output, SIZES[given.size], peer, novae)
    kept = output / "state.json"
    if kept.is_file():
        showdown.state = json.loads(kept.read_text())
    if showdown.state.setdefault("size", given.size) != given.size:
        sys.exit(f"{output} holds a showdown of size {showdown.state['size']}; give --fresh or another --output")
    if given.peer is None:
        print("no PEER: sopa's half is left out", flush=True)
    if given.novae is None:
        print("no NOVAE: novae's half is left out", flush=True)
    from showdown_page import render, summary

    data = {**run(showdown), "note": given.note}
    showdown.write("report.json", data)
    (output / "report.html").write_text(render(data))
    print(summary(data))
    print(f"{output / 'report.html'}")


if __name__ == "__main__":
    main()
