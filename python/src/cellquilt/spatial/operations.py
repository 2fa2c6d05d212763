"""Operations across elements: joins by place, statistics of regions, labels carried from one modality to another."""

from typing import TYPE_CHECKING, Any

import numpy as np
import shapely
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from cellquilt.core.errors import CellquiltError, did_you_mean
from cellquilt.spatial.elements import frame_in, shared_system, table_of_element
from cellquilt.spatial.slides import codes_of

if TYPE_CHECKING:
    import geopandas as gpd
    import pandas as pd
    from spatialdata import SpatialData

#: Relations of `sjoin`, and which rows it keeps.
PREDICATES = ("intersects", "within", "contains", "covers", "covered_by", "touches", "overlaps", "crosses")
HOWS = ("inner", "left", "right")
#: How labels are carried over.
TRANSFERS = ("overlap", "nearest")


def sjoin(
    sdata: "SpatialData",
    left: str,
    right: str,
    how: str = "left",
    predicate: str = "intersects",
    *,
    coordinate_system: str | None = None,
) -> "gpd.GeoDataFrame":
    """Join two elements by where they lie.

    Parameters
    ----------
    sdata
        Object with both.
    left, right
        Names of shapes or points; they may be of different coordinates.
    how
        ``left`` keeps all rows of the left element, ``right`` of the right, ``inner`` those with a partner.
    predicate
        What the left geometry does to the right: ``intersects``, ``within``, ``contains``, ``covers``, ``covered_by``,
        ``touches``, ``overlaps`` or ``crosses``.
    coordinate_system
        Where they are compared. None: ``microns`` where both are in it, else ``global``, else the first that they
        share.

    Returns
    -------
    geopandas.GeoDataFrame
        As ``geopandas.sjoin`` gives it: a row for each pair, with the left one's geometry (the right one's for
        ``right``) in that coordinate system, and the other's id in ``index_right`` (``index_left``).

    Raises
    ------
    CellquiltError
        ``element-unknown``, ``element-kind``, ``coordinate-systems-disjoint``, ``coordinate-system-unknown``,
        ``sjoin-how-unknown``, ``sjoin-predicate-unknown``.
    """
    import geopandas as gpd

    if how not in HOWS:
        raise CellquiltError("sjoin-how-unknown", f'how is "{how}"', did_you_mean(how, HOWS))
    if predicate not in PREDICATES:
        raise CellquiltError(
            "sjoin-predicate-unknown", f'unknown predicate "{predicate}"', did_you_mean(predicate, PREDICATES)
        )
    system = shared_system(sdata, left, right, coordinate_system)
    a, b = (_named(frame_in(sdata, name, system), side) for name, side in ((left, "left"), (right, "right")))
    return gpd.sjoin(a, b, how=how, predicate=predicate, lsuffix="left", rsuffix="right")


def _named(frame: "gpd.GeoDataFrame", side: str) -> "gpd.GeoDataFrame":
    """With an index that gets a name of its own in the result."""
    frame.index.name = None
    taken = [name for name in frame.columns if name in ("index_left", "index_right")]
    return frame.rename(columns={name: f"{name}_{side}" for name in taken})


