"""Aligned images: lazily read, and where their matrix says."""

from contextlib import ExitStack

import numpy as np
import pytest
import tifffile
from cellquilt.core.errors import CellquiltError
from cellquilt.core.transforms import GLOBAL, MICRONS, apply
from cellquilt.readers.he_image import open_he_image, read_matrix

PIXELS = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
MATRIX = np.array([[0.0, -2.0, 300.0], [2.0, 0.0, 12.5], [0.0, 0.0, 1.0]])
MAIN_TO_UM = np.diag([0.25, 0.25, 1.0])


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "he.ome.tif"
    tifffile.imwrite(
        path, PIXELS, photometric="rgb", tile=(32, 32), compression="zlib",
        metadata={"PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5, "axes": "YXS"},
    )  # fmt: skip
    return path


@pytest.fixture
def resources():
    with ExitStack() as stack:
        yield stack


@pytest.mark.parametrize("separator", [",", ", ", ";", "\t", " "])
def test_matrices_of_any_separator(separator, tmp_path):
    path = tmp_path / "matrix.csv"
    path.write_text("\ufeff" + "\r\n".join(separator.join(map(repr, row)) for row in MATRIX.tolist()) + "\r\n\r\n")
    assert np.array_equal(read_matrix(path), MATRIX)


BAD = {
    "header": "a,b,c\n1,0,0\n0,1,0\n0,0,1\n",
    "two rows": "1,0,0\n0,1,0\n",
    "empty": "",
    "words": "1,0,x\n0,1,0\n0,0,1\n",
    "not finite": "1,0,nan\n0,1,0\n0,0,1\n",
    "perspective": "1,0,0\n0,1,0\n0.1,0,1\n",
    "flat": "1,2,0\n2,4,0\n0,0,1\n",
    "another direction": "5000,0,0\n0,5000,0\n0,0,1\n",
}


@pytest.mark.parametrize("name", BAD)
def test_bad_matrices(name, tmp_path, image, resources):
    path = tmp_path / "matrix.csv"
    path.write_text(BAD[name])
    with pytest.raises(CellquiltError, match=r"matrix\.csv") as caught:
        open_he_image(image, path, main_to_um=MAIN_TO_UM, resources=resources)
    assert caught.value.code == "he-matrix-invalid"
    assert caught.value.hint


def test_pixels_lie_where_the_matrix_says(tmp_path, image, resources):
    np.savetxt(tmp_path / "matrix.csv", MATRIX, delimiter=",")
    found = open_he_image(image, tmp_path / "matrix.csv", main_to_um=MAIN_TO_UM, resources=resources)
    assert (found.shape, found.channels, found.interleaved) == ((3, 60, 80), ["r", "g", "b"], True)
    corner = np.array([[10.0, 20.0]])
    np.testing.assert_allclose(apply(found.transforms[GLOBAL], corner), [[260.0, 32.5]])
    np.testing.assert_allclose(apply(found.transforms[MICRONS], corner), [[65.0, 8.125]])
    for channel in range(3):
        assert np.array_equal(found.read(channel, 5, 59, 20, 80), PIXELS[5:59, 20:80, channel])
    cells = open_he_image(image, tmp_path / "matrix.csv", main_to_um=None, resources=resources)
    assert set(cells.transforms) == {MICRONS}
    np.testing.assert_allclose(apply(cells.transforms[MICRONS], corner), [[260.0, 32.5]])


def test_without_a_matrix_the_file_says_how_large_pixels_are(tmp_path, image, resources):
    found = open_he_image(image, main_to_um=MAIN_TO_UM, resources=resources)
    np.testing.assert_allclose(found.transforms[MICRONS], np.diag([0.5, 0.5, 1]))
    np.testing.assert_allclose(found.transforms[GLOBAL], np.diag([2, 2, 1]))
    bare = tmp_path / "bare.tif"
    tifffile.imwrite(bare, PIXELS, photometric="rgb")
    with pytest.raises(CellquiltError, match=r"bare\.tif does not say") as caught:
        open_he_image(bare, main_to_um=MAIN_TO_UM, resources=resources)
    assert caught.value.code == "pixel-size-unknown"
    stack = tmp_path / "stack.ome.tif"
    tifffile.imwrite(stack, np.zeros((4, 20, 30), np.uint8), metadata={"axes": "ZYX"})
    with pytest.raises(CellquiltError, match="4 planes"):
        open_he_image(stack, main_to_um=MAIN_TO_UM, resources=resources)
