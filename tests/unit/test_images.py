"""Images: what is written is what spatialdata, and we, read; the pyramid lies where it should; memory is bounded."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from cellquilt.core.errors import CellquiltError
from cellquilt.core.images import Image, ImageWriter, level_shapes, open_image
from cellquilt.core.store import new_store
from cellquilt.core.transforms import identity
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

MICRONS = np.array([[0.1, 0.0, 5.0], [0.0, 0.1, -3.0], [0.0, 0.0, 1.0]])


def write(element: Path, pixels: np.ndarray, *, chunk_px: int = 64, channels=None, transforms=None, **options) -> Image:
    names = channels or [f"channel{c}" for c in range(len(pixels))]
    maps = transforms or {"global": identity(), "microns": MICRONS}
    with ImageWriter(element, pixels.shape, pixels.dtype, names, maps, chunk_px=chunk_px, **options) as writer:
        for y in range(0, pixels.shape[1], chunk_px):
            writer.write(pixels[:, y : y + chunk_px], y, 0)
    return Image(element)


def noise(shape, dtype=np.uint16, seed=0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    values = rng.normal(300, 40, shape) if np.dtype(dtype).kind == "f" else rng.poisson(90, shape)
    return values.astype(dtype)


def halved(pixels: np.ndarray) -> np.ndarray:
    """The pyramid's rule, spelled out: the mean of the pixels there are, halves up."""
    height, width = pixels.shape
    out = np.empty((-(-height // 2), -(-width // 2)), pixels.dtype)
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            block = pixels[2 * i : 2 * i + 2, 2 * j : 2 * j + 2].astype(np.float64)
            out[i, j] = block.mean() if pixels.dtype.kind == "f" else int(np.floor(block.mean() + 0.5))
    return out


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    height=st.integers(1, 150),
    width=st.integers(1, 150),
    dtype=st.sampled_from(["uint8", "uint16", "uint32", "float32"]),
    chunk=st.sampled_from([16, 48, 64]),
    data=st.data(),
)
def test_every_window_reads_back(tmp_path_factory, height, width, dtype, chunk, data) -> None:
    pixels = noise((2, height, width), dtype, seed=height * width)
    image = write(tmp_path_factory.mktemp("im") / "im", pixels, chunk_px=chunk)
    y0, x0 = data.draw(st.integers(0, height)), data.draw(st.integers(0, width))
    y1, x1 = data.draw(st.integers(y0, height + 9)), data.draw(st.integers(x0, width + 9))
    np.testing.assert_array_equal(image.read(y0, y1, x0, x1), pixels[:, y0:y1, x0:x1])
    np.testing.assert_array_equal(image.read(y0, y1, x0, x1, channels=["channel1"]), pixels[1:, y0:y1, x0:x1])


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "float32"])
def test_the_pyramid_is_the_mean_of_two_by_two(tmp_path, monkeypatch, dtype) -> None:
    monkeypatch.setattr("cellquilt.core.images.SMALLEST_LEVEL_PX", 16)
    pixels = noise((2, 133, 70), dtype)
    pixels[0, :40, :40] = np.iinfo(dtype).max if pixels.dtype.kind == "u" else 1e30  # sums must not overflow
    image = write(tmp_path / "im", pixels, chunk_px=32)
    assert [image.level_shape(k) for k in range(image.n_levels)] == [
        (2, 133, 70), (2, 67, 35), (2, 34, 18), (2, 17, 9), (2, 9, 5)
    ]  # fmt: skip
    expected = list(pixels)
    for level in range(1, image.n_levels):
        expected = [halved(plane) for plane in expected]
        np.testing.assert_array_equal(image.read(0, 200, 0, 200, level=level), np.stack(expected))


def test_a_shape_lies_on_the_same_pixels_at_each_level(tmp_path) -> None:
    import spatialdata

    pixels = np.zeros((1, 4096, 2048), np.uint16)
    y0, y1, x0, x1 = 1024, 1536, 256, 512
    pixels[0, y0:y1, x0:x1] = 1000
    with new_store(tmp_path / "s.zarr", sample="s") as store:
        write(store.new_element("images", "image"), pixels, chunk_px=512)
    image = open_image(tmp_path / "s.zarr")
    tree = spatialdata.read_zarr(tmp_path / "s.zarr").images["image"]
    assert list(tree) == ["scale0", "scale1", "scale2"]
    for level in range(3):
        factor = 2**level
        bright = np.argwhere(image.read(0, 4096, 0, 4096, level=level)[0] == 1000)
        box = [*(bright.min(0) * factor), *((bright.max(0) + 1) * factor)]
        assert box == [y0, x0, y1, x1]
        # spatialdata's own coordinates of those pixels: centres of squares that fill the same box.
        plane = tree[f"scale{level}"].ds["image"][0]
        rows = plane.y.to_numpy()[(plane.to_numpy() == 1000).any(1)]
        columns = plane.x.to_numpy()[(plane.to_numpy() == 1000).any(0)]
        half = factor / 2
        assert [rows[0] - half, columns[0] - half, rows[-1] + half, columns[-1] + half] == box
    datasets = json.loads((image.element / "zarr.json").read_text())["attributes"]["ome"]["multiscales"][0]["datasets"]
    for level, dataset in enumerate(datasets):
        (_, sy, sx), (_, ty, tx) = (m[m["type"]] for m in dataset["coordinateTransformations"])
        # OME-Zarr: the centre of pixel 0 of a level, in pixels of the image counted from its first centre.
        assert (sy, sx) == (2**level, 2**level)
        assert (ty + 0.5, tx + 0.5) == (2**level / 2, 2**level / 2)


