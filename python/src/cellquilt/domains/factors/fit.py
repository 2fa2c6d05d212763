"""A model of factors from slides: sums over cells, and the solutions of small problems.

Slides are read one after the other, three times; of each a sample of cells is kept, so that memory does not grow with
what the slides hold.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_matrix, diags, identity

from cellquilt.core.errors import CellquiltError
from cellquilt.core.log import LOG
from cellquilt.domains.expression import Panel, Vocabulary, panel_of, totals
from cellquilt.domains.factors.analysis import factor_analysis, panel_weights
from cellquilt.domains.factors.encoder import FactorEncoder, check_kind
from cellquilt.domains.factors.sensitivity import Own, Scale, States, compared, sums
from cellquilt.domains.factors.smoothing import place_mean, squared_steps
from cellquilt.domains.neighbourhoods import Hops, at
from cellquilt.domains.slides import SlideCells, Slides
from cellquilt.geometry.polygons import ranges

_N_FACTORS, _N_STATES, _N_PROTOTYPES = 30, 30, 512
#: Genes that a factor should have at least.
_GENES_A_FACTOR = 3
_CELLS_A_STATE = 50
#: Molecules or cells of a state that count as much as the average of all.
_STATE_BELIEF = 10.0
#: Cells of all slides together that factors and states are made from, and least of each slide.
_SAMPLE, _LEAST = 200_000, 1_000
_CLUSTERED = 20_000
_ROUNDS = 5
#: Cells so many hops apart share a place, and neither molecules nor outlines.
_APART = (2, 3)
#: A direction must explain this much of the variance of single cells by the place; of noise some explain a little.
_LEAST_SHARED = 0.02
#: Squared step between neighbours, in medians of all, at which one counts a third; and how often means are taken.
#: Of 27 settings the best on six simulated cohorts together (mean adjusted Rand index 0.54 to 0.62).
_ALIKE = 1.0
_STEPS = 4
_MIN_CELLS = 50
#: Places by which it is judged how much patches of an image have in common, and the most that is believed.
_OVERLAPS, _MOST_TOGETHER = 500, 0.95
#: Pairs of places that are looked at together.
_MOST_OVERLAPS = 2_000_000


@dataclass(frozen=True)
class _Sample:
    """Some cells of a slide, and which genes they have."""

    name: str
    matrix: Any
    panel: Panel


def fit_factors(slides: Slides, *, start: FactorEncoder | None = None, seed: int = 0) -> FactorEncoder:
    """Make a model of factors.

    Parameters
    ----------
    slides
        Of one kind of measurement; panels may differ.
    start
        A model whose genes and their correlations are kept, with as much weight as the slides.
    seed
        Of the sample and of the clustering.

    Raises
    ------
    CellquiltError
        ``too-few-cells``, ``genes-twice``, ``kinds-differ``, ``panels-apart``, ``image-embeddings``.
    """
    vocabulary = _vocabulary(slides, start)
    kind = slides[0].kind
    samples, images = _samples(slides, vocabulary, kind, seed)
    if sum(sample.matrix.shape[0] for sample in samples) < _MIN_CELLS:
        raise CellquiltError("too-few-cells", f"fewer than {_MIN_CELLS} cells have a neighbour", "use more slides")
    n_factors = max(2, min(_N_FACTORS, len(vocabulary) // _GENES_A_FACTOR))
    scale, states, loadings, own = _factors(samples, vocabulary, kind, n_factors, start, seed)
    image_mean, image_std = images
    encoder = FactorEncoder(
        vocabulary=vocabulary, scale=scale, states=states, loadings=loadings, own=own,
        centre=np.zeros(n_factors + image_mean.size), directions=np.eye(n_factors + image_mean.size),
        image_mean=image_mean, image_std=image_std, sharpness=0.0, steps=_STEPS, n_prototypes=_N_PROTOTYPES,
    )  # fmt: skip
    centre, directions, shared = _directions(encoder, slides)
    encoder = replace(encoder, centre=centre, directions=directions)
    LOG.info("places explain %s of the variance of single cells", ", ".join(f"{100 * part:.0f} %" for part in shared))
    # As it is saved, so that a model gives the same before and after.
    encoder = _single_precision(encoder)
    return replace(encoder, sharpness=_sharpness(encoder, slides), config={"shared_variance": shared.round(4).tolist()})


def _single_precision(encoder: FactorEncoder) -> FactorEncoder:
    def of(part: Any) -> Any:
        arrays = {key: value for key, value in vars(part).items() if isinstance(value, np.ndarray)}
        return replace(part, **{key: value.astype(np.float32).astype(np.float64) for key, value in arrays.items()})

    return replace(of(encoder), scale=of(encoder.scale), states=of(encoder.states))


def _vocabulary(slides: Slides, start: FactorEncoder | None) -> Vocabulary:
    names = list(start.vocabulary.names) if start else []
    known = set(names)
    more = {gene.lower() for slide in slides for gene in slide.genes} - known
    return Vocabulary(names + sorted(more))


def _samples(
    slides: Slides, vocabulary: Vocabulary, kind: str, seed: int
) -> tuple[list[_Sample], tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Cells of each slide, and mean and deviation of what an image shows."""
    most = max(_LEAST, _SAMPLE // max(len(slides), 1))
    samples, image_sums = [], np.zeros((3, 0))
    for number, slide in enumerate(slides):
        check_kind(slide, kind)
        panel = panel_of(slide.genes, vocabulary, None, slide.name)
        n_image = 0 if slide.image is None else slide.image.shape[1]
        if number and n_image != image_sums.shape[1]:
            raise CellquiltError(
                "image-embeddings",
                f"{slide.name}: the image has {n_image} numbers a cell, others {image_sums.shape[1]}",
            )
        if slide.image is not None:
            x = slide.image.astype(np.float64)
            part = np.stack([np.full(n_image, float(len(x))), x.sum(axis=0), (x**2).sum(axis=0)])
            image_sums = part + (image_sums if number else 0)
        rows = np.flatnonzero(slide.graph.degree > 0)
        if rows.size > most:
            rows = np.sort(np.random.default_rng([seed, number]).choice(rows, most, replace=False))
        samples.append(_Sample(slide.name, slide.matrix[rows], panel))
    n, total, square = image_sums
    mean = total / np.maximum(n, 1)
    std = np.sqrt(np.maximum(square / np.maximum(n, 1) - mean**2, 1e-12))
    return samples, (mean, std)


def _factors(
    samples: list[_Sample], vocabulary: Vocabulary, kind: str, n_factors: int, start: FactorEncoder | None, seed: int
) -> tuple[Scale, States, NDArray[np.float64], NDArray[np.float64]]:
    """Scale, states and factors, each from the others, in turn."""
    scale = _first_scale(samples, vocabulary, kind)
    own: list[Own | None] = [None] * len(samples)
    states: States | None = None
    for round_ in range(_ROUNDS + 1):
        correlation, scale = _correlation(samples, scale, own, start)
        loadings, psi = factor_analysis(correlation, n_factors)
        factors = []
        for sample, mine in zip(samples, own, strict=True):
            weights = panel_weights(loadings[sample.panel.numbers], psi[sample.panel.numbers])
            found = scale.expression(sample.matrix, sample.panel, mine).project(weights)
            # At first slides are compared as they are; later by what their cells are.
            factors.append(found - found.mean(axis=0) if round_ == 0 else found)
        states = _states(samples, factors, scale, own, states, seed)
        if round_ < _ROUNDS:
            own = [
                compared(sample.matrix, sample.panel, scale, states, states.nearest(found))
                for sample, found in zip(samples, factors, strict=True)
            ]
    assert states is not None
    return scale, states, loadings, psi


def _first_scale(samples: list[_Sample], vocabulary: Vocabulary, kind: str) -> Scale:
    n = len(vocabulary)
    target, rate, cofactor = 1.0, np.zeros(n), np.ones(n)
    if kind == "counts":
        medians = []
        for sample in samples:
            total = totals(sample.matrix, sample.panel)
            medians.append(float(np.median(total[total > 0])) if (total > 0).any() else 1.0)
        rate = _rates([_column_sums(sample) for sample in samples], samples, n)
        measured = [rate[sample.panel.numbers].sum() for sample in samples]
        target = float(np.median(np.array(medians) / np.maximum(measured, 1e-12)))
    elif kind == "protein":
        middle: list[NDArray[np.float64]] = []
        for sample in samples:
            row = np.full(n, np.nan)
            values = sample.matrix.toarray() if hasattr(sample.matrix, "toarray") else np.asarray(sample.matrix)
            row[sample.panel.numbers] = np.median(values[:, sample.panel.columns], axis=0)
            middle.append(row)
        cofactor = np.maximum(np.nanmedian(np.stack(middle), axis=0), 1e-6)
    return Scale(kind, target, rate, cofactor, np.zeros(n), np.ones(n))


def _column_sums(sample: _Sample) -> NDArray[np.float64]:
    return np.asarray(sample.matrix.sum(axis=0), dtype=np.float64).ravel()[sample.panel.columns]


def _rates(seen: list[NDArray[np.float64]], samples: list[_Sample], n: int) -> NDArray[np.float64]:
    """(n,) share of all molecules that are of each gene, were all genes measured everywhere.

    Each slide says only how its own genes stand to each other. A few rounds bring slides that share genes together.
    """
    rate = np.full(n, 1.0 / n)
    for _ in range(20):
        molecules, exposure = np.zeros(n), np.zeros(n)
        for counted, sample in zip(seen, samples, strict=True):
            genes = sample.panel.numbers
            molecules[genes] += counted
            exposure[genes] += counted.sum() / max(rate[genes].sum(), 1e-12)
        rate = molecules / np.maximum(exposure, 1e-12)
        rate /= max(rate.sum(), 1e-12)
    return rate


def _correlation(
    samples: list[_Sample], scale: Scale, own: list[Own | None], start: FactorEncoder | None
) -> tuple[NDArray[np.float64], Scale]:
    """Correlation of genes within slides, NaN for pairs that no slide has; and the scale with means and deviations."""
    n = scale.rate.size
    pairs, weight = np.zeros((n, n)), np.zeros((n, n))
    total, cells = np.zeros(n), np.zeros(n)
    plain = replace(scale, mean=np.zeros(n), std=np.ones(n))
    for sample, mine in zip(samples, own, strict=True):
        genes, n_cells = sample.panel.numbers, sample.matrix.shape[0]
        expression = plain.expression(sample.matrix, sample.panel, mine)
        x = csr_matrix(expression.transformed(slice(None))).astype(np.float64)
        mean = np.asarray(x.mean(axis=0)).ravel()
        square = (x.T @ x).toarray() - n_cells * np.outer(mean, mean)
        pairs[np.ix_(genes, genes)] += square
        weight[np.ix_(genes, genes)] += n_cells
        total[genes] += n_cells * (mean - expression.mean)
        cells[genes] += n_cells
    mean = total / np.maximum(cells, 1)
    if start is not None:
        # As if as many cells of the model's slides were among these.
        old, as_many = np.arange(len(start.vocabulary)), max(float(cells.max(initial=1)), 1.0)
        std = start.scale.std
        covariance = (start.loadings @ start.loadings.T + np.diag(start.own)) * np.outer(std, std)
        pairs[np.ix_(old, old)] += as_many * covariance
        weight[np.ix_(old, old)] += as_many
        mean[old] = np.where(cells[old] > 0, mean[old], start.scale.mean)
    covariance = np.where(weight > 0, pairs / np.maximum(weight, 1), np.nan)
    std = np.sqrt(np.maximum(np.diag(covariance), 1e-12))
    correlation = covariance / np.outer(std, std)
    # A gene that nobody shows has no correlation with others; it must not become one with itself of 0.
    np.fill_diagonal(correlation, 1.0)
    return correlation, replace(scale, mean=mean, std=std)


def _states(
    samples: list[_Sample],
    factors: list[NDArray[np.float32]],
    scale: Scale,
    own: list[Own | None],
    before: States | None,
    seed: int,
) -> States:
    """States of cells, and what they show, in the slides on average."""
    from sklearn.cluster import KMeans

    together = np.concatenate(factors).astype(np.float64)
    every = max(1, -(-len(together) // _CLUSTERED))
    n_states = max(2, min(_N_STATES, len(together) // _CELLS_A_STATE))
    first: Any = "k-means++" if before is None else before.centres
    found = KMeans(n_states, init=first, n_init=3 if before is None else 1, random_state=seed).fit(together[::every])
    n = scale.rate.size
    states = States(found.cluster_centers_, np.zeros((n_states, n)), np.zeros((n_states, n)))
    nearest = [states.nearest(part) for part in factors]
    means, cells = np.zeros((n_states, n)), np.zeros((n_states, n))
    for sample, mine, state in zip(samples, own, nearest, strict=True):
        genes = sample.panel.numbers
        n_cells = np.bincount(state, minlength=n_states)[:, None].astype(np.float64)
        bent = sums(scale.bent(sample.matrix, sample.panel, mine), state, n_states)
        means[:, genes] += bent if mine is None else bent - n_cells * mine.offset
        cells[:, genes] += n_cells
    # A state that is rare leans on the average.
    means = (means + _STATE_BELIEF * scale.mean) / (cells + _STATE_BELIEF)
    rates = _state_rates(samples, own, nearest, scale, n_states) if scale.kind == "counts" else states.rates
    return States(states.centres, rates, means)


def _state_rates(
    samples: list[_Sample], own: list[Own | None], nearest: list[NDArray[np.int64]], scale: Scale, n_states: int
) -> NDArray[np.float64]:
    """(n_states, n_genes) shares of molecules; as in `_rates`, for each state."""
    n = scale.rate.size
    seen, rates, parts = np.zeros((n_states, n)), np.tile(scale.rate, (n_states, 1)), []
    for sample, mine, state in zip(samples, own, nearest, strict=True):
        counted = sums(sample.matrix, state, n_states)[:, sample.panel.columns]
        parts.append(counted if mine is None else counted / mine.factor)
        seen[:, sample.panel.numbers] += parts[-1]
    for _ in range(10):
        exposure = np.zeros((n_states, n))
        for sample, counted in zip(samples, parts, strict=True):
            genes = sample.panel.numbers
            share = np.maximum(rates[:, genes].sum(axis=1, keepdims=True), 1e-12)
            exposure[:, genes] += counted.sum(axis=1, keepdims=True) / share
        rates = (seen + _STATE_BELIEF * scale.rate) / (exposure + _STATE_BELIEF)
        rates /= np.maximum(rates.sum(axis=1, keepdims=True), 1e-12)
    return rates


def _directions(
    encoder: FactorEncoder, slides: Slides
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Directions in which cells some hops apart are alike.

    With S the covariance of cells and B that of pairs of cells 2 and 3 hops apart, both within slides: what pairs share
    is of the place. The directions are those of ``B w = λ S w`` with the largest λ, in units in which what is not
    shared has variance 1 (maximum autocorrelation factors, Switzer and Green 1984; with domains as classes, Fisher's
    linear discriminants without labels).

    Patches of an image that overlap share pixels, and what these show by chance is neither of the place nor lost in
    means over neighbours: see `_overlap`.
    """
    n, n_image = encoder.centre.size, encoder.image_mean.size
    together, kept = 0.0, 0.0
    square, shared, total = np.zeros((n, n)), np.zeros((n, n)), np.zeros(n)
    n_cells, n_pairs = 0, 0
    for slide in slides:
        features = encoder.features(slide).astype(np.float64)
        used = slide.graph.degree > 0
        mean = features[used].mean(axis=0) if used.any() else np.zeros(n)
        total += features[used].sum(axis=0)
        centred = np.where(used[:, None], features - mean, 0)
        square += centred.T @ centred
        n_cells += int(used.sum())
        apart = [at(slide.graph, hops) for hops in _APART]
        for pairs in apart:
            shared += centred.T @ _summed(pairs, centred)
            n_pairs += pairs.indices.size
        if n_image:
            seen, left = _overlap(slide, apart)
            together += seen * sum(pairs.indices.size for pairs in apart)
            kept += left * int(used.sum())
    if n_pairs == 0:
        raise CellquiltError("graph-empty", "no two cells are 2 hops apart", "use a larger radius")
    square, shared = square / max(n_cells, 1), shared / n_pairs
    shared = (shared + shared.T) / 2
    single = square - shared
    if n_image:
        of_image = slice(n - n_image, n)
        alone = single[of_image, of_image] / (1 - min(together / n_pairs, _MOST_TOGETHER))
        shared[of_image, of_image] = square[of_image, of_image] - alone
        single[of_image, of_image] = alone * max(kept / max(n_cells, 1), 1.0)
    single += 1e-2 * np.trace(single) / n * np.eye(n)
    values, vectors = np.linalg.eigh(single)
    whitened = vectors / np.sqrt(np.maximum(values, 1e-9))
    part, turned = np.linalg.eigh(whitened.T @ shared @ whitened)
    part, directions = part[::-1], (whitened @ turned)[:, ::-1]
    directions = directions * np.sign(directions[np.abs(directions).argmax(axis=0), np.arange(n)])
    kept = max(2, int((part > _LEAST_SHARED).sum()))
    return total / max(n_cells, 1), directions[:, :kept], part[:kept] / (1 + part[:kept])


def _overlap(slide: SlideCells, apart: Sequence[Hops]) -> tuple[float, float]:
    """How much patches of an image have in common.

    Returns
    -------
    seen, left
        Part of a patch that cells some hops apart share, on average; and how many times the variance of the mean over
        a place is what it were if patches had nothing in common.
    """
    if slide.patch_um is None:
        return 0.0, 1.0
    rows = np.arange(0, len(slide), max(1, len(slide) // _OVERLAPS))

    def common(a: NDArray[np.int64], b: NDArray[np.int64]) -> NDArray[np.float64]:
        far = np.abs(slide.xy_um[a] - slide.xy_um[b]) / slide.patch_um
        return np.maximum(1 - far, 0).prod(axis=-1)  # type: ignore[no-any-return]

    parts = []
    for pairs in apart:
        first, last = pairs.indptr[rows], pairs.indptr[rows + 1]
        parts.append(common(np.repeat(rows, last - first), pairs.indices[ranges(first, last)].astype(np.int64)))
    together = np.concatenate(parts)
    seen = float(together.mean()) if together.size else 0.0
    connected = slide.graph.to_csr()
    connected.data = np.ones_like(connected.data)
    mean = diags(1 / (slide.graph.degree + 1)) @ (connected + identity(len(slide), format="csr"))
    place = (mean[rows] @ mean).tocsr()
    # The weights of each place in a row of its own, filled up with 0; of few places where they are large.
    most = int(np.diff(place.indptr).max(initial=1))
    place = place[: max(1, _MOST_OVERLAPS // most**2)]
    weight, cell = np.zeros((place.shape[0], most)), np.zeros((place.shape[0], most), dtype=np.int64)
    line = np.repeat(np.arange(place.shape[0]), np.diff(place.indptr))
    position = np.arange(line.size) - place.indptr[line]
    weight[line, position], cell[line, position] = place.data, place.indices
    shared = np.einsum("ij,ik,ijk->i", weight, weight, common(cell[:, :, None], cell[:, None, :]))
    return seen, float((shared / (weight**2).sum(axis=1)).mean())


def _summed(pairs: Hops, x: NDArray[np.float64]) -> NDArray[np.float64]:
    n = len(x)
    matrix = csr_matrix((np.ones(pairs.indices.size), pairs.indices, pairs.indptr), shape=(n, n))
    return matrix @ x  # type: ignore[no-any-return]


def _sharpness(encoder: FactorEncoder, slides: Slides) -> float:
    """How fast neighbours stop to count, by how large steps between neighbours are."""
    steps = []
    for slide in slides:
        single = ((encoder.features(slide) - encoder.centre) @ encoder.directions).astype(np.float32)
        found = squared_steps(slide.graph, place_mean(slide.graph, single))
        every = max(1, found.size // 20_000)
        steps.append(found[::every])
    middle = float(np.median(np.concatenate(steps))) if steps else 1.0
    return 1.0 / max(_ALIKE * middle, 1e-9)
