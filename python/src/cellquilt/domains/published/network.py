"""The network: gene panel → cell embedding → graph attention → one latent a neighbourhood → prototypes.

The parts and the names of their parameters are those of published checkpoints (Blampey et al., Nature Methods 2025), so
that these load as they are. `Architecture` says how large they are.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from cellquilt.domains.neighbourhoods import Batch
from cellquilt.domains.published.attention import GraphAttention, attention_by_torch, interleaved, own_lengths

#: Lengths of edges are given in units of this: about the distance of two cells.
CELL_DISTANCE_UM = 20.0
_PROTOTYPES = "swav_head._prototypes"  # as published checkpoints call them


@dataclass(frozen=True)
class Architecture:
    """Sizes of the network.

    Attributes
    ----------
    embedding_size
        Numbers that a gene, and a cell, is embedded in.
    hidden_size, heads, num_layers
        Of the graph attention: a layer has `heads` heads of ``hidden_size / heads`` numbers.
    output_size
        Numbers of a latent; the last layer's heads have so many each and are averaged.
    histo_embedding_size
        Numbers of an image embedding, where there are any.
    num_prototypes
        How many prototypes.
    """

    embedding_size: int = 100
    hidden_size: int = 128
    heads: int = 8
    num_layers: int = 10
    output_size: int = 64
    histo_embedding_size: int = 50
    num_prototypes: int = 512

    def to_dict(self) -> dict[str, int]:
        """As plain data."""
        return asdict(self)


class CellEmbedder(nn.Module):
    """Cells of any panel as vectors: expression times what is learned of the panel's genes.

    ``h = x Û``, where U = W V[panel] + b and every column of Û is a column of U over its norm.
    """

    def __init__(self, n_genes: int, size: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(n_genes, size)
        self.linear = nn.Linear(size, size)
        with torch.no_grad():
            self.linear.weight.copy_(torch.eye(size))
            self.linear.bias.zero_()

    def panel(self, genes: Tensor) -> Tensor:
        """(n_panel, size) weights of the panel's genes."""
        return F.normalize(self.linear(self.embedding(genes)), dim=0, p=2)

    def forward(self, expression: Tensor, genes: Tensor) -> Tensor:
        """(n_cells, size) of expression (n_cells, n_panel) of genes (n_panel,), numbers in the vocabulary."""
        return expression @ self.panel(genes)


