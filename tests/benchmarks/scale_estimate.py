"""The tables of docs/scale.md: what `--estimate` says of slides that are not there, from their sizes.

    .venv/core/bin/python tests/benchmarks/scale_estimate.py

Nothing is measured; the sizes below are all that it gets.
"""

from dataclasses import replace

from cellquilt.core.settings import Settings
from cellquilt.core.sheet import Row
from cellquilt.costs import GPU_SPEED, _bytes, costs_of
from cellquilt.costs.contents import CELL_AREA_UM2, Contents
from cellquilt.costs.disk import disk_of
from cellquilt.costs.plan import Task, tasks_of_cohort, tasks_of_sample
from cellquilt.costs.prices import PRICES, read_prices
from cellquilt.costs.table import cpu_seconds, memory_mb

MILLION = 1_000_000
#: No task asks for more.
LIMIT_MB = 128 * 1024
#: Name → side in pixels, channels, µm a pixel, transcripts, bytes of the machine's files.
SLIDES = {
    "region": (32_768, 4, 0.2125, 25 * MILLION, 9_000_000_000),
    "whole slide": (131_072, 2, 0.108, 500 * MILLION, 85_000_000_000),
}
METHODS: dict[str, dict[str, object]] = {
    "vendor": {"segmentation": "vendor"},
    "cellpose": {"segmentation": "cellpose"},
    "cellpose on GPUs": {"segmentation": "cellpose", "cellpose_gpu": True},
    "cellpose,proseg on GPUs": {"segmentation": "cellpose,proseg", "cellpose_gpu": True},
}
ON_DEMAND, SPOT, _ = read_prices(PRICES)["offers"].values()


def contents(name: str) -> Contents:
    """What headers of such a slide would say."""
    side, channels, pixel_um, transcripts, size = SLIDES[name]
    cells = round((side * pixel_um) ** 2 / CELL_AREA_UM2)
    outlines = min(size, cells * 600)
    names = ("DAPI", *(f"stain_{n}" for n in range(1, channels)))
    return Contents(
        (channels, side, side), names, 2, pixel_um, transcripts, cells, cells,
        {"bytes": size, "outline_bytes": outlines}, size,
    )  # fmt: skip


def rows(name: str, method: str, count: int) -> tuple[list[str], list[str]]:
    """Rows of both tables, of so many slides that are alike."""
    settings = Settings({**METHODS[method], "cellpose_channels": "DAPI"})
    found, slide = contents(name), Row(name, "merscope")
    tasks = tasks_of_sample(slide, settings, found)
    one = costs_of(tasks)
    work, published = disk_of(slide, settings, found, sum(one.tasks.values()))
    total = costs_of([replace(task, count=task.count * count) for task in tasks])
    largest = max(tasks, key=lambda task: asked_mb(task))
    path = {
        task.process: cpu_seconds(task.process, task.sizes) / (GPU_SPEED if task.gpu else task.cpus) for task in tasks
    }
    money = [
        total.cpu_h * offer["cpu_h"] + total.memory_gb_h * offer["memory_gb_h"] + total.gpu_h * offer["gpu_h"]
        for offer in (ON_DEMAND, SPOT)
    ]
    money.append(count * published / 1e9 * ON_DEMAND["storage_gb_month"])
    slides = f"{count:,} × {name}"
    needs = [
        slides, method, f"{sum(total.tasks.values()):,}", f"{total.cpu_h:,.{0 if count > 1 else 1}f}",
        f"{total.gpu_h:,.{0 if count > 1 else 2}f}" if total.gpu_h else "",
        f"{asked_mb(largest) / 1024:.1f} GB `{largest.process}`", f"{sum(path.values()) / 3600:.1f} h",
    ]  # fmt: skip
    costs = [
        slides, method, *map(_bytes, (count * found.raw_bytes, count * work, count * published)),
        *(f"{cost:,.{0 if cost > 20 else 2}f}" for cost in money),
    ]  # fmt: skip
    return needs, costs


def asked_mb(task: Task) -> int:
    """Memory that is asked for a task at first."""
    return memory_mb(task.process, task.sizes, task.memory_setting_mb)


def most_slides(process: str) -> int:
    """Slides of the first kind whose cohort a process can hold in the most memory that is ever asked for."""

    def fits(count: int) -> bool:
        tasks = tasks_of_cohort(Settings(domains="train"), count * contents("region").cells, count)
        return all(asked_mb(task) < LIMIT_MB for task in tasks if task.process == process)

    return next(count for count in range(5000, 0, -1) if fits(count))


if __name__ == "__main__":
    kinds = [
        (name, method, count)
        for name, count in (("region", 1), ("region", 10_000), ("whole slide", 1))
        for method in METHODS
    ]
    heads = (
        ("slides", "method", "tasks", "CPU-h", "GPU-h", "largest request", "longest way"),
        ("slides", "method", "read", "work", "results", "on demand", "spot", "storage a month"),
    )
    for which, head in enumerate(heads):
        print("| " + " | ".join(head) + " |\n" + "|---" * len(head) + "|")
        for kind in kinds:
            print("| " + " | ".join(rows(*kind)[which]) + " |")
        print()
    for process in ("DOMAINS_TRAIN", "DOMAINS_ASSIGN", "DOMAINS_REPORT"):
        print(f"{process}: up to {most_slides(process)} regions of {contents('region').cells:,} cells")
