"""Expression as published models expect it: every gene with mean 0 and deviation 1 on its slide, of variable genes."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from cellquilt.domains.expression import Expression, Panel, Vocabulary, mean_std, panel_of, scaled_to
from cellquilt.domains.slides import SlideCells, Slides

#: Panels with more genes keep the variable ones: so many, or half of them.
_PANEL_WITHOUT_CHOICE, _ENOUGH_VARIABLE = 100, 500
#: Cells of all slides together that genes are chosen by.
_SAMPLE = 100_000


@dataclass(frozen=True)
class GeneChoice:
    """The genes that were chosen of the panel of a cohort.

    Attributes
    ----------
    panel
        Digest of the panel's genes.
    genes
        Those chosen, in lower case.
    """

    panel: str
    genes: frozenset[str]

    @classmethod
    def of(cls, slides: Slides) -> "GeneChoice | None":
        """By the cells of all slides, one slide in memory at a time; None where they have different panels."""
        panel = _panel(slides[0].genes)
        if any(_panel(slide.genes) != panel for slide in slides):
            return None
        return cls(panel, frozenset(_variable(slides)))

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "GeneChoice | None":
        """What the ``config.json`` of a model says that it was trained on, if it does."""
        said = config.get("variable_genes")
        return None if said is None else cls(said["panel"], frozenset(said["genes"]))

    def to_config(self) -> dict[str, Any]:
        """For ``config.json``."""
        return {"variable_genes": {"panel": self.panel, "genes": sorted(self.genes)}}

    def holds_for(self, slide: SlideCells) -> bool:
        """Whether the slide has the panel."""
        return _panel(slide.genes) == self.panel


def _panel(genes: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(sorted(gene.lower() for gene in genes)).encode()).hexdigest()


def with_variable_genes(slides: Slides, known: GeneChoice | None = None) -> Slides:
    """Slides with their genes chosen: all of small panels, the variable ones of large ones.

    Slides of the panel that a model knows have its choice. Else slides of one panel have one choice, made of the cells
    of all of them; others each their own.
    """
    if known is None or not all(map(known.holds_for, slides)):
        known = GeneChoice.of(slides) or known
    return slides.with_used([_used(slide, known) for slide in slides])


def _used(slide: SlideCells, known: GeneChoice | None) -> NDArray[np.bool_]:
    """(n_genes,) bool: chosen before, by a cohort, or by the slide's own cells."""
    if slide.used is not None:
        return slide.used
    chosen = known.genes if known is not None and known.holds_for(slide) else _variable([slide])
    return np.array([gene.lower() in chosen for gene in slide.genes])


def _variable(slides: Sequence[SlideCells]) -> set[str]:
    import anndata
    import pandas as pd
    import scanpy as sc

    genes = [gene.lower() for gene in slides[0].genes]
    if len(genes) <= _PANEL_WITHOUT_CHOICE or slides[0].kind == "protein" or len(set(genes)) < len(genes):
        return set(genes)
    every = max(1, -(-sum(map(len, slides)) // _SAMPLE))
    tables = []
    for slide in slides:
        lower = pd.Index([gene.lower() for gene in slide.genes])
        columns = np.arange(len(lower))
        logs = _plain(slide, Panel(columns, columns)).transformed(slice(None, None, every))
        tables.append(anndata.AnnData(csr_matrix(logs), var=pd.DataFrame(index=lower))[:, genes])
    table = anndata.concat(tables, index_unique="-") if len(tables) > 1 else tables[0].copy()
    found = np.asarray(sc.pp.highly_variable_genes(table, inplace=False)["highly_variable"], dtype=bool)
    half = table.n_vars // 2
    if found.sum() < min(_ENOUGH_VARIABLE, half):
        chosen = sc.pp.highly_variable_genes(table, n_top_genes=half, inplace=False)
        found = np.asarray(chosen["highly_variable"], dtype=bool)
    return set(table.var_names[found])


def _plain(slide: SlideCells, panel: Panel) -> Expression:
    """A slide's expression in its own scale, before means are taken off and deviations divided by."""
    n_genes = panel.columns.size
    nothing, one = np.zeros(n_genes, dtype=np.float32), np.ones(n_genes, dtype=np.float32)
    scale = np.ones(len(slide), dtype=np.float32)
    if slide.kind == "counts":
        total = np.asarray(slide.matrix.sum(axis=1), dtype=np.float64).ravel()
        some = total[total > 0]
        usual = float(np.median(some)) if some.size else 1.0
        scale = scaled_to(total, usual if slide.target is None else slide.target)
    return Expression(slide.matrix, panel, slide.kind, scale, one, nothing, one)


def published_expression(slide: SlideCells, vocabulary: Vocabulary, known: GeneChoice | None = None) -> Expression:
    """One slide's expression.

    Parameters
    ----------
    slide
        With its genes chosen (`with_variable_genes`); else they are those known, or chosen by its own cells.
    vocabulary
        The model's genes.
    known
        The choice of the cohort that a model was trained on, for slides of its panel.

    Raises
    ------
    CellquiltError
        ``genes-twice``, ``genes-unknown``.
    """
    panel = panel_of(slide.genes, vocabulary, _used(slide, known), slide.name)
    raw = _plain(slide, panel)
    if slide.kind == "protein":
        values = slide.matrix.toarray() if hasattr(slide.matrix, "toarray") else np.asarray(slide.matrix)
        middle = np.median(values[:, panel.columns], axis=0)
        raw = replace(raw, divisor=np.maximum(middle, 1e-6).astype(np.float32))
    mean, std = mean_std(raw)
    return replace(raw, mean=mean, std=std)
