"""Embeddings of what images show around cells: where patches lie, that nothing else matters, and what they are for."""

import importlib.util
import logging
from dataclasses import replace
from functools import partial

import anndata
import cellquilt as cq
import numpy as np
import pytest
import torch
from cellquilt.core.errors import CellquiltError
from cellquilt.core.images import ImageWriter
from cellquilt.core.transforms import apply
from cellquilt.domains import ImagePca, Model, SlideImage, image_embeddings
from cellquilt.domains.factors.fit import _overlap
from cellquilt.domains.images.patches import Cut, patches
from cellquilt.domains.neighbourhoods import at
from cellquilt.domains.slides import SlideCells
from cellquilt.geometry.neighbours import neighbour_graph
from scipy.spatial import cKDTree
from sklearn.metrics import adjusted_rand_score

RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (3, 150, 200), dtype=np.uint8)


def cells(xy) -> anndata.AnnData:
    table = anndata.AnnData(np.ones((len(xy), 1), dtype=np.float32))
    table.obsm["spatial"] = np.asarray(xy, dtype=float)
    return table


def cut_out(image: SlideImage, xy, patch_um: float, um_per_px: float, memory_mb: float = 100, most: int = 7):
    """(n, channels, size, size) of all cells in order."""
    xy, cut = np.asarray(xy, dtype=float), Cut(patch_um, um_per_px)
    out = np.full((len(xy), image.shape[0], cut.size, cut.size), np.nan, dtype=np.float32)
    for rows, part in patches(image, xy, np.arange(len(xy)), cut, most, memory_mb):
        assert len(rows) <= most
        out[rows] = part
    assert np.isfinite(out).all()
    return out


def refused(code: str, function, *args, **kwargs) -> CellquiltError:
    with pytest.raises(CellquiltError) as caught:
        function(*args, **kwargs)
    assert caught.value.code == code, caught.value
    assert caught.value.hint or code == "options-invalid"
    return caught.value


def moments(x: torch.Tensor) -> torch.Tensor:
    """A callable: mean, deviation and roughness of each channel."""
    return torch.stack(
        [x.mean((2, 3)), x.std((2, 3)), (x[..., 1:] - x[..., :-1]).abs().mean((2, 3)),
         (x[..., 4:] - x[..., :-4]).abs().mean((2, 3))], dim=1
    ).flatten(1)  # fmt: skip


def turned(degrees: float, scale: float, x: float, y: float, flip: int = 1) -> np.ndarray:
    angle = np.deg2rad(degrees)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) * scale
    turn[:, 1] *= flip
    return np.vstack([np.column_stack([turn, [x, y]]), [0, 0, 1]])


def test_patches_are_the_pixels_themselves_where_they_match():
    image = SlideImage(NOISE, pixel_size_um=0.5)
    xy = np.array([[20.0, 30.0], [50.0, 10.0], [4.0, 4.0], [96.0, 70.0]])
    found = cut_out(image, xy, 8, 0.5) * 255
    for patch, (x, y) in zip(found, (xy * 2).astype(int), strict=True):
        np.testing.assert_allclose(patch, NOISE[:, y - 8 : y + 8, x - 8 : x + 8], atol=1e-4)


