"""What a network says of the patches around a slide's cells, on disk beside the slide's graph.

A cohort's principal components are known only when all slides were seen. So each slide keeps its features as they are,
4 bytes each: a file that is mapped, of which rows are read.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cellquilt.core.errors import CellquiltError
from cellquilt.core.log import LOG
from cellquilt.core.settings import Settings
from cellquilt.domains.images.embeddings import ImagedSlide, PatchFeatures, check_inside, sample_cells
from cellquilt.domains.images.network import network_of, network_or_function
from cellquilt.domains.images.patches import Cut
from cellquilt.domains.images.pca import ImagePca
from cellquilt.domains.images.slide_image import SlideImage

if TYPE_CHECKING:
    from cellquilt.domains.slides import SlideCells

_FEATURES, _ABOUT = "image_features.npy", "image_features.json"
_BATCH, _ROWS_AT_ONCE = 64, 4096


@dataclass(frozen=True)
class FeatureFile:
    """Features of a slide's cells.

    Attributes
    ----------
    values
        (n_cells, n_features) float32, mapped.
    about
        How they were made; see `ImagePca`.
    """

    values: NDArray[np.float32]
    about: dict[str, Any]

    @classmethod
    def find(cls, graph: Path) -> "FeatureFile | None":
        """Those of a graph store; None if it has none.

        Raises
        ------
        CellquiltError
            ``graph-store-invalid``.
        """
        if not (graph / _ABOUT).exists():
            return None
        try:
            values = np.load(graph / _FEATURES, mmap_mode="r")
            return cls(values, json.loads((graph / _ABOUT).read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise CellquiltError(
                "graph-store-invalid", f"{graph} has no readable features of an image: {error}",
                "write it again with cellquilt domains prepare",
            ) from error  # fmt: skip

    def embeddings(self, pca: ImagePca) -> NDArray[np.float32]:
        """(n_cells, size) components of all cells.

        Raises
        ------
        CellquiltError
            ``image-pca-differs``.
        """
        pca.check(self.about)
        out = np.empty((len(self.values), pca.size), dtype=np.float32)
        for start in range(0, len(out), _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            out[rows] = pca.transform(self.values[rows])
        return out


def write_features(
    slide: "SlideCells", image: SlideImage, graph: Path, *, settings: Settings, weights: Path | None = None
) -> None:
    """Add the features of a slide's cells to its graph store, which is being made.

    Parameters
    ----------
    slide
        Its cells.
    image
        Aligned with it.
    graph
        The store.
    settings
        Groups ``domains_image`` and ``resources``.
    weights
        File of the network's weights, where it lies elsewhere than the settings say.

    Raises
    ------
    CellquiltError
        See `image_embeddings`.
    """
    from cellquilt.domains.model import threads_of

    name = settings["domains_image_model"]
    cut = Cut(settings["domains_patch_um"], settings["domains_um_per_px"])
    imaged = ImagedSlide(slide.name, 0, np.arange(len(slide)), slide.xy_um, image)
    check_inside(imaged, cut)
    weights = weights or settings["domains_image_weights"]
    with (
        threads_of(settings["threads"]),
        network_of(network_or_function(name), weights, None, None, image.shape[0], "auto") as network,
    ):
        about = {"model": name, "patch_um": cut.patch_um, "um_per_px": cut.um_per_px, **network.about}
        work = PatchFeatures(network, cut, _BATCH, settings["memory_mb"])
        values: NDArray[np.float32] | None = None
        for rows, features in work.batches(imaged, imaged.rows):
            if values is None:
                shape = (len(slide), features.shape[1])
                values = np.lib.format.open_memmap(graph / _FEATURES, mode="w+", dtype=np.float32, shape=shape)
            values[rows] = features
    assert values is not None
    values.flush()  # type: ignore[attr-defined]
    (graph / _ABOUT).write_text(json.dumps(about, sort_keys=True) + "\n", encoding="utf-8")
    LOG.info("%s: %d features of an image for each of %d cells", slide.name, values.shape[1], len(slide))


def cohort_pca(graphs: Sequence[Path], n_components: int, seed: int) -> ImagePca | None:
    """Components of the features of a cohort, as `image_embeddings` makes them; None where no slide has features.

    Raises
    ------
    CellquiltError
        ``images-differ`` where only some have, ``image-pca-differs`` where they were made in different ways,
        ``image-constant``.
    """
    files = [FeatureFile.find(graph) for graph in graphs]
    known = [file for file in files if file is not None]
    if not known:
        return None
    if len(known) < len(files):
        without = next(graph for graph, file in zip(graphs, files, strict=True) if file is None)
        raise CellquiltError(
            "images-differ", f"{without.name} has no features of an image, others have",
            "prepare all slides with the same network, or none",
        )  # fmt: skip
    for file in known[1:]:
        ImagePca(*(np.zeros(0, np.float32),) * 3, known[0].about).check(file.about)
    chosen = sample_cells([len(file.values) for file in known], seed)
    features = np.concatenate([file.values[rows] for file, rows in zip(known, chosen, strict=True)])
    return ImagePca.of(features, n_components, known[0].about)
