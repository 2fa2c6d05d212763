"""On a whole slide our tiling and dynamics give what the Cellpose library gives.

Runs in the environment that has Cellpose 3 (see `test_seams`).
"""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from test_seams import MODEL, ROOT, cellpose_python, make_sample

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(cellpose_python() is None, reason="no environment with Cellpose 3"),
]

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


@pytest.mark.parametrize("diameter", [17.0, 12.0])
def test_the_masks_are_those_of_the_library(tmp_path, diameter):
    sample = make_sample((330, 450), seed=7, gradient=1.0, share=1.0)
    values = (sample.image.astype(np.float32) - 60) / 700
    np.save(tmp_path / "image.npy", values)
    done = subprocess.run(
        [str(cellpose_python()), "-c", _COMPARE, str(tmp_path / "image.npy"), MODEL, str(diameter)],
        env={**os.environ, "PYTHONPATH": str(Path(ROOT) / "python" / "src")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])
    print(counts)
    assert counts["theirs"] > 150
    assert counts["ours"] == counts["theirs"]
    assert counts["same"] >= 0.98 * counts["theirs"]
    assert counts["close"] >= 0.995 * counts["theirs"]
