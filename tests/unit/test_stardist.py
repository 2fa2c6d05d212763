"""StarDist without its library: what is planned, which pixels a patch brings, and every mistake about a model."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from cellquilt.cli import main
from cellquilt.core.errors import CellquiltError, SeveralErrors
from cellquilt.core.settings import Settings
from cellquilt.patches.grid import Lattice, grid_of_windows, make_grid
from cellquilt.patches.normalize import estimate_normalization
from cellquilt.segment import engine, stardist
from cellquilt.segment.arrays import ArrayImage
from cellquilt.segment.run import make_image_patches, segment_bundle
from hypothesis import given, settings
from hypothesis import strategies as st
from test_normalize import nuclei

CONFIG = {
    "n_dim": 2, "axes": "YXC", "n_channel_in": 1, "n_rays": 32, "grid": [2, 2], "backbone": "unet",
    "unet_n_depth": 3, "unet_kernel_size": [3, 3], "unet_n_filter_base": 32, "unet_n_conv_per_depth": 2,
    "unet_pool": [2, 2], "net_conv_after_unet": 128,
}  # fmt: skip


def slide(side=400, *, colours=False):
    image, _ = nuclei(side, spacing=24)
    if colours:
        tissue = np.clip(235 - image / 6, 0, 255)
        return ArrayImage(np.stack([tissue, tissue * 0.8, tissue * 0.9]).astype(np.uint8), ["R", "G", "B"], 0.5)
    return ArrayImage(np.stack([np.zeros_like(image), image]), ["PolyT", "DAPI"], 0.5)


def model(folder: Path, *, thresholds: object = None, weights=("weights_best.h5",), own=None, **config) -> Path:
    """A model's folder as StarDist writes it, its weights being no weights."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    for name in weights:
        (folder / name).write_bytes(b"no weights")
    if thresholds is not None:
        (folder / "thresholds.json").write_text(thresholds if isinstance(thresholds, str) else json.dumps(thresholds))
    if own:
        (folder / "cellquilt.json").write_text(json.dumps(own))
    return folder


# --- planning


def test_the_shipped_model_is_planned_at_the_scale_of_its_nuclei():
    image = slide(800)
    plan = engine.plan("stardist", image)
    shipped = stardist.describe("nuclei")
    assert plan.channels == ("DAPI",)  # the nuclear stain, not the first channel
    assert (plan.nuclear, plan.joint, plan.facts["diameter_from"]) == (True, False, "estimate")
    assert abs(plan.diameter_px - 12) < 2
    assert plan.lattice.rescale == pytest.approx(shipped.diameter_px / plan.diameter_px)
    assert plan.lattice.reach * plan.lattice.rescale > shipped.reach + shipped.multiple
    fixed = engine.plan("stardist", image, {"stardist_diameter_um": 5.0})
    assert (fixed.diameter_px, fixed.lattice.rescale, fixed.facts) == (10.0, 2.0, {"diameter_from": "setting"})
    assert engine.plan("stardist", image, {"stardist_scale": 1.5}).lattice.rescale == 1.5
    assert sum(path.stat().st_size for path in stardist.SHIPPED_FOLDER.iterdir()) < 3e6


def test_a_model_of_unknown_scale_sees_the_pixels_as_they_are(tmp_path):
    image = slide()
    plan = engine.plan("stardist", image, {"stardist_model_type": str(model(tmp_path / "mine"))})
    assert (plan.lattice.rescale, plan.diameter_px, plan.settings["model"]) == (1.0, 18.0, "mine")
    assert plan.nuclear  # by the name of the stain
    by_name = engine.plan("stardist", image, {"stardist_model_type": "2D_versatile_fluo"})
    assert (by_name.lattice, by_name.nuclear) == (plan.lattice, True)
    cells = engine.plan("stardist", image, {"stardist_model_type": str(tmp_path / "mine"), "stardist_channels": ["0"]})
    assert (cells.channels, cells.nuclear) == (("PolyT",), False)


