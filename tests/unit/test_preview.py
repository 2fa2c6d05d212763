"""Trying parameters: combinations, windows, and a page that shows what a full run would make there."""

import re
from pathlib import Path

import numpy as np
import pytest
from cellquilt.core.errors import CellquiltError
from cellquilt.core.images import open_image
from cellquilt.core.settings import Settings
from cellquilt.core.shapes import read_shapes
from cellquilt.core.store import Store
from cellquilt.report.preview import choose_windows, command, parse_grid, preview_slide

GENERIC = {"segmentation": "generic", "generic_diameter_um": 8.0, "seed": 1}


@pytest.fixture(scope="module")
def slide(tmp_path_factory) -> Path:
    """A simulated slide, read, with its tissue."""
    import cellquilt as cq

    folder = tmp_path_factory.mktemp("preview")
    cq.simulate(folder / "sim", width_px=640, seed=2)
    source = folder / "sim" / "slide_0"
    sdata = cq.io.ome_tif(
        source / "image.ome.tif", transcripts=source / "transcripts.parquet", output=folder / "slide.zarr"
    )
    cq.segmentation.tissue(sdata)
    return folder / "slide.zarr"


def test_a_grid_is_all_combinations_in_the_order_written():
    assert parse_grid("cellpose_diameter_um=8,10; expand_um=3,5") == [
        {"cellpose_diameter_um": 8.0, "expand_um": 3.0},
        {"cellpose_diameter_um": 8.0, "expand_um": 5.0},
        {"cellpose_diameter_um": 10.0, "expand_um": 3.0},
        {"cellpose_diameter_um": 10.0, "expand_um": 5.0},
    ]
    assert parse_grid(None) == [{}]


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("expand_um", "preview-grid"),
        ("expand_um=", "preview-grid"),
        ("expnd_um=3", "parameter-unknown"),
        ("min_transcripts=3", "preview-parameter"),
        ("expand_um=" + ",".join(map(str, range(60))), "preview-grid"),
    ],
)
def test_mistakes_in_a_grid_are_named(text, code):
    with pytest.raises(CellquiltError) as caught:
        parse_grid(text)
    assert caught.value.code == code


def test_windows_go_from_dense_to_sparse_and_depend_on_the_seed_alone(slide):
    image = open_image(slide)
    windows = choose_windows(image, 4, 25.0, None, seed=3)
    assert windows == choose_windows(image, 4, 25.0, None, seed=3)
    assert len(set(windows)) == 4
    spread = [image.read(y0, y1, x0, x1, channels=["DAPI"]).std() for y0, y1, x0, x1 in windows]
    assert spread == sorted(spread, reverse=True)


def test_the_page_shows_the_cells_that_a_full_run_finds(slide, tmp_path):
    import cellquilt as cq
    import spatialdata

    settings = Settings(
        {**GENERIC, "preview": 2, "preview_size_um": 60.0, "preview_grid": "expand_um=0,4", "preview_seed": 1}
    )
    page = preview_slide(slide, tmp_path / "preview.html", settings=settings).read_text()
    counts = [[int(n) for n in row] for row in re.findall(r"window 1: (\d+) cells.*?window 2: (\d+) cells", page, re.S)]
    assert len(counts) == 2
    assert page.count("nextflow run main.nf") == 2
    assert "--expand_um 4" in page
    assert "http" not in re.sub(r"http://www\.w3\.org/\S+", "", page)

    sdata = spatialdata.read_zarr(slide)
    cq.segmentation.generic(sdata, "cellquilt.segment.generic:rainfall", diameter_um=8, expand_um=4)
    cells = read_shapes(Store(slide).element("shapes", "cell_boundaries"))
    import shapely

    centre = shapely.get_coordinates(shapely.centroid(cells.geometry))
    windows = choose_windows(
        open_image(slide), 2, 60.0, read_shapes(Store(slide).element("shapes", "region_of_interest")).geometry, seed=1
    )
    for number, (y0, y1, x0, x1) in enumerate(windows):
        inside = (centre >= [x0, y0]).all(axis=1) & (centre < [x1, y1]).all(axis=1)
        assert abs(int(np.count_nonzero(inside)) - counts[1][number]) <= 1


def test_the_command_repeats_what_was_given():
    text = command({"expand_um": 3.0}, Settings({"cellpose_channels": "DAPI", "preview": 3, "z": "max"}))
    assert text.endswith("--cellpose_channels DAPI --expand_um 3")