@pytest.mark.parametrize("px", [0.7, 1.0, 1.9, 3.3, 4.0, 8.8])
def test_patches_are_means_weighted_by_triangles(px):
    """By dense matrices: pixels of a patch are `px` pixels wide, and beyond four blocks are made first."""
    factor, picture = max(int(px / 2), 1), NOISE[:, :144, :192].astype(float)
    small = picture.reshape(3, 144 // factor, factor, 192 // factor, factor).mean(axis=(2, 4))
    xy, n, width = np.array([[80.3, 60.9], [2.0, 143.0]]), 9, px / factor
    padded = np.pad(small, ((0, 0), (99, 99), (99, 99)), mode="edge")
    for patch, (x, y) in zip(
        cut_out(SlideImage(NOISE[:, :144, :192], pixel_size_um=1), xy, 9 * px, px), xy, strict=True
    ):
        sides = []
        for place, length in ((y, padded.shape[1]), (x, padded.shape[2])):
            at = place / factor + (np.arange(n) - (n - 1) / 2) * width
            weight = np.maximum(0, 1 - np.abs(np.arange(length) - 99 + 0.5 - at[:, None]) / max(width, 1))
            sides.append(weight / weight.sum(axis=1, keepdims=True))
        np.testing.assert_allclose(patch * 255, sides[0] @ padded @ sides[1].T, atol=1e-3)


def test_beyond_the_border_its_pixels_are_repeated():
    padded = np.pad(NOISE, ((0, 0), (40, 40), (40, 40)), mode="edge")
    xy = np.array([[0.0, 0.0], [200.0, 150.0], [198.0, 3.0], [-10.0, 70.0], [215.0, 160.0], [30.0, -20.0]])
    found = cut_out(SlideImage(NOISE, pixel_size_um=1.0), xy, 16, 1.0) * 255
    for patch, (x, y) in zip(found, xy.astype(int) + 40, strict=True):
        np.testing.assert_allclose(patch, padded[:, y - 8 : y + 8, x - 8 : x + 8], atol=1e-4)


@pytest.mark.parametrize("um_per_px", [0.3, 1.0, 2.7], ids=["finer", "as it is", "coarser"])
@pytest.mark.parametrize(
    "um_to_px",
    [turned(0, 1.3, 5, 9), turned(90, 1, 300, 0), turned(33, 2.1, 180, 10), turned(-120, 1.7, 300, 300, flip=-1),
     np.array([[2.0, 0.3, 40], [0.1, 0.9, 60], [0, 0, 1]])],
    ids=["scaled", "quarter turn", "turned", "mirrored", "sheared"],
)  # fmt: skip
def test_pixels_are_where_the_map_says(um_to_px, um_per_px):
    """Of an image whose pixels hold their own place, patches hold the places of their pixels."""
    y, x = np.mgrid[:400, :420] + 0.5
    image = SlideImage(np.stack([x, y]).astype(np.float32), um_to_px=um_to_px)
    inside = np.random.default_rng(3).uniform(110, 290, (12, 2))
    xy = apply(np.linalg.inv(um_to_px), inside)
    found = cut_out(image, xy, 19, um_per_px)
    n = found.shape[-1]
    assert n == round(19 / um_per_px)
    offset = (np.arange(n) - (n - 1) / 2) * um_per_px
    places = xy[:, None, None] + np.stack(np.meshgrid(offset, offset), axis=-1)
    expected = apply(um_to_px, places.reshape(-1, 2)).reshape(len(xy), n, n, 2)
    # Triangles on a grid of pixels are off by up to 0.09 of them.
    np.testing.assert_allclose(found, np.moveaxis(expected, -1, 1), atol=0.1 if um_per_px < 2 else 0.2)


@pytest.mark.parametrize("degrees", [0, 30, 45])
def test_what_is_finer_than_pixels_leaves_no_pattern(degrees):
    board = (np.indices((300, 300)).sum(axis=0) % 2).astype(np.float32)[None]
    stripes = np.broadcast_to((np.arange(300) % 2).astype(np.float32), (1, 300, 300))
    middle = apply(np.linalg.inv(turned(degrees, 1, 150, 20)), np.array([[150.0, 150.0], [140.3, 151.2]]))
    for picture in (board, stripes):
        found = cut_out(SlideImage(picture, um_to_px=turned(degrees, 1, 150, 20)), middle, 60, 3.0)
        assert np.abs(found - 0.5).max() < 0.06  # thinned out without care it would be 0.5


def test_tiles_batches_and_the_order_of_cells_do_not_matter():
    xy = RNG.uniform(0, 100, (60, 2))
    image = SlideImage(NOISE, um_to_px=turned(20, 1.0, 40, 2))
    whole = cut_out(image, xy, 12, 1.0)
    assert np.array_equal(whole, cut_out(image, xy, 12, 1.0, memory_mb=0.03, most=64))
    order = RNG.permutation(60)
    assert np.array_equal(whole[order], cut_out(image, xy[order], 12, 1.0, memory_mb=0.05, most=3))
    found = []
    for batch_size, memory in ((1, 1), (7, 2), (500, 1500)):
        table = cells(xy)
        image_embeddings(table, image, moments, patch_um=12, n_components=6, batch_size=batch_size, memory_mb=memory)
        found.append(table.obsm["histo_embeddings"])
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], atol=2e-3)


