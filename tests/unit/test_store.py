"""Stores: atomic, immutable, put together by one writer."""

import os
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapely
import spatialdata
from cellquilt.core import zarr_json
from cellquilt.core.atomic import atomic_path
from cellquilt.core.errors import CellquiltError
from cellquilt.core.points import (
    PointsWriter,
    count_points,
    iter_points,
    points_columns,
    points_transforms,
)
from cellquilt.core.shapes import (
    ShapesTable,
    read_geoparquet,
    read_shapes,
    write_geoparquet,
    write_shapes,
)
from cellquilt.core.store import Store, add_delta, assemble, new_store, result_of
from spatialdata.models import TableModel

TO_MICRONS = np.array([[0.1, 0, 5], [0, 0.1, -6], [0, 0, 1]])


def squares(n: int) -> np.ndarray:
    return np.array([shapely.box(3 * i, 0, 3 * i + 2, 2) for i in range(n)], dtype=object)


def cells(n: int = 3, sample: str = "s") -> ShapesTable:
    ids = np.array([f"{sample}-{i + 1}" for i in range(n)])
    return ShapesTable(
        ids,
        squares(n),
        {"merged": np.zeros(n, bool)},
        {"global": np.eye(3), "microns": TO_MICRONS},
    )


def table_delta(path: Path, ids: np.ndarray) -> Path:
    obs = pd.DataFrame(
        {"cell_id": ids, "region": pd.Categorical(["cell_boundaries"] * len(ids))},
        index=ids,
    )
    table = TableModel.parse(
        anndata.AnnData(np.zeros((len(ids), 2)), obs=obs),
        region="cell_boundaries",
        region_key="region",
        instance_key="cell_id",
    )
    with new_store(path, sample="s") as delta:
        table.write_zarr(delta.new_element("tables", "table"))
        zarr_json.update_attributes(
            delta.path / "tables" / "table",
            {
                "spatialdata-encoding-type": "ngff:regions_table",
                "region": "cell_boundaries",
                "region_key": "region",
                "instance_key": "cell_id",
                "version": "0.2",
            },
        )
    return path


def test_a_failed_write_leaves_nothing(tmp_path):
    def fail() -> None:
        with new_store(tmp_path / "a.zarr", sample="s") as store:
            write_shapes(store.new_element("shapes", "x"), cells())
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_kept_unless_overwritten(tmp_path):
    target = tmp_path / "file"
    target.write_text("old")
    with pytest.raises(CellquiltError, match="exists already"), atomic_path(target):
        pass

    def fail() -> None:
        with atomic_path(target, overwrite=True) as aside:
            aside.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert target.read_text() == "old"
    with atomic_path(target, overwrite=True) as aside:
        aside.write_text("new")
    assert target.read_text() == "new"
    assert os.listdir(tmp_path) == ["file"]


def test_a_full_disk_is_named(tmp_path):
    with pytest.raises(CellquiltError) as caught, atomic_path(tmp_path / "file"):
        raise OSError(28, "No space left on device")
    assert caught.value.code == "disk-full"


@pytest.mark.parametrize("n", [0, 1, 5])
def test_shapes_come_back_as_written_and_geopandas_agrees(tmp_path, n):
    import geopandas

    path = tmp_path / "x.parquet"
    table = cells(n)
    write_geoparquet(
        path,
        table.geometry,
        table.columns,
        index=("cell_id", table.ids),
        metadata={"a": 1},
    )
    geometry, rest, metadata = read_geoparquet(path)
    assert shapely.equals_exact(geometry, table.geometry).all()
    assert rest.column("cell_id").to_pylist() == table.ids.tolist()
    assert metadata == {"a": 1}
    frame = geopandas.read_parquet(path)
    assert frame.index.tolist() == table.ids.tolist()
    assert frame.geometry.area.sum() == pytest.approx(4 * n)


def test_shapes_element_round_trip_and_spatialdata_agrees(tmp_path):
    with new_store(tmp_path / "s.zarr", sample="s") as store:
        write_shapes(store.new_element("shapes", "cell_boundaries"), cells())
    back = read_shapes(Store(tmp_path / "s.zarr").element("shapes", "cell_boundaries"))
    assert back.ids.tolist() == ["s-1", "s-2", "s-3"]
    assert np.array_equal(back.transforms["microns"], TO_MICRONS)
    read = spatialdata.read_zarr(tmp_path / "s.zarr")
    moved = spatialdata.transform(read.shapes["cell_boundaries"], to_coordinate_system="microns")
    assert moved.geometry.iloc[1].bounds == pytest.approx((5.3, -6.0, 5.5, -5.8))


