"""Parameters and sheet as the pipeline's head job checks them: the same messages as the command line gives."""

import csv
import json

import pytest
from cases import CASES, make_case
from cellquilt.core.settings import GROUPS, Settings, methods_of
from cellquilt.core.sheet import check_input
from runner import ROOT

pytestmark = pytest.mark.slow

_STAGES = sorted({stage for _, stages in GROUPS.values() for stage in stages})


def test_all_cases(nextflow, monkeypatch):
    cases, expected = [], {}
    for number, case in enumerate(CASES):
        folder = nextflow.folder / f"case{number}"
        expected[case["name"]] = make_case(case, folder)
        params = {"input": "sheet.csv", "outdir": "results", **case["params"]}
        cases.append({"name": case["name"], "folder": str(folder), "params": params})
    (nextflow.folder / "cases.json").write_text(json.dumps(cases))
    run = nextflow(
        "run", ROOT / "tests/pipeline/check_inputs", "-lib", ROOT / "lib",
        "--cases", "cases.json", "--repository", ROOT, "--output", "found.json",
    )  # fmt: skip
    assert run.code == 0, run.out + run.err
    found = {case["name"]: case for case in json.loads((nextflow.folder / "found.json").read_text())}
    for number, case in enumerate(CASES):
        assert found[case["name"]]["codes"] == case["codes"], case["name"]
        assert found[case["name"]]["lines"] == expected[case["name"]], case["name"]
        if not case["codes"]:
            monkeypatch.chdir(nextflow.folder / f"case{number}")
            rows, values = check_input("sheet.csv", case["params"])
            slides = found[case["name"]]["slides"]
            assert [slide["id"] for slide in slides] == [row.sample for row in rows]
            for row, slide in zip(rows, slides, strict=True):
                assert slide["metadata"] == row.metadata
                assert slide["methods"] == methods_of(Settings({**values, **row.overrides}))
                for stage in _STAGES:
                    ours = json.loads(Settings({**values, **row.overrides}).to_json(stage))
                    theirs = json.loads(slide["settings"][stage])
                    assert theirs == json.loads(slide["by_method"][slide["methods"][0]]["settings"][stage])
                    if stage == "domains_train" and ours["domains_checkpoints"]:
                        ours["domains_checkpoints"] = str(nextflow.folder / f"case{number}" / "state")
                    if stage == "convert":
                        ours |= {"technology": row.technology, "source": row.source}
                    if stage == "aggregate":
                        ours |= {"metadata": row.metadata}
                    assert theirs == ours, (case["name"], stage)
                    assert "'" not in slide["settings"][stage]


def test_mistakes_end_the_run_before_any_task(nextflow):
    (nextflow.folder / "sheet.csv").write_text("sample,technology,path\na b,ome_tiff,x.tif\n")
    run = nextflow.pipeline("--input", "sheet.csv", "--expand-um", "3", "--normalize", "feild")
    assert run.code == 1
    message = run.err[run.err.index("error: ") :]
    assert message.splitlines()[0] == "error: [input-invalid] The input has mistakes; nothing was started:"
    for part in ('"feild"', 'did you mean "expand_um"', 'sample "a b"', 'did you mean "ome_tif"', "path not found"):
        assert part in message
    assert "at " not in message.replace("at most", "")  # no stack trace
    assert run.trace == []


def test_help_lists_the_parameters(nextflow):
    run = nextflow("run", ROOT, "--help")
    assert run.code == 0
    assert "--expand_um" in run.out
    assert "--publish_dir_mode" not in run.out


#: Names that shells, globs and Nextflow's own escaping trip over.
_NAMES = [
    "plain.tif", "with space.tif", "semi;colon.tif", "$(touch PWNED).tif", "`touch PWNED`.tif", "$HOME.tif",
    "single'quote.tif", 'double"quote.tif', "-dash.tif", "--input", "é µ 細胞.tif", "[bracket].tif", "glob*.tif",
    "que?tion.tif", "{a,b}.tif", "a&b|c.tif", "back\\slash.tif", "#hash!.tif", "~.tif", "50%20.tif", " spaces ",
    "<in>.tif",
]  # fmt: skip


@pytest.mark.parametrize(("mode", "data"), [("symlink", "raw"), ("copy", "$HOME (data) {x,y} [1]")])
def test_any_path_is_staged_and_every_failure_named(nextflow, mode, data):
    data = nextflow.folder / data
    data.mkdir()
    contents = {f"s{number}": name for number, name in enumerate(_NAMES)}
    files = dict(contents)
    for number, name in enumerate(_NAMES):
        (data / name).write_text(contents[f"s{number}"])
        (data / name.replace("*", "X").replace("?", "Y")).write_text(name)  # what a glob would find too
    for sample in ("mistaken", "killed", "unlucky", "broken"):
        files[sample] = sample
        (data / sample).write_text(sample)
    with (nextflow.folder / "sheet.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["sample", "technology", "path"])
        table.writerows([sample, "ome_tif", f"{data.name}/{name}"] for sample, name in files.items())
    run = nextflow(
        "run", ROOT / "tests/pipeline/stage_inputs", "-lib", ROOT / "lib", "-process.stageInMode", mode,
        "--input", "sheet.csv", "--outdir", "results", "--repository", ROOT,
    )  # fmt: skip
    results = nextflow.folder / "results"
    for sample, content in {**contents, "unlucky": "unlucky"}.items():
        assert (results / sample / "content.txt").read_text() == content, (content, run.out, run.err)
        settings = json.loads((results / sample / "settings.json").read_text())
        assert settings["source"] == f"{data.name}/{files[sample]}"
    assert not list(nextflow.folder.rglob("PWNED"))

    assert run.code != 0
    assert f"cellquilt: {len(_NAMES) + 1} of {len(files)} samples done" in run.out
    with (results / "samples.tsv").open(newline="") as file:
        rows = {row["sample"]: row for row in csv.DictReader(file, delimiter="\t")}
    assert list(rows) == list(files)
    rows = {sample: row for sample, row in rows.items() if row["status"] != "done"}
    assert {sample: row["error"] for sample, row in rows.items()} == {
        "mistaken": "no-image", "killed": "task-killed", "broken": "task-killed"
    }  # fmt: skip
    assert {row["status"] for row in rows.values()} == {"failed"}
    assert {row["stage"] for row in rows.values()} == {"CONVERT"}
    assert rows["mistaken"]["cause"] == "no image in …/slide.tif"
    assert rows["mistaken"]["hint"] == "look there"
    assert "137" in rows["killed"]["cause"]
    assert "139" in rows["broken"]["cause"]
    assert (nextflow.folder / rows["broken"]["log"]).read_text() == "Segmentation fault\n"
    assert str(nextflow.folder) not in (results / "samples.tsv").read_text()
