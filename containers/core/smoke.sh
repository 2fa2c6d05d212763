#!/bin/bash
# In an empty folder of the core image: the steps around segmentation, without an engine.
set -euo pipefail
cp -r /opt/cellquilt/sample/slide.zarr .
cellquilt aggregate slide.zarr --overwrite
cellquilt assemble --help >/dev/null
python -c 'import cellquilt, spatialdata; print(spatialdata.read_zarr("slide.zarr"))' | grep -q 'table'
