"""Wrong, damaged and empty input over the whole chain: a message with a code, or a correct empty result.

Every case is what users of such tools reported, or a class of fault. A case that fails must say so in one message
with a stable code, show no traceback, and leave every file as it was: no output, nothing half-written, nothing aside.
The sheet's and the parameters' own cases are in `tests/cases/bad_inputs.json`.
"""

import errno
import gzip
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tifffile
from cellquilt.cli import main
from cellquilt.core.shapes import ShapesTable, read_shapes, write_shapes
from cellquilt.core.store import Store

PIXEL_UM = 0.5
OME = {
    "PhysicalSizeX": PIXEL_UM,
    "PhysicalSizeY": PIXEL_UM,
    "PhysicalSizeXUnit": "µm",
    "PhysicalSizeYUnit": "µm",
}
GENERIC = ("--segmentation", "generic", "--generic-diameter-um", "6")
#: Nine nuclei of 12 px on 128 × 128; in µm each has one transcript at its centre.
CENTRES = [(x, y) for y in (24, 64, 104) for x in (24, 64, 104)]
TABLE = "x,y,gene\n" + "".join(f"{x / 2},{y / 2},G{k % 3}\n" for k, (x, y) in enumerate(CENTRES))
PARTS = ("raw", "tissue", "patches", "cells", "table")

SEGMENTERS = """
import numpy as np


def wrong_shape(image):
    return np.zeros((3, 3), np.int32)


def floats(image):
    return np.zeros(image.shape[1:])


def nan(image):
    return np.full(image.shape[1:], np.nan)


def negative(image):
    return np.full(image.shape[1:], -1)


def raises(image):
    raise RuntimeError("the engine has no fuel")


def none(image):
    return None


def nothing(image):
    return np.zeros(image.shape[1:], np.int32)


def one(image):
    labels = np.zeros(image.shape[1:], np.int32)
    labels[10:20, 10:20] = 7
    return labels


not_a_function = 3
"""


