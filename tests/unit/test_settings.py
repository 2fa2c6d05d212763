"""The table of settings, and everything that is generated from it or must agree with it."""

import inspect
import json

import pytest
from cellquilt.core.errors import CellquiltError, SeveralErrors
from cellquilt.core.schema import generated_files, pipeline_schema
from cellquilt.core.settings import BY_NAME, GROUPS, PRESETS, SETTINGS, Settings, check, of_stage, resolve_name
from conftest import ROOT


@pytest.mark.parametrize("name", generated_files())
def test_generated_files_are_up_to_date(name):
    assert (ROOT / name).read_text(encoding="utf-8") == generated_files()[name], "run `make generate`"


def test_names_are_unique_and_groups_known():
    names = [name for setting in SETTINGS for name in (setting.name, *setting.aliases)]
    assert len(names) == len(set(names))
    assert {setting.group for setting in SETTINGS} == set(GROUPS)
    for group in GROUPS:
        keywords = [setting.api_name for setting in SETTINGS if setting.group == group]
        assert len(keywords) == len(set(keywords))


def test_defaults_pass_their_own_checks():
    for setting in SETTINGS:
        assert check(setting, setting.default) == setting.default


def test_presets_hold_good_values_that_give_way_to_the_users():
    assert BY_NAME["preset"].choices == tuple(PRESETS)
    for name, values in PRESETS.items():
        chosen = Settings(preset=name)
        for key, value in values.items():
            assert BY_NAME[key].per_sample
            assert check(BY_NAME[key], value) == value == chosen[key]
    chosen = Settings({"z": "3", "preset": "merscope"})
    assert (chosen["z"], chosen["min_transcripts"], chosen["preset"]) == ("3", 10, "merscope")
    assert chosen.of_stage("convert")["z"] == "3"
    assert chosen.of_stage("aggregate")["min_transcripts"] == 10
    # A default that the user gives is the user's.
    assert Settings(preset="merscope", z="max")["z"] == "max"
    assert Settings({**chosen.given, "segmentation": "vendor"})["min_transcripts"] == 10


def test_schema_holds_every_setting_once():
    properties = [name for group in pipeline_schema()["$defs"].values() for name in group["properties"]]
    assert sorted(properties) == sorted(BY_NAME)


def test_schema_and_manifest_say_the_same():
    """nf-core's tools compare them."""
    manifest = (ROOT / "nextflow.config").read_text()
    assert f"description     = '{pipeline_schema()['description']}'" in manifest
    assert "name            = 'cellquilt'" in manifest


@pytest.mark.parametrize(
    ("name", "value", "typed"),
    [
        ("expand_um", "3", 3.0),
        ("patch_width", "512", 512),
        ("cellpose-diameter", "35", 35.0),
        ("cellpose_channels", "DAPI, PolyT", ["DAPI", "PolyT"]),
        ("drop_failed", "true", True),
        ("z", 3, "3"),
    ],
)
def test_values_are_typed_and_names_understood(name, value, typed):
    assert Settings({name: value})[resolve_name(name)] == typed


@pytest.mark.parametrize(
    ("name", "value", "code", "says"),
    [
        ("expand_um", "wide", "parameter-type", '"wide"'),
        ("expand_um", -1, "parameter-range", "at least 0"),
        ("expand_um", "nan", "parameter-type", "nan"),
        ("seed", "inf", "parameter-type", "inf"),
        ("patches_per_task", 1.5, "parameter-type", "a whole number"),
        ("segmentation", "celpose", "parameter-choice", 'did you mean "cellpose"?'),
        ("expnd_um", 3, "parameter-unknown", 'did you mean "expand_um"?'),
        ("z", "top", "parameter-choice", '"top"'),
        ("preset", "xenum", "parameter-choice", 'did you mean "xenium"?'),
        ("drop_failed", "maybe", "parameter-type", "true or false"),
    ],
)
def test_mistakes_are_named(name, value, code, says):
    with pytest.raises(SeveralErrors) as caught:
        Settings({name: value})
    assert [error.code for error in caught.value.errors] == [code]
    assert says in str(caught.value)


def test_all_mistakes_come_in_one_message():
    with pytest.raises(SeveralErrors) as caught:
        Settings({"expand_um": "x", "z": "top", "nothing": 1})
    assert len(caught.value.errors) == 3


def test_settings_of_a_stage_do_not_depend_on_other_stages():
    base = Settings()
    changed = Settings(expand_um=9, min_transcripts=3)
    for stage in ("convert", "tissue", "patchify", "segment"):
        assert base.to_json(stage) == changed.to_json(stage)
    assert base.to_json("resolve") != changed.to_json("resolve")


def test_json_is_safe_between_single_quotes():
    text = Settings(gene_column="it's").to_json("convert")
    assert "'" not in text
    assert json.loads(text)["gene_column"] == "it's"


def test_every_stage_is_handed_settings():
    for stage in ("convert", "tissue", "patchify", "segment", "resolve", "aggregate", "report"):
        assert of_stage(stage)


@pytest.mark.parametrize(
    ("group", "path"),
    [
        ("cellpose", "segmentation.cellpose"),
        ("generic", "segmentation.generic"),
        ("stardist", "segmentation.stardist"),
        ("baysor", "segmentation.baysor"),
        ("proseg", "segmentation.proseg"),
        ("tissue", "segmentation.tissue"),
    ],
)
def test_api_takes_every_setting_of_its_group(group, path):
    """Keywords of the API are the table's; a default of None leaves the choice to the table."""
    import cellquilt

    module, name = path.split(".")
    parameters = inspect.signature(getattr(getattr(cellquilt, module), name)).parameters
    for setting in SETTINGS:
        if setting.group == group:
            assert setting.api_name in parameters, f"{path} lacks {setting.api_name}"
            if setting.name != "generic_function":
                assert parameters[setting.api_name].default is None


def test_unknown_setting_of_an_object_is_an_error():
    with pytest.raises(CellquiltError, match="unknown parameter"):
        resolve_name("colour")


def test_each_stage_of_a_chain_has_its_own_method():
    chain = Settings(segmentation="cellpose,proseg")
    assert chain.of_stage("segment")["segmentation"] == "cellpose"
    assert chain.of_stage("resolve_transcripts")["segmentation"] == "proseg"
    assert Settings(segmentation="baysor").of_stage("resolve")["segmentation"] is None
    for wrong in ("proseg,cellpose", "cellpose,generic", "cellpose, proseg", "cellpose,proseg,baysor", ""):
        with pytest.raises(SeveralErrors, match="segmentation is"):
            Settings(segmentation=wrong)
