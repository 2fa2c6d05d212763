"""Train the small StarDist model that the package ships.

A U-Net of half the usual width and 32 rays, with the library's own training, on one CPU core::

    python train_stardist.py --data train.npz --out ../src/cellquilt/segment/weights/stardist_nuclei

Images, experiments and held-out experiments are those of the Cellpose model (`nuclei_data`). The StarDist package ships
a micrograph of the same collection with its nuclei, on which the tests score the model: every image that shows the same
field is left out, whatever its experiment.

Intensities are normalised by the very code that normalises slides, and images are scaled by the code that scales
patches, so that the network is trained on what it will see. The random numbers depend on the seed only; two runs on one
kind of processor give the same weights.

Needs ``cellquilt[stardist]``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import nuclei_data as nd
import numpy as np
from cellquilt.patches.normalize import estimate_normalization
from cellquilt.segment.arrays import ArrayImage
from cellquilt.segment.resample import resample, taps
from scipy import ndimage

#: Median diameter to which the network's images are scaled, px.
DIAMETER_PX = 20.0
#: What a nucleus measures in µm where an image does not tell its pixel size; sets the blocks of the normalisation.
NUCLEUS_UM = 9.0
PATCH_PX = 128
BATCH = 8
STEPS_PER_EPOCH = 100
#: Scaled copies of the training images in all; an experiment has a share that grows with the root of its size.
COPIES = 900
#: Spread of the logarithm of the scale of a copy.
SCALE_SPREAD = 0.22
#: Images that correlate like this with a part of the package's micrograph show the same field (others: below 0.55).
SAME_FIELD = 0.8
#: Every so many images of an experiment one chooses the thresholds instead of training.
VALIDATION_EVERY = 12


def normalise(image: np.ndarray, diameter_px: float, seed: int = 0) -> np.ndarray:
    """Normalise an image as if it were a slide.

    Parameters
    ----------
    image : ndarray of uint8, shape (h, w)
        Grey values.
    diameter_px : float
        Median diameter of the nuclei, px.
    seed : int
        Seed of the sample.

    Returns
    -------
    ndarray of float32, shape (h, w)
    """
    slide = ArrayImage(image[None], ["nuclei"], NUCLEUS_UM / diameter_px)
    return estimate_normalization(slide, ["nuclei"], mode="global", seed=seed).apply(image[None], 0, 0)[0]


def scale_to(image: np.ndarray, labels: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Resize an image as patches are resized, and its labels by the nearest pixel.

    Parameters
    ----------
    image : ndarray of float32, shape (h, w)
        Normalised grey values.
    labels : ndarray of int32, shape (h, w)
        Nuclei, 0 is background.
    scale : float
        New size / old size.

    Returns
    -------
    image : ndarray of float32, shape (h', w')
    labels : ndarray of uint16, shape (h', w')
        At least as large as a training patch; what is added has value and label 0.
    """
    frames, nearest = [], []
    for length in image.shape:
        at = (np.arange(max(1, round(length * scale))) + 0.5) / scale - 0.5
        frames.append(taps(at, max(1.0, 1 / scale), 0, length))
        nearest.append(np.clip(np.rint(at).astype(np.int64), 0, length - 1))
    image = resample(image[None], *frames)[0]
    labels = labels[np.ix_(*nearest)].astype(np.uint16)
    missing = [max(0, PATCH_PX - length) for length in image.shape]
    padding = [(n // 2, n - n // 2) for n in missing]
    return np.pad(image, padding), np.pad(labels, padding)


def shows(image: np.ndarray, field: np.ndarray) -> float:
    """Largest correlation of an image with parts of a field, at any shift.

    Parameters
    ----------
    image, field : ndarray, shape (h, w)
        Grey values at the same scale.

    Returns
    -------
    float
        Near 1 if the image holds a part of the field.
    """
    from scipy.signal import fftconvolve

    side = min(*image.shape, 200)
    image = image.astype(np.float64)
    ones = np.ones((side, side))
    mean = fftconvolve(image, ones, mode="valid") / side**2
    deviation = np.sqrt(np.maximum(fftconvolve(image**2, ones, mode="valid") / side**2 - mean**2, 1e-6))
    best = -1.0
    for y, x in np.ndindex(3, 3):
        top, left = y * (field.shape[0] - side) // 2, x * (field.shape[1] - side) // 2
        part = field[top : top + side, left : left + side].astype(np.float64)
        part = (part - part.mean()) / max(part.std(), 1e-6)
        best = max(best, float((fftconvolve(image, part[::-1, ::-1], mode="valid") / side**2 / deviation).max()))
    return best


def without_the_micrograph(samples: list[nd.Sample]) -> tuple[list[nd.Sample], list[str]]:
    """Leave out images that show the field of the StarDist package's micrograph.

    Parameters
    ----------
    samples : list of Sample
        Images.

    Returns
    -------
    kept : list of Sample
    left_out : list of str
        Names of the others.
    """
    from stardist.data import test_image_nuclei_2d

    field = test_image_nuclei_2d()
    same = {sample.name for sample in samples if shows(sample.image, field) > SAME_FIELD}
    return [sample for sample in samples if sample.name not in same], sorted(same)


def copies(samples: list[nd.Sample], seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Normalised, scaled copies of the training images.

    Parameters
    ----------
    samples : list of Sample
        Training images.
    seed : int
        Decides the scales.

    Returns
    -------
    list of (image, labels)
        About `COPIES`, at least one of each image.
    """
    _, index, counts = np.unique([s.group for s in samples], return_inverse=True, return_counts=True)
    crowding = np.sqrt([max(1, int(s.labels.max())) for s in samples])
    weight = crowding / np.bincount(index, crowding)[index] * np.sqrt(counts)[index]
    number = np.maximum(1, np.rint(COPIES * weight / weight.sum())).astype(int)
    made = []
    for sample, n in zip(samples, number, strict=True):
        rng = np.random.default_rng([seed, int(sample.name)])
        image = normalise(sample.image, sample.diameter_px, seed)
        for _ in range(n):
            factor = math.exp(float(np.clip(rng.normal(0, SCALE_SPREAD), -0.6, 0.6)))
            made.append(scale_to(image, sample.labels, factor * DIAMETER_PX / sample.diameter_px))
    return made


def change(image: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Turn and mirror a patch, and vary contrast, sharpness, background and noise.

    Parameters
    ----------
    image : ndarray of float32, shape (h, w)
        Normalised grey values.
    labels : ndarray, shape (h, w)
        Nuclei.

    Returns
    -------
    image, labels
    """
    # The library draws its patches from numpy's global generator, seeded once; so does this, in the same thread.
    rng = np.random.default_rng(np.random.randint(0, 2**31, 2))  # noqa: NPY002
    turns = int(rng.integers(4))
    image, labels = np.rot90(image, turns), np.rot90(labels, turns)
    if rng.random() < 0.5:
        image, labels = image[:, ::-1], labels[:, ::-1]
    if rng.random() < 0.3:  # nuclei of one tissue differ in brightness
        numbers, flat = np.unique(labels, return_inverse=True)
        gain = np.where(numbers > 0, np.exp(rng.normal(0, 0.35, len(numbers))), 1.0).astype(np.float32)
        image = image * ndimage.gaussian_filter(gain[flat].reshape(labels.shape), 1.0)
    if rng.random() < 0.4:
        top = max(float(image.max()), 1e-3)
        image = top * np.sign(image) * np.abs(image / top) ** math.exp(rng.normal(0, 0.25))
    if rng.random() < 0.2:  # light from other planes
        image = image + rng.uniform(0, 0.5) * ndimage.gaussian_filter(image, rng.uniform(5, 14))
    if rng.random() < 0.3:
        image = ndimage.gaussian_filter(image, rng.uniform(0.4, 1.5))
    if rng.random() < 0.2:  # uneven illumination
        ramp = np.linspace(-0.5, 0.5, image.shape[0])
        image = image + rng.normal(0, 0.15) * ramp[:, None] + rng.normal(0, 0.15) * ramp[None, :]
    image = image * math.exp(rng.normal(0, 0.25)) + rng.normal(0, 0.05)
    if rng.random() < 0.5:
        image = image + rng.normal(0, rng.uniform(0, 0.1), image.shape)
    return np.ascontiguousarray(image, dtype=np.float32), np.ascontiguousarray(labels)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="npz file with image_NNN and labels_NNN")
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    parser.add_argument("--epochs", type=int, default=140, help=f"of {STEPS_PER_EPOCH} steps of {BATCH} patches")
    parser.add_argument("--lr", type=float, default=6e-4)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()

    import keras
    import tensorflow as tf
    from stardist.models import Config2D, StarDist2D

    keras.utils.disable_interactive_logging()
    tf.config.threading.set_intra_op_parallelism_threads(args.threads)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    tf.config.experimental.enable_op_determinism()
    keras.utils.set_random_seed(args.seed)

    train, _ = nd.split(nd.load_samples(args.data))
    train, same = without_the_micrograph(train)
    print(f"{len(train)} images; left out as the package's micrograph: {same or 'none, it is held out already'}")
    by_group: dict[str, list[nd.Sample]] = {}
    for sample in train:
        by_group.setdefault(sample.group, []).append(sample)
    chosen = [s for members in by_group.values() for s in members[VALIDATION_EVERY // 2 :: VALIDATION_EVERY]]
    names = {sample.name for sample in chosen}
    items = copies([s for s in train if s.name not in names], args.seed)
    validation = [scale_to(normalise(s.image, s.diameter_px), s.labels, DIAMETER_PX / s.diameter_px) for s in chosen]
    print(f"{len(items)} copies to train on, {len(validation)} images to choose thresholds", flush=True)

    config = Config2D(
        n_rays=32, grid=(2, 2), n_channel_in=1, unet_n_depth=3, unet_n_filter_base=16, net_conv_after_unet=128,
        train_patch_size=(PATCH_PX, PATCH_PX), train_batch_size=BATCH, train_epochs=args.epochs,
        train_steps_per_epoch=STEPS_PER_EPOCH, train_learning_rate=args.lr, train_reduce_lr=None,
        train_checkpoint=None, train_checkpoint_last=None, train_checkpoint_epoch=None, train_tensorboard=False,
        train_sample_cache=False, train_n_val_patches=16,
    )  # fmt: skip
    model = StarDist2D(config, name=args.out.name, basedir=str(args.out.parent))
    # The average of the weights over the last steps takes their place at the end.
    model.prepare_for_training(keras.optimizers.Adam(args.lr, use_ema=True, ema_momentum=0.998))
    begin = time.monotonic()

    def rate(epoch: int, _: float) -> float:
        return args.lr * (0.5 + 0.5 * math.cos(math.pi * epoch / args.epochs)) + 1e-6

    model.callbacks = [
        keras.callbacks.LearningRateScheduler(rate),
        keras.callbacks.LambdaCallback(
            on_epoch_end=lambda epoch, logs: print(f"epoch {epoch + 1}, {time.monotonic() - begin:.0f} s", flush=True)
        ),
    ]
    images, labels = (list(part) for part in zip(*items, strict=True))
    model.train(
        images,
        labels,
        validation_data=tuple(map(list, zip(*validation, strict=True))),
        augmenter=change,
        seed=args.seed,
    )
    model.optimize_thresholds(*map(list, zip(*validation, strict=True)))
    # Without the optimiser's state, which is three times as large as the weights.
    bare = StarDist2D(config, name=None, basedir=None)
    bare.keras_model.set_weights(model.keras_model.get_weights())
    bare.keras_model.save_weights(str(args.out / "weights_best.weights.h5"))
    document = {
        "diameter_px": DIAMETER_PX,
        "nuclear": True,
        "data_sha256": nd.sha256(args.data),
        "held_out": list(nd.HELD_OUT),
        "epochs": args.epochs,
        "steps": args.epochs * STEPS_PER_EPOCH,
        "seed": args.seed,
        "minutes": round((time.monotonic() - begin) / 60, 1),
    }
    (args.out / "cellquilt.json").write_text(json.dumps(document, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
