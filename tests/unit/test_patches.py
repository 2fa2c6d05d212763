"""The grid of patches, the engine's tile lattice, and bundles."""

import itertools
import json

import numpy as np
import pytest
import shapely
import zarr
from cellquilt.core.errors import CellquiltError
from cellquilt.patches.bundle import Bundle, write_bundles
from cellquilt.patches.grid import Lattice, Patch, check_overlap, make_grid
from cellquilt.patches.normalize import Normalization
from cellquilt.segment.arrays import ArrayImage
from hypothesis import given, settings
from hypothesis import strategies as st

lengths = st.integers(1, 9000)
lattices = st.one_of(
    st.just(Lattice()),
    st.builds(Lattice, multiple=st.sampled_from([1, 4, 16])),
    st.builds(Lattice, tile=st.sampled_from([224, 256]), rescale=st.floats(0.15, 2.5), full_tiles=st.booleans()),
)


@settings(max_examples=150, deadline=None)
@given(length=lengths, width=st.integers(64, 3000), overlap=st.integers(0, 400), lattice=lattices)
def test_cores_tile_the_slide_and_windows_nest(length, width, overlap, lattice):
    grid = make_grid((length, 1), width_px=width, overlap_px=overlap, lattice=lattice)
    spans = [patch.y for patch in grid.patches]
    assert spans[0].core0 == 0
    assert spans[-1].core1 == length
    for before, after in itertools.pairwise(spans):
        assert before.core1 == after.core0
        # The strip that two neighbours share is as wide as was asked for, half of it on either side of the line.
        assert before.stop - after.start >= overlap or after.start == 0 or before.stop == length
        assert after.start <= before.core1 <= before.stop
    for span in spans:
        assert span.context0 <= span.start <= span.core0 < span.core1 <= span.stop <= span.context1
    assert [patch.index for patch in grid.patches] == list(range(len(grid.patches)))


@settings(max_examples=100, deadline=None)
@given(length=st.integers(500, 20000), width=st.sampled_from([256, 512, 1024, 2048]), rescale=st.floats(0.2, 2.0))
def test_no_slivers(length, width, rescale):
    plain = [patch.x for patch in make_grid((10, length), width_px=width, overlap_px=50).patches]
    sizes = [span.core1 - span.core0 for span in plain]
    assert max(sizes) - min(sizes) <= 1
    assert max(sizes) <= width
    tiled = make_grid((10, length), width_px=width, overlap_px=60, lattice=Lattice(tile=224, rescale=rescale)).patches
    sizes = [patch.x.core1 - patch.x.core0 for patch in tiled]
    assert min(sizes) >= 0.4 * max(sizes)


@settings(max_examples=60, deadline=None)
@given(length=st.integers(300, 6000), width=st.sampled_from([256, 700, 2048]), rescale=st.floats(0.2, 2.0))
def test_a_patch_holds_all_tiles_that_its_window_depends_on(length, width, rescale):
    lattice = Lattice(tile=224, rescale=rescale)
    axis = lattice.axis(length)
    for patch in make_grid((10, length), width_px=width, overlap_px=40, lattice=lattice).patches:
        needed = axis.context(patch.x.start, patch.x.stop)
        assert patch.x.context0 <= needed[0]
        assert needed[1] <= patch.x.context1


def test_the_lattice_is_that_of_cellpose_on_the_whole_slide():
    # The library on 870 px: padded to 880 + 16, 5 tiles of 224 whose starts are evenly spaced.
    axis = Lattice(tile=224).axis(870)
    assert axis.padded == 896
    assert axis.pad == 8 + 5
    np.testing.assert_array_equal(axis.starts, np.linspace(0, 896 - 224, 5).astype(int))
    # A slide smaller than a tile: one smaller tile, or for transformers one padded to full size.
    assert (Lattice(tile=224).axis(100).size, len(Lattice(tile=224).axis(100).starts)) == (128, 1)
    assert Lattice(tile=256, full_tiles=True).axis(100).size == 256


def test_a_slide_no_wider_than_a_patch_is_one_patch():
    grid = make_grid((2048, 300), overlap_px=68)
    assert [patch.window for patch in grid.patches] == [(0, 2048, 0, 300)]
    assert grid.patches[0].inner_sides(grid.shape) == (False, False, False, False)
    assert len(make_grid((2048, 300), overlap_px=68, lattice=Lattice(tile=224)).patches) == 1


