#!/usr/bin/env bash
# The images that the container profiles run: `make images`, or `scripts/images.sh STAGE...`.
#
#   core cellpose proseg stardist domains   all of them by default
#   cellpose4                               only when asked for (another 6 GB): Cellpose-SAM, of cellpose's Dockerfile
#   baysor                                  only when asked for: it builds where Julia's servers can be reached
#
# Each is tried when it is there: as no root, without network, on a read-only file system. A second call does nothing:
# an image says (label cellquilt.source-hash) what it was made from.
#
#   CELLQUILT_ENGINE    podman or docker; default: what there is. Without either, podman is installed if that can be done
#                       (Debian, root)
#   CELLQUILT_REGISTRY  prefix of the names, default localhost/
#   BASE_IMAGE          default: the one that the Dockerfiles name; where it cannot be pulled, one that is made here, of
#                       Debian's packages and the Python 3.12 that `make setup` found
#   TORCH_INDEX, TENSORFLOW, PROSEG   see docs/containers.md
#
# podman's images lie in the cache folder; scripts/podman is the podman that knows them.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cache="${CELLQUILT_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/cellquilt}"
store="$cache/containers"
registry="${CELLQUILT_REGISTRY-localhost/}"
version="$(sed -nE "s/^ *version *= *'(.+)'/\1/p" "$root/nextflow.config")"
public_base="$(sed -n 's/^ARG BASE_IMAGE=//p' "$root/containers/core/Dockerfile")"
suite="${public_base##*-}"
# What CPython loads besides libc.
libraries=usr-is-merged,libbz2-1.0,libcrypt1,libexpat1,libffi8,liblzma5,libncursesw6,libreadline8,libsqlite3-0,libssl3,libstdc++6,libuuid1,zlib1g

say() { printf 'images: %s\n' "$*" >&2; }
fail() {
    printf 'images: error: %s\n' "$1" >&2
    [ $# -lt 2 ] || printf '  hint: %s\n' "$2" >&2
    exit "${3:-1}"
}

install_packages() {
    if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        fail "this needs $*" "install it with the system's package manager"
    fi
    say "installing $*"
    apt-get install -q -y --no-install-recommends "$@" >"$store/apt.log" 2>&1 ||
        { apt-get update -q && apt-get install -q -y --no-install-recommends "$@"; } >"$store/apt.log" 2>&1 ||
        fail "Debian's packages could not be installed: $*" "see $store/apt.log"
}

find_engine() {
    engine="${CELLQUILT_ENGINE:-}"
    if [ -z "$engine" ]; then
        if ! command -v podman >/dev/null && docker info >/dev/null 2>&1; then
            engine=docker
        else
            engine=podman
        fi
    fi
    case "$engine" in
        podman)
            command -v podman >/dev/null || install_packages podman runc netavark aardvark-dns catatonit
            run=("$root/scripts/podman")
            ;;
        docker)
            docker info >/dev/null 2>&1 || fail "docker does not answer" "start it, or use podman: CELLQUILT_ENGINE=podman"
            run=(docker)
            export DOCKER_BUILDKIT=1
            ;;
        *) fail "CELLQUILT_ENGINE is \"$engine\"" "podman or docker" ;;
    esac
}

has_image() { "${run[@]}" image inspect "$1" >/dev/null 2>&1; }

# The base: as asked for, the public one, or one of our own making.
find_base() {
    base="${BASE_IMAGE:-}"
    [ -z "$base" ] || return 0
    local python key
    if has_image "$public_base"; then
        base="$public_base"
        return
    fi
    python="$("$root/.venv/core/bin/python" -c 'import sys; print(sys.base_prefix)' 2>/dev/null)" ||
        fail "the environment of core is not there" "make setup"
    key="$({ printf '%s\n' "$suite" "$libraries" "$python"; declare -f make_base copy_python; } | sha256sum | cut -c1-12)"
    base="localhost/cellquilt-base:$key"
    ! has_image "$base" || return 0
    if "${run[@]}" pull --quiet "$public_base" >/dev/null 2>&1; then
        base="$public_base"
    else
        make_base "$base" "$python"
    fi
}

