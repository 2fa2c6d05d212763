"""The command line: instant, lazy, and with messages instead of tracebacks."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cellquilt.cli import _VERBS, main
from cellquilt.core.settings import METHODS, SETTINGS

HEAVY = (
    "spatialdata",
    "pandas",
    "anndata",
    "dask",
    "scipy",
    "skimage",
    "matplotlib",
    "torch",
    "numba",
    "zarr",
    "pyarrow",
)


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cellquilt", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )


def in_process(capsys, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


def test_help_lists_every_verb_and_loads_nothing_heavy():
    code = (
        "import sys, cellquilt.cli\n"
        "try: cellquilt.cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    for verb in _VERBS:
        assert verb in done.stdout


def test_help_is_instant():
    """Less than 0.3 s of CPU, of which Python's own start is a part."""
    before = os.times()
    assert run("--help").returncode == 0
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    assert used < 0.3


@pytest.mark.parametrize("verb", sorted(set(_VERBS) - {"patchify", "segment", "demo"}))
def test_every_verb_explains_itself(capsys, verb):
    code, out, _ = in_process(capsys, verb, "--help")
    assert code == 0
    assert "Usage:" in out


def test_segment_has_a_command_a_method(capsys):
    for method in METHODS:
        if method != "vendor":
            code, out, _ = in_process(capsys, "segment", method, "--help")
            assert code == 0
            for setting in SETTINGS:
                if setting.group == method:
                    assert f"--{setting.api_name.replace('_', '-')}" in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["convrt"], 'did you mean "convert"?'),
        (["resolve", "--expnd-um", "3", "x.zarr"], "--expand-um"),
        (["tissue", "nowhere.zarr"], "nowhere.zarr does not exist"),
        (["resolve", "x.zarr", "--expand-um", "wide"], "expected a number"),
        (["resolve", "x.zarr", "--settings", "{"], "not JSON"),
        (["resolve", "x.zarr", "--settings", '{"expnd_um": 3}'], 'did you mean "expand_um"?'),
        (["segment", "celpose", "x"], "celpose"),
        (["check", "sheet.csv", "expand_um"], "NAME=VALUE"),
    ],
)
def test_mistakes_are_messages_not_tracebacks(capsys, tmp_path, monkeypatch, arguments, says):
    monkeypatch.chdir(tmp_path)
    code, _, err = in_process(capsys, *arguments)
    assert code in (1, 2)
    assert err.startswith("error: [")
    assert says in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_a_task_tells_the_head_job_its_cause(tmp_path):
    script = Path(__file__).parents[2] / "bin" / "tissue.py"
    done = subprocess.run(
        [sys.executable, script, "nowhere.zarr", "--output", "x.zarr"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 1
    line = done.stderr.splitlines()[-1]
    assert line.startswith("CELLQUILT_ERROR ")
    assert json.loads(line.removeprefix("CELLQUILT_ERROR "))["code"] == "store-missing"


@pytest.mark.parametrize(
    "refusal",
    [
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        ImportError("libssl.so.3: failed to map segment from shared object"),
    ],
    ids=["Python", "the system", "the loader"],
)
def test_out_of_memory_exits_so_that_it_is_tried_again(capsys, monkeypatch, refusal):
    def explode(**_):
        raise refusal

    monkeypatch.setattr("cellquilt.segment.stages.find_tissue", explode)
    code, _, err = in_process(capsys, "tissue", "x.zarr")
    assert code == 137
    assert "out-of-memory" in err


def test_every_entry_script_is_a_verb_and_executable():
    scripts = sorted((Path(__file__).parents[2] / "bin").glob("*.py"))
    assert len(scripts) >= 9
    for script in scripts:
        assert os.access(script, os.X_OK)
        assert len(script.read_text().splitlines()) <= 15
        assert script.stem.partition("_")[0] in _VERBS  # patchify_transcripts: a verb and its kind
