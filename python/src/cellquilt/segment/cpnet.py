"""The shipped nuclei network: reading its weights, and the nucleus diameter it finds by itself.

The network is a Cellpose ``CPnet`` (Stringer et al. 2021, Nature Methods 18:100-106) of half the stock width. The stock
library builds networks of the stock width only, so the narrow weights are embedded in stock ones by zero padding.

Why the padding is exact. A unit of the network is batch normalisation, ReLU, convolution. A padded channel has weight
0 and bias 0 in the convolution (or linear layer) that makes it, so its value is 0. Batch normalisation of a padded
channel has scale 0, shift 0, running mean 0 and running variance 1 (a variance of 0 would leave the tiny epsilon as the
divisor), so the value stays 0, and ReLU, pooling, upsampling and the residual sums keep it 0. The next convolution
multiplies it by a zero column. The style vector is the mean over the image, divided by its norm, to which zeros add
nothing. What remains is the order of summation: outputs agree with the narrow network's within rounding (about 2e-6).
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

#: Widths of the stock network: input channels, then the four levels.
STOCK_NBASE: tuple[int, ...] = (2, 32, 64, 128, 256)
#: Version of the weights file that this module reads.
VERSION = 1


def read_metadata(path: str | Path) -> dict[str, Any]:
    """What a weights file says about itself.

    Parameters
    ----------
    path
        ``npz`` file with fp16 arrays and a JSON text ``metadata``.

    Returns
    -------
    dict
        Among others ``version``, ``nbase`` (stored widths), ``diam_mean_px``, ``data_sha256``, ``steps``, ``seed``.

    Raises
    ------
    ValueError
        The file is of another version.
    """
    with np.load(path, allow_pickle=False) as arrays:
        metadata: dict[str, Any] = json.loads(str(arrays["metadata"]))
    if metadata.get("version") != VERSION:
        raise ValueError(f"{path}: weights of version {metadata.get('version')!r}, expected {VERSION}")
    return metadata


def load_state_dict(path: str | Path, nbase: Sequence[int] | None = STOCK_NBASE) -> dict[str, np.ndarray]:
    """Read the weights, embedded in a network of the given widths.

    Parameters
    ----------
    path
        ``npz`` file with fp16 arrays, named as in the state dict of cellpose's ``CPnet``.
    nbase
        Widths of the network to fill: input channels, then the four levels, none below the stored ones. None gives the
        stored widths: the same outputs (see above) for about a quarter of the work.

    Returns
    -------
    dict of str to numpy.ndarray
        State dict of a ``CPnet(nbase, nout=3, sz=3)``, complete: float32 arrays, and int64 ``num_batches_tracked``.

    Raises
    ------
    ValueError
        A width is below the stored one, or the file is of another version.
    """
    stored = [int(n) for n in read_metadata(path)["nbase"]]
    wanted = stored if nbase is None else [int(n) for n in nbase]
    if len(wanted) != len(stored) or any(w < s for w, s in zip(wanted, stored, strict=True)) or wanted[0] != stored[0]:
        raise ValueError(f"{path}: widths {stored} do not fit into {wanted}")
    # A stored length names its level, for all levels differ; other lengths (inputs, outputs, kernels) stay.
    grown = dict(zip(stored[1:], wanted[1:], strict=True))
    state: dict[str, np.ndarray] = {}
    with np.load(path, allow_pickle=False) as arrays:
        for name in arrays.files:
            if name == "metadata":
                continue
            value = arrays[name].astype(np.float32)
            # Kernels are (out, in, 3, 3): only the first two axes are channels. Single numbers (diameters) stay.
            channel_axes = () if name.startswith("diam_") else range(min(2, value.ndim))
            shape = [grown.get(n, n) if axis in channel_axes else n for axis, n in enumerate(value.shape)]
            full = np.full(shape, 1.0 if name.endswith("running_var") else 0.0, np.float32)
            full[tuple(slice(n) for n in value.shape)] = value
            state[name] = full
            if name.endswith("running_var"):
                state[name.removesuffix("running_var") + "num_batches_tracked"] = np.zeros((), np.int64)
    return state


def estimate_diameter_px(
    segment: Callable[[np.ndarray, float], np.ndarray],
    image: np.ndarray,
    *,
    start_px: Sequence[float],
    tolerance: float = 0.2,
    max_rounds: int = 3,
) -> float:
    """Nucleus diameter of an image, from what the model finds.

    The model sees the image scaled as if nuclei had the starting diameter, once per start; the start whose found median
    diameter is nearest to what it assumed wins. While the found diameter differs from the assumed one by more than
    ``tolerance``, the model runs again with the found one.

    Parameters
    ----------
    segment
        ``segment(image, diameter_px)`` gives labels (h, w) of integers, 0 = background.
    image
        (h, w) grey values.
    start_px
        Diameters to start from; the model's own mean diameter means that the image is not scaled.
    tolerance
        Relative difference that is not worth another run.
    max_rounds
        Most runs after the first ones.

    Returns
    -------
    float
        Diameter of the disk with a nucleus' area, median over nuclei, in pixels; the first start if none is found.
    """
    tried: list[tuple[float, float, float]] = []  # disagreement, assumed, found

    def run(assumed: float) -> None:
        area = np.bincount(np.asarray(segment(image, assumed)).ravel())[1:]
        area = area[area > 0]
        if area.size:
            found = float(np.median(np.sqrt(area * (4 / np.pi))))
            tried.append((abs(float(np.log(found / assumed))), assumed, found))

    for start in start_px:
        run(float(start))
    if not tried:
        return float(start_px[0])
    for _ in range(max_rounds):
        disagreement, _, found = min(tried)
        if disagreement <= float(np.log1p(tolerance)):
            break
        before = len(tried)
        run(found)
        if len(tried) == before or tried[-1][0] >= disagreement:  # nothing found, or no nearer: do not wander
            break
    return min(tried)[2]
