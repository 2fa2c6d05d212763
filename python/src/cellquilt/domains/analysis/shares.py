"""How much of each slide each domain takes."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from cellquilt.spatial.slides import all_domains, one_value, slides

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData


def proportions(
    adatas: "AnnData | Sequence[AnnData]",
    domain_key: str = "domain",
    slide_key: str | None = None,
    condition_key: str | None = None,
) -> "pd.DataFrame":
    """Share of the domains in each slide.

    Parameters
    ----------
    adatas
        Tables with domains.
    domain_key
        Column of `obs` with them; cells without one are left out.
    slide_key
        Column that names the slides; None: each table is one.
    condition_key
        Column that names the slides' condition.

    Returns
    -------
    pandas.DataFrame
        A row for every slide and domain, those of no cell too: ``slide``, ``condition`` (if asked for), ``domain``,
        ``n_cells``, ``share`` (of the slide's cells that have a domain; NaN if none has).
    """
    import pandas as pd

    found = []
    for slide in slides(adatas, domain_key, slide_key):
        condition = None if condition_key is None else one_value(slide, condition_key)
        found.append((slide.name, condition, slide.domains, slide.numbers))
    domains, places = all_domains([own for _, _, own, _ in found])
    numbers = np.zeros((len(found), len(domains)), dtype=np.int64)
    for row, place, (_, _, _, own) in zip(numbers, places, found, strict=True):
        row[place] = own
    total = numbers.sum(axis=1, keepdims=True)
    share = np.divide(numbers, total, out=np.full(numbers.shape, np.nan), where=total > 0)
    columns = {
        "slide": np.repeat([name for name, *_ in found], len(domains)),
        "condition": np.repeat([condition for _, condition, *_ in found], len(domains)),
        "domain": np.tile(domains, len(found)),
        "n_cells": numbers.ravel(),
        "share": share.ravel(),
    }
    if condition_key is None:
        del columns["condition"]
    return pd.DataFrame(columns)
