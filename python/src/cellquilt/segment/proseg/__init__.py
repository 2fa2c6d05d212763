"""Proseg: cells from transcripts and prior cells, by simulation of cells made of voxels.

A patch is one run of the executable, usually the whole slide; a slide that takes more memory than it may is cut into
tiles that overlap, whose cells are put together like those of any patches. Proseg has no seed: two runs differ.
"""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cellquilt.core.atomic import refuse_existing
from cellquilt.core.errors import CellquiltError
from cellquilt.core.log import LOG
from cellquilt.core.record import Record, note_program
from cellquilt.core.settings import Settings
from cellquilt.core.settings import default as default_of
from cellquilt.patches.transcripts import TranscriptBundle
from cellquilt.segment.executable import Ended, run_executable
from cellquilt.segment.molecules import write_result
from cellquilt.segment.patchwise import PatchCells, segment_patches
from cellquilt.segment.proseg.command import (
    Proseg,
    arguments,
    burnin_voxel_um,
    extra_options,
    find_proseg,
    settings_names,
)
from cellquilt.segment.proseg.memory import estimate_gb, transcripts_that_fit
from cellquilt.segment.proseg.outcome import check_ended
from cellquilt.segment.proseg.read import no_cells, read_output
from cellquilt.segment.proseg.transcripts import Contents, look, write_table

METHOD = "proseg"
#: Settings that are about where a task runs, not about what it makes; they do not travel in bundles.
_LOCAL = ("proseg_executable", "proseg_timeout_min")