def cellquilt(capsys: Any, *arguments: object) -> tuple[int, str, str]:
    """One command in this process: exit code, stdout, stderr."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything in a folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def nuclei(size: int = 128) -> np.ndarray:
    y, x = np.mgrid[:size, :size]
    image = np.full((size, size), 100.0)
    for cx, cy in CENTRES:
        image += 2000 * np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / 50)
    return image.astype(np.uint16)


def write_image(path: Path, pixels: np.ndarray | None = None, **options: Any) -> Path:
    pixels = nuclei() if pixels is None else pixels
    axes = {2: "YX", 3: "CYX"}.get(pixels.ndim, "YX")
    tifffile.imwrite(path, pixels, **{"ome": True, "metadata": {**OME, "axes": axes}, **options})
    return path


@dataclass
class Chain:
    """Runs the chain of one sample in a folder."""

    folder: Path
    capsys: Any
    sample: str = "s"

    def store(self, part: str) -> Path:
        return self.folder / (f"{self.sample}.{part}.zarr" if part else f"{self.sample}.zarr")

    def do(self, *arguments: object) -> str:
        code, _, err = cellquilt(self.capsys, *arguments)
        assert code == 0, err
        return err

    def convert(self, image: Path, transcripts: Path | None = None, *more: object, technology: str = "ome_tif") -> None:
        table = ("--transcripts", transcripts) if transcripts else ()
        output = ("--sample", self.sample, "-o", self.store("raw"))
        self.do("convert", image, "--technology", technology, *table, *output, *more)

    def segment(self, *more: object, patch: tuple[object, ...] = (), resolve: tuple[object, ...] = ()) -> None:
        raw, bundles = self.store("raw"), self.folder / "bundles"
        self.do("tissue", raw, "-o", self.store("tissue"))
        out = ("--bundles", bundles, "-o", self.store("patches"))
        self.do("patchify", "image", raw, "--tissue", self.store("tissue"), *out, *GENERIC, *patch, *more)
        results = []
        for bundle in sorted(bundles.iterdir()):
            results.append(self.folder / f"{bundle.stem}.cells.parquet")
            self.do("segment", "generic", bundle, "-o", results[-1], *more)
        self.do("resolve", raw, *results, "-o", self.store("cells"), *GENERIC[:2], *resolve)

    def finish(self, *more: object, parts: tuple[str, ...] = PARTS) -> "Result":
        self.do("aggregate", self.store("raw"), "--cells", self.store("cells"), "-o", self.store("table"), *more)
        self.do(
            "assemble", *map(self.store, parts), "-o", self.store(""), "--qc", self.folder / "qc.json"
        )  # fmt: skip
        page = self.folder / "report.html"
        self.do("report", self.store(""), "--qc", self.folder / "qc.json", "-o", page)
        self.do("samples", self.folder / "qc.json", "--samples", self.sample, "-o", self.folder / "samples.tsv")
        return Result(
            self.store(""), json.loads((self.folder / "qc.json").read_text()), page.read_text(encoding="utf-8")
        )


@dataclass
class Result:
    """A finished sample, as its users read it."""

    store: Path
    qc: dict[str, Any]
    page: str

    def check(self, n_cells: int, n_transcripts: int | None) -> "Result":
        """What must hold for every store, the empty ones too."""
        import spatialdata

        sdata = spatialdata.read_zarr(self.store)
        table = sdata.tables["table"]
        assert table.n_obs == self.qc["n_cells"] == n_cells
        assert ("cell_boundaries" in sdata.shapes) == (n_cells > 0)  # spatialdata has no shapes without rows
        assert len(read_shapes(Store(self.store).element("shapes", "cell_boundaries"))) == n_cells
        assert table.obsm["spatial"].shape == (n_cells, 2)
        assert self.qc["n_transcripts"] == n_transcripts
        assert ("transcripts" in sdata.points) == (n_transcripts is not None)
        if n_transcripts is not None:
            points = sdata.points["transcripts"].compute()
            assert len(points) == n_transcripts
            counted = points[~points["is_control"].astype(bool) & points["passes_qv"].astype(bool)]
            sums = counted["cell_id"].value_counts()
            assert np.asarray(table.X.sum(axis=1)).ravel().tolist() == [sums.get(cell, 0) for cell in table.obs_names]
        assert self.page.lower().startswith("<!doctype html>")
        return self


@pytest.fixture(scope="module")
def kit(tmp_path_factory) -> Iterator[Path]:
    """A good sample with all its parts; nothing may write into it."""
    folder = tmp_path_factory.mktemp("kit")
    write_image(folder / "image.ome.tif")
    (folder / "t.csv").write_text(TABLE)
    commands: list[list[object]] = [
        ["convert", folder / "image.ome.tif", "--technology", "ome_tif", "--transcripts", folder / "t.csv",
         "--sample", "s", "-o", folder / "s.raw.zarr"],
        ["tissue", folder / "s.raw.zarr", "-o", folder / "s.tissue.zarr"],
        ["patchify", "image", folder / "s.raw.zarr", "--tissue", folder / "s.tissue.zarr",
         "--bundles", folder / "bundles", "-o", folder / "s.patches.zarr", *GENERIC],
        ["segment", "generic", folder / "bundles" / "bundle_000.zarr", "-o", folder / "b.cells.parquet"],
        ["resolve", folder / "s.raw.zarr", folder / "b.cells.parquet", "-o", folder / "s.cells.zarr", *GENERIC[:2]],
        ["aggregate", folder / "s.raw.zarr", "--cells", folder / "s.cells.zarr", "-o", folder / "s.table.zarr"],
        ["assemble", *[folder / f"s.{part}.zarr" for part in PARTS], "-o", folder / "s.zarr",
         "--qc", folder / "qc.json"],
    ]  # fmt: skip
    for command in commands:
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in command])
        assert not stop.value.code
    before = tree(folder)
    yield folder
    assert tree(folder) == before


@pytest.fixture
def chain(tmp_path, capsys) -> Chain:
    return Chain(tmp_path, capsys)


@pytest.fixture(autouse=True)
def _segmenters(tmp_path_factory, monkeypatch) -> None:
    folder = tmp_path_factory.mktemp("modules")
    (folder / "odd_segmenters.py").write_text(SEGMENTERS)
    monkeypatch.syspath_prepend(str(folder))


# ----------------------------------------------------------------------------------------------------- cases that fail


@dataclass(frozen=True)
class Fault:
    """A case that must fail.

    Attributes
    ----------
    name, code
        What is wrong, and the code that says so.
    make
        (kit, empty folder) → the command line; it makes what it needs in the folder.
    says
        Words that the message must hold.
    breaks
        Makes the machine fail, for faults that are not in a file.
    """

    name: str
    code: str
    make: Callable[[Path, Path], list[object]]
    says: tuple[str, ...] = ()
    breaks: Callable[[pytest.MonkeyPatch], None] | None = None


def _convert(image: object, folder: Path, *more: object) -> list[object]:
    return ["convert", image, "--technology", "ome_tif", "--sample", "liver", "-o", folder / "out" / "x.zarr", *more]


def _bytes(content: bytes, *more: object) -> Callable[[Path, Path], list[object]]:
    """Convert a file of these bytes."""

    def make(_: Path, folder: Path) -> list[object]:
        (folder / "slide.tif").write_bytes(content)
        return _convert(folder / "slide.tif", folder, *more)

    return make


def _image(*more: object, pixels: np.ndarray | None = None, cut: float = 1.0, **options: Any):
    """Convert a TIFF made with these options."""

    def make(_: Path, folder: Path) -> list[object]:
        path = write_image(folder / "slide.tif", pixels, **options)
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * cut)])
        return _convert(path, folder, *more)

    return make


def _table(content: str | bytes | pa.Table, *more: object, name: str = "t.csv"):
    """Convert a good image with this table."""

    def make(kit: Path, folder: Path) -> list[object]:
        path = folder / name
        if isinstance(content, pa.Table):
            pq.write_table(content, path)
        else:
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        return _convert(kit / "image.ome.tif", folder, "--transcripts", path, *more)

    return make


def _damaged_tile(_: Path, folder: Path) -> list[object]:
    path = folder / "slide.tif"
    noise = np.random.default_rng(0).integers(0, 999, (128, 128)).astype(np.uint16)
    write_image(path, noise, compression="zlib", tile=(64, 64))
    with tifffile.TiffFile(path) as file:
        offset, count = file.pages[0].dataoffsets[2], file.pages[0].databytecounts[2]
    content = bytearray(path.read_bytes())
    content[offset : offset + count] = bytes(count)
    path.write_bytes(content)
    return _convert(path, folder)


def _region(folder: Path) -> Path:
    """A MERSCOPE region of 64 × 64 pixels of 0.5 µm."""
    region = folder / "region_0"
    (region / "images").mkdir(parents=True)
    for stain in ("DAPI", "PolyT"):
        for plane in (0, 1):
            tifffile.imwrite(region / "images" / f"mosaic_{stain}_z{plane}.tif", nuclei(64))
    (region / "images" / "micron_to_mosaic_pixel_transform.csv").write_text("2 0 0\n0 2 0\n0 0 1\n")
    (region / "detected_transcripts.csv").write_text(",global_x,global_y,global_z,gene\n0,12.1,12.2,0.0,A\n1,5,5,1,B\n")
    return region


def _merscope(spoil: Callable[[Path], object], *more: object):
    def make(_: Path, folder: Path) -> list[object]:
        region = _region(folder)
        spoil(region)
        output = ("--sample", "liver", "-o", folder / "out" / "x.zarr")
        return ["convert", region, "--technology", "merscope", *output, *more]

    return make


def _transform(text: str):
    return _merscope(lambda region: (region / "images" / "micron_to_mosaic_pixel_transform.csv").write_text(text))


def _copy(kit: Path, folder: Path, part: str) -> Path:
    return Path(shutil.copytree(kit / part, folder / part))


def _spoiled(part: str, spoil: Callable[[Path], object], *command: str, out: bool = True):
    """A command on a copy of a store of the kit that was spoiled; ``{kit}`` and ``{store}`` stand for the folders."""

    def make(kit: Path, folder: Path) -> list[object]:
        store = _copy(kit, folder, part)
        spoil(store)
        words = [word.format(kit=kit, store=store) for word in command]
        return [*words, *(["-o", folder / "out" / "x.zarr"] if out else [])]

    return make


def _on_kit(*command: str, out: str = "x.zarr"):
    """A command on the kit itself."""
    return lambda kit, folder: [
        *[word.format(kit=kit, folder=folder) for word in command], *(["-o", folder / "out" / out] if out else [])
    ]  # fmt: skip


def _segment(function: str, *more: object):
    """Segment the whole slide with a function of `SEGMENTERS`, in its own store."""
    return lambda kit, folder: [
        "segment", "generic", _copy(kit, folder, "s.raw.zarr"), "--function", function, "--diameter-um", "6", *more,
    ]  # fmt: skip


def _bundle_without_pixels(kit: Path, folder: Path) -> list[object]:
    bundle = Path(shutil.copytree(kit / "bundles" / "bundle_000.zarr", folder / "bundle_000.zarr"))
    for path in bundle.rglob("c/0/0/0"):
        path.write_bytes(path.read_bytes()[:20])
    return ["segment", "generic", bundle, "-o", folder / "out" / "b.cells.parquet"]


def _patch_result(change: Callable[[Path, pa.Table], object]):
    def make(kit: Path, folder: Path) -> list[object]:
        path = folder / "b.cells.parquet"
        change(path, pq.read_table(kit / "b.cells.parquet"))
        output = ("-o", folder / "out" / "x.zarr")
        return ["resolve", kit / "s.raw.zarr", path, *GENERIC[:2], *output]

    return make


def _two_cells_of_one_name(store: Path) -> None:
    element = store / "shapes" / "cell_boundaries"
    shapes = read_shapes(element)
    shutil.rmtree(element)
    shapes.ids[1] = shapes.ids[0]
    write_shapes(element, shapes)


def _fewer_cells(store: Path) -> None:
    for name in Store(store).names("shapes"):
        shapes = read_shapes(store / "shapes" / name)
        shutil.rmtree(store / "shapes" / name)
        write_shapes(store / "shapes" / name, shapes.take(np.arange(4)))


def _no_microns(store: Path) -> None:
    element = store / "shapes" / "cell_boundaries"
    shapes = read_shapes(element)
    shutil.rmtree(element)
    write_shapes(element, ShapesTable(shapes.ids, shapes.geometry, {}, {"global": np.eye(3)}))


def _drop_column(store: Path, column: str) -> None:
    for part in (store / "points" / "transcripts" / "points.parquet").iterdir():
        pq.write_table(pq.read_table(part).drop_columns([column]), part)


def _second_image(store: Path) -> None:
    shutil.copytree(store / "images" / "image", store / "images" / "other")


def _short_chunk(store: Path) -> None:
    chunk = store / "images" / "image" / "s0" / "c" / "0" / "0" / "0"
    chunk.write_bytes(chunk.read_bytes()[:30])


def _first_part(store: Path) -> Path:
    return next((store / "points" / "transcripts" / "points.parquet").iterdir())


def _refuse(number: int, *, at: str, name: str | None = None) -> Callable[[pytest.MonkeyPatch], None]:
    """Let the file system refuse in one place."""

    def breaks(monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: object, **__: object) -> None:
            raise OSError(number, errno.errorcode[number], name)

        monkeypatch.setattr(at, refuse)

    return breaks


def _full_after(n: int) -> Callable[[pytest.MonkeyPatch], None]:
    """A disk that is full after so many chunks and small files."""

    def breaks(monkeypatch: pytest.MonkeyPatch) -> None:
        write, left = Path.write_bytes, [n]

        def write_bytes(path: Path, data: bytes) -> int:
            if "out" in path.parts:
                left[0] -= 1
                if left[0] < 0:
                    write(path, data[: len(data) // 2])
                    raise OSError(errno.ENOSPC, "No space left on device", str(path))
            return write(path, data)

        monkeypatch.setattr(Path, "write_bytes", write_bytes)

    return breaks


def _existing(kit: Path, folder: Path) -> list[object]:
    (folder / "out" / "x.zarr").mkdir(parents=True)
    (folder / "out" / "x.zarr" / "precious").write_text("keep me")
    return _convert(kit / "image.ome.tif", folder)


def _file_in_the_way(kit: Path, folder: Path) -> list[object]:
    (folder / "out").write_text("a file where the folder should be")
    return _convert(kit / "image.ome.tif", folder)


def _qc(folder: Path, name: str, **changes: Any) -> Path:
    path = folder / name
    path.write_text(json.dumps({"sample": "a", "verdict": "PASS", **changes}))
    return path


def _multi_file(_: Path, folder: Path) -> list[object]:
    xml = """<?xml version="1.0"?><OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="urn:uuid:1">
    <Image ID="Image:0"><Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="uint16" SizeX="64" SizeY="64" SizeC="2"
    SizeZ="1" SizeT="1" PhysicalSizeX="1" PhysicalSizeY="1"><Channel ID="C:0" SamplesPerPixel="1"/><Channel ID="C:1"
    SamplesPerPixel="1"/><TiffData FirstC="0" IFD="0" PlaneCount="1"><UUID FileName="slide.ome.tif">urn:uuid:1</UUID>
    </TiffData><TiffData FirstC="1" IFD="0" PlaneCount="1"><UUID FileName="b.ome.tif">urn:uuid:2</UUID></TiffData>
    </Pixels></Image></OME>"""
    path = write_image(folder / "slide.ome.tif", nuclei(64), ome=False, description=xml, metadata=None)
    return _convert(path, folder)


def _not_ome(*more: object, **options: Any):
    return _image(*more, ome=False, metadata=None, **options)


FAULTS = [
    # --- images
    Fault("no slide", "slide-missing", lambda kit, folder: ["convert", "--technology", "ome_tif"], ("path",)),
    Fault("no such file", "slide-not-found", lambda kit, folder: _convert(folder / "a b.tif", folder), ("a b.tif",)),
    Fault("no technology", "technology-missing", lambda kit, folder: ["convert", kit / "image.ome.tif",
          "-o", folder / "out" / "x"], ("merscope",)),
    Fault("unknown technology", "technology-unknown", lambda kit, folder: ["convert", kit / "image.ome.tif",
          "--technology", "merscop", "-o", folder / "out" / "x"], ("merscop", 'did you mean "merscope"?')),
    Fault("a PNG", "not-a-tiff", _bytes(b"\x89PNG\r\n\x1a\n" + bytes(50)), ("slide.tif", "PNG")),
    Fault("a folder for a TIFF", "not-a-tiff", lambda kit, folder: _convert(kit, folder), ("folder",)),
    Fault("an empty file", "tiff-empty", _bytes(b""), ("slide.tif", "copy it again")),
    Fault("a TIFF cut short", "tiff-truncated", _image(cut=0.6), ("slide.tif", "bytes", "copy it again")),
    Fault("a TIFF of zeros", "tiff-unreadable", _bytes(b"II*\x00\x08\x00\x00\x00" + bytes(99)), ("slide.tif",)),
    Fault("a damaged tile", "tiff-undecodable", _damaged_tile, ("slide.tif", "segment 2")),
    Fault("complex pixels", "tiff-dtype", _not_ome(pixels=nuclei(64).astype(np.complex64)), ("complex64",)),
    Fault("a time series", "tiff-time-series", _image(pixels=np.zeros((3, 64, 64), np.uint8),
          metadata={**OME, "axes": "TYX"}), ("3 time points",)),
    Fault("half of a multi-file OME-TIFF", "tiff-planes-missing", _multi_file, ("slide.ome.tif", "one folder")),
    Fault("one giant compressed strip", "tiff-segment-too-large", _image("--memory-mb", 256,
          pixels=np.zeros((5200, 10_000), np.uint16), compression="zlib", rowsperstrip=5200), ("104 MB", "memory_mb")),
    Fault("OME-XML that is cut off", "ome-xml-invalid", _not_ome(description="<OME><Image></OME>"), ("slide.tif",)),
    Fault("no pixel size anywhere", "pixel-size-unknown", _not_ome(), ("slide.tif", "--pixel_size_um")),
    Fault("a pixel size of zero", "pixel-size-invalid", _image(metadata={**OME, "PhysicalSizeX": 0.0, "axes": "YX"}),
          ("slide.tif", "0.0")),
    Fault("a pixel size of zero by hand", "parameters-invalid", _image("--pixel-size-um", 0),
          ("pixel_size_um", "at least")),
    Fault("a plane that is not there", "z-plane-unknown", _image("--z", 7), ("slide.tif", "7")),
    Fault("NaN pixels", "image-not-finite", _image(pixels=np.pad(nuclei(64).astype(np.float32), ((0, 0), (0, 3)),
          constant_values=np.nan)), ("sample liver", "channel_0", "row 0, column 64", "nan")),
    # --- transcripts
    Fault("no such table", "transcripts-not-found", lambda kit, folder: _convert(kit / "image.ome.tif", folder,
          "--transcripts", folder / "t.csv"), ("t.csv",)),
    Fault("a folder for a table", "transcripts-not-found", lambda kit, folder: _convert(kit / "image.ome.tif", folder,
          "--transcripts", kit), ("no file",)),
    Fault("an empty table", "transcripts-empty-file", _table(""), ("t.csv", "header")),
    Fault("no column for the gene", "transcripts-column-missing", _table("x,y,probe_nr\n1,2,A\n"),
          ("t.csv", "gene", "x, y, probe_nr", "gene_column")),
    Fault("a gene column that is not there", "transcripts-column-missing", _table(TABLE, "--gene-column", "gen"),
          ('"gen"', 'did you mean "gene"?')),
    Fault("a column twice", "transcripts-column-duplicate", _table("x,y,gene,x\n1,2,a,3\n"), ("t.csv", '"x"')),
    Fault("NaN for a coordinate", "transcripts-nan", _table("x,y,gene\n1,2,a\nnan,2,a\n"), ("t.csv", "row 2", '"x"')),
    Fault("NaN in Parquet", "transcripts-nan", _table(pa.table({"x": [1.0, np.nan], "y": [1.0, 2.0],
          "gene": ["a", "b"]}), name="t.parquet"), ("t.parquet", "row 2", '"x"')),
    Fault("an infinite coordinate", "transcripts-nan", _table("x,y,gene\n1,inf,a\n"), ("row 1", '"y"', "inf")),
    Fault("text for a coordinate", "transcripts-value", _table("x,y,gene\n1,2,a\nleft,2,a\n"),
          ("t.csv", "line 3", '"x"', '"left"')),
    Fault("text for a coordinate in Parquet", "transcripts-value", _table(pa.table({"x": ["l", "r"], "y": [1.0, 2.0],
          "gene": ["a", "b"]}), name="t.parquet"), ("t.parquet", '"x"')),
    Fault("a row that is cut off", "transcripts-bad-row", _table("x,y,gene\n1,2,a\n1,2\n"), ("t.csv", "line 3")),
    Fault("a gene without a name", "transcripts-gene-missing", _table("x,y,gene\n1,2,a\n1,2,\n"), ("row 2", '"gene"')),
    Fault("planes in µm", "transcripts-z-plane", _table("x,y,gene,global_z\n1,2,a,1.5\n"), ("row 1", "z_column")),
    Fault("a damaged Parquet file", "transcripts-unreadable", _table(b"PAR1" + bytes(40), name="t.parquet"),
          ("t.parquet",)),
    Fault("a gzip cut short", "transcripts-unreadable", _table(gzip.compress(TABLE.encode() * 2000)[:-200],
          name="t.csv.gz"), ("t.csv.gz",)),
    Fault("an image for a table", "transcripts-unreadable", lambda kit, folder: _convert(kit / "image.ome.tif",
          folder, "--transcripts", kit / "image.ome.tif"), ("image.ome.tif", "tiff")),
    Fault("a table in UTF-16", "transcripts-unreadable", _table(TABLE.encode("utf-16")), ("t.csv",)),
    Fault("genes that are lists", "transcripts-value", _table(pa.table({"x": [1.0], "y": [1.0], "gene": [["a", "b"]]}),
          name="t.parquet"), ("t.parquet", '"gene"')),
    # --- MERSCOPE
    Fault("a file for a region", "merscope-no-folder", lambda kit, folder: ["convert", kit / "image.ome.tif",
          "--technology", "merscope", "-o", folder / "out" / "x"], ("folder",)),
    Fault("no mosaics", "merscope-no-images", _merscope(lambda region: [path.unlink() for path in
          (region / "images").glob("*.tif")]), ("region_0", "mosaic_")),
    Fault("no transform", "merscope-no-transform", _merscope(lambda region: (
          region / "images" / "micron_to_mosaic_pixel_transform.csv").unlink()), ("region_0/images", "3 × 3")),
    Fault("a transform of two lines", "transform-invalid", _transform("1 0 0\n0 1 0\n"), ("2 × 3",)),
    Fault("a transform with lines of different lengths", "transform-invalid", _transform("1 0\n0 1 0\n0 0 1\n"), ()),
    Fault("a singular transform", "transform-invalid", _transform("1 0 0\n1 0 0\n0 0 1\n"), ("singular",)),
    Fault("a transform with NaN", "transform-invalid", _transform("nan 0 0\n0 1 0\n0 0 1\n"), ("not finite",)),
    Fault("a transform of words", "transform-invalid", _transform("a b c\n"), ("numbers",)),
    Fault("no transcripts", "merscope-no-transcripts", _merscope(lambda region: (
          region / "detected_transcripts.csv").unlink()), ("region_0", "ome_tif")),
    Fault("a plane that one stain lacks", "merscope-planes-missing", _merscope(lambda region: (
          region / "images" / "mosaic_PolyT_z1.tif").unlink()), ("plane 1", "PolyT")),
    Fault("mosaics of different sizes", "merscope-mosaics-differ", _merscope(lambda region: tifffile.imwrite(
          region / "images" / "mosaic_PolyT_z1.tif", nuclei(60))), ("60 × 60", "64 × 64")),
    Fault("a mosaic with two channels", "merscope-mosaic-channels", _merscope(lambda region: tifffile.imwrite(
          region / "images" / "mosaic_PolyT_z1.tif", np.zeros((2, 64, 64), np.uint16))), ("2 channels",)),
    Fault("a truncated mosaic", "tiff-truncated", _merscope(lambda region: (
          region / "images" / "mosaic_PolyT_z1.tif").write_bytes(
              (region / "images" / "mosaic_PolyT_z1.tif").read_bytes()[:5000])), ("mosaic_PolyT_z1.tif",)),
    Fault("the vendor's cells damaged", "merscope-cells-unreadable", _merscope(lambda region: (
          region / "cell_boundaries.parquet").write_bytes(b"PAR1" + bytes(99))), ("cell_boundaries.parquet",)),
    Fault("the vendor's cells without outlines", "merscope-cells-unreadable", _merscope(lambda region: pq.write_table(
          pa.table({"EntityID": [1], "ZIndex": [0]}), region / "cell_boundaries.parquet")), ("Geometry",)),
    # --- stores
    Fault("no store", "store-missing", _on_kit("tissue", "{folder}/nowhere.zarr"), ("nowhere.zarr",)),
    Fault("a folder that is no store", "store-unreadable", _on_kit("tissue", "{kit}"), ("cellquilt convert",)),
    Fault("a file that is no store", "store-unreadable", _on_kit("tissue", "{kit}/image.ome.tif"), ("image.ome.tif",)),
    Fault("a store whose metadata was cut", "store-unreadable", _spoiled("s.raw.zarr", lambda store: (
          store / "zarr.json").write_text('{"node_ty'), "tissue", "{store}"), ("s.raw.zarr",)),
    Fault("a store without image", "image-missing", _on_kit("tissue", "{kit}/s.cells.zarr"), ("s.cells.zarr",)),
    Fault("a store with two images", "image-ambiguous", _spoiled("s.raw.zarr", _second_image, "tissue", "{store}"),
          ("image, other",)),
    Fault("an image whose metadata was cut", "image-unreadable", _spoiled("s.raw.zarr", lambda store: (
          store / "images" / "image" / "zarr.json").write_text("{"), "tissue", "{store}"), ("images/image",)),
    Fault("a damaged chunk", "image-damaged", _spoiled("s.raw.zarr", _short_chunk, "tissue", "{store}"), ("s0/c/0",)),
    Fault("saturation of one channel", "tissue-saturation-channels", _on_kit("tissue", "{kit}/s.raw.zarr",
          "--mode", "saturation"), ("saturation",)),
    # --- patches
    Fault("a channel that is not there", "channel-missing", _on_kit("patchify", "image", "{kit}/s.raw.zarr", *GENERIC,
          "--generic-channels", "DAPPI"), ("DAPPI", "channel_0")),
    Fault("an overlap that cuts cells", "patch-overlap-small", _on_kit("patchify", "image", "{kit}/s.raw.zarr",
          *GENERIC, "--patch-overlap-px", "2"), ("overlap",)),
    Fault("a length in two units", "parameter-conflict", _on_kit("patchify", "image", "{kit}/s.raw.zarr", *GENERIC,
          "--patch-width-px", "256", "--patch-width-um", "100"), ("patch_width_px", "patch_width_um")),
    Fault("arguments that are no JSON", "generic-kwargs", _on_kit("patchify", "image", "{kit}/s.raw.zarr", *GENERIC,
          "--generic-kwargs", "threshold=3"), ("JSON",)),
    Fault("the tissue of a store without", "element-missing", _on_kit("patchify", "image", "{kit}/s.raw.zarr",
          "--tissue", "{kit}/s.cells.zarr", *GENERIC), ("region_of_interest",)),
    # --- segmentation
    Fault("no such module", "generic-function", _segment("nowhere_at_all:f"), ("nowhere_at_all",)),
    Fault("no such function", "generic-function", _segment("odd_segmenters:nothing_here"), ("nothing_here",)),
    Fault("not a function", "generic-function", _segment("odd_segmenters:not_a_function"), ("int",)),
    Fault("labels of a wrong shape", "patch-failed", _segment("odd_segmenters:wrong_shape"),
          ("sample s", "patch 0", "(3, 3)", "expected")),
    Fault("labels that are floats", "patch-failed", _segment("odd_segmenters:floats"), ("float64", "integers")),
    Fault("labels that are NaN", "patch-failed", _segment("odd_segmenters:nan"), ("float64", "integers")),
    Fault("labels below zero", "patch-failed", _segment("odd_segmenters:negative"), ("negative",)),
    Fault("a function that raises", "patch-failed", _segment("odd_segmenters:raises"),
          ("sample s", "patch 0", "no fuel", "--on_patch_error skip")),
    Fault("a function that returns nothing", "patch-failed", _segment("odd_segmenters:none"), ("shape ()",)),
    Fault("an unknown method", "usage", _on_kit("segment", "celpose", "{kit}/s.raw.zarr", out=""), ("celpose",)),
    Fault("a folder that is no bundle", "store-unreadable", _on_kit("segment", "generic", "{kit}/bundles"),
          ("bundles",)),
    Fault("a bundle whose pixels are damaged", "bundle-unreadable", _bundle_without_pixels, ("patch 0",)),
    Fault("weights that are not there", "weights-missing", _on_kit("patchify", "image", "{kit}/s.raw.zarr",
          "--segmentation", "cellpose", "--weights", "{folder}/no.pth"), ("no.pth",)),
    # --- resolve
    Fault("nothing was segmented", "no-patch-results", _on_kit("resolve", "generic", "{kit}/s.raw.zarr"),
          ("generic", "cellquilt segment")),
    Fault("a result without its columns", "patch-result-invalid", _patch_result(lambda path, table: pq.write_table(
          table.drop_columns(["cut", "depth_px"]), path)), ("b.cells.parquet", "cut, depth_px")),
    Fault("a result cut short", "geoparquet-unreadable", _patch_result(lambda path, table: (
          pq.write_table(table, path), path.write_bytes(path.read_bytes()[:-50]))), ("b.cells.parquet",)),
    Fault("a result without outlines", "geoparquet-unreadable", _patch_result(lambda path, table: pq.write_table(
          table.drop_columns(["geometry"]), path)), ("b.cells.parquet", "geometry")),
    Fault("a result that is not there", "geoparquet-unreadable", _on_kit("resolve", "{kit}/s.raw.zarr",
          "{folder}/no.parquet", *GENERIC[:2]), ("no.parquet",)),
    Fault("outlines that are no outlines", "geoparquet-unreadable", _patch_result(lambda path, table: pq.write_table(
          table.set_column(table.schema.get_field_index("geometry"), "geometry",
                           pa.array([b"rubbish"] * table.num_rows, pa.binary())), path)), ("b.cells.parquet",)),
    Fault("the vendor's cells of a machine without", "vendor-cells-missing", _on_kit("resolve", "vendor",
          "{kit}/s.raw.zarr"), ("s:", "--segmentation")),
    # --- aggregate
    Fault("no cells", "element-missing", _on_kit("aggregate", "{kit}/s.raw.zarr"), ("cell_boundaries",)),
    Fault("one plane of a projection", "z-plane-unknown", _on_kit("aggregate", "{kit}/s.raw.zarr",
          "--cells", "{kit}/s.cells.zarr", "--count-z", "same"), ("count_z", "projection max")),
    Fault("two cells of one name", "cell-ids-not-unique", _spoiled("s.cells.zarr", _two_cells_of_one_name,
          "aggregate", "{kit}/s.raw.zarr", "--cells", "{store}"), ("s-1",)),
    Fault("cells that know no microns", "pixel-size-unknown", _spoiled("s.cells.zarr", _no_microns,
          "aggregate", "{kit}/s.raw.zarr", "--cells", "{store}"), ("pixel_size_um",)),
    Fault("transcripts without genes", "points-column-missing", _spoiled("s.raw.zarr",
          lambda store: _drop_column(store, "gene"), "aggregate", "{store}", "--cells", "{kit}/s.cells.zarr"),
          ("gene",)),
    Fault("transcripts cut short", "points-unreadable", _spoiled("s.raw.zarr", lambda store: _first_part(
          store).write_bytes(_first_part(store).read_bytes()[:-40]), "aggregate", "{store}",
          "--cells", "{kit}/s.cells.zarr"), ("points.parquet", "make the store anew")),
    Fault("transcripts lost", "points-unreadable", _spoiled("s.raw.zarr", lambda store: _first_part(store).unlink(),
          "aggregate", "{store}", "--cells", "{kit}/s.cells.zarr"), ("transcripts",)),
    Fault("outlines lost", "geoparquet-unreadable", _spoiled("s.cells.zarr", lambda store: (
          store / "shapes" / "cell_boundaries" / "shapes.parquet").unlink(), "aggregate", "{kit}/s.raw.zarr",
          "--cells", "{store}"), ("shapes.parquet",)),
    Fault("an element whose metadata was cut", "element-unreadable", _spoiled("s.cells.zarr", lambda store: (
          store / "shapes" / "cell_boundaries" / "zarr.json").write_text("{"), "aggregate", "{kit}/s.raw.zarr",
          "--cells", "{store}"), ("cell_boundaries",)),
    Fault("a damaged image under cells", "image-damaged", _spoiled("s.raw.zarr", _short_chunk, "aggregate", "{store}",
          "--cells", "{kit}/s.cells.zarr"), ("s0/c/0",)),
    # --- assemble, report, samples
    Fault("cells that do not fit the table", "assembly-invalid", _spoiled("s.cells.zarr", _fewer_cells, "assemble",
          "{kit}/s.raw.zarr", "{store}", "{kit}/s.table.zarr"), ("table", "cell_boundaries")),
    Fault("a part that is not there", "store-missing", _on_kit("assemble", "{kit}/s.raw.zarr", "{folder}/no.zarr"),
          ("no.zarr",)),
    Fault("a damaged table", "table-unreadable", _spoiled("s.table.zarr", lambda store: (
          store / "tables" / "table" / "obs" / "area_um2" / "c" / "0").write_bytes(b"rubbish"), "assemble",
          "{kit}/s.raw.zarr",
          "{kit}/s.cells.zarr", "{store}"), ("table",)),
    Fault("limits that are not there", "qc-thresholds-unreadable", _on_kit("assemble", "{kit}/s.zarr",
          "--qc-thresholds", "{folder}/no.yml"), ("no.yml",)),
    Fault("limits that are no limits", "qc-thresholds-invalid", lambda kit, folder: [
          (folder / "limits.yml").write_text("- check: a\n  metric: n_cells\n  text: x\n  warn_belw: 3\n"), "assemble",
          kit / "s.zarr", "--qc-thresholds", folder / "limits.yml", "-o", folder / "out" / "x.zarr"][1:],
          ("limits.yml", "warn_belw")),
    Fault("a report on no qc.json", "qc-unreadable", _on_kit("report", "{kit}/s.zarr", "--qc", "{kit}/t.csv",
          out="r.html"), ("t.csv", "--qc")),
    Fault("a report on no store", "store-missing", _on_kit("report", "{folder}/no.zarr", out="r.html"), ("no.zarr",)),
    Fault("truth that is not there", "truth-missing", _on_kit("report", "{kit}/s.zarr", "--truth", "{kit}/bundles",
          out="r.html"), ("bundles",)),
    Fault("the qc.json of another run", "sample-unknown", lambda kit, folder: ["samples", _qc(folder, "a.json"),
          "--samples", "b,c", "-o", folder / "out" / "samples.tsv"], ("'a'",)),
    Fault("a sample twice", "sample-duplicate", lambda kit, folder: ["samples", _qc(folder, "a.json"),
          _qc(folder, "b.json"), "--samples", "a,b", "-o", folder / "out" / "samples.tsv"], ("'a'",)),
    Fault("a qc.json without verdict", "qc-unreadable", lambda kit, folder: ["samples", _qc(folder, "a.json",
          verdict="GOOD"), "--samples", "a", "-o", folder / "out" / "samples.tsv"], ("a.json", "GOOD")),
    # --- tools
    Fault("an unknown preset", "simulate-preset", _on_kit("simulate", "{folder}/out/sim", "--preset", "esy", out=""),
          ("esy", 'did you mean "easy"?')),
    Fault("an unknown format", "simulate-value", _on_kit("simulate", "{folder}/out/sim", "--format", "xenum",
          "--width-px", "64", out=""), ("xenum", 'did you mean "xenium"?')),
    Fault("a width of nothing", "usage", _on_kit("simulate", "{folder}/out/sim", "--width-px", "0", out=""), ("64",)),
    Fault("a sheet with a sample twice", "input-invalid", lambda kit, folder: [(folder / "sheet.csv").write_text(
          f"sample,technology,path\na,ome_tif,{kit}/image.ome.tif\na,ome_tif,{kit}/image.ome.tif\n"), "check",
          folder / "sheet.csv"][1:], ('sample "a"', "row")),
    Fault("a folder for a sheet", "input-invalid", _on_kit("check", "{kit}", out=""), ()),
    Fault("an unknown verb", "verb-unknown", _on_kit("convrt", out=""), ('did you mean "convert"?',)),
    Fault("an unknown option", "parameter-unknown", _on_kit("tissue", "{kit}/s.raw.zarr", "--mood", "x"), ("--mood",)),
    Fault("settings that are no JSON", "settings-json", _on_kit("tissue", "{kit}/s.raw.zarr", "--settings", "{{"), ()),
    Fault("text for a number", "parameters-invalid", _on_kit("resolve", "{kit}/s.raw.zarr", "--expand-um", "wide"),
          ("expand_um", "wide", "expected a number")),
    Fault("windows of nothing", "preview-grid", _on_kit("preview", "{kit}/s.raw.zarr", *GENERIC, "--preview", "1",
          "--preview-grid", "expand_um", out="p.html"), ("expand_um",)),
    Fault("results of no run", "results-missing", _on_kit("demo", "show", "{folder}", out=""), ()),
    # --- the machine
    Fault("the output is there", "output-exists", _existing, ("x.zarr", "--overwrite")),
    Fault("an element is there", "output-exists", lambda kit, folder: ["aggregate", _copy(kit, folder, "s.zarr")],
          ("transcripts", "--overwrite")),
    Fault("a file where a folder must be", "output-not-writable", _file_in_the_way, ("out",)),
    Fault("a name that is too long", "output-not-writable", lambda kit, folder: ["convert", kit / "image.ome.tif",
          "--technology", "ome_tif", "-o", folder / "out" / ("x" * 300)], ("xxx",)),
    Fault("the disk is full at once", "disk-full", lambda kit, folder: _convert(kit / "image.ome.tif", folder),
          ("x.zarr", "free some space"), _full_after(0)),
    Fault("the disk gets full at the table", "disk-full", _on_kit("aggregate", "{kit}/s.raw.zarr", "--cells",
          "{kit}/s.cells.zarr"), ("x.zarr", "free some space"),
          _refuse(errno.ENOSPC, at="cellquilt.aggregation.stage.write_table")),
    Fault("the disk gets full at the transcripts", "disk-full", lambda kit, folder: _convert(kit / "image.ome.tif",
          folder, "--transcripts", kit / "t.csv"), ("x.zarr",),
          _refuse(errno.ENOSPC, at="cellquilt.core.points.PointsWriter.write")),
    Fault("the disk gets full at an in-place step", "disk-full", lambda kit, folder: ["tissue", _copy(kit, folder,
          "s.raw.zarr")], ("s.raw.zarr",), _refuse(errno.ENOSPC, at="cellquilt.core.shapes.ParquetWriter")),
    Fault("the disk gets full at the report", "disk-full", _on_kit("report", "{kit}/s.zarr", out="r.html"),
          ("r.html",), _refuse(errno.ENOSPC, at="pathlib.Path.write_text")),
    Fault("the disk gets full when parts are put together", "disk-full", _on_kit("assemble", "{kit}/s.raw.zarr",
          "{kit}/s.cells.zarr", "{kit}/s.table.zarr"), ("x.zarr", "free some space"),
          _refuse(errno.ENOSPC, at="cellquilt.core.store._link")),
    Fault("no permission", "output-not-writable", lambda kit, folder: _convert(kit / "image.ome.tif", folder),
          ("x.zarr", "permissions"), _refuse(errno.EACCES, at="cellquilt.core.zarr_json.write_group")),
    Fault("a file system that is read-only", "output-not-writable", _on_kit("tissue", "{kit}/s.raw.zarr"),
          ("x.zarr", "permissions"), _refuse(errno.EROFS, at="cellquilt.core.atomic.Path.mkdir")),
    Fault("an input that may not be read", "input-not-readable", lambda kit, folder: _convert(kit / "image.ome.tif",
          folder), ("/data/image.ome.tif", "permissions"), _refuse(errno.EACCES,
          at="cellquilt.readers.tiff.sniff", name="/data/image.ome.tif")),
    Fault("a network drive that went away", "file-system", lambda kit, folder: _convert(kit / "image.ome.tif",
          folder), ("EIO",), _refuse(errno.EIO, at="cellquilt.core.images._LevelWriter.write")),
    Fault("a bug", "unexpected", _on_kit("tissue", "{kit}/s.raw.zarr"), ("KeyError", "--verbose"),
          lambda monkeypatch: monkeypatch.setattr("cellquilt.segment.tissue.tissue_polygons",
                                                  lambda *_, **__: {}["no such key"])),
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_a_message_and_leaves_nothing_behind(kit, tmp_path, capsys, monkeypatch, fault: Fault):
    arguments = fault.make(kit, tmp_path)
    before = tree(tmp_path)
    with monkeypatch.context() as patch:
        if fault.breaks:
            fault.breaks(patch)
        code, _, err = cellquilt(capsys, *arguments)
    assert code != 0
    assert "Traceback" not in err
    message = err[err.index("error: [") :]
    assert message.startswith(f"error: [{fault.code}] "), message
    assert [word for word in fault.says if word not in message] == [], message
    after = tree(tmp_path)
    if "out" not in before:
        after.pop("out", None)  # the folder for results may be made; nothing may lie in it
    assert after == before


# ------------------------------------------------------------------------------------------- cases with an empty result

EMPTY: dict[str, Callable[[Chain], None]] = {}


def empty(function: Callable[[Chain], None]) -> Callable[[Chain], None]:
    EMPTY[function.__name__.strip("_").replace("_", " ")] = function
    return function


def _csv(chain: Chain, text: str) -> Path:
    path = chain.folder / "t.csv"
    path.write_text(text)
    return path


@empty
def _an_image_of_zeros(chain: Chain) -> None:
    image = write_image(chain.folder / "i.tif", np.zeros((128, 128), np.uint16))
    chain.convert(image, _csv(chain, TABLE))
    chain.segment()
    result = chain.finish().check(0, 9)
    assert result.qc["verdict"] == "FAIL"
    assert result.qc["n_assigned"] == 0
    assert "no cells" in result.page.lower()


@empty
def _an_image_of_one_value(chain: Chain) -> None:
    chain.convert(write_image(chain.folder / "i.tif", np.full((96, 130), 777, np.uint16)))
    chain.segment()
    assert chain.finish().check(0, None).qc["n_cells_pass"] == 0


@empty
def _tissue_without_nuclei(chain: Chain) -> None:
    chain.convert(write_image(chain.folder / "i.tif"), _csv(chain, TABLE))
    chain.segment("--generic-function", "odd_segmenters:nothing")
    result = chain.finish().check(0, 9)
    assert result.qc["tissue_area_um2"] > 0
    assert result.qc["n_inside_image"] == 9


@empty
def _every_patch_fails_and_is_skipped(chain: Chain) -> None:
    chain.convert(write_image(chain.folder / "i.tif"))
    chain.segment("--generic-function", "odd_segmenters:raises", "--on-patch-error", "skip")
    result = chain.finish().check(0, None)
    assert result.qc["patches"]["n_failed"] >= 1
    assert result.qc["verdict"] == "FAIL"


@empty
def _every_cell_is_too_small(chain: Chain) -> None:
    chain.convert(write_image(chain.folder / "i.tif"))
    chain.segment("--min-area-um2", 10_000)
    chain.finish().check(0, None)


@empty
def _every_cell_fails_and_is_dropped(chain: Chain) -> None:
    """Filters that leave nothing stopped others' aggregation."""
    chain.convert(write_image(chain.folder / "i.tif"), _csv(chain, TABLE))
    chain.segment()
    result = chain.finish("--min-transcripts", 1000, "--drop-failed").check(0, 9)
    assert result.qc["n_assigned"] == 0


