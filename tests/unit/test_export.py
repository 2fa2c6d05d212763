"""The way out: files for Xenium Ranger, VPT and QuPath hold the store's cells, whatever the maps of its elements."""

import csv
import hashlib
import itertools
import json
import shutil
from pathlib import Path

import cellquilt as cq
import geopandas
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapely
import spatialdata
from cellquilt.cli import main
from cellquilt.core.errors import CellquiltError
from cellquilt.core.points import PointsWriter, iter_points
from cellquilt.core.settings import Settings
from cellquilt.core.shapes import ShapesTable, read_shapes, write_shapes
from cellquilt.core.store import Store, consolidate, new_store
from cellquilt.core.transforms import apply
from cellquilt.formats.cells import SlideCells
from cellquilt.formats.stage import export_slide
from cellquilt.geometry.geojson import geometry_json, string_json
from cellquilt.geometry.polygons import Rings
from cellquilt.geometry.wkb import wkb_of_rings

ANGLE = np.deg2rad(25)
TURN = np.array([[np.cos(ANGLE), -np.sin(ANGLE), 30.0], [np.sin(ANGLE), np.cos(ANGLE), -8.0], [0, 0, 1]])


@pytest.fixture(scope="module")
def xenium(tmp_path_factory) -> Path:
    """A simulated bundle, with the machine's cells, counted."""
    folder = tmp_path_factory.mktemp("export")
    cq.simulate(folder / "sim", width_px=500, seed=4, format="xenium", image=False)
    store = folder / "slide_0.zarr"
    source = folder / "sim" / "slide_0"
    for arguments in (
        ["convert", source, "--technology", "xenium", "--xenium-image", "none", "-o", store],
        ["resolve", "vendor", store],
        ["aggregate", store, "--min-transcripts", "60"],
    ):
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        assert stop.value.code == 0, arguments
    return store


def turned_slide(path: Path, *, points: bool = True) -> Path:
    """Cells with holes and parts, nuclei in another frame, three planes; the cells' own coordinates are turned."""
    shapes = [
        shapely.box(0, 0, 10, 8),
        shapely.box(20, 0, 30, 9).difference(shapely.box(23, 3, 25, 5)),
        shapely.MultiPolygon([shapely.box(40, 0, 44, 4), shapely.box(46, 0, 49, 8)]),
        shapely.Polygon(),
        shapely.box(60, 0, 70, 5).reverse(),
    ]
    to_um = TURN @ np.diag([0.5, 0.5, 1.0])
    to_pixels = np.diag([4.0, -4.0, 1.0]) @ to_um  # mirrored: the order of corners turns round
    with new_store(path, sample='odd "name"') as store:
        ids = np.array([f"s-{k}" for k in (1, 2, 4, 7, 9)])
        transforms = {"global": to_pixels, "microns": to_um}
        cells = ShapesTable(ids, np.array(shapes, dtype=object), {}, transforms)
        write_shapes(store.new_element("shapes", "cell_boundaries"), cells)
        nuclei = np.array([shapely.box(1, 1, 4, 4), shapely.box(62, 1, 64, 3), shapely.box(90, 0, 91, 1)], dtype=object)
        in_um = np.asarray(shapely.transform(nuclei, lambda xy: apply(to_um, xy)), dtype=object)
        other = {"microns": np.eye(3), "global": np.diag([4.0, -4.0, 1.0])}
        write_shapes(
            store.new_element("shapes", "nucleus_boundaries"),
            ShapesTable(np.array(["s-9", "s-1", "gone"]), in_um[[1, 0, 2]], {}, other),
        )
        if points:
            rows = {
                "x": np.arange(6.0),
                "y": np.arange(6.0),
                "z_plane": np.array([0, 1, 2, 2, 1, 0], dtype=np.int32),
                "gene": pa.array(["A", "B", "A", "A", "B", "A"]).dictionary_encode(),
                "transcript_id": np.arange(6, dtype=np.uint64),
                "vendor_transcript_id": np.array([2**63 + 5, 7, 8, 9, 10, 11], dtype=np.uint64),
                "cell_id": pa.array(["s-1", None, "s-2", "s-7", "s-9", "s-9"]),
            }
            with PointsWriter(store.new_element("points", "transcripts"), {"microns": np.eye(3)}) as writer:
                writer.write(pa.table(rows))
        consolidate(store.path)
    return path


