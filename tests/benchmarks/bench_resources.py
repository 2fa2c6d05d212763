"""What every process of the pipeline costs: memory and CPU time by how much a task gets.

``python tests/benchmarks/bench_resources.py [--only CONVERT] [--sizes 2048,4096] [--scratch FOLDER] [--dry-run]``

Runs the pipeline's tasks by their own scripts on simulated slides of several sizes, each a process of its own, one at
a time; fits ``base + Σ coefficient × millions of what the task got``, no coefficient below zero; and writes them, with
the runs they are from, into `resources.json`. Peak memory is that of the task's whole tree of processes, watched ten
times a second. With ``--only`` the other processes keep their numbers.
"""

import argparse
import datetime
import json
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from cellquilt.core.sizes import size_of
from cellquilt.costs.table import TABLE
from scipy.optimize import nnls

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "resources.md"
PAGE_HEAD = (
    "| process | MB | streamed: MB a million | held: MB a million | s | s a million | measured |\n"
    "|---|---|---|---|---|---|---|\n"
)
#: What the pipeline asks for over what was measured.
MEMORY_SAFETY, TIME_SAFETY = 1.5, 5.0
DEFAULT_MB = 1500
#: Sweeps of proseg here, of either kind, and as many as there are by default: its time grows with them.
SWEEPS, FULL_SWEEPS = 20, 200
LIMITS = {"least_mb": 768, "most_mb": 128 << 10, "least_minutes": 60, "most_minutes": 7 * 24 * 60}


@dataclass(frozen=True)
class Model:
    """What a process's costs grow with.

    Attributes
    ----------
    streamed
        Memory that the setting ``memory_mb`` bounds; fitted.
    cpu
        CPU time; fitted.
    held
        Memory that nothing bounds; fitted.
    known
        Such memory in MB a million, where these slides are too small to show it beside what is streamed.
    """

    streamed: tuple[str, ...] = ()
    cpu: tuple[str, ...] = ()
    held: tuple[str, ...] = ()
    known: dict[str, float] = field(default_factory=dict)