@empty
def _a_table_without_rows(chain: Chain) -> None:
    chain.convert(write_image(chain.folder / "i.tif"), _csv(chain, "x,y,gene\n"))
    chain.segment()
    result = chain.finish().check(9, 0)
    assert result.qc["n_counted"] == 0


@empty
def _nothing_at_all(chain: Chain) -> None:
    image = write_image(chain.folder / "i.tif", np.zeros((64, 64), np.uint8))
    chain.convert(image, _csv(chain, "x,y,gene\n"))
    chain.segment()
    chain.finish().check(0, 0)


@empty
def _all_transcripts_outside_the_image(chain: Chain) -> None:
    """As with micrometres taken for pixels, or a wrong transform: all is kept, and the verdict says it."""
    rows = "".join(f"{5000 + k},{-400 - k},G{k % 2}\n" for k in range(20))
    chain.convert(write_image(chain.folder / "i.tif"), _csv(chain, "x,y,gene\n" + rows))
    chain.segment()
    result = chain.finish().check(9, 20)
    assert (result.qc["n_inside_image"], result.qc["n_assigned"]) == (0, 0)
    assert result.qc["verdict"] == "FAIL"


@empty
def _one_transcript(chain: Chain) -> None:
    chain.convert(write_image(chain.folder / "i.tif"), _csv(chain, "x,y,gene\n12,12,A\n"))
    chain.segment()
    result = chain.finish().check(9, 1)
    assert (result.qc["n_assigned"], result.qc["n_counted"]) == (1, 1)


