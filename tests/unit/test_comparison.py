"""Methods compared: every measure against a slow one, what must not change it, what is missing, and what it ranks."""

import csv
import json
import re
from html.parser import HTMLParser

import numpy as np
import pyarrow as pa
import pytest
import shapely
from cellquilt.cli import main
from cellquilt.comparison.cells import (
    Segmentation,
    neighbours,
    outline_f1,
    overlapping_cells,
    solidity,
)
from cellquilt.comparison.expression import coexpression_ratio, information, leakage, mecr
from cellquilt.comparison.markers import (
    MarkerPairs,
    SquareSample,
    derive_pairs,
    pairs_from_reference,
    read_marker_pairs,
    read_reference,
)
from cellquilt.comparison.methods import MEASURES, compare, read_comparison, write_comparison
from cellquilt.comparison.stores import Source, compare_stores, default_names, rows_of
from cellquilt.comparison.transcripts import assignment_agreement, assignment_ari, contingency, in_core
from cellquilt.core.assignment import ASSIGNMENT, NO_CELL, NOT_SEGMENTED, AssignmentWriter
from cellquilt.core.errors import CellquiltError
from cellquilt.core.points import PointsWriter
from cellquilt.core.settings import Settings
from cellquilt.core.shapes import ShapesTable, read_geoparquet, write_shapes
from cellquilt.core.store import new_store
from cellquilt.geometry.locate import PolygonIndex
from cellquilt.geometry.polygons import Rings
from cellquilt.report.methods import render_methods
from cellquilt.report.qc import compute_qc
from cellquilt.report.stage import assemble_slide
from cellquilt.report.view import View
from cellquilt.resolve.nuclei import expand_nuclei
from cellquilt.simulate import Slide, make_parameters, simulate, truth_scores
from cellquilt.simulate.scores import adjusted_rand
from cellquilt.simulate.writer import tile_outlines
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import csr_matrix
from synthetic_slide import N_CELLS, make_parts

SEEDS = (0, 1, 2)
GROWTH_UM = 5.0
SHIFT_UM = 2.0


# --- slides whose cells are known, and what can be done wrong with them


class KnownSlide:
    """A simulated slide: cells, nuclei and transcripts in µm, with the true cell of each transcript."""

    def __init__(self, seed: int, width_px: int = 1500) -> None:
        made = make_parameters(width_px=width_px, seed=seed, ambient=0.1, diffusion=0.1)
        slide = Slide(made)
        tile = slide.tile((0, width_px, 0, width_px))
        self.pixel_um, self.width_px = made.pixel_size_um, width_px
        self.cells_px = tile_outlines(tile.masks.cells, tile)
        nuclei = tile_outlines(tile.masks.nuclei, tile)
        self.nuclei_px = nuclei[~shapely.is_missing(nuclei)]
        self.kind = tile.cells.kind[tile.owned.index]
        found = slide.transcripts(tile)
        n_genes = len(slide.expression.genes) - slide.expression.n_controls
        gene = pa.DictionaryArray.from_arrays(pa.array(found.gene, pa.int32()), pa.array(slide.expression.genes))
        columns = {"x": found.xy[:, 0], "y": found.xy[:, 1], "gene": gene, "is_control": found.gene >= n_genes}
        self.transcripts = pa.table(columns)
        row = {number: k for k, number in enumerate(tile.cells.ids[tile.owned.index].tolist())}
        self.true_cell = np.array([row.get(number, -1) for number in found.cell.tolist()])

    def segmentation(self, name: str, outlines_px: np.ndarray) -> Segmentation:
        scaled = shapely.transform(outlines_px, lambda xy: xy * self.pixel_um)
        return Segmentation(name, scaled[shapely.area(scaled) > 0])

    @property
    def truth(self) -> Segmentation:
        return self.segmentation("truth", self.cells_px)

    def compare(self, segmentations: list[Segmentation], **more):
        cells = [None] * len(segmentations)
        if "truth" in more:
            cells.append(self.true_cell)
        return compare(segmentations, [(self.transcripts, cells)], **more)


def expanded(slide: KnownSlide) -> np.ndarray:
    """Every cell grown by some µm, up to the line half-way to its neighbours."""
    width = slide.width_px
    return expand_nuclei(slide.cells_px, round(GROWTH_UM / slide.pixel_um), bounds=(width, width))


def shifted(slide: KnownSlide) -> np.ndarray:
    step = SHIFT_UM / slide.pixel_um / np.sqrt(2)
    return shapely.transform(slide.cells_px, lambda xy: xy + step)


def merged(slide: KnownSlide) -> np.ndarray:
    """Pairs of neighbours that touch, each cell in one pair at most."""
    cells = slide.cells_px
    i, j = shapely.STRtree(cells).query(cells, predicate="dwithin", distance=1.0)
    taken = np.zeros(len(cells), dtype=bool)
    pairs = []
    for a, b in sorted(zip(i.tolist(), j.tolist(), strict=True)):
        if a < b and not taken[a] and not taken[b]:
            taken[[a, b]] = True
            pairs.append((a, b))
    first, second = np.array(pairs).T
    return np.concatenate([shapely.union(cells[first], cells[second]), cells[~taken]])


def split(slide: KnownSlide) -> np.ndarray:
    """Every cell cut in two across its longer side."""
    cells = slide.cells_px
    x0, y0, x1, y1 = shapely.bounds(cells).T
    middle = Rings.from_shapely(cells).centroids()
    wide = x1 - x0 > y1 - y0
    half = shapely.box(x0, y0, np.where(wide, middle[:, 0], x1), np.where(wide, y1, middle[:, 1]))
    parts = np.concatenate([shapely.intersection(cells, half), shapely.difference(cells, half)])
    return shapely.buffer(parts, 0)  # without the points and lines that cutting leaves


