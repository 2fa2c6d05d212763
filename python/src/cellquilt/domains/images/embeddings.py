"""Embeddings of the cells of a cohort by what images show around them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cellquilt.core.errors import CellquiltError
from cellquilt.core.log import LOG
from cellquilt.core.transforms import MICRONS, apply, length_scale
from cellquilt.domains.images.network import Network, network_of
from cellquilt.domains.images.patches import Cut, patches
from cellquilt.domains.images.pca import ImagePca
from cellquilt.domains.images.slide_image import SlideImage
from cellquilt.domains.model import threads_of
from cellquilt.domains.slides import IMAGE
from cellquilt.spatial.tables import coordinates_of, slides_of, tables_of

if TYPE_CHECKING:
    import torch
    from anndata import AnnData

#: Cells of all slides together that the components are made of.
_SAMPLE = 20_000
#: Share of a slide's cells that may lie beside its image: segmentation and alignment are not exact.
_MOST_OUTSIDE = 0.05
#: Pixels of a patch to one of the image beyond which patches show nothing but interpolation.
_COARSE = 4.0


@dataclass(frozen=True)
class ImagedSlide:
    """A slide's cells and its image; `table` is the place of its table among several."""

    name: str
    table: int
    rows: NDArray[np.int64]
    xy_um: NDArray[np.float64]
    image: SlideImage


