"""Scores of gene sets in domains."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cellquilt.core.errors import CellquiltError, did_you_mean_file
from cellquilt.core.log import LOG
from cellquilt.domains.analysis.expression import measured, membership
from cellquilt.spatial.slides import Slide, slides

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

#: Genes of a set that all panels must have.
MIN_GENES = 3
#: Molecules of shared genes that cells are scaled to before logarithms are taken.
_TARGET = 100.0


@dataclass(frozen=True)
class Pathways:
    """Scores of gene sets.

    Attributes
    ----------
    scores
        A row for every slide, domain that it has, and set: ``slide``, ``domain``, ``pathway``, ``n_cells``, ``score``.
    sets
        A row for every set, those that are too small too: ``pathway``, ``n_genes`` (in the set), ``n_used`` (in all
        panels), ``genes`` (these, by commas), ``scored``.
    """

    scores: "pd.DataFrame"
    sets: "pd.DataFrame"

    def by_domain(self) -> "pd.DataFrame":
        """Domains × scored sets: mean over slides of the score less the slide's mean, so that batches do not count."""
        found = self.scores.copy()
        weighted = found["score"] * found["n_cells"]
        groups = [found["slide"], found["pathway"]]
        mean = weighted.groupby(groups).transform("sum") / found["n_cells"].groupby(groups).transform("sum")
        found["score"] -= mean
        table = found.groupby(["domain", "pathway"], sort=False)["score"].mean().unstack()
        return table.loc[list(dict.fromkeys(found["domain"])), list(dict.fromkeys(found["pathway"]))]


def read_gene_sets(path: Path | str) -> dict[str, list[str]]:
    """Read gene sets.

    Parameters
    ----------
    path
        ``.gmt`` (name, description, genes, by tabs) or ``.json``: name → genes, or name → ``{"geneSymbols": genes}`` as
        MSigDB has them.

    Raises
    ------
    CellquiltError
        ``gene-sets-missing``, ``gene-sets-invalid``.
    """
    path = Path(path)
    if not path.is_file():
        raise CellquiltError("gene-sets-missing", f"there is no file {path}", did_you_mean_file(path))
    kind = path.suffix.lower()
    if kind not in (".gmt", ".json"):
        raise CellquiltError("gene-sets-invalid", f"{path}: gene sets are read from .gmt and .json files")
    try:
        text = path.read_text(encoding="utf-8")
        return _from_gmt(text, path) if kind == ".gmt" else _from_json(json.loads(text), path)
    except ValueError as error:
        raise CellquiltError("gene-sets-invalid", f"{path}: {error}", "is the file whole?") from None


def _from_gmt(text: str, path: Path) -> dict[str, list[str]]:
    sets: dict[str, list[str]] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        name, *rest = line.split("\t")
        if len(rest) < 2:
            raise CellquiltError(
                "gene-sets-invalid", f"{path}, line {number}: name, description and genes were expected, by tabs"
            )
        if name in sets:
            raise CellquiltError("gene-sets-invalid", f'{path}, line {number}: a second set "{name}"')
        sets[name] = [gene.strip() for gene in rest[1:] if gene.strip()]
    return _some(sets, path)


def _from_json(data: Any, path: Path) -> dict[str, list[str]]:
    sets = {}
    for name, value in data.items() if isinstance(data, dict) else ():
        genes = value.get("geneSymbols") if isinstance(value, dict) else value
        if not isinstance(genes, list) or not all(isinstance(gene, str) for gene in genes):
            raise CellquiltError(
                "gene-sets-invalid", f'{path}: "{name}" has no list of genes', 'write {"set": ["gene", …]}'
            )
        sets[str(name)] = genes
    return _some(sets, path)


def _some(sets: dict[str, list[str]], path: Path) -> dict[str, list[str]]:
    if not sets:
        raise CellquiltError("gene-sets-invalid", f"{path} holds no gene set", 'write {"set": ["gene", …]}')
    return sets


