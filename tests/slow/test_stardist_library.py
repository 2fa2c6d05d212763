"""StarDist with the real library: its own result on a whole slide, the same cells in patches, colours, bad models.

Runs in the environment that ``CELLQUILT_STARDIST_PYTHON`` or ``.venv/stardist`` names.
"""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import shapely
from cellquilt.core.shapes import read_geoparquet
from cellquilt.resolve.choose import Windows, resolve_cells
from cellquilt.segment import stardist
from cellquilt.segment.arrays import ArrayImage
from cellquilt.segment.run import make_image_patches
from test_seams import make_sample, matches

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
TRAINING = ROOT / "python" / "training"
PYTHON = Path(os.environ.get("CELLQUILT_STARDIST_PYTHON") or ROOT / ".venv" / "stardist" / "bin" / "python")


@pytest.fixture(scope="module", autouse=True)
def _there_is_stardist():
    if not PYTHON.exists():
        pytest.skip("no environment with StarDist: make setup STAGES=stardist")


def run_there(script: str, *arguments, **environment: str) -> dict:
    """The last line that a script prints, in StarDist's environment, as JSON."""
    done = subprocess.run(
        [str(PYTHON), "-c", script, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT / "python" / "src"), **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# --- the library's own result

_WHOLE = """
import json, sys
import numpy as np
from cellquilt.patches.bundle import PatchPixels
from cellquilt.patches.grid import make_grid
from cellquilt.patches.normalize import estimate_normalization
from cellquilt.segment import stardist
from cellquilt.segment.arrays import ArrayImage, MemoryBundle
from stardist.data import test_image_nuclei_2d
from stardist.models import StarDist2D

folder = sys.argv[1]
image, mask = test_image_nuclei_2d(return_mask=True)
np.save(folder + "/image.npy", image)
np.save(folder + "/mask.npy", np.unique(mask, return_inverse=True)[1].reshape(mask.shape))
whole_image = image
image = image[:500, :431]  # of no multiple of the network's steps
slide = ArrayImage(image[None], ["DAPI"], 0.4)
normalization = estimate_normalization(slide, ["DAPI"])
model = StarDist2D(None, name="stardist_nuclei", basedir=str(stardist.SHIPPED_FOLDER.parent))
bare, details = model.predict_instances(normalization.apply(slide.pixels, 0, 0)[0])


class Parts(MemoryBundle):
    def __iter__(self):
        for patch in self.patches:
            y0, y1, x0, x1 = patch.context
            yield PatchPixels(patch, self.pixels[:, y0:y1, x0:x1])


def segment(width=0, **settings):
    plan = stardist.plan(slide, {"stardist_scale": 1.0, "stardist_diameter_px": 24, "threads": 1, **settings})
    grid = make_grid(image.shape, width_px=width, overlap_px=96, lattice=plan.lattice)
    bundle = Parts(slide.pixels, image.shape, list(grid.patches), plan.lattice, normalization)
    segmenter = stardist.StarDistSegmenter(plan.settings)
    results = list(segmenter.segment(bundle))
    for result in results:
        if result.error:
            raise result.error
    return segmenter, results


def small(height, width, scale):
    pixels = whole_image[None, :height, :width]
    tiny = ArrayImage(pixels, ["DAPI"], 0.4)
    plan = stardist.plan(tiny, {"stardist_scale": scale, "stardist_diameter_px": 24, "threads": 1})
    (patch,) = make_grid((height, width), width_px=0, lattice=plan.lattice).patches
    bundle = MemoryBundle(pixels, (height, width), [patch], plan.lattice, normalization)
    (result,) = stardist.StarDistSegmenter(plan.settings).segment(bundle)
    if result.error:
        raise result.error
    return result.labels.shape == (height, width)


segmenter, (ours,) = segment()
again = segment()[1][0].labels
in_tiles = segment(memory_mb=20)[1][0].labels  # the library's tiles of 256 pixels
strict, few = segment(stardist_prob_thresh=0.9), segment(stardist_nms_thresh=0.01)
same, total = 0, 0
for part in segment(200)[1]:
    y0, y1, x0, x1 = part.patch.window
    same += int(((part.labels > 0) == (bare[y0:y1, x0:x1] > 0)).sum())
    total += part.labels.size
print(json.dumps({
    "bare": len(details["prob"]), "ours": len(np.unique(ours.labels)) - 1,
    "equal": bool((ours.labels == bare).all()), "again": bool((again == bare).all()),
    "in_tiles": float(((in_tiles > 0) == (bare > 0)).mean()), "patches": total / image.size, "same": same / total,
    "strict": len(np.unique(strict[1][0].labels)) - 1, "facts": segmenter.facts, "strict_facts": strict[0].facts,
    "few": len(np.unique(few[1][0].labels)) - 1,
    "small": [small(*shape) for shape in ((1, 1, 1.0), (1, 1, 0.3), (3, 40, 1.0), (17, 5, 2.7))],
}))
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("micrograph")
    return folder, run_there(_WHOLE, folder)


def test_a_whole_slide_is_what_the_library_gives(whole):
    found = whole[1]
    assert found["bare"] > 80
    assert found["equal"]
    assert found["ours"] >= 0.98 * found["bare"]  # some are hidden below others
    assert found["again"]


def test_patches_and_tiles_change_no_pixel_but_by_rounding(whole):
    found = whole[1]
    assert found["patches"] > 1.5
    assert found["same"] > 0.9999
    assert found["in_tiles"] > 0.9999


def test_the_smallest_slides_are_segmented(whole):
    assert whole[1]["small"] == [True] * 4


def test_thresholds_are_passed_on_and_recorded(whole):
    found = whole[1]
    own = json.loads((stardist.SHIPPED_FOLDER / "thresholds.json").read_text())
    facts = found["facts"]
    assert (facts["prob_thresh"], facts["nms_thresh"]) == (own["prob"], own["nms"])
    assert found["strict_facts"]["prob_thresh"] == 0.9
    assert found["strict"] < found["ours"]
    assert found["few"] <= found["ours"]
    weights = stardist.weights_of(stardist.SHIPPED_FOLDER)
    assert facts["weights_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert (facts["device"], facts["threads"]) == ("cpu", 1)


# --- patches resolved

_BUNDLES = """
import json, sys
from pathlib import Path
from cellquilt.segment.run import segment_bundle
for bundle, output, weights in json.loads(sys.argv[1]):
    segment_bundle(Path(bundle), Path(output), settings={"threads": 1}, weights=Path(weights) if weights else None)
print("{}")
"""


def cut(slide: ArrayImage, folder: Path, width: int, **settings):
    """Patches of a slide: its grid, and (bundle, result, model) to segment."""
    values = {"patch_width_px": width, "patches_per_task": 16, **settings}
    grid, _, bundles = make_image_patches(slide, folder, method="stardist", settings=values)
    return grid, [(str(path), f"{path}.parquet", settings.get("stardist_model_type", "")) for path in bundles]


def resolved(grid, jobs) -> np.ndarray:
    parts = [read_geoparquet(path) for _, path, _ in jobs]
    windows = Windows.of([patch for part in parts for patch in part[2]["patches"]], grid.shape)
    columns = {
        name: np.concatenate([part[1][name].to_numpy() for part in parts]) for name in ("patch", "cut", "depth_px")
    }
    geometry = np.concatenate([part[0] for part in parts])
    return resolve_cells(
        geometry, columns["patch"], columns["cut"], columns["depth_px"], windows=windows
    ).geometry  # fmt: skip


def average_precision(found: np.ndarray, truth: np.ndarray) -> float:
    hit = int(matches(truth, found, 0.5)[0].sum())
    return hit / (len(truth) + len(found) - hit)


@pytest.fixture(scope="module")
def cells(whole, tmp_path_factory):
    """Cells of the micrograph in one patch and in patches, and of a slide in colours, by name → (n,) polygons."""
    folder = tmp_path_factory.mktemp("cells")
    micrograph = ArrayImage(np.load(whole[0] / "image.npy")[None], ["DAPI"], 0.4)
    stained, truth = stained_tissue()
    runs = {
        "whole": cut(micrograph, folder / "whole", 4096),
        "patches": cut(micrograph, folder / "patches", 150),
        "colours": cut(
            stained, folder / "colours", 4096, stardist_model_type=str(for_colours(folder / "he")),
            stardist_scale=20 / 17, stardist_diameter_px=17, normalize="global",
        ),
        "colours in patches": cut(
            stained, folder / "cut", 256, stardist_model_type=str(folder / "he"),
            stardist_scale=20 / 17, stardist_diameter_px=17, normalize="global",
        ),
    }  # fmt: skip
    run_there(_BUNDLES, json.dumps([job for _, jobs in runs.values() for job in jobs]))
    return {name: resolved(*run) for name, run in runs.items()}, {name: run[0] for name, run in runs.items()}, truth


def polygons(labels: np.ndarray) -> np.ndarray:
    from cellquilt.geometry.polygonize import labels_to_polygons

    return np.asarray(labels_to_polygons(labels.astype(np.int32))[1], dtype=object)


def f1(a: np.ndarray, b: np.ndarray, least: float) -> float:
    in_a, in_b = matches(a, b, least)
    return float((in_a.sum() + in_b.sum()) / (len(a) + len(b)))


def test_the_micrograph_is_segmented(cells, whole):
    truth = polygons(np.load(whole[0] / "mask.npy"))
    score = average_precision(cells[0]["whole"], truth)
    print(score)
    assert len(truth) == 125
    assert score >= 0.80


def test_patches_do_not_show(cells):
    found, grids, _ = cells
    assert len(grids["patches"].patches) >= 9
    score = f1(found["whole"], found["patches"], 0.9)
    print(score)
    assert score >= 0.99


# --- colours


def for_colours(folder: Path) -> Path:
    """The shipped network for H&E: it sees 1 - red, for haematoxylin takes red light. Made of its own weights."""
    run_there(_COLOURS, folder)
    return folder


_COLOURS = """
import json, sys
from pathlib import Path
import numpy as np
from cellquilt.segment import stardist
from stardist.models import Config2D, StarDist2D

folder = Path(sys.argv[1])
grey = StarDist2D(None, name="stardist_nuclei", basedir=str(stardist.SHIPPED_FOLDER.parent))
config = {key: value for key, value in json.loads((stardist.SHIPPED_FOLDER / "config.json").read_text()).items()
          if key in ("n_rays", "grid") or key.startswith(("unet_", "net_conv"))}
colours = StarDist2D(Config2D(n_channel_in=3, axes="YXC", **config), name=folder.name, basedir=str(folder.parent))
weights = grey.keras_model.get_weights()
kernel, bias = weights[0], weights[1]  # of the first layer, (3, 3, 1, n) and (n,)
weights[0] = np.concatenate([-kernel, 0 * kernel, 0 * kernel], axis=2)
weights[1] = bias + kernel.sum(axis=(0, 1, 2))
colours.keras_model.set_weights(weights)
colours.keras_model.save_weights(str(folder / "weights_best.h5"))  # the older format, as published models have it
(folder / "thresholds.json").write_text((stardist.SHIPPED_FOLDER / "thresholds.json").read_text())
print("{}")
"""


def stained_tissue() -> tuple[ArrayImage, np.ndarray]:
    """A section in H&E by Beer and Lambert: violet nuclei in pink tissue, white glass around; and its true nuclei."""
    sample = make_sample((420, 420), seed=3, gradient=1.0, share=0.5)
    nuclei = np.clip((sample.image.astype(np.float32) - 60) / 600, 0, 1.5)
    y, x = np.mgrid[:420, :420]
    tissue = (((y - 210) / 200) ** 2 + ((x - 210) / 200) ** 2 < 1).astype(np.float32)
    haematoxylin, eosin = np.array([1.0, 1.1, 0.4]), np.array([0.05, 0.6, 0.25])
    density = nuclei[..., None] * tissue[..., None] * haematoxylin + 0.6 * tissue[..., None] * eosin
    light = 240 * np.exp(-density) + np.random.default_rng(0).normal(0, 3, density.shape)
    inside = np.where(tissue > 0, sample.truth, 0)
    partly = np.unique(np.where(tissue > 0, 0, sample.truth))
    truth = polygons(np.where(np.isin(inside, partly), 0, inside))
    return ArrayImage(np.moveaxis(np.clip(light, 0, 255).astype(np.uint8), -1, 0), ["R", "G", "B"], 0.5), truth


def test_colours_go_to_the_network_as_they_are(cells):
    found, grids, truth = cells
    assert len(truth) > 100
    hit = matches(truth, found["colours"], 0.5)[0].mean()
    print(hit, len(found["colours"]), len(truth))
    assert hit >= 0.85
    # Nuclei at the tissue's edge are found, but are none of the truth's.
    inner = shapely.within(found["colours"], shapely.Point(210, 210).buffer(170))
    assert matches(found["colours"][inner], truth, 0.5)[0].mean() >= 0.85
    assert len(grids["colours in patches"].patches) == 4
    assert f1(found["colours"], found["colours in patches"], 0.9) >= 0.99


# --- mistakes that only the library can tell

_REFUSED = """
import json, os, shutil, sys
from pathlib import Path
from cellquilt.core.errors import CellquiltError
from cellquilt.segment import stardist

folder, found = Path(sys.argv[1]), {}


def load(name, model, **engine):
    try:
        stardist.StarDistSegmenter({"model": str(model), "channels": 1, "threads": 1, "memory_mb": 1500, **engine})
        found[name] = None
    except CellquiltError as error:
        found[name] = error.as_dict()


load("not here", "2D_versatile_fluo")
garbage = folder / "garbage"
shutil.copytree(stardist.SHIPPED_FOLDER, garbage)
stardist.weights_of(garbage).write_bytes(b"no weights")
load("garbage", garbage)
other = folder / "other"
shutil.copytree(stardist.SHIPPED_FOLDER, other)
config = json.loads((other / "config.json").read_text())
(other / "config.json").write_text(json.dumps({**config, "unet_n_filter_base": 8}))
load("of another network", other)
load("of other patches", stardist.SHIPPED_FOLDER, channels=3)
load("with a GPU", stardist.SHIPPED_FOLDER, gpu=True)
os.environ["CELLQUILT_GPU_FALLBACK"] = "true"
load("with a GPU, or the CPU", stardist.SHIPPED_FOLDER, gpu=True)
print(json.dumps(found))
"""


def test_models_that_cannot_be_loaded_are_named(tmp_path):
    """Nothing listens at the proxy, so that StarDist's hub is out of reach wherever this runs; GPUs are hidden."""
    dead = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    nowhere = {"HOME": str(tmp_path), "KERAS_HOME": str(tmp_path / "keras"), "CUDA_VISIBLE_DEVICES": "-1"}
    found = run_there(_REFUSED, tmp_path, **nowhere, **dead)
    print(found)
    assert found["not here"]["code"] == "weights-missing"
    assert "2D_versatile_fluo" in found["not here"]["message"]
    assert "give the path of a folder with config.json" in found["not here"]["hint"]
    assert "cellquilt download-weights 2D_versatile_fluo" in found["not here"]["hint"]
    for name in ("garbage", "of another network"):
        assert found[name]["code"] == "weights-unreadable", name
        assert "weights_best.weights.h5" in found[name]["message"]
    assert found["of other patches"]["code"] == "stardist-channels"
    assert found["with a GPU"]["code"] == "gpu-missing"
    assert found["with a GPU, or the CPU"] is None  # as the user allowed


# --- the shipped model's scores


def test_the_scores_are_those_of_the_shipped_weights():
    sys.path.insert(0, str(TRAINING))
    try:
        import nuclei_data
    finally:
        sys.path.remove(str(TRAINING))
    scores = json.loads((TRAINING / "scores_stardist.json").read_text())
    weights = stardist.weights_of(stardist.SHIPPED_FOLDER)
    assert scores["weights_sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    document = json.loads((stardist.SHIPPED_FOLDER / "cellquilt.json").read_text())
    assert document["held_out"] == scores["held_out"] == list(nuclei_data.HELD_OUT)
    assert set(scores["scores"]["model"]["groups"]) == set(nuclei_data.HELD_OUT)
    assert scores["micrograph"][0] >= 0.80
    assert scores["scores"]["model"]["mean"][0] >= 0.78


_SCORE = """
import json, sys
sys.path.insert(0, sys.argv[1])
import evaluate_stardist, nuclei_data
from pathlib import Path
from stardist.data import test_image_nuclei_2d
from train_stardist import without_the_micrograph
samples = nuclei_data.load_samples(Path(sys.argv[2]))
kept, same = without_the_micrograph([s for s in samples if s.image.shape == (520, 696)])
held_out = {sample.name for sample in nuclei_data.split(samples)[1]}
print(json.dumps({"same": same, "held_out": [name in held_out for name in same], "kept": len(kept)}))
"""


def test_the_micrograph_is_none_of_the_training_images(shared_data):
    found = run_there(_SCORE, TRAINING, shared_data / "nuclei_dsb2018" / "train.npz")
    assert len(found["same"]) == 1  # it was cut from an image of the collection
    assert found["held_out"] == [True]
    assert found["kept"] > 50
