"""Graph attention (GATv2) over many small graphs, forward and backward, in one pass over the edges.

For head h and edge j → i with length d (Brody et al. 2022, eq. 7, with edge features):

    s_ij = a_h · LeakyReLU(L_j + R_i + d w_e),   α_ij = softmax_j(s_ij),   out_i = Σ_j α_ij L_j

where L = W_l x, R = W_r x. Each node also has an edge to itself, whose length is the mean of its other edges', or 0.
Nothing larger than the nodes and one number a head and edge is held, and sums are in one order whatever the threads.
"""

from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray

_SLOPE = 0.2  # of LeakyReLU
#: Parts of a batch whose gradients are summed separately: fixed, so that the sum does not depend on threads.
_SLICES = 16


class GraphAttention(torch.autograd.Function):
    """See the module; `apply` takes L, R (n, heads × width), the edge weight and a (heads × width), and the graph."""

    @staticmethod
    def forward(ctx, left, right, edge_weight, attention, heads, ptr, indptr, indices, length, own_length):  # type: ignore[no-untyped-def]
        """(n, heads × width) messages."""
        arrays = [part.detach().contiguous().numpy() for part in (left, right, edge_weight, attention)]
        kernel: Any = _forward
        out = np.empty_like(arrays[0])
        # An edge more a node: to itself, the last.
        weights = np.empty((indices.size + indptr.size - 1, heads), dtype=arrays[0].dtype)
        kernel(*arrays, heads, ptr, indptr, indices, length, own_length, out, weights)
        ctx.save_for_backward(left, right, edge_weight, attention)
        ctx.graph = (heads, ptr, indptr, indices, length, own_length, weights)
        return torch.from_numpy(out)

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        """Gradients of L, R, the edge weight and a."""
        heads, ptr, indptr, indices, length, own_length, weights = ctx.graph
        arrays = [part.detach().contiguous().numpy() for part in ctx.saved_tensors]
        grad = grad.contiguous().numpy()
        kernel: Any = _backward
        d_left, d_right = np.zeros_like(arrays[0]), np.zeros_like(arrays[1])
        width = arrays[0].shape[1]
        d_edge = np.zeros((_SLICES, width), dtype=arrays[0].dtype)
        d_attention = np.zeros((_SLICES, width), dtype=arrays[0].dtype)
        kernel(
            *arrays, heads, ptr, indptr, indices, length, own_length, weights, grad,
            d_left, d_right, d_edge, d_attention,
        )  # fmt: skip
        found = (d_left, d_right, d_edge.sum(axis=0), d_attention.sum(axis=0))
        return *(torch.from_numpy(part) for part in found), None, None, None, None, None, None


def own_lengths(indptr: NDArray[np.int64], length: NDArray[np.floating]) -> NDArray[np.float32]:
    """(n,) float32 mean length of each node's edges, 0 where it has none."""
    total = np.add.reduceat(np.append(length, 0).astype(np.float64), np.minimum(indptr[:-1], length.size))
    number = np.diff(indptr)
    return np.where(number > 0, total / np.maximum(number, 1), 0).astype(np.float32)


@numba.njit(cache=True, nogil=True, parallel=True, fastmath={"reassoc", "contract", "nsz", "arcp"})
def _forward(left, right, edge_weight, attention, heads, ptr, indptr, indices, length, own_length, out, weights):
    size = left.shape[1] // heads
    for p in numba.prange(ptr.size - 1):
        for i in range(ptr[p], ptr[p + 1]):
            first = indptr[i] + i  # each earlier node had one edge more
            number = indptr[i + 1] - indptr[i] + 1
            for h in range(heads):
                low, high = h * size, (h + 1) * size
                best = np.float32(-np.inf)
                for k in range(number):
                    j = i if k == number - 1 else indices[indptr[i] + k]
                    d = own_length[i] if k == number - 1 else length[indptr[i] + k]
                    score = np.float32(0.0)
                    for c in range(low, high):
                        value = left[j, c] + right[i, c] + edge_weight[c] * d
                        score += attention[c] * max(value, np.float32(_SLOPE) * value)
                    weights[first + k, h] = score
                    best = max(best, score)
                total = np.float32(0.0)
                for k in range(number):
                    weights[first + k, h] = np.exp(weights[first + k, h] - best)
                    total += weights[first + k, h]
                for c in range(low, high):
                    out[i, c] = 0
                for k in range(number):
                    j = i if k == number - 1 else indices[indptr[i] + k]
                    weights[first + k, h] /= total
                    share = weights[first + k, h]
                    for c in range(low, high):
                        out[i, c] += share * left[j, c]


@numba.njit(cache=True, nogil=True, parallel=True, fastmath={"reassoc", "contract", "nsz", "arcp"})
def _backward(
    left, right, edge_weight, attention, heads, ptr, indptr, indices, length, own_length, weights, grad,
    d_left, d_right, d_edge, d_attention,
):  # fmt: skip
    size = left.shape[1] // heads
    n_parts = ptr.size - 1
    for s in numba.prange(_SLICES):
        for p in range(s * n_parts // _SLICES, (s + 1) * n_parts // _SLICES):
            for i in range(ptr[p], ptr[p + 1]):
                first = indptr[i] + i
                number = indptr[i + 1] - indptr[i] + 1
                for h in range(heads):
                    low, high = h * size, (h + 1) * size
                    mean = np.float32(0.0)
                    for k in range(number):
                        j = i if k == number - 1 else indices[indptr[i] + k]
                        part = np.float32(0.0)
                        for c in range(low, high):
                            part += grad[i, c] * left[j, c]
                        mean += weights[first + k, h] * part
                    for k in range(number):
                        j = i if k == number - 1 else indices[indptr[i] + k]
                        d = own_length[i] if k == number - 1 else length[indptr[i] + k]
                        share = weights[first + k, h]
                        part = np.float32(0.0)
                        for c in range(low, high):
                            part += grad[i, c] * left[j, c]
                        d_score = share * (part - mean)
                        for c in range(low, high):
                            value = left[j, c] + right[i, c] + edge_weight[c] * d
                            slope = np.float32(1.0) if value > 0 else np.float32(_SLOPE)
                            step = d_score * attention[c] * slope
                            d_right[i, c] += step
                            d_left[j, c] += step + share * grad[i, c]
                            d_edge[s, c] += step * d
                            d_attention[s, c] += d_score * value * slope


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
    score = (value * attention).view(-1, heads, width // heads).sum(dim=2)
    best = torch.full((n, heads), -torch.inf, device=left.device, dtype=score.dtype)
    best = best.scatter_reduce(0, target[:, None].expand_as(score), score.detach(), "amax")
    weight = torch.exp(score - best[target])
    total = torch.zeros_like(best).index_add(0, target, weight)
    share = (weight / total[target]).repeat_interleave(width // heads, dim=1)
    return torch.zeros_like(left).index_add(0, target, share * left[source])
