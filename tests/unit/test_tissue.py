"""Tissue: found by what it shows, whatever the slide around it is like."""

import numpy as np
import pytest
import shapely
from cellquilt.core.errors import CellquiltError
from cellquilt.segment.arrays import ArrayImage
from cellquilt.segment.tissue import tissue_polygons
from test_normalize import nuclei

PIXEL = 0.5


def fluorescence(side, box, *, light=None, signal=800.0, seed=0, background=100):
    """Nuclei inside a box, nothing but noise around."""
    image, _ = nuclei(side, seed=seed, light=light, signal=signal, background=background)
    empty = np.full((side, side), float(background)) * (1.0 if light is None else light)
    empty = np.random.default_rng(1).normal(empty, 5).clip(0).astype(np.uint16)
    y0, y1, x0, x1 = box
    empty[y0:y1, x0:x1] = image[y0:y1, x0:x1]
    return ArrayImage(empty[None], ["DAPI"], PIXEL)


def covers(tissue, box, slack_um=40.0):
    """The box is in the tissue, and nothing further than `slack_um` from it is."""
    y0, y1, x0, x1 = box
    truth = shapely.box(x0, y0, x1, y1)
    found = shapely.union_all(tissue.polygons)
    return found.covers(truth.buffer(-2)) and truth.buffer(slack_um / PIXEL, join_style="mitre").covers(found)


@pytest.mark.parametrize(
    "box",
    [(300, 800, 400, 1000), (0, 1500, 0, 1500), (0, 200, 0, 1500), (600, 1070, 600, 1070)],
    ids=["middle", "everywhere", "edge", "a tenth"],
)
def test_the_tissue_is_found(box):
    tissue = tissue_polygons(fluorescence(1500, box))
    assert tissue.mode == "staining"
    assert not tissue.empty
    assert covers(tissue, box)


def test_under_a_gradient_and_dim():
    light = np.linspace(0.2, 1, 1500)[None, :]
    box = (200, 1300, 100, 1400)
    assert covers(tissue_polygons(fluorescence(1500, box, light=light)), box)
    assert covers(tissue_polygons(fluorescence(1500, box, signal=40.0)), box)


def test_an_empty_slide_has_no_tissue():
    tissue = tissue_polygons(fluorescence(800, (0, 0, 0, 0)))
    assert tissue.empty
    assert tissue.area_um2 == 0
    assert tissue.as_dict()["empty"] is True
    assert tissue_polygons(ArrayImage(np.zeros((1, 300, 300), np.uint16), ["DAPI"], PIXEL)).empty


def test_specks_go_and_holes_are_filled():
    image = fluorescence(1500, (300, 1200, 300, 1200))
    image.pixels[0, 700:760, 700:760] = 100  # a vessel of 30 µm
    image.pixels[0, 100:106, 100:106] = 900  # dust of 3 µm
    tissue = tissue_polygons(image, min_area_um2=6000)
    assert len(tissue.polygons) == 1
    assert len(tissue.polygons[0].interiors) == 0
    assert not shapely.intersects(tissue.polygons[0], shapely.Point(103, 103))


def test_a_field_of_view_smaller_than_the_least_region_still_counts():
    tissue = tissue_polygons(fluorescence(64, (0, 64, 0, 64)))
    assert shapely.area(tissue.polygons).sum() == 64 * 64


def test_any_channel_may_show_it():
    a, b = (fluorescence(900, box).pixels[0] for box in ((100, 300, 100, 800), (600, 800, 100, 800)))
    both = tissue_polygons(ArrayImage(np.stack([a, b]), ["DAPI", "PolyT"], PIXEL))
    assert len(both.polygons) == 2
    first = tissue_polygons(ArrayImage(np.stack([a, b]), ["DAPI", "PolyT"], PIXEL), channels=["DAPI"])
    assert len(first.polygons) == 1


def bright_field(side, box):
    rng = np.random.default_rng(0)
    image = rng.normal(235, 3, (3, side, side))
    y0, y1, x0, x1 = box
    image[:, y0:y1, x0:x1] = rng.normal([[[190]], [[120]], [[180]]], 10, (3, y1 - y0, x1 - x0))
    return ArrayImage(image.clip(0, 255).astype(np.uint8), ["r", "g", "b"], PIXEL)


@pytest.mark.parametrize("box", [(200, 700, 300, 800), (0, 1000, 0, 1000)], ids=["part", "everywhere"])
def test_stained_sections_are_found_by_colour(box):
    tissue = tissue_polygons(bright_field(1000, box))
    assert tissue.mode == "saturation"
    assert covers(tissue, box)


def test_none_is_the_whole_image():
    tissue = tissue_polygons(fluorescence(300, (0, 0, 0, 0)), mode="none")
    assert shapely.equals(tissue.polygons[0], shapely.box(0, 0, 300, 300))
    assert tissue.area_um2 == 300 * 300 * PIXEL**2


def test_wrong_settings_are_named():
    image = fluorescence(100, (0, 100, 0, 100))
    with pytest.raises(CellquiltError, match="staining"):
        tissue_polygons(image, mode="stainning")
    with pytest.raises(CellquiltError) as caught:
        tissue_polygons(image, mode="saturation")
    assert caught.value.code == "tissue-saturation-channels"


def test_a_pyramid_level_gives_the_same_place(tmp_path):
    from cellquilt.core.images import Image, ImageWriter
    from cellquilt.core.transforms import scale

    box = (300, 1500, 500, 2000)
    pixels = fluorescence(2400, box).pixels
    transforms = {"global": np.eye(3), "microns": scale(PIXEL)}
    with ImageWriter(tmp_path / "image", pixels.shape, pixels.dtype, ["DAPI"], transforms, chunk_px=1024) as writer:
        for y in range(0, 2400, 1024):
            for x in range(0, 2400, 1024):
                writer.write(pixels[:, y : y + 1024, x : x + 1024], y, x)
    tissue = tissue_polygons(Image(tmp_path / "image"))
    assert tissue.level > 0
    assert covers(tissue, box)