def scattered(slide: KnownSlide) -> np.ndarray:
    """The same outlines at random places."""
    cells = slide.cells_px
    rng = np.random.default_rng(7)
    step = rng.uniform(0, slide.width_px, (len(cells), 2)) - Rings.from_shapely(cells).centroids()
    moved = [shapely.transform(cell, lambda xy, by=by: xy + by) for cell, by in zip(cells, step, strict=True)]
    return np.array(moved, dtype=object)


DEGRADED = {"expanded": expanded, "shifted": shifted, "merged": merged, "split": split, "random": scattered}


@pytest.fixture(scope="module", params=SEEDS)
def compared(request):
    slide = KnownSlide(request.param)
    segmentations = [slide.truth, *(slide.segmentation(name, make(slide)) for name, make in DEGRADED.items())]
    return slide.compare(segmentations, truth=slide.truth)


@pytest.fixture(scope="module")
def slide():
    return KnownSlide(5, 900)


def column(table, name: str) -> dict[str, float]:
    return dict(zip(table.methods, table.values[name], strict=True))


@pytest.mark.slow
def test_five_degraded_segmentations_rank_below_the_truth(compared):
    rank, bits = column(compared, "rank"), column(compared, "information_bits")
    assert rank["truth"] == 1
    assert sorted(rank.values()) == [1, 2, 3, 4, 5, 6]
    assert all(bits[name] < bits["truth"] - 0.001 for name in DEGRADED)
    assert bits["random"] < 0.4 * bits["truth"]


@pytest.mark.parametrize(
    ("name", "sensitivity", "contamination"),
    [
        ("expanded", "transcripts_per_100um2_of_cell", "leakage"),
        ("expanded", "", "coexpression_ratio"),
        ("shifted", "share_assigned", "leakage"),
        ("shifted", "median_transcripts_per_cell", "coexpression_ratio"),
        ("merged", "", "coexpression_ratio"),
        ("split", "median_transcripts_per_cell", ""),
        ("split", "median_genes_per_cell", ""),
        ("random", "share_assigned", "coexpression_ratio"),
        ("random", "transcripts_per_100um2_of_cell", "leakage"),
    ],
)
def test_every_degradation_is_caught_by_sensitivity_or_contamination(compared, name, sensitivity, contamination):
    by_name = {measure.name: measure for measure in MEASURES}
    if sensitivity:
        assert by_name[sensitivity].group == "sensitivity"
        found = column(compared, sensitivity)
        assert found[name] < 0.95 * found["truth"]
    if contamination:
        assert by_name[contamination].group == "contamination"
        found = column(compared, contamination)
        assert found[name] > 1.05 * found["truth"]
    if contamination == "leakage":
        error = column(compared, "leakage_standard_error")
        assert found[name] - found["truth"] > 2 * max(error[name], error["truth"])


def test_sensitivity_alone_would_crown_the_largest_cells_and_mecr_the_smallest(compared):
    """Why the table has both sides, and a ratio that does not depend on depth."""
    assert max(column(compared, "share_assigned"), key=column(compared, "share_assigned").get) == "expanded"
    assert max(column(compared, "median_genes_per_cell"), key=column(compared, "median_genes_per_cell").get) == "merged"
    assert min(column(compared, "mecr"), key=column(compared, "mecr").get) == "split"
    ratio = column(compared, "coexpression_ratio")
    assert ratio["split"] == pytest.approx(ratio["truth"], rel=0.06)


def test_scores_against_the_truth_itself(compared):
    assert column(compared, "true_f1")["truth"] == 1
    assert column(compared, "true_f1")["random"] < 0.1
    assert column(compared, "share_in_true_cell")["split"] < 0.55
    best = column(compared, "precision")
    assert max(best, key=best.get) == "truth"
    k = compared.methods.index("truth")
    for matrix in compared.matrices.values():
        assert np.array_equal(matrix, matrix.T)
        assert (matrix[k] <= 1).all()
        assert matrix[k].argmin() == compared.methods.index("random")


def test_information_follows_the_truth_without_knowing_it():
    """Nuclei grown by 0 to 10 µm: the growth that tells most is the one that gets most transcripts right."""
    slide = KnownSlide(0)
    width = slide.width_px
    grown = [
        slide.segmentation(f"{um}", expand_nuclei(slide.nuclei_px, round(um / slide.pixel_um), bounds=(width, width)))
        for um in (0, 1, 2, 3, 5, 7, 10)
    ]
    table = slide.compare(grown, truth=slide.truth)
    share, precision = (np.array(table.values[name]) for name in ("share_in_true_cell", "precision"))
    right = 2 * share * precision / (share + precision)
    bits = np.array(table.values["information_bits"])
    assert abs(int(bits.argmax()) - int(right.argmax())) <= 1
    assert (np.diff(bits[:4]) > 0).all()
    assert bits[-1] < bits.max()
    assert np.argmax(table.values["share_assigned"]) == 6  # the largest, as ever


# --- measures against slow ones

counts_strategy = st.integers(0, 2**32 - 1).map(
    lambda seed: np.random.default_rng(seed).poisson(
        np.random.default_rng(seed + 1).gamma(0.4, 2.0, (7, 5)),
    )
)


@given(counts_strategy)
def test_mecr_by_hand(counts):
    a, b = np.array([0, 1, 2]), np.array([3, 4, 3])
    rates = []
    for i, j in zip(a, b, strict=True):
        both = sum(1 for cell in counts if cell[i] > 0 and cell[j] > 0)
        either = sum(1 for cell in counts if cell[i] > 0 or cell[j] > 0)
        rates += [both / either] if either else []
    expected = np.mean(rates) if rates else np.nan
    assert mecr(csr_matrix(counts), a, b) == pytest.approx(expected, nan_ok=True)


