#!/usr/bin/env bash
# Everything the pipeline needs on this machine, made once: `make setup`, or `scripts/setup.sh STAGE...`.
#
#   .venv/core        readers, patches, resolve, aggregate, reports; tests and linters
#   .venv/cellpose3   Cellpose with CPnet models (the shipped model)
#   .venv/cellpose4   Cellpose-SAM; only when asked for
#   .venv/stardist    StarDist with TensorFlow; only when asked for
#   .venv/domains     the model of spatial domains (torch), and what its tests need; only when asked for
#   .venv/nextflow    a Java runtime and Nextflow; only where PATH has no Nextflow that is new enough
#   .venv/proseg      proseg, from PATH or built by cargo (once, into the cache: about 12 minutes on two cores); only when
#                     asked for, or where it is there already
#
# A second call does nothing: each environment carries a stamp of all it was made from. Registries and certificates come
# from the user's own settings of pip, uv and jgo. CELLQUILT_CACHE moves the cache, CELLQUILT_PYTHON names a Python 3.12.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cache="${CELLQUILT_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/cellquilt}"
nextflow_oldest=24.10
proseg_version=3.2.0
proseg_home="$cache/proseg-$proseg_version"

# Registries are sometimes slow; bytecode is compiled now, not by every task.
export UV_HTTP_TIMEOUT="${UV_HTTP_TIMEOUT:-300}" UV_COMPILE_BYTECODE=1 UV_NO_PROGRESS=1
unset VIRTUAL_ENV PYTHONDONTWRITEBYTECODE PYTHONPATH

