"""Cellpose, both generations behind one adapter.

The library's networks, but our own tiling: the network runs on the tiles that Cellpose would lay over the whole slide
(`patches.grid.Lattice`), each patch holds the tiles it needs whole, and a tile that two patches of a bundle share is
computed once. Everything in the library that depends on the image it is given is taken out of play: its normalisation
(the slide's is used), the resizing (one lattice for the slide), the limit on a mask's share of the image, and the way
from flows to masks (`segment.dynamics`, the same masks wherever a patch begins). So a cell looks the same in every
patch that holds it whole; on a whole slide the result is that of the library.

Weights are files: the shipped model, or a path. Nothing is ever downloaded in a task.
"""

import collections
import hashlib
import io
import os
import pickle
import struct
import time
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cellquilt.core import gpus
from cellquilt.core.errors import CellquiltError
from cellquilt.patches.bundle import Bundle
from cellquilt.patches.grid import Axis, Lattice, Patch
from cellquilt.segment.diameter import expected_diameter
from cellquilt.segment.engine import PatchLabels, Plan, is_nuclear_stain, length_px, pick_channels, setting
from cellquilt.segment.resample import resample, taps

if TYPE_CHECKING:
    from cellquilt.core.images import Image

MODEL_SETTING = "cellpose_model"
SHIPPED = "nuclei"
SHIPPED_FILE = Path(__file__).parent / "weights" / "nuclei.npz"
NUCLEI_DIAMETER_PX = 17.0  # what published nuclear models see a nucleus as; the shipped one says it itself
OTHER_DIAMETER_PX = 30.0

_CELL_UM = 15.0
_TILE = {"3": 224, "4": 256}
_INPUTS = {"3": 2, "4": 3}
#: Tiles that several small patches are gathered to, where nothing else is known.
_GATHERED_TILES = 8
#: Tiles of the batch that is measured.
_MEASURED_TILES = 4


# --- planning: without the library


def plan(image: "Image", settings: Mapping[str, Any], regions: np.ndarray | None = None) -> Plan:
    """See `engine.plan`."""
    generation = str(setting(settings, "cellpose_generation"))
    model = setting(settings, "cellpose_model")
    channels = pick_channels(image, setting(settings, "cellpose_channels"))
    if len(channels) > _INPUTS[generation]:
        raise CellquiltError(
            "cellpose-channels",
            f"Cellpose {generation} takes at most {_INPUTS[generation]} channels, got {', '.join(channels)}",
            "name one channel, or the cytoplasm and then the nucleus",
        )
    model_diameter = _model_diameter(model, generation)
    diameter = length_px(settings, "cellpose_diameter", image.pixel_size_um, default=False)
    given = diameter is not None
    facts: dict[str, Any] = {"diameter_from": "setting"}
    nuclear_model = generation == "3" and (model == SHIPPED or model_diameter == NUCLEI_DIAMETER_PX)
    if diameter is None and nuclear_model:
        nuclei = channels[-1]  # of two channels the second is the nuclear one
        diameter, counted = expected_diameter(image, nuclei, regions=regions, seed=setting(settings, "seed"))
        facts = {"diameter_from": "estimate" if counted else "default", "diameter_measured_on": counted}
    elif diameter is None:
        # Of the engine's scale; for the halo also what a cell commonly measures.
        usual = _CELL_UM / (image.pixel_size_um or 1.0) if generation == "4" else 0.0
        diameter, facts = max(model_diameter, usual), {"diameter_from": "model"}
    # Cellpose-SAM is not tied to a scale: it sees the pixels as they are unless a diameter is asked for.
    rescale = model_diameter / diameter if given or generation == "3" else 1.0
    lattice = Lattice(tile=_TILE[generation], overlap=0.1, rescale=rescale, full_tiles=generation == "4")
    engine = {
        "generation": generation,
        "model": model if model == SHIPPED else os.path.basename(model),
        "diameter_px": diameter,
        "model_diameter_px": model_diameter,
        "flow_threshold": setting(settings, "cellpose_flow_threshold"),
        "cellprob_threshold": setting(settings, "cellpose_cellprob_threshold"),
        "batch_size": setting(settings, "cellpose_batch_size"),
        "gpu": setting(settings, "cellpose_gpu"),
        "threads": setting(settings, "threads"),
        "min_size_px": settings.get("cellpose_min_size_px") or 15,
    }
    nuclear = nuclear_model or is_nuclear_stain(channels)
    return Plan("cellpose", channels, float(diameter), lattice, nuclear, engine, facts)


