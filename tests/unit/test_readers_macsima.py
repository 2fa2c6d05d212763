"""MACSima: cycles of files against spatialdata-io and the truth, annotations of two versions, what can be wrong."""

import os
import shutil
import warnings
from contextlib import ExitStack
from pathlib import Path

import cellquilt as cq
import numpy as np
import pytest
import tifffile
from cellquilt.core.errors import CellquiltError
from cellquilt.core.images import open_image
from cellquilt.core.settings import Settings
from cellquilt.readers.base import Request, Slide
from cellquilt.readers.channels import ChannelFile, open_tiff, stack_files
from cellquilt.simulate import simulate
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

TECHNOLOGY = "macsima"
NS = "http://www.openmicroscopy.org/Schemas/OME/2016-06"
NAMES = ["CD20", "CD3", "DAPI", "FITC_background", "CD68", "CK18", "DAPI_2"]


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    output = tmp_path_factory.mktemp("macsima") / "sim"
    simulate(output, width_px=400, height_px=300, pixel_size_um=0.4, seed=3, format=TECHNOLOGY, tile_px=256)
    return output / "slide_0"


@pytest.fixture(scope="module")
def reference(experiment):
    import spatialdata_io

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return spatialdata_io.macsima(experiment)


def noise(seed=0, size=(30, 40)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 60_000, size).astype(np.uint16)


def ome(notes=None, *, name="", size=(30, 40), pixel=0.5, position=None, extra="") -> str:
    """OME-XML of one channel with annotations."""
    values = "".join(f'<M K="{key}">{value}</M>' for key, value in (notes or {}).items())
    notes_xml = (
        f'<StructuredAnnotations><MapAnnotation ID="Annotation:0"><Value>{values}</Value></MapAnnotation>'
        "</StructuredAnnotations>"
    )
    channel = f'<Channel ID="Channel:0:0" SamplesPerPixel="1"{f" Name={name!r}" if name else ""}/>'
    place = "" if position is None else f' PositionY="{position[0]}" PositionX="{position[1]}"'
    sizes = f'PhysicalSizeX="{pixel}" PhysicalSizeY="{pixel}"' if pixel else ""
    return (
        f'<OME xmlns="{NS}">{extra}<Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYZCT" Type="uint16" '
        f'SizeX="{size[1]}" SizeY="{size[0]}" SizeZ="1" SizeC="1" SizeT="1" {sizes}>{channel}'
        f'<TiffData IFD="0" PlaneCount="1"/><Plane TheZ="0" TheT="0" TheC="0"{place}/></Pixels></Image>'
        f"{notes_xml}</OME>"
    )


def write(path, seed=0, xml="", size=(30, 40)) -> np.ndarray:
    path.parent.mkdir(parents=True, exist_ok=True)
    plane = noise(seed, size)
    tifffile.imwrite(path, plane, description=xml.encode() or None, metadata=None)
    return plane


def version_1(name, cycle, scan="S", roi=1, **more) -> dict[str, str]:
    return {"SoftwareVersion": "1.2.3", "Biomarker": name, "Cycle": cycle, "RoiId": roi, "ScanType": scan, **more}


# --- simulated: ours, spatialdata-io's and the truth


def test_pixels_order_and_names_agree(experiment, reference, tmp_path) -> None:
    from spatialdata.transformations import get_transformation

    store = convert(experiment, TECHNOLOGY, tmp_path / "out.zarr", chunk_px=256)
    theirs = reference["slide_0_image"]["scale0"]["image"]
    np.testing.assert_array_equal(pixels(store), theirs.values)
    assert channels(store) == NAMES
    # Theirs number the first of a name, too.
    assert [name.removesuffix(" (1)").replace(" (2)", "_2") for name in theirs.coords["c"].values] == NAMES
    scale = get_transformation(reference["slide_0_image"], "slide_0").scale
    assert open_image(store.path).pixel_size_um == pytest.approx(scale[0])
    assert facts(store)["cycles"] == reference["slide_0_table"].var["cycle"].tolist() == [1, 1, 1, 1, 2, 2, 2]


def test_given_cells_have_the_true_intensities(experiment, tmp_path) -> None:
    found, _ = table_of_given_cells(experiment, TECHNOLOGY, experiment / "truth", tmp_path)
    assert_true_intensities(found, experiment / "truth")


