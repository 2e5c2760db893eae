#!/usr/bin/env bash
# Makes .venv with all dependencies of megatron_r1. A second run takes about a second when nothing has changed.
# MEGATRON_R1_LOCK=cpu|gpu chooses the set of versions; without it, a working GPU chooses gpu.
# gpu: Linux on x86-64, a C++ compiler, 20 GB of disk, no GPU to set up and driver 580 or newer to run. It compiles
# Transformer Engine, half an hour of one core: MAX_JOBS limits how many files at once (1 to 2 GB of memory each).
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

pip_install() { .venv/bin/python -m pip install --quiet --quiet --no-deps "$@"; }

# What would fail after minutes of downloading fails here.
check_machine() {
    local gigabytes driver
    if [[ "$lock" == gpu ]]; then
        "${CXX:-c++}" --version >/dev/null 2>&1 ||
            stop "CXX=${CXX:-c++}: does not run; Transformer Engine needs a C++ compiler (Debian: g++)"
        [[ -f "$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" ]] ||
            stop "Transformer Engine needs Python's headers (Debian: python3-dev)"
        # Without a driver this is a machine to set up on, a login node for example.
        if driver="$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null)"; then
            driver="${driver%%.*}"
            ((driver >= 580)) || stop "the NVIDIA driver is version $driver: CUDA 13 needs 580 or newer"
        fi
    fi
    if ! compgen -G '.venv/lib/python3*/site-packages/torch' >/dev/null; then
        gigabytes="$(($(df --output=avail --block-size=1G . | tail -n 1)))"
        ((gigabytes >= disk)) || stop "$PWD has $gigabytes GB free: launch/lock/$lock.txt needs $disk GB"
    fi
}

# FlashInfer, DeepGEMM and SGLang compile kernels when a server starts. They link libraries by their names without a
# version, in lib64, as a CUDA toolkit has them.
complete_cuda() {
    local cuda library
    for cuda in .venv/lib/python3*/site-packages/nvidia/cu13; do
        ln -sfn lib "$cuda/lib64"
        for library in "$cuda"/lib/lib*.so.*; do
            ln -sf "${library##*/}" "${library%%.so.*}.so"
        done
    done
}

# Builds Transformer Engine's extension with the CUDA headers of the lock's packages: no CUDA toolkit is needed.
build_transformer_engine() {
    local inputs stamp=.venv/transformer_engine.stamp
    inputs="$(cat launch/lock/gpu-build.txt && grep '^torch==' launch/lock/gpu.txt && .venv/bin/python -VV)"
    if [[ ! -f "$stamp" || "$(<"$stamp")" != "$inputs" ]]; then
        say "building Transformer Engine: half an hour of one core, less with more"
        # pip's cache would return an extension that was built for another torch, and ninja compiles on all cores.
        PATH="$PWD/.venv/bin:$PATH" \
            NVTE_FRAMEWORK=pytorch NVTE_BUILD_USE_NVIDIA_WHEELS=1 NVTE_PYTORCH_FORCE_BUILD=TRUE \
            pip_install --no-build-isolation --no-cache-dir --force-reinstall -r launch/lock/gpu-build.txt ||
            stop "Transformer Engine was not built: the compiler's message is above; nothing runs without it"
    fi
    # As the program does, after torch, which loads NCCL from its package.
    .venv/bin/python -c 'import torch, transformer_engine.pytorch' ||
        stop "Transformer Engine was built but cannot be imported: the reason is above"
    printf '%s\n' "$inputs" >"$stamp"
}

rm -f "$stamp"
disk=8
[[ "$lock" == cpu ]] || disk=20
check_machine
say "installing the packages of launch/lock/$lock.txt: some minutes and $disk GB of disk the first time"
pip_install -r "launch/lock/$lock.txt"
if [[ "$lock" == gpu ]]; then
    complete_cuda
    build_transformer_engine
fi
say "installing megatron_r1 from this checkout"
pip_install --no-build-isolation --editable .
printf '%s\n' "$wanted" >"$stamp"
say "done"
