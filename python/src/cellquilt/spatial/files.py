"""Cell tables from files, one in memory at a time, and results as files."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cellquilt.core import zarr_json
from cellquilt.core.atomic import atomic_path, refuse_existing
from cellquilt.core.errors import CellquiltError, did_you_mean, did_you_mean_file
from cellquilt.core.store import Store
from cellquilt.spatial.slides import SAMPLE

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

#: Suffixes of tables that can be written.
FORMATS = (".csv", ".tsv", ".parquet", ".json")


class TableFiles(Sequence["AnnData"]):
    """Cell tables on disk, each read when it is asked for and then forgotten.

    Parameters
    ----------
    paths
        ``.h5ad`` files, AnnData ``.zarr`` folders, or SpatialData stores.
    table
        Name of the table in SpatialData stores.
    places_only
        Read where the cells are and what is said of them (`obs`, coordinates and graphs), not what was measured.
    """

    def __init__(self, paths: Sequence[Path | str], table: str = "table", *, places_only: bool = False) -> None:
        self.paths = [Path(path) for path in paths]
        self.table = table
        self.places_only = places_only
        if not self.paths:
            raise CellquiltError("tables-missing", "there are no tables", "name .h5ad files or .zarr stores")
        for path in self.paths:
            if not path.exists():
                raise CellquiltError("table-missing", f"{path} does not exist", did_you_mean_file(path))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, place):  # type: ignore[no-untyped-def]
        if isinstance(place, slice):
            return TableFiles(self.paths[place], self.table, places_only=self.places_only)
        return self._read(self.paths[place])

    def __iter__(self) -> "Iterator[AnnData]":
        return map(self._read, self.paths)

    def _read(self, path: Path) -> "AnnData":
        import anndata

        folder = path
        if path.is_dir() and not _is_anndata(path):
            store = Store(path)
            if not store.has("tables", self.table):
                there = path / "tables"
                names = [entry.name for entry in there.iterdir() if entry.is_dir()] if there.is_dir() else []
                hint = did_you_mean(self.table, names) if names else "run `cellquilt aggregate` on it first"
                raise CellquiltError("table-missing", f'{path} has no table "{self.table}"', hint)
            folder = store.element("tables", self.table)
        elif not path.is_dir() and path.suffix.lower() != ".h5ad":
            raise CellquiltError("table-unreadable", f"{path} is neither .h5ad nor a .zarr folder", "convert it first")
        try:
            if self.places_only:
                table = _places(folder)
            else:
                table = anndata.read_zarr(folder) if path.is_dir() else anndata.read_h5ad(path)
        except Exception as error:  # whatever h5py, zarr and anndata raise on damaged files
            raise CellquiltError(
                "table-unreadable", f"{path} cannot be read: {type(error).__name__}: {error}", "is the file whole?"
            ) from error
        if SAMPLE not in table.obs:
            table.obs[SAMPLE] = path.name.removesuffix(path.suffix)
        return table


def _places(path: Path) -> "AnnData":
    """A table without its matrix, layers and all of `obsm` but the coordinates."""
    import anndata
    from anndata.io import read_elem

    def parts(group: Any) -> "AnnData":
        obsm: Any = {"spatial": read_elem(group["obsm/spatial"])} if "spatial" in group.get("obsm", {}) else {}
        names = sorted(group["obsp"]) if "obsp" in group else []
        obsp: Any = {name: read_elem(group[f"obsp/{name}"]) for name in names}
        return anndata.AnnData(obs=read_elem(group["obs"]), obsm=obsm, obsp=obsp)

    if path.is_dir():
        import zarr

        return parts(zarr.open_group(str(path), mode="r"))
    import h5py

    with h5py.File(path, "r") as file:
        return parts(file)


def _is_anndata(folder: Path) -> bool:
    if not zarr_json.is_group(folder):
        return (folder / ".zattrs").is_file()  # an older Zarr, which only AnnData's own folders are read in
    return zarr_json.read_attributes(folder).get("encoding-type") == "anndata"


def read_tables(paths: "Sequence[Path | str] | Path | str", table: str = "table") -> TableFiles:
    """Cell tables on disk, as all functions of the analysis take them.

    Parameters
    ----------
    paths
        ``.h5ad`` files, AnnData ``.zarr`` folders, or SpatialData stores; a slide without a column ``sample`` is called
        as its file.
    table
        Name of the table in SpatialData stores.

    Raises
    ------
    CellquiltError
        ``tables-missing``, ``table-missing``, and when one is read ``table-unreadable``.
    """
    return TableFiles([paths] if isinstance(paths, str | Path) else paths, table)


def write_table(found: "pd.DataFrame", output: Path | str, *, overwrite: bool = False) -> Path:
    """Write a result as CSV, TSV, Parquet or JSON (rows), by the suffix.

    Raises
    ------
    CellquiltError
        ``format-unknown``, ``output-exists``.
    """
    output = Path(output)
    kind = check_format(output)
    with atomic_path(output, overwrite=overwrite) as aside:
        if kind == ".parquet":
            found.to_parquet(aside, index=False)
        elif kind == ".json":
            found.to_json(aside, orient="records", indent=1, double_precision=15)
        else:
            found.to_csv(aside, index=False, sep="," if kind == ".csv" else "\t")
    return output


def check_output(output: Path | str, overwrite: bool) -> None:
    """Refuse what `write_table` would refuse, before any work is done for it."""
    check_format(Path(output))
    refuse_existing(Path(output), overwrite)


def check_format(output: Path) -> str:
    """The suffix of a table to write; one of `FORMATS`."""
    kind = output.suffix.lower()
    if kind not in FORMATS:
        raise CellquiltError("format-unknown", f"{output}: a table is written as {', '.join(FORMATS)}")
    return kind
