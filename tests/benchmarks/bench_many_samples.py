"""Many small samples in one run: tasks, what the head job holds, and what a task costs beside its own work.

    .venv/core/bin/python tests/benchmarks/bench_many_samples.py --folder many --samples 200   # all for real
    .venv/core/bin/python tests/benchmarks/bench_many_samples.py --folder many --samples 200 --stub   # the head

All samples are links to one simulated slide of 256 × 256 pixels, segmented by the `rainfall` function, which needs no
model. Printed as JSON; docs/scale.md says what came out.
"""

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT / "tests"))

METHOD = (
    "--segmentation", "generic", "--generic_function", "cellquilt.segment.generic:rainfall",
    "--patch_width_px", "256", "--domains", "none",
)  # fmt: skip


def write_sheet(folder: Path, samples: int) -> Path:
    """A sheet of samples with files of their own names."""
    from cellquilt.simulate import simulate

    slide = folder / "sim" / "slide_0"
    if not slide.exists():
        simulate(folder / "sim", width_px=256, slides=1, seed=3)
    sheet = folder / "sheet.csv"
    with sheet.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["sample", "technology", "path", "transcripts"])
        for number in range(samples):
            own = folder / "inputs" / f"s{number}"
            own.mkdir(parents=True, exist_ok=True)
            for name in ("image.ome.tif", "transcripts.parquet"):
                if not (own / name).exists():
                    os.link(slide / name, own / name)
            table.writerow([f"s{number}", "ome_tif", own / "image.ome.tif", own / "transcripts.parquet"])
    return sheet


def run(folder: Path, sheet: Path, more: list[str]) -> dict[str, object]:
    """Run the pipeline and watch its head job."""
    from traces import process as process_of
    from traces import seconds

    began = time.monotonic()
    process = subprocess.Popen(
        [
            ROOT / "scripts" / "nextflow",
            "run",
            ROOT / "main.nf",
            "--input",
            sheet,
            "--outdir",
            "results",
            *METHOD,
            *more,
        ],
        cwd=folder,
        stdout=(folder / "run.log").open("w"),
        stderr=subprocess.STDOUT,
        env={**os.environ, "NXF_ANSI_LOG": "false"},
    )
    peak_mb, head_cpu_s = 0.0, 0.0
    while process.poll() is None:
        # The launcher becomes Java by exec: the process is the head job itself.
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
            times = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            break
        for line in status.splitlines():
            if line.startswith("VmHWM"):
                peak_mb = max(peak_mb, int(line.split()[1]) / 1024)
        head_cpu_s = (int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK")
        time.sleep(0.5)
    code = process.wait()
    wall_s = time.monotonic() - began
    with (folder / "results" / "pipeline_info" / "trace.txt").open(newline="") as file:
        tasks = list(csv.DictReader(file, delimiter="\t"))
    statuses = folder / "results" / "samples.tsv"
    outcomes: Counter[str] = Counter()
    if statuses.exists():
        with statuses.open(newline="") as file:
            outcomes.update(row["status"] for row in csv.DictReader(file, delimiter="\t"))
    own_s = sum(seconds(task["realtime"]) for task in tasks)
    return {
        "exit": code,
        "tasks": len(tasks),
        "tasks_by_process": dict(sorted(Counter(map(process_of, tasks)).items())),
        "samples_by_status": dict(sorted(outcomes.items())),
        "wall_s": round(wall_s, 1),
        "tasks_own_s": round(own_s, 1),
        "wall_ms_a_task": round(1000 * wall_s / len(tasks)),
        "head_peak_mb": round(peak_mb),
        "head_cpu_s": round(head_cpu_s, 1),
        "head_cpu_ms_a_task": round(1000 * head_cpu_s / len(tasks)),
        "results_mb": round(sum(p.lstat().st_size for p in (folder / "results").rglob("*") if p.is_file()) / 1e6, 1),
        "load": os.getloadavg()[1],
    }


def main() -> None:
    """Make the samples, run them, print the numbers."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--stub", action="store_true", help="no work is done in the tasks")
    parser.add_argument("--folder", type=Path, required=True, help="made anew")
    arguments, more = parser.parse_known_args()
    shutil.rmtree(arguments.folder, ignore_errors=True)
    arguments.folder.mkdir(parents=True)
    folder = arguments.folder.resolve()
    found = run(folder, write_sheet(folder, arguments.samples), [*(["-stub-run"] if arguments.stub else []), *more])
    print(json.dumps({"samples": arguments.samples, "stub": arguments.stub, **found}, indent=2))
    sys.exit(found["exit"])


if __name__ == "__main__":
    main()
