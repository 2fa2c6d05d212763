"""Pairs of genes that no cell expresses together: from a file, from a reference, or from the slide itself.

Pairs from the slide are found without any segmentation: genes that hardly ever lie in one square smaller than a cell,
although they lie near each other. So no method has a say in what it is measured by, and all are measured by the same.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cellquilt.core.errors import CellquiltError, did_you_mean, did_you_mean_file

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

MAX_PAIRS = 100
_PAIRS_A_GENE = 5
#: Exclusive in a reference: together at most this often, over what chance would give.
_REFERENCE_RATIO = 0.1
_DERIVED_RATIO = 0.5
_SQUARE_UM = 5.0
_PLACE_UM = 30.0
#: Normal quantile of the upper bound that a pair's ratio must keep below the limit.
_QUANTILE = 1.645
_MAX_GENES = 1000
_MAX_SAMPLE = 4_000_000
_PAIR_COLUMNS = ("gene_a", "gene_b")


@dataclass(frozen=True)
class MarkerPairs:
    """Pairs of mutually exclusive genes.

    Attributes
    ----------
    a, b
        Names of the genes of each pair.
    source
        ``file``, ``reference``, ``derived``.
    """

    a: tuple[str, ...] = ()
    b: tuple[str, ...] = ()
    source: str = "derived"

    def __len__(self) -> int:
        return len(self.a)

    def columns(self, genes: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Positions in the panel of both genes of the pairs that lie on it."""
        place = {gene: k for k, gene in enumerate(genes)}
        known = [(place[a], place[b]) for a, b in zip(self.a, self.b, strict=True) if a in place and b in place]
        columns = np.array(known, dtype=np.int64).reshape(-1, 2)
        return columns[:, 0], columns[:, 1]


def read_marker_pairs(path: Path | str) -> MarkerPairs:
    """Read pairs from a table (CSV or TSV) with the columns ``gene_a, gene_b``.

    Raises
    ------
    CellquiltError
        ``marker-pairs-unreadable``, or ``marker-pairs-invalid`` naming the row.
    """
    hint = "give a CSV with the columns gene_a and gene_b, one pair a row"
    rows = _read_table(Path(path), "marker-pairs-unreadable", hint)
    header = rows[0] if rows else []
    missing = [name for name in _PAIR_COLUMNS if name not in header]
    if missing:
        raise CellquiltError("marker-pairs-invalid", f"{path} has no column {' and '.join(missing)}", hint)
    columns = [header.index(name) for name in _PAIR_COLUMNS]
    pairs: dict[tuple[str, str], None] = {}
    for line, row in enumerate(rows[1:], 2):
        a, b = (row[k].strip() if k < len(row) else "" for k in columns)
        if not a or not b or a == b:
            what = "names one gene twice" if a and a == b else "lacks a gene"
            raise CellquiltError("marker-pairs-invalid", f"{path}, line {line} {what}", hint)
        pairs[(a, b) if a < b else (b, a)] = None
    if not pairs:
        raise CellquiltError("marker-pairs-invalid", f"{path} has no pairs", hint)
    return MarkerPairs(tuple(a for a, _ in pairs), tuple(b for _, b in pairs), "file")


def _read_table(path: Path, code: str, hint: str) -> list[list[str]]:
    if not path.exists():
        raise CellquiltError(code, f"{path} does not exist", did_you_mean_file(path) or hint)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise CellquiltError(code, f"{path} cannot be read: {error}", hint) from None
    delimiter = "\t" if "\t" in text.split("\n", 1)[0] else ","
    return [row for row in csv.reader(text.splitlines(), delimiter=delimiter) if any(word.strip() for word in row)]


def check_genes(pairs: MarkerPairs, panel: Sequence[str]) -> int:
    """How many pairs lie on the panel.

    Raises
    ------
    CellquiltError
        ``marker-genes-unknown`` if none does.
    """
    found = len(pairs.columns(panel)[0])
    if found == 0 and len(pairs) and len(panel):
        known = set(panel)
        raise _unknown(
            next(gene for pair in zip(pairs.a, pairs.b, strict=True) for gene in pair if gene not in known), panel
        )
    return found


def _unknown(gene: str, panel: Sequence[str]) -> CellquiltError:
    near = did_you_mean(gene, panel)
    return CellquiltError(
        "marker-genes-unknown",
        f"no marker is on the panel; {gene!r}, for one, is not",
        near if near.startswith("did you mean") else "name genes as the transcripts do",
    )


