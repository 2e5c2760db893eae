#!/usr/bin/env bash
# Makes .venv with all dependencies of megatron_r1. A second run takes about a second when nothing has changed.
# MEGATRON_R1_LOCK=cpu|gpu chooses the set of versions; without it, a working GPU chooses gpu.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PIP_DISABLE_PIP_VERSION_CHECK=1

say() { printf 'setup: %s\n' "$*" >&2; }
stop() {
    say "$*"
    exit 1
}

# A candidate counts only when it really runs: a pyenv shim may be found and then refuse.
works() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1; }
complete() { "$1" -c 'import ensurepip, venv' >/dev/null 2>&1; }

find_python() {
    local candidate
    for candidate in python3.12 python3.13 "$HOME"/.pyenv/versions/3.1[2-9]*/bin/python python3; do
        if works "$candidate" && complete "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    return 1
}

make_venv() {
    local python
    if python="$(find_python)"; then
        say "making .venv with $python"
        "$python" -m venv --clear .venv
    elif command -v uv >/dev/null; then
        say "making .venv with uv"
        uv venv --quiet --clear --seed --python 3.12 .venv
    elif works python3.12 || works python3; then
        stop "this Python cannot make a virtual environment: install its venv module (Debian: python3-venv)"
    else
        stop "needs Python 3.12 or newer; found none as python3.12, python3.13, python3, in ~/.pyenv/versions or by uv"
    fi
}

lock="${MEGATRON_R1_LOCK:-}"
if [[ -z "$lock" ]]; then
    lock=cpu
    if command -v nvidia-smi >/dev/null; then
        if nvidia-smi -L >/dev/null 2>&1; then lock=gpu; else say "nvidia-smi fails: installing the CPU versions"; fi
    fi
fi
[[ "$lock" == cpu || "$lock" == gpu ]] || stop "MEGATRON_R1_LOCK=$lock: must be cpu or gpu"

works .venv/bin/python || make_venv

# The checkout's path is part of the stamp, since the package is installed in place.
wanted="$(
    { cat launch/lock/"$lock"*.txt pyproject.toml && .venv/bin/python -VV && echo "$lock $PWD"; } | sha256sum
)"
stamp=.venv/megatron_r1.stamp
if [[ -f "$stamp" && "$(<"$stamp")" == "$wanted" ]]; then
    exit 0
fi

rm -f "$stamp"
say "installing the packages of launch/lock/$lock.txt: some minutes and 7 GB of disk the first time"
.venv/bin/python -m pip install --quiet --quiet --no-deps -r "launch/lock/$lock.txt"
if [[ "$lock" == gpu ]]; then
    say "building Transformer Engine"
    .venv/bin/python -m pip install --quiet --quiet --no-deps --no-build-isolation -r launch/lock/gpu-build.txt ||
        say "Transformer Engine cannot be built here (it needs the CUDA toolkit): torch's own modules will be used"
fi
say "installing megatron_r1 from this checkout"
.venv/bin/python -m pip install --quiet --quiet --no-deps --no-build-isolation --editable .
printf '%s\n' "$wanted" >"$stamp"
say "done"
