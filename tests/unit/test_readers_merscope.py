"""MERSCOPE: the real region whole, and every way in which a region's folder can be wrong."""

import shutil
from pathlib import Path

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapely
import tifffile
from cellquilt.core.errors import CellquiltError
from cellquilt.core.images import open_image
from cellquilt.core.points import iter_points, points_transforms, xy
from cellquilt.core.settings import Settings
from cellquilt.core.shapes import read_shapes
from cellquilt.core.store import Store
from cellquilt.core.transforms import apply
from cellquilt.readers import convert_slide
from cellquilt.readers.merscope import read_transform

TO_PX = np.array([[9.0, 0.5, -20.0], [0.25, -8.0, 900.0], [0, 0, 1]])  # sheared, flipped, of unequal scales
TABLE = (
    ",barcode_id,global_x,global_y,global_z,x,y,fov,gene,transcript_id\n"
    "7,0,10.5,20.25,0.0,1.0,2.0,3,NANOG,ENSMUST1\n"
    "9,1,-4.0,30.0,6.0,1.5,2.5,3,Blank-7,ENSMUST1\n"
    "11,1,11.0,31.0,3.0,1.5,2.5,3,NEGR1,ENSMUST2\n"
)
SHAPE = (70, 90)


def mosaic(stain: str, plane: int) -> np.ndarray:
    seed = sum(stain.encode()) * 100 + plane
    return np.random.default_rng(seed).integers(0, 60_000, SHAPE).astype(np.uint16)


@pytest.fixture
def region(tmp_path) -> Path:
    folder = tmp_path / "region_0"
    (folder / "images").mkdir(parents=True)
    for stain in ("PolyT", "DAPI", "Cellbound10", "Cellbound2"):
        for plane in (0, 1, 2):
            tifffile.imwrite(folder / "images" / f"mosaic_{stain}_z{plane}.tif", mosaic(stain, plane))
    np.savetxt(folder / "images" / "micron_to_mosaic_pixel_transform.csv", TO_PX)
    (folder / "detected_transcripts.csv").write_text(TABLE)
    return folder


def convert(folder: Path, **given) -> Store:
    output = folder.parent / "out.raw.zarr"
    convert_slide(folder, technology="merscope", sample="s", output=output, settings=Settings(given), overwrite=True)
    return Store(output)


def fails(folder: Path, **given) -> CellquiltError:
    with pytest.raises(CellquiltError) as caught:
        convert(folder, **given)
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name]  # nothing half-written
    return caught.value


def transcripts(store: Store) -> pa.Table:
    return pa.concat_tables(iter_points(store.element("points", "transcripts"))).unify_dictionaries()


@pytest.fixture(scope="module")
def liver(shared_data, tmp_path_factory) -> Store:
    folder = tmp_path_factory.mktemp("liver")
    source = shared_data / "merscope_liver"
    region = folder / "region"
    region.mkdir()
    (region / "images").symlink_to(source / "images")
    (region / "detected_transcripts.csv").symlink_to(source / "detected_transcripts.csv")
    (region / "cell_boundaries.parquet").symlink_to(source / "vendor_cells_cellpose.parquet")
    return convert(region)


def test_the_real_region_keeps_every_transcript(liver, shared_data) -> None:
    import pandas as pd

    found = transcripts(liver)
    truth = pd.read_csv(shared_data / "merscope_liver" / "detected_transcripts.csv")
    assert found.num_rows == len(truth) == 5936
    np.testing.assert_array_equal(found.column("x").to_numpy(), truth["global_x"])
    np.testing.assert_array_equal(found.column("y").to_numpy(), truth["global_y"])
    np.testing.assert_array_equal(found.column("z_plane").to_numpy(), truth["global_z"])
    np.testing.assert_array_equal(found.column("z").to_numpy(), truth["global_z"] * 1.5)
    assert found.schema.field("z_plane").type == pa.int32()
    assert found.column("gene").to_pylist() == truth["gene"].tolist()
    assert found.column("transcript_id").to_pylist() == list(range(5936))
    assert found.column("vendor_transcript_id").to_pylist() == truth["transcript_id"].tolist()
    assert found.column("vendor_row").to_pylist() == truth.iloc[:, 0].tolist()
    control = found.column("is_control").to_numpy()
    assert control.sum() == 22
    genes = np.asarray(found.column("gene").to_pylist())
    assert sorted(set(genes[control])) == sorted({name for name in genes if name.startswith("Blank-")})
    assert len(set(genes[control])) == 15


