"""A stand-in for Baysor where there is no Julia: its command line, its checks, its files.

Written after the source of Baysor 0.6.2 and 0.7.1 and of the package that parses their command line. It knows exactly
the flags and configuration keys of the version that it plays, takes what they take, refuses what they refuse in their
words, and writes their files with their oddities: cells named after a random run and numbered at random, molecules of
rare genes left out, noise, cells of one or two molecules, rings that are not closed or cross themselves, cells without
outline. In place of Baysor's model it groups molecules by prior cell and distance, so that what comes out depends on
what goes in. Standard library only: it must run wherever a task runs.

Environment
-----------
FAKE_BAYSOR_VERSION   0.7.1 (default) or 0.6.2; anything else only says its version
FAKE_BAYSOR_FAIL      end with this error after reading the molecules
FAKE_BAYSOR_FAIL_BELOW  the same, only for fewer molecules than this
FAKE_BAYSOR_KILL      be killed as the system does when memory runs out
FAKE_BAYSOR_HANG      never end
FAKE_BAYSOR_HALF      write half of segmentation.csv, and say that all is well
FAKE_BAYSOR_NUMBERS   how whole numbers of the input come back: int, float or string
FAKE_BAYSOR_CALLS     file to which each call is added: a line of JSON with the arguments, threads and configuration
"""

import csv
import json
import math
import os
import random
import re
import signal
import sys
import time
import tomllib
import uuid
from collections import Counter
from pathlib import Path

BOTH = {
    "data": {
        "x": str,
        "y": str,
        "z": str,
        "gene": str,
        "force_2d": bool,
        "min_molecules_per_gene": int,
        "exclude_genes": str,
        "min_molecules_per_cell": int,
        "min_molecules_per_segment": int,
        "confidence_nn_id": object,
    },
    "segmentation": {
        "scale": float,
        "scale_std": str,
        "estimate_scale_from_centers": bool,
        "n_clusters": int,
        "prior_segmentation_confidence": float,
        "iters": int,
        "n_cells_init": int,
        "nuclei_genes": str,
        "cyto_genes": str,
    },
    "plotting": {"gene_composition_neigborhood": int, "min_pixels_per_cell": int},
}
ONLY = {
    "0.6": {"segmentation": {"new_component_weight": float, "new_component_fraction": float}},
    "0.7": {
        "segmentation": {"unassigned_prior_label": str},
        "plotting": {"max_plot_size": int, "ncv_method": str},
    },
}
DEFAULTS = {
    "data": {
        "x": "x",
        "y": "y",
        "z": "z",
        "gene": "gene",
        "force_2d": False,
        "min_molecules_per_gene": 1,
        "exclude_genes": "",
        "min_molecules_per_cell": 0,
        "min_molecules_per_segment": 0,
        "confidence_nn_id": 0,
    },
    "segmentation": {
        "scale": -1.0,
        "scale_std": "25%",
        "estimate_scale_from_centers": True,
        "n_clusters": 4,
        "prior_segmentation_confidence": 0.2,
        "iters": 500,
        "n_cells_init": 0,
        "nuclei_genes": "",
        "cyto_genes": "",
        "unassigned_prior_label": "0",
    },
    "plotting": {"gene_composition_neigborhood": 0, "min_pixels_per_cell": 15, "ncv_method": "ri"},
}
#: Option of the command line → its letter, and the place of what it sets.
OPTIONS = {
    "config": ("c", None),
    "x-column": ("x", ("data", "x")),
    "y-column": ("y", ("data", "y")),
    "z-column": ("z", ("data", "z")),
    "gene-column": ("g", ("data", "gene")),
    "min-molecules-per-cell": ("m", ("data", "min_molecules_per_cell")),
    "scale": ("s", ("segmentation", "scale")),
    "scale-std": ("", ("segmentation", "scale_std")),
    "n-clusters": ("", ("segmentation", "n_clusters")),
    "prior-segmentation-confidence": ("", ("segmentation", "prior_segmentation_confidence")),
    "output": ("o", None),
    "count-matrix-format": ("", None),
}
OWN_OPTIONS = {"0.6": ("save-polygons",), "0.7": ("polygon-format",)}
FLAGS = {"0.6": ("plot", "no-ncv-estimation"), "0.7": ("plot",)}
NEIGHBOURS = 20


