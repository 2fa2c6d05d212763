"""Models on disk: a folder with ``config.json`` and ``model.safetensors``, ours and published ones alike."""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from cellquilt.core.atomic import atomic_path
from cellquilt.core.errors import CellquiltError

if TYPE_CHECKING:
    from cellquilt.domains.model import Encoder
    from cellquilt.domains.prototypes import Prototypes

CONFIG, WEIGHTS = "config.json", "model.safetensors"
#: Of models that look at images, too.
COMPONENTS = "image_pca.safetensors"
HINT = "copy the model's folder again"
Array = TypeVar("Array")
_SHIPPED = Path(__file__).with_name("models") / "default"


def shipped_model() -> Path:
    """The folder of the model that comes with the package.

    Raises
    ------
    CellquiltError
        ``model-not-shipped`` where this version has none.
    """
    if not (_SHIPPED / CONFIG).is_file():
        raise CellquiltError(
            "model-not-shipped", "no model of domains comes with this version", "name one with --domains-model"
        )
    return _SHIPPED


def checksum(folder: Path) -> str:
    """SHA-256 of a model: of its files, one after the other."""
    import hashlib

    found = hashlib.sha256()
    for name in (CONFIG, WEIGHTS, COMPONENTS):
        if name != COMPONENTS or (folder / name).is_file():
            found.update((folder / name).read_bytes())
    return found.hexdigest()


def read_checkpoint(folder: Path) -> "tuple[Encoder, Prototypes]":
    """Read a model of either kind.

    Raises
    ------
    CellquiltError
        ``model-missing``, ``model-invalid`` with what does not fit, ``package-missing``.
    """
    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise CellquiltError(
            "model-missing", f"{folder} has no {' and no '.join(missing)}", "name the folder that holds both files"
        )
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise CellquiltError("model-invalid", f"{folder / CONFIG} is not JSON: {error}", HINT) from error
    if not isinstance(config, dict):
        raise CellquiltError("model-invalid", f"{folder / CONFIG} is no JSON object", HINT)
    if config.get("recipe") == "factors":
        from cellquilt.domains.factors.checkpoint import read_factors

        return read_factors(folder, config)
    with needs_torch():
        from cellquilt.domains.published.checkpoint import read_published
    encoder = read_published(folder, config)
    return encoder, encoder.prototypes


@contextmanager
def needs_torch() -> Iterator[None]:
    """Say which extra lacks where torch is imported."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise CellquiltError(
            "package-missing", f"published models need the package {error.name}", "install cellquilt[domains]"
        ) from None


def read_weights(folder: Path, load_file: "Callable[[Path], dict[str, Array]]") -> "dict[str, Array]":
    """The arrays of a model, by safetensors' reader for numpy or for torch.

    Raises
    ------
    CellquiltError
        ``model-invalid``.
    """
    from safetensors import SafetensorError

    try:
        return load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise CellquiltError("model-invalid", f"{folder / WEIGHTS} cannot be read: {error}", HINT) from error


def refuse_misfits(folder: Path, wrong: Sequence[str]) -> None:
    """Refuse a model whose arrays are not what its configuration says."""
    if wrong:
        shown = "; ".join(wrong[:3]) + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        raise CellquiltError("model-invalid", f"{folder / WEIGHTS} does not fit {CONFIG}: {shown}", HINT)


def write_files(folder: Path, config: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> Path:
    """Write the two files, the same bytes for the same content."""
    from safetensors.numpy import save_file

    with atomic_path(folder) as part:
        os.makedirs(part, exist_ok=True)
        (part / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        save_file({name: np.ascontiguousarray(array) for name, array in sorted(arrays.items())}, part / WEIGHTS)
    return folder
