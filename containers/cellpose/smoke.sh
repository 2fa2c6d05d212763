#!/bin/bash
# In an empty folder of the image: the engine finds the nuclei of the tiny slide. Cellpose-SAM has no weights here: with
# some that nobody trained it has to run to its end, whatever it finds.
set -euo pipefail
if [ "$(python -c 'import importlib.metadata; print(importlib.metadata.version("cellpose")[0])')" = 3 ]; then
    cellquilt segment cellpose /opt/cellquilt/sample/bundles/bundle_000.zarr -o cells.parquet
    python -c 'import pyarrow.parquet as pq; n = pq.read_metadata("cells.parquet").num_rows; print(n, "cells"); assert n > 10'
else
    trap 'rm -rf untrained.pth bundles4 patches4.zarr' EXIT
    python -c 'import torch; from cellpose.vit import CPSAM; torch.manual_seed(0); torch.save(CPSAM().state_dict(), "untrained.pth")'
    settings='{"segmentation": "cellpose", "cellpose_generation": "4", "cellpose_model": "untrained.pth"}'
    cellquilt patchify image /opt/cellquilt/sample/slide.zarr --settings "$settings" --bundles bundles4 --output patches4.zarr
    cellquilt segment cellpose bundles4/bundle_000.zarr -o cells.parquet
    python -c 'import pyarrow.parquet as pq; print(pq.read_metadata("cells.parquet").num_rows, "outlines")'
fi
