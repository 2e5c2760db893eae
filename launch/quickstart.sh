#!/usr/bin/env bash
# The main job, from random weights to a report: launch/quickstart.sh [key=value ...]
# After an interruption the same command resumes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh

# Where there is a GPU, `auto` uses it or fails with the reason; it never falls back to the CPU silently.
platform=cpu
if [[ "${MEGATRON_R1_LOCK:-gpu}" == gpu ]] && { [[ -e /dev/nvidia0 ]] || command -v nvidia-smi >/dev/null; }; then
    platform=auto
fi
exec .venv/bin/megatron-r1 pipeline --config-name quickstart "platform=$platform" "$@"