def outlines_in(store: Path, system: str, name: str = "cell_boundaries") -> pd.Series:
    shapes = read_shapes(Store(store).element("shapes", name))
    matrix = shapes.transforms[system]
    return pd.Series(np.asarray(shapely.transform(shapes.geometry, lambda xy: apply(matrix, xy))), shapes.ids)


def assert_same(found: np.ndarray, expected: np.ndarray, tolerance: float = 2e-4) -> None:
    assert len(found) == len(expected)
    assert shapely.is_valid(np.asarray(found)).all()
    apart = shapely.area(shapely.symmetric_difference(np.asarray(found), np.asarray(expected)))
    assert (apart <= tolerance * (1 + shapely.length(np.asarray(expected)))).all()
    assert np.array_equal(shapely.get_num_coordinates(found), shapely.get_num_coordinates(np.asarray(expected)))


def features(path: Path) -> list[dict]:
    return json.loads(path.read_text())["features"]


def assert_orientation(geometry: dict) -> None:
    """Rings are closed; outer ones counter-clockwise, holes clockwise."""
    parts = geometry["coordinates"] if geometry["type"] == "MultiPolygon" else [geometry["coordinates"]]
    for part in parts:
        for number, ring in enumerate(part):
            assert ring[0] == ring[-1]
            assert len(ring) >= 4
            assert shapely.LinearRing(ring).is_ccw == (number == 0)


