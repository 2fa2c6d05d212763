"""Baysor's settings: what each of its versions knows, and what is asked of it, checked before anything is started.

Baysor reads a TOML file in three sections and refuses keys that its version does not know. Here a user gives such a
file, the same as JSON, or parameters of the table of settings; all three end in one checked `Config`.
"""

import json
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cellquilt.core.errors import CellquiltError, SeveralErrors, did_you_mean
from cellquilt.core.log import LOG
from cellquilt.core.settings import Settings

#: Versions of Baysor whose contract is known.
CONTRACTS = ("0.6", "0.7")

Tree = dict[str, dict[str, Any]]

#: Section → key → type, of all versions.
KEYS: dict[str, dict[str, type]] = {
    "data": {
        "x": str,
        "y": str,
        "z": str,
        "gene": str,
        "force_2d": bool,
        "min_molecules_per_gene": int,
        "exclude_genes": str,
        "min_molecules_per_cell": int,
        "min_molecules_per_segment": int,
        "confidence_nn_id": int,
    },
    "segmentation": {
        "scale": float,
        "scale_std": str,
        "estimate_scale_from_centers": bool,
        "n_clusters": int,
        "prior_segmentation_confidence": float,
        "iters": int,
        "n_cells_init": int,
        "nuclei_genes": str,
        "cyto_genes": str,
        "unassigned_prior_label": str,
        "new_component_weight": float,
        "new_component_fraction": float,
    },
    "plotting": {
        "gene_composition_neigborhood": int,
        "min_pixels_per_cell": int,
        "max_plot_size": int,
        "ncv_method": str,
    },
}
#: Keys that only one version knows.
_ONLY = {
    "unassigned_prior_label": "0.7",
    "max_plot_size": "0.7",
    "ncv_method": "0.7",
    "new_component_weight": "0.6",
    "new_component_fraction": "0.6",
}
#: Keys that describe the table of molecules. That table is ours, so what a user's file says of another is left out.
_OURS = {
    "data": ("x", "y", "z", "gene"),
    "segmentation": ("unassigned_prior_label", "estimate_scale_from_centers"),
    "plotting": (),
}
#: Key → smallest and largest value. In a file, 0 and below stand for "not given" where Baysor says so.
_RANGES = {
    "min_molecules_per_gene": (0, math.inf),
    "min_molecules_per_cell": (0, math.inf),
    "min_molecules_per_segment": (0, math.inf),
    "confidence_nn_id": (0, math.inf),
    "n_clusters": (1, math.inf),
    "prior_segmentation_confidence": (0, 1),
    "iters": (1, math.inf),
    "n_cells_init": (0, math.inf),
    "new_component_weight": (0, math.inf),
    "new_component_fraction": (0, 1),
}
#: Parameter of the table of settings → section and key.
_PARAMETERS = {
    "baysor_scale_um": ("segmentation", "scale"),
    "baysor_min_molecules_per_cell": ("data", "min_molecules_per_cell"),
    "baysor_prior_confidence": ("segmentation", "prior_segmentation_confidence"),
    "baysor_n_clusters": ("segmentation", "n_clusters"),
    "baysor_iterations": ("segmentation", "iters"),
    "baysor_force_2d": ("data", "force_2d"),
}
#: In force where neither a parameter nor the file says anything; all else is Baysor's own default.
_DEFAULTS = {("data", "min_molecules_per_cell"): 10, ("segmentation", "prior_segmentation_confidence"): 0.8}
_KIND_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


