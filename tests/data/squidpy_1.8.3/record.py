"""Record what squidpy makes of a small slide, for the tests of `cellquilt.spatial`.

Run with the Python of an environment that has squidpy: ``python record.py OUTPUT``.
"""

import json
import sys
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import squidpy
from scipy.sparse import csr_matrix

N_CELLS, SIDE_UM, REACH_UM = 300, 180.0, 16.0
EDGES_UM = [0.0, 10.0, 25.0, 45.0, 70.0]


def slide() -> tuple[np.ndarray, np.ndarray]:
    """Places and groups: one group gathers, another is rare."""
    rng = np.random.default_rng(11)
    xy = np.round(rng.random((N_CELLS, 2)) * SIDE_UM, 2)
    codes = rng.integers(0, 3, N_CELLS)
    codes[np.linalg.norm(xy - 60, axis=1) < 35] = 0
    codes[[5, 80, 200, 250]] = 3
    return xy, codes


def graph(xy: np.ndarray) -> csr_matrix:
    """All pairs within reach: a graph that nobody's choice of neighbours enters."""
    far = np.linalg.norm(xy[:, None] - xy[None], axis=2)
    near = (far <= REACH_UM) & (far > 0)
    return csr_matrix(np.where(near, far, 0))


def main() -> None:
    xy, codes = slide()
    table = anndata.AnnData(
        obs=pd.DataFrame({"group": pd.Categorical(codes.astype(str))}, index=np.arange(N_CELLS).astype(str)),
        obsm={"spatial": xy},
    )
    distances = graph(xy)
    table.obsp["spatial_distances"] = distances
    connected = distances.copy()
    connected.data = np.ones_like(connected.data)
    table.obsp["spatial_connectivities"] = connected
    found = squidpy.gr.nhood_enrichment(table, "group", n_perms=4000, seed=1, copy=True, show_progress_bar=False)
    z, count = (found.zscore, found.counts) if hasattr(found, "zscore") else found[:2]
    ratio, _ = squidpy.gr.co_occurrence(table, "group", interval=np.array(EDGES_UM), copy=True)
    record = {
        "squidpy": squidpy.__version__,
        "counts": np.asarray(count).astype(int).tolist(),
        "z": np.round(np.asarray(z), 5).tolist(),
        "n_permutations": 4000,
        "edges_um": EDGES_UM,
        "co_occurrence": np.round(np.asarray(ratio, dtype=float), 6).tolist(),
    }
    Path(sys.argv[1]).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
