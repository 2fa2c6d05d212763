"""A sample's stores seen as one: the parts that will be assembled, or the assembled store."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cellquilt.core.shapes import ShapesTable, read_shapes
from cellquilt.core.store import Store
from cellquilt.core.transforms import MICRONS, length_scale

if TYPE_CHECKING:
    from cellquilt.core.images import Image


class View:
    """Elements and records of a sample, wherever they lie.

    Parameters
    ----------
    parts
        Stores; where two have an element of one name, the later one counts, as in `core.store.assemble`.

    Raises
    ------
    CellquiltError
        ``store-missing`` or ``store-unreadable``.
    """

    def __init__(self, parts: Sequence[Path]) -> None:
        self.stores = [Store(part) for part in parts]

    @property
    def sample(self) -> str:
        """The sample's name."""
        return self.stores[0].name

    @cached_property
    def records(self) -> list[dict[str, Any]]:
        """The records of all stages in the order of the parts."""
        return [record for store in self.stores for record in store.records]

    def facts(self, stage: str) -> dict[str, Any]:
        """The facts of the last record of a stage; empty if it left none."""
        found: dict[str, Any] = {}
        for record in self.records:
            if record.get("stage") == stage:
                found = record.get("facts", {})
        return found

    def find(self, kind: str, name: str) -> Path | None:
        """The folder of an element, None if no part has it."""
        for store in reversed(self.stores):
            if store.has(kind, name):
                return store.element(kind, name)
        return None

    def shapes(self, name: str) -> ShapesTable | None:
        """A shapes element, None if there is none."""
        element = self.find("shapes", name)
        return None if element is None else read_shapes(element)

    @cached_property
    def image(self) -> "Image | None":
        """The main image (not its pixels), None if there is none."""
        from cellquilt.core.images import open_image

        for store in self.stores:
            names = store.names("images")
            if names:
                return open_image(store.path, names[0] if len(names) > 1 else None)
        return None

    @cached_property
    def pixel_size_um(self) -> float:
        """Microns a pixel of the main image; of the cells' own coordinates where there is no image."""
        if self.image is not None:
            return length_scale(self.image.transforms[MICRONS])
        for name in ("cell_boundaries", "region_of_interest"):
            element = self.find("shapes", name)
            if element is not None:
                from cellquilt.core import zarr_json
                from cellquilt.core.transforms import from_ngff

                attributes = zarr_json.read_attributes(element)
                return length_scale(from_ngff(attributes["coordinateTransformations"])[MICRONS])
        return 1.0

    @cached_property
    def to_pixels(self) -> np.ndarray:
        """(3, 3) map from microns to pixels of the main image."""
        if self.image is not None:
            return np.linalg.inv(self.image.transforms[MICRONS])
        return np.diag([1 / self.pixel_size_um, 1 / self.pixel_size_um, 1.0])

    @property
    def image_size(self) -> tuple[int, int] | None:
        """(height, width) of the main image in pixels, None if there is none."""
        return None if self.image is None else (int(self.image.shape[1]), int(self.image.shape[2]))
