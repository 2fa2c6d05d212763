"""TIFFs of every build and tables of transcripts: the pixels and rows are those of the file, mistakes have names."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tifffile
from cellquilt.core.errors import CellquiltError
from cellquilt.core.images import open_image
from cellquilt.core.points import count_points, iter_points, points_columns, points_transforms
from cellquilt.core.settings import TABLES, TECHNOLOGIES, Settings
from cellquilt.core.store import Store
from cellquilt.readers import convert_slide, reader_of
from cellquilt.readers.base import project
from cellquilt.readers.tiff import TiffImage, unique_names
from cellquilt.readers.transcript_table import TranscriptTable, is_control_name
from hypothesis import given, settings
from hypothesis import strategies as st

OME = {"axes": "CYX", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5, "PhysicalSizeXUnit": "µm", "PhysicalSizeYUnit": "µm"}


def noise(shape, dtype="uint16", seed=0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if np.dtype(dtype).kind == "f":
        return rng.normal(300, 40, shape).astype(dtype)
    return rng.integers(0, 200, shape).astype(dtype)


def convert(path: Path, table: Path | None = None, **given) -> Store:
    output = path.parent / "out" / "slide.raw.zarr"
    convert_slide(
        path, technology="ome_tif", transcripts=table, output=output, settings=Settings(given), overwrite=True
    )
    return Store(output)


def fails(path: Path, table: Path | None = None, **given) -> CellquiltError:
    before = sorted(path.parent.rglob("*"))
    with pytest.raises(CellquiltError) as caught:
        convert(path, table, **given)
    assert [made for made in sorted(path.parent.rglob("*")) if made not in before and made.name != "out"] == []
    return caught.value


def rows(store: Store) -> pa.Table:
    return pa.concat_tables(iter_points(store.element("points", "transcripts"))).unify_dictionaries()


BUILDS = {
    "contiguous": {},
    "strips": {"rowsperstrip": 7, "compression": "zlib"},
    "one_strip": {"rowsperstrip": 10_000, "compression": "lzw"},
    "plain_strips": {"rowsperstrip": 11},
    "tiles": {"tile": (32, 48)},
    "tiles_zlib_predictor": {"tile": (32, 48), "compression": "zlib", "predictor": True},
    "tiles_zstd_bigtiff": {"tile": (64, 64), "compression": "zstd", "bigtiff": True},
    "big_endian": {"byteorder": ">"},
    "big_endian_tiles": {"byteorder": ">", "tile": (32, 32), "compression": "lzw"},
}


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "float32"])
@pytest.mark.parametrize("build", BUILDS)
def test_every_build_of_tiff_gives_its_pixels(tmp_path, build, dtype) -> None:
    pixels = noise((3, 150, 203), dtype)
    path = tmp_path / "staged_without_extension"
    tifffile.imwrite(path, pixels, photometric="minisblack", ome=True, metadata=OME, **BUILDS[build])
    with TiffImage(path) as image:
        assert (image.shape, image.dtype) == ((3, 1, 150, 203), np.dtype(dtype))
        for channel in range(3):
            for window in [(0, 150, 0, 203), (31, 99, 47, 48), (149, 150, 202, 203), (5, 64, 0, 130)]:
                y0, y1, x0, x1 = window
                np.testing.assert_array_equal(image.read(channel, 0, *window), pixels[channel, y0:y1, x0:x1])


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.sampled_from([(16, 16), (32, 16), None]), st.data())
def test_every_window_of_a_tiled_file(tmp_path_factory, height, width, tile, data) -> None:
    path = tmp_path_factory.mktemp("tiff") / "a.tif"
    pixels = noise((height, width))
    tifffile.imwrite(path, pixels, tile=tile, compression="zlib")
    y0, x0 = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    y1, x1 = data.draw(st.integers(y0 + 1, height)), data.draw(st.integers(x0 + 1, width))
    with TiffImage(path, memory_mb=200) as image:
        np.testing.assert_array_equal(image.read(0, 0, y0, y1, x0, x1), pixels[y0:y1, x0:x1])


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((80, 90, 3), {}),
        ((80, 90, 3), {"tile": (32, 32), "compression": "zlib"}),
        ((3, 80, 90), {"planarconfig": "separate"}),
        ((3, 80, 90), {"planarconfig": "separate", "tile": (32, 32), "compression": "zlib"}),
        ((80, 90, 4), {"extrasamples": ["unassalpha"], "compression": "zlib"}),
        ((80, 90, 3), {"ome": True, "metadata": {"axes": "YXS"}}),
    ],
)
def test_colours_are_three_channels(tmp_path, shape, options) -> None:
    pixels = noise(shape, "uint8")
    tifffile.imwrite(tmp_path / "he.tif", pixels, photometric="rgb", **options)
    image = open_image(convert(tmp_path / "he.tif", pixel_size_um=0.25).path)
    expected = pixels if shape[0] == 3 else np.moveaxis(pixels[..., :3], -1, 0)
    assert image.channels == ["r", "g", "b"]
    np.testing.assert_array_equal(image.read(0, 80, 0, 90), expected)


def test_jpeg_tiles_are_decoded_to_colours(tmp_path) -> None:
    pixels = np.full((96, 128, 3), (200, 40, 90), np.uint8)
    tifffile.imwrite(tmp_path / "he.svs", pixels, photometric="rgb", tile=(32, 32), compression="jpeg")
    with TiffImage(tmp_path / "he.svs") as image:
        seen = [image.read(channel, 0, 10, 90, 3, 77).mean() for channel in range(3)]
    np.testing.assert_allclose(seen, [200, 40, 90], atol=3)


def test_pyramids_give_their_largest_level(tmp_path) -> None:
    pixels = noise((2, 128, 160))
    with tifffile.TiffWriter(tmp_path / "sub.ome.tif", ome=True) as file:
        file.write(pixels, subifds=1, tile=(32, 32), metadata=OME, compression="zlib")
        file.write(pixels[:, ::2, ::2], subfiletype=1, tile=(32, 32), compression="zlib")
    with tifffile.TiffWriter(tmp_path / "flat.tif") as file:  # pages of falling size, the small one first
        file.write(pixels[0, ::2, ::2], tile=(32, 32))
        file.write(pixels[0], tile=(32, 32))
    for name, expected in {"sub.ome.tif": pixels, "flat.tif": pixels[:1]}.items():
        store = convert(tmp_path / name, pixel_size_um=0.5)
        np.testing.assert_array_equal(open_image(store.path).read(0, 128, 0, 160), expected)


def test_signed_and_wide_numbers_become_floats_and_complex_ones_an_error(tmp_path) -> None:
    for dtype in ("int8", "int16", "int32", "float64"):
        pixels = noise((40, 50), dtype) - np.asarray(90, dtype)
        tifffile.imwrite(tmp_path / "a.tif", pixels)
        image = open_image(convert(tmp_path / "a.tif", pixel_size_um=1).path)
        assert image.dtype == np.float32
        np.testing.assert_allclose(image.read(0, 40, 0, 50)[0], pixels, rtol=1e-6)
    tifffile.imwrite(tmp_path / "mask.tif", noise((40, 50)) > 90)
    np.testing.assert_array_equal(
        open_image(convert(tmp_path / "mask.tif", pixel_size_um=1).path).read(0, 40, 0, 50)[0], noise((40, 50)) > 90
    )
    tifffile.imwrite(tmp_path / "c.tif", noise((40, 50)).astype("complex64"))
    assert fails(tmp_path / "c.tif", pixel_size_um=1).code == "tiff-dtype"


@pytest.mark.parametrize(
    ("z", "expected"),
    [
        ("max", lambda stack: stack.max(1)),
        ("mean", lambda stack: np.floor(stack.mean(1) + 0.5)),
        ("middle", lambda stack: stack[:, 2]),
        ("4", lambda stack: stack[:, 4]),
    ],
)
@pytest.mark.parametrize("kind", ["ome", "imagej"])
def test_stacks_are_projected(tmp_path, kind, z, expected) -> None:
    stack = noise((2, 5, 60, 70))
    if kind == "ome":
        tifffile.imwrite(tmp_path / "a.tif", stack, ome=True, metadata={**OME, "axes": "CZYX"}, tile=(32, 32))
    else:
        pixels = np.moveaxis(stack, 0, 1)
        tifffile.imwrite(
            tmp_path / "a.tif",
            pixels,
            imagej=True,
            resolution=(2, 2),
            metadata={"axes": "ZCYX", "unit": "um", "spacing": 0.7},
        )
    store = convert(tmp_path / "a.tif", z=z)
    image = open_image(store.path)
    np.testing.assert_array_equal(image.read(0, 60, 0, 70), expected(stack))
    assert image.pixel_size_um == pytest.approx(0.5)


def test_projection_of_large_numbers_does_not_overflow() -> None:
    planes = [np.full((2, 2), np.iinfo(np.uint32).max, np.uint32)] * 3
    np.testing.assert_array_equal(project(lambda z: planes[z], range(3), "mean"), planes[0])
    np.testing.assert_array_equal(project(lambda z: np.full((1, 1), z, np.uint8), [1, 2], "mean"), [[2]])


def test_planes_and_time_points_that_cannot_be_read(tmp_path) -> None:
    tifffile.imwrite(tmp_path / "z.tif", noise((5, 20, 20)), imagej=True, metadata={"axes": "ZYX"})
    error = fails(tmp_path / "z.tif", z="5", pixel_size_um=1)
    assert (error.code, "0, 1, 2, 3, 4" in error.message) == ("z-plane-unknown", True)
    tifffile.imwrite(tmp_path / "t.tif", noise((5, 20, 20)), imagej=True, metadata={"axes": "TYX"})
    assert fails(tmp_path / "t.tif", pixel_size_um=1).code == "tiff-time-series"


def test_pages_without_metadata_are_channels(tmp_path) -> None:
    pixels = noise((4, 30, 40))
    with tifffile.TiffWriter(tmp_path / "pages.tif") as file:
        for page in pixels:
            file.write(page, metadata=None, contiguous=False)
    image = open_image(convert(tmp_path / "pages.tif", pixel_size_um=1).path)
    assert image.channels == ["channel_0", "channel_1", "channel_2", "channel_3"]
    np.testing.assert_array_equal(image.read(0, 30, 0, 40), pixels)


def test_channel_names_are_those_of_the_xml_and_distinct(tmp_path) -> None:
    metadata = {**OME, "Channel": {"Name": ["DAPI", "CD3", "DAPI", "DAPI_2"]}}
    tifffile.imwrite(tmp_path / "a.tif", noise((4, 20, 20)), ome=True, metadata=metadata, photometric="minisblack")
    assert open_image(convert(tmp_path / "a.tif").path).channels == ["DAPI", "CD3", "DAPI_3", "DAPI_2"]
    assert unique_names(["a", "a", "a"]) == ["a", "a_2", "a_3"]


@pytest.mark.parametrize(
    ("unit", "value", "um"),
    [("µm", 0.5, 0.5), ("nm", 500, 0.5), ("mm", 0.0005, 0.5), ("pixel", 1, None), ("reference frame", 1, None)],
)
def test_pixel_sizes_have_units(tmp_path, unit, value, um) -> None:
    metadata = {"axes": "YX", "PhysicalSizeX": value, "PhysicalSizeY": value}
    metadata |= {"PhysicalSizeXUnit": unit, "PhysicalSizeYUnit": unit}
    tifffile.imwrite(tmp_path / "a.tif", noise((20, 20)), ome=True, metadata=metadata)
    if um is None:
        assert fails(tmp_path / "a.tif").code == "pixel-size-unknown"
    else:
        assert open_image(convert(tmp_path / "a.tif").path).pixel_size_um == pytest.approx(um)


def test_pixels_may_be_oblong(tmp_path) -> None:
    metadata = {"axes": "YX", "PhysicalSizeX": 0.2, "PhysicalSizeY": 0.4}
    tifffile.imwrite(tmp_path / "a.tif", noise((20, 30)), ome=True, metadata=metadata)
    image = open_image(convert(tmp_path / "a.tif").path)
    np.testing.assert_allclose(image.transforms["microns"], np.diag([0.2, 0.4, 1]))


@pytest.mark.parametrize(
    ("options", "um"),
    [
        ({"resolution": (20000, 20000), "resolutionunit": "CENTIMETER"}, 0.5),
        ({"resolution": (50800, 50800), "resolutionunit": "INCH"}, 0.5),
        ({"resolution": (72, 72), "resolutionunit": "INCH"}, None),  # a screen's
        ({"resolution": (300, 300), "resolutionunit": "INCH"}, None),  # a printer's
        ({"resolution": (1, 1), "resolutionunit": "NONE"}, None),
        ({"description": "Aperio Image Library v1|AppMag = 20|MPP = 0.4990", "metadata": None}, 0.499),
        ({}, None),
    ],
)
def test_pixel_sizes_in_tags(tmp_path, options, um) -> None:
    tifffile.imwrite(tmp_path / "a.tif", noise((20, 20)), **options)
    if um is None:
        error = fails(tmp_path / "a.tif")
        assert (error.code, "a.tif" in error.message, "pixel_size_um" in error.hint) == (
            "pixel-size-unknown", True, True
        )  # fmt: skip
    else:
        assert open_image(convert(tmp_path / "a.tif").path).pixel_size_um == pytest.approx(um)


def test_the_users_pixel_size_wins_and_a_conflict_is_recorded(tmp_path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", noise((2, 20, 20)), ome=True, metadata=OME, photometric="minisblack")
    store = convert(tmp_path / "a.tif", pixel_size_um=0.6)
    assert open_image(store.path).pixel_size_um == pytest.approx(0.6)
    (record,) = store.records
    (warning,) = record["facts"]["warnings"]
    assert "0.6" in warning
    assert "0.5" in warning
    store = convert(tmp_path / "a.tif", pixel_size_um=0.503)  # within 1 %
    assert "warnings" not in store.records[0]["facts"]


def test_a_pixel_size_of_zero_is_refused(tmp_path) -> None:
    metadata = {"axes": "YX", "PhysicalSizeX": 0, "PhysicalSizeY": 0}
    tifffile.imwrite(tmp_path / "a.tif", noise((20, 20)), ome=True, metadata=metadata)
    assert fails(tmp_path / "a.tif").code == "pixel-size-invalid"


def test_files_that_are_no_tiff(tmp_path) -> None:
    cases = {
        "empty.tif": (b"", "tiff-empty"),
        "text.tif": (b"hello world, this is text", "not-a-tiff"),
        "png.tif": (b"\x89PNG\r\n\x1a\n" + bytes(50), "not-a-tiff"),
        "gz.tif": (gzip.compress(b"II*\x00"), "not-a-tiff"),
        "head.tif": (b"II*\x00\x08\x00", "tiff-truncated"),
        "far.tif": (b"II*\x00" + (10_000).to_bytes(4, "little") + bytes(99), "tiff-truncated"),
        "zeros.tif": (b"II*\x00" + (8).to_bytes(4, "little") + bytes(99), "tiff-unreadable"),
    }
    for name, (content, code) in cases.items():
        (tmp_path / name).write_bytes(content)
        error = fails(tmp_path / name, pixel_size_um=1)
        assert (error.code, name in error.message) == (code, True), error
    (tmp_path / "folder").mkdir()
    assert fails(tmp_path / "folder", pixel_size_um=1).code == "not-a-tiff"
    assert fails(tmp_path / "absent.tif").code == "slide-not-found"


@pytest.mark.parametrize("build", ["contiguous", "strips", "tiles_zlib_predictor"])
def test_truncated_files(tmp_path, build) -> None:
    path = tmp_path / "cut.tif"
    tifffile.imwrite(path, noise((3, 150, 203)), photometric="minisblack", ome=True, metadata=OME, **BUILDS[build])
    whole = path.read_bytes()
    for share in (0.99, 0.5, 0.1):
        path.write_bytes(whole[: int(len(whole) * share)])
        assert fails(path).code in ("tiff-truncated", "tiff-unreadable"), share
    path.write_bytes(whole[: len(whole) * 9 // 10])
    assert "bytes" in fails(path).message


def test_a_damaged_segment_is_named(tmp_path) -> None:
    path = tmp_path / "damaged.tif"
    tifffile.imwrite(path, noise((150, 203)), compression="zlib", tile=(64, 64))
    with tifffile.TiffFile(path) as file:
        offset, count = file.pages[0].dataoffsets[5], file.pages[0].databytecounts[5]
    content = bytearray(path.read_bytes())
    content[offset : offset + count] = bytes(count)
    path.write_bytes(content)
    error = fails(path, pixel_size_um=1)
    assert (error.code, "segment 5" in error.message) == ("tiff-undecodable", True)


def test_a_giant_compressed_strip_is_refused_unless_it_fits(tmp_path) -> None:
    path = tmp_path / "strip.tif"
    pixels = np.zeros((9000, 6000), np.uint16)
    pixels[8999, 5999] = 7
    tifffile.imwrite(path, pixels, compression="zlib", rowsperstrip=9000)
    error = fails(path, pixel_size_um=1, memory_mb=200)
    assert (error.code, "108 MB" in error.message) == ("tiff-segment-too-large", True)
    assert open_image(convert(path, pixel_size_um=1).path).read(8999, 9000, 5999, 6000)[0, 0, 0] == 7


def test_wide_strips_are_read_in_windows_that_fit(tmp_path) -> None:
    pixels = noise((130, 40_000))
    tifffile.imwrite(tmp_path / "wide.tif", pixels, compression="zlib", rowsperstrip=1)
    with TiffImage(tmp_path / "wide.tif", memory_mb=10) as image:
        height, width = image.window_px(64)
        assert (height, width % 64) == (64, 0)
        assert 64 < width < 40_000
        for x in range(0, 40_000, width):
            window = (64, 128, x, min(x + width, 40_000))
            np.testing.assert_array_equal(image.read(0, 0, *window), pixels[64:128, x : x + width])


def test_a_multi_file_image_with_a_file_missing(tmp_path) -> None:
    xml = """<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image ID="Image:0">
    <Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="uint16" SizeX="20" SizeY="20" SizeC="2" SizeZ="1" SizeT="1"
    PhysicalSizeX="1" PhysicalSizeY="1"><Channel ID="C:0" SamplesPerPixel="1"/><Channel ID="C:1" SamplesPerPixel="1"/>
    <TiffData FirstC="0" IFD="0" PlaneCount="1"><UUID FileName="a.ome.tif">urn:uuid:1</UUID></TiffData>
    <TiffData FirstC="1" IFD="0" PlaneCount="1"><UUID FileName="b.ome.tif">urn:uuid:2</UUID></TiffData>
    </Pixels></Image></OME>"""
    xml = xml.replace("<OME ", '<OME UUID="urn:uuid:1" ')
    tifffile.imwrite(tmp_path / "a.ome.tif", noise((20, 20)), description=xml, metadata=None)
    assert fails(tmp_path / "a.ome.tif").code == "tiff-planes-missing"


_MEMORY = """
import sys
from pathlib import Path
from cellquilt.core.record import peak_rss_mb
from cellquilt.core.settings import Settings
from cellquilt.readers import convert_slide
settings = Settings(pixel_size_um=1, chunk_px=512, memory_mb=200)
convert_slide(Path(sys.argv[1]), technology="ome_tif", output=Path(sys.argv[1] + ".zarr"), settings=settings)
print(peak_rss_mb())
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path) -> None:
    def peak(height: int, **build) -> float:
        path = tmp_path / f"{height}_{len(build)}.tif"
        tifffile.imwrite(path, np.full((height, 8192), 3, np.uint16), **build)
        arguments = [sys.executable, "-c", _MEMORY, str(path)]
        return float(subprocess.run(arguments, check=True, capture_output=True, text=True).stdout)

    small = peak(1024)  # 17 MB of pixels against 134 MB; decoded strips that are kept may fill 80 MB of the 200
    assert peak(8192) - small < 60
    assert peak(8192, compression="zlib", rowsperstrip=16) - small < 130