def _model_diameter(model: str, generation: str) -> float:
    if generation == "4":
        return OTHER_DIAMETER_PX
    path = SHIPPED_FILE if model == SHIPPED else Path(model)
    stored = _stored_diameter(path) if path.is_file() else None
    if stored is not None:
        return stored
    return NUCLEI_DIAMETER_PX if "nuclei" in path.name else OTHER_DIAMETER_PX


#: Bytes of the index of a torch file; a network's has a few thousand.
_LARGEST_INDEX = 16 << 20


class _DiameterReader(pickle.Unpickler):
    """Reads one number out of a torch file without torch, and refuses everything else that a pickle may do."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, *_: (storage, offset)
        if module == "torch._utils" and name == "_rebuild_parameter":
            return lambda data, *_: data
        if module == "torch" and name.endswith("Storage"):
            return name
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed")

    def persistent_load(self, pid: Any) -> Any:
        return pid[1], str(pid[2])


def _stored_diameter(path: Path) -> float | None:
    """``diam_mean`` of a weights file, or None where it has none."""
    try:
        if path.suffix == ".npz":
            from cellquilt.segment.cpnet import read_metadata

            return float(read_metadata(path)["diam_mean_px"])
        with zipfile.ZipFile(path) as archive:
            name = next(item for item in archive.namelist() if item.endswith("/data.pkl"))
            if archive.getinfo(name).file_size > _LARGEST_INDEX:
                return None
            state = _DiameterReader(io.BytesIO(archive.read(name))).load()
            (kind, key), offset = state["diam_mean"]
            raw = archive.read(f"{name.removesuffix('data.pkl')}data/{key}")
            form, size = {"FloatStorage": ("<f", 4), "HalfStorage": ("<e", 2), "DoubleStorage": ("<d", 8)}[kind]
            return float(struct.unpack_from(form, raw, offset * size)[0])
    except (KeyError, StopIteration, OSError, ValueError, TypeError, zipfile.BadZipFile, pickle.UnpicklingError):
        return None


# --- weights


def models_folder() -> Path:
    """Where explicit downloads go: ``CELLPOSE_LOCAL_MODELS_PATH``, else the library's own folder."""
    return Path(os.environ.get("CELLPOSE_LOCAL_MODELS_PATH") or Path.home() / ".cellpose" / "models")


def find_weights(model: str) -> Path:
    """The file of a model.

    Raises
    ------
    CellquiltError
        ``weights-missing`` with the step that gets them.
    """
    if model == SHIPPED:
        path = SHIPPED_FILE
    else:
        path = Path(model)
        if not path.is_file() and path.name == model and (models_folder() / model).is_file():
            path = models_folder() / model
    if not path.is_file():
        raise CellquiltError(
            "weights-missing",
            f"there are no Cellpose weights {model!r}",
            f"give the path of a file, or fetch them once with internet: cellquilt download-weights {path.name}",
        )
    return path


def download_weights(name: str, generation: str = "3") -> Path:
    """Fetch published weights with the library's own downloader: the explicit step, never called by a task.

    Raises
    ------
    CellquiltError
        ``download-failed``.
    """
    try:
        from cellpose import models

        path = models.model_path(name) if generation == "3" else models.cache_model_path(name)
    except ImportError as error:
        raise _engine_missing(generation) from error
    except Exception as error:  # urllib raises many kinds
        raise CellquiltError(
            "download-failed",
            f"cannot download the Cellpose weights {name!r}: {error}",
            "on a machine without internet, copy the file there and give its path",
        ) from error
    return Path(path)


def _engine_missing(generation: str) -> CellquiltError:
    return CellquiltError(
        "engine-missing",
        f"Cellpose {generation} is not installed in this environment",
        f"install cellquilt[cellpose{generation}], or `make setup`",
    )


