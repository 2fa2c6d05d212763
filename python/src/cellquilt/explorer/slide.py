"""A slide as the viewer sees it: one plane in µm, whose origin is the corner of the morphology image."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cellquilt.core.errors import CellquiltError, did_you_mean
from cellquilt.core.images import Image, open_image
from cellquilt.core.points import batch_rows, iter_points, points_transforms, xy
from cellquilt.core.shapes import count_shapes
from cellquilt.core.store import Store
from cellquilt.core.transforms import GLOBAL, MICRONS, Affine, apply, length_scale, scale, translation
from cellquilt.core.xenium import xenium_ids, xenium_numbers
from cellquilt.formats.cells import CELLS, POINTS, TABLE, SlideCells

#: Pixel of a slide that has no image (µm).
BLANK_PIXEL_UM = 1.0


@dataclass
class ViewedSlide:
    """A store and where its elements lie in the viewer.

    Attributes
    ----------
    store
        The store.
    image_name
        Name of the morphology image; None: the one image there is, or the one whose pixels are ``global``.
    given_pixel_um
        Width of a pixel where the store does not say.
    memory_mb
        Memory for data.
    """

    store: Store
    image_name: str | None = None
    given_pixel_um: float | None = None
    memory_mb: int = 1500

    @cached_property
    def image(self) -> Image | None:
        """The morphology image; None for a slide of transcripts alone.

        Raises
        ------
        CellquiltError
            ``image-missing``, ``image-ambiguous``.
        """
        names = self.store.names("images")
        if not names and self.image_name is None:
            return None
        if len(names) > 1 and self.image_name is None:
            opened = {name: Image(self.store.element("images", name)) for name in names}
            main = [
                n
                for n, image in opened.items()
                if GLOBAL in image.transforms and np.array_equal(image.transforms[GLOBAL], np.eye(3))
            ]
            if len(main) == 1:
                return opened[main[0]]
        return open_image(self.store.path, self.image_name)

    @cached_property
    def pixel_um(self) -> float:
        """Width of a pixel of the image in µm.

        Raises
        ------
        CellquiltError
            ``pixel-size-unknown``.
        """
        if self.image is None:
            return BLANK_PIXEL_UM
        found = self.image.pixel_size_um or self.given_pixel_um
        if not found:
            raise CellquiltError(
                "pixel-size-unknown",
                f"{self.image.element} does not say how large its pixels are",
                "give pixel_size_um when reading the slide, or here",
            )
        return found

    @cached_property
    def cells(self) -> SlideCells | None:
        """The slide's cells; None where it was not segmented, or none were found."""
        there = self.store.has("shapes", CELLS) and count_shapes(self.store.element("shapes", CELLS)) > 0
        return SlideCells(self.store) if there else None

    @cached_property
    def table(self) -> Path | None:
        """The cells' table, if there is one."""
        return self.store.element("tables", TABLE) if self.store.has("tables", TABLE) else None

    @cached_property
    def points(self) -> Path | None:
        """The transcripts, if there are any."""
        return self.store.element("points", POINTS) if self.store.has("points", POINTS) else None

    @cached_property
    def numbers(self) -> NDArray[np.uint32]:
        """(n,) the cells' numbers in the viewer: of names that are the viewer's own, else as `SlideCells.numbers`."""
        if self.cells is None:
            return np.zeros(0, np.uint32)
        own = xenium_numbers(self.cells.outlines.ids)
        if (own >= 0).all() and np.unique(own).size == own.size:
            return own.astype(np.uint32)
        return self.cells.numbers.astype(np.uint32)

    @property
    def names(self) -> NDArray[np.str_]:
        """(n,) the cells' names in the viewer."""
        return xenium_ids(self.numbers)

    def map_of(self, transforms: Mapping[str, Affine], name: str) -> Affine:
        """(3, 3) map from an element's own coordinates to the viewer's.

        Raises
        ------
        CellquiltError
            ``explorer-no-system`` if it shares no coordinate system with the image.
        """
        if self.image is None:
            if MICRONS not in transforms:
                raise self._lost(name, transforms, (MICRONS,))
            return self._shift @ transforms[MICRONS]
        shared = [system for system in (GLOBAL, MICRONS, *sorted(transforms)) if system in transforms]
        for system in shared:
            if system in self.image.transforms:
                return scale(self.pixel_um) @ np.linalg.inv(self.image.transforms[system]) @ transforms[system]
        raise self._lost(name, transforms, tuple(sorted(self.image.transforms)))

    def _lost(self, name: str, transforms: Mapping[str, Affine], known: tuple[str, ...]) -> CellquiltError:
        return CellquiltError(
            "explorer-no-system",
            f"{self.store.path}: {name} has maps to {', '.join(sorted(transforms)) or 'nothing'}, the image to "
            f"{', '.join(known)}",
            "give both a map to one coordinate system",
        )

    @cached_property
    def _extent(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Lowest and highest x, y in µm of all there is, for a slide without an image."""
        low, high = np.full(2, np.inf), np.full(2, -np.inf)
        if self.cells is not None:
            bounds = self.cells.outlines.traits.bounds
            corners = np.concatenate([bounds[:, [0, 1]], bounds[:, [2, 3]], bounds[:, [0, 3]], bounds[:, [2, 1]]])
            um = apply(self.cells.map_of(MICRONS), corners[np.isfinite(corners).all(axis=1)])
            low, high = np.fmin(low, um.min(axis=0, initial=np.inf)), np.fmax(high, um.max(axis=0, initial=-np.inf))
        if self.points is not None:
            matrix = points_transforms(self.points).get(MICRONS, np.eye(3))
            for batch in iter_points(self.points, ["x", "y"], batch_rows(self.memory_mb)):
                um = apply(matrix, xy(batch))
                um = um[np.isfinite(um).all(axis=1)]
                low, high = np.fmin(low, um.min(axis=0, initial=np.inf)), np.fmax(high, um.max(axis=0, initial=-np.inf))
        if not np.isfinite(low).all():
            raise CellquiltError(
                "explorer-nothing", f"{self.store.path} has no image, no cells and no transcripts", "is it a slide?"
            )
        return low, high

    @cached_property
    def _shift(self) -> Affine:
        low, _ = self._extent
        return translation(*-np.floor(np.minimum(low, 0)))

    @cached_property
    def size_px(self) -> tuple[int, int]:
        """(height, width) of the image, or of a blank one that all there is fits on."""
        if self.image is not None:
            return int(self.image.shape[1]), int(self.image.shape[2])
        _, high = self._extent
        width, height = np.ceil((high + self._shift[:2, 2]) / self.pixel_um).astype(np.int64) + 1
        return int(height), int(width)

    @property
    def size_um(self) -> tuple[float, float]:
        """(height, width) in µm."""
        return self.size_px[0] * self.pixel_um, self.size_px[1] * self.pixel_um

    @cached_property
    def row_of_cell(self) -> NDArray[np.int64]:
        """(n,) row of the table of each cell, -1 for a cell that is not in it.

        Raises
        ------
        CellquiltError
            ``explorer-table-cells`` if the table has none of the cells.
        """
        assert self.cells is not None
        obs = self.obs
        row = self.cells.rows_of(pa.array(obs.index.astype(str).tolist(), pa.string()))
        if not (row >= 0).any() and "cell_id" in obs:
            row = self.cells.rows_of(pa.array(obs["cell_id"].astype(str).tolist(), pa.string()))
        out = np.full(len(self.cells), -1, np.int64)
        out[row[row >= 0]] = np.flatnonzero(row >= 0)
        if not (out >= 0).any():
            known = self.cells.outlines.ids[0]
            raise CellquiltError(
                "explorer-table-cells",
                f"{self.store.path}: no row of the table is called like a cell ({known}, …)",
                f"did the table change its index? {did_you_mean(str(known), obs.index.astype(str).tolist()[:1000])}",
            )
        return out

    @cached_property
    def obs(self):  # type: ignore[no-untyped-def]
        """The table's obs (a data frame).

        Raises
        ------
        CellquiltError
            ``table-unreadable``.
        """
        import zarr
        from anndata.io import read_elem

        assert self.table is not None
        try:
            return read_elem(zarr.open_group(str(self.table), mode="r")["obs"])
        except Exception as error:  # whatever zarr and anndata raise on damaged files
            raise CellquiltError(
                "table-unreadable", f"{self.table} cannot be read: {error}", "run `aggregate` again"
            ) from error

    @property
    def length_um(self) -> float:
        """By how much the map of the cells stretches lengths."""
        assert self.cells is not None
        return length_scale(self.map_of(self.cells.outlines.transforms, CELLS))
