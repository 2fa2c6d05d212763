"""The simulator: the same for every tiling, calibrated, and as hard as it says."""

import hashlib
import json
import tracemalloc
from pathlib import Path

import cellquilt
import numpy as np
import pyarrow.csv as pc
import pyarrow.parquet as pq
import pytest
import shapely
import tifffile
from cellquilt.core.errors import CellquiltError
from cellquilt.core.shapes import ShapesTable, read_geoparquet
from cellquilt.geometry.polygonize import labels_to_polygons
from cellquilt.simulate import calibration_table, simulate, truth_scores
from cellquilt.simulate.calibration import calibration, format_table, main, measure_region
from cellquilt.simulate.cells import MAX_DIAMETER_UM, OUT_OF_FOCUS
from cellquilt.simulate.expression import expression, gene_names
from cellquilt.simulate.masks import keep_largest_part
from cellquilt.simulate.parameters import PRESETS, make_parameters
from cellquilt.simulate.scores import adjusted_rand
from cellquilt.simulate.slide import Slide, Tile
from hypothesis import given
from hypothesis import strategies as st


def whole(preset: str = "default", width_px: int = 768, seed: int = 3, **more) -> tuple[Slide, Tile]:
    slide = Slide(make_parameters(preset, width_px=width_px, seed=seed, **more))
    return slide, slide.tile((0, *slide.canvas[:1], 0, slide.canvas[1]))


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def touching_share(labels: np.ndarray) -> float:
    """Share of labels that share a pixel edge with another label."""
    touching = set()
    for a, b in ((labels[1:], labels[:-1]), (labels[:, 1:], labels[:, :-1])):
        meet = (a != b) & (a > 0) & (b > 0)
        touching |= set(a[meet].tolist()) | set(b[meet].tolist())
    return len(touching) / (len(np.unique(labels)) - 1)


def nuclei_touching(tile: Tile) -> float:
    """Share of nuclei within 2 px of another."""
    _, nuclei = labels_to_polygons(tile.crop(tile.masks.nuclei))
    one, other = shapely.STRtree(nuclei).query(nuclei, predicate="dwithin", distance=2.0)
    return len(np.unique(one[one != other])) / len(nuclei)


def simple_baseline(slide: Slide, tile: Tile) -> tuple[float, float]:
    """Otsu, watershed, nearest nucleus: F1 of nuclei at IoU 0.5 and share of transcripts in their true cell."""
    from scipy import ndimage, spatial
    from skimage.feature import peak_local_max
    from skimage.filters import threshold_otsu
    from skimage.segmentation import watershed

    image = ndimage.gaussian_filter(slide.image(tile, ("DAPI",))[0].astype(float), 2)
    mask = image > threshold_otsu(image)
    depth = ndimage.gaussian_filter(ndimage.distance_transform_edt(mask), 2)
    peaks = peak_local_max(depth, min_distance=8, labels=mask.astype(int))
    markers = np.zeros(mask.shape, int)
    markers[tuple(peaks.T)] = np.arange(1, len(peaks) + 1)
    found = watershed(-depth, markers, mask=mask)
    true = tile.crop(tile.masks.nuclei)
    pairs, shared = np.unique(np.stack([found.ravel(), true.ravel()]), axis=1, return_counts=True)
    size_found, size_true = np.bincount(found.ravel()), np.bincount(true.ravel())
    iou = shared / (size_found[pairs[0]] + size_true[pairs[1]] - shared)
    hit = (pairs[0] > 0) & (pairs[1] > 0) & (iou > 0.5)
    f1 = 2 * hit.sum() / ((size_found[1:] > 0).sum() + (size_true[1:] > 0).sum())
    match = np.zeros(len(size_found), np.int64)
    match[pairs[0][hit]] = tile.cells.ids[pairs[1][hit] - 1]
    centres = np.array(ndimage.center_of_mass(found > 0, found, np.arange(1, found.max() + 1)))
    transcripts = slide.transcripts(tile)
    inside = transcripts.cell > 0
    xy = transcripts.xy[inside] / slide.parameters.pixel_size_um
    _, nearest = spatial.cKDTree(centres + 0.5).query(xy[:, ::-1])
    return float(f1), float((match[nearest + 1] == transcripts.cell[inside]).mean())


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("cohort") / "out"
    simulate(output, width_px=640, height_px=512, slides=2, seed=5, labels=True, tile_px=512)
    return output


