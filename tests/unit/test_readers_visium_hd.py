"""Visium HD: Space Ranger's output against spatialdata-io and the truth; folders that are wrong; bins to cells."""

import contextlib
import json
import shutil
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata
import cellquilt as cq
import h5py
import machine_cases
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapely
import tifffile
from cellquilt.aggregation.stage import aggregate_slide
from cellquilt.core.bins import read_bins
from cellquilt.core.errors import CellquiltError
from cellquilt.core.images import open_image
from cellquilt.core.labels import Labels
from cellquilt.core.points import iter_points
from cellquilt.core.settings import Settings
from cellquilt.core.shapes import ShapesTable, read_shapes, write_geoparquet
from cellquilt.core.store import Store
from cellquilt.core.transforms import apply, length_scale
from cellquilt.readers.visium_hd import Matrix, bin_places
from cellquilt.resolve.stage import resolve_slide
from cellquilt.simulate import Slide, make_parameters, simulate
from cellquilt.simulate.bins import count_in_bins
from cellquilt.simulate.visium_hd import ANGLE_DEG, stained
from machine_cases import facts, pixels
from PIL import Image

PIXEL, WIDTH, HEIGHT = 0.3, 220, 170
MADE = {"width_px": WIDTH, "height_px": HEIGHT, "pixel_size_um": PIXEL, "seed": 5, "n_genes": 30}
BINS = "binned_outputs/square_002um"


def convert(folder: Path, output: Path | None = None, **given: Any) -> Store:
    output = output or folder.parent / "out.raw.zarr"
    cells = given.pop("prior_cells", None)
    return machine_cases.convert(folder, "visium_hd", output, cells, **{"chunk_px": 128, **given})


def fails(folder: Path, **given: Any) -> CellquiltError:
    with pytest.raises(CellquiltError) as caught:
        convert(folder, **given)
    return caught.value


def table(store: Store, name: str) -> anndata.AnnData:
    return anndata.read_zarr(store.element("tables", name))


def shapes(store: Store, name: str) -> ShapesTable:
    return read_shapes(store.element("shapes", name))


def read_reference(folder: Path) -> Any:
    import spatialdata_io

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return spatialdata_io.visium_hd(folder, load_segmentations_only=False, load_nucleus_segmentations=True)


@dataclass
class Case:
    folder: Path
    store: Store
    reference: Any


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> Case:
    output = tmp_path_factory.mktemp("visium_hd") / "sim"
    simulate(output, format="visium_hd", tile_px=256, density_factor=0.5, **MADE)
    folder = output / "slide_0"
    return Case(folder, convert(folder), read_reference(folder))


@pytest.fixture
def copy(case, tmp_path) -> Path:
    return shutil.copytree(case.folder, tmp_path / "copy", ignore=shutil.ignore_patterns("truth"))


# --- ours, spatialdata-io's and the truth -----------------------------------------------------------------------------


def test_images_agree(case) -> None:
    image = open_image(case.store.path)
    assert image.channels == ["r", "g", "b"]
    assert image.pixel_size_um == pytest.approx(PIXEL)
    reference = np.asarray(case.reference["slide_0_full_image"]["scale0"]["image"].values)
    np.testing.assert_array_equal(pixels(case.store), reference)
    slide = Slide(make_parameters(**MADE, density_factor=0.5))
    np.testing.assert_array_equal(reference, stained(slide.image(slide.tile((0, HEIGHT, 0, WIDTH)))))
    assert reference.max() > 200
    assert reference.min() < 120  # glass and nuclei


@pytest.mark.parametrize("size", [2, 8, 16])
def test_bins_agree(case, tmp_path, size) -> None:
    store = case.store if size == 2 else convert(case.folder, tmp_path / "s.zarr", visium_hd_bin_um=size)
    bins = read_bins(store)
    ours, reference = table(store, "bins"), case.reference[f"square_{size:03d}um"]
    assert ours.var_names.tolist() == reference.var_names.tolist() == bins.genes
    for column in ("array_row", "array_col"):
        np.testing.assert_array_equal(ours.obs[column], reference.obs[column])
    np.testing.assert_array_equal(ours.X.toarray(), reference.X.toarray())
    squares = case.reference[f"slide_0_square_{size:03d}um"].geometry
    centres = np.column_stack([bins.column, bins.row]) + 0.5
    np.testing.assert_allclose(
        apply(bins.transforms["global"], centres), np.column_stack([squares.centroid.x, squares.centroid.y]), atol=1e-6
    )
    assert length_scale(bins.transforms["microns"]) == pytest.approx(size)
    np.testing.assert_allclose(length_scale(bins.transforms["global"]) ** 2, squares.area, rtol=1e-6)
    assert facts(store)["n_bins"] == len(bins)


