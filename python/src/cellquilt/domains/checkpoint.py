"""Weights on disk: a folder with ``config.json`` and ``model.safetensors``, ours and published ones alike."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cellquilt.core.atomic import atomic_path
from cellquilt.core.errors import CellquiltError
from cellquilt.domains.expression import Vocabulary
from cellquilt.domains.network import Architecture, Network, load_parameters, published_parameters

CONFIG, WEIGHTS = "config.json", "model.safetensors"
_NEEDED = ("embedding_size", "hidden_size", "heads", "num_layers", "output_size", "num_prototypes", "n_hops_local")


@dataclass
class Checkpoint:
    """A network with all that is needed to use it.

    Attributes
    ----------
    network
        With its weights.
    vocabulary
        The genes it knows; empty if it takes embedded cells.
    config
        What ``config.json`` says.
    """

    network: Network
    vocabulary: Vocabulary
    config: dict[str, Any]


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a model.

    Raises
    ------
    CellquiltError
        ``model-missing``, ``model-invalid`` with what does not fit.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    missing = [name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()]
    if missing:
        raise CellquiltError(
            "model-missing", f"{folder} has no {' and no '.join(missing)}", "name the folder that holds both files"
        )
    hint = "copy the model's folder again"
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise CellquiltError("model-invalid", f"{folder / CONFIG} is not JSON: {error}", hint) from error
    absent = [name for name in _NEEDED if not isinstance(config, dict) or not isinstance(config.get(name), int)]
    if absent:
        raise CellquiltError("model-invalid", f"{folder / CONFIG} does not say {', '.join(absent)}", hint)
    try:
        parameters = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise CellquiltError("model-invalid", f"{folder / WEIGHTS} cannot be read: {error}", hint) from error
    names = config.get("var_names") or []
    known = Architecture.__dataclass_fields__
    sizes = Architecture(**{name: config[name] for name in known if isinstance(config.get(name), int)})
    network = Network(len(names), sizes)
    wrong = load_parameters(network, parameters)
    if wrong:
        shown = "; ".join(wrong[:3]) + (f"; and {len(wrong) - 3} more" if len(wrong) > 3 else "")
        raise CellquiltError("model-invalid", f"{folder / WEIGHTS} does not fit {CONFIG}: {shown}", hint)
    if not all(torch.isfinite(part).all() for part in network.state_dict().values()):
        raise CellquiltError("model-invalid", f"{folder / WEIGHTS} has weights that are no numbers", hint)
    return Checkpoint(network.eval(), Vocabulary(names), config)


def write_checkpoint(checkpoint: Checkpoint, folder: Path) -> Path:
    """Write a model: the two files, the same bytes for the same model."""
    from safetensors.torch import save_file

    state = {name: part.contiguous() for name, part in sorted(published_parameters(checkpoint.network).items())}
    config = {**checkpoint.config, **checkpoint.network.sizes.to_dict(), "var_names": checkpoint.vocabulary.names}
    with atomic_path(folder) as part:
        os.makedirs(part, exist_ok=True)
        (part / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        save_file(state, part / WEIGHTS)
    return folder
