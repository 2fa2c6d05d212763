"""Regions that split a slide: what their file says, and the names that their slides get.

`lib/Inputs.groovy` reads the names in the pipeline's head job, with the same messages.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cellquilt.core.errors import CellquiltError

#: Longest name of a sample, and what no name may hold.
_LONGEST, _FORBIDDEN = 64, re.compile(r"[^A-Za-z0-9.-]+")
_HINT = "export it from QuPath, or from Xenium Explorer, as GeoJSON"


@dataclass(frozen=True)
class RegionFeature:
    """A feature of the file.

    Attributes
    ----------
    name
        As the file has it.
    slug
        What of it can be part of a sample's name.
    geometry
        GeoJSON.
    """

    name: str
    slug: str
    geometry: Any


def read_features(path: Path | str) -> list[RegionFeature]:
    """The features of a GeoJSON file with their names, in the order of the file.

    A feature is called as its property ``name`` or, without one, as its classification.

    Raises
    ------
    CellquiltError
        ``regions-unreadable``, ``regions-empty``, ``regions-name``, ``regions-twice``.
    """
    path = Path(path)
    try:
        found = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (OSError, ValueError) as error:
        raise CellquiltError("regions-unreadable", f"{path.name} is no GeoJSON", _HINT) from error
    if isinstance(found, dict):
        found = found.get("features") if "features" in found else [found]
    if not isinstance(found, list) or not all(isinstance(one, dict) and "geometry" in one for one in found):
        raise CellquiltError("regions-unreadable", f"{path.name} is no GeoJSON", _HINT)
    if not found:
        raise CellquiltError("regions-empty", f"{path.name} has no regions", _HINT)
    features: list[RegionFeature] = []
    known: dict[str, str] = {}
    for number, one in enumerate(found, 1):
        name = _name(one.get("properties"))
        slug = _FORBIDDEN.sub("_", name).strip("_")
        if not slug:
            raise CellquiltError(
                "regions-name", f"{path.name}: region {number} has no name of letters and digits", "name each region"
            )
        if slug.lower() in known:
            raise CellquiltError(
                "regions-twice", f'{path.name}: two regions are called "{known[slug.lower()]}" and "{name}"',
                "give each region a name of its own",
            )  # fmt: skip
        known[slug.lower()] = name
        features.append(RegionFeature(name, slug, one["geometry"]))
    return features


def _name(properties: Any) -> str:
    if not isinstance(properties, dict):
        return ""
    of_class = properties.get("classification")
    name = properties.get("name") or (of_class.get("name") if isinstance(of_class, dict) else None)
    return str(name or "").strip()


def region_sample(sample: str, slug: str) -> str:
    """The name of a region's slide.

    Raises
    ------
    CellquiltError
        ``regions-name`` if it is too long.
    """
    name = f"{sample}_{slug}"
    if len(name) > _LONGEST:
        raise CellquiltError(
            "regions-name", f'sample "{sample}": with the region\'s name "{slug}" it has {len(name)} letters',
            f"shorten one of them: {_LONGEST} are the most",
        )  # fmt: skip
    return name
