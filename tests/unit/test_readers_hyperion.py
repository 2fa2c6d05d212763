"""Hyperion: a TIFF a channel, or one of all; names of many programs; what can be wrong."""

import contextlib

import cellquilt as cq
import numpy as np
import pytest
import tifffile
from cellquilt.core.errors import CellquiltError
from cellquilt.core.images import open_image
from cellquilt.readers.hyperion import parse_channel
from cellquilt.segment.engine import pick_channels
from cellquilt.simulate import simulate
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from machine_cases import assert_true_intensities, channels, convert, facts, fails, pixels, table_of_given_cells

TECHNOLOGY = "hyperion"
NAMES = ["CD3", "CD20", "CD68", "CK18", "DNA1"]


@pytest.fixture(scope="module")
def region(tmp_path_factory):
    output = tmp_path_factory.mktemp("hyperion") / "sim"
    simulate(output, width_px=256, height_px=200, pixel_size_um=1.0, seed=3, format=TECHNOLOGY, compression="zlib")
    return output / "slide_0"


def noise(seed=0, size=(30, 40)) -> np.ndarray:
    return np.random.default_rng(seed).gamma(1.0, 5.0, size).astype(np.float32)


def write(path, seed=0, *, size=(30, 40), pixel=1.0, names=None) -> np.ndarray:
    plane = noise(seed, size if names is None else (len(names), *size))
    path.parent.mkdir(parents=True, exist_ok=True)
    if pixel is None:
        tifffile.imwrite(path, plane)
        return plane
    metadata = {"axes": "CYX", "PhysicalSizeX": pixel, "PhysicalSizeY": pixel}
    metadata |= {} if names is None else {"Channel": {"Name": names}}
    tifffile.imwrite(path, plane.reshape(-1, *size), ome=True, photometric="minisblack", metadata=metadata)
    return plane


# --- simulated


def test_pixels_are_the_counts_of_the_files_in_the_order_of_masses(region, tmp_path) -> None:
    store = convert(region, TECHNOLOGY, tmp_path / "out.zarr")
    files = sorted(region.glob("*.ome.tiff"))
    assert [file.name for file in files] == [
        "141Pr_CD3.ome.tiff", "142Nd_CD20.ome.tiff", "143Nd_CD68.ome.tiff", "144Nd_CK18.ome.tiff",
        "191Ir_DNA1.ome.tiff",
    ]  # fmt: skip
    expected = np.stack([tifffile.imread(file).reshape(200, 256) for file in files])
    assert expected.dtype == pixels(store).dtype == np.float32
    np.testing.assert_array_equal(pixels(store), expected)
    assert channels(store) == NAMES
    assert facts(store)["isotopes"] == ["141Pr", "142Nd", "143Nd", "144Nd", "191Ir"]
    assert open_image(store.path).pixel_size_um == 1.0


def test_given_cells_have_the_true_intensities(region, tmp_path) -> None:
    found, _ = table_of_given_cells(region, TECHNOLOGY, region / "truth", tmp_path)
    assert_true_intensities(found, region / "truth")


def test_the_facade_and_a_file_of_all_channels(region, tmp_path) -> None:
    from spatialdata.models import get_channel_names

    files = sorted(region.glob("*.ome.tiff"))
    stack = np.stack([tifffile.imread(file).reshape(200, 256) for file in files])
    labels = [file.name.removesuffix(".ome.tiff") for file in files]
    for path in (tmp_path / "all.ome.tiff", tmp_path / "folder" / "all.ome.tiff"):
        path.parent.mkdir(exist_ok=True)
        tifffile.imwrite(
            path, stack, ome=True, photometric="minisblack",
            metadata={"axes": "CYX", "PhysicalSizeX": 1.0, "PhysicalSizeY": 1.0, "Channel": {"Name": labels}},
        )  # fmt: skip
    one = convert(region, TECHNOLOGY, tmp_path / "a.zarr")
    for path in (tmp_path / "all.ome.tiff", tmp_path / "folder"):
        other = convert(path, TECHNOLOGY, tmp_path / "b.zarr")
        assert channels(other) == channels(one) == NAMES
        assert facts(other)["isotopes"] == facts(one)["isotopes"]
        np.testing.assert_array_equal(pixels(other), pixels(one))
    assert get_channel_names(cq.io.hyperion(region)["image"]) == NAMES