def test_memory_is_that_of_a_window():
    class Watched:
        """An image of which only windows are there."""

        shape, dtype, most = (3, 40_000, 60_000), np.dtype(np.uint8), 0

        def __getitem__(self, place):
            y, x = place[1], place[2]
            size = 3 * (y.stop - y.start) * (x.stop - x.start)
            self.most = max(self.most, size)
            return np.full((3, y.stop - y.start, x.stop - x.start), 100, dtype=np.uint8)

    watched = Watched()
    xy = np.random.default_rng(0).uniform(0, 1, (40, 2)) * [60_000 * 0.25, 40_000 * 0.25]
    cut_out(SlideImage(watched, pixel_size_um=0.25), xy, 56, 0.5, memory_mb=8)
    assert 0 < watched.most < 8 * 2**20 / 2
    too_large = patches(SlideImage(watched, pixel_size_um=0.25), xy, np.arange(40), Cut(2000, 0.5), 8, 1)
    refused("memory-too-small", next, too_large)


def written(path, picture, chunk_px: int = 512):
    names = [f"c{k}" for k in range(len(picture))]
    transforms = {"microns": np.linalg.inv(turned(10, 4.0, 200, 300)), "global": np.eye(3)}
    with ImageWriter(path, picture.shape, picture.dtype, names, transforms, chunk_px=chunk_px) as writer:
        for y in range(0, picture.shape[1], chunk_px):
            for x in range(0, picture.shape[2], chunk_px):
                writer.write(np.ascontiguousarray(picture[:, y : y + chunk_px, x : x + chunk_px]), y, x)
    return path


def test_the_same_image_as_any_kind_of_array_or_element(tmp_path):
    import dask.array
    import zarr
    from spatialdata.models import Image2DModel
    from spatialdata.transformations import Affine, Identity

    smooth = cKDTree(RNG.uniform(0, 1500, (200, 2))).query(np.moveaxis(np.mgrid[:1501, :1333], 0, -1))[0]
    picture = np.stack([smooth * 2, smooth, 200 - smooth]).clip(0, 255).astype(np.uint8)
    um_to_px = turned(10, 4.0, 200, 300)
    xy = apply(np.linalg.inv(um_to_px), np.random.default_rng(1).uniform(100, 1200, (30, 2)))
    expected = cut_out(SlideImage(picture, um_to_px=um_to_px), xy, 30, 1.0)
    axes = ("x", "y")
    maps = {"microns": Affine(np.linalg.inv(um_to_px), axes, axes), "global": Identity()}
    stored = zarr.create_array(tmp_path / "a.zarr", shape=picture.shape, chunks=(1, 300, 300), dtype="uint8")
    stored[:] = picture
    lazy = dask.array.from_array(picture, chunks=(3, 200, 333))
    element = Image2DModel.parse(lazy, dims=("c", "y", "x"), transformations=maps)
    pyramid = Image2DModel.parse(lazy, dims=("c", "y", "x"), transformations=maps, scale_factors=[2, 2])
    for image in (stored, lazy):
        assert np.array_equal(cut_out(SlideImage(image, um_to_px=um_to_px[:2]), xy, 30, 1.0), expected)
    for image in (element, pyramid):
        np.testing.assert_allclose(cut_out(SlideImage(image), xy, 30, 1.0), expected, atol=1e-5)
    np.testing.assert_allclose(
        cut_out(SlideImage(pyramid, channels=[2, 0]), xy, 30, 1.0), expected[:, [2, 0]], atol=1e-5
    )
    folder = written(tmp_path / "images" / "he", picture)
    opened = SlideImage(str(folder))
    assert opened.level(4) == 1  # this image has two
    # Levels of the pyramid are rounded to whole numbers.
    np.testing.assert_allclose(cut_out(opened, xy, 30, 1.0), expected, atol=1.01 / 255)
    full = cut_out(SlideImage(folder, coordinate_system="global"), apply(um_to_px, xy), 40, 1.0)
    assert np.array_equal(full, cut_out(SlideImage(picture, pixel_size_um=1.0), apply(um_to_px, xy), 40, 1.0))
    assert "microns" in refused("image-alignment", SlideImage, element, coordinate_system="micron").hint


