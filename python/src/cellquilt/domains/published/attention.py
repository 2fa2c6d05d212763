"""Graph attention (GATv2) over many small graphs, forward and backward, in one pass over the edges.

For head h and edge j → i with length d (Brody et al. 2022, eq. 7, with edge features):

    s_ij = a_h · LeakyReLU(L_j + R_i + d w_e),   α_ij = softmax_j(s_ij),   z_i = Σ_j α_ij L_j

where L = W_l x, R = W_r x. Each node also has an edge to itself, whose length is the mean of its other edges', or 0.
A layer among others gives ELU(z + b), `Messages`. Of the last one only a mean of its nodes is wanted: each graph's
mean of z over heads and nodes, nodes weighted by the softmax of their gates g · z. It is made without any z, `Pooled`:
what a node adds to the mean and to the gates is a sum over its own L.

All vectors over heads stand with the heads innermost (`interleaved`), so that a processor's vector is the same number
of all heads and sums over a head need no sum within a vector. Nothing larger than the nodes and one number a head and
edge is held, and sums are in one order whatever the threads.
"""

import functools
from dataclasses import dataclass
from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray

from cellquilt.domains.neighbourhoods import Batch
from cellquilt.domains.published.lanes import (
    everywhere,
    exponential,
    larger,
    load,
    over,
    store,
    total,
    where_positive,
)

#: Lengths of edges are given in units of this: about the distance of two cells.
CELL_DISTANCE_UM = 20.0
_SLOPE = 0.2  # of LeakyReLU
#: Parts of a batch whose gradients are summed separately: fixed, so that the sum does not depend on threads.
_SLICES = 16
_LOWEST = np.float32(-1e30)  # below any score


def interleaved(heads: int, size: int) -> NDArray[np.int64]:
    """(heads × size,) where each number of the interleaved order stands in the usual one."""
    return np.arange(heads * size).reshape(heads, size).T.ravel()


@dataclass(frozen=True)
class Edges:
    """A batch as the layers take it.

    Attributes
    ----------
    ptr
        (n_parts + 1,) int64: part p has the nodes ``ptr[p]:ptr[p + 1]``.
    indptr, indices
        (n_nodes + 1,) and (n_edges,) int64: the nodes that each node gets messages from, itself the last.
    length
        (n_edges,) float32 in cell distances.
    """

    ptr: NDArray[np.int64]
    indptr: NDArray[np.int64]
    indices: NDArray[np.int64]
    length: NDArray[np.float32]

    @classmethod
    def of(cls, batch: Batch) -> "Edges":
        """Of a batch's neighbourhoods."""
        return cls(batch.ptr, *_with_own(batch.indptr, batch.indices, batch.distance_um, CELL_DISTANCE_UM))

    @property
    def arrays(self) -> tuple[NDArray[Any], ...]:
        """As kernels take them."""
        return self.ptr, self.indptr, self.indices, self.length


@numba.njit(cache=True, nogil=True)
def _with_own(indptr, indices, distance_um, unit):
    n = indptr.size - 1
    out_indptr = indptr + np.arange(n + 1)
    out_indices = np.empty(indices.size + n, dtype=np.int64)
    length = np.empty(indices.size + n, dtype=np.float32)
    for i in range(n):
        to = out_indptr[i]
        summed = 0.0
        for e in range(indptr[i], indptr[i + 1]):
            out_indices[to] = indices[e]
            length[to] = distance_um[e] / unit
            summed += length[to]
            to += 1
        out_indices[to] = i
        length[to] = summed / max(indptr[i + 1] - indptr[i], 1)
    return out_indptr, out_indices, length


