"""The tree of domains: how the domains at hand are merged above their level."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cellquilt.core.errors import CellquiltError
from cellquilt.domains.hierarchy import Hierarchy


@dataclass(frozen=True)
class Dendrogram:
    """K domains merged two by two.

    Attributes
    ----------
    domains
        Names, in the order in which they are drawn: no lines cross.
    links
        (K - 1, 4) float64 as ``scipy.cluster.hierarchy`` has them: two nodes (below K: domains), the distance at which
        they merge, and the number of domains below.
    """

    domains: list[str]
    links: NDArray[np.float64]

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {"domains": self.domains, "links": self.links.tolist()}


def dendrogram(hierarchy: Hierarchy, domains: Sequence[str] | None = None, level: int | None = None) -> Dendrogram:
    """The tree above some domains.

    Parameters
    ----------
    hierarchy
        The model's.
    domains
        Domains as `Model.assign_domains` names them (``D`` and the node's number); None: all of a level.
    level
        Number of nodes, where `domains` is not given.

    Raises
    ------
    CellquiltError
        ``domains-not-of-tree`` for names of no node, or of nodes that lie in each other; ``level-unknown``.
    """
    if domains is None:
        nodes = np.unique(hierarchy.nodes_at(level or min(7, hierarchy.n_prototypes))).tolist()
    else:
        nodes = sorted({_node(name, hierarchy) for name in domains})
    n = hierarchy.n_prototypes
    # Of every node of the tree: what it is called among the links, how many domains are below it.
    label: dict[int, int] = {node: k for k, node in enumerate(nodes)}
    below = {node: [k] for k, node in enumerate(nodes)}
    links: list[tuple[float, float, float, float]] = []
    for merge, (a, b) in enumerate(hierarchy.merges.tolist()):
        parts = [node for node in (a, b) if node in label]
        parent = n + merge
        if not parts:
            continue
        if parent in label:
            raise CellquiltError(
                "domains-not-of-tree", f"D{parts[0]} lies in D{parent}", "give the domains of one level"
            )
        below[parent] = [leaf for node in parts for leaf in below[node]]
        label[parent] = label[parts[0]]
        if len(parts) == 2:
            links.append((label[a], label[b], float(hierarchy.heights[merge]), len(below[parent])))
            label[parent] = len(nodes) + len(links) - 1
    order = below[2 * n - 2] if n > 1 else list(range(len(nodes)))
    place = np.empty(len(nodes), dtype=np.int64)
    place[order] = np.arange(len(nodes))
    found = np.array(links, dtype=np.float64).reshape(-1, 4)
    leaf = found[:, :2] < len(nodes)
    found[:, :2][leaf] = place[found[:, :2][leaf].astype(np.int64)]
    return Dendrogram([f"D{nodes[k]}" for k in order], found)


def _node(name: str, hierarchy: Hierarchy) -> int:
    number = name.removeprefix("D")
    if not (name.startswith("D") and number.isdecimal() and int(number) < 2 * hierarchy.n_prototypes - 1):
        raise CellquiltError(
            "domains-not-of-tree",
            f'"{name}" is no domain of a model of {hierarchy.n_prototypes} prototypes',
            "give the model that the domains were assigned with; domains by resolution have no tree",
        )
    return int(number)
