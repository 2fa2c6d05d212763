"""Score the StarDist model on the held-out experiments and on the micrograph of the StarDist package.

    python evaluate_stardist.py --data train.npz --json scores_stardist.json

Each image goes through the steps of a slide: normalisation, the diameter estimated or given, the engine. Needs
``cellquilt[stardist]``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import evaluate_nuclei as en
import nuclei_data as nd
import numpy as np
from cellquilt.patches.grid import make_grid
from cellquilt.patches.normalize import estimate_normalization
from cellquilt.segment import stardist
from cellquilt.segment.arrays import ArrayImage, MemoryBundle

#: The images do not tell their pixel size; with this one, nuclei of 6 to 60 px are looked for.
PIXEL_UM = 0.5


def make_segmenter(model: str, threads: int = 1) -> Callable[[np.ndarray, float | None], np.ndarray]:
    """The pipeline's engine on single images.

    Parameters
    ----------
    model : str
        Name or folder of the model.
    threads : int
        Threads of TensorFlow.

    Returns
    -------
    callable
        ``(image (h, w), diameter in px or None) -> labels (h, w) int32``.
    """
    loaded: list[stardist.StarDistSegmenter] = []

    def segment(image: np.ndarray, diameter_px: float | None) -> np.ndarray:
        slide = ArrayImage(image[None], ["nuclei"], PIXEL_UM)
        settings = {"stardist_model_type": model, "stardist_diameter_px": diameter_px, "threads": threads}
        plan = stardist.plan(slide, settings)
        if not loaded:
            loaded.append(stardist.StarDistSegmenter({**plan.settings, "model": model}))
        loaded[0].scale = plan.settings["scale"]
        grid = make_grid(image.shape, width_px=0, lattice=plan.lattice)
        normalization = estimate_normalization(slide, list(plan.channels))
        bundle = MemoryBundle(slide.pixels, grid.shape, list(grid.patches), plan.lattice, normalization)
        (result,) = loaded[0].segment(bundle)
        if result.error is not None:
            raise result.error
        return result.labels

    return segment


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="npz file with image_NNN and labels_NNN")
    parser.add_argument("--model", default=stardist.SHIPPED, help="name or folder of the model")
    parser.add_argument("--json", type=Path, help="write the scores here")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()

    from stardist.data import test_image_nuclei_2d

    _, held_out = nd.split(nd.load_samples(args.data))
    groups = {sample.name: sample.group for sample in held_out}
    segment = make_segmenter(args.model, args.threads)
    methods = {"model": lambda s: None, "model, known d": lambda s: s.diameter_px}
    scores = {}
    for method, diameter in methods.items():
        counts = {s.name: nd.match_counts(s.labels, segment(s.image, diameter(s))) for s in held_out}
        scores[method] = nd.summarise(counts, groups)
    en.print_table(scores)

    image, mask = test_image_nuclei_2d(return_mask=True)
    truth = np.unique(mask, return_inverse=True)[1].reshape(mask.shape)
    micrograph = nd.average_precision_of(nd.match_counts(truth, segment(image, None)))
    print(f"micrograph of the StarDist package: AP@0.5 {micrograph[0]:.3f}, AP@0.75 {micrograph[1]:.3f}")
    if args.json:
        weights = stardist.weights_of(stardist.find_model(args.model))
        record = {
            "columns": ["AP@0.5", "AP@0.75"],
            "scores": scores,
            "micrograph": [round(float(value), 4) for value in micrograph],
            "held_out": list(nd.HELD_OUT),
            "weights_sha256": nd.sha256(weights),
        }
        args.json.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