say() { printf 'setup: %s\n' "$*" >&2; }
fail() {
    printf 'setup: error: %s\n' "$1" >&2
    [ $# -lt 2 ] || printf '  hint: %s\n' "$2" >&2
    exit 1
}

# The Python 3.12 to use, or just "3.12" for uv to fetch. Each candidate is run: one on PATH may be a dead shim.
find_python() {
    local candidate pyenv="${PYENV_ROOT:-}"
    [ -n "$pyenv" ] || pyenv="$(pyenv root 2>/dev/null || true)"
    for candidate in "${CELLQUILT_PYTHON:-}" python3.12 python3 "${pyenv:-$HOME/.pyenv}"/versions/3.12*/bin/python3.12; do
        [ -n "$candidate" ] || continue
        if "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null; then
            "$candidate" -c 'import sys; print(sys.executable)'
            return
        fi
    done
    echo 3.12
}

# A wheel of pip, for a Python that comes without pip and ensurepip (as Debian's does): from the index that pip is set to
# in the environment, else the one that the lock file names.
fetch_pip() {
    "$1" - "$root/python/uv.lock" "$2" <<'PYTHON'
import hashlib, os, pathlib, re, sys, urllib.parse, urllib.request
lock, folder = sys.argv[1:]
index = os.environ.get("PIP_INDEX_URL") or re.search(r'registry = "(.+?)"', pathlib.Path(lock).read_text()).group(1)
page_url = index.rstrip("/") + "/pip/"
page = urllib.request.urlopen(page_url, timeout=60).read().decode()
wheels = re.findall(r'href="([^"]*?/(pip-(\d+(?:\.\d+)*)-py3-none-any\.whl)[^"]*?#sha256=([0-9a-f]{64}))', page)
link, name, _, digest = max(wheels, key=lambda wheel: [int(part) for part in wheel[2].split(".")])
content = urllib.request.urlopen(urllib.parse.urljoin(page_url, link), timeout=60).read()
if hashlib.sha256(content).hexdigest() != digest:
    sys.exit("the checksum of pip's wheel is wrong")
(pathlib.Path(folder) / name).write_bytes(content)
print(pathlib.Path(folder) / name)
PYTHON
}

# uv from PATH, else from PyPI in a private environment made by any Python 3.8 or newer.
find_uv() {
    if uv --version >/dev/null 2>&1; then
        command -v uv
        return
    fi
    local home="$cache/uv" candidate wheel
    if ! "$home/bin/uv" --version >/dev/null 2>&1; then
        say "installing uv into $home"
        mkdir -p "$cache"
        for candidate in "$python" python3 /usr/bin/python3; do
            "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 8))' 2>/dev/null || continue
            rm -rf "$home"
            if "$candidate" -m venv "$home" >/dev/null 2>&1; then
                "$home/bin/python" -m pip install --quiet --disable-pip-version-check uv >&2 && break
            elif "$candidate" -m venv --without-pip "$home" >/dev/null 2>&1; then
                wheel="$(fetch_pip "$candidate" "$home")" &&
                    PYTHONPATH="$wheel" "$home/bin/python" -m pip install --quiet --disable-pip-version-check uv >&2 && break
            fi
        done
        "$home/bin/uv" --version >/dev/null 2>&1 ||
            fail "uv is neither on PATH nor could it be installed" "install uv (pip install uv), or python3 with python3-venv"
    fi
    echo "$home/bin/uv"
}

# Whether PATH has a Nextflow that is new enough. Its version is asked only here: that takes seconds.
system_nextflow() {
    local version
    command -v nextflow >/dev/null || return 1
    version="$(NXF_ANSI_LOG=false nextflow -version 2>/dev/null | grep -oE 'version [0-9]+\.[0-9]+' | head -n 1 | cut -d' ' -f2)"
    [ -n "$version" ] && [ "$(printf '%s\n' "$nextflow_oldest" "$version" | sort -V | head -n 1)" = "$nextflow_oldest" ]
}

# Nextflow's jars, in a folder of the cache named by what they are.
fetch_nextflow() {
    local key home part try
    key="$(sha256sum <"$root/scripts/nextflow.sha256" | cut -c1-16)"
    home="$cache/nextflow-$key"
    if [ ! -d "$home" ]; then
        say "resolving Nextflow"
        part="$home.part-$$"
        for try in 1 2 3; do
            rm -rf "$part"
            mkdir -p "$part/jars"
            "$root/.venv/nextflow/bin/python" -m jgo --quiet --timeout 60 --file "$root/scripts/jgo.toml" --cache-dir "$part/env" \
                --links copy sync && break
            [ "$try" -lt 3 ] || fail "Nextflow could not be resolved from Maven Central" "see the message above; or put a Nextflow >= $nextflow_oldest on PATH"
        done
        find "$part/env" -name '*.jar' -exec mv -t "$part/jars" {} +
        (cd "$part/jars" && sha256sum --check --quiet --strict "$root/scripts/nextflow.sha256") ||
            fail "Nextflow's jars are not the ones that scripts/nextflow.sha256 names"
        rm -rf "$part/env"
        mv -T "$part" "$home" 2>/dev/null || rm -rf "$part" # another clone was faster
    fi
    ln -sfnT "$home/jars" "$root/.venv/nextflow/jars"
}

# A proseg that needs no building: of generation 3 on PATH, else the one in the cache.
find_proseg() {
    local found
    found="$(command -v proseg || true)"
    if [ -n "$found" ] && [[ "$("$found" --version 2>/dev/null)" =~ ^proseg\ 3\. ]]; then
        readlink -f "$found"
    elif [ -x "$proseg_home/bin/proseg" ]; then
        echo "$proseg_home/bin/proseg"
    else
        return 1
    fi
}

# What was compiled stays in the cache until all is done: a build that is stopped goes on where it was.
build_proseg() {
    local part="$proseg_home.part-$$" target="$proseg_home.build"
    command -v cargo >/dev/null ||
        fail "proseg is built by cargo, which is not on PATH" "install Rust 1.88 or newer (rustup), or put a proseg $proseg_version on PATH"
    mkdir -p "$cache"
    exec 8>"$cache/.proseg.lock"
    flock 8 # another clone may be building it
    [ ! -x "$proseg_home/bin/proseg" ] || return 0
    say "building proseg $proseg_version (about 12 minutes on two cores)"
    # The crate's own profile would add full debug information: several times the time and the size.
    CARGO_PROFILE_RELEASE_DEBUG=0 CARGO_TARGET_DIR="$target" \
        cargo install proseg --version "$proseg_version" --locked --quiet --root "$part" >&2 ||
        fail "proseg $proseg_version could not be built" "see cargo's message above; it needs Rust 1.88 or newer"
    rm -rf "$proseg_home"
    mv -T "$part" "$proseg_home"
    rm -rf "$target"
}

make_proseg() {
    local start=$SECONDS
    find_proseg >/dev/null || build_proseg
    mkdir -p "$root/.venv/proseg/bin"
    ln -sfnT "$(find_proseg)" "$root/.venv/proseg/bin/proseg"
    printf '%s\n' "$stamp" >"$root/.venv/proseg/.made-from"
    say ".venv/proseg is ready: $("$root/.venv/proseg/bin/proseg" --version) ($((SECONDS - start)) s)"
}

# make_stage NAME UV-SYNC-OPTION...
make_stage() {
    local name="$1" folder="$root/.venv/$1" start=$SECONDS
    shift
    say "making .venv/$name"
    UV_PROJECT_ENVIRONMENT="$folder" UV_PYTHON="$python" "$uv" sync --quiet --frozen --project "$root/python" "$@" ||
        fail "the environment .venv/$name could not be made" "see uv's message above"
    [ "$name" != nextflow ] || fetch_nextflow
    printf '%s\n' "$stamp" >"$folder/.made-from"
    say ".venv/$name is ready ($((SECONDS - start)) s)"
}

stages=("$@")
if [ $# -eq 0 ]; then
    stages=(core cellpose3 nextflow)
    ! find_proseg >/dev/null || stages+=(proseg)
fi

mkdir -p "$root/.venv"
exec 9>"$root/.venv/.lock"
flock 9 # two calls at once: the second waits, then finds all done

# What every environment is made from; the clone's own path is part of it, for environments cannot be moved.
stamp="$({ printf '%s\n' "$root"; cat "$root"/python/{uv.lock,pyproject.toml} "$root"/scripts/{setup.sh,jgo.toml,nextflow.sha256}; } | sha256sum | cut -d' ' -f1)"
missing=()
for stage in "${stages[@]}"; do
    case "$stage" in
        core | cellpose3 | cellpose4 | stardist | domains | nextflow | proseg) ;;
        *) fail "unknown stage \"$stage\"" "known: core, cellpose3, cellpose4, stardist, domains, nextflow, proseg" ;;
    esac
    program=python
    [ "$stage" != proseg ] || program=proseg
    if [ "$(cat "$root/.venv/$stage/.made-from" 2>/dev/null)" = "$stamp" ] && [ -x "$root/.venv/$stage/bin/$program" ]; then
        if [ "$stage" != nextflow ] || [ -e "$root/.venv/nextflow/jars/." ]; then
            continue
        fi
    elif [ "$stage" = nextflow ] && [ "$(cat "$root/.venv/.system-nextflow" 2>/dev/null)" = "$stamp $(command -v nextflow)" ]; then
        continue
    fi
    missing+=("$stage")