def sha256(path: Path) -> str:
    """Checksum of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# --- running


def load(bundle: Bundle, *, model: str | None = None) -> "CellposeSegmenter":
    """See `engine.load`.

    Parameters
    ----------
    bundle
        Its engine settings decide.
    model
        Path of the weights here, where it differs from the name in the bundle (weights are staged as inputs).
    """
    return CellposeSegmenter({**bundle.engine, **({"model": model} if model else {})})


class CellposeSegmenter:
    """A loaded Cellpose model.

    Parameters
    ----------
    engine
        The settings that `plan` made, ``model`` being a path or ``nuclei``.
    """

    def __init__(self, engine: Mapping[str, Any]) -> None:
        self.engine = dict(engine)
        self.generation = str(engine["generation"])
        weights = find_weights(str(engine["model"]))
        try:
            import cellpose  # noqa: F401
            import torch
        except ImportError as error:
            raise _engine_missing(self.generation) from error
        from importlib.metadata import version

        found = version("cellpose")
        if found.split(".")[0] != self.generation:
            raise CellquiltError(
                "engine-missing",
                f"Cellpose {self.generation} is wanted, version {found} is installed here",
                f"use the environment with cellquilt[cellpose{self.generation}]",
            )
        self._torch = torch
        torch.set_num_threads(max(1, int(engine.get("threads") or 1)))
        torch.use_deterministic_algorithms(True, warn_only=True)
        self.device = _device(torch, bool(engine.get("gpu")))
        self._weights = weights
        self.net = self._network(self.device)
        self._net_on_cpu: Any = None
        given = engine.get("batch_size")
        #: Tiles in a batch; None until a first one was measured.
        self.batch_size: int | None = int(given or _GATHERED_TILES) if given or self.device.type != "cuda" else None
        self.facts: dict[str, Any] = {
            "engine_version": found,
            "torch_version": torch.__version__,
            "weights": weights.name,
            "weights_sha256": sha256(weights),
            "threads": torch.get_num_threads(),
            "device": self.device.type,
        }

    def _network(self, device: Any) -> Any:
        torch, weights = self._torch, self._weights
        try:
            net = _load_3(torch, weights) if self.generation == "3" else _load_4(torch, weights, device.type != "cpu")
        except CellquiltError:
            raise
        except Exception as error:  # torch and cellpose raise whatever they like about a bad file
            raise CellquiltError(
                "weights-unreadable",
                f"{weights} does not hold Cellpose {self.generation} weights: {error}",
                "Cellpose 3 and 4 files are not interchangeable; choose --cellpose_generation to match",
            ) from error
        net = net.to(device).eval()
        if device.type == "cpu" and self.generation == "3":
            net = net.to(memory_format=torch.channels_last)  # a third less time
        return net

    def segment(self, bundle: Bundle) -> Iterator[PatchLabels]:
        """See `engine.Segmenter`. Tiles of several small patches go through the network together."""
        axes = bundle.lattice.axis(bundle.shape[0]), bundle.lattice.axis(bundle.shape[1])
        tiles_of = {patch.index: _tiles(axes, patch) for patch in bundle.patches}
        uses = collections.Counter(key for keys in tiles_of.values() for key in keys)
        outputs: dict[tuple[int, int], np.ndarray] = {}
        waiting: list[tuple[Patch, float]] = []
        inputs: dict[tuple[int, int], np.ndarray] = {}
        last = len(bundle) - 1
        for position, item in enumerate(bundle):
            started = time.perf_counter()
            try:
                missing = [key for key in tiles_of[item.patch.index] if key not in outputs and key not in inputs]
                y0, _, x0, _ = item.patch.context
                pixels = bundle.normalization.apply(item.pixels, y0, x0)
                inputs.update(cut_tiles(axes, missing, pixels, (y0, x0), _INPUTS[self.generation]))
            except Exception as error:  # reported with the patch
                yield PatchLabels(item.patch, None, time.perf_counter() - started, error)
                continue
            waiting.append((item.patch, time.perf_counter() - started))
            if len(inputs) < (self.batch_size or _GATHERED_TILES) and position < last:
                continue
            yield from self._finish(waiting, inputs, outputs, tiles_of, uses, axes)
            waiting, inputs = [], {}
        if waiting:
            yield from self._finish(waiting, inputs, outputs, tiles_of, uses, axes)

    def _finish(
        self,
        waiting: list[tuple[Patch, float]],
        inputs: dict[tuple[int, int], np.ndarray],
        outputs: dict[tuple[int, int], np.ndarray],
        tiles_of: Mapping[int, list[tuple[int, int]]],
        uses: collections.Counter[tuple[int, int]],
        axes: tuple[Axis, Axis],
    ) -> Iterator[PatchLabels]:
        started = time.perf_counter()
        failure: Exception | None = None
        try:
            outputs.update(self.run_tiles(inputs))
        except (RuntimeError, CellquiltError) as error:  # out of memory and the like
            failure = error
        each = (time.perf_counter() - started) / len(waiting)
        for patch, before in waiting:
            started = time.perf_counter()
            labels, problem = None, failure
            if problem is None:
                try:
                    labels = self._labels(patch, outputs, axes)
                except Exception as error:  # reported with the patch
                    problem = error
            for key in tiles_of[patch.index]:
                uses[key] -= 1
                if not uses[key]:
                    outputs.pop(key, None)
            yield PatchLabels(patch, labels, before + each + time.perf_counter() - started, problem)

    def run_tiles(self, inputs: dict[tuple[int, int], np.ndarray]) -> dict[tuple[int, int], np.ndarray]:
        """Run the network on (C, t, t) float32 tiles; returns (3, t, t) float32: flow y, flow x, cell logit.

        `inputs` is emptied on the way, to save memory.

        On the CPU a batch saves no time, so tiles go one by one: the bits of a tile's result then do not depend on
        which tiles happen to be in its batch. On a GPU a first batch is measured where no size was given; a batch that
        does not fit is halved.

        Raises
        ------
        CellquiltError
            ``gpu-out-of-memory``.
        """
        outputs: dict[tuple[int, int], np.ndarray] = {}
        keys = list(inputs)
        if self.device.type == "cpu":
            for key in keys:
                outputs[key] = self._forward(self.net, self.device, [inputs.pop(key)])[0]
            return outputs
        if self.batch_size is None and keys:
            first, keys = keys[:_MEASURED_TILES], keys[_MEASURED_TILES:]
            self.batch_size = self._measured(first, inputs, outputs)
        if keys:
            assert self.batch_size is not None
            self.batch_size = self._run_batches(keys, self.batch_size, inputs, outputs)
        self.facts["batch_size"] = self.batch_size
        return outputs

    def _measured(
        self,
        keys: list[tuple[int, int]],
        inputs: dict[tuple[int, int], np.ndarray],
        outputs: dict[tuple[int, int], np.ndarray],
    ) -> int:
        """Run a small batch; how many tiles fit by what it took."""
        cuda = self._torch.cuda
        cuda.empty_cache()
        cuda.reset_peak_memory_stats(self.device)
        before = cuda.memory_allocated(self.device)
        fitted = self._run_batches(keys, len(keys), inputs, outputs)
        if fitted < len(keys):
            return fitted
        peak = cuda.max_memory_allocated(self.device) - before
        cuda.empty_cache()
        free, _ = cuda.mem_get_info(self.device)
        return gpus.fitting_items(free, peak, len(keys))

    def _run_batches(
        self,
        keys: list[tuple[int, int]],
        size: int,
        inputs: dict[tuple[int, int], np.ndarray],
        outputs: dict[tuple[int, int], np.ndarray],
    ) -> int:
        """Run tiles on the GPU; how many are left in a batch."""
        batches = gpus.in_batches(
            keys,
            size,
            lambda batch: self._forward(self.net, self.device, [inputs[key] for key in batch]),
            release=self._release,
            unit="tiles",
            instead=(lambda batch: self._on_cpu([inputs[key] for key in batch])) if gpus.fallback() else None,
        )
        for batch, result, left in batches:
            outputs.update(zip(batch, result, strict=True))
            for key in batch:
                del inputs[key]
            size = left
        return size

    def _forward(self, net: Any, device: Any, tiles: list[np.ndarray]) -> np.ndarray:
        with self._torch.inference_mode():
            tensor = self._torch.from_numpy(np.stack(tiles)).to(device)
            if self.generation == "4":
                tensor = tensor.to(next(net.parameters()).dtype)
            result: np.ndarray = net(tensor)[0].float().cpu().numpy()
        return result

    def _on_cpu(self, tiles: list[np.ndarray]) -> np.ndarray:
        place = self._torch.device("cpu")
        if self._net_on_cpu is None:
            self._net_on_cpu = self._network(place)
        self.facts["tiles_on_cpu"] = self.facts.get("tiles_on_cpu", 0) + len(tiles)
        return self._forward(self._net_on_cpu, place, tiles)

    def _release(self) -> None:
        (self._torch.mps if self.device.type == "mps" else self._torch.cuda).empty_cache()

    def _labels(
        self, patch: Patch, outputs: Mapping[tuple[int, int], np.ndarray], axes: tuple[Axis, Axis]
    ) -> np.ndarray:
        flows = blend_tiles(axes, patch, outputs)
        return self.masks(flows, 1.0 / axes[0].step)

    def masks(self, flows: np.ndarray, rescale: float) -> np.ndarray:
        """Masks of a patch.

        Parameters
        ----------
        flows
            (3, h, w) float32 at slide resolution: flow y, flow x, cell logit.
        rescale
            Network pixels a slide pixel; the number of steps grows with the cells' size in pixels.

        Returns
        -------
        numpy.ndarray
            (h, w) int32.
        """
        from cellquilt.segment.dynamics import masks_from_flows

        return masks_from_flows(
            flows,
            steps=max(1, int(200 / rescale)),
            cellprob_threshold=float(self.engine["cellprob_threshold"]),
            flow_threshold=float(self.engine["flow_threshold"]),
            min_size_px=int(self.engine["min_size_px"]),
            threads=self.facts["threads"],
        )


def _device(torch: Any, gpu: bool) -> Any:
    if not gpu:
        return torch.device("cpu")
    found = gpus.want_gpu(
        "--cellpose_gpu (gpu=True)",
        gpus.about_torch(torch),
        lambda: torch.cuda.is_available() or torch.backends.mps.is_available(),
        "leave --cellpose_gpu out",
    )
    return torch.device(("cuda" if torch.cuda.is_available() else "mps") if found else "cpu")


def _load_3(torch: Any, weights: Path) -> Any:
    """A CPnet of the width that the weights have: the shipped one is narrow, a quarter of the stock network's work."""
    from cellpose.resnet_torch import CPnet

    if weights.suffix == ".npz":
        from cellquilt.segment.cpnet import load_state_dict

        state = {key: torch.from_numpy(value) for key, value in load_state_dict(weights, None).items()}
    else:
        state = torch.load(weights, map_location="cpu", weights_only=True)
    if "W2" in state:
        raise CellquiltError(
            "weights-unreadable", f"{weights} holds Cellpose 4 weights", "choose --cellpose_generation 4"
        )
    widths = [int(state[f"downsample.down.res_down_{k}.conv.conv_0.2.weight"].shape[0]) for k in range(4)]
    inputs = int(state["downsample.down.res_down_0.conv.conv_0.2.weight"].shape[1])
    net = CPnet([inputs, *widths], int(state["output.2.weight"].shape[0]), sz=3, mkldnn=False)
    missing = net.load_state_dict(state, strict=False).missing_keys
    wanted = [key for key in missing if not key.endswith("num_batches_tracked") and not key.startswith("diam_")]
    if wanted:
        raise CellquiltError("weights-unreadable", f"{weights} lacks {', '.join(wanted[:3])}")
    return net