def test_odd_sizes_stay_within_one_pixel_of_the_level_in_spatialdata(tmp_path) -> None:
    import spatialdata

    with new_store(tmp_path / "s.zarr", sample="s") as store:
        write(store.new_element("images", "image"), noise((1, 2051, 2999)), chunk_px=512)
    tree = spatialdata.read_zarr(tmp_path / "s.zarr").images["image"]
    for level in range(1, 3):
        centres = tree[f"scale{level}"].ds["image"].x.to_numpy()
        exact = (np.arange(len(centres)) + 0.5) * 2**level
        assert np.abs(centres - exact).max() < 2**level


def test_spatialdata_reads_pixels_extent_transforms_and_channels(tmp_path) -> None:
    import spatialdata
    from spatialdata.transformations import get_transformation

    pixels = noise((3, 1100, 700))
    pixels[:, 512:, :256] = 0  # chunks without a file
    with new_store(tmp_path / "s.zarr", sample="s") as store:
        write(store.new_element("images", "morphology"), pixels, chunk_px=256, channels=["DAPI", "Poly T", "µ"])
    sdata = spatialdata.read_zarr(tmp_path / "s.zarr")
    tree = sdata.images["morphology"]
    full = tree["scale0"].ds["image"]
    np.testing.assert_array_equal(full.to_numpy(), pixels)
    assert full.c.to_numpy().tolist() == ["DAPI", "Poly T", "µ"]
    extent = spatialdata.get_extent(sdata, coordinate_system="microns")
    assert extent["x"] == pytest.approx((5.0, 75.0))
    assert extent["y"] == pytest.approx((-3.0, 107.0))
    assert spatialdata.get_extent(sdata, coordinate_system="global")["y"] == (0, 1100)
    matrix = get_transformation(tree, "microns").to_affine_matrix(("x", "y"), ("x", "y"))
    np.testing.assert_allclose(matrix, MICRONS)
    assert not (store_chunk := tmp_path / "s.zarr/images/morphology/s0/c/0/3/0").exists(), store_chunk


