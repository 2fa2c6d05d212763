"""Spatial domains: ours and novae's on the same cells and the same weights.

Run where both have torch: ``.venv/domains/bin/python tests/benchmarks/compare.py --peer /path/to/python --cases
'domains-*'``, the peer's Python having novae 1.1.2. Both have one thread. The cases ``published`` give both the same
checkpoint with random weights and the sizes of published ones; ``own`` sets our default recipe against it.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from harness import OURS, Case, Comparison

_WARM = {"cells": 600, "slides": 1}
_QUICK = {"cells": 800}
_PUBLISHED = {"genes": 500, "slides": 1, "do": "infer"}
CASES = (
    Case("domains-graph-100k", {"cells": 100_000, "genes": 1, "slides": 1, "do": "graph"}, _QUICK, _WARM, target=3.0),
    Case("domains-published-500", {**_PUBLISHED, "cells": 3_000}, _QUICK, _WARM, target=8.0),
    Case("domains-published-5000", {**_PUBLISHED, "cells": 3_000, "genes": 5_000}, _QUICK, {**_WARM}, target=8.0),
    Case("domains-published-100k", {**_PUBLISHED, "cells": 100_000}, _QUICK, _WARM, target=8.0, limit_s=3600),
    Case("domains-epoch-published", {**_PUBLISHED, "cells": 3_000, "do": "epoch"}, _QUICK, _WARM, target=4.0),
    Case("domains-own", {**_PUBLISHED, "cells": 3_000, "do": "own"}, _QUICK, _WARM, target=20.0),
    Case("domains-own-100k", {**_PUBLISHED, "cells": 100_000, "do": "own"}, _QUICK, _WARM, peer=False),
    Case(
        "domains-cohort-5",
        {"cells": 50_000, "genes": 300, "slides": 5, "do": "cohort"}, _QUICK, peer=False, max_peak_mb=3000,
    ),
    Case(
        "domains-cohort-20",
        {"cells": 50_000, "genes": 300, "slides": 20, "do": "cohort"}, _QUICK, peer=False, max_peak_mb=3000,
    ),
)  # fmt: skip


def _table(sizes: dict[str, Any], number: int) -> Any:
    """Cells on a jittered grid, 12 µm apart, in four bands that differ in a tenth of the genes."""
    import anndata
    import pandas as pd
    from scipy.sparse import csr_matrix

    rng = np.random.default_rng(number)
    n, n_genes = sizes["cells"], sizes["genes"]
    side = int(np.ceil(np.sqrt(n)))
    grid = np.stack(np.meshgrid(np.arange(side), np.arange(side)), axis=-1).reshape(-1, 2)[:n]
    xy = 12.0 * grid + rng.uniform(-5, 5, (n, 2))
    # About 100 molecules a cell, some genes common: novae takes tables without a count of 10 for logarithms. Written
    # entry by entry, so that a large table needs no dense one.
    count = rng.poisson(100, n)
    band = (4 * xy[:, 1] / (12.0 * side)).astype(int).clip(0, 3)
    cell = np.repeat(np.arange(n), count)
    gene = (n_genes * rng.random(cell.size) ** 2).astype(int)
    moved = rng.random(cell.size) < 0.3
    tenth = max(n_genes // 10, 1)
    gene[moved] = (band[cell[moved]] * tenth + rng.integers(0, tenth, int(moved.sum()))) % n_genes
    counts = csr_matrix((np.ones(cell.size, np.float32), (cell, gene)), shape=(n, n_genes))
    table = anndata.AnnData(counts, var=pd.DataFrame(index=[f"gene{k}" for k in range(n_genes)]))
    table.obs_names = [f"c{k}" for k in range(n)]
    table.obsm["spatial"] = xy
    return table


def make_input(sizes: dict[str, Any], folder: Path) -> None:
    """The tables, and for published models a checkpoint; for a cohort its stores."""
    for number in range(sizes["slides"]):
        table = _table(sizes, number)
        if sizes["do"] == "cohort":
            import cellquilt as cq
            from cellquilt.domains.slides import slides_of_table, write_slide

            cq.spatial_neighbors(table)
            write_slide(slides_of_table(table)[0], folder / f"{number:02}.zarr")
        else:
            table.write_h5ad(folder / f"{number}.h5ad")
    if sizes["do"] == "infer":
        import torch
        from cellquilt.domains.expression import Vocabulary
        from cellquilt.domains.published.encoder import PublishedEncoder
        from cellquilt.domains.published.network import Architecture, Network

        torch.manual_seed(0)
        names = [str(name) for name in table.var_names]
        network = Network(len(names), Architecture())
        config = {"n_hops_local": 2, "n_hops_view": 2, "temperature": 0.1, "mode_kwargs": {"trained": True}}
        encoder = PublishedEncoder(network.eval(), Vocabulary(names), config)
        encoder.save(folder / "model", encoder.prototypes)


def prepare(sizes: dict[str, Any], folder: Path, tool: str) -> None:
    """Both read the same files."""


def load(sizes: dict[str, Any], folder: Path, tool: str) -> Callable[[], Any]:
    """The step: graph, latents, an epoch, or a whole cohort."""
    os.environ["OMP_NUM_THREADS"] = "1"
    return _ours(sizes, folder) if tool == OURS else _novae(sizes, folder)


def _ours(sizes: dict[str, Any], folder: Path) -> Callable[[], Any]:
    import cellquilt as cq
    from cellquilt.domains.model import Model
    from cellquilt.domains.slides import Slides

    if sizes["do"] == "cohort":
        slides = Slides.of_stores(sorted(folder.glob("*.zarr")))

        def cohort() -> Any:
            model = Model.train(slides, n_domains=4)
            return [np.bincount(model.leaves(model.encoder.encode(slide)) + 1) for slide in slides]

        return cohort
    import anndata

    table = anndata.read_h5ad(folder / "0.h5ad")
    if sizes["do"] == "graph":
        return lambda: (cq.spatial_neighbors(table, radius=80), table)[1]
    cq.spatial_neighbors(table, radius=80)
    if sizes["do"] == "infer":
        model = Model.from_pretrained(folder / "model")
        return lambda: (model.compute_representations(table), table)[1]
    if sizes["do"] == "own":
        model = Model.train(table)
        return lambda: (model.compute_representations(table), table)[1]
    return lambda: (Model.train(table, recipe="published", max_epochs=1, background=1.25), table)[1]


def _novae(sizes: dict[str, Any], folder: Path) -> Callable[[], Any]:
    import anndata
    import novae
    import torch

    torch.set_num_threads(1)
    table = anndata.read_h5ad(folder / "0.h5ad")
    if sizes["do"] == "graph":
        return lambda: (novae.spatial_neighbors(table, radius=80), table)[1]
    novae.spatial_neighbors(table, radius=80)
    if sizes["do"] == "epoch":
        model = novae.Novae(table)
        return lambda: (model.fit(max_epochs=1), table)[1]
    if sizes["do"] == "own":
        model = novae.Novae(table)
        model.mode.trained = True
    else:
        model = novae.Novae.from_pretrained(str(folder / "model"))
    return lambda: (model.compute_representations(table), table)[1]


def finish(result: Any, sizes: dict[str, Any], folder: Path, tool: str) -> dict[str, Any]:
    """Keep latents or the graph for the comparison."""
    if sizes["do"] in ("infer", "graph"):
        ours = tool == OURS
        key = "niche_latent" if ours else "novae_latent"
        matrix = result.obsp["spatial_distances"]
        kept = {"indices": matrix.indices, "data": matrix.data, "indptr": matrix.indptr}
        if sizes["do"] == "infer":
            kept = {"latent": result.obsm[key]}
        np.savez(folder / f"{tool}.npz", **kept)
    return {"cells": sizes["cells"] * sizes["slides"]}


def compare(sizes: dict[str, Any], folder: Path) -> Comparison:
    """The same graph, the same latents."""
    from scipy.sparse import csr_matrix

    files = sorted(folder.glob("*.npz"))
    if len(files) < 2:
        return Comparison(None, "other work, not compared")
    a, b = (np.load(file) for file in files)
    if "latent" in a.files:
        most = float(np.abs(np.nan_to_num(a["latent"]) - np.nan_to_num(b["latent"])).max())
        return Comparison(most < 1e-4, f"latents differ by at most {most:.1e}")
    graphs = [csr_matrix((file["data"], file["indices"], file["indptr"])) for file in (a, b)]
    apart = abs(graphs[0] - graphs[1]).max() if graphs[0].nnz == graphs[1].nnz else np.inf
    return Comparison(bool(apart < 1e-3), f"{graphs[0].nnz} and {graphs[1].nnz} edges, at most {apart:.1e} µm apart")