# --- names


@pytest.mark.parametrize(
    ("name", "isotope", "marker"),
    [
        ("141Pr_CD3", "141Pr", "CD3"),
        ("141Pr_141Pr_CD3", "141Pr", "CD3"),
        ("CD3(Pr141Di)", "141Pr", "CD3"),
        ("CD3_Pr141", "141Pr", "CD3"),
        ("ROI001_Pr141_CD3", "141Pr", "CD3"),
        ("Pr141-CD3_Pr141", "141Pr", "CD3"),
        ("Nd142_CD19(Nd142Di)", "142Nd", "CD19"),
        ("176Yb_Histone H3", "176Yb", "Histone H3"),
        ("Y89_CD45", "89Y", "CD45"),
        ("127I_127I", "127I", "127I"),
        ("80ArAr", "80ArAr", "80ArAr"),
        ("190BCKG", "190BCKG", "190BCKG"),
        ("191Ir_DNA1", "191Ir", "DNA1"),
        ("115In_IdU (115)", "115In", "IdU (115)"),
        ("159Tb_E-Cadherin/P-Cadherin", "159Tb", "E-Cadherin/P-Cadherin"),
        ("168Er_Ki-67", "168Er", "Ki-67"),
        ("141Pr_αSMA", "141Pr", "αSMA"),
        # What looks like an isotope and is none.
        ("CD141", None, "CD141"),
        ("Cd3", None, "Cd3"),
        ("I99", None, "I99"),
        ("PD-1", None, "PD-1"),
        ("141Pr_CD141", "141Pr", "CD141"),
    ],
)
def test_isotopes_and_markers(name, isotope, marker) -> None:
    tag = parse_channel(name)
    assert (None if tag.mass is None else f"{tag.mass}{tag.element}", tag.marker) == (isotope, marker)


@given(st.text(max_size=40))
@settings(max_examples=200, deadline=None)
def test_any_name_has_a_marker(name) -> None:
    assert parse_channel(f"141Pr_{name}").mass is not None or name[:1].isalnum() is False
    assert isinstance(parse_channel(name).marker, str)


@pytest.mark.parametrize(("name", "channel"), [("191Ir_191Ir", "191Ir"), ("193Ir_DNA2", "DNA2"), ("Ir193", "193Ir")])
def test_the_intercalator_is_what_is_segmented(tmp_path, name, channel) -> None:
    for file in ("141Pr_CD3", name):
        write(tmp_path / "roi" / f"{file}.tiff")
    image = open_image(convert(tmp_path / "roi", TECHNOLOGY, tmp_path / "out.zarr").path)
    assert pick_channels(image, None) == (channel,)


def test_order_and_duplicates(tmp_path) -> None:
    for seed, name in enumerate(["193Ir_DNA", "89Y_CD45", "191Ir_DNA", "152Sm_CD4"]):
        write(tmp_path / "roi" / f"{name}.tiff", seed)
    store = convert(tmp_path / "roi", TECHNOLOGY, tmp_path / "out.zarr")
    assert channels(store) == ["CD45", "CD4", "DNA", "DNA_2"]
    np.testing.assert_array_equal(pixels(store), [noise(seed) for seed in (1, 3, 2, 0)])
    assert any("DNA → DNA_2" in text for text in facts(store)["warnings"])


def test_a_sample_in_front_of_the_markers_is_no_part_of_them(tmp_path) -> None:
    for seed, name in enumerate(["Lung_7_CD3(Pr141Di)", "Lung_7_CD4(Sm152Di)"]):
        write(tmp_path / "a" / f"{name}.tiff", seed)
    for seed, name in enumerate(["Lung_7_CD3", "Lung_7_CD4"]):
        write(tmp_path / "b" / f"{name}.tiff", seed)
    for folder in "ab":
        assert channels(convert(tmp_path / folder, TECHNOLOGY, tmp_path / "out.zarr")) == ["CD3", "CD4"]


def test_ome_xml_names_what_the_file_does_not(tmp_path) -> None:
    write(tmp_path / "roi" / "1.ome.tiff", 1, names=["152Sm_CD4"])
    write(tmp_path / "roi" / "2.ome.tiff", 2, names=["141Pr_CD3"])
    store = convert(tmp_path / "roi", TECHNOLOGY, tmp_path / "out.zarr")
    assert channels(store) == ["CD3", "CD4"]
    np.testing.assert_array_equal(pixels(store)[0], noise(2, (1, 30, 40))[0])