# --- the same for every tiling, the same every time


def test_any_window_alone_equals_the_whole():
    slide, full = whole(width_px=700, height_px=520, seed=11, overlap=0.3)
    image, ids = slide.image(full), np.concatenate([[0], full.cells.ids])
    cells, nuclei = ids[full.crop(full.masks.cells)], ids[full.crop(full.masks.nuclei)]
    for y0, y1, x0, x1 in [(0, 256, 0, 256), (256, 512, 512, 700), (512, 520, 256, 512), (104, 205, 304, 431)]:
        alone = slide.tile((y0, y1, x0, x1))
        numbers = np.concatenate([[0], alone.cells.ids])
        assert np.array_equal(numbers[alone.crop(alone.masks.cells)], cells[y0:y1, x0:x1])
        assert np.array_equal(numbers[alone.crop(alone.masks.nuclei)], nuclei[y0:y1, x0:x1])
        if y0 % 8 == 0 and x0 % 8 == 0:
            assert np.array_equal(slide.image(alone), image[:, y0:y1, x0:x1])


def test_a_slide_of_128k_by_128k_is_made_tile_by_tile():
    slide = Slide(make_parameters(width_px=131_072, seed=2))
    assert slide.canvas == (131_072, 131_072)
    here, there = (65_536, 65_792, 99_072, 99_328), (65_664, 65_920, 98_944, 99_200)
    tracemalloc.start()
    one, two = slide.tile(here), slide.tile(there)
    images = slide.image(one), slide.image(two)
    n_transcripts = len(slide.transcripts(one))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6
    assert len(one.owned.index) > 10
    assert n_transcripts > 1000
    assert np.array_equal(images[0][:, 128:, :128], images[1][:, :128, 128:])
    ids = [np.concatenate([[0], tile.cells.ids])[tile.crop(tile.masks.cells)] for tile in (one, two)]
    assert np.array_equal(ids[0][128:, :128], ids[1][:128, 128:])
    # The last tile is as near as the first.
    assert slide.tile((131_000, 131_072, 131_000, 131_072)).masks.cells.any()


def test_tiles_share_out_cells_and_transcripts_once():
    slide, full = whole(width_px=700, height_px=520, seed=11)
    tiles = [slide.tile(window) for window in slide.windows(256)]
    ids = np.concatenate([tile.cells.ids[tile.owned.index] for tile in tiles])
    areas = np.concatenate([tile.owned.area_um2 for tile in tiles])
    order = np.argsort(ids)
    assert np.array_equal(ids[order], np.sort(full.cells.ids[full.owned.index]))
    assert np.array_equal(areas[order], full.owned.area_um2[np.argsort(full.cells.ids[full.owned.index])])
    parts, one = [slide.transcripts(tile) for tile in tiles], slide.transcripts(full)

    def rows(several: list) -> np.ndarray:
        columns = [np.concatenate([getattr(part, name) for part in several]) for name in ("plane", "gene", "cell")]
        flags = [np.concatenate([getattr(part, name) for part in several]) for name in ("in_nucleus", "origin")]
        table = np.column_stack([np.concatenate([part.xy for part in several]), *columns, *flags])
        return table[np.lexsort(table.T)]

    assert np.array_equal(rows(parts), rows([one]))


def test_files_are_the_same_bytes_again_and_same_content_for_other_tiles(cohort: Path, tmp_path: Path):
    simulate(tmp_path / "again", width_px=640, height_px=512, slides=2, seed=5, labels=True, tile_px=512)
    assert digests(tmp_path / "again") == digests(cohort)
    simulate(tmp_path / "other", width_px=640, height_px=512, slides=2, seed=5, labels=True, tile_px=256)
    for file in ("image.ome.tif", "truth/cells_labels.tif", "truth/nuclei_labels.tif"):
        assert np.array_equal(
            tifffile.imread(cohort / "slide_1" / file), tifffile.imread(tmp_path / "other/slide_1" / file)
        )
    one, other = (
        pq.read_table(folder / "slide_1/truth/cells.parquet").sort_by("cell_id")
        for folder in (cohort, tmp_path / "other")
    )
    assert one.equals(other)
    simulate(tmp_path / "seed", width_px=640, height_px=512, seed=6, with_transcripts=False)
    assert not np.array_equal(
        tifffile.imread(cohort / "slide_0/image.ome.tif"), tifffile.imread(tmp_path / "seed/slide_0/image.ome.tif")
    )


