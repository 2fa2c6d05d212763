"""CosMx: stitched fields against spatialdata-io, the truth and brute force; folders that are wrong."""

import contextlib
import gzip
import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata
import cellquilt as cq
import machine_cases
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import shapely
import tifffile
from cellquilt.aggregation.stage import aggregate_slide
from cellquilt.core.errors import CellquiltError
from cellquilt.core.images import open_image
from cellquilt.core.settings import PRESETS, Settings
from cellquilt.core.shapes import ShapesTable, read_shapes
from cellquilt.core.store import Store
from cellquilt.readers import cosmx
from cellquilt.resolve.stage import resolve_slide
from cellquilt.simulate import Slide, make_parameters, simulate
from cellquilt.simulate.cosmx import _STAINS, ORIGIN_PX
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from machine_cases import facts, pixels, points

PIXEL, WIDTH, HEIGHT = 0.3, 300, 240
MADE = {"width_px": WIDTH, "height_px": HEIGHT, "pixel_size_um": PIXEL, "seed": 2, "n_genes": 40, "fov_um": 60.0}
MADE["density_factor"] = 0.4


def convert(folder: Path, output: Path | None = None, **given: Any) -> Store:
    output = output or folder.parent / "out.raw.zarr"
    return machine_cases.convert(folder, "cosmx", output, **{"pixel_size_um": PIXEL, "chunk_px": 64, **given})


def fails(folder: Path, **given: Any) -> CellquiltError:
    with pytest.raises(CellquiltError) as caught:
        convert(folder, **given)
    return caught.value


def cells(store: Store) -> ShapesTable:
    return read_shapes(store.element("shapes", "vendor_cells"))


def read_reference(folder: Path) -> Any:
    """spatialdata-io's reader, whose call of AnnData the installed anndata no longer takes."""
    from spatialdata_io.readers import cosmx as theirs

    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(theirs, "AnnData", lambda X, dtype, **more: anndata.AnnData(X.astype(dtype), **more))
        return theirs.cosmx(folder)


