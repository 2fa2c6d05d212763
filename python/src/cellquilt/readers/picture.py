"""PNG and JPEG as images that are read in windows; they have no parts: one is decoded whole, when it is used."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from cellquilt.core.errors import CellquiltError

SUFFIXES = (".png", ".jpg", ".jpeg")


class Picture:
    """A PNG or JPEG file with the attributes of `cellquilt.readers.tiff.TiffImage` that readers ask for.

    Parameters
    ----------
    path
        The file.
    name
        What to call it in messages.
    memory_mb
        Bound of the decoded picture.

    Attributes
    ----------
    shape
        (channels, 1, height, width).
    dtype
        uint8.
    channel_names
        ``r, g, b``, or one ``channel_0`` where it is grey.

    Raises
    ------
    CellquiltError
        ``picture-unreadable``, ``picture-too-large``.
    """

    interleaved = True
    pixel_size_um = None
    description = ""

    def __init__(self, path: Path, name: str | None = None, *, memory_mb: int = 1500) -> None:
        self.path, self.name = Path(path), name or Path(path).name
        self._pixels: np.ndarray | None = None
        from PIL import Image

        try:
            with self._opened() as picture:
                width, height = picture.size
                grey = picture.mode in ("1", "L")
        except Image.DecompressionBombError as error:
            raise self._too_large(str(error)) from error
        channels = 1 if grey else 3
        if width * height * channels > memory_mb * 400_000:
            raise self._too_large(f"{width} × {height} pixels, at most {memory_mb * 0.4:.0f} MB fit the memory setting")
        self.shape = (channels, 1, height, width)
        self.dtype = np.dtype(np.uint8)
        self.channel_names = ["channel_0"] if grey else ["r", "g", "b"]

    def _opened(self) -> Any:
        from PIL import Image

        try:
            with warnings.catch_warnings():
                # The size is checked here, against the memory that there is.
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                return Image.open(self.path, formats=("PNG", "JPEG"))
        except (OSError, SyntaxError, ValueError) as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> CellquiltError:
        return CellquiltError(
            "picture-unreadable", f"{self.name} cannot be read as PNG or JPEG: {error}", "copy it again"
        )

    def _too_large(self, why: str) -> CellquiltError:
        return CellquiltError(
            "picture-too-large",
            f"{self.name} is too large for a format that can only be read whole: {why}",
            "convert it to a tiled TIFF, or raise memory_mb",
        )

    def __enter__(self) -> "Picture":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Forget the pixels."""
        self._pixels = None

    def window_px(self, chunk_px: int) -> tuple[int, int]:
        """(height, width) of the windows to ask for."""
        return chunk_px, chunk_px

    def read(self, channel: int, z: int, y0: int, y1: int, x0: int, x1: int) -> np.ndarray:
        """(y1 - y0, x1 - x0) uint8 window of one channel; `z` is 0."""
        if self._pixels is None:
            with self._opened() as picture:
                try:
                    pixels = np.asarray(picture.convert("L" if self.shape[0] == 1 else "RGB"))
                except (OSError, SyntaxError, ValueError) as error:
                    raise self._unreadable(error) from error
            self._pixels = pixels.reshape(*pixels.shape[:2], -1)
        return self._pixels[y0:y1, x0:x1, channel]