# --- files


def test_ome_tif_slide_is_complete_and_consistent(cohort: Path):
    rows = pc.read_csv(cohort / "sheet.csv").to_pylist()
    assert [row["sample"] for row in rows] == ["slide_0", "slide_1"]
    assert {row["technology"] for row in rows} == {"ome_tif"}
    assert all((cohort / row["path"]).is_file() and (cohort / row["transcripts"]).is_file() for row in rows)
    with tifffile.TiffFile(cohort / rows[0]["path"]) as tiff:
        assert tiff.series[0].axes == "CYX"
        assert tiff.series[0].shape == (2, 512, 640)
        assert tiff.pages[0].tile == (256, 256)
        assert 'PhysicalSizeX="0.2125"' in tiff.ome_metadata
        assert 'Name="DAPI"' in tiff.ome_metadata
        assert 'Name="Cellbound"' in tiff.ome_metadata
    folder = cohort / "slide_0"
    slide = Slide(make_parameters(width_px=640, height_px=512, seed=5))
    full = slide.tile((0, 512, 0, 640))
    assert np.array_equal(tifffile.imread(folder / "image.ome.tif"), slide.image(full))
    seen = pq.read_table(folder / "transcripts.parquet")
    truth = pq.read_table(folder / "truth/transcripts_truth.parquet")
    assert seen.column_names == ["x", "y", "z", "gene"]
    assert seen.equals(truth.select(seen.column_names))
    x, y = seen.column("x").to_numpy(), seen.column("y").to_numpy()
    assert x.min() >= 0
    assert y.min() >= 0
    assert x.max() < 640 * 0.2125
    assert y.max() < 512 * 0.2125
    cells = pq.read_table(folder / "truth/cells.parquet")
    counts = truth.filter(truth["cell_id"].to_numpy() > 0).group_by("cell_id").aggregate([([], "count_all")])
    true_count = dict(zip(cells["cell_id"].to_pylist(), cells["n_transcripts"].to_pylist(), strict=True))
    assert all(true_count[row["cell_id"]] == row["count_all"] for row in counts.to_pylist())
    assert sum(true_count.values()) == sum(counts["count_all"].to_pylist())
    assert not [path for path in cohort.rglob("*") if path.name.startswith(".")]


def test_polygons_are_the_labels_and_nuclei_lie_in_their_cells(cohort: Path):
    truth = cohort / "slide_0" / "truth"
    labels = tifffile.imread(truth / "cells_labels.tif")
    geometry, cells, _ = read_geoparquet(truth / "cells.parquet")
    nuclei, nucleus_table, _ = read_geoparquet(truth / "nuclei.parquet")
    ids = cells["cell_id"].to_numpy()
    assert np.array_equal(np.sort(ids), np.unique(labels)[1:])
    assert shapely.is_valid(geometry).all()
    assert set(shapely.get_type_id(geometry)) == {3}  # one part each
    area = dict(zip(*np.unique(labels, return_counts=True), strict=True))
    assert np.array_equal(shapely.area(geometry), [area[k] for k in ids])
    assert np.allclose(shapely.area(geometry) * 0.2125**2, cells["area_um2"].to_numpy())
    points = np.argwhere(labels > 0)[::97]
    place = np.searchsorted(np.sort(ids), labels[tuple(points.T)])
    chosen = geometry[np.argsort(ids)][place]
    assert shapely.contains_xy(chosen, points[:, 1] + 0.5, points[:, 0] + 0.5).all()
    mine = geometry[np.argsort(ids)][np.searchsorted(np.sort(ids), nucleus_table["cell_id"].to_numpy())]
    assert shapely.covers(mine, nuclei).all()
    document = json.loads((truth / "simulation.json").read_text())
    assert (document["n_cells"], document["n_nuclei"]) == (len(ids), len(nuclei))
    assert document["parameters"]["seed"] == 5


