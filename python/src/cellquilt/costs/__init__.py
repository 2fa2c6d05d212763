"""What a run will take, before it starts: tasks, CPU and GPU hours, memory, disk and money, from headers in seconds."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

#: How much faster a GPU's task is than one CPU: a cautious round number.
GPU_SPEED = 15.0


@dataclass
class Costs:
    """What a sample, or all of them, takes.

    Attributes
    ----------
    tasks
        Process → number of tasks.
    cpu_h, gpu_h
        Hours of CPUs and GPUs.
    peak_mb, peak_process
        Memory of the largest task, as measured, and its process.
    memory_mb
        Memory that the pipeline asks for it at first.
    memory_gb_h
        Memory asked for, times hours.
    raw_bytes, work_bytes, published_bytes
        Files that are read; the most that the work folder holds; results.
    """

    tasks: dict[str, int] = field(default_factory=dict)
    cpu_h: float = 0.0
    gpu_h: float = 0.0
    peak_mb: float = 0.0
    peak_process: str = ""
    memory_mb: int = 0
    memory_gb_h: float = 0.0
    raw_bytes: int = 0
    work_bytes: int = 0
    published_bytes: int = 0

    def add(self, other: "Costs") -> None:
        """Add another's; of peaks the larger one counts."""
        self.tasks = dict(sorted((Counter(self.tasks) + Counter(other.tasks)).items()))
        for name in ("cpu_h", "gpu_h", "memory_gb_h", "raw_bytes", "work_bytes", "published_bytes"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        if other.peak_mb > self.peak_mb:
            self.peak_mb, self.peak_process = other.peak_mb, other.peak_process
        self.memory_mb = max(self.memory_mb, other.memory_mb)


@dataclass
class Estimate:
    """What a run will take.

    Attributes
    ----------
    samples
        Sample → its costs.
    total
        Of all samples and of what they have in common.
    money
        Offer → what part of it costs what, and ``total``; storage is of one month.
    currency, prices_of
        Of the prices, and when they were.
    """

    samples: dict[str, Costs]
    total: Costs
    money: dict[str, dict[str, float]]
    currency: str
    prices_of: str

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    def __str__(self) -> str:
        return "\n".join(_page(self))


def estimate(sheet: Path | str, *, prices: Path | str | None = None, **parameters: Any) -> Estimate:
    """Say what a run of the pipeline will take, from the headers of its input.

    Parameters
    ----------
    sheet
        The sample sheet.
    prices
        File with prices (YAML), see ``assets/prices.yml``, which is taken by default.
    parameters
        Parameters of the run, by name.

    Returns
    -------
    Estimate
        ``str()`` of it is a table; ``as_dict()`` plain data.

    Raises
    ------
    CellquiltError
        ``input-invalid``, ``prices-invalid``, and what is found wrong with a slide's files.
    """
    from cellquilt.core.settings import Settings
    from cellquilt.core.sheet import check_input
    from cellquilt.costs.contents import contents_of
    from cellquilt.costs.disk import disk_of
    from cellquilt.costs.plan import cells_of, has_domains, tasks_of_cohort, tasks_of_sample
    from cellquilt.costs.prices import PRICES, read_prices

    rows, values = check_input(sheet, parameters)
    offers = read_prices(PRICES if prices is None else Path(prices))
    samples: dict[str, Costs] = {}
    total, cells, n_with_domains = Costs(), 0, 0
    for row in rows:
        settings = Settings({**values, **row.overrides})
        found = contents_of(row, settings)
        costs = costs_of(tasks_of_sample(row, settings, found))
        costs.raw_bytes = found.raw_bytes
        costs.work_bytes, costs.published_bytes = disk_of(row, settings, found, sum(costs.tasks.values()))
        samples[row.sample] = costs
        total.add(costs)
        if has_domains(found):
            cells += cells_of(str(settings["segmentation"]), found)
            n_with_domains += 1
    total.add(costs_of(tasks_of_cohort(Settings(values), cells, n_with_domains)))
    money = {offer: _money(total, price) for offer, price in offers["offers"].items()}
    return Estimate(samples, total, money, offers["currency"], offers["date"])


def costs_of(tasks: Sequence[Any]) -> Costs:
    """CPU and GPU hours and memory of tasks (`plan.Task`)."""
    from cellquilt.costs.table import cpu_seconds, memory_mb, peak_mb

    costs = Costs()
    for task in tasks:
        seconds = cpu_seconds(task.process, task.sizes)
        hours = seconds / (GPU_SPEED if task.gpu else task.cpus) / 3600
        peak = peak_mb(task.process, task.sizes, task.memory_setting_mb)
        asked = memory_mb(task.process, task.sizes, task.memory_setting_mb)
        tasks_alike = Costs(
            {task.process: task.count},
            cpu_h=task.count * hours * task.cpus,
            gpu_h=task.count * hours if task.gpu else 0.0,
            peak_mb=peak,
            peak_process=task.process,
            memory_mb=asked,
            memory_gb_h=task.count * hours * asked / 1024,
        )
        costs.add(tasks_alike)
    return costs


def _money(costs: Costs, price: Mapping[str, float]) -> dict[str, float]:
    parts = {
        "cpu": costs.cpu_h * price.get("cpu_h", 0),
        "memory": costs.memory_gb_h * price.get("memory_gb_h", 0),
        "gpu": costs.gpu_h * price.get("gpu_h", 0),
        "storage_month": costs.published_bytes / 1e9 * price.get("storage_gb_month", 0),
    }
    return {**parts, "total": sum(parts.values())}


def _page(found: Estimate) -> list[str]:
    rows: list[tuple[str, ...]] = [("sample", "tasks", "CPU-h", "GPU-h", "largest task", "read", "work", "results")]
    for name, costs in (*found.samples.items(), ("total", found.total)):
        rows.append(
            (
                name,
                str(sum(costs.tasks.values())),
                f"{costs.cpu_h:.3g}",
                f"{costs.gpu_h:.3g}",
                f"{costs.peak_mb / 1024:.1f} GB {costs.peak_process}",
                *(_bytes(count) for count in (costs.raw_bytes, costs.work_bytes, costs.published_bytes)),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines += ["", "tasks: " + ", ".join(f"{name} {count}" for name, count in found.total.tasks.items())]
    lines += [
        f"Memory of the largest request: {found.total.memory_mb / 1024:.1f} GB, more where a task is tried again."
    ]
    lines += ["", f"Money, by example prices of {found.prices_of} (storage: results, one month):"]
    lines += [f"  {cost['total']:.2f} {found.currency}  {offer}" for offer, cost in found.money.items()]
    lines += [
        "",
        "From headers: all of a slide is taken to be tissue. Hours are of the CPU that the table was measured on.",
    ]
    return lines


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            break
        count /= 1000
    return f"{count:.3g} {unit}"