def test_components_are_those_of_all_slides_and_kept_for_others(tmp_path):
    first, second, third = (cells(RNG.uniform(15, 85, (n, 2))) for n in (40, 50, 30))
    images = [SlideImage(NOISE[:, :100, :100], pixel_size_um=1), SlideImage(NOISE[:, 50:, 90:], pixel_size_um=1)]
    given = {"patch_um": 8, "um_per_px": 1.0, "n_components": 5}
    pca = image_embeddings([first, second], images, moments, **given)
    together = np.vstack([first.obsm["histo_embeddings"], second.obsm["histo_embeddings"]])
    assert together.dtype == np.float32
    np.testing.assert_allclose(np.cov(together.T), np.eye(5), atol=1e-3)
    np.testing.assert_allclose(together.mean(axis=0), 0, atol=1e-4)
    # By numpy's own decomposition of the features themselves.
    features = np.vstack([
        moments(torch.from_numpy(cut_out(image, table.obsm["spatial"], 8, 1.0))).numpy()
        for image, table in zip(images, (first, second), strict=True)
    ]).astype(float)  # fmt: skip
    u, _, _ = np.linalg.svd(features - features.mean(axis=0), full_matrices=False)
    for k in range(5):
        assert abs(np.corrcoef(u[:, k], together[:, k])[0, 1]) == pytest.approx(1, abs=1e-4)
    saved = pca.save(tmp_path)
    assert saved.name == "image_pca.safetensors"
    again = ImagePca.load(tmp_path)
    assert pca.save(tmp_path / "b.safetensors").read_bytes() == saved.read_bytes()
    assert again.about == {"patch_um": 8.0, "um_per_px": 1.0, "mean": [0.0], "std": [1.0]}
    refused("output-exists", pca.save, tmp_path)
    copy = first.copy()
    del copy.obsm["histo_embeddings"]
    assert image_embeddings([copy, third], images, moments, pca=again, **given) is again
    np.testing.assert_allclose(copy.obsm["histo_embeddings"], first.obsm["histo_embeddings"], atol=1e-5)
    assert third.obsm["histo_embeddings"].shape == (30, 5)
    error = refused("image-pca-differs", image_embeddings, third, images[0], moments, pca=again, patch_um=20)
    assert "patch_um is 20.0" in error.message
    refused("image-pca-differs", image_embeddings, third, images[0], lambda x: x.mean((2, 3)), pca=again, **given)
    saved.write_bytes(b"nothing")
    refused("image-pca-invalid", ImagePca.load, tmp_path)
    refused("image-pca-invalid", ImagePca.load, tmp_path / "none.safetensors")


def test_components_of_a_sample(monkeypatch):
    """With more cells than the components are made of, all get embeddings, and most the same as ever."""
    table = cells(RNG.uniform(15, 85, (400, 2)))
    given = {"pixel_size_um": 1, "patch_um": 8, "um_per_px": 1.0, "n_components": 3}
    brighter = (NOISE * np.linspace(0.2, 1, 200)).astype(np.uint8)
    image_embeddings(table, brighter, moments, **given)
    whole = table.obsm["histo_embeddings"]
    monkeypatch.setattr("cellquilt.domains.images.embeddings._SAMPLE", 200)
    found = []
    for seed in (0, 0, 1):
        image_embeddings(table, brighter, moments, seed=seed, **given)
        found.append(table.obsm["histo_embeddings"])
        assert np.isfinite(found[-1]).all()
        assert np.corrcoef(found[-1][:, 0], whole[:, 0])[0, 1] > 0.99
    assert np.array_equal(found[0], found[1])
    assert not np.array_equal(found[0], found[2])


