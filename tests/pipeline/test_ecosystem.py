"""What the field's own tools say of what is written for them: nf-core's lint, MultiQC, MkDocs, the format of citations.

They are fetched by uv (``CELLQUILT_UV``, PATH or the cache of `make setup`) in the versions below; where that cannot
be, the tests are skipped and say so.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from cellquilt import __version__
from cellquilt.core.settings import SETTINGS
from runner import ROOT

pytestmark = pytest.mark.slow

NF_CORE, MULTIQC, CFFCONVERT = "nf-core==4.2.1", "multiqc==1.35", "cffconvert==2.0.0"


def tool(package: str, *, beside: str = "") -> list[str]:
    """The command that runs a package's program of the same name; skips where it cannot be had.

    ``beside`` is another package that it needs and does not name.
    """
    cache = Path(os.environ.get("CELLQUILT_CACHE", Path.home() / ".cache/cellquilt"))
    uv = os.environ.get("CELLQUILT_UV") or shutil.which("uv") or cache / "uv/bin/uv"
    if not Path(uv).exists():
        pytest.skip(f"NOT TESTED: {package} needs uv, which is neither on PATH nor at {uv}")
    python = str(Path(sys.executable).resolve())
    command = [str(uv), "tool", "run", "--python", python, "--from", package]
    command += [*(("--with", beside) if beside else ()), package.split("==")[0]]
    tried = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=600, check=False)
    if tried.returncode:
        pytest.skip(f"NOT TESTED: {package} cannot be had here: {tried.stderr[-300:]}")
    return command


@pytest.mark.parametrize("parser", ["v1", "v2"])
def test_nf_core_finds_nothing_wrong_with_the_schema(tmp_path, parser):
    done = subprocess.run(
        [*tool(NF_CORE), "pipelines", "schema", "lint", str(ROOT / "nextflow_schema.json")],
        cwd=tmp_path,
        env={
            **os.environ,
            "PATH": f"{ROOT / 'scripts'}:{os.environ['PATH']}",
            "NXF_HOME": str(tmp_path),  # else it may see the configuration of an earlier call
            "NXF_SYNTAX_PARSER": parser,
            "NFCORE_NO_VERSION_CHECK": "1",
            "COLUMNS": "200",
        },
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert f"Pipeline schema looks valid (found {len(SETTINGS)} params)" in said
    # All that it has to remark is that false is a default.
    remarks = [line for line in said.splitlines() if "WARNING" in line or "ERROR" in line]
    assert [line for line in remarks if "is empty, null, or False" not in line] == []


def test_multiqc_shows_every_sample(tmp_path):
    from cellquilt.report.samples import write_multiqc

    qc = {"n_cells": 1234567, "share_assigned": 0.875, "control_rate_in_cells": 0.0012, "median_area_um2": 55.25}
    for sample, verdict in (("s1", "PASS"), ("s2", "FAIL"), ("t", None)):
        (tmp_path / f"{sample}.json").write_text(json.dumps({"sample": sample, "verdict": verdict, **qc}))
    write_multiqc([tmp_path / f"{sample}.json" for sample in ("s1", "s2", "t")], tmp_path / "in")
    done = subprocess.run(
        [*tool(MULTIQC), "--strict", "--no-version-check", "--outdir", "out", "in"],
        cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "cellquilt_samples: Found 3 samples" in said
    lines = (tmp_path / "out/multiqc_data/multiqc_cellquilt_samples_table.txt").read_text().splitlines()
    table = [dict(zip(lines[0].split("\t"), line.split("\t"), strict=True)) for line in lines[1:]]
    assert [(row["Sample"], row["verdict"], float(row["n_cells"])) for row in table] == [
        ("s1", "PASS", 1234567),
        ("s2", "FAIL", 1234567),
        ("t", "", 1234567),
    ]
    page = (tmp_path / "out/multiqc_report.html").read_text()
    for shown in ("87.5%", "0.12%", "Area (µm²)"):
        assert shown in page, shown


def test_citation_is_valid_and_of_this_version(tmp_path):
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__
    assert citation["license"] == "BSD-3-Clause"
    command = [*tool(CFFCONVERT, beside="setuptools<81"), "--validate", "-i", str(ROOT / "CITATION.cff")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("wrong", "says"), [("", ""), ("[a](nowhere.md)", "nowhere.md"), ("[a](usage.md#nowhere)", "nowhere")]
)
def test_documentation_is_a_site_without_links_to_nowhere(tmp_path, wrong, says):
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copyfile(ROOT / "mkdocs.yml", tmp_path / "mkdocs.yml")
    for name in ("scripts", ".venv"):
        (tmp_path / name).symlink_to(ROOT / name)
    with (tmp_path / "docs/output.md").open("a") as page:
        page.write(f"\n{wrong}\n")
    done = subprocess.run(["scripts/docs.sh"], cwd=tmp_path, capture_output=True, text=True, timeout=600, check=False)
    said = done.stdout + done.stderr
    if "Failed to fetch" in said or ("No such file or directory" in said and "uv" in said):
        pytest.skip(f"NOT TESTED: MkDocs cannot be had here: {said[-300:]}")
    if wrong:
        assert done.returncode != 0
        assert says in said
    else:
        assert done.returncode == 0, said
        front = (tmp_path / "site/index.html").read_text()
        assert 'href="platforms/slurm.html"' in front  # the front page is README.md
        assert "unpkg" not in front  # who reads it fetches nothing from elsewhere
        assert len(list((tmp_path / "site").rglob("*.html"))) >= len(list((ROOT / "docs").rglob("*.md")))
