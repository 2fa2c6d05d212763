"""Latents of slides brought together, domain by domain."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from cellquilt.core.errors import CellquiltError
from cellquilt.core.log import LOG
from cellquilt.domains.model import DOMAIN, LATENT
from cellquilt.spatial.slides import require_column
from cellquilt.spatial.tables import tables_of

if TYPE_CHECKING:
    from anndata import AnnData

CORRECTED = "niche_latent_corrected"
#: Cells of a domain that a slide must have before its shift is believed by half.
_BELIEF = 30.0


def batch_effect_correction(
    adata: "AnnData | Sequence[AnnData]",
    batch_key: str,
    *,
    domain_key: str = DOMAIN,
    condition_key: str | None = None,
    key_added: str = CORRECTED,
) -> None:
    """Move the cells of each domain in each batch to where the domain is in all batches.

    A domain's shift in a batch is that of its mean, and the less the fewer cells say so; a domain that one batch has
    alone stays where it is. Cells keep their places among those of their domain and batch.

    Parameters
    ----------
    adata
        Tables with latents and domains. They get ``obsm[key_added]``.
    batch_key
        Column of `obs`: slides, runs or panels.
    domain_key
        Column of the domains.
    condition_key
        Column of what is compared: batches are brought together within each condition only, so that a difference
        between conditions stays.

    Raises
    ------
    CellquiltError
        ``latents-missing``, ``column-unknown``.
    """
    tables = tables_of(adata)
    for table in tables:
        if LATENT not in table.obsm:
            raise CellquiltError("latents-missing", f'obsm has no "{LATENT}"', "run compute_representations first")
        for key in (batch_key, domain_key, *([condition_key] if condition_key else [])):
            require_column(table, key, "column-unknown")
    latents = np.concatenate([np.asarray(table.obsm[LATENT], dtype=np.float64) for table in tables])
    batch, domain = (_codes(tables, key) for key in (batch_key, domain_key))
    condition = _codes(tables, condition_key) if condition_key else np.zeros(len(batch), dtype=np.int64)
    if condition_key:
        _confounded(batch, condition, batch_key, condition_key)
    shift = _shifts(latents, batch, domain, condition)
    start = 0
    for table in tables:
        rows = slice(start, start + table.n_obs)
        corrected = latents[rows] + shift[rows]
        corrected[domain[rows] < 0] = latents[rows][domain[rows] < 0]
        table.obsm[key_added] = corrected.astype(np.float32)
        start += table.n_obs


def _codes(tables: "Sequence[AnnData]", key: str) -> NDArray[np.int64]:
    import pandas as pd

    together = pd.concat([table.obs[key].astype("object") for table in tables], ignore_index=True)
    return pd.Categorical(together, sorted(together.dropna().astype(str).unique())).codes.astype(np.int64)


def _confounded(batch: NDArray[np.int64], condition: NDArray[np.int64], batch_key: str, condition_key: str) -> None:
    pairs = np.unique(np.column_stack([batch, condition])[(batch >= 0) & (condition >= 0)], axis=0)
    conditions_of = np.bincount(pairs[:, 0])
    batches_of = np.bincount(pairs[:, 1])
    if conditions_of.max() == 1 and np.unique(pairs[:, 1]).size > 1:
        alone = int((batches_of == 1).sum())
        LOG.warning(
            "%s and %s are confounded: no %s has two conditions%s. What differs between conditions may be the %s's",
            batch_key, condition_key, batch_key,
            f", and {alone} of the conditions have one only" if alone else "", batch_key,
        )  # fmt: skip


def _shifts(
    latents: NDArray[np.float64], batch: NDArray[np.int64], domain: NDArray[np.int64], condition: NDArray[np.int64]
) -> NDArray[np.float64]:
    """(n_cells, size) how far each cell is moved."""
    known = (batch >= 0) & (domain >= 0) & (condition >= 0)
    keys = np.column_stack([condition, domain, batch])
    keys[~known] = -1
    groups, group = np.unique(keys, axis=0, return_inverse=True)
    group = group.ravel()
    n = np.bincount(group).astype(np.float64)
    means = np.stack([np.bincount(group, weights=column) for column in latents.T], axis=1) / n[:, None]
    _, place = np.unique(groups[:, :2], axis=0, return_inverse=True)
    place = place.ravel()
    # Where a domain is in all batches: each counts by how much it is believed, not by how many cells it has.
    belief = n / (n + _BELIEF)
    total = np.bincount(place, weights=belief)
    centre = np.stack([np.bincount(place, weights=belief * column) for column in means.T], axis=1) / total[:, None]
    moved = (centre[place] - means) * belief[:, None]
    moved[(groups < 0).any(axis=1)] = 0
    found: NDArray[np.float64] = moved[group]
    return found
