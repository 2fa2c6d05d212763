"""The sample sheet and parameters as the command line checks them; tests/pipeline/test_inputs.py has the other door."""

import pytest
from cases import CASES, make_case
from cellquilt.core.errors import SeveralErrors
from cellquilt.core.sheet import check_input, check_params, read_sheet
from hypothesis import given
from hypothesis import strategies as st


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.get("only") != "pipeline"], ids=lambda case: case["name"]
)
def test_case(case, tmp_path, monkeypatch):
    lines = make_case(case, tmp_path)
    monkeypatch.chdir(tmp_path)
    if not case["codes"]:
        rows, _ = check_input("sheet.csv", case["params"])
        assert rows
        return
    with pytest.raises(SeveralErrors) as caught:
        check_input("sheet.csv", case["params"])
    assert [error.code for error in caught.value.errors] == case["codes"]
    assert str(caught.value).split("\n  - ")[1:] == lines


def test_rows_hold_paths_overrides_and_metadata(tmp_path):
    (tmp_path / "slide 1.tif").touch()
    sheet = tmp_path / "sheet.tsv"
    sheet.write_text(
        "\ufeffsample\ttechnology\tpath\texpand-um\tpatch_width\tdonor\r\na\tome_tif\tslide 1.tif\t3\t\t Jo \r\n"
    )
    (row,) = read_sheet(sheet)
    assert (row.sample, row.technology, row.source) == ("a", "ome_tif", "slide 1.tif")
    assert row.path == tmp_path / "slide 1.tif"
    assert row.transcripts is None
    assert row.overrides == {"expand_um": 3.0}
    assert row.metadata == {"donor": "Jo"}


def test_a_metadata_column_that_is_nearly_a_parameter_is_pointed_out(tmp_path, caplog):
    (tmp_path / "x.tif").touch()
    sheet = tmp_path / "sheet.csv"
    sheet.write_text("sample,technology,path,expandum\na,ome_tif,x.tif,3\n")
    assert read_sheet(sheet)[0].metadata == {"expandum": "3"}
    assert 'the parameter is called "expand_um"' in caplog.text


def test_parameters_come_back_typed():
    assert check_params({"expand_um": "3", "seed": 1}) == {"expand_um": 3.0, "seed": 1}


def _quoted(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'


@given(st.lists(st.text(st.characters(exclude_characters="\0\r", exclude_categories=["Cs"])), min_size=1, max_size=4))
def test_any_metadata_survives_quoting(tmp_path_factory, values):
    folder = tmp_path_factory.mktemp("sheet")
    (folder / "x").touch()
    header = ",".join(["sample", "technology", "path", *(f"about{i}" for i in range(len(values)))])
    (folder / "sheet.csv").write_bytes(f"{header}\na,ome_tif,x,{','.join(map(_quoted, values))}\n".encode())
    (row,) = read_sheet(folder / "sheet.csv")
    assert list(row.metadata.values()) == [value.strip() for value in values]