class JuliaError(Exception):
    """An exception in Julia: printed with its stack trace."""


class CommandError(Exception):
    """What Baysor says itself about a call: printed with the help."""


class UsageError(Exception):
    """What the parser says about a call: printed with the help."""


def version() -> str:
    return os.environ.get("FAKE_BAYSOR_VERSION", "0.7.1")


def contract() -> str:
    return ".".join(version().split(".")[:2])


def main(arguments: list[str]) -> int:
    """Play `baysor` with these arguments; returns its exit code."""
    if "--version" in arguments:
        print("nothing" if contract() == "0.6" else version())  # 0.6 looks for its version in the wrong place
        return 0
    if contract() not in OWN_OPTIONS:
        print(f"unknown command: {' '.join(arguments)}")
        return 1
    try:
        if not arguments or arguments[0] != "run":
            raise UsageError("valid sub-commands for command baysor are: preview, segfree, run")
        if "-h" in arguments or "--help" in arguments:
            print(help_text())
            return 0
        run(*parse(arguments[1:]), arguments)
    except (UsageError, CommandError) as error:
        command = isinstance(error, CommandError)
        print(f"CommandError: {error} exit with 1" if command else f"\x1b[31m\x1b[1mError: {error}\x1b[22m\x1b[39m")
        print(help_text())
        return 1
    except JuliaError as error:
        print(f"\x1b[91m\x1b[1mERROR: \x1b[22m\x1b[39m{error}\nStacktrace:", file=sys.stderr)
        print(" [1] \x1b[1merror\x1b[22m(s::String)\n   @ Base ./error.jl:35", file=sys.stderr)
        return 1
    return 0


def help_text() -> str:
    letters = {name: letter for name, (letter, _) in OPTIONS.items()} | dict.fromkeys(OWN_OPTIONS[contract()], "")
    options = [f"  \x1b[96m{f'-{k}, ' if k else ''}--{n}\x1b[39m <value>" for n, k in letters.items()]
    flags = [f"  \x1b[96m--{name}\x1b[39m" for name in FLAGS[contract()]]
    return "\n".join(["", "  run <args> [options] [flags]", "", "Options", *options, "", "Flags", *flags, ""])


# --- the command line


def parse(arguments: list[str]) -> tuple[list[str], dict[str, str], set[str], dict]:
    """Positional arguments, options, flags, and the configuration that results."""
    names = [*OPTIONS, *OWN_OPTIONS[contract()]]
    short = {letter: name for name, (letter, _) in OPTIONS.items() if letter}
    positional, options, flags, overrides = [], {}, set(), {}
    rest = list(arguments)
    while rest:
        token = rest.pop(0)
        if not token.startswith("-"):
            positional.append(token)
            continue
        if token.startswith("--"):
            name, equals, value = token[2:].partition("=")
            head, _, field = name.partition(".")
            if head in FLAGS[contract()]:
                flags.add(head)
                continue
            if head not in names:
                raise UsageError(f"cannot find {token}, use -h or --help to check more detailed help info")
        elif token[1:2] == "p":
            flags.add("plot")
            continue
        elif token[1:2] in short:
            head, field = short[token[1]], ""
            value, equals = token[2:].removeprefix("="), "=" if token[2:] else ""
        else:
            raise UsageError(f"cannot find short flag or option: {token}")
        if not equals:
            if not rest:
                raise UsageError("expect a value, use -h or --help to check more detailed help info")
            value = rest.pop(0)
        if head == "config" and field:
            overrides[field] = value
        else:
            options[head] = value
    if not positional:
        raise UsageError("expect 1 positional arguments, use -h or --help to check more detailed help info")
    if len(positional) > 2:
        raise UsageError("expect at most 2 positional arguments, use -h or --help to check more detailed help info")
    return positional, options, flags, configure(options, overrides)


def configure(options: dict[str, str], overrides: dict[str, str]) -> dict:
    tree = {}
    if "config" in options:
        path = Path(options["config"])
        if not path.is_file():
            raise JuliaError(f'SystemError: opening file "{path}": No such file or directory')
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    known = {section: {**keys, **ONLY[contract()].get(section, {})} for section, keys in BOTH.items()}
    for field, value in overrides.items():
        section, _, key = field.partition(".")
        if key not in known.get(section, {}):
            raise UsageError(f"cannot find field {field}")
        tree.setdefault(section, {})[key] = from_text(known[section][key], value)
    for section, keys in tree.items():
        if section not in known:
            raise invalid_key(section, known)
        for key, value in keys.items():
            if key not in known[section]:
                raise invalid_key(key, known[section])
            keys[key] = convert(known[section][key], key, value)
    config = {section: {**values, **tree.get(section, {})} for section, values in DEFAULTS.items()}
    for name, (_, place) in OPTIONS.items():
        if place and name in options:
            config[place[0]][place[1]] = from_text(known[place[0]][place[1]], options[name])
    return config