def image_embeddings(
    adata: "AnnData | Sequence[AnnData]",
    image: Any,
    model: "str | Callable[[torch.Tensor], Any]",
    *,
    pixel_size_um: float | None = None,
    um_to_px: ArrayLike | None = None,
    coordinate_system: str = MICRONS,
    slide_key: str | None = None,
    channels: Sequence[int] | None = None,
    patch_um: float = 30.0,
    um_per_px: float = 0.5,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    weights: Path | str | None = None,
    batch_size: int = 64,
    device: str = "auto",
    n_components: int = 10,
    pca: ImagePca | None = None,
    memory_mb: int = 1500,
    threads: int = 1,
    seed: int = 0,
    key_added: str = IMAGE,
) -> ImagePca:
    """Describe the neighbourhood of each cell by what an aligned image shows there.

    A patch around each cell goes through a network of images; its numbers are brought to a few principal components
    that all slides share. Models of domains take them beside expression.

    Parameters
    ----------
    adata
        One or several tables with ``obsm["spatial"]`` in µm. They get ``obsm[key_added]``, (n_cells, size) float32, and
        ``uns["{key_added}_about"]``, the width of the patches.
    image
        The image, or a list with one for each table; with `slide_key` a mapping from slides to images. An array
        (channels, height, width) of numpy, dask or zarr, a SpatialData image element or its folder, or a `SlideImage`.
    model
        A callable, such as a torch module, from (n, channels, size, size) float32 tensors to (n, n_features); or the
        name of a network of torchvision or timm (``resnet50``, ``timm/vit_small_patch16_224``), used without its
        classifier.
    pixel_size_um, um_to_px, coordinate_system, channels
        See `SlideImage`; for images that are not one yet.
    slide_key
        Column of `obs` that names the slides; None: each table is one.
    patch_um
        Width of a patch.
    um_per_px
        Width of its pixels: the magnification that the network was trained at (0.5 is 20×).
    mean, std
        Of each channel, taken off and divided by; pixels of integers are 0 to 1 before. By default those of the named
        network, 0 and 1 for callables.
    weights
        File with the named network's weights, ``.safetensors`` or what torch saved. Nothing is downloaded.
    batch_size
        Patches that go through the network at once.
    device
        ``auto``, ``cpu``, ``cuda``, …; modules are moved there.
    n_components
        Most numbers of an embedding.
    pca
        Components of other slides, to which these are brought; None makes them of a sample of these slides' cells.
    memory_mb
        Memory for an image's open window.
    threads
        Threads of the network and of cutting.
    seed
        Of the sample.
    key_added
        Where embeddings are put; models look for them under the default.

    Returns
    -------
    ImagePca
        The components; save them beside the model, for slides to come.

    Raises
    ------
    CellquiltError
        ``cells-outside-image``, ``images-differ``, ``image-constant``, ``image-pca-differs``, ``memory-too-small``,
        ``options-invalid``, ``coordinates-missing``, ``coordinates-invalid``, ``slide-key-unknown``, and what
        `SlideImage` and `network.network_of` raise.

    Notes
    -----
    Beyond the border of an image its last pixels are repeated. Up to 5 % of a slide's cells may lie outside.
    """
    for what, value in (("patch_um", patch_um), ("um_per_px", um_per_px), ("batch_size", batch_size),
                        ("n_components", n_components), ("memory_mb", memory_mb)):  # fmt: skip
        if not 0 < value < np.inf:
            raise CellquiltError("options-invalid", f"{what} is {value}", "a number above 0 was expected")
    cut = Cut(float(patch_um), float(um_per_px))
    tables = tables_of(adata)

    def opened(given: Any) -> SlideImage:
        if isinstance(given, SlideImage):
            return given
        return SlideImage(
            given, pixel_size_um=pixel_size_um, um_to_px=um_to_px, coordinate_system=coordinate_system,
            channels=channels,
        )  # fmt: skip

    slides = _slides(tables, image, slide_key, opened)
    if not slides:
        raise CellquiltError("images-differ", "there are no cells", "give tables with cells")
    for slide in slides:
        check_inside(slide, cut)
    with threads_of(threads), network_of(model, weights, mean, std, slides[0].image.shape[0], device) as network:
        about = {"patch_um": cut.patch_um, "um_per_px": cut.um_per_px, **network.about}
        work = PatchFeatures(network, cut, batch_size, memory_mb)
        if pca is None:
            chosen = sample_cells([slide.rows.size for slide in slides], seed)
            features = work.features(slides, chosen)
            pca = ImagePca.of(features, n_components, about)
            known = np.split(pca.transform(features), np.cumsum([rows.size for rows in chosen])[:-1])
            del features
        else:
            pca.check(about)
            chosen = [np.zeros(0, dtype=np.int64) for _ in slides]
            known = [np.zeros((0, pca.size), dtype=np.float32) for _ in slides]
        found = [np.zeros((table.n_obs, pca.size), dtype=np.float32) for table in tables]
        for slide, rows, embeddings in zip(slides, chosen, known, strict=True):
            found[slide.table][slide.rows[rows]] = embeddings
            rest = np.setdiff1d(np.arange(slide.rows.size), rows, assume_unique=True)
            for part, seen in work.batches(slide, rest):
                found[slide.table][slide.rows[part]] = pca.transform(seen)
            LOG.info("%s: %d cells, %d numbers each of the image", slide.name, slide.rows.size, pca.size)
    for table, embeddings in zip(tables, found, strict=True):
        table.obsm[key_added] = embeddings
        table.uns[f"{key_added}_about"] = {"patch_um": cut.patch_um}
    return pca


def _slides(
    tables: "list[AnnData]", image: Any, slide_key: str | None, opened: Callable[[Any], SlideImage]
) -> list[ImagedSlide]:
    """The slides of all tables, each with its image; those without cells are left out."""
    several = isinstance(image, list | tuple)
    if isinstance(image, Mapping) and slide_key is None and not hasattr(image, "children"):
        raise CellquiltError("images-differ", "images have names, slides have none", "give slide_key, or a list")
    if several and (slide_key is not None or len(image) != len(tables)):
        what = f"{len(image)} images for {len(tables)} tables" + (f' with slides by "{slide_key}"' if slide_key else "")
        raise CellquiltError("images-differ", what, "one for each table, or a mapping from slides with slide_key")
    if not several and len(tables) > 1 and slide_key is None:
        raise CellquiltError("images-differ", f"one image for {len(tables)} tables", "give a list, one for each table")
    found = []
    for number, table in enumerate(tables):
        xy = coordinates_of(table)
        for slide in slides_of(table, slide_key):
            if not slide.rows.size:
                continue
            given = image[number] if several else image
            if slide_key is not None:
                if not isinstance(image, Mapping) or slide.name not in image:
                    known = ", ".join(map(str, image)) if isinstance(image, Mapping) else "one without a name"
                    raise CellquiltError("images-differ", f'slide "{slide.name}" has no image', f"images: {known}")
                given = image[slide.name]
            name = slide.name if slide_key is not None else f"table {number}"
            found.append(ImagedSlide(name, number, slide.rows, xy[slide.rows], opened(given)))
    sizes = {slide.image.shape[0] for slide in found}
    if len(sizes) > 1:
        raise CellquiltError(
            "images-differ", f"images have {' and '.join(map(str, sorted(sizes)))} channels", "choose channels"
        )
    return found