def test_merscope_folder_maps_back_to_the_pixels(tmp_path: Path):
    simulate(tmp_path / "out", width_px=512, seed=2, format="merscope", planes=(0, 3))
    folder = tmp_path / "out" / "slide_0"
    assert sorted(path.name for path in (folder / "images").iterdir()) == [
        "micron_to_mosaic_pixel_transform.csv",
        *(f"mosaic_{stain}_z{z}.tif" for stain in ("Cellbound", "DAPI") for z in (0, 3)),
    ]
    matrix = np.loadtxt(folder / "images/micron_to_mosaic_pixel_transform.csv")
    seen = pc.read_csv(folder / "detected_transcripts.csv")
    truth = pq.read_table(folder / "truth/transcripts_truth.parquet")
    real = ["global_x", "global_y", "global_z", "x", "y", "fov", "gene", "transcript_id"]
    assert seen.column_names[1:] == ["barcode_id", *real]
    xy = np.column_stack([seen["global_x"].to_numpy(), seen["global_y"].to_numpy()])
    pixels = xy @ matrix[:2, :2].T + matrix[:2, 2]
    assert np.abs(pixels[:, 0] - truth["x"].to_numpy() / 0.2125).max() < 1e-6
    assert np.abs(pixels[:, 1] - truth["y"].to_numpy() / 0.2125).max() < 1e-6
    assert seen["gene"].to_pylist() == truth["gene"].to_pylist()
    assert np.array_equal(seen["global_z"].to_numpy() * 1.5, truth["z"].to_numpy())
    vendor = pq.read_table(folder / "cell_boundaries.parquet")
    outlines, cells, _ = read_geoparquet(folder / "truth/cells.parquet")
    first = vendor.filter(vendor["ZIndex"].to_numpy() == 3)
    assert first["EntityID"].to_pylist() == cells["cell_id"].to_pylist()
    back = shapely.transform(
        shapely.from_wkb(first["Geometry"].to_pylist()), lambda xy: xy @ matrix[:2, :2].T + matrix[:2, 2]
    )
    assert np.allclose(shapely.area(back), shapely.area(outlines))
    assert np.allclose(shapely.bounds(back), shapely.bounds(outlines), atol=1e-6)
    images = [tifffile.imread(folder / f"images/mosaic_DAPI_z{z}.tif") for z in (0, 3)]
    assert images[0].shape == (512, 512)
    assert not np.array_equal(*images)
    assert np.corrcoef(images[0].ravel(), images[1].ravel())[0, 1] > 0.8


def test_options_leave_things_out(tmp_path: Path):
    simulate(tmp_path / "a", width_px=256, image_only=True, channels=("DAPI",), compression="zlib")
    assert not (tmp_path / "a/slide_0/transcripts.parquet").exists()
    assert not (tmp_path / "a/slide_0/truth/transcripts_truth.parquet").exists()
    assert pc.read_csv(tmp_path / "a/sheet.csv")["transcripts"].to_pylist() in ([""], [None])
    assert tifffile.imread(tmp_path / "a/slide_0/image.ome.tif").shape[-2:] == (256, 256)
    cellquilt.simulate(tmp_path / "b", width_px=256, image=False)
    assert not (tmp_path / "b/slide_0/image.ome.tif").exists()
    assert pq.read_metadata(tmp_path / "b/slide_0/transcripts.parquet").num_rows > 1000


# --- calibration


def test_calibration_within_20_percent(tmp_path: Path):
    simulate(tmp_path / "out", width_px=1536, seed=1, image=False)
    table = calibration_table(tmp_path / "out/slide_0")
    text = format_table(table)
    assert len(table) >= 3 + 7 + 20
    assert all(row.ok for row in table), text
    # Rare genes one by one are noise in the real region itself; together they are not.
    numbers = calibration()
    document = json.loads((tmp_path / "out/slide_0/truth/simulation.json").read_text())
    assert document["genes"] == numbers.genes
    counts = np.zeros(len(numbers.genes))
    genes = pq.read_table(tmp_path / "out/slide_0/transcripts.parquet")["gene"].to_pylist()
    place = {gene: k for k, gene in enumerate(numbers.genes)}
    np.add.at(counts, [place[gene] for gene in genes if gene in place], 1)
    share = counts / counts.sum()
    assert np.corrcoef(np.log(share + 1e-6), np.log(numbers.gene_shares + 1e-6))[0, 1] > 0.95


