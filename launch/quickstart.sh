#!/usr/bin/env bash
# The main job, from random weights to a report: launch/quickstart.sh [key=value ...]
# Interrupted, the same command goes on where it was.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh

# Where there is a GPU, `auto` takes it or says what is wrong with it; it never falls back to the CPU in silence.
platform=cpu
if [[ "${MEGATRON_R1_LOCK:-gpu}" == gpu ]] && { [[ -e /dev/nvidia0 ]] || command -v nvidia-smi >/dev/null; }; then
    platform=auto
fi
exec .venv/bin/megatron-r1 pipeline --config-name quickstart "platform=$platform" "$@"
