"""Transcript patches: what a transcript-based segmentation task needs of a slide, and nothing else.

A transcript bundle is a small Zarr group ``bundle_<nnn>.zarr``: one Parquet file a patch with the transcripts of its
window, their gene, their prior cell and whether they lie in a nucleus, and in the attribute ``cellquilt`` the patches'
windows, the genes, the method's settings and where the prior is from. A task that has it never stages the slide.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cellquilt.core import zarr_json
from cellquilt.core.errors import CellquiltError
from cellquilt.core.transforms import Affine

FORMAT = 1
KIND = "transcripts"
#: Columns of a patch's transcripts. Rows are sorted by ``transcript_id``, the slide's own number of the row; ``gene``
#: is a position in the bundle's `genes`; ``prior_cell`` is 0 for none.
SCHEMA = pa.schema(
    [
        ("transcript_id", pa.uint64()),
        ("x_um", pa.float64()),
        ("y_um", pa.float64()),
        ("z_um", pa.float64()),
        ("gene", pa.int32()),
        ("prior_cell", pa.int32()),
        ("in_nucleus", pa.bool_()),
    ]
)
_FILE = "transcripts.parquet"


def inner_sides(record: Mapping[str, Any]) -> tuple[bool, bool, bool, bool]:
    """Whether the left, top, right and bottom side of a patch's window lies inside the slide, that is, may cut cells.

    Parameters
    ----------
    record
        The patch's record: a window reaches beyond its core just where there are neighbours.
    """
    window = (record["x0"], record["y0"], record["x1"], record["y1"])
    x0, y0, x1, y1 = (bool(side != own) for side, own in zip(window, record["core"], strict=True))
    return x0, y0, x1, y1


@dataclass(frozen=True)
class TranscriptPatch:
    """A patch with its transcripts.

    Attributes
    ----------
    record
        ``index``; ``x0, y0, x1, y1`` of its window and ``core`` (x0, y0, x1, y1) of the part that is its own alone, in
        µm; ``n_transcripts`` of the window.
    table
        Columns as in `SCHEMA`.
    """

    record: dict[str, Any]
    table: pa.Table

    @property
    def index(self) -> int:
        """The patch's number within the slide."""
        return int(self.record["index"])


class TranscriptBundle:
    """A transcript bundle on disk.

    Parameters
    ----------
    path
        Its folder.

    Attributes
    ----------
    attributes
        All that is known of it, plain data.
    patches
        The patches' records, by index.

    Raises
    ------
    CellquiltError
        ``bundle-unreadable`` if it is not a transcript bundle.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        try:
            self.attributes: dict[str, Any] = zarr_json.read_attributes(self.path)["cellquilt"]
            if self.attributes["kind"] != KIND:
                raise KeyError("kind")
            self.patches: list[dict[str, Any]] = list(self.attributes["patches"])
        except (KeyError, OSError, ValueError, TypeError) as error:
            raise CellquiltError(
                "bundle-unreadable",
                f"{self.path} is not a bundle of transcript patches",
                "make one with `cellquilt patchify transcripts`",
            ) from error

    @property
    def sample(self) -> str:
        """The sample's name."""
        return self.attributes["sample"]

    @property
    def engine(self) -> dict[str, Any]:
        """Method and settings of the engine."""
        return dict(self.attributes["engine"])

    @property
    def prior(self) -> dict[str, Any]:
        """Where the prior cells are from, and how many there are: ``from``, ``name``, ``n_cells``."""
        return dict(self.attributes["prior"])

    @property
    def pixel_size_um(self) -> float | None:
        """Size of a pixel of the main image in µm; None where there is no image."""
        return self.attributes["pixel_size_um"]

    @cached_property
    def genes(self) -> list[str]:
        """Names of the genes, sorted."""
        return list(self.attributes["genes"])

    @cached_property
    def transforms(self) -> dict[str, Affine]:
        """Coordinate system → (3, 3) map from x, y in µm."""
        return {name: np.asarray(matrix, dtype=np.float64) for name, matrix in self.attributes["transforms"].items()}

    def __len__(self) -> int:
        return len(self.patches)

    def file(self, record: Mapping[str, Any]) -> Path:
        """The Parquet file of a patch, for whoever streams it."""
        return self.path / _name(record) / _FILE

    def read(self, record: Mapping[str, Any]) -> pa.Table:
        """The transcripts of a patch, columns as in `SCHEMA`."""
        return pa.Table.from_batches(self.batches(record), SCHEMA)

    def batches(self, record: Mapping[str, Any], batch_rows: int = 1_000_000) -> Iterator[pa.RecordBatch]:
        """The transcripts of a patch, at most so many rows at a time."""
        try:
            with pq.ParquetFile(self.file(record)) as file:
                for batch in file.iter_batches(batch_size=batch_rows):
                    yield batch.cast(SCHEMA)
        except (OSError, pa.ArrowException) as error:
            raise CellquiltError(
                "bundle-unreadable",
                f"{self.path}: transcripts of patch {record['index']} cannot be read: {error}",
                "make the bundles anew with `cellquilt patchify transcripts`",
            ) from error

    def __iter__(self) -> Iterator[TranscriptPatch]:
        for record in self.patches:
            yield TranscriptPatch(record, self.read(record))


def _name(record: Mapping[str, Any]) -> str:
    return f"patch_{int(record['index']):06d}"
