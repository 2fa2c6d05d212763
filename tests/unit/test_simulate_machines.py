"""The simulator's folders of protein machines and Molecular Cartography: same bytes again, the same in any tiling."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from cellquilt.core.errors import CellquiltError
from cellquilt.simulate import simulate
from machine_cases import convert, pixels, points

FORMATS = ["phenocycler", "macsima", "hyperion", "molecular_cartography"]
OPTIONS = {"width_px": 300, "height_px": 520, "pixel_size_um": 0.5, "seed": 5, "compression": "zlib", "n_genes": 20}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("name", FORMATS)
def test_same_bytes_again_and_the_same_content_in_other_tiles(tmp_path, name) -> None:
    for folder, more in {"a": {}, "b": {}, "c": {"tile_px": 256}}.items():
        simulate(tmp_path / folder, format=name, **OPTIONS, **more)
    a = contents(tmp_path / "a")
    assert a == contents(tmp_path / "b")
    assert not [file for file in a if "spool" in file]
    path = "slide_0/slide_0.qptiff" if name == "phenocycler" else "slide_0"
    stores = [convert(tmp_path / f / path, name, tmp_path / f"{f}.zarr", pixel_size_um=0.5) for f in "ac"]
    np.testing.assert_array_equal(pixels(stores[0]), pixels(stores[1]))
    whole, tiled = (
        pq.read_table(tmp_path / f / "slide_0" / "truth" / "intensities.parquet").sort_by("cell_id") for f in "ac"
    )
    assert whole.equals(tiled)
    if name == "molecular_cartography":
        columns = ["x", "y", "z_plane", "gene"]
        whole, tiled = (points(store)[columns].astype({"gene": str}).sort_values(columns) for store in stores)
        assert (whole.to_numpy() == tiled.to_numpy()).all()


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"proteins": ("CD3", "CD99")}, "CD99"),
        ({"proteins": ()}, "proteins are 0"),
        ({"proteins": ("CD3", "CD3")}, "each of them once"),
        ({"image": False}, "image is False"),
    ],
)
def test_wishes_that_cannot_be_met(tmp_path, given, text) -> None:
    with pytest.raises(CellquiltError, match="simulate-value") as caught:
        simulate(tmp_path / "out", format="macsima", width_px=64, **given)
    assert text in caught.value.message
