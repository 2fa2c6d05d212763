"""What a segmentation method is, and the list of them.

A method is one module with two functions:

``plan(image, settings, regions) -> Plan``
    Runs in the patchify task, where the slide is and the engine's library is not: which channels, what diameter, what
    tile lattice, which settings travel in the bundles.
``load(bundle) -> Segmenter``
    Runs in the segmentation task, where the library is and the slide is not; loads the model once.

and, if its weights are a file or folder that users name, ``MODEL_SETTING``, the name of that setting. To add one, write
the module and name it in `METHODS`.
"""

import importlib
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from cellquilt.core.errors import CellquiltError, did_you_mean
from cellquilt.patches.bundle import Bundle
from cellquilt.patches.grid import Lattice, Patch

if TYPE_CHECKING:
    from pathlib import Path

    from cellquilt.core.images import Image

#: Method → module that has `plan` and `load`.
METHODS: dict[str, str] = {
    "cellpose": "cellquilt.segment.cellpose",
    "generic": "cellquilt.segment.generic",
    "stardist": "cellquilt.segment.stardist",
}


@dataclass(frozen=True)
class Plan:
    """What a method decides before the slide is cut.

    Attributes
    ----------
    method
        Its name.
    channels
        Names of the channels it wants, in its order.
    diameter_px
        Expected diameter of its objects in slide pixels; the halo must be twice that.
    lattice
        Its tiling.
    nuclear
        Whether its objects are nuclei, which then grow to cells.
    settings
        Plain data for the bundles, with everything `load` needs.
    facts
        Plain data for the record, for example how the diameter was found.
    joint
        Whether all channels are normalised by the same values, as colours are.
    """

    method: str
    channels: tuple[str, ...]
    diameter_px: float
    lattice: Lattice
    nuclear: bool
    settings: dict[str, Any]
    facts: dict[str, Any] = field(default_factory=dict)
    joint: bool = False


@dataclass(frozen=True)
class PatchLabels:
    """What a segmenter made of a patch.

    Attributes
    ----------
    patch
        The patch.
    labels
        (h, w) int32 of its window; 0 is background. None if there was an error.
    seconds
        Wall time.
    error
        What went wrong, or None.
    """

    patch: Patch
    labels: np.ndarray | None
    seconds: float
    error: Exception | None = None


class Segmenter(Protocol):
    """A loaded method."""

    #: Plain data for the record: versions, checksum of the weights, threads.
    facts: dict[str, Any]

    def segment(self, bundle: Bundle) -> Iterator[PatchLabels]:
        """Segment all patches of a bundle, in their order. Errors of a patch come as `PatchLabels.error`."""
        ...


def _module(method: str) -> Any:
    if method not in METHODS:
        raise CellquiltError(
            "segmentation-method-unknown", f"no segmentation method {method!r}", did_you_mean(method, METHODS)
        )
    return importlib.import_module(METHODS[method])


def plan(
    method: str, image: "Image", settings: Mapping[str, Any] | None = None, regions: np.ndarray | None = None
) -> Plan:
    """Let a method decide about a slide.

    Parameters
    ----------
    method
        Name in `METHODS`.
    image
        The slide.
    settings
        Values by the names of the settings table; what is missing has its default.
    regions
        (n,) tissue polygons in global pixels.

    Raises
    ------
    CellquiltError
        ``segmentation-method-unknown``, ``channel-missing``, or what the method refuses.
    """
    return _module(method).plan(image, settings or {}, regions)


def load(method: str, bundle: Bundle) -> Segmenter:
    """Load a method's engine for a bundle.

    Raises
    ------
    CellquiltError
        ``engine-missing`` if its library is not installed here, ``weights-missing`` and others of the method.
    """
    return _module(method).load(bundle)


def model_setting(method: str) -> str | None:
    """Name of the setting that says where a method's weights are; None if it has none."""
    return getattr(_module(method), "MODEL_SETTING", None)


def with_model(settings: Mapping[str, Any], method: str, weights: "Path | None") -> Mapping[str, Any]:
    """Settings with the place of a method's weights, where they were staged under another name than is set."""
    name = model_setting(method)
    return {**settings, name: str(weights)} if name and weights is not None else settings


def setting(settings: Mapping[str, Any], name: str) -> Any:
    """A setting's value, else its default from the one table."""
    value = settings.get(name)
    if value is not None:
        return value
    from cellquilt.core import settings as table

    return table.default(name)


_NUCLEAR = re.compile(r"dapi|hoechst|draq|syto|nuc|histone|h33|\bdna|ir19[13]|19[13]ir", re.IGNORECASE)


def is_nuclear_stain(channels: Sequence[str]) -> bool:
    """Whether the one channel there is is named like a nuclear stain."""
    return len(channels) == 1 and bool(_NUCLEAR.search(channels[0]))


def pick_channels(image: "Image", wanted: Sequence[str] | None) -> tuple[str, ...]:
    """The channels to segment.

    Parameters
    ----------
    image
        The slide.
    wanted
        Names (any case) or numbers; None takes the first channel that is named like a nuclear stain, else the first.

    Raises
    ------
    CellquiltError
        ``channel-missing`` with the names that are there.
    """
    names = [str(name) for name in image.channels]
    if not wanted:
        return (next((name for name in names if _NUCLEAR.search(name)), names[0]),)
    lower = {name.lower(): name for name in reversed(names)}
    found = []
    for item in wanted:
        text = str(item)
        if text in names:
            found.append(text)
        elif text.lower() in lower:
            found.append(lower[text.lower()])
        elif text.isdigit() and int(text) < len(names):
            found.append(names[int(text)])
        else:
            raise CellquiltError(
                "channel-missing",
                f"the image has no channel {text!r}; it has {', '.join(names)}",
                did_you_mean(text, names),
            )
    return tuple(found)


def length_px(
    settings: Mapping[str, Any], name: str, pixel_size_um: float | None, *, default: bool = True
) -> float | None:
    """A length that has a name in pixels and one in microns (``<name>_px``, ``<name>_um``), in pixels.

    Raises
    ------
    CellquiltError
        ``parameter-conflict`` if both are given.
    """
    px, um = settings.get(f"{name}_px"), settings.get(f"{name}_um")
    if px is not None and um is not None:
        raise CellquiltError("parameter-conflict", f"both {name}_px and {name}_um are given", "give one of them")
    if px is None and um is None and default:
        um = setting(settings, f"{name}_um")
    if px is not None:
        return float(px)
    return float(um) / (pixel_size_um or 1.0) if um is not None else None


def each_patch(bundle: Bundle, function: Callable[[Patch, np.ndarray], np.ndarray]) -> Iterator[PatchLabels]:
    """Run a function on each patch's normalised pixels, with time and errors.

    Parameters
    ----------
    bundle
        The patches.
    function
        (patch, (C, h, w) float32 pixels of its *context*) → (h, w) labels of its *window*.
    """
    for item in bundle:
        started = time.perf_counter()
        try:
            y0, _, x0, _ = item.patch.context
            labels = function(item.patch, bundle.normalization.apply(item.pixels, y0, x0))
        except Exception as error:  # an engine may raise anything; the caller decides whether it is fatal
            yield PatchLabels(item.patch, None, time.perf_counter() - started, error)
        else:
            yield PatchLabels(item.patch, labels, time.perf_counter() - started)


def window_of(patch: Patch, context: np.ndarray) -> np.ndarray:
    """Cut a (…, h, w) array of a patch's context to its window."""
    (cy, _, cx, _), (y0, y1, x0, x1) = patch.context, patch.window
    return context[..., y0 - cy : y1 - cy, x0 - cx : x1 - cx]
