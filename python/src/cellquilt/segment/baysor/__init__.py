"""Baysor: cells from transcripts, with or without prior cells.

A patch is one call of Baysor, through one of two doors: the executable (0.6 or 0.7), or Julia in this process. Both are
asked the same and read in the same way. See docs/baysor.md for what has been run and what has not.
"""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pcsv

from cellquilt.core.atomic import refuse_existing
from cellquilt.core.errors import CellquiltError
from cellquilt.core.log import LOG
from cellquilt.core.parquet import arrow_array
from cellquilt.core.record import Record, note_program
from cellquilt.core.settings import Settings
from cellquilt.core.settings import default as default_of
from cellquilt.patches.transcripts import TranscriptBundle
from cellquilt.segment.baysor.call import CONFIG, INSTALL, MOLECULES, PRIOR, Door, arguments, check_end
from cellquilt.segment.baysor.config import Config, checked_config, config_path, read_tree
from cellquilt.segment.baysor.prior import main_prior
from cellquilt.segment.baysor.read import ROW, Found, no_cells, read_output
from cellquilt.segment.executable import Ended, find_executable
from cellquilt.segment.molecules import borders, write_result
from cellquilt.segment.patchwise import PatchCells, segment_patches

METHOD = "baysor"
#: Baysor looks at so many neighbours of every molecule, so a patch needs as many.
_NEIGHBOURS = 20
#: Prior cells from which Baysor 0.6 can take a scale, which it does even when it is given one.
_FEWEST_PRIOR_CELLS = 3
#: Settings that are about where a task runs, not about what it makes; they do not travel in bundles.
_LOCAL = ("baysor_executable", "baysor_timeout_min", "baysor_via")
#: Settings of a task besides those that become Baysor's own.
_OF_THE_TASK = (*_LOCAL, "min_area_um2", "on_patch_error", "threads")


