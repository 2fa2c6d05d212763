"""The graph against scipy, neighbourhoods against products of matrices, attention against whole matrices."""

import anndata
import cellquilt as cq
import numba
import numpy as np
import pytest
import torch
from cellquilt.core.errors import CellquiltError
from cellquilt.domains.neighbourhoods import at, make_batch, within
from cellquilt.domains.published.attention import CELL_DISTANCE_UM, Edges, Messages, Pooled, interleaved
from cellquilt.domains.published.lanes import everywhere, exponential, larger, load, over, store, total, where_positive
from cellquilt.geometry.neighbours import SpatialGraph, neighbour_graph, neighbours_in_grid
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix, identity
from scipy.spatial import Delaunay, cKDTree


def places(seed: int, n: int = 200, width: float = 200) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0, width, (n, 2))


def dense(graph: SpatialGraph) -> np.ndarray:
    return graph.to_csr().toarray()


def test_delaunay_edges_up_to_the_radius():
    xy = places(0)
    got = dense(neighbour_graph(xy, radius_um=25))
    want = np.zeros_like(got)
    for a, b, c in Delaunay(xy).simplices:
        for i, j in ((a, b), (b, c), (c, a)):
            length = np.hypot(*(xy[i] - xy[j]))
            want[i, j] = want[j, i] = length if length <= 25 else 0
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert (want > 0).sum() > 600


def test_nearest_neighbours_are_symmetric():
    xy = places(1)
    got = dense(neighbour_graph(xy, mode="knn", n_neighbours=4)) > 0
    want = np.zeros_like(got)
    want[np.repeat(np.arange(200), 4), cKDTree(xy).query(xy, 5)[1][:, 1:].ravel()] = True
    assert np.array_equal(got, want | want.T)


@pytest.mark.parametrize(("n_neighbours", "inner"), [(4, 4), (8, 8)])
def test_a_square_grid(n_neighbours, inner):
    xy = np.stack(np.meshgrid(np.arange(10), np.arange(10)), -1).reshape(-1, 2) * 8.0
    degree = neighbour_graph(xy, mode="grid", n_neighbours=n_neighbours).degree.reshape(10, 10)
    assert (degree[1:-1, 1:-1] == inner).all()
    assert degree[0, 0] == {4: 2, 8: 3}[n_neighbours]


def grid(kind: str, n: int = 20, pitch: float = 16.0, degrees: float = 0.0) -> np.ndarray:
    """(n², 2) places on squares or triangles, turned, in random order."""
    column, row = np.meshgrid(np.arange(n, dtype=float), np.arange(n, dtype=float))
    if kind == "triangles":
        column, row = column + 0.5 * (row % 2), row * np.sqrt(3) / 2
    angle = np.deg2rad(degrees)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    xy = np.stack([column, row], axis=-1).reshape(-1, 2) @ turn.T * pitch + 1000
    return np.random.default_rng(4).permutation(xy)


GRIDS = {"squares": 8, "triangles": 6}


@pytest.mark.parametrize("degrees", [0, 17, 45])
@pytest.mark.parametrize("pitch", [2.0, 16.0, 100.0])
@pytest.mark.parametrize("kind", GRIDS)
def test_grids_are_recognised(kind, pitch, degrees):
    xy, rng = grid(kind, pitch=pitch, degrees=degrees), np.random.default_rng(5)
    kept = rng.random(len(xy)) > 0.3
    jittered = xy + rng.normal(0, 0.01 * pitch, xy.shape)
    for places_ in (xy, xy[kept], jittered, np.round(xy * 40 / pitch)):
        assert neighbours_in_grid(places_) == GRIDS[kind]
    table = anndata.AnnData(np.ones((int(kept.sum()), 1), dtype=np.float32))
    table.obsm["spatial"] = xy[kept]
    cq.spatial_neighbors(table)  # also where the pitch is beyond the radius
    assert table.uns["spatial_neighbors"]["mode"] == "grid"
    reach = pitch * (1.3 * np.sqrt(2) if kind == "squares" else 1.3)
    near = np.linalg.norm(xy[kept][:, None] - xy[kept][None], axis=-1)
    want = (near > 0) & (near < reach)
    assert np.array_equal(table.obsp["spatial_distances"].toarray() > 0, want)


