"""How well methods find the true domains of whole cohorts, ours and others', in one table.

    python domains_quality.py run cellquilt --seeds 0 1 2 3 4
    python domains_quality.py run novae --python /path/to/python/with/novae --seeds 0 1
    python domains_quality.py table

A run reads the cohort's slides (`domains_cohorts.py`) in the method's own environment (`domains_methods.py`) and is
told the true number of domains. Runs are added to ``domains_quality.json`` beside this file, which is committed;
labels stay in the folder of the cohorts, and a run whose labels are there is only scored again.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from domains_cohorts import ABOUT, COHORTS, write

HERE = Path(__file__).parent
RESULTS = HERE / "domains_quality.json"
#: In the order of the table: method → name in it.
METHODS = {
    "cellquilt": "cellquilt",
    "kmeans_2hop": "k-means of 2-hop means",
    "novae": "novae, defaults",
    "novae_converged": "novae, converged",
    "banksy": "BANKSY",
    "cellcharter": "CellCharter",
    "graphst": "GraphST",
    "spaceflow": "SpaceFlow",
}
NONE = "none"


def scores(home: Path, labels: list[list[str | None]]) -> dict[str, Any]:
    """Agreement with the truth.

    Parameters
    ----------
    home
        Folder of the cohort.
    labels
        Each slide's domains, in the order of its cells; cells without one count as a domain of their own.

    Returns
    -------
    dict
        ``ari`` and ``nmi`` over all cells, both for each slide in ``slides``, the number of domains found and the
        share of cells without one.
    """
    import anndata
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    def both(truth: np.ndarray, found: np.ndarray) -> dict[str, float]:
        return {
            "ari": round(float(adjusted_rand_score(truth, found)), 4),
            "nmi": round(float(normalized_mutual_info_score(truth, found)), 4),
        }

    truths, founds, slides = [], [], {}
    for name, part in zip(json.loads((home / ABOUT).read_text())["slides"], labels, strict=True):
        truth = anndata.read_h5ad(home / f"{name}.h5ad").obs["domain_true"].astype(str).to_numpy()
        found = np.array([NONE if label is None else label for label in part])
        slides[name] = both(truth, found)
        truths.append(truth)
        founds.append(found)
    found = np.concatenate(founds)
    return {
        **both(np.concatenate(truths), found),
        "n_found": len(set(found.tolist()) - {NONE}),
        "without": round(float((found == NONE).mean()), 4),
        "slides": slides,
    }


def run(
    method: str, cohort: str, seed: int, folder: Path, python: str, limit_s: float, timeout_s: float
) -> dict[str, Any]:
    """One run in the method's environment, scored; an ``error`` in place of scores where it did not end well."""
    home = write(COHORTS[cohort], folder)
    output = folder / "runs" / f"{method}-{cohort}-{seed}.json"
    output.parent.mkdir(exist_ok=True)
    line: dict[str, Any] = {"method": method, "cohort": cohort, "seed": seed}
    if not output.is_file():
        command = [python, HERE / "domains_methods.py", method, home, output, "--seed", seed, "--limit_s", limit_s]
        threads = {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "PYTHONHASHSEED": str(seed)}
        try:
            done = subprocess.run(
                [str(part) for part in command], env={**threads, **os.environ}, capture_output=True, text=True,
                timeout=timeout_s,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return {**line, "error": f"not done after {timeout_s:g} s"}
        if done.returncode:
            return {**line, "error": done.stderr.strip().splitlines()[-1][-300:]}
    document = json.loads(output.read_text())
    line |= scores(home, document["labels"])
    return line | {key: document[key] for key in ("wall_s", "cpu_s", "versions", "notes")}


def read() -> dict[str, Any]:
    """The results so far."""
    if not RESULTS.is_file():
        return {"cohorts": {}, "not_run": {}, "runs": []}
    return json.loads(RESULTS.read_text())


def add(line: dict[str, Any], folder: Path) -> None:
    """Put a run into the results, in place of an older one of the same method, cohort and seed."""
    results = read()
    cohort = COHORTS[line["cohort"]]
    digest = json.loads((folder / cohort.name / ABOUT).read_text())["digest"]
    known = results["cohorts"].get(cohort.name)
    if known and known["digest"] != digest:  # other cells: nothing of before can be compared
        results["runs"] = [run for run in results["runs"] if run["cohort"] != cohort.name]
    results["cohorts"][cohort.name] = {"text": cohort.text, "n_domains": cohort.n_domains, "digest": digest}
    same = ("method", "cohort", "seed")
    runs = [run for run in results["runs"] if any(run[key] != line[key] for key in same)]
    order = (list(METHODS), list(COHORTS))
    runs = [*runs, line]
    runs.sort(key=lambda run: (order[0].index(run["method"]), order[1].index(run["cohort"]), run["seed"]))
    results["runs"] = runs
    results["machine"] = f"{platform.machine()}, {os.cpu_count()} cores, one thread a run"
    save(results)


def save(results: dict[str, Any]) -> None:
    """Write the results."""
    RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")


def table(results: dict[str, Any]) -> str:
    """One Markdown table: a line a method, ARI / NMI over all cells of a cohort, mean over seeds.

    In brackets the lowest and the highest ARI, and the processor seconds of a run.
    """
    cohorts = [name for name in COHORTS if name in results["cohorts"]]
    lines = [
        f"| ARI / NMI | {' | '.join(cohorts)} |",
        "| --- |" + " --- |" * len(cohorts),
    ]
    for method, title in METHODS.items():
        cells = [_cell([run for run in results["runs"] if (run["method"], run["cohort"]) == (method, cohort)])
                 for cohort in cohorts]  # fmt: skip
        if method in results["not_run"]:
            lines.append(f"| {title} | {results['not_run'][method]}" + " |" * len(cohorts))
        elif any(cells):
            lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(runs: list[dict[str, Any]]) -> str:
    done = [run for run in runs if "error" not in run]
    if not done:
        return runs[0]["error"] if runs else ""
    ari = [run["ari"] for run in done]
    nmi = np.mean([run["nmi"] for run in done])
    spread = f"{min(ari):.2f}–{max(ari):.2f}, " if len(ari) > 1 else ""
    return f"{np.mean(ari):.2f} / {nmi:.2f} ({spread}{np.mean([run['cpu_s'] for run in done]):.0f} s)"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    runs = verbs.add_parser("run", help="run one method and add it to the results")
    runs.add_argument("method", choices=METHODS)
    runs.add_argument("--cohorts", nargs="+", choices=COHORTS, default=list(COHORTS))
    runs.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    runs.add_argument("--python", default=sys.executable, help="of the method's environment")
    runs.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "domains_quality")
    runs.add_argument("--limit_s", type=float, default=600.0, help="processor time that open-ended training may take")
    runs.add_argument("--timeout_s", type=float, default=3600.0, help="time after which a run is given up")
    absent = verbs.add_parser("absent", help="say why a method was not run")
    absent.add_argument("method", choices=METHODS)
    absent.add_argument("reason")
    verbs.add_parser("table", help="print the results as Markdown")
    given = parser.parse_args()
    if given.verb == "run":
        for seed in given.seeds:
            for cohort in given.cohorts:
                line = run(given.method, cohort, seed, given.folder, given.python, given.limit_s, given.timeout_s)
                line["command"] = " ".join(
                    f"domains_quality.py run {given.method} --cohorts {cohort} --seeds {seed}"
                    f" --limit_s {given.limit_s:g}".split()
                )
                add(line, given.folder)
                said = line.get("error") or f"ARI {line['ari']:.3f}, NMI {line['nmi']:.3f}, {line['wall_s']:.0f} s"
                print(f"{given.method} {cohort} {seed}: {said}", flush=True)
    elif given.verb == "absent":
        results = read()
        results["not_run"][given.method] = given.reason
        save(results)
    else:
        print(table(read()))


if __name__ == "__main__":
    main()
