"""PAGA and the scale of counts are scanpy's."""

import anndata
import cellquilt as cq
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from cellquilt.domains import analysis
from cellquilt.domains.analysis.expression import scaled_logs
from scipy.sparse import csr_matrix


def table(seed: int) -> anndata.AnnData:
    rng = np.random.default_rng(seed)
    out = anndata.AnnData(np.ones((500, 1), np.float32))
    out.obsm["spatial"] = rng.uniform(0, 250, (500, 2))
    # Domains of unlike size, one of scattered cells.
    names = np.array(["A", "B", "C", "D"])[np.digitize(out.obsm["spatial"][:, 0], [40, 120, 200])]
    names[rng.random(500) < 0.08] = "E"
    out.obs["domain"] = pd.Categorical(names)
    out.obs["sample"] = f"s{seed}"
    cq.spatial_neighbors(out)
    return out


def scanpy_paga(adata: anndata.AnnData) -> np.ndarray:
    adata.obsp["distances"], adata.obsp["connectivities"] = (
        adata.obsp[f"spatial_{name}"] for name in ("distances", "connectivities")
    )
    names = {"connectivities_key": "connectivities", "distances_key": "distances"}
    adata.uns["neighbors"] = {**names, "params": {"n_neighbors": 6, "method": "umap"}}
    sc.tl.paga(adata, groups="domain")
    return adata.uns["paga"]["connectivities"].toarray()


def test_paga_of_a_slide_and_of_the_cohort_is_scanpys():
    tables = [table(0), table(1)]
    found = analysis.architecture(tables)
    for name, own in zip(found.slides, tables, strict=True):
        assert found.paga(name) == pytest.approx(scanpy_paga(own.copy()), abs=1e-7)
        assert (found.paga(name) > 0).sum() > 8
    together = anndata.concat(tables, pairwise=True, index_unique="-")
    assert found.paga() == pytest.approx(scanpy_paga(together), abs=1e-7)


def test_counts_are_scaled_as_scanpy_does():
    counts = csr_matrix(np.random.default_rng(0).poisson(1, (200, 30)).astype(np.float64))
    counts[3] = 0
    counts.eliminate_zeros()
    want = anndata.AnnData(counts.copy())
    sc.pp.normalize_total(want)
    sc.pp.log1p(want)
    assert np.allclose(scaled_logs(counts).toarray(), want.X.toarray(), atol=1e-12)