def test_what_is_no_grid(caplog):
    rng = np.random.default_rng(6)
    relaxed = rng.uniform(0, 300, (900, 2))
    for _ in range(300):  # cells that keep away from each other, as evenly as cells ever lie
        near, other = cKDTree(relaxed).query(relaxed, 7)
        away = relaxed[:, None] - relaxed[other[:, 1:]]
        relaxed = (relaxed + 0.3 * (away / near[:, 1:, None] ** 2).sum(axis=1)).clip(0, 300)
    line = np.column_stack([np.arange(50.0), np.zeros(50)])
    rows = np.stack(np.meshgrid(np.arange(20) * 10.0, np.arange(20) * 25.0), axis=-1).reshape(-1, 2)
    for xy in (places(1), relaxed, line, rows, np.zeros((50, 2)), grid("squares", 5), grid("squares")[:0]):
        assert neighbours_in_grid(xy) == 0
    for kind in GRIDS:
        shaken = grid(kind) + rng.normal(0, 2.5, (400, 2))
        assert neighbours_in_grid(shaken) == 0
        got, want = neighbour_graph(shaken, radius_um=80), neighbour_graph(shaken, mode="delaunay", radius_um=80)
        assert np.array_equal(got.indices, want.indices)
    table = anndata.AnnData(np.ones((400, 1), dtype=np.float32))
    table.obsm["spatial"] = grid("squares", pitch=1.0)
    with pytest.raises(CellquiltError, match="1 µm apart"):
        cq.spatial_neighbors(table)
    cq.spatial_neighbors(table, mode="grid")  # the user's word
    with caplog.at_level("INFO"):
        cq.spatial_neighbors(table, scale_to_um=55)
    assert "on a grid of squares" in caplog.text


def test_a_large_grid_and_one_of_two_slides():
    assert neighbours_in_grid(grid("squares", 200, degrees=3)) == 8
    assert neighbours_in_grid(grid("triangles", 200, degrees=3)) == 6
    table = anndata.AnnData(np.ones((600, 1), dtype=np.float32))
    table.obsm["spatial"] = np.concatenate([grid("triangles"), places(2)])
    table.obs["slide"] = ["a"] * 400 + ["b"] * 200
    cq.spatial_neighbors(table, slide_key="slide")
    assert table.uns["spatial_neighbors"]["mode"] == "auto"
    degree = np.diff(table.obsp["spatial_distances"].indptr)
    assert degree[:400].max() == 6
    assert degree[400:].max() > 6


def test_cells_in_one_place_and_on_a_line_keep_their_edges():
    xy = places(2, 30)
    graph = neighbour_graph(np.vstack([xy, xy[:3]]), radius_um=80)
    assert (graph.distance_um > 0).all()
    assert (graph.degree > 0).all()
    assert dense(graph)[0, 30] > 0
    line = neighbour_graph(np.column_stack([np.arange(6)[::-1] * 10.0, np.zeros(6)]))
    assert line.degree.tolist() == [1, 2, 2, 2, 2, 1]
    assert len(neighbour_graph(np.zeros((1, 2)))) == 1
    assert neighbour_graph(np.zeros((0, 2))).indices.size == 0


@given(st.integers(0, 2**32 - 1), st.integers(1, 4))
@settings(max_examples=20, deadline=None)
def test_hops_are_powers_of_the_graph(seed, hops):
    graph = neighbour_graph(places(seed, 60), radius_um=40)
    step = (graph.to_csr() > 0).astype(int) + identity(60, dtype=int)
    powers = [identity(60, dtype=int)]
    for _ in range(hops):
        powers.append((powers[-1] @ step > 0).astype(int))
    near, far = within(graph, hops), at(graph, hops)
    ones = [csr_matrix((np.ones(part.indices.size), part.indices, part.indptr), (60, 60)) for part in (near, far)]
    assert np.array_equal(ones[0].toarray() > 0, powers[-1].toarray() > 0)
    assert np.array_equal(ones[1].toarray() > 0, (powers[-1].toarray() > 0) & (powers[-2].toarray() == 0))


def test_a_batch_holds_the_induced_graphs():
    graph = neighbour_graph(places(3, 120), radius_um=40)
    near, whole = within(graph, 2), dense(graph)
    cells = np.array([5, 77, 5, 0])
    batch = make_batch(graph, near, cells)
    n = batch.ptr[-1]
    got = csr_matrix((batch.distance_um, batch.indices, batch.indptr), (n, n)).toarray()
    for p, cell in enumerate(cells):
        part = slice(batch.ptr[p], batch.ptr[p + 1])
        members = batch.cells[part]
        assert cell in members
        assert members.tolist() == near.indices[near.indptr[cell] : near.indptr[cell + 1]].tolist()
        assert np.array_equal(got[part, part], whole[np.ix_(members, members)].astype(np.float32))
        assert got[part].sum() == pytest.approx(got[part, part].sum())


def reference(sides, edge, attention, heads, batch):
    """z of `attention`, with whole matrices and the heads outermost, (n, heads, size)."""
    left, right = sides.chunk(2, dim=1)
    n, size = left.shape[0], left.shape[1] // heads
    connected = np.eye(n, dtype=bool)
    far = np.zeros((n, n))
    row = np.repeat(np.arange(n), np.diff(batch.indptr))
    connected[row, batch.indices], far[row, batch.indices] = True, batch.distance_um / CELL_DISTANCE_UM
    far[np.arange(n), np.arange(n)] = far.sum(axis=1) / np.maximum(connected.sum(axis=1) - 1, 1)
    value = left[None] + right[:, None] + edge * torch.from_numpy(far)[:, :, None]
    score = (torch.nn.functional.leaky_relu(value, 0.2) * attention).view(n, n, heads, size).sum(-1)
    weight = torch.softmax(score.masked_fill(~torch.from_numpy(connected)[:, :, None], -torch.inf), dim=1)
    return torch.einsum("ijh,jhc->ihc", weight, left.view(n, heads, size))