def test_slides_of_one_table_by_their_names():
    table = cells(RNG.uniform(15, 85, (80, 2)))
    table.obs["sample"] = np.where(np.arange(80) % 2, "b", "a")
    images = {"b": NOISE[:, 50:, 90:], "a": NOISE[:, :100, :100]}
    given = {"pixel_size_um": 1, "patch_um": 8, "um_per_px": 1.0, "n_components": 5}
    image_embeddings(table, images, moments, slide_key="sample", **given)
    parts = [table[::2].copy(), table[1::2].copy()]
    image_embeddings(parts, [images["a"], images["b"]], moments, **given)
    for start, part in enumerate(parts):
        np.testing.assert_allclose(table.obsm["histo_embeddings"][start::2], part.obsm["histo_embeddings"], atol=1e-4)
    assert (
        "images: b"
        in refused("images-differ", image_embeddings, table, {"b": NOISE}, moments, slide_key="sample", **given).hint
    )
    refused("images-differ", image_embeddings, table, images, moments, **given)
    refused("images-differ", image_embeddings, parts, [NOISE], moments, **given)
    refused("images-differ", image_embeddings, parts, NOISE, moments, **given)
    refused("images-differ", image_embeddings, parts, [NOISE, NOISE[:1]], moments, **given)
    assert "histo_embeddings" in table.obsm


def test_cells_outside(caplog):
    xy = RNG.uniform(10, 90, (100, 2))
    xy[:3] += 120
    table = cells(xy)
    image = partial(image_embeddings, table, model=moments, pixel_size_um=1, patch_um=8, um_per_px=1.0, n_components=3)
    with caplog.at_level(logging.WARNING, "cellquilt"):
        image(NOISE[:, :100, :100])
    assert "3 of 100 cells lie beside the image" in caplog.text
    assert np.isfinite(table.obsm["histo_embeddings"]).all()
    error = refused("cells-outside-image", image, NOISE[:, :50, :100])
    outside = int((xy[:, 1] >= 50).sum() + ((xy[:, 0] >= 100) & (xy[:, 1] < 50)).sum())
    assert f"{outside} of 100 cells lie outside the image" in error.message
    assert "100 × 50" in error.message


BAD_IMAGES = {
    "channels last": ({"image": NOISE.transpose(1, 2, 0)}, "image-invalid"),
    "two axes": ({"image": NOISE[0]}, "image-invalid"),
    "int64": ({"image": NOISE.astype(int)}, "image-invalid"),
    "no array": ({"image": {1, 2}}, "image-invalid"),
    "no such channel": ({"channels": [0, 3]}, "image-invalid"),
    "no place": ({"pixel_size_um": None}, "image-alignment"),
    "two places": ({"um_to_px": np.eye(3)}, "image-alignment"),
    "pixels of nothing": ({"pixel_size_um": 0}, "image-alignment"),
    "a line": ({"pixel_size_um": None, "um_to_px": np.ones((3, 3))}, "image-alignment"),
    "no map": ({"pixel_size_um": None, "um_to_px": np.eye(2)}, "image-alignment"),
    "no folder": ({"image": "nowhere/he"}, "image-unreadable"),
    "means of four": ({"mean": [0, 0, 0, 0]}, "image-normalisation"),
    "deviation of 0": ({"std": [1, 0, 1]}, "image-normalisation"),
    "no batch": ({"batch_size": 0}, "options-invalid"),
    "no patch": ({"patch_um": -1}, "options-invalid"),
    "no such device": ({"device": "abacus"}, "device-missing"),
    "no model": ({"model": 3}, "image-model-unknown"),
    "another library": ({"model": "keras/resnet50", "weights": __file__}, "image-model-unknown"),
    "no weights": ({"model": "resnet50"}, "image-weights"),
    "weights nowhere": ({"model": "resnet50", "weights": "nowhere.pt"}, "image-weights"),
    "weights of a callable": ({"weights": __file__}, "image-weights"),
    "a failing model": ({"model": torch.nn.Linear(3, 2)}, "image-model-failed"),
    "four axes out": ({"model": torch.nn.Identity()}, "image-model-failed"),
    "no numbers": ({"model": lambda x: x.mean((2, 3)) / 0 * 0}, "image-model-failed"),
    "always the same": ({"model": lambda x: torch.ones(len(x), 4)}, "image-constant"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_mistakes(name):
    changed, code = BAD_IMAGES[name]
    table = cells(RNG.uniform(10, 90, (20, 2)))
    given = {"image": NOISE, "model": moments, "pixel_size_um": 1.0, "patch_um": 8, **changed}
    image, model = given.pop("image"), given.pop("model")
    error = refused(code, image_embeddings, table, image, model, **given)
    assert "histo_embeddings" not in table.obsm
    assert error.message


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) for name in ("torchvision", "timm")), reason="torchvision or timm is here"
)
def test_names_need_a_package():
    table = cells(RNG.uniform(10, 90, (20, 2)))
    for name in ("resnet18", "timm/resnet18", "torchvision/resnet18"):
        error = refused("package-missing", image_embeddings, table, NOISE, name, weights=__file__, pixel_size_um=1)
        assert "timm" in error.message or "torchvision" in error.message


