"""The model of factors in use: expression of a slide's cells → what their places have in common."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from cellquilt.core.errors import CellquiltError
from cellquilt.core.log import LOG
from cellquilt.domains.expression import Expression, Panel, Vocabulary, panel_of
from cellquilt.domains.factors.analysis import panel_weights
from cellquilt.domains.factors.sensitivity import Scale, States, own_sensitivity
from cellquilt.domains.factors.smoothing import place_mean, within_borders
from cellquilt.domains.prototypes import Metric, Prototypes
from cellquilt.domains.slides import IMAGE, SlideCells, Slides

#: Cells of a slide by which its sensitivity is judged, evenly spread over its table.
_SAMPLE = 10_000


@dataclass(frozen=True)
class FactorEncoder:
    """A model of factors.

    Attributes
    ----------
    vocabulary
        The genes it knows.
    scale, states
        See `sensitivity`.
    loadings, own
        (n_genes, n_factors) and (n_genes,): see `analysis.factor_analysis`.
    centre, directions
        (n_features,) and (n_features, size): latents of single cells are ``(features - centre) @ directions``, features
        being the factors and, of models with an image, what it shows.
    image_mean, image_std
        (n_image,) float64, empty for models without an image.
    sharpness, steps
        See `smoothing.within_borders`.
    n_prototypes
        Most prototypes that are made.
    config
        How the model was made, for its ``config.json``.
    """

    vocabulary: Vocabulary
    scale: Scale
    states: States
    loadings: NDArray[np.float64]
    own: NDArray[np.float64]
    centre: NDArray[np.float64]
    directions: NDArray[np.float64]
    image_mean: NDArray[np.float64]
    image_std: NDArray[np.float64]
    sharpness: float
    steps: int
    n_prototypes: int
    config: dict[str, Any] = field(default_factory=dict)

    recipe: ClassVar[str] = "factors"
    metric: ClassVar[Metric] = "euclidean"

    @property
    def size(self) -> int:
        """Numbers of a latent."""
        return self.directions.shape[1]

    def prepare(self, slides: Slides) -> Slides:
        """Nothing is chosen: all genes of a panel say what they can."""
        return slides

    def features(self, slide: SlideCells) -> NDArray[np.float32]:
        """(n_cells, n_features) of the slide's cells, each by itself.

        Raises
        ------
        CellquiltError
            ``genes-twice``, ``genes-unknown``, ``kinds-differ``, ``image-embeddings``.
        """
        check_kind(slide, self.scale.kind)
        panel = panel_of(slide.genes, self.vocabulary, None, slide.name)
        found = self.expression(slide, panel).project(self._weights(panel))
        return with_image(slide, found, self.image_mean, self.image_std)

    def expression(self, slide: SlideCells, panel: Panel) -> Expression:
        """The slide's expression, brought to scale."""
        every = max(1, -(-len(slide) // _SAMPLE))
        own = own_sensitivity(slide.matrix[::every], panel, self.scale, self.states, self._weights(panel))
        if self.scale.kind == "counts":
            changed = np.abs(np.log(own.factor))
            most = int(changed.argmax())
            LOG.info(
                "%s: genes are seen up to %.1f times as often as in the cohort (%s %.2f)",
                slide.name, np.exp(changed[most]), slide.genes[panel.columns[most]], own.factor[most],
            )  # fmt: skip
        return self.scale.expression(slide.matrix, panel, own)

    def _weights(self, panel: Panel) -> NDArray[np.float64]:
        return panel_weights(self.loadings[panel.numbers], self.own[panel.numbers])

    def encode(self, slide: SlideCells) -> NDArray[np.float32]:
        """Latents of all cells of a slide.

        Returns
        -------
        numpy.ndarray
            (n_cells, size) float32; NaN for cells without a neighbour.
        """
        single = (self.features(slide) - self.centre) @ self.directions
        smooth = self.smoothed(slide, single.astype(np.float32))
        smooth[slide.graph.degree == 0] = np.nan
        return smooth

    def smoothed(self, slide: SlideCells, single: NDArray[np.float32]) -> NDArray[np.float32]:
        """(n_cells, size) of the latents of single cells."""
        return within_borders(slide.graph, place_mean(slide.graph, single), self.sharpness, self.steps)

    def save(self, folder: Path, prototypes: Prototypes) -> Path:
        """Write the model's folder."""
        from cellquilt.domains.factors.checkpoint import write_factors

        return write_factors(self, prototypes, folder)


def check_kind(slide: SlideCells, kind: str) -> None:
    """Refuse slides that hold something else."""
    if slide.kind != kind:
        raise CellquiltError(
            "kinds-differ",
            f"{slide.name}: X holds {slide.kind}, the other slides or the model {kind}",
            "use tables of one kind, or say what they hold (kind)",
        )


def with_image(
    slide: SlideCells, factors: NDArray[np.float32], mean: NDArray[np.float64], std: NDArray[np.float64]
) -> NDArray[np.float32]:
    """Factors, and beside them what an image shows, for models that look at it."""
    there = 0 if slide.image is None else slide.image.shape[1]
    if there != mean.size:
        raise CellquiltError(
            "image-embeddings",
            f'{slide.name}: obsm["{IMAGE}"] has {there} numbers a cell, the model takes {mean.size}',
            "use a model of the same kind, or " + ("compute them" if mean.size else "remove them"),
        )
    if slide.image is None:
        return factors
    return np.hstack([factors, ((slide.image - mean) / std).astype(np.float32)])
