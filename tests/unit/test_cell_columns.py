"""Clusters and types of cells on their way into the published table and the report."""

import json

import anndata
import numpy as np
import pandas as pd
import pytest
import spatialdata
from cellquilt.aggregation.columns import CellColumns, read_columns
from cellquilt.core.errors import CellquiltError
from cellquilt.core.settings import Settings
from cellquilt.core.store import Store
from cellquilt.report.stage import assemble_slide, report_slide
from synthetic_slide import N_CELLS, N_FAILING, ids, make_parts


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return make_parts(tmp_path_factory.mktemp("parts"))


def clusters():
    codes = np.where(np.arange(N_CELLS) < N_CELLS - N_FAILING, np.arange(N_CELLS) % 3, -1)
    columns = pd.DataFrame({"cluster": pd.Categorical.from_codes(codes, ["0", "1", "2", "3"])}, index=ids())
    markers = pd.DataFrame({"cluster": ["0", "1"], "gene": ["A", "B"], "rank": [1, 1], "auc": [0.9, np.nan]})
    return CellColumns("s1", "cluster", columns, {"cluster_markers": markers}, {"cluster_seed": 0}, {"n_clusters": 3})


def types():
    columns = pd.DataFrame(
        {
            "cell_type": pd.Categorical.from_codes(np.arange(N_CELLS) % 2, ["T", "unknown"]),
            "cell_type_score": np.linspace(0, 1, N_CELLS).astype(np.float32),
        },
        index=ids(),
    )
    return CellColumns("s1", "annotate", columns, facts={"checksums": {"annotate_markers": "ab"}})


def test_a_file_gives_back_what_was_written(tmp_path):
    for found in (clusters(), types()):
        read = read_columns(found.write(tmp_path / "x.parquet", overwrite=True))
        pd.testing.assert_frame_equal(read.columns, found.columns, check_index_type=False, check_column_type=False)
        for name, table in found.tables.items():
            pd.testing.assert_frame_equal(read.tables[name], table)
        assert (read.sample, read.stage, read.parameters, read.facts) == (
            found.sample, found.stage, dict(found.parameters), dict(found.facts),
        )  # fmt: skip


def test_a_published_table_has_them_and_its_report_shows_them(parts, tmp_path):
    files = [clusters().write(tmp_path / "c.parquet"), types().write(tmp_path / "t.parquet")]
    plain = assemble_slide(parts, tmp_path / "plain.zarr", settings=Settings())
    made = assemble_slide(parts, tmp_path / "s1.zarr", settings=Settings(), columns=files, qc=tmp_path / "qc.json")
    table, before = (spatialdata.read_zarr(path).tables["table"] for path in (made, plain))
    assert table.obs["cluster"].isna().sum() == N_FAILING
    assert table.obs["cluster"].astype(str)[:3].tolist() == ["0", "1", "2"]
    assert table.obs["cell_type"].tolist() == types().columns["cell_type"].tolist()
    assert table.uns["cluster_markers"]["gene"].tolist() == ["A", "B"]
    pd.testing.assert_frame_equal(table.obs[before.obs.columns], before.obs)
    assert (table.X != before.X).nnz == 0
    stages = [record["stage"] for record in Store(made).records]
    assert stages[-2:] == ["cluster", "annotate"]
    assert Store(made).attributes["checksums"]["annotate_markers"] == "ab"
    assert json.loads((tmp_path / "qc.json").read_text())["n_cells"] == N_CELLS
    page = report_slide(made, tmp_path / "r.html", settings=Settings()).read_text()
    assert 'id="celltypes"' in page
    assert "5 cells that fail QC have none" in page
    assert "<td>A</td>" in page
    assert 'id="celltypes"' not in report_slide(plain, tmp_path / "p.html", settings=Settings()).read_text()


def test_a_slide_with_nothing_to_cluster_says_so(parts, tmp_path):
    none = pd.DataFrame({"cluster": pd.Categorical([None] * N_CELLS, categories=[])}, index=ids())
    missing = {"cluster_missing": {"code": "too-few-cells", "message": "s1: 3 cells pass QC", "hint": ""}}
    file = CellColumns("s1", "cluster", none, facts=missing).write(tmp_path / "c.parquet")
    made = assemble_slide(parts, tmp_path / "s1.zarr", settings=Settings(), columns=[file])
    page = report_slide(made, tmp_path / "r.html", settings=Settings()).read_text()
    assert "s1: 3 cells pass QC" in page
    assert anndata.read_zarr(made / "tables/table").obs["cluster"].isna().all()


def test_columns_of_other_cells_are_refused(parts, tmp_path):
    other = clusters()
    file = CellColumns("s1", "cluster", other.columns.iloc[::-1]).write(tmp_path / "c.parquet")
    with pytest.raises(CellquiltError, match="what cluster found is of 105 cells") as caught:
        assemble_slide(parts, tmp_path / "s1.zarr", settings=Settings(), columns=[file])
    assert caught.value.code == "cells-mismatch"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.parquet"]


def test_other_files_are_refused(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(CellquiltError, match=r"x\.parquet has no columns of cells"):
        read_columns(tmp_path / "x.parquet")
