"""Differences between conditions. The sample is the unit: cells of one sample are no independent observations."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cellquilt.core.errors import CellquiltError, did_you_mean
from cellquilt.domains.analysis.expression import measured
from cellquilt.spatial.conditions import ComparedPairs
from cellquilt.spatial.slides import natural_order, one_value, slides
from cellquilt.statistics.compositions import PSEUDOCOUNT, centred_log_ratios, median_log_ratios
from cellquilt.statistics.groups import pairs_of

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

#: What may be compared.
WHAT = ("proportions", "expression")
#: Cells that a sample must have of a domain for its expression there to be compared.
MIN_CELLS = 10
#: Molecules that expression is scaled to, before its logarithm is taken.
_TARGET = 10_000.0


@dataclass
class _Sample:
    condition: str
    batch: str | None
    numbers: dict[str, int] = field(default_factory=dict)
    kinds: set[str] = field(default_factory=set)
    #: Domain → (genes, their summed counts).
    sums: dict[str, list[tuple[list[str], NDArray[np.float64]]]] = field(default_factory=dict)


def compare_conditions(
    adatas: "AnnData | Sequence[AnnData]",
    condition_key: str,
    sample_key: str | None = None,
    *,
    what: str = "proportions",
    domain_key: str = "domain",
    batch_key: str | None = None,
    reference: str | None = None,
    n_permutations: int = 9999,
    seed: int = 0,
    min_cells: int = MIN_CELLS,
    layer: str | None = None,
    kind: str | None = None,
) -> "pd.DataFrame":
    """Compare conditions by permuting which sample has which.

    Parameters
    ----------
    adatas
        Tables with domains.
    condition_key
        Column of `obs` with the samples' condition.
    sample_key
        Column that names the samples, the unit of the comparison: a patient with several slides is one. None: each
        table is one.
    what
        ``proportions``: shares of the domains, as log2 of each over a reference that one rising domain does not move
        (`cellquilt.statistics.compositions.median_log_ratios`), so that it does not make all others fall.
        ``expression``: log2 of each gene's counts summed over a sample's cells of a
        domain (pseudobulk), scaled to 10,000.
    domain_key
        Column with the domains.
    batch_key
        Column with the samples' batch; samples are then compared within batches.
    reference
        Condition that the others are compared with; None: all pairs.
    n_permutations, seed
        All ways to permute the samples are tried if there are no more; else so many random ones.
    min_cells
        Samples with fewer cells of a domain are left out of the comparison of its expression.
    layer
        Layer with the counts instead of X.
    kind
        What it holds: ``counts``, ``log1p`` or ``protein``; None: by its values. Of intensities the mean over a
        sample's cells of a domain is compared.

    Returns
    -------
    pandas.DataFrame
        A row for each pair of conditions and domain (and gene): ``condition_a``, ``condition_b``, ``domain``,
        (``gene``,) ``n_a``, ``n_b`` (samples), ``mean_a``, ``mean_b`` (shares; logarithms for genes), ``difference`` (b
        less a), ``log2_ratio`` (of what is tested), ``hedges_g``, (``clr_difference``, of centred log-ratios,) ``p``,
        ``p_max_t`` (chance of one false finding or more in the pair; for genes in the domain), ``p_bh`` (false
        discovery rate over all rows), ``smallest_p`` (that the design could give), ``n_permutations``, ``exact``,
        ``note`` (why there is no p-value). In each pair the smallest p first.

    Raises
    ------
    CellquiltError
        ``comparison-unknown``, ``condition-missing``, ``condition-mixed``, ``batch-missing``, ``batch-mixed``,
        ``conditions-too-few``, ``reference-unknown``, ``genes-none-shared``, and what `proportions` raises.
    """
    if what not in WHAT:
        raise CellquiltError("comparison-unknown", f'cannot compare "{what}"', did_you_mean(what, WHAT))
    source = (layer, kind) if what == "expression" else None
    samples = _samples(adatas, condition_key, sample_key, domain_key, batch_key, source)
    conditions = [sample.condition for sample in samples.values()]
    batches = None if batch_key is None else np.array([str(sample.batch) for sample in samples.values()])
    pairs = pairs_of(conditions, reference)
    compared = ComparedPairs(n_permutations, seed, batches, np.array(conditions, dtype=object))
    if what == "proportions":
        _proportions(samples, pairs, compared)
    else:
        _expression(samples, pairs, compared, min_cells)
    if what == "expression":
        return compared.frame("domain", "gene")
    return compared.frame("domain", extra=("clr_difference",))


def _samples(
    adatas: "AnnData | Sequence[AnnData]",
    condition_key: str,
    sample_key: str | None,
    domain_key: str,
    batch_key: str | None,
    source: tuple[str | None, str | None] | None,
) -> dict[str, _Sample]:
    """The samples by name; with their expression (layer and kind) if that is asked for."""
    samples: dict[str, _Sample] = {}
    for slide in slides(adatas, domain_key, sample_key, parts=True):
        said = _Sample(one_value(slide, condition_key), None)
        if batch_key is not None:
            said.batch = _batch(slide, batch_key)
        known = samples.setdefault(slide.name, said)
        for key, code, old, new in (
            (condition_key, "condition-mixed", known.condition, said.condition),
            (batch_key, "batch-mixed", known.batch, said.batch),
        ):
            if old != new:
                raise CellquiltError(
                    code, f'{slide.name}: obs["{key}"] is {old} in one table, {new} in another', "one was expected"
                )
        for name, number in zip(slide.domains, slide.numbers.tolist(), strict=True):
            known.numbers[name] = known.numbers.get(name, 0) + number
        if source is not None and (slide.codes >= 0).any():
            own = measured(slide, *source)
            known.kinds.add("protein" if own.kind == "protein" else "counts")
            for name, row in zip(slide.domains, own.sums(len(slide.domains)), strict=True):
                known.sums.setdefault(name, []).append((own.genes, row))
    return samples


def _batch(slide: Any, key: str) -> str:
    try:
        return one_value(slide, key)
    except CellquiltError as error:
        raise CellquiltError(error.code.replace("condition", "batch"), error.message, error.hint) from None


def _proportions(samples: dict[str, _Sample], pairs: list[tuple[str, str]], compared: ComparedPairs) -> None:
    names = sorted({name for sample in samples.values() for name in sample.numbers})
    domains = [names[k] for k in natural_order(names)]
    numbers = np.array([[sample.numbers.get(name, 0) for name in domains] for sample in samples.values()])
    total = numbers.sum(axis=1, keepdims=True)
    some = total.ravel() > 0
    shares, centred = numbers / np.maximum(total, 1), centred_log_ratios(numbers)
    for pair in pairs:
        a, b = (some & (compared.conditions == name) for name in pair)
        among = a | b
        ratios = np.full(shares.shape, np.nan)
        ratios[among] = median_log_ratios(numbers[among])
        labels = {"domain": domains, "clr_difference": centred[b].mean(axis=0) - centred[a].mean(axis=0)}
        compared.add(pair, among, ratios, shares, labels)


def _expression(
    samples: dict[str, _Sample], pairs: list[tuple[str, str]], compared: ComparedPairs, min_cells: int
) -> None:
    names = sorted({name for sample in samples.values() for name in sample.sums})
    genes = sorted(
        {gene for sample in samples.values() for parts in sample.sums.values() for g, _ in parts for gene in g}
    )
    column = {gene: k for k, gene in enumerate(genes)}
    measured = np.array([_measured(sample, column) for sample in samples.values()])
    shared = measured[measured.any(axis=1)].all(axis=0)  # a sample without a domain has no say
    if not shared.any():
        raise CellquiltError(
            "genes-none-shared", "no gene is in the panels of all samples", "compare samples of one panel, or fewer"
        )
    kinds = {kind for sample in samples.values() for kind in sample.kinds}
    if len(kinds) > 1:
        raise CellquiltError(
            "expression-mixed", "some samples have counts, others intensities", "compare samples of one machine"
        )
    for domain in [names[k] for k in natural_order(names)]:
        enough = np.array([sample.numbers.get(domain, 0) >= min_cells for sample in samples.values()])
        sums = np.zeros(measured.shape)
        for row, sample in zip(sums, samples.values(), strict=True):
            for own, values in sample.sums.get(domain, []):
                row[[column[gene] for gene in own]] += values
        if kinds == {"protein"}:
            cells = np.array([[sample.numbers.get(domain, 0)] for sample in samples.values()])
            logs = np.log2(np.maximum(sums / np.maximum(cells, 1), 1e-6))
        else:
            total = sums[:, shared].sum(axis=1, keepdims=True)
            logs = np.log2((sums + PSEUDOCOUNT) / (total + 2 * PSEUDOCOUNT) * _TARGET)
        for pair in pairs:
            of_pair = enough & np.isin(compared.conditions, pair)
            # Genes of different panels are measured in different samples.
            patterns, which = np.unique(measured[of_pair], axis=1, return_inverse=True)
            for k, pattern in enumerate(patterns.T):
                columns = np.flatnonzero(which.ravel() == k)
                among = np.zeros(len(samples), dtype=bool)
                among[np.flatnonzero(of_pair)[pattern]] = True
                labels = {"domain": domain, "gene": [genes[g] for g in columns]}
                compared.add(pair, among, logs[:, columns], logs[:, columns], labels)


def _measured(sample: _Sample, column: dict[str, int]) -> NDArray[np.bool_]:
    """(n_genes,) which genes all tables of a sample have."""
    panels = {tuple(own) for parts in sample.sums.values() for own, _ in parts}
    out = np.ones(len(column), dtype=bool)
    for panel in panels:
        has = np.zeros(len(column), dtype=bool)
        has[[column[gene] for gene in panel]] = True
        out &= has
    return out & bool(panels)
