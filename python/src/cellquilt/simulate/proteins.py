"""Which proteins cells show: markers of cell types, states of domains, stains that differ between slides."""

from dataclasses import dataclass

import numpy as np

from cellquilt.simulate.cells import TYPE_NAMES
from cellquilt.simulate.parameters import Parameters

_PURPOSE = 20280  # second word of the seeds drawn here
_ON, _OFF = 1500.0, 40.0  # intensity of a protein in cells that have it, and in others
_LEAST_BACKGROUND, _MOST_BACKGROUND = 20.0, 150.0

#: Protein → cell types that have it; none: a state, in some cells of all types.
PROTEINS: dict[str, tuple[str, ...]] = {
    "HepPar1": ("hepatocyte",),
    "ARG1": ("hepatocyte",),
    "CK18": ("hepatocyte", "cholangiocyte"),
    "CK7": ("cholangiocyte",),
    "CK19": ("cholangiocyte",),
    "EpCAM": ("cholangiocyte",),
    "aSMA": ("stellate",),
    "Vimentin": ("stellate", "endothelial", "kupffer"),
    "PDGFRB": ("stellate",),
    "CD31": ("endothelial",),
    "CD34": ("endothelial",),
    "LYVE1": ("endothelial",),
    "CD68": ("kupffer",),
    "CD163": ("kupffer",),
    "MARCO": ("kupffer",),
    "CD3": ("t_cell",),
    "CD4": ("t_cell", "kupffer"),
    "CD8": ("t_cell",),
    "PD-1": ("t_cell",),
    "CD20": ("b_cell",),
    "CD79a": ("b_cell",),
    "MPO": ("neutrophil",),
    "CD66b": ("neutrophil",),
    "CD15": ("neutrophil",),
    "CD45": ("t_cell", "b_cell", "neutrophil", "kupffer"),
    "HLA-DR": ("b_cell", "kupffer"),
    "E-cadherin": ("hepatocyte", "cholangiocyte"),
    "Ki67": (),
    "PD-L1": (),
    "b-catenin": ("hepatocyte", "cholangiocyte", "endothelial"),
}


@dataclass(frozen=True)
class Stains:
    """Proteins on one slide, in the camera's units.

    Attributes
    ----------
    levels
        (n_domains, n_types, n_proteins) float64 mean signal of a cell.
    gain, background
        (n_proteins,) float64: what signal and background are multiplied by, and what is added to every cell's signal.
    """

    levels: np.ndarray
    gain: np.ndarray
    background: np.ndarray


def stains(parameters: Parameters, slide: int, batch_effect: float) -> Stains:
    """Proteins on slide number `slide`; `batch_effect` as in `expression.expression`."""
    rng = np.random.default_rng([parameters.seed, _PURPOSE])
    n = len(PROTEINS)
    has = np.array([[name in types for types in PROTEINS.values()] for name in TYPE_NAMES])
    spread = np.exp(0.4 * parameters.cell_type_contrast * rng.standard_normal((len(TYPE_NAMES), n)))
    levels = np.where(has, _ON * parameters.contrast, _OFF) * spread
    levels[:, [not types for types in PROTEINS.values()]] = 4 * _OFF
    state = np.where(rng.random(n) < 0.3, rng.integers(0, parameters.n_domains, n), -1)
    domain_factor = np.ones((parameters.n_domains, n))
    changed = np.flatnonzero(state >= 0)
    domain_factor[state[changed], changed] = np.exp(
        parameters.cell_type_contrast * parameters.domain_contrast * np.log(2.5)
    )
    background = parameters.background * np.exp(rng.uniform(np.log(_LEAST_BACKGROUND), np.log(_MOST_BACKGROUND), n))
    gain = np.ones(n)
    if slide > 0 and batch_effect > 0:
        batch = np.random.default_rng([parameters.seed, _PURPOSE, slide])
        gain = np.exp(batch_effect * (batch.standard_normal(n) + 0.5 * batch.standard_normal()))
        background = background * np.exp(batch_effect * batch.standard_normal(n))
    return Stains(levels[None] * domain_factor[:, None], gain, background)
