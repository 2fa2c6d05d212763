"""Images read by bioio: planes, scenes and times as bioio gives them, lazily, and what is said where it is missing."""

import contextlib
import subprocess
import sys

import cellquilt as cq
import numpy as np
import pytest
import tifffile
from cellquilt.core.errors import CellquiltError
from cellquilt.core.images import open_image
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from machine_cases import assert_true_intensities, channels, convert, facts, fails, pixels, table_of_given_cells

pytest.importorskip("bioio")

TECHNOLOGY = "bioio"


def noise(shape, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 60_000, shape).astype(np.uint16)


@pytest.fixture(scope="module")
def movie(tmp_path_factory):
    """2 times, 3 channels, 4 planes."""
    path = tmp_path_factory.mktemp("bioio") / "movie.ome.tif"
    metadata = {
        "axes": "TCZYX", "PhysicalSizeX": 500.0, "PhysicalSizeXUnit": "nm", "PhysicalSizeY": 500.0,
        "PhysicalSizeYUnit": "nm", "Channel": {"Name": ["DAPI", "CD3", "DAPI"]},
    }  # fmt: skip
    tifffile.imwrite(path, noise((2, 3, 4, 90, 120)), ome=True, tile=(32, 32), metadata=metadata)
    return path


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, lambda movie: movie[0].max(1)),
        ({"z": "2", "bioio_timepoint": 1}, lambda movie: movie[1][:, 2]),
        ({"z": "middle"}, lambda movie: movie[0][:, 2]),
        ({"z": "mean"}, lambda movie: np.floor(movie[0].mean(1) + 0.5)),
    ],
)
def test_planes_and_times(movie, tmp_path, given, expected) -> None:
    store = convert(movie, TECHNOLOGY, tmp_path / "out.zarr", chunk_px=64, **given)
    np.testing.assert_array_equal(pixels(store), expected(noise((2, 3, 4, 90, 120))))
    assert channels(store) == ["DAPI", "CD3", "DAPI_2"]
    assert open_image(store.path).pixel_size_um == pytest.approx(0.5)


