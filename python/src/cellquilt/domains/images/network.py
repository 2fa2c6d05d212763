"""What turns patches into numbers: any callable, or a network of torchvision or timm with weights from a file."""

import hashlib
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cellquilt.core import gpus
from cellquilt.core.errors import CellquiltError, did_you_mean, did_you_mean_file
from cellquilt.domains.devices import device_of
from cellquilt.segment.generic import import_function

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

#: Mean and deviation of the channels of ImageNet, on which torchvision's networks were trained.
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_HEADS = ("fc", "classifier", "heads", "head")


@dataclass(frozen=True)
class Network:
    """A network in use.

    Attributes
    ----------
    call
        From (n, channels, size, size) float32 on the device to (n, n_features).
    device
        Where patches are put.
    mean, std
        (channels,) float32, taken off and divided by before; or (1,).
    about
        What it is, for `ImagePca`.
    """

    call: Callable[["torch.Tensor"], Any]
    device: "torch.device"
    mean: NDArray[np.float32]
    std: NDArray[np.float32]
    about: dict[str, Any]

    def __call__(self, patches: NDArray[np.float32]) -> NDArray[np.float32]:
        """(n, n_features) float32 of (n, channels, size, size) patches; on a GPU, in parts where they do not fit.

        Raises
        ------
        CellquiltError
            ``image-model-failed``, ``gpu-out-of-memory``.
        """
        import torch

        shape = patches.shape
        scaled = (patches - self.mean[:, None, None]) / self.std[:, None, None]
        try:
            if self.device.type != "cuda":
                features = self._features(scaled)
            else:
                parts = gpus.in_batches(
                    range(len(scaled)),
                    max(len(scaled), 1),
                    lambda rows: self._features(scaled[rows[0] : rows[-1] + 1]),
                    release=torch.cuda.empty_cache,
                    unit="patches of an image",
                )
                features = np.concatenate([part for _, part, _ in parts])
        except CellquiltError:
            raise
        except Exception as error:  # of anybody's network
            raise CellquiltError(
                "image-model-failed",
                f"the model fails on patches {shape}: {type(error).__name__}: {error}",
                "patches are patch_um / um_per_px pixels wide; many networks take 224 and 3 channels only",
            ) from error
        if features.ndim != 2 or len(features) != len(patches):
            raise CellquiltError(
                "image-model-failed",
                f"the model gives {features.shape} for patches {shape}",
                "(n, n_features) expected",
            )
        if not np.isfinite(features).all():
            raise CellquiltError(
                "image-model-failed",
                "the model gives values that are no numbers",
                "has the image pixels that are none?",
            )
        return features

    def _features(self, scaled: NDArray[np.float32]) -> NDArray[np.float32]:
        import torch

        with torch.inference_mode():
            found = self.call(torch.from_numpy(scaled).to(self.device))
        if isinstance(found, torch.Tensor):
            found = found.float().cpu().numpy()
        return np.asarray(found, dtype=np.float32)


@contextmanager
def network_of(
    model: "str | Callable[[torch.Tensor], Any]",
    weights: Path | str | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    channels: int,
    device: str,
) -> "Iterator[Network]":
    """A network ready to use; torch modules are in evaluation mode until the end.

    Raises
    ------
    CellquiltError
        ``package-missing``, ``image-model-unknown``, ``image-weights``, ``image-normalisation``, ``device-missing``.
    """
    try:
        import torch
    except ModuleNotFoundError as error:
        raise CellquiltError(
            "package-missing", f"networks of images need the package {error.name}", "install cellquilt[domains]"
        ) from None
    place = device_of(device)
    about: dict[str, Any] = {}
    usual: tuple[Sequence[float], Sequence[float]] = ((0.0,), (1.0,))
    if isinstance(model, str):
        path = _weights_path(model, weights)
        about = {"model": model, "weights": _sha256(path)}
        call, usual = _named(model, path)
    elif weights is not None:
        raise CellquiltError("image-weights", "weights are given for a model that is no name", "load them into it")
    elif not callable(model):
        raise CellquiltError("image-model-unknown", f"{type(model).__name__} is no model", "a callable, or a name")
    else:
        call = model
    middle = _of_channels("mean", mean, usual[0], channels)
    width = _of_channels("std", std, usual[1], channels)
    if (width <= 0).any():
        raise CellquiltError("image-normalisation", f"std is {width.tolist()}", "numbers above 0")
    about |= {"mean": middle.astype(float).round(6).tolist(), "std": width.astype(float).round(6).tolist()}
    if not isinstance(call, torch.nn.Module):
        yield Network(call, place, middle, width, about)
        return
    trained = [module for module in call.modules() if module.training]
    try:
        yield Network(call.to(place).eval(), place, middle, width, about)
    finally:
        for module in trained:
            module.training = True