def test_a_model_for_colours_takes_all_three_and_normalises_them_together(tmp_path):
    folder = model(tmp_path / "he", n_channel_in=3)
    for name in (str(folder), "2D_versatile_he"):
        plan = engine.plan("stardist", slide(colours=True), {"stardist_model_type": name})
        assert (plan.channels, plan.joint, plan.nuclear) == (("R", "G", "B"), True, True)
    picked = engine.plan(
        "stardist", slide(colours=True), {"stardist_model_type": str(folder), "stardist_channels": ["B", "G", "R"]}
    )
    assert picked.channels == ("B", "G", "R")


def test_colours_keep_their_ratios():
    image = slide(colours=True)
    for mode in ("field", "global"):
        together = estimate_normalization(image, image.channels, mode=mode, joint=True)
        assert np.array_equal(together.low[0], together.low[1])
        assert np.array_equal(together.high[0], together.high[2])
        alone = estimate_normalization(image, image.channels, mode=mode)
        assert not np.array_equal(alone.high[0], alone.high[1])
        assert (together.low[0] <= alone.low.min(axis=0) + 2).all()
        assert (together.high[0] >= alone.high.max(axis=0) - 10).all()
        values = together.apply(image.pixels, 0, 0)
        spread = values.max(axis=0) - values.min(axis=0)
        assert np.corrcoef(spread.ravel(), np.ptp(image.pixels.astype(float), axis=0).ravel())[0, 1] > 0.99


# --- which pixels a patch brings


@given(st.integers(200, 3000), st.integers(64, 700), st.integers(0, 200), st.integers(0, 300))
@settings(max_examples=50, deadline=None)
def test_a_patch_brings_all_that_its_window_depends_on(length, width, overlap, reach):
    grid = make_grid((length, 100), width_px=width, overlap_px=overlap, lattice=Lattice(reach=reach))
    for patch in grid.patches:
        start, stop = patch.y.start, patch.y.stop
        assert (patch.y.context0, patch.y.context1) == (max(start - reach, 0), min(stop + reach, length))
        (alone,) = grid_of_windows((length, 100), [patch.core], lattice=Lattice(reach=reach)).patches
        assert (alone.y.context0, alone.y.context1) == (
            max(alone.y.start - reach, 0),
            min(alone.y.stop + reach, length),
        )


@given(
    st.integers(50, 5000),
    st.floats(0.2, 5),
    st.integers(0, 4000),
    st.integers(1, 1000),
    st.sampled_from([8, 16]),
    st.integers(1, 130),
)
@settings(max_examples=200, deadline=None)
def test_network_pixels_lie_on_the_slides_lattice_and_reach_far_enough(length, scale, start, size, multiple, reach):
    start = min(start, length - 1)
    stop = min(start + size, length)
    axis = stardist.network_axis(length, scale)
    around = stardist.reach_px(reach, multiple, axis.resized / length)
    context = max(start - around, 0), min(stop + around, length)
    first, last = stardist.network_span(axis, *context, multiple)
    assert first % multiple == 0
    assert 0 <= first < last <= axis.resized
    # What interpolation reads lies in the context, or the slide ends there.
    read = 0.0 if axis.step == 1 else max(1.0, axis.step)
    assert first == 0 or axis.position(first) - read >= context[0] - 1e-9
    assert last == axis.resized or axis.position(last - 1) + read <= context[1] - 1 + 1e-9
    # All network pixels that the window's depend on are there.
    wanted = (start + 0.5) / axis.step - 0.5 - reach, (stop - 0.5) / axis.step - 0.5 + reach
    assert first <= max(wanted[0], 0)
    assert last - 1 >= min(wanted[1], axis.resized - 1) - 1e-9