def test_the_order_of_files_on_disk_does_not_matter(experiment, tmp_path) -> None:
    paths = sorted(experiment.glob("*.tif"))
    stores = []
    for number, order in enumerate((paths, paths[::-1])):
        folder = tmp_path / str(number) / "slide_0"
        folder.mkdir(parents=True)
        for path in order:
            shutil.copyfile(path, folder / path.name)
        stores.append(convert(folder, TECHNOLOGY, tmp_path / f"{number}.zarr"))
    assert channels(stores[0]) == channels(stores[1]) == NAMES
    np.testing.assert_array_equal(pixels(stores[0]), pixels(stores[1]))


def test_the_facade(experiment) -> None:
    from spatialdata.models import get_channel_names

    assert get_channel_names(cq.io.macsima(experiment)["image"]) == NAMES


# --- names


def test_annotations_of_version_0(tmp_path) -> None:
    folder = tmp_path / "run"
    reagent = '<Screen ID="Screen:0"><Reagent ID="Reagent:0" Name="{}"/></Screen>'
    plate = '<Plate ID="Plate:0"><Well ID="Well:0" Column="1" Row="1" ExternalIdentifier="B1"/></Plate>'
    for number, (name, cycle, kind) in enumerate(
        [("CD4__REA623", "3", "AntigenCycle"), ("DAPI", "0", "AntigenCycle"), ("CD4__REA623", "3", "BleachCycle")]
    ):
        notes = {"Software version": "0.9", "MICS cycle type": kind, "Cycle": cycle, "ROI ID": "1"}
        write(folder / f"{number}.tif", number, ome(notes, extra=plate + reagent.format(name)))
    store = convert(folder, TECHNOLOGY, tmp_path / "out.zarr")
    import spatialdata_io

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = spatialdata_io.macsima(folder)["run_image"]
    theirs = theirs["scale0"]["image"] if "scale0" in getattr(theirs, "children", {}) else theirs
    assert channels(store) == ["DAPI", "CD4", "CD4_background"] == theirs.coords["c"].values.tolist()
    np.testing.assert_array_equal(pixels(store), theirs.values)


def test_names_and_cycles_from_the_files_names(tmp_path) -> None:
    folder = tmp_path / "run"
    files = {
        "C-010_S-000_S_FITC_R-01_W-B-1_ROI-01_A-HLA-DR_C-REA805.tif": "HLA-DR",
        "C-002_S-000_S_PE_R-01_W-B-1_ROI-01_A-β-Catenin_C-REA1.tif": "β-Catenin",
        "C-002_S-000_B_PE_R-01_W-B-1_ROI-01_A-PE.tiff": "PE_background",
        "C-001_S-000_S_DAPI_R-01_W-B-1_ROI-01_A-DAPI.tif": "DAPI",
    }
    for number, file in enumerate(files):
        write(folder / "below" / file, number)
    write(folder / "below" / "overview.tif", 9, size=(300, 400))
    store = convert(folder, TECHNOLOGY, tmp_path / "out.zarr", pixel_size_um=0.17)
    assert channels(store) == ["DAPI", "PE_background", "β-Catenin", "HLA-DR"]
    order = [list(files.values()).index(name) for name in channels(store)]
    np.testing.assert_array_equal(pixels(store), [noise(number) for number in order])


@pytest.mark.parametrize(
    ("file", "name", "cycle"),
    [
        ("C-000_S-000_AFB_APC_R-01_W-A-1_ROI-08_A-None.tif", "APC_background", 0),
        ("C-000_S-000_AF_APC_R-01_W-A-1_ROI-08_A-None.tif", "APC", 0),
        ("C-001_S-000_S_APC_R-01_W-A-1_ROI-08_A-VG_C-234TCR.tif", "VG", 1),
        ("C-001_S-000_B_FITC_R-01_W-B01_ROI-01_A-Bcl_2_C-REA872.tif", "Bcl_2_background", 1),
        ("001_S_R-01_W-B-1_ROI-01_A-CD14REA599ROI1_C-REA599.ome.tif", "CD14REA599ROI1", 1),
        ("CYC-012_SCN-001_ST-B_R-01_W-B01_ROI-001_F-001_A-Syk_C-_D-FITC_EXP-17.5781.tif", "Syk_background", 12),
        ("C-002_S-000_S_PE_R-01_W-A01_ROI-02_A-S100A9_C-Poly.tif", "S100A9", 2),
    ],
)
def test_names_that_the_machine_has_given(tmp_path, file, name, cycle) -> None:
    write(tmp_path / "run" / file)
    store = convert(tmp_path / "run", TECHNOLOGY, tmp_path / "out.zarr", pixel_size_um=1)
    assert (channels(store), facts(store)["cycles"]) == ([name], [cycle])


