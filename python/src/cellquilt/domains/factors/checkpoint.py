"""Models of factors on disk: the same two files as published models."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellquilt.core.errors import CellquiltError
from cellquilt.domains.checkpoint import CONFIG, HINT, read_weights, refuse_misfits, write_files
from cellquilt.domains.expression import KINDS, Vocabulary
from cellquilt.domains.factors.encoder import FactorEncoder
from cellquilt.domains.factors.sensitivity import Scale, States
from cellquilt.domains.prototypes import Prototypes

_FORMAT = 1
_NUMBERS = ("target", "sharpness", "steps", "n_prototypes", "prototype_width")


def write_factors(encoder: FactorEncoder, prototypes: Prototypes, folder: Path) -> Path:
    """Write a model, the same bytes for the same model."""
    arrays: dict[str, NDArray[Any]] = {
        "rate": encoder.scale.rate,
        "cofactor": encoder.scale.cofactor,
        "mean": encoder.scale.mean,
        "std": encoder.scale.std,
        "state_centres": encoder.states.centres,
        "state_rates": encoder.states.rates,
        "state_means": encoder.states.means,
        "loadings": encoder.loadings,
        "own": encoder.own,
        "centre": encoder.centre,
        "directions": encoder.directions,
        "image_mean": encoder.image_mean,
        "image_std": encoder.image_std,
        "prototypes": prototypes.vectors,
        "prototype_cells": np.zeros(0) if prototypes.cells is None else prototypes.cells,
        "prototype_groups": np.zeros(0) if prototypes.groups is None else prototypes.groups,
    }
    config = {
        **encoder.config,
        "recipe": "factors",
        "format": _FORMAT,
        "kind": encoder.scale.kind,
        "target": encoder.scale.target,
        "sharpness": encoder.sharpness,
        "steps": encoder.steps,
        "n_prototypes": encoder.n_prototypes,
        "prototype_width": prototypes.width,
        "var_names": encoder.vocabulary.names,
    }
    return write_files(folder, config, {name: array.astype(np.float32) for name, array in arrays.items()})


def read_factors(folder: Path, config: dict[str, Any]) -> tuple[FactorEncoder, Prototypes]:
    """Read a model.

    Raises
    ------
    CellquiltError
        ``model-invalid`` with what does not fit.
    """
    from safetensors.numpy import load_file

    absent = [name for name in _NUMBERS if not isinstance(config.get(name), int | float)]
    absent += [] if config.get("kind") in KINDS else ["kind"]
    if absent:
        raise CellquiltError("model-invalid", f"{folder / CONFIG} does not say {', '.join(absent)}", HINT)
    if config.get("format") != _FORMAT:
        raise CellquiltError(
            "model-invalid", f"{folder / CONFIG} is of format {config.get('format')}, this version reads {_FORMAT}",
            "use the cellquilt that wrote it",
        )  # fmt: skip
    found = read_weights(folder, load_file)
    names = config.get("var_names") or []
    _check(folder, found, len(names))
    part = {name: array.astype(np.float64) for name, array in found.items()}
    encoder = FactorEncoder(
        vocabulary=Vocabulary(names),
        scale=Scale(config["kind"], config["target"], part["rate"], part["cofactor"], part["mean"], part["std"]),
        states=States(part["state_centres"], part["state_rates"], part["state_means"]),
        loadings=part["loadings"],
        own=part["own"],
        centre=part["centre"],
        directions=part["directions"],
        image_mean=part["image_mean"],
        image_std=part["image_std"],
        sharpness=float(config["sharpness"]),
        steps=int(config["steps"]),
        n_prototypes=int(config["n_prototypes"]),
        config={name: config[name] for name in ("shared_variance", "training") if name in config},
    )
    cells = part["prototype_cells"] if part["prototype_cells"].size else None
    groups = part["prototype_groups"].astype(np.int64) if part["prototype_groups"].size else None
    return encoder, Prototypes(found["prototypes"], "euclidean", cells, float(config["prototype_width"]), groups)


def _check(folder: Path, found: dict[str, NDArray[Any]], n_genes: int) -> None:
    genes = ("rate", "cofactor", "mean", "std", "own")
    names = (*genes, "state_centres", "state_rates", "state_means", "loadings", "centre", "directions", "image_mean",
             "image_std", "prototypes", "prototype_cells", "prototype_groups")  # fmt: skip
    wrong = [f"no array {name}" for name in names if name not in found]
    if not wrong:
        n_factors, n_image = found["loadings"].shape[-1], found["image_mean"].size
        n_states, size = found["state_centres"].shape[0], found["directions"].shape[-1]
        n = found["prototypes"].shape[0]
        expected = dict.fromkeys(genes, (n_genes,)) | {
            "loadings": (n_genes, n_factors), "state_centres": (n_states, n_factors),
            "state_rates": (n_states, n_genes), "state_means": (n_states, n_genes), "centre": (n_factors + n_image,),
            "directions": (n_factors + n_image, size), "image_std": (n_image,), "prototypes": (n, size),
        } | {name: (n,) for name in ("prototype_cells", "prototype_groups") if found[name].size}  # fmt: skip
        wrong = [
            f"{name} is {found[name].shape}, expected {shape}"
            for name, shape in expected.items()
            if found[name].shape != shape
        ]
        wrong += [f"{name} has values that are no numbers" for name in names if not np.isfinite(found[name]).all()]
    refuse_misfits(folder, wrong)
