#!/bin/bash
# In an empty folder of the image: proseg finds the cells of the tiny slide.
set -euo pipefail
proseg --version
cellquilt segment proseg /opt/cellquilt/sample/transcript_bundles/bundle_000.zarr -o cells.result
ls cells.result
