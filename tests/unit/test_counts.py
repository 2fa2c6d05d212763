"""Transcripts to cells: exact, streamed, and the same as the published assignment says."""

import cellquilt.aggregation.counts as module
import numpy as np
import pyarrow as pa
import pytest
import shapely
from cellquilt.aggregation.counts import (
    Counts,
    PairCounts,
    TranscriptCounter,
    count_transcripts,
    pair_keys,
    points_with_cells,
)
from cellquilt.core.errors import CellquiltError
from cellquilt.geometry.locate import PolygonIndex
from cellquilt.geometry.polygons import Rings
from hypothesis import given, settings
from hypothesis import strategies as st

GENES = ["NANOG", "Blank-1", "NEGR1", "Actb", "Unassigned"]
CONTROLS = {"Blank-1", "Unassigned"}
UM_TO_PX = np.array([[2.0, 0.0, 5.0], [0.0, 2.0, -3.0], [0.0, 0.0, 1.0]])


def index_of(polygons: np.ndarray, **keywords) -> PolygonIndex:
    return PolygonIndex(Rings.from_shapely(polygons), **keywords)


def circles(rng: np.random.Generator, n: int, size: float, radius: float) -> np.ndarray:
    return shapely.buffer(shapely.points(rng.uniform(0, size, (n, 2))), radius * rng.uniform(0.5, 1, n))


def transcripts(rng: np.random.Generator, n: int, size: float) -> pa.Table:
    gene = rng.choice(GENES, n)
    return pa.table(
        {
            "x": rng.uniform(-5, size, n),
            "y": rng.uniform(-5, size, n),
            "z_plane": rng.integers(0, 3, n).astype(np.int32),
            "gene": pa.array(gene).dictionary_encode(),
            "transcript_id": np.arange(n, dtype=np.uint64),
            "is_control": np.isin(gene, list(CONTROLS)),
            "passes_qv": rng.random(n) < 0.8,
        }
    )


def batches_of(table: pa.Table, size: int) -> list[pa.Table]:
    return [table.slice(k, size) for k in range(0, table.num_rows, size)]