NETWORKS = {
    "torchvision/resnet18": 512,
    "torchvision/convnext_tiny": 768,
    "torchvision/mobilenet_v3_small": 1024,
    "timm/resnet18": 512,
    "timm/vit_tiny_patch16_224": 192,
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_networks_by_name(name, suffix, tmp_path):
    """The networks themselves, with weights drawn at random, and those of their classifiers left out."""
    library, bare = name.split("/")
    pytest.importorskip(library, reason=f"{library} is not installed here")
    from safetensors.torch import save_file

    torch.manual_seed(0)
    if library == "torchvision":
        import torchvision

        whole = torchvision.models.get_model(bare, weights=None)
    else:
        import timm

        whole = timm.create_model(bare, pretrained=False)
    path = tmp_path / f"weights{suffix}"
    (torch.save if suffix == ".pt" else save_file)(whole.state_dict(), path)
    table = cells(RNG.uniform(10, 90, (6, 2)))
    given = {"pixel_size_um": 1.0, "patch_um": 112.0, "n_components": 3, "batch_size": 4}
    pca = image_embeddings(table, NOISE, name, weights=path, **given)
    assert pca.mean.size == NETWORKS[name]
    assert pca.about["model"] == name
    assert len(pca.about["weights"]) == 64
    # The same features by the whole network with its last layer taken away by hand.
    mean, std = (torch.tensor(x).reshape(3, 1, 1) for x in (pca.about["mean"], pca.about["std"]))
    x = torch.from_numpy(cut_out(SlideImage(NOISE, pixel_size_um=1.0), table.obsm["spatial"], 112, 0.5))
    last = [path for path, module in whole.named_modules() if isinstance(module, torch.nn.Linear)][-1]
    whole.set_submodule(last, torch.nn.Identity())
    with torch.inference_mode():
        features = whole.eval()((x - mean) / std).numpy()
    np.testing.assert_allclose(pca.transform(features), table.obsm["histo_embeddings"], atol=5e-3)
    state = whole.state_dict()
    (torch.save if suffix == ".pt" else save_file)({k: state[k] for k in list(state)[1:]}, path)
    assert (
        "1 weights are missing"
        in refused("image-weights", image_embeddings, table, NOISE, name, weights=path, **given).message
    )
    path.write_bytes(b"nothing")
    refused("image-weights", image_embeddings, table, NOISE, name, weights=path, **given)
    near = refused("image-model-unknown", image_embeddings, table, NOISE, name[:-1] + "_", weights=path, **given)
    assert near.hint


def test_a_module_is_left_as_it_was():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = torch.nn.Dropout(0.5)

        def forward(self, x):
            return self.drop(moments(x))

    table, net = cells(RNG.uniform(10, 90, (20, 2))), Net().train()
    given = {"pixel_size_um": 1.0, "patch_um": 8, "n_components": 4}
    image_embeddings(table, NOISE, net, **given)
    assert net.training
    assert net.drop.training
    first = table.obsm["histo_embeddings"]
    image_embeddings(table, NOISE, net, **given)
    assert np.array_equal(first, table.obsm["histo_embeddings"])  # nothing is dropped


def test_how_much_patches_have_in_common():
    """By loops over pairs, and by whole matrices."""
    xy = RNG.uniform(0, 90, (120, 2))
    graph = neighbour_graph(xy, radius_um=40)
    slide = SlideCells("s", graph, np.zeros((120, 1)), ["g"], "counts", xy, [""] * 120, patch_um=25.0)
    apart = [at(graph, hops) for hops in (2, 3)]
    seen, left = _overlap(slide, apart)
    common = np.prod(np.maximum(0, 1 - np.abs(xy[:, None] - xy[None]) / 25), axis=2)
    pairs = [common[i, j] for hops in apart for i in range(120) for j in hops.indices[slice(*hops.indptr[i : i + 2])]]
    assert seen == pytest.approx(np.mean(pairs))
    near = (graph.to_csr().toarray() > 0) + np.eye(120)
    mean = np.linalg.matrix_power(near / near.sum(axis=1, keepdims=True), 2)
    assert left == pytest.approx(np.mean(((mean @ common) * mean).sum(axis=1) / (mean**2).sum(axis=1)))
    # Noise of patches, as the mean over a place keeps it.
    noise = np.linalg.cholesky(common + 1e-9 * np.eye(120)) @ np.random.default_rng(0).normal(size=(120, 20_000))
    kept = (mean @ noise).var(axis=1) / (mean**2).sum(axis=1)
    assert left == pytest.approx(kept.mean(), rel=0.02)
    assert _overlap(replace(slide, patch_um=None), apart) == (0.0, 1.0)
    assert _overlap(replace(slide, patch_um=1e-6), apart)[0] == 0


def stained(table: anndata.AnnData, seed: int) -> np.ndarray:
    """(3, h, w) uint8 at 1 µm a pixel: coarse grain in one of the two domains, fine grain in all others."""
    xy = table.obsm["spatial"]
    low = xy.min(axis=0) - 20
    table.obsm["spatial"] = xy - low
    height, width = np.ceil((xy - low).max(axis=0) + 20).astype(int)[::-1]
    rng = np.random.default_rng(seed)
    fine = rng.normal(size=(height, width))
    coarse = np.kron(rng.normal(size=(-(-height // 6), -(-width // 6))), np.ones((6, 6)))[:height, :width]
    place = np.stack(np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5), axis=-1)
    nearest = cKDTree(table.obsm["spatial"]).query(place.reshape(-1, 2))[1].reshape(height, width)
    is_coarse = (table.obs["domain_true"].astype(str) == "domain_3").to_numpy()[nearest]
    grain = np.where(is_coarse, coarse, fine) + 0.3 * rng.normal(size=(height, width))
    return (150 + 25 * grain[None] + np.array([30, 0, 20])[:, None, None]).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize(("patch_um", "least"), [(30, 0.6), (56, 0.6)])
def test_domains_of_the_same_expression_are_told_apart_by_the_image(patch_um, least):
    """Cells of one domain get the expression of another's; only the grain of the image still tells them apart.

    By patches that are nearly as wide as a layer, too: their overlap is known.
    """
    scores = []
    for seed in (1, 2):
        tables = cq.simulate.cell_tables(
            slides=2, n_cells=900, n_domains=5, thin_layers=0, rare_niches=0, batch_effect=0.2, seed=seed
        )
        rng, images = np.random.default_rng(0), []
        for number, table in enumerate(tables):
            domain = table.obs["domain_true"].astype(str).to_numpy()
            like, same = np.flatnonzero(domain == "domain_1"), np.flatnonzero(domain == "domain_3")
            counts = table.X.tolil()
            counts[same] = table.X[rng.choice(like, same.size)]
            table.X = counts.tocsr()
            images.append(stained(table, number))
        cq.spatial_neighbors(tables)
        truth = np.concatenate([table.obs["domain_true"].astype(str) for table in tables])
        pair = np.isin(truth, ["domain_1", "domain_3"])
        for with_image in (False, True):
            if with_image:
                image_embeddings(tables, images, moments, pixel_size_um=1, um_per_px=1, patch_um=patch_um)
            model = Model.train(tables, n_domains=5)
            model.compute_representations(tables)
            model.assign_domains(tables, n_domains=5)
            found = np.concatenate([table.obs["domain"].astype(str) for table in tables])
            scores.append([adjusted_rand_score(truth, found), adjusted_rand_score(truth[pair], found[pair])])
    without, with_it = np.array(scores[::2]), np.array(scores[1::2])
    print(f"\nall domains and the two alone: without {without.round(3).tolist()}, with {with_it.round(3).tolist()}")
    assert without[:, 1].max() < 0.1
    assert with_it[:, 1].min() > least
    assert (with_it[:, 0] - without[:, 0]).min() > 0.1
