#!/bin/bash
# In an empty folder of the image: the engine finds the nuclei of the tiny slide.
set -euo pipefail
cellquilt segment stardist /opt/cellquilt/sample/stardist_bundles/bundle_000.zarr -o cells.parquet
python -c 'import pyarrow.parquet as pq; n = pq.read_metadata("cells.parquet").num_rows; print(n, "cells"); assert n > 10'
