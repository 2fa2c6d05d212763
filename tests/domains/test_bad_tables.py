"""Mistakes in cell tables and models, each named with what was expected."""

import json
import shutil
from pathlib import Path

import anndata
import cellquilt as cq
import numpy as np
import pandas as pd
import pytest
from cellquilt.core.errors import CellquiltError

DATA = Path(__file__).with_name("data") / "small"
GENES = json.loads((DATA / "config.json").read_text())["var_names"]


def table(n: int = 60, graph: bool = True, **changed) -> anndata.AnnData:
    rng = np.random.default_rng(0)
    genes = changed.get("genes", GENES)
    counts = changed.get("x", rng.poisson(2, (n, len(genes))).astype(np.float32))
    out = anndata.AnnData(counts, var=pd.DataFrame(index=list(genes)))
    out.obsm["spatial"] = changed.get("xy", rng.uniform(0, 100, (n, 2)))
    if graph:
        cq.spatial_neighbors(out)
    return out


def with_value(value: float) -> np.ndarray:
    x = np.random.default_rng(0).poisson(2, (60, len(GENES))).astype(np.float32)
    x[3, 4] = value
    return x


GRAPHS = {
    "no coordinates": (lambda t: t.obsm.pop("spatial"), {}, "coordinates-missing"),
    "three dimensions": (lambda t: t.obsm.update(spatial=np.zeros((60, 3))), {}, "coordinates-invalid"),
    "NaN": (lambda t: t.obsm.update(spatial=np.full((60, 2), np.nan)), {}, "coordinates-invalid"),
    "pixels": (lambda t: t.obsm.update(spatial=t.obsm["spatial"] * 100), {"radius": None}, "coordinates-not-um"),
    "metres": (lambda t: t.obsm.update(spatial=t.obsm["spatial"] / 1000), {}, "coordinates-not-um"),
    "radius too small": (lambda t: None, {"radius": 0.01}, "coordinates-not-um"),
    "negative radius": (lambda t: None, {"radius": -5}, "radius-invalid"),
    "scale of zero": (lambda t: None, {"scale_to_um": 0}, "radius-invalid"),
    "unknown slide key": (lambda t: None, {"slide_key": "slide"}, "slide-key-unknown"),
    "unknown mode": (lambda t: None, {"mode": "delaunai"}, "graph-mode-unknown"),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_graphs(name):
    change, given, code = GRAPHS[name]
    bad = table(graph=False)
    change(bad)
    with pytest.raises(CellquiltError) as caught:
        cq.spatial_neighbors(bad, **given)
    assert caught.value.code == code
    assert "spatial_distances" not in bad.obsp


TABLES = {
    "no graph": ({"graph": False}, {}, "graph-missing"),
    "other genes": ({"genes": [f"x{k}" for k in range(40)]}, {}, "genes-unknown"),
    "few genes": ({"genes": GENES[:12]}, {}, "genes-unknown"),
    "a gene twice": ({"genes": [*GENES[:-1], GENES[0].upper()]}, {}, "genes-twice"),
    "NaN": ({"x": with_value(np.nan)}, {}, "expression-not-finite"),
    "negative": ({"x": with_value(-1)}, {}, "expression-negative"),
    "neither counts nor logarithms": ({"x": with_value(300.5)}, {}, "expression-unknown"),
    "no cells for prototypes": (
        {"n": 6, "xy": np.arange(12.0).reshape(6, 2) * 5},
        {"zero_shot": True},
        "too-few-cells",
    ),
    "an image for a model without": ({"image": True}, {}, "image-embeddings"),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables(name):
    changed, given, code = TABLES[name]
    bad = table(**changed)
    if changed.get("image"):
        bad.obsm["histo_embeddings"] = np.zeros((60, 6), np.float32)
    model = cq.domains.Model.from_pretrained(DATA)
    with pytest.raises(CellquiltError) as caught:
        model.compute_representations(bad, **given)
    assert caught.value.code == code
    assert "niche_latent" not in bad.obsm or given.get("zero_shot")


def _edit(folder: Path, **values) -> None:
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps(config))


MODELS = {
    "no folder": (shutil.rmtree, "model-missing"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "model-missing"),
    "cut weights": (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 100), "model-invalid"),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), "model-invalid"),
    "a list": (lambda folder: (folder / "config.json").write_text("[]"), "model-invalid"),
    "sizes missing": (lambda folder: _edit(folder, heads=None), "model-invalid"),
    "another size": (lambda folder: _edit(folder, hidden_size=64), "model-invalid"),
    "more layers": (lambda folder: _edit(folder, num_layers=5), "model-invalid"),
    "fewer genes": (lambda folder: _edit(folder, var_names=GENES[:-1]), "model-invalid"),
    "a gene twice": (lambda folder: _edit(folder, var_names=[*GENES[:-1], GENES[0]]), "genes-twice"),
}


@pytest.mark.parametrize("name", MODELS)
def test_models(tmp_path, name):
    damage, code = MODELS[name]
    shutil.copytree(DATA, tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(CellquiltError) as caught:
        cq.domains.Model.from_pretrained(tmp_path / "model")
    assert caught.value.code == code
    assert caught.value.hint


def test_levels_and_numbers_that_there_are_not():
    found = table()
    model = cq.domains.Model.from_pretrained(DATA)
    with pytest.raises(CellquiltError, match="domain_leaf"):
        model.assign_domains(found)
    model.compute_representations(found)
    for given, code in (
        ({"level": 0}, "level-unknown"),
        ({"level": 33}, "level-unknown"),
        ({"n_domains": 40}, "n-domains-impossible"),
    ):
        with pytest.raises(CellquiltError) as caught:
            model.assign_domains(found, **given)
        assert caught.value.code == code
    assert "domain" not in found.obs


def test_cells_without_neighbours_have_no_domain():
    xy = np.random.default_rng(0).uniform(0, 100, (60, 2))
    xy[7] = 5000
    found = table(xy=xy)
    model = cq.domains.Model.from_pretrained(DATA)
    model.compute_representations(found)
    model.assign_domains(found)
    assert not found.obsm["niche_latent"][7].any()
    assert found.obs["domain"].isna().tolist() == [k == 7 for k in range(60)]