done
[ ${#missing[@]} -gt 0 ] || exit 0

if [ "${missing[*]}" != proseg ]; then
    python="$(find_python)"
    uv="$(find_uv)"
fi
for stage in "${missing[@]}"; do
    case "$stage" in
        core) make_stage core --extra sdata --extra report --group dev ;;
        cellpose3) make_stage cellpose3 --no-default-groups --extra cellpose3 ;;
        cellpose4) make_stage cellpose4 --no-default-groups --extra cellpose4 ;;
        stardist) make_stage stardist --no-default-groups --extra stardist ;;
        domains) make_stage domains --extra sdata --extra report --extra domains --group dev ;;
        proseg) make_proseg ;;
        nextflow)
            if system_nextflow; then
                rm -rf "$root/.venv/nextflow"
                printf '%s\n' "$stamp $(command -v nextflow)" >"$root/.venv/.system-nextflow"
                say "using $(command -v nextflow)"
            else
                make_stage nextflow --only-group nextflow
            fi
            ;;
    esac
done

# The numerical kernels are compiled now, once, instead of by the first tasks that meet them. A clone that cannot be
# written to compiles them in its tasks, so a failure here is none.
if [[ " ${missing[*]} " =~ " core " ]]; then
    say "compiling kernels"
    scratch="$(mktemp -d)"
    trap 'rm -rf "$scratch"' EXIT
    if bundle="$("$root/.venv/core/bin/cellquilt" doctor --compile "$scratch/slide" 2>"$scratch/log")" &&
        [ -x "$root/.venv/cellpose3/bin/cellquilt" ]; then
        "$root/.venv/cellpose3/bin/cellquilt" segment cellpose "$bundle" -o "$scratch/cells.parquet" 2>>"$scratch/log" ||
            say "kernels will be compiled by the first tasks: $(tail -n 1 "$scratch/log")"
    fi
fi
