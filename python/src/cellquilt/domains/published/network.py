"""The network: gene panel → cell embedding → graph attention → one latent a neighbourhood → prototypes.

The parts and the names of their parameters are those of published checkpoints (Blampey et al., Nature Methods 2025), so
that these load as they are. `Architecture` says how large they are.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from cellquilt.domains.neighbourhoods import Batch
from cellquilt.domains.published.attention import (
    Edges,
    Messages,
    Pooled,
    interleaved,
    messages_by_torch,
    pooled_by_torch,
)

_PROTOTYPES = "swav_head._prototypes"  # as published checkpoints call them
_LAYERS = "encoder.gnn.convs."  # whose parameters these have in another order


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
    """A layer of graph attention; see `attention`.

    Parameters are held as the kernels take them, both projections in one and with the heads innermost; `published` and
    `take` translate.

    Parameters
    ----------
    inputs
        Numbers of a node.
    size, heads
        Heads, and numbers of each.
    last
        Heads are averaged, else they stand side by side.
    order
        (inputs,) where each number of a node stands in the usual order.
    """

    def __init__(self, inputs: int, size: int, heads: int, *, last: bool, order: NDArray[np.int64]) -> None:
        super().__init__()
        self.heads, self.size, self.last = heads, size, last
        self._inputs, self._order = torch.from_numpy(order), torch.from_numpy(interleaved(heads, size))
        width = heads * size
        self.sides = nn.Linear(inputs, 2 * width)
        self.edge = nn.Parameter(torch.empty(width))
        self.attention = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.zeros(size if last else width))
        with torch.no_grad():
            for half in self.sides.weight.chunk(2):
                nn.init.xavier_uniform_(half)
            self.sides.bias.zero_()
            nn.init.xavier_uniform_(self.edge[:, None])
            nn.init.xavier_uniform_(self.attention.view(1, size, heads).transpose(1, 2))

    def published(self) -> dict[str, Tensor]:
        """The parameters by the names, and in the order, of published checkpoints."""
        by_head, by_input = self._order.argsort(), self._inputs.argsort()
        weights = [part[by_head][:, by_input] for part in self.sides.weight.detach().chunk(2)]
        biases = [part[by_head] for part in self.sides.bias.detach().chunk(2)]
        return {
            "lin_l.weight": weights[0], "lin_l.bias": biases[0], "lin_r.weight": weights[1], "lin_r.bias": biases[1],
            "lin_edge.weight": self.edge.detach()[by_head][:, None],
            "att": self.attention.detach()[by_head].view(1, self.heads, self.size),
            "bias": self.bias.detach() if self.last else self.bias.detach()[by_head],
        }  # fmt: skip

    @torch.no_grad()
    def take(self, found: Mapping[str, Tensor]) -> None:
        """Take over what `published` gives."""
        order = self._order
        weights = [found[f"lin_{side}.weight"][order][:, self._inputs] for side in "lr"]
        self.sides.weight.copy_(torch.cat(weights))
        self.sides.bias.copy_(torch.cat([found[f"lin_{side}.bias"][order] for side in "lr"]))
        self.edge.copy_(found["lin_edge.weight"][order, 0])
        self.attention.copy_(found["att"].reshape(-1)[order])
        self.bias.copy_(found["bias"] if self.last else found["bias"][order])

    def messages(self, sides: Tensor, graph: Edges) -> Tensor:
        """(n, heads × size) ELU of what nodes get, from their projections (n, 2 × heads × size)."""
        do = Messages.apply if sides.device.type == "cpu" else messages_by_torch
        return do(sides, self.edge, self.attention, self.bias, self.heads, graph)  # type: ignore[no-any-return]

    def pooled(self, sides: Tensor, gate: Tensor, graph: Edges) -> Tensor:
        """(n_parts, size) mean over the nodes of each part, weighted by the softmax of their gates."""
        do = Pooled.apply if sides.device.type == "cpu" else pooled_by_torch
        return do(sides, self.edge, self.attention, gate, self.heads, graph) + self.bias  # type: ignore[no-any-return]


class _Layers(nn.Module):
    def __init__(self, sizes: Architecture) -> None:
        super().__init__()
        of_head = sizes.hidden_size // sizes.heads
        self.convs = nn.ModuleList()
        inputs, order = sizes.embedding_size, np.arange(sizes.embedding_size)
        for number in range(sizes.num_layers):
            last = number == sizes.num_layers - 1
            size = sizes.output_size if last else of_head
            self.convs.append(AttentionLayer(inputs, size, sizes.heads, last=last, order=order))
            inputs, order = sizes.hidden_size, interleaved(sizes.heads, of_head)


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

    def forward(self, sides: Tensor, batch: Batch, image: Tensor | None = None) -> Tensor:
        """Latents of a batch of neighbourhoods.

        Parameters
        ----------
        sides
            (n_nodes, 2 × hidden) projections by the `first` layer of the batch's nodes.
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
        *layers, last = self.gnn.convs
        for layer, following in zip(layers, self.gnn.convs[1:], strict=True):
            sides = following.sides(layer.messages(sides, graph))  # type: ignore[operator, union-attr]
        pooling = self.node_aggregation.attention_aggregation
        # What is the same for all nodes of a part does not change their weights: not the layer's bias, nor the gate's.
        # And as weights add up to 1, the mean of what `nn` makes of the nodes is what it makes of their mean.
        out = pooling.nn(last.pooled(sides, pooling.gate_nn.weight[0], graph))  # type: ignore[operator, union-attr]
        return out if image is None else self.mlp_fusion(torch.cat([out, image], dim=-1))


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
    """The parameters by the names that they have in published checkpoints, and in their order."""
    found = {
        name.replace("prototypes", _PROTOTYPES): part
        for name, part in network.state_dict().items()
        if not name.startswith(_LAYERS)
    }
    for number, layer in enumerate(network.encoder.gnn.convs):
        found |= {f"{_LAYERS}{number}.{name}": part for name, part in layer.published().items()}  # type: ignore[operator, union-attr]
    return found


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
        rest = {
            name.replace(_PROTOTYPES, "prototypes"): part
            for name, part in given.items()
            if not name.startswith(_LAYERS)
        }
        network.load_state_dict(rest, strict=False)
        for number, layer in enumerate(network.encoder.gnn.convs):
            prefix = f"{_LAYERS}{number}."
            layer.take(  # type: ignore[operator, union-attr]
                {name.removeprefix(prefix): part for name, part in given.items() if name.startswith(prefix)}
            )
    return wrong