def test_shipped_numbers_are_those_of_the_real_region(shared_data: Path, tmp_path: Path):
    real = measure_region(shared_data / "merscope_liver")
    numbers = calibration()
    assert real["n_transcripts"] == 5936
    assert real["density_um2"] == pytest.approx(numbers.density_um2, rel=1e-4)
    assert real["nuclear_share"] == pytest.approx(numbers.nuclear_share, rel=1e-4)
    assert real["control_rate"] == pytest.approx(numbers.control_rate, rel=1e-3)
    assert real["z_profile"] == pytest.approx(numbers.z_profile.tolist(), abs=1e-4)
    assert list(real["gene_counts"].items()) == list(zip(numbers.genes, numbers.gene_counts.tolist(), strict=True))
    assert real["controls"] == numbers.controls
    simulate(tmp_path / "out", width_px=512, image=False)
    own, shipped = (
        calibration_table(tmp_path / "out/slide_0", region) for region in (shared_data / "merscope_liver", None)
    )
    assert [row.name for row in own] == [row.name for row in shipped]
    assert [row.measured for row in own] == pytest.approx([row.measured for row in shipped], rel=1e-3)


def test_comparison_is_printed(cohort: Path, capsys: pytest.CaptureFixture[str]):
    main([str(cohort / "slide_0")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["measured", "simulated", "ratio"]
    assert lines[1].split()[:4] == ["transcripts", "per", "µm²", "1.943"]
    assert len(lines) == 1 + len(calibration_table(cohort / "slide_0"))


def test_missing_region_is_named(tmp_path: Path):
    with pytest.raises(CellquiltError, match="mosaic_DAPI_z3") as caught:
        measure_region(tmp_path)
    assert caught.value.code == "calibration-data-missing"


# --- what the parameters do


def test_default_tissue_touches_and_sizes_span_the_range():
    slide, tile = whole(width_px=1024)
    labels = tile.crop(tile.masks.cells)
    assert touching_share(labels) >= 0.5
    assert 0.05 < nuclei_touching(tile) < 0.3
    assert nuclei_touching(whole(width_px=1024, pairing=0.9, overlap=0.3)[1]) > 0.3
    assert nuclei_touching(whole(pairing=0.0)[1]) < 0.03
    bounds = np.sqrt(4 / np.pi * tile.owned.area_um2)
    inner = ~np.isin(tile.owned.index + 1, np.unique(np.r_[labels[0], labels[-1], labels[:, 0], labels[:, -1]]))
    assert bounds[inner].min() >= 3.5
    assert bounds[inner].max() <= MAX_DIAMETER_UM
    assert bounds[inner].max() > 18
    nuclei = np.sqrt(4 / np.pi * tile.owned.nucleus_area_um2[inner & (tile.owned.nucleus_area_um2 > 0)])
    assert 17 <= np.median(nuclei) / slide.parameters.pixel_size_um <= 40


def test_density_sets_the_number_of_cells():
    full, half = (len(whole(density=value)[1].owned.index) for value in (1.0, 0.5))
    assert 0.4 < half / full < 0.6
    assert len(whole(density=0.0)[1].owned.index) == 0


def test_overlap_squeezes_cells():
    loose, tight = whole()[1], whole(overlap=0.8)[1]
    assert len(tight.owned.index) > 1.3 * len(loose.owned.index)
    assert touching_share(tight.crop(tight.masks.cells)) > 0.9


def test_tissue_fraction_leaves_glass():
    slide, tile = whole(width_px=1280, tissue_fraction=0.1, empty_fraction=0.0)
    labels = tile.crop(tile.masks.cells)
    _, full = whole(empty_fraction=0.0)
    assert 0.06 < (labels > 0).mean() / (full.crop(full.masks.cells) > 0).mean() < 0.16
    assert not labels[:300].any()
    assert slide.image(tile, ("DAPI",)).std() > 0


def test_empty_and_necrotic_regions_have_their_share():
    slide, tile = whole(width_px=1024, empty_fraction=0.2, necrotic_fraction=0.2)
    grid = (np.arange(100) + 0.5) / 100 * 1024 * slide.parameters.pixel_size_um
    x, y = (axis.ravel() for axis in np.meshgrid(grid, grid))
    state, domain = slide.tissue.at(x, y)
    assert 0.17 < (state == 1).mean() < 0.23
    assert 0.1 < (state == 2).mean() < 0.23
    assert np.bincount(domain) / len(domain) == pytest.approx([0.25] * 4, abs=0.03)
    necrotic = tile.cells.necrotic[tile.owned.index]
    assert necrotic.any()
    assert (tile.owned.nucleus_area_um2[necrotic] == 0).all()
    transcripts = slide.transcripts(tile)
    ids = tile.cells.ids[tile.owned.index]
    density = np.array([np.count_nonzero(transcripts.cell == k) for k in ids]) / tile.owned.area_um2
    assert np.median(density[necrotic]) < 0.3 * np.median(density[~necrotic])


def test_no_nucleus_share():
    _, tile = whole(width_px=1024, no_nucleus=0.3, necrotic_fraction=0.0)
    without = tile.owned.nucleus_area_um2 == 0
    assert 0.22 < without.mean() < 0.38
    assert (tile.cells.nucleus == OUT_OF_FOCUS).any()


def test_illumination_gradient_and_fields_of_view():
    flat = {"fov_spread": 0.0, "vignetting": 0.0, "noise": 0.0, "fov_dropout": 0.0}
    plain_slide, tile = whole(**flat)
    plain = plain_slide.image(tile, ("DAPI",))[0].astype(float) - 2400
    slide, tile = whole(illumination_gradient=5.0, **flat)
    ratio = (slide.image(tile, ("DAPI",))[0] - 2400.0) / plain
    assert np.median(ratio[:, -1]) / np.median(ratio[:, 0]) == pytest.approx(5, rel=0.03)
    slide, tile = whole(**{**flat, "fov_spread": 0.3}, fov_um=80.0)
    ratio = np.median((slide.image(tile, ("DAPI",))[0] - 2400.0) / plain, axis=0)
    seam = round(80 / 0.2125)
    assert abs(np.log(ratio[seam + 5] / ratio[seam - 5])) > 0.05
    assert ratio[: seam - 5].std() < 0.01


def test_lost_fields_are_dark_and_silent():
    slide, tile = whole(fov_um=60.0, fov_dropout=0.4, seed=4)
    from cellquilt.simulate.transcripts import lost_fields

    transcripts = slide.transcripts(tile)
    assert not lost_fields(slide.parameters, slide.seed, *transcripts.xy.T).any()
    pixels = (np.arange(768) + 0.5) * slide.parameters.pixel_size_um
    x, y = np.meshgrid(pixels, pixels)
    lost = lost_fields(slide.parameters, slide.seed, x.ravel(), y.ravel()).reshape(x.shape)
    assert 0.1 < lost.mean() < 0.8
    image = slide.image(tile, ("DAPI",))[0]
    assert image[lost].max() < 5500
    assert image[~lost].max() > 10000


def test_ambient_and_diffusion_put_transcripts_outside():
    def outside(**more: float) -> float:
        slide, tile = whole(**more)
        transcripts = slide.transcripts(tile)
        ids = np.concatenate([[0], tile.cells.ids])[tile.crop(tile.masks.cells)]
        column, row = np.floor(transcripts.xy / slide.parameters.pixel_size_um).astype(int).T
        return float((ids[row, column] != transcripts.cell).mean())

    assert outside(ambient=0.0, diffusion=0.0) == 0
    assert 0.01 < outside(ambient=0.05, diffusion=0.0) < 0.06
    assert outside(ambient=0.0, diffusion=0.5, diffusion_um=3.0) > 0.1


def test_cell_types_and_domains_differ_in_expression():
    parameters = make_parameters(seed=1)
    model = expression(parameters, calibration(), 0, 1, 0.7, 0.25)
    mean = np.einsum("dt,dtg->g", calibration().area_shares, model.rates) / calibration().area_shares.sum()
    assert mean == pytest.approx(calibration().gene_shares, rel=1e-6)
    best = model.rates.mean(axis=0).argmax(axis=0)
    assert (np.bincount(best, minlength=8) > 5).all()
    assert np.abs(np.log(model.rates[0] / model.rates[1])).max() > 0.5
    second = expression(parameters, calibration(), 1, 1, 0.7, 0.25)
    assert 0.15 < np.log(second.rates / model.rates).std() < 0.35
    assert np.array_equal(expression(parameters, calibration(), 1, 1, 0.7, 0.0).rates, model.rates)


def test_panels_share_some_genes():
    parameters = make_parameters(n_genes=300)
    a, b = (expression(parameters, calibration(), k, 2, 0.6, 0.0).ambient > 0 for k in (0, 1))
    assert (a & b).sum() == 180
    assert (a | b).all()
    assert len(expression(parameters, calibration(), 0, 1, 0.7, 0.0).genes) == 300 + 15


@pytest.mark.parametrize("n", [10, 100, 259, 1000])
def test_any_number_of_genes(n: int):
    names, shares = gene_names(calibration(), n)
    assert len(set(names)) == n
    assert shares.sum() == pytest.approx(1)
    assert (np.diff(shares) <= 0).all()


def test_hard_is_harder_than_default_for_a_simple_method():
    default, hard = (simple_baseline(*whole(preset, width_px=640, seed=7)) for preset in ("default", "hard"))
    assert default[0] > 0.8
    assert default[1] > 0.7
    assert hard[0] < default[0] - 0.2
    assert hard[1] < default[1] - 0.2


# --- mistakes


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        ({"preset": "hrad"}, "simulate-preset", "hard"),
        ({"densty": 0.5}, "simulate-parameter", "density"),
        ({"density": 1.5, "seed": -1}, "simulate-value", "density is 1.5"),
        ({"pixel_size_um": 0.0}, "simulate-value", "pixel_size_um"),
        ({"density": float("nan")}, "simulate-value", "density"),
        ({"format": "stereoseq"}, "simulate-value", "merscope"),
        ({"tile_px": 100}, "simulate-value", "256"),
        ({"slides": 0}, "simulate-value", "slides"),
        ({"channels": ("DAPY",)}, "simulate-value", "DAPI"),
    ],
)
def test_mistakes_are_named_and_leave_nothing(arguments: dict, code: str, word: str, tmp_path: Path):
    with pytest.raises(CellquiltError, match=word) as caught:
        simulate(tmp_path / "out", **{"width_px": 256, **arguments})
    assert caught.value.code == code
    assert list(tmp_path.iterdir()) == []


