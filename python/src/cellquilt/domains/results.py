"""What the stages of a cohort hand on: latents of a slide's cells, and their domains. Parquet, a row a cell."""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cellquilt.core.atomic import atomic_path
from cellquilt.core.errors import CellquiltError
from cellquilt.core.parquet import arrow_array, write_parquet
from cellquilt.domains.model import DOMAIN, LATENT, LEAF
from cellquilt.domains.stability import Confidence

#: Columns of a table, and of files, with what is known of how sure a domain is.
CONFIDENCE, STABILITY, PROBABILITIES = f"{DOMAIN}_confidence", f"{DOMAIN}_stability", f"{DOMAIN}_probabilities"
_ABOUT = b"cellquilt"
_CELL = "cell_id"


@dataclass(frozen=True)
class CellDomains:
    """Latents and, where they were assigned, domains of a slide's cells.

    Attributes
    ----------
    sample
        The slide's name.
    cells
        (n,) names.
    latents
        (n, size) float32; NaN for cells that have none.
    leaf, domain
        (n,) int64 number of each cell's nearest prototype, and of its domain in `names`; -1 for none. None: not yet.
    names
        Of the domains.
    confidence
        How sure they are; None: not known.
    about
        How they were made; plain data.
    """

    sample: str
    cells: NDArray[np.object_]
    latents: NDArray[np.float32]
    leaf: NDArray[np.int64] | None = None
    domain: NDArray[np.int64] | None = None
    names: Sequence[str] = ()
    confidence: Confidence | None = None
    about: Mapping[str, Any] | None = None

    @property
    def counts(self) -> dict[str, int]:
        """Domain → cells; of those that the slide shows."""
        assert self.domain is not None
        number = np.bincount(self.domain[self.domain >= 0], minlength=len(self.names)).tolist()
        return {name: n for name, n in zip(self.names, number, strict=True) if n}

    def write(self, output: Path, *, overwrite: bool = False) -> Path:
        """Write the file; the same cells, the same bytes."""
        columns = {_CELL: pa.array(self.cells.tolist(), pa.string())}
        if self.domain is not None and self.leaf is not None:
            n_leaves = int(self.leaf.max(initial=-1)) + 1
            columns[DOMAIN] = _named(self.domain, list(self.names))
            columns[LEAF] = _named(self.leaf, [leaf_name(number) for number in range(n_leaves)])
        if self.confidence is not None:
            columns[CONFIDENCE] = arrow_array(self.confidence.own)
            columns[STABILITY] = arrow_array(self.confidence.stability)
            columns[PROBABILITIES] = _rows(self.confidence.probabilities)
        columns[LATENT] = _rows(self.latents)
        about = {"sample": self.sample, "names": list(self.names), **(self.about or {})}
        text = json.dumps(about, sort_keys=True).encode()
        with atomic_path(output, overwrite=overwrite) as aside:
            write_parquet(aside, pa.table(columns).replace_schema_metadata({_ABOUT: text}))
        return output


def _rows(x: NDArray[np.float32]) -> pa.FixedSizeListArray:
    """(n, size) as a list a cell."""
    return pa.FixedSizeListArray.from_arrays(arrow_array(np.ascontiguousarray(x, dtype=np.float32).ravel()), x.shape[1])


def _of_rows(table: pa.Table, name: str) -> NDArray[np.float32]:
    column, size = table.column(name).combine_chunks(), table.schema.field(name).type.list_size
    found: NDArray[np.float32] = column.flatten().to_numpy(zero_copy_only=False).reshape(table.num_rows, size)
    return found.astype(np.float32)


def leaf_name(number: int) -> str:
    """Name of a prototype."""
    return f"D{number}"


def _named(codes: NDArray[np.int64], names: list[str]) -> pa.Array:
    missing = codes < 0
    indices = pa.array(np.where(missing, 0, codes).astype(np.int32), pa.int32(), mask=missing)
    return pa.DictionaryArray.from_arrays(indices, pa.array(names, pa.string()))


def about_file(path: Path) -> dict[str, Any]:
    """What a file says of itself, without its cells.

    Raises
    ------
    CellquiltError
        ``latents-invalid``.
    """
    try:
        return dict(json.loads(pq.read_schema(path).metadata[_ABOUT]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CellquiltError(
            "latents-invalid",
            f"{path} has no cells of cellquilt: {type(error).__name__}: {error}",
            "make it with cellquilt domains embed",
        ) from None


def read_cells(path: Path) -> CellDomains:
    """Read what `CellDomains.write` wrote.

    Raises
    ------
    CellquiltError
        ``latents-invalid``.
    """
    about = about_file(path)
    sample, names = about.pop("sample"), about.pop("names")
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise CellquiltError("latents-invalid", f"{path} cannot be read: {error}", "make it again") from None
    cells = table.column(_CELL).to_numpy()
    leaf = domain = None
    if DOMAIN in table.column_names:
        domain = _codes(table.column(DOMAIN), {name: number for number, name in enumerate(names)})
        leaves = table.column(LEAF).combine_chunks().dictionary.to_pylist()
        leaf = _codes(table.column(LEAF), {name: int(name[1:]) for name in leaves})
    confidence = None
    if CONFIDENCE in table.column_names:
        own, stability = (table.column(name).to_numpy() for name in (CONFIDENCE, STABILITY))
        confidence = Confidence(_of_rows(table, PROBABILITIES), own, stability)
    return CellDomains(sample, cells, _of_rows(table, LATENT), leaf, domain, names, confidence, about)


def _codes(column: pa.ChunkedArray, number: Mapping[str, int]) -> NDArray[np.int64]:
    array = column.combine_chunks()
    place = np.array([number[name] for name in array.dictionary.to_pylist()] + [-1], dtype=np.int64)
    found: NDArray[np.int64] = place[array.indices.fill_null(-1).to_numpy()]
    return found


class LatentFiles(Sequence[NDArray[np.float32]]):
    """Latents of the slides of a cohort, by the slides' names; each is read when it is asked for and then forgotten.

    Parameters
    ----------
    paths
        Files, in any order.

    Raises
    ------
    CellquiltError
        ``latents-invalid``, ``slide-twice``.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        named = [(str(about_file(path)["sample"]), path) for path in paths]
        self.samples, self.paths = sorted_by_name(named)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number):  # type: ignore[no-untyped-def]
        return read_cells(self.paths[number]).latents

    def cells(self) -> Iterator[CellDomains]:
        """The slides' cells."""
        return map(read_cells, self.paths)


def sorted_by_name(named: Sequence[tuple[str, Path]]) -> tuple[list[str], list[Path]]:
    """Names and files of slides, in the order of the names.

    Raises
    ------
    CellquiltError
        ``slide-twice``.
    """
    in_order = sorted(named)
    for (name, _), (other, path) in itertools.pairwise(in_order):
        if name == other:
            raise CellquiltError(
                "slide-twice", f'{path}: slide "{name}" is there twice', "give each slide its own name"
            )
    return [name for name, _ in in_order], [path for _, path in in_order]
