"""Xenium: bundles of four versions against spatialdata-io and the truth, and every way in which one can be wrong."""

import itertools
import json
import re
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata
import cellquilt as cq
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapely
import tifffile
from cellquilt.aggregation.stage import aggregate_slide
from cellquilt.core.errors import CellquiltError
from cellquilt.core.images import open_image
from cellquilt.core.points import iter_points, points_transforms
from cellquilt.core.settings import Settings
from cellquilt.core.shapes import read_shapes
from cellquilt.core.store import Store
from cellquilt.geometry.polygons import Rings
from cellquilt.geometry.rasterize import polygons_to_labels
from cellquilt.readers import convert_slide, transcript_table
from cellquilt.resolve.stage import resolve_slide
from cellquilt.simulate import simulate
from cellquilt.simulate.xenium import xenium_ids

PIXEL = 0.2125
WIDTH = 512
STAINS = ["DAPI", "ATP1A1/CD45/E-Cadherin", "18S", "AlphaSMA/Vimentin"]


def convert(folder: Path, output: Path | None = None, **given: Any) -> Store:
    output = output or folder.parent / "out.raw.zarr"
    convert_slide(folder, technology="xenium", sample="s", output=output, settings=Settings(given), overwrite=True)
    return Store(output)


def points(store: Store) -> pa.Table:
    return pa.concat_tables(iter_points(store.element("points", "transcripts"))).unify_dictionaries()


def facts(store: Store) -> dict[str, Any]:
    return store.records[-1]["facts"]


def read_reference(folder: Path):
    import spatialdata_io

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return spatialdata_io.xenium(folder)


# --- simulated bundles: ours, spatialdata-io's and the truth --------------------------------------------------------


@dataclass
class Case:
    version: int
    folder: Path
    store: Store
    reference: Any
    truth: pd.DataFrame
    cells: pa.Table

    @property
    def points(self) -> pd.DataFrame:
        return points(self.store).to_pandas()

    def outlines(self, name: str) -> np.ndarray:
        """True outlines of cells or nuclei in µm."""
        table = pq.read_table(self.folder / "truth" / f"{name}.parquet")
        pixels = shapely.from_wkb(table.column("geometry").to_numpy(zero_copy_only=False))
        return shapely.transform(pixels, lambda xy: xy * PIXEL)


@pytest.fixture(scope="module", params=[1, 2, 3, 4])
def case(request, tmp_path_factory) -> Case:
    output = tmp_path_factory.mktemp("xenium") / "sim"
    simulate(output, width_px=WIDTH, height_px=400, seed=3, format="xenium", xenium_version=request.param, tile_px=256)
    folder = output / "slide_0"
    truth = pq.read_table(folder / "truth" / "transcripts_truth.parquet").to_pandas()
    cells = pq.read_table(folder / "truth" / "cells.parquet")
    return Case(request.param, folder, convert(folder, chunk_px=256), read_reference(folder), truth, cells)


def test_pixels_and_stains_agree(case) -> None:
    image = open_image(case.store.path)
    reference = case.reference["morphology_focus"]["scale0"]["image"]
    assert image.shape == (1 if case.version == 1 else 4, 400, WIDTH)
    np.testing.assert_array_equal(image.read(0, 400, 0, WIDTH), reference.values)
    if case.version == 1:  # where spatialdata-io gives numbers only
        assert image.channels == ["DAPI"]
        mip = convert(case.folder, case.folder.parent / "mip.zarr", xenium_image="mip")
        expected = case.reference["morphology_mip"]["scale0"]["image"].values
        np.testing.assert_array_equal(open_image(mip.path).read(0, 400, 0, WIDTH), expected)
    else:
        assert image.channels == reference.coords["c"].values.tolist() == STAINS
    assert image.pixel_size_um == pytest.approx(PIXEL)


def test_transcripts_agree(case) -> None:
    from spatialdata.transformations import get_transformation

    ours, reference = case.points, case.reference["transcripts"].compute().reset_index(drop=True)
    assert len(ours) == len(reference) > 10_000
    reference = reference.sort_values("transcript_id", ignore_index=True)
    assert (ours["vendor_transcript_id"] == reference["transcript_id"]).all()
    assert ours["transcript_id"].tolist() == list(range(len(ours)))
    for axis in "xyz":
        np.testing.assert_array_equal(ours[axis], reference[axis].astype(np.float64))
    for mine, theirs in {"gene": "feature_name", "vendor_cell_id": "cell_id", "fov_name": "fov_name"}.items():
        found, expected = ours[mine].astype(str), reference[theirs]
        if isinstance(expected.iloc[0], bytes):
            expected = expected.str.decode("utf-8")
        assert (found == expected.astype(str)).all(), mine
    same = ["qv", "overlaps_nucleus", "nucleus_distance", "codeword_index", "codeword_category", "is_gene"]
    for column in same[: {1: 3, 2: 4}.get(case.version)]:
        assert (ours[column] == reference[column]).all(), column
    matrix = get_transformation(case.reference["transcripts"]).to_affine_matrix(("x", "y"), ("x", "y"))
    np.testing.assert_allclose(points_transforms(case.store.element("points", "transcripts"))["global"], matrix)