# --- transcripts


@pytest.fixture
def image(tmp_path) -> Path:
    path = tmp_path / "image.ome.tif"
    tifffile.imwrite(path, noise((100, 120)), ome=True, metadata={**OME, "axes": "YX"})
    return path


HEADER = "x,y,gene,cell_id,transcript_id,score\n"
BODY = "1.5,2,NANOG,c1,T1,3\n-7.25,1e3,NEGR1,c2,T2,4\n3,4,Blank-12,c2,T2,4.5\n5,6,BLANKET,,T9,\n"


def write_table(path: Path, text: str) -> Path:
    if path.suffix == ".gz" or path.name == "gz_without_extension":
        path.write_bytes(gzip.compress(text.encode()))
    elif path.suffix == ".parquet":
        import io

        from pyarrow import csv

        pq.write_table(csv.read_csv(io.BytesIO(text.encode())), path)
    else:
        path.write_text(text)
    return path


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz", "t.parquet", "gz_without_extension", "t.tsv"])
def test_tables_of_every_kind(image, tmp_path, name) -> None:
    text = HEADER + BODY
    table = write_table(tmp_path / name, text.replace(",", "\t") if name == "t.tsv" else text)
    store = convert(image, table)
    found = rows(store)
    assert found.column_names == [
        "x", "y", "gene", "transcript_id", "is_control", "passes_qv",
        "vendor_cell_id", "vendor_transcript_id", "score",
    ]  # fmt: skip
    assert found.column("x").to_pylist() == [1.5, -7.25, 3, 5]
    assert found.column("y").to_pylist() == [2, 1000, 4, 6]
    assert found.column("gene").to_pylist() == ["NANOG", "NEGR1", "Blank-12", "BLANKET"]
    assert found.column("is_control").to_pylist() == [False, False, True, False]
    assert found.column("transcript_id").to_pylist() == [0, 1, 2, 3]
    assert found.schema.field("transcript_id").type == pa.uint64()
    assert found.column("vendor_transcript_id").to_pylist() == ["T1", "T2", "T2", "T9"]
    np.testing.assert_allclose(points_transforms(store.element("points", "transcripts"))["global"], np.diag([2, 2, 1]))