def test_points_are_streamed_in_parts_and_batches(tmp_path, monkeypatch):
    monkeypatch.setattr("cellquilt.core.points.ROWS_PER_PART", 150)
    element = tmp_path / "points"
    with PointsWriter(element, {"microns": np.eye(3), "global": np.linalg.inv(TO_MICRONS)}) as writer:
        for start in range(0, 500, 100):
            ids = np.arange(start, start + 100)
            genes = pa.array([f"g{i % 7}" for i in ids]).dictionary_encode()
            writer.write(
                pa.table(
                    {
                        "x": ids * 1.0,
                        "y": ids * 2.0,
                        "gene": genes,
                        "transcript_id": ids.astype(np.uint64),
                    }
                )
            )
    assert len(list((element / "points.parquet").iterdir())) == 3
    assert count_points(element) == 500
    assert points_columns(element) == ["x", "y", "gene", "transcript_id"]
    batches = list(iter_points(element, batch_rows=70))
    assert max(batch.num_rows for batch in batches) <= 70
    stacked = pa.concat_tables(batches)
    assert stacked.column("transcript_id").to_pylist() == list(range(500))
    assert stacked.column("gene").to_pylist()[8] == "g1"
    assert np.allclose(points_transforms(element)["global"], np.linalg.inv(TO_MICRONS))


def test_empty_points_keep_their_columns(tmp_path):
    element = tmp_path / "points"
    empty = pa.table(
        {
            "x": np.zeros(0),
            "y": np.zeros(0),
            "gene": pa.array([], pa.string()).dictionary_encode(),
        }
    )
    with PointsWriter(element, {"microns": np.eye(3)}) as writer:
        writer.write(empty)
    assert count_points(element) == 0
    assert points_columns(element) == ["x", "y", "gene"]
    assert [(batch.num_rows, batch.column_names) for batch in iter_points(element)] == [(0, ["x", "y", "gene"])]


def test_assemble_takes_the_later_part_and_checks_the_table(tmp_path):
    with new_store(tmp_path / "raw.zarr", sample="s") as raw:
        write_shapes(raw.new_element("shapes", "cell_boundaries"), cells(2))
        raw.add_record({"stage": "convert"})
    with new_store(tmp_path / "cells.zarr", sample="s") as delta:
        write_shapes(delta.new_element("shapes", "cell_boundaries"), cells(3))
        delta.add_record({"stage": "resolve"})
    table = table_delta(tmp_path / "table.zarr", cells(3).ids)
    assemble(
        [tmp_path / "raw.zarr", tmp_path / "cells.zarr", table],
        tmp_path / "s.zarr",
        sample="s",
        attributes={"verdict": "PASS"},
    )
    sdata = spatialdata.read_zarr(tmp_path / "s.zarr")
    assert len(sdata.shapes["cell_boundaries"]) == 3
    assert sdata.tables["table"].n_obs == 3
    assert [record["stage"] for record in sdata.attrs["cellquilt"]["records"]] == [
        "convert",
        "resolve",
    ]
    assert sdata.attrs["cellquilt"]["verdict"] == "PASS"


def test_assemble_refuses_a_table_of_other_cells(tmp_path):
    with new_store(tmp_path / "cells.zarr", sample="s") as delta:
        write_shapes(delta.new_element("shapes", "cell_boundaries"), cells(3))
    table = table_delta(tmp_path / "table.zarr", cells(3).ids[::-1].copy())
    with pytest.raises(CellquiltError) as caught:
        assemble(
            [tmp_path / "cells.zarr", table],
            tmp_path / "s.zarr",
            sample="s",
            attributes={},
        )
    assert caught.value.code == "assembly-invalid"
    assert not (tmp_path / "s.zarr").exists()