def read_reference(path: Path | str) -> tuple[list[str], NDArray[np.float64]]:
    """Mean expression of cell types.

    Parameters
    ----------
    path
        A CSV or TSV: a gene a row, its name first, then a number for every type. Or an AnnData file (``.h5ad``): its
        rows are types, or cells that ``obs["cell_type"]`` gives the type of.

    Returns
    -------
    genes : list of str
    profiles : numpy.ndarray
        (n_types, n_genes) float64; every row adds up to 1.

    Raises
    ------
    CellquiltError
        ``reference-unreadable`` or ``reference-invalid``.
    """
    path = Path(path)
    genes, means = _reference_anndata(path) if path.suffix == ".h5ad" else _reference_table(path)
    hint = "give counts or normalised means, not logarithms or scaled values"
    if means.shape[0] < 2 or not len(genes):
        raise CellquiltError(
            "reference-invalid", f"{path} has {means.shape[0]} cell types and {len(genes)} genes; expected two or more"
        )
    if not (np.isfinite(means).all() and (means >= 0).all()):
        raise CellquiltError("reference-invalid", f"{path} has negative or missing values", hint)
    totals = means.sum(axis=1, keepdims=True)
    if (totals == 0).any():
        raise CellquiltError("reference-invalid", f"{path} has a cell type without any expression", hint)
    return genes, means / totals


def _reference_table(path: Path) -> tuple[list[str], NDArray[np.float64]]:
    hint = "give a CSV with a gene a row: its name, then its mean in every cell type"
    rows = _read_table(path, "reference-unreadable", hint)
    try:
        values = np.array([row[1:] for row in rows[1:]], dtype=np.float64).reshape(len(rows) - 1, -1)
    except ValueError as error:
        raise CellquiltError("reference-invalid", f"{path} is no table of numbers: {error}", hint) from None
    return [row[0].strip() for row in rows[1:]], values.T


def _reference_anndata(path: Path) -> tuple[list[str], NDArray[np.float64]]:
    import anndata
    from scipy.sparse import csr_matrix

    if not path.exists():
        raise CellquiltError("reference-unreadable", f"{path} does not exist", did_you_mean_file(path))
    try:
        table = anndata.read_h5ad(path)
    except Exception as error:  # whatever h5py and anndata raise on damaged files
        raise CellquiltError("reference-unreadable", f"{path} cannot be read as AnnData: {error}") from None
    counts = csr_matrix(table.X, dtype=np.float64)
    genes = [str(gene) for gene in table.var_names]
    if "cell_type" not in table.obs:
        return genes, counts.toarray()
    _, kind = np.unique(table.obs["cell_type"].astype(str).to_numpy(), return_inverse=True)
    # Every cell counts the same, whatever its depth.
    share = 1.0 / np.maximum(np.asarray(counts.sum(axis=1)).ravel(), 1e-300)
    groups = csr_matrix((share, (kind, np.arange(len(kind)))), shape=(int(kind.max(initial=-1)) + 1, len(kind)))
    return genes, (groups @ counts).toarray()


def pairs_from_reference(genes: Sequence[str], profiles: NDArray[np.float64], panel: Sequence[str]) -> MarkerPairs:
    """Exclusive pairs by a reference.

    Parameters
    ----------
    genes, profiles
        What `read_reference` returns.
    panel
        Genes of the slide; others do not count.

    Returns
    -------
    MarkerPairs
        Of the pairs that share cell types at most a tenth as often as by chance the most abundant ones; a gene is in
        five at most.

    Raises
    ------
    CellquiltError
        ``marker-genes-unknown`` if the reference has no gene of the panel.
    """
    place = {gene: k for k, gene in enumerate(genes)}
    known = [gene for gene in sorted(set(panel)) if gene in place]
    if not known:
        raise _unknown(genes[0], panel)
    some = profiles[:, [place[gene] for gene in known]]
    mean = some.mean(axis=0)
    kept = np.argsort(-mean, kind="stable")[:_MAX_GENES]
    kept = np.sort(kept[mean[kept] > 0])
    some, mean = some[:, kept], mean[kept]
    i, j = np.triu_indices(kept.size, 1)
    ratio = (some.T @ some / len(some))[i, j] / (mean[i] * mean[j])
    exclusive = np.flatnonzero(ratio <= _REFERENCE_RATIO)
    rarer = np.minimum(mean[i], mean[j])[exclusive]
    order = exclusive[np.lexsort((j[exclusive], i[exclusive], -rarer))]
    return _named(i[order], j[order], [known[k] for k in kept], "reference")


def _named(i: NDArray[np.int64], j: NDArray[np.int64], genes: Sequence[str], source: str) -> MarkerPairs:
    """The first pairs in which no gene is met too often."""
    used = np.zeros(len(genes), dtype=np.int64)
    a, b = [], []
    for one, other in zip(i.tolist(), j.tolist(), strict=True):
        if used[one] < _PAIRS_A_GENE and used[other] < _PAIRS_A_GENE:
            used[[one, other]] += 1
            a.append(genes[one])
            b.append(genes[other])
            if len(a) == MAX_PAIRS:
                break
    return MarkerPairs(tuple(a), tuple(b), source)