def messages_reference(sides, edge, attention, bias, heads, batch):
    return torch.nn.functional.elu(reference(sides, edge, attention, heads, batch).flatten(1) + bias)


def pooled_reference(sides, edge, attention, gate, heads, batch):
    z = reference(sides, edge, attention, heads, batch).mean(dim=1)
    parts = [z[a:b] for a, b in zip(batch.ptr[:-1], batch.ptr[1:], strict=True)]
    return torch.stack([torch.softmax(part @ gate, dim=0) @ part for part in parts])


@pytest.mark.parametrize("heads", [1, 3, 8])
@pytest.mark.parametrize("what", ["messages", "pooled"])
def test_attention_and_its_gradient_are_those_of_whole_matrices(what, heads):
    graph = neighbour_graph(places(4, 80), radius_um=50)
    batch = make_batch(graph, within(graph, 1), np.array([3, 50, 60]))
    generator = torch.Generator().manual_seed(0)
    n, size = int(batch.ptr[-1]), 6
    width = heads * size
    order = torch.from_numpy(interleaved(heads, size))
    numbers = {"sides": (n, 2 * width), "edge": (width,), "attention": (width,)}
    numbers["last"] = (width if what == "messages" else size,)
    given = {name: torch.randn(shape, generator=generator) for name, shape in numbers.items()}
    target = torch.randn((n, width) if what == "messages" else (3, size), generator=generator)

    def turned(name, part):
        """With the heads innermost."""
        if name == "sides":
            return torch.cat([half[:, order] for half in part.chunk(2, dim=1)], dim=1)
        return part[order] if len(part) == width else part

    found = []
    for exact in (True, False):
        parts = [(part.double() if exact else turned(name, part)).requires_grad_() for name, part in given.items()]
        if exact:
            out = (messages_reference if what == "messages" else pooled_reference)(*parts, heads, batch)
            (out * target).sum().backward()
            gradients = [turned(name, part.grad) for name, part in zip(given, parts, strict=True)]
            found.append([out.detach()[:, order] if what == "messages" else out.detach(), *gradients])
        else:
            out = (Messages if what == "messages" else Pooled).apply(*parts, heads, Edges.of(batch))
            wanted = target[:, order] if what == "messages" else target
            (out * wanted).sum().backward()
            found.append([out.detach(), *[part.grad for part in parts]])
    for exact, ours in zip(*found, strict=True):
        np.testing.assert_allclose(ours.numpy(), exact.numpy(), rtol=2e-4, atol=2e-4)
        assert exact.abs().max() > 0.01


def test_a_node_alone_looks_at_itself():
    graph = SpatialGraph.from_csr(csr_matrix((3, 3), dtype=np.float32))
    batch = make_batch(graph, within(graph, 2), np.array([1]))
    assert (batch.ptr.tolist(), batch.cells.tolist(), batch.indices.size) == ([0, 1], [1], 0)
    sides, ones = torch.randn(1, 12), torch.ones(6)
    out = Messages.apply(sides, ones, ones, torch.zeros(6), 1, Edges.of(batch))
    np.testing.assert_allclose(out, torch.nn.functional.elu(sides[:, :6]), rtol=1e-6, atol=1e-6)
    out = Pooled.apply(sides, ones, ones, ones, 1, Edges.of(batch))
    np.testing.assert_allclose(out, sides[:, :6], rtol=1e-6)


@pytest.mark.parametrize("heads", [1, 3, 8])
def test_vectors_over_heads_compute_as_numpy(heads):
    @numba.njit
    def do(a, b, out):
        for row in range(len(a)):
            x, y = load(a, row * heads, heads), load(b, row * heads, heads)
            store(out, 4 * row * heads, x * y - y + np.float32(2))
            store(out, (4 * row + 1) * heads, exponential(x) * over(everywhere(np.float32(2), heads)))
            store(out, (4 * row + 2) * heads, where_positive(x, larger(x, y), y))
            out[row, 3, 0] = total(y)

    rng = np.random.default_rng(0)
    a = np.linspace(-90, 88, 200 * heads, dtype=np.float32).reshape(200, heads)
    b = rng.normal(size=(200, heads)).astype(np.float32)
    out = np.zeros((200, 4, heads), dtype=np.float32)
    do(a, b, out)
    np.testing.assert_allclose(out[:, 0], a * b - b + 2, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(out[:, 1], np.exp(a.astype(np.float64)) / 2, rtol=4e-6, atol=1e-37)
    np.testing.assert_allclose(out[:, 2], np.where(a > 0, np.maximum(a, b), b))
    np.testing.assert_allclose(out[:, 3, 0], b.sum(axis=1), rtol=1e-5, atol=1e-6)
