"""How sure domains are: of each cell, and of how many domains there are."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cellquilt.core.errors import CellquiltError
from cellquilt.core.log import progress
from cellquilt.domains.prototypes import Metric, Prototypes, unit

#: Cells by which numbers of domains are compared.
_SAMPLE = 6_000
#: A number of domains is as good as a smaller one if it is found again about as surely.
_AS_SURE = 0.95


@dataclass(frozen=True)
class Levels:
    """How surely each number of domains is found again.

    Attributes
    ----------
    levels
        (n,) int64 numbers of domains.
    stability
        (n,) float64 mean adjusted Rand index of domains found in two bootstrap samples of the cells.
    recommended
        The largest number that is found again about as surely as any above 2.
    """

    levels: NDArray[np.int64]
    stability: NDArray[np.float64]
    recommended: int


def stable_levels(
    latents: NDArray[np.float32],
    metric: str,
    *,
    levels: Sequence[int] = tuple(range(2, 21)),
    bootstraps: int = 8,
    seed: int = 0,
) -> Levels:
    """How many domains there are, as far as the cells say so again when others of them are asked.

    Parameters
    ----------
    latents
        (n_cells, size), of all slides, without NaN.
    metric
        ``cosine`` or ``euclidean``.
    levels
        Numbers of domains to try.
    bootstraps
        Samples of cells, with replacement, each clustered with its own seed.
    seed
        Of the samples and the clustering.

    Notes
    -----
    Continuity in space (FIDE) is not asked: it is highest where domains are merged.
    """
    from sklearn.cluster import KMeans
    from sklearn.metrics import adjusted_rand_score

    rng = np.random.default_rng(seed)
    if len(latents) < 3 * max(levels):
        raise CellquiltError(
            "too-few-cells", f"{len(latents)} cells are too few for {max(levels)} domains", "ask for fewer levels"
        )
    if len(latents) > _SAMPLE:
        latents = latents[np.sort(rng.choice(len(latents), _SAMPLE, replace=False))]
    points = (unit(latents) if metric == "cosine" else latents).astype(np.float64)
    samples = [rng.choice(len(points), len(points)) for _ in range(bootstraps)]
    found = []
    for level in progress(list(levels), "numbers of domains"):
        labels = [
            KMeans(level, n_init=5, random_state=seed + number).fit(points[rows]).predict(points)
            for number, rows in enumerate(samples)
        ]
        pairs = [adjusted_rand_score(labels[a], labels[b]) for a in range(bootstraps) for b in range(a)]
        found.append(float(np.mean(pairs)))
    numbers, stability = np.asarray(levels, dtype=np.int64), np.asarray(found)
    several = numbers > 2
    best = stability[several].max() if several.any() else stability.max()
    sure = numbers[(stability >= _AS_SURE * best) & (several | ~several.any())]
    return Levels(numbers, stability, int(sure.max()))


def domain_probabilities(
    prototypes: Prototypes, domain: NDArray[np.int64], latents: NDArray[np.float32]
) -> NDArray[np.float32]:
    """(n_cells, n_domains) how probable each domain is for each cell; rows add up to 1.

    The prototypes are taken for the means of normal distributions, all as wide as the cells lie around them.

    Parameters
    ----------
    prototypes
        Of the model.
    domain
        (n_prototypes,) the domain of each, -1 for those of none.
    latents
        (n_cells, size), without NaN.
    """
    kept = domain >= 0
    width = prototypes.width or float(np.sqrt(np.mean(prototypes.nearest(latents)[1].astype(np.float64) ** 2))) or 1.0
    share = np.ones(len(prototypes)) if prototypes.cells is None else np.maximum(prototypes.cells, 1e-6)
    # The mean squared distance in all directions together, of which each has its part.
    each = width**2 / prototypes.vectors.shape[1] if prototypes.metric == "euclidean" else width**2
    out = np.zeros((len(latents), int(domain.max(initial=0)) + 1), dtype=np.float32)
    for start in range(0, len(latents), 8192):
        rows = slice(start, start + 8192)
        far = prototypes.distances(latents[rows])[:, kept].astype(np.float64)
        score = -(far**2) / (2 * each) + np.log(share[kept])
        weight = np.exp(score - score.max(axis=1, keepdims=True))
        weight /= weight.sum(axis=1, keepdims=True)
        for number in range(out.shape[1]):
            out[rows, number] = weight[:, domain[kept] == number].sum(axis=1)
    return out


@dataclass(frozen=True)
class Bootstraps:
    """Domains as other samples of the cells would have them.

    Attributes
    ----------
    centres
        (n_samples, n_domains, size) float64.
    metric
        Of the latents.
    """

    centres: NDArray[np.float64]
    metric: Metric

    @classmethod
    def of(
        cls,
        sample: NDArray[np.float32],
        labels: NDArray[np.int64],
        metric: Metric,
        *,
        n_samples: int = 8,
        seed: int = 0,
    ) -> "Bootstraps":
        """Cluster samples of cells, drawn with replacement, each with its own seed, and name clusters by the domains.

        Parameters
        ----------
        sample, labels
            (n_cells, size) latents of all slides and (n_cells,) their domains.
        """
        from scipy.optimize import linear_sum_assignment
        from sklearn.cluster import KMeans

        rng = np.random.default_rng(seed)
        if len(sample) > _SAMPLE:
            rows = np.sort(rng.choice(len(sample), _SAMPLE, replace=False))
            sample, labels = sample[rows], labels[rows]
        names, labels = np.unique(labels, return_inverse=True)
        points = (unit(sample) if metric == "cosine" else sample).astype(np.float64)
        n = names.size
        found = np.full((n_samples, int(names.max(initial=0)) + 1, points.shape[1]), np.inf)
        for number in range(n_samples):
            rows = rng.choice(len(points), len(points))
            fitted = KMeans(n, n_init=1, random_state=seed + number).fit(points[rows])
            overlap = np.zeros((n, n))
            np.add.at(overlap, (fitted.predict(points), labels), 1)
            a, b = linear_sum_assignment(-overlap)
            found[number, names[b]] = fitted.cluster_centers_[a]
        return cls(found, metric)

    def same(self, latents: NDArray[np.float32], labels: NDArray[np.int64]) -> NDArray[np.float32]:
        """(n_cells,) share of the samples by which cells get the domain that they have."""
        points = (unit(latents) if self.metric == "cosine" else latents).astype(np.float64)
        same = np.zeros(len(points), dtype=np.float32)
        for centres in self.centres:
            there = np.flatnonzero(np.isfinite(centres).all(axis=1))
            far = (centres[there] ** 2).sum(axis=1) - 2 * points @ centres[there].T
            same += there[far.argmin(axis=1)] == labels
        return same / np.float32(len(self.centres))


@dataclass(frozen=True)
class Confidence:
    """How sure the domain of each cell is; NaN for cells without one.

    Attributes
    ----------
    probabilities
        (n_cells, n_domains) float32 how probable each domain is; rows add up to 1.
    own
        (n_cells,) float32 probability of the cell's own domain.
    stability
        (n_cells,) float32 share of the bootstrap samples by which the cell gets its domain again.
    """

    probabilities: NDArray[np.float32]
    own: NDArray[np.float32]
    stability: NDArray[np.float32]


@dataclass(frozen=True)
class Judge:
    """Judges how sure domains are, slide by slide: by the prototypes, and by other samples of the cells.

    Attributes
    ----------
    prototypes
        Of the model.
    domain
        (n_prototypes,) int64 the domain of each, -1 for those of none.
    again
        Domains as other samples would have them.
    """

    prototypes: Prototypes
    domain: NDArray[np.int64]
    again: Bootstraps

    @classmethod
    def of(
        cls,
        prototypes: Prototypes,
        domain: NDArray[np.int64],
        sample: NDArray[np.float32],
        *,
        bootstraps: int = 8,
        seed: int = 0,
    ) -> "Judge":
        """From a sample of all slides' latents, (n_cells, size) without NaN."""
        labels = domain[prototypes.nearest(sample)[0]]
        there = labels >= 0
        again = Bootstraps.of(sample[there], labels[there], prototypes.metric, n_samples=bootstraps, seed=seed)
        return cls(prototypes, domain, again)

    def confidence(self, latents: NDArray[np.float32], codes: NDArray[np.integer], n_domains: int) -> Confidence:
        """Of a slide's cells.

        Parameters
        ----------
        latents
            (n_cells, size).
        codes
            (n_cells,) their domains, -1 for none.
        n_domains
            How many there are in all slides.
        """
        labels: NDArray[np.int64] = np.asarray(codes, dtype=np.int64)
        valid = labels >= 0
        probable = np.full((len(latents), n_domains), np.nan, dtype=np.float32)
        own, stable = (np.full(len(latents), np.nan, dtype=np.float32) for _ in range(2))
        if valid.any():
            found = domain_probabilities(self.prototypes, self.domain, latents[valid])
            probable[valid, : found.shape[1]], probable[valid, found.shape[1] :] = found, 0.0
            own[valid] = probable[valid, labels[valid]]
            stable[valid] = self.again.same(latents[valid], labels[valid])
        return Confidence(probable, own, stable)