@dataclass
class SquareSample:
    """Transcripts of a sample of places, kept to find exclusive pairs in.

    Parameters
    ----------
    n_transcripts
        About how many there are on the slide: more than can be kept are thinned out, place by place.
    seed
        Of the choice of places.
    """

    n_transcripts: int
    seed: int = 0
    _parts: list[tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int32]]] = field(default_factory=list)

    def add(self, x: NDArray[np.float64], y: NDArray[np.float64], gene: NDArray[np.int64]) -> None:
        """Look at a batch: (n,) µm, (n,) µm, (n,) codes of genes."""
        known = np.isfinite(x) & np.isfinite(y)
        share = min(_MAX_SAMPLE / max(self.n_transcripts, 1), 1.0)
        if share < 1.0:
            column = np.floor(np.where(known, x, 0) / _PLACE_UM).astype(np.int64).astype(np.uint64)
            row = np.floor(np.where(known, y, 0) / _PLACE_UM).astype(np.int64).astype(np.uint64)
            known &= _uniform(column, row, self.seed) < share
        rows = np.flatnonzero(known)
        self._parts.append((x[rows], y[rows], gene[rows].astype(np.int32)))

    def counts(self, width_um: float, column: NDArray[np.integer], n_genes: int) -> "csr_matrix":
        """(n_squares, n_genes) float64 CSR: transcripts in the squares of a grid through (0, 0).

        Parameters
        ----------
        width_um
            Side of a square.
        column, n_genes
            Column of each gene code, and how many columns there are.
        """
        from scipy.sparse import csr_matrix

        empty = (np.zeros(0), np.zeros(0), np.zeros(0, np.int32))
        x, y, gene = (np.concatenate(parts) for parts in zip(empty, *self._parts, strict=True))
        place = np.floor(np.stack([x, y]) / width_um).astype(np.int64)
        place -= place.min(axis=1, keepdims=True, initial=0)
        _, square = np.unique(place[1] * (place[0].max(initial=0) + 1) + place[0], return_inverse=True)
        shape = (int(square.max(initial=-1)) + 1, n_genes)
        return csr_matrix((np.ones(gene.size), (square, column[gene])), shape=shape)


def _uniform(column: NDArray[np.uint64], row: NDArray[np.uint64], seed: int) -> NDArray[np.float64]:
    """A number in [0, 1) for every place that depends on the place and the seed alone (the mixer of splitmix64)."""
    with np.errstate(over="ignore"):
        z = column * np.uint64(0x9E3779B97F4A7C15) + row * np.uint64(0xC2B2AE3D27D4EB4F)
        z += np.uint64(seed) * np.uint64(0x165667B19E3779F9)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return (z >> np.uint64(11)).astype(np.float64) / 2.0**53


def derive_pairs(sample: SquareSample, genes: Sequence[str], column: NDArray[np.integer]) -> MarkerPairs:
    """Exclusive pairs by the slide itself, without any cells.

    Parameters
    ----------
    sample
        Transcripts.
    genes, column
        Names of the genes, and the position among them of each gene code.

    Returns
    -------
    MarkerPairs
        At most `MAX_PAIRS`, the most exclusive first; a gene is in five at most. None where the slide has too few
        transcripts to tell.

    Notes
    -----
    For every pair, how often do transcripts of both lie in one square of 5 µm, over what chance would give? The same in
    squares of 30 µm says whether the two are met in one place at all: pairs of genes of different regions would be
    exclusive whatever a segmentation does. A pair is taken if the upper bound (95 %, Poisson) of the first ratio is at
    most half of the second.
    """
    n = len(genes)
    small, large = sample.counts(_SQUARE_UM, column, n), sample.counts(_PLACE_UM, column, n)
    totals = np.asarray(small.sum(axis=0)).ravel()
    kept = np.argsort(-totals, kind="stable")[:_MAX_GENES]
    kept = np.sort(kept[totals[kept] > 0])
    if kept.size < 2:
        return MarkerPairs()
    i, j = np.triu_indices(kept.size, 1)
    met, chance = (values[i, j] for values in _meetings(small, kept))
    met_near, chance_near = (values[i, j] for values in _meetings(large, kept))
    expected = chance * met_near / np.maximum(chance_near, 1e-300)
    # Upper bound of a Poisson count's mean, by its score.
    upper = met + _QUANTILE**2 / 2 + _QUANTILE * np.sqrt(met + _QUANTILE**2 / 4)
    ratio = np.divide(upper, expected, out=np.full(met.size, np.inf), where=expected > 0)
    exclusive = np.flatnonzero(ratio <= _DERIVED_RATIO)
    order = exclusive[np.lexsort((j[exclusive], i[exclusive], ratio[exclusive]))]
    return _named(i[order], j[order], [genes[k] for k in kept], "derived")


def _meetings(counts: "csr_matrix", kept: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """How often two transcripts of one square are of each pair of genes, and how often they would by chance."""
    totals = np.asarray(counts.sum(axis=1)).ravel()
    share = np.asarray(counts.sum(axis=0)).ravel()[kept] / max(totals.sum(), 1.0)
    some = counts[:, kept]
    return (some.T @ some).toarray(), (totals * (totals - 1)).sum() * np.outer(share, share)