def _load_4(torch: Any, weights: Path, gpu: bool) -> Any:
    """A Cellpose-SAM network; the library tells its backbones apart by what the file holds. It downloads nothing, as
    the file is there."""
    from cellpose.models import CellposeModel

    # The library leaves it to torch's version and environment whether a file may run code; here none may.
    torch.load(weights, map_location="cpu", weights_only=True, mmap=True)
    model = CellposeModel(gpu=False, device=torch.device("cpu"), pretrained_model=str(weights), use_bfloat16=gpu)
    return model.net


# --- tiles


def _tiles(axes: tuple[Axis, Axis], patch: Patch) -> list[tuple[int, int]]:
    """Tiles that a patch's window depends on, row by row."""
    rows, columns = (
        axis.tiles(*axis.needed(span.start, span.stop)) for axis, span in zip(axes, (patch.y, patch.x), strict=True)
    )
    return [(i, j) for i in rows for j in columns]


def cut_tiles(
    axes: tuple[Axis, Axis], keys: list[tuple[int, int]], pixels: np.ndarray, origin: tuple[int, int], inputs: int
) -> dict[tuple[int, int], np.ndarray]:
    """Network inputs of some tiles.

    Parameters
    ----------
    axes
        The slide's tiling along y and x.
    keys
        (row, column) of the tiles.
    pixels
        (C, h, w) float32, normalised, of a part of the slide that holds the tiles whole.
    origin
        Slide pixel (y, x) of the part's first.
    inputs
        Channels of the network; missing ones are zero.

    Returns
    -------
    dict
        Key → (inputs, t, t) float32, zero outside the slide.
    """
    if not keys:
        return {}
    frames = []
    for axis, first, length, used in zip(
        axes, origin, pixels.shape[1:], ([key[0] for key in keys], [key[1] for key in keys]), strict=True
    ):
        start = max(int(axis.starts[min(used)]), axis.pad)
        stop = min(int(axis.starts[max(used)]) + axis.size, axis.pad + axis.resized)
        positions = axis.position(np.arange(start, stop) - axis.pad)
        frames.append((start, taps(positions, max(1.0, axis.step), first, first + length)))
    whole = resample(pixels, frames[0][1], frames[1][1])
    cut = {}
    for i, j in keys:
        tile = np.zeros((inputs, axes[0].size, axes[1].size), dtype=np.float32)
        y, x = int(axes[0].starts[i]) - frames[0][0], int(axes[1].starts[j]) - frames[1][0]
        top, left = max(y, 0), max(x, 0)
        part = whole[:, top : y + axes[0].size, left : x + axes[1].size]
        tile[: len(part), top - y : top - y + part.shape[1], left - x : left - x + part.shape[2]] = part
        cut[i, j] = tile
    return cut


