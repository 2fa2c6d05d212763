#!/bin/bash
# In an empty folder of the image: domains of two tiny slides.
set -euo pipefail
for slide in slide_0 slide_1; do
    cellquilt domains prepare "/opt/cellquilt/sample/$slide.h5ad" --sample "$slide" -o "$slide.graph.zarr"
done
cellquilt domains train ./*.graph.zarr -o model --domains train --domains-n 3
for slide in slide_0 slide_1; do
    cellquilt domains embed "$slide.graph.zarr" --weights model -o "$slide.latents.parquet"
done
cellquilt domains assign ./*.latents.parquet --weights model -o domains --domains-n 3