@given(counts_strategy)
def test_coexpression_ratio_by_hand(counts):
    a, b = np.array([0, 1, 2]), np.array([3, 4, 3])
    kept = counts[counts.sum(axis=1) > 1]
    n = kept.sum()
    met = chance = 0.0
    for i, j in zip(a, b, strict=True):
        for cell in kept:  # every transcript of one gene, any other transcript of its cell
            met += cell[i] * (cell[j] / (cell.sum() - 1))
        chance += n * (kept[:, i].sum() / max(n, 1)) * (kept[:, j].sum() / max(n, 1))
    expected = met / chance if chance else np.nan
    assert coexpression_ratio(csr_matrix(counts), a, b) == pytest.approx(expected, nan_ok=True)


@given(counts_strategy)
def test_information_by_hand(counts):
    total = int(counts.sum()) + 3  # three transcripts in no cell
    shares = (counts.sum(axis=0) + 0.6) / total
    best = -np.inf
    for prior in 2.0 ** np.arange(2, 15):
        gain = 0.0
        for cell in counts:
            for gene, x in enumerate(cell):
                for _ in range(x):
                    predicted = (x - 1 + prior * shares[gene]) / (cell.sum() - 1 + prior)
                    gain += np.log2(predicted / shares[gene])
        best = max(best, gain / total)
    assert information(csr_matrix(counts), shares, total) == pytest.approx(best)


def test_leakage_by_hand(monkeypatch):
    rng = np.random.default_rng(3)
    n, genes = 40, 12
    profiles = rng.dirichlet(np.full(genes, 0.5), n)
    core, ring = rng.poisson(40 * profiles), rng.poisson(30 * profiles)
    core[5] = 0  # nothing to compare with
    near = neighbours(rng.uniform(0, 100, (n, 2)), 3)
    shares = rng.dirichlet(np.ones(genes))
    weight = 1 / (shares + 1 / genes)

    def same(u):
        total = u.sum()
        return float((weight * u * (u - 1)).sum() / (total * (total - 1)))

    def other(u, v):
        return float((weight * u * v).sum() / (u.sum() * v.sum()))

    top = bottom = 0.0
    for k in range(n):
        around = core[near[k][near[k] >= 0]].sum(axis=0)
        if core[k].sum() < 2:
            continue
        w = core[k].sum() * ring[k].sum()
        rc, rn, cn = other(ring[k], core[k]), other(ring[k], around), other(core[k], around)
        top += w * (rn - rc - cn + same(core[k]))
        bottom += w * (same(around) - 2 * cn + same(core[k]))
    monkeypatch.setattr("cellquilt.comparison.expression.MAX_STANDARD_ERROR", np.inf)
    monkeypatch.setattr("cellquilt.comparison.expression._ROWS", 7)  # in pieces
    found = leakage(csr_matrix(core), csr_matrix(ring), near, shares)
    assert found.share == pytest.approx(top / bottom)


def test_leakage_is_the_share_that_was_mixed_in_whatever_the_depth():
    rng = np.random.default_rng(0)
    n, genes = 3000, 30
    types = rng.dirichlet(np.full(genes, 0.3), 4)
    kind = rng.integers(0, 4, n)
    near = neighbours(rng.uniform(0, 1000, (n, 2)))
    own, around = types[kind], types[kind[near]].mean(axis=1)
    for depth, leak in ((60, 0.0), (60, 0.2), (12, 0.2)):
        core = rng.poisson(depth * own)
        ring = rng.poisson(depth * ((1 - leak) * own + leak * around))
        found = leakage(csr_matrix(core), csr_matrix(ring), near, types.mean(axis=0))
        assert found.share == pytest.approx(leak, abs=3 * found.standard_error + 1e-3)
        assert found.standard_error < 0.03
        assert found.similarity_own > found.similarity_neighbours
    core, ring = (csr_matrix(rng.poisson(0.4 * own[:60])) for _ in range(2))
    assert np.isnan(leakage(core, ring, near[:60] % 60, types[0]).share)


def test_coexpression_ratio_does_not_depend_on_depth_but_mecr_does():
    rng = np.random.default_rng(1)
    profile = np.where(rng.random(4000)[:, None] < 0.5, [0.3, 0.05, 0.65], [0.05, 0.3, 0.65])
    deep, shallow = (csr_matrix(rng.poisson(depth * profile)) for depth in (40, 5))
    a, b = np.array([0]), np.array([1])
    assert coexpression_ratio(shallow, a, b) == pytest.approx(coexpression_ratio(deep, a, b), rel=0.08)
    assert mecr(shallow, a, b) < 0.5 * mecr(deep, a, b)
    at_random = csr_matrix(rng.poisson(40 * profile.mean(axis=0), (4000, 3)))
    assert coexpression_ratio(at_random, a, b) == pytest.approx(1, abs=0.02)


assignments = st.lists(st.tuples(st.integers(-1, 3), st.integers(-1, 3)), min_size=2, max_size=40)


@given(assignments)
def test_agreement_and_ari_by_hand(items):
    a, b = np.array(items).T
    table = contingency(a, b)
    assert table.counts.sum() == len(a)
    pairs = {(i, j): int(np.count_nonzero((a == i) & (b == j))) for i in range(-1, 4) for j in range(-1, 4)}
    assert {(i, j): n for i, j, n in zip(table.a, table.b, table.counts, strict=True)} == {
        pair: n for pair, n in pairs.items() if n
    }
    inside = {pair: n for pair, n in pairs.items() if min(pair) >= 0 and n}

    def best(axis: int, k: int):
        mine = [pair for pair in inside if pair[axis] == k]
        return max(mine, key=lambda pair: (inside[pair], -pair[1 - axis]), default=None)

    matched = sum(n for pair, n in inside.items() if best(0, pair[0]) == pair and best(1, pair[1]) == pair)
    assert assignment_agreement(table) == pytest.approx((matched + pairs[-1, -1]) / len(a))
    alone = 100 + np.arange(len(a))
    one, other = np.where(a < 0, alone, a), np.where(b < 0, alone, b)
    spelled, counts = np.unique([one, other], axis=1, return_counts=True)
    assert assignment_ari(table) == pytest.approx(adjusted_rand(*spelled, counts))


