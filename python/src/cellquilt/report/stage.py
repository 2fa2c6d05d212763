"""The last steps of a sample: assemble and judge it, report on it; and the table of all samples."""

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cellquilt import __version__
from cellquilt.comparison.methods import read_comparison
from cellquilt.core.atomic import atomic_path
from cellquilt.core.log import LOG
from cellquilt.core.privacy import refuse_links_outside, scrub
from cellquilt.core.record import Record, versions
from cellquilt.core.settings import TABLES, Settings
from cellquilt.core.store import Store, assemble, new_store
from cellquilt.readers.base import describe_file
from cellquilt.report.provenance import provenance
from cellquilt.report.qc import compute_qc, qc_json, read_qc
from cellquilt.report.remake import Origin, add_origin
from cellquilt.report.view import View

if TYPE_CHECKING:
    from cellquilt.domains.results import CellDomains


def _thresholds(settings: Settings) -> Path | None:
    path = settings.get("qc_thresholds")
    return Path(path) if path else None


def assemble_slide(
    parts: Sequence[Path],
    output: Path,
    *,
    settings: Settings,
    qc: Path | None = None,
    domains: Path | None = None,
    graph: Path | None = None,
    columns: Sequence[Path] = (),
    overwrite: bool = False,
) -> Path:
    """Put a sample's raw store and what the steps added together into one store, and judge it.

    Parameters
    ----------
    parts
        The sample's stores, the raw one first; where two have an element of one name, the later one counts.
    output
        The store to make.
    settings
        Group ``report``.
    qc
        File for the numbers and the verdict; None writes none.
    domains
        Domains of the cells, or why there are none: what `domains.stages.assign_domains`, or `prepare_slide`, wrote.
    graph
        The cells' neighbours, where there are domains.
    columns
        Clusters and types of the cells: what `celltypes.stage` wrote.
    overwrite
        Replace what stands there.

    Returns
    -------
    pathlib.Path
        The store.

    Raises
    ------
    CellquiltError
        ``output-exists``, ``assembly-invalid``, ``store-missing``, ``cells-mismatch``, or what the file of limits is
        missing.
    """
    with_domains = None if domains is None else partial(_add_domains, domains=domains, graph=graph)
    with_columns = partial(_add_columns, columns=columns) if columns else None
    with (
        _with_more(parts, output, "domains", with_domains) as whole,
        _with_more(whole, output, "columns", with_columns) as all_parts,
    ):
        return _assemble(all_parts, output, settings, qc, overwrite)


@contextmanager
def _with_more(
    parts: Sequence[Path], output: Path, name: str, fill: Callable[[View, Store], None] | None
) -> Iterator[Sequence[Path]]:
    """The parts, and one more that is filled for as long as they are put together; None: there is no more."""
    if fill is None:
        yield parts
        return
    view = View(parts)
    output = Path(output).absolute()
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=output.parent) as folder:
        added = Path(folder) / f"{name}.zarr"
        with new_store(added, sample=view.sample) as delta:
            fill(view, delta)
        yield [*parts, added]


def _holder(view: View) -> Store:
    """The store whose table counts."""
    return next(store for store in reversed(view.stores) if store.has("tables", "table"))


def _add_domains(view: View, delta: Store, *, domains: Path, graph: Path | None) -> None:
    """The domains, or why there are none."""
    if domains.suffix == ".json":
        record = Record("domains_prepare", view.sample)
        record.facts["domains_missing"] = json.loads(domains.read_text(encoding="utf-8"))
        delta.add_record(record.finish())
    else:
        from cellquilt.domains.stages import add_to_table

        add_to_table(_holder(view), delta, domains=domains, graph=graph)


def _add_columns(view: View, delta: Store, *, columns: Sequence[Path]) -> None:
    """What was found of the cells."""
    from cellquilt.aggregation.columns import add_columns, read_columns

    add_columns(_holder(view), delta, [read_columns(path) for path in columns])


def _assemble(parts: Sequence[Path], output: Path, settings: Settings, qc: Path | None, overwrite: bool) -> Path:
    view = View(parts)
    numbers = compute_qc(view, thresholds=_thresholds(settings))
    attributes = {**provenance(view.records, view.sample), "verdict": numbers["verdict"]}
    thresholds = _thresholds(settings)
    if thresholds is not None:  # the verdict is by these
        attributes["checksums"][thresholds.name] = describe_file(thresholds)["sha256"]
    # The store is made before anything is replaced: a failure leaves what was there.
    with atomic_path(output, overwrite=overwrite) as aside:
        assemble(parts, aside, sample=view.sample, attributes=attributes)
    if qc is not None:
        with atomic_path(qc, overwrite=overwrite) as aside:
            aside.write_text(qc_json(numbers), encoding="utf-8")
    LOG.info("%s: %s, %d cells", view.sample, numbers["verdict"], numbers["n_cells"])
    return Path(output)