def dependence(depth, kernel, convolutions, pool, grid, last, size=1024):
    """How far a result of the network depends on its input, by passing a mark through its layers along one axis."""

    def convolve(marks, times):
        for _ in range(times):
            marks = np.convolve(marks, np.ones(kernel), mode="same") > 0
        return marks

    def network(marks):
        step = 1
        while step < grid:
            marks = convolve(marks, convolutions).reshape(-1, 2).any(axis=1)
            step *= 2
        skipped = []
        for _ in range(depth):
            marks = convolve(marks, convolutions)
            skipped.append(marks)
            marks = marks.reshape(-1, pool).any(axis=1)
        marks = convolve(marks, convolutions)
        for before in reversed(skipped):
            marks = convolve(np.repeat(marks, pool) | before, convolutions)
        return np.repeat(convolve(marks, int(last)), grid)

    far = 0
    for at in range(size // 2, size // 2 + pool**depth * grid):
        marks = np.zeros(size, bool)
        marks[at] = True
        hit = np.flatnonzero(network(marks))
        far = max(far, at - hit[0], hit[-1] - at)
    return far


@pytest.mark.parametrize(
    ("depth", "kernel", "convolutions", "pool", "grid", "last"),
    [
        (3, 3, 2, 2, 2, True),
        (3, 3, 2, 2, 1, False),
        (2, 3, 2, 2, 4, True),
        (2, 5, 1, 2, 2, True),
        (1, 3, 3, 4, 2, True),
    ],
)
def test_the_reach_is_that_of_the_network(depth, kernel, convolutions, pool, grid, last):
    found = stardist._reach(depth=depth, kernel=kernel, convolutions=convolutions, pool=pool, grid=grid, last=last)
    true = dependence(depth, kernel, convolutions, pool, grid, last)
    assert true <= found <= 1.25 * true + 4


# --- mistakes


def refused(name: object, image=None, **values) -> CellquiltError:
    with pytest.raises(CellquiltError) as caught:
        engine.plan("stardist", image or slide(), {"stardist_model_type": str(name), **values})
    return caught.value


def test_a_model_that_is_not_there_is_named_with_what_to_give(tmp_path):
    wrong = refused("2D_versatile_flou")
    assert wrong.code == "stardist-model-unknown"
    assert 'did you mean "2D_versatile_fluo"?' in wrong.hint
    assert "thresholds.json" in wrong.hint
    missing = refused(tmp_path / "nowhere")
    assert (missing.code, "nowhere" in missing.message) == ("weights-missing", True)
    (tmp_path / "empty").mkdir()
    assert "config.json" in refused(tmp_path / "empty").message
    without = refused(model(tmp_path / "without", weights=()))
    assert (without.code, "no weights (.h5)" in without.message) == ("weights-missing", True)
    (tmp_path / "model.zip").write_bytes(b"")
    assert "unpack" in refused(tmp_path / "model.zip").hint


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"n_dim": 3}, "n_dim 3"),
        ({"backbone": "resnet"}, "backbone resnet"),
        ({"grid": "2,2"}, "cannot be used"),
        ({"n_channel_in": "many"}, "many"),
    ],
)
def test_a_model_of_another_kind_is_refused(tmp_path, config, says):
    error = refused(model(tmp_path / "odd", **config))
    assert error.code == "weights-unreadable"
    assert says in error.message


def test_a_config_that_is_no_stardists_is_refused(tmp_path):
    folder = model(tmp_path / "care")
    (folder / "config.json").write_text(json.dumps({key: value for key, value in CONFIG.items() if key != "n_rays"}))
    assert "no n_rays" in refused(folder).message
    for text in ("{", "[1]"):
        (folder / "config.json").write_text(text)
        assert refused(folder).code == "weights-unreadable"


@pytest.mark.parametrize(
    "thresholds",
    ["{", "[]", {"prob": 0.5}, {"prob": 1.5, "nms": 0.3}, {"prob": "0.5", "nms": 0.3}, {"prob": 0.5, "nms": 0}],
)
def test_thresholds_that_stardist_would_replace_in_silence_are_refused(tmp_path, thresholds):
    error = refused(model(tmp_path / "m", thresholds=thresholds))
    assert (error.code, "thresholds.json" in error.message) == ("weights-unreadable", True)


