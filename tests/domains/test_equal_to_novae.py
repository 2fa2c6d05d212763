"""Checkpoints that novae saved give novae's latents and domains: recorded by make_reference.py, live where it is."""

import shutil
from pathlib import Path

import anndata
import cellquilt as cq
import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix

DATA = Path(__file__).with_name("data")
CASES = sorted(folder.name for folder in DATA.iterdir())


def tables_of(case: str) -> list[tuple[anndata.AnnData, dict[str, np.ndarray]]]:
    """The tables of a case, and what novae said of them."""
    found = []
    for path in sorted((DATA / case).glob("cells_*.npz")):
        said = dict(np.load(path))
        genes, slide = said["genes"].tolist(), said["slide"].tolist()
        table = anndata.AnnData(csr_matrix(said["counts"].astype(np.float32)), var=pd.DataFrame(index=genes))
        table.obs["slide"] = slide
        table.obsm["spatial"] = said["xy"]
        if "image" in said:
            table.obsm["histo_embeddings"] = said["image"]
        found.append((table, said))
    return found


@pytest.mark.parametrize("case", CASES)
def test_graph_latents_leaves_and_domains_are_novaes(case):
    pairs = tables_of(case)
    tables = [table for table, _ in pairs]
    cq.spatial_neighbors(tables, radius=80, slide_key="slide")
    model = cq.domains.Model.from_pretrained(DATA / case)
    model.compute_representations(tables)
    model.assign_domains(tables, level=5)
    for table, said in pairs:
        distances = table.obsp["spatial_distances"]
        assert np.array_equal(distances.indices, said["neighbours"])
        np.testing.assert_allclose(distances.data, said["distances"], rtol=1e-5)
        np.testing.assert_allclose(table.obsm["niche_latent"], said["latent"], atol=1e-4)
        assert np.abs(said["latent"]).max() > 0.01
        assert table.obs["domain_leaf"].astype(str).tolist() == said["leaf"].tolist()
        assert table.obs["domain"].astype(str).tolist() == said["domain"].tolist()
        assert len(np.unique(said["leaf"])) >= 8


def test_the_cases_differ():
    """Several panels, several slides in a table, genes chosen among many, an image."""
    assert len(tables_of("default")) == 2
    assert len({tuple(said["genes"]) for _, said in tables_of("default")}) == 2
    assert len(np.unique(tables_of("small")[0][1]["slide"])) == 2
    ((_, said),) = tables_of("wide")
    assert len(said["genes"]) > 100
    assert 20 <= said["used"].sum() < len(said["genes"])
    assert "image" in tables_of("image")[0][1]


@pytest.mark.parametrize("case", CASES)
def test_a_model_saved_again_is_the_same(case, tmp_path):
    model = cq.domains.Model.from_pretrained(DATA / case)
    model.save_pretrained(tmp_path / "a")
    again = cq.domains.Model.from_pretrained(tmp_path / "a")
    again.save_pretrained(tmp_path / "b")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    ours, theirs = tables_of(case)[0][0], tables_of(case)[0][0]
    for table, used in ((ours, model), (theirs, again)):
        cq.spatial_neighbors(table, slide_key="slide")
        used.compute_representations(table)
    assert np.array_equal(ours.obsm["niche_latent"], theirs.obsm["niche_latent"])


def test_the_same_bytes_again_in_any_order_and_with_more_threads():
    """Nothing but the neighbourhood of a cell decides: not its place in the table, not batches, not threads."""
    (table, _), *_ = tables_of("default")
    model = cq.domains.Model.from_pretrained(DATA / "default")
    order = np.random.default_rng(0).permutation(table.n_obs)
    shuffled, threaded = table[order].copy(), table.copy()
    for own, threads in ((table, 1), (shuffled, 1), (threaded, 2)):
        cq.spatial_neighbors(own, slide_key="slide")
        model.compute_representations(own, threads=threads)
    assert np.array_equal(table.obsm["niche_latent"], threaded.obsm["niche_latent"])
    np.testing.assert_allclose(shuffled.obsm["niche_latent"], table.obsm["niche_latent"][order], atol=1e-5)
    assert shuffled.obs["domain_leaf"].tolist() == table.obs["domain_leaf"].iloc[order].tolist()


def test_zero_shot_is_seeded_and_works_on_few_cells():
    (table, _), *_ = tables_of("default")
    few = table[np.argsort(((table.obsm["spatial"] - 100) ** 2).sum(1))[:100]].copy()
    found = []
    for own in (few, few.copy()):
        model = cq.domains.Model.from_pretrained(DATA / "default")
        cq.spatial_neighbors(own, slide_key="slide")
        model.compute_representations(own, zero_shot=True, seed=3)
        assert model.assign_domains(own, n_domains=3) == "domain"
        assert own.obs["domain"].nunique() == 3
        assert len(model.prototypes) <= 25
        np.testing.assert_allclose(np.linalg.norm(model.prototypes, axis=1), 1, rtol=1e-5)
        found.append(own.obs["domain"].astype(str).tolist())
    assert found[0] == found[1]


def test_levels_are_nested_and_leiden_finds_communities():
    pairs = tables_of("default")
    tables = [table for table, _ in pairs]
    cq.spatial_neighbors(tables, slide_key="slide")
    model = cq.domains.Model.from_pretrained(DATA / "default")
    model.compute_representations(tables, zero_shot=True)
    for level in range(2, 20, 4):
        model.assign_domains(tables, level=level, key_added="coarse")
        model.assign_domains(tables, level=level + 3, key_added="fine")
        for table in tables:
            assert (table.obs.groupby("fine", observed=True)["coarse"].nunique() == 1).all()
    model.assign_domains(tables, resolution=1.0, key_added="leiden")
    assert tables[0].obs["leiden"].cat.categories.tolist() == tables[1].obs["leiden"].cat.categories.tolist()
    assert 2 <= tables[0].obs["leiden"].nunique() < 32
    before = tables[0].obs["leiden"].tolist()
    model.assign_domains(tables, resolution=1.0, key_added="leiden")
    assert tables[0].obs["leiden"].tolist() == before


@pytest.mark.bench
def test_live_against_novae(tmp_path):
    """`make check-novae`: another checkpoint, one that novae itself reads; CELLQUILT_NOVAE_WEIGHTS names it."""
    import os

    novae = pytest.importorskip("novae")
    weights = Path(os.environ.get("CELLQUILT_NOVAE_WEIGHTS", DATA / "default"))
    shutil.copytree(weights, tmp_path / "model")
    tables = novae.toy_dataset(n_panels=1, n_slides_per_panel=1, xmax=300, n_vars=60)
    genes = cq.domains.Model.from_pretrained(weights).vocabulary.names
    for table in tables:
        table.var_names = genes[: table.n_vars]
        table.obsm["spatial"] = table.obsm["spatial"] + np.random.default_rng(0).uniform(-5, 5, (table.n_obs, 2))
    theirs = [table.copy() for table in tables]
    novae.spatial_neighbors(theirs, radius=80)
    model = novae.Novae.from_pretrained(str(tmp_path / "model"))
    model.compute_representations(theirs)
    cq.spatial_neighbors(tables, radius=80)
    cq.domains.Model.from_pretrained(weights).compute_representations(tables)
    for ours, other in zip(tables, theirs, strict=True):
        np.testing.assert_allclose(ours.obsm["niche_latent"], other.obsm["novae_latent"], atol=1e-4)
        assert ours.obs["domain_leaf"].astype(str).tolist() == other.obs["novae_leaves"].astype(str).tolist()