def test_bins_count_the_true_transcripts(case) -> None:
    bins = read_bins(case.store)
    truth = count_in_bins(case.folder / "truth", angle_deg=ANGLE_DEG)
    np.testing.assert_array_equal(bins.row, truth.row)
    np.testing.assert_array_equal(bins.column, truth.column)
    ours = table(case.store, "bins")
    assert (truth.counts != ours.X).nnz == 0
    np.testing.assert_allclose(bins.transforms["microns"], truth.to_um, atol=1e-6)
    labels = Labels(case.store.element("labels", "bins_grid")).read_all()
    assert (labels[bins.row, bins.column] == ours.obs["bin_id"]).all()
    assert np.count_nonzero(labels) == len(bins)


def test_raw_bins_are_all_places_of_the_grid(case, tmp_path) -> None:
    store = convert(case.folder, tmp_path / "raw.zarr", visium_hd_counts="raw")
    raw, filtered = table(store, "bins"), table(case.store, "bins")
    shape = read_bins(store).shape
    assert len(raw) == shape[0] * shape[1] > len(filtered)
    assert raw.X.sum() == filtered.X.sum()


def test_cells_and_nuclei_agree(case) -> None:
    names = pd.read_parquet(case.folder / "truth" / "vendor_ids.parquet").set_index("cell_id")["vendor_id"]
    for element, file in (("vendor_cells", "cells"), ("vendor_nuclei", "nuclei")):
        ours = shapes(case.store, element)
        known = pq.read_table(case.folder / "truth" / f"{file}.parquet")
        geometry = shapely.from_wkb(known.column("geometry").to_numpy(zero_copy_only=False))
        outer = [shapely.Polygon(max(shapely.get_parts(cell), key=shapely.area).exterior) for cell in geometry]
        true = dict(zip(names[known.column("cell_id").to_pylist()], outer, strict=True))
        assert sorted(ours.ids) == sorted(true)
        expected = np.array([true[name] for name in ours.ids], dtype=object)
        assert shapely.equals(shapely.normalize(ours.geometry), shapely.normalize(expected)).all()
        reference = case.reference[f"slide_0_{'cell' if file == 'cells' else 'nucleus'}_segmentations"]
        # spatialdata-io leaves out what its matrix does not have.
        assert set(reference.index) <= set(ours.ids)
        place = pd.Series(np.arange(len(ours)), index=ours.ids)[reference.index]
        assert shapely.equals(
            shapely.normalize(reference.geometry.to_numpy()), shapely.normalize(ours.geometry[place])
        ).all()


def test_the_machines_counts_agree(case) -> None:
    ours, reference = table(case.store, "vendor_table"), case.reference["cell_segmentations"]
    assert ours.obs_names.tolist() == shapes(case.store, "vendor_cells").ids.tolist()
    counted = ours[ours.obs["counted"].to_numpy()]
    assert counted.obs_names.tolist() == reference.obs_names.tolist()
    np.testing.assert_array_equal(counted.X.toarray(), reference.X.toarray())
    assert ours.X.sum() == counted.X.sum() > 0


# --- bins to cells ----------------------------------------------------------------------------------------------------


def test_vendor_cells_have_the_counts_that_the_machine_gave(case, tmp_path) -> None:
    chosen = Settings(segmentation="vendor", average_intensities=False)
    found = resolve_slide(case.store.path, settings=chosen, output=tmp_path / "cells.zarr")
    made = aggregate_slide(case.store.path, cells=found, settings=chosen, output=tmp_path / "table.zarr")
    ours = table(Store(made), "table")
    vendor = shapes(Store(found), "cell_boundaries").columns["vendor_id"]
    machine = table(case.store, "vendor_table")[vendor, ours.var_names]
    same = (ours.X != machine.X).sum(axis=1).A1 == 0
    # Two cells may overlap where a hole was filled; then a bin is one cell's by both rules, but maybe not the same.
    assert same.mean() > 0.97
    assert ours.X.sum() == machine.X.sum() == facts(Store(made))["n_counted"]


