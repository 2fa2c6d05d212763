"""Patch bundles: everything a segmentation task needs, and nothing else of the slide.

A bundle is a small Zarr store ``bundle_<nnn>.zarr``: one array a patch with the pixels of its context (segmentation
channels only, the image's own dtype), and in the attribute ``cellquilt`` the patches' windows, the normalisation of
the slide, the engine's settings and lattice, the pixel size and the sample. A task that has it never stages the slide.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cellquilt.core import zarr_json
from cellquilt.core.atomic import atomic_path
from cellquilt.core.errors import CellquiltError
from cellquilt.core.log import progress
from cellquilt.patches.grid import Grid, Lattice, Patch
from cellquilt.patches.normalize import Normalization

if TYPE_CHECKING:
    from cellquilt.core.images import Image

FORMAT = 1
_BIT_SHUFFLE = 2
#: Bundles stay until the run's work folder is deleted; they are read once. A tenth smaller than with LZ4.
_CODEC, _LEVEL, _BLOCK_BYTES = "zstd", 1, 1 << 20


@dataclass(frozen=True)
class PatchPixels:
    """A patch with its pixels.

    Attributes
    ----------
    patch
        Where it lies.
    pixels
        (C, h, w) of its context, the image's dtype.
    """

    patch: Patch
    pixels: np.ndarray


def write_bundles(
    image: "Image",
    grid: Grid,
    output: Path,
    *,
    sample: str,
    channels: Sequence[str],
    normalization: Normalization,
    engine: Mapping[str, Any],
    lattice: Lattice | None = None,
    patches_per_task: int = 8,
) -> list[Path]:
    """Crop the patches of a grid into bundles.

    Peak memory is one patch. There is always at least one bundle; it holds no patch where there is no tissue.

    Parameters
    ----------
    image
        The slide.
    grid
        Its patches.
    output
        Folder for the bundles.
    sample
        The sample's name.
    channels
        Segmentation channels, in the order in which the engine wants them.
    normalization
        Of the whole slide, for these channels.
    engine
        Method and settings, plain data: ``{"method": "cellpose", "diameter_px": 35.0, …}``.
    lattice
        The engine's tiling that the grid was made with.
    patches_per_task
        Patches in one bundle; bundles of a slide differ by at most one patch.

    Returns
    -------
    list of pathlib.Path
        The bundles, in the order of their patches.
    """
    count = max(1, -(-len(grid.patches) // max(patches_per_task, 1)))
    edges = [k * len(grid.patches) // count for k in range(count + 1)]
    paths = []
    for number in progress(range(count), "patch bundles", count):
        members = grid.patches[edges[number] : edges[number + 1]]
        path = Path(output) / f"bundle_{number:03d}.zarr"
        attributes = {
            "format": FORMAT,
            "sample": sample,
            "bundle": number,
            "n_bundles": count,
            "n_patches": len(grid.patches),
            "shape": [int(n) for n in grid.shape],
            "pixel_size_um": image.pixel_size_um,
            "transforms": {name: np.asarray(matrix).tolist() for name, matrix in image.transforms.items()},
            "channels": list(channels),
            "normalization": normalization.as_dict(),
            "engine": dict(engine),
            "lattice": (lattice or Lattice()).as_dict(),
            "patches": [patch.as_dict() for patch in members],
            "size": _size(members, len(channels)),
        }
        with atomic_path(path) as aside:
            zarr_json.write_group(aside, {"cellquilt": attributes})
            for patch in members:
                _write_pixels(aside / _name(patch), image.read(*patch.context, channels=list(channels)))
        paths.append(path)
    return paths


def _size(patches: Sequence[Patch], n_channels: int) -> dict[str, int]:
    """Pixels of all channels, for `core.sizes`."""
    pixels = [n_channels * (y1 - y0) * (x1 - x0) for y0, y1, x0, x1 in (patch.context for patch in patches)]
    return {"pixels": sum(pixels), "patch_pixels": max(pixels, default=0)}


def _name(patch: Patch) -> str:
    return f"patch_{patch.index:06d}"


# The arrays are plain Zarr v3, one chunk a channel. They are written and read without the zarr package: importing it
# would cost each patch task more than reading its pixels.


def _write_pixels(folder: Path, pixels: np.ndarray) -> None:
    from numcodecs import blosc

    blosc.use_threads = False
    pixels = np.ascontiguousarray(pixels)
    for channel, plane in enumerate(pixels):
        chunk = folder / "c" / str(channel) / "0" / "0"
        chunk.parent.mkdir(parents=True)
        chunk.write_bytes(blosc.compress(plane, _CODEC.encode(), _LEVEL, _BIT_SHUFFLE, _BLOCK_BYTES))
    codec = {
        "typesize": pixels.itemsize,
        "cname": _CODEC,
        "clevel": _LEVEL,
        "shuffle": "bitshuffle",
        "blocksize": _BLOCK_BYTES,
    }
    document = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(pixels.shape),
        "data_type": pixels.dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [1, *pixels.shape[1:]]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0,
        "codecs": [
            {"name": "bytes", "configuration": {"endian": "little"}},
            {"name": "blosc", "configuration": codec},
        ],
        "dimension_names": ["c", "y", "x"],
        "attributes": {},
    }
    (folder / "zarr.json").write_text(json.dumps(document, sort_keys=True))


def _read_pixels(folder: Path) -> np.ndarray:
    from numcodecs import blosc

    blosc.use_threads = False
    document = json.loads((folder / "zarr.json").read_text())
    pixels = np.empty(document["shape"], dtype=document["data_type"])
    for channel, plane in enumerate(pixels):
        encoded = (folder / "c" / str(channel) / "0" / "0").read_bytes()
        plane[...] = np.frombuffer(blosc.decompress(encoded), pixels.dtype).reshape(plane.shape)
    return pixels


class Bundle:
    """A bundle on disk.

    Parameters
    ----------
    path
        Its folder.

    Raises
    ------
    CellquiltError
        ``bundle-unreadable`` if it is not a bundle.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        try:
            self.attributes: dict[str, Any] = zarr_json.read_attributes(self.path)["cellquilt"]
            _ = self.attributes["patches"]
        except (KeyError, OSError, ValueError) as error:
            raise CellquiltError(
                "bundle-unreadable",
                f"{self.path} is not a patch bundle",
                "make one with `cellquilt patchify image`",
            ) from error

    @property
    def sample(self) -> str:
        """The sample's name."""
        return self.attributes["sample"]

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) of the slide in pixels."""
        height, width = self.attributes["shape"]
        return int(height), int(width)

    @property
    def pixel_size_um(self) -> float:
        """Size of a pixel in µm."""
        return float(self.attributes["pixel_size_um"])

    @property
    def channels(self) -> list[str]:
        """Names of the channels that the pixels have."""
        return list(self.attributes["channels"])

    @property
    def engine(self) -> dict[str, Any]:
        """Method and settings of the engine."""
        return dict(self.attributes["engine"])

    @cached_property
    def lattice(self) -> Lattice:
        """The engine's tiling."""
        return Lattice(**self.attributes["lattice"])

    @cached_property
    def normalization(self) -> Normalization:
        """The slide's normalisation."""
        return Normalization.from_dict(self.attributes["normalization"])

    @cached_property
    def patches(self) -> list[Patch]:
        """The bundle's patches by index."""
        return [Patch.from_dict(item) for item in self.attributes["patches"]]

    def __len__(self) -> int:
        return len(self.patches)

    def read(self, patch: Patch) -> np.ndarray:
        """(C, h, w) pixels of a patch's context."""
        try:
            return _read_pixels(self.path / _name(patch))
        except (KeyError, OSError, ValueError, RuntimeError) as error:
            raise CellquiltError(
                "bundle-unreadable",
                f"{self.path}: pixels of patch {patch.index} cannot be read: {error}",
                "make the bundles anew with `cellquilt patchify image`; after --cleanup start without -resume",
            ) from error

    def __iter__(self) -> Iterator[PatchPixels]:
        for patch in self.patches:
            yield PatchPixels(patch, self.read(patch))
