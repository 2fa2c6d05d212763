"""Published checkpoints: what stands in ``config.json`` and ``model.safetensors``, and how it is written again."""

from pathlib import Path
from typing import Any

import torch

from cellquilt.core.errors import CellquiltError
from cellquilt.domains.checkpoint import CONFIG, HINT, WEIGHTS, read_weights, refuse_misfits, write_files
from cellquilt.domains.expression import Vocabulary
from cellquilt.domains.prototypes import Prototypes
from cellquilt.domains.published.encoder import PublishedEncoder
from cellquilt.domains.published.network import Architecture, Network, load_parameters, published_parameters

_NEEDED = ("embedding_size", "hidden_size", "heads", "num_layers", "output_size", "num_prototypes", "n_hops_local")


def read_published(folder: Path, config: dict[str, Any]) -> PublishedEncoder:
    """Read a model that novae saved, or we as novae would.

    Raises
    ------
    CellquiltError
        ``model-invalid`` with what does not fit.
    """
    from safetensors.torch import load_file

    absent = [name for name in _NEEDED if not isinstance(config.get(name), int)]
    if absent:
        raise CellquiltError("model-invalid", f"{folder / CONFIG} does not say {', '.join(absent)}", HINT)
    parameters = read_weights(folder, load_file)
    names = config.get("var_names") or []
    known = Architecture.__dataclass_fields__
    sizes = Architecture(**{name: config[name] for name in known if isinstance(config.get(name), int)})
    network = Network(len(names), sizes)
    wrong = load_parameters(network, parameters)
    refuse_misfits(folder, wrong)
    if not all(torch.isfinite(part).all() for part in network.state_dict().values()):
        raise CellquiltError("model-invalid", f"{folder / WEIGHTS} has weights that are no numbers", HINT)
    return PublishedEncoder(network.eval(), Vocabulary(names), config)


def write_checkpoint(encoder: PublishedEncoder, prototypes: Prototypes, folder: Path) -> Path:
    """Write a model: the two files, the same bytes for the same model."""
    network = encoder.network
    network.set_prototypes(torch.from_numpy(prototypes.vectors))
    state = {name: part.detach().cpu().numpy() for name, part in published_parameters(network).items()}
    config = {**encoder.config, **network.sizes.to_dict(), "var_names": encoder.vocabulary.names}
    config["num_prototypes"] = len(prototypes)
    return write_files(folder, config, state)