def annotate_sample(
    table: Path,
    output: Path,
    *,
    domains: Path,
    graph: Path | None = None,
    sample: str | None = None,
    metadata: Mapping[str, str] | None = None,
    qc: Path | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a copy of a cell table that was made elsewhere with the domains of its cells, and its numbers.

    Parameters
    ----------
    table, output, domains, graph, sample, metadata, overwrite
        As `cellquilt.domains.stages.annotate_table` takes them.
    qc
        File for the numbers; nothing is judged. None writes none.

    Returns
    -------
    pathlib.Path
        The copy.

    Raises
    ------
    CellquiltError
        ``link-outside`` if a link in a table's folder leads out of it, and what `annotate_table` refuses.
    """
    from cellquilt.domains.results import read_cells
    from cellquilt.domains.stages import annotate_table

    refuse_links_outside(table)
    found = read_cells(domains)
    record = Record("domains_annotate", sample or found.sample)
    with atomic_path(output, overwrite=overwrite) as aside:
        annotate_table(table, aside, domains=domains, graph=graph, sample=sample, metadata=metadata)
        add_origin(aside, _origin_of_table(table, found, graph, record.sample, metadata or {}))
    if qc is not None:
        assert found.domain is not None
        made = record.finish()
        numbers = {
            "sample": record.sample,
            "verdict": None,
            "n_cells": len(found.cells),
            "n_domains": len(found.counts),
            "n_cells_with_domain": int((found.domain >= 0).sum()),
            "seconds": {"domains_annotate": made["seconds"], "total": made["seconds"]},
            "peak_rss_mb": {"domains_annotate": made["peak_rss_mb"], "max": made["peak_rss_mb"]},
            "versions": {"domains_annotate": made["versions"]},
        }
        with atomic_path(qc, overwrite=overwrite) as aside:
            aside.write_text(qc_json(numbers), encoding="utf-8")
    return Path(output)


def _origin_of_table(
    table: Path, found: "CellDomains", graph: Path | None, sample: str, metadata: Mapping[str, str]
) -> Origin:
    """How a table got its domains; without times, so that the same input gives the same bytes."""
    about = dict(found.about or {})
    parameters, used = about.pop("parameters", {}), about.pop("versions", {})
    inside = (Path(table) / "tables").is_dir()
    facts = {
        "sources": {"path": Path(table).name},
        "inputs": [{"column": "path", **describe_file(Path(table))}],
        "metadata": dict(sorted(metadata.items())),
    }
    records = [] if graph is None else Store(graph).records
    records = [
        *({key: value for key, value in made.items() if key not in ("seconds", "peak_rss_mb")} for made in records),
        {"stage": "domains", "sample": sample, "parameters": parameters, "facts": about, "versions": used},
        {"stage": "domains_annotate", "sample": sample, "parameters": {}, "facts": facts, "versions": versions()},
    ]
    seeds = {name: value for name, value in sorted(parameters.items()) if name.split("_")[-1] == "seed"}
    return Origin(
        sample=sample,
        technology=TABLES[1] if inside else TABLES[0],
        version=__version__,
        records=scrub(records),
        seeds=seeds,
        checksums={"domains_model": about.get("model_sha256", "")},
    )


def report_slide(
    store: Path,
    output: Path,
    *,
    settings: Settings,
    qc: Path | None = None,
    truth: Path | None = None,
    comparison: Path | None = None,
    stats: Path | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a sample's report: one HTML page that needs nothing else.

    Parameters
    ----------
    store
        The assembled store.
    output
        The page to write.
    settings
        Group ``report``.
    qc
        The sample's qc.json; None computes it from the store.
    truth
        Folder with the truth of a simulated slide; the report then shows the accuracy reached.
    comparison
        What `cellquilt compare` wrote as JSON; the report then shows the methods side by side.
    stats
        Folder that `cellquilt stats` wrote; the report then shows it.
    overwrite
        Replace what stands there.

    Returns
    -------
    pathlib.Path
        The page.
    """
    from cellquilt.report.page import render

    view = View([store])
    numbers = read_qc(qc) if qc is not None else compute_qc(view, thresholds=_thresholds(settings))
    accuracy: dict[str, Any] | None = None
    if truth is not None and settings["report_truth"]:
        from cellquilt.simulate.scores import truth_scores

        accuracy = truth_scores(store, truth)
    methods = None if comparison is None else read_comparison(comparison)
    space = None
    if stats is not None:
        from cellquilt.report.spatial import spatial_context

        space = spatial_context(stats)
    with atomic_path(output, overwrite=overwrite) as aside:
        aside.write_text(render(view, numbers, accuracy, methods, space), encoding="utf-8")
    return Path(output)


def samples_table(
    qcs: Sequence[Path],
    names: str | Sequence[str],
    output: Path,
    *,
    checksums: Path | None = None,
    multiqc: Path | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the table of all samples of a run, failed ones too.

    Parameters
    ----------
    qcs
        The qc.json of every sample that came through.
    names
        All samples of the run (comma-separated, or a list): the rows, in this order.
    output
        The file to write.
    checksums
        Where to write which inputs and weights each sample was made from (TSV).
    multiqc
        Folder for a table that MultiQC takes into its report.
    overwrite
        Replace what stands there.

    Returns
    -------
    pathlib.Path
        The table.
    """
    from cellquilt.report.samples import write_checksums, write_multiqc, write_samples

    listed = names.split(",") if isinstance(names, str) else list(names)
    write_samples(qcs, [name for name in listed if name], output, overwrite=overwrite)
    if checksums:
        write_checksums(qcs, checksums, overwrite=overwrite)
    if multiqc:
        write_multiqc(qcs, multiqc)
    return Path(output)
