"""Graph attention (GATv2) over many small graphs, forward and backward, in one pass over the edges.

For head h and edge j → i with length d (Brody et al. 2022, eq. 7, with edge features):

    s_ij = a_h · LeakyReLU(L_j + R_i + d w_e),   α_ij = softmax_j(s_ij),   out_i = Σ_j α_ij L_j

where L = W_l x, R = W_r x. Each node also has an edge to itself, whose length is the mean of its other edges', or 0.
Nothing larger than the nodes and one number a head and edge is held, and sums are in one order whatever the threads.

The numbers of L, R, w_e and a stand with the heads innermost (`interleaved`), so that a processor's vector is the same
number of all heads and sums over a head need no sum within a vector. The messages stand with the heads outermost, as
the weights of published checkpoints have them.
"""

import functools
from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray

_SLOPE = 0.2  # of LeakyReLU
#: Parts of a batch whose gradients are summed separately: fixed, so that the sum does not depend on threads.
_SLICES = 16


def interleaved(heads: int, size: int) -> NDArray[np.int64]:
    """(heads × size,) where each number of the interleaved order stands in the usual one."""
    return np.arange(heads * size).reshape(heads, size).T.ravel()


class GraphAttention(torch.autograd.Function):
    """See the module; `apply` takes L, R (n, heads × size), the edge weight and a (heads × size), and the graph."""

    @staticmethod
    def forward(ctx, left, right, edge_weight, attention, heads, ptr, indptr, indices, length, own_length):  # type: ignore[no-untyped-def]
        """(n, heads × size) messages."""
        arrays = [part.detach().contiguous().numpy() for part in (left, right, edge_weight, attention)]
        kernel = _kernels(heads, arrays[0].shape[1] // heads)[0]
        out = np.empty_like(arrays[0])
        # An edge more a node: to itself, the last.
        weights = np.empty((indices.size + indptr.size - 1, heads), dtype=arrays[0].dtype)
        kernel(*arrays, ptr, indptr, indices, length, own_length, out, weights)
        ctx.save_for_backward(left, right, edge_weight, attention)
        ctx.graph = (heads, ptr, indptr, indices, length, own_length, weights)
        return torch.from_numpy(out)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        """Gradients of L, R, the edge weight and a."""
        heads, ptr, indptr, indices, length, own_length, weights = ctx.graph
        arrays = [part.detach().contiguous().numpy() for part in ctx.saved_tensors]
        grad = grad.contiguous().numpy()
        width = arrays[0].shape[1]
        kernel = _kernels(heads, width // heads)[1]
        d_left, d_right = np.zeros_like(arrays[0]), np.zeros_like(arrays[1])
        d_edge = np.zeros((_SLICES, width), dtype=arrays[0].dtype)
        d_attention = np.zeros((_SLICES, width), dtype=arrays[0].dtype)
        kernel(*arrays, ptr, indptr, indices, length, own_length, weights, grad, d_left, d_right, d_edge, d_attention)
        found = (d_left, d_right, d_edge.sum(axis=0), d_attention.sum(axis=0))
        return *(torch.from_numpy(part) for part in found), None, None, None, None, None, None


def own_lengths(indptr: NDArray[np.int64], length: NDArray[np.floating]) -> NDArray[np.float32]:
    """(n,) float32 mean length of each node's edges, 0 where it has none."""
    total = np.add.reduceat(np.append(length, 0).astype(np.float64), np.minimum(indptr[:-1], length.size))
    number = np.diff(indptr)
    return np.where(number > 0, total / np.maximum(number, 1), 0).astype(np.float32)


@numba.njit(inline="always")
def _to_heads(part, heads, size):
    """The sum of each head's numbers, left in the first places."""
    for c in range(1, size):
        for h in range(heads):
            part[h] += part[c * heads + h]


@numba.njit(inline="always")
def _spread(weight, wide, heads, size):
    """A head's weight for each of its numbers."""
    for c in range(size):
        for h in range(heads):
            wide[c * heads + h] = weight[h]


@functools.cache
def _kernels(heads: int, size: int) -> tuple[Any, Any]:
    """Forward and backward for this number and size of heads: loops of known lengths become vector instructions.

    Every inner loop writes to one array only; where it wrote to more, the compiler would have to ask each time whether
    they overlap.
    """
    width = heads * size
    slope = np.float32(_SLOPE)
    # Values are finite: a model with others is refused. What the kernels close over must be numbers: they are compiled
    # once and kept on disk, by the values of these.
    options: dict[str, Any] = {"nogil": True, "parallel": True, "cache": True}
    options["fastmath"] = {"reassoc", "contract", "nsz", "arcp", "nnan", "ninf"}

    @numba.njit(**options)
    def forward(left, right, edge_weight, attention, ptr, indptr, indices, length, own_length, out, weights):
        for p in numba.prange(ptr.size - 1):
            best, total = np.empty(heads, dtype=np.float32), np.empty(heads, dtype=np.float32)
            part, wide = np.empty(width, dtype=np.float32), np.empty(width, dtype=np.float32)
            for i in range(ptr[p], ptr[p + 1]):
                first = indptr[i] + i  # each earlier node had one edge more
                number = indptr[i + 1] - indptr[i] + 1
                for h in range(heads):
                    best[h], total[h] = np.float32(-1e30), np.float32(0.0)
                for k in range(number):
                    j = i if k == number - 1 else indices[indptr[i] + k]
                    d = own_length[i] if k == number - 1 else length[indptr[i] + k]
                    for c in range(width):
                        value = left[j, c] + right[i, c] + edge_weight[c] * d
                        part[c] = attention[c] * max(value, slope * value)
                    _to_heads(part, heads, size)
                    for h in range(heads):
                        weights[first + k, h] = part[h]
                    for h in range(heads):
                        best[h] = max(best[h], part[h])
                for k in range(number):
                    for h in range(heads):
                        weights[first + k, h] = np.exp(weights[first + k, h] - best[h])
                    for h in range(heads):
                        total[h] += weights[first + k, h]
                for h in range(heads):
                    total[h] = np.float32(1.0) / total[h]
                for c in range(width):
                    part[c] = 0
                for k in range(number):
                    j = i if k == number - 1 else indices[indptr[i] + k]
                    for h in range(heads):
                        weights[first + k, h] *= total[h]
                    _spread(weights[first + k], wide, heads, size)
                    for c in range(width):
                        part[c] += wide[c] * left[j, c]
                for h in range(heads):
                    for c in range(size):
                        out[i, h * size + c] = part[c * heads + h]

    @numba.njit(**options)
    def backward(
        left, right, edge_weight, attention, ptr, indptr, indices, length, own_length, weights, grad,
        d_left, d_right, d_edge, d_attention,
    ):  # fmt: skip
        n_parts = ptr.size - 1
        for s in numba.prange(_SLICES):
            mean, step = np.empty(heads, dtype=np.float32), np.empty(width, dtype=np.float32)
            part, wide = np.empty(width, dtype=np.float32), np.empty(width, dtype=np.float32)
            mine, into = np.empty(width, dtype=np.float32), np.empty(width, dtype=np.float32)
            for i in range(ptr[s * n_parts // _SLICES], ptr[(s + 1) * n_parts // _SLICES]):
                first = indptr[i] + i
                number = indptr[i + 1] - indptr[i] + 1
                asked = np.empty((number, heads), dtype=np.float32)
                for h in range(heads):
                    mean[h] = 0
                    for c in range(size):
                        mine[c * heads + h] = grad[i, h * size + c]
                for k in range(number):
                    j = i if k == number - 1 else indices[indptr[i] + k]
                    for c in range(width):
                        part[c] = mine[c] * left[j, c]
                    _to_heads(part, heads, size)
                    for h in range(heads):
                        asked[k, h] = part[h]
                    for h in range(heads):
                        mean[h] += weights[first + k, h] * part[h]
                for c in range(width):
                    into[c] = 0
                for k in range(number):
                    j = i if k == number - 1 else indices[indptr[i] + k]
                    d = own_length[i] if k == number - 1 else length[indptr[i] + k]
                    _spread(weights[first + k], wide, heads, size)
                    for c in range(width):
                        d_left[j, c] += wide[c] * mine[c]
                    for h in range(heads):
                        asked[k, h] = weights[first + k, h] * (asked[k, h] - mean[h])
                    _spread(asked[k], wide, heads, size)
                    for c in range(width):
                        value = left[j, c] + right[i, c] + edge_weight[c] * d
                        part[c] = wide[c] * max(value, slope * value)
                        step[c] = wide[c] * attention[c] * (np.float32(1.0) if value > 0 else slope)
                    for c in range(width):
                        d_attention[s, c] += part[c]
                    for c in range(width):
                        d_left[j, c] += step[c]
                    for c in range(width):
                        d_edge[s, c] += step[c] * d
                    for c in range(width):
                        into[c] += step[c]
                for c in range(width):
                    d_right[i, c] = into[c]

    return forward, backward


def attention_by_torch(
    left: torch.Tensor,
    right: torch.Tensor,
    edge_weight: torch.Tensor,
    attention: torch.Tensor,
    heads: int,
    arrays: tuple[NDArray[Any], ...],
) -> torch.Tensor:
    """The same messages by tensor operations, for devices on which there are no kernels of ours."""
    _, indptr, indices, length, own_length = (torch.from_numpy(np.ascontiguousarray(part)) for part in arrays)
    n, width = left.shape
    nodes = torch.arange(n)
    target = torch.cat([torch.repeat_interleave(nodes, indptr.diff()), nodes]).to(left.device)
    source = torch.cat([indices, nodes]).to(left.device)
    far = torch.cat([length, own_length]).to(left.device, left.dtype)
    value = torch.nn.functional.leaky_relu(left[source] + right[target] + edge_weight * far[:, None], _SLOPE)
    score = (value * attention).view(-1, width // heads, heads).sum(dim=1)
    best = torch.full((n, heads), -torch.inf, device=left.device, dtype=score.dtype)
    best = best.scatter_reduce(0, target[:, None].expand_as(score), score.detach(), "amax")
    weight = torch.exp(score - best[target])
    total = torch.zeros_like(best).index_add(0, target, weight)
    share = (weight / total[target]).repeat(1, width // heads)
    messages = torch.zeros_like(left).index_add(0, target, share * left[source])
    return messages.view(n, width // heads, heads).transpose(1, 2).reshape(n, width)