def test_columns_named_by_the_user_planes_quality_and_pixels(image, tmp_path) -> None:
    text = "a,b,c,d,global_z,qv\n10,20,7.5,Actb,3,19.9\n12,22,8.5,Gapdh,4,20\n"
    table = write_table(tmp_path / "t.csv", text)
    names = {"x_column": "a", "y_column": "b", "gene_column": "d"}
    found = rows(convert(image, table, transcripts_unit="px", z_step_um=2, **names))
    assert found.column("x").to_pylist() == [5, 6]
    assert found.column("y").to_pylist() == [10, 11]
    assert found.column("z").to_pylist() == [6, 8]
    assert found.column("z_plane").to_pylist() == [3, 4]
    assert found.column("passes_qv").to_pylist() == [False, True]
    found = rows(convert(image, table, z_column="c", **names))
    assert found.column("z").to_pylist() == [7.5, 8.5]


def test_the_shared_table_is_read_by_its_own_names(shared_data, image) -> None:
    table = TranscriptTable(shared_data / "merscope_liver" / "detected_transcripts.csv")
    assert (table.columns.x, table.columns.z_plane, table.columns.gene) == ("global_x", "global_z", "gene")


def test_batches_number_rows_on_and_types_come_from_all_of_them(image, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("cellquilt.readers.transcript_table._BLOCK_BYTES", 2000)
    n = 1000
    lines = [f"{k / 4},{k},g{k % 7},{'' if k < 500 else 'late'}" for k in range(n)]
    table = write_table(tmp_path / "t.csv", "x,y,gene,note\n" + "\n".join(lines))
    assert len(list(TranscriptTable(table).batches())) > 5
    found = rows(convert(image, table))
    assert found.column("transcript_id").to_pylist() == list(range(n))
    assert found.column("gene").to_pylist() == [f"g{k % 7}" for k in range(n)]
    assert found.column("note").to_pylist() == ["" if k < 500 else "late" for k in range(n)]


def test_a_table_of_no_rows_is_no_mistake(image, tmp_path) -> None:
    for name in ("t.csv", "t.parquet"):
        table = tmp_path / name
        if name == "t.csv":
            table.write_text("x,y,gene\n")
        else:
            pq.write_table(pa.table({"x": pa.array([], pa.float64()), "y": pa.array([], pa.float64()),
                                     "gene": pa.array([], pa.string())}), table)  # fmt: skip
        store = convert(image, table)
        element = store.element("points", "transcripts")
        assert count_points(element) == store.records[0]["facts"]["n_transcripts"] == 0
        assert points_columns(element) == ["x", "y", "gene", "transcript_id", "is_control", "passes_qv"]


@pytest.mark.parametrize(
    ("text", "code", "parts"),
    [
        ("", "transcripts-empty-file", []),
        ("x,why,gene\n1,2,a\n", "transcripts-column-missing", ['"y"', "x, why, gene", "y_column"]),
        ("x,y,gene,x\n1,2,a,3\n", "transcripts-column-duplicate", ['"x"']),
        ("x,y,gene\n1,2,a\nnan,2,a\n", "transcripts-nan", ["row 2", '"x"', "nan"]),
        ("x,y,gene\n1,inf,a\n", "transcripts-nan", ["row 1", '"y"', "inf"]),
        ("x,y,gene\n1,2,a\n1,,a\n", "transcripts-nan", ["row 2", '"y"', "empty"]),
        ("x,y,gene\n1,2,a\n1,2,a\nleft,2,a\n", "transcripts-value", ["line 4", '"x"', '"left"']),
        ("x,y,gene\n1,2,a\n1,2\n", "transcripts-bad-row", ["line 3", "Expected 3 columns"]),
        ("x,y,gene\n1,2,a\n1,2,\n", "transcripts-gene-missing", ["row 2", '"gene"']),
        ("x,y,gene,global_z\n1,2,a,3\n1,2,b,1.5\n", "transcripts-z-plane", ["row 2", "global_z", "z_column"]),
        ("x\x00\x00\x00", "transcripts-unreadable", []),
    ],
)
def test_bad_tables(image, tmp_path, text, code, parts) -> None:
    (tmp_path / "bad.csv").write_text(text)
    error = fails(image, tmp_path / "bad.csv")
    assert error.code == code, error
    assert "bad.csv" in error.message
    assert [part for part in parts if part not in f"{error.message} {error.hint}"] == []


def test_bad_names_and_files(image, tmp_path) -> None:
    table = write_table(tmp_path / "t.csv", HEADER + BODY)
    error = fails(image, table, gene_column="gen")
    assert (error.code, 'did you mean "gene"?' in error.hint) == ("transcripts-column-missing", True)
    assert fails(image, tmp_path / "absent.csv").code == "transcripts-not-found"
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1" + bytes(40))
    assert fails(image, broken).code == "transcripts-unreadable"
    cut = tmp_path / "cut.csv.gz"
    cut.write_bytes(gzip.compress((HEADER + BODY * 5000).encode())[:-300])
    assert fails(image, cut).code == "transcripts-unreadable"
    assert fails(image, image).code == "transcripts-unreadable"  # an image for a table


@given(
    st.sampled_from(
        ["NANOG", "NEGR1", "BLANKET", "Blank", "Blanka-1", "NegPrb", "Neg1", "SystemControl", "UNASSIGNED1"]
    )
)
def test_genes_are_never_controls(name) -> None:
    assert not is_control_name(name)


def test_controls_of_several_machines() -> None:
    names = ["Blank-1", "BLANK_0006", "NegControlProbe_00042", "NegControlCodeword_0500", "NegPrb3", "SystemControl17",
             "DeprecatedCodeword_0001", "UnassignedCodeword_0003", "antisense_LRRK2"]  # fmt: skip
    assert [name for name in names if not is_control_name(name)] == []


# --- the driver


def test_every_technology_has_its_reader_and_others_are_refused(tmp_path) -> None:
    for technology in set(TECHNOLOGIES) - set(TABLES):
        assert reader_of(technology).technology == technology
    with pytest.raises(CellquiltError) as caught:
        reader_of("anndata")
    assert caught.value.code == "technology-table"
    with pytest.raises(CellquiltError) as caught:
        reader_of("merscop")
    assert (caught.value.code, caught.value.hint) == ("technology-unknown", 'did you mean "merscope"?')
    with pytest.raises(CellquiltError) as caught:
        convert_slide(None, technology="ome_tif")
    assert caught.value.code == "slide-missing"
    with pytest.raises(CellquiltError) as caught:
        convert_slide(tmp_path, technology=None)
    assert caught.value.code == "technology-missing"


def test_the_store_says_what_it_is_made_of_and_not_where(image, tmp_path) -> None:
    import hashlib

    table = write_table(tmp_path / "t.csv", HEADER + BODY)
    store = convert(image, table)
    attributes = store.attributes
    assert (attributes["sample"], attributes["technology"], attributes["source"]) == (
        "slide", "ome_tif", "image.ome.tif"
    )  # fmt: skip
    assert attributes["inputs"][1] == {
        "column": "transcripts",
        "name": "t.csv",
        "bytes": table.stat().st_size,
        "sha256": hashlib.sha256(table.read_bytes()).hexdigest(),
    }
    assert str(tmp_path) not in json.dumps(attributes)


def test_spatialdata_reads_the_store(image, tmp_path) -> None:
    import spatialdata

    table = write_table(tmp_path / "t.csv", HEADER + BODY)
    sdata = spatialdata.read_zarr(convert(image, table).path)
    assert sdata.images["image"].shape == (1, 100, 120)
    extent = spatialdata.get_extent(sdata["transcripts"], coordinate_system="global")
    assert (extent["x"], extent["y"]) == ((-14.5, 10.0), (4.0, 2000.0))
    assert sorted(sdata.coordinate_systems) == ["global", "microns"]
