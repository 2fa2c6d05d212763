"""All that is known of a cohort's domains, in one object."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cellquilt.domains import metrics
from cellquilt.domains.analysis.architecture import Architecture, architecture
from cellquilt.domains.analysis.conditions import compare_conditions
from cellquilt.domains.analysis.genes import GeneStatistics, gene_statistics
from cellquilt.domains.analysis.pathways import Pathways, pathway_scores, read_gene_sets
from cellquilt.domains.analysis.shares import proportions
from cellquilt.spatial.files import write_table
from cellquilt.spatial.slides import slides

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData


@dataclass(frozen=True)
class CohortAnalysis:
    """What `analyse_cohort` found; None for what was not asked for, or what the tables lack.

    Attributes
    ----------
    proportions
        Of `proportions`.
    architecture
        None if a table has no graph, or there is one domain.
    genes
        None without expression, or with one domain.
    compared, compared_genes
        Of `compare_conditions`; None without conditions.
    pathways
        None without gene sets.
    metrics
        A row a slide: ``slide``, ``n_cells``, ``n_domains``, ``entropy`` (of the shares, over that of even ones),
        ``fide``.
    divergence
        Jensen-Shannon divergence of the slides' shares, in bits.
    agreement
        ``ari`` and ``nmi`` where there is a truth.
    notes
        What is missing, and why.
    """

    proportions: "pd.DataFrame"
    architecture: Architecture | None
    genes: GeneStatistics | None
    compared: "pd.DataFrame | None"
    compared_genes: "pd.DataFrame | None"
    pathways: Pathways | None
    metrics: "pd.DataFrame"
    divergence: float
    agreement: dict[str, float] | None
    notes: list[str] = field(default_factory=list)

    @property
    def domains(self) -> list[str]:
        """All domains, in natural order."""
        return list(dict.fromkeys(self.proportions["domain"]))

    def tables(self) -> "dict[str, pd.DataFrame]":
        """All tables there are, by name."""
        found = {"proportions": self.proportions, "metrics": self.metrics}
        if self.architecture is not None:
            found["architecture"] = self.architecture.to_frame()
        if self.genes is not None:
            found["variable_genes"] = self.genes.by_gene()
            found["genes_by_domain"] = self.genes.by_domain()
        if self.compared is not None:
            found["conditions_proportions"] = self.compared
        if self.compared_genes is not None:
            found["conditions_genes"] = self.compared_genes
        if self.pathways is not None:
            found["pathway_scores"] = self.pathways.scores
            found["pathway_sets"] = self.pathways.sets
        return found

    def write(self, folder: Path, *, overwrite: bool = False) -> None:
        """Write all tables as ``<name>.csv`` into a folder."""
        for name, table in self.tables().items():
            write_table(table, folder / f"{name}.csv", overwrite=overwrite)


def analyse_cohort(
    adatas: "AnnData | Sequence[AnnData]",
    domain_key: str = "domain",
    slide_key: str | None = None,
    *,
    condition_key: str | None = None,
    sample_key: str | None = None,
    batch_key: str | None = None,
    gene_sets: Mapping[str, Sequence[str]] | Path | str | None = None,
    truth_key: str = "domain_true",
    n_permutations: int = 9999,
    seed: int = 0,
) -> CohortAnalysis:
    """Do all analyses that the tables allow; see the functions of each.

    Parameters
    ----------
    adatas
        Tables with domains.
    domain_key, slide_key, condition_key, batch_key
        Columns of `obs` with domains, slides, conditions and batches.
    sample_key
        Column with the samples, the unit of comparisons; None: the slides.
    gene_sets
        Name → genes, or a file of them.
    truth_key
        Column with the true domains, where it is there.
    n_permutations, seed
        Of the comparison of conditions.

    Raises
    ------
    CellquiltError
        What the functions raise for mistakes of the caller; what a table lacks is in `CohortAnalysis.notes`.
    """
    sets = read_gene_sets(gene_sets) if isinstance(gene_sets, str | Path) else gene_sets
    shares = proportions(adatas, domain_key, slide_key, condition_key)
    notes: list[str] = []
    about = _survey(adatas, domain_key, slide_key, truth_key)
    several = shares["domain"].nunique() > 1
    if not several:
        notes.append("all cells are of one domain: there is nothing to compare it with")
    neighbours = genes = compared = compared_genes = scores = None
    if about.without_graph:
        notes.append(f"no architecture: {about.without_graph} has no graph of cells")
    elif several:
        neighbours = architecture(adatas, domain_key, slide_key)
    if about.without_genes:
        notes.append(f"no genes: {about.without_genes} has no expression")
    elif several:
        genes = gene_statistics(adatas, domain_key, slide_key)
    if condition_key is not None:
        unit = sample_key or slide_key
        keys = {"domain_key": domain_key, "batch_key": batch_key, "n_permutations": n_permutations, "seed": seed}
        if several:
            compared = compare_conditions(adatas, condition_key, unit, **keys)  # type: ignore[arg-type]
        if not about.without_genes:
            compared_genes = compare_conditions(adatas, condition_key, unit, what="expression", **keys)  # type: ignore[arg-type]
    if sets is not None and not about.without_genes:
        scores = pathway_scores(adatas, sets, domain_key, slide_key)
    return CohortAnalysis(
        proportions=shares,
        architecture=neighbours,
        genes=genes,
        compared=compared,
        compared_genes=compared_genes,
        pathways=scores,
        metrics=_metrics(shares, neighbours),
        divergence=_divergence(shares),
        agreement=about.agreement,
        notes=notes,
    )


@dataclass
class _Survey:
    without_graph: str = ""
    without_genes: str = ""
    agreement: dict[str, float] | None = None


def _survey(adatas: "AnnData | Sequence[AnnData]", domain_key: str, slide_key: str | None, truth_key: str) -> _Survey:
    """What the tables have, and their agreement with the truth."""
    import anndata

    from cellquilt.spatial.tables import DISTANCES

    found = _Survey()
    labels, all_true = [], True
    for slide in slides(adatas, domain_key, slide_key):
        table = slide.table
        if DISTANCES not in table.obsp:
            found.without_graph = found.without_graph or slide.name
        if table.X is None or not table.n_vars:
            found.without_genes = found.without_genes or slide.name
        all_true &= truth_key in table.obs
        if all_true:
            labels.append(anndata.AnnData(obs=table.obs[[domain_key, truth_key]].iloc[slide.rows]))
    if all_true:
        found.agreement = metrics.agreement(labels, domain_key, truth_key)
    return found


def _metrics(shares: "pd.DataFrame", neighbours: Architecture | None) -> "pd.DataFrame":
    import pandas as pd

    table = shares.pivot(index="slide", columns="domain", values="share").loc[list(dict.fromkeys(shares["slide"]))]
    values = table.to_numpy()
    some = np.isfinite(values).all(axis=1)
    most = np.log2(max(values.shape[1], 2))
    return pd.DataFrame(
        {
            "slide": list(table.index),
            "n_cells": shares.groupby("slide", sort=False)["n_cells"].sum().to_numpy(),
            "n_domains": (values > 0).sum(axis=1),
            "entropy": [
                metrics.entropy(row) / most if known else np.nan for row, known in zip(values, some, strict=True)
            ],
            "fide": [
                neighbours.continuity(name) if known and neighbours is not None else np.nan
                for name, known in zip(table.index, some, strict=True)
            ],
        }
    )


def _divergence(shares: "pd.DataFrame") -> float:
    values = shares.dropna().pivot(index="slide", columns="domain", values="share").to_numpy()
    mean = metrics.entropy(values.mean(axis=0))
    return mean - float(np.mean([metrics.entropy(row) for row in values]))
