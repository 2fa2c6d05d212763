"""Spatial statistics of a cohort: conditions compared, the sample being the unit."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cellquilt.core.atomic import atomic_path
from cellquilt.core.errors import CellquiltError, did_you_mean
from cellquilt.core.log import LOG
from cellquilt.spatial.conditions import ComparedPairs
from cellquilt.spatial.slides import CELL_TYPE, natural_order
from cellquilt.spatial.summary import SlideStatistics
from cellquilt.statistics.groups import pairs_of

if TYPE_CHECKING:
    import pandas as pd

#: Co-occurrence is compared within the last ring that ends no farther out.
_NEAR_UM = 50.0
#: Added to numbers of edges and niches before logarithms are taken.
_PSEUDOCOUNT = 0.5


@dataclass(frozen=True)
class CohortStatistics:
    """What `cohort_statistics` found.

    Attributes
    ----------
    values
        A row for each sample, quantity and pair of groups (or domain): ``sample``, ``condition`` (if asked for),
        ``quantity``, ``a``, ``b``, ``value`` (a logarithm to base 2).
    compared
        Conditions compared; None without two of them: a row for each pair of conditions, quantity and pair of groups,
        with the columns of `cellquilt.domains.analysis.compare_conditions`.
    notes
        What is missing, and why.
    """

    values: "pd.DataFrame"
    compared: "pd.DataFrame | None"
    notes: list[str] = field(default_factory=list)

    def tables(self) -> "dict[str, pd.DataFrame]":
        """All tables there are, by the name of their file."""
        found = {"spatial": self.values}
        if self.compared is not None:
            found["conditions_spatial"] = self.compared
        return found

    def write(self, folder: Path, *, overwrite: bool = False) -> None:
        """Write all tables as ``<name>.csv`` into a folder, which others may write to, too."""
        for name, table in self.tables().items():
            with atomic_path(Path(folder) / f"{name}.csv", overwrite=overwrite) as aside:
                table.to_csv(aside, index=False)


#: Quantity → what it is.
QUANTITIES = {
    "enrichment": "edges between two groups over those expected at random",
    "distance_um": "mean distance to the nearest of a group over that expected at random, in µm",
    "distance_hops": "the same in steps along the graph",
    "co_occurrence": f"likelihood of a group within {_NEAR_UM:g} µm of another over that anywhere",
    "n_niches": "niches of a domain",
    "niche_area_um2": "mean area of a domain's niches",
    "niche_roundness": "mean roundness of a domain's niches, by area",
    "niche_nearest_um": "mean distance to the nearest niche of the same domain",
}


def cohort_statistics(
    slides: Sequence[SlideStatistics | Path | str],
    condition_key: str | None = None,
    sample_key: str | None = None,
    *,
    batch_key: str | None = None,
    reference: str | None = None,
    n_permutations: int = 9999,
    seed: int = 0,
) -> CohortStatistics:
    """Bring slides' spatial statistics together, and compare conditions by permuting which sample has which.

    Parameters
    ----------
    slides
        What `slide_statistics` returned, or folders that it was written to.
    condition_key
        Column of the slides' `obs` with their condition; None compares nothing.
    sample_key
        Column that names the samples, the unit of the comparison: of a patient with several slides the mean is taken.
        None: each slide is one.
    batch_key
        Column with the samples' batch; samples are then compared within batches.
    reference
        Condition that the others are compared with; None: all pairs.
    n_permutations, seed
        All ways to permute the samples are tried if there are no more; else so many random ones.

    Raises
    ------
    CellquiltError
        ``tables-missing``, ``slide-twice``, ``condition-missing``, ``condition-mixed``, ``batch-missing``,
        ``batch-mixed``, ``column-unknown``, ``reference-unknown``, ``stats-unreadable``.
    """
    import pandas as pd

    found = [slide if isinstance(slide, SlideStatistics) else SlideStatistics.read(slide) for slide in slides]
    if not found:
        raise CellquiltError("tables-missing", "there are no slides", "name folders that `cellquilt stats` wrote")
    names = [slide.sample for slide in found]
    for name in names:
        if names.count(name) > 1:
            raise CellquiltError("slide-twice", f'two folders are of a slide "{name}"', "give each slide its own name")
    found = [found[k] for k in np.argsort(names, kind="stable")]
    units = [slide.sample if sample_key is None else _of(slide, sample_key, "column-unknown") for slide in found]
    samples = [name for k, name in enumerate(units) if name not in units[:k]]
    parts = []
    for unit, slide in zip(units, found, strict=True):
        own = _values(slide)
        own.insert(0, "sample", unit)
        parts.append(own)
    values = pd.concat(parts, ignore_index=True)
    items = ["quantity", "a", "b"]
    # Of a sample's slides the mean.
    values = values.groupby(["sample", *items], sort=False)["value"].mean().reset_index()
    values = values.iloc[_order(values)].reset_index(drop=True)
    notes = [f"{slide.sample}: {note}" for slide in found for note in slide.about.get("notes", [])]
    if condition_key is None:
        return CohortStatistics(values, None, notes)
    condition = _one_each(found, units, condition_key, "condition")
    batch = None if batch_key is None else _one_each(found, units, batch_key, "batch")
    values.insert(1, "condition", values["sample"].map(condition))
    conditions = sorted(set(condition.values()))
    if len(conditions) < 2:  # what was measured stands all the same
        text = f'nothing to compare: {condition_key} is "{conditions[0]}" in all samples'
        LOG.warning("%s", text)
        return CohortStatistics(values, None, [text, *notes])
    pairs = pairs_of(conditions, reference)
    batches = None if batch is None else np.array([batch[name] for name in samples])
    compared = ComparedPairs(
        n_permutations, seed, batches, np.array([condition[name] for name in samples], dtype=object)
    )
    for quantity in QUANTITIES:
        own = values[values["quantity"] == quantity]
        if own.empty:
            continue
        table = own.pivot(index="sample", columns=["a", "b"], values="value").reindex(samples)
        order = list(dict.fromkeys(zip(own["a"], own["b"], strict=True)))
        _compare(compared, pairs, quantity, table[order].to_numpy(), order)
    return CohortStatistics(values, compared.frame(*items), notes)


def _compare(
    compared: ComparedPairs,
    pairs: list[tuple[str, str]],
    quantity: str,
    numbers: NDArray[np.float64],
    items: list[tuple[str, str]],
) -> None:
    """Compare one quantity; items that other samples lack are compared in those that have them."""
    measured = np.isfinite(numbers)
    for pair in pairs:
        of_pair = np.isin(compared.conditions, pair)
        patterns, which = np.unique(measured & of_pair[:, None], axis=1, return_inverse=True)
        for k, among in enumerate(patterns.T):
            columns = np.flatnonzero(which.ravel() == k)
            labels = {
                "quantity": quantity,
                "a": [items[c][0] for c in columns],
                "b": [items[c][1] for c in columns],
            }
            compared.add(pair, among, numbers[:, columns], numbers[:, columns], labels)


def _values(slide: SlideStatistics) -> "pd.DataFrame":
    """Logarithms to base 2 of a slide's numbers: ``quantity``, ``a``, ``b``, ``value``."""
    import pandas as pd

    parts = [pd.DataFrame({"quantity": [], "a": [], "b": [], "value": []})]

    def add(quantity: str, a: Any, b: Any, value: NDArray) -> None:
        with np.errstate(divide="ignore", invalid="ignore"):
            logs = np.log2(np.asarray(value, dtype=np.float64))
        known = np.isfinite(logs)
        one = pd.DataFrame({"quantity": quantity, "a": np.asarray(a), "b": np.asarray(b), "value": logs})
        parts.append(one[known])

    tables = slide.tables
    if "enrichment" in tables:
        own = tables["enrichment"]
        own = own[own["of"] == CELL_TYPE]
        ratio = (own["n_edges"] + _PSEUDOCOUNT) / (own["expected"] + _PSEUDOCOUNT)
        add("enrichment", own["a"], own["b"], ratio.to_numpy())
    if "distances" in tables:
        for unit in ("um", "hops"):
            own = tables["distances"][tables["distances"]["unit"] == unit]
            add(f"distance_{unit}", own["source"], own["target"], own["ratio"].to_numpy())
    if "co_occurrence" in tables:
        own = tables["co_occurrence"]
        near = own["to_um"][own["to_um"] <= _NEAR_UM]
        own = own[own["to_um"] == (near.max() if len(near) else own["to_um"].min())]
        add("co_occurrence", own["a"], own["b"], own["ratio_within"].to_numpy())
    if "niches_by_domain" in tables:
        own = tables["niches_by_domain"]
        for quantity, column in (
            ("niche_area_um2", "mean_area_um2"),
            ("niche_roundness", "roundness"),
            ("niche_nearest_um", "nearest_um"),
        ):
            add(quantity, own["domain"], [""] * len(own), own[column].to_numpy())
        add("n_niches", own["domain"], [""] * len(own), own["n_niches"].to_numpy() + _PSEUDOCOUNT)
    return pd.concat(parts[1:] or parts, ignore_index=True)