def plan(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Baysor's settings for the bundles of a slide, checked where the slide is cut.

    Parameters
    ----------
    settings
        Values by the names of the table of settings.

    Returns
    -------
    dict
        Plain data for the bundle's ``engine``: ``method`` and what was given, a configuration file as its content, so
        that no task has to find it. ``min_prior_transcripts`` says which prior cells the scale is taken from.

    Raises
    ------
    CellquiltError
        What `checked_config` refuses.
    """
    given = _given(settings)
    config = checked_config(given)
    if "baysor_config" in given:
        given["baysor_config"] = read_tree(given["baysor_config"])
    own = {name: value for name, value in given.items() if name.startswith("baysor_") and name not in _LOCAL}
    return {"method": METHOD, "min_prior_transcripts": config.min_molecules_per_cell, **own}


def segment_bundle(
    bundle_path: Path,
    output: Path,
    *,
    settings: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    door: Door | None = None,
) -> dict[str, Any]:
    """Segment the patches of a transcript bundle.

    Parameters
    ----------
    bundle_path
        The bundle; see `patches.transcripts`.
    output
        The result to write; see `segment.molecules`. What Baysor says is kept beside it, as ``<output>.log``.
    settings
        ``baysor_*``, ``on_patch_error``, ``min_area_um2``, ``threads``. They win over what the bundle was cut with; a
        file ``baysor_config`` whose content the bundle brings need not be there.
    overwrite
        Replace an existing output.
    door
        The way to Baysor; None opens the one that ``baysor_via`` says.

    Returns
    -------
    dict
        The record.

    Raises
    ------
    MemoryError
        If Baysor was killed or ran out of memory.
    CellquiltError
        ``baysor-config…``, ``baysor-scale-missing``, ``engine-missing``, ``baysor-version``; ``patch-failed`` if Baysor
        fails on a patch and ``on_patch_error`` is ``fail``.
    """
    output = Path(output)
    refuse_existing(output, overwrite)
    bundle = TranscriptBundle(bundle_path)
    values = _in_force(bundle, settings or {})
    config = checked_config(values)
    if bundle.prior["from"] == "none" and config.scale_um is None and len(bundle):
        raise CellquiltError(
            "baysor-scale-missing",
            f"sample {bundle.sample}: neither prior cells nor a scale; Baysor needs one of them",
            "give baysor_scale_um, about the radius of a cell, or prior cells",
        )
    record = Record("segment", bundle.sample, {"method": METHOD, "threads": values["threads"], **config.tree})
    task = _Task(bundle, config, values, output)
    if len(bundle):
        task.door = door or open_door(values)
        config.check_version(task.door.contract)
        record.facts["baysor"] = task.door.facts
        if config.scale_um is None:
            task.config = config.but(scale=_slide_scale(bundle))
            record.facts["scale_um"] = task.config.scale_um
        task.log.unlink(missing_ok=True)
    result = segment_patches(bundle, METHOD, task.segment, keep_going=values["on_patch_error"] == "skip")
    patches = result.patches
    record.facts["prior"] = bundle.prior
    record.facts["n_objects"] = len(result.geometry)
    record.facts["n_failed"] = sum(1 for patch in patches if patch["error"] is not None)
    record.facts["n_outlines_from_molecules"] = sum(patch.get("n_outlines_from_molecules", 0) for patch in patches)
    record.facts["baysor_peak_rss_mb"] = round(max((run.peak_rss_mb for run in task.runs), default=0.0), 1)
    result.record = record.finish()
    if task.door is not None:
        note_program(result.record, METHOD, task.door.facts["version"])
    write_result(output, result, overwrite=overwrite)
    return {**result.record, "method": METHOD, "bundle": bundle.attributes["bundle"], "patches": patches}


def open_door(settings: Mapping[str, Any]) -> Door:
    """The way to Baysor that the settings ask for: the executable where there is one, else Julia.

    Parameters
    ----------
    settings
        ``baysor_via``, ``baysor_executable``, ``baysor_timeout_min`` and ``threads``.

    Raises
    ------
    CellquiltError
        ``engine-missing`` if there is neither, ``baysor-version`` if it is another version.
    """
    from cellquilt.segment.baysor.bridge import BaysorBridge, has_juliacall
    from cellquilt.segment.baysor.executable import BaysorExecutable

    via, threads = settings["baysor_via"], settings["threads"]
    if via != "julia":
        julia = Path.home() / ".julia" / "bin"  # where Julia's package manager puts it
        path = find_executable("baysor_executable", settings["baysor_executable"], METHOD, [julia])
        if path is not None:
            return BaysorExecutable(path, threads=threads, timeout_min=settings["baysor_timeout_min"])
    if via == "executable" or (via == "auto" and not has_juliacall()):
        raise CellquiltError("engine-missing", "no executable baysor on PATH or in ~/.julia/bin", INSTALL)
    return BaysorBridge(threads=threads)


def _given(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a user said, without defaults."""
    values = settings.given if isinstance(settings, Settings) else settings
    return {name: value for name, value in values.items() if value is not None}


def _in_force(bundle: TranscriptBundle, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a task: its own over the bundle's over the table's defaults."""
    own = {name: value for name, value in bundle.engine.items() if name.startswith("baysor_")}
    given = _given(settings)
    path = config_path(given.get("baysor_config"))
    if "baysor_config" in own and path is not None and not path.is_file():
        del given["baysor_config"]  # it was read where the slide was cut; where this task runs it need not be
    tree = {"baysor_config": given.pop("baysor_config", own.get("baysor_config"))}
    return {**{name: default_of(name) for name in _OF_THE_TASK}, **own, **Settings(given).given, **tree}


def _slide_scale(bundle: TranscriptBundle) -> float | None:
    """Half the distance of neighbouring prior cells: Baysor's rule, over the slide; None if there are too few.

    One scale for all, so that cells of neighbouring patches are sought at the same size, and sparse patches have one.
    """
    spacing_um = bundle.prior.get("spacing_um")
    return None if spacing_um is None else spacing_um / 2


@dataclass
class _Task:
    """The calls of a task, one a patch."""

    bundle: TranscriptBundle
    config: Config
    values: dict[str, Any]
    output: Path
    door: Door | None = None
    runs: list[Ended] = field(default_factory=list)

    @property
    def log(self) -> Path:
        return self.output.with_name(f"{self.output.name}.log")

    def segment(self, record: dict[str, Any]) -> PatchCells:
        """Segment one patch."""
        table = self.bundle.read(record)
        facts: dict[str, Any] = {}
        xy = np.column_stack([table.column(name).to_numpy() for name in ("x_um", "y_um")])
        if len(xy) < self.config.min_molecules_per_cell:
            # Too few for a single cell: that there is none is the right answer, which Baysor cannot give.
            found = no_cells(len(xy))
        else:
            _check_patch(table, self.config, xy, self.bundle.prior)
            found, facts = self._call(record, table, xy)
        found = found.at_least(self.values["min_area_um2"])
        facts["n_outlines_from_molecules"] = found.n_from_molecules
        number = np.full(len(xy), int(record["index"]), dtype=np.int32)
        columns = {"patch": number, "label": found.labels, "confidence": found.confidence}
        transcripts = pa.table(
            {
                "transcript_id": table.column("transcript_id"),
                **{name: arrow_array(values) for name, values in columns.items()},
            }
        )
        prior = main_prior(found.labels, table.column("prior_cell").to_numpy(), len(found.geometry))
        cells = {**found.columns, "prior_cell": prior, **_border_columns(found, record)}
        return PatchCells(found.geometry, cells, [transcripts], facts=facts)

    def _call(self, record: dict[str, Any], table: pa.Table, xy: np.ndarray) -> tuple[Found, dict[str, Any]]:
        assert self.door is not None
        contract = self.door.contract
        prior = self._use_prior(record, table.column("prior_cell").to_numpy(), contract)
        # Beside the output, where there is room for it: a table of a large patch is larger than many a /tmp.
        self.output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{self.output.name}.", dir=self.output.parent) as scratch:
            folder = Path(scratch).resolve()
            config = _write_molecules(folder / MOLECULES, table, self.bundle.genes, self.config, prior=prior)
            (folder / CONFIG).write_text(config.to_toml(contract), encoding="utf-8")
            log = folder / "log.txt"
            try:
                ended = self.door.run(arguments(contract, folder, prior=prior), log)
            finally:
                said = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
                with self.log.open("a", encoding="utf-8") as stream:
                    stream.write(f"=== patch {record['index']} ===\n{said}\n")
            self.runs.append(ended)
            check_end(ended, f"sample {self.bundle.sample}, patch {record['index']}")
            facts = {"with_prior": prior, "peak_rss_mb": round(ended.peak_rss_mb, 1)}
            return read_output(folder, contract, xy), facts

    def _use_prior(self, record: dict[str, Any], prior: np.ndarray, contract: str) -> bool:
        """Whether Baysor can make use of the patch's prior cells."""
        if not prior.any():
            return False
        if contract != "0.6":
            return True
        sizes = np.unique(prior[prior > 0], return_counts=True)[1]
        enough = int((sizes >= self.config.min_molecules_per_cell).sum()) >= _FEWEST_PRIOR_CELLS
        if not enough:
            LOG.warning("patch %d: too few prior cells for Baysor 0.6, segmented without", record["index"])
        return enough


def _border_columns(found: Found, record: dict[str, Any]) -> dict[str, np.ndarray]:
    """``cut`` and ``depth_um`` of cells.

    An outline goes through molecules, so a cell that a side of the window cuts ends about as far from it as molecules
    are from each other.
    """
    depth = borders(found.geometry, np.full(len(found.geometry), int(record["index"])), [record])["depth_um"]
    return {"cut": depth <= found.spacing_um, "depth_um": depth}


def _check_patch(table: pa.Table, config: Config, xy: np.ndarray, prior: Mapping[str, Any]) -> None:
    """Refuse what Baysor would end on, or get wrong without a word."""
    n = table.num_rows
    z = table.column("z_um").to_numpy()
    finite = np.isfinite(xy).all(axis=1) & (np.isfinite(z) | np.isnan(z).all())
    if not finite.all():
        row = int(np.flatnonzero(~finite)[0])
        which = table.column("transcript_id")[row].as_py()
        raise CellquiltError(
            "transcripts-not-finite",
            f"{int((~finite).sum())} transcripts have no finite position, the first is transcript_id {which}",
            "make the bundles anew with `cellquilt patchify transcripts`; after --cleanup start without -resume",
        )
    least = max(_NEIGHBOURS, config.confidence_nn_id + 1)
    if n < least:
        raise CellquiltError(
            "patch-too-sparse", f"{n} transcripts; Baysor needs {least}", "cut larger patches, or skip this one"
        )
    n_genes = pc.count_distinct(table.column("gene")).as_py()
    if n_genes < 2:
        raise CellquiltError(
            "baysor-one-gene", "all transcripts are of one gene; Baysor tells cells apart by their genes", "skip it"
        )
    if config.scale_um is None:
        raise CellquiltError(
            "baysor-scale-missing",
            f"no scale was given and the slide has fewer than {_FEWEST_PRIOR_CELLS} prior cells with at least "
            f"{prior.get('min_transcripts', config.min_molecules_per_cell)} transcripts to take it from",
            "give baysor_scale_um, about the radius of a cell",
        )


def _write_molecules(path: Path, table: pa.Table, genes: list[str], config: Config, *, prior: bool) -> Config:
    """Write Baysor's table of a patch; returns the settings that go with it."""
    z = table.column("z_um").to_numpy()
    flat = bool(config["force_2d"]) or len(z) == 0 or not np.ptp(z) > 0
    columns: dict[str, Any] = {"x": table.column("x_um"), "y": table.column("y_um")}
    if not flat:
        columns["z"] = table.column("z_um")
    columns["gene"] = pa.array(genes, pa.string()).take(table.column("gene").combine_chunks())
    columns[ROW] = arrow_array(np.arange(table.num_rows, dtype=np.int64))
    if prior:
        columns[PRIOR] = table.column("prior_cell")
    pcsv.write_csv(pa.table(columns), path)
    return config.but(force_2d=True) if flat else config