@empty
def _a_transcript_beyond_all_numbers(chain: Chain) -> None:
    chain.convert(write_image(chain.folder / "i.tif"), _csv(chain, "x,y,gene\n12,12,A\n1e300,-1e300,B\n"))
    chain.segment()
    result = chain.finish().check(9, 2)
    assert (result.qc["n_inside_image"], result.qc["n_counted"]) == (1, 1)


@empty
def _all_transcripts_are_controls(chain: Chain) -> None:
    chain.convert(write_image(chain.folder / "i.tif"), _csv(chain, TABLE.replace("G", "Blank-")))
    chain.segment()
    result = chain.finish().check(9, 9)
    assert (result.qc["n_counted"], result.qc["n_control"]) == (0, 9)


@empty
def _no_transcript_is_good_enough(chain: Chain) -> None:
    text = "x,y,gene,qv\n12,12,A,3\n32,12,B,4\n"
    chain.convert(write_image(chain.folder / "i.tif"), _csv(chain, text), "--min-qv", 20)
    chain.segment()
    result = chain.finish().check(9, 2)
    assert (result.qc["n_assigned"], result.qc["n_counted"]) == (2, 0)


@empty
def _one_pixel(chain: Chain) -> None:
    image = write_image(chain.folder / "i.tif", np.full((1, 1), 9, np.uint16))
    chain.convert(image, _csv(chain, "x,y,gene\n0.1,0.1,A\n"))
    chain.segment()
    result = chain.finish().check(0, 1)
    assert result.qc["n_inside_image"] == 1