def _order(values: "pd.DataFrame") -> list[int]:
    """Samples in their order, quantities as listed, groups in natural order."""
    groups = list(dict.fromkeys([*values["a"], *values["b"]]))
    place = {groups[k]: rank for rank, k in enumerate(natural_order(groups))}
    quantity = {name: rank for rank, name in enumerate(QUANTITIES)}
    sample = {name: rank for rank, name in enumerate(dict.fromkeys(values["sample"]))}
    keys = (
        values["b"].map(place),
        values["a"].map(place),
        values["quantity"].map(quantity),
        values["sample"].map(sample),
    )
    return [int(k) for k in np.lexsort([np.asarray(key) for key in keys])]


def _one_each(slides: list[SlideStatistics], units: list[str], key: str, what: str) -> dict[str, str]:
    """What a column says of each sample."""
    out: dict[str, str] = {}
    for unit, slide in zip(units, slides, strict=True):
        said = _of(slide, key, f"{what}-missing")
        if out.setdefault(unit, said) != said:
            raise CellquiltError(
                f"{what}-mixed",
                f"{unit}: {key} is {out[unit]} in one slide, {said} in another",
                "one was expected",
            )
    return out


def _of(slide: SlideStatistics, key: str, code: str) -> str:
    metadata = slide.about.get("metadata", {})
    if key not in metadata:
        hint = did_you_mean(key, metadata) if metadata else "one value for all of a slide's cells was expected in obs"
        raise CellquiltError(code, f'{slide.sample}: nothing says its "{key}"', hint)
    return str(metadata[key])