def brute_force(table: pa.Table, polygons: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The nearest cell that contains each transcript, and the dense matrix of the counted ones."""
    xy = np.column_stack([table["x"].to_numpy(), table["y"].to_numpy()]) @ UM_TO_PX[:2, :2].T + UM_TO_PX[:2, 2]
    inside = shapely.contains_xy(polygons[:, None], xy[None, :, 0], xy[None, :, 1])
    centre = shapely.get_coordinates(shapely.centroid(polygons))
    distance = np.where(inside, ((xy[None] - centre[:, None]) ** 2).sum(axis=-1), np.inf)
    cell = np.where(inside.any(axis=0), distance.argmin(axis=0), -1)
    genes = sorted(set(GENES) - CONTROLS)
    matrix = np.zeros((len(polygons), len(genes)), dtype=int)
    for row, name, control, passes in zip(
        cell, table["gene"].to_pylist(), table["is_control"].to_pylist(), table["passes_qv"].to_pylist(), strict=True
    ):
        if row >= 0 and passes and not control:
            matrix[row, genes.index(name)] += 1
    return cell, matrix


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 7, 100, 1000]))
@settings(max_examples=20, deadline=None)
def test_counts_and_assignment_equal_brute_force_for_any_batch_size(seed, batch_rows):
    rng = np.random.default_rng(seed)
    polygons, table = circles(rng, 15, 100, 25), transcripts(rng, 300, 50)
    want_cell, want = brute_force(table, polygons)
    counter = TranscriptCounter(index_of(polygons), UM_TO_PX)
    ids = [f"s-{i}" for i in range(15)]
    published = pa.concat_tables(points_with_cells(batches_of(table, batch_rows), counter, ids))
    counts = counter.finish()
    assert counts.genes == ["Actb", "NANOG", "NEGR1"]
    assert counts.matrix.dtype == np.int32
    np.testing.assert_array_equal(counts.matrix.toarray(), want)
    assert published["cell_id"].to_pylist() == [None if c < 0 else f"s-{c}" for c in want_cell]
    assert published.select(table.column_names).equals(table)
    assert counts.matrix.has_canonical_format
    assert (counts.matrix.data > 0).all()


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 50, 20_000]), st.sampled_from([1, 3000]))
@settings(max_examples=20, deadline=None)
def test_pairs_are_counted_whether_rows_hold_few_keys_or_many(seed, n_rows, n):
    rng = np.random.default_rng(seed)
    row, code = rng.integers(0, n_rows, 2 * n), rng.integers(0, 40, 2 * n)
    pairs = PairCounts()
    for part in (slice(None, n), slice(n, None)):
        pairs.add(pair_keys(row[part], code[part]))
    expected = np.zeros((n_rows, 40), dtype=np.int64)
    np.add.at(expected, (row, code), 1)
    matrix = pairs.matrix(n_rows, np.arange(40), 40)
    assert (matrix.toarray() == expected).all()
    assert matrix.nnz == (expected > 0).sum()


def lies_in_a_file(array: np.ndarray | None) -> bool:
    return isinstance(array, np.memmap) or (isinstance(array, np.ndarray) and lies_in_a_file(array.base))


@pytest.mark.parametrize("n_rows", [3, 5000])
@pytest.mark.parametrize("parts", [1, 7])
def test_counts_that_do_not_fit_are_kept_aside(monkeypatch, n_rows, parts):
    monkeypatch.setattr(module, "_SAMPLED", 100)
    monkeypatch.setattr(module, "_MERGED_AT_ONCE", 3000)
    rng = np.random.default_rng(n_rows + parts)
    row, code = rng.integers(0, n_rows, 400_000) ** 2 // n_rows, rng.integers(0, 40, 400_000)
    keys, column = pair_keys(row, code), rng.permutation(40)
    pairs = {memory_mb: PairCounts(memory_mb) for memory_mb in (1, 1500)}
    for memory_mb, counter in pairs.items():
        for part in np.array_split(keys, parts):
            counter.add(part)
        assert any(run.on_disk for run in counter._runs) == (memory_mb == 1 and n_rows == 5000)
    (little, plenty) = (counter.matrix(n_rows, column, 40) for counter in pairs.values())
    assert lies_in_a_file(little.data) == lies_in_a_file(little.indices) == (n_rows == 5000)
    assert not lies_in_a_file(plenty.data)
    assert little.dtype == plenty.dtype == np.int32
    assert little.indices.dtype == plenty.indices.dtype == np.int32
    expected = np.zeros((n_rows, 40), dtype=np.int64)
    np.add.at(expected, (row, column[code]), 1)
    for matrix in (little, plenty):
        assert (matrix.toarray() == expected).all()
        assert matrix.nnz == (expected > 0).sum()
        assert matrix.has_sorted_indices
    distinct, counts = np.unique(keys, return_counts=True)
    for counter in pairs.values():
        total = counter.total()
        np.testing.assert_array_equal(total[0], distinct)
        np.testing.assert_array_equal(total[1], counts)


def test_memory_of_counts_is_bounded_by_the_setting():
    """What NumPy takes while 4 million pairs are counted, 48 MB of them, and made a matrix."""
    import tracemalloc

    rng = np.random.default_rng(0)
    warm = PairCounts(16)
    warm.add(pair_keys(np.arange(100_000), np.zeros(100_000, dtype=np.int64)))
    warm.matrix(100_000, np.arange(1), 1)
    pairs = PairCounts(16)
    tracemalloc.start()
    for _ in range(20):
        pairs.add(pair_keys(rng.integers(0, 200_000, 250_000), rng.integers(0, 300, 250_000)))
    matrix = pairs.matrix(200_000, np.arange(300), 300)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert matrix.nnz > 4_000_000
    assert matrix.sum() == 5_000_000
    assert peak < 16e6


def test_row_sums_are_the_counted_transcripts_that_name_the_cell():
    rng = np.random.default_rng(0)
    polygons, table = circles(rng, 40, 200, 30), transcripts(rng, 5000, 100)
    counter = TranscriptCounter(index_of(polygons), UM_TO_PX)
    ids = np.array([f"liver-{i + 1}" for i in range(40)])
    published = pa.concat_tables(points_with_cells(batches_of(table, 999), counter, ids)).to_pandas()
    counts = counter.finish()
    counted = published[~published.is_control & published.passes_qv & published.cell_id.notna()]
    sums = counted.groupby("cell_id").size().reindex(ids, fill_value=0)
    np.testing.assert_array_equal(np.asarray(counts.matrix.sum(axis=1)).ravel(), sums.to_numpy())
    controls = published[published.is_control & published.passes_qv].groupby("cell_id").size()
    np.testing.assert_array_equal(counts.n_control, controls.reindex(ids, fill_value=0).to_numpy())
    qc = counts.qc
    assert qc["n_transcripts"] == 5000
    assert qc["n_counted"] == len(counted) == counts.matrix.sum()
    assert qc["n_assigned"] == published.cell_id.notna().sum()
    assert qc["n_control"] == published.is_control.sum()
    assert qc["n_control_in_cells"] == counts.n_control.sum()
    passing = published[published.passes_qv]
    assert qc["control_rate_in_cells"] == pytest.approx(passing[passing.cell_id.notna()].is_control.mean())
    assert qc["control_rate_outside"] == pytest.approx(passing[passing.cell_id.isna()].is_control.mean())
    for plane, rows in published.groupby("z_plane"):
        assert qc["share_assigned_by_z"][plane] == pytest.approx(rows.cell_id.notna().mean())


def test_nuclei_image_and_planes():
    cells = np.array([shapely.box(0, 0, 10, 10), shapely.box(10, 0, 20, 10)])
    nuclei = np.array([shapely.box(2, 2, 5, 5)])
    table = pa.table(
        {
            "x": [3.0, 3.0, 8.0, 15.0, 25.0, -1.0, np.nan],
            "y": [3.0, 3.0, 8.0, 5.0, 5.0, 5.0, 5.0],
            "z_plane": pa.array([0, 1, 0, 0, 0, 0, 0], pa.int32()),
            "gene": ["a", "a", "b", "b", "b", "b", "c"],
            "is_control": [False] * 7,
        }
    )
    counter = TranscriptCounter(index_of(cells), np.eye(3), nuclei=index_of(nuclei), planes=[0], image_shape=(10, 18))
    assignment = counter.add(table)
    counts = counter.finish()
    assert assignment.cell.tolist() == [0, -1, 0, 1, -1, -1, -1]
    assert assignment.in_nucleus.tolist() == [True, False, False, False, False, False, False]
    assert counts.genes == ["a", "b", "c"]
    assert counts.matrix.toarray().tolist() == [[1, 1, 0], [0, 1, 0]]
    assert counts.qc["n_inside_image"] == 4
    assert counts.qc["n_in_nucleus"] == 1
    assert counts.qc["share_assigned_by_z"] == {0: 1.0, 1: 0.0}
    everywhere = count_transcripts([table], TranscriptCounter(index_of(cells), np.eye(3)))
    assert everywhere.matrix.toarray().tolist() == [[2, 1, 0], [0, 1, 0]]
    assert everywhere.qc["n_inside_image"] == 6


def test_genes_in_changing_dictionaries_and_machines_own_columns():
    cells = np.array([shapely.box(0, 0, 10, 10)])
    indices = pa.array([0, 1, None], pa.int32())
    tables = [
        pa.table(
            {
                "x": [1.0, 1.0, 1.0],
                "y": [1.0, 1.0, 1.0],
                "gene": pa.DictionaryArray.from_arrays(indices, pa.array(names)),
                "is_control": [False, False, True],
                "cell_id": [9, 9, 9],
            }
        )
        for names in (["b", "a", "never seen"], ["a", "c"])
    ]
    tables = [pa.concat_tables([tables[0], tables[1]]), tables[1].slice(0, 0), tables[1]]
    counter = TranscriptCounter(index_of(cells), np.eye(3))
    published = pa.concat_tables(points_with_cells(tables, counter, ["s-1"]))
    counts = counter.finish()
    assert dict(zip(counts.genes, counts.matrix.toarray()[0], strict=True)) == {"a": 3, "b": 1, "c": 2}
    assert counts.n_control.tolist() == [3]
    assert published["vendor_cell_id"].to_pylist() == [9] * 9
    assert published["cell_id"].to_pylist() == ["s-1"] * 9


def test_no_cells_no_transcripts():
    table = transcripts(np.random.default_rng(0), 50, 10)
    counts = count_transcripts([table], TranscriptCounter(index_of(np.array([])), np.eye(3)))
    assert counts.matrix.shape == (0, 3)
    assert counts.qc["n_assigned"] == 0
    assert counts.qc["control_rate_in_cells"] is None
    empty = count_transcripts(
        [table.slice(0, 0)], TranscriptCounter(index_of(np.array([shapely.box(0, 0, 1, 1)])), np.eye(3))
    )
    assert empty.matrix.shape == (1, 0)
    assert empty.genes == []
    assert empty.qc["share_assigned"] is None
    assert isinstance(empty, Counts)


def test_errors_name_the_column():
    index = index_of(np.array([shapely.box(0, 0, 1, 1)]))
    table = transcripts(np.random.default_rng(0), 10, 10)
    cases = [
        (table.drop_columns(["gene"]), {}, "points-column-missing", "gene"),
        (table.drop_columns(["z_plane"]), {"planes": [1]}, "z-plane-missing", "z_plane"),
        (table.set_column(3, "gene", pa.nulls(10, pa.string())), {}, "gene-missing", "no gene"),
    ]
    for broken, keywords, code, text in cases:
        with pytest.raises(CellquiltError, match=text) as error:
            TranscriptCounter(index, np.eye(3), **keywords).add(broken)
        assert error.value.code == code


def test_vendor_counts_of_the_real_region(shared_data):
    """With the machine's own outlines our counts are the machine's, cell by cell and gene by gene."""
    pd = pytest.importorskip("pandas")
    folder = shared_data / "merscope_liver"
    vendor = pd.read_parquet(folder / "vendor_cells_cellpose.parquet", columns=["EntityID", "ZIndex", "Geometry"])
    wanted = pd.read_csv(folder / "vendor_cell_by_gene.csv", index_col="cell")
    rows = pd.read_csv(folder / "detected_transcripts.csv")
    table = pa.table(
        {
            "x": rows.global_x.to_numpy(),
            "y": rows.global_y.to_numpy(),
            "z_plane": rows.global_z.to_numpy().astype(np.int32),
            "gene": pa.array(rows.gene, pa.string()),
            "is_control": np.zeros(len(rows), dtype=bool),  # the vendor's table counts the blanks too
        }
    )
    cells = np.sort(vendor.EntityID.unique())
    rings = Rings.from_shapely(shapely.from_wkb(vendor.Geometry.to_numpy()))
    index = PolygonIndex(rings, z_plane=vendor.ZIndex.to_numpy())
    owner = np.searchsorted(cells, vendor.EntityID.to_numpy())

    def count(**keywords) -> Counts:
        counter = TranscriptCounter(index, np.eye(3), n_cells=len(cells), cell_of_polygon=owner, **keywords)
        return count_transcripts(batches_of(table, 1000), counter)

    counts = count()
    ours = pd.DataFrame(counts.matrix.toarray(), index=cells, columns=counts.genes)
    ours = ours.reindex(index=wanted.index, columns=wanted.columns, fill_value=0)
    np.testing.assert_array_equal(ours.to_numpy(), wanted.to_numpy())
    assert counts.matrix.sum() == 1484
    assert [int(count(planes=[z]).matrix.sum()) for z in range(7)] == [177, 203, 287, 240, 256, 186, 135]
    # Two wrong ways must not be told apart by the sum alone: plane 3's outlines with all planes' transcripts.
    third = vendor.ZIndex.to_numpy() == 3
    flat = TranscriptCounter(PolygonIndex(rings.take(np.flatnonzero(third))), np.eye(3))
    wrong = count_transcripts([table], flat)
    assert wrong.matrix.sum() == 1484
    assert wrong.matrix.shape[0] == third.sum() != len(cells)
