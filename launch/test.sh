#!/usr/bin/env bash
# The test suite without its long forms, or a part of it: launch/test.sh [pytest arguments ...].
# The long forms (campaigns of faults, whole recipes, real servers many times): launch/test.sh -m slow.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh

# Debian packages that tests use. Installed where that is possible; elsewhere those tests are skipped with the reason.
debian_packages=(bubblewrap chromium g++ munge slurm-wlm)
if ((${#debian_packages[@]})) && [[ -f /etc/debian_version && "$(id -u)" == 0 ]]; then
    if ! dpkg --status "${debian_packages[@]}" >/dev/null 2>&1; then
        printf 'test: installing %s\n' "${debian_packages[*]}" >&2
        apt-get update --quiet --quiet
        export DEBIAN_FRONTEND=noninteractive
        apt-get install --yes --quiet --quiet --no-install-recommends "${debian_packages[@]}"
    fi
fi

# Transformer Engine's Python half, for tests/transformer_engine. Where it cannot be installed, those are skipped.
if ! cmp --silent launch/lock/te.txt .te/lock.txt; then
    printf 'test: installing Transformer Engine into .te (0.4 GB)\n' >&2
    rm -rf .te
    packages=(--no-deps --target .te --requirement launch/lock/te.txt)
    if .venv/bin/python -m pip install --quiet --quiet --disable-pip-version-check "${packages[@]}"; then
        cp launch/lock/te.txt .te/lock.txt
    fi
fi

# Two workers, since most minutes go to tests that wait for processes; a file's tests share ranks and servers, so they
# go to one worker. What is named on the command line runs in this process: its output comes at once.
(($#)) || set -- --numprocesses=2 --dist=loadfile --no-loadscope-reorder
exec .venv/bin/python -m pytest --durations=10 "$@"
