"""On a whole slide our tiling and dynamics give what the Cellpose library gives, in both of its generations.

Runs in the environments that have Cellpose 3 (see `test_seams`) and Cellpose 4 (``CELLQUILT_CELLPOSE4_PYTHON`` or
``.venv/cellpose4``).
"""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from test_seams import MODEL, ROOT, cellpose_python, make_sample

pytestmark = pytest.mark.slow
CELLPOSE_4 = os.environ.get("CELLQUILT_CELLPOSE4_PYTHON") or ROOT / ".venv" / "cellpose4" / "bin" / "python"
needs_3 = pytest.mark.skipif(cellpose_python() is None, reason="no environment with Cellpose 3")
needs_4 = pytest.mark.skipif(
    not Path(CELLPOSE_4).exists(), reason="no environment with Cellpose 4: make setup STAGES=cellpose4"
)


def run_there(python, script: str, *arguments) -> dict:
    """The last line that a script prints, in another environment, as JSON."""
    done = subprocess.run(
        [str(python), "-c", script, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(Path(ROOT) / "python" / "src")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


_COMPARE = """
import json, sys
import numpy as np, torch
from cellpose import core, dynamics, transforms
from cellpose.resnet_torch import CPnet
from cellquilt.patches.grid import Lattice, make_grid
from cellquilt.patches.normalize import Normalization
from cellquilt.segment import cellpose
from cellquilt.segment.arrays import ArrayImage, MemoryBundle
from cellquilt.segment.cpnet import STOCK_NBASE, load_state_dict, read_metadata

image, model, diameter = np.load(sys.argv[1]), sys.argv[2], float(sys.argv[3])
torch.set_num_threads(1)
weights = cellpose.find_weights(model)
stock = CPnet(list(STOCK_NBASE), 3, sz=3, mkldnn=False)
stock.load_state_dict({key: torch.from_numpy(value) for key, value in load_state_dict(weights).items()})
nominal = read_metadata(weights)["diam_mean_px"]
scale = None if diameter == nominal else nominal / diameter
flows = core.run_net(stock, np.stack([image, 0 * image], -1)[None], rsz=scale)[0]
if scale:
    flows = transforms.resize_image(flows, *image.shape)
flows = flows[0].transpose(2, 0, 1)
theirs = dynamics.compute_masks(
    np.ascontiguousarray(flows[:2]), np.ascontiguousarray(flows[2]), niter=int(200 * diameter / nominal),
    flow_threshold=0.4, max_size_fraction=1.0,
).astype(int)
theirs[np.bincount(theirs.ravel())[theirs] < 15] = 0

slide = ArrayImage(image[None])
plan = cellpose.plan(slide, {"cellpose_diameter_px": diameter, "threads": 1})
grid = make_grid(image.shape, width_px=0, lattice=plan.lattice)
bundle = MemoryBundle(image[None], image.shape, list(grid.patches), plan.lattice, Normalization.nothing(1))
(result,) = cellpose.CellposeSegmenter({**plan.settings, "model": model}).segment(bundle)
ours = result.labels
pairs, both = np.unique(np.stack([ours.ravel(), theirs.ravel()]), axis=1, return_counts=True)
keep = (pairs > 0).all(axis=0)
a, b = np.bincount(ours.ravel())[pairs[0]], np.bincount(theirs.ravel())[pairs[1]]
iou = (both / (a + b - both))[keep]
print(json.dumps({"ours": int(ours.max()), "theirs": len(np.unique(theirs)) - 1,
                  "same": int((iou == 1).sum()), "close": int((iou > 0.95).sum())}))
"""


@needs_3
@pytest.mark.parametrize("diameter", [17.0, 12.0])
def test_the_masks_are_those_of_the_library(tmp_path, diameter):
    sample = make_sample((330, 450), seed=7, gradient=1.0, share=1.0)
    values = (sample.image.astype(np.float32) - 60) / 700
    np.save(tmp_path / "image.npy", values)
    counts = run_there(cellpose_python(), _COMPARE, tmp_path / "image.npy", MODEL, diameter)
    print(counts)
    assert counts["theirs"] > 150
    assert counts["ours"] == counts["theirs"]
    assert counts["same"] >= 0.98 * counts["theirs"]
    assert counts["close"] >= 0.995 * counts["theirs"]


_FLOWS = """
import json, sys
import numpy as np, torch
from cellpose import core, transforms
from cellquilt.patches.grid import make_grid
from cellquilt.segment import cellpose
from cellquilt.segment.arrays import ArrayImage

folder, generation, scale = sys.argv[1], sys.argv[2], float(sys.argv[3])
image = np.load(folder + "/image.npy")  # (2, h, w): cytoplasm, nuclei
torch.manual_seed(0)
torch.set_num_threads(2)
# Weights nobody trained: what the network says of them means nothing, but has to be the same.
if generation == "3":
    from cellpose.resnet_torch import CPnet
    net = CPnet([2, 32, 64, 128, 256], 3, sz=3, mkldnn=False)
else:
    from cellpose.vit import CPSAM
    net = CPSAM()
torch.save(net.state_dict(), folder + "/weights")
net.eval()

inputs = np.zeros((*image.shape[1:], 2 if generation == "3" else 3), np.float32)
inputs[..., :2] = np.moveaxis(image, 0, -1)
more = {} if generation == "3" else {"bsize": 256}
theirs = core.run_net(net, inputs[None], rsz=None if scale == 1 else scale, **more)[0]
if scale != 1:
    theirs = transforms.resize_image(theirs, *image.shape[1:])
theirs = theirs[0].transpose(2, 0, 1)

slide = ArrayImage(image, ["cyto", "nuclei"])
diameter = {} if scale == 1 else {"cellpose_diameter_px": 30.0 / scale}
settings = {"cellpose_generation": generation, "cellpose_model": folder + "/weights",
            "cellpose_channels": ["cyto", "nuclei"], "threads": 2, **diameter}
plan = cellpose.plan(slide, settings)
(patch,) = make_grid(image.shape[1:], width_px=0, lattice=plan.lattice).patches
axes = plan.lattice.axis(image.shape[1]), plan.lattice.axis(image.shape[2])
segmenter = cellpose.CellposeSegmenter({**plan.settings, "model": folder + "/weights"})
keys = cellpose._tiles(axes, patch)
tiles = segmenter.run_tiles(cellpose.cut_tiles(axes, keys, image, (0, 0), inputs.shape[-1]))
ours = cellpose.blend_tiles(axes, patch, tiles)
print(json.dumps({"channels": plan.channels, "tiles": len(keys), "spread": float(theirs.std()),
                  "off": float(np.abs(ours - theirs).max())}))
"""


@pytest.mark.parametrize(
    ("generation", "scale", "shape"),
    [
        pytest.param("3", 1.0, (300, 420), marks=needs_3),
        pytest.param("3", 2.0, (200, 310), marks=needs_3),
        pytest.param("4", 1.0, (200, 300), marks=needs_4),
    ],
)
def test_the_flows_of_two_channels_are_those_of_the_library(tmp_path, generation, scale, shape):
    sample = make_sample(shape, seed=7, gradient=1.0, share=1.0)
    nuclei = (sample.image.astype(np.float32) - 60) / 700
    np.save(tmp_path / "image.npy", np.stack([np.sqrt(np.abs(nuclei)), nuclei]))
    python = cellpose_python() if generation == "3" else CELLPOSE_4
    found = run_there(python, _FLOWS, tmp_path, generation, scale)
    print(found)
    assert found["channels"] == ["cyto", "nuclei"]
    assert found["tiles"] >= 2
    assert found["off"] < 1e-3 * found["spread"]
