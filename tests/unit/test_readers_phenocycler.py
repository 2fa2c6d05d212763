"""PhenoCycler: a QPTIFF's channels and nothing of its other pages; QuPath's and ImageJ's TIFFs; what can be wrong."""

import cellquilt as cq
import numpy as np
import pytest
import tifffile
from cellquilt.core.errors import CellquiltError
from cellquilt.core.images import open_image
from cellquilt.readers import convert_slide
from cellquilt.simulate import simulate
from cellquilt.simulate.phenocycler import PRIVATE
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from machine_cases import (
    assert_nowhere,
    assert_true_intensities,
    channels,
    convert,
    facts,
    fails,
    pixels,
    table_of_given_cells,
)

TECHNOLOGY = "phenocycler"
PIXEL = 0.4
SIZE = (300, 400)


@pytest.fixture(scope="module")
def scan(tmp_path_factory):
    output = tmp_path_factory.mktemp("phenocycler") / "sim"
    simulate(
        output, width_px=SIZE[1], height_px=SIZE[0], pixel_size_um=PIXEL, seed=3, format=TECHNOLOGY, tile_px=256,
        compression="zlib",
    )  # fmt: skip
    return output / "slide_0" / "slide_0.qptiff"


def noise(shape, seed=0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 60_000, shape).astype(np.uint16)


def xml(fields: str, kind: str = "FullResolution") -> str:
    return (
        f'<?xml version="1.0" encoding="utf-16"?>\r\n<PerkinElmer-QPI-ImageDescription><ImageType>{kind}</ImageType>'
        f"{fields}</PerkinElmer-QPI-ImageDescription>"
    )


def write_qptiff(path, texts, *, size=(60, 80), resolution=(25_000, 25_000)) -> np.ndarray:
    """A QPTIFF of one level whose pages say `texts`."""
    planes = noise((len(texts), *size))
    unit = {} if resolution is None else {"resolution": resolution, "resolutionunit": "CENTIMETER"}
    with tifffile.TiffWriter(path) as tiff:
        for plane, text in zip(planes, texts, strict=True):
            tiff.write(
                plane, tile=(32, 32), metadata=None, description=text.encode(), software="PerkinElmer-QPI", **unit
            )
    return planes


# --- the simulator's scan


def test_channels_are_those_of_the_full_resolution(scan, tmp_path) -> None:
    store = convert(scan, TECHNOLOGY, tmp_path / "out.zarr", chunk_px=256)
    with tifffile.TiffFile(scan) as file:
        assert file.series[0].name == "Baseline"
        assert [page.shape for page in file.series[0].levels[1].pages] == [(150, 200)] * 5
        assert [series.name for series in file.series[1:]] == ["Thumbnail", "Macro", "Label"]
        expected = file.series[0].asarray()
    np.testing.assert_array_equal(pixels(store), expected)
    assert channels(store) == ["DAPI", "CD3", "CD20", "CD68", "CK18"]
    assert open_image(store.path).pixel_size_um == pytest.approx(PIXEL)
    assert facts(store)["names_from"] == "qptiff"


def test_its_folder_names_it_as_well(scan, tmp_path) -> None:
    store = convert(scan.parent, TECHNOLOGY, tmp_path / "out.zarr")
    np.testing.assert_array_equal(pixels(store), tifffile.imread(scan))
    assert [entry["name"] for entry in facts(store)["inputs"]] == [scan.name]


def test_no_text_about_the_slide_gets_out(scan, tmp_path) -> None:
    assert PRIVATE.encode() in scan.read_bytes()
    store = convert(scan, TECHNOLOGY, tmp_path / "out.zarr")
    assert_nowhere(store.path, [PRIVATE, "Patient", "OperatorName", "PerkinElmer"])
    assert [path.name for path in (store.path / "images").iterdir() if path.is_dir()] == ["image"]


def test_given_cells_have_the_true_intensities(scan, tmp_path) -> None:
    truth = scan.parent / "truth"
    found, _ = table_of_given_cells(scan, TECHNOLOGY, truth, tmp_path)
    assert_true_intensities(found, truth)
    assert found.n_vars == 0


def test_levels_are_means_of_four(scan) -> None:
    with tifffile.TiffFile(scan) as file:
        full, half = (level.asarray() for level in file.series[0].levels[:2])
    means = full.reshape(5, 150, 2, 200, 2).mean(axis=(2, 4))
    np.testing.assert_array_equal(half, np.floor(means + 0.5))


def test_the_facade(scan) -> None:
    from spatialdata.models import get_channel_names

    assert get_channel_names(cq.io.phenocycler(scan)["image"]) == ["DAPI", "CD3", "CD20", "CD68", "CK18"]