def region_statistics(
    sdata: "SpatialData",
    regions: str,
    cells: str = "cell_boundaries",
    key: str | None = None,
    *,
    table: str | None = None,
    coordinate_system: str | None = None,
) -> "pd.DataFrame":
    """What lies in each region.

    Parameters
    ----------
    sdata
        Object with both.
    regions
        Name of shapes: tissues, cores, annotations. They may overlap, a cell then counts in each.
    cells
        Name of shapes or points; a cell is where its centroid is.
    key
        Column of the cells' table with groups, such as cell types: their shares are given as well.
    table
        Name of the table; None: the first that annotates the cells.
    coordinate_system
        As `sjoin` takes it. Areas are in µm² if it is ``microns``.

    Returns
    -------
    pandas.DataFrame
        A row for each region, by its id: ``n_cells``, ``area``, ``density`` (cells on 1 mm², or a million units of
        area), ``share_cells`` (of all cells), the mean of every number in the table's ``obs`` (``mean_<column>``)
        and of every channel (``mean_intensity_<channel>``), and ``share_<group>`` of the cells with a group.

    Raises
    ------
    CellquiltError
        ``table-missing``, ``column-unknown``, and what `sjoin` raises.
    """
    import pandas as pd

    system = shared_system(sdata, cells, regions, coordinate_system)
    places, areas = frame_in(sdata, cells, system), frame_in(sdata, regions, system)
    outlines = np.asarray(areas.geometry.array, dtype=object)
    middle = shapely.centroid(np.asarray(places.geometry.array, dtype=object))
    region, cell = shapely.STRtree(middle).query(outlines, predicate="intersects")
    n = len(outlines)
    number = np.bincount(region, minlength=n)
    area = shapely.area(outlines)
    out: dict[str, NDArray] = {
        "n_cells": number,
        "area": area,
        "density": np.divide(number * 1e6, area, out=np.full(n, np.nan), where=area > 0),
        "share_cells": number / max(len(middle), 1),
    }
    annotating = table_of_element(sdata, cells, table)
    if annotating is None:
        if key is not None:
            raise CellquiltError("table-missing", f'no table annotates "{cells}"', "run `cellquilt.aggregate` first")
        return pd.DataFrame(out, index=areas.index)
    found, ids = annotating
    row = pd.Index(ids).get_indexer(places.index)[cell]
    in_table = row >= 0
    region, row = region[in_table], row[in_table]

    def mean(values: NDArray) -> NDArray[np.float64]:
        own = np.asarray(values, dtype=np.float64)[row]
        known = np.isfinite(own)
        total = np.bincount(region[known], weights=own[known], minlength=n)
        counted = np.bincount(region[known], minlength=n)
        return np.divide(total, counted, out=np.full(n, np.nan), where=counted > 0)

    for name in found.obs.columns:
        if pd.api.types.is_numeric_dtype(found.obs[name]):
            out[f"mean_{name}"] = mean(found.obs[name].to_numpy(dtype=np.float64, na_value=np.nan))
    intensities: Any = found.obsm.get("intensities")
    if isinstance(intensities, pd.DataFrame):
        for name in intensities.columns:
            out[f"mean_intensity_{name}"] = mean(intensities[name].to_numpy())
    if key is not None:
        codes, groups = codes_of(found, key, "column-unknown")
        own = codes[row]
        some = own >= 0
        counts = np.bincount(region[some] * len(groups) + own[some], minlength=n * len(groups)).reshape(n, len(groups))
        total = counts.sum(axis=1, keepdims=True)
        shares = np.divide(counts, total, out=np.full(counts.shape, np.nan), where=total > 0)
        out |= {f"share_{name}": shares[:, k] for k, name in enumerate(groups)}
    return pd.DataFrame(out, index=areas.index)


