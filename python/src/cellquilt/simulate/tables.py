"""Cell tables of simulated slides, made from the truth alone: no image, no transcripts, no segmentation."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from cellquilt.core.errors import CellquiltError, did_you_mean
from cellquilt.simulate.cells import TYPE_NAMES, Cells, cells_in
from cellquilt.simulate.expression import in_panel
from cellquilt.simulate.parameters import Parameters, make_parameters
from cellquilt.simulate.proteins import PROTEINS, stains
from cellquilt.simulate.slide import Slide
from cellquilt.simulate.tissue import NICHE_SHARE

if TYPE_CHECKING:
    from anndata import AnnData
    from scipy.sparse import csr_matrix

KINDS = ("counts", "protein")

_PURPOSE = 20300  # second word of the seeds drawn here
_CELLS_AT_ONCE = 8192
_CELL_UM2 = 190.0  # canvas that a cell takes on a default slide, rather too much
_THIN = 0.5  # share of a thin layer over that of others
# Share of its free outline that pressing neighbours leave to a cell: measured on label images of 435 µm, with the
# default overlap of 0 and the 0.6 of `hard`.
_AREA_LEFT, _AREA_LEFT_BY_OVERLAP = 0.87, -0.37
_NEIGHBOURS = 6
_TOUCH_UM = 25.0  # cells farther apart share no border
_SPILL = 0.1  # share of a cell's stain that is measured in its neighbours
_CELL_SPREAD, _STAIN_SPREAD, _READ_NOISE = 0.2, 0.4, 15.0


def cell_tables(
    slides: int = 1,
    n_cells: int = 1500,
    *,
    n_domains: int = 8,
    thin_layers: int = 1,
    rare_niches: int = 1,
    kind: Literal["counts", "protein"] = "counts",
    preset: str = "default",
    seed: int = 0,
    n_genes: int | None = None,
    panels: int = 1,
    panel_overlap: float = 0.7,
    batch_effect: float = 0.25,
    dispersion: float = 0.1,
    conditions: Sequence[str] = ("control",),
    condition_niche: bool = False,
    absent: Mapping[int, Sequence[int]] | None = None,
    name: str = "slide",
    **parameters: Any,
) -> "list[AnnData]":
    """Cell tables whose cell types and domains are known.

    A domain is a mixture of cell types and a programme of some genes; its cells are of all types.

    Parameters
    ----------
    slides
        Number of slides. They share cell types, domains and genes; each has its own tissue.
    n_cells
        Cells of each slide, exactly.
    n_domains
        Domains, up to 8: layers that follow each other (``domain_0`` beside ``domain_1``, …), then rare niches.
    thin_layers
        How many layers have half of the share of others; they are two or three cells wide.
    rare_niches
        How many of the domains, the last ones, are islands of 4 % of the slide each.
    kind
        ``counts``: molecules of genes, CSR. ``protein``: intensities of 30 proteins, dense.
    preset
        ``default``, ``easy`` or ``hard`` (`parameters.PRESETS`).
    seed
        The same seed and arguments give the same tables.
    n_genes
        Genes of all panels together; by default the calibrated 259. Proteins: at most 30.
    panels, panel_overlap
        Number of panels, dealt to the slides in turn, and the share of genes that all have.
    batch_effect
        Standard deviation of the log of a slide's factor on a gene, or of the gain of a stain; the first slide has
        none.
    dispersion
        Variance of counts over their mean, less 1, for each expected molecule: 0 is Poisson.
    conditions
        Condition of each slide; fewer than slides are dealt out, all panels of one after the other.
    condition_niche
        Whether the last domain is found only in slides of the last condition.
    absent
        Slide number → domain numbers that it lacks.
    name
        Slides are called ``<name>_0``, ``<name>_1``, …
    **parameters
        Anything of `parameters.Parameters` but the canvas, such as ``density_factor``. Here ``domain_um`` is 300,
        ``niche_um`` 80 and ``domain_contrast`` 1.5 (``hard``: 1) unless given.

    Returns
    -------
    list of anndata.AnnData
        One a slide. ``obs``: ``sample``, ``condition``, ``panel``, ``cell_type``, ``domain_true`` (all categorical)
        and ``area_um2``; ``obsm["spatial"]`` (n_cells, 2) float64 in µm; X float32; ``var_names`` the genes of the
        slide's panel.

    Raises
    ------
    CellquiltError
        ``simulate-preset``, ``simulate-parameter`` or ``simulate-value``.

    Examples
    --------
    >>> tables = cell_tables(slides=2, n_cells=300, panels=2, panel_overlap=0.5)
    >>> [table.shape for table in tables]
    [(300, 195), (300, 194)]
    """
    absent = {} if absent is None else dict(absent)
    _check(slides, n_cells, panels, n_domains, thin_layers, rare_niches, kind, n_genes, conditions, absent)
    contrast = 1.0 if preset == "hard" else 1.5
    usual = {"domain_um": 300.0, "niche_um": 80.0, "domain_contrast": contrast, **parameters}
    made = make_parameters(
        preset, width_px=1024, seed=seed, n_genes=None if kind == "protein" else n_genes, n_domains=n_domains,
        n_niches=rare_niches, **usual,
    )  # fmt: skip
    shares = _shares(n_domains, thin_layers, rare_niches) if made.domain_shares is None else made.domain_shares
    tables = []
    for number in range(slides):
        condition = conditions[number if len(conditions) == slides else number // panels % len(conditions)]
        without = set(absent.get(number, ()))
        if condition_niche and condition != conditions[-1]:
            without.add(n_domains - 1)
        here = tuple(0.0 if domain in without else share for domain, share in enumerate(shares))
        own = dataclasses.replace(made, domain_shares=here)
        slide, cells, kept = _cells(own, number, n_cells, panels, panel_overlap, batch_effect)
        rng = np.random.default_rng([seed, _PURPOSE, number])
        if kind == "counts":
            names, matrix = _counts(slide, cells, kept, dispersion, rng)
        else:
            chosen = in_panel(seed, n_genes or len(PROTEINS), number, panels, panel_overlap)
            names, matrix = _intensities(slide, cells, kept, chosen, batch_effect, rng)
        columns = {"sample": f"{name}_{number}", "condition": condition, "panel": f"panel_{number % panels}"}
        tables.append(_table(cells, kept, names, matrix, columns, n_domains, _area(slide.parameters, cells)[kept]))
    return tables


def _shares(n_domains: int, thin_layers: int, rare_niches: int) -> tuple[float, ...]:
    n_layers = n_domains - rare_niches
    layers = np.ones(n_layers)
    layers[(np.arange(0.5, thin_layers) * n_layers / max(thin_layers, 1)).astype(int)] = _THIN
    return (*(layers / layers.sum()).tolist(), *[NICHE_SHARE] * rare_niches)


def _cells(
    parameters: Parameters, number: int, n_cells: int, panels: int, panel_overlap: float, batch_effect: float
) -> tuple[Slide, Cells, np.ndarray]:
    """A slide large enough, its cells, and (n_cells,) int64 which of them are kept: a square in its middle."""
    packed = _CELL_UM2 * (1 - 0.7 * parameters.overlap) * parameters.size**2 / max(parameters.density, 0.01)
    width = math.sqrt(n_cells * packed / max(parameters.tissue_fraction, 0.05))
    while True:
        width_px = math.ceil(width / parameters.pixel_size_um)
        sized = dataclasses.replace(parameters, width_px=width_px, height_px=width_px)
        slide = Slide(sized, number, panels=panels, panel_overlap=panel_overlap, batch_effect=batch_effect)
        cells = cells_in(sized, slide.seed, slide.tissue, 0.0, 0.0, width, width)
        if len(cells) >= n_cells:
            from_middle = np.abs(cells.xy - width / 2).max(axis=1)
            return slide, cells, np.sort(np.argsort(from_middle, kind="stable")[:n_cells])
        width *= 1.02 * min(math.sqrt(n_cells / max(len(cells), 1)), 2.0)


def _area(parameters: Parameters, cells: Cells) -> np.ndarray:
    free = np.pi * (cells.outline.astype(np.float64) ** 2).mean(axis=1)
    return free * (_AREA_LEFT + _AREA_LEFT_BY_OVERLAP * parameters.overlap)


def _mixture(cells: Cells, amount: np.ndarray, leaving: np.ndarray, n_domains: int) -> "csr_matrix":
    """What is found in each cell, by the domain and type of the cells that it comes from.

    Parameters
    ----------
    amount
        (n,) how much each cell makes.
    leaving
        (n,) share of it that ends in cells that touch it, or gets lost where none does.

    Returns
    -------
    scipy.sparse.csr_matrix
        (n, n_domains × n_types).
    """
    from scipy.sparse import csr_matrix, identity
    from scipy.spatial import cKDTree

    n = len(cells)
    source = cells.domain.astype(np.int64) * len(TYPE_NAMES) + cells.kind
    made = csr_matrix((amount, (np.arange(n), source)), shape=(n, n_domains * len(TYPE_NAMES)))
    k = min(_NEIGHBOURS, n - 1)
    if k < 1:
        return made
    distance, near = cKDTree(cells.xy).query(cells.xy, k + 1)
    distance, near = distance[:, 1:], near[:, 1:]
    touching = (distance < _TOUCH_UM).ravel()
    share = np.repeat(leaving / k, k)[touching]
    giver = np.repeat(np.arange(n), k)[touching]
    moved = csr_matrix((share, (near.ravel()[touching], giver)), shape=(n, n))
    return ((moved + identity(n, format="csr").multiply(1 - leaving)) @ made).tocsr()


def _counts(
    slide: Slide, cells: Cells, kept: np.ndarray, dispersion: float, rng: np.random.Generator
) -> tuple[list[str], Any]:
    from scipy.sparse import csr_matrix, vstack

    parameters, numbers, rates = slide.parameters, slide.calibration, slide.expression.rates
    chosen = np.flatnonzero(rates.sum(axis=(0, 1)) > 0)
    area = _area(parameters, cells)
    nucleus = np.pi * (cells.nucleus_outline.astype(np.float64) ** 2).mean(axis=1) * (cells.nucleus == 1)
    amount = numbers.rate_um2 * cells.richness * (area + np.minimum(nucleus, area) * (numbers.enrichment - 1))
    amount *= parameters.density_factor * (1 - parameters.ambient)
    # Of molecules spread evenly over a disc, so many pass its border when each takes a normal step.
    passing = np.sqrt(2 / np.pi) * parameters.diffusion_um / np.sqrt(area / np.pi)
    leaving = parameters.diffusion * np.minimum(passing, 1.0)
    mixture = _mixture(cells, amount, leaving, parameters.n_domains)[kept]
    profile = rates[..., chosen].reshape(-1, len(chosen))
    ambient = parameters.ambient * numbers.density_um2 * parameters.density_factor * slide.expression.ambient[chosen]
    parts = []
    for start in range(0, len(kept), _CELLS_AT_ONCE):
        rows = slice(start, start + _CELLS_AT_ONCE)
        mean = mixture[rows] @ profile + area[kept][rows, None] * ambient
        if dispersion > 0:
            mean *= rng.gamma(1 / dispersion, dispersion, mean.shape)
        parts.append(csr_matrix(rng.poisson(mean).astype(np.float32)))
    return [slide.expression.genes[k] for k in chosen.tolist()], vstack(parts, format="csr")


def _intensities(
    slide: Slide, cells: Cells, kept: np.ndarray, chosen: np.ndarray, batch_effect: float, rng: np.random.Generator
) -> tuple[list[str], np.ndarray]:
    parameters = slide.parameters
    made = stains(parameters, slide.number, batch_effect)
    genes = np.flatnonzero(chosen)
    leaving = np.full(len(cells), _SPILL * (1 + 2 * parameters.overlap))
    brightness = np.exp(_CELL_SPREAD * rng.standard_normal(len(cells)))
    mixture = _mixture(cells, np.where(cells.necrotic, 0.3, 1.0) * brightness, leaving, parameters.n_domains)[kept]
    profile = made.levels[..., genes].reshape(-1, len(genes))
    parts = []
    for start in range(0, len(kept), _CELLS_AT_ONCE):
        signal = mixture[start : start + _CELLS_AT_ONCE] @ profile
        signal *= np.exp(_STAIN_SPREAD * rng.standard_normal(signal.shape))
        signal += made.background[genes] * np.exp(0.2 * rng.standard_normal(signal.shape))
        signal += _READ_NOISE * parameters.noise * rng.standard_normal(signal.shape)
        parts.append(np.maximum(made.gain[genes] * signal, 0).astype(np.float32))
    names = list(PROTEINS)
    return [names[k] for k in genes.tolist()], np.concatenate(parts)


def _table(
    cells: Cells, kept: np.ndarray, genes: list[str], matrix: Any, columns: dict[str, str], n_domains: int,
    area_um2: np.ndarray,
) -> "AnnData":  # fmt: skip
    import anndata
    import pandas as pd

    domains = [f"domain_{k}" for k in range(n_domains)]
    obs = pd.DataFrame(
        {
            **{key: pd.Categorical.from_codes(np.zeros(len(kept), np.int8), [value]) for key, value in columns.items()},
            "cell_type": pd.Categorical.from_codes(cells.kind[kept], TYPE_NAMES),
            "domain_true": pd.Categorical.from_codes(cells.domain[kept], domains),
            "area_um2": area_um2,
        },
        index=[f"{columns['sample']}-{k}" for k in cells.ids[kept].tolist()],
    )
    return anndata.AnnData(matrix, obs=obs, var=pd.DataFrame(index=genes), obsm={"spatial": cells.xy[kept]})


def _check(
    slides: int, n_cells: int, panels: int, n_domains: int, thin_layers: int, rare_niches: int, kind: str,
    n_genes: int | None, conditions: Sequence[str], absent: Mapping[int, Sequence[int]],
) -> None:  # fmt: skip
    if kind not in KINDS:
        raise CellquiltError("simulate-value", f'kind is "{kind}"', did_you_mean(kind, KINDS))
    wrong = ""
    for what, value in (("slides", slides), ("n_cells", n_cells), ("panels", panels)):
        if value < 1:
            wrong = f"{what} is {value}; expected at least 1"
    if not 0 <= rare_niches < n_domains:
        wrong = f"rare_niches is {rare_niches}; expected 0 to {n_domains - 1}, as one domain lies around them"
    elif not 0 <= thin_layers < n_domains - rare_niches:
        wrong = f"thin_layers is {thin_layers}; expected 0 to {n_domains - rare_niches - 1}, as one is not thin"
    if kind == "protein" and n_genes is not None and not 1 <= n_genes <= len(PROTEINS):
        wrong = f"n_genes is {n_genes}; expected 1 to {len(PROTEINS)} proteins"
    if isinstance(conditions, str) or not conditions:
        wrong = f"conditions is {conditions!r}; expected a list of names"
    for number, domains in absent.items():
        if not 0 <= number < slides or not all(0 <= domain < n_domains for domain in domains):
            wrong = f"absent has {number}: {domains}; expected slides 0 to {slides - 1}, domains 0 to {n_domains - 1}"
        elif set(range(n_domains - rare_niches)) <= set(domains):
            wrong = f"absent leaves slide {number} without a layer"
    if wrong:
        raise CellquiltError("simulate-value", wrong)
