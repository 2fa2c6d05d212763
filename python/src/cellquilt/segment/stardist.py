"""StarDist: the library's networks and polygons, on one lattice for the whole slide.

Everything in the library that depends on the image it is given is taken out of play: its normalisation (the slide's is
used), its resizing, and where its pooling starts. A patch brings all pixels that the network sees around its window, so
that a nucleus looks the same in every patch; on a slide of one patch the result is that of ``predict_instances``.

A model is a folder with ``config.json``, weights and ``thresholds.json``, as StarDist writes it: the shipped one, or a
path. Names of StarDist's own registry are understood too, where its hub is reachable or they were fetched before.
"""

import contextlib
import gc
import hashlib
import io
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cellquilt.core import gpus
from cellquilt.core.errors import CellquiltError, did_you_mean
from cellquilt.core.log import LOG
from cellquilt.patches.bundle import Bundle
from cellquilt.patches.grid import Axis, Lattice, Patch
from cellquilt.segment.diameter import DEFAULT_UM, expected_diameter
from cellquilt.segment.engine import (
    PatchLabels,
    Plan,
    each_patch,
    is_nuclear_stain,
    length_px,
    pick_channels,
    setting,
    window_of,
)
from cellquilt.segment.resample import resample, taps

if TYPE_CHECKING:
    from cellquilt.core.images import Image

MODEL_SETTING = "stardist_model_type"
SHIPPED = "nuclei"
SHIPPED_FOLDER = Path(__file__).parent / "weights" / "stardist_nuclei"
#: Models of StarDist's registry → channels. All are U-Nets of the default depth for nuclei.
PUBLISHED = {"2D_versatile_fluo": 1, "2D_versatile_he": 3, "2D_paper_dsb2018": 1, "2D_demo": 1}

_PARTS = "a folder with config.json, weights (.h5) and thresholds.json, as StarDist writes it"
_DEFAULT_THRESHOLDS = {"prob": 0.5, "nms": 0.4}  # StarDist's own, where a model brings none
#: Measured peak of a prediction for a pixel and filter of the first layer: a few feature maps live at the same time.
_BYTES = 24
_LEAST_TILE_PX = 256


@dataclass(frozen=True)
class Model:
    """What a model's folder says of it; read without the library.

    Attributes
    ----------
    channels
        Channels of its input.
    multiple
        Its input is counted in steps of so many pixels (pooling).
    reach
        Pixels around a pixel that its result depends on, at most.
    filters
        Feature maps of the first layer.
    thresholds
        Its own ``prob`` and ``nms``.
    diameter_px
        What its objects measured in training, where it tells.
    nuclear
        Whether its objects are nuclei, where that is known.
    """

    channels: int
    multiple: int
    reach: int
    filters: int
    thresholds: dict[str, float]
    diameter_px: float | None = None
    nuclear: bool | None = None


# --- planning: without the library


def plan(image: "Image", settings: Mapping[str, Any], regions: np.ndarray | None = None) -> Plan:
    """See `engine.plan`."""
    name = setting(settings, MODEL_SETTING)
    model = describe(name)
    channels = _channels(image, setting(settings, "stardist_channels"), model.channels)
    diameter = length_px(settings, "stardist_diameter", image.pixel_size_um, default=False)
    facts: dict[str, Any] = {"diameter_from": "setting"}
    if diameter is None and model.diameter_px and model.channels == 1:
        seed = setting(settings, "seed")
        diameter, counted = expected_diameter(image, channels[0], regions=regions, seed=seed)
        facts = {"diameter_from": "estimate" if counted else "default", "diameter_measured_on": counted}
    elif diameter is None:
        diameter, facts = DEFAULT_UM / (image.pixel_size_um or 1.0), {"diameter_from": "default"}
    scale = setting(settings, "stardist_scale")
    if scale is None:
        scale = model.diameter_px / diameter if model.diameter_px else 1.0
    engine: dict[str, Any] = {
        "model": name if name in (SHIPPED, *PUBLISHED) else Path(name).name,
        "channels": model.channels,
        "diameter_px": diameter,
        "scale": scale,
        "prob_thresh": setting(settings, "stardist_prob_thresh"),
        "nms_thresh": setting(settings, "stardist_nms_thresh"),
        "gpu": setting(settings, "stardist_gpu"),
        "threads": setting(settings, "threads"),
        "memory_mb": setting(settings, "memory_mb"),
    }
    nuclear = model.nuclear if model.nuclear is not None else model.channels == 3 or is_nuclear_stain(channels)
    lattice = Lattice(rescale=scale, reach=reach_px(model.reach, model.multiple, scale))
    return Plan("stardist", channels, float(diameter), lattice, nuclear, engine, facts, joint=model.channels == 3)