def test_transcripts_are_the_true_ones(case) -> None:
    ours, truth = case.points, case.truth
    document = json.loads((case.folder / "truth" / "simulation.json").read_text())
    assert len(ours) == len(truth) == document["n_transcripts"] == facts(case.store)["n_transcripts"]
    for axis in "xyz":
        np.testing.assert_array_equal(ours[axis], truth[axis].astype(np.float32))
    assert (ours["gene"].astype(str) == truth["gene"].astype(str)).all()
    assert (ours["overlaps_nucleus"] == truth["in_nucleus"]).all()
    # A transcript's cell is where it lies, not where it came from.
    places = shapely.points(truth["x"], truth["y"])
    row, cell = shapely.STRtree(case.outlines("cells")).query(places, "intersects")
    expected = np.full(len(truth), "UNASSIGNED", dtype=object)
    expected[row] = xenium_ids(case.cells.column("cell_id").to_numpy())[cell]
    assert (ours["vendor_cell_id"] == expected).all()
    # Below the threshold they are kept and marked; controls too.
    assert (ours["passes_qv"] == (ours["qv"] >= 20)).all()
    assert 0.1 < 1 - ours["passes_qv"].mean() < 0.2
    assert (ours["is_control"] == ours["gene"].isin(document["controls"])).all()
    assert ours["is_control"].sum() > 50
    assert facts(case.store)["controls_from"] == ("is_gene" if case.version >= 3 else "names")


@pytest.mark.parametrize("kind", ["cell", "nucleus"])
def test_outlines_agree_with_both(case, kind) -> None:
    ours = read_shapes(case.store.element("shapes", {"cell": "vendor_cells", "nucleus": "vendor_nuclei"}[kind]))
    reference = case.reference[f"{kind}_boundaries"]
    assert shapely.equals_exact(ours.geometry, reference.geometry.to_numpy()).all()
    if kind == "nucleus" and case.version > 1:
        assert ours.columns["label_id"].tolist() == reference.index.tolist()
        assert ours.columns["entity_id"].tolist() == reference["cell_id"].tolist()
    else:
        assert ours.ids.tolist() == ours.columns["entity_id"].tolist() == reference.index.tolist()
    name = {"cell": "cells", "nucleus": "nuclei"}[kind]
    truth = pq.read_table(case.folder / "truth" / f"{name}.parquet")
    assert ours.ids.tolist() == xenium_ids(truth.column("cell_id").to_numpy()).tolist()
    np.testing.assert_allclose(shapely.area(ours.geometry), truth.column("area_um2").to_numpy(), rtol=1e-5)
    exact = shapely.transform(case.outlines(name), lambda xy: xy.astype(np.float32))
    assert shapely.equals_exact(ours.geometry, exact).all()
    # In the image's pixels they are the bundle's mask.
    pixels = shapely.transform(ours.geometry, lambda xy: xy * ours.transforms["global"][0, 0])
    numbers = np.arange(1, len(ours) + 1)
    if kind == "nucleus" and case.version == 1:  # whose nuclei have their cells' numbers
        cells = read_shapes(case.store.element("shapes", "vendor_cells")).ids.tolist()
        numbers = np.array([cells.index(name) + 1 for name in ours.ids])
    labels = polygons_to_labels(Rings.from_shapely(pixels), numbers, (0, 400, 0, WIDTH))
    np.testing.assert_array_equal(labels, case.reference[f"{kind}_labels"]["scale0"]["image"].values)


def test_vendor_cells_have_the_bundles_own_counts(case, tmp_path) -> None:
    import scanpy

    chosen = Settings(segmentation="vendor", average_intensities=False)
    cells = resolve_slide(case.store.path, settings=chosen, output=tmp_path / "cells.zarr")
    table = aggregate_slide(case.store.path, cells=cells, settings=chosen, output=tmp_path / "table.zarr")
    ours = anndata.read_zarr(Store(table).element("tables", "table"))
    vendor = read_shapes(Store(cells).element("shapes", "cell_boundaries")).columns["vendor_id"]
    reference = case.reference["table"]
    assert sorted(vendor) == sorted(reference.obs_names)
    reference = reference[vendor]
    absent = set(reference.var_names) - set(ours.var_names)
    assert set(ours.var_names) <= set(reference.var_names)
    assert reference[:, sorted(absent)].X.sum() == 0
    np.testing.assert_array_equal(ours.X.toarray(), reference[:, ours.var_names].X.toarray())
    np.testing.assert_array_equal(ours.X.sum(axis=1).A1, reference.obs["transcript_counts"])
    np.testing.assert_allclose(ours.obs["area_um2"], reference.obs["cell_area"], rtol=1e-5)
    np.testing.assert_allclose(ours.obsm["spatial"], reference.obsm["spatial"], atol=1e-3)
    full = scanpy.read_10x_h5(case.folder / "cell_feature_matrix.h5", gex_only=False)[vendor]
    controls = full[:, full.var["feature_types"] != "Gene Expression"]
    assert controls.n_vars == len(json.loads((case.folder / "truth" / "simulation.json").read_text())["controls"])
    np.testing.assert_array_equal(ours.obs["n_control"], controls.X.sum(axis=1).A1)
    # Of the transcripts none is lost, and the matrix holds those that pass, in a cell, of genes.
    found = points(Store(table)).to_pandas()
    counted = found["passes_qv"] & ~found["is_control"] & found["cell_id"].notna()
    assert len(found) == len(case.truth)
    assert counted.sum() == ours.X.sum() == facts(Store(table))["n_counted"]
    assert ((found["vendor_cell_id"] == "UNASSIGNED") == found["cell_id"].isna()).all()


def test_the_facade_gives_what_the_store_holds(case) -> None:
    import spatialdata

    sdata = cq.io.xenium(case.folder)
    assert sorted(sdata.shapes) == ["vendor_cells", "vendor_nuclei"]
    assert len(sdata["transcripts"]) == len(case.truth)
    assert spatialdata.get_extent(sdata["morphology"]) == {"x": (0, WIDTH), "y": (0, 400)}


