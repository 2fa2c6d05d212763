"""Packed polygons are the polygons, whatever they are."""

import numpy as np
import pytest
import shapely
from cellquilt.core.shapes import mapped, read_geoparquet, write_geoparquet
from cellquilt.geometry import packed
from cellquilt.geometry.packed import HeldPolygons, PackedPolygons, polygons_of
from cellquilt.geometry.polygonize import labels_to_polygons
from cellquilt.geometry.polygons import Rings
from cellquilt.geometry.wkb import wkb_of_rings
from hypothesis import given, settings
from hypothesis import strategies as st

LATTICE = labels_to_polygons(np.random.default_rng(0).integers(0, 9, (30, 30)))[1]  # parts, holes, touching corners
SQUARES = shapely.box(*np.random.default_rng(1).uniform(0, 40, (2, 12)), 50, 60)
OTHERS = np.array(
    [
        shapely.Polygon(),
        shapely.box(-0.0, 0.0, 5, 5),  # minus zero is no whole number here: its sign would be lost
        shapely.box(-70_000, -3, 2**29, 8),  # steps longer than 16 bits
        shapely.box(2.0**40, 0, 2.0**40 + 1, 1),
        shapely.MultiPolygon([shapely.box(0, 0, 1, 1), shapely.box(3, 3, 4, 4.5)]),
    ]
)
ALL = np.concatenate([LATTICE, SQUARES, OTHERS])


def wkb(polygons):
    return shapely.to_wkb(polygons).tolist()


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(packed, "_BLOCK", 4)
    monkeypatch.setattr(packed, "_WRITTEN", 3)


@pytest.mark.parametrize(
    "polygons", [LATTICE, SQUARES, OTHERS, ALL, ALL[:0]], ids=["lattice", "free", "odd", "all", "no"]
)
def test_bytes_of_wkb_are_those_of_shapely(polygons):
    rings = Rings.from_shapely(polygons)
    assert wkb_of_rings(rings).to_pylist() == wkb(polygons)
    once = PackedPolygons.of([rings])
    assert wkb(once.objects()) == wkb(polygons)
    assert once.wkb(0, len(once)).to_pylist() == wkb(polygons)
    assert once.wkb(len(once) // 3, len(once) // 2).to_pylist() == wkb(polygons[len(once) // 3 : len(once) // 2])


def test_mapped_polygons_are_those_of_shapely():
    matrix = np.array([[2.0, 0.5, 30.0], [0.0, 0.7, -10.0], [0.0, 0.0, 1.0]])
    tight = PackedPolygons.of([Rings.from_shapely(ALL)]).take(np.arange(len(ALL))[::-1])
    assert tight.mapped(np.eye(3)) is tight
    assert wkb(tight.mapped(matrix).objects()) == wkb(mapped(ALL[::-1], matrix))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_packed_and_held_polygons_are_used_alike(data):
    held = polygons_of(ALL)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ALL)), max_size=3)))
    tight = PackedPolygons.of(Rings.from_shapely(part) for part in np.split(ALL, cuts))
    for _ in range(2):
        index = np.array(data.draw(st.lists(st.integers(0, len(held) - 1), max_size=20)), dtype=np.int64)
        new = np.array(data.draw(st.lists(st.integers(0, 9), max_size=5, unique=True)), dtype=np.int64)
        parts = [(new, OTHERS[: new.size]), (new + 10, Rings.from_shapely(SQUARES[: new.size]))]
        before = wkb(held.objects()), wkb(tight.objects())
        assert wkb(held.take(index).objects()) == wkb(tight.take(index).objects())
        assert wkb(held.rings(index).to_shapely()) == wkb(tight.rings(index).to_shapely())
        changed = held.replaced(parts), tight.replaced(parts)
        assert before == (wkb(held.objects()), wkb(tight.objects()))  # neither changes
        held, tight = changed
        assert wkb(held.objects()) == wkb(tight.objects())
        for name in ("bounds", "measures", "n_parts", "n_rings", "n_vertices", "on_lattice"):
            np.testing.assert_array_equal(getattr(held.traits, name), getattr(tight.traits, name))
    assert isinstance(held.blank(), HeldPolygons)
    assert wkb(held.blank().objects()) == wkb(tight.blank().objects())


@pytest.mark.parametrize("polygons", [ALL, ALL[:0], OTHERS[:1]], ids=["all", "no", "empty"])
def test_a_file_of_packed_polygons_is_that_of_held_ones(tmp_path, polygons):
    columns = {"cut": np.arange(len(polygons)) % 3 == 0, "patch": np.arange(len(polygons), dtype=np.int32)}
    index = ("cell_id", np.array([f"s-{k}" for k in range(len(polygons))], dtype=str))
    for name, geometry in (("held", polygons), ("packed", PackedPolygons.of([Rings.from_shapely(polygons)]))):
        write_geoparquet(tmp_path / name, geometry, columns, index=index, metadata={"a": 1})
    (first, held, said), (second, tight, also) = (read_geoparquet(tmp_path / name) for name in ("held", "packed"))
    assert wkb(first) == wkb(second) == wkb(polygons)
    assert held.equals(tight, check_metadata=True)
    assert said == also == {"a": 1}
