"""Outlines read in parts: the same as all at once, and bounded in memory."""

import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapely
from cellquilt.aggregation.channels import measure_channels, measure_outlines
from cellquilt.core.errors import CellquiltError
from cellquilt.core.images import Image, ImageWriter
from cellquilt.core.shapes import ShapesTable, copy_shapes, read_shapes, write_shapes
from cellquilt.core.transforms import apply
from cellquilt.geometry.outlines import Outlines
from cellquilt.geometry.polygons import Rings
from cellquilt.geometry.wkb import rings_from_wkb

TO_PIXELS = np.array([[1.5, 0.25, -3], [-0.5, 2, 40], [0, 0, 1]])


def blobs(n: int, seed: int = 0, size: float = 400.0) -> np.ndarray:
    """Polygons with and without a hole, of several parts, and empty ones."""
    rng = np.random.default_rng(seed)
    angle = np.linspace(0, 2 * np.pi, 13, endpoint=False)
    ring = np.stack([np.cos(angle), np.sin(angle)], axis=-1) * rng.uniform(0.3, 1, (n, 13, 1)) * 9
    centre = rng.uniform(0, size, (n, 1, 2))
    out = shapely.polygons(centre + ring)
    kind = rng.integers(0, 10, n)
    out = np.where(kind < 3, shapely.difference(out, shapely.polygons(centre + ring * 0.4)), out)
    out = np.where(kind == 3, shapely.union(out, shapely.transform(out, lambda xy: xy + 30)), out)
    out[kind == 4] = shapely.Polygon()
    return out


def wkb(geometry: np.ndarray, **options: object) -> pa.Array:
    return pa.array(shapely.to_wkb(geometry, **options).tolist(), pa.binary())


def assert_same_rings(found: Rings, wanted: Rings) -> None:
    for name in ("coords", "ring_offsets", "polygon_offsets", "exterior"):
        assert getattr(found, name).dtype == getattr(wanted, name).dtype
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name))


def element_of(path, geometry: np.ndarray) -> Outlines:
    columns = {"patch": np.arange(len(geometry), dtype=np.int32), "cut": np.arange(len(geometry)) % 3 == 0}
    ids = np.array([f"s-{i + 1}" for i in range(len(geometry))], dtype=str)
    write_shapes(path, ShapesTable(ids, geometry, columns, {"global": TO_PIXELS, "microns": np.eye(3)}, {"a": 1}))
    return Outlines(path)


def test_wkb_becomes_the_arrays_that_shapely_gives():
    geometry = blobs(300)
    wanted = Rings.from_shapely(geometry)
    values = wkb(geometry)
    assert_same_rings(rings_from_wkb(values), wanted)
    assert_same_rings(rings_from_wkb(values.cast(pa.large_binary())), wanted)
    assert_same_rings(rings_from_wkb(values.slice(40, 100)), Rings.from_shapely(geometry[40:140]))
    assert_same_rings(rings_from_wkb(wkb(geometry, byte_order=0)), wanted)
    lifted = shapely.force_3d(geometry, 7.0)
    assert_same_rings(rings_from_wkb(wkb(lifted)), wanted)
    gone = geometry.copy()
    gone[::7] = None
    assert_same_rings(rings_from_wkb(wkb(gone)), Rings.from_shapely(gone))
    assert_same_rings(rings_from_wkb(wkb(geometry[:0])), Rings.from_shapely([]))


@pytest.mark.parametrize(
    "value", [b"", b"\x01", shapely.box(0, 0, 1, 1).wkb[:-3], shapely.box(0, 0, 1, 1).wkb[:-8] + b"\1" * 8]
)
def test_damaged_outlines_name_the_file(tmp_path, value):
    outlines = element_of(tmp_path / "cells", np.array([shapely.box(0, 0, 1, 1), shapely.box(2, 0, 3, 1)]))
    path = tmp_path / "cells" / "shapes.parquet"
    table = pq.read_table(path)
    at = table.schema.get_field_index("geometry")
    damaged = pa.array([value, shapely.box(0, 0, 1, 1).wkb], pa.binary())
    pq.write_table(table.set_column(at, "geometry", damaged), path)
    with pytest.raises(CellquiltError, match=r"shapes\.parquet") as caught:
        outlines.rings()
    assert caught.value.code == "geoparquet-unreadable"