# --- the simulator's bundles ----------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_same_bytes_again_and_same_content_for_other_tiles(tmp_path) -> None:
    options = {"width_px": WIDTH, "height_px": 300, "seed": 5, "format": "xenium", "compression": "zlib"}
    simulate(tmp_path / "a", **options)
    simulate(tmp_path / "b", **options)
    simulate(tmp_path / "c", **options, tile_px=256)
    a = contents(tmp_path / "a")
    assert a == contents(tmp_path / "b")
    assert not [name for name in a if "spool" in name]
    bundles = [tmp_path / name / "slide_0" for name in "ac"]
    for stain in range(4):
        path = f"morphology_focus/morphology_focus_{stain:04d}.ome.tif"
        assert a[f"slide_0/{path}"] == (bundles[1] / path).read_bytes()
    whole, tiled = (pq.read_table(bundle / "cells.parquet").sort_by("cell_id").to_pandas() for bundle in bundles)
    pd.testing.assert_frame_equal(whole, tiled)
    keys = [(name, "ascending") for name in ("x_location", "y_location", "z_location", "qv")]
    whole, tiled = (pq.read_table(bundle / "transcripts.parquet").sort_by(keys) for bundle in bundles)
    whole, tiled = (table.drop_columns(["transcript_id"]) for table in (whole, tiled))
    assert whole.equals(tiled)