def test_a_region_of_several_files_and_the_preset(tmp_path) -> None:
    for seed, roi in enumerate(["ROI_001", "ROI_002"]):
        write(tmp_path / "run" / f"{roi}.ome.tiff", seed, names=["141Pr_CD3", "152Sm_CD4"])
    store = convert(tmp_path / "run", TECHNOLOGY, tmp_path / "out.zarr", vendor_region="ROI_002")
    np.testing.assert_array_equal(pixels(store), noise(1, (2, 30, 40)))
    write(tmp_path / "plain" / "141Pr_CD3.tiff", pixel=None)
    assert fails(tmp_path / "plain", TECHNOLOGY, tmp_path / "p.zarr").code == "pixel-size-unknown"
    store = convert(tmp_path / "plain", TECHNOLOGY, tmp_path / "out.zarr", preset="hyperion")
    assert open_image(store.path).pixel_size_um == 1.0


# --- what can be wrong


def _mcd(folder):
    (folder / "slide.mcd").write_bytes(b"x")


def _below(folder):
    write(folder / "ROI_1" / "141Pr_CD3.tiff")


def _twice(folder):
    write(folder / "ROI1_141Pr_CD3.tiff", 1)
    write(folder / "ROI2_141Pr_CD3.tiff", 2)


def _sizes(folder):
    write(folder / "141Pr_CD3.tiff", 1)
    write(folder / "142Nd_CD4.tiff", 2, size=(31, 40))


def _mixed(folder):
    write(folder / "141Pr_CD3.tiff", 1)
    write(folder / "all.ome.tiff", 2, names=["141Pr_CD3", "142Nd_CD4"])


def _regions(folder):
    for roi in "ab":
        write(folder / f"{roi}.ome.tiff", 1, names=["141Pr_CD3", "142Nd_CD4"])


def _nan(folder):
    plane = noise()
    plane[3, 4] = np.nan
    tifffile.imwrite(folder / "141Pr_CD3.tiff", plane)


def _cut(folder):
    write(folder / "141Pr_CD3.tiff", 1)
    content = (folder / "141Pr_CD3.tiff").read_bytes()
    (folder / "141Pr_CD3.tiff").write_bytes(content[: len(content) // 2])


BAD = {
    "only the machine's own file": (_mcd, {}, "machine-no-images", "slide.mcd"),
    "the folder above": (_below, {}, "machine-no-images", "ROI_1"),
    "two regions in one folder": (_twice, {}, "hyperion-channel-twice", "141Pr CD3"),
    "sizes that differ": (_sizes, {}, "machine-images-differ", "31 × 40"),
    "all channels among single ones": (_mixed, {}, "machine-image-channels", "all.ome.tiff"),
    "several regions": (_regions, {}, "machine-region-needed", "a, b"),
    "a region that is not there": (_regions, {"vendor_region": "c"}, "machine-region-unknown", '"c"'),
    "no number": (_nan, {"pixel_size_um": 1}, "image-not-finite", "row 3, column 4"),
    "a file cut short": (_cut, {}, "tiff-truncated", "141Pr_CD3.tiff"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(tmp_path, case) -> None:
    make, given, code, text = BAD[case]
    (tmp_path / "roi").mkdir()
    make(tmp_path / "roi")
    error = fails(tmp_path / "roi", TECHNOLOGY, tmp_path / "out.zarr", **given)
    assert error.code == code
    assert text in error.message
    if case == "only the machine's own file":
        assert "slide.mcd as OME-TIFF" in error.hint
    if case == "the folder above":
        assert "ROI_1" in error.hint


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 600), garbage=st.binary(min_size=1, max_size=10))
def test_garbage_in_the_header_is_an_error_or_an_image(tmp_path, place, garbage) -> None:
    path = tmp_path / "roi" / "141Pr_CD3.tiff"
    write(path)
    content = bytearray(path.read_bytes())
    content[place : place + len(garbage)] = garbage
    path.write_bytes(content)
    with contextlib.suppress(CellquiltError):
        convert(tmp_path / "roi", TECHNOLOGY, tmp_path / "out.zarr", memory_mb=256, pixel_size_um=1)