# --- names


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["<Name>DAPI</Name>", "<Name>Opal 520</Name>"], ["DAPI", "Opal 520"]),
        (["<Name>DAPI</Name><Biomarker>Nucleus</Biomarker>", "<Fluor>Cy5</Fluor>"], ["Nucleus", "Cy5"]),
        (["<Biomarker> HLA-DR\n α </Biomarker>", "<Biomarker/><Name>β-Catenin</Name>"], ["HLA-DR α", "β-Catenin"]),
        (["<Biomarker>Blank</Biomarker>"] * 3, ["Blank", "Blank_2", "Blank_3"]),
        (["<Name>DAPI</Name>", ""], ["DAPI", "channel_1"]),
        # The bands of the whole scan are no name of a page.
        (
            [
                f"<ScanProfile><root><ScanBands-i><Biomarker>DAPI</Biomarker></ScanBands-i></root></ScanProfile>{name}"
                for name in ("<Name>Opal 520</Name>", "")
            ],
            ["Opal 520", "channel_1"],
        ),
        (
            [
                "<Responsivity><Filter><Name>DAPI MSI</Name></Filter></Responsivity>",
                "<ExcitationFilter><Bands><Band><Name>FITC</Name></Band></Bands></ExcitationFilter>",
            ],
            ["DAPI MSI", "FITC"],
        ),
    ],
)
def test_names_of_channels(tmp_path, texts, expected) -> None:
    planes = write_qptiff(tmp_path / "a.qptiff", [xml(text) for text in texts])
    store = convert(tmp_path / "a.qptiff", TECHNOLOGY, tmp_path / "out.zarr")
    assert channels(store) == expected
    np.testing.assert_array_equal(pixels(store), planes)
    assert any("Blank → Blank_2" in text for text in facts(store).get("warnings", [])) == ("Blank" in expected)


def test_a_single_channel_and_a_big_file_in_little_memory(tmp_path) -> None:
    planes = write_qptiff(tmp_path / "a.qptiff", [xml("<Name>DAPI</Name>")], size=(700, 900))
    store = convert(tmp_path / "a.qptiff", TECHNOLOGY, tmp_path / "out.zarr", memory_mb=256, chunk_px=64)
    np.testing.assert_array_equal(pixels(store), planes)


def test_pixel_size_from_the_xml_where_the_tags_are_silent(tmp_path) -> None:
    write_qptiff(
        tmp_path / "a.qptiff", [xml("<ScanResolution><PixelSizeMicrons>0.5082</PixelSizeMicrons></ScanResolution>")],
        resolution=None,
    )  # fmt: skip
    store = convert(tmp_path / "a.qptiff", TECHNOLOGY, tmp_path / "out.zarr")
    assert open_image(store.path).pixel_size_um == pytest.approx(0.5082)
    assert facts(store)["pixel_size_from"] == "PixelSizeMicrons"


# --- QuPath and ImageJ


@pytest.mark.parametrize("labels", [["DAPI", "CD3", "CD3"], ["c:1/3 - DAPI", "c:2/3 - CD3", "c:3/3 - CD3"]])
def test_imagej_labels_are_names(tmp_path, labels) -> None:
    planes = noise((3, 60, 80))
    tifffile.imwrite(
        tmp_path / "a.tif", planes, imagej=True, resolution=(2, 2),
        metadata={"axes": "CYX", "unit": "um", "Labels": labels},
    )  # fmt: skip
    store = convert(tmp_path / "a.tif", TECHNOLOGY, tmp_path / "out.zarr")
    assert channels(store) == ["DAPI", "CD3", "CD3_2"]
    np.testing.assert_array_equal(pixels(store), planes)
    assert open_image(store.path).pixel_size_um == pytest.approx(0.5)


@pytest.mark.parametrize(
    "label", ["doe_jane_{}.tif", "0010,0010 Patient's Name: DOE\n{}", "{}" + "x" * 60, "D:\\doe\\{}"]
)
def test_imagej_labels_that_are_no_names_stay_out(tmp_path, label) -> None:
    tifffile.imwrite(
        tmp_path / "a.tif", noise((2, 60, 80)), imagej=True, resolution=(2, 2),
        metadata={"axes": "CYX", "unit": "um", "Labels": [label.format(k) for k in range(2)]},
    )  # fmt: skip
    store = convert(tmp_path / "a.tif", TECHNOLOGY, tmp_path / "out.zarr")
    assert channels(store) == ["channel_0", "channel_1"]
    assert_nowhere(store.path, ["doe", "DOE", "xxxx"])