def pathway_scores(
    adatas: "AnnData | Sequence[AnnData]",
    gene_sets: Mapping[str, Sequence[str]] | Path | str,
    domain_key: str = "domain",
    slide_key: str | None = None,
    *,
    min_genes: int = MIN_GENES,
    layer: str | None = None,
    kind: str | None = None,
    key_added: str | None = None,
) -> Pathways:
    """Score gene sets in every domain of every slide.

    A cell's score is the mean over the set's genes of log1p expression, less the gene's mean over all cells of the
    cohort, over its standard deviation. Only genes of all panels are used, and cells are scaled to the total of these:
    what else a panel measures changes nothing.

    Parameters
    ----------
    adatas
        Tables with domains, and counts, logarithms or intensities in X.
    gene_sets
        Name → genes, or a file of `read_gene_sets`. Case does not matter.
    domain_key
        Column of `obs` with the domains; cells without one are left out.
    slide_key
        Column that names the slides; None: each table is one.
    min_genes
        Sets with fewer genes that all panels have are not scored, and named.
    layer
        Layer to take instead of X.
    kind
        What it holds: ``counts``, ``log1p`` or ``protein``; None: by its values.
    key_added
        Name in `obsm` for the scores of all cells, (n_cells, n_scored) float32 with the sets' names as columns; None
        keeps them nowhere.

    Raises
    ------
    CellquiltError
        ``gene-sets-no-overlap`` if no set has enough genes, ``gene-sets-invalid``, and what `gene_statistics` raises.
    """
    import pandas as pd

    sets = read_gene_sets(gene_sets) if isinstance(gene_sets, str | Path) else dict(gene_sets)
    shared = _shared_genes(adatas, domain_key, slide_key)
    members = {name: sorted({gene.lower() for gene in genes} & set(shared)) for name, genes in sets.items()}
    scored = [name for name, genes in members.items() if len(genes) >= min_genes]
    small = [name for name in members if name not in scored]
    if not scored:
        raise CellquiltError(
            "gene-sets-no-overlap",
            f"none of {len(sets)} gene sets has {min_genes} of the {len(shared)} genes that all panels share",
            "use gene symbols of the tables' species, or a smaller min_genes",
        )
    if small:
        LOG.warning("gene sets with fewer than %d genes in all panels: %s", min_genes, ", ".join(small))
    used = sorted({gene for name in scored for gene in members[name]})
    column = {gene: k for k, gene in enumerate(used)}
    weights = np.zeros((len(used), len(scored)))
    for k, name in enumerate(scored):
        weights[[column[gene] for gene in members[name]], k] = 1 / len(members[name])
    # The score is linear in the logarithms: domains' sums suffice for their means.
    found = []
    total, square, n_cells = np.zeros(len(used)), np.zeros(len(used)), 0
    for slide in slides(adatas, domain_key, slide_key):
        logs, codes = _logs(slide, (layer, kind), shared, used)
        if codes.size:
            n = np.bincount(codes, minlength=len(slide.domains))
            sums = (membership(codes, n.size) @ logs).toarray()
            squares = logs.copy()
            squares.data **= 2
            total += sums.sum(axis=0)
            square += np.asarray(squares.sum(axis=0)).ravel()
            n_cells += codes.size
            found.append((slide.name, slide.domains, n, sums))
    mean = total / n_cells
    spread = np.sqrt(np.maximum(square / n_cells - mean**2, 0))
    weights *= np.divide(1, spread, out=np.zeros_like(spread), where=spread > 1e-9)[:, None]
    if key_added is not None:
        _add_to_cells(
            adatas, domain_key, slide_key, (layer, kind), (shared, used), (weights, mean @ weights, scored), key_added
        )
    parts = [
        pd.DataFrame(
            {
                "slide": name,
                "domain": np.repeat(domains, len(scored)),
                "pathway": np.tile(scored, len(domains)),
                "n_cells": np.repeat(n, len(scored)),
                "score": ((sums / n[:, None] - mean) @ weights).ravel(),
            }
        )
        for name, domains, n, sums in found
    ]
    about = pd.DataFrame(
        {
            "pathway": list(sets),
            "n_genes": [len(set(map(str.lower, genes))) for genes in sets.values()],
            "n_used": [len(members[name]) for name in sets],
            "genes": [", ".join(shared[gene] for gene in members[name]) for name in sets],
            "scored": [name in scored for name in sets],
        }
    )
    return Pathways(pd.concat(parts, ignore_index=True), about)


def _shared_genes(adatas: "AnnData | Sequence[AnnData]", domain_key: str, slide_key: str | None) -> dict[str, str]:
    """Genes that all panels have: lower case → as the first table spells them."""
    shared: dict[str, str] | None = None
    for slide in slides(adatas, domain_key, slide_key):
        own = {str(gene).lower(): str(gene) for gene in slide.table.var_names}
        if len(own) < slide.table.n_vars:
            raise CellquiltError(
                "genes-twice", f"{slide.name}: two genes have one name but for case", "make the names unique"
            )
        shared = own if shared is None else {gene: name for gene, name in shared.items() if gene in own}
    return dict(sorted((shared or {}).items()))


def _logs(
    slide: Slide, source: tuple[str | None, str | None], shared: Mapping[str, str], used: Sequence[str]
) -> tuple[Any, NDArray]:
    """(n, n_used) CSR logarithms of the cells that have a domain, scaled to one total of the shared genes; domains."""
    own = measured(slide, *source)
    place = {gene.lower(): k for k, gene in enumerate(own.genes)}
    order = {gene: k for k, gene in enumerate(shared)}
    logs = own.logarithms_to(np.array([place[gene] for gene in shared]), _TARGET)
    return logs[:, [order[gene] for gene in used]], own.codes


def _add_to_cells(
    adatas: "AnnData | Sequence[AnnData]",
    domain_key: str,
    slide_key: str | None,
    source: tuple[str | None, str | None],
    genes: tuple[Mapping[str, str], Sequence[str]],
    model: tuple[NDArray[np.float64], NDArray[np.float64], list[str]],
    key: str,
) -> None:
    import pandas as pd

    weights, offset, names = model
    for slide in slides(adatas, domain_key, slide_key):
        logs, _ = _logs(slide, source, *genes)
        table = slide.table
        known: Any = table.obsm.get(key)
        values = np.full((table.n_obs, len(names)), np.nan, np.float32) if known is None else known.to_numpy(copy=True)
        values[slide.rows[slide.codes >= 0]] = logs @ weights - offset
        table.obsm[key] = pd.DataFrame(values, index=table.obs_names, columns=names)
