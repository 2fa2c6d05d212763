"""The stages from cell tables to domains: the same as the model in memory, whatever the order and kind of the files."""

import hashlib
import json
import shutil
from pathlib import Path

import anndata
import cellquilt as cq
import cellquilt.simulate
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import spatialdata
from cellquilt.core.errors import CellquiltError
from cellquilt.core.settings import BY_NAME, Settings
from cellquilt.domains import stages
from cellquilt.domains.checkpoint import checksum
from cellquilt.domains.published.expression import _variable
from cellquilt.domains.published.training import TrainingOptions, _Training
from cellquilt.domains.results import read_cells
from cellquilt.domains.slides import Slides, read_slide
from sklearn.metrics import adjusted_rand_score

NAMES = ("a", "b", "c")


def tables() -> list[anndata.AnnData]:
    """Three slides of two panels; one cell of the first is alone."""
    made = cq.simulate.cell_tables(3, 500, panels=2, n_domains=5, thin_layers=0, rare_niches=0, seed=4)
    made[0].obsm["spatial"][7] += 5000.0
    made[1].uns["kept"] = {"as": "it was"}
    return made


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Path:
    """The slides as an .h5ad file, a .zarr folder, and a SpatialData store."""
    folder = tmp_path_factory.mktemp("cohort")
    a, b, c = tables()
    a.write_h5ad(folder / "a.h5ad")
    b.write_zarr(folder / "b.zarr")
    spatialdata.SpatialData(tables={"cells": c}).write(folder / "c.zarr")
    return folder


def files(folder: Path) -> list[Path]:
    return [folder / name for name in ("a.h5ad", "b.zarr", "c.zarr")]


