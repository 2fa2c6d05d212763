"""The cohorts that spatial domains are measured on: one folder each, one ``.h5ad`` a slide, the same for every method.

``obs["sample"]`` names the slide, ``obs["domain_true"]`` the domain; ``cohort.json`` says what else a method is told:
what X holds, and how many domains there are. Its digest is that of all counts, places, domains and names.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from anndata import AnnData

ABOUT = "cohort.json"


@dataclass(frozen=True)
class Cohort:
    """A cohort of benchmarks.

    Attributes
    ----------
    name, text
        Its name, and what it is made of.
    kind
        What X holds: ``counts`` or ``protein``.
    n_domains
        True number of domains.
    make
        Gives its slides.
    """

    name: str
    text: str
    kind: str
    n_domains: int
    make: "Callable[[], list[AnnData]]"


def simulated(**given: Any) -> "Callable[[], list[AnnData]]":
    """6 slides of 1,200 cells: 6 layers, two of them thin, 2 rare niches, effects of batches."""

    def make() -> "list[AnnData]":
        from cellquilt.simulate import cell_tables

        usual = {"slides": 6, "n_cells": 1200, "n_domains": 8, "thin_layers": 2, "rare_niches": 2, "batch_effect": 0.4}
        return cell_tables(**{**usual, **given})

    return make


def toy(seed: int = 0) -> "list[AnnData]":
    """What ``novae.toy_dataset()`` gives with its defaults, by the same recipe but with a seed; X holds the counts.

    3 slides, each of a panel of its own: places 20 µm apart in a disc of 500 µm, 4 rings of the same width. A gene's
    counts are exponential, rounded down, with the mean being the sum of a ring's, a panel's and a slide's shift.
    """
    import anndata
    import pandas as pd

    rng = np.random.default_rng([seed, 505])
    n_panels, n_domains, n_genes, n_left_out, reach, step = 3, 4, 100, 20, 500, 20
    places = np.arange(-reach, reach, step)
    xy = np.stack(np.meshgrid(places, places, indexing="ij"), axis=-1).reshape(-1, 2).astype(float)
    from_middle = np.hypot(*xy.T)
    xy, from_middle = xy[from_middle <= reach], from_middle[from_middle <= reach]
    ring = (from_middle // (reach / n_domains + 1e-8)).astype(int)
    of_ring = rng.exponential(2.0, (n_domains, n_genes))
    tables = []
    for number in range(n_panels):
        mean = of_ring[ring] + rng.exponential(5.0, n_genes) + rng.exponential(1.5, n_genes)
        counts = np.floor(rng.exponential(mean)).astype(np.float32)
        genes = np.sort(rng.choice(n_genes, n_genes - n_left_out - number, replace=False))
        kept = slice(0, len(xy) - 1 - number)
        obs = pd.DataFrame(
            {"sample": f"toy_{number}", "domain_true": [f"domain_{k}" for k in ring[kept]]},
            index=[f"toy_{number}-{k}" for k in range(len(xy))[kept]],
        )
        var = pd.DataFrame(index=[f"GENE{k:03d}" for k in genes])
        tables.append(anndata.AnnData(counts[kept][:, genes], obs=obs, var=var, obsm={"spatial": xy[kept] + number}))
    return tables


COHORTS = {
    cohort.name: cohort
    for cohort in (
        Cohort("panels", "3 panels × 2 slides", "counts", 8, simulated(panels=3, panel_overlap=0.6, seed=101)),
        Cohort("protein", "30 proteins, 6 slides", "protein", 8, simulated(kind="protein", seed=102)),
        Cohort("hard", "preset hard, 3 panels × 2 slides", "counts", 8,
               simulated(preset="hard", panels=3, panel_overlap=0.6, seed=103)),
        Cohort("toy", "novae.toy_dataset, 3 panels", "counts", 4, toy),
        Cohort("toy_2", "novae.toy_dataset, drawn again", "counts", 4, lambda: toy(201)),
    )
}  # fmt: skip


def write(cohort: Cohort, folder: Path) -> Path:
    """Put a cohort on disk, once."""
    home = folder / cohort.name
    if (home / ABOUT).is_file():
        return home
    home.mkdir(parents=True, exist_ok=True)
    slides, digest = [], hashlib.sha256()
    for table in cohort.make():
        name = str(table.obs["sample"].iloc[0])
        # Plain columns: methods bring their own, older, anndata.
        table.obs = table.obs[["sample", "domain_true"]].astype(object)
        table.write_h5ad(home / f"{name}.h5ad")
        slides.append(name)
        for part in (table.X, table.obsm["spatial"], table.obs["domain_true"], table.var_names):
            dense = part.toarray() if hasattr(part, "toarray") else np.asarray(part)
            digest.update("\n".join(dense).encode() if dense.dtype == object else np.ascontiguousarray(dense))
    about = {
        "kind": cohort.kind,
        "n_domains": cohort.n_domains,
        "slides": slides,
        "digest": digest.hexdigest()[:16],
    }
    (home / ABOUT).write_text(json.dumps(about))
    return home
