"""What images show around cells, by the stages of the pipeline: as in memory, from files to files."""

import json
from pathlib import Path

import anndata
import cellquilt as cq
import numpy as np
import pytest
import spatialdata
import tifffile
from cellquilt.core.errors import CellquiltError
from cellquilt.core.images import ImageWriter
from cellquilt.core.settings import BY_NAME, Settings
from cellquilt.domains import ImagePca, SlideImage, image_embeddings, stages
from cellquilt.domains.checkpoint import checksum
from cellquilt.domains.images.features import FeatureFile
from cellquilt.domains.results import read_cells
from cellquilt.domains.slides import read_slide

#: A module of the user's.
NETWORK = """
import torch

def moments(x):
    near, far = (x[..., k:] - x[..., :-k] for k in (1, 4))
    parts = [x.mean((2, 3)), x.std((2, 3)), near.abs().mean((2, 3)), far.abs().mean((2, 3))]
    return torch.stack(parts, dim=1).flatten(1)

def other(x):
    return x.mean((2, 3))
"""
GIVEN = {"domains_image_model": "stains:moments", "domains_patch_um": 24, "domains_um_per_px": 1.0,
         "domains_image_components": 3}  # fmt: skip
#: From pixels of the image to µm: turned by a quarter.
TO_UM = np.array([[0.0, -0.8, 900.0], [0.8, 0.0, -20.0], [0.0, 0.0, 1.0]])


