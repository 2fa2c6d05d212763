#!/bin/bash
# In an empty folder of the image: Baysor finds the cells of the tiny slide.
set -euo pipefail
baysor --version
cellquilt segment baysor /opt/cellquilt/sample/transcript_bundles/bundle_000.zarr -o cells.result --baysor-scale-um 6
ls cells.result