def test_thresholds_are_the_models_own(tmp_path):
    assert stardist.describe(str(model(tmp_path / "a"))).thresholds == {"prob": 0.5, "nms": 0.4}
    own = stardist.describe(str(model(tmp_path / "b", thresholds={"prob": 0.6, "nms": 0.2, "other": None})))
    assert own.thresholds == {"prob": 0.6, "nms": 0.2}
    for name in ("stardist_prob_thresh", "stardist_nms_thresh"):
        with pytest.raises(SeveralErrors, match=name):
            Settings({name: 1.2})


def test_which_weights_are_used_does_not_hang_on_dates(tmp_path):
    both = model(tmp_path / "both", weights=("weights_best.h5", "weights_last.h5"))
    assert stardist.weights_of(both).name == "weights_best.h5"
    several = model(tmp_path / "several", weights=("a_best.h5", "b_best.h5"))
    assert "a_best.h5, b_best.h5" in refused(several).message


@pytest.mark.parametrize(
    ("channels", "colours", "n_channel_in", "says"),
    [
        (["DAPI", "PolyT"], False, 1, "takes 1 channel, got DAPI, PolyT"),
        (None, False, 3, "takes 3 channels, got DAPI of an image with PolyT, DAPI"),
        (["R"], True, 3, "takes 3 channels, got R of an image with R, G, B"),
        (["CD3"], False, 1, "no channel 'CD3'"),
    ],
)
def test_another_number_of_channels_than_the_model_takes(tmp_path, channels, colours, n_channel_in, says):
    folder = model(tmp_path / "m", n_channel_in=n_channel_in)
    error = refused(folder, slide(colours=colours), stardist_channels=channels)
    assert error.code in ("stardist-channels", "channel-missing")
    assert says in error.message


def test_an_environment_without_stardist_is_named(tmp_path, capsys):
    image = slide()
    _, _, (bundle, *_) = make_image_patches(image, tmp_path / "bundles", method="stardist", settings={})
    with pytest.raises(CellquiltError) as caught:
        segment_bundle(bundle, tmp_path / "cells.parquet")
    assert caught.value.code == "engine-missing"
    assert "make setup STAGES=stardist" in caught.value.hint
    with pytest.raises(SystemExit) as stop:
        main(["segment", "stardist", str(bundle), "-o", str(tmp_path / "cells.parquet")])
    assert stop.value.code == 1
    assert "engine-missing" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["download-weights", "2D_versatile_he"])
    assert "StarDist is not installed" in capsys.readouterr().err


def test_a_model_given_by_path_is_found_by_whoever_segments(tmp_path, monkeypatch):
    """A bundle has the model's name only: where it is, the settings of whoever segments say, or its task's input."""
    monkeypatch.chdir(tmp_path)
    values = {"stardist_model_type": str(model(tmp_path / "folder" / "mine"))}
    _, _, (bundle, *_) = make_image_patches(slide(), tmp_path / "bundles", method="stardist", settings=values)
    seen = []

    def load(_, loaded):
        seen.append(loaded.engine["model"])
        raise CellquiltError("stop", "here")

    monkeypatch.setattr(engine, "load", load)
    for weights, given_settings in ((None, values), (tmp_path / "weights" / "mine", values), (None, {})):
        with pytest.raises(CellquiltError, match="here"):
            segment_bundle(bundle, tmp_path / "x.parquet", settings=given_settings, weights=weights)
    assert seen == [str(tmp_path / "folder" / "mine"), str(tmp_path / "weights" / "mine"), "mine"]
    assert engine.with_model({}, "stardist", Path("m")) == {"stardist_model_type": "m"}
    assert engine.with_model({}, "generic", Path("m")) == engine.with_model({}, "cellpose", None) == {}


def test_importing_the_method_does_not_import_its_engine():
    code = (
        "import sys, cellquilt.segment.stardist;"
        "heavy = {'tensorflow', 'keras', 'stardist', 'skimage', 'pandas', 'zarr'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_sopas_names_are_understood():
    assert Settings(local_model="a/b")["stardist_model_type"] == "a/b"
    assert Settings(stardist_model="2D_versatile_he")["stardist_model_type"] == "2D_versatile_he"
    assert Settings(segmentation="stardist,proseg").of_stage("segment")["segmentation"] == "stardist"
