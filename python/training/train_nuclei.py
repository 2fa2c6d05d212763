"""Train the small nuclei network that the package ships.

A Cellpose ``CPnet`` of half the stock width, on one CPU core::

    python train_nuclei.py --data train.npz --out nuclei.pt --export ../src/cellquilt/segment/weights/nuclei.npz

A tenth of a field's nuclei are cut by its border, far more in small fields of large nuclei, and their annotation is the
part inside. So besides the whole images the network sees windows cut from them, with the flows of what is left of each
nucleus, and crops that reach beyond the window's border.

A score counts nuclei, a loss counts pixels: fragments and micronuclei of a third of the diameter are a tenth of the
pixels and are not learned. So the pixels of a nucleus weigh as the inverse of its diameter.

The held-out experiments (``nuclei_data.split``) are never read. A checkpoint is written every few minutes and a second
call goes on from it; ``--export`` (written with every checkpoint) receives the exponential moving average of the
weights as fp16. The random numbers of step *k* depend on the seed and *k* only.

Needs ``cellpose>=3.1,<4``, torch and OpenCV (which cellpose brings).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import nuclei_data as nd
import numpy as np
import torch
import torch.nn.functional as functional
from cellpose.dynamics import labels_to_flows
from cellpose.resnet_torch import CPnet

NBASE: tuple[int, ...] = (2, 16, 32, 64, 128)
#: Images with larger nuclei are reduced to this diameter once, in advance (px).
WORK_DIAMETER_PX = 28.0
#: Windows cut from each training image, and their sides in nucleus diameters.
WINDOWS_PER_IMAGE = 4
WINDOW_DIAMETERS = (3.0, 9.0)
#: Share of the crops that come from windows.
WINDOW_SHARE = 0.4
#: Most weight of a small nucleus' pixels.
MOST_WEIGHT = 4.0


@dataclass(frozen=True)
class Prepared:
    """One training image, reduced where its nuclei are large.

    Attributes
    ----------
    image : ndarray of float32, shape (h, w)
        Grey values, 1st percentile at 0 and 99th at 1.
    labels : ndarray of int32, shape (h, w)
        Nuclei, 0 is background.
    target : ndarray of float32, shape (h, w, 4)
        Inside a nucleus (0 or 1), unit flow towards its centre (y, x), and weight in the loss.
    centres : ndarray of float32, shape (n, 2)
        Centres of the nuclei (x, y), px.
    diameter_px : float
        Median diameter of the nuclei.
    group : str
        Experiment.
    """

    image: np.ndarray
    labels: np.ndarray
    target: np.ndarray
    centres: np.ndarray
    diameter_px: float
    group: str
    windows: tuple[Prepared, ...] = ()


def normalise(image: np.ndarray) -> np.ndarray:
    """Scale grey values so that the 1st percentile becomes 0 and the 99th 1, as cellpose does.

    Parameters
    ----------
    image : ndarray, shape (h, w)
        Grey values.

    Returns
    -------
    ndarray of float32, shape (h, w)
    """
    low, high = np.percentile(image, [1, 99])
    return ((image - low) / max(high - low, 1e-3)).astype(np.float32)


def prepare(sample: nd.Sample, seed: int) -> Prepared:
    """Reduce an image to the working diameter, cut windows from it and compute all flows.

    Parameters
    ----------
    sample : Sample
        Training image.
    seed : int
        Decides where the windows lie.

    Returns
    -------
    Prepared
    """
    image, labels = sample.image.astype(np.float32), sample.labels
    scale = min(1.0, WORK_DIAMETER_PX / sample.diameter_px)
    if scale < 1:
        size = (round(image.shape[1] * scale), round(image.shape[0] * scale))
        image = cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)
        labels = cv2.resize(labels.astype(np.float32), size, interpolation=cv2.INTER_NEAREST).astype(np.int32)
    diameter_px = nd.median_diameter(labels)
    image = normalise(image)
    rng = np.random.default_rng([seed, int(sample.name)])
    windows = []
    for _ in range(WINDOWS_PER_IMAGE):
        sides = np.minimum(labels.shape, np.rint(rng.uniform(*WINDOW_DIAMETERS, 2) * diameter_px).astype(int))
        y, x = (int(rng.integers(0, full - side + 1)) for full, side in zip(labels.shape, sides, strict=True))
        part = labels[y : y + sides[0], x : x + sides[1]]
        if part.any():
            windows.append(_with_flows(image[y : y + sides[0], x : x + sides[1]], part, diameter_px, sample.group))
    return replace(_with_flows(image, labels, diameter_px, sample.group), windows=tuple(windows))


def _with_flows(image: np.ndarray, labels: np.ndarray, diameter_px: float, group: str) -> Prepared:
    """An image with the flows and centres of its labels as they are, cut or whole."""
    labels = np.unique(labels, return_inverse=True)[1].reshape(labels.shape).astype(np.int32)
    flows = labels_to_flows([labels.astype(np.uint16)], device=torch.device("cpu"))[0]  # labels, inside, dy, dx
    count = np.bincount(labels.ravel()).astype(np.float64)
    y, x = np.indices(labels.shape)
    centres = np.stack([np.bincount(labels.ravel(), v.ravel()) / np.maximum(count, 1) for v in (x, y)], axis=1)[1:]
    weight = np.clip(diameter_px / np.sqrt(np.maximum(count, 1) * 4 / np.pi), 1.0, MOST_WEIGHT)
    weight[0] = 1.0
    target = np.stack([labels > 0, flows[2], flows[3], weight[labels]], axis=-1).astype(np.float32)
    return Prepared(np.ascontiguousarray(image), labels, target, centres.astype(np.float32), diameter_px, group)


def draw_crop(item: Prepared, size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Cut one turned, scaled and mirrored crop with changed intensities.

    Parameters
    ----------
    item : Prepared
        Image to cut from.
    size : int
        Side of the crop, px.
    rng : numpy Generator
        Source of randomness.

    Returns
    -------
    image : ndarray of float32, shape (size, size)
        Network input.
    target : ndarray of float32, shape (4, size, size)
        Inside, flow y, flow x, weight.
    """
    cut = bool(item.windows) and rng.random() < WINDOW_SHARE
    if cut:
        item = item.windows[rng.integers(len(item.windows))]
    height, width = item.image.shape
    # Most crops near the nominal diameter (an error of the user's or the estimated one), a few far off, so that the
    # first pass of the size estimate works.
    jitter = math.exp(rng.uniform(-1.0, 0.7)) if rng.random() < 0.1 else math.exp(rng.normal(0, 0.22))
    scale = nd.DIAM_MEAN_PX / item.diameter_px * float(np.clip(1 / jitter, 0.4, 2.6))
    if rng.random() < 0.85 and len(item.centres):
        centre = item.centres[rng.integers(len(item.centres))] + rng.uniform(-0.35, 0.35, 2) * size / scale
    else:
        centre = rng.uniform(0, 1, 2) * (width, height)
    # Keep the crop inside the image as far as the image is large enough. A window's border is to be seen.
    half = 0.5 * size / scale
    for axis, extent in enumerate(() if cut else (width, height)):
        centre[axis] = np.clip(centre[axis], half, extent - half) if extent > 2 * half else extent / 2
    angle = rng.uniform(0, 2 * np.pi)
    mirror = -1.0 if rng.random() < 0.5 else 1.0
    # Forward map of (x, y): source to crop.
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]]) @ np.diag([mirror, 1.0])
    linear = scale * turn
    shift = np.full(2, size / 2) - linear @ centre
    matrix = np.concatenate([linear, shift[:, None]], axis=1)
    image = item.image
    if rng.random() < 0.4:
        # Nuclei of one tissue differ in brightness (ploidy, cycle, death): give each its own gain.
        gain = np.exp(rng.normal(0, 0.4, int(item.labels.max()) + 1)).astype(np.float32)
        gain[0] = 1.0
        image = image * cv2.GaussianBlur(gain[item.labels], (0, 0), 1.0)
    image = cv2.warpAffine(image, matrix, (size, size), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT)
    target = cv2.warpAffine(item.target, matrix, (size, size), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT)
    flow_x = turn[0, 0] * target[..., 2] + turn[0, 1] * target[..., 1]
    flow_y = turn[1, 0] * target[..., 2] + turn[1, 1] * target[..., 1]
    inside = (target[..., 0] > 0.5).astype(np.float32)
    weight = np.maximum(target[..., 3], 1.0)
    return change_intensities(image, rng), np.stack([inside, flow_y * inside, flow_x * inside, weight])


