"""Data of the nuclei model: loading, experiments, the split, scores and the watershed baseline.

The data are 465 fluorescence micrographs of the Data Science Bowl 2018 (CC0) in one ``npz`` file with ``image_NNN``
(uint8) and ``labels_NNN`` (uint16, 0 is background).

The split is by experiment and was written down before any training:

1. Images are grouped by image size. Two sizes hold several experiments, told apart by the camera's background (first
   percentile of the image, bimodal with nothing between 5 and 9) and, on the bright-background camera, by magnification
   (median nucleus diameter; 520 x 696: nothing between 30 and 38 px; 256 x 256: a minimum around 12 px, where a guard
   band of images is used neither for training nor for scores). No experiment is divided, so that crops of one field
   cannot lie on both sides.
2. Held out are: two whole image sizes (360 x 360, large nuclei; 260 x 347, tissue), and of each size with several
   experiments the one with the fewest images, leaving out the one that is the only counterpart in training of another
   held-out group (520 x 696 with large nuclei, the counterpart of 360 x 360).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

#: Groups that training never sees.
HELD_OUT: tuple[str, ...] = ("360x360", "260x347", "520x696-bright-dense", "256x256-bright-large")
#: Images between two experiments, used for nothing.
GUARD: tuple[str, ...] = ("256x256-bright-guard",)
#: Mean diameter to which the network's images are scaled, px. Above the 17 px of cellpose's own nuclei model: fragments
#: and nuclei cut by the border are then still several pixels wide.
DIAM_MEAN_PX = 22.0
#: IoU thresholds of the scores.
THRESHOLDS: tuple[float, float] = (0.5, 0.75)


@dataclass(frozen=True)
class Sample:
    """One annotated micrograph.

    Attributes
    ----------
    name : str
        Number of the image in the file.
    image : ndarray of uint8, shape (h, w)
        Grey values.
    labels : ndarray of int32, shape (h, w)
        Annotated nuclei, 1 to n without gaps; 0 is background.
    diameter_px : float
        Median diameter of the nuclei, px (of the disc with the nucleus' area).
    group : str
        Experiment, see :func:`group_of`.
    """

    name: str
    image: np.ndarray
    labels: np.ndarray
    diameter_px: float
    group: str


def median_diameter(labels: np.ndarray) -> float:
    """Median diameter of the objects of a label image.

    Parameters
    ----------
    labels : ndarray of integers, shape (h, w)
        Label image, 0 is background.

    Returns
    -------
    float
        Diameter in px of the disc of an object's area, median over the objects; 0 if there is none.
    """
    area = np.bincount(labels.ravel())[1:]
    area = area[area > 0]
    return float(np.median(np.sqrt(area * 4.0 / np.pi))) if area.size else 0.0


def group_of(image: np.ndarray, diameter_px: float) -> str:
    """Experiment of an image, from its size, background and magnification.

    Parameters
    ----------
    image : ndarray of uint8, shape (h, w)
        Grey values.
    diameter_px : float
        Median diameter of the annotated nuclei, px.

    Returns
    -------
    str
        Group name: image size, and for sizes with several experiments their kind.
    """
    height, width = image.shape
    size = f"{height}x{width}"
    bright = float(np.percentile(image, 1)) >= 8
    if size == "520x696":
        return f"{size}-dark" if not bright else f"{size}-bright-{'dense' if diameter_px < 33 else 'large'}"
    if size == "256x256":
        if not bright:
            return f"{size}-dark"
        kind = "small" if diameter_px < 11.5 else "guard" if diameter_px < 13 else "large"
        return f"{size}-bright-{kind}"
    return size


def load_samples(path: Path) -> list[Sample]:
    """Read all micrographs of the data file.

    Parameters
    ----------
    path : Path
        ``npz`` file with ``image_NNN`` and ``labels_NNN``.

    Returns
    -------
    list of Sample
        In the order of their numbers.
    """
    samples = []
    with np.load(path) as archive:
        for key in sorted(k for k in archive.files if k.startswith("image_")):
            name = key.removeprefix("image_")
            image = archive[key]
            labels = np.unique(archive[f"labels_{name}"], return_inverse=True)[1].reshape(image.shape).astype(np.int32)
            diameter = median_diameter(labels)
            samples.append(Sample(name, image, labels, diameter, group_of(image, diameter)))
    return samples


def split(samples: Iterable[Sample]) -> tuple[list[Sample], list[Sample]]:
    """Divide the micrographs into training and held-out ones, by whole experiments.

    Parameters
    ----------
    samples : iterable of Sample
        All micrographs.

    Returns
    -------
    train, held_out : list of Sample
        Neither holds the guard band.
    """
    train, held_out = [], []
    for sample in samples:
        if sample.group in HELD_OUT:
            held_out.append(sample)
        elif sample.group not in GUARD:
            train.append(sample)
    return train, held_out


def sha256(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal text."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def match_counts(truth: np.ndarray, found: np.ndarray, thresholds: Sequence[float] = THRESHOLDS) -> np.ndarray:
    """True positives, false positives and false negatives of one segmentation.

    An optimal one-to-one assignment decides which objects match, as in ``cellpose.metrics.average_precision``.

    Parameters
    ----------
    truth, found : ndarray of integers, shape (h, w)
        Label images, 0 is background.
    thresholds : sequence of float
        Least IoU of a match.

    Returns
    -------
    ndarray of int64, shape (n_thresholds, 3)
        TP, FP and FN per threshold.
    """
    try:
        from cellpose.metrics import average_precision
    except ImportError:  # the environment of StarDist, whose assignment is the same
        from stardist.matching import matching

        found = np.unique(found, return_inverse=True)[1].reshape(found.shape)
        scores = [matching(truth, found, thresh=threshold) for threshold in thresholds]
        return np.array([[score.tp, score.fp, score.fn] for score in scores], dtype=np.int64)
    _, tp, fp, fn = average_precision([truth], [found], threshold=list(thresholds))
    return np.stack([tp[0], fp[0], fn[0]], axis=1).astype(np.int64)


def average_precision_of(counts: np.ndarray) -> np.ndarray:
    """``TP / (TP + FP + FN)`` of counts whose last axis is (TP, FP, FN); 1 where there is nothing to find or found."""
    total = counts.sum(axis=-1)
    return np.where(total > 0, counts[..., 0] / np.maximum(total, 1), 1.0)


def summarise(counts: Mapping[str, np.ndarray], groups: Mapping[str, str]) -> dict[str, object]:
    """Mean, pooled and per-group average precision.

    Parameters
    ----------
    counts : mapping of str to ndarray of int64, shape (2, 3)
        Image name to TP, FP, FN at IoU 0.5 and 0.75.
    groups : mapping of str to str
        Image name to group.

    Returns
    -------
    dict
        ``mean`` and ``pooled`` (lists: AP@0.5, AP@0.75) and ``groups``: name to ``n``, ``mean``, ``pooled``.
    """

    def both(names: list[str]) -> dict[str, object]:
        stack = np.stack([counts[n] for n in names])
        return {
            "n": len(names),
            "nuclei": int(stack[:, 0, 0].sum() + stack[:, 0, 2].sum()),
            "mean": [round(float(v), 4) for v in average_precision_of(stack).mean(axis=0)],
            "pooled": [round(float(v), 4) for v in average_precision_of(stack.sum(axis=0))],
        }

    names = sorted(counts)
    by_group = {g: both([n for n in names if groups[n] == g]) for g in sorted({groups[n] for n in names})}
    return {**both(names), "groups": by_group}


@dataclass(frozen=True)
class Watershed:
    """Threshold and distance-transform watershed, the baseline; lengths are relative to the nucleus diameter.

    Attributes
    ----------
    threshold : {"otsu", "log-otsu", "local"}
        Otsu's threshold, Otsu's threshold of the logarithm (keeps dim nuclei beside bright ones), or Otsu's together
        with what stands out of a Gaussian mean of four diameters' scale.
    sigma : float
        Gaussian smoothing of the image before the threshold, diameters.
    smooth : float
        Gaussian smoothing of the distance transform, diameters.
    spacing : float
        Least distance between two seeds, diameters.
    """

    threshold: str = "otsu"
    sigma: float = 0.05
    smooth: float = 0.05
    spacing: float = 0.4

    def foreground(self, image: np.ndarray, diameter_px: float) -> np.ndarray:
        """Thresholded image, holes filled.

        Parameters
        ----------
        image : ndarray, shape (h, w)
            Grey values, nuclei bright.
        diameter_px : float
            Nucleus diameter, px.

        Returns
        -------
        ndarray of bool, shape (h, w)
        """
        from scipy import ndimage
        from skimage import filters

        smooth = ndimage.gaussian_filter(image.astype(np.float32), max(0.5, self.sigma * diameter_px))
        if smooth.max() <= smooth.min():
            return np.zeros(image.shape, bool)
        if self.threshold == "log-otsu":
            smooth = np.log(smooth - smooth.min() + 1.0)
        level = filters.threshold_otsu(smooth)
        mask = smooth > level
        if self.threshold == "local":
            # Dim nuclei lie below Otsu's level: accept what stands out of its surroundings as well, yet stay well
            # above the background.
            base = np.median(smooth[~mask])
            mask |= (smooth > ndimage.gaussian_filter(smooth, 2 * diameter_px)) & (smooth > base + 0.3 * (level - base))
        return ndimage.binary_fill_holes(mask)

    def __call__(self, image: np.ndarray, diameter_px: float | None = None) -> np.ndarray:
        """Segment one image.

        Parameters
        ----------
        image : ndarray, shape (h, w)
            Grey values, nuclei bright.
        diameter_px : float, optional
            Nucleus diameter, px. Otherwise it is that of the median connected part of the thresholded image.

        Returns
        -------
        ndarray of int32, shape (h, w)
            Label image, 0 is background.
        """
        from scipy import ndimage
        from skimage import segmentation

        if diameter_px is None:
            diameter_px = median_diameter(self._parts(self.foreground(image, 15.0), 20)) or 15.0
        mask = self._parts(self.foreground(image, diameter_px), max(12, round(0.06 * diameter_px**2))) > 0
        distance = ndimage.gaussian_filter(ndimage.distance_transform_edt(mask), self.smooth * diameter_px) * mask
        reach = 2 * max(1, round(self.spacing * diameter_px)) + 1
        seeds = ndimage.label((distance == ndimage.maximum_filter(distance, reach)) & mask)[0]
        return segmentation.watershed(-distance, seeds, mask=mask).astype(np.int32)

    @staticmethod
    def _parts(mask: np.ndarray, min_area_px: int) -> np.ndarray:
        """Connected parts of a mask of at least ``min_area_px`` pixels, as labels."""
        from scipy import ndimage

        parts = ndimage.label(mask)[0]
        keep = np.bincount(parts.ravel()) >= min_area_px
        keep[0] = False
        return np.where(keep[parts], parts, 0)


def tune_watershed(samples: Sequence[Sample], *, per_group: int = 10) -> tuple[Watershed, float]:
    """Choose the watershed's parameters on training images.

    Parameters
    ----------
    samples : sequence of Sample
        Training images.
    per_group : int
        At most so many images of each experiment, evenly spaced over its list.

    Returns
    -------
    watershed : Watershed
        The best of the grid.
    score : float
        Its AP@0.5, mean over the experiments' means.
    """
    by_group: dict[str, list[Sample]] = {}
    for sample in samples:
        by_group.setdefault(sample.group, []).append(sample)
    chosen = {
        group: [members[i] for i in np.unique(np.linspace(0, len(members) - 1, per_group).round().astype(int))]
        for group, members in sorted(by_group.items())
    }

    def score(watershed: Watershed) -> float:
        means = []
        for members in chosen.values():
            counts = [match_counts(s.labels, watershed(s.image)) for s in members]
            means.append(average_precision_of(np.stack(counts))[:, 0].mean())
        return float(np.mean(means))

    # Threshold and smoothing first, then what separates touching nuclei, then the first again: a full grid would take
    # many times as long.
    best = Watershed()
    value = score(best)
    image_side = [{"threshold": t, "sigma": g} for t in ("otsu", "log-otsu", "local") for g in (0.03, 0.07, 0.12)]
    seed_side = [{"smooth": m, "spacing": p} for m in (0.0, 0.05, 0.1) for p in (0.2, 0.3, 0.4, 0.55)]
    for changes in (image_side, seed_side, image_side):
        for change in changes:
            candidate = replace(best, **change)
            if candidate != best and (new := score(candidate)) > value:
                best, value = candidate, new
    return best, value