@pytest.fixture(autouse=True)
def network(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("module")
    (folder / "stains.py").write_text(NETWORK)
    monkeypatch.syspath_prepend(folder)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Path:
    """Two tables of cells, each with an aligned image of noise whose grain is that of the cells' domains."""
    folder = tmp_path_factory.mktemp("cohort")
    tables = cq.simulate.cell_tables(slides=2, n_cells=200, n_domains=4, thin_layers=0, rare_niches=0, seed=2)
    for number, table in enumerate(tables):
        low = table.obsm["spatial"].min(axis=0)
        table.obsm["spatial"] = (table.obsm["spatial"] - low) * min(1, 600 / np.ptp(table.obsm["spatial"])) + 50
        table.write_h5ad(folder / f"s{number}.h5ad")
        rng = np.random.default_rng(number)
        pixels = rng.integers(0, 256, (1100, 1100, 3), dtype=np.uint8)
        pixels[:, :500] = pixels[::8, :500].repeat(8, axis=0)[:1100]
        tifffile.imwrite(folder / f"s{number}.tif", pixels, photometric="rgb", tile=(256, 256), compression="zlib")
        np.savetxt(folder / f"s{number}.csv", TO_UM, delimiter=",")
    return folder


def prepared(cohort: Path, folder: Path, **settings) -> list[Path]:
    return [
        stages.prepare_slide(
            cohort / f"{name}.h5ad", folder / f"{name}.graph.zarr", settings=Settings({**GIVEN, **settings}),
            he_image=cohort / f"{name}.tif", he_matrix=cohort / f"{name}.csv",
        )
        for name in ("s0", "s1")
    ]  # fmt: skip


@pytest.fixture
def graphs(cohort, tmp_path) -> list[Path]:
    return prepared(cohort, tmp_path)


def in_memory(cohort: Path) -> tuple[list[anndata.AnnData], ImagePca]:
    import stains

    tables = [anndata.read_h5ad(cohort / f"{name}.h5ad") for name in ("s0", "s1")]
    pixels = [tifffile.imread(cohort / f"{name}.tif").transpose(2, 0, 1) for name in ("s0", "s1")]
    images = [SlideImage(part, um_to_px=np.linalg.inv(TO_UM)) for part in pixels]
    pca = image_embeddings(tables, images, stains.moments, patch_um=24, um_per_px=1.0, n_components=3)
    cq.spatial_neighbors(tables)
    return tables, pca


def test_embeddings_and_domains_are_those_of_the_model_in_memory(cohort, graphs, tmp_path):
    settings = Settings({**GIVEN, "domains": "train", "domains_n": 4})
    model = stages.train_model(graphs, tmp_path / "model", settings=settings)
    tables, pca = in_memory(cohort)
    kept = ImagePca.load(model)
    np.testing.assert_allclose(kept.components, pca.components, atol=1e-4)
    assert kept.about["model"] == "stains:moments"
    for graph, table in zip(graphs, tables, strict=True):
        np.testing.assert_allclose(read_slide(graph, kept).image, table.obsm["histo_embeddings"], atol=1e-3)
        assert read_slide(graph).image is None
    latents = [
        stages.embed_slide(graph, tmp_path / f"{graph.name}.parquet", settings=settings, weights=model)
        for graph in graphs
    ]
    found = stages.assign_domains(latents, tmp_path / "domains", settings=settings, weights=model)
    expected = cq.domains.Model.train(tables, n_domains=4)
    expected.compute_representations(tables)
    expected.assign_domains(tables, n_domains=4)
    for name, table in zip(("s0", "s1"), tables, strict=True):
        cells = read_cells(found / f"{name}.domains.parquet")
        np.testing.assert_allclose(np.nan_to_num(cells.latents), table.obsm["niche_latent"], atol=1e-2)
        same = np.array([*cells.names, "nan"])[cells.domain] == table.obs["domain"].astype(str).to_numpy()
        assert same.mean() > 0.98
    # What is published can be used again, and says what it looked at.
    about = json.loads((found / "domains.json").read_text())
    assert about["image"]["patch_um"] == 24
    assert about["model_sha256"] == checksum(found / "model")
    assert sorted(path.name for path in (found / "model").iterdir()) == [
        "config.json", "image_pca.safetensors", "model.safetensors",
    ]  # fmt: skip
    again = stages.embed_slide(graphs[0], tmp_path / "again.parquet", settings=settings, weights=found / "model")
    assert np.array_equal(read_cells(again).latents, read_cells(latents[0]).latents, equal_nan=True)
    # One that goes on from it keeps the components.
    more = stages.train_model(graphs[:1], tmp_path / "more", settings=settings, weights=model)
    assert (more / "image_pca.safetensors").read_bytes() == (model / "image_pca.safetensors").read_bytes()


def test_the_published_recipe_takes_as_many_components_as_there_are(cohort, graphs, tmp_path):
    settings = Settings({**GIVEN, "domains": "train", "domains_recipe": "published", "domains_max_epochs": 1})
    model = stages.train_model(graphs[:1], tmp_path / "model", settings=settings)
    config = json.loads((model / "config.json").read_text())
    assert config["histo_embedding_size"] == 3
    assert config["mode_kwargs"]["multimodal"]
    latents = stages.embed_slide(graphs[1], tmp_path / "x.parquet", settings=settings, weights=model)
    assert np.isfinite(read_cells(latents).latents).any(axis=1).sum() > 150


def test_the_same_bytes_again_and_nothing_of_a_table_s_own_embeddings(cohort, graphs, tmp_path):
    table = anndata.read_h5ad(cohort / "s0.h5ad")
    table.obsm["histo_embeddings"] = np.ones((table.n_obs, 2), dtype=np.float32)
    (tmp_path / "own").mkdir()
    table.write_h5ad(tmp_path / "own" / "s0.h5ad")
    again = stages.prepare_slide(
        tmp_path / "own" / "s0.h5ad", tmp_path / "again.zarr", settings=Settings(GIVEN),
        he_image=cohort / "s0.tif", he_matrix=cohort / "s0.csv",
    )  # fmt: skip
    for name in ("image_features.npy", "image_features.json"):
        assert (again / name).read_bytes() == (graphs[0] / name).read_bytes()
    assert read_slide(again).image is None
    # Without a network the table's own count.
    plain = stages.prepare_slide(tmp_path / "own" / "s0.h5ad", tmp_path / "plain.zarr", settings=Settings())
    assert read_slide(plain).image.shape == (200, 2)
    assert FeatureFile.find(plain) is None


def test_an_image_of_the_slide_s_own_store(cohort, graphs, tmp_path):
    """The element and the file show the same."""
    pixels = tifffile.imread(cohort / "s0.tif").transpose(2, 0, 1)
    store = tmp_path / "s0.zarr"
    table = anndata.read_h5ad(cohort / "s0.h5ad")
    spatialdata.SpatialData(tables={"table": table}).write(store)
    (store / "images").mkdir(exist_ok=True)
    for element, scale in (("main", 0.5), ("stain", 1.0)):
        # The file's map is from its pixels to those of the main image, if there is one.
        to_um = TO_UM if element == "stain" else np.diag([scale, scale, 1.0])
        names = ["r", "g", "b"]
        with ImageWriter(store / "images" / element, pixels.shape, pixels.dtype, names, {"microns": to_um}) as writer:
            for channel, part in enumerate(pixels):
                writer.write(part, 0, 0, channel)
    settings = Settings({**GIVEN, "domains_image": "stain"})
    found = stages.prepare_slide(store, tmp_path / "element.zarr", settings=settings)
    expected = FeatureFile.find(graphs[0])
    np.testing.assert_allclose(FeatureFile.find(found).values, expected.values, atol=1e-5)
    with pytest.raises(CellquiltError, match="stian"):
        stages.prepare_slide(store, tmp_path / "x.zarr", settings=Settings({**GIVEN, "domains_image": "stian"}))
    import shutil

    shutil.rmtree(store / "images" / "stain")
    np.savetxt(tmp_path / "to_main.csv", np.diag([2, 2, 1]) @ TO_UM, delimiter=",")
    mapped = stages.prepare_slide(
        cohort / "s0.h5ad", tmp_path / "mapped.zarr", settings=Settings(GIVEN), slide=store,
        he_image=cohort / "s0.tif", he_matrix=tmp_path / "to_main.csv",
    )  # fmt: skip
    np.testing.assert_allclose(FeatureFile.find(mapped).values, expected.values, atol=1e-5)


def test_mistakes(cohort, graphs, tmp_path):
    def code(function, *args, **kwargs) -> str:
        with pytest.raises(CellquiltError) as caught:
            function(*args, **kwargs)
        assert caught.value.hint
        assert not (tmp_path / "x").exists()
        return caught.value.code

    table, train = cohort / "s0.h5ad", Settings({**GIVEN, "domains": "train"})
    image = {"he_image": cohort / "s0.tif", "he_matrix": cohort / "s0.csv"}

    def prepare(**settings) -> str:
        return code(stages.prepare_slide, table, tmp_path / "x", settings=Settings({**GIVEN, **settings}), **image)

    assert prepare(domains_image_model="stains:absent") == "image-model-unknown"
    assert prepare(domains_image_model="nowhere:moments") == "image-model-unknown"
    assert prepare(domains_image_weights=str(table)) == "image-weights"
    assert code(stages.prepare_slide, table, tmp_path / "x", settings=train) == "domains-image-missing"
    far = tmp_path / "far.csv"
    np.savetxt(far, [[1, 0, 5000], [0, 1, 0], [0, 0, 1]], delimiter=",")
    given = {"he_image": cohort / "s0.tif", "he_matrix": far}
    assert code(stages.prepare_slide, table, tmp_path / "x", settings=train, **given) == "cells-outside-image"
    plain = stages.prepare_slide(table, tmp_path / "plain.zarr", settings=Settings(), sample="plain")
    assert code(stages.train_model, [*graphs, plain], tmp_path / "x", settings=train) == "images-differ"
    (tmp_path / "wide").mkdir()
    wide = prepared(cohort, tmp_path / "wide", domains_patch_um=30)
    assert code(stages.train_model, [graphs[0], wide[1]], tmp_path / "x", settings=train) == "image-pca-differs"
    model = stages.train_model(graphs, tmp_path / "model", settings=train)
    embed = {"settings": train, "weights": model}
    assert code(stages.embed_slide, wide[0], tmp_path / "x", **embed) == "image-pca-differs"
    assert code(stages.embed_slide, plain, tmp_path / "x", **embed) == "image-embeddings"
    (wide[0] / "image_features.npy").write_bytes(b"nothing")
    assert code(stages.embed_slide, wide[0], tmp_path / "x", **embed) == "graph-store-invalid"
    # A model that does not look at images takes slides that have one without it.
    blind = stages.train_model([plain], tmp_path / "blind", settings=Settings(domains="train"))
    stages.embed_slide(graphs[0], tmp_path / "blind.parquet", settings=Settings(), weights=blind)


def test_defaults_are_those_of_the_api():
    import inspect

    api = inspect.signature(image_embeddings).parameters
    for name in ("domains_patch_um", "domains_um_per_px", "domains_image_components", "domains_image_weights"):
        assert api[BY_NAME[name].api_name].default == BY_NAME[name].default, name