class Messages(torch.autograd.Function):
    """A layer: `apply` takes L and R side by side (n, 2 × heads × size), w_e, a and b (heads × size), and the graph."""

    @staticmethod
    def forward(ctx, sides, edge, attention, bias, heads, graph):  # type: ignore[no-untyped-def]
        """(n, heads × size) ELU(z + b)."""
        arrays = _numpy(sides, edge, attention, bias)
        out = np.empty((len(arrays[0]), len(arrays[1])), dtype=np.float32)
        weights = np.empty((graph.indices.size, heads), dtype=np.float32)
        _message_kernels(heads, out.shape[1] // heads)[0](*arrays, *graph.arrays, out, weights)
        found = torch.from_numpy(out)
        ctx.save_for_backward(sides, edge, attention, found)
        ctx.rest = heads, graph, weights
        return found

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        """Gradients of the numbers that `apply` takes."""
        heads, graph, weights = ctx.rest
        sides, edge, attention, out, grad = _numpy(*ctx.saved_tensors, grad)
        d_sides = np.empty_like(sides)
        d_edge, d_attention, d_bias = (np.zeros((_SLICES, edge.size), dtype=np.float32) for _ in range(3))
        _message_kernels(heads, edge.size // heads)[1](
            sides, edge, attention, *graph.arrays, weights, out, grad, d_sides, d_edge, d_attention, d_bias
        )
        found = (d_sides, d_edge.sum(axis=0), d_attention.sum(axis=0), d_bias.sum(axis=0))
        return *(torch.from_numpy(part) for part in found), None, None


class Pooled(torch.autograd.Function):
    """The last layer and the mean of its nodes: `apply` takes L and R, w_e, a, g (size,), and the graph."""

    @staticmethod
    def forward(ctx, sides, edge, attention, gate, heads, graph):  # type: ignore[no-untyped-def]
        """(n_parts, size)."""
        arrays = _numpy(sides, edge, attention, gate)
        out = np.empty((graph.ptr.size - 1, gate.shape[0]), dtype=np.float32)
        weights = np.empty((graph.indices.size, heads), dtype=np.float32)
        of_nodes = np.empty(len(arrays[0]), dtype=np.float32)
        _pooled_kernels(heads, out.shape[1])[0](*arrays, *graph.arrays, out, weights, of_nodes)
        ctx.save_for_backward(sides, edge, attention, gate)
        ctx.rest = heads, graph, weights, of_nodes
        return torch.from_numpy(out)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        """Gradients of the numbers that `apply` takes."""
        heads, graph, weights, of_nodes = ctx.rest
        sides, edge, attention, gate, grad = _numpy(*ctx.saved_tensors, grad)
        d_sides = np.empty_like(sides)
        d_edge, d_attention, d_gate = (np.zeros((_SLICES, edge.size), dtype=np.float32) for _ in range(3))
        _pooled_kernels(heads, gate.size)[1](
            sides, edge, attention, gate, *graph.arrays, weights, of_nodes, grad, d_sides, d_edge, d_attention, d_gate
        )
        of_gate = d_gate.sum(axis=0).reshape(gate.size, heads).sum(axis=1)
        found = (d_sides, d_edge.sum(axis=0), d_attention.sum(axis=0), of_gate)
        return *(torch.from_numpy(part) for part in found), None, None


def _numpy(*parts: torch.Tensor) -> list[NDArray[np.float32]]:
    return [part.detach().contiguous().numpy() for part in parts]


@numba.njit(inline="always")
def _shares(sides, edge, attention, indptr, indices, length, i, weights, heads, size):
    """Write α of all edges to node i."""
    width = heads * size
    slope = np.float32(_SLOPE)
    best = everywhere(_LOWEST, heads)
    for e in range(indptr[i], indptr[i + 1]):
        left, right, far = 2 * width * indices[e], 2 * width * i + width, length[e]
        score = everywhere(np.float32(0), heads)
        for c in range(0, width, heads):
            value = load(sides, left + c, heads) + load(sides, right + c, heads) + load(edge, c, heads) * far
            score = score + load(attention, c, heads) * larger(value, value * slope)
        store(weights, e * heads, score)
        best = larger(best, score)
    summed = everywhere(np.float32(0), heads)
    for e in range(indptr[i], indptr[i + 1]):
        share = exponential(load(weights, e * heads, heads) - best)
        store(weights, e * heads, share)
        summed = summed + share
    scale = over(summed)
    for e in range(indptr[i], indptr[i + 1]):
        store(weights, e * heads, load(weights, e * heads, heads) * scale)


@numba.njit(inline="always")
def _scores_backward(
    sides, edge, attention, indptr, indices, length, i, weights, asked, pulled, d_sides, d_edge, d_attention, s,
    heads, size,
):  # fmt: skip
    """From the gradients of the α of all edges to node i, `asked`, those of what its scores are made of.

    What i was sent also has the gradient `pulled`, where the layer gives messages.
    """
    width = heads * size
    slope = np.float32(_SLOPE)
    first = indptr[i]
    mean = everywhere(np.float32(0), heads)
    for e in range(first, indptr[i + 1]):
        mean = mean + load(weights, e * heads, heads) * load(asked, (e - first) * heads, heads)
    for e in range(first, indptr[i + 1]):
        own = (e - first) * heads
        store(asked, own, load(weights, e * heads, heads) * (load(asked, own, heads) - mean))
    for c in range(0, width, heads):
        right, by, each = load(sides, 2 * width * i + width + c, heads), load(edge, c, heads), load(attention, c, heads)
        pull = load(pulled, c, heads)
        of_right = everywhere(np.float32(0), heads)
        of_edge, of_attention = of_right, of_right
        for e in range(first, indptr[i + 1]):
            place, far = 2 * width * indices[e] + c, length[e]
            value = load(sides, place, heads) + right + by * far
            wanted = load(asked, (e - first) * heads, heads)
            step = where_positive(value, wanted, wanted * slope)
            of_right = of_right + step
            of_edge = of_edge + step * far
            of_attention = of_attention + step * value
            own = load(d_sides, place, heads) + load(weights, e * heads, heads) * pull + each * step
            store(d_sides, place, own)
        store(d_sides, 2 * width * i + width + c, each * of_right)
        here = s * width + c
        store(d_edge, here, load(d_edge, here, heads) + each * of_edge)
        store(d_attention, here, load(d_attention, here, heads) + of_attention)


@numba.njit(cache=True)
def _most(indptr):
    """The most entries that a row has."""
    most = 0
    for i in range(indptr.size - 1):
        most = max(most, indptr[i + 1] - indptr[i])
    return most


# Numbers and sizes of heads are known when kernels are compiled: loops of known lengths become straight instructions.
# What kernels close over must be numbers: they are kept on disk by the values of these.
_OPTIONS: dict[str, Any] = {"nogil": True, "parallel": True, "cache": True}


@functools.cache
def _message_kernels(heads: int, size: int) -> tuple[Any, Any]:
    """Forward and backward of `Messages`."""
    width = heads * size

    @numba.njit(**_OPTIONS)
    def forward(sides, edge, attention, bias, ptr, indptr, indices, length, out, weights):
        for p in numba.prange(ptr.size - 1):
            nothing = everywhere(np.float32(0), heads)
            for i in range(ptr[p], ptr[p + 1]):
                _shares(sides, edge, attention, indptr, indices, length, i, weights, heads, size)
                for c in range(0, width, heads):
                    z = load(bias, c, heads)
                    for e in range(indptr[i], indptr[i + 1]):
                        z = z + load(weights, e * heads, heads) * load(sides, 2 * width * indices[e] + c, heads)
                    below = exponential(z - larger(z, nothing)) - np.float32(1)
                    store(out, i * width + c, where_positive(z, z, below))

    @numba.njit(**_OPTIONS)
    def backward(
        sides, edge, attention, ptr, indptr, indices, length, weights, out, grad, d_sides, d_edge, d_attention, d_bias
    ):
        n_parts = ptr.size - 1
        most = _most(indptr)
        for s in numba.prange(_SLICES):
            asked, pulled = np.empty((most, heads), dtype=np.float32), np.empty(width, dtype=np.float32)
            for i in range(ptr[s * n_parts // _SLICES], ptr[(s + 1) * n_parts // _SLICES]):
                d_sides[i, :width] = 0
            for i in range(ptr[s * n_parts // _SLICES], ptr[(s + 1) * n_parts // _SLICES]):
                for c in range(0, width, heads):
                    y, pull = load(out, i * width + c, heads), load(grad, i * width + c, heads)
                    pull = where_positive(y, pull, pull * (y + np.float32(1)))
                    store(pulled, c, pull)
                    store(d_bias, s * width + c, load(d_bias, s * width + c, heads) + pull)
                for e in range(indptr[i], indptr[i + 1]):
                    found = everywhere(np.float32(0), heads)
                    for c in range(0, width, heads):
                        found = found + load(pulled, c, heads) * load(sides, 2 * width * indices[e] + c, heads)
                    store(asked, (e - indptr[i]) * heads, found)
                _scores_backward(
                    sides, edge, attention, indptr, indices, length, i, weights, asked, pulled,
                    d_sides, d_edge, d_attention, s, heads, size,
                )  # fmt: skip

    return forward, backward


@functools.cache
def _pooled_kernels(heads: int, size: int) -> tuple[Any, Any]:
    """Forward and backward of `Pooled`."""
    width = heads * size
    each = np.float32(1 / heads)

    @numba.njit(**_OPTIONS)
    def forward(sides, edge, attention, gate, ptr, indptr, indices, length, out, weights, of_nodes):
        most = _most(ptr)
        for p in numba.prange(ptr.size - 1):
            nothing = everywhere(np.float32(0), heads)
            first, end = ptr[p], ptr[p + 1]
            gates, parts = np.empty((most, heads), dtype=np.float32), np.zeros((most, heads), dtype=np.float32)
            for j in range(first, end):
                own = nothing
                for c in range(size):
                    own = own + load(sides, 2 * width * j + c * heads, heads) * gate[c]
                store(gates, (j - first) * heads, own * each)
            best = _LOWEST
            for i in range(first, end):
                _shares(sides, edge, attention, indptr, indices, length, i, weights, heads, size)
                own = nothing
                for e in range(indptr[i], indptr[i + 1]):
                    own = own + load(weights, e * heads, heads) * load(gates, (indices[e] - first) * heads, heads)
                of_nodes[i] = total(own)
                best = max(best, of_nodes[i])
            summed = np.float32(0)
            for i in range(first, end):
                of_nodes[i] = np.exp(of_nodes[i] - best)
                summed += of_nodes[i]
            for i in range(first, end):
                of_nodes[i] /= summed
                for e in range(indptr[i], indptr[i + 1]):
                    place = (indices[e] - first) * heads
                    store(parts, place, load(parts, place, heads) + load(weights, e * heads, heads) * of_nodes[i])
            for c in range(size):
                mean = nothing
                for j in range(first, end):
                    mean = mean + load(parts, (j - first) * heads, heads) * load(
                        sides, 2 * width * j + c * heads, heads
                    )
                out[p, c] = total(mean) * each

    @numba.njit(**_OPTIONS)
    def backward(
        sides, edge, attention, gate, ptr, indptr, indices, length, weights, of_nodes, grad,
        d_sides, d_edge, d_attention, d_gate,
    ):  # fmt: skip
        n_parts = ptr.size - 1
        most, nodes = _most(indptr), _most(ptr)
        for s in numba.prange(_SLICES):
            nothing = everywhere(np.float32(0), heads)
            asked, pulled = np.empty((most, heads), dtype=np.float32), np.zeros(width, dtype=np.float32)
            # Of each node: what its L adds to the gates, and to the loss; and how much L adds to the mean, and to the
            # gates, by the nodes that it is sent to.
            gates, wanted = np.empty((nodes, heads), dtype=np.float32), np.empty((nodes, heads), dtype=np.float32)
            parts, opened = np.empty((nodes, heads), dtype=np.float32), np.empty((nodes, heads), dtype=np.float32)
            of_gates = np.empty(nodes, dtype=np.float32)
            for p in range(s * n_parts // _SLICES, (s + 1) * n_parts // _SLICES):
                first, end = ptr[p], ptr[p + 1]
                for j in range(first, end):
                    own, towards = nothing, nothing
                    for c in range(size):
                        left = load(sides, 2 * width * j + c * heads, heads)
                        own = own + left * gate[c]
                        towards = towards + left * grad[p, c]
                    store(gates, (j - first) * heads, own * each)
                    store(wanted, (j - first) * heads, towards * each)
                    store(parts, (j - first) * heads, nothing)
                    store(opened, (j - first) * heads, nothing)
                mean = np.float32(0)
                for i in range(first, end):
                    own = nothing
                    for e in range(indptr[i], indptr[i + 1]):
                        own = own + load(weights, e * heads, heads) * load(wanted, (indices[e] - first) * heads, heads)
                    of_gates[i - first] = total(own)
                    mean += of_nodes[i] * of_gates[i - first]
                for i in range(first, end):
                    of_gates[i - first] = of_nodes[i] * (of_gates[i - first] - mean)
                    for e in range(indptr[i], indptr[i + 1]):
                        place, share = (indices[e] - first) * heads, load(weights, e * heads, heads) * each
                        store(parts, place, load(parts, place, heads) + share * of_nodes[i])
                        store(opened, place, load(opened, place, heads) + share * of_gates[i - first])
                for j in range(first, end):
                    part, gated = load(parts, (j - first) * heads, heads), load(opened, (j - first) * heads, heads)
                    for c in range(size):
                        place, here = 2 * width * j + c * heads, s * width + c * heads
                        store(d_sides, place, part * grad[p, c] + gated * gate[c])
                        store(d_gate, here, load(d_gate, here, heads) + gated * load(sides, place, heads))
                for i in range(first, end):
                    for e in range(indptr[i], indptr[i + 1]):
                        place = (indices[e] - first) * heads
                        found = (
                            load(wanted, place, heads) * of_nodes[i] + load(gates, place, heads) * of_gates[i - first]
                        )
                        store(asked, (e - indptr[i]) * heads, found)
                    _scores_backward(
                        sides, edge, attention, indptr, indices, length, i, weights, asked, pulled,
                        d_sides, d_edge, d_attention, s, heads, size,
                    )  # fmt: skip

    return forward, backward


def _attend_by_torch(
    sides: torch.Tensor, edge: torch.Tensor, attention: torch.Tensor, heads: int, graph: Edges
) -> torch.Tensor:
    """(n, heads × size) z by tensor operations."""
    _, indptr, source, length = (torch.from_numpy(part).to(sides.device) for part in graph.arrays)
    left, right = sides.chunk(2, dim=1)
    n, width = left.shape
    target = torch.repeat_interleave(torch.arange(n, device=sides.device), indptr.diff())
    value = left[source] + right[target] + edge * length.to(left.dtype)[:, None]
    score = (torch.nn.functional.leaky_relu(value, _SLOPE) * attention).view(-1, width // heads, heads).sum(dim=1)
    share = _softmax(score, target, n).repeat(1, width // heads)
    return torch.zeros_like(left).index_add(0, target, share * left[source])


def _softmax(score: torch.Tensor, group: torch.Tensor, n: int) -> torch.Tensor:
    """The softmax of the rows of each group."""
    best = score.new_full((n, score.shape[1]), -torch.inf)
    best = best.scatter_reduce(0, group[:, None].expand_as(score), score.detach(), "amax")
    weight = torch.exp(score - best[group])
    return weight / torch.zeros_like(best).index_add(0, group, weight)[group]


def messages_by_torch(
    sides: torch.Tensor, edge: torch.Tensor, attention: torch.Tensor, bias: torch.Tensor, heads: int, graph: Edges
) -> torch.Tensor:
    """`Messages` by tensor operations, for devices on which there are no kernels of ours."""
    return torch.nn.functional.elu(_attend_by_torch(sides, edge, attention, heads, graph) + bias)


def pooled_by_torch(
    sides: torch.Tensor, edge: torch.Tensor, attention: torch.Tensor, gate: torch.Tensor, heads: int, graph: Edges
) -> torch.Tensor:
    """`Pooled` by tensor operations."""
    z = _attend_by_torch(sides, edge, attention, heads, graph).view(len(sides), -1, heads).mean(dim=2)
    n_parts = graph.ptr.size - 1
    part = torch.from_numpy(np.repeat(np.arange(n_parts), np.diff(graph.ptr))).to(z.device)
    weight = _softmax((z @ gate.to(z.dtype))[:, None], part, n_parts)
    return z.new_zeros(n_parts, z.shape[1]).index_add(0, part, z * weight)