@dataclass(frozen=True)
class Config:
    """Checked settings of Baysor.

    Attributes
    ----------
    tree
        Section → key → value, by Baysor's names, without the keys that describe the table of molecules.
    """

    tree: Tree

    def __getitem__(self, key: str) -> Any:
        """The value of a key, None where it is not given."""
        return next((section[key] for section in self.tree.values() if key in section), None)

    @property
    def scale_um(self) -> float | None:
        """Expected radius of a cell in µm; None where it has to be estimated."""
        return self["scale"]

    @property
    def min_molecules_per_cell(self) -> int:
        """Fewest molecules of a cell."""
        return self["min_molecules_per_cell"]

    @property
    def min_molecules_per_segment(self) -> int:
        """Fewest molecules of a prior cell that Baysor heeds; by its own rule where not given."""
        given = self["min_molecules_per_segment"]
        return given or max(round(max(self.min_molecules_per_cell, 3) / 4), 2)

    @property
    def confidence_nn_id(self) -> int:
        """Which neighbour tells signal from noise; by Baysor's own rule where not given."""
        given = self["confidence_nn_id"]
        return given or max(max(self.min_molecules_per_cell, 3) // 2 + 1, 5)

    def but(self, **values: Any) -> "Config":
        """The same with other values of some keys; None takes a key out."""
        tree = {section: dict(keys) for section, keys in self.tree.items()}
        for key, value in values.items():
            section = next(name for name, keys in KEYS.items() if key in keys)
            tree[section].pop(key, None)
            if value is not None:
                tree[section][key] = value
        return Config(tree)

    def check_version(self, contract: str) -> None:
        """Refuse keys that a version does not know.

        Parameters
        ----------
        contract
            One of `CONTRACTS`.

        Raises
        ------
        CellquiltError
            ``baysor-config``.
        """
        errors = []
        for section, keys in self.tree.items():
            known = [key for key in KEYS[section] if _ONLY.get(key, contract) == contract]
            errors += [
                CellquiltError(
                    "baysor-config",
                    f"Baysor {contract} has no [{section}] {key}; Baysor {_ONLY[key]} has",
                    f"leave it out, or use Baysor {_ONLY[key]}",
                )
                for key in keys
                if key not in known
            ]
        _raise_all(errors, f"Baysor's settings do not suit Baysor {contract}:")

    def to_toml(self, contract: str) -> str:
        """The text of Baysor's configuration file, for the table of molecules as we write it."""
        table: Tree = {section: dict(keys) for section, keys in self.tree.items()}
        table["data"].update({name: name for name in ("x", "y", "z", "gene")})
        if contract == "0.7":
            table["segmentation"]["unassigned_prior_label"] = "0"
        return "\n".join(
            f"[{section}]\n" + "".join(f"{key} = {_toml(value)}\n" for key, value in sorted(table[section].items()))
            for section in KEYS
            if table[section]
        )


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    # A basic string of TOML has the escapes of JSON.
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def checked_config(settings: Mapping[str, Any]) -> Config:
    """The settings of Baysor that follow from a user's.

    Parameters
    ----------
    settings
        Values by the names of the table of settings; only what was given, no defaults. ``baysor_config`` may be the
        path of a TOML file, the same as JSON, or a dict; parameters win over it.

    Raises
    ------
    CellquiltError
        ``baysor-config-missing`` if there is no such file; ``baysor-config`` naming every key that is unknown, of the
        wrong type or out of range.
    """
    given = settings.get("baysor_config")
    tree = _checked_tree(read_tree(given), str(config_path(given) or "baysor_config"))
    parameters = {name: settings[name] for name in _PARAMETERS if settings.get(name) is not None}
    for name, value in Settings(parameters).given.items():
        section, key = _PARAMETERS[name]
        tree[section][key] = value
    for (section, key), value in _DEFAULTS.items():
        tree[section].setdefault(key, value)
    return Config(tree)


def config_path(given: Mapping[str, Any] | str | Path | None) -> Path | None:
    """The file that ``baysor_config`` names; None if it holds the settings themselves."""
    if given is None or isinstance(given, Mapping) or str(given).lstrip().startswith("{"):
        return None
    return Path(given)


def read_tree(given: Mapping[str, Any] | str | Path | None) -> dict[str, Any]:
    """What ``baysor_config`` holds, unchecked.

    Raises
    ------
    CellquiltError
        ``baysor-config-missing`` if there is no such file, ``baysor-config`` if it is not TOML or the text not JSON.
    """
    if given is None:
        return {}
    if isinstance(given, Mapping):
        return dict(given)
    path = config_path(given)
    if path is None:
        try:
            return json.loads(str(given))
        except ValueError as error:
            raise CellquiltError(
                "baysor-config",
                f"baysor_config is not JSON: {error}",
                'for example {"segmentation": {"n_clusters": 6}}',
            ) from error
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CellquiltError(
            "baysor-config-missing", f"baysor_config {path} cannot be read: {error.strerror}", "check the path"
        ) from error
    except ValueError as error:
        raise CellquiltError("baysor-config", f"{path} is not TOML: {error}", "text needs quotes") from error


def _checked_tree(tree: Mapping[str, Any], name: str) -> Tree:
    errors: list[CellquiltError] = []
    checked: Tree = {section: {} for section in KEYS}
    for section, keys in tree.items():
        if section not in KEYS or not isinstance(keys, Mapping):
            errors.append(CellquiltError("baysor-config", *_unknown_section(section, keys)))
            continue
        for key, value in keys.items():
            if key not in KEYS[section]:
                hint = did_you_mean(key, KEYS[section])
                errors.append(CellquiltError("baysor-config", f"Baysor has no [{section}] {key}", hint))
                continue
            try:
                checked[section][key] = _checked_value(section, key, value)
            except CellquiltError as error:
                errors.append(error)
    compartments = checked["segmentation"]
    if bool(compartments.get("nuclei_genes")) != bool(compartments.get("cyto_genes")):
        errors.append(
            CellquiltError("baysor-config", "only one of nuclei_genes and cyto_genes is given", "give both or none")
        )
    _raise_all(errors, f"{name}: Baysor's settings have mistakes:")
    ours = [key for section, keys in checked.items() for key in keys if key in _OURS[section]]
    if ours:
        LOG.info("%s: %s left out, Baysor gets a table of our own", name, ", ".join(ours))
    return {
        section: {key: value for key, value in keys.items() if value is not None and key not in _OURS[section]}
        for section, keys in checked.items()
    }


def _unknown_section(section: str, keys: Any) -> tuple[str, str]:
    homes = [name for name, known in KEYS.items() if section in known]
    if homes:
        return f"{section} stands outside of a section", f"put it under [{homes[0]}]"
    if section in KEYS:
        return f"[{section}] is {json.dumps(keys)}; expected keys and values", "see docs/baysor.md"
    return f"Baysor has no section [{section}]", did_you_mean(section, KEYS)


def _checked_value(section: str, key: str, value: Any) -> Any:
    """A value as Baysor's type; None where Baysor takes it as not given."""
    kind: Any = KEYS[section][key]
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if key == "scale_std" and number:
        value = str(value)
    if kind is float and number and math.isfinite(value):
        value = float(value)
    elif kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        expected = _KIND_NAMES[kind]
        raise CellquiltError("baysor-config", f"[{section}] {key} is {json.dumps(value)}; expected {expected}")
    if key == "scale":
        return value if value > 0 else None
    if key == "ncv_method" and value not in ("ri", "dense", "sparse"):
        raise CellquiltError("baysor-config", f'[plotting] ncv_method is "{value}"; expected ri, dense or sparse')
    if key == "scale_std" and not _is_spread(value):
        raise CellquiltError(
            "baysor-config", f'[segmentation] scale_std is "{value}"; expected "25%" or a length in µm'
        )
    low, high = _RANGES.get(key, (-math.inf, math.inf))
    if kind in (int, float) and not low <= value <= high:
        limit = f"at least {low:g}" if math.isinf(high) else f"{low:g} to {high:g}"
        raise CellquiltError("baysor-config", f"[{section}] {key} is {value}; expected {limit}")
    return None if key == "min_molecules_per_cell" and value == 0 else value


def _is_spread(text: str) -> bool:
    try:
        return float(text.strip().removesuffix("%")) > 0
    except ValueError:
        return False


def _raise_all(errors: list[CellquiltError], title: str) -> None:
    if errors:
        raise SeveralErrors("baysor-config", title, errors)