def transfer_labels(
    sdata: "SpatialData",
    source: str,
    target: str,
    column: str,
    how: str = "overlap",
    *,
    table: str | None = None,
    max_distance: float | None = None,
    coordinate_system: str | None = None,
) -> "pd.DataFrame":
    """Carry a label, or a number, from one element to another: from bins to cells, or between two machines' cells.

    Parameters
    ----------
    sdata
        Object with both.
    source, target
        Names of shapes or points; they may be of different coordinates.
    column
        Of the source's own table, or of the table that annotates it. Text, categories and booleans are labels; numbers
        are averaged.
    how
        ``overlap``: by the area of the target that sources of each label cover; the label that covers most wins, of
        equals the first by name. Numbers are averaged by area. ``nearest``: that of the nearest source, by centroids.
    table
        Name of the table; None: the first that annotates the source.
    max_distance
        For ``nearest``: farther sources (in units of the coordinate system) say nothing. None: any distance.
    coordinate_system
        As `sjoin` takes it.

    Returns
    -------
    pandas.DataFrame
        A row for each target, by its id: ``label`` (missing where there is none), and ``share`` (of the target that
        bears the label; of its area that is covered, for numbers) or ``distance``.

    Raises
    ------
    CellquiltError
        ``transfer-unknown``, ``column-unknown``, and what `sjoin` raises.
    """
    import pandas as pd

    if how not in TRANSFERS:
        raise CellquiltError("transfer-unknown", f'how is "{how}"', did_you_mean(how, TRANSFERS))
    system = shared_system(sdata, source, target, coordinate_system)
    a, b = frame_in(sdata, source, system), frame_in(sdata, target, system)
    values = _column(sdata, source, a, column, table)
    labels = not pd.api.types.is_numeric_dtype(values) or pd.api.types.is_bool_dtype(values)
    codes, names = pd.factorize(values, sort=True) if labels else (np.where(values.isna(), -1, 0), [])
    known = np.flatnonzero(codes >= 0)
    from_, to = (np.asarray(frame.geometry.array, dtype=object) for frame in (a.iloc[known], b))
    numbers = values.to_numpy(dtype=np.float64, na_value=np.nan)[known] if not labels else None
    codes = np.asarray(codes)[known]
    if how == "nearest":
        place, far = _nearest(from_, to)
        near = (place >= 0) & (far <= (np.inf if max_distance is None else max_distance))
        found = _labels(np.where(near, codes[place] if codes.size else -1, -1), names) if labels else None
        if numbers is not None:
            found = np.where(near, numbers[place] if numbers.size else np.nan, np.nan)
        return pd.DataFrame({"label": found, "distance": far}, index=b.index)
    if len(to) and (shapely.area(to) == 0).all():  # points have no area: what they lie in
        share, member, owner = _covering(from_, to)
    else:
        share, member, owner = _overlaps(from_, to)
    n = len(to)
    if numbers is not None:
        covered = np.bincount(member, weights=share, minlength=n)
        total = np.bincount(member, weights=share * numbers[owner], minlength=n)
        mean = np.divide(total, covered, out=np.full(n, np.nan), where=covered > 0)
        return pd.DataFrame({"label": mean, "share": np.minimum(covered, 1)}, index=b.index)
    best, most = np.full(n, -1), np.zeros(n)
    if member.size:
        pair, which = np.unique(member * max(len(names), 1) + codes[owner], return_inverse=True)
        covered = np.bincount(which.ravel(), weights=share)
        code, of = pair % max(len(names), 1), pair // max(len(names), 1)
        # The largest of each target first; rounding makes no difference between equals.
        order = np.lexsort((code, -np.round(covered, 9), of))
        first = order[np.unique(of[order], return_index=True)[1]]
        best[of[first]], most[of[first]] = code[first], covered[first]
    return pd.DataFrame({"label": _labels(best, names), "share": np.minimum(most, 1)}, index=b.index)


def _labels(codes: NDArray, names: Any) -> "pd.Categorical":
    import pandas as pd

    return pd.Categorical.from_codes(np.asarray(codes, dtype=np.int64), [str(name) for name in names])  # type: ignore[arg-type]


def _column(sdata: "SpatialData", name: str, frame: "gpd.GeoDataFrame", column: str, table: str | None) -> "pd.Series":
    """A column of an element, or of the table that annotates it, by the element's rows."""
    if column in frame.columns and column != "geometry":
        return frame[column]
    annotating = table_of_element(sdata, name, table)
    columns = [str(own) for own in frame.columns if own != "geometry"]
    if annotating is not None:
        found, ids = annotating
        if column in found.obs:
            own = found.obs[column]
            own.index = ids
            return own.reindex(frame.index)
        columns += map(str, found.obs.columns)
    raise CellquiltError("column-unknown", f'"{name}" has no column "{column}"', did_you_mean(column, columns))


def _nearest(from_: NDArray[np.object_], to: NDArray[np.object_]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    if not len(from_) or not len(to):
        return np.full(len(to), -1), np.full(len(to), np.inf)
    a, b = (shapely.get_coordinates(shapely.centroid(geometry)) for geometry in (from_, to))
    far, place = cKDTree(a).query(b)
    return place, far


def _overlaps(
    from_: NDArray[np.object_], to: NDArray[np.object_]
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
    """Pairs that overlap: the share of the target, the target, the source."""
    member, owner = shapely.STRtree(from_).query(to, predicate="intersects")
    order = np.lexsort((owner, member))
    member, owner = member[order], owner[order]
    share = np.empty(member.size)
    areas = shapely.area(to)
    # Whole groups of pairs at a time: intersections are objects.
    for start in range(0, member.size, 200_000):
        part = slice(start, start + 200_000)
        share[part] = shapely.area(shapely.intersection(from_[owner[part]], to[member[part]])) / areas[member[part]]
    some = share > 0
    return share[some], member[some], owner[some]


def _covering(
    from_: NDArray[np.object_], to: NDArray[np.object_]
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
    """Pairs of a point and what it lies in, each of as many as there are with an equal share."""
    member, owner = shapely.STRtree(from_).query(to, predicate="intersects")
    order = np.lexsort((owner, member))
    member, owner = member[order], owner[order]
    return 1 / np.bincount(member, minlength=len(to))[member], member, owner
