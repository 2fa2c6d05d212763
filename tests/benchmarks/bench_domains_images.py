"""How wide patches should be and how many components kept, where an image tells domains apart that expression does not.

    python bench_domains_images.py [--seeds 1 2 3] [--output domains_images.json]

Cohorts of two simulated slides of 900 cells. Cells of one of five domains get the expression of another's, and the
image coarser grain there. The networks are four moments of each channel, and 64 filters drawn at random with means and
deviations of what they find. For each setting: the adjusted Rand index of all cells with the truth.
"""

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

import anndata
import cellquilt as cq
import numpy as np
import torch
from scipy.spatial import cKDTree
from sklearn.metrics import adjusted_rand_score

#: Layers as wide (µm) as `cell_tables` makes them by itself for so many cells, and wide ones.
WIDTHS = {"usual": {}, "wide": {"domain_um": 150.0}}
PATCH_UM = (15.0, 30.0, 56.0, 80.0)
COMPONENTS = (2, 5, 10, 50)
#: Whether the model knows how wide patches are, and so how much they overlap.
KNOWN = (True, False)
#: What embeddings are multiplied by.
WEIGHTS = (0.3, 1.0, 3.0)


def cohort(seed: int, **options: Any) -> tuple[list[anndata.AnnData], list[np.ndarray]]:
    """Tables with a graph, and an image of each at 1 µm a pixel."""
    tables = cq.simulate.cell_tables(
        slides=2, n_cells=900, n_domains=5, thin_layers=0, rare_niches=0, batch_effect=0.2, seed=seed, **options
    )
    rng, images = np.random.default_rng(seed), []
    for table in tables:
        domain = table.obs["domain_true"].astype(str).to_numpy()
        like, same = np.flatnonzero(domain == "domain_1"), np.flatnonzero(domain == "domain_3")
        counts = table.X.tolil()
        counts[same] = table.X[rng.choice(like, same.size)]
        table.X = counts.tocsr()
        images.append(stained(table, rng))
    cq.spatial_neighbors(tables)
    return tables, images


def stained(table: anndata.AnnData, rng: np.random.Generator) -> np.ndarray:
    """(3, height, width) uint8: coarse grain in one of the domains, fine grain in the others."""
    low = table.obsm["spatial"].min(axis=0) - 20
    table.obsm["spatial"] = xy = table.obsm["spatial"] - low
    height, width = np.ceil(xy.max(axis=0) + 20).astype(int)[::-1]
    fine = rng.normal(size=(height, width))
    coarse = np.kron(rng.normal(size=(-(-height // 6), -(-width // 6))), np.ones((6, 6)))[:height, :width]
    place = np.stack(np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5), axis=-1)
    nearest = cKDTree(xy).query(place.reshape(-1, 2))[1].reshape(height, width)
    is_coarse = (table.obs["domain_true"].astype(str) == "domain_3").to_numpy()[nearest]
    grain = np.where(is_coarse, coarse, fine) + 0.3 * rng.normal(size=(height, width))
    return (150 + 25 * grain[None] + np.array([30, 0, 20])[:, None, None]).clip(0, 255).astype(np.uint8)


def moments(x: torch.Tensor) -> torch.Tensor:
    """(n, 12): mean, deviation and roughness of each channel at two distances."""
    near, far = (x[..., k:] - x[..., :-k] for k in (1, 4))
    parts = [x.mean((2, 3)), x.std((2, 3)), near.abs().mean((2, 3)), far.abs().mean((2, 3))]
    return torch.stack(parts, dim=1).flatten(1)


def drawn() -> torch.nn.Module:
    """(n, 128): what 64 filters find after 16 others, their mean and deviation."""
    torch.manual_seed(0)
    filters = torch.nn.Sequential(torch.nn.Conv2d(3, 16, 3), torch.nn.ReLU(), torch.nn.Conv2d(16, 64, 3))

    class Filters(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.filters = filters

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found = self.filters(x).relu()
            return torch.cat([found.mean((2, 3)), found.std((2, 3))], dim=1)

    return Filters()


def score(tables: list[anndata.AnnData]) -> float:
    """Adjusted Rand index of the domains that a model of these tables finds."""
    model = cq.domains.Model.train(tables, n_domains=5)
    model.compute_representations(tables)
    model.assign_domains(tables, n_domains=5)
    truth, found = (
        np.concatenate([table.obs[key].astype(str) for table in tables]) for key in ("domain_true", "domain")
    )
    return round(float(adjusted_rand_score(truth, found)), 3)


def main() -> None:
    """Run all settings."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("domains_images.json"))
    given = parser.parse_args()
    rows, start = [], time.time()

    def note(tables: list[anndata.AnnData], **what: Any) -> None:
        rows.append({**what, "ari": score(tables)})
        print(rows[-1], f"{time.time() - start:.0f} s", flush=True)

    for seed in given.seeds:
        for width, options in WIDTHS.items():
            tables, images = cohort(seed, **options)
            note(tables, seed=seed, width=width, network="none")
            place = "histo_embeddings"
            for name, network in {"moments": moments, "drawn": drawn()}.items():
                for patch_um in PATCH_UM:
                    cq.domains.image_embeddings(
                        tables, images, network, pixel_size_um=1, patch_um=patch_um, um_per_px=1, n_components=50
                    )
                    whole, about = [table.obsm[place] for table in tables], {"patch_um": patch_um}
                    # Components are nested: fewer of them are the first ones.
                    for n in sorted({min(n, whole[0].shape[1]) for n in COMPONENTS}):
                        weights = WEIGHTS if (patch_um, n) == (30.0, 2) else (1.0,)
                        for weight, known in itertools.product(weights, KNOWN):
                            for table, part in zip(tables, whole, strict=True):
                                table.obsm[place] = part[:, :n] * np.float32(weight)
                                table.uns[f"{place}_about"] = about if known else {}
                            said = {"network": name, "components": n, "weight": weight, "overlap_known": known}
                            note(tables, seed=seed, width=width, **about, **said)
                for table in tables:
                    del table.obsm[place]
    given.output.write_text(json.dumps({"cellquilt": cq.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