def bytes_of(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def prepared(cohort: Path, folder: Path, **settings) -> list[Path]:
    return [
        stages.prepare_slide(path, folder / f"{name}.graph.zarr", settings=Settings(settings), sample=name)
        for name, path in zip(NAMES, files(cohort), strict=True)
    ]


def run(graphs: list[Path], folder: Path, model: Path | None = None, start: Path | None = None, **settings) -> Path:
    """Train (unless there is a model), embed and assign."""
    chosen = Settings(settings)
    if model is None:
        model = stages.train_model(graphs, folder / "model", settings=chosen, weights=start)
    latents = [
        stages.embed_slide(graph, folder / f"{number}.parquet", settings=chosen, weights=model)
        for number, graph in enumerate(graphs)
    ]
    return stages.assign_domains(latents, folder / "domains", settings=chosen, weights=model)


@pytest.fixture(scope="module")
def graphs(cohort, tmp_path_factory) -> list[Path]:
    before = bytes_of(cohort)
    made = prepared(cohort, tmp_path_factory.mktemp("graphs"))
    assert bytes_of(cohort) == before
    return made


@pytest.fixture(scope="module")
def trained(graphs, tmp_path_factory) -> Path:
    return run(graphs, tmp_path_factory.mktemp("trained"), domains="train", domains_n=5)


def texts(column: pd.Series) -> list[str]:
    """Names, of cells without one an empty one."""
    return column.astype(object).fillna("").tolist()


def assert_as_in_memory(folder: Path, expected: list[anndata.AnnData]) -> None:
    for name, table in zip(NAMES, expected, strict=True):
        found = pd.read_parquet(folder / f"{name}.domains.parquet")
        assert found["cell_id"].tolist() == table.obs_names.tolist()
        assert (
            found["domain"].astype(object).fillna("").tolist() == table.obs["domain"].astype(object).fillna("").tolist()
        )
        leaves = table.obs["domain_leaf"].astype(object).fillna("").tolist()
        assert found["domain_leaf"].astype(object).fillna("").tolist() == leaves
        latents = np.stack(found["niche_latent"].to_list())
        assert np.array_equal(np.nan_to_num(latents), table.obsm["niche_latent"])
        for column in ("domain_confidence", "domain_stability"):
            assert np.array_equal(found[column], table.obs[column], equal_nan=True), column
        probable = np.stack(found["domain_probabilities"].to_list())
        assert np.array_equal(probable, table.obsm["domain_probabilities"], equal_nan=True)


def in_memory(start=None, zero_shot=False, **assigned) -> list[anndata.AnnData]:
    made = tables()
    cq.spatial_neighbors(made)
    n = assigned.get("n_domains")
    model = start if zero_shot else cq.domains.Model.train(made, start=start, n_domains=n)
    model.compute_representations(made, zero_shot=zero_shot, n_domains=n)
    model.assign_domains(made, **assigned)
    model.domain_confidence(made)
    return made


def test_training_is_that_of_the_model_in_memory(trained):
    expected = in_memory(n_domains=5)
    assert_as_in_memory(trained, expected)
    assert pd.isna(expected[0].obs["domain"].iloc[7])
    truth = pd.concat([table.obs for table in expected]).dropna(subset="domain")
    assert adjusted_rand_score(truth["domain_true"], truth["domain"]) > 0.5


def test_what_is_said_of_the_run(trained):
    about = json.loads((trained / "domains.json").read_text())
    assert (about["mode"], about["recipe"], about["level_asked"], about["seed"]) == ("train", "factors", 7, 0)
    assert about["model_sha256"] == about["start_sha256"] == checksum(trained / "model")
    assert about["n_cells_without_domain"] == {"a": 1, "b": 0, "c": 0}
    assert len(about["domains"]) == 5
    for name in NAMES:
        found = read_cells(trained / f"{name}.domains.parquet")
        assert found.counts == about["n_cells"][name]
        assert sum(found.counts.values()) + about["n_cells_without_domain"][name] == 500
        assert found.about["model_sha256"] == about["model_sha256"]
    assert str(trained) not in (trained / "domains.json").read_text()


def test_order_and_names_of_files_do_not_matter(graphs, trained, tmp_path):
    moved = []
    for number, graph in enumerate(graphs[::-1]):
        moved.append(tmp_path / f"slide_{number}.zarr")
        shutil.copytree(graph, moved[-1])
    assert bytes_of(run(moved, tmp_path, domains="train", domains_n=5)) == bytes_of(trained)
    other = run(moved, tmp_path / "seed", domains="train", domains_n=5, domains_seed=1)
    assert bytes_of(other) != bytes_of(trained)


def test_zero_shot_makes_prototypes_of_all_slides(graphs, trained, tmp_path):
    start = cq.domains.Model.from_pretrained(trained / "model")
    found = run(graphs, tmp_path, model=trained / "model", domains="zeroshot", domains_n=4)
    assert_as_in_memory(found, in_memory(start, zero_shot=True, n_domains=4))
    own = cq.domains.Model.from_pretrained(found / "model")
    about = json.loads((found / "domains.json").read_text())
    assert (about["model_sha256"], about["start_sha256"]) == (checksum(found / "model"), checksum(trained / "model"))
    assert not np.array_equal(own.prototypes, cq.domains.Model.from_pretrained(trained / "model").prototypes)


def test_finetuning_goes_on_from_a_model(graphs, trained, tmp_path):
    old = cq.domains.Model.from_pretrained(trained / "model")
    found = run(graphs[:1], tmp_path, start=trained / "model", domains="finetune")
    new = cq.domains.Model.from_pretrained(found / "model")
    assert new.vocabulary.names == old.vocabulary.names
    assert not np.array_equal(new.prototypes, old.prototypes)


def test_how_many_domains(graphs, trained, tmp_path):
    model = trained / "model"
    latents = [
        stages.embed_slide(graph, tmp_path / f"{graph.name}.parquet", settings=Settings(), weights=model)
        for graph in graphs
    ]

    def about(name: str, **settings) -> dict:
        chosen = Settings({"domains": "train", **settings})
        folder = stages.assign_domains(latents, tmp_path / name, settings=chosen, weights=model)
        return json.loads((folder / "domains.json").read_text())

    n = len(cq.domains.Model.from_pretrained(model).prototypes)
    three = about("three", domains_level=3)
    assert (len(three["domains"]), three["level_used"]) == (3, 3)
    many = about("many", domains_level=1000)
    assert (many["level_asked"], many["level_used"]) == (1000, n)
    # So many probabilities of each cell would be no result.
    judged = [read_cells(tmp_path / name / "a.domains.parquet").confidence is not None for name in ("three", "many")]
    assert judged == [True, len(many["domains"]) <= 64]
    leiden = about("leiden", domains_resolution=1.0)
    assert leiden["level_used"] is None
    assert all(name.startswith("L") for name in leiden["domains"])
    with pytest.raises(CellquiltError, match="no level has 1000 domains"):
        about("impossible", domains_n=1000)
    assert not (tmp_path / "impossible").exists()


def test_copies_have_the_domains_and_all_that_was_there(cohort, graphs, trained, tmp_path):
    before = bytes_of(cohort)
    for name, path, graph, table in zip(NAMES, files(cohort), graphs, tables(), strict=True):
        copy = stages.annotate_table(
            path, tmp_path / path.name, domains=trained / f"{name}.domains.parquet", graph=graph, sample=name,
            metadata={"donor": "d 1", "condition": "x"},
        )  # fmt: skip
        if name == "c":
            found = spatialdata.read_zarr(copy).tables["cells"]
        else:
            found = anndata.read_h5ad(copy) if name == "a" else anndata.read_zarr(copy)
        cells = read_cells(trained / f"{name}.domains.parquet")
        expected = np.array([*cells.names, ""], dtype=object)[cells.domain]
        assert texts(found.obs["domain"]) == expected.tolist()
        assert np.array_equal(found.obsm["niche_latent"], np.nan_to_num(cells.latents))
        assert np.array_equal(found.obs["domain_confidence"], cells.confidence.own, equal_nan=True)
        assert np.array_equal(found.obs["domain_stability"], cells.confidence.stability, equal_nan=True)
        assert list(found.obsm["domain_probabilities"].columns) == cells.names
        assert np.array_equal(found.obsm["domain_probabilities"], cells.confidence.probabilities, equal_nan=True)
        assert (found.X != table.X).nnz == 0
        assert found.uns.get("kept") == table.uns.get("kept")
        assert found.obs["sample"].unique().tolist() == [name]
        assert found.obs["table_sample"].tolist() == table.obs["sample"].tolist()
        assert found.obs["condition"].tolist() == table.obs["condition"].tolist()
        assert (found.obs["sheet_condition"] == "x").all()
        assert (found.obs["donor"] == "d 1").all()
        assert found.obsp["spatial_distances"].nnz == read_slide(graph).graph.indices.size
        assert found.uns["spatial_neighbors"]["radius_um"] == 80
        cq.domains.analysis.architecture(found)
    assert bytes_of(cohort) == before


def test_tables_in_another_unit(cohort, graphs, tmp_path):
    pixels = anndata.read_h5ad(cohort / "a.h5ad")
    pixels.obsm["spatial"] = pixels.obsm["spatial"] / 0.25
    pixels.write_h5ad(tmp_path / "a.h5ad")
    settings = Settings(domains_scale_to_um=0.25)
    scaled = read_slide(stages.prepare_slide(tmp_path / "a.h5ad", tmp_path / "a.zarr", settings=settings))
    assert np.allclose(scaled.xy_um, read_slide(graphs[0]).xy_um)
    assert np.array_equal(scaled.graph.indices, read_slide(graphs[0]).graph.indices)


def marked(n_cells: int = 60, channels: int = 12) -> anndata.AnnData:
    """Cells of an image without genes."""
    rng = np.random.default_rng(0)
    table = anndata.AnnData(obs=pd.DataFrame(index=[f"c{k}" for k in range(n_cells)]))
    table.obsm["spatial"] = rng.uniform(0, 80, (n_cells, 2))
    names = [f"m{k}" for k in range(channels)]
    table.obsm["intensities"] = pd.DataFrame(rng.gamma(2, 100, (n_cells, channels)), table.obs_names, names)
    return table


def test_an_image_of_many_channels_is_enough(tmp_path):
    marked().write_h5ad(tmp_path / "x.h5ad")
    slide = read_slide(stages.prepare_slide(tmp_path / "x.h5ad", tmp_path / "x.zarr", settings=Settings()))
    assert (slide.kind, slide.genes, len(slide)) == ("protein", [f"m{k}" for k in range(12)], 60)


def twice(table: anndata.AnnData) -> anndata.AnnData:
    table.obs_names = ["same", *table.obs_names[1:-1], "same"]
    return table


def empty() -> anndata.AnnData:
    """Counts in a layer, and nothing in X."""
    table = tables()[0]
    table.layers["counts"], table.X = table.X, None
    return table


def far(table: anndata.AnnData) -> anndata.AnnData:
    table.obsm["spatial"] *= 1000
    return table


REFUSED = {
    "one channel": (marked(channels=1), "genes-missing", True),
    "no cells": (marked(0), "too-few-cells", True),
    "two cells": (marked(2), "too-few-cells", True),
    "a cell twice": (twice(marked()), "cells-twice", False),
    "nothing in X": (empty(), "expression-missing", False),
    "another unit": (far(marked()), "coordinates-not-um", False),
}


@pytest.mark.parametrize("name", REFUSED)
def test_slides_in_which_there_is_nothing_to_find(name, tmp_path):
    table, code, is_nobodys_mistake = REFUSED[name]
    table.write_h5ad(tmp_path / "x.h5ad")
    with pytest.raises(CellquiltError) as caught:
        stages.prepare_slide(tmp_path / "x.h5ad", tmp_path / "x.zarr", settings=Settings())
    assert caught.value.code == code
    assert not caught.value.message.startswith("table")
    if is_nobodys_mistake:
        why = stages.prepare_slide(
            tmp_path / "x.h5ad", tmp_path / "x.zarr", settings=Settings(), sample="s", refusal=tmp_path / "why.json"
        )
        said = json.loads(why.read_text())
        assert (said["sample"], said["code"], said["stage"]) == ("s", code, "DOMAINS_PREPARE")
    assert not (tmp_path / "x.zarr").exists()


def test_mistakes_of_the_cohort_are_named(graphs, trained, tmp_path):
    settings = Settings(domains="train")
    one = stages.embed_slide(graphs[0], tmp_path / "one.parquet", settings=settings, weights=trained / "model")
    other = run(graphs[:2], tmp_path / "other", domains="train")

    def code(*latents: Path, weights: Path = trained / "model") -> str:
        with pytest.raises(CellquiltError) as caught:
            stages.assign_domains(latents, tmp_path / "x", settings=settings, weights=weights)
        assert not (tmp_path / "x").exists()
        return caught.value.code

    assert code(one, weights=other / "model") == "latents-of-another-model"
    shutil.copyfile(one, tmp_path / "again.parquet")
    assert code(one, tmp_path / "again.parquet") == "slide-twice"
    (tmp_path / "cut.parquet").write_bytes(one.read_bytes()[:200])
    assert code(one, tmp_path / "cut.parquet") == "latents-invalid"
    pq.write_table(pq.read_table(one).replace_schema_metadata({}), tmp_path / "bare.parquet")
    assert code(one, tmp_path / "bare.parquet") == "latents-invalid"
    with pytest.raises(CellquiltError, match='slide "a" is there twice'):
        stages.train_model([graphs[0], graphs[0]], tmp_path / "model", settings=settings)
    table = tables()[1]
    table.write_h5ad(tmp_path / "b.h5ad")
    with pytest.raises(CellquiltError, match="the domains are of"):
        stages.annotate_table(tmp_path / "b.h5ad", tmp_path / "copy.h5ad", domains=trained / "a.domains.parquet")
    assert not (tmp_path / "copy.h5ad").exists()


def test_defaults_are_those_of_the_api():
    import inspect

    def of(function) -> dict:
        return {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}

    model = cq.domains.Model
    homes = {
        **dict.fromkeys(("domains_radius", "domains_graph", "domains_scale_to_um"), of(cq.spatial_neighbors)),
        **dict.fromkeys(("domains_recipe", "domains_n", "domains_seed"), of(model.train)),
        **dict.fromkeys(("domains_level", "domains_n", "domains_resolution"), of(model.assign_domains)),
    }
    for name, parameters in homes.items():
        assert parameters[BY_NAME[name].api_name] == BY_NAME[name].default, name


def test_a_checkpoint_of_novae(tmp_path):
    """Of one panel that is small enough to be used whole, the same as in memory."""
    weights = Path(__file__).with_name("data") / "small"
    genes = json.loads((weights / "config.json").read_text())["var_names"]
    rng = np.random.default_rng(1)
    made, graphs = [], []
    for name in ("a", "b"):
        table = anndata.AnnData(rng.poisson(2, (150, len(genes))).astype(np.float32), var=pd.DataFrame(index=genes))
        table.obs_names = [f"{name}{k}" for k in range(150)]
        table.obsm["spatial"] = rng.uniform(0, 150, (150, 2))
        table.write_h5ad(tmp_path / f"{name}.h5ad")
        made.append(table)
        graph = tmp_path / f"{name}.graph.zarr"
        graphs.append(stages.prepare_slide(tmp_path / f"{name}.h5ad", graph, settings=Settings()))
    found = run(graphs, tmp_path, model=weights, domains="zeroshot", domains_level=5)
    cq.spatial_neighbors(made)
    model = cq.domains.Model.from_pretrained(weights)
    model.compute_representations(made, zero_shot=True)
    model.assign_domains(made, level=5)
    for name, table in zip(("a", "b"), made, strict=True):
        cells = pd.read_parquet(found / f"{name}.domains.parquet")
        assert texts(cells["domain"]) == texts(table.obs["domain"])
        assert texts(cells["domain_leaf"]) == texts(table.obs["domain_leaf"])
    about = json.loads((found / "domains.json").read_text())
    assert (about["mode"], about["recipe"], about["level_used"]) == ("zeroshot", "published", 5)


def test_published_training_chooses_the_genes_of_the_cohort(tmp_path):
    """As in memory, and so that no slide's latents depend on which others are embedded beside it."""
    made = cq.simulate.cell_tables(slides=2, n_cells=150, n_genes=130, panels=1, seed=8)
    paths = []
    for number, table in enumerate(made):
        paths.append(tmp_path / f"s{number}.h5ad")
        table.write_h5ad(paths[-1])
    graphs = [stages.prepare_slide(path, tmp_path / f"{path.stem}.graph.zarr", settings=Settings()) for path in paths]
    given = {"domains": "train", "domains_recipe": "published", "domains_max_epochs": 1}
    found = run(graphs, tmp_path / "run", **given)
    cq.spatial_neighbors(made)
    model = cq.domains.Model.train(made, recipe="published", max_epochs=1)
    model.compute_representations(made)
    model.assign_domains(made)
    model.domain_confidence(made)
    own = [sorted(_variable([slide])) for slide in Slides.of_stores(graphs)]
    assert model.vocabulary.names == sorted(_variable(Slides.of_stores(graphs)))
    assert 0 < len(model.vocabulary) < 130
    assert model.vocabulary.names not in own
    for name, table in zip(("s0", "s1"), made, strict=True):
        cells = read_cells(found / f"{name}.domains.parquet")
        assert np.array_equal(np.nan_to_num(cells.latents), table.obsm["niche_latent"])
        assert texts(table.obs["domain"]) == np.array([*cells.names, ""], dtype=object)[cells.domain].tolist()
        assert np.array_equal(cells.confidence.stability, table.obs["domain_stability"], equal_nan=True)
    alone = made[0].copy()
    loaded = cq.domains.Model.from_pretrained(found / "model")
    loaded.compute_representations(alone)
    assert np.array_equal(alone.obsm["niche_latent"], made[0].obsm["niche_latent"])


@pytest.fixture
def small_network(monkeypatch):
    """The published recipe with a network that trains in seconds."""
    small = {"embedding_size": 16, "hidden_size": 16, "heads": 2, "num_layers": 2, "output_size": 8,
             "num_prototypes": 24, "batch_size": 64}  # fmt: skip
    usual = TrainingOptions.of
    monkeypatch.setattr(TrainingOptions, "of", lambda **given: usual(**{**small, **given}))


def test_a_training_that_was_killed_goes_on_where_it_was(graphs, tmp_path, small_network, monkeypatch, caplog):
    given = {"domains": "train", "domains_recipe": "published", "domains_max_epochs": 3}
    kept = Settings({**given, "domains_checkpoints": str(tmp_path / "kept")})
    whole = stages.train_model(graphs, tmp_path / "whole", settings=Settings(given))
    epoch = _Training._epoch

    def killed(self, number):
        if number == 2:
            raise MemoryError
        return epoch(self, number)

    with monkeypatch.context() as patched:
        patched.setattr(_Training, "_epoch", killed)
        with pytest.raises(MemoryError):
            stages.train_model(graphs, tmp_path / "first" / "model", settings=kept)
    (state,) = (tmp_path / "kept").iterdir()
    # Another training, of other slides or another seed, begins anew beside it.
    other = Settings({**kept.given, "domains_seed": 1})
    stages.train_model(graphs[:2], tmp_path / "other", settings=other)
    assert list((tmp_path / "kept").iterdir()) == [state]
    # The task is tried again in another folder, its files under other names and in another order.
    moved = []
    for number, graph in enumerate(graphs[::-1]):
        moved.append(tmp_path / "second" / f"{number}.zarr")
        shutil.copytree(graph, moved[-1])
    with caplog.at_level("INFO"):
        found = stages.train_model(moved, tmp_path / "second" / "model", settings=kept)
    assert "going on after epoch 2" in caplog.text
    assert bytes_of(found) == bytes_of(whole)
    assert list((tmp_path / "kept").iterdir()) == []


def test_several_processes_train_as_in_memory(graphs, tmp_path, small_network):
    given = {"domains": "train", "domains_recipe": "published", "domains_max_epochs": 1, "domains_processes": 2}
    found = stages.train_model(graphs[:1], tmp_path / "model", settings=Settings(given))
    model = cq.domains.Model.train(Slides.of_stores(graphs[:1]), recipe="published", max_epochs=1, processes=2)
    assert bytes_of(found) == bytes_of(model.save_pretrained(tmp_path / "in_memory"))