class AttentionLayer(nn.Module):
    """A layer of graph attention; see `attention`. Heads stand side by side, or are averaged."""

    def __init__(self, inputs: int, size: int, heads: int, concat: bool) -> None:
        super().__init__()
        self.heads, self.size, self.concat = heads, size, concat
        self.lin_l = nn.Linear(inputs, heads * size)
        self.lin_r = nn.Linear(inputs, heads * size)
        self.lin_edge = nn.Linear(1, heads * size, bias=False)
        self.att = nn.Parameter(torch.empty(1, heads, size))
        self.order = torch.from_numpy(interleaved(heads, size))
        self.bias = nn.Parameter(torch.zeros(heads * size if concat else size))
        for part in (self.lin_l, self.lin_r, self.lin_edge):
            nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        nn.init.xavier_uniform_(self.att)

    def sides(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The two projections of nodes (n, inputs), each (n, heads × size), with the heads innermost."""
        left, right = self.lin_l, self.lin_r
        return F.linear(x, left.weight[self.order], left.bias[self.order]), F.linear(
            x, right.weight[self.order], right.bias[self.order]
        )

    def attend(self, left: Tensor, right: Tensor, graph: "Edges") -> Tensor:
        """(n, heads × size or size) from the two projections of the nodes."""
        learned = self.lin_edge.weight[self.order, 0], self.att.reshape(-1)[self.order]
        if left.device.type == "cpu":
            out = GraphAttention.apply(left, right, *learned, self.heads, *graph.arrays)
        else:
            out = attention_by_torch(left, right, *learned, self.heads, graph.arrays)
        if not self.concat:
            out = out.view(-1, self.heads, self.size).mean(dim=1)
        return out + self.bias

    def forward(self, x: Tensor, graph: "Edges") -> Tensor:
        """(n, heads × size or size) of nodes (n, inputs)."""
        return self.attend(*self.sides(x), graph)


@dataclass(frozen=True)
class Edges:
    """A batch as the layers take it: lengths of edges in cell distances, and nodes with an edge to themselves."""

    arrays: tuple[NDArray[Any], ...]

    @classmethod
    def of(cls, batch: Batch) -> "Edges":
        """Of a batch's neighbourhoods."""
        length = (batch.distance_um / np.float32(CELL_DISTANCE_UM)).astype(np.float32)
        return cls((batch.ptr, batch.indptr, batch.indices, length, own_lengths(batch.indptr, length)))


class _Layers(nn.Module):
    def __init__(self, sizes: Architecture) -> None:
        super().__init__()
        inputs = [sizes.embedding_size, *[sizes.hidden_size] * (sizes.num_layers - 1)]
        self.convs = nn.ModuleList(
            AttentionLayer(size, sizes.hidden_size // sizes.heads, sizes.heads, concat=True) for size in inputs[:-1]
        )
        self.convs.append(AttentionLayer(inputs[-1], sizes.output_size, sizes.heads, concat=False))


class _Pooling(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.gate_nn = nn.Linear(size, 1)
        self.nn = nn.Linear(size, size)


class _Aggregation(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.attention_aggregation = _Pooling(size)


class Encoder(nn.Module):
    """Neighbourhoods as latents: attention layers, then a weighted mean of the nodes, then perhaps the image's part."""

    def __init__(self, sizes: Architecture) -> None:
        super().__init__()
        self.gnn = _Layers(sizes)
        self.node_aggregation = _Aggregation(sizes.output_size)
        both = sizes.histo_embedding_size + sizes.output_size
        self.mlp_fusion = nn.Sequential(
            nn.Linear(both, both),
            nn.ReLU(),
            nn.Linear(both, sizes.output_size),
            nn.ReLU(),
            nn.Linear(sizes.output_size, sizes.output_size),
        )

    @property
    def first(self) -> AttentionLayer:
        """The first layer, whose projections of a cell are the same in all neighbourhoods that it is in."""
        return self.gnn.convs[0]  # type: ignore[return-value]

    def forward(self, left: Tensor, right: Tensor, batch: Batch, image: Tensor | None = None) -> Tensor:
        """Latents of a batch of neighbourhoods.

        Parameters
        ----------
        left, right
            (n_nodes, hidden) projections by the `first` layer of the batch's nodes.
        batch
            The neighbourhoods.
        image
            (n_parts, histo_embedding_size) what the image shows around each.

        Returns
        -------
        torch.Tensor
            (n_parts, output_size).
        """
        graph = Edges.of(batch)
        x = self.first.attend(left, right, graph)
        for layer in list(self.gnn.convs)[1:]:
            x = layer(F.elu(x), graph)
        pooling = self.node_aggregation.attention_aggregation
        part = torch.from_numpy(np.repeat(np.arange(batch.ptr.size - 1), np.diff(batch.ptr)))
        out = _weighted_mean(pooling.nn(x), pooling.gate_nn(x)[:, 0], part, batch.ptr.size - 1)
        return out if image is None else self.mlp_fusion(torch.cat([out, image], dim=-1))


def _weighted_mean(x: Tensor, gate: Tensor, part: Tensor, n_parts: int) -> Tensor:
    """(n_parts, size) mean of the nodes of each part, weighted by the softmax of their gates."""
    part = part.to(x.device)
    best = gate.new_full((n_parts,), -torch.inf).scatter_reduce(0, part, gate.detach(), "amax")
    weight = torch.exp(gate - best[part])
    total = gate.new_zeros(n_parts).index_add(0, part, weight)
    return x.new_zeros(n_parts, x.shape[1]).index_add(0, part, x * (weight / total[part])[:, None])


class Network(nn.Module):
    """All of it.

    Parameters
    ----------
    n_genes
        Genes of the vocabulary; 0 where cells come embedded.
    sizes
        How large the parts are.
    """

    def __init__(self, n_genes: int, sizes: Architecture) -> None:
        super().__init__()
        self.sizes = sizes
        self.cell_embedder = CellEmbedder(n_genes, sizes.embedding_size) if n_genes else None
        self.encoder = Encoder(sizes)
        prototypes = torch.empty(sizes.num_prototypes, sizes.output_size)
        nn.init.kaiming_uniform_(prototypes, a=5**0.5, mode="fan_out")
        self.prototypes = nn.Parameter(F.normalize(prototypes, dim=1))

    def set_prototypes(self, vectors: Tensor) -> None:
        """Take other prototypes, (n_prototypes, output_size) unit vectors."""
        self.prototypes = nn.Parameter(vectors.clone())

    def project(self, latents: Tensor) -> Tensor:
        """(n, n_prototypes) cosine of each latent with each prototype."""
        return F.normalize(latents, dim=1) @ self.prototypes.T


def published_parameters(network: Network) -> dict[str, Tensor]:
    """The parameters by the names that they have in published checkpoints."""
    return {name.replace("prototypes", _PROTOTYPES): part for name, part in network.state_dict().items()}


def load_parameters(network: Network, found: Mapping[str, Tensor]) -> list[str]:
    """Take a checkpoint's parameters over.

    Returns
    -------
    list of str
        What does not fit: names that lack, are too many or are of another shape; then nothing was taken.
    """
    own = published_parameters(network)
    # The queue is of the slides of a training, and no part of the network.
    given = {name: part for name, part in found.items() if name != "swav_head.queue"}
    wrong = [f"no parameter {name}" for name in own if name not in given]
    wrong += [f"unknown parameter {name}" for name in given if name not in own]
    wrong += [
        f"{name} is {tuple(given[name].shape)}, expected {tuple(own[name].shape)}"
        for name in own
        if name in given and given[name].shape != own[name].shape
    ]
    if not wrong:
        network.load_state_dict({name.replace(_PROTOTYPES, "prototypes"): given[name] for name in own})
    return wrong
