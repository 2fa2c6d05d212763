"""Score the nuclei network on the held-out experiments, next to a watershed tuned on the training ones.

    python evaluate_nuclei.py --data train.npz --json scores.json

The network runs in the stock library's ``CellposeModel.eval`` with its default thresholds, on the zero-padded weights,
with the estimated diameter (the headline: nothing is known of the truth) and with the annotated median diameter.
Needs ``cellpose>=3.1,<4``.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import nuclei_data as nd
import numpy as np

SEGMENT = Path(__file__).resolve().parents[1] / "src" / "cellquilt" / "segment"
#: Least scores that the project asks for: mean and pooled AP@0.5, of any group, and how far below the watershed.
REQUIRED = {"mean": 0.86, "pooled": 0.80, "group": 0.70, "below_watershed": 0.02}


def _load_cpnet() -> ModuleType:
    """``cellquilt.segment.cpnet`` by its path: the package itself need not be installed beside cellpose 3."""
    spec = importlib.util.spec_from_file_location("cpnet", SEGMENT / "cpnet.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_segmenter(
    weights: Path, threads: int = 1, *, narrow: bool = False
) -> Callable[[np.ndarray, float], np.ndarray]:
    """The stock Cellpose model with the shipped weights.

    Parameters
    ----------
    weights : Path
        ``npz`` file of fp16 arrays.
    threads : int
        Threads of torch.
    narrow : bool
        Put the network of the stored widths into the stock model, without padding: the same values for a third of the
        time.

    Returns
    -------
    callable
        ``(image (h, w), diameter_px) -> labels (h, w) int32``.
    """
    import torch
    from cellpose.models import CellposeModel
    from cellpose.resnet_torch import CPnet

    torch.set_num_threads(threads)
    cpnet = _load_cpnet()

    def tensors(nbase: tuple[int, ...] | None) -> dict[str, torch.Tensor]:
        return {k: torch.from_numpy(v) for k, v in cpnet.load_state_dict(weights, nbase).items()}

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "nuclei.pt"
        torch.save(tensors(cpnet.STOCK_NBASE), path)
        model = CellposeModel(gpu=False, pretrained_model=str(path))
    if narrow:

        class Narrow(CPnet):
            """Gives the style the length that the stock code expects."""

            def forward(self, data: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
                output, style, _ = super().forward(data)
                return output, torch.nn.functional.pad(style, (0, cpnet.STOCK_NBASE[-1] - style.shape[1]))

        model.net = Narrow(list(cpnet.read_metadata(weights)["nbase"]), 3, 3)
        model.net.load_state_dict(tensors(None))

    def segment(image: np.ndarray, diameter_px: float) -> np.ndarray:
        return model.eval(image, channels=[0, 0], diameter=diameter_px)[0].astype(np.int32)

    return segment


def print_table(scores: dict[str, dict[str, object]]) -> None:
    """Print mean, pooled and per-group scores of several methods side by side.

    Parameters
    ----------
    scores : dict
        Method name to the result of ``nuclei_data.summarise``.
    """
    methods = list(scores)
    first = scores[methods[0]]
    print(f"{'':26s}{'images':>7s}{'nuclei':>8s}" + "".join(f"{m:>26s}" for m in methods))
    print(f"{'':41s}" + f"{'AP@0.5':>16s}{'AP@0.75':>10s}" * len(methods))

    def line(name: str, n: int, nuclei: int, values: list[list[float]]) -> None:
        print(f"{name:26s}{n:7d}{nuclei:8d}" + "".join(f"{v[0]:16.3f}{v[1]:10.3f}" for v in values))

    for group, row in first["groups"].items():
        line(group, row["n"], row["nuclei"], [scores[m]["groups"][group]["mean"] for m in methods])
    line("mean over images", first["n"], first["nuclei"], [scores[m]["mean"] for m in methods])
    line("pooled", first["n"], first["nuclei"], [scores[m]["pooled"] for m in methods])


def card_tables(scores: dict[str, dict[str, object]]) -> str:
    """The two tables of the model card, in Markdown.

    Parameters
    ----------
    scores : dict
        Method name to the result of ``nuclei_data.summarise``.

    Returns
    -------
    str
        Means over images with a row a group, then the pooled AP@0.5 of each group.
    """
    columns = {"model": "model", "watershed": "watershed", "model, known d": "model, known diameter",
               "watershed, known d": "watershed, known diameter"}  # fmt: skip
    first = scores["model"]

    def row(name: str, n: int, nuclei: int, values: list[list[float]]) -> str:
        return f"| {name} | {n} | {nuclei} | " + " | ".join(f"{a:.3f} | {b:.3f}" for a, b in values) + " |"

    lines = [
        "| | images | nuclei | " + " | ".join(f"{title} AP@0.5 | AP@0.75" for title in columns.values()) + " |",
        "|" + "---|" * (3 + 2 * len(columns)),
    ]
    for group, summary in first["groups"].items():
        means = [scores[m]["groups"][group]["mean"] for m in columns]
        lines.append(row(f"`{group}`", summary["n"], summary["nuclei"], means))
    for kind, name in (("mean", "**mean over images**"), ("pooled", "**pooled** (sums of TP, FP, FN)")):
        lines.append(row(name, first["n"], first["nuclei"], [scores[m][kind] for m in columns]))
    lines += ["", "Pooled AP@0.5 within each group:", "", "| | " + " | ".join(columns) + " |"]
    lines.append("|" + "---|" * (1 + len(columns)))
    for group in first["groups"]:
        pooled = [f"{scores[m]['groups'][group]['pooled'][0]:.3f}" for m in columns]
        lines.append(f"| `{group}` | " + " | ".join(pooled) + " |")
    return "\n".join(lines)


def shortfalls(model: dict[str, object], watershed: dict[str, object]) -> list[str]:
    """Requirements that the scores miss, as sentences; empty if all are met.

    Parameters
    ----------
    model, watershed : dict
        Results of ``nuclei_data.summarise``.

    Returns
    -------
    list of str
    """
    missed = [
        f"{kind} AP@0.5 {model[kind][0]:.3f} < {REQUIRED[kind]}"
        for kind in ("mean", "pooled")
        if model[kind][0] < REQUIRED[kind]
    ]
    if model["mean"][0] <= watershed["mean"][0]:
        missed.append(f"mean AP@0.5 {model['mean'][0]:.3f} is not above the watershed's {watershed['mean'][0]:.3f}")
    for group, row in model["groups"].items():
        score, base = row["mean"][0], watershed["groups"][group]["mean"][0]
        if score < REQUIRED["group"]:
            missed.append(f"{group}: AP@0.5 {score:.3f} < {REQUIRED['group']}")
        if score < base - REQUIRED["below_watershed"]:
            missed.append(f"{group}: AP@0.5 {score:.3f} is more than 0.02 below the watershed's {base:.3f}")
    return missed


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="npz file with image_NNN and labels_NNN")
    parser.add_argument("--weights", type=Path, default=SEGMENT / "weights" / "nuclei.npz")
    parser.add_argument("--json", type=Path, help="write the scores here")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--per-group", type=int, help="only so many images of each group, evenly spaced (a quick look)")
    parser.add_argument("--narrow", action="store_true", help="do not pad the weights (same values, faster)")
    parser.add_argument("--training-side", action="store_true", help="score the training experiments instead")
    args = parser.parse_args()

    metadata = _load_cpnet().read_metadata(args.weights)
    digest = nd.sha256(args.data)
    if metadata["data_sha256"] != digest:
        raise SystemExit(f"{args.data} is not the file that the weights were trained on: the split may differ")
    train, held_out = nd.split(nd.load_samples(args.data))
    scored = train if args.training_side else held_out
    if args.per_group:
        members = {g: [s for s in scored if s.group == g] for g in sorted({s.group for s in scored})}
        scored = [
            m[i] for m in members.values() for i in np.unique(np.linspace(0, len(m) - 1, args.per_group).astype(int))
        ]
    baseline, baseline_score = nd.tune_watershed(train)
    print(f"watershed tuned on training images: {baseline}", flush=True)
    segment = make_segmenter(args.weights, args.threads, narrow=args.narrow)
    estimate = _load_cpnet().estimate_diameter_px

    begin = time.monotonic()
    groups = {s.name: s.group for s in scored}
    estimated: dict[str, float] = {}

    def with_estimate(sample: nd.Sample) -> np.ndarray:
        estimated[sample.name] = round(estimate(segment, sample.image, start_px=(metadata["diam_mean_px"],)), 2)
        return segment(sample.image, estimated[sample.name])

    methods: dict[str, Callable[[nd.Sample], np.ndarray]] = {
        "watershed": lambda s: baseline(s.image),
        "watershed, known d": lambda s: baseline(s.image, s.diameter_px),
        "model": with_estimate,
        "model, known d": lambda s: segment(s.image, s.diameter_px),
    }
    counts: dict[str, dict[str, np.ndarray]] = {}
    for method, function in methods.items():
        counts[method] = {}
        for number, sample in enumerate(scored, 1):
            counts[method][sample.name] = nd.match_counts(sample.labels, function(sample))
            if number % 10 == 0:
                row = nd.summarise(counts[method], groups)
                print(f"{method}: {number}/{len(scored)} AP {row['mean']} {time.monotonic() - begin:.0f} s", flush=True)
        print_table({method: nd.summarise(counts[method], groups)})
    scores = {
        m: nd.summarise(counts[m], groups) for m in ("model", "watershed", "model, known d", "watershed, known d")
    }
    print_table(scores)
    missed = shortfalls(scores["model"], scores["watershed"])
    print("All requirements are met." if not missed else "Missed:\n  " + "\n  ".join(missed))
    print(card_tables(scores))
    error = np.array([abs(np.log(estimated[s.name] / s.diameter_px)) for s in scored])
    print(f"estimated diameter within 20 % of the annotated median: {(error < np.log(1.2)).mean():.1%} of images")
    if args.json:
        record = {
            "columns": ["AP@0.5", "AP@0.75"],
            "scores": scores,
            "requirements_missed": missed,
            "diameter_within_20_percent": round(float((error < np.log(1.2)).mean()), 4),
            "held_out": list(nd.HELD_OUT),
            "training_groups": {g: sum(s.group == g for s in train) for g in sorted({s.group for s in train})},
            "watershed": {"parameters": asdict(baseline), "training_score": round(baseline_score, 4)},
            "images": {
                s.name: {
                    "group": s.group,
                    "diameter_px": round(s.diameter_px, 2),
                    "estimated_diameter_px": estimated[s.name],
                    **{m: counts[m][s.name].tolist() for m in counts},
                }
                for s in scored
            },
            "network": "stored widths" if args.narrow else "padded to the stock widths",
            "weights": {**metadata, "sha256": nd.sha256(args.weights)},
        }  # fmt: skip
        args.json.write_text(json.dumps(record, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