def check_inside(slide: ImagedSlide, cut: Cut) -> None:
    """Refuse an image beside which many of the slide's cells lie."""
    image = slide.image
    n, outside = slide.rows.size, int((~image.inside(slide.xy_um)).sum())
    if outside > _MOST_OUTSIDE * n:
        xy = apply(image.um_to_px, slide.xy_um)
        low, high = xy.min(axis=0), xy.max(axis=0)
        raise CellquiltError(
            "cells-outside-image",
            f"{slide.name}: {outside} of {n} cells lie outside the image: they are at x {low[0]:.0f} to {high[0]:.0f}, "
            f"y {low[1]:.0f} to {high[1]:.0f} px, it has {image.shape[2]} × {image.shape[1]}",
            "check the alignment (um_to_px, pixel_size_um), and that coordinates are in µm",
        )
    if outside:
        LOG.warning("%s: %d of %d cells lie beside the image; its border is repeated there", slide.name, outside, n)
    px_um = 1 / length_scale(image.um_to_px)
    if px_um > _COARSE * cut.um_per_px:
        LOG.warning(
            "%s: a pixel of the image is %.3g µm wide, patches of %.3g µm a pixel show little", slide.name, px_um,
            cut.um_per_px,
        )  # fmt: skip


def sample_cells(sizes: Sequence[int], seed: int) -> list[NDArray[np.int64]]:
    """Cells of slides of so many, ascending, of each the same share: those that components are made of."""
    share = min(1.0, _SAMPLE / max(sum(sizes), 1))
    found = []
    for number, n in enumerate(sizes):
        rng = np.random.default_rng([seed, number])
        found.append(np.sort(rng.choice(n, round(share * n), replace=False)) if share < 1 else np.arange(n))
    return found


@dataclass(frozen=True)
class PatchFeatures:
    """What a network says of the patches around cells."""

    network: Network
    cut: Cut
    batch_size: int
    memory_mb: int

    def features(self, slides: list[ImagedSlide], chosen: list[NDArray[np.int64]]) -> NDArray[np.float32]:
        """(n, n_features) of some cells of each slide, in their order."""
        out, start = np.zeros((0, 0), dtype=np.float32), 0
        for slide, rows in zip(slides, chosen, strict=True):
            for part, seen in self.batches(slide, rows):
                if not out.size:
                    out = np.empty((sum(each.size for each in chosen), seen.shape[1]), dtype=np.float32)
                out[start + np.searchsorted(rows, part)] = seen
            start += rows.size
        return out

    def batches(
        self, slide: ImagedSlide, rows: NDArray[np.int64]
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """Cells and their features, in whole batches: a tile that has few cells is no batch by itself."""
        waiting: list[tuple[NDArray[np.int64], NDArray[np.float32]]] = []
        n = 0
        for part, cut in patches(slide.image, slide.xy_um, rows, self.cut, self.batch_size, self.memory_mb):
            waiting.append((part, cut))
            n += part.size
            while n >= self.batch_size:
                cells, together = (np.concatenate(x) for x in zip(*waiting, strict=True))
                waiting = [(cells[self.batch_size :], together[self.batch_size :])]
                n -= self.batch_size
                yield cells[: self.batch_size], self.network(together[: self.batch_size])
        if n:
            cells, together = (np.concatenate(x) for x in zip(*waiting, strict=True))
            yield cells, self.network(together)