def tree(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_xeniumranger_gets_every_transcripts_cell_by_the_machines_own_ids(xenium, tmp_path):
    (folder,) = export_slide(xenium, tmp_path, ["xeniumranger"], settings=Settings(memory_mb=200))
    table = pd.read_csv(folder / "transcript_assignment.csv", dtype={"transcript_id": np.uint64}, keep_default_na=False)
    assert table.columns.tolist() == ["transcript_id", "cell", "is_noise"]
    known = pa.concat_tables(iter_points(xenium / "points" / "transcripts", ["vendor_transcript_id", "cell_id"]))
    names = pd.read_csv(folder / "cells.csv").set_index("cell")
    assert len(table) == known.num_rows > 10_000
    assert table["transcript_id"].tolist() == known.column("vendor_transcript_id").to_pylist()
    ours = known.column("cell_id").to_pandas().astype(object).where(lambda ids: ids.notna(), "")
    assert table["cell"].map(names["cell_id"]).fillna("").tolist() == ours.tolist()
    assert (table["is_noise"] == (ours == "")).all()
    first = (folder / "transcript_assignment.csv").read_text().splitlines()[1].split(",")
    assert first[2] in ("true", "false")
    # The same cells in all files: the importer refuses a cell that is in one of them only.
    used = sorted(set(table["cell"]) - {""})
    assert used == sorted(names.index[names["imported"]])
    new = features(folder / "viz_polygons.geojson")
    assert sorted(feature["id"] for feature in new) == used
    assert all(feature["properties"]["cell"] == feature["id"] for feature in new)
    old = json.loads((folder / "viz_polygons_3.1.geojson").read_text())
    assert old["type"] == "GeometryCollection"
    assert sorted(f"cell-{geometry['cell']}" for geometry in old["geometries"]) == used
    assert all(isinstance(geometry["cell"], int) for geometry in old["geometries"])
    expected = outlines_in(xenium, "microns")
    for found, cells in (
        (shapely.from_geojson([json.dumps(f["geometry"]) for f in new]), [f["id"] for f in new]),
        (
            shapely.from_geojson([json.dumps(g) for g in old["geometries"]]),
            [f"cell-{g['cell']}" for g in old["geometries"]],
        ),
    ):
        assert_same(found, expected[names.loc[cells, "cell_id"]].to_numpy())
    for feature in new:
        assert_orientation(feature["geometry"])
    both = features(folder / "cells_and_nuclei.geojson")
    assert [feature["properties"]["name"] for feature in both] == names["cell_id"].tolist()
    nuclei = outlines_in(xenium, "microns", "nucleus_boundaries")
    with_nucleus = [feature for feature in both if "nucleusGeometry" in feature]
    assert len(with_nucleus) == sum(name in nuclei for name in names["cell_id"]) > 10


def test_vpt_reads_what_the_machine_would_have_written(xenium, tmp_path):
    (folder,) = export_slide(turned_slide(tmp_path / "s.zarr"), tmp_path, ["vpt"], settings=Settings())
    frame = geopandas.read_parquet(folder / "cell_boundaries.parquet")
    assert frame.columns.tolist() == [
        *("ID", "EntityID", "ZIndex", "Geometry", "Type", "ZLevel", "Name", "ParentID", "ParentType"),
    ]
    assert frame.geometry.name == "Geometry"
    assert set(frame.geometry.geom_type) == {"MultiPolygon"}
    assert frame["EntityID"].tolist() == np.repeat([1, 2, 4, 9], 3).tolist()  # cell 7 has no outline
    assert frame["EntityID"].is_monotonic_increasing
    assert frame["ZIndex"].tolist() == [0, 1, 2] * 4
    assert frame["ZLevel"].tolist() == [1.5, 3.0, 4.5] * 4
    assert frame["ID"].tolist() == list(range(12))
    assert frame["Name"].tolist() == np.repeat(["s-1", "s-2", "s-4", "s-9"], 3).tolist()
    assert (frame["Type"] == "cell").all()
    assert frame[["ParentID", "ParentType"]].isna().all(axis=None)
    expected = outlines_in(tmp_path / "s.zarr", "microns")
    assert_same(frame.geometry.to_numpy()[::3], expected[frame["Name"][::3]].to_numpy(), 1e-9)
    nuclei = geopandas.read_parquet(folder / "nucleus_boundaries.parquet")
    assert nuclei["ParentID"].tolist() == [9] * 3 + [1] * 3
    assert set(nuclei["ParentType"]) == {"cell"}
    assert set(nuclei["Type"]) == {"nucleus"}
    assert not set(nuclei["EntityID"]) & set(frame["EntityID"])
    theirs = outlines_in(tmp_path / "s.zarr", "microns", "nucleus_boundaries")
    assert_same(nuclei.geometry.to_numpy()[::3], theirs[["s-9", "s-1"]].to_numpy(), 1e-9)
    # The types of the columns that VPT looks at are those of a file of the machine's.
    schema = pq.read_schema(folder / "cell_boundaries.parquet")
    assert [str(schema.field(name).type) for name in ("EntityID", "ZIndex", "Geometry", "Type", "ZLevel")] == [
        *("int64", "int64", "binary", "string", "double"),
    ]
    # Row groups hold whole cells.
    (many,) = export_slide(xenium, tmp_path / "x", ["vpt"], settings=Settings())
    file = pq.ParquetFile(many / "cell_boundaries.parquet")
    ends = [file.read_row_group(k, ["EntityID"]).column(0).to_pylist() for k in range(file.num_row_groups)]
    assert all(a[-1] < b[0] for a, b in itertools.pairwise(ends))


def test_a_vpt_file_is_read_as_the_machines_cells(tmp_path):
    """Our own reader of a MERSCOPE region takes it as the machine's outlines."""
    from cellquilt.readers.merscope import _parquet_cells

    (folder,) = export_slide(turned_slide(tmp_path / "s.zarr"), tmp_path, ["vpt"], settings=Settings())
    found = _parquet_cells(folder / "cell_boundaries.parquet", "x", {})
    assert found.columns["z_plane"].tolist() == [0, 1, 2] * 4
    assert found.ids.tolist()[:3] == ["1_z0", "1_z1", "1_z2"]


def test_qupath_gets_cells_with_nuclei_in_pixels_whatever_the_maps(tmp_path):
    (folder,) = export_slide(turned_slide(tmp_path / "s.zarr"), tmp_path, ["qupath"], settings=Settings())
    path = folder / "cells.geojson"
    read = geopandas.read_file(path)
    assert read["name"].tolist() == ["s-1", "s-2", "s-4", "s-9"]
    assert (read["objectType"] == "cell").all()
    expected = outlines_in(tmp_path / "s.zarr", "global")[read["name"]].to_numpy()
    assert_same(read.geometry.to_numpy(), expected)
    assert read.geometry.geom_type.tolist() == ["Polygon", "Polygon", "MultiPolygon", "Polygon"]
    nuclei = outlines_in(tmp_path / "s.zarr", "global", "nucleus_boundaries")
    found = {f["properties"]["name"]: f for f in features(path)}
    assert {name for name, f in found.items() if "nucleusGeometry" in f} == {"s-1", "s-9"}
    for name in ("s-1", "s-9"):
        nucleus = shapely.from_geojson(json.dumps(found[name]["nucleusGeometry"]))
        assert_same(np.array([nucleus]), nuclei[[name]].to_numpy())
        assert_orientation(found[name]["nucleusGeometry"])
    for feature in found.values():
        assert_orientation(feature["geometry"])
        area = feature["properties"]["measurements"]["Area µm^2"]
        outline = outlines_in(tmp_path / "s.zarr", "microns")[feature["properties"]["name"]]
        assert area == pytest.approx(outline.area, abs=1e-3)
    import uuid

    ids = [uuid.UUID(feature["id"]) for feature in found.values()]
    assert len(set(ids)) == 4
    assert {i.version for i in ids} == {8}


def test_qupath_gets_measurements_and_classes_of_the_table(xenium, tmp_path):
    (folder,) = export_slide(xenium, tmp_path, ["qupath"], settings=Settings())
    table = spatialdata.read_zarr(xenium).tables["table"]
    found = [feature["properties"] for feature in features(folder / "cells.geojson")]
    assert [cell["name"] for cell in found] == table.obs_names.tolist()
    counts = np.asarray(table.X.sum(axis=1)).ravel()
    assert [cell["measurements"]["Transcripts"] for cell in found] == counts.tolist()
    assert [cell["measurements"]["Genes"] for cell in found] == np.diff(table.X.indptr).tolist()
    areas = [cell["measurements"]["Area µm^2"] for cell in found]
    assert np.allclose(areas, table.obs["area_um2"], atol=1e-3)
    passes = [cell["classification"]["name"] == "Cell" for cell in found]
    assert passes == table.obs["passes_qc"].tolist()
    assert 0 < sum(passes) < len(passes)
    assert all(len(cell["classification"]["color"]) == 3 for cell in found)


def test_the_doors_write_the_same_bytes_every_time(xenium, tmp_path):
    command = ["export", "qupath,vpt,xeniumranger", str(xenium), "-o", str(tmp_path / "cli")]
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 0
    given = ["export", str(xenium), "-o", str(tmp_path / "task"), "--settings", '{"export": "xeniumranger,vpt,qupath"}']
    with pytest.raises(SystemExit) as stop:
        main([*given, "--memory-mb", "200"])
    assert stop.value.code == 0
    sdata = spatialdata.read_zarr(xenium)
    for name in ("xeniumranger", "vpt", "qupath"):
        assert getattr(cq.export, name)(sdata, tmp_path / "api") == tmp_path / "api" / name
    assert tree(tmp_path / "cli") == tree(tmp_path / "task") == tree(tmp_path / "api")
    assert sorted(tree(tmp_path / "cli")) == [
        "qupath/cells.geojson",
        "vpt/cell_boundaries.parquet",
        "vpt/nucleus_boundaries.parquet",
        "xeniumranger/cells.csv",
        "xeniumranger/cells_and_nuclei.geojson",
        "xeniumranger/transcript_assignment.csv",
        "xeniumranger/viz_polygons.geojson",
        "xeniumranger/viz_polygons_3.1.geojson",
    ]
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 1
    with pytest.raises(SystemExit) as stop:
        main([*command, "--overwrite"])
    assert stop.value.code == 0


def test_golden_lines(tmp_path):
    """What the other programs parse, letter by letter."""
    store = turned_slide(tmp_path / "s.zarr")
    export_slide(store, tmp_path, ["qupath", "xeniumranger"], settings=Settings())
    folder = tmp_path / "xeniumranger"
    assert (folder / "transcript_assignment.csv").read_text() == (
        "transcript_id,cell,is_noise\n"
        "9223372036854775813,cell-1,false\n7,,true\n8,cell-2,false\n9,,true\n10,cell-9,false\n11,cell-9,false\n"
    )  # the transcript of the cell without an outline is noise
    assert (folder / "cells.csv").read_text().splitlines()[1:] == [
        '"cell-1","s-1",true', '"cell-2","s-2",true', '"cell-4","s-4",false', '"cell-7","s-7",false',
        '"cell-9","s-9",true',
    ]  # fmt: skip
    old = (folder / "viz_polygons_3.1.geojson").read_text().splitlines()
    assert old[0] == '{"type":"GeometryCollection","geometries":['
    corner = np.round(apply(TURN @ np.diag([0.5, 0.5, 1.0]), np.array([[0.0, 0.0]]))[0], 4)
    assert old[1].startswith('{"type":"Polygon","coordinates":[[[')
    assert f"[{corner[0]:g},{corner[1]:g}]" in old[1]
    assert old[1].endswith('"cell":1},')
    assert old[-1] == "]}"
    (new,) = [line for line in (folder / "viz_polygons.geojson").read_text().splitlines() if '"cell-9"' in line]
    assert new.startswith('{"type":"Feature","id":"cell-9","geometry":{"type":"Polygon","coordinates":[[[')
    assert new.endswith(']]]},"properties":{"cell":"cell-9"}}')
    line = (tmp_path / "qupath" / "cells.geojson").read_text().splitlines()[1]
    head, _, rest = line.partition(',"geometry":')
    assert head == '{"type":"Feature","id":"' + json.loads(line.rstrip(","))["id"] + '"'
    assert rest.endswith(',"properties":{"objectType":"cell","name":"s-1","measurements":{"Area µm^2":20}}},')
    hole = json.loads((folder / "viz_polygons.geojson").read_text())["features"][1]
    assert len(hole["geometry"]["coordinates"]) == 1  # the importer's outlines have no holes


def test_ids_that_are_no_numbers_are_numbered_by_row(tmp_path):
    with new_store(tmp_path / "s.zarr", sample="s") as store:
        boxes = np.array([shapely.box(k, 0, k + 1, 1) for k in range(3)], dtype=object)
        ids = np.array(["aaaa-1", 'b"\\b', "cé-7"])
        write_shapes(store.new_element("shapes", "cell_boundaries"), ShapesTable(ids, boxes, {}, {"global": np.eye(3)}))
    cells = SlideCells(Store(tmp_path / "s.zarr"))
    assert cells.numbers.tolist() == [1, 2, 3]
    export_slide(tmp_path / "s.zarr", tmp_path, ["qupath"], settings=Settings())
    found = features(tmp_path / "qupath" / "cells.geojson")
    assert [f["properties"]["name"] for f in found] == ids.tolist()
    assert all("measurements" not in f["properties"] for f in found)
    assert json.loads(string_json(pa.array(["a\tb\x01"]))[0].as_py()) == "a b "


def test_geometry_texts_and_wkb_equal_shapelys():
    shapes = np.array(
        [
            shapely.box(0, 0, 1, 1).reverse(),
            shapely.Polygon(),
            shapely.MultiPolygon([shapely.box(-3, 2, 0, 3), shapely.box(5, 5, 6, 6)]),
            shapely.box(0, 0, 9, 9).difference(shapely.box(1, 1, 2.25, 2)),
        ],
        dtype=object,
    )
    rings = Rings.from_shapely(shapes)
    texts = geometry_json(rings).to_pylist()
    assert texts[0] == '{"type":"Polygon","coordinates":[[[0,0],[1,0],[1,1],[0,1],[0,0]]]}'.replace(
        "[[0,0],[1,0],[1,1],[0,1],[0,0]]", str(json.loads(texts[0])["coordinates"][0]).replace(" ", "")
    )
    assert texts[1] == '{"type":"Polygon","coordinates":[]}'
    read = shapely.from_geojson(texts)
    assert shapely.equals(read, shapes).all()
    several = shapely.from_wkb(wkb_of_rings(rings, multi=True).to_pylist())
    assert [shape.geom_type for shape in several] == ["MultiPolygon", "Polygon", "MultiPolygon", "MultiPolygon"]
    assert shapely.equals(several, shapes).all()


def test_mistakes_are_named(xenium, tmp_path, capsys):
    def code_of(store: Path, *formats: str, **given) -> str:
        with pytest.raises(CellquiltError) as caught:
            export_slide(store, tmp_path / "out", formats, settings=Settings(**given))
        assert caught.value.hint
        assert not list((tmp_path / "out").glob("*")) if (tmp_path / "out").exists() else True
        return caught.value.code

    assert code_of(tmp_path / "nowhere.zarr", "vpt") == "store-missing"
    assert code_of(xenium, "xeniumrangr") == "export-unknown"
    assert code_of(xenium) == "export-missing"
    with pytest.raises(SystemExit):
        main(["export", "qpath", str(xenium), "-o", str(tmp_path / "out")])
    assert 'did you mean "qupath"?' in capsys.readouterr().err
    with new_store(tmp_path / "empty.zarr", sample="s") as store:
        consolidate(store.path)
    assert code_of(tmp_path / "empty.zarr", "vpt") == "export-no-cells"
    bare = turned_slide(tmp_path / "bare.zarr", points=False)
    assert code_of(bare, "xeniumranger") == "export-no-transcripts"

    def changed(name: str, table: pa.Table) -> Path:
        path = Path(shutil.copytree(bare, tmp_path / f"{name}.zarr"))
        with PointsWriter(path / "points" / "transcripts", {"microns": np.eye(3)}) as writer:
            writer.write(table)
        return path

    base = {"x": np.zeros(2), "y": np.zeros(2), "gene": pa.array(["A", "B"])}
    assert code_of(changed("not_counted", pa.table(base)), "xeniumranger") == "export-not-counted"
    counted = {**base, "cell_id": pa.array(["s-1", None])}
    assert code_of(changed("no_ids", pa.table(counted)), "xeniumranger") == "export-not-xenium"
    odd = {**counted, "vendor_transcript_id": pa.array(["x", "y"])}
    assert code_of(changed("odd_ids", pa.table(odd)), "xeniumranger") == "export-transcript-id"
    nobody = {**base, "cell_id": pa.nulls(2, pa.string()), "vendor_transcript_id": np.arange(2, dtype=np.uint64)}
    assert code_of(changed("nobody", pa.table(nobody)), "xeniumranger") == "export-no-transcripts"
    other = changed("other", pa.table({**counted, "vendor_transcript_id": np.arange(2, dtype=np.uint64)}))
    Store(other).add_record({"stage": "convert", "parameters": {"technology": "merscope"}})
    assert code_of(other, "xeniumranger") == "export-not-xenium"
    with new_store(tmp_path / "pixels.zarr", sample="s") as store:
        cells = ShapesTable(np.array(["a"]), np.array([shapely.box(0, 0, 1, 1)]), {}, {"global": np.eye(3)})
        write_shapes(store.new_element("shapes", "cell_boundaries"), cells)
    assert code_of(tmp_path / "pixels.zarr", "vpt") == "export-no-system"


def test_csv_is_what_pythons_reader_understands(tmp_path):
    store = turned_slide(tmp_path / "s.zarr")
    export_slide(store, tmp_path, ["xeniumranger"], settings=Settings())
    with (tmp_path / "xeniumranger" / "transcript_assignment.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["transcript_id"] for row in rows] == ["9223372036854775813", "7", "8", "9", "10", "11"]
    assert {row["is_noise"] for row in rows} == {"true", "false"}
