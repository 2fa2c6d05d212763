"""One step of one case in a process of its own: ``python child.py MODULE CASE DO TOOL FOLDER [--quick]``.

DO is ``input``, ``prepare``, ``measure`` or ``compare``, see `harness`; the last line printed is the answer as JSON.
"""

import argparse
import importlib
import json
from pathlib import Path
from typing import Any

from harness import Case, measured


def make_input(module: Any, case: Case, sizes: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What both tools read, for the run that counts and for the one that warms up."""
    module.make_input(sizes, folder)
    if case.warm is not None:
        (folder / "warm").mkdir()
        module.make_input({**sizes, **case.warm}, folder / "warm")
    return {}


def prepare(module: Any, case: Case, sizes: dict[str, Any], folder: Path, tool: str) -> dict[str, Any]:
    """What a tool reads in a form of its own."""
    module.prepare(sizes, folder, tool)
    if case.warm is not None:
        module.prepare({**sizes, **case.warm}, folder / "warm", tool)
    return {}


def measure(module: Any, case: Case, sizes: dict[str, Any], folder: Path, tool: str) -> dict[str, Any]:
    """Warm up, load, and measure."""
    if case.warm is not None:
        module.load({**sizes, **case.warm}, folder / "warm", tool)()
    step = module.load(sizes, folder, tool)
    result, line = measured(folder, step)
    return {**line, **module.finish(result, sizes, folder, tool)}


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("module")
    parser.add_argument("case")
    parser.add_argument("do", choices=("input", "prepare", "measure", "compare"))
    parser.add_argument("tool")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    module = importlib.import_module(options.module)
    case = next(case for case in module.CASES if case.name == options.case)
    sizes = case.sizes_of(options.quick)
    match options.do:
        case "input":
            answer = make_input(module, case, sizes, options.folder)
        case "prepare":
            answer = prepare(module, case, sizes, options.folder, options.tool)
        case "measure":
            answer = measure(module, case, sizes, options.folder, options.tool)
        case _:
            answer = module.compare(sizes, options.folder).as_dict()
    print("\n" + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
