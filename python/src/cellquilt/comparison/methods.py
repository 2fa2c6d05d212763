"""One table of all methods: sensitivity and contamination side by side, how far they agree, and the truth if known."""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cellquilt.comparison.cells import Segmentation, neighbours, outline_f1, overlapping_cells, solidity
from cellquilt.comparison.expression import coexpression_ratio, information, leakage, mecr, row_sums
from cellquilt.comparison.markers import MarkerPairs, SquareSample, check_genes, derive_pairs, pairs_from_reference
from cellquilt.comparison.transcripts import (
    CellCounts,
    Contingency,
    TranscriptTally,
    assignment_agreement,
    assignment_ari,
)
from cellquilt.core.atomic import atomic_path
from cellquilt.core.errors import CellquiltError
from cellquilt.simulate.scores import one_to_one, transcript_scores

if TYPE_CHECKING:
    import pandas as pd

_THRESHOLD = 0.5
_QUANTILES = (0.05, 0.25, 0.75, 0.95)
_AREA_BINS = 48
#: Bits a transcript below which the best method's cells tell so little that chance may decide the rank.
_LITTLE_INFORMATION = 0.01


@dataclass(frozen=True)
class Measure:
    """What a number of the table means.

    Attributes
    ----------
    name
        Column of the table.
    group
        ``sensitivity``, ``contamination``, ``shape``, ``overall`` or ``truth``.
    title
        Words for people.
    better
        ``more``, ``less``, or empty where neither is better by itself.
    kind
        ``count``, ``share`` or ``number``.
    """

    name: str
    group: str
    title: str
    better: str = ""
    kind: str = "number"


#: Every column of the table, in order; docs/compare.md says what each one tells.
MEASURES = (
    Measure("rank", "overall", "Rank", "less", "count"),
    Measure("information_bits", "overall", "Information (bits a transcript)", "more"),
    Measure("n_cells", "sensitivity", "Cells", "", "count"),
    Measure("share_assigned", "sensitivity", "Transcripts assigned", "more", "share"),
    Measure("median_transcripts_per_cell", "sensitivity", "Transcripts a cell, median", "more"),
    Measure("median_genes_per_cell", "sensitivity", "Genes a cell, median", "more"),
    Measure("transcripts_per_100um2_of_cell", "sensitivity", "Transcripts per 100 µm² of cell", "more"),
    Measure("coexpression_ratio", "contamination", "Co-expression of exclusive genes (1: chance)", "less"),
    Measure("mecr", "contamination", "Mutually exclusive co-expression rate", "less", "share"),
    Measure("control_rate_in_cells", "contamination", "Controls in cells", "less", "share"),
    Measure("control_rate_outside", "contamination", "Controls in no cell", "", "share"),
    Measure("leakage", "contamination", "Neighbours' share of the outer half", "less", "share"),
    Measure("leakage_standard_error", "contamination", "… its standard error", "", "share"),
    Measure("similarity_own", "contamination", "Outer half like own core", "more"),
    Measure("similarity_neighbours", "contamination", "Outer half like neighbours' cores", "less"),
    Measure("median_area_um2", "shape", "Area (µm²), median"),
    Measure("area_p05_um2", "shape", "… 5% of cells below"),
    Measure("area_p25_um2", "shape", "… 25% below"),
    Measure("area_p75_um2", "shape", "… 25% above"),
    Measure("area_p95_um2", "shape", "… 5% above"),
    Measure("median_solidity", "shape", "Solidity, median", "more"),
    Measure("true_f1", "truth", "Cells found (F1 at overlap 0.5)", "more"),
    Measure("share_in_true_cell", "truth", "Transcripts in their true cell", "more", "share"),
    Measure("precision", "truth", "Assigned ones in the cell they came from", "more", "share"),
    Measure("true_ari", "truth", "Adjusted Rand index against the truth", "more"),
)
MATRICES = {
    "outline_f1": "Outlines: F1 at overlap 0.5",
    "agreement": "Transcripts assigned alike",
    "ari": "Adjusted Rand index of the assignments",
}