# make_base NAME PYTHON-PREFIX
make_base() {
    local start=$SECONDS part="$store/base.part-$$" merged
    say "$public_base cannot be pulled; making a base of Debian $suite and $2"
    command -v mmdebstrap >/dev/null || install_packages mmdebstrap
    rm -rf "$part"
    mkdir -p "$part/python"
    copy_python "$2" "$part/python"
    # The package usrmerge would take in all of Perl; the folders are merged beforehand instead.
    merged=(--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr
        --setup-hook='mkdir -p "$1/etc/apt/preferences.d"; printf "Package: usrmerge\nPin: release *\nPin-Priority: -1\n" >"$1/etc/apt/preferences.d/merged"'
        --customize-hook='rm "$1/etc/apt/preferences.d/merged"')
    mmdebstrap --quiet --variant=essential --include="ca-certificates,procps,$libraries" \
        --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-include=/usr/share/doc/*/copyright' \
        --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
        --dpkgopt='path-exclude=/usr/lib/*/gconv/*' "${merged[@]}" --customize-hook="sync-in '$part/python' /usr/local" --customize-hook="chroot \"\$1\" ldconfig" \
        "$suite" "$part/base.tar" 2>"$part/log" ||
        fail "Debian $suite could not be put together: $(tail -n 1 "$part/log")" "give an image with Python 3.12: BASE_IMAGE=…"
    "${run[@]}" import --change 'ENV PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin' "$part/base.tar" "$1" >/dev/null 2>&1
    rm -rf "$part"
    say "the base is ready ($((SECONDS - start)) s)"
}

# A Python without its tests, static libraries and installed packages: copy_python FROM TO
copy_python() {
    [ -e "$1/lib/python3.12/os.py" ] && [ "$1" != /usr ] ||
        fail "$1 holds no Python 3.12 that can be copied" "set CELLQUILT_PYTHON to another and make setup again, or give BASE_IMAGE"
    mkdir -p "$2/bin" "$2/lib"
    cp -p "$1/bin/python3.12" "$2/bin/"
    ln -s python3.12 "$2/bin/python3"
    ln -s python3.12 "$2/bin/python"
    ! compgen -G "$1/lib/libpython3*.so*" >/dev/null || cp -pP "$1"/lib/libpython3*.so* "$2/lib/"
    tar -C "$1/lib" -c --exclude='site-packages/*' --exclude='config-3.12*' --exclude=test --exclude=tests \
        --exclude=idlelib --exclude=turtledemo --exclude=lib2to3 --exclude=tkinter --exclude='_tkinter*' --exclude=pydoc_data \
        --exclude='*.opt-?.pyc' python3.12 | tar -C "$2/lib" -x --no-same-owner
    # A Python that was compiled on this machine carries its symbols for debuggers.
    ! command -v strip >/dev/null || find "$2" -name '*.so*' -type f -exec strip --strip-unneeded {} +
}

# Whether containers run at all here, and with which settings of podman.
check_engine() {
    local setting nofile nproc said
    try() { said="$("${run[@]}" run --rm --network=none "$base" true 2>&1)"; }
    ! try || return 0
    [ "$engine" = podman ] || fail "this machine runs no containers: $(tail -n 1 <<<"$said")" "see docs/containers.md" 3
    # podman asks for higher limits than a machine may allow; crun refuses some layouts of control groups.
    nofile="$(ulimit -Hn)" nproc="$(ulimit -Hu)"
    [[ "$nofile" =~ ^[0-9]+$ ]] && [ "$nofile" -lt 16384 ] || nofile=16384
    [[ "$nproc" =~ ^[0-9]+$ ]] && [ "$nproc" -lt 16384 ] || nproc=16384
    for setting in '' 'runtime = "runc"'; do
        {
            printf '[containers]\ndefault_ulimits = ["nofile=%s:%s", "nproc=%s:%s"]\n' "$nofile" "$nofile" "$nproc" "$nproc"
            printf '[engine]\ncgroup_manager = "cgroupfs"\nevents_logger = "file"\n%s\n' "$setting"
            ! [ -x /usr/lib/podman/netavark ] || printf '[network]\nnetwork_backend = "netavark"\n'
        } >"$store/containers.conf"
        if try; then
            say "podman needs settings of its own here: $store/containers.conf"
            return
        fi
    done
    : >"$store/containers.conf"
    fail "this machine runs no containers: $(tail -n 1 <<<"$said")" "see docs/containers.md" 3
}

# A proseg that need not be built: the one named, else the one that `make setup` built.
find_proseg() {
    local found="${PROSEG:-$root/.venv/proseg/bin/proseg}"
    [ ! -x "$found" ] || readlink -f "$found"
}

# What an image is made from, as one number: source_hash STAGE
source_hash() {
    local stage="${1%4}"
    {
        printf '%s\n' "$1" "$version" "$("${run[@]}" image inspect --format '{{.Id}}' "$base")" "${TORCH_INDEX:-}" "${TENSORFLOW:-}"
        cd "$root"
        find "containers/$stage" containers/core containers/common python/{pyproject.toml,uv.lock,README.md,src} \
            -name __pycache__ -prune -o -type f -print0 | sort -z | xargs -0 sha256sum
        [ "$stage" != proseg ] || [ -z "$(find_proseg)" ] || sha256sum "$(find_proseg)"
    } | sha256sum | cut -d' ' -f1
}

image() { printf '%scellquilt-%s:%s\n' "$registry" "$1" "$version"; }

build() {
    local stage="$1" recipe="${1%4}" hash="$2" start=$SECONDS options uv_cache proseg prebuilt=''
    options=(--network=host --tag "$(image "$stage")" --file "$root/containers/$recipe/Dockerfile"
        --build-arg "BASE_IMAGE=$base" --build-arg "VERSION=$version" --build-arg "TOOLS=$(cat "$root"/containers/{common,$recipe}/* | sha256sum | cut -c1-16)"
        --build-arg "SOURCE_HASH=$hash" --build-arg "REVISION=$(git -C "$root" rev-parse HEAD 2>/dev/null || echo unknown)")
    [ "$stage" = core ] || options+=(--build-arg "CORE_IMAGE=$(image core)")
    [ "$stage" != cellpose4 ] || options+=(--build-arg EXTRA=cellpose4)
    [ -z "${TORCH_INDEX:-}" ] || options+=(--build-arg "TORCH_INDEX=$TORCH_INDEX")
    [ -z "${TENSORFLOW:-}" ] || options+=(--build-arg "TENSORFLOW=$TENSORFLOW")
    [ ! -s "${SSL_CERT_FILE:-}" ] || options+=(--secret "id=ca,src=$SSL_CERT_FILE")
    if [ "$engine" = podman ]; then
        options+=(--pull=missing --layers)
        uv_cache="${UV_CACHE_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/uv}"
        [ ! -d "$uv_cache" ] || options+=(--volume "$uv_cache:/host/uv")
    fi
    if [ "$stage" = proseg ]; then
        proseg="$(find_proseg)"
        if [ -n "$proseg" ]; then
            prebuilt="$(mktemp -d)"
            cp "$proseg" "$prebuilt/proseg"
            ! command -v strip >/dev/null || strip "$prebuilt/proseg"
            options+=(--build-context "prebuilt=$prebuilt" --build-arg "RUST_IMAGE=$base")
        fi
    fi
    say "building $(image "$stage")"
    "${run[@]}" build "${options[@]}" "$root" >"$store/$stage.log" 2>&1 ||
        { tail -n 30 "$store/$stage.log" >&2; fail "$(image "$stage") could not be built" "all of it: $store/$stage.log"; }
    [ -z "$prebuilt" ] || rm -rf "$prebuilt"
    say "$(image "$stage") is built ($((SECONDS - start)) s)"
}

smoke() {
    local stage="${1%4}" start=$SECONDS options=()
    [ "$engine" = docker ] || options=(--read-only-tmpfs=false)
    "${run[@]}" run --rm --network=none --read-only "${options[@]}" --cap-drop=all --user 54321:54321 \
        --volume "$root/containers:/containers:ro" --tmpfs /work:rw,mode=1777 --workdir /work \
        "$(image "$1")" bash /containers/common/check-image "$stage" >"$store/$1.smoke.log" 2>&1 ||
        { tail -n 30 "$store/$1.smoke.log" >&2; fail "$(image "$1") does not work" "all of it: $store/$1.smoke.log"; }
    say "$(image "$1") works ($((SECONDS - start)) s)"
}

stages=("$@")
[ $# -gt 0 ] || stages=(core proseg domains cellpose stardist)
for stage in "${stages[@]}"; do
    case "$stage" in
        core | cellpose | cellpose4 | stardist | proseg | domains | baysor) ;;
        *) fail "unknown stage \"$stage\"" "known: core, cellpose, cellpose4, stardist, proseg, domains, baysor" ;;
    esac
done

mkdir -p "$store"
exec 9>"$store/.lock"
flock 9
find_engine
find_base
check_engine

# The others take the package from core.
others=()
for stage in "${stages[@]}"; do
    [ "$stage" = core ] || others+=("$stage")
done
stages=(core "${others[@]}")
for stage in "${stages[@]}"; do
    hash="$(source_hash "$stage")"
    tried="$store/$stage.works"
    name="$(image "$stage")"
    if [ "$("${run[@]}" image inspect --format '{{index .Config.Labels "cellquilt.source-hash"}}' "$name" 2>/dev/null)" != "$hash" ]; then
        build "$stage" "$hash"
    fi
    id="$("${run[@]}" image inspect --format '{{.Id}}' "$name")"
    if [ "$(cat "$tried" 2>/dev/null)" != "$id" ]; then
        smoke "$stage"
        printf '%s\n' "$id" >"$tried"
    fi
done

printf '%-40s %8s\n' image MB
for stage in "${stages[@]}"; do
    printf '%-40s %8d\n' "$(image "$stage")" "$(($("${run[@]}" image inspect --format '{{.Size}}' "$(image "$stage")") / 1000000))"
done