def test_patches_without_tissue_are_left_out_and_keep_their_numbers():
    regions = np.array([shapely.box(10, 10, 20, 20), shapely.box(950, 950, 990, 990)])
    grid = make_grid((1000, 1000), width_px=250, overlap_px=20, regions=regions)
    assert [patch.index for patch in grid.patches] == [0, 15]
    assert grid.n_empty == 14
    assert make_grid((1000, 1000), width_px=250, regions=np.empty(0, object)).patches == ()


def test_polygons_are_the_windows_and_borders_their_inner_sides():
    grid = make_grid((100, 200), width_px=100, overlap_px=20)
    assert [tuple(shapely.bounds(box)) for box in grid.polygons()] == [(0, 0, 110, 100), (90, 0, 200, 100)]
    ys, xs = grid.borders()
    assert ys.tolist() == []
    assert xs.tolist() == [90, 110]


def test_a_small_overlap_is_refused_with_the_number_to_set():
    check_overlap(34, 17)
    with pytest.raises(CellquiltError, match="at least 34 px") as caught:
        check_overlap(33, 17, pixel_size_um=0.5)
    assert caught.value.code == "patch-overlap-small"
    assert "17 µm" in caught.value.message
    assert "34" in caught.value.hint


def test_patch_round_trips_through_json():
    patch = make_grid((3000, 3000), width_px=700, overlap_px=60, lattice=Lattice(tile=224, rescale=0.7)).patches[5]
    assert Patch.from_dict(json.loads(json.dumps(patch.as_dict()))) == patch


@pytest.fixture
def slide():
    pixels = np.random.default_rng(0).integers(0, 60000, (3, 300, 500), dtype=np.uint16)
    return ArrayImage(pixels, ["DAPI", "A", "B"], 0.5)


def write(slide, folder, regions=None, patches_per_task=2):
    grid = make_grid((300, 500), width_px=150, overlap_px=20, regions=regions)
    paths = write_bundles(
        slide,
        grid,
        folder,
        sample="liver_1",
        channels=["B", "DAPI"],
        normalization=Normalization("global", np.zeros((2, 1, 1)), np.ones((2, 1, 1)), (300.0, 500.0)),
        engine={"method": "generic", "function": "m:f"},
        patches_per_task=patches_per_task,
    )
    return grid, paths


def test_bundles_hold_the_pixels_and_all_a_task_needs(slide, tmp_path):
    grid, paths = write(slide, tmp_path)
    assert [path.name for path in paths] == [f"bundle_{k:03d}.zarr" for k in range(4)]
    bundles = [Bundle(path) for path in paths]
    assert [patch for bundle in bundles for patch in bundle.patches] == list(grid.patches)
    for bundle in bundles:
        assert (bundle.sample, bundle.shape, bundle.pixel_size_um) == ("liver_1", (300, 500), 0.5)
        assert bundle.channels == ["B", "DAPI"]
        assert bundle.engine["function"] == "m:f"
        assert bundle.normalization.mode == "global"
        for item in bundle:
            y0, y1, x0, x1 = item.patch.context
            np.testing.assert_array_equal(item.pixels, slide.pixels[[2, 0], y0:y1, x0:x1])
            assert item.pixels.dtype == np.uint16


def test_bundles_are_plain_zarr(slide, tmp_path):
    _, paths = write(slide, tmp_path)
    group = zarr.open_group(str(paths[1]), mode="r")
    item = next(iter(Bundle(paths[1])))
    np.testing.assert_array_equal(group[f"patch_{item.patch.index:06d}"][...], item.pixels)


def test_there_is_always_a_bundle(slide, tmp_path):
    _, paths = write(slide, tmp_path, regions=np.empty(0, object))
    assert len(paths) == 1
    assert list(Bundle(paths[0])) == []


def test_same_input_same_bytes(slide, tmp_path):
    files = []
    for name in ("a", "b"):
        write(slide, tmp_path / name)
        files.append(
            {
                p.relative_to(tmp_path / name): p.read_bytes()
                for p in sorted((tmp_path / name).rglob("*"))
                if p.is_file()
            }
        )
    assert files[0] == files[1]


def test_a_broken_bundle_is_named(slide, tmp_path):
    with pytest.raises(CellquiltError, match="not a patch bundle"):
        Bundle(tmp_path)
    _, paths = write(slide, tmp_path / "b")
    bundle = Bundle(paths[0])
    (paths[0] / "patch_000000" / "c" / "0" / "0" / "0").write_bytes(b"broken")
    with pytest.raises(CellquiltError) as caught:
        bundle.read(bundle.patches[0])
    assert caught.value.code == "bundle-unreadable"