def plan(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Proseg's settings for the bundles of a slide, checked where the slide is cut.

    Parameters
    ----------
    settings
        Values by the names of the table of settings.

    Returns
    -------
    dict
        Plain data for the bundle's ``engine``: ``method`` and every ``proseg_*`` that a result depends on;
        ``proseg_max_transcripts`` is the most that a patch may hold.

    Raises
    ------
    CellquiltError
        ``proseg-args``.
    """
    values = {**_defaults(), **{name: settings[name] for name in settings_names() if settings.get(name) is not None}}
    extra_options(values["proseg_args"])
    if values["proseg_max_transcripts"] is None:
        values["proseg_max_transcripts"] = transcripts_that_fit(
            values["proseg_memory_gb"], values["proseg_voxel_size_um"], values["proseg_voxel_layers"]
        )
    return {"method": METHOD, **{name: value for name, value in values.items() if name not in _LOCAL}}


def segment_bundle(
    bundle_path: Path, output: Path, *, settings: Mapping[str, Any] | None = None, overwrite: bool = False
) -> dict[str, Any]:
    """Segment the patches of a transcript bundle.

    Parameters
    ----------
    bundle_path
        The bundle; see `patches.transcripts`.
    output
        The result to write; see `segment.molecules`. What proseg says is kept beside it, as ``<output>.log``.
    settings
        ``proseg_*``, ``on_patch_error``, ``threads``. They win over what the bundle was cut with.
    overwrite
        Replace an existing output.

    Returns
    -------
    dict
        The record.

    Raises
    ------
    MemoryError
        If proseg was killed or ran out of memory.
    CellquiltError
        ``proseg-prior-missing``, ``proseg-args``, ``engine-missing``, ``proseg-version``; ``patch-failed`` if proseg
        fails on a patch and ``on_patch_error`` is ``fail``.
    """
    output = Path(output)
    refuse_existing(output, overwrite)
    bundle = TranscriptBundle(bundle_path)
    values = _in_force(bundle, settings or {})
    if bundle.prior["from"] == "none" and len(bundle):
        raise CellquiltError(
            "proseg-prior-missing",
            f"sample {bundle.sample}: no prior cells; proseg starts from cells or nuclei",
            "segment nuclei first, or take the machine's cells: --prior",
        )
    parameters = {name: value for name, value in values.items() if name not in (*_LOCAL, "on_patch_error")}
    record = Record("segment", bundle.sample, {"method": METHOD, **parameters})
    task = _Task(bundle, values, output)
    if any(patch["n_transcripts"] for patch in bundle.patches) and bundle.prior["n_cells"]:
        task.proseg = find_proseg(values["proseg_executable"])
        task.log.unlink(missing_ok=True)
    result = segment_patches(bundle, METHOD, task.segment, keep_going=values["on_patch_error"] == "skip")
    record.facts["prior"] = bundle.prior
    record.facts["n_objects"] = len(result.geometry)
    record.facts["n_failed"] = sum(1 for patch in result.patches if patch["error"] is not None)
    record.facts["proseg_peak_rss_mb"] = max((run.peak_rss_mb for run in task.runs), default=0.0)
    document = record.finish()
    if task.proseg is not None:
        note_program(document, METHOD, task.proseg.version)
    result.record = document
    write_result(output, result, overwrite=overwrite)
    return {**document, "method": METHOD, "bundle": bundle.attributes["bundle"], "patches": result.patches}


def _defaults() -> dict[str, Any]:
    return {name: default_of(name) for name in settings_names()}


def _in_force(bundle: TranscriptBundle, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a task: its own over the bundle's over the table's defaults."""
    given = settings.given if isinstance(settings, Settings) else Settings(settings).given
    own = {name: value for name, value in bundle.engine.items() if name in settings_names()}
    others = {name: default_of(name) for name in ("threads", "on_patch_error")}
    known = {**_defaults(), **others}
    return {**known, **own, **{name: value for name, value in given.items() if name in known}}


@dataclass
class _Task:
    """The runs of a task."""

    bundle: TranscriptBundle
    values: dict[str, Any]
    output: Path
    proseg: Proseg | None = None
    runs: list[Ended] = field(default_factory=list)

    @property
    def log(self) -> Path:
        return self.output.with_name(f"{self.output.name}.log")

    def segment(self, record: dict[str, Any]) -> PatchCells:
        """Segment one patch."""
        contents = look(self.bundle, record)
        if not contents.prior_cells.size:
            # No cell to start from: that there are none is the right answer, which proseg cannot give.
            return no_cells(self.bundle, record)
        estimated = self._estimate(record, contents)
        assert self.proseg is not None
        # Beside the output, where there is room for it: a table of a large slide is larger than many a /tmp.
        self.output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{self.output.name}.", dir=self.output.parent) as scratch:
            folder = Path(scratch).resolve()
            ended = self._run(folder, record, contents)
            check_ended(ended, f"sample {self.bundle.sample}, patch {record['index']}")
            voxel_um = burnin_voxel_um(self.values["proseg_voxel_size_um"])
            found = read_output(folder, self.bundle, record, contents, voxel_um=voxel_um)
        found.facts.update({"estimated_gb": round(estimated, 2), "peak_rss_mb": round(ended.peak_rss_mb, 1)})
        return found

    def _estimate(self, record: dict[str, Any], contents: Contents) -> float:
        voxels = (self.values["proseg_voxel_size_um"], self.values["proseg_voxel_layers"])
        estimated, limit = estimate_gb(contents, *voxels), self.values["proseg_memory_gb"]
        LOG.info(
            "proseg: patch %d, %d transcripts of %d genes, %d prior cells, about %.1f GB",
            record["index"], contents.n, contents.n_genes, contents.prior_cells.size, estimated,
        )  # fmt: skip
        if estimated > limit:
            LOG.warning(
                "proseg: patch %d may take %.1f GB, more than proseg_memory_gb %g; try proseg_max_transcripts %d",
                record["index"], estimated, limit, int(contents.n * limit / estimated),
            )  # fmt: skip
        return estimated

    def _run(self, folder: Path, record: dict[str, Any], contents: Contents) -> Ended:
        assert self.proseg is not None
        write_table(folder, self.bundle, record, contents)
        options = arguments(
            self.values,
            folder,
            n_planes=contents.n_planes,
            with_nuclei=bool(contents.nuclear.any()),
            factored=contents.can_be_factored,
        )
        log = folder / "log.txt"
        try:
            ended = run_executable(
                [self.proseg.path.absolute(), *options],
                name=METHOD,
                log=log,
                folder=folder,
                timeout_min=self.values["proseg_timeout_min"],
            )
        finally:
            said = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
            with self.log.open("a", encoding="utf-8") as stream:
                stream.write(f"=== patch {record['index']} ===\n{said}\n")
        self.runs.append(ended)
        return ended
