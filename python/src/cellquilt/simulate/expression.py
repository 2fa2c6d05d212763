"""Which genes cells express: calibrated means, markers of cell types, programmes of domains, effects of batches."""

from dataclasses import dataclass

import numpy as np

from cellquilt.simulate.calibration import Calibration
from cellquilt.simulate.cells import CELL_TYPES, composition
from cellquilt.simulate.parameters import Parameters

_HOUSEKEEPING = 36  # the most abundant genes hardly differ between cell types: panels hold few of them as markers
_PURPOSE = 20260  # second word of the seeds drawn here


@dataclass(frozen=True)
class Expression:
    """Expression on one slide.

    Attributes
    ----------
    genes
        Names of all rows of the panel: genes, then controls.
    n_controls
        How many of them, at the end, are controls.
    rates
        (n_domains, n_types, n_genes) float64: transcripts of a gene relative to the mean density of all genes; genes
        absent from the slide's panel are 0.
    ambient
        (n_genes,) float64: the same for transcripts outside cells.
    """

    genes: list[str]
    n_controls: int
    rates: np.ndarray
    ambient: np.ndarray


def gene_names(calibration: Calibration, n_genes: int | None) -> tuple[list[str], np.ndarray]:
    """Names and shares (float64, sum 1) of a panel with `n_genes` genes, most abundant first.

    A smaller panel takes every k-th gene in the order of abundance; a larger one repeats the shares under new names.
    """
    known = len(calibration.genes)
    n = known if n_genes is None else n_genes
    if n <= known:
        rows = np.floor(np.arange(n) * known / n).astype(int)
        names = [calibration.genes[row] for row in rows]
    else:
        rows = np.arange(n) % known
        names = [calibration.genes[k] if k < known else f"Gene{k + 1:05d}" for k in range(n)]
    shares = calibration.gene_shares[rows]
    order = np.argsort(-shares, kind="stable")
    return [names[k] for k in order], shares[order] / shares.sum()


def in_panel(seed: int, n_genes: int, slide: int, panels: int, panel_overlap: float) -> np.ndarray:
    """Which genes the panel of a slide has: (n_genes,) bool."""
    dealt = np.random.default_rng([seed, _PURPOSE + 1]).permutation(n_genes)
    n_shared = round(panel_overlap * n_genes) if panels > 1 else n_genes
    panel_of = np.full(n_genes, -1)
    panel_of[dealt[n_shared:]] = np.arange(n_genes - n_shared) % panels
    return (panel_of == -1) | (panel_of == slide % panels)


def expression(
    parameters: Parameters, calibration: Calibration, slide: int, panels: int, panel_overlap: float, batch_effect: float
) -> Expression:
    """Expression on slide number `slide` (from 0) of a cohort.

    Parameters
    ----------
    panels
        Number of gene panels; slide k has panel k mod `panels`.
    panel_overlap
        Share of genes that all panels have; the rest is dealt out among them.
    batch_effect
        Standard deviation of the log of a slide's factor on each gene; the first slide is the reference and has none.

    Notes
    -----
    Rates are scaled so that with the areas that the types fill in a default slide the mean of every gene is the
    calibrated one, whatever the contrast between types.
    """
    names, shares = gene_names(calibration, parameters.n_genes)
    n, n_types, n_domains = len(names), len(CELL_TYPES), parameters.n_domains
    rng = np.random.default_rng([parameters.seed, _PURPOSE])
    contrast = parameters.cell_type_contrast
    log_factor = contrast * 0.4 * rng.standard_normal((n_types, n))
    log_factor[:, :_HOUSEKEEPING] *= 0.5
    marker_of = np.where(rng.random(n) < 0.6, rng.integers(0, n_types, n), -1)
    marker_of[:_HOUSEKEEPING] = -1
    markers = np.flatnonzero(marker_of >= 0)
    log_factor[:, markers] -= contrast * np.log(4.0)
    log_factor[marker_of[markers], markers] += contrast * np.log(32.0)
    programme = np.where(rng.random(n) < 0.15, rng.integers(0, n_domains, n), -1)
    programme[:_HOUSEKEEPING] = -1
    domain_factor = np.ones((n_domains, n))
    changed = np.flatnonzero(programme >= 0)
    domain_factor[programme[changed], changed] = np.exp(contrast * parameters.domain_contrast * np.log(3.0))
    factors = np.exp(log_factor)[None] * domain_factor[:, None]
    weights = composition(n_domains, parameters.domain_contrast)
    if n_domains == len(calibration.area_shares) and parameters.domain_contrast == 1:
        weights = calibration.area_shares
    weights = weights / weights.sum()
    rates = shares * factors / np.einsum("dt,dtg->g", weights, factors)
    if slide > 0 and batch_effect > 0:
        batch = np.random.default_rng([parameters.seed, _PURPOSE, slide])
        rates = rates * np.exp(batch_effect * (batch.standard_normal(n) + 0.5 * batch.standard_normal()))
    rates = rates * in_panel(parameters.seed, n, slide, panels, panel_overlap)
    ambient = np.einsum("dt,dtg->g", weights, rates)
    return Expression(names + list(calibration.controls), len(calibration.controls), rates, ambient)