#: An outline with its index and its copies takes 2 kB (docs/benchmarks.md: 100,000 cells 190 MB); in a patch's result
#: it has 140 bytes, in a machine's file about 400.
_CELLS = {"cells": 2000.0}
MODELS = {
    "CONVERT": Model(("bytes",), ("bytes", "outline_bytes"), known={"outline_bytes": 5.0}),
    "TISSUE": Model(("pixels",), ("pixels",)),
    "PATCHIFY": Model(("pixels",), ("pixels",)),
    "SEGMENT_GENERIC": Model((), ("pixels",), ("patch_pixels",)),
    "SEGMENT_CELLPOSE": Model((), ("pixels",), ("patch_pixels",)),
    "SEGMENT_STARDIST": Model((), ("pixels",), ("patch_pixels",)),
    "RESOLVE": Model((), ("bytes", "cells"), known={"bytes": 15.0, **_CELLS}),
    "PATCHIFY_TRANSCRIPTS": Model(("transcripts",), ("transcripts", "cells"), known=_CELLS),
    "SEGMENT_PROSEG": Model((), ("transcripts",), ("patch_transcripts",)),
    "RESOLVE_TRANSCRIPTS": Model(("transcripts",), ("transcripts", "bytes"), known=_CELLS),
    "AGGREGATE": Model(("transcripts",), ("pixels", "transcripts", "cells"), known=_CELLS),
    "ASSEMBLE": Model(("transcripts",), ("transcripts", "cells"), known=_CELLS),
    "COMPARE": Model(("transcripts",), ("transcripts", "cells"), known=_CELLS),
    "REPORT": Model(("transcripts",), ("transcripts", "cells"), known=_CELLS),
    "EXPORT": Model(("transcripts",), ("transcripts", "cells"), known=_CELLS),
    "EXPLORER": Model(("transcripts",), ("pixels", "transcripts", "cells"), known=_CELLS),
    "PREVIEW": Model(("pixels",), ("pixels",)),
    "DOMAINS_PREPARE": Model((), ("cells",), known=_CELLS),
    "DOMAINS_TRAIN": Model((), ("cells",), ("cells",)),
    "DOMAINS_EMBED": Model((), ("cells",), known=_CELLS),
    "DOMAINS_ASSIGN": Model((), ("bytes",), ("bytes",)),
    "DOMAINS_ANNOTATE": Model((), ("cells",), known=_CELLS),
    "DOMAINS_REPORT": Model((), ("cells",), ("cells",)),
    "SAMPLES": Model(),
}
#: What larger inputs took in other benchmarks: too much to run once more here.
KNOWN: dict[str, list[dict[str, Any]]] = {
    "PATCHIFY_TRANSCRIPTS": [
        {
            "slide": "prior-10m of bench_transcripts.py",
            "sizes": {"transcripts": 10**7, "cells": 10**5},
            "peak_mb": 917.0,
            "cpu_s": 8.5,
        },
    ],
    "RESOLVE_TRANSCRIPTS": [
        {
            "slide": "molecules-points-10m of bench_transcripts.py",
            "sizes": {"transcripts": 10**7, "cells": 10**5},
            "peak_mb": 782.0,
            "cpu_s": 9.0,
        },
    ],
    "SEGMENT_PROSEG": [
        {
            "slide": "proseg_memory.py",
            "sizes": {"transcripts": 4 * 10**6, "patch_transcripts": 4 * 10**6},
            "peak_mb": 2900.0,
        },
    ],
    "DOMAINS_PREPARE": [
        {"slide": "100,000 random cells", "sizes": {"cells": 10**5}, "peak_mb": 490.0, "cpu_s": 4.4},
    ],
    "DOMAINS_TRAIN": [
        {"slide": "20 slides of docs/domains.md", "sizes": {"cells": 10**6}, "peak_mb": 681.0},
    ],
    "DOMAINS_REPORT": [
        {"slide": "8 of docs/domains_analysis.md", "sizes": {"cells": 16 * 10**5}, "peak_mb": 950.0, "cpu_s": 60.0},
    ],
}
#: What cannot be run here, from what else is known.
NOT_MEASURED: dict[str, dict[str, Any]] = {
    "SEGMENT_BAYSOR": {
        "memory": {"base_mb": 1500, "streamed_mb": {}, "held_mb": {"patch_transcripts": 4000}},
        "cpu": {"base_s": 60, "per_million_s": {"transcripts": 3600}},
        "measured": "not measured: a cautious guess. Say what yours takes in a site's configuration",
    },
    "SEGMENT_CELLPOSE4": {
        "memory": {"base_mb": 4200, "streamed_mb": {}, "held_mb": {"patch_pixels": 80}},
        "cpu": {"base_s": 60, "per_million_s": {"pixels": 120}},
        "measured": "not measured: weights of 1.2 GB are held twice while they load; much slower than Cellpose 3",
    },
    "OTHERS": {
        "memory": {"base_mb": 1365, "streamed_mb": {}, "held_mb": {}},
        "cpu": {"base_s": 2880, "per_million_s": {}},
        "measured": "not measured: a process without an entry asks for 2 GB and 4 hours",
    },
    "ESTIMATE": {
        "memory": {"base_mb": 400, "streamed_mb": {}, "held_mb": {}},
        "cpu": {"base_s": 5, "per_million_s": {}},
        "measured": "reads headers only",
    },
}


# --- running