def test_the_real_region_lies_where_it_should(liver) -> None:
    pixels = apply(points_transforms(liver.element("points", "transcripts"))["global"], xy(transcripts(liver)))
    inside = ((pixels >= 0) & (pixels < 512)).all(1)
    assert inside.sum() == 3334
    image = open_image(liver.path)
    assert image.pixel_size_um == pytest.approx(0.108, abs=1e-4)
    around = image.transforms["microns"] @ np.linalg.inv(image.transforms["microns"])
    np.testing.assert_allclose(around, np.eye(3), atol=1e-9)


def test_the_real_region_has_its_stains_projected(liver, shared_data) -> None:
    image = open_image(liver.path)
    assert image.channels == ["DAPI", "Cellbound1", "Cellbound2"]
    for channel in image.channels:
        planes = [
            tifffile.imread(shared_data / "merscope_liver" / "images" / f"mosaic_{channel}_z{z}.tif") for z in range(7)
        ]
        np.testing.assert_array_equal(image.read(0, 512, 0, 512, channels=[channel])[0], np.max(planes, axis=0))


def test_the_real_region_has_the_vendors_cells_of_all_planes(liver, shared_data) -> None:
    cells = read_shapes(liver.element("shapes", "vendor_cells"))
    truth = pq.read_table(shared_data / "merscope_liver" / "vendor_cells_cellpose.parquet")
    assert len(cells) == 98
    assert len(set(cells.ids)) == 98
    assert cells.columns["entity_id"].tolist() == [str(value) for value in truth.column("EntityID").to_pylist()]
    assert cells.columns["z_plane"].tolist() == truth.column("ZIndex").to_pylist()
    assert shapely.equals(cells.geometry, shapely.from_wkb(truth.column("Geometry").to_pylist())).all()
    # In pixels of the image they lie inside it.
    corners = apply(cells.transforms["global"], shapely.get_coordinates(cells.geometry))
    assert corners.min() > -1
    assert corners.max() < 513


@pytest.mark.parametrize("z", ["max", "mean", "middle", "2"])
def test_planes_and_projections(region, z) -> None:
    image = open_image(convert(region, z=z, chunk_px=64).path)
    assert image.channels == ["DAPI", "Cellbound2", "Cellbound10", "PolyT"]
    for channel in image.channels:
        planes = np.stack([mosaic(channel, plane) for plane in range(3)])
        expected = {
            "max": planes.max(0),
            "mean": np.floor(planes.astype(float).mean(0) + 0.5),
            "middle": planes[1],
            "2": planes[2],
        }[z]
        np.testing.assert_array_equal(image.read(0, 70, 0, 90, channels=[channel])[0], expected)


def test_points_and_image_agree_under_any_affine_map(region) -> None:
    store = convert(region, z_step_um=2)
    found = transcripts(store)
    assert found.column_names[:8] == ["x", "y", "z", "z_plane", "gene", "transcript_id", "is_control", "passes_qv"]
    assert found.column("z").to_pylist() == [0, 12, 6]
    assert found.column("vendor_x").to_pylist() == [1, 1.5, 1.5]
    assert found.column("is_control").to_pylist() == [False, True, False]
    pixels = apply(points_transforms(store.element("points", "transcripts"))["global"], xy(found))
    np.testing.assert_allclose(pixels[0], [9 * 10.5 + 0.5 * 20.25 - 20, 0.25 * 10.5 - 8 * 20.25 + 900])
    np.testing.assert_allclose(apply(open_image(store.path).transforms["microns"], pixels), xy(found), atol=1e-9)


def test_spatialdata_agrees_on_the_coordinates(region) -> None:
    import spatialdata

    sdata = spatialdata.read_zarr(convert(region).path)
    corners = apply(np.linalg.inv(TO_PX), np.array([[0, 0], [90, 0], [0, 70], [90, 70]]))
    extent = spatialdata.get_extent(sdata["morphology"], coordinate_system="microns")
    assert extent["x"] == pytest.approx((corners[:, 0].min(), corners[:, 0].max()))
    assert extent["y"] == pytest.approx((corners[:, 1].min(), corners[:, 1].max()))