def stitched(fields: dict[tuple[int, int], np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """Brute force: the mean of what lies on each pixel, weighted by the distance to the border of its field."""
    total, weight = (np.zeros(shape, dtype=object) for _ in range(2))
    for (x, y), field in fields.items():
        height, width = field.shape
        for row in range(height):
            for column in range(width):
                w = min(row + 1, height - row, column + 1, width - column)
                total[y + row, x + column] += w * int(field[row, column])
                weight[y + row, x + column] += w
    there = weight > 0
    out = np.zeros(shape, np.int64)
    out[there] = (total[there] + weight[there] // 2) // weight[there]
    return out


# --- a simulated slide: ours, spatialdata-io's and the truth ----------------------------------------------------------


@dataclass
class Case:
    folder: Path
    store: Store
    reference: Any
    truth: pd.DataFrame

    @property
    def names(self) -> pd.Series:
        """True number → the machine's name of each cell."""
        table = pd.read_parquet(self.folder / "truth" / "vendor_ids.parquet")
        return table.set_index("cell_id")["vendor_id"]

    def file(self, ending: str) -> Path:
        return self.folder / f"slide_0{ending}"


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> Case:
    output = tmp_path_factory.mktemp("cosmx") / "sim"
    simulate(output, format="cosmx", tile_px=256, **MADE)
    folder = output / "slide_0"
    truth = pd.read_parquet(folder / "truth" / "transcripts_truth.parquet")
    return Case(folder, convert(folder), read_reference(folder), truth)


def test_fields_become_the_true_slide(case) -> None:
    image = open_image(case.store.path)
    assert image.channels == ["CD298/B2M", "PanCK", "CD45", "CD68", "DNA"]
    assert image.pixel_size_um == pytest.approx(PIXEL)
    slide = Slide(make_parameters(**MADE))
    tile = slide.tile((0, HEIGHT, 0, WIDTH))
    for channel, (_, _, stain, plane) in enumerate(_STAINS):
        expected = slide.image(tile, (stain,), plane)[0]
        np.testing.assert_array_equal(image.read(0, HEIGHT, 0, WIDTH)[channel], expected)
    assert facts(case.store)["overlap_px"] > 0.2 * WIDTH * HEIGHT


def test_composites_agree_with_spatialdata_io(case) -> None:
    from spatialdata.transformations import get_transformation

    store = convert(case.folder, case.folder.parent / "composite.zarr", cosmx_image="composite")
    ours = pixels(store)
    assert open_image(store.path).channels == ["r", "g", "b"]
    fields: list[dict[tuple[int, int], np.ndarray]] = [{}, {}, {}]
    assert len(case.reference.images) == facts(store)["n_fields"] >= 6
    for image in case.reference.images.values():
        to_global = get_transformation(image, "global").to_affine_matrix(("x", "y"), ("x", "y"))
        np.testing.assert_allclose(to_global[:2, :2], np.eye(2), atol=1e-9)
        corner = tuple(np.rint(to_global[:2, 2] - ORIGIN_PX).astype(int).tolist())
        for channel, values in enumerate(np.asarray(image.values)):
            fields[channel][corner] = values
    for channel in (1, 2):
        np.testing.assert_array_equal(ours[channel], stitched(fields[channel], (HEIGHT, WIDTH)))


def test_transcripts_agree_and_are_the_true_ones(case) -> None:
    ours = points(case.store)
    parts = [part.compute() for part in case.reference.points.values()]
    reference = pd.concat(parts).sort_values(["x_global_px", "y_global_px", "z_raw"])
    assert len(ours) == len(reference) == len(case.truth) == facts(case.store)["n_transcripts"]
    mine = ours.sort_values(["x", "y", "z_plane"])
    np.testing.assert_allclose(mine["x"] / PIXEL, reference["x_global_px"] - ORIGIN_PX[0], atol=1e-9)
    np.testing.assert_allclose(mine["y"] / PIXEL, reference["y_global_px"] - ORIGIN_PX[1], atol=1e-9)
    for own, theirs in {"gene": "target", "z_plane": "z_raw", "cell_ID": "cell_ID", "fov": "fov"}.items():
        assert (mine[own].astype(str).to_numpy() == reference[theirs].astype(str).to_numpy()).all(), own
    # In the order of the file, which is the truth's.
    for axis in "xy":
        np.testing.assert_allclose(ours[axis], case.truth[axis], atol=1e-9)
    np.testing.assert_allclose(ours["z"], 0.8 * ours["z_plane"])
    assert (ours["gene"].astype(str) == case.truth["gene"].astype(str)).all()
    assert (ours["overlaps_nucleus"] <= case.truth["in_nucleus"]).all()
    known = json.loads((case.folder / "truth" / "simulation.json").read_text())
    assert set(ours["gene"][ours["is_control"]].astype(str)) <= set(known["controls"])
    assert ours["is_control"].sum() == case.truth["gene"].astype(str).isin(known["controls"]).sum() > 0


def test_cells_are_the_true_ones_by_outlines_and_by_masks(case, tmp_path) -> None:
    table = pq.read_table(case.folder / "truth" / "cells.parquet")
    geometry = shapely.from_wkb(table.column("geometry").to_numpy(zero_copy_only=False))
    filled = [shapely.Polygon(max(shapely.get_parts(cell), key=lambda part: part.area).exterior) for cell in geometry]
    true = dict(zip(case.names[table.column("cell_id").to_pylist()], filled, strict=True))
    ours = cells(case.store)
    assert sorted(ours.ids) == sorted(true)
    assert len(ours) > 30
    expected = np.array([true[name] for name in ours.ids], dtype=object)
    assert shapely.equals(shapely.normalize(ours.geometry), shapely.normalize(expected)).all()
    folder = shutil.copytree(case.folder, tmp_path / "masks")
    (folder / "slide_0-polygons.csv").unlink()
    masks = cells(convert(folder, cosmx_image="none"))
    assert set(masks.ids) <= set(ours.ids)
    assert len(masks) >= len(ours) - 1
    sizes = {}
    for fov, labels in case.reference.labels.items():
        numbers, counts = np.unique(np.asarray(labels.values), return_counts=True)
        sizes |= {
            f"{number}_{fov.removesuffix('_labels')}": n for number, n in zip(numbers, counts, strict=True) if number
        }
    assert dict(zip(masks.ids, shapely.area(masks.geometry).astype(int), strict=True)) == sizes
    # A mask is cut at its field's border, nothing else differs.
    outline = dict(zip(ours.ids, ours.geometry, strict=True))
    covered = [shapely.area(cell - outline[name]) for name, cell in zip(masks.ids, masks.geometry, strict=True)]
    assert max(covered) == 0


def test_the_machines_counts_agree(case) -> None:
    ours = anndata.read_zarr(case.store.element("tables", "vendor_table"))
    reference = case.reference["table"]
    assert sorted(ours.obs_names) == sorted(reference.obs_names)
    assert ours.obs_names.tolist() == cells(case.store).ids.tolist()
    theirs = reference[ours.obs_names, ours.var_names]
    np.testing.assert_array_equal(ours.X.toarray(), theirs.X.toarray())
    assert ours.X.sum() == (points(case.store)["cell_ID"] > 0).sum()
    assert ours.obs["counted"].all()


def test_vendor_cells_through_the_pipelines_steps_have_the_true_counts(case, tmp_path) -> None:
    chosen = Settings(segmentation="vendor", average_intensities=False)
    found = resolve_slide(case.store.path, settings=chosen, output=tmp_path / "cells.zarr")
    table = aggregate_slide(case.store.path, cells=found, settings=chosen, output=tmp_path / "table.zarr")
    ours = anndata.read_zarr(Store(table).element("tables", "table"))
    vendor = read_shapes(Store(found).element("shapes", "cell_boundaries")).columns["vendor_id"]
    machine = anndata.read_zarr(case.store.element("tables", "vendor_table"))[vendor, ours.var_names]
    # Holes in cells, which outlines of the machine do not have, may hold another cell's.
    assert np.abs(ours.X.toarray() - machine.X.toarray()).sum() <= 0.001 * machine.X.sum()
    own = points(Store(table))
    assert len(own) == len(case.truth)
    assert ((own["vendor_cell_id"] == "UNASSIGNED") == (own["cell_ID"] == 0)).all()
    prior = own.loc[own["cell_ID"] > 0, ["vendor_cell_id", "cell_ID", "fov"]]
    assert (prior["vendor_cell_id"].astype(str) == prior["cell_ID"].astype(str) + "_" + prior["fov"].astype(str)).all()


def test_notebooks_and_presets_know_the_machine(case, tmp_path) -> None:
    sdata = cq.io.cosmx(case.folder, output=tmp_path / "s.zarr", pixel_size_um=PIXEL)
    assert {"morphology", "transcripts", "vendor_cells", "vendor_table"} <= {
        name for _, name, _ in sdata.gen_elements()
    }
    assert Settings(preset="cosmx")["z_step_um"] == PRESETS["cosmx"]["z_step_um"] == 0.8


def test_the_same_slide_gives_the_same_store(case, tmp_path) -> None:
    one, two = convert(case.folder, tmp_path / "a.zarr"), convert(case.folder, tmp_path / "b.zarr", memory_mb=300)
    for kind in ("images", "points", "shapes", "tables"):
        for file in sorted((one.path / kind).rglob("*")):
            if file.is_file():
                assert file.read_bytes() == (two.path / file.relative_to(one.path)).read_bytes(), file


# --- places of fields -------------------------------------------------------------------------------------------------


@pytest.fixture
def copy(case, tmp_path) -> Path:
    return shutil.copytree(case.folder, tmp_path / "copy", ignore=shutil.ignore_patterns("CellComposite", "truth"))


def edit(path: Path, change: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
    change(pd.read_csv(path)).to_csv(path, index=False)


def same(store: Store, other: Store) -> None:
    np.testing.assert_array_equal(pixels(store), pixels(other))
    for axis in "xy":
        np.testing.assert_allclose(points(store)[axis], points(other)[axis], atol=1e-6)


@pytest.mark.parametrize("columns", [("FOV", "X_mm", "Y_mm"), ("fov", "x_global_mm", "y_global_mm")])
def test_positions_in_millimetres(case, copy, columns) -> None:
    def change(table: pd.DataFrame) -> pd.DataFrame:
        found = table[["fov", "x_global_mm", "y_global_mm"]].sample(frac=1, random_state=1)
        return found.set_axis(columns, axis=1)

    edit(copy / "slide_0_fov_positions_file.csv", change)
    for file in ("slide_0_fov_positions_file.csv", "slide_0_tx_file.csv", "slide_0_exprMat_file.csv"):
        (copy / f"{file}.gz").write_bytes(gzip.compress((copy / file).read_bytes(), 1))
        (copy / file).unlink()
    found = convert(copy)
    same(found, case.store)
    assert cells(found).ids.tolist() == cells(case.store).ids.tolist()


def test_positions_that_name_another_corner(case, copy) -> None:
    """Some exports shift the positions by a field against the transcripts."""
    height = tifffile.imread(next((copy / "Morphology2D").iterdir())).shape[1]
    edit(copy / "slide_0_fov_positions_file.csv", lambda table: table.assign(y_global_px=table["y_global_px"] + height))
    found = convert(copy)
    same(found, case.store)
    assert facts(found)["fields_off_px"] == [0, -height]
    for name in ("metadata_file", "tx_file"):
        (copy / f"slide_0_{name}.csv").rename(copy / f"gone_{name}.csv")
    (copy / "gone_tx_file.csv").rename(copy / "slide_0_tx_file.csv")
    same(convert(copy), case.store)


def test_global_y_that_grows_downwards(case, copy) -> None:
    def mirror(name: str) -> Callable[[pd.DataFrame], pd.DataFrame]:
        return lambda table: table.assign(**{name: -table[name]})

    for file, column in {
        "_fov_positions_file": "y_global_px", "_tx_file": "y_global_px", "_metadata_file": "CenterY_global_px",
        "-polygons": "y_global_px",
    }.items():  # fmt: skip
        edit(copy / f"slide_0{file}.csv", mirror(column))
    found = convert(copy)
    np.testing.assert_array_equal(pixels(found), pixels(case.store)[:, ::-1])
    np.testing.assert_allclose(points(found)["y"], HEIGHT * PIXEL - points(case.store)["y"], atol=1e-6)
    areas = [shapely.area(cells(store).geometry) for store in (found, case.store)]
    np.testing.assert_allclose(*areas)


def test_a_field_off_its_place_goes_where_its_transcripts_are(case, copy) -> None:
    edit(
        copy / "slide_0_fov_positions_file.csv",
        lambda table: table.assign(x_global_px=table["x_global_px"] + np.where(table["fov"] == 5, 11, 0)),
    )
    found = convert(copy)
    same(found, case.store)
    assert "5" in facts(found)["warnings"][0]


def test_fields_without_image_stay_black_and_are_told(case, copy) -> None:
    next((copy / "Morphology2D").glob("*_F00001.TIF")).unlink()
    found = convert(copy)
    assert pixels(found)[:, 0, 0].max() == 0
    assert "the first of them 1" in facts(found)["warnings"][0]
    assert len(points(found)) == len(case.truth)


# --- stitching --------------------------------------------------------------------------------------------------------


def write_fields(folder: Path, fields: dict[tuple[float, float], np.ndarray], order: list[int] | None = None) -> Path:
    """A slide of grey fields; corner → pixels as they shall lie in the stitched image."""
    (folder / "Morphology2D").mkdir(parents=True)
    rows = []
    for number, ((x, y), field) in enumerate(fields.items(), 1):
        tifffile.imwrite(
            folder / "Morphology2D" / f"a_F{number:05d}.TIF", np.ascontiguousarray(field[::-1]), metadata=None
        )
        rows.append(f"{number},{x},{y}")
    rows = [rows[k] for k in order or range(len(rows))]
    (folder / "a_fov_positions_file.csv").write_text("fov,x_global_px,y_global_px\n" + "\n".join(rows) + "\n")
    (folder / "a_tx_file.csv").write_text("fov,cell_ID,x_global_px,y_global_px,z,target\n1,0,1.5,2.5,0,A\n")
    return folder


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_overlaps_are_blended_whatever_the_order(tmp_path_factory, data) -> None:
    n = data.draw(st.integers(1, 5))
    place = st.tuples(st.integers(0, 25), st.integers(0, 25))
    corners = data.draw(st.lists(place, min_size=n, max_size=n, unique=True))
    shape = data.draw(st.tuples(st.integers(1, 20), st.integers(1, 20)))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    constant = data.draw(st.booleans())
    fields = {
        corner: np.full(shape, 60_001, np.uint16) if constant else rng.integers(0, 65536, shape).astype(np.uint16)
        for corner in corners
    }
    low = np.min(corners, axis=0)
    high = np.max(corners, axis=0) + shape[::-1]
    moved = {tuple((np.array(corner) - low).tolist()): field for corner, field in fields.items()}
    expected = stitched(moved, tuple((high - low)[::-1].tolist()))
    folder = tmp_path_factory.mktemp("fields")
    order = data.draw(st.permutations(range(n)))
    found = pixels(convert(write_fields(folder / "slide", fields, order), chunk_px=64))[0]
    np.testing.assert_array_equal(found, expected)
    if constant:
        assert set(np.unique(found)) <= {0, 60_001}
    # The numbers of fields do not matter either.
    again = write_fields(folder / "again", dict(reversed(list(fields.items()))))
    np.testing.assert_array_equal(pixels(convert(again))[0], found)


def test_no_more_files_are_open_than_memory_is_for(tmp_path, monkeypatch) -> None:
    opened: list[int] = []
    whole = cosmx._Stitched._opened

    def counted(self, path):
        file = whole(self, path)
        opened.append(len(self._open))
        return file

    monkeypatch.setattr(cosmx._Stitched, "_opened", counted)
    fields = {(40.0 * k, 0.0): np.full((50, 50), k, np.uint16) for k in range(30)}
    store = convert(write_fields(tmp_path / "slide", fields), memory_mb=200)
    assert max(opened) <= 20
    assert np.unique(pixels(store)).tolist() == list(range(30))


def test_proteins_are_channels_by_name(tmp_path) -> None:
    fields = {(0.0, 0.0): np.full((20, 30), 7, np.uint16), (25.0, 0.0): np.full((20, 30), 7, np.uint16)}
    folder = write_fields(tmp_path / "slide", fields)
    (folder / "a_tx_file.csv").unlink()
    for field, names in ((1, ("PanCK", "CD3", "cd8")), (2, ("cd8", "CD3"))):
        place = folder / "Results" / f"FOV{field:05d}" / "ProteinImages"
        place.mkdir(parents=True)
        for k, name in enumerate(names):
            description = json.dumps({"DisplayName": name, "Other": 1})
            values = np.full((20, 30), 10 * len(name) + field, np.uint16)
            tifffile.imwrite(place / f"x_{k}.TIF", values, metadata=None, description=description)
    store = convert(folder)
    image = open_image(store.path)
    assert image.channels == ["channel_0", "CD3", "cd8", "PanCK"]
    values = pixels(store)
    assert values[1, 5, 0] == 31
    assert values[1, 5, 54] == 32
    assert 31 <= values[1, 5, 27] <= 32
    assert values[3, 5, 54] == 0  # the second field has none, which is told
    assert "PanCK" in facts(store)["warnings"][0]
    assert not store.names("points")


def test_stains_are_named_by_the_pages_own_description() -> None:
    class Page:
        shape = (3, 1, 5, 5)
        channel_names = ("channel_0", "channel_1", "channel_2")

    reagents = (
        '{"Reagents": [{"BiologicalTarget": "DNA", "Fluorophore": {"ChannelId": "U"}}, {"BiologicalTarget": "CD45",'
    )
    reagents += ' "Fluorophore": {"ChannelId": "B"}}], "ChannelOrder": "%s"}'
    Page.description = reagents % "BXU"
    assert cosmx._stains(Page) == ["CD45", "X", "DNA"]
    Page.description = "something before " + reagents % "UBB"
    assert cosmx._stains(Page) == ["DNA", "CD45", "CD45_2"]
    for text in ("", "{", "[" * 5000, reagents % "B", '{"ChannelOrder": 3}'):
        Page.description = text
        assert cosmx._stains(Page) == Page.channel_names


# --- folders that are wrong -------------------------------------------------------------------------------------------


def _csv(ending: str, change: Callable[[pd.DataFrame], pd.DataFrame]) -> Callable[[Path], object]:
    return lambda folder: edit(folder / f"slide_0{ending}.csv", change)


def _text(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


def _gone(*names: str) -> Callable[[Path], object]:
    def remove(folder: Path) -> None:
        for name in names:
            for path in list(folder.glob(name)):
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    return remove


def _field(folder: Path, number: int) -> Path:
    return next((folder / "Morphology2D").glob(f"*_F{number:05d}.TIF"))


POSITIONS, TX, COUNTS = "slide_0_fov_positions_file.csv", "slide_0_tx_file.csv", "slide_0_exprMat_file.csv"
BAD: dict[str, tuple[Callable[[Path], object], str, tuple[str, ...]]] = {
    "no positions": (_gone(POSITIONS), "cosmx-fov-positions", ("copy", "_fov_positions_file.csv", "Morphology2D")),
    "two slides": (
        lambda folder: shutil.copy(folder / POSITIONS, folder / "b_fov_positions_file.csv"),
        "cosmx-fov-positions", ("several slides", "b_fov_positions_file.csv"),
    ),
    "positions without a field": (
        _csv("_fov_positions_file", lambda table: table[table["fov"] != 2]), "cosmx-fov-positions", ("field 2",)
    ),
    "a field twice": (
        _csv("_fov_positions_file", lambda table: pd.concat([table, table[table["fov"] == 3]])),
        "cosmx-fov-positions", ("field 3", "more than once"),
    ),
    "positions in unknown columns": (
        _csv("_fov_positions_file", lambda table: table.set_axis(["fov", "a", "b", "c", "d"], axis=1)),
        "cosmx-fov-positions", ("fov, a, b, c, d", "x_global_px", "x_mm"),
    ),
    "positions of another planet": (
        _csv("_fov_positions_file", lambda table: table.assign(x_global_px=np.where(table["fov"] == 4, 1e12, 0.0))),
        "cosmx-fov-positions", ("field 4", "glass"),
    ),
    "positions that are no numbers": (
        _text(POSITIONS, b"fov,x_global_px,y_global_px\n1,here,there\n"), "cosmx-fov-positions", ("here",)
    ),
    "empty positions": (_text(POSITIONS, b""), "cosmx-fov-positions", ("is empty",)),
    "positions without rows": (_text(POSITIONS, b"fov,x_mm,y_mm\n"), "cosmx-fov-positions", ("no fields",)),
    "positions that are binary": (_text(POSITIONS, bytes(range(256)) * 99), "cosmx-fov-positions", (POSITIONS,)),
    "infinite positions": (
        _text(POSITIONS, b"fov,x_mm,y_mm\n1,inf,0\n"), "cosmx-fov-positions", ("row 1", "inf")
    ),
    "global pixels in another unit": (
        _csv("_metadata_file", lambda table: table.assign(CenterX_global_px=table["CenterX_global_px"] * 0.3)),
        "cosmx-fov-positions", ("global x grows by 0.3",),
    ),
    "no images": (_gone("Morphology2D", "CellComposite"), "cosmx-no-image", ("Morphology2D", "cosmx_image=none")),
    "a field in two files": (
        lambda folder: shutil.copy(_field(folder, 1), folder / "Morphology2D" / "b_F1.tif"),
        "cosmx-images-differ", ("two images of field 1", "b_F1.tif"),
    ),
    "a field of another size": (
        lambda folder: tifffile.imwrite(_field(folder, 3), np.zeros((5, 9, 9), np.uint16), photometric="minisblack"),
        "cosmx-images-differ", ("_F00003.TIF", "9 × 9"),
    ),
    "a field of another type": (
        lambda folder: tifffile.imwrite(
            _field(folder, 3), tifffile.imread(_field(folder, 3)).astype(np.uint8), photometric="minisblack"
        ),
        "cosmx-images-differ", ("uint8", "uint16"),
    ),
    "an image cut short": (
        lambda folder: _field(folder, 2).write_bytes(_field(folder, 2).read_bytes()[:5000]),
        "tiff-truncated", ("_F00002.TIF",),
    ),
    "an image that is none": (lambda folder: _field(folder, 2).write_bytes(b"hello"), "not-a-tiff", ("_F00002.TIF",)),
    "no transcripts": (_gone(TX), "cosmx-no-transcripts", ("_tx_file.csv", "ome_tif")),
    "transcripts without places": (
        _csv("_tx_file", lambda table: table.drop(columns="x_global_px")),
        "transcripts-column-missing", ("x_global_px",),
    ),
    "a transcript without gene": (
        _csv("_tx_file", lambda table: table.assign(target=table["target"].where(table.index != 4))),
        "transcripts-gene-missing", ("row 5",),
    ),
    "cells of transcripts that are no numbers": (
        _csv("_tx_file", lambda table: table.assign(cell_ID="x")), "transcripts-value", ("cell_ID",)
    ),
    "outlines without a column": (
        _csv("-polygons", lambda table: table.drop(columns="y_global_px")), "cosmx-cells-unreadable", ("y_global_px",)
    ),
    "outlines that are no numbers": (
        _csv("-polygons", lambda table: table.assign(fov="x")), "cosmx-cells-unreadable", ("polygons.csv",)
    ),
    "counts without cells": (
        _csv("_exprMat_file", lambda table: table.drop(columns="cell_ID")), "cosmx-cells-unreadable", ("cell_ID",)
    ),
    "counts that are none": (
        _csv("_exprMat_file", lambda table: table.assign(**{table.columns[5]: -1})),
        "cosmx-cells-unreadable", ("counts",),
    ),
    "counts that are shares": (
        _csv("_exprMat_file", lambda table: table.assign(**{table.columns[5]: 0.5})), "cosmx-cells-unreadable", ("0.5",)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_wrong_folders_say_what_is_wrong(copy, name) -> None:
    spoil, code, words = BAD[name]
    spoil(copy)
    error = fails(copy)
    assert error.code == code, error
    for word in words:
        assert word in error.message + error.hint, error
    assert error.hint
    assert str(copy.parent) not in str(error)


def test_a_file_is_no_folder(case) -> None:
    assert fails(case.file("_tx_file.csv")).code == "cosmx-no-folder"


def test_masks_that_are_none(copy) -> None:
    (copy / "slide_0-polygons.csv").unlink()
    mask = copy / "CellLabels" / "CellLabels_F001.tif"
    tifffile.imwrite(mask, tifffile.imread(mask).astype(np.float32))
    error = fails(copy)
    assert (error.code, mask.name in error.message) == ("cosmx-cells-unreadable", True)


def test_damaged_files_never_end_in_anything_else(copy) -> None:
    """Cut short, or with noise in them: an error that names its cause, or a slide; and soon."""
    rng = np.random.default_rng(0)
    table = (copy / TX).read_bytes()
    (copy / TX).write_bytes(table[: table.index(b"\n", 20_000) + 1])
    for path in [*sorted(copy.glob("*.csv")), _field(copy, 1), copy / "CellLabels" / "CellLabels_F001.tif"]:
        whole = path.read_bytes()
        for attempt in range(2):
            content = bytearray(whole)
            if attempt == 0:
                content = content[: int(len(content) * rng.uniform(0.01, 0.99))]
            else:
                for place in rng.integers(0, min(len(content), 4000), 12):
                    content[place] = int(rng.integers(0, 256))
            path.write_bytes(content)
            with contextlib.suppress(CellquiltError):
                convert(copy)
        path.write_bytes(whole)
    convert(copy)
