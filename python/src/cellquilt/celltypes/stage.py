"""The steps that find the types of a slide's cells, each from files to files."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cellquilt.aggregation.columns import CellColumns, add_columns
from cellquilt.celltypes.clusters import CLUSTER, MARKERS, find_clusters
from cellquilt.celltypes.phenotypes import phenotype, read_signatures
from cellquilt.celltypes.transfer import read_reference, transfer_labels
from cellquilt.core import zarr_json
from cellquilt.core.atomic import refuse_existing
from cellquilt.core.errors import CellquiltError
from cellquilt.core.log import LOG
from cellquilt.core.record import versions
from cellquilt.core.settings import Settings
from cellquilt.core.store import Store, result_of
from cellquilt.domains.model import threads_of
from cellquilt.readers.base import describe_file
from cellquilt.spatial.files import read_tables, write_table
from cellquilt.spatial.slides import CELL_TYPE

if TYPE_CHECKING:
    from anndata import AnnData

#: What a slide may lack, without a mistake of anybody's.
_NOTHING_THERE = ("too-few-cells", "genes-missing")
#: Settings that say where, and how much memory: nothing of the result.
_NOT_OF_RESULT = ("memory_mb",)


def cluster_table(
    table: Path,
    output: Path | None = None,
    *,
    settings: Settings,
    sample: str | None = None,
    markers: Path | None = None,
    allow_none: bool = False,
    overwrite: bool = False,
) -> Path:
    """Cluster the cells of one slide.

    Parameters
    ----------
    table
        An ``.h5ad`` file, an AnnData ``.zarr`` folder, or a SpatialData store with a table ``table``.
    output
        Parquet file with a row a cell, which `cellquilt assemble` adds to a table; None adds to the store's own table.
    settings
        Groups ``cluster`` and ``resources``.
    sample
        The slide's name; None: the file's.
    markers
        Where to write the clusters' markers as a table (CSV, TSV, Parquet, JSON).
    allow_none
        Of a slide with nothing to cluster say so in the output, instead of an error.
    overwrite
        Replace what stands there.

    Returns
    -------
    pathlib.Path
        `output` or the store.

    Raises
    ------
    CellquiltError
        What `find_clusters` and reading the table refuse; ``table-not-in-store``.
    """
    if markers is not None:
        refuse_existing(markers, overwrite)

    def find(cells: "AnnData", name: str) -> CellColumns:
        import pandas as pd

        clusters, found = find_clusters(
            cells,
            resolution=settings["cluster_resolution"],
            n_neighbors=settings["cluster_n_neighbors"],
            n_pcs=settings["cluster_n_pcs"],
            n_top_genes=settings["cluster_n_top_genes"],
            n_markers=settings["cluster_n_markers"],
            seed=settings["cluster_seed"],
            name=name,
        )
        columns = pd.DataFrame({CLUSTER: clusters}, index=cells.obs_names)
        LOG.info("%s: %d clusters of %d cells", name, len(clusters.categories), int((clusters.codes >= 0).sum()))
        facts = {"n_clusters": len(clusters.categories), "n_cells_with_cluster": int((clusters.codes >= 0).sum())}
        return CellColumns(name, "cluster", columns, {MARKERS: found}, facts=facts)

    found = _found(table, sample, "cluster", (CLUSTER,), settings, find, allow_none)
    if markers is not None:
        import pandas as pd

        empty = pd.DataFrame({CLUSTER: pd.Series(dtype=object), "gene": pd.Series(dtype=object)})
        write_table(found.tables.get(MARKERS, empty), markers, overwrite=overwrite)
    return _publish(found, table, output, overwrite)


def annotate_by_markers(
    table: Path,
    output: Path | None = None,
    *,
    settings: Settings,
    sample: str | None = None,
    allow_none: bool = False,
    overwrite: bool = False,
) -> Path:
    """Name the types of one slide's cells by their markers.

    Parameters
    ----------
    table, output, sample, allow_none, overwrite
        As `cluster_table` takes them.
    settings
        Groups ``annotate`` and ``resources``; ``annotate_markers`` is the file with the types' markers
        (`read_signatures`).

    Returns
    -------
    pathlib.Path
        `output` or the store.

    Raises
    ------
    CellquiltError
        ``annotate-nothing`` without a file, what `read_signatures`, `phenotype` and reading the table refuse.
    """
    place = _file(settings, "annotate_markers", "the markers of cell types")
    signatures = read_signatures(place)

    def find(cells: "AnnData", name: str) -> CellColumns:
        columns = phenotype(
            cells,
            signatures,
            min_score=settings["annotate_min_score"],
            min_margin=settings["annotate_min_margin"],
            name=name,
        )
        return _annotated(name, columns, {"annotate_markers": _checksum(place)})

    found = _found(table, sample, "annotate", (CELL_TYPE,), settings, find, allow_none)
    return _publish(found, table, output, overwrite)


def annotate_by_reference(
    table: Path,
    output: Path | None = None,
    *,
    settings: Settings,
    sample: str | None = None,
    allow_none: bool = False,
    overwrite: bool = False,
) -> Path:
    """Name the types of one slide's cells by those of a reference.

    Parameters
    ----------
    table, output, sample, allow_none, overwrite
        As `cluster_table` takes them.
    settings
        Groups ``annotate`` and ``resources``; ``annotate_reference`` is AnnData (``.h5ad``) whose cells have types.

    Returns
    -------
    pathlib.Path
        `output` or the store.

    Raises
    ------
    CellquiltError
        ``annotate-nothing`` without a reference, ``annotate-label`` without the name of its column, what
        `transfer_labels` and reading the tables refuse.
    """
    place = _file(settings, "annotate_reference", "a reference (.h5ad)")
    label = settings["annotate_label"]
    if not label:
        raise CellquiltError("annotate-label", "annotate_label is not given", "name the reference's column of types")
    known = read_reference(place)

    def find(cells: "AnnData", name: str) -> CellColumns:
        columns = transfer_labels(
            cells,
            known,
            label,
            min_confidence=settings["annotate_min_confidence"],
            min_genes=settings["annotate_min_genes"],
            n_neighbors=settings["annotate_n_neighbors"],
            n_pcs=settings["annotate_n_pcs"],
            scaling=settings["annotate_scaling"],
            seed=settings["annotate_seed"],
            name=name,
        )
        return _annotated(name, columns, {"annotate_reference": _checksum(place)})

    found = _found(table, sample, "annotate", (CELL_TYPE,), settings, find, allow_none)
    return _publish(found, table, output, overwrite)


def _file(settings: Settings, name: str, what: str) -> Path:
    if not settings[name]:
        raise CellquiltError("annotate-nothing", f"{name} is not given", f"name the file with {what}")
    return Path(settings[name])


def _checksum(path: Path) -> str:
    about = describe_file(path)
    return str(about.get("sha256") or about["sha256_sampled"])


def _annotated(name: str, columns: Any, checksums: Mapping[str, str]) -> CellColumns:
    counts = columns[CELL_TYPE].value_counts()
    by_type = {str(kind): int(counts[kind]) for kind in columns[CELL_TYPE].cat.categories}
    LOG.info("%s: %s", name, ", ".join(f"{kind} {n}" for kind, n in by_type.items()))
    return CellColumns(name, "annotate", columns, facts={"cell_types": by_type, "checksums": dict(checksums)})


def _found(
    table: Path,
    sample: str | None,
    stage: str,
    columns: tuple[str, ...],
    settings: Settings,
    find: "Callable[[AnnData, str], CellColumns]",
    allow_none: bool,
) -> CellColumns:
    """What a step finds in a table, with all that its record needs."""
    import dataclasses

    import pandas as pd

    table = Path(table)
    is_store = table.is_dir() and zarr_json.is_group(table) and (table / "tables").is_dir()
    name = sample or (Store(table).name if is_store else table.stem)
    cells: AnnData = read_tables([table])[0]
    try:
        with threads_of(settings["threads"]):
            found = find(cells, name)
    except CellquiltError as error:
        if not allow_none or error.code not in _NOTHING_THERE:
            raise
        LOG.warning("%s: %s: %s", name, stage, error.message)
        none = pd.DataFrame(
            {column: pd.Categorical([None] * cells.n_obs, categories=[]) for column in columns}, index=cells.obs_names
        )
        found = CellColumns(name, stage, none, facts={f"{stage}_missing": error.as_dict()})
    parameters = {key: value for key, value in settings.of_stage(stage).items() if key not in _NOT_OF_RESULT}
    return dataclasses.replace(found, parameters=parameters, versions=versions())


def _publish(found: CellColumns, table: Path, output: Path | None, overwrite: bool) -> Path:
    if output is not None:
        return found.write(Path(output), overwrite=overwrite)
    table = Path(table)
    if not (table.is_dir() and (table / "tables" / "table").is_dir()):
        raise CellquiltError(
            "table-not-in-store", f"{table.name} is no store to add columns to", "name a Parquet file as --output"
        )
    store = Store(table)
    with result_of(store, None, overwrite=overwrite, extends=[("tables", "table")]) as delta:
        add_columns(store, delta, [found])
    return table