@empty
def _a_line_of_pixels(chain: Chain) -> None:
    chain.convert(write_image(chain.folder / "i.tif", nuclei()[64:65]))
    chain.segment()
    chain.finish().check(3, None)


@empty
def _one_cell(chain: Chain) -> None:
    chain.convert(write_image(chain.folder / "i.tif", nuclei(40)), _csv(chain, "x,y,gene\n7,7,A\n7.5,7.5,B\n"))
    chain.segment("--generic-function", "odd_segmenters:one", resolve=("--expand-um", 0))
    result = chain.finish().check(1, 2)
    assert result.qc["n_counted"] == 2
    assert result.qc["median_area_um2"] == pytest.approx(100 * PIXEL_UM**2)


@empty
def _an_image_smaller_than_a_patch(chain: Chain) -> None:
    chain.convert(write_image(chain.folder / "i.tif", nuclei(70)))
    chain.segment(patch=("--patch-width-px", 4096))
    chain.finish().check(4, None)


@empty
def _odd_names_of_channels(chain: Chain) -> None:
    """Slashes, blanks and one name twice broke others' stores."""
    pixels = np.stack([nuclei(), nuclei(), nuclei()])
    names = {"Channel": {"Name": ["CD3/CD8 (a)", "DAPI", "DAPI"]}}
    chain.convert(write_image(chain.folder / "i.tif", pixels, metadata={**OME, "axes": "CYX", **names}))
    chain.segment()
    table = anndata.read_zarr(chain.finish().check(9, None).store / "tables" / "table")
    assert list(table.obsm["intensities"].columns)[:2] == ["CD3_CD8 (a)", "DAPI"]
    assert len(set(table.obsm["intensities"].columns)) == 3


