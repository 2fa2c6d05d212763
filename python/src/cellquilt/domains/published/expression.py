"""Expression as published models expect it: every gene with mean 0 and deviation 1 on its slide, of variable genes."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from cellquilt.domains.expression import Expression, Vocabulary, mean_std, panel_of
from cellquilt.domains.slides import SlideCells, Slides

#: Panels with more genes keep the variable ones: so many, or half of them.
_PANEL_WITHOUT_CHOICE, _ENOUGH_VARIABLE = 100, 500
#: Cells of all slides together that genes are chosen by.
_SAMPLE = 100_000


def with_variable_genes(slides: Slides) -> Slides:
    """Slides with their genes chosen: all of small panels, the variable ones of large ones.

    Tables in memory that have one panel have one choice, made of the cells of all of them; others each their own.
    """
    if slides.in_memory:
        loaded = list(slides)
        panels = [tuple(sorted(gene.lower() for gene in slide.genes)) for slide in loaded]
        if all(panel == panels[0] for panel in panels[1:]):
            chosen = _variable(loaded)
            return slides.with_used([_in(slide, chosen) for slide in loaded])
    return slides.with_used([_in(slide, _variable([slide])) for slide in slides])


def _in(slide: SlideCells, chosen: set[str]) -> NDArray[np.bool_]:
    if slide.used is not None:
        return slide.used
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
        logs = _logs(slide)
        tables.append(anndata.AnnData(logs[::every], var=pd.DataFrame(index=lower))[:, genes])
    table = anndata.concat(tables, index_unique="-") if len(tables) > 1 else tables[0].copy()
    found = np.asarray(sc.pp.highly_variable_genes(table, inplace=False)["highly_variable"], dtype=bool)
    half = table.n_vars // 2
    if found.sum() < min(_ENOUGH_VARIABLE, half):
        chosen = sc.pp.highly_variable_genes(table, n_top_genes=half, inplace=False)
        found = np.asarray(chosen["highly_variable"], dtype=bool)
    return set(table.var_names[found])


def _logs(slide: SlideCells) -> Any:
    """(n_cells, n_columns) CSR of logarithms."""
    part = csr_matrix(slide.matrix).astype(np.float32)
    if slide.kind == "counts":
        part.data = np.log1p(part.data * np.repeat(_scale(slide), np.diff(part.indptr)))
    return part


def _scale(slide: SlideCells) -> NDArray[np.float32]:
    total = np.asarray(slide.matrix.sum(axis=1), dtype=np.float64).ravel()
    some = total > 0
    target = slide.target if slide.target is not None else float(np.median(total[some])) if some.any() else 1.0
    return np.where(some, target / np.where(some, total, 1), 1.0).astype(np.float32)


def published_expression(slide: SlideCells, vocabulary: Vocabulary) -> Expression:
    """One slide's expression.

    Parameters
    ----------
    slide
        With its genes chosen (`with_variable_genes`); else they are chosen by its own cells.
    vocabulary
        The model's genes.

    Raises
    ------
    CellquiltError
        ``genes-twice``, ``genes-unknown``.
    """
    used = slide.used if slide.used is not None else _in(slide, _variable([slide]))
    panel = panel_of(slide.genes, vocabulary, used, slide.name)
    n_genes = panel.columns.size
    divisor = np.ones(n_genes, dtype=np.float32)
    scale = _scale(slide) if slide.kind == "counts" else np.ones(len(slide), dtype=np.float32)
    if slide.kind == "protein":
        values = slide.matrix.toarray() if hasattr(slide.matrix, "toarray") else np.asarray(slide.matrix)
        divisor = np.maximum(np.median(values[:, panel.columns], axis=0), 1e-6).astype(np.float32)
    nothing, one = np.zeros(n_genes, dtype=np.float32), np.ones(n_genes, dtype=np.float32)
    raw = Expression(slide.matrix, panel, slide.kind, scale, divisor, nothing, one)
    mean, std = mean_std(raw)
    return replace(raw, mean=mean, std=std)
