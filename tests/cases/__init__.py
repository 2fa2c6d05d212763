"""Wrong and unusual inputs with the messages they must give, for both the command line and the pipeline."""

import json
from pathlib import Path
from typing import Any

from cellquilt.core.settings import BY_NAME, TECHNOLOGIES

CASES: list[dict[str, Any]] = json.loads(Path(__file__).with_name("bad_inputs.json").read_text(encoding="utf-8"))


def make_case(case: dict[str, Any], folder: Path) -> list[str]:
    """Write a case's files into a folder; the message lines that it must give there."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ["x.tif", "t.csv", *case.get("files", [])]:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("")
    for name, text in case.get("texts", {}).items():
        (folder / name).write_text(text, encoding="utf-8")
    if "sheet" in case:
        (folder / "sheet.csv").write_bytes(case["sheet"].encode())
    elif "sheet_hex" in case:
        (folder / "sheet.csv").write_bytes(bytes.fromhex(case["sheet_hex"]))
    fill = {
        "{folder}": str(folder),
        "{parent}": str(folder.parent),
        "{technologies}": ", ".join(sorted(TECHNOLOGIES)),
        "{methods}": ", ".join(BY_NAME["segmentation"].choices),
        "{compared}": ", ".join(BY_NAME["compare"].choices),
    }
    lines = case["lines"]
    for mark, text in fill.items():
        lines = [line.replace(mark, text) for line in lines]
    return lines