def taper(size: int) -> np.ndarray:
    """(size,) float64 weights of a tile's pixels along one axis, small at the ends (Cellpose's blending)."""
    full = max(224, size)
    away = np.abs(np.arange(full) - (full - 1) / 2)
    weights = 1 / (1 + np.exp((away - (full / 2 - 20)) / 7.5))
    first = full // 2 - size // 2
    return weights[first : first + size]


def blend_tiles(axes: tuple[Axis, Axis], patch: Patch, outputs: Mapping[tuple[int, int], np.ndarray]) -> np.ndarray:
    """Blend tiles and bring them back to the slide's pixels.

    Returns
    -------
    numpy.ndarray
        (3, h, w) float32 of the patch's window.
    """
    (y0, y1), (x0, x1) = (
        axis.needed(span.start, span.stop) for axis, span in zip(axes, (patch.y, patch.x), strict=True)
    )
    total = np.zeros((3, y1 - y0, x1 - x0), dtype=np.float32)
    weight = np.zeros((y1 - y0, x1 - x0), dtype=np.float32)
    window = (taper(axes[0].size)[:, None] * taper(axes[1].size)[None, :]).astype(np.float32)
    for i, j in _tiles(axes, patch):
        y, x = int(axes[0].starts[i]) - y0, int(axes[1].starts[j]) - x0
        top, left = max(y, 0), max(x, 0)
        bottom, right = min(y + axes[0].size, y1 - y0), min(x + axes[1].size, x1 - x0)
        inner = (slice(top - y, bottom - y), slice(left - x, right - x))
        outer = (slice(top, bottom), slice(left, right))
        total[:, *outer] += outputs[i, j][:, *inner] * window[inner]
        weight[outer] += window[inner]
    total /= weight
    frames = []
    for axis, span, start, stop in zip(axes, (patch.y, patch.x), (y0, x0), (y1, x1), strict=True):
        positions = (np.arange(span.start, span.stop) + 0.5) / axis.step - 0.5
        frames.append(taps(positions, 1.0, start - axis.pad, stop - axis.pad))
    if axes[0].step == 1.0 and axes[1].step == 1.0:
        dy, dx = (
            span.start - (begin - axis.pad)
            for axis, span, begin in zip(axes, (patch.y, patch.x), (y0, x0), strict=True)
        )
        return total[:, dy : dy + patch.y.stop - patch.y.start, dx : dx + patch.x.stop - patch.x.start]
    return resample(total, frames[0], frames[1])