@pytest.mark.slow
def test_spatialdata_plot_renders_it(tmp_path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import spatialdata
    import spatialdata_plot  # noqa: F401

    pixels = np.zeros((1, 1200, 1200), np.uint16)
    pixels[0, 600:, :] = 1000  # the lower half is bright
    with new_store(tmp_path / "s.zarr", sample="s") as store:
        write(store.new_element("images", "image"), pixels, chunk_px=512, channels=["DAPI"])
    figure, axes = plt.subplots(figsize=(3, 3), dpi=100)
    sdata = spatialdata.read_zarr(tmp_path / "s.zarr")
    sdata.pl.render_images("image", channel="DAPI", cmap="gray").pl.show(
        ax=axes, coordinate_systems="global", colorbar=False
    )
    figure.canvas.draw()
    shown = np.asarray(figure.canvas.buffer_rgba())[..., :3].mean(-1)
    for y, x, low, high in [(300, 600, 0, 20), (590, 300, 0, 20), (610, 900, 235, 255), (1100, 100, 235, 255)]:
        column, row = axes.transData.transform((x, y)).astype(int)
        assert low <= shown[shown.shape[0] - 1 - row, column] <= high, (y, x)
    plt.close(figure)


def test_images_written_by_spatialdata_are_read(tmp_path) -> None:
    import spatialdata
    from spatialdata.models import Image2DModel
    from spatialdata.transformations import Identity, Scale

    pixels = noise((2, 90, 130))
    element = Image2DModel.parse(
        pixels,
        dims=("c", "y", "x"),
        c_coords=["a", "b"],
        transformations={"global": Identity(), "microns": Scale([0.5, 0.5], axes=("x", "y"))},
        scale_factors=[2],
    )
    spatialdata.SpatialData(images={"im": element}).write(tmp_path / "s.zarr")
    image = open_image(tmp_path / "s.zarr")
    np.testing.assert_array_equal(image.read(10, 90, 20, 77, channels=["b", 0]), pixels[::-1, 10:90, 20:77])
    assert (image.channels, image.n_levels, image.pixel_size_um) == (["a", "b"], 2, 0.5)


def test_properties_windows_and_names(tmp_path) -> None:
    image = write(tmp_path / "im", noise((2, 150, 100)), channels=["DAPI", "PolyT"])
    assert (image.shape, image.dtype, image.chunk_px) == ((2, 150, 100), np.uint16, 64)
    assert image.pixel_size_um == pytest.approx(0.1)
    np.testing.assert_allclose(image.transforms["microns"], MICRONS)
    assert list(image.windows(100)) == [(0, 100, 0, 100), (100, 150, 0, 100)]
    covered = np.zeros((150, 100), int)
    for y0, y1, x0, x1 in image.windows(64):
        covered[y0:y1, x0:x1] += 1
    assert (covered == 1).all()
    with pytest.raises(CellquiltError, match="DAPI, PolyT") as caught:
        image.read(0, 1, 0, 1, channels=["dapi"])
    assert caught.value.code == "channel-unknown"
    assert 'did you mean "DAPI"' in CellquiltError.__str__(caught.value) or "known" in caught.value.hint
    with pytest.raises(CellquiltError) as caught:
        image.read(0, 1, 0, 1, channels=[2])
    assert caught.value.code == "channel-unknown"


@pytest.mark.parametrize("window", [(-1, 5, 0, 5), (0, 5, -1, 5), (151, 160, 0, 5), (0, 5, 101, 110), (5, 4, 0, 5)])
def test_windows_outside_are_an_error(tmp_path, window) -> None:
    image = write(tmp_path / "im", noise((1, 150, 100)))
    with pytest.raises(CellquiltError, match="150 rows and 100 columns") as caught:
        image.read(*window)
    assert caught.value.code == "window-outside-image"


def test_a_level_that_is_not_there(tmp_path) -> None:
    image = write(tmp_path / "im", noise((1, 50, 50)))
    with pytest.raises(CellquiltError) as caught:
        image.read(0, 1, 0, 1, level=1)
    assert caught.value.code == "level-unknown"


def test_a_damaged_chunk_and_a_damaged_image(tmp_path) -> None:
    image = write(tmp_path / "im", noise((1, 100, 100)))
    chunk = tmp_path / "im/s0/c/0/1/1"
    chunk.write_bytes(chunk.read_bytes()[:-20])
    with pytest.raises(CellquiltError) as caught:
        image.read(0, 100, 0, 100)
    assert caught.value.code == "image-damaged"
    np.testing.assert_array_equal(image.read(0, 64, 0, 64), noise((1, 100, 100))[:, :64, :64])
    (tmp_path / "im/s0/zarr.json").write_text("{")
    with pytest.raises(CellquiltError) as caught:
        Image(tmp_path / "im")
    assert caught.value.code == "image-unreadable"


def test_open_image_names_what_is_there(tmp_path) -> None:
    with new_store(tmp_path / "s.zarr", sample="s") as store:
        with pytest.raises(CellquiltError) as caught:
            open_image(store.path)
        assert caught.value.code == "image-missing"
        for name in ("morphology", "he"):
            write(store.new_element("images", name), noise((1, 20, 20)))
        with pytest.raises(CellquiltError, match="he, morphology") as caught:
            open_image(store.path)
        assert caught.value.code == "image-ambiguous"
        with pytest.raises(CellquiltError) as caught:
            open_image(store.path, "morfology")
        assert caught.value.code == "image-missing"
        assert caught.value.hint == 'did you mean "morphology"?'
        assert open_image(store.path, "he").shape == (1, 20, 20)


def test_wrong_blocks_are_refused(tmp_path) -> None:
    writer = ImageWriter(tmp_path / "im", (2, 100, 100), np.uint16, ["a", "b"], {"global": identity()}, chunk_px=64)
    block = np.zeros((2, 64, 64), np.uint16)
    for y0, x0, wrong in [(1, 0, block), (64, 0, block), (0, 0, block[:, :63]), (0, 0, block.astype(np.uint8))]:
        with pytest.raises(ValueError, match=r"grid|block is"):
            writer.write(wrong, y0, x0)
    with pytest.raises(ValueError, match="grid"):
        writer.write(block[0], 0, 0, channel=2)
    wrong = [((1, 5, 5), "int64", ["a"]), ((2, 5, 5), "uint8", ["a", "a"]), ((1, 0, 5), "uint8", ["a"])]
    for shape, dtype, names in wrong:
        with pytest.raises(ValueError, match=r"images are|distinct|no pixels"):
            ImageWriter(tmp_path / "other", shape, dtype, names, {})


def test_a_failed_write_has_no_metadata(tmp_path) -> None:
    def fail() -> None:
        with ImageWriter(tmp_path / "im", (1, 9, 9), "uint8", ["a"], {}, threads=2) as writer:
            writer.write(np.ones((1, 9, 9), np.uint8), 0, 0)
            raise RuntimeError("reader")

    with pytest.raises(RuntimeError, match="reader"):
        fail()
    assert not (tmp_path / "im/zarr.json").exists()


@pytest.mark.parametrize("threads", [1, 2])
def test_an_error_of_the_disk_reaches_the_caller(tmp_path, monkeypatch, threads) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(CellquiltError) as caught, new_store(tmp_path / "s.zarr", sample="s") as store:
        write(store.new_element("images", "image"), noise((1, 300, 300)), threads=threads)
    assert caught.value.code == "disk-full"
    assert list(tmp_path.iterdir()) == []


def test_same_bytes_with_any_number_of_threads_and_order(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("cellquilt.core.images.SMALLEST_LEVEL_PX", 64)
    pixels = noise((2, 300, 200))
    write(tmp_path / "one", pixels)
    maps = {"global": identity(), "microns": MICRONS}
    names = ["channel0", "channel1"]
    with ImageWriter(tmp_path / "two", pixels.shape, "uint16", names, maps, chunk_px=64, threads=3) as writer:
        for channel in (1, 0):
            for y in reversed(range(0, 300, 64)):
                for x in (64, 0):
                    block = pixels[channel, y : y + 64, x : 200 if x else 64].copy()
                    writer.write(block, y, x, channel)
                    block[:] = 0  # it is the caller's again
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert files == sorted(p.relative_to(tmp_path / "two") for p in (tmp_path / "two").rglob("*") if p.is_file())
    assert sum(path.parts[1] == "c" for path in files if len(path.parts) > 2) == 2 * (20 + 6 + 2 + 1)
    for path in files:
        one = (tmp_path / "one" / path).read_bytes().replace(b"/images/one", b"")
        assert one == (tmp_path / "two" / path).read_bytes().replace(b"/images/two", b""), path


def test_reading_from_several_threads(tmp_path) -> None:
    pixels = noise((2, 400, 400))
    image = write(tmp_path / "im", pixels)

    def check(window: tuple[int, int, int, int]) -> bool:
        y0, y1, x0, x1 = window
        return bool((image.read(*window) == pixels[:, y0:y1, x0:x1]).all())

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(check, list(image.windows(37))))


@pytest.mark.parametrize("name", ["DAPI", "Cellbound2"])
def test_real_mosaics_take_less_space_than_spatialdatas_default(shared_data, tmp_path, monkeypatch, name) -> None:
    import tifffile
    from numcodecs import Zstd

    monkeypatch.setattr("cellquilt.core.images.SMALLEST_LEVEL_PX", 440)
    pixels = tifffile.imread(shared_data / "merscope_dapi880" / f"mosaic_{name}_z3.tif")[None]
    image = write(tmp_path / "im", pixels, chunk_px=2048)
    assert image.n_levels == 2
    for level in range(2):
        ours = (tmp_path / f"im/s{level}/c/0/0/0").stat().st_size
        assert ours < 0.95 * len(Zstd(level=0).encode(image.read(0, 880, 0, 880, level=level)))


def test_level_shapes_round_up_and_stop() -> None:
    assert level_shapes(1024, 5) == [(1024, 5)]
    assert level_shapes(4097, 2000) == [(4097, 2000), (2049, 1000), (1025, 500), (513, 250)]


_MEMORY = """
import sys
import numpy as np
from pathlib import Path
from cellquilt.core.record import peak_rss_mb
from cellquilt.core.images import ImageWriter, Image
height, width = int(sys.argv[1]), int(sys.argv[2])
block = np.random.default_rng(0).poisson(90, (512, 512)).astype(np.uint16)
with ImageWriter(sys.argv[3], (1, height, width), "uint16", ["a"], {}, chunk_px=512) as writer:
    for y in range(0, height, 512):
        for x in range(0, width, 512):
            writer.write(block, y, x, 0)
assert Image(sys.argv[3]).read(0, 512, 0, 512)[0, 7, 7] == block[7, 7]
print(peak_rss_mb())
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_image(tmp_path) -> None:
    def peak(height: int, width: int) -> float:
        arguments = [sys.executable, "-c", _MEMORY, str(height), str(width), str(tmp_path / f"{height}_{width}")]
        return float(subprocess.run(arguments, check=True, capture_output=True, text=True).stdout)

    small, large = peak(1024, 1024), peak(4096, 16384)  # 2 MB and 134 MB of pixels
    assert large - small < 15
