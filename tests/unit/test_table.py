"""The cell table: what the contract says, readable by anndata and spatialdata."""

import numpy as np
import pytest
import shapely
from cellquilt.aggregation.channels import ChannelTable
from cellquilt.aggregation.counts import Counts
from cellquilt.aggregation.table import build_table, table_numbers
from cellquilt.core.errors import CellquiltError
from cellquilt.core.shapes import ShapesTable
from scipy.sparse import csr_matrix

TO_UM = np.array([[0.5, 0.0, 10.0], [0.0, 0.5, 20.0], [0.0, 0.0, 1.0]])


def four_cells() -> ShapesTable:
    boxes = np.array([shapely.box(0, 0, w, 4) for w in (2, 4, 6, 40)], dtype=object)
    transforms = {"global": np.eye(3), "microns": TO_UM}
    return ShapesTable(np.array([f"s1-{i}" for i in range(1, 5)]), boxes, {}, transforms)


def counts() -> Counts:
    matrix = csr_matrix(np.array([[0, 1], [0, 0], [3, 2], [9, 0]], dtype=np.int32))
    return Counts(matrix, ["NANOG", "NEGR1"], np.array([1, 0, 0, 2]))


def channels() -> ChannelTable:
    mean = np.arange(8.0).reshape(4, 2)
    mean[1] = np.nan
    return ChannelTable(["DAPI", "PolyT"], mean, mean - 1, mean + 1, np.array([3, 0, 3, 3]))


def test_columns_as_the_contract_says():
    built = build_table(
        "s1", four_cells(), counts(), channels(), metadata={"patient": "P7", "age": 61, "region": "head"}
    )
    adata = built.adata
    assert adata.obs_names.tolist() == ["s1-1", "s1-2", "s1-3", "s1-4"]
    assert adata.obs.columns.tolist() == [
        "cell_id", "sample", "region", "area_um2", "passes_qc", "qc_reason", "n_control",
        "patient", "age", "sheet_region",
    ]  # fmt: skip
    assert adata.obs["cell_id"].tolist() == adata.obs_names.tolist()
    assert set(adata.obs["region"]) == {"cell_boundaries"}
    assert set(adata.obs["sheet_region"]) == {"head"}
    assert adata.obs["area_um2"].tolist() == [2.0, 4.0, 6.0, 40.0]
    assert adata.obs["n_control"].tolist() == [1, 0, 0, 2]
    assert adata.obs["passes_qc"].all()
    np.testing.assert_allclose(adata.obsm["spatial"], [[10.5, 21], [11, 21], [11.5, 21], [20, 21]])
    assert adata.X.dtype == np.int32
    assert adata.var_names.tolist() == ["NANOG", "NEGR1"]
    assert adata.obsm["intensities"].columns.tolist() == ["DAPI", "PolyT"]
    assert adata.obsm["intensities"].loc["s1-3"].tolist() == [4.0, 5.0]
    assert np.isnan(adata.obsm["intensities"].loc["s1-2"]).all()
    assert list(adata.obsm) == ["spatial", "intensities"]
    assert table_numbers(adata) == {
        "n_cells": 4,
        "n_cells_pass": 4,
        "median_transcripts_per_cell": 3.0,
        "median_genes_per_cell": 1.0,
        "median_area_um2": 5.0,
    }


def test_filters_mark_with_reasons():
    built = build_table("s1", four_cells(), counts(), min_transcripts=2, min_area_um2=4, max_area_um2=30)
    assert built.adata.obs["passes_qc"].tolist() == [False, False, True, False]
    assert built.adata.obs["qc_reason"].tolist() == [
        "min_area_um2;min_transcripts",
        "min_transcripts",
        "",
        "max_area_um2",
    ]
    assert built.kept.all()
    assert built.failed == {"max_area_um2": 1, "min_area_um2;min_transcripts": 1, "min_transcripts": 1}
    assert table_numbers(built.adata)["n_cells_pass"] == 1
    assert table_numbers(built.adata)["median_transcripts_per_cell"] == 5.0


def test_drop_failed_removes_and_counts():
    built = build_table("s1", four_cells(), counts(), channels(), min_transcripts=2, drop_failed=True)
    assert built.adata.obs_names.tolist() == ["s1-3", "s1-4"]
    assert built.kept.tolist() == [False, False, True, True]
    assert built.failed == {"min_transcripts": 2}
    assert built.adata.X.toarray().tolist() == [[3, 2], [9, 0]]
    assert built.adata.obsm["intensities"]["DAPI"].tolist() == [4.0, 6.0]
    assert built.adata.obs["n_control"].tolist() == [0, 2]


def test_no_transcripts_means_no_gene_columns_and_no_failures_for_it():
    built = build_table("s1", four_cells(), None, channels(), statistics=("mean", "min", "max"), min_transcripts=5)
    assert built.adata.shape == (4, 0)
    assert built.adata.obs["passes_qc"].all()
    assert built.adata.obsm["intensities_min"]["DAPI"].tolist()[2:] == [3.0, 5.0]
    assert built.adata.obsm["intensities_max"]["PolyT"].tolist()[2:] == [6.0, 8.0]
    assert table_numbers(built.adata)["median_transcripts_per_cell"] is None


def test_no_cells():
    none = four_cells().take(np.zeros(4, dtype=bool))
    built = build_table("s1", none, None, None, metadata={"patient": "P7"})
    assert built.adata.shape == (0, 0)
    assert table_numbers(built.adata)["median_area_um2"] is None


def test_errors():
    cells = four_cells()
    cells.transforms.pop("microns")
    with pytest.raises(CellquiltError, match="microns"):
        build_table("s1", cells)
    twice = four_cells()
    twice.ids[1] = "s1-1"
    with pytest.raises(CellquiltError, match="s1-1"):
        build_table("s1", twice)
    with pytest.raises(ValueError, match="counts of 4 cells for 2"):
        build_table("s1", four_cells().take(np.array([0, 1])), counts())


def test_spatialdata_validates_and_reads_it_back(tmp_path):
    geopandas = pytest.importorskip("geopandas")
    import spatialdata
    from spatialdata.models import ShapesModel, TableModel
    from spatialdata.transformations import Identity

    cells = four_cells()
    adata = build_table("s1", cells, counts(), channels(), metadata={"patient": "P7"}).adata
    TableModel().validate(adata)
    empty = build_table("s1", cells.take(np.zeros(4, dtype=bool))).adata
    TableModel().validate(empty)
    frame = geopandas.GeoDataFrame(geometry=list(cells.geometry), index=cells.ids)
    shapes = ShapesModel.parse(frame, transformations={"global": Identity()})
    sdata = spatialdata.SpatialData(shapes={"cell_boundaries": shapes}, tables={"table": adata, "none": empty})
    sdata.write(tmp_path / "s1.zarr")
    back = spatialdata.read_zarr(tmp_path / "s1.zarr")
    table = back["table"]
    assert table.obs["cell_id"].tolist() == back["cell_boundaries"].index.tolist()
    np.testing.assert_array_equal(table.X.toarray(), counts().matrix.toarray())
    assert table.obsm["intensities"].columns.tolist() == ["DAPI", "PolyT"]
    assert table.obs["qc_reason"].tolist() == [""] * 4
    assert back["none"].shape == (0, 0)
    matched, _ = spatialdata.join_spatialelement_table(
        back, spatial_element_names="cell_boundaries", table_name="table", how="inner"
    )
    assert len(matched["cell_boundaries"]) == 4