def test_existing_output_is_kept(tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("x")
    with pytest.raises(CellquiltError) as caught:
        simulate(tmp_path / "out", width_px=256)
    assert caught.value.code == "output-exists"
    assert (tmp_path / "out/mine").read_text() == "x"
    simulate(tmp_path / "out", width_px=256, overwrite=True, image=False, with_transcripts=False)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["sheet.csv", "slide_0"]


def test_presets_name_real_parameters():
    for preset in PRESETS:
        assert make_parameters(preset).seed == 0


# --- parts


def test_keep_largest_part():
    labels = np.array([[1, 1, 0, 2, 2], [0, 0, 1, 2, 0], [3, 0, 1, 1, 2], [0, 3, 0, 1, 2]], np.int32)
    keep_largest_part(labels, 3, 1)
    assert labels.tolist() == [[0, 0, 0, 2, 2], [0, 0, 1, 2, 0], [3, 0, 1, 1, 0], [0, 0, 0, 1, 0]]
    keep_largest_part(labels, 3, 2)
    assert (labels != 3).all()


# --- scores


def test_truth_against_itself_is_perfect(cohort: Path):
    truth = cohort / "slide_0/truth"
    geometry, _, _ = read_geoparquet(truth / "cells.parquet")
    nuclei, _, _ = read_geoparquet(truth / "nuclei.parquet")
    scores = truth_scores(geometry[::-1], truth, nuclei=nuclei)
    for part, n in (("cells", len(geometry)), ("nuclei", len(nuclei))):
        assert scores[part]["n_true"] == scores[part]["n_found"] == n
        assert all(scores[part][f"f1_{t}"] == 1 for t in (0.5, 0.75, 0.9))
        assert scores[part]["mean_iou"] == pytest.approx(1)


def test_scores_count_missed_false_and_shifted_cells(tmp_path: Path):
    from cellquilt.core.shapes import write_geoparquet

    true = np.array([shapely.box(x, 0, x + 10, 10) for x in (0, 20, 40, 60)], dtype=object)
    ids = np.arange(1, 5)
    write_geoparquet(tmp_path / "cells.parquet", true, {"cell_id": ids, "cut_by_edge": ids == 1})
    # Half of the first; the second twice, once whole; the third exactly; one where there is nothing.
    boxes = [(0, 0, 6, 10), (20, 0, 28, 10), (20, 0, 30, 10), (40, 0, 50, 10), (90, 0, 99, 9)]
    found = np.array([shapely.box(*box) for box in boxes], dtype=object)
    cells = truth_scores(found, tmp_path)["cells"]
    assert (cells["n_true"], cells["n_found"]) == (4, 5)
    assert cells["precision_0.5"] == 3 / 5
    assert cells["recall_0.5"] == 3 / 4
    assert cells["f1_0.75"] == pytest.approx(2 * 2 / 9)
    assert cells["mean_iou"] == pytest.approx((0.6 + 1 + 1 + 0) / 4)
    inner = truth_scores(found, tmp_path, inner_only=True)["cells"]
    assert (inner["n_true"], inner["n_found"]) == (3, 4)
    in_microns = ShapesTable(
        np.arange(5).astype(str),
        shapely.transform(found, lambda xy: xy / 4),
        transforms={"global": np.diag([4.0, 4, 1])},
    )
    assert truth_scores(in_microns, tmp_path)["cells"] == cells
    with pytest.raises(CellquiltError) as caught:
        truth_scores(found, tmp_path / "nowhere")
    assert caught.value.code == "truth-missing"


def test_store_scores_follow_the_assignment(cohort: Path, tmp_path: Path):
    import pyarrow as pa
    from cellquilt.core import zarr_json
    from cellquilt.core.points import PointsWriter
    from cellquilt.core.shapes import write_shapes

    truth = cohort / "slide_0/truth"
    geometry, cells, _ = read_geoparquet(truth / "cells.parquet")
    names = np.array([f"s-{k}" for k in cells["cell_id"].to_pylist()])
    store = tmp_path / "s.zarr"
    zarr_json.write_group(store)
    write_shapes(store / "shapes/cell_boundaries", ShapesTable(names, geometry, transforms={"global": np.eye(3)}))
    true = pq.read_table(truth / "transcripts_truth.parquet")
    cell = true["cell_id"].to_numpy().copy()
    from_cell = np.flatnonzero(cell)
    cell[from_cell[::4]] = 0  # every fourth one left out
    words = [None if k == 0 else f"s-{k}" for k in cell.tolist()]
    table = pa.table({"x": true["x"], "y": true["y"], "cell_id": pa.array(words, pa.string())})
    table = table.append_column("transcript_id", pa.array(np.arange(len(words)), pa.uint64()))
    with PointsWriter(store / "points/transcripts", {"global": np.eye(3)}) as writer:
        for start in range(0, len(table), 5000):
            writer.write(table.slice(start, 5000))
    scores = truth_scores(store, truth)
    assert scores["cells"]["f1_0.9"] == 1
    assert "nuclei" not in scores
    found = scores["transcripts"]
    assert found["share_in_true_cell"] == pytest.approx(0.75, abs=0.001)
    assert found["share_assigned"] == pytest.approx(np.count_nonzero(cell) / len(cell))
    assert found["precision"] == 1
    pairs, counts = np.unique([cell[from_cell], true["cell_id"].to_numpy()[from_cell]], axis=1, return_counts=True)
    assert found["ari"] == pytest.approx(adjusted_rand(*pairs, counts, pairs[0] == 0))
    assert 0.6 < found["ari"] < 0.8  # 9 of 16 pairs stay together
    with pytest.raises(CellquiltError) as caught:
        truth_scores(store, cohort / "slide_1/truth")
    assert caught.value.code == "truth-mismatch"


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=2, max_size=30))
def test_adjusted_rand_counts_pairs(items: list[tuple[int, int]]):
    one, other = np.array(items).T
    pairs, counts = np.unique([one, other], axis=1, return_counts=True)
    a, b = np.triu_indices(len(one), 1)
    same_one, same_other = one[a] == one[b], other[a] == other[b]
    expected = same_one.sum() * same_other.sum() / len(a)
    most = (same_one.sum() + same_other.sum()) / 2
    direct = 1.0 if most == expected else ((same_one & same_other).sum() - expected) / (most - expected)
    assert adjusted_rand(*pairs, counts) == pytest.approx(direct)
    single = np.where(one == 0, 10 + np.arange(len(one)), one)
    spelled_out = np.unique([single, other], axis=1, return_counts=True)
    by_flag = adjusted_rand(*pairs, counts, pairs[0] == 0)
    assert by_flag == pytest.approx(adjusted_rand(*spelled_out[0], spelled_out[1]))


def test_large_mosaics_get_64_bit_offsets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("cellquilt.simulate.writer._BIG", 1000)
    simulate(tmp_path / "out", width_px=300, image_only=True)
    with tifffile.TiffFile(tmp_path / "out/slide_0/image.ome.tif") as tiff:
        assert tiff.is_bigtiff
        slide = Slide(make_parameters(width_px=300))
        assert np.array_equal(tiff.asarray(), slide.image(slide.tile((0, 300, 0, 300))))