def test_overlaps_and_f1_against_shapely():
    rng = np.random.default_rng(2)

    def blobs(n: int) -> np.ndarray:
        return shapely.buffer(shapely.points(rng.uniform(0, 60, (n, 2))), rng.uniform(2, 6, n), quad_segs=4)

    a, b = Segmentation("a", blobs(40)), Segmentation("b", np.append(blobs(30), shapely.MultiPolygon()))
    i, j, iou = overlapping_cells(a, b)
    shared = shapely.area(shapely.intersection(a.geometry[:, None], b.geometry[None]))
    assert sorted(zip(i, j, strict=True)) == list(zip(*np.nonzero(shared > 1e-9), strict=True))
    union = shapely.area(shapely.union(a.geometry[i], b.geometry[j]))
    np.testing.assert_allclose(iou, shared[i, j] / union, rtol=1e-9)
    full = np.zeros(shared.shape)
    full[i, j] = iou
    same = sum(
        full[p, q] >= 0.3 and full[p].argmax() == q and full[:, q].argmax() == p for p, q in zip(i, j, strict=True)
    )
    assert same > 0
    assert outline_f1(a, b, 0.3) == outline_f1(b, a, 0.3) == pytest.approx(2 * same / (40 + 31))
    assert outline_f1(a, a) == 1
    none = Segmentation("none", np.zeros(0, dtype=object))
    assert outline_f1(a, none) == 0
    assert np.isnan(outline_f1(none, none))


def test_outlines_that_cross_themselves_are_mended():
    bow = shapely.Polygon([(0, 0), (2, 2), (2, 0), (0, 2)])
    found = Segmentation("bow", np.array([bow, None, shapely.box(0, 0, 2, 2)], dtype=object))
    np.testing.assert_allclose(found.areas_um2, [2, 0, 4])
    assert np.isnan(found.centroids_um[1]).all()


def test_solidity():
    corner = shapely.Polygon([(0, 0), (2, 0), (2, 1), (1, 1), (1, 2), (0, 2)])
    found = solidity(np.array([shapely.box(0, 0, 3, 1), corner, shapely.Polygon()], dtype=object))
    np.testing.assert_allclose(found, [1, 3 / 3.5, np.nan])