def change_intensities(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Vary contrast, gamma, sharpness, background and noise of a crop.

    Parameters
    ----------
    image : ndarray of float32, shape (h, w)
        Normalised grey values.
    rng : numpy Generator
        Source of randomness.

    Returns
    -------
    ndarray of float32, shape (h, w)
    """
    size = image.shape[0]
    if rng.random() < 0.4:
        top = max(float(image.max()), 1e-3)
        image = top * np.sign(image) * np.abs(image / top) ** np.float32(math.exp(rng.normal(0, 0.25)))
    if rng.random() < 0.2:  # light from other planes
        image = image + rng.uniform(0, 0.6) * cv2.GaussianBlur(image, (0, 0), rng.uniform(5, 14))
    if rng.random() < 0.3:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.4, 1.6))
    if rng.random() < 0.15:  # coarse pixels
        small = max(8, round(size / rng.uniform(1.4, 2.4)))
        image = cv2.resize(cv2.resize(image, (small, small), interpolation=cv2.INTER_AREA), (size, size))
    if rng.random() < 0.2:  # uneven illumination
        ramp = np.linspace(-0.5, 0.5, size, dtype=np.float32)
        image = image + rng.normal(0, 0.15) * ramp[:, None] + rng.normal(0, 0.15) * ramp[None, :]
    image = image * np.float32(math.exp(rng.normal(0, 0.25))) + np.float32(rng.normal(0, 0.05))
    if rng.random() < 0.5:
        image = image + rng.normal(0, 1, image.shape).astype(np.float32) * np.float32(rng.uniform(0, 0.1))
    return image.astype(np.float32)


def draw_batch(
    items: list[Prepared], weights: np.ndarray, batch: int, size: int, seed: int, step: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Batch of step ``step``: inputs (batch, 2, size, size) and targets (batch, 4, size, size), float32."""
    rng = np.random.default_rng([seed, step])
    chosen = rng.choice(len(items), size=batch, p=weights)
    pairs = [draw_crop(items[i], size, rng) for i in chosen]
    images = np.zeros((batch, 2, size, size), np.float32)
    images[:, 0] = [p[0] for p in pairs]
    return torch.from_numpy(images), torch.from_numpy(np.stack([p[1] for p in pairs]))


def sampling_weights(items: list[Prepared]) -> np.ndarray:
    """Probability of each image.

    Groups weigh as the square root of their number of images, so that rare experiments are learned; within a group an
    image weighs as the square root of its number of nuclei, so that crowded fields, the harder ones, come more often.

    Parameters
    ----------
    items : list of Prepared
        Training images.

    Returns
    -------
    ndarray of float64, shape (n,)
        Sums to 1.
    """
    _, index, counts = np.unique([i.group for i in items], return_inverse=True, return_counts=True)
    within = np.sqrt([max(1, len(i.centres)) for i in items])
    weights = within / np.bincount(index, within)[index] * np.sqrt(counts)[index]
    return weights / weights.sum()


def loss_of(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Cellpose's loss, squared error of five times the flow plus cross-entropy of inside, weighted by pixel."""
    weight = target[:, 3]
    flow = 0.5 * (weight[:, None] * (output[:, :2] - 5.0 * target[:, 1:3]) ** 2).mean()
    return flow + functional.binary_cross_entropy_with_logits(output[:, 2], target[:, 0], weight)


def blind_second_input(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Make the network ignore its second input channel, which was zero throughout the training.

    The first batch normalisations divide that channel by the square root of its variance, zero here: anything but zero
    would be blown up. A scale of 0 keeps the output for zero input to the bit and ignores all else.

    Parameters
    ----------
    state : dict of str to Tensor
        State dict of the network.

    Returns
    -------
    dict of str to Tensor
        The same with the second entry of the first normalisations' ``weight`` 0 and ``running_var`` 1.
    """
    state = dict(state)
    for layer in ("downsample.down.res_down_0.conv.conv_0.0", "downsample.down.res_down_0.proj.0"):
        for field, value in (("weight", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            tensor = state[f"{layer}.{field}"].clone()
            tensor[1] = value
            state[f"{layer}.{field}"] = tensor
    return state


def export(state: dict[str, torch.Tensor], path: Path, metadata: dict[str, object]) -> None:
    """Write weights as fp16 arrays, with a JSON text ``metadata`` beside them, readable without pickle."""
    state = blind_second_input(state)
    arrays = {k: v.numpy().astype(np.float16) for k, v in state.items() if not k.endswith("num_batches_tracked")}
    part = path.with_suffix(".part.npz")
    np.savez_compressed(part, metadata=np.array(json.dumps(metadata, sort_keys=True)), **arrays)
    os.replace(part, path)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="npz file with image_NNN and labels_NNN")
    parser.add_argument("--out", type=Path, required=True, help="checkpoint (.pt), continued if present")
    parser.add_argument(
        "--start", type=Path, help="exported weights (.npz) or checkpoint (.pt) of an earlier training to start from"
    )
    parser.add_argument("--export", type=Path, help="fp16 weights (.npz), written with every checkpoint")
    parser.add_argument("--cache", type=Path, help="folder for the prepared images (flows)")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--max-minutes", type=float, default=math.inf, help="end the schedule by then at the latest")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--crop", type=int, default=128, help="side of a crop, px")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--checkpoint-minutes", type=float, default=4.0)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    cv2.setNumThreads(1)
    torch.manual_seed(args.seed)
    train, _ = nd.split(nd.load_samples(args.data))
    digest = nd.sha256(args.data)
    items = prepare_all(train, args.cache, digest, args.seed)
    weights = sampling_weights(items)

    net = CPnet(list(NBASE), 3, 3, diam_mean=nd.DIAM_MEAN_PX).to(memory_format=torch.channels_last)
    mean_diameter = float(np.mean([s.diameter_px for s in train]))
    net.diam_labels.data[:] = mean_diameter
    trained = [p for p in net.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=args.lr, weight_decay=1e-4)
    average = {k: v.detach().clone() for k, v in net.state_dict().items()}
    first, spent = 0, 0.0
    if args.start and not args.out.exists():
        started = load_start(args.start)
        net.load_state_dict({**started, "diam_mean": net.diam_mean.data, "diam_labels": net.diam_labels.data})
        average = {k: v.detach().clone() for k, v in net.state_dict().items()}
    if args.out.exists():
        saved = torch.load(args.out, weights_only=True)
        net.load_state_dict(saved["net"])
        optimiser.load_state_dict(saved["optimiser"])
        average, first, spent = saved["average"], int(saved["step"]), float(saved["seconds"])
        print(f"going on after step {first}", flush=True)

    def save(step: int, seconds: float) -> None:
        state = {"net": net.state_dict(), "optimiser": optimiser.state_dict(), "average": average}
        part = args.out.with_suffix(".part")
        torch.save({**state, "step": step, "seconds": seconds}, part)
        os.replace(part, args.out)
        if args.export:
            metadata = {
                "version": 1, "nbase": list(NBASE), "diam_mean_px": nd.DIAM_MEAN_PX, "steps": step, "seed": args.seed,
                "batch": args.batch, "crop_px": args.crop, "data_sha256": digest, "held_out": list(nd.HELD_OUT),
                "mean_training_diameter_px": round(mean_diameter, 2), "minutes": round(seconds / 60, 1),
            }  # fmt: skip
            export(average, args.export, metadata)

    net.train()
    begin = last_save = time.monotonic()
    running, warmup = 0.0, 150
    for step in range(first, args.steps):
        seconds = spent + time.monotonic() - begin
        progress = max(step / args.steps, seconds / (60 * args.max_minutes))
        if progress >= 1:
            break
        rate = args.lr * min(1.0, (step + 1) / warmup) * (0.5 + 0.5 * math.cos(math.pi * progress))
        for group in optimiser.param_groups:
            group["lr"] = rate
        images, target = draw_batch(items, weights, args.batch, args.crop, args.seed, step)
        loss = loss_of(net(images.to(memory_format=torch.channels_last))[0], target)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 5.0)
        optimiser.step()
        decay = min(0.998, (step + 1) / (step + 20))
        with torch.no_grad():
            for key, value in net.state_dict().items():
                if value.dtype.is_floating_point:
                    average[key].lerp_(value, 1 - decay)
        running = loss.item() if step == first else 0.98 * running + 0.02 * loss.item()
        if (step + 1) % 50 == 0:
            elapsed = time.monotonic() - begin
            print(
                f"step {step + 1} loss {running:.4f} rate {rate:.2e} {elapsed / (step + 1 - first):.3f} s/step",
                flush=True,
            )
        if time.monotonic() - last_save > 60 * args.checkpoint_minutes:
            save(step + 1, spent + time.monotonic() - begin)
            last_save = time.monotonic()
    else:
        step = args.steps
    save(step, spent + time.monotonic() - begin)


def load_start(path: Path) -> dict[str, torch.Tensor]:
    """Weights of an earlier training: the average of a checkpoint, or what `export` wrote."""
    if path.suffix == ".pt":
        return torch.load(path, weights_only=True)["average"]
    with np.load(path, allow_pickle=False) as arrays:
        state = {name: torch.from_numpy(arrays[name].astype(np.float32)) for name in arrays.files if name != "metadata"}
    for name in [name for name in state if name.endswith("running_var")]:
        state[name.removesuffix("running_var") + "num_batches_tracked"] = torch.zeros((), dtype=torch.int64)
    return state


def prepare_all(samples: list[nd.Sample], cache: Path | None, digest: str, seed: int) -> list[Prepared]:
    """Prepare the training images, or read them from the cache folder.

    Parameters
    ----------
    samples : list of Sample
        Training images.
    cache : Path or None
        Folder for the prepared arrays.
    digest : str
        SHA-256 of the data, part of the cache's file name.
    seed : int
        Decides where the windows lie.

    Returns
    -------
    list of Prepared
    """
    path = cache / f"nuclei-{digest[:12]}-{WORK_DIAMETER_PX:g}px-weight{MOST_WEIGHT:g}-seed{seed}.pt" if cache else None
    if path and path.exists():
        stored = torch.load(path, weights_only=False)
        return [stored[s.name] for s in samples]
    items = {s.name: prepare(s, seed) for s in samples}
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(items, path)
    return [items[s.name] for s in samples]


if __name__ == "__main__":
    main()