def test_parts_are_the_whole(tmp_path):
    geometry = blobs(3000, seed=1)  # three batches
    outlines = element_of(tmp_path / "cells", geometry)
    whole = Rings.from_shapely(geometry)
    assert_same_rings(outlines.rings(), whole)
    np.testing.assert_array_equal(outlines.traits.areas, whole.areas())
    np.testing.assert_array_equal(outlines.traits.centroids, whole.centroids())
    rng = np.random.default_rng(0)
    kept = rng.random(3000) < 0.5
    left = outlines.take(kept)
    assert left.ids.tolist() == outlines.ids[kept].tolist()
    assert_same_rings(left.rings(), whole.take(np.flatnonzero(kept)))
    again = rng.random(len(left)) < 0.1
    rows = np.flatnonzero(kept)[again]
    assert_same_rings(left.rings(again), whole.take(rows))
    assert_same_rings(left.take(again).rings(), whole.take(rows))
    np.testing.assert_array_equal(left.rings(again, matrix=TO_PIXELS).coords, apply(TO_PIXELS, whole.take(rows).coords))
    assert len(outlines.take(np.zeros(3000, bool)).rings()) == 0


@pytest.mark.parametrize("kept", [np.arange(2500) % 5 > 1, np.zeros(2500, bool)])
def test_copied_rows_are_what_writing_them_gives(tmp_path, kept):
    element_of(tmp_path / "cells", blobs(2500, seed=2))
    copy_shapes(tmp_path / "cells", tmp_path / "copied", kept)
    write_shapes(tmp_path / "written", read_shapes(tmp_path / "cells").take(kept))
    found, wanted = (pq.read_table(tmp_path / name / "shapes.parquet") for name in ("copied", "written"))
    assert found.equals(wanted)
    assert found.schema.equals(wanted.schema, check_metadata=True)
    assert (tmp_path / "copied" / "zarr.json").read_bytes() == (tmp_path / "written" / "zarr.json").read_bytes()


@pytest.mark.parametrize("matrix", [np.eye(3), TO_PIXELS])
def test_channels_do_not_depend_on_the_memory_given(tmp_path, matrix):
    pixels = np.random.default_rng(3).integers(0, 60_000, (2, 700, 900)).astype(np.uint16)
    with ImageWriter(tmp_path / "i", pixels.shape, pixels.dtype, ["a", "b"], {"global": np.eye(3)}, chunk_px=64) as out:
        out.write(pixels, 0, 0)
    geometry = blobs(3000, seed=4)
    cells, image = element_of(tmp_path / "cells", geometry), Image(tmp_path / "i")
    whole = measure_channels(image, Rings.from_shapely(geometry), to_pixels=matrix, window_px=128)
    assert (whole.n_pixels > 0).sum() > 1500
    for memory_mb in (1500, 1):  # 1: seven strips
        found = measure_outlines(image, cells, to_pixels=matrix, memory_mb=memory_mb)
        for name in ("mean", "min", "max", "n_pixels"):
            np.testing.assert_array_equal(getattr(found, name), getattr(whole, name))
    nothing = measure_outlines(image, cells.take(np.zeros(3000, bool)), to_pixels=matrix)
    assert nothing.mean.shape == (0, 2)


_MEASURE = """
import json, sys
from pathlib import Path
import numpy as np
from cellquilt.aggregation.channels import measure_outlines
from cellquilt.core.images import open_image
from cellquilt.geometry.outlines import Outlines

def peak_mb():
    # The process's own: what getrusage says it has from the one that started it.
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024

def measure(name):
    cells = Outlines(Path(sys.argv[1]) / "shapes" / name)
    return measure_outlines(open_image(Path(sys.argv[1])), cells, to_pixels=np.eye(3), memory_mb=200)

measure("few")
before = peak_mb()
found = measure("many")
print(json.dumps([peak_mb() - before, int(found.n_pixels.sum())]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the process's peak memory")
def test_many_cells_take_no_more_memory_than_they_may(tmp_path):
    # 40,000 outlines of 320 vertices: 205 MB as arrays, 25 MB (an eighth of 200) a strip.
    n, side = 40_000, 4000
    angle = np.append(np.linspace(0, 2 * np.pi, 319, endpoint=False), 0.0)
    grid = np.stack(np.meshgrid(np.arange(200), np.arange(200)), axis=-1).reshape(-1, 1, 2) * 20 + 10.2
    circles = shapely.polygons(grid + 8 * np.stack([np.cos(angle), np.sin(angle)], axis=-1))
    element_of(tmp_path / "shapes" / "many", circles)
    element_of(tmp_path / "shapes" / "few", circles[:50])
    with ImageWriter(tmp_path / "images" / "i", (1, side, side), np.uint8, ["a"], {"global": np.eye(3)}) as out:
        out.write(np.ones((1, side, side), np.uint8), 0, 0)
    (tmp_path / "zarr.json").write_text(json.dumps({"zarr_format": 3, "node_type": "group", "attributes": {}}))
    done = subprocess.run([sys.executable, "-c", _MEASURE, tmp_path], capture_output=True, text=True, check=True)
    grown_mb, n_pixels = json.loads(done.stdout)
    assert abs(n_pixels / (n * np.pi * 64) - 1) < 0.02
    assert grown_mb < 100