def test_given_cells_get_the_true_counts(case, tmp_path) -> None:
    known = pq.read_table(case.folder / "truth" / "cells.parquet")
    geometry = shapely.from_wkb(known.column("geometry").to_numpy(zero_copy_only=False))
    names = known.column("cell_id").to_numpy().astype(str)
    microns = shapely.transform(geometry, lambda xy: xy * PIXEL)
    write_geoparquet(tmp_path / "cells.parquet", microns, {"cell_id": names})
    folder = shutil.copytree(case.folder, tmp_path / "copy", ignore=shutil.ignore_patterns("segmented_outputs"))
    store = convert(folder, prior_cells=tmp_path / "cells.parquet")
    assert not store.has("shapes", "vendor_cells")
    chosen = Settings(segmentation="vendor", average_intensities=True)
    found = resolve_slide(store.path, settings=chosen, output=tmp_path / "cells.zarr")
    made = aggregate_slide(store.path, cells=found, settings=chosen, output=tmp_path / "table.zarr")
    ours = table(Store(made), "table")
    ids = shapes(Store(found), "cell_boundaries").columns["vendor_id"]
    truth = count_in_bins(case.folder / "truth", angle_deg=ANGLE_DEG)
    centres = apply(truth.to_um, np.column_stack([truth.column, truth.row]) + 0.5)
    tree = shapely.STRtree(microns)
    point, cell = tree.query(shapely.points(centres), predicate="intersects")
    assert len(np.unique(point)) == len(point)
    expected = np.zeros((len(microns), len(truth.genes)), np.int64)
    np.add.at(expected, cell, truth.counts.toarray()[point])
    place = pd.Series(np.arange(len(names)), index=names)[ids]
    np.testing.assert_array_equal(ours.X.toarray(), expected[place])
    assert ours.obs["n_bins"].sum() == len(point)
    assert list(ours.obsm["intensities"].columns) == ["r", "g", "b"]


def test_counts_as_transcripts_for_methods_that_take_nothing_else(case, tmp_path, monkeypatch) -> None:
    from cellquilt.readers import visium_hd
    from cellquilt.segment.stages import patchify_transcripts

    monkeypatch.setattr(visium_hd, "_BATCH_ROWS", 500)
    monkeypatch.setattr(visium_hd, "_BYTES_AN_ENTRY", 50_000)
    store = convert(case.folder, tmp_path / "s.zarr", visium_hd_transcripts=True, memory_mb=400)
    batches = list(iter_points(store.element("points", "transcripts")))
    points = pa.concat_tables(batches).unify_dictionaries().to_pandas()
    bins, counts = read_bins(store), table(store, "bins").X
    assert len(points) == counts.sum() == facts(store)["n_transcripts"]
    assert points["transcript_id"].tolist() == list(range(len(points)))
    found = np.zeros(counts.shape, np.int64)
    code = pd.Categorical(points["gene"].astype(str), categories=bins.genes).codes
    np.add.at(found, (points["bin_id"].to_numpy() - 1, code), 1)
    np.testing.assert_array_equal(found, counts.toarray())
    centres = apply(bins.transforms["microns"], np.column_stack([bins.column, bins.row]) + 0.5)
    np.testing.assert_allclose(points[["x", "y"]], centres[points["bin_id"] - 1])
    assert points["passes_qv"].all()
    assert not points["is_control"].any()
    # Cells count them as they count bins.
    chosen = Settings(segmentation="vendor", average_intensities=False, memory_mb=400)
    cells = resolve_slide(store.path, settings=chosen, output=tmp_path / "cells.zarr")
    by_bins, by_points = (
        table(Store(aggregate_slide(source.path, cells=cells, settings=chosen, output=tmp_path / name)), "table")
        for source, name in ((case.store, "a.zarr"), (store, "b.zarr"))
    )
    assert (by_bins.X != by_points[:, by_bins.var_names].X).nnz == 0
    settings = Settings(transcripts_per_patch=1000, transcripts_patch_overlap_um=10.0, min_transcripts_per_patch=100)
    patchify_transcripts(store.path, method="proseg", settings=settings, output=tmp_path / "patches.zarr")
    assert Store(tmp_path / "patches.zarr").records[-1]["facts"]["n_patches"] > 1
    with pytest.raises(CellquiltError, match="visium_hd_transcripts"):
        patchify_transcripts(case.store.path, method="proseg", settings=settings, output=tmp_path / "none.zarr")


