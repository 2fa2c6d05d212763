"""The principal components of what a network says of images, the same for all slides of a cohort."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellquilt.core.atomic import atomic_path
from cellquilt.core.errors import CellquiltError
from cellquilt.core.log import LOG
from cellquilt.domains.checkpoint import COMPONENTS

_ROWS_AT_ONCE = 4096
#: Of the largest variance; what is below is rounding.
_LEAST_VARIANCE = 1e-9


@dataclass(frozen=True)
class ImagePca:
    """Principal components of image features.

    Attributes
    ----------
    mean
        (n_features,) float32.
    components
        (n_features, size) float32, of length 1, by the variance they explain.
    std
        (size,) float32 deviation along each in the cells that it was made of; embeddings are divided by it.
    about
        How the features were made: size of the patches, the network. Slides that are brought to the same components
        must be made in the same way.
    """

    mean: NDArray[np.float32]
    components: NDArray[np.float32]
    std: NDArray[np.float32]
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Numbers of an embedding."""
        return self.components.shape[1]

    @classmethod
    def of(cls, features: NDArray[np.float32], n_components: int, about: Mapping[str, Any]) -> "ImagePca":
        """Components of a sample of cells.

        Parameters
        ----------
        features
            (n_cells, n_features).
        n_components
            Most components; there are fewer of features that vary in fewer directions.
        about
            See the attribute.

        Raises
        ------
        CellquiltError
            ``image-constant``.
        """
        n, size = features.shape
        starts = range(0, n, _ROWS_AT_ONCE)
        mean = sum(features[k : k + _ROWS_AT_ONCE].sum(axis=0, dtype=np.float64) for k in starts) / max(n, 1)
        square = np.zeros((size, size))
        for k in starts:
            part = features[k : k + _ROWS_AT_ONCE] - mean
            square += part.T @ part
        values, vectors = np.linalg.eigh(square / max(n - 1, 1))
        values, vectors = values[::-1], vectors[:, ::-1]
        rank = min(int((values > _LEAST_VARIANCE * max(values[0], 1e-30)).sum()), n - 1)
        if rank < 1 or values[0] <= 0:
            raise CellquiltError(
                "image-constant", f"the model says the same of all {n} patches", "does the image show the tissue?"
            )
        kept = min(n_components, rank)
        if kept < n_components:
            LOG.warning("what the model says of the patches varies in %d directions only, not %d", kept, n_components)
        vectors = vectors[:, :kept]
        # The sign of a component is free: its largest part is positive.
        vectors = vectors * np.sign(vectors[np.abs(vectors).argmax(axis=0), np.arange(kept)])
        found = np.asarray(mean, np.float32), vectors.astype(np.float32), np.sqrt(values[:kept]).astype(np.float32)
        return cls(*found, dict(about))

    def transform(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """(n_cells, size) float32 of (n_cells, n_features).

        Raises
        ------
        CellquiltError
            ``image-pca-differs``.
        """
        if features.shape[1] != self.mean.size:
            raise CellquiltError(
                "image-pca-differs",
                f"the model gives {features.shape[1]} numbers a patch, the components are of {self.mean.size}",
                "use the model that the components were made with",
            )
        found: NDArray[np.float32] = np.asarray((features - self.mean) @ self.components / self.std, dtype=np.float32)
        return found

    def check(self, about: Mapping[str, Any]) -> None:
        """Refuse features that are made in another way.

        Raises
        ------
        CellquiltError
            ``image-pca-differs``.
        """
        for name, value in about.items():
            if name in self.about and self.about[name] != value:
                raise CellquiltError(
                    "image-pca-differs",
                    f"{name} is {value}, the components were made with {self.about[name]}",
                    f"give {name}={self.about[name]!r}, or make new components of all slides (pca=None)",
                )

    def save(self, path: Path | str, *, overwrite: bool = False) -> Path:
        """Write them, the same bytes for the same components.

        Parameters
        ----------
        path
            A file, or the folder of a model, in which they are called ``image_pca.safetensors``.
        overwrite
            Replace what stands there.

        Returns
        -------
        pathlib.Path
            The file.

        Raises
        ------
        CellquiltError
            ``output-exists``.
        """
        from safetensors.numpy import save_file

        path = Path(path)
        path = path / COMPONENTS if path.is_dir() else path
        arrays = {name: np.ascontiguousarray(getattr(self, name)) for name in ("components", "mean", "std")}
        with atomic_path(path, overwrite=overwrite) as part:
            # One entry: safetensors writes several in any order.
            save_file(arrays, part, {"about": json.dumps(dict(self.about), sort_keys=True)})
        return path

    @classmethod
    def load(cls, path: Path | str) -> "ImagePca":
        """Read what `save` wrote, a file or the folder of a model.

        Raises
        ------
        CellquiltError
            ``image-pca-invalid``.
        """
        from safetensors import SafetensorError, safe_open

        path = Path(path)
        path = path / COMPONENTS if path.is_dir() else path
        try:
            with safe_open(path, framework="numpy") as file:
                found = [file.get_tensor(name) for name in ("mean", "components", "std")]
                about = json.loads((file.metadata() or {})["about"])
            mean, components, std = found
            if components.shape != (mean.size, std.size) or not all(np.isfinite(part).all() for part in found):
                raise ValueError("sizes do not fit, or values are no numbers")
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise CellquiltError(
                "image-pca-invalid", f"{path} holds no components of images: {error}", "write them with ImagePca.save"
            ) from error
        return cls(mean, components, std, about)
