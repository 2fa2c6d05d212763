"""The table of faults: what is done to a run, and how that must end."""

from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RECORD = Path(__file__).with_name("record.json")
PAGE = ROOT / "docs" / "faults.md"
BEGIN, END = "<!-- table of faults: made by `make test-faults` -->", "<!-- end of the table -->"


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes
    ----------
    how
        What is done.
    error
        The error that the run or ``samples.tsv`` must name; empty where the run itself must come through.
    then
        What finishes the work after an error.
    """

    how: str
    error: str = ""
    then: str = "`-resume`"


DELETE = "delete the folder that is named, `-resume`"
_STAGES = ("convert", "tissue", "patchify", "segment", "resolve", "aggregate", "assemble", "report", "samples")

FAULTS: dict[str, Fault] = {
    # Tasks
    "patch-killed": Fault("SIGKILL to the first patch task"),
    **{f"{stage}-killed": Fault(f"SIGKILL to the first task of `{stage}`") for stage in _STAGES},
    "patch-killed-for-good": Fault("SIGKILL to a patch task of one slide of two, each time it is tried", "task-killed"),
    "memory-kill": Fault("a patch task in a container that is killed by its memory limit (cgroup), the first time"),
    "memory-refused": Fault("a patch task is refused memory (`ulimit -v`), the first time"),
    "worker-hangs": Fault("a patch task stands still (SIGSTOP) until its time limit", "task-killed"),
    # Nextflow
    "nextflow-killed": Fault("SIGKILL to Nextflow alone, while CONVERT runs; the task goes on without it", "run-ended"),
    "machine-lost": Fault("SIGKILL to Nextflow and all tasks, in PATCHIFY", "run-ended"),
    "nextflow-ended": Fault("SIGTERM to Nextflow, in a patch task", "run-ended"),
    "ctrl-c": Fault("SIGINT to Nextflow and all tasks, in RESOLVE", "run-ended"),
    "killed-while-publishing": Fault(
        "SIGKILL to Nextflow and all tasks, when the store is being published", "run-ended"
    ),
    "cache-damaged": Fault(
        "Nextflow's cache (`.nextflow/cache`) cut, then `-resume`",
        "nextflow",
        "without `-resume`, or without `.nextflow`",
    ),
    "cache-lost": Fault("`.nextflow` deleted, then `-resume`"),
    # Disks
    "disk-full-in-a-task": Fault("the work folder's disk has no room for a task's result", "disk-full"),
    "disk-full-before-a-task": Fault("the work folder's disk has not a byte left when a task is to start", "disk-full"),
    "results-disk-full": Fault("the results' disk has no room for the published store", "disk-full"),
    # Damage
    "bundle-cut": Fault(
        "a chunk of a patch bundle cut to half between two tasks",
        "bundle-unreadable",
        DELETE,
    ),
    "bundle-chunk-lost": Fault(
        "a chunk of a patch bundle deleted between two tasks",
        "bundle-unreadable",
        DELETE,
    ),
    "patch-cells-cut": Fault(
        "the cells of a patch task (Parquet) cut to half between two tasks",
        "geoparquet-unreadable",
        DELETE,
    ),
    "image-cut": Fault("an input TIFF cut to half once the run has started", "tiff-truncated", "mend it, `-resume`"),
    "transcripts-cut": Fault(
        "an input Parquet cut to half once the run has started", "transcripts-unreadable", "mend it, `-resume`"
    ),
    "input-vanishes": Fault(
        "an input moved away once the run has started", "transcripts-not-found", "mend it, `-resume`"
    ),
    "input-unreachable": Fault(
        "an input that is a link into nowhere when the run starts", "input-invalid", "mend it, `-resume`"
    ),
    # Time
    "results-of-tomorrow": Fault("files of a finished task dated a day ahead, then `-resume`"),
    "slurm-files-of-yesterday": Fault(
        "inputs and all work files dated a day back, then `-resume -profile slurm`: all cached"
    ),
    # Surroundings, all of them in one run
    "inputs-read-only": Fault("the inputs on a disk that is mounted read-only"),
    "inputs-of-tomorrow": Fault("inputs dated a day ahead"),
    "work-linked": Fault("the work folder is a link"),
    "work-elsewhere": Fault("`NXF_WORK` on another disk"),
    "tmpdir-not-writable": Fault("`TMPDIR` on a disk that is mounted read-only"),
    "home-unset": Fault("no `HOME`"),
    "umask-077": Fault("`umask 077`"),
    "locale-c": Fault("`LC_ALL=C`"),
    # Two runs
    "two-runs": Fault("a second run with the same output folder; the first one goes on", "outdir-in-use", "wait"),
    "two-runs-same-folder": Fault("the same, started in the same folder with `-resume`", "nextflow", "wait"),
    "two-runs-first-killed": Fault("the same after SIGKILL to the first: the second may start"),
    # Code
    "stage-changed": Fault("the script of one stage changed, then `-resume`: it and what follows run again"),
    "program-changed": Fault("a file of `bin` changed, then `-resume`: its stage and what follows run again"),
    "version-changed": Fault("another version of the package, then `-resume`: all run again"),
    # Slurm, all of them in one run
    "slurmd-killed": Fault("SIGKILL to the node's slurmd while a task runs; started again later"),
    "node-lost": Fault("SIGKILL to slurmd and to all that it started; started again when the node is down"),
    "job-cancelled": Fault("`scancel` of a running task"),
    "node-drained": Fault("the node drained while a task waits; resumed later"),
    "slurmctld-killed": Fault("SIGKILL to slurmctld while a task is about to be submitted; started again later"),
}


def page(record: dict[str, dict[str, object]]) -> str:
    """The table as Markdown, with its counts."""
    seen = {name: record[name] for name in FAULTS if name in record}
    finished = [end for end in seen.values() if end["finished"]]
    named = [end for end in seen.values() if end["error"]]
    equal = sum(bool(end["equal"]) for end in finished)
    counts = (
        f"Faults injected: {len(seen)} of {len(FAULTS)}. Ended in a named error first: {len(named)}. Runs finished, by "
        f"themselves or by what the table says: {len(finished)}. Results equal: {equal}."
    )
    lines = [
        counts,
        "",
        "| fault | what is done | the run ends in | finished by | tables |",
        "|---|---|---|---|---|",
    ]
    for name, fault in FAULTS.items():
        end = seen.get(name)
        first = f"`{fault.error}`" if fault.error else "its results"
        how = fault.then if fault.error else "itself"
        tables = "not run yet" if end is None else "equal" if end["equal"] else "not compared"
        lines.append(f"| `{name}` | {fault.how} | {first} | {how} | {tables} |")
    return "\n".join(lines)


def write_page(table: str) -> None:
    """Put the table into docs/faults.md."""
    text = PAGE.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    PAGE.write_text(f"{before}{BEGIN}\n\n{table}\n\n{END}{after}")