# --- what is read -----------------------------------------------------------------------------------------------------


def test_the_image_may_lie_elsewhere_and_be_of_another_kind(case, copy, tmp_path) -> None:
    whole = pixels(case.store)
    shutil.rmtree(copy / "microscope_image")
    assert fails(copy).code == "visium-hd-no-image"
    tifffile.imwrite(tmp_path / "my image.btf", whole.transpose(1, 2, 0), bigtiff=True, photometric="rgb")
    np.testing.assert_array_equal(pixels(convert(copy, fullres_image=str(tmp_path / "my image.btf"))), whole)
    Image.fromarray(whole.transpose(1, 2, 0)).save(copy / "tissue_image.png")
    np.testing.assert_array_equal(pixels(convert(copy)), whole)
    (copy / "tissue_image.png").rename(copy / "other.png")
    np.testing.assert_array_equal(pixels(convert(copy, fullres_image=str(copy / "other.png"))), whole)
    Image.fromarray(whole[0]).save(copy / "grey.png")
    np.testing.assert_array_equal(pixels(convert(copy, fullres_image=str(copy / "grey.png"))), whole[:1])


def test_the_small_image_and_none(case, copy) -> None:
    Image.fromarray(pixels(case.store).transpose(1, 2, 0)[::2, ::2]).save(copy / "spatial" / "tissue_hires_image.png")
    for path in copy.rglob("scalefactors_json.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "tissue_hires_scalef": 0.5}))
    small = convert(copy, visium_hd_image="hires")
    assert open_image(small.path).shape == (3, HEIGHT // 2, WIDTH // 2)
    assert open_image(small.path).pixel_size_um == pytest.approx(2 * PIXEL)
    none = convert(copy, copy.parent / "none.zarr", visium_hd_image="none")
    assert not none.names("images")
    for store, factor in ((small, 0.5), (none, 1.0)):
        for system, scaled in (("global", factor), ("microns", 1.0)):
            expected = np.diag([scaled, scaled, 1]) @ read_bins(case.store).transforms[system]
            np.testing.assert_allclose(read_bins(store).transforms[system], expected, atol=1e-6)
        areas = [
            shapely.area(shapes(found, "vendor_cells").geometry)
            * np.linalg.det(shapes(found, "vendor_cells").transforms["microns"])
            for found in (store, case.store)
        ]
        np.testing.assert_allclose(*areas)


def test_counts_are_read_in_blocks(case, monkeypatch) -> None:
    from cellquilt.readers import visium_hd

    monkeypatch.setattr(visium_hd, "_BYTES_AN_ENTRY", 50_000)
    matrix = Matrix(case.folder / BINS / "filtered_feature_bc_matrix.h5", "m")
    blocks = list(matrix.blocks(400))
    assert len(blocks) > 2
    assert max(block.nnz for block in blocks) <= 1000 + max(np.diff(block.indptr).max() for block in blocks)
    whole = table(case.store, "bins").X.toarray()
    np.testing.assert_array_equal(np.concatenate([block.toarray() for block in blocks]), whole)


def test_the_folder_may_be_that_of_the_bins(case, tmp_path) -> None:
    store = convert(case.folder / "binned_outputs", tmp_path / "s.zarr", visium_hd_image="none")
    assert len(read_bins(store)) == len(read_bins(case.store))


def test_names_of_bins() -> None:
    def places(*names: str) -> Any:
        return bin_places(np.array(names, "S").view(np.uint8).reshape(len(names), -1), 2)

    row, column = places("s_002um_00012_03349-1", "s_002um_99999_00000-1")
    assert (row.tolist(), column.tolist()) == ([12, 99999], [3349, 0])
    for name in ("AAACCTGAGAAACCAT-1", "s_008um_00012_00345-1", "s_002um_00012_0a345-1", "s_002um_12_345-1"):
        assert places(name) is None


def test_genes_of_one_name_stay_apart(copy) -> None:
    with h5py.File(copy / BINS / "filtered_feature_bc_matrix.h5", "r+") as file:
        names = file["matrix/features/name"][:]
        names[3] = names[2]
        file["matrix/features/name"][:] = names
    store = convert(copy)
    reference = read_reference(copy)["square_002um"]
    assert table(store, "bins").var_names.tolist() == reference.var_names.tolist()


def test_pixel_sizes_that_do_not_fit_are_told(copy) -> None:
    assert "taking 0.5" in facts(convert(copy, pixel_size_um=0.5))["warnings"][0]
    path = copy / BINS / "spatial" / "scalefactors_json.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "microns_per_pixel": 0.4}))
    store = convert(copy)
    assert "microns_per_pixel is 0.4" in facts(store)["warnings"][0]
    assert open_image(store.path).pixel_size_um == pytest.approx(PIXEL)


def test_notebooks_presets_and_the_verb_know_the_machine(case, tmp_path) -> None:
    from cellquilt.cli import main

    sdata = cq.io.visium_hd(case.folder, output=tmp_path / "s.zarr")
    assert {"tissue", "bins", "bins_grid", "vendor_cells", "vendor_nuclei", "vendor_table"} == {
        name for _, name, _ in sdata.gen_elements()
    }
    assert sdata["bins"].uns["spatialdata_attrs"]["region"] == "bins_grid"
    assert Settings(preset="visium_hd")["segmentation"] == "stardist"
    with contextlib.suppress(SystemExit):
        main(["simulate", str(tmp_path / "cli"), "--format", "visium_hd", "--width-px", "80"])
    assert "slide_0,visium_hd,slide_0" in (tmp_path / "cli" / "sheet.csv").read_text()


# --- folders that are wrong -------------------------------------------------------------------------------------------


def _gone(*names: str) -> Callable[[Path], object]:
    def remove(folder: Path) -> None:
        for name in names:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return remove


def _positions(change: Callable[[pd.DataFrame], pd.DataFrame]) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        path = folder / BINS / "spatial" / "tissue_positions.parquet"
        change(pd.read_parquet(path)).to_parquet(path, index=False)

    return edit


def _matrix(
    change: Callable[[Any], object], name: str = f"{BINS}/filtered_feature_bc_matrix.h5"
) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        with h5py.File(folder / name, "r+") as file:
            change(file["matrix"])

    return edit


def _replace(group: Any, name: str, values: Any) -> None:
    del group[name]
    group[name] = values


def _text(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def _image(values: np.ndarray, **more: Any) -> Callable[[Path], object]:
    return lambda folder: tifffile.imwrite(next((folder / "microscope_image").iterdir()), values, **more)


def _put(group: Any, name: str, place: int, value: Any) -> None:
    values = group[name][:]
    values[place] = value
    group[name][:] = values


SCALES, POSITIONS = f"{BINS}/spatial/scalefactors_json.json", f"{BINS}/spatial/tissue_positions.parquet"
COUNTS, CELLS = f"{BINS}/filtered_feature_bc_matrix.h5", "segmented_outputs/cell_segmentations.geojson"
BAD: dict[str, tuple[Callable[[Path], object], str, tuple[str, ...]]] = {
    "no bins": (_gone("binned_outputs"), "visium-hd-no-bins", ("square_002um", "microscope_image", "outs")),
    "archives": (
        lambda folder: (shutil.rmtree(folder / "binned_outputs"), (folder / "binned_outputs.tar.gz").write_bytes(b"x")),
        "visium-hd-no-bins", ("unpack", "binned_outputs.tar.gz"),
    ),
    "the folder above": (
        lambda folder: (shutil.move(folder / "binned_outputs", folder / "outs" / "binned_outputs")),
        "visium-hd-no-bins", ("copy/outs",),
    ),
    "no such bins": (_gone("binned_outputs/square_002um"), "visium-hd-no-bins", ("8 µm, 16 µm", "visium_hd_bin_um=8")),
    "no scales": (_gone(SCALES), "visium-hd-scales", ("does not exist",)),
    "scales that are none": (_text(SCALES, b"{"), "visium-hd-scales", ("no JSON",)),
    "scales that are a list": (_text(SCALES, b"[1]"), "visium-hd-scales", ("no JSON",)),
    "scales of other bins": (_text(SCALES, b'{"bin_size_um": 8.0}'), "visium-hd-scales", ("8", "2 µm")),
    "no positions": (_gone(POSITIONS), "visium-hd-positions", ("does not exist",)),
    "positions without a column": (
        _positions(lambda at: at.drop(columns="array_row")), "visium-hd-positions", ("array_row", "array_col")
    ),
    "positions that are no numbers": (
        _positions(lambda at: at.assign(pxl_row_in_fullres="x")), "visium-hd-positions", ("no number",)
    ),
    "positions that are missing": (
        _positions(lambda at: at.assign(pxl_row_in_fullres=np.nan)), "visium-hd-positions", ("pxl_row_in_fullres",)
    ),
    "positions off the grid": (
        _positions(lambda at: at.assign(pxl_row_in_fullres=at["pxl_row_in_fullres"] + 40.0 * (at.index == 9))),
        "visium-hd-positions", ("bins off",),
    ),
    "positions in one place": (
        _positions(lambda at: at.assign(pxl_row_in_fullres=1.0, pxl_col_in_fullres=2.0)),
        "visium-hd-positions", ("one place",),
    ),
    "positions in one line": (
        _positions(lambda at: at[at["array_row"] == 3]), "visium-hd-positions", ("in one line",)
    ),
    "no positions in it": (_positions(lambda at: at[:0]), "visium-hd-positions", ("too few",)),
    "names of another kind": (
        _positions(lambda at: at.assign(barcode="AAACCT-1")), "visium-hd-positions", ("AAACCT-1", "s_002um_")
    ),
    "rows beyond any slide": (
        _positions(lambda at: at.assign(array_row=at["array_row"] + 10**9)), "visium-hd-positions", ("beyond",)
    ),
    "no counts": (_gone(COUNTS), "visium-hd-counts", ("does not exist", "visium_hd_counts")),
    "counts without genes": (_matrix(lambda group: group.__delitem__("features")), "visium-hd-counts", (COUNTS,)),
    "counts of other genes": (
        _matrix(lambda group: _put(group, "shape", 0, 5)), "visium-hd-counts", ("5 features",)
    ),
    "an index beyond the genes": (
        _matrix(lambda group: _put(group, "indices", 4, 900)), "visium-hd-counts", ("beyond its 30 features",)
    ),
    "counts below nothing": (_matrix(lambda group: _put(group, "data", 4, -1)), "visium-hd-counts", ("no counts",)),
    "shares for counts": (
        _matrix(lambda group: _replace(group, "data", np.full(group["data"].shape, 0.5))),
        "visium-hd-counts", ("no counts",),
    ),
    "starts that fall": (_matrix(lambda group: _put(group, "indptr", 4, 9**9)), "visium-hd-counts", ("indptr",)),
    "a bin beside the grid": (
        _matrix(lambda group: _put(group, "barcodes", 0, b"s_002um_09999_00000-1")),
        "visium-hd-counts", ("s_002um_09999_00000-1", "not on the grid"),
    ),
    "a bin twice": (
        _matrix(lambda group: _put(group, "barcodes", 0, group["barcodes"][1])), "visium-hd-counts", ("two columns",)
    ),
    "bins of other bins": (
        lambda folder: shutil.copy(folder / COUNTS.replace("002um", "008um"), folder / COUNTS),
        "visium-hd-counts", ("s_008um",),
    ),
    "no image": (_gone("microscope_image"), "visium-hd-no-image", ("microscope_image", "fullres_image")),
    "two images": (
        lambda folder: (folder / "microscope_image" / "b.png").write_bytes(b"x"),
        "visium-hd-images-ambiguous", ("b.png", "fullres_image"),
    ),
    "an image that is none": (
        lambda folder: next((folder / "microscope_image").iterdir()).write_bytes(b"hello"),
        "not-a-tiff", ("tissue_image",),
    ),
    "an image cut short": (
        lambda folder: (file := next((folder / "microscope_image").iterdir())).write_bytes(file.read_bytes()[:9000]),
        "tiff-truncated", ("tissue_image",),
    ),
    "a small image": (
        _image(np.zeros((60, 80, 3), np.uint8), photometric="rgb"),
        "visium-hd-image-size", ("80 × 60", "full-resolution"),
    ),
    "a stack": (
        _image(np.zeros((4, 240, 300), np.uint8), ome=True, metadata={"axes": "ZYX"}, photometric="minisblack"),
        "visium-hd-image-planes", ("4 planes",),
    ),
    "cells that are none": (_text(CELLS, b"{"), "visium-hd-cells", (CELLS,)),
    "cells that are points": (
        _text(CELLS, b'{"type":"FeatureCollection","features":[{"type":"Feature","properties":{"cell_id":1},'
              b'"geometry":{"type":"Point","coordinates":[1,2]}}]}'),
        "visium-hd-cells", ("Point",),
    ),
    "cells without numbers": (
        _text(CELLS, b'{"type":"FeatureCollection","features":[{"type":"Feature","properties":{"cell_id":"a"},'
              b'"geometry":{"type":"Polygon","coordinates":[[[0,0],[9,0],[9,9],[0,0]]]}}]}'),
        "visium-hd-cells", ("whole numbers",),
    ),
    "counts of cells that are none": (
        _text("segmented_outputs/filtered_feature_cell_matrix.h5", b"hello"), "visium-hd-counts", ("cell_matrix.h5",)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_wrong_folders_say_what_is_wrong(copy, name) -> None:
    spoil, code, words = BAD[name]
    if name == "the folder above":
        (copy / "outs").mkdir()
    spoil(copy)
    error = fails(copy)
    assert error.code == code, error
    for word in words:
        assert word in error.message + error.hint, error
    assert error.hint
    assert str(copy.parent) not in str(error)


def test_settings_that_find_nothing(case, copy, tmp_path) -> None:
    assert fails(case.folder / BINS / "filtered_feature_bc_matrix.h5").code == "visium-hd-no-folder"
    assert fails(copy, fullres_image="absent.tif").code == "visium-hd-no-image"
    assert fails(copy, visium_hd_bin_um=3).code == "visium-hd-no-bins"
    (copy / "spatial" / "tissue_hires_image.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40))
    assert fails(copy, visium_hd_image="hires").code == "picture-unreadable"
    (copy / "spatial" / "tissue_hires_image.png").unlink()
    assert fails(copy, visium_hd_image="hires").code == "visium-hd-no-image"
    header = b"\x89PNG\r\n\x1a\n" + b"\x00\x00\x00\rIHDR" + (12_000).to_bytes(4, "big") * 2 + b"\x08\x02\x00\x00\x00"
    data = b"\x00\x00\x00\x00IDAT" + zlib.crc32(b"IDAT").to_bytes(4, "big")
    (copy / "big.png").write_bytes(header + zlib.crc32(header[12:]).to_bytes(4, "big") + data)
    error = fails(copy, fullres_image=str(copy / "big.png"), memory_mb=500)
    assert (error.code, "12000" in error.message) == ("picture-too-large", True)


def test_damaged_files_never_end_in_anything_else(copy) -> None:
    """Cut short, or with noise in them: an error that names its cause, or a slide; and soon."""
    rng = np.random.default_rng(1)
    image = next((copy / "microscope_image").iterdir()).relative_to(copy).as_posix()
    for name in (COUNTS, POSITIONS, SCALES, CELLS, image, "segmented_outputs/filtered_feature_cell_matrix.h5"):
        whole = (copy / name).read_bytes()
        for attempt in range(3):
            content = bytearray(whole)
            if attempt == 0:
                content = content[: int(len(content) * rng.uniform(0.05, 0.95))]
            else:
                for place in rng.integers(0, min(len(content), 3000), 10):
                    content[place] = int(rng.integers(0, 256))
            (copy / name).write_bytes(content)
            with contextlib.suppress(CellquiltError):
                convert(copy)
        (copy / name).write_bytes(whole)
    convert(copy)
