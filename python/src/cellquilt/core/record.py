"""What a run leaves behind about itself: parameters, versions, time, peak memory."""

import importlib.metadata
import platform
import resource
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cellquilt import __version__
from cellquilt.core.privacy import scrub

#: Packages whose version may change a result, named if a stage has loaded them.
_PACKAGES = (
    *("anndata", "cellpose", "csbdeep", "igraph", "numba", "numpy", "pyarrow", "safetensors", "scanpy", "scipy"),
    *("shapely", "spatialdata", "stardist", "tensorflow", "tifffile", "torch", "zarr"),
)
#: Programs that this task has called → their versions.
_PROGRAMS: dict[str, str] = {}


def rss_mb(usage: resource.struct_rusage) -> float:
    """Peak resident memory in MiB of what a resource usage is about."""
    # Linux counts in KiB, macOS in bytes.
    return usage.ru_maxrss / (1024 if platform.system() == "Linux" else 1024**2)


def peak_rss_mb() -> float:
    """Peak resident memory of this process in MiB."""
    try:
        # Its usage would count what the process that started it had at that moment.
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.partition("VmHWM:")[2].split(maxsplit=1)[0]) / 1024
    except (OSError, ValueError, IndexError):  # not Linux
        return rss_mb(resource.getrusage(resource.RUSAGE_SELF))


def versions() -> dict[str, str]:
    """Versions of cellquilt, Python and those packages with a say in the result that this process has loaded."""
    loaded = {name: _version(name) for name in _PACKAGES if name in sys.modules}
    return {"cellquilt": __version__, "python": platform.python_version(), **loaded}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # tensorflow is installed as tensorflow-cpu
        return str(getattr(sys.modules[package], "__version__", "unknown"))


def note_program(document: dict[str, Any], name: str, version: str) -> None:
    """Add the version of a program that a stage called to its record, and to what `write_versions` writes."""
    document["versions"][name] = _PROGRAMS[name] = version


def write_versions(stage: str, output: Path) -> None:
    """Write the versions of this process and of the programs it called as YAML: stage → package → version, by name."""
    lines = [f"{stage}:", *(f"  {name}: {version}" for name, version in sorted((versions() | _PROGRAMS).items()))]
    output.write_text("\n".join(lines) + "\n", encoding="utf-8")


@dataclass
class Record:
    """The record of one stage of one sample.

    Attributes
    ----------
    stage
        Name of the stage, for example ``"convert"``.
    sample
        The sample's name.
    parameters
        The settings in force, by name.
    facts
        Numbers that the stage reports.
    """

    stage: str
    sample: str
    parameters: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic, repr=False)

    def finish(self) -> dict[str, Any]:
        """The record as plain data without absolute paths, with the time and memory taken so far."""
        return {
            "stage": self.stage,
            "sample": self.sample,
            "versions": versions(),
            "parameters": scrub(self.parameters),
            "facts": scrub(self.facts),
            "seconds": round(time.monotonic() - self.started, 3),
            "peak_rss_mb": round(peak_rss_mb(), 1),
        }