def invalid_key(key: str, known: dict) -> JuliaError:
    return JuliaError(f"InvalidKeyError: invalid key {key}, possible keys are: {', '.join(known)}")


def convert(kind: type, key: str, value: object) -> object:
    """As Julia converts a value of the file to the option's type."""
    number = isinstance(value, int | float)
    if kind is object or isinstance(value, kind):
        return value
    if kind is float and number:
        return float(value)
    if kind is int and number and float(value).is_integer():
        return int(value)
    raise JuliaError(f"FieldTypeConversionError: conversion from {type(value)} to type {kind} for field {key} failed")


def from_text(kind: type, text: str) -> object:
    try:
        return kind(text) if kind in (int, float) else text
    except ValueError:
        raise UsageError(f"expect value of type: {kind}") from None


# --- the run


def run(positional: list[str], options: dict[str, str], flags: set[str], config: dict, arguments: list[str]) -> None:
    coordinates, prior = positional[0], positional[1] if len(positional) > 1 else ""
    data, segmentation = config["data"], config["segmentation"]
    m = data["min_molecules_per_cell"]
    if m <= 0:
        raise CommandError("`min_molecules_per_cell` must be positive")
    if not prior and segmentation["scale"] <= 0:
        raise CommandError("Either `prior_segmentation` or `scale` must be provided.")
    if bool(segmentation["nuclei_genes"]) != bool(segmentation["cyto_genes"]):
        raise CommandError("Only one of `nuclei-genes` and `cyto-genes` is provided. It has to be either both or none.")
    count_format = options.get("count-matrix-format", "loom")
    if count_format not in ("loom", "tsv"):
        raise JuliaError("AssertionError: count_matrix_format must be either 'loom' or 'tsv'")
    output = Path(options.get("output", "segmentation.csv"))
    if output.is_dir():
        output = output / "segmentation.csv"
    prefix = output.with_suffix("")
    note_call(arguments, config, prior)

    log = Log(Path(f"{prefix}_log.log"))
    run_id = f"R{uuid.uuid1().hex[20:29]}"
    log(f"Run {run_id}")
    log(f"(2024-11-01) Run Baysor v{version()}")
    log("Loading data...")
    molecules = load(coordinates, data)
    log(f"Loaded {len(molecules)} transcripts")
    misbehave(len(molecules))

    labels = prior_labels(molecules, prior, config) if prior else [0] * len(molecules)
    scale = segmentation["scale"]
    if prior and (scale <= 0 or contract() == "0.6"):  # 0.6 estimates it in any case
        estimate = scale_of_prior(molecules, labels, m)
        scale = estimate if scale <= 0 else scale
    log("Estimating noise level")
    neighbours = data["confidence_nn_id"] or max(max(m, 3) // 2 + 1, 5)
    if len(molecules) < max(NEIGHBOURS, neighbours + 1):
        raise JuliaError("ArgumentError: k must be smaller than or equal to the number of data points")
    if len({row["gene"] for row in molecules}) < 2:
        raise JuliaError("ArgumentError: matrix contains Infs or NaNs")
    cells = cluster(molecules, labels, scale, m)
    print(f"\rProgress:  50%|{'█' * 20}\rProgress: 100%|{'█' * 40}", file=sys.stderr)
    log("Processing complete.")
    write(prefix, molecules, cells, scale, run_id, config, options, count_format)
    log("All done!")


class Log:
    """Baysor's log goes to its output and to a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.write_text("")

    def __call__(self, message: str) -> None:
        line = f"[12:00:00] Info: {message}\n"
        sys.stdout.write(line)
        sys.stdout.flush()
        with self.path.open("a") as stream:
            stream.write(line)


def note_call(arguments: list[str], config: dict, prior: str) -> None:
    path = os.environ.get("FAKE_BAYSOR_CALLS")
    if path:
        with open(path, "a") as stream:
            call = {"arguments": arguments, "config": config, "prior": prior}
            stream.write(json.dumps({**call, "threads": os.environ.get("JULIA_NUM_THREADS")}) + "\n")


def misbehave(n: int) -> None:
    below = os.environ.get("FAKE_BAYSOR_FAIL_BELOW")
    failure = os.environ.get("FAKE_BAYSOR_FAIL")
    if failure or (below and n < int(below)):
        raise JuliaError(failure or "DimensionMismatch: arrays could not be broadcast to a common size")
    if os.environ.get("FAKE_BAYSOR_KILL"):
        os.kill(os.getpid(), signal.SIGKILL)
    while os.environ.get("FAKE_BAYSOR_HANG"):
        time.sleep(1)


def load(path: str, data: dict) -> list[dict]:
    extension = Path(path).suffix.lstrip(".").lower()
    if extension != "csv":
        raise JuliaError(f"Unsupported file format: {extension}. Please, provide a CSV or Parquet file")
    with open(path, newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    there = rows[0].keys() if rows else ()
    for name in ("x", "y", "z", "gene"):
        column = data[name]
        if column not in there:
            if name == "z" and column == "z":
                continue
            raise JuliaError(f"{name} column '{column}' not found in the data frame")
    if data["force_2d"] or len({row.get("z") for row in rows}) < 2:
        for row in rows:
            row.pop("z", None)
    counts = Counter(row["gene"] for row in rows)
    masks = [re.compile(mask.strip()) for mask in data["exclude_genes"].split(",") if mask.strip()]
    kept = []
    for row in rows:
        if counts[row["gene"]] < data["min_molecules_per_gene"] or any(mask.search(row["gene"]) for mask in masks):
            continue
        row["at"] = (float(row["x"]), float(row["y"]))
        kept.append(row)
    return kept


def prior_labels(molecules: list[dict], prior: str, config: dict) -> list[int]:
    if not prior.startswith(":"):
        raise JuliaError(f"IOError: could not open {prior}")
    column = prior[1:]
    if molecules and column not in molecules[0]:
        raise JuliaError(f'ArgumentError: column name "{column}" not found in the data frame')
    raw = [row[column] for row in molecules]
    if contract() == "0.6":
        if any(not re.fullmatch(r"-?\d+", text) for text in raw):
            raise JuliaError(f"The prior segmentation column '{column}' must be of integer type")
        if any(int(text) < 0 for text in raw):
            raise JuliaError(f"The prior segmentation column '{column}' must not contain negative numbers")
        rank = {value: number for number, value in enumerate(sorted({int(text) for text in raw}))}
        labels = [rank[int(text)] for text in raw]
    else:
        unassigned = config["segmentation"]["unassigned_prior_label"]
        rank = {value: number for number, value in enumerate(sorted(set(raw) - {unassigned}), 1)}
        labels = [rank.get(text, 0) for text in raw]
    least = config["data"]["min_molecules_per_segment"]
    least = least or max(round(max(config["data"]["min_molecules_per_cell"], 3) / 4), 2)
    sizes = Counter(labels)
    return [label if sizes[label] >= least else 0 for label in labels]


def scale_of_prior(molecules: list[dict], labels: list[int], m: int) -> float:
    centres = [centre for _, centre, size in groups(molecules, labels) if size >= m]
    if len(centres) < 3:
        name = "min_mols_per_cell" if contract() == "0.6" else "min_molecules_per_cell"
        raise JuliaError(f"Not enough prior cells pass the {name}={m} threshold. Please, specify scale manually.")
    nearest = sorted(min(math.dist(a, b) for b in centres if b is not a) for a in centres)
    return nearest[len(nearest) // 2] / 2


def groups(molecules: list[dict], labels: list[int]) -> list[tuple[int, tuple[float, float], int]]:
    """Label, centre and size of every group but 0."""
    sums: dict[int, list[float]] = {}
    for row, label in zip(molecules, labels, strict=True):
        if label:
            total = sums.setdefault(label, [0.0, 0.0, 0])
            total[0] += row["at"][0]
            total[1] += row["at"][1]
            total[2] += 1
    return [(label, (x / n, y / n), n) for label, (x, y, n) in sorted(sums.items())]


def cluster(molecules: list[dict], labels: list[int], scale: float, m: int) -> list[int]:
    """Cells by prior and distance: a molecule joins the nearest centre within 1.5 scales. Centres are those of the
    prior cells, and where there is none within 2.2 scales a molecule, in the order of x + y, moved once to the middle
    of those that join it."""
    reach, apart = 1.5 * scale, 2.2 * scale
    grid: dict[tuple[int, int], list[tuple[float, float, int]]] = {}

    def add(x: float, y: float, label: int) -> None:
        grid.setdefault((int(x // apart), int(y // apart)), []).append((x, y, label))

    def nearest(x: float, y: float, limit: float) -> int:
        i, j = int(x // apart), int(y // apart)
        near = [item for a in (-1, 0, 1) for b in (-1, 0, 1) for item in grid.get((i + a, j + b), ())]
        best = min(near, key=lambda item: (math.dist((x, y), item[:2]), item[2]), default=None)
        return best[2] if best and math.dist((x, y), best[:2]) <= limit else 0

    of_prior = groups(molecules, labels)
    for label, centre, _ in of_prior:
        add(*centre, label)
    known = max(labels, default=0)
    cells, count = list(labels), known
    free = sorted((i for i, label in enumerate(labels) if not label), key=lambda i: (sum(molecules[i]["at"]), i))
    for i in free:
        cells[i] = nearest(*molecules[i]["at"], apart)
        if not cells[i]:
            count += 1
            cells[i] = count
            add(*molecules[i]["at"], count)
    moved = groups(molecules, [label if label > known else 0 for label in cells])
    grid.clear()
    for label, centre, _ in [*of_prior, *moved]:
        add(*centre, label)
    for i in free:
        cells[i] = nearest(*molecules[i]["at"], reach)
    # Small groups are noise, but as in Baysor some of one or two molecules stay.
    sizes = Counter(cells)
    return [label if sizes[label] >= m or (sizes[label] <= 2 and label % 3 == 0) else 0 for label in cells]


# --- the files


def write(prefix, molecules, cells, scale, run_id, config, options, count_format) -> None:
    numbers = sorted(set(cells) - {0})
    shuffled = random.sample(range(1, len(numbers) + 1), len(numbers))
    number = dict(zip(numbers, shuffled, strict=True))
    name = {label: f"C{run_id}-{number[label]}" for label in numbers}
    centre = {label: at for label, at, _ in groups(molecules, cells)}
    members: dict[int, list[int]] = {}
    for i, label in enumerate(cells):
        if label:
            members.setdefault(label, []).append(i)
    order = sorted(numbers, key=number.get)

    passed_on = [column for column in (molecules[0] if molecules else ()) if column != "at"]
    header = [*passed_on, "molecule_id", "confidence", "cluster", "cell", "assignment_confidence", "is_noise"]
    if contract() != "0.6":
        header.append("ncv_color")
    style = {"int": str, "float": lambda text: f"{text}.0", "string": lambda text: f'"{text}"'}
    as_number = style[os.environ.get("FAKE_BAYSOR_NUMBERS", "int")]
    lines = [",".join(header)]
    for i, (row, label) in enumerate(zip(molecules, cells, strict=True)):
        sure = math.exp(-math.dist(row["at"], centre[label]) / scale / 2) if label else 0.5
        fields = [as_number(row[c]) if row[c].isdigit() and c != "gene" else quoted(row[c]) for c in passed_on]
        fields += [str(i + 1), "0.9", str(i % config["segmentation"]["n_clusters"] + 1), name.get(label, "")]
        fields += [f"{sure:.5f}", "true" if not label else "false"]
        lines.append(",".join([*fields, "#a0b1c2"] if contract() != "0.6" else fields))
    if os.environ.get("FAKE_BAYSOR_HALF"):
        lines = lines[: len(lines) // 2]
    Path(f"{prefix}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")

    stats = ["cell,x,y,cluster,n_transcripts,density,elongation,area,avg_confidence,avg_assignment_confidence,lifespan"]
    for label in order:
        n = len(members[label])
        shape = "0.5,1.5,20.0" if n > 2 else "NaN,NaN,NaN"
        x, y = centre[label]
        stats.append(f"{name[label]},{x:.6g},{y:.6g},1,{n},{shape},0.9,0.8,50")
    Path(f"{prefix}_cell_stats.csv").write_text("\n".join(stats) + "\n")

    write_counts(prefix, molecules, cells, [name[label] for label in order], order, count_format)
    write_polygons(prefix, molecules, members, order, name, number, options)
    Path(f"{prefix}_params.dump.toml").write_text(f"# CLI params: `{' '.join(sys.argv[2:])}`\n")


def quoted(text: str) -> str:
    return '"' + text.replace('"', '""') + '"' if re.search(r'[",\n]', text) else text


def write_counts(prefix, molecules, cells, names, order, count_format) -> None:
    genes = sorted({row["gene"] for row in molecules})
    counts = Counter((row["gene"], label) for row, label in zip(molecules, cells, strict=True) if label)
    matrix = [[counts[gene, label] for label in order] for gene in genes]
    if count_format == "tsv":
        rows = [
            "\t".join(["gene", *names]),
            *("\t".join([g, *map(str, row)]) for g, row in zip(genes, matrix, strict=True)),
        ]
        Path(f"{prefix}_counts.tsv").write_text("\n".join(rows) + "\n", encoding="utf-8")
        return
    if len(order) == len(genes):  # Baysor's own slip: it takes this for a wrong length
        raise JuliaError(f"Col attribute avg_confidence has wrong length ({len(order)} != {len(genes)})")
    import h5py

    with h5py.File(f"{prefix}_counts.loom", "w") as file:
        file["matrix"] = matrix
        file["attrs/LOOM_SPEC_VERSION"] = "3.0.0"
        file["row_attrs/Name"] = genes
        file["col_attrs/CellID"] = [float(i) for i in range(1, len(names) + 1)]
        file["col_attrs/Name"] = names


def write_polygons(prefix, molecules, members, order, name, number, options) -> None:
    old = contract() == "0.6"
    wanted = options.get("save-polygons", "false") if old else options.get("polygon-format", "FeatureCollection")
    if wanted.lower() in ("false", "none"):
        return
    path = Path(f"{prefix}_polygons.json" if old else f"{prefix}_polygons_2d.json")
    if old and wanted.lower() != "geojson":
        return  # 0.6 only warns
    polygons = {}
    for label in order:
        ring = outline([molecules[i]["at"] for i in members[label]], members[label][0])
        if ring:
            polygons[label] = ring
    if not old and wanted.lower() == "featurecollection":
        features = [
            {"type": "Feature", "id": name[k], "geometry": {"type": "Polygon", "coordinates": [ring]}}
            for k, ring in polygons.items()
            if len(ring) > 3
        ]
        path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
        return
    if not old and wanted.lower() not in ("geometrycollection", "geometrycollectionlegacy"):
        raise JuliaError(f"Unknown polygon format: {wanted}")
    whole = old or wanted.lower() == "geometrycollectionlegacy"
    geometries = [
        {"type": "Polygon", "coordinates": [ring], "cell": number[k] if whole else name[k]}
        for k, ring in polygons.items()
    ]
    document = {"type": "GeometryCollection", "geometries": geometries}
    path.write_text(json.dumps(document))
    if not old and molecules and "z" in molecules[0]:
        Path(f"{prefix}_polygons_3d.json").write_text(json.dumps({"0.0": document}))


def outline(points: list[tuple[float, float]], which: int) -> list[list[float]]:
    """A cell's ring; some have what is odd about some of Baysor's."""
    if len(points) <= 2:
        if contract() == "0.6":
            return [list(points[0]), list(points[-1]), list(points[0])]
        x, y = points[0]
        return [[x + 0.01, y], [x - 0.01, y], [x, y + 0.01], [x, y - 0.01]]
    ring = [list(point) for point in hull(points)]
    if which % 7 == 6 or len(ring) < 3:
        return []
    if which % 5 == 4 and len(ring) > 3:
        ring[1], ring[2] = ring[2], ring[1]  # crosses itself
    return ring if which % 2 else [*ring, ring[0]]


def hull(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Convex hull, by the sides of a monotone chain."""
    points = sorted(set(points))

    def side(ordered: list[tuple[float, float]]) -> list[tuple[float, float]]:
        chain: list[tuple[float, float]] = []
        for p in ordered:
            while len(chain) > 1 and turn(chain[-2], chain[-1], p) <= 0:
                chain.pop()
            chain.append(p)
        return chain[:-1]

    return side(points) + side(points[::-1])


def turn(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> float:
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])