def network_or_function(name: str) -> "str | Callable[[torch.Tensor], Any]":
    """A function of that name, ``module:function``, or the name as it is: a network's.

    Raises
    ------
    CellquiltError
        ``image-model-unknown``.
    """
    if ":" not in name:
        return name
    try:
        return import_function(name)
    except CellquiltError as error:
        raise CellquiltError(
            "image-model-unknown", f"{error.message.replace('the segmentation function ', '')}", error.hint
        ) from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _of_channels(
    name: str, given: Sequence[float] | None, usual: Sequence[float], channels: int
) -> NDArray[np.float32]:
    found = np.atleast_1d(np.asarray(usual if given is None else given, dtype=np.float32))
    if found.shape not in ((1,), (channels,)) or not np.isfinite(found).all():
        raise CellquiltError(
            "image-normalisation",
            f"{name} is {found.tolist()}, the image has {channels} channels",
            f"a number for each; choose channels, or give {name}",
        )
    return found


def _weights_path(name: str, weights: Path | str | None) -> Path:
    if weights is None:
        raise CellquiltError(
            "image-weights", f'no weights for "{name}"', "give the file with weights=; nothing is downloaded here"
        )
    path = Path(weights)
    if not path.is_file():
        hint = did_you_mean_file(path) or "name the file with the network's weights"
        raise CellquiltError("image-weights", f"{path} is no file", hint)
    return path


def _named(name: str, weights: Path) -> "tuple[Callable[[torch.Tensor], Any], tuple[Sequence[float], Sequence[float]]]":
    """A network without its classifier, and mean and deviation of what it was trained on."""
    library, _, bare = name.rpartition("/")
    if library not in ("", "torchvision", "timm"):
        raise CellquiltError("image-model-unknown", f'unknown library "{library}"', "torchvision/… or timm/…")
    known: list[str] = []
    for candidate, make in (("torchvision", _of_torchvision), ("timm", _of_timm)):
        if library not in ("", candidate):
            continue
        try:
            network, head, usual = make(bare, known)
        except ModuleNotFoundError as error:
            if library:
                raise CellquiltError(
                    "package-missing", f'"{name}" needs the package {error.name}', f"install {candidate}"
                ) from None
            continue
        except KeyError:
            continue
        _load(network, head, weights, name)
        return network, usual
    if not known:
        raise CellquiltError(
            "package-missing", f'"{name}" needs the package torchvision or timm', "install one, or give a callable"
        )
    raise CellquiltError("image-model-unknown", f'unknown network "{name}"', _near(bare, known))


def _near(name: str, known: list[str]) -> str:
    hint = did_you_mean(name, known)
    return hint if hint.startswith("did") else "names of torchvision.models.list_models() or timm.list_models()"


def _of_torchvision(name: str, known: list[str]) -> "tuple[torch.nn.Module, str, Any]":
    import torch
    from torchvision import models

    names = models.list_models(module=models)
    known += names
    if name not in names:
        raise KeyError(name)
    network = models.get_model(name, weights=None)
    head = next(part for part in _HEADS if hasattr(network, part))
    # Of several layers the last is what tells classes apart.
    last = [path for path, module in network.named_modules()
            if path.split(".")[0] == head and isinstance(module, torch.nn.Linear)][-1]  # fmt: skip
    network.set_submodule(last, torch.nn.Identity())
    return network, last, _IMAGENET


def _of_timm(name: str, known: list[str]) -> "tuple[torch.nn.Module, str, Any]":
    import timm

    names = timm.list_models()
    known += names
    if name.split(".")[0] not in names:
        raise KeyError(name)
    network = timm.create_model(name, pretrained=False, num_classes=0)
    about = network.pretrained_cfg
    head = about.get("classifier") or "head"
    return network, head, (about["mean"], about["std"])


def _load(network: "torch.nn.Module", head: str, path: Path, name: str) -> None:
    """Put weights into a network; those of its classifier are left."""
    import torch

    hint = "a state_dict of the network, as .safetensors or written by torch.save"
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            found = load_file(path)
        else:
            found = torch.load(path, weights_only=True, map_location="cpu")
            found = found.get("state_dict", found)
        wrong = network.load_state_dict(found, strict=False)
    except Exception as error:  # of safetensors, of unpickling, of sizes that do not fit
        said = str(error).splitlines()
        raise CellquiltError(
            "image-weights", f'{path} does not fit "{name}": {" ".join(said[:2]) or repr(error)}', hint
        ) from error
    heads = tuple(f"{part}." for part in ([head] if isinstance(head, str) else head))
    left = [part for part in wrong.unexpected_keys if not part.startswith(heads)]
    if wrong.missing_keys or left:
        shown = ", ".join([*wrong.missing_keys, *left][:3])
        what = f"{len(wrong.missing_keys)} weights are missing, {len(left)} too many ({shown}, …)"
        raise CellquiltError("image-weights", f'{path} does not fit "{name}": {what}', hint)