def _channels(image: "Image", wanted: Any, count: int) -> tuple[str, ...]:
    if not wanted and count > 1 and len(image.channels) == count:
        return tuple(str(name) for name in image.channels)
    channels = pick_channels(image, wanted)
    if len(channels) == count:
        return channels
    names = ", ".join(str(name) for name in image.channels)
    hint = "give --stardist_channels, in the order that the model was trained with"
    if count == 3 and len(image.channels) != 3:
        hint += "; models for H&E need an image in colours"
    raise CellquiltError(
        "stardist-channels",
        f"this StarDist model takes {count} channel{'s' if count > 1 else ''}, got {', '.join(channels)}"
        f" of an image with {names}",
        hint,
    )


def describe(name: str) -> Model:
    """What is known of a model before the library is there.

    Parameters
    ----------
    name
        The shipped model, a name of StarDist's registry, or a folder.

    Raises
    ------
    CellquiltError
        ``stardist-model-unknown`` for what is none of them, ``weights-missing`` and ``weights-unreadable`` for a folder
        that holds no 2D StarDist model.
    """
    if name in PUBLISHED:
        reach = _reach(depth=3, kernel=3, convolutions=2, pool=2, grid=2, last=True)
        return Model(PUBLISHED[name], 16, reach, 32, dict(_DEFAULT_THRESHOLDS), nuclear=True)
    folder = SHIPPED_FOLDER if name == SHIPPED else Path(name)
    if name != SHIPPED and not folder.exists():
        if "/" in name or "\\" in name:
            raise CellquiltError("weights-missing", f"there is no StarDist model {name}", f"give {_PARTS}")
        raise CellquiltError(
            "stardist-model-unknown",
            f"no StarDist model is called {name!r}, and there is no such folder",
            f"{did_you_mean(name, (SHIPPED, *PUBLISHED))}; or give {_PARTS}",
        )
    weights_of(folder)
    config = _read_json(folder / "config.json")
    kind = (config.get("n_dim"), config.get("backbone", "unet"), "n_rays" in config)
    if kind != (2, "unet", True):
        raise CellquiltError(
            "weights-unreadable",
            f"{folder / 'config.json'} is not that of a 2D StarDist model (n_dim {kind[0]}, backbone {kind[1]}, "
            f"{'' if kind[2] else 'no '}n_rays)",
            f"give {_PARTS}",
        )
    own = _read_json(folder / "cellquilt.json") if (folder / "cellquilt.json").is_file() else {}
    try:
        depth, pools, grids = int(config["unet_n_depth"]), config["unet_pool"], config["grid"]
        reach = _reach(
            depth=depth,
            kernel=max(config["unet_kernel_size"]),
            convolutions=int(config["unet_n_conv_per_depth"]),
            pool=max(pools),
            grid=max(grids),
            last=int(config["net_conv_after_unet"]) > 0,
        )
        steps = [int(pool) ** depth * int(grid) for pool, grid in zip(pools, grids, strict=True)]
        return Model(
            int(config["n_channel_in"]),
            math.lcm(*steps),
            reach,
            int(config["unet_n_filter_base"]),
            _thresholds(folder / "thresholds.json"),
            float(own["diameter_px"]) if "diameter_px" in own else None,
            own.get("nuclear"),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CellquiltError(
            "weights-unreadable", f"{folder / 'config.json'} cannot be used: {type(error).__name__} {error}",
            f"give {_PARTS}",
        ) from error  # fmt: skip


def _reach(*, depth: int, kernel: int, convolutions: int, pool: int, grid: int, last: bool) -> int:
    """Pixels on either side that a result of StarDist's U-Net can depend on: convolutions, pooling and upsampling."""
    half, step, total = kernel // 2, 1, 0
    while step < grid:  # pooling to the grid, by two at a time
        total += convolutions * half * step + step
        step *= 2
    for _ in range(depth):  # down and up again at each level
        total += 2 * convolutions * half * step + 2 * (pool - 1) * step
        step *= pool
    total += convolutions * half * step
    return total + (half * grid if last else 0) + grid


def weights_of(folder: Path) -> Path:
    """The file of weights in a model's folder, the one that StarDist would take.

    Raises
    ------
    CellquiltError
        ``weights-missing`` if this is no folder of a model, ``weights-unreadable`` if the choice would hang on the
        files' dates.
    """
    if not folder.is_dir():
        raise CellquiltError("weights-missing", f"{folder} is no folder", f"give {_PARTS}; unpack an archive first")
    if not (folder / "config.json").is_file():
        raise CellquiltError("weights-missing", f"{folder} has no config.json", f"give {_PARTS}")
    files = sorted(path for pattern in ("*.h5", "*.hdf5") for path in folder.glob(pattern))
    best = [path for path in files if "best" in path.name] or files
    if not best:
        raise CellquiltError("weights-missing", f"{folder} has no weights (.h5)", f"give {_PARTS}")
    if len(best) > 1:
        raise CellquiltError(
            "weights-unreadable",
            f"{folder} has several files of weights: {', '.join(path.name for path in best)}",
            "leave the one to use, for example weights_best.h5",
        )
    return best[0]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CellquiltError("weights-unreadable", f"{path} cannot be read: {error}", f"give {_PARTS}") from error
    if not isinstance(content, dict):
        raise CellquiltError("weights-unreadable", f"{path} is not a JSON object", f"give {_PARTS}")
    return content


def _thresholds(path: Path) -> dict[str, float]:
    """A model's own thresholds; where it has none, StarDist's. It would take those in silence for bad ones, too."""
    if not path.is_file():
        return dict(_DEFAULT_THRESHOLDS)
    content = _read_json(path)
    for name in _DEFAULT_THRESHOLDS:
        value = content.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
            raise CellquiltError(
                "weights-unreadable",
                f"{path}: {name} is {json.dumps(value)}; expected a number between 0 and 1",
                'it should hold {"prob": 0.5, "nms": 0.4} or the like; StarDist\'s optimize_thresholds writes it',
            )
    return {name: float(content[name]) for name in _DEFAULT_THRESHOLDS}


# --- weights


def find_model(name: str) -> Path:
    """The folder of a model; one of StarDist's registry is fetched from its hub if it is not there yet.

    Raises
    ------
    CellquiltError
        ``weights-missing`` with the steps that get it, and what `describe` refuses.
    """
    if name == SHIPPED:
        return SHIPPED_FOLDER
    if name in PUBLISHED:
        return download(name)
    describe(name)
    return Path(name)


def download(name: str) -> Path:
    """Fetch a model of StarDist's registry with the library's own downloader, which keeps it and checks its checksum.

    Parameters
    ----------
    name
        One of `PUBLISHED`.

    Returns
    -------
    pathlib.Path
        Its folder.

    Raises
    ------
    CellquiltError
        ``weights-missing`` if it is neither here nor to be had, ``engine-missing``.
    """
    _library()
    from csbdeep.models.pretrained import get_model_folder
    from stardist.models import StarDist2D

    try:
        with _one_at_a_time(), _quiet():
            return Path(get_model_folder(StarDist2D, name))
    except Exception as error:  # keras and urllib raise many kinds
        raise CellquiltError(
            "weights-missing",
            f"the StarDist model {name!r} is not on this machine and cannot be fetched: {error}",
            f"give the path of {_PARTS}; or, where there is internet, fetch it once: cellquilt download-weights {name}",
        ) from error


@contextlib.contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Of tasks that start together on one machine one fetches, the others wait; none waits on a dead line for long."""
    import fcntl
    import socket
    import tempfile

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(60)
    try:
        # In a folder that all may write to: another user's link under this name is not followed.
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        path = Path(tempfile.gettempdir()) / f"cellquilt-stardist-{os.getuid()}.lock"
        with os.fdopen(os.open(path, flags, 0o600), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    finally:
        socket.setdefaulttimeout(before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what the library prints out of a command's output."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


# --- running


def load(bundle: Bundle) -> "StarDistSegmenter":
    """See `engine.load`."""
    return StarDistSegmenter(bundle.engine)


def _library(threads: int | None = None) -> Any:
    """StarDist's module of models, on TensorFlow's Keras."""
    if threads:
        os.environ["OMP_NUM_THREADS"] = str(threads)  # of StarDist's own loops; read when they are first run
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ["KERAS_BACKEND"] = "tensorflow"
    try:
        import stardist.models

        return stardist.models
    except (ImportError, RuntimeError) as error:
        raise CellquiltError(
            "engine-missing",
            f"StarDist is not installed in this environment: {error}",
            "install cellquilt[stardist], or `make setup STAGES=stardist`",
        ) from error


class StarDistSegmenter:
    """A loaded StarDist model.

    Parameters
    ----------
    engine
        The settings that `plan` made, ``model`` being a path or a name.
    """

    def __init__(self, engine: Mapping[str, Any]) -> None:
        threads = max(1, int(engine.get("threads") or 1))
        models = _library(threads)
        folder = find_model(str(engine["model"]))
        self.description = describe(str(folder))
        weights = weights_of(folder)
        if self.description.channels != int(engine.get("channels") or 1):
            raise CellquiltError(
                "stardist-channels",
                f"{folder} takes {self.description.channels} channels; the patches were cut for {engine['channels']}",
                "cut the patches anew with this model",
            )
        threads, device = _device(threads, bool(engine.get("gpu")))
        try:
            with _quiet():
                self.model = models.StarDist2D(None, name=folder.name, basedir=str(folder.parent))
        except Exception as error:  # keras raises whatever it likes about a bad file
            problem = f"{weights} does not hold the weights of its config.json: {error}"
            raise CellquiltError("weights-unreadable", problem, f"give {_PARTS}") from error
        own = {f"{name}_thresh": value for name, value in self.description.thresholds.items()}
        given = {name: float(engine[name]) for name in own if engine.get(name) is not None}
        self.thresholds = {**own, **given}
        self.scale = float(engine.get("scale") or 1.0)
        self.memory_mb = int(engine["memory_mb"])
        from importlib.metadata import version

        import tensorflow

        self.facts: dict[str, Any] = {
            "engine_version": version("stardist"),
            "tensorflow_version": tensorflow.__version__,
            "weights": f"{folder.name}/{weights.name}",
            "weights_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
            **self.thresholds,
            "threads": threads,
            "device": device,
        }

    def segment(self, bundle: Bundle) -> Iterator[PatchLabels]:
        """See `engine.Segmenter`."""
        axes = [network_axis(length, self.scale) for length in bundle.shape]
        return each_patch(bundle, partial(self._one, axes))

    def _one(self, axes: list[Axis], patch: Patch, pixels: np.ndarray) -> np.ndarray:
        y0, y1, x0, x1 = patch.context
        spans = [
            network_span(axis, *ends, self.description.multiple)
            for axis, ends in zip(axes, ((y0, y1), (x0, x1)), strict=True)
        ]
        if self.scale != 1.0:
            frames = [
                taps(axis.position(np.arange(*span)), max(1.0, axis.step), *ends)
                for axis, span, ends in zip(axes, spans, ((y0, y1), (x0, x1)), strict=True)
            ]
            pixels = resample(pixels, frames[0], frames[1])
        else:
            (a, b), (c, d) = spans
            pixels = pixels[:, a - y0 : b - y0, c - x0 : d - x0]
        outlines, confidence = self.outlines(pixels)
        for k, (axis, span, first) in enumerate(zip(axes, spans, (y0, x0), strict=True)):
            outlines[:, k] = axis.position(outlines[:, k] + span[0]) - first
        return window_of(patch, drawn(outlines, confidence, (y1 - y0, x1 - x0)))

    def outlines(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Run network and non-maximum suppression.

        Parameters
        ----------
        pixels
            (C, h, w) float32, normalised, at the network's scale.

        Returns
        -------
        outlines : numpy.ndarray
            (n, 2, rays) float64 y and x of the corners; pixel centres lie at integers.
        confidence : numpy.ndarray
            (n,) object probability.
        """
        colours = len(pixels) > 1
        image = np.moveaxis(pixels, 0, -1) if colours else pixels[0]
        found = self._predict(np.ascontiguousarray(image))
        rays = int(self.model.config.n_rays)
        return np.asarray(found["coord"], np.float64).reshape(-1, 2, rays), np.asarray(found["prob"], np.float64)

    def _predict(self, image: np.ndarray) -> dict[str, Any]:
        """What the library finds in a (h, w) or (h, w, C) image, within the memory that there is."""
        reach, pixel_bytes = self.description.reach, _BYTES * self.description.filters

        def in_tiles(memory_mb: int) -> dict[str, Any]:
            # Of the library's own, which overlap by all that the network sees: they bound memory and change nothing.
            side = max(math.sqrt(memory_mb * 1e6 / pixel_bytes) - 2 * reach, _LEAST_TILE_PX)
            with _quiet():
                _, found = self.model.predict_instances(
                    image,
                    axes="YXC"[: image.ndim],
                    n_tiles=[math.ceil(length / side) for length in image.shape[:2]] + [1] * (image.ndim - 2),
                    show_tile_progress=False,
                    return_labels=False,
                    **self.thresholds,
                )
            return found

        if self.facts["device"] == "cpu":
            return in_tiles(self.memory_mb)

        def needed_mb(side_px: int) -> int:
            return math.ceil((side_px + 2 * reach) ** 2 * pixel_bytes / 1e6)

        size = min(self.memory_mb, needed_mb(max(image.shape[:2])))
        found, left = gpus.shrinking(
            size,
            in_tiles,
            is_oom=gpus.out_of_memory,
            release=gc.collect,
            least=needed_mb(_LEAST_TILE_PX),
            unit="MB of tiles",
            instead=partial(self._on_cpu, in_tiles) if gpus.fallback() else None,
        )
        if left < size:
            self.memory_mb = left
        return found

    def _on_cpu(self, in_tiles: Callable[[int], dict[str, Any]]) -> dict[str, Any]:
        import tensorflow as tf

        self.facts["patches_on_cpu"] = self.facts.get("patches_on_cpu", 0) + 1
        with tf.device("/CPU:0"):
            return in_tiles(self.memory_mb)


def drawn(outlines: np.ndarray, confidence: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Labels of outlines; where some overlap, the one of the highest confidence is on top, as in StarDist.

    Parameters
    ----------
    outlines
        (n, 2, rays) y and x of the corners; pixel centres lie at integers.
    confidence
        (n,).
    shape
        (height, width).

    Returns
    -------
    numpy.ndarray
        (h, w) int32; label k + 1 is outline k.
    """
    if not len(outlines):
        return np.zeros(shape, np.int32)
    from stardist.geometry import polygons_to_label_coord

    order = np.argsort(confidence, kind="stable")
    return np.asarray(polygons_to_label_coord(outlines[order], shape=shape, labels=order), np.int32)


def reach_px(reach: int, multiple: int, scale: float) -> int:
    """Slide pixels to bring around a window, for a network that reaches so many of its own pixels.

    More than that by a step of the network, for its pixels start at whole steps, and by what interpolation reads.
    """
    return math.ceil((reach + multiple) / scale + max(1.0, 1 / scale)) + 1


def network_axis(length_px: int, scale: float) -> Axis:
    """One axis of the slide at the network's scale."""
    resized = length_px if scale == 1.0 else max(1, round(length_px * scale))
    return Axis(length_px, resized, 0, resized, np.zeros(1, np.int64), resized)


def network_span(axis: Axis, start: int, stop: int, multiple: int) -> tuple[int, int]:
    """Network pixels [a, b) whose sources the slide pixels [start, stop) hold, `a` on the slide's pooling lattice."""
    read = 0.0 if axis.step == 1.0 else max(1.0, axis.step)  # by interpolation, on either side
    first = 0 if start == 0 else math.ceil((start + read + 0.5) / axis.step - 0.5)
    last = axis.resized if stop == axis.length_px else math.floor((stop - 0.5 - read) / axis.step - 0.5) + 1
    return -(-first // multiple) * multiple, last


def _device(threads: int, gpu: bool) -> tuple[int, str]:
    """Bound TensorFlow to some threads, and to the CPU unless a GPU is wanted; the same bits every time.

    Returns
    -------
    threads : int
        As many as there are.
    device : str
        ``cpu`` or ``gpu``.
    """
    import tensorflow as tf

    gpu = gpu and gpus.want_gpu(
        "--stardist_gpu (gpu=True)",
        f"TensorFlow {tf.__version__}{'' if tf.test.is_built_with_cuda() else ', built without CUDA,'}",
        lambda: tf.config.list_physical_devices("GPU"),
        "leave --stardist_gpu out",
    )
    try:
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(1)
        if not gpu:
            tf.config.set_visible_devices([], "GPU")
        for device in tf.config.list_physical_devices("GPU") if gpu else []:
            tf.config.experimental.set_memory_growth(device, True)
    except RuntimeError:  # in a notebook TensorFlow may run already, and keeps what it was started with
        LOG.debug("TensorFlow runs already; its threads and devices stay as they are")
    tf.config.experimental.enable_op_determinism()
    return tf.config.threading.get_intra_op_parallelism_threads() or threads, "gpu" if gpu else "cpu"