def test_the_order_in_the_folder_does_not_matter(region, monkeypatch) -> None:
    def pixels() -> tuple[list[str], bytes]:
        image = open_image(convert(region).path)
        return image.channels, image.read(0, 70, 0, 90).tobytes()

    before = pixels()
    listed = Path.iterdir

    def reverse(self: Path):
        return iter(sorted(listed(self), reverse=True))

    monkeypatch.setattr(Path, "iterdir", reverse)
    assert pixels() == before


def test_parquet_and_gzipped_transcripts(region) -> None:
    import gzip
    import io

    from pyarrow import csv

    before = transcripts(convert(region))
    (region / "detected_transcripts.csv").unlink()
    (region / "detected_transcripts.csv.gz").write_bytes(gzip.compress(TABLE.encode()))
    assert transcripts(convert(region)).equals(before)
    (region / "detected_transcripts.csv.gz").unlink()
    table = csv.read_csv(io.BytesIO(TABLE.replace(",barcode", "vendor_row,barcode", 1).encode()))
    pq.write_table(table, region / "detected_transcripts.parquet")
    assert transcripts(convert(region)).equals(before)


def square(x: float, y: float, size: float = 2.0) -> shapely.Polygon:
    return shapely.box(x, y, x + size, y + size)


def test_cells_in_hdf5(region) -> None:
    folder = region / "cell_boundaries"
    folder.mkdir()
    for fov, cells in {10: ["500"], 2: ["7", "30"]}.items():
        with h5py.File(folder / f"feature_data_{fov}.hdf5", "w") as file:
            for cell in cells:
                for plane in (0, 3) if cell == "7" else (1,):
                    ring = shapely.get_coordinates(square(float(cell), plane).exterior)
                    file[f"featuredata/{cell}/zIndex_{plane}/p_0/coordinates"] = ring[None]
                file[f"featuredata/{cell}/z_coordinates"] = np.arange(7.0)
    cells = read_shapes(convert(region).element("shapes", "vendor_cells"))
    assert cells.ids.tolist() == ["30", "7_z0", "7_z3", "500"]
    assert cells.columns["z_plane"].tolist() == [1, 0, 3, 1]
    assert shapely.equals(cells.geometry, [square(30, 1), square(7, 0), square(7, 3), square(500, 1)]).all()
    (folder / "feature_data_2.hdf5").write_bytes(b"\x89HDF nonsense")
    shutil.rmtree(region.parent / "out.raw.zarr")
    assert fails(region).code == "merscope-cells-unreadable"


def test_cells_without_outline_are_counted_and_ids_stay_distinct(region) -> None:
    table = pa.table(
        {
            "EntityID": pa.array([5, 5, 6, 8], pa.int64()),
            "ZIndex": pa.array([1, 1, 1, 2], pa.int64()),
            "Geometry": [square(1, 1).wkb, square(4, 4).wkb, None, square(9, 9).wkb],
        }
    )
    pq.write_table(table, region / "cell_boundaries.parquet")
    cells = read_shapes(convert(region).element("shapes", "vendor_cells"))
    assert cells.ids.tolist() == ["5_z1", "5_z1_2", "8"]
    assert cells.metadata["n_without_outline"] == 1


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("1 0\n0 1\n", "2 × 2"),
        ("1 0 0\n0 1 0\n", "2 × 3"),
        ("1 0 0\n0 nan 0\n0 0 1\n", "not finite"),
        ("1 2 0\n2 4 0\n0 0 1\n", "singular"),
        ("1 0 0\n0 1 0\n0.5 0 1\n", "last line"),
        ("1 0 zero\n0 1 0\n0 0 1\n", "no matrix"),
        ("1 0 0\n0 1\n0 0 1\n", "no matrix"),
        ("", "shape"),
    ],
)
def test_wrong_transforms(region, content, part) -> None:
    (region / "images" / "micron_to_mosaic_pixel_transform.csv").write_text(content)
    error = fails(region)
    assert (error.code, part in error.message) == ("transform-invalid", True), error
    assert "region_0/images/micron_to_mosaic_pixel_transform.csv" in error.message


