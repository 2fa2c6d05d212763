#!/usr/bin/env bash
# The documentation as a site in site/ (`make docs`): mkdocs in the versions of docs/requirements.txt, kept by uv. A page that no
# menu shows and a link to nowhere are errors. `scripts/docs.sh serve` shows it while it is written.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
uv="$(command -v uv || echo "${CELLQUILT_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/cellquilt}/uv/bin/uv")"
export NO_MKDOCS_2_WARNING=1 UV_NO_PROGRESS=1
[ $# -gt 0 ] || set -- build # not --quiet: with it, warnings are no errors
"$uv" run --quiet --no-project --python "$(readlink -f .venv/core/bin/python)" --with-requirements docs/requirements.txt mkdocs "$@"
[ "$1" != build ] || echo "docs: site/index.html"