def test_names_from_the_ome_xml_where_nothing_else_is(tmp_path) -> None:
    for number, name in enumerate(["DAPI", "CD3", "DAPI"]):
        write(tmp_path / "run" / f"{number}.ome.tif", number, ome(name=name))
    store = convert(tmp_path / "run", TECHNOLOGY, tmp_path / "out.zarr")
    assert channels(store) == ["CD3", "DAPI", "DAPI_2"]
    np.testing.assert_array_equal(pixels(store), [noise(1), noise(0), noise(2)])


def test_files_that_nothing_tells_of_are_left_out_with_a_notice(tmp_path) -> None:
    write(tmp_path / "run" / "a.tif", 1, ome(version_1("CD3", 1)))
    write(tmp_path / "run" / "scratch.tif", 2)
    store = convert(tmp_path / "run", TECHNOLOGY, tmp_path / "out.zarr")
    assert channels(store) == ["CD3"]
    assert any("scratch.tif" in text for text in facts(store)["warnings"])


def test_files_of_other_size_lie_where_they_say(tmp_path) -> None:
    folder = tmp_path / "run"
    one = write(folder / "a.tif", 1, ome(version_1("CD3", 1), position=(100, 200)))
    two = write(folder / "b.tif", 2, ome(version_1("CD4", 1), size=(20, 50), position=(105, 197)), size=(20, 50))
    store = convert(folder, TECHNOLOGY, tmp_path / "out.zarr", chunk_px=64)
    import spatialdata_io

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = spatialdata_io.macsima(folder, multiscale=False)["run_image"]
    expected = np.zeros((2, 30, 50), np.uint16)
    expected[0, :30, 3:43], expected[1, 5:25, :50] = one, two
    np.testing.assert_array_equal(pixels(store), expected)
    np.testing.assert_array_equal(theirs.values, expected)
    assert any("not of one size" in text for text in facts(store)["warnings"])


def test_a_region_of_several(tmp_path) -> None:
    for roi in (1, 2):
        write(tmp_path / "run" / f"{roi}.tif", roi, ome(version_1("CD3", 1, roi=roi)))
    store = convert(tmp_path / "run", TECHNOLOGY, tmp_path / "out.zarr", vendor_region="ROI-2")
    np.testing.assert_array_equal(pixels(store), [noise(2)])
    assert facts(store)["vendor_region"] == "ROI-2"


def test_no_text_about_the_experiment_gets_out(tmp_path) -> None:
    secret = "Jane Q Patient"
    xml = ome(version_1("CD3", 1, Comment=secret), extra=f"<Experimenter UserName='{secret}' ID='Experimenter:0'/>")
    write(tmp_path / "run" / "a.tif", 1, xml)
    write(tmp_path / "run" / "label.tif", 2)
    store = convert(tmp_path / "run", TECHNOLOGY, tmp_path / "out.zarr")
    assert_nowhere(store.path, [secret, "label.tif"])
    assert pixels(store).shape == (1, 30, 40)


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="only Linux tells which files are open")
def test_of_many_files_one_is_open(experiment) -> None:
    with ExitStack() as resources:
        request = Request(experiment, None, Settings({}), "slide", resources)
        files = [ChannelFile(path.name, open_tiff(request, path)) for path in sorted(experiment.glob("*.tif"))]
        source = stack_files(files, request, Slide())
        for channel in (0, 3, 6, 1):
            source.read(channel, 0, 64, 0, 64)
            opened = [Path(os.readlink(entry)) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]
            assert [path for path in opened if path.parent == experiment] == [files[channel].image.path]


