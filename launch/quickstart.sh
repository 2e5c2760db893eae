#!/usr/bin/env bash
# R1's whole recipe, from random weights to a report: launch/quickstart.sh [key=value ...]
# launch/quickstart.sh until=r1_zero is its short form, launch/quickstart.sh --list says what is done.
# After an interruption the same command resumes; after a change, what depends on it runs again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh

# Where there is a GPU, `auto` uses it or fails with the reason; it never falls back to the CPU silently.
platform=cpu pipeline=r1_tiny
if [[ "${MEGATRON_R1_LOCK:-gpu}" == gpu ]] && { [[ -e /dev/nvidia0 ]] || command -v nvidia-smi >/dev/null; }; then
    platform=auto pipeline=r1_tiny_gpu
fi
exec .venv/bin/megatron-r1 pipeline --config-name r1_tiny "platform=$platform" "pipeline=$pipeline" "$@"