def test_shapes_too_large_to_read_whole_are_checked_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr("cellquilt.core.store._WHOLE_BYTES", 200)
    many, read = cells(500), []
    read_zarr = spatialdata.read_zarr
    monkeypatch.setattr(spatialdata, "read_zarr", lambda path: read.append(read_zarr(path)) or read[-1])

    def assembled(name: str, change=lambda table: table, ids: np.ndarray = many.ids) -> Path:
        with new_store(tmp_path / f"{name}.cells.zarr", sample="s") as delta:
            element = delta.new_element("shapes", "cell_boundaries")
            write_shapes(element, many)
            write_shapes(delta.new_element("shapes", "tissue"), cells(1))
            pq.write_table(change(pq.read_table(element / "shapes.parquet")), element / "shapes.parquet")
        table = table_delta(tmp_path / f"{name}.table.zarr", ids)
        output = tmp_path / f"{name}.zarr"
        assemble([tmp_path / f"{name}.cells.zarr", table], output, sample="s", attributes={})
        return output

    output = assembled("good")
    assert 0 < len(read[0].shapes["cell_boundaries"]) < 50
    assert read[0].shapes["cell_boundaries"].index[0] == "s-1"
    assert read[0].tables["table"].n_obs == 500
    assert len(read_zarr(output).shapes["cell_boundaries"]) == 500
    assert not any("check" in path.name for path in tmp_path.iterdir())

    def last_is_damaged(table: pa.Table) -> pa.Table:
        outlines = [*table.column("geometry").to_pylist()[:-1], b"\x01\x03"]
        at = table.schema.get_field_index("geometry")
        return table.set_column(at, table.schema.field(at), pa.array(outlines, pa.binary()))

    def says_nothing_of_geometry(table: pa.Table) -> pa.Table:
        return table.replace_schema_metadata({})

    others = np.append(many.ids[:-1], "s-501")
    for name, change, ids in (
        ("damaged", last_is_damaged, many.ids),
        ("undescribed", says_nothing_of_geometry, many.ids),
        ("others", lambda table: table, others),
    ):
        with pytest.raises(CellquiltError) as caught:
            assembled(name, change, ids)
        assert caught.value.code == "assembly-invalid"
        assert not (tmp_path / f"{name}.zarr").exists()
        assert not any("check" in path.name for path in tmp_path.iterdir())


def test_assemble_works_through_symlinks_without_touching_its_parts(tmp_path):
    with new_store(tmp_path / "real.zarr", sample="s") as raw:
        write_shapes(raw.new_element("shapes", "cell_boundaries"), cells(2))
    (tmp_path / "link.zarr").symlink_to(tmp_path / "real.zarr")
    before = {path: path.read_bytes() for path in sorted((tmp_path / "real.zarr").rglob("*")) if path.is_file()}
    assemble([tmp_path / "link.zarr"], tmp_path / "s.zarr", sample="s", attributes={})
    assert not any(path.is_symlink() for path in (tmp_path / "s.zarr").rglob("*"))
    assert before == {path: path.read_bytes() for path in before}


def added(folder: Path, name: str, n: int) -> Path:
    with new_store(folder / "delta.zarr", sample="s", overwrite=True) as delta:
        write_shapes(delta.new_element("shapes", name), cells(n))
        delta.add_record({"stage": f"made {n}"})
    return folder / "delta.zarr"


def test_a_result_is_added_atomically_and_replaced_only_when_told(tmp_path):
    with new_store(tmp_path / "s.zarr", sample="s") as store:
        write_shapes(store.new_element("shapes", "a"), cells(2))
    add_delta(tmp_path / "s.zarr", added(tmp_path, "b", 3))
    assert sorted(spatialdata.read_zarr(tmp_path / "s.zarr").shapes) == ["a", "b"]
    with pytest.raises(CellquiltError, match="already"):
        add_delta(tmp_path / "s.zarr", added(tmp_path, "b", 1))
    assert len(spatialdata.read_zarr(tmp_path / "s.zarr").shapes["b"]) == 3
    add_delta(tmp_path / "s.zarr", added(tmp_path, "b", 1), overwrite=True)
    assert len(spatialdata.read_zarr(tmp_path / "s.zarr").shapes["b"]) == 1
    assert [record["stage"] for record in Store(tmp_path / "s.zarr").records] == [
        "made 3",
        "made 1",
    ]


def test_a_step_without_output_adds_to_the_store_and_a_failed_one_leaves_it_alone(
    tmp_path,
):
    with new_store(tmp_path / "s.zarr", sample="s"):
        pass
    store = Store(tmp_path / "s.zarr")

    def fail() -> None:
        with result_of(store, None) as result:
            write_shapes(result.new_element("shapes", "a"), cells(2))
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert store.names("shapes") == []
    with result_of(store, None) as result:
        write_shapes(result.new_element("shapes", "a"), cells(2))
    assert store.names("shapes") == ["a"]
    assert [path.name for path in tmp_path.iterdir()] == ["s.zarr"]


@pytest.mark.parametrize(("make", "code"), [("nothing", "store-missing"), ("folder", "store-unreadable")])
def test_what_is_no_store_is_named(tmp_path, make, code):
    path = tmp_path / "x.zarr"
    if make == "folder":
        path.mkdir()
    with pytest.raises(CellquiltError) as caught:
        Store(path)
    assert caught.value.code == code
    assert str(path) in str(caught.value)


def test_a_missing_element_lists_what_is_there(tmp_path):
    with new_store(tmp_path / "s.zarr", sample="s") as store:
        write_shapes(store.new_element("shapes", "cell_boundaries"), cells(1))
    with pytest.raises(CellquiltError, match="did you mean"):
        Store(tmp_path / "s.zarr").element("shapes", "cell_boundary")