def tree_mb(pid: int) -> float:
    """Resident memory of a process and all below it, in MiB."""
    total, waiting = 0.0, [pid]
    while waiting:
        one = waiting.pop()
        try:
            status = Path(f"/proc/{one}/statm").read_text().split()
            total += int(status[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
            for task in Path(f"/proc/{one}/task").iterdir():
                waiting += [int(child) for child in (task / "children").read_text().split()]
        except OSError:
            continue
    return total


def run(command: list[str | Path], log: Path) -> dict[str, float]:
    """Run one task; CPU seconds of it and its children, peak memory of all of them together in MiB."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")
    environment = {**os.environ, **dict.fromkeys(names, "1"), "PYTHONNOUSERSITE": "1"}
    environment["PATH"] = os.pathsep.join([str(ROOT / ".venv/proseg/bin"), environment["PATH"]])
    peak, done = [0.0], threading.Event()
    with log.open("wb") as out:
        process = subprocess.Popen(
            [str(part) for part in command], stdout=out, stderr=subprocess.STDOUT, env=environment
        )

        def watch() -> None:
            while not done.wait(0.1):
                peak[0] = max(peak[0], tree_mb(process.pid))

        watcher = threading.Thread(target=watch)
        watcher.start()
        _, status, usage = os.wait4(process.pid, 0)
        done.set()
        watcher.join()
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{command[1]} ended with {process.returncode}: {log.read_text(errors='replace')[-800:]}")
    return {
        "cpu_s": round(usage.ru_utime + usage.ru_stime, 2),
        "peak_mb": round(max(peak[0], usage.ru_maxrss / 1024), 1),
    }


class Bench:
    """Runs tasks and keeps what they took."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.runs: dict[str, list[dict[str, Any]]] = {}
        self.slide = ""

    def task(
        self,
        process: str,
        script: str,
        *arguments: str | Path,
        inputs: Iterable[Path],
        stage: str = "core",
        **settings: Any,
    ) -> None:
        """One task by its script, in its stage's environment."""
        python = ROOT / ".venv" / stage / "bin" / "python"
        command: list[str | Path] = [python, ROOT / "bin" / f"{script}.py", *arguments]
        if script not in ("samples", "domains_report"):
            command += ["--settings", json.dumps(settings)]
        sizes = size_of(inputs)
        found = run(command, self.scratch / f"{self.slide}.{process or script}.log")
        found["cpu_s"] *= FULL_SWEEPS / SWEEPS if process == "SEGMENT_PROSEG" else 1
        if process:
            self.runs.setdefault(process, []).append({"slide": self.slide, "sizes": sizes, **found})
        print(f"{self.slide:<14} {process:<22} {found['peak_mb']:8.0f} MB {found['cpu_s']:8.1f} s  {sizes}", flush=True)


# --- the tasks of a slide


def simulate(folder: Path, pixels: int) -> Path:
    """A simulated slide's folder."""
    program = "from cellquilt.simulate import simulate; import sys; simulate(sys.argv[1], width_px=int(sys.argv[2]))"
    subprocess.run(
        [ROOT / ".venv/core/bin/python", "-c", program, folder, str(pixels)], check=True, capture_output=True
    )
    return folder / "slide_0"


def image_slide(
    bench: Bench, pixels: int, *, transcripts: bool = True, engines: bool = True, sweeps: int = 0
) -> Path | None:
    """All tasks of a slide with an image; the table's delta store."""
    bench.slide = f"{pixels}px" + ("" if transcripts else "-image")
    source, work = bench.scratch / f"sim{pixels}" / "slide_0", bench.scratch / bench.slide
    if not source.exists():
        simulate(bench.scratch / f"sim{pixels}", pixels)
    work.mkdir()
    part = {name: work / f"s.{name}.zarr" for name in ("raw", "tissue", "patches", "cells", "table", "vendor")}
    image, points = source / "image.ome.tif", source / "transcripts.parquet"
    given = [image, *([points] if transcripts else [])]
    more = ["--transcripts", points] if transcripts else []
    bench.task(
        "CONVERT",
        "convert",
        image,
        *more,
        "--technology",
        "ome_tif",
        "--sample",
        "s",
        "--output",
        part["raw"],
        inputs=given,
    )
    raw = part["raw"]
    bench.task("TISSUE", "tissue", raw, "--output", part["tissue"], inputs=[raw])
    cells = ["--tissue", part["tissue"]]
    generic = {"segmentation": "generic", "generic_function": "cellquilt.segment.generic:rainfall"}
    bench.task(
        "PATCHIFY",
        "patchify",
        raw,
        *cells,
        "--bundles",
        work / "bundles",
        "--output",
        part["patches"],
        inputs=[raw],
        **generic,
    )
    for bundle in sorted((work / "bundles").iterdir()):
        bench.task(
            "SEGMENT_GENERIC",
            "segment",
            "generic",
            bundle,
            "--output",
            work / f"{bundle.stem}.cells.parquet",
            inputs=[bundle],
            **generic,
        )
    results = sorted(work.glob("*.cells.parquet"))
    bench.task("RESOLVE", "resolve", raw, *results, "--output", part["cells"], inputs=[raw, *results], **generic)
    deltas = [part["cells"]]
    bench.task(
        "AGGREGATE", "aggregate", raw, "--cells", part["cells"], "--output", part["table"], inputs=[raw, *deltas]
    )
    parts = [part[name] for name in ("raw", "tissue", "patches", "cells", "table")]
    store, qc = work / "s.zarr", work / "qc.json"
    bench.task("ASSEMBLE", "assemble", *parts, "--output", store, "--qc", qc, inputs=parts)
    bench.task("REPORT", "report", store, "--qc", qc, "--output", work / "report.html", inputs=[store])
    bench.task(
        "PREVIEW",
        "preview",
        raw,
        *cells,
        "--output",
        work / "preview.html",
        inputs=[raw, part["tissue"]],
        preview=3,
        **generic,
    )
    bench.task("SAMPLES", "samples", qc, "--samples", "s", "--output", work / "s.tsv", inputs=[])
    if not transcripts:
        return None
    bench.task("EXPORT", "export", store, "--output", work / "exports", inputs=[store], export="vpt,qupath")
    bench.task("EXPLORER", "explorer", store, "--output", work / "explorer", inputs=[store])
    for method, stage in (("cellpose", "cellpose3"), ("stardist", "stardist")) if engines else ():
        bundles = work / f"{method}_bundles"
        subprocess.run(
            [
                ROOT / ".venv/core/bin/python",
                ROOT / "bin/patchify.py",
                raw,
                *cells,
                "--bundles",
                bundles,
                "--output",
                work / f"{method}.patches.zarr",
                "--settings",
                json.dumps({"segmentation": method}),
            ],
            check=True,
            capture_output=True,
        )
        for bundle in sorted(bundles.iterdir()):
            bench.task(
                f"SEGMENT_{method.upper()}",
                "segment",
                method,
                bundle,
                "--output",
                work / f"{method}.{bundle.stem}.cells.parquet",
                inputs=[bundle],
                stage=stage,
            )
    molecules(bench, raw, part["cells"], work, sweeps)
    other = work / "s.molecules_table.zarr"
    bench.task(
        "AGGREGATE",
        "aggregate",
        raw,
        "--cells",
        work / "s.molecules.zarr",
        "--name",
        "proseg",
        "--output",
        other,
        inputs=[raw, work / "s.molecules.zarr"],
    )
    both = work / "both.zarr"
    bench.task(
        "ASSEMBLE", "assemble", *parts, other, "--output", both, "--qc", work / "q2.json", inputs=[*parts, other]
    )
    bench.task(
        "COMPARE",
        "compare",
        both,
        "--output",
        work / "c.json",
        "--output",
        work / "c.tsv",
        inputs=[both],
        compare="proseg",
    )
    return part["table"]


def molecules(bench: Bench, raw: Path, prior: Path, work: Path, sweeps: int) -> None:
    """Proseg from the cells of the image. Its time grows with its sweeps; only full ones count for it."""
    settings = {"segmentation": "cellpose,proseg", "proseg_burnin_samples": sweeps, "proseg_samples": sweeps}
    bundles = work / "molecule_bundles"
    bench.task(
        "PATCHIFY_TRANSCRIPTS", "patchify_transcripts", raw, "--method", "proseg", "--cells", prior,
        "--bundles", bundles, "--output", work / "s.transcript_patches.zarr", inputs=[raw, prior], **settings,
    )  # fmt: skip
    results = []
    for bundle in sorted(bundles.iterdir()):
        results.append(work / f"{bundle.stem}.result")
        bench.task(
            "SEGMENT_PROSEG" if sweeps == SWEEPS else "", "segment", "proseg", bundle, "--output", results[-1],
            "--threads", "1", inputs=[bundle], **settings,
        )  # fmt: skip
    bench.task(
        "RESOLVE_TRANSCRIPTS", "resolve", raw, *results, "--prior", prior, "--output", work / "s.molecules.zarr",
        inputs=[raw, prior, *results], **settings,
    )  # fmt: skip


def xenium_slide(bench: Bench, pixels: int) -> None:
    """A machine's folder with outlines, and its own cells taken as they are."""
    bench.slide = f"{pixels}px-xenium"
    source, work = bench.scratch / f"xenium{pixels}", bench.scratch / bench.slide
    program = "from cellquilt.simulate import simulate; import sys; simulate(sys.argv[1], width_px=int(sys.argv[2]), "
    program += "format='xenium')"
    python = ROOT / ".venv/core/bin/python"
    subprocess.run([python, "-c", program, source, str(pixels)], check=True, capture_output=True)
    machine = next(path.parent for path in source.rglob("experiment.xenium"))
    work.mkdir()
    raw, cells = work / "s.raw.zarr", work / "s.cells.zarr"
    bench.task(
        "CONVERT", "convert", machine, "--technology", "xenium", "--sample", "s", "--output", raw, inputs=[machine]
    )
    bench.task("RESOLVE", "resolve", raw, "--output", cells, inputs=[raw], segmentation="vendor")
    table = work / "s.table.zarr"
    bench.task("AGGREGATE", "aggregate", raw, "--cells", cells, "--output", table, inputs=[raw, cells])


def domains(bench: Bench, tables: list[Path]) -> None:
    """Domains of a cohort of all slides' tables, and of its first alone."""
    work = bench.scratch / "domains"
    work.mkdir()
    graphs = []
    for table in tables:
        bench.slide = table.parent.name
        graphs.append(work / f"{bench.slide}.graph.zarr")
        bench.task(
            "DOMAINS_PREPARE", "domains_prepare", table, "--sample", bench.slide, "--output", graphs[-1], inputs=[table]
        )
    for n in sorted({1, len(graphs)}):
        folder = work / f"cohort{n}"
        folder.mkdir()
        used, model, bench.slide = graphs[:n], folder / "model", f"cohort{n}"
        bench.task("DOMAINS_TRAIN", "domains_train", *used, "--output", model, inputs=used, stage="domains")
        latents = []
        for graph in used:
            latents.append(folder / graph.name.replace(".graph.zarr", ".latents.parquet"))
            bench.task(
                "DOMAINS_EMBED",
                "domains_embed",
                graph,
                "--weights",
                model,
                "--output",
                latents[-1],
                inputs=[graph],
                stage="domains",
            )
        found = folder / "found"
        bench.task(
            "DOMAINS_ASSIGN",
            "domains_assign",
            *latents,
            "--weights",
            model,
            "--output",
            found,
            inputs=latents,
            stage="domains",
        )
        stores = [bench.scratch / graph.name.removesuffix(".graph.zarr") / "s.zarr" for graph in used]
        annotated = []
        for store, graph in zip(stores, used, strict=True):
            name = graph.name.removesuffix(".graph.zarr")
            annotated.append(folder / f"{name}.zarr")
            bench.task(
                "DOMAINS_ANNOTATE",
                "domains_annotate",
                store,
                "--domains",
                found / f"{name}.domains.parquet",
                "--graph",
                graph,
                "--sample",
                name,
                "--output",
                annotated[-1],
                "--qc",
                folder / "qc.json",
                inputs=[store],
            )
            (folder / "qc.json").unlink()
        bench.task(
            "DOMAINS_REPORT",
            "domains_report",
            *annotated,
            "--model",
            found / "model",
            "--about",
            found / "domains.json",
            "--tables-output",
            folder / "stats",
            "--output",
            folder / "report.html",
            inputs=annotated,
            stage="domains",
        )


# --- fitting


def fitted(runs: list[dict[str, Any]], names: tuple[str, ...], what: str) -> tuple[float, dict[str, float]]:
    """Base and coefficients per million, none below zero, that lie at or above the middle of the runs."""
    runs = [run for run in runs if what in run]
    rows = np.array([[1.0, *(run["sizes"].get(name, 0) / 1e6 for name in names)] for run in runs])
    values = np.array([run[what] for run in runs])
    scale = rows.max(axis=0)
    used = scale > 0
    solution = np.zeros(rows.shape[1])
    # Relative errors count: a slide of a second is as good a witness as one of a minute.
    weight = 1 / np.maximum(values, 1e-3)
    solution[used] = nnls(rows[:, used] / scale[used] * weight[:, None], values * weight)[0] / scale[used]
    return float(solution[0]), {name: float(each) for name, each in zip(names, solution[1:], strict=True) if each > 0}


def rounded(value: float) -> float:
    """Three digits: more were not measured."""
    return float(f"{value:.3g}")


def entry(process: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """A process's entry in the table."""
    model = MODELS[process]
    beside = [
        {
            **run,
            "peak_mb": run["peak_mb"] - sum(mb * run["sizes"].get(name, 0) / 1e6 for name, mb in model.known.items()),
        }
        for run in runs
    ]
    base_mb, memory = fitted(beside, (*model.streamed, *model.held), "peak_mb")
    base_s, cpu = fitted(runs, model.cpu, "cpu_s")
    slides = ", ".join(dict.fromkeys(run["slide"] for run in runs))
    return {
        "memory": {
            "base_mb": rounded(base_mb),
            "streamed_mb": {name: rounded(memory[name]) for name in model.streamed if name in memory},
            "held_mb": {name: rounded(memory[name]) for name in model.held if name in memory} | model.known,
        },
        "cpu": {"base_s": rounded(base_s), "per_million_s": {name: rounded(each) for name, each in cpu.items()}},
        "measured": f"bench_resources.py, {datetime.date.today().isoformat()}: {len(runs)} tasks ({slides}), "
        f"up to {max(run['peak_mb'] for run in runs):.0f} MB and {max(run.get('cpu_s', 0) for run in runs):.0f} s",
    }


def main() -> None:
    """Measure, fit, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="write this process's numbers only")
    parser.add_argument("--sizes", default="1024,2048,4096,6144", help="widths of the slides in pixels")
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--dry-run", action="store_true", help="show the table instead of writing it")
    options = parser.parse_args()
    started = time.monotonic()
    scratch = options.scratch or Path(tempfile.mkdtemp(prefix="resources-"))
    scratch.mkdir(parents=True, exist_ok=True)
    bench = Bench(scratch)
    try:
        widths = [int(width) for width in options.sizes.split(",")]
        # Proseg with all its sweeps, and the engines, on the smaller slides: they would take hours on the others.
        tables = [
            image_slide(bench, width, engines=width <= 4096, sweeps=SWEEPS if width <= 2048 else 1) for width in widths
        ]
        image_slide(bench, widths[-1], transcripts=False, engines=False)
        for width in (1024, 2048):
            xenium_slide(bench, width)
        domains(bench, [table for table in tables if table is not None])
    finally:
        (scratch / "runs.json").write_text(json.dumps(bench.runs, indent=1))
        if options.scratch is None:
            shutil.rmtree(scratch)
    write(bench.runs, options.only, options.dry_run)
    print(f"{time.monotonic() - started:.0f} s")


def write(runs: dict[str, list[dict[str, Any]]], only: str | None, dry_run: bool) -> None:
    """The table, sorted by process."""
    before = json.loads(TABLE.read_text()) if TABLE.exists() else {"processes": {}}
    found = {process: entry(process, tasks + KNOWN.get(process, [])) for process, tasks in runs.items()} | NOT_MEASURED
    processes = before["processes"] | {name: found[name] for name in found if only in (None, name)}
    table = {
        "about": "Written by tests/benchmarks/bench_resources.py; docs/resources.md explains it. Coefficients are per "
        "million pixels, transcripts, cells or bytes.",
        "memory_safety": MEMORY_SAFETY,
        "time_safety": TIME_SAFETY,
        "memory_setting_mb": DEFAULT_MB,
        **LIMITS,
        "processes": dict(sorted(processes.items())),
    }
    text = json.dumps(table, indent=2) + "\n"
    if dry_run:
        print(text)
    else:
        TABLE.write_text(text)
        write_page(table)


def write_page(table: dict[str, Any]) -> None:
    """The table of docs/resources.md, between its head and the next blank line."""

    def shown(coefficients: dict[str, float]) -> str:
        return ", ".join(f"{each:g} `{name}`" for name, each in coefficients.items())

    rows = []
    for name, costs in table["processes"].items():
        memory, cpu = costs["memory"], costs["cpu"]
        cells = [f"{memory['base_mb']:g}", shown(memory["streamed_mb"]), shown(memory["held_mb"])]
        cells += [f"{cpu['base_s']:g}", shown(cpu["per_million_s"]), costs["measured"]]
        rows.append(f"| `{name}` | {' | '.join(cells)} |")
    before, head, rest = PAGE.read_text().partition(PAGE_HEAD)
    _, _, after = rest.partition("\n\n")
    PAGE.write_text(f"{before}{head}{chr(10).join(rows)}\n\n{after}")


if __name__ == "__main__":
    main()