@given(st.integers(0, 2**32 - 1), st.integers(0, 12))
def test_neighbours_by_hand(seed, n):
    xy = np.random.default_rng(seed).uniform(0, 10, (n, 2))
    xy[: n // 5] = np.nan
    found = neighbours(xy, 3)
    assert found.shape == (n, 3)
    for k in range(n):
        distance = np.linalg.norm(xy - xy[k], axis=1)
        others = [other for other in np.argsort(distance) if other != k and np.isfinite(distance[other])][:3]
        assert found[k].tolist() == others + [-1] * (3 - len(others))


def test_neighbours_of_cells_on_one_spot():
    found = neighbours(np.zeros((5, 2)), 2)
    assert all(k not in row and len(set(row)) == 2 for k, row in enumerate(found.tolist()))


def test_core_is_half_of_the_cell():
    rng = np.random.default_rng(0)
    cells = shapely.box([0, 10, 20], 0, [10, 20, 30], [4, 10, 7])
    rings = Rings.from_shapely(cells)
    index, middle = PolygonIndex(rings), rings.centroids()
    xy = rng.uniform(0, [30, 10], (60_000, 2))
    cell = index.locate(xy)
    xy, cell = xy[cell >= 0], cell[cell >= 0]
    core = in_core(index, middle, xy, cell)
    share = np.bincount(cell[core], minlength=3) / np.bincount(cell, minlength=3)
    np.testing.assert_allclose(share, 0.5, atol=0.02)
    assert (np.abs(xy[core] - middle[cell[core]]) < [5 * 0.7072, 5 * 0.7072]).all()
    assert not in_core(index, middle, np.array([[25.0, 5.0]]), np.array([0])).any()  # assigned to a cell far away


# --- what must not change a number


def test_order_of_cells_and_transcripts_and_batches_changes_nothing(slide):
    rng = np.random.default_rng(0)
    segmentations = [slide.truth, slide.segmentation("shifted", shifted(slide))]
    plain = slide.compare(segmentations, truth=slide.truth)
    shuffled, back = [], []
    for segmentation in segmentations:
        order = rng.permutation(len(segmentation))
        shuffled.append(Segmentation(segmentation.name, segmentation.geometry[order]))
        back.append(np.argsort(order))
    rows = rng.permutation(slide.transcripts.num_rows)
    own = PolygonIndex(segmentations[0].rings).locate(
        np.column_stack([slide.transcripts["x"].to_numpy(), slide.transcripts["y"].to_numpy()])
    )
    renamed = np.append(back[0], -1)[own]  # the first method says itself which cell, under the cells' new numbers
    parts = np.array_split(rows, 5)
    batches = [(slide.transcripts.take(part), [renamed[part], None, slide.true_cell[part]]) for part in parts]
    again = compare(shuffled, batches, truth=slide.truth)
    assert again.marker_pairs == plain.marker_pairs
    for name, values in plain.values.items():
        assert again.values[name] == pytest.approx(values, rel=1e-7), name
    for name, matrix in plain.matrices.items():
        np.testing.assert_allclose(again.matrices[name], matrix, rtol=1e-9)
    reverse = slide.compare(segmentations[::-1], truth=slide.truth)
    assert {name: values[::-1] for name, values in reverse.values.items()} == plain.values


def test_same_input_same_bytes(slide, tmp_path):
    tables = [slide.compare([slide.truth, slide.segmentation("m", merged(slide))]) for _ in range(2)]
    texts = [write_comparison(t, tmp_path / f"{k}.json").read_bytes() for k, t in enumerate(tables)]
    assert texts[0] == texts[1]


def test_json_holds_the_whole_table(compared, tmp_path):
    path = write_comparison(compared, tmp_path / "comparison.json")
    assert read_comparison(path).to_dict() == compared.to_dict()
    assert read_comparison(path).to_tsv() == compared.to_tsv()
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(CellquiltError) as caught:
        read_comparison(tmp_path / "broken.json")
    assert caught.value.code == "comparison-unreadable"


# --- what is missing is said


def test_without_cells_numbers_are_missing_not_zero(slide):
    none = Segmentation("none", np.zeros(0, dtype=object))
    table = slide.compare([slide.truth, none], truth=slide.truth)
    empty = {name: values[1] for name, values in table.values.items()}
    known = {name for name, value in empty.items() if value is not None}
    # No cells is a result: nothing is assigned, nothing is found.
    assert known == {"n_cells", "share_assigned", "control_rate_outside", "true_f1", "share_in_true_cell", "true_ari"}
    assert empty["n_cells"] == empty["share_assigned"] == empty["true_f1"] == 0
    assert table.values["rank"] == (1, None)
    assert "no cells by none: it is not ranked" in table.notes


def test_one_cell():
    table = pa.table({"x": [1.0, 2.0, 8.0], "y": [1.0, 2.0, 8.0], "gene": ["A", "B", "A"], "is_control": [False] * 3})
    found = compare([Segmentation("one", np.array([shapely.box(0, 0, 4, 4)]))], [(table, [None])])
    values = {name: column[0] for name, column in found.values.items()}
    assert values["n_cells"] == values["rank"] == 1
    assert values["share_assigned"] == pytest.approx(2 / 3)
    assert values["median_transcripts_per_cell"] == values["median_genes_per_cell"] == 2
    assert values["transcripts_per_100um2_of_cell"] == pytest.approx(12.5)
    assert values["median_area_um2"] == 16
    missing = {"coexpression_ratio", "mecr", "leakage", "leakage_standard_error", "control_rate_in_cells"}
    assert {name for name, value in values.items() if value is None} >= missing
    assert any("no pair of exclusive genes" in note for note in found.notes)
    assert any("no controls" in note for note in found.notes)
    assert any("leakage of one" in note for note in found.notes)


def test_without_transcripts_outlines_are_still_compared():
    cells = np.array([shapely.box(0, 0, 4, 4), shapely.box(4, 0, 8, 4)])
    found = compare([Segmentation("a", cells), Segmentation("b", cells[:1])], [])
    assert found.values["n_cells"] == (2, 1)
    assert found.values["share_assigned"] == found.values["information_bits"] == (None, None)
    assert found.matrices["outline_f1"][0, 1] == pytest.approx(2 / 3)
    assert np.isnan(found.matrices["ari"][0, 1])
    assert any("no transcripts" in note for note in found.notes)
    assert "outline" in render_methods(found).lower()


def test_cells_that_tell_nothing_are_said_to():
    rng = np.random.default_rng(0)
    n = 4000
    table = pa.table(
        {
            "x": rng.uniform(0, 100, n),
            "y": rng.uniform(0, 100, n),
            "gene": pa.array(rng.integers(0, 8, n).astype(str)),
            "is_control": np.zeros(n, dtype=bool),
        }
    )
    x, y = (grid.ravel() for grid in np.meshgrid(np.arange(0, 100, 10.0), np.arange(0, 100, 10.0)))
    found = compare([Segmentation("tiles", shapely.box(x, y, x + 10, y + 10))], [(table, [None])])
    assert abs(found.values["information_bits"][0]) < 0.01
    assert any("next to chance" in note for note in found.notes)


# --- pairs of exclusive genes


def test_derived_pairs_are_those_that_no_cell_type_has_together():
    slide = KnownSlide(0)
    gene = slide.transcripts["gene"].combine_chunks()
    names = gene.dictionary.to_pylist()
    table = slide.compare([slide.truth])
    assert len(table.marker_pairs) > 15
    assert table.marker_source == "derived"
    inside = slide.true_cell >= 0
    profiles = np.zeros((slide.kind.max() + 1, len(names)))
    np.add.at(profiles, (slide.kind[slide.true_cell[inside]], gene.indices.to_numpy()[inside]), 1)
    weight = profiles.sum(axis=1) / profiles.sum()
    profiles = profiles / np.maximum(profiles.sum(axis=1, keepdims=True), 1)
    mean = weight @ profiles
    a, b = (np.array([names.index(pair[k]) for pair in table.marker_pairs]) for k in (0, 1))
    ratio = (weight[:, None] * profiles[:, a] * profiles[:, b]).sum(axis=0) / (mean[a] * mean[b])
    assert np.median(ratio) < 0.4
    assert np.quantile(ratio, 0.9) < 0.8
    uses = np.unique([name for pair in table.marker_pairs for name in pair], return_counts=True)[1]
    assert uses.max() <= 5
    assert not any(name.startswith("Blank") for pair in table.marker_pairs for name in pair)


def test_derived_pairs_do_not_depend_on_the_methods(slide):
    one = slide.compare([slide.truth])
    other = slide.compare([slide.segmentation("random", scattered(slide)), slide.segmentation("split", split(slide))])
    assert one.marker_pairs == other.marker_pairs


def test_a_large_slide_is_thinned_by_places_and_seed(monkeypatch):
    rng = np.random.default_rng(0)
    x, y, gene = rng.uniform(0, 900, 20_000), rng.uniform(0, 900, 20_000), rng.integers(0, 3, 20_000)
    monkeypatch.setattr("cellquilt.comparison.markers._MAX_SAMPLE", 5000)

    def kept(seed: int) -> set:
        sample = SquareSample(20_000, seed)
        for part in np.array_split(np.arange(20_000), 3):
            sample.add(x[part], y[part], gene[part])
        xs, ys = (np.concatenate([part[k] for part in sample._parts]) for k in (0, 1))
        assert 3500 < len(xs) < 6500
        return set(zip((xs // 30).tolist(), (ys // 30).tolist(), strict=True)), len(xs)

    places, n = kept(1)
    assert kept(1) == (places, n)
    assert kept(2)[0] != places
    inside = [(a, b) in places for a, b in zip((x // 30).tolist(), (y // 30).tolist(), strict=True)]
    assert sum(inside) == n  # places are kept whole


def test_derived_pairs_of_a_real_slide_make_sense(shared_data):
    """Mouse liver: enzymes of hepatocytes against what vessels have."""
    import pyarrow.csv
    from cellquilt.core.genes import GeneNames

    table = pyarrow.csv.read_csv(shared_data / "merscope_liver" / "detected_transcripts.csv")
    control = np.array([name.startswith("Blank") for name in table["gene"].to_pylist()])
    names = GeneNames()
    code = names.encode(table["gene"], control)
    sample = SquareSample(table.num_rows)
    x, y = (table[name].to_numpy()[~control] for name in ("global_x", "global_y"))
    sample.add(x, y, code[~control])
    pairs = derive_pairs(sample, *names.sorted_columns())
    assert len(pairs) > 20
    hepatocyte = {"Alas1", "Acss2", "Sardh", "Pck1", "Fasn", "Errfi1", "Egfr", "Aldh3a2", "G6pc", "Acacb", "Fech"}
    vessel = {"Clec14a", "Stab2", "Kdr", "Esam", "Eng", "Ltbp4", "Hoxb4", "Nes", "Notch1", "Mrc1", "Flt4", "Bmp2"}
    expected = sum(1 for a, b in zip(pairs.a, pairs.b, strict=True) if {a, b} & hepatocyte and {a, b} & vessel)
    wrong = sum(1 for a, b in zip(pairs.a, pairs.b, strict=True) if {a, b} <= hepatocyte or {a, b} <= vessel)
    assert expected > 15
    assert wrong == 0


def test_pairs_from_a_file(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("note,gene_a,gene_b\n,B,A\nx,C,D\n,A,B\n\n")
    pairs = read_marker_pairs(path)
    assert (pairs.a, pairs.b, pairs.source) == (("A", "C"), ("B", "D"), "file")
    a, b = pairs.columns(["A", "B", "C"])
    assert (a.tolist(), b.tolist()) == ([0], [1])
    table = pa.table({"x": [1.0, 1.5], "y": [1.0, 1.0], "gene": ["A", "B"], "is_control": [False, False]})
    found = compare([Segmentation("m", np.array([shapely.box(0, 0, 2, 2)]))], [(table, [None])], pairs=pairs)
    assert found.values["mecr"] == (1,)
    assert found.marker_source == "file"
    assert "1 of 2 pairs of exclusive genes are on the panel" in found.notes
    with pytest.raises(CellquiltError) as caught:
        compare(
            [Segmentation("m", np.array([shapely.box(0, 0, 2, 2)]))],
            [(table, [None])],
            pairs=MarkerPairs(("Alb1",), ("Pecam",), "file"),
        )
    assert caught.value.code == "marker-genes-unknown"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a,b\n1,2\n", "no column gene_a and gene_b"),
        ("gene_a\tgene_b\nA\tA\n", "line 2 names one gene twice"),
        ("gene_a,gene_b\nA,B\nC\n", "line 3 lacks a gene"),
        ("gene_a,gene_b\n", "no pairs"),
        ("", "no column"),
    ],
)
def test_files_of_pairs_that_are_wrong(tmp_path, text, words):
    path = tmp_path / "pairs.csv"
    path.write_text(text)
    with pytest.raises(CellquiltError, match=words) as caught:
        read_marker_pairs(path)
    assert caught.value.code == "marker-pairs-invalid"


def test_missing_file_of_pairs(tmp_path):
    with pytest.raises(CellquiltError) as caught:
        read_marker_pairs(tmp_path / "none.csv")
    assert caught.value.code == "marker-pairs-unreadable"


def test_pairs_from_a_reference(tmp_path):
    import anndata
    import pandas as pd

    genes = ["A", "B", "C", "H", "X"]
    means = np.array([[10, 0.02, 0.02, 50, 5], [0.02, 8, 0.02, 50, 5], [0.02, 0.02, 4, 50, 5]])
    (tmp_path / "means.csv").write_text(
        "gene,one,two,three\n" + "".join(f"{g},{','.join(map(str, m))}\n" for g, m in zip(genes, means.T, strict=True))
    )
    found, profiles = read_reference(tmp_path / "means.csv")
    assert found == genes
    np.testing.assert_allclose(profiles, means / means.sum(axis=1, keepdims=True))
    pairs = pairs_from_reference(found, profiles, ["C", "H", "A", "B", "unknown"])
    assert list(zip(pairs.a, pairs.b, strict=True)) == [("A", "B"), ("A", "C"), ("B", "C")]  # the abundant ones first
    types = anndata.AnnData(means, var=pd.DataFrame(index=genes))
    types.write_h5ad(tmp_path / "types.h5ad")
    np.testing.assert_allclose(read_reference(tmp_path / "types.h5ad")[1], profiles)
    cells = anndata.AnnData(
        np.repeat(means, 2, axis=0) * np.array([1, 3, 1, 3, 1, 3])[:, None],
        obs=pd.DataFrame({"cell_type": list("aabbcc")}, index=list("uvwxyz")),
        var=pd.DataFrame(index=genes),
    )
    cells.write_h5ad(tmp_path / "cells.h5ad")
    np.testing.assert_allclose(read_reference(tmp_path / "cells.h5ad")[1], profiles)
    with pytest.raises(CellquiltError) as caught:
        pairs_from_reference(found, profiles, ["a", "b"])
    assert caught.value.code == "marker-genes-unknown"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("gene,one\nA,1\n", "reference-invalid"),  # one type
        ("gene,one,two\nA,1,-1\nB,1,1\n", "reference-invalid"),
        ("gene,one,two\nA,1,0\nB,1,0\n", "reference-invalid"),
        ("gene,one,two\nA,1,x\n", "reference-invalid"),
        ("gene,one,two\nA,1\nB,1,2\n", "reference-invalid"),
        (None, "reference-unreadable"),
    ],
)
def test_references_that_are_wrong(tmp_path, text, code):
    path = tmp_path / "reference.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(CellquiltError) as caught:
        read_reference(path)
    assert caught.value.code == code


# --- stores


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    return assemble_slide(make_parts(folder), folder / "s1.zarr", settings=Settings())


def test_numbers_of_a_published_store_are_those_of_its_qc(published):
    qc = compute_qc(View([published]))
    sources = [Source("cells", published), Source("nuclei", published, "nucleus_boundaries", None)]
    table = compare_stores(sources, settings=Settings())
    for name in ("n_cells", "share_assigned", "median_transcripts_per_cell", "median_genes_per_cell", "median_area_um2",
                 "control_rate_in_cells", "control_rate_outside"):  # fmt: skip
        assert column(table, name)["cells"] == pytest.approx(qc[name]), name
    assert table.sample == "s1"
    assert column(table, "median_area_um2")["nuclei"] == 25  # 10 × 10 px of 0.5 µm
    assert column(table, "median_transcripts_per_cell")["nuclei"] == 1
    assert column(table, "transcripts_per_100um2_of_cell")["cells"] == pytest.approx(263 / N_CELLS)
    assert table.matrices["outline_f1"][0, 1] == 0  # a quarter of the area


def test_a_slide_without_transcripts(tmp_path):
    store = assemble_slide(make_parts(tmp_path, points=False), tmp_path / "s1.zarr", settings=Settings())
    sources = [Source("cells", store), Source("nuclei", store, "nucleus_boundaries", None)]
    table = compare_stores(sources, settings=Settings())
    assert column(table, "n_cells") == {"cells": N_CELLS, "nuclei": N_CELLS}
    assert column(table, "share_assigned") == {"cells": None, "nuclei": None}
    assert column(table, "median_area_um2") == {"cells": 100, "nuclei": 25}
    assert any("no transcripts" in note for note in table.notes)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cohort") / "cohort"
    simulate(folder, width_px=512, slides=2, image=False, seed=3)
    return folder


def write_run(path, slide_folder, outlines_px, names, *, rows_a_batch, said=None):
    """A store as a run of the pipeline would publish it."""
    import pyarrow.parquet as pq

    pixel = json.loads((slide_folder / "truth" / "simulation.json").read_text())["parameters"]["pixel_size_um"]
    transforms = {"global": np.eye(3), "microns": np.diag([pixel, pixel, 1.0])}
    table = pq.read_table(slide_folder / "transcripts.parquet")
    n = table.num_rows
    xy = np.column_stack([table["x"].to_numpy(), table["y"].to_numpy()])
    cell = PolygonIndex(Rings.from_shapely(outlines_px)).locate(xy / pixel)
    ids = pa.array(names).take(pa.array(cell, mask=cell < 0))
    genes = table["gene"].cast(pa.string()).combine_chunks()
    control = np.array([name.startswith("Blank") for name in genes.to_pylist()])
    columns = {"x": xy[:, 0], "y": xy[:, 1], "gene": genes.dictionary_encode(), "is_control": control}
    points = pa.table({**columns, "transcript_id": np.arange(n, dtype=np.uint64)})
    with new_store(path, sample="slide") as store:
        element = store.new_element("shapes", "cell_boundaries")
        write_shapes(element, ShapesTable(np.array(names), outlines_px, {}, transforms))
        if said is None:
            points = points.append_column("cell_id", ids)
        else:
            with AssignmentWriter(element / ASSIGNMENT) as writer:
                writer.write(np.arange(n, dtype=np.uint64), said(cell))
        to_px = np.diag([1 / pixel, 1 / pixel, 1.0])
        maps = {"global": to_px, "microns": np.eye(3)}
        with PointsWriter(store.new_element("points", "transcripts"), maps) as writer:
            for start in range(0, n, rows_a_batch):
                writer.write(points.slice(start, rows_a_batch))
    return path


@pytest.fixture(scope="module")
def runs(cohort, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    outlines, _, _ = read_geoparquet(cohort / "slide_0/truth/cells.parquet")
    moved = shapely.transform(outlines, lambda xy: xy + 8.0)
    names = [f"slide-{k}" for k in range(len(outlines))]
    for name, cells, rows in (("exact", outlines, 3000), ("moved", moved, 7777)):
        (folder / name).mkdir()
        write_run(folder / name / "slide.zarr", cohort / "slide_0", cells, names, rows_a_batch=rows)
    return folder


def test_runs_of_one_slide_against_its_truth(runs, cohort):
    stores = [runs / name / "slide.zarr" for name in ("exact", "moved")]
    truth = cohort / "slide_0/truth"
    sources = [Source(path.parent.name, path) for path in stores]
    table = compare_stores(sources, settings=Settings(memory_mb=200), truth=truth)
    for k, store in enumerate(stores):
        scores = truth_scores(store, truth)
        assert table.values["true_f1"][k] == pytest.approx(scores["cells"]["f1_0.5"])
        for name, key in (("share_in_true_cell",) * 2, ("precision",) * 2, ("true_ari", "ari")):
            assert table.values[name][k] == pytest.approx(scores["transcripts"][key]), name
        assert table.values["share_assigned"][k] == pytest.approx(scores["transcripts"]["share_assigned"])
    assert table.values["rank"] == (1, 2)
    assert 0.3 < table.matrices["agreement"][0, 1] < 0.95
    with pytest.raises(CellquiltError) as caught:
        compare_stores(sources, settings=Settings(), truth=cohort / "slide_1/truth")
    assert caught.value.code == "truth-mismatch"


def test_what_a_method_says_of_its_transcripts_wins_over_its_outlines(runs, cohort, tmp_path):
    outlines, _, _ = read_geoparquet(cohort / "slide_0/truth/cells.parquet")
    names = [f"slide-{k}" for k in range(len(outlines))]

    def every_second(cell):
        said = np.where(np.arange(len(cell)) % 2 == 0, cell, NO_CELL)
        said[1::4] = NOT_SEGMENTED  # of these the outlines tell
        return said

    said = write_run(tmp_path / "s.zarr", cohort / "slide_0", outlines, names, rows_a_batch=5000, said=every_second)
    table = compare_stores([Source("all", runs / "exact/slide.zarr"), Source("said", said)], settings=Settings())
    share = table.values["share_assigned"]
    assert share[1] == pytest.approx(0.75 * share[0], abs=0.01)
    assert table.values["n_cells"][0] == table.values["n_cells"][1]


def test_stores_of_two_slides_are_refused(runs, cohort, tmp_path):
    outlines, _, _ = read_geoparquet(cohort / "slide_1/truth/cells.parquet")
    names = [f"slide-{k}" for k in range(len(outlines))]
    other = write_run(tmp_path / "o.zarr", cohort / "slide_1", outlines, names, rows_a_batch=5000)
    with pytest.raises(CellquiltError) as caught:
        compare_stores([Source("a", runs / "exact/slide.zarr"), Source("b", other)], settings=Settings())
    assert caught.value.code == "transcripts-differ"


def test_rows_of_names():
    ids = pa.array(["b", "a", "c"])
    plain = pa.chunked_array([["a", None], ["x", "c"]], pa.string())
    assert rows_of(plain, ids).tolist() == [1, -1, -1, 2]
    assert rows_of(plain.dictionary_encode(), ids).tolist() == [1, -1, -1, 2]
    assert rows_of(pa.chunked_array([], pa.string()), ids).tolist() == []
    assert rows_of(pa.chunked_array([[None, None]], pa.string()), ids).tolist() == [-1, -1]


def test_names_by_default(runs, published, tmp_path):
    stores = [runs / "exact/slide.zarr", runs / "moved/slide.zarr"]
    assert default_names(stores) == ["exact", "moved"]
    assert default_names([published, stores[0]])[0] != ""


# --- the page


class Page(HTMLParser):
    """Words and links, and tags that close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.links: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "wbr"):
            self.open.append(tag)
        self.links += [value for name, value in attributes if name in ("href", "src")]

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "script" not in self.open and "style" not in self.open:
            self.words.append(data)


def test_the_page_shows_both_sides_and_stands_alone(compared):
    html = render_methods(compared)
    page = Page(html)
    text = re.sub(r"\s+", " ", " ".join(page.words))
    for words in ("Sensitivity", "Contamination", "Against the truth", "Transcripts assigned", *compared.methods):
        assert words in text
    bits = column(compared, "information_bits")["truth"]
    assert f"{bits:.3g}" in text
    assert html.count('class="dot-mark"') == 12  # six methods in two charts
    assert html.count('class="ridge"') == 6
    assert html.count('class="heat"') == 3 * 30
    assert page.links == []
    assert "http" not in html.replace("http-equiv", "")
    data = json.loads(re.search(r'id="cellquilt-comparison">(.*?)</script>', html, re.DOTALL).group(1))
    assert data["comparison"] == json.loads(json.dumps(compared.to_dict()))


def test_names_of_methods_are_no_markup(slide):
    table = slide.compare([Segmentation("<b>&", slide.truth.geometry), Segmentation("x" * 60, slide.truth.geometry)])
    html = render_methods(table)
    Page(html)
    assert "<b>&" not in html
    assert "x" * 60 in html


def test_command_line(runs, cohort, tmp_path, capsys):
    out, page = tmp_path / "table.tsv", tmp_path / "page.html"
    stores = [str(runs / name / "slide.zarr") for name in ("exact", "moved")]
    with pytest.raises(SystemExit) as stop:
        main(["compare", *stores, "-o", str(out), "--html", str(page), "--truth", str(cohort / "slide_0/truth")])
    assert stop.value.code == 0
    rows = list(csv.DictReader(out.open(), delimiter="\t"))
    assert [row["method"] for row in rows] == ["exact", "moved"]
    assert float(rows[0]["true_f1"]) == 1
    assert list(rows[0])[1:] == [measure.name for measure in MEASURES]
    assert "exact" in page.read_text()
    assert str(tmp_path) not in page.read_text()
    for arguments, code in (
        ([stores[0], "-o", str(tmp_path / "t.tsv")], "methods-too-few"),
        ([*stores, "--shapes", "cell_boundaries", "-o", str(tmp_path / "t.tsv")], "usage"),
        ([*stores, "--names", "a", "-o", str(tmp_path / "t.tsv")], "method-names"),
        ([*stores, "-o", str(out)], "output-exists"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["compare", *arguments])
        assert stop.value.code == 1
        assert f"[{code}]" in capsys.readouterr().err


def test_two_elements_of_one_store(published, tmp_path):
    out = tmp_path / "table.tsv"
    with pytest.raises(SystemExit) as stop:
        main(["compare", str(published), "--shapes", "cell_boundaries,nucleus_boundaries", "-o", str(out)])
    assert stop.value.code == 0
    rows = list(csv.DictReader(out.open(), delimiter="\t"))
    assert [row["method"] for row in rows] == ["cell_boundaries", "nucleus_boundaries"]
    assert [row["n_cells"] for row in rows] == ["105", "105"]