def test_pixels_agree_with_bioio_and_with_our_own_reader(movie, tmp_path) -> None:
    import bioio

    path = tmp_path / "still.ome.tif"
    metadata = {"axes": "CYX", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5, "Channel": {"Name": ["a", "b"]}}
    tifffile.imwrite(path, noise((2, 70, 90)), ome=True, metadata=metadata)
    one = convert(path, TECHNOLOGY, tmp_path / "a.zarr", chunk_px=64)
    other = convert(path, "ome_tif", tmp_path / "b.zarr", chunk_px=64)
    np.testing.assert_array_equal(pixels(one), pixels(other))
    np.testing.assert_array_equal(pixels(one), bioio.BioImage(path).get_image_data("CYX", T=0, Z=0))
    assert channels(one) == channels(other) == ["a", "b"]
    assert open_image(one.path).pixel_size_um == open_image(other.path).pixel_size_um


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Three images in a file; the first is of the glass slide."""
    path = tmp_path_factory.mktemp("bioio") / "scenes.ome.tif"
    with tifffile.TiffWriter(path, ome=True) as tiff:
        for seed, name in enumerate(["Label", "Lung α", "Liver"]):
            metadata = {"axes": "YX", "Name": name, "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}
            tiff.write(noise((40 + seed, 50), seed), metadata=metadata)
    return path


def test_scenes_by_name_and_number(scenes, tmp_path) -> None:
    import bioio

    names = bioio.BioImage(scenes).scenes
    for wish, seed in [
        ({}, 1),
        ({"bioio_scene": "2"}, 2),
        ({"bioio_scene": names[2]}, 2),
        ({"bioio_scene": "Liver"}, 2),
    ]:
        store = convert(scenes, TECHNOLOGY, tmp_path / "out.zarr", **wish)
        np.testing.assert_array_equal(pixels(store), noise((1, 40 + seed, 50), seed))
        assert facts(store)["scene"] == seed


def test_colours(tmp_path) -> None:
    rgb = np.random.default_rng(0).integers(0, 255, (50, 60, 3)).astype(np.uint8)
    tifffile.imwrite(tmp_path / "rgb.tif", rgb, photometric="rgb")
    store = convert(tmp_path / "rgb.tif", TECHNOLOGY, tmp_path / "out.zarr", pixel_size_um=1)
    assert channels(store) == ["r", "g", "b"]
    np.testing.assert_array_equal(pixels(store), rgb.transpose(2, 0, 1))


def test_given_cells_have_the_true_intensities(tmp_path) -> None:
    cq.simulate(tmp_path / "sim", width_px=256, pixel_size_um=0.8, seed=3, format="hyperion", proteins=("CD3", "CK18"))
    folder = tmp_path / "sim" / "slide_0"
    stack = np.stack([tifffile.imread(path).reshape(256, 256) for path in sorted(folder.glob("*.tiff"))])
    names = ["CD3", "CK18", "DNA1"]
    metadata = {"axes": "CYX", "PhysicalSizeX": 0.8, "PhysicalSizeY": 0.8, "Channel": {"Name": names}}
    tifffile.imwrite(tmp_path / "a.ome.tif", stack, ome=True, photometric="minisblack", metadata=metadata)
    found, _ = table_of_given_cells(tmp_path / "a.ome.tif", TECHNOLOGY, folder / "truth", tmp_path / "out")
    assert_true_intensities(found, folder / "truth")


def test_the_facade(movie) -> None:
    from spatialdata.models import get_channel_names

    assert get_channel_names(cq.io.bioio(movie, bioio_timepoint=1)["image"]) == ["DAPI", "CD3", "DAPI_2"]


def test_bioio_is_imported_only_when_it_is_used() -> None:
    code = (
        "import sys, cellquilt.readers.bioio as r; from cellquilt.readers import reader_of; "
        "assert reader_of('bioio') is r.READER; assert not {'bioio', 'dask', 'ome_types'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- what can be wrong


def _bytes(name, content):
    def write(folder):
        (folder / name).write_bytes(content)
        return folder / name

    return write


def _cut(folder):
    path = folder / "cut.ome.tif"
    tifffile.imwrite(path, noise((3, 200, 200)), ome=True, tile=(32, 32), compression="zlib")
    path.write_bytes(path.read_bytes()[:9000])
    return path


def _plain(folder):
    tifffile.imwrite(folder / "plain.tif", noise((20, 30)), metadata=None)
    return folder / "plain.tif"


def _large(folder):
    tifffile.imwrite(folder / "large.tif", np.zeros((40, 1100, 1100), np.uint16), compression="zlib")
    return folder / "large.tif"


PX = {"pixel_size_um": 1.0}
BAD = {
    "a format without a plug-in": (_bytes("a.czi", b"ZISRAWFILE" + bytes(99)), PX, "bioio-format", "a.czi"),
    "an empty file": (_bytes("a.tif", b""), PX, "bioio-format", "a.tif"),
    "no image": (_bytes("a.tif", b"some text"), PX, "bioio-format", "a.tif"),
    "a file cut short": (_cut, PX, "bioio-", "cut.ome.tif"),
    "no pixel size": (_plain, {}, "pixel-size-unknown", "plain.tif"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(tmp_path, case) -> None:
    make, given, code, text = BAD[case]
    error = fails(make(tmp_path), TECHNOLOGY, tmp_path / "out.zarr", **given)
    assert error.code.startswith(code)
    assert text in error.message
    assert str(tmp_path) not in error.message
    if code == "bioio-format":
        assert "cellquilt[bioio]" in error.hint


@pytest.mark.parametrize(
    ("given", "code", "text"),
    [
        ({"bioio_timepoint": 2}, "bioio-timepoint", "2 time points"),
        ({"z": "9"}, "z-plane-unknown", "0, 1, 2, 3"),
        ({"bioio_scene": "Kidney"}, "bioio-scene", "Kidney"),
        ({"bioio_scene": "7"}, "bioio-scene", '"7"'),
    ],
)
def test_wishes_that_cannot_be_met(movie, tmp_path, given, code, text) -> None:
    error = fails(movie, TECHNOLOGY, tmp_path / "out.zarr", **given)
    assert error.code == code
    assert text in error.message


def test_a_picture_of_the_glass_slide_is_refused(scenes, tmp_path) -> None:
    import bioio

    name = bioio.BioImage(scenes).scenes[0]
    assert fails(scenes, TECHNOLOGY, tmp_path / "out.zarr", bioio_scene=name).code == "bioio-scene"


def test_pieces_that_do_not_fit_in_memory_are_refused(tmp_path) -> None:
    error = fails(_large(tmp_path), TECHNOLOGY, tmp_path / "out.zarr", pixel_size_um=1, memory_mb=200)
    assert error.code == "bioio-piece-too-large"
    assert "97 MB" in error.message


def test_a_header_of_more_pixels_than_any_file_has(tmp_path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, noise((20, 30)), metadata=None, compression="zlib")
    with tifffile.TiffFile(path, mode="r+") as file:
        for tag in ("ImageWidth", "ImageLength"):
            file.pages[0].tags[tag].overwrite(2**31 - 1)
    assert fails(path, TECHNOLOGY, tmp_path / "out.zarr", pixel_size_um=1).code.startswith("bioio-")


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 700), garbage=st.binary(min_size=1, max_size=10))
def test_garbage_in_the_header_is_an_error_or_an_image(tmp_path, place, garbage) -> None:
    path = tmp_path / "fuzz.ome.tif"
    metadata = {"axes": "CYX", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}
    tifffile.imwrite(path, noise((2, 20, 30)), ome=True, metadata=metadata, compression="zlib")
    content = bytearray(path.read_bytes())
    content[place : place + len(garbage)] = garbage
    path.write_bytes(content)
    with contextlib.suppress(CellquiltError):
        convert(path, TECHNOLOGY, tmp_path / "out.zarr", pixel_size_um=1, memory_mb=256)


def test_without_the_package_it_says_how_to_install_it(movie, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "bioio", None)
    error = fails(movie, TECHNOLOGY, tmp_path / "out.zarr")
    assert error.code == "package-missing"
    assert "cellquilt[bioio]" in error.hint