def test_pyramids_are_means_of_four(tmp_path) -> None:
    simulate(tmp_path / "out", width_px=700, height_px=301, format="xenium", with_transcripts=False, channels=("DAPI",))
    folder = tmp_path / "out" / "slide_0" / "morphology_focus"
    assert [path.name for path in folder.iterdir()] == ["morphology_focus_0000.ome.tif"]
    with tifffile.TiffFile(folder / "morphology_focus_0000.ome.tif") as file:
        levels = [level.asarray() for level in file.series[0].levels]
    assert [level.shape for level in levels] == [(301, 700), (150, 350), (75, 175)]
    for fine, coarse in itertools.pairwise(levels):
        even = fine[: fine.shape[0] // 2 * 2, : fine.shape[1] // 2 * 2].astype(float)
        means = even.reshape(coarse.shape[0], 2, coarse.shape[1], 2).mean(axis=(1, 3))
        np.testing.assert_array_equal(coarse, np.floor(means + 0.5))


def test_a_bundle_without_image_says_so_in_the_sheet(tmp_path) -> None:
    simulate(tmp_path / "out", width_px=256, format="xenium", image=False)
    sheet = pd.read_csv(tmp_path / "out" / "sheet.csv")
    assert sheet.loc[0, ["technology", "path", "xenium_image"]].tolist() == ["xenium", "slide_0", "none"]
    assert not (tmp_path / "out" / "slide_0" / "morphology_focus").exists()


def test_names_of_cells() -> None:
    # The two examples of the machine's own description of its ids.
    assert xenium_ids(np.array([1437536272, 1437536273]), 1).tolist() == ["ffkpbaba-1", "ffkpbabb-1"]


# --- a bundle by hand -----------------------------------------------------------------------------------------------

SHAPE = (70, 90)
KIT = ("dapi", "atp1a1_cd45_e-cadherin", "18s", "alphasma_vimentin")
NS = "http://www.openmicroscopy.org/Schemas/OME/2016-06"


def stain(number: int, plane: int = 0) -> np.ndarray:
    return np.random.default_rng([number, plane]).integers(0, 60_000, SHAPE).astype(np.uint16)


def ome(names: list[str], files: list[str], pixel: float = 0.5) -> str:
    channels = "".join(f'<Channel ID="Channel:{k}" Name="{name}"/>' for k, name in enumerate(names))
    data = "".join(
        f'<TiffData FirstC="{k}" IFD="0" PlaneCount="1"><UUID FileName="{file}">urn:uuid:{k}</UUID></TiffData>'
        for k, file in enumerate(files)
    )
    return (
        f'<?xml version="1.0"?><OME xmlns="{NS}"><Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYZCT" '
        f'Type="uint16" SizeX="{SHAPE[1]}" SizeY="{SHAPE[0]}" SizeZ="1" SizeC="{len(names)}" SizeT="1" '
        f'PhysicalSizeX="{pixel}" PhysicalSizeY="{pixel}">{channels}{data}</Pixels></Image></OME>'
    )


def write_stains(folder: Path, names: list[str], stains: list[str], **options: Any) -> None:
    """Files `names` of morphology_focus, whose OME-XML calls their channels `stains`."""
    shutil.rmtree(folder / "morphology_focus", ignore_errors=True)
    (folder / "morphology_focus").mkdir()
    for k, name in enumerate(names):
        xml = ome(stains, names) if stains else "no xml"
        tifffile.imwrite(folder / "morphology_focus" / name, stain(k), description=xml, metadata=None, **options)


def focus(k: int) -> str:
    return f"morphology_focus_{k:04d}.ome.tif"


TABLE = {
    "transcript_id": pa.array([10, 11, 12, 13, 14], pa.uint64()),
    "cell_id": ["aaaaaaab-1", "UNASSIGNED", "aaaaaaac-1", "UNASSIGNED", "UNASSIGNED"],
    "overlaps_nucleus": pa.array([1, 0, 0, 0, 0], pa.uint8()),
    "feature_name": ["NANOG", "BLANK_0007", "NegControlProbe_00042", "NEGR1", "DeprecatedCodeword_0001"],
    "x_location": pa.array([1.5, 20.25, 7.0, 40.0, 3.0], pa.float32()),
    "y_location": pa.array([2.5, 10.0, 3.5, 30.0, 4.0], pa.float32()),
    "z_location": pa.array([10.5, 11.0, 12.5, 13.0, 14.0], pa.float32()),
    "qv": pa.array([40.0, 19.99, 20.0, 5.0, 30.0], pa.float32()),
}
BOX = [(0, 0), (4, 0), (4, 4), (0, 4), (0, 0)]


def outlines(rows: list[tuple[str, int, list[tuple[float, float]]]], label: bool = True) -> pa.Table:
    """A table of vertices: cell, label and ring of each outline."""
    table = {
        "cell_id": [cell for cell, _, ring in rows for _ in ring],
        "vertex_x": pa.array([x for _, _, ring in rows for x, _ in ring], pa.float32()),
        "vertex_y": pa.array([y for _, _, ring in rows for _, y in ring], pa.float32()),
        "label_id": pa.array([number for _, number, ring in rows for _ in ring], pa.int32()),
    }
    return pa.table(table if label else {name: table[name] for name in list(table)[:3]})


def moved(x: float, y: float) -> list[tuple[float, float]]:
    return [(a + x, b + y) for a, b in BOX]


CELLS = [("aaaaaaab-1", 1, moved(0, 0)), ("aaaaaaac-1", 2, moved(5, 2))]


@pytest.fixture
def bundle(tmp_path) -> Path:
    folder = tmp_path / "region_0"
    folder.mkdir()
    document = {"pixel_size": 0.5, "analysis_sw_version": "xenium-3.1.0.4", "region_name": "r"}
    (folder / "experiment.xenium").write_text(json.dumps(document))
    pq.write_table(pa.table(TABLE), folder / "transcripts.parquet")
    pq.write_table(outlines(CELLS), folder / "cell_boundaries.parquet")
    write_stains(folder, [focus(k) for k in range(4)], STAINS)
    return folder


def rewrite(folder: Path, **columns: Any) -> None:
    pq.write_table(pa.table({**TABLE, **columns}), folder / "transcripts.parquet")


def say(folder: Path, **values: Any) -> None:
    path = folder / "experiment.xenium"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_bundle_as_it_is(bundle) -> None:
    before = contents(bundle)
    store = convert(bundle)
    image = open_image(store.path)
    assert image.channels == STAINS
    np.testing.assert_array_equal(image.read(0, 70, 0, 90), np.stack([stain(k) for k in range(4)]))
    found = points(store)
    assert found.column_names == [
        "x", "y", "z", "gene", "transcript_id", "is_control", "passes_qv", "vendor_transcript_id", "vendor_cell_id",
        "overlaps_nucleus", "qv",
    ]  # fmt: skip
    assert found.column("passes_qv").to_pylist() == [True, False, True, False, True]
    assert found.column("is_control").to_pylist() == [False, True, True, False, True]
    assert found.column("vendor_cell_id").to_pylist() == TABLE["cell_id"]
    cells = read_shapes(store.element("shapes", "vendor_cells"))
    assert cells.ids.tolist() == ["aaaaaaab-1", "aaaaaaac-1"]
    assert shapely.equals(cells.geometry, [shapely.Polygon(ring) for _, _, ring in CELLS]).all()
    np.testing.assert_allclose(cells.transforms["global"], np.diag([2, 2, 1]))
    assert not store.has("shapes", "vendor_nuclei")
    recorded = [entry["name"] for entry in store.attributes["inputs"]]
    assert recorded == [
        "experiment.xenium",
        *(f"morphology_focus/{focus(n)}" for n in range(4)),
        "transcripts.parquet",
        "cell_boundaries.parquet",
    ]
    assert contents(bundle) == before


@pytest.mark.parametrize(("min_qv", "passing"), [(0, [1, 1, 1, 1, 1]), (20, [1, 0, 1, 0, 1]), (30.5, [1, 0, 0, 0, 0])])
def test_the_threshold_marks_and_never_drops(bundle, min_qv, passing) -> None:
    found = points(convert(bundle, min_qv=min_qv))
    assert found.column("passes_qv").to_pylist() == [bool(value) for value in passing]
    assert found.column("qv").to_pylist() == TABLE["qv"].to_pylist()


def test_without_quality_values_all_pass_and_that_is_said(bundle) -> None:
    pq.write_table(pa.table(TABLE).drop_columns(["qv"]), bundle / "transcripts.parquet")
    store = convert(bundle)
    assert all(points(store).column("passes_qv").to_pylist())
    assert "no column qv" in facts(store)["warnings"][0]


@pytest.mark.parametrize(
    ("columns", "source", "expected"),
    [
        ({}, "names", [0, 1, 1, 0, 1]),
        # A custom gene called like a control, a control called like a gene, a row that is not told of.
        ({"is_gene": [False, True, None, True, False]}, "is_gene", [1, 0, 1, 0, 1]),
        ({"is_gene": pa.array([1, 0, 0, 1, 0], pa.uint8())}, "is_gene", [0, 1, 1, 0, 1]),
        (
            {
                "codeword_category": [
                    "predesigned_gene", "custom_gene", None, "unassigned_codeword", "deprecated_codeword"
                ]
            },
            "codeword_category",
            [0, 0, 1, 1, 1],
        ),
        ({"is_gene": [True] * 5, "codeword_category": ["unassigned_codeword"] * 5}, "is_gene", [0] * 5),
    ],
)  # fmt: skip
def test_what_is_a_control(bundle, columns, source, expected) -> None:
    rewrite(bundle, **columns)
    store = convert(bundle)
    assert points(store).column("is_control").to_pylist() == [bool(value) for value in expected]
    assert facts(store)["controls_from"] == source


def test_tables_of_the_first_versions(bundle) -> None:
    # XOA 1 stores text as bytes; 1.0 numbers its cells and has -1 for none, and has no labels.
    as_bytes = {name: pa.array(TABLE[name], pa.string()).cast(pa.binary()) for name in ("cell_id", "feature_name")}
    rewrite(bundle, **as_bytes)
    found = points(convert(bundle))
    assert found.column("gene").to_pylist() == TABLE["feature_name"]
    assert found.column("vendor_cell_id").to_pylist() == TABLE["cell_id"]
    rewrite(bundle, cell_id=pa.array([1, -1, 2, -1, -1], pa.int32()))
    numbered = outlines(CELLS, label=False).set_column(0, "cell_id", pa.array([1] * 5 + [2] * 5, pa.int32()))
    pq.write_table(numbered, bundle / "cell_boundaries.parquet")
    store = convert(bundle)
    assert points(store).column("vendor_cell_id").to_pylist() == [1, -1, 2, -1, -1]
    cells = read_shapes(store.element("shapes", "vendor_cells"))
    assert (cells.ids.tolist(), list(cells.columns)) == (["1", "2"], ["entity_id"])
    as_bytes = outlines(CELLS).column("cell_id").cast(pa.binary())
    pq.write_table(outlines(CELLS).set_column(0, "cell_id", as_bytes), bundle / "cell_boundaries.parquet")
    cells = read_shapes(convert(bundle).element("shapes", "vendor_cells"))
    assert cells.ids.tolist() == ["aaaaaaab-1", "aaaaaaac-1"]


def test_gzipped_transcripts_and_a_table_given_beside(bundle, tmp_path) -> None:
    import gzip

    lines = [",".join(TABLE), *(",".join(map(str, row.values())) for row in pa.table(TABLE).to_pylist())]
    (bundle / "transcripts.parquet").rename(bundle.parent / "aside.parquet")
    (bundle / "transcripts.csv.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    found = points(convert(bundle))
    assert found.column("gene").to_pylist() == TABLE["feature_name"]
    assert found.column("passes_qv").to_pylist() == [True, False, True, False, True]
    output = tmp_path / "other.zarr"
    pq.write_table(pa.table(TABLE).slice(0, 2), bundle.parent / "aside.parquet")
    convert_slide(
        bundle, technology="xenium", transcripts=bundle.parent / "aside.parquet", output=output, settings=Settings()
    )
    assert points(Store(output)).num_rows == 2


def test_transcripts_are_streamed(bundle, monkeypatch) -> None:
    monkeypatch.setattr(transcript_table, "BATCH_ROWS", 400)
    n = 2500
    rng = np.random.default_rng(0)
    table = pa.table(
        {
            "transcript_id": pa.array(np.arange(n), pa.uint64()),
            "cell_id": ["UNASSIGNED"] * n,
            "feature_name": rng.choice(["A", "B", "BLANK_0001"], n),
            "x_location": rng.uniform(0, 40, n).astype(np.float32),
            "y_location": rng.uniform(0, 40, n).astype(np.float32),
            "qv": rng.uniform(0, 40, n).astype(np.float32),
        }
    )
    pq.write_table(table, bundle / "transcripts.parquet", row_group_size=700)
    store = convert(bundle)
    (part,) = (store.element("points", "transcripts") / "points.parquet").glob("*.parquet")
    groups = pq.ParquetFile(part).metadata
    assert groups.num_row_groups > 5
    assert max(groups.row_group(k).num_rows for k in range(groups.num_row_groups)) <= 400
    found = points(store)
    assert found.column("transcript_id").to_pylist() == list(range(n))
    assert found.column("gene").to_pylist() == table.column("feature_name").to_pylist()
    np.testing.assert_array_equal(found.column("x"), table.column("x_location"))


def test_an_empty_table_keeps_its_columns(bundle) -> None:
    pq.write_table(pa.table(TABLE).slice(0, 0), bundle / "transcripts.parquet")
    pq.write_table(outlines([]), bundle / "cell_boundaries.parquet")
    store = convert(bundle)
    assert points(store).num_rows == 0
    assert "vendor_cell_id" in points(store).column_names
    assert len(read_shapes(store.element("shapes", "vendor_cells"))) == 0


# --- images


def test_stains_by_files_and_by_their_names(bundle) -> None:
    names = [f"ch{k:04d}_{name}.ome.tif" for k, name in enumerate(KIT)]
    write_stains(bundle, names, STAINS)
    assert open_image(convert(bundle).path).channels == STAINS
    write_stains(bundle, names, [])  # no OME-XML
    assert open_image(convert(bundle).path).channels == ["DAPI", *KIT[1:]]
    write_stains(bundle, [focus(k) for k in range(4)], [])
    assert open_image(convert(bundle).path).channels == STAINS
    write_stains(bundle, [focus(0)], [])
    (bundle / "morphology_focus" / "._morphology_focus_0001.ome.tif").write_bytes(b"\x00\x05\x16\x07")
    assert open_image(convert(bundle).path).channels == ["DAPI"]
    many = [f"ch{k:04d}_marker{k}.ome.tif" for k in range(12)]
    write_stains(bundle, many, [])
    image = open_image(convert(bundle).path)
    assert image.channels == [f"marker{k}" for k in range(12)]
    np.testing.assert_array_equal(image.read(0, 70, 0, 90, channels=["marker10"])[0], stain(10))


def test_a_stain_is_called_as_the_xml_says_of_its_file(bundle) -> None:
    # The file of number 0 holds channel 3.
    files = [focus(k) for k in range(4)]
    for k, file in enumerate(files):
        path = bundle / "morphology_focus" / file
        tifffile.imwrite(path, stain(k), description=ome(STAINS, files[::-1]), metadata=None)
    image = open_image(convert(bundle).path)
    assert image.channels == STAINS[::-1]
    np.testing.assert_array_equal(image.read(0, 70, 0, 90, channels=["DAPI"])[0], stain(3))


def test_the_order_in_the_folder_does_not_matter(bundle, monkeypatch) -> None:
    before = open_image(convert(bundle).path).read(0, 70, 0, 90)
    listed = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda self: iter(sorted(listed(self), reverse=True)))
    np.testing.assert_array_equal(open_image(convert(bundle).path).read(0, 70, 0, 90), before)


def test_compressed_as_the_machine_does(bundle) -> None:
    tile = {"tile": (32, 32), "compression": "jpeg2000", "compressionargs": {"level": 0}}
    write_stains(bundle, [focus(k) for k in range(4)], STAINS, **tile)
    with tifffile.TiffFile(bundle / "morphology_focus" / focus(2)) as file:
        assert file.pages.first.compression.name == "JPEG2000"
        expected = file.pages.first.asarray()
    found = open_image(convert(bundle, chunk_px=64).path).read(0, 70, 0, 90, channels=["18S"])[0]
    np.testing.assert_array_equal(found, expected)


def test_other_images_of_a_bundle(bundle) -> None:
    planes = np.stack([stain(9, z) for z in range(3)])
    tifffile.imwrite(bundle / "morphology.ome.tif", planes, metadata={"axes": "ZYX"}, ome=True)
    for z, expected in {"max": planes.max(axis=0), "middle": planes[1], "2": planes[2]}.items():
        store = convert(bundle, xenium_image="stack", z=z)
        np.testing.assert_array_equal(open_image(store.path).read(0, 70, 0, 90)[0], expected)
    assert facts(store)["z_planes"] == [2]
    assert open_image(store.path).channels == ["DAPI"]
    error = fails(bundle, xenium_image="stack", z="7")
    assert (error.code, "planes: 0, 1, 2" in error.message) == ("z-plane-unknown", True)
    # A plane is of no matter to the other images.
    assert facts(convert(bundle, z="7"))["xenium_image"] == "focus"
    shutil.rmtree(bundle / "morphology_focus")
    store = convert(bundle, xenium_image="none")
    assert store.names("images") == []
    assert points(store).num_rows == 5
    for name, k in {"morphology_focus.ome.tif": 1, "morphology_mip.ome.tif": 2}.items():
        tifffile.imwrite(bundle / name, stain(k), description=ome(["DAPI"], [name]), metadata=None)
    for kind, k in {"focus": 1, "mip": 2}.items():
        image = open_image(convert(bundle, xenium_image=kind).path)
        np.testing.assert_array_equal(image.read(0, 70, 0, 90)[0], stain(k))


def test_pixel_size(bundle) -> None:
    store = convert(bundle, pixel_size_um=0.25)
    assert open_image(store.path).pixel_size_um == pytest.approx(0.25)
    np.testing.assert_allclose(points_transforms(store.element("points", "transcripts"))["global"], np.diag([4, 4, 1]))
    assert [text for text in facts(store)["warnings"] if "the file says 0.5; taking 0.25" in text]
    say(bundle, pixel_size=0.3)
    store = convert(bundle)
    assert open_image(store.path).pixel_size_um == pytest.approx(0.3)
    assert "says its pixels are 0.5 µm wide; taking 0.3" in facts(store)["warnings"][0]
    say(bundle, pixel_size=None)
    assert facts(convert(bundle, pixel_size_um=0.5))["pixel_size_from"] == "settings"


# --- cells and nuclei


def test_nuclei_of_one_cell_stay_apart(bundle) -> None:
    rows = [("b-1", 1, moved(0, 0)), ("a-1", 2, moved(9, 9)), ("b-1", 3, moved(5, 0)), ("b-1", 4, moved(0, 5))]
    pq.write_table(outlines(rows), bundle / "nucleus_boundaries.parquet")
    nuclei = read_shapes(convert(bundle).element("shapes", "vendor_nuclei"))
    assert nuclei.ids.tolist() == ["b-1", "a-1", "b-1_2", "b-1_3"]
    assert nuclei.columns["entity_id"].tolist() == ["b-1", "a-1", "b-1", "b-1"]
    assert nuclei.columns["label_id"].tolist() == [1, 2, 3, 4]
    assert shapely.area(nuclei.geometry).tolist() == [16] * 4


def test_run_together_nuclei_of_version_2_0_are_left_out(bundle) -> None:
    rows = [("b-1", 1, moved(0, 0) + moved(5, 0)), ("a-1", 2, moved(9, 9))]
    pq.write_table(outlines(rows, label=False), bundle / "nucleus_boundaries.parquet")
    say(bundle, analysis_sw_version="xenium-2.0.0.6-35-ga7e17149a")
    store = convert(bundle)
    assert not store.has("shapes", "vendor_nuclei")
    assert "cannot be told apart" in facts(store)["warnings"][0]
    # Of version 1, where a cell has one nucleus, they are read; and xeniumranger writes newer files of older runs.
    pq.write_table(outlines(CELLS, label=False), bundle / "nucleus_boundaries.parquet")
    say(bundle, analysis_sw_version="xenium-1.6.0.7")
    assert convert(bundle).has("shapes", "vendor_nuclei")
    say(bundle, xenium_ranger={"version": "xenium-2.0.0.1"})
    store = convert(bundle)
    assert facts(store)["analysis_version"] == "xenium-2.0.0.1"
    assert not store.has("shapes", "vendor_nuclei")


def test_vertices_of_an_outline_that_lie_apart_are_brought_together(bundle) -> None:
    table = outlines(CELLS)
    order = [0, 5, 1, 2, 6, 7, 3, 8, 4, 9]  # each outline's own order kept
    pq.write_table(table.take(order), bundle / "cell_boundaries.parquet", row_group_size=3)
    cells = read_shapes(convert(bundle).element("shapes", "vendor_cells"))
    assert cells.ids.tolist() == ["aaaaaaab-1", "aaaaaaac-1"]
    assert shapely.equals(cells.geometry, [shapely.Polygon(ring) for _, _, ring in CELLS]).all()


def test_open_rings_are_closed_and_lines_left_out(bundle) -> None:
    rows = [
        ("a-1", 1, BOX[:-1]),
        ("b-1", 2, [(0, 0), (1, 1), (0, 0)]),
        ("c-1", 3, [(0, 0), (1, 1), (2, 2), (0, 0)]),
        ("d-1", 4, [(3, 3)]),
        ("e-1", 5, moved(2, 2)),
    ]
    pq.write_table(outlines(rows), bundle / "cell_boundaries.parquet")
    store = convert(bundle)
    cells = read_shapes(store.element("shapes", "vendor_cells"))
    assert cells.ids.tolist() == ["a-1", "e-1"]
    assert cells.columns["label_id"].tolist() == [1, 5]
    assert shapely.area(cells.geometry).tolist() == [16, 16]
    assert cells.metadata["n_without_outline"] == 3
    assert facts(store)["n_vendor_cells"] == 2


# --- what can be wrong ----------------------------------------------------------------------------------------------


def fails(folder: Path, **given: Any) -> CellquiltError:
    shutil.rmtree(folder.parent / "out.raw.zarr", ignore_errors=True)
    before = sorted(path.name for path in folder.parent.iterdir())
    with pytest.raises(CellquiltError) as caught:
        convert(folder, **given)
    assert sorted(path.name for path in folder.parent.iterdir()) == before  # nothing half-written
    assert caught.value.hint
    return caught.value


def _into_a_folder_below(bundle: Path) -> None:
    (bundle / "inner").mkdir()
    for path in list(bundle.iterdir()):
        if path.name != "inner":
            path.rename(bundle / "inner" / path.name)


def _table(column: str, values: Any) -> Any:
    return lambda bundle: rewrite(bundle, **{column: values})


def _without(column: str) -> Any:
    return lambda bundle: pq.write_table(pa.table(TABLE).drop_columns([column]), bundle / "transcripts.parquet")


def _cells(column: str, values: pa.Array | None) -> Any:
    def spoil(bundle: Path) -> None:
        table = outlines(CELLS)
        place = table.schema.get_field_index(column)
        table = table.remove_column(place) if values is None else table.set_column(place, column, values)
        pq.write_table(table, bundle / "cell_boundaries.parquet")

    return spoil


def _experiment(text: str) -> Any:
    return lambda bundle: (bundle / "experiment.xenium").write_text(text)


def _stain(k: int, pixels: np.ndarray, **options: Any) -> Any:
    def spoil(bundle: Path) -> None:
        xml = ome(STAINS, [focus(n) for n in range(4)])
        tifffile.imwrite(bundle / "morphology_focus" / focus(k), pixels, description=xml, metadata=None, **options)

    return spoil


def _cut(name: str, size: int) -> Any:
    return lambda bundle: (bundle / name).write_bytes((bundle / name).read_bytes()[:size])


def _holds(name: str, content: bytes) -> Any:
    return lambda bundle: (bundle / name).write_bytes(content)


def _gone(name: str) -> Any:
    return lambda bundle: shutil.rmtree(bundle / name) if (bundle / name).is_dir() else (bundle / name).unlink()


FAULTS: dict[str, tuple[Any, str, tuple[str, ...]]] = {
    "no manifest": (_gone("experiment.xenium"), "xenium-no-experiment", ("region_0/experiment.xenium",)),
    "the region one folder below": (_into_a_folder_below, "xenium-no-experiment", ("region_0/inner",)),
    "a manifest that is no JSON": (_experiment('{"pixel_size": '), "xenium-experiment-invalid", ("experiment.xenium",)),
    "a manifest in another encoding": (
        _holds("experiment.xenium", b'{"run_name": "\xff\xfe"}'),
        "xenium-experiment-invalid",
        ("experiment.xenium",),
    ),
    "a manifest that is a list": (_experiment("[1]"), "xenium-experiment-invalid", ("list",)),
    "no pixel size": (_experiment("{}"), "pixel-size-unknown", ("pixel_size", "pixel_size_um")),
    "a pixel size of 0": (_experiment('{"pixel_size": 0}'), "pixel-size-invalid", ("is 0,",)),
    "a pixel size that is text": (_experiment('{"pixel_size": "0.2125"}'), "pixel-size-invalid", ("'0.2125'",)),
    "a pixel size that is no number": (_experiment('{"pixel_size": NaN}'), "pixel-size-invalid", ("nan",)),
    "a pixel size of true": (_experiment('{"pixel_size": true}'), "pixel-size-invalid", ("True",)),
    "a stain missing in between": (
        _gone(f"morphology_focus/{focus(1)}"),
        "xenium-channels-missing",
        ("0001", focus(2)),
    ),
    "the last stain missing": (
        _gone(f"morphology_focus/{focus(3)}"),
        "xenium-channels-missing",
        ("announces 4 channels", "3 files"),
    ),
    "no stains at all": (_gone("morphology_focus"), "xenium-no-image", ("region_0", focus(0), "xenium_image=none")),
    "an empty folder of stains": (
        lambda bundle: [path.unlink() for path in (bundle / "morphology_focus").iterdir()],
        "xenium-no-image",
        (focus(0),),
    ),
    "a smaller stain": (_stain(2, stain(2)[:-1]), "xenium-images-differ", (f"{focus(2)} has 69 × 90", "70 × 90")),
    "a stain of 8 bits": (_stain(2, stain(2).astype(np.uint8)), "xenium-images-differ", ("uint8",)),
    "a stain of two planes": (
        _stain(2, np.stack([stain(2)] * 2), photometric="minisblack"),
        "xenium-image-channels",
        (focus(2), "2 channels"),
    ),
    "a stain cut short": (_cut(f"morphology_focus/{focus(1)}", 5000), "tiff-truncated", (focus(1),)),
    "an empty stain": (_cut(f"morphology_focus/{focus(1)}", 0), "tiff-empty", (focus(1),)),
    "a stain that is no TIFF": (
        lambda bundle: shutil.copy(bundle / "transcripts.parquet", bundle / "morphology_focus" / focus(1)),
        "not-a-tiff",
        ("Parquet",),
    ),
    "no transcripts": (_gone("transcripts.parquet"), "xenium-no-transcripts", ("transcripts.parquet", "ome_tif")),
    "transcripts cut short": (_cut("transcripts.parquet", 500), "transcripts-unreadable", ("transcripts.parquet",)),
    "transcripts without x": (_without("x_location"), "transcripts-column-missing", ("x_location",)),
    "transcripts without genes": (_without("feature_name"), "transcripts-column-missing", ("feature_name",)),
    "a place that is no number": (
        _table("x_location", pa.array([1, 2, np.nan, 4, 5], pa.float32())),
        "transcripts-nan",
        ("row 3", "x_location"),
    ),
    "a gene that is empty": (
        _table("feature_name", ["A", "B", "", "C", "D"]),
        "transcripts-gene-missing",
        ("row 3", "feature_name"),
    ),
    "names that are no text": (
        _table("cell_id", pa.array([b"a", b"\xff\xfe", b"b", b"c", b"d"], pa.binary())),
        "transcripts-value",
        ("transcripts.parquet", "cell_id"),
    ),
    "is_gene that is no answer": (_table("is_gene", ["maybe"] * 5), "transcripts-value", ("is_gene", "maybe")),
    "cells that are no table": (
        _holds("cell_boundaries.parquet", b"not parquet"),
        "xenium-cells-unreadable",
        ("region_0/cell_boundaries.parquet",),
    ),
    "cells cut short": (_cut("cell_boundaries.parquet", 700), "xenium-cells-unreadable", ("cell_boundaries.parquet",)),
    "cells without names": (_cells("cell_id", None), "xenium-cells-unreadable", ("no column cell_id", "vertex_x")),
    "cells without places": (_cells("vertex_y", None), "xenium-cells-unreadable", ("no column vertex_y",)),
    "a corner that is no number": (
        _cells("vertex_x", pa.array([0, 1, 2, np.nan] + [3] * 6, pa.float32())),
        "xenium-cells-unreadable",
        ("row 4",),
    ),
    "a corner that is text": (
        _cells("vertex_x", pa.array(["left"] * 10)),
        "xenium-cells-unreadable",
        ("cell_boundaries.parquet", "left"),
    ),
    "a corner of no cell": (
        _cells("cell_id", pa.array(["a"] * 6 + [None] + ["b"] * 3)),
        "xenium-cells-unreadable",
        ("row 7",),
    ),
    "a corner of no outline": (
        _cells("label_id", pa.array([1] * 8 + [None, 2], pa.int32())),
        "xenium-cells-unreadable",
        ("row 9",),
    ),
    "nuclei that are no table": (
        _holds("nucleus_boundaries.parquet", b""),
        "xenium-cells-unreadable",
        ("nucleus_boundaries.parquet",),
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults(bundle, name) -> None:
    spoil, code, words = FAULTS[name]
    spoil(bundle)
    error = fails(bundle)
    assert error.code == code, error
    assert "region_0" in error.message
    for word in words:
        assert word in f"{error.message} {error.hint}", error
    assert str(bundle.parent) not in str(error)


def test_images_that_are_not_there_are_named_with_those_that_are(bundle) -> None:
    error = fails(bundle, xenium_image="mip")
    assert error.code == "xenium-no-image"
    assert re.search(r"no morphology_mip\.ome\.tif.*xenium_image=focus", str(error), re.DOTALL)
    tifffile.imwrite(bundle / "morphology.ome.tif", np.stack([stain(0)] * 2), metadata={"axes": "CYX"}, ome=True)
    error = fails(bundle, xenium_image="stack")
    assert (error.code, "2 channels" in error.message) == ("xenium-image-channels", True)


def test_a_file_for_a_folder(bundle, tmp_path) -> None:
    file = bundle / "experiment.xenium"
    with pytest.raises(CellquiltError) as caught:
        convert_slide(file, technology="xenium", output=tmp_path / "o.zarr", settings=Settings())
    assert caught.value.code == "xenium-no-folder"
    assert "experiment.xenium" in caught.value.hint


def test_wrong_values_of_the_setting() -> None:
    with pytest.raises(CellquiltError, match="stack"):
        Settings(xenium_image="stak")
