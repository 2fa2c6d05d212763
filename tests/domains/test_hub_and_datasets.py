"""Models and slides by name: folders, catalogues, and a model hub's cache where huggingface_hub is installed."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import anndata
import cellquilt as cq
import numpy as np
import pandas as pd
import pytest
from cellquilt.core.errors import CellquiltError
from cellquilt.domains.checkpoint import checksum, shipped_model
from cellquilt.domains.datasets import load_dataset
from cellquilt.domains.hub import fetch_model, model_folder

DATA = Path(__file__).with_name("data") / "small"
HAS_HUB = importlib.util.find_spec("huggingface_hub") is not None
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SLIDES = pd.DataFrame(
    {
        "name": ["brain_1", "lung_1", "007", "brain_2"],
        "species": ["human", "human", "mouse", "human"],
        "tissue": ["brain", "lung", "brain", "brain"],
        "technology": ["xenium", "merscope", "xenium", "cosmx"],
        "n_cells": [3, 4, 5, 6],
    }
)


def refused(code: str, function, *args, **kwargs) -> CellquiltError:
    with pytest.raises(CellquiltError) as caught:
        function(*args, **kwargs)
    assert caught.value.code == code, caught.value
    return caught.value


@pytest.fixture
def catalogue(tmp_path) -> Path:
    return write_catalogue(tmp_path / "catalogue")


def write_catalogue(folder: Path) -> Path:
    folder.mkdir(parents=True)
    SLIDES.to_csv(folder / "metadata.csv", index=False)
    for row in SLIDES.itertuples():
        path = folder / row.species / row.tissue / f"{row.name}.h5ad"
        path.parent.mkdir(parents=True, exist_ok=True)
        genes = pd.DataFrame(index=["A", "B"])
        anndata.AnnData(np.full((row.n_cells, 2), row.n_cells, dtype=np.float32), var=genes).write_h5ad(path)
    return folder


def test_a_model_is_a_folder_or_the_one_that_comes_with_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert model_folder("default") == shipped_model()
    assert model_folder(str(DATA)) == DATA
    assert cq.domains.Model.from_pretrained("default").encoder.recipe == "factors"
    shutil.copytree(DATA, tmp_path / "owner" / "name")  # a folder of such a name is the folder
    assert model_folder("owner/name") == Path("owner/name")
    assert len(cq.domains.Model.from_pretrained("owner/name").vocabulary) == len(
        cq.domains.Model.from_pretrained(DATA).vocabulary
    )


@pytest.mark.parametrize("name", ["no/such/folder", "./owner/name", "/owner", "model", "-x/name"])
def test_folders_that_are_not_there(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    error = refused("model-missing", cq.domains.Model.from_pretrained, name)
    assert str(Path(name)) in error.message
    assert "owner/name on a hub" in error.hint
    refused("model-missing", cq.domains.Model.from_pretrained, Path("owner/name"))


def test_a_name_that_is_nearly_that_of_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(DATA, "models/small")
    assert 'did you mean "small"?' in refused("model-missing", model_folder, "./models/smal").hint
    if not HAS_HUB:
        assert 'did you mean "small"?' in refused("package-missing", model_folder, "models/smal").hint


def test_models_are_put_into_folders(tmp_path):
    """By the command, byte by byte; what stands there is kept."""
    command = [sys.executable, "-m", "cellquilt", "domains", "fetch", "default", "--output", "mine"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert checksum(shipped_model()) in done.stderr
    assert checksum(tmp_path / "mine") == checksum(shipped_model())
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == ["config.json", "model.safetensors"]
    refused("output-exists", fetch_model, "default", tmp_path / "mine")
    fetch_model(str(DATA), tmp_path / "mine", overwrite=True)
    assert checksum(tmp_path / "mine") == checksum(DATA)
    refused("model-missing", fetch_model, "./nowhere", tmp_path / "x")
    (tmp_path / "empty").mkdir()
    assert "no config.json" in refused("model-missing", fetch_model, str(tmp_path / "empty"), tmp_path / "x").message
    if not HAS_HUB:
        refused("package-missing", fetch_model, "owner/name", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_only_a_hub_has_revisions():
    assert "main" in refused("revision-unused", cq.domains.Model.from_pretrained, str(DATA), revision="main").message
    refused("revision-unused", load_dataset, path=str(DATA), revision="main")


@pytest.mark.skipif(HAS_HUB, reason="huggingface_hub is installed")
def test_a_hub_needs_its_package():
    error = refused("package-missing", cq.domains.Model.from_pretrained, "owner/name")
    assert "huggingface_hub" in error.message
    assert "folder" in error.hint
    assert "dataset" in refused("package-missing", load_dataset).message


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ({}, ["brain_1", "lung_1", "007", "brain_2"]),
        ({"tissue": "brain"}, ["brain_1", "007", "brain_2"]),
        ({"tissue": ["lung", "brain"], "species": "human"}, ["brain_1", "lung_1", "brain_2"]),
        ({"technology": "xenium", "top_k": 1}, ["brain_1"]),
        ({"pattern": "brain_.*"}, ["brain_1", "brain_2"]),
        ({"pattern": "rain"}, None),
        ({"pattern": "007"}, ["007"]),
    ],
)
def test_slides_are_chosen_in_the_order_of_the_catalogue(catalogue, given, names):
    if names is None:
        refused("dataset-empty", load_dataset, path=catalogue, **given)
        return
    rows = load_dataset(path=catalogue, dry_run=True, **given)
    assert rows.index.tolist() == names
    assert rows["species"].tolist() == [SLIDES.set_index("name").loc[name, "species"] for name in names]
    tables = load_dataset(path=str(catalogue), **given)
    for table, name in zip(tables, names, strict=True):
        n = SLIDES.set_index("name").loc[name, "n_cells"]
        assert table.obs["sample"].tolist() == [name] * n
        assert table.X.tolist() == [[n, n]] * n


def test_mistakes_of_a_catalogue(catalogue, tmp_path):
    error = refused("dataset-value-unknown", load_dataset, path=catalogue, tissue="brian")
    assert error.hint == 'did you mean "brain"?'
    assert "human" in refused("dataset-value-unknown", load_dataset, path=catalogue, species="zebrafish").hint
    empty = refused("dataset-empty", load_dataset, path=catalogue, species="mouse", technology="cosmx")
    assert "none of 4 slides has species mouse and technology cosmx" in empty.message
    refused("pattern-invalid", load_dataset, path=catalogue, pattern="(")
    refused("top-k-invalid", load_dataset, path=catalogue, top_k=0)
    refused("catalogue-missing", load_dataset, path=tmp_path / "nowhere")
    (tmp_path / "other").mkdir()
    assert "metadata.csv" in refused("catalogue-missing", load_dataset, path=tmp_path / "other").message
    (catalogue / "human" / "lung" / "lung_1.h5ad").rename(catalogue / "human" / "lung" / "lung1.h5ad")
    assert "lung1.h5ad" in refused("table-missing", load_dataset, path=catalogue).hint
    (catalogue / "human" / "lung" / "lung_1.h5ad").write_bytes(b"no table")
    assert "lung_1.h5ad" in refused("table-unreadable", load_dataset, path=catalogue).message
    assert len(load_dataset(path=catalogue, tissue="brain")) == 3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "no CSV"),
        (b"\xff\xfe\x00name", "no CSV"),
        (b'name,species\n"a', "no CSV"),
        (b"name,species,tissue\na,human,lung\n", "no column technology"),
        (b"species,tissue,technology\nhuman,lung,xenium\n", "no column species"),
        (b"name,species,tissue,technology\na,human,,xenium\n", "row 2: nan is no tissue"),
        (b"name,species,tissue,technology\na,human,lung,x\n../../b,human,lung,x\n", "row 3: '../../b' is no name"),
        (b"name,species,tissue,technology\na,..,lung,x\n", "row 2: '..' is no species"),
        (b"name,species,tissue,technology\na,human,lung,x\na,human,brain,x\n", 'slide "a" twice'),
    ],
)
def test_bad_catalogues(tmp_path, text, said):
    (tmp_path / "metadata.csv").write_bytes(text)
    assert said in refused("catalogue-invalid", load_dataset, path=tmp_path, dry_run=True).message


def test_a_catalogue_of_no_slides(tmp_path):
    (tmp_path / "metadata.csv").write_text("name,species,tissue,technology\n")
    assert "no slides" in refused("dataset-empty", load_dataset, path=tmp_path).message


def in_cache(home: Path, kind: str, owner: str, name: str) -> Path:
    """An empty snapshot as huggingface_hub keeps it."""
    place = home / "hub" / f"{kind}s--{owner}--{name}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(COMMIT)
    return place / "snapshots" / COMMIT


@pytest.mark.skipif(not HAS_HUB, reason="huggingface_hub is not installed here")
def test_models_and_slides_of_a_hub_offline(tmp_path):
    """In a process of its own: the package reads where its cache lies, and that it is offline, when it is imported."""
    home = tmp_path / "home"
    shutil.copytree(DATA, in_cache(home, "model", "owner", "whole"))
    half = in_cache(home, "model", "owner", "half")
    half.mkdir(parents=True)
    shutil.copy(DATA / "config.json", half)
    write_catalogue(in_cache(home, "dataset", "prism-oncology", "novae"))
    code = re.sub(r"^    ", "", _OFFLINE, flags=re.MULTILINE)
    environment = {**os.environ, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        str(len(cq.domains.Model.from_pretrained(DATA).vocabulary)), "same", "hub-unreachable", "model.safetensors",
        "hub-unreachable", "hub-unreachable", "hub-file-missing", "brain_1,007,brain_2", "4", "hub-unreachable",
        "True", "config.json,model.safetensors", "False", "hub-unreachable", "False",
    ]  # fmt: skip


_OFFLINE = f"""
    from cellquilt.core.errors import CellquiltError
    from cellquilt.domains import Model, load_dataset
    from pathlib import Path
    from cellquilt.domains.checkpoint import checksum
    from cellquilt.domains.hub import Hub, fetch_model, model_folder

    def code(function, *args, **kwargs):
        try:
            function(*args, **kwargs)
        except CellquiltError as error:
            return error
    print(len(Model.from_pretrained("owner/whole").vocabulary))
    print("same" if model_folder("owner/whole", "{COMMIT}") == model_folder("owner/whole", "main") else "other")
    error = code(Model.from_pretrained, "owner/half")
    print(error.code, error.message.split()[0])
    print(code(Model.from_pretrained, "owner/other").code)
    print(code(Model.from_pretrained, "owner/whole", revision="v9").code)
    print(code(Hub("owner/whole..x", "model").file, "config.json").code)
    print(",".join(load_dataset(tissue="brain", dry_run=True).index))
    print(load_dataset(pattern="lung")[0].n_obs)
    print(code(load_dataset, path="owner/other").code)
    fetched = fetch_model("owner/whole", Path("fetched"))
    print(checksum(fetched) == checksum(model_folder("owner/whole")))
    files = sorted(fetched.iterdir())
    print(",".join(path.name for path in files), any(path.is_symlink() for path in files))
    print(code(fetch_model, "owner/half", Path("half")).code, Path("half").exists())
"""