def test_ome_tiff_as_qupath_writes_it(tmp_path) -> None:
    planes = noise((2, 300, 400))
    names = {"Channel": {"Name": ["DAPI", "CD3"]}}
    with tifffile.TiffWriter(tmp_path / "a.ome.tif", ome=True) as tiff:
        tiff.write(
            planes, subifds=1, tile=(128, 128), compression="zlib", photometric="minisblack",
            metadata={"axes": "CYX", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5, **names},
        )  # fmt: skip
        tiff.write(planes[:, ::2, ::2], tile=(128, 128), compression="zlib", photometric="minisblack", subfiletype=1)
    store = convert(tmp_path / "a.ome.tif", TECHNOLOGY, tmp_path / "out.zarr")
    assert channels(store) == ["DAPI", "CD3"]
    np.testing.assert_array_equal(pixels(store), planes)


# --- what can be wrong


def _two(folder) -> None:
    for name in "ab":
        write_qptiff(folder / f"{name}.qptiff", [xml("<Name>DAPI</Name>")])


def _empty(folder) -> None:
    (folder / "notes.txt").write_text("nothing")


def _one(*texts, **options):
    return lambda folder: write_qptiff(folder / "a.qptiff", list(texts), **options)


def _cut(share):
    def write(folder) -> None:
        write_qptiff(folder / "a.qptiff", [xml("<Name>DAPI</Name>")] * 2)
        content = (folder / "a.qptiff").read_bytes()
        (folder / "a.qptiff").write_bytes(content[: int(len(content) * share)])

    return write


BOMB = '<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa">]>'
BAD = {
    "a folder without images": (_empty, "machine-no-images", "notes.txt"),
    "two scans in a folder": (_two, "phenocycler-several", "a.qptiff, b.qptiff"),
    "a page's XML cut short": (_one(xml("<Name>DAPI</Name>")[:-9]), "phenocycler-xml-invalid", "a.qptiff"),
    "entities": (_one(xml("").replace("\r\n", BOMB)), "phenocycler-xml-invalid", "document type"),
    "only a label": (_one(xml("<Name>x</Name>", "Label")), "phenocycler-not-full", "Label"),
    "only an overview": (_one(xml("", "Overview"), xml("", "Overview")), "phenocycler-not-full", "Overview"),
    "no pixel size": (_one(xml("<Name>DAPI</Name>"), resolution=None), "pixel-size-unknown", "a.qptiff"),
    "a file cut in its pixels": (_cut(0.5), "tiff-", "a.qptiff"),
    "a file cut in its header": (_cut(0.001), "tiff-", "a.qptiff"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(tmp_path, case) -> None:
    write, code, text = BAD[case]
    (tmp_path / "scan").mkdir()
    write(tmp_path / "scan")
    error = fails(tmp_path / "scan", TECHNOLOGY, tmp_path / "out.zarr")
    assert error.code.startswith(code)
    assert text in error.message


def test_a_table_of_transcripts_is_refused(scan, tmp_path) -> None:
    (tmp_path / "t.csv").write_text("x,y,gene\n")
    for technology in (TECHNOLOGY, "macsima", "hyperion", "bioio"):
        with pytest.raises(CellquiltError, match="machine-transcripts"):
            convert_slide(scan, technology=technology, transcripts=tmp_path / "t.csv", output=tmp_path / "o.zarr")


def test_colours_keep_their_names(tmp_path) -> None:
    rgb = np.random.default_rng(0).integers(0, 255, (40, 50, 3)).astype(np.uint8)
    for planar in ("contig", "separate"):
        tifffile.imwrite(
            tmp_path / "a.qptiff", rgb if planar == "contig" else rgb.transpose(2, 0, 1), photometric="rgb",
            planarconfig=planar, metadata=None, description=xml("<Name>Brightfield</Name>").encode(),
            software="PerkinElmer-QPI", resolution=(20_000, 20_000), resolutionunit="CENTIMETER", tile=(32, 32),
        )  # fmt: skip
        store = convert(tmp_path / "a.qptiff", TECHNOLOGY, tmp_path / "out.zarr")
        assert channels(store) == ["r", "g", "b"]
        np.testing.assert_array_equal(pixels(store), rgb.transpose(2, 0, 1))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 4000), garbage=st.binary(min_size=1, max_size=12))
def test_garbage_in_the_header_is_an_error_or_an_image(tmp_path, place, garbage) -> None:
    path = tmp_path / "fuzz.qptiff"
    write_qptiff(path, [xml("<Name>DAPI</Name>"), xml("<Name>CD3</Name>")], size=(20, 30))
    content = bytearray(path.read_bytes())
    place = min(place, len(content) - len(garbage))
    content[place : place + len(garbage)] = garbage
    path.write_bytes(content)
    try:
        store = convert(path, TECHNOLOGY, tmp_path / "out.zarr", memory_mb=256)
    except CellquiltError:
        return
    assert open_image(store.path).shape[1] <= 2**16