def test_transforms_with_commas(tmp_path) -> None:
    np.savetxt(tmp_path / "t.csv", TO_PX, delimiter=",")
    np.testing.assert_allclose(read_transform(tmp_path / "t.csv", "s"), TO_PX)


def test_incomplete_folders(region) -> None:
    shutil.move(region / "detected_transcripts.csv", region / "elsewhere.csv")
    assert fails(region).code == "merscope-no-transcripts"
    shutil.move(region / "elsewhere.csv", region / "detected_transcripts.csv")
    error = fails(region, z="3")
    assert (error.code, "planes: 0, 1, 2" in error.message) == ("z-plane-unknown", True)
    (region / "images" / "mosaic_PolyT_z1.tif").unlink()
    error = fails(region)
    assert error.code == "merscope-planes-missing"
    assert "plane 1 of stain PolyT" in error.message
    assert fails(region, z="1").code == "merscope-planes-missing"
    assert open_image(convert(region, z="0").path).shape == (4, *SHAPE)  # a plane that all stains have
    shutil.rmtree(region.parent / "out.raw.zarr")
    (region / "images" / "micron_to_mosaic_pixel_transform.csv").unlink()
    assert fails(region).code == "merscope-no-transform"
    np.savetxt(region / "images" / "micron_to_mosaic_pixel_transform.csv", TO_PX)
    for path in (region / "images").glob("*.tif"):
        path.unlink()
    assert fails(region).code == "merscope-no-images"
    shutil.rmtree(region / "images")
    assert fails(region).code == "merscope-no-transform"


def test_no_folder(region, tmp_path) -> None:
    file = region / "detected_transcripts.csv"
    with pytest.raises(CellquiltError) as caught:
        convert_slide(file, technology="merscope", output=tmp_path / "o.zarr", settings=Settings())
    assert caught.value.code == "merscope-no-folder"
    with pytest.raises(CellquiltError) as caught:
        convert_slide(tmp_path / "absent", technology="merscope", output=tmp_path / "o.zarr", settings=Settings())
    assert caught.value.code == "slide-not-found"


def test_mosaics_must_be_alike_and_whole(region) -> None:
    path = region / "images" / "mosaic_PolyT_z2.tif"
    whole = path.read_bytes()
    tifffile.imwrite(path, mosaic("PolyT", 2)[:-1])
    error = fails(region)
    assert error.code == "merscope-mosaics-differ"
    assert "mosaic_PolyT_z2.tif has 69 × 90" in error.message
    tifffile.imwrite(path, mosaic("PolyT", 2).astype(np.uint8))
    assert fails(region).code == "merscope-mosaics-differ"
    tifffile.imwrite(path, np.stack([mosaic("PolyT", 2)] * 2), photometric="minisblack")
    assert fails(region).code == "merscope-mosaic-channels"
    path.write_bytes(whole[:5000])
    error = fails(region)
    assert (error.code, "mosaic_PolyT_z2.tif" in error.message) == ("tiff-truncated", True)
    path.write_bytes(b"")
    assert fails(region).code == "tiff-empty"


@pytest.mark.parametrize(
    ("old", "new", "code"),
    [
        ("global_x", "xs", "transcripts-column-missing"),
        ("gene", "symbol", "transcripts-column-missing"),
        ("10.5,", "nan,", "transcripts-nan"),
        ("6.0,", "6.5,", "transcripts-z-plane"),
        ("20.25", "left", "transcripts-value"),
    ],
)
def test_bad_transcripts(region, old, new, code) -> None:
    (region / "detected_transcripts.csv").write_text(TABLE.replace(old, new))
    error = fails(region)
    assert (error.code, "region_0/detected_transcripts.csv" in error.message) == (code, True), error


def test_bad_cells(region) -> None:
    path = region / "cell_boundaries.parquet"
    path.write_bytes(b"not parquet")
    assert fails(region).code == "merscope-cells-unreadable"
    pq.write_table(pa.table({"EntityID": [1], "ZIndex": [0]}), path)
    error = fails(region)
    assert (error.code, "Geometry" in error.message) == ("merscope-cells-unreadable", True)
    pq.write_table(pa.table({"EntityID": [1], "ZIndex": [0], "Geometry": [b"xyz"]}), path)
    assert fails(region).code == "merscope-cells-unreadable"
