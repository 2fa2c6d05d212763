"""What each error means, what usually causes it and how to mend it: the catalogue in ``errors.toml``."""

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from cellquilt.core.errors import CellquiltError, did_you_mean

#: Section of the catalogue → its heading, in the order of a run.
SECTIONS = {
    "run": "The run and the machine",
    "input": "Parameters and sheet",
    "convert": "Reading the machine's output",
    "segment": "Tissue, patches and segmentation",
    "resolve": "Putting patches together",
    "aggregate": "Counting, and the store",
    "compare": "Comparing methods",
    "spatial": "Space: statistics, joins and alignment",
    "domains": "Spatial domains",
    "cell_types": "Clusters and cell types",
    "regions": "Regions of a slide",
    "report": "Quality control and reports",
    "export": "Files for other programs",
    "explorer": "Xenium Explorer",
    "simulate": "Simulated slides",
}


@dataclass(frozen=True)
class Entry:
    """An error of the catalogue.

    Attributes
    ----------
    code
        As in messages and in the column ``error`` of `samples.tsv`.
    section
        Key of `SECTIONS`: where it comes up.
    means, cause, fix
        One sentence each, Markdown.
    """

    code: str
    section: str
    means: str
    cause: str
    fix: str


@cache
def catalogue() -> dict[str, Entry]:
    """All errors: code → entry, in the order of the page."""
    sections = tomllib.loads(Path(__file__).with_name("errors.toml").read_text(encoding="utf-8"))
    return {
        code: Entry(code, section, *sentences)
        for section in SECTIONS
        for code, sentences in sorted(sections[section].items())
    }


def explain(code: str) -> str:
    """An error as text for the terminal.

    Raises
    ------
    CellquiltError
        ``code-unknown`` with the nearest known code.
    """
    known = catalogue()
    if code not in known:
        hint = did_you_mean(code, known)
        raise CellquiltError(
            "code-unknown",
            f'there is no error "{code}"',
            "docs/errors.md lists them" if hint.startswith("known:") else hint,
        )
    entry = known[code]
    return f"{entry.code} ({SECTIONS[entry.section]})\n  {entry.means}\n  cause: {entry.cause}\n  fix:   {entry.fix}"


def errors_page(note: str) -> str:
    """The page of the documentation that lists all errors.

    Parameters
    ----------
    note
        What the page is generated from.
    """
    lines = [
        "# Errors",
        "",
        f"<!-- {note} -->",
        "",
        "Each message begins with its code in brackets, `samples.tsv` has it in the column `error`, and",
        "`cellquilt doctor --explain CODE` prints what stands here.",
        "",
    ]
    for section, title in SECTIONS.items():
        lines += [f"## {title}", "", "| error | meaning | usual cause | what to do |", "|---|---|---|---|"]
        for entry in catalogue().values():
            if entry.section == section:
                cells = [text.replace("|", "\\|") for text in (entry.means, entry.cause, entry.fix)]
                lines.append(f'| <a id="{entry.code}"></a>`{entry.code}` | {" | ".join(cells)} |')
        lines.append("")
    return "\n".join(lines[:-1]) + "\n"
