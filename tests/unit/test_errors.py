"""The catalogue of errors: every code of the sources is explained, and nothing else is."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from cellquilt.core.errors import CellquiltError
from cellquilt.core.explain import SECTIONS, catalogue, explain
from cellquilt.core.schema import generated_files
from cellquilt.report.samples import COLUMNS

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "python/src/cellquilt"
#: Calls whose code is no plain string: (file, what stands there) → the codes that it can be.
COMPUTED = {
    ("celltypes/measured.py", "error.code"): set(),  # the same error, with the slide's name before it
    ("celltypes/phenotypes.py", "error.code"): set(),  # the same error, with the file's name before it
    ("comparison/markers.py", "code"): {"marker-pairs-unreadable", "reference-unreadable"},
    ("costs/contents.py", "error.code"): set(),  # an error of a reader, with the sample before it
    ("core/sheet.py", "error.code"): set(),  # an error of the same module, with the row before it
    ("domains/stages.py", "error.code"): set(),  # the same error, with the slide's name before it
    ("domains/analysis/conditions.py", "error.code.replace('condition', 'batch')"): {"batch-missing", "batch-mixed"},
    ("domains/analysis/conditions.py", "code"): {"condition-mixed", "batch-mixed"},
    ("spatial/slides.py", "code"): {"domains-missing", "condition-missing", "column-unknown"},
    ("spatial/cohort.py", "code"): {"column-unknown", "condition-missing", "batch-missing"},
    ("spatial/cohort.py", "f'{what}-mixed'"): {"condition-mixed", "batch-mixed"},
    ("explorer/folder.py", "error.code"): set(),  # the same error, with the folder as the user knows it
    ("explorer/imports.py", "code"): {"explorer-selection", "explorer-categories", "explorer-names"},
    ("readers/base.py", "f'{what}-not-found'"): {"transcripts-not-found", "prior-cells-not-found", "regions-not-found"},
    ("readers/cosmx.py", "self._code"): {"cosmx-cells-unreadable", "cosmx-fov-positions"},
    ("segment/executable.py", "f'{name}-timeout'"): {"baysor-timeout", "proseg-timeout"},
}


@cache
def raised() -> list[tuple[str, ast.expr]]:
    """File and first argument of every error made in the package."""
    return list(_raised())


def _raised() -> Iterator[tuple[str, ast.expr]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
                name = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
                if name in ("CellquiltError", "SeveralErrors"):
                    yield str(path.relative_to(PACKAGE)), node.args[0]


def codes_of_python() -> set[str]:
    found: set[str] = set()
    for file, argument in raised():
        if isinstance(argument, ast.Constant):
            found.add(argument.value)
        else:
            found |= COMPUTED[file, ast.unparse(argument)]
    return found


def codes_of_groovy() -> set[str]:
    text = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "lib").glob("*.groovy")))
    plain = re.findall(r"\b(?:error|fail|Mistake)\(\s*'([a-z][a-z0-9-]+)'", text)
    in_brackets = re.findall(r"\[([a-z]+(?:-[a-z]+)+)\]", text)
    named = re.findall(r"\berror\s*[:=]\s*'([a-z][a-z0-9-]+)'", text)
    return {*plain, *in_brackets, *named}


def test_every_code_is_explained_and_no_other():
    sources = codes_of_python() | codes_of_groovy()
    known = set(catalogue())
    assert sources - known == set(), "codes without an entry in core/errors.toml"
    assert known - sources == set(), "entries of core/errors.toml that nothing raises"


def test_the_computed_codes_are_still_there():
    computed = {(file, ast.unparse(argument)) for file, argument in raised() if not isinstance(argument, ast.Constant)}
    assert computed == set(COMPUTED)


def test_codes_are_kebab_case_and_entries_are_sentences():
    for code, entry in catalogue().items():
        assert re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", code)
        assert entry.section in SECTIONS
        for text in (entry.means, entry.cause, entry.fix):
            assert text == text.strip() != ""
            assert text.endswith((".", "`", ":"))
            assert text.count("`") % 2 == 0, f"{code}: {text}"


def test_no_code_stands_in_two_sections():
    import tomllib

    sections = tomllib.loads((PACKAGE / "core/errors.toml").read_text(encoding="utf-8"))
    assert list(sections) == list(SECTIONS)
    assert sum(map(len, sections.values())) == len(catalogue())


def test_the_page_has_every_error_once_and_is_what_is_generated():
    page = (ROOT / "docs/errors.md").read_text(encoding="utf-8")
    assert page == generated_files()["docs/errors.md"]
    assert re.findall(r'<a id="([^"]+)"></a>', page) == list(catalogue())
    rows = [line for line in page.splitlines() if line.startswith("| <a ")]
    assert {len(re.split(r"(?<!\\)\|", row)) for row in rows} == {6}


def test_samples_tsv_names_the_error_before_its_cause():
    assert COLUMNS.index("error") + 1 == COLUMNS.index("cause")


def test_explain_prints_an_entry():
    text = explain("tiff-truncated")
    assert text.startswith("tiff-truncated (Reading the machine's output)\n")
    assert [line.split(":")[0].strip() for line in text.splitlines()[2:]] == ["cause", "fix"]


def test_explain_offers_the_nearest_code():
    with pytest.raises(CellquiltError) as caught:
        explain("tif-truncated")
    assert caught.value.code == "code-unknown"
    assert caught.value.hint == 'did you mean "tiff-truncated"?'


@pytest.mark.parametrize("code", ["task-killed", "task-failed", "run-ended"])
def test_failures_without_a_record_are_explained_too(code):
    assert "-resume" in explain(code) or "doctor" in explain(code)