@empty
def _odd_names_of_genes_and_of_columns(chain: Chain) -> None:
    text = 'x,y,gene,a/b,_index\n12,12,HLA-A/B,1,2\n12,12,"Gm, 1",3,4\n12,12,NA,5,6\n12,12,éβ,7,8\n'
    chain.convert(write_image(chain.folder / "i.tif"), _csv(chain, text))
    chain.segment()
    metadata = {"metadata": {"age/sex": "3/f", "_index": "x", "cell_id": "mine"}}
    result = chain.finish("--settings", json.dumps(metadata)).check(9, 4)
    table = anndata.read_zarr(result.store / "tables" / "table")
    assert sorted(table.var_names) == sorted(["HLA-A/B", "Gm, 1", "NA", "éβ"])
    assert table.obs["age_sex"].tolist() == ["3/f"] * 9
    assert table.obs["sheet_cell_id"].tolist() == ["mine"] * 9


@empty
def _the_vendor_found_no_cells(chain: Chain) -> None:
    region = _region(chain.folder)
    empty = pa.table({"EntityID": pa.array([], pa.int64()), "ZIndex": pa.array([], pa.int64()),
                      "Geometry": pa.array([], pa.binary())})  # fmt: skip
    pq.write_table(empty, region / "cell_boundaries.parquet")
    chain.convert(region, technology="merscope")
    chain.do("resolve", "vendor", chain.store("raw"), "-o", chain.store("cells"))
    chain.finish(parts=("raw", "cells", "table")).check(0, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", EMPTY)
def test_an_empty_or_odd_slide_has_a_correct_result(chain, name):
    EMPTY[name](chain)
    assert not [path for path in chain.folder.rglob(".*") if "partial" in path.name or "delta" in path.name]


def test_there_are_enough_of_them():
    codes = {fault.code for fault in FAULTS}
    assert len(codes) >= 40
    assert len(codes) + len(EMPTY) >= 60
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
