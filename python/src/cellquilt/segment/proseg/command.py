"""Proseg's command line: which executable, which numbers, which files."""

import os
import re
import shlex
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cellquilt.core.errors import CellquiltError
from cellquilt.core.settings import BY_NAME
from cellquilt.segment.executable import find_executable

#: Versions from … to before …: older ones of 3.0 wrote wrong transcript or prior-cell ids, another generation has
#: another command line.
OLDEST, NEXT = (3, 0, 8), (4, 0, 0)
INSTALL = "make it with `make setup STAGES=proseg` or `cargo install proseg --version 3.2.0 --locked`"
_PROBE_SECONDS = 60

INPUT = "transcripts.csv"
COLUMNS = ("transcript_id", "x", "y", "z", "gene", "cell", "compartment")
NUCLEAR, OTHER = 1, 0
#: What proseg writes.
TRANSCRIPTS, CELLS, GENES = "transcripts.parquet", "cells.parquet", "genes.parquet"
COUNTS, EXPECTED = "counts.mtx.gz", "expected.mtx.gz"
STORE = "proseg-output.zarr"

_BURNIN_VOXEL_UM = 2.0
_UNFACTORED = "--no-factorization"
_RECORDED_SAMPLES = 100
#: Options that are decided here, and the setting to use instead, if there is one.
_OWN_OPTIONS = {
    "--samples": "proseg_samples",
    "--burnin-samples": "proseg_burnin_samples",
    "--voxel-size": "proseg_voxel_size_um",
    "--voxel-layers": "proseg_voxel_layers",
    "--nthreads": "threads",
    "-t": "threads",
    **dict.fromkeys(
        ("-x", "-y", "-z", "--x-column", "--y-column", "--z-column", "--gene-column", "--transcript-id-column",
         "--cell-id-column", "--cell-id-unassigned", "--compartment-column", "--compartment-nuclear", "--fov-column",
         "--qv-column", "--cell-assignment-column", "--cell-assignment-unassigned", "--coordinate-scale",
         "--non-unique-cell-ids", "--overwrite", "--exclude-spatialdata-transcripts", "--xenium", "--cosmx",
         "--cosmx-micron", "--merscope", "--merfish", "--visiumhd", "--zarr", "--anndata"), "",
    ),
}  # fmt: skip


def extra_options(text: str | None) -> list[str]:
    """``proseg_args`` as a list.

    Raises
    ------
    CellquiltError
        ``proseg-args`` if it cannot be split, or holds what is decided here.
    """
    try:
        options = shlex.split(text or "")
    except ValueError as error:
        raise CellquiltError("proseg-args", f"proseg_args is {text!r}: {error}", "close the quotes") from None
    for option in options:
        name = option.split("=")[0]
        if name in _OWN_OPTIONS or name.startswith("--output"):
            instead = _OWN_OPTIONS.get(name)
            hint = f"use {instead}" if instead else "leave it out: input and output are cellquilt's own"
            raise CellquiltError("proseg-args", f"proseg_args holds {name}", hint)
    return options


@dataclass(frozen=True)
class Proseg:
    """A proseg that can be run here.

    Attributes
    ----------
    path
        The executable.
    version
        For example ``"3.2.0"``.
    """

    path: Path
    version: str


def find_proseg(given: str | None) -> Proseg:
    """Find proseg and ask for its version.

    Parameters
    ----------
    given
        ``proseg_executable``.

    Raises
    ------
    CellquiltError
        ``engine-missing`` if there is none, ``proseg-version`` if it is another version than is understood.
    """
    cache = os.environ.get("CELLQUILT_CACHE")
    home = Path(cache) if cache else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cellquilt"
    places = [Path.home() / ".cargo" / "bin", *sorted(home.glob("proseg-3*/bin"), reverse=True)]
    path = find_executable("proseg_executable", given, "proseg", places)
    if path is None:
        raise CellquiltError("engine-missing", "no executable proseg on PATH or in ~/.cargo/bin", INSTALL)
    return Proseg(path, _version(path))


def _version(path: Path) -> str:
    try:
        answer = subprocess.run(
            [path, "--version"], stdin=subprocess.DEVNULL, capture_output=True, timeout=_PROBE_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CellquiltError("proseg-version", f"{path} cannot be run: {error}", INSTALL) from error
    said = answer.stdout.decode(errors="replace").strip()
    found = re.search(r"(\d+)\.(\d+)\.(\d+)", said)
    version = tuple(int(part) for part in found.groups()) if found else ()
    if not found or not OLDEST <= version < NEXT:
        raise CellquiltError(
            "proseg-version",
            f"{path} answers {said[:80]!r} when asked for its version; "
            f"proseg {OLDEST[0]}.x from {'.'.join(map(str, OLDEST))} on is needed",
            INSTALL,
        )
    return found[0]


def burnin_voxel_um(voxel_um: float) -> float:
    """Width of the larger voxels of the first iterations: about 2 µm, a whole number of small ones."""
    return voxel_um * max(round(_BURNIN_VOXEL_UM / voxel_um), 1)


def arguments(
    values: Mapping[str, Any], folder: Path, *, n_planes: int, with_nuclei: bool, factored: bool = True
) -> list[str]:
    """Arguments of proseg for the `INPUT` of a folder; its output goes to the same folder.

    Parameters
    ----------
    values
        ``proseg_*`` and ``threads``, all given.
    folder
        Holds `INPUT`.
    n_planes
        Number of different z of the transcripts (more than there can be layers need not be told apart).
    with_nuclei
        Whether the column of compartments counts.
    factored
        Whether factors of gene expression may be sought, where there are many genes.
    """
    extra = extra_options(values["proseg_args"])
    voxel = float(values["proseg_voxel_size_um"])
    samples = int(values["proseg_samples"])
    ours = {
        "--x-column": "x",
        "--y-column": "y",
        "--z-column": "z",
        "--gene-column": "gene",
        "--transcript-id-column": "transcript_id",
        "--cell-id-column": "cell",
        "--cell-id-unassigned": "0",
        "--samples": samples,
        "--burnin-samples": values["proseg_burnin_samples"],
        "--recorded-samples": min(_RECORDED_SAMPLES, samples),
        "--voxel-size": f"{voxel:g}",
        "--burnin-voxel-size": f"{burnin_voxel_um(voxel):g}",
        "--voxel-layers": max(min(int(values["proseg_voxel_layers"]), n_planes), 1),
        "--nthreads": values["threads"],
        "--output-path": folder,
        "--output-spatialdata": STORE,
        "--output-transcript-metadata": TRANSCRIPTS,
        "--output-cell-metadata": CELLS,
        "--output-gene-metadata": GENES,
        "--output-counts": COUNTS,
        "--output-expected-counts": EXPECTED,
    }
    if with_nuclei:
        ours |= {"--compartment-column": "compartment", "--compartment-nuclear": NUCLEAR}
    told = {option.split("=")[0] for option in extra}
    options = [str(part) for name, value in ours.items() if name not in told for part in (name, value)]
    if not factored and _UNFACTORED not in told:
        options.append(_UNFACTORED)
    return [str(folder / INPUT), *options, "--exclude-spatialdata-transcripts", *extra]


def settings_names() -> list[str]:
    """The settings that a run depends on."""
    return [name for name, setting in BY_NAME.items() if setting.group == "proseg"]