# --- what can be wrong


def _file(folder):
    write(folder / "a.tif", 1, ome(version_1("CD3", 1)))
    return folder / "a.tif"


def _others(folder):
    (folder / "sub").mkdir()
    (folder / "readme.md").write_text("x")
    return folder


def _renamed(folder):
    write(folder / "1.tif")
    write(folder / "2.tif")
    return folder


def _rois(folder):
    for roi in range(1, 4):
        write(folder / f"{roi}.tif", roi, ome(version_1("CD3", 1, roi=roi)))
    return folder


def _types(folder):
    _file(folder)
    tifffile.imwrite(
        folder / "b.tif", np.zeros((30, 40), np.uint8), metadata=None,
        description=ome(version_1("CD4", 1)).replace("uint16", "uint8").encode(),
    )  # fmt: skip
    return folder


def _pixels(folder):
    _file(folder)
    write(folder / "b.tif", 2, ome(version_1("CD4", 1), pixel=0.7))
    return folder


def _no_pixel(folder):
    write(folder / "a.tif", 1, ome(version_1("CD3", 1), pixel=None))
    return folder


def _planes(folder):
    tifffile.imwrite(folder / "C-001_S_FITC_A-CD3.tif", np.zeros((3, 20, 20), np.uint16), photometric="minisblack")
    return folder


def _apart(folder):
    write(folder / "a.tif", 1, ome(version_1("CD3", 1), position=(0, 0)))
    write(folder / "b.tif", 2, ome(version_1("CD4", 1), size=(20, 40), position=(10**8, 10**8)), size=(20, 40))
    return folder


def _cut(folder):
    path = _file(folder)
    path.write_bytes(path.read_bytes()[:-500])
    return folder


def _text(folder):
    (folder / "C-001_S_FITC_A-CD3.tif").write_text("no TIFF")
    return folder


def _raw(folder):
    for field in (1, 2):
        write(folder / f"CYC-001_SCN-001_ST-S_R-01_W-B01_ROI-001_F-{field:03d}_A-Syk_C-_D-FITC_EXP-17.tif")
    return folder


BAD = {
    "raw fields of view": (_raw, {}, "macsima-raw", "2 fields"),
    "a file": (_file, {}, "machine-no-folder", "a.tif"),
    "a folder without images": (_others, {}, "machine-no-images", "readme.md, sub"),
    "names that say nothing": (_renamed, {}, "macsima-names-unknown", "1.tif, 2.tif"),
    "several regions": (_rois, {}, "machine-region-needed", "ROI-1, ROI-2, ROI-3"),
    "a region that is not there": (_rois, {"vendor_region": "ROI-7"}, "machine-region-unknown", "ROI-7"),
    "types that differ": (_types, {}, "machine-images-differ", "uint8"),
    "pixel sizes that differ": (_pixels, {}, "machine-images-differ", "0.7"),
    "no pixel size": (_no_pixel, {}, "pixel-size-unknown", "a.tif"),
    "a stack in a file": (_planes, {}, "machine-image-channels", "3 channels"),
    "positions far apart": (_apart, {}, "machine-images-differ", "100000000"),
    "a file cut short": (_cut, {}, "tiff-truncated", "a.tif"),
    "a file that is none": (_text, {}, "not-a-tiff", "A-CD3.tif"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(tmp_path, case) -> None:
    make, given, code, text = BAD[case]
    (tmp_path / "run").mkdir()
    error = fails(make(tmp_path / "run"), TECHNOLOGY, tmp_path / "out.zarr", **given)
    assert error.code == code
    assert text in error.message


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 1500), garbage=st.binary(min_size=1, max_size=10))
def test_garbage_in_the_header_is_an_error_or_an_image(tmp_path, place, garbage) -> None:
    path = _file(tmp_path / "run")
    content = bytearray(path.read_bytes())
    content[place : place + len(garbage)] = garbage
    path.write_bytes(content)
    try:
        store = convert(tmp_path / "run", TECHNOLOGY, tmp_path / "out.zarr", memory_mb=256, pixel_size_um=1)
    except CellquiltError:
        return
    assert open_image(store.path).shape[1] <= 2**16