@dataclass(frozen=True)
class ComparisonTable:
    """Methods, measured.

    Attributes
    ----------
    sample
        The slide.
    methods
        Names, in the order given.
    values
        Name of a `Measure` → one number a method; None where it has no meaning.
    matrices
        Key of `MATRICES` → (m, m) float64, symmetric; NaN where it has no meaning.
    area_edges_um2, area_counts
        (b + 1,) edges of bins of equal width in the logarithm, and (m, b) cells of every method in them.
    marker_pairs, marker_source
        The pairs of exclusive genes used, and where they are from: ``file``, ``reference`` or ``derived``.
    notes
        Why numbers are missing.
    """

    sample: str
    methods: tuple[str, ...]
    values: dict[str, tuple[float | int | None, ...]]
    matrices: dict[str, NDArray[np.float64]]
    area_edges_um2: NDArray[np.float64]
    area_counts: NDArray[np.int64]
    marker_pairs: tuple[tuple[str, str], ...] = ()
    marker_source: str = ""
    notes: tuple[str, ...] = ()

    def to_tsv(self) -> str:
        """One row a method, every measure a column; empty where it has no meaning."""
        lines = ["\t".join(("method", *self.values))]
        for k, method in enumerate(self.methods):
            lines.append("\t".join((method, *(_text(column[k]) for column in self.values.values()))))
        return "\n".join(lines) + "\n"

    def to_frame(self) -> "pd.DataFrame":
        """One row a method, every measure a column; NaN where it has no meaning."""
        import pandas as pd

        return pd.DataFrame(self.values, index=pd.Index(self.methods, name="method"))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, from which `from_dict` makes the same table."""
        return {
            "sample": self.sample,
            "methods": list(self.methods),
            "values": {name: list(column) for name, column in self.values.items()},
            "matrices": {name: [[_plain(v) for v in row] for row in m.tolist()] for name, m in self.matrices.items()},
            "area_edges_um2": [_plain(edge) for edge in self.area_edges_um2.tolist()],
            "area_counts": self.area_counts.tolist(),
            "marker_pairs": [list(pair) for pair in self.marker_pairs],
            "marker_source": self.marker_source,
            "notes": list(self.notes),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "ComparisonTable":
        """A table from what `to_dict` returned."""
        n = len(data["methods"])
        return cls(
            data["sample"],
            tuple(data["methods"]),
            {m.name: tuple(data["values"][m.name]) for m in MEASURES if m.name in data["values"]},
            {name: np.array(rows, dtype=np.float64).reshape(n, n) for name, rows in data["matrices"].items()},
            np.array(data["area_edges_um2"], dtype=np.float64),
            np.array(data["area_counts"], dtype=np.int64).reshape(n, -1),
            tuple((a, b) for a, b in data["marker_pairs"]),
            data["marker_source"],
            tuple(data["notes"]),
        )


def _plain(value: float | int | None) -> float | int | None:
    """A finite number, floats to 9 digits (the last ones depend on a library's version), else None."""
    if value is None or not math.isfinite(value):
        return None
    return value if isinstance(value, int) else float(f"{value:.9g}")


def _text(value: float | int | None) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def compare(
    segmentations: Sequence[Segmentation],
    batches: Iterable[tuple[pa.Table, Sequence[NDArray[np.integer] | None]]],
    *,
    pairs: MarkerPairs | None = None,
    reference: tuple[Sequence[str], NDArray[np.float64]] | None = None,
    truth: Segmentation | None = None,
    n_transcripts: int = 0,
    sample: str = "",
    seed: int = 0,
    threads: int = 1,
) -> ComparisonTable:
    """Measure segmentations of one slide by the same transcripts.

    Parameters
    ----------
    segmentations
        The methods' cells, names unique.
    batches
        The slide's transcripts in pieces: a table and the cell of each transcript by every method, as
        `TranscriptTally.add` takes them. A method without transcripts of its own passes None: outlines decide.
    pairs
        Pairs of exclusive genes. Default: from `reference`, else from the slide itself.
    reference
        Genes and mean expression of cell types, as `markers.read_reference` returns them.
    truth
        The true cells, where they are known; the batches then have one more assignment, the true one.
    n_transcripts
        About how many there are, so that no more is kept in memory than is needed to derive `pairs`.
    sample
        Name of the slide.
    seed
        Of the choice of places from which `pairs` are derived.
    threads
        Threads that locate points; changes nothing.

    Returns
    -------
    ComparisonTable
        Methods are ranked by `expression.information`, the most first.
    """
    names = [segmentation.name for segmentation in segmentations]
    if len(set(names)) < len(names):
        raise ValueError(f"methods of one name: {', '.join(sorted(names))}")
    tally = TranscriptTally(segmentations, truth, threads)
    squares = SquareSample(n_transcripts, seed)
    wanted = pairs is None and reference is None
    for batch, cells in batches:
        counted = tally.add(batch, cells)
        if wanted:
            squares.add(*counted)
    genes, column, shares = tally.panel()
    if pairs is None:
        pairs = (
            derive_pairs(squares, genes, column)
            if reference is None or not genes
            else pairs_from_reference(*reference, genes)
        )
    check_genes(pairs, genes)
    table = _Table(names, genes, shares, tally.n_countable, pairs.columns(genes))
    for k, segmentation in enumerate(segmentations):
        table.add(segmentation, tally.counts(k))
    if truth is not None:
        for k, segmentation in enumerate(segmentations):
            table.add_truth(segmentation, truth, tally.contingency(k, len(segmentations)))
    edges, counts = _area_histogram(segmentations)
    return ComparisonTable(
        sample,
        tuple(names),
        table.finish(),
        _matrices(segmentations, tally),
        edges,
        counts,
        tuple(zip(pairs.a, pairs.b, strict=True)),
        pairs.source,
        tuple(_notes(table, pairs, segmentations)),
    )


@dataclass
class _Table:
    """The numbers of the table, method by method."""

    names: list[str]
    genes: list[str]
    shares: NDArray[np.float64]
    n_countable: int
    pairs: tuple[NDArray[np.int64], NDArray[np.int64]]
    columns: dict[str, list[Any]] = field(default_factory=dict)

    def _put(self, **values: Any) -> None:
        for name, value in values.items():
            self.columns.setdefault(name, []).append(_plain(value))

    def add(self, segmentation: Segmentation, found: CellCounts) -> None:
        counts = found.counts
        told = counts if found.outlined is None else found.outlined
        areas = segmentation.areas_um2
        area = float(areas.sum())
        with_cells = len(segmentation) > 0
        with_genes = with_cells and len(self.genes) > 0
        nan = float("nan")
        low, lower, upper, high = np.quantile(areas, _QUANTILES).tolist() if with_cells else [nan] * 4
        leak = leakage(found.core, found.ring, neighbours(segmentation.centroids_um), self.shares)
        solid = solidity(segmentation.outlines)
        self._put(
            information_bits=information(told, self.shares, self.n_countable) if with_cells else nan,
            n_cells=len(segmentation),
            share_assigned=found.share_assigned,
            median_transcripts_per_cell=float(np.median(row_sums(counts))) if with_genes else nan,
            median_genes_per_cell=float(np.median(np.diff(counts.indptr))) if with_genes else nan,
            transcripts_per_100um2_of_cell=100.0 * float(counts.sum()) / area if with_genes and area > 0 else nan,
            coexpression_ratio=coexpression_ratio(counts, *self.pairs),
            mecr=mecr(counts, *self.pairs),
            control_rate_in_cells=found.control_rate_in_cells,
            control_rate_outside=found.control_rate_outside,
            leakage=leak.share,
            leakage_standard_error=leak.standard_error,
            similarity_own=leak.similarity_own,
            similarity_neighbours=leak.similarity_neighbours,
            median_area_um2=float(np.median(areas)) if with_cells else nan,
            area_p05_um2=low,
            area_p25_um2=lower,
            area_p75_um2=upper,
            area_p95_um2=high,
            median_solidity=float(np.nanmedian(solid)) if np.isfinite(solid).any() else nan,
        )

    def add_truth(self, segmentation: Segmentation, truth: Segmentation, together: Contingency) -> None:
        i, j, iou = overlapping_cells(segmentation, truth)
        n = len(segmentation)
        match = one_to_one(i, j, iou, n, len(truth))
        found = np.where(together.a < 0, n, together.a)
        scores = transcript_scores(found, together.b, together.counts, match)
        there = bool(together.counts.sum())
        self._put(
            true_f1=outline_f1(segmentation, truth, _THRESHOLD),
            share_in_true_cell=scores["share_in_true_cell"] if there else float("nan"),
            precision=scores["precision"] if there and (together.a >= 0).any() else float("nan"),
            true_ari=scores["ari"] if there else float("nan"),
        )

    def finish(self) -> dict[str, tuple[Any, ...]]:
        """The columns in the order of `MEASURES`, with the rank."""
        bits = np.array([np.nan if value is None else value for value in self.columns.get("information_bits", [])])
        # The best has rank 1; equal ones share a rank.
        ranks = [None if np.isnan(own) else 1 + int(np.count_nonzero(bits > own)) for own in bits]
        columns = {**self.columns, "rank": ranks}
        return {measure.name: tuple(columns[measure.name]) for measure in MEASURES if measure.name in columns}


def _matrices(segmentations: Sequence[Segmentation], tally: TranscriptTally) -> dict[str, NDArray[np.float64]]:
    m = len(segmentations)
    matrices = {name: np.eye(m) for name in MATRICES}
    for i, j in combinations(range(m), 2):
        together = tally.contingency(i, j)
        values = (
            outline_f1(segmentations[i], segmentations[j], _THRESHOLD),
            assignment_agreement(together),
            assignment_ari(together),
        )
        for matrix, value in zip(matrices.values(), values, strict=True):
            matrix[i, j] = matrix[j, i] = value
    return matrices


def _area_histogram(segmentations: Sequence[Segmentation]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    areas = [segmentation.areas_um2[segmentation.areas_um2 > 0] for segmentation in segmentations]
    together = np.concatenate([np.zeros(0), *areas])
    if not together.size:
        return np.zeros(1), np.zeros((len(segmentations), 0), dtype=np.int64)
    low, high = np.quantile(together, [0.01, 0.995]).tolist()
    edges = np.geomspace(low / 1.1, high * 1.1, _AREA_BINS + 1)
    # What lies beyond counts in the outermost bins.
    clipped = [np.clip(part, edges[0], edges[-1]) for part in areas]
    return edges, np.array([np.histogram(part, edges)[0] for part in clipped])


def _notes(table: _Table, pairs: MarkerPairs, segmentations: Sequence[Segmentation]) -> Iterator[str]:
    """Why numbers are missing."""
    for segmentation in segmentations:
        if len(segmentation) == 0:
            yield f"no cells by {segmentation.name}: it is not ranked"
    if not table.genes:
        yield "no transcripts to count: what compares counts is missing"
        return
    most = max((value for value in table.columns["information_bits"] if value is not None), default=math.inf)
    if most < _LITTLE_INFORMATION:
        yield "cells tell next to nothing about their transcripts: the rank is next to chance"
    if not len(pairs):
        where = {"reference": "in the reference", "derived": "by too few transcripts to tell"}.get(pairs.source, "")
        yield f"no pair of exclusive genes was found {where}: coexpression_ratio and mecr are missing"
    elif len(table.pairs[0]) < len(pairs):
        yield f"{len(table.pairs[0])} of {len(pairs)} pairs of exclusive genes are on the panel"
    if all(value is None for value in table.columns["control_rate_in_cells"]):
        yield "no controls among the transcripts: their rates are missing"
    by_genes = [segmentation.name for segmentation in segmentations if segmentation.by_genes]
    if by_genes:
        yield (
            f"transcripts of {', '.join(by_genes)} were assigned by their genes, too, which makes co-expression and "
            "leakage small, right or not; information and rank are those of the outlines"
        )
    unknown = [name for name, value in zip(table.names, table.columns["leakage"], strict=True) if value is None]
    if unknown:
        yield f"too few transcripts or neighbours to tell the leakage of {', '.join(unknown)}"


def write_comparison(table: ComparisonTable, output: Path, *, overwrite: bool = False) -> Path:
    """Write a table as TSV, or whole, with the agreement of methods and all else, where `output` ends in ``.json``."""
    text = table.to_tsv()
    if Path(output).suffix == ".json":
        text = json.dumps(table.to_dict(), indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"
    with atomic_path(output, overwrite=overwrite) as aside:
        aside.write_text(text, encoding="utf-8")
    return Path(output)


def read_comparison(path: Path) -> ComparisonTable:
    """Read what `write_comparison` wrote as JSON.

    Raises
    ------
    CellquiltError
        ``comparison-unreadable``.
    """
    try:
        return ComparisonTable.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CellquiltError(
            "comparison-unreadable", f"{path} is no comparison: {error}", "make one with `cellquilt compare`"
        ) from None
