"""The published model in use: a neighbourhood's latent by graph attention and attention pooling."""

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from cellquilt.core.errors import CellquiltError
from cellquilt.core.log import LOG, progress
from cellquilt.domains.expression import Vocabulary
from cellquilt.domains.neighbourhoods import at, make_batch, within
from cellquilt.domains.prototypes import Metric, Prototypes
from cellquilt.domains.published.expression import GeneChoice, published_expression, with_variable_genes
from cellquilt.domains.published.network import Network
from cellquilt.domains.slides import IMAGE, SlideCells, Slides

_CELLS_AT_ONCE = 4096  # whose first projections are made at a time
#: Neighbourhoods at a time: few enough that their nodes stay in the processor's cache.
_BATCH = 64


class PublishedEncoder:
    """A network with all that is needed to use it.

    Parameters
    ----------
    network
        With its weights.
    vocabulary
        The genes it knows; empty if it takes embedded cells.
    config
        What ``config.json`` says.
    """

    recipe: ClassVar[str] = "published"
    metric: ClassVar[Metric] = "cosine"

    def __init__(self, network: Network, vocabulary: Vocabulary, config: dict[str, Any]) -> None:
        self.network, self.vocabulary, self.config = network, vocabulary, config

    @property
    def size(self) -> int:
        """Numbers of a latent."""
        return self.network.sizes.output_size

    @property
    def n_prototypes(self) -> int:
        """Most prototypes that are made."""
        return self.network.sizes.num_prototypes

    @property
    def prototypes(self) -> Prototypes:
        """Those of the network."""
        return Prototypes(self.network.prototypes.detach().cpu().numpy().copy())

    def prepare(self, slides: Slides) -> Slides:
        """Choose the genes of a cohort: as in training, for slides of the panel of then."""
        return with_variable_genes(slides, GeneChoice.from_config(self.config))

    def image_of(self, slide: SlideCells) -> NDArray[np.float32] | None:
        """What an image shows around each cell, where the model was trained with it.

        Raises
        ------
        CellquiltError
            ``image-embeddings``.
        """
        wanted = bool((self.config.get("mode_kwargs") or {}).get("multimodal"))
        if wanted != (slide.image is not None):
            there = "has none" if wanted else "has some"
            raise CellquiltError(
                "image-embeddings",
                f'{slide.name}: the model was trained {"with" if wanted else "without"} an image, and obsm["{IMAGE}"] '
                f"{there}",
                "use a model of the same kind, or " + ("compute them" if wanted else "remove them"),
            )
        expected = self.network.sizes.histo_embedding_size
        if slide.image is not None and slide.image.shape[1] != expected:
            raise CellquiltError(
                "image-embeddings",
                f'{slide.name}: obsm["{IMAGE}"] has {slide.image.shape[1]} numbers a cell, the model takes {expected}',
            )
        return slide.image

    @torch.no_grad()
    def encode(self, slide: SlideCells) -> NDArray[np.float32]:
        """Latents of all cells of a slide, exactly as each neighbourhood by itself would give them.

        The projections of the first layer are those of cells, whatever neighbourhood they are in: they are made once.

        Returns
        -------
        numpy.ndarray
            (n_cells, size) float32; NaN for cells from which no cell is as many hops away as the model's views.

        Raises
        ------
        CellquiltError
            ``genes-twice``, ``genes-unknown``, ``image-embeddings``.
        """
        image = self.image_of(slide)
        expression = published_expression(slide, self.vocabulary, GeneChoice.from_config(self.config))
        graph, network = slide.graph, self.network
        near = within(graph, int(self.config["n_hops_local"]))
        valid = np.flatnonzero(np.diff(at(graph, self.hops_view).indptr))
        out = np.full((len(graph), self.size), np.nan, dtype=np.float32)
        if valid.size < 0.7 * len(graph):
            LOG.warning(
                "%s: %d of %d cells have a neighbourhood; a larger radius may be better",
                slide.name, valid.size, len(graph),
            )  # fmt: skip
        assert network.cell_embedder is not None
        panel = network.cell_embedder.panel(torch.from_numpy(expression.genes))
        embedded = torch.from_numpy(expression.project(panel.numpy()))
        first = network.encoder.first
        sides = torch.empty(len(graph), first.sides.out_features)
        for start in range(0, len(graph), _CELLS_AT_ONCE):
            block = slice(start, start + _CELLS_AT_ONCE)
            sides[block] = first.sides(embedded[block])
        for start in progress(range(0, valid.size, _BATCH), f"{slide.name}: latents"):
            cells = valid[start : start + _BATCH]
            batch = make_batch(graph, near, cells)
            nodes = torch.from_numpy(batch.cells)
            seen = None if image is None else torch.from_numpy(image[cells])
            out[cells] = network.encoder(sides[nodes], batch, seen).numpy()
        return out

    @property
    def hops_view(self) -> int:
        """How many hops apart the two views of a place are."""
        return int(self.config.get("n_hops_view", self.config["n_hops_local"]))

    def save(self, folder: Path, prototypes: Prototypes) -> Path:
        """Write the model's folder."""
        from cellquilt.domains.published.checkpoint import write_checkpoint

        return write_checkpoint(self, prototypes, folder)
