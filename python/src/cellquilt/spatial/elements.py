"""Elements of SpatialData objects: where they lie, their shapes, and what tables say of them."""

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cellquilt.core.errors import CellquiltError, did_you_mean
from cellquilt.core.transforms import GLOBAL, MICRONS, Affine, apply

if TYPE_CHECKING:
    import geopandas as gpd
    from anndata import AnnData
    from spatialdata import SpatialData


def element_of(sdata: "SpatialData", name: str) -> Any:
    """An image, labels, shapes or points element.

    Raises
    ------
    CellquiltError
        ``element-unknown``.
    """
    known = [own for kind in (sdata.images, sdata.labels, sdata.shapes, sdata.points) for own in kind]
    if name not in known:
        raise CellquiltError("element-unknown", f'there is no element "{name}"', did_you_mean(name, known))
    return sdata[name]


def maps_of(sdata: "SpatialData", name: str) -> dict[str, Affine]:
    """Coordinate system → (3, 3) map from an element's own coordinates."""
    from spatialdata.transformations import get_transformation

    found: Any = get_transformation(element_of(sdata, name), get_all=True)
    return {system: np.asarray(map_.to_affine_matrix(("x", "y"), ("x", "y"))) for system, map_ in found.items()}


def shared_system(sdata: "SpatialData", left: str, right: str, wanted: str | None = None) -> str:
    """A coordinate system that two elements have in common: ``microns`` where they have it, else ``global``, else the
    first by name.

    Raises
    ------
    CellquiltError
        ``element-unknown``, ``coordinate-system-unknown``, ``coordinate-systems-disjoint``.
    """
    own, other = maps_of(sdata, left), maps_of(sdata, right)
    if wanted is not None:
        for name, systems in ((left, own), (right, other)):
            if wanted not in systems:
                raise CellquiltError(
                    "coordinate-system-unknown", f'"{name}" is not in the coordinate system "{wanted}"',
                    did_you_mean(wanted, systems),
                )  # fmt: skip
        return wanted
    both = sorted(set(own) & set(other))
    if not both:
        raise CellquiltError(
            "coordinate-systems-disjoint",
            f'"{left}" is in {", ".join(sorted(own))} and "{right}" in {", ".join(sorted(other))}',
            "bring one to the other first: cellquilt.spatial.align",
        )
    return next((name for name in (MICRONS, GLOBAL) if name in both), both[0])


def frame_in(sdata: "SpatialData", name: str, system: str) -> "gpd.GeoDataFrame":
    """Shapes or points with their columns, their coordinates in a coordinate system; circles as polygons.

    Raises
    ------
    CellquiltError
        ``element-unknown``, ``element-kind``, ``coordinate-system-unknown``.
    """
    import geopandas as gpd
    import shapely

    element, maps = element_of(sdata, name), maps_of(sdata, name)
    if system not in maps:
        raise CellquiltError(
            "coordinate-system-unknown",
            f'"{name}" is not in the coordinate system "{system}"',
            did_you_mean(system, maps),
        )
    matrix = maps[system]
    if name in sdata.points:
        table = element.compute()
        xy = apply(matrix, table[["x", "y"]].to_numpy())
        return gpd.GeoDataFrame(table, geometry=shapely.points(xy))
    if name not in sdata.shapes:
        raise CellquiltError("element-kind", f'"{name}" is an image, not shapes or points', "name shapes or points")
    geometry = np.asarray(element.geometry.array, dtype=object)
    if "radius" in element and len(geometry) and (shapely.get_type_id(geometry) == 0).all():
        geometry = np.asarray(shapely.buffer(geometry, element["radius"].to_numpy(), quad_segs=16), dtype=object)
    moved = shapely.transform(geometry, lambda xy: apply(matrix, xy))
    return gpd.GeoDataFrame(element.drop(columns="geometry"), geometry=moved)


def table_of_element(sdata: "SpatialData", name: str, table: str | None = None) -> "tuple[AnnData, NDArray] | None":
    """The table that annotates an element, and the element's id of each of its rows; None if there is none.

    Parameters
    ----------
    sdata
        The object.
    name
        The element.
    table
        Name of the table; None: the first by name that annotates it.

    Raises
    ------
    CellquiltError
        ``table-missing``.
    """
    if table is not None and table not in sdata.tables:
        raise CellquiltError("table-missing", f'there is no table "{table}"', did_you_mean(table, list(sdata.tables)))
    for own in [table] if table is not None else sorted(sdata.tables):
        found = sdata.tables[own]
        about: Any = found.uns.get("spatialdata_attrs", {})
        regions = about.get("region", [])
        if name in ([regions] if isinstance(regions, str) else list(regions)):
            rows = np.ones(found.n_obs, dtype=bool)
            if about.get("region_key") in found.obs:
                rows = (found.obs[about["region_key"]].astype(str) == name).to_numpy()
            return found[rows], found.obs[about["instance_key"]].to_numpy()[rows]
    return None
