#!/usr/bin/env bash
# The demo: make its input, run the pipeline on it, show what came out. A second call re-uses everything.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cellquilt="$root/.venv/core/bin/cellquilt"
mkdir -p "$root/demo-results"
cd "$root/demo-results" # Nextflow keeps the history that -resume needs where it was started

"$cellquilt" demo input input >/dev/null
start=$SECONDS
"$root/scripts/nextflow" run "$root/main.nf" --input input/sheet.csv --outdir results --domains train --domains_n 4 -resume "$@"
seconds=$((SECONDS - start))
cd "$root"
"$cellquilt" demo show demo-results/results
echo "The pipeline took $seconds s."
