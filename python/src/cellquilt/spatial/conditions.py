"""Conditions compared in many numbers of each sample, as one table."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cellquilt.core.log import LOG
from cellquilt.spatial.slides import natural_order
from cellquilt.statistics.groups import GroupComparison, compare_groups
from cellquilt.statistics.multiplicity import benjamini_hochberg

if TYPE_CHECKING:
    import pandas as pd


@dataclass
class ComparedPairs:
    """Pairs of conditions compared in many numbers, the sample being the unit.

    Attributes
    ----------
    n_permutations, seed
        As `cellquilt.statistics.groups.compare_groups` takes them.
    batches
        (n_samples,) the samples' batches, or None.
    conditions
        (n_samples,) the samples' conditions.
    """

    n_permutations: int
    seed: int
    batches: NDArray | None
    conditions: NDArray
    rows: list[dict[str, Any]] = field(default_factory=list)
    warned: set[str] = field(default_factory=set)

    def add(
        self, pair: tuple[str, str], among: NDArray[np.bool_], tested: NDArray, shown: NDArray, labels: dict[str, Any]
    ) -> None:
        """Compare a pair of conditions in columns of numbers.

        `among` (n_samples,) says which samples have them, `tested` and `shown` are (n_samples, m), and `labels` are
        columns of the result.
        """
        a, b = ((self.conditions == name) & among for name in pair)
        columns = {"condition_a": pair[0], "condition_b": pair[1], **labels, "n_a": int(a.sum()), "n_b": int(b.sum())}
        if not a.any() or not b.any():
            return
        rows = a | b
        batch = None if self.batches is None else self.batches[rows]
        found = compare_groups(tested[rows], b[rows], batch, n_permutations=self.n_permutations, seed=self.seed)
        self._warn(pair, found)
        self.rows.append(
            {
                **columns,
                "mean_a": shown[a].mean(axis=0),
                "mean_b": shown[b].mean(axis=0),
                "difference": shown[b].mean(axis=0) - shown[a].mean(axis=0),
                "log2_ratio": found.difference,
                "hedges_g": found.hedges_g,
                "p": found.p,
                "p_max_t": found.p_max_t,
                "smallest_p": found.smallest_p,
                "n_permutations": found.n_permutations,
                "exact": found.exact,
                "note": found.why_no_p,
            }
        )

    def _warn(self, pair: tuple[str, str], found: GroupComparison) -> None:
        text = f"{pair[0]} against {pair[1]}"
        if found.why_no_p == "confounded with batch":
            text += ": confounded: every batch holds one of the two only; differences may be the batches', no p-values"
        elif found.why_no_p:
            text += f": {found.n_a} and {found.n_b} samples: {found.why_no_p}: effect sizes, no p-values"
        elif found.smallest_p > 0.05:
            text += f": with {found.n_a} and {found.n_b} samples no p-value can be below {found.smallest_p:.2g}"
        else:
            return
        if text not in self.warned:
            self.warned.add(text)
            LOG.warning("%s", text)

    def frame(self, *labels: str, extra: Sequence[str] = ()) -> "pd.DataFrame":
        """All rows; in each pair the smallest p first.

        Parameters
        ----------
        labels
            Columns that say what was compared; the first is put in natural order where p and effects are the same.
        extra
            Other columns that `add` was given, for after the effect sizes.
        """
        import pandas as pd

        names = ["condition_a", "condition_b", *labels, "n_a", "n_b", "mean_a", "mean_b", "difference", "log2_ratio"]
        names += ["hedges_g", *extra, "p", "p_max_t", "p_bh", "smallest_p", "n_permutations", "exact", "note"]
        if not self.rows:
            return pd.DataFrame(columns=names)
        found = pd.concat([pd.DataFrame(row) for row in self.rows], ignore_index=True)
        found = found.assign(p_bh=benjamini_hochberg(found["p"]))[names]
        first = found[labels[0]]
        known = list(first.unique())
        place = {known[k]: rank for rank, k in enumerate(natural_order(known))}
        keys = pd.DataFrame(
            {
                "a": found["condition_a"],
                "b": found["condition_b"],
                "p": found["p"],
                "g": -found["hedges_g"].abs(),
                "first": first.map(place),
                "row": np.arange(len(found)),
            }
        )
        return found.iloc[keys.sort_values(list(keys.columns)).index].reset_index(drop=True)
