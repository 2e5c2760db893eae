#!/usr/bin/env bash
# The quick checks, for every commit: style, types, contracts, scripts, rules of the repository, fast unit tests.
# Three minutes on two quiet cores. launch/check.sh lint leaves out the tests; launch/test.sh runs the suite.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
bash launch/setup.sh || exit
bin=.venv/bin failed=()

part() {
    local name=$1 started=$SECONDS
    shift
    "$@" || failed+=("$name")
    printf 'check: %-14s %3d s\n' "$name" "$((SECONDS - started))"
}

part ruff "$bin/ruff" check --quiet .
part format "$bin/ruff" format --quiet --check .
part shellcheck "$bin/shellcheck" launch/*.sh launch/*/*.sh tools/*.sh .ci/run
part hadolint "$bin/hadolint" launch/Containerfile
part contracts "$bin/lint-imports" --cache-dir .import_linter_cache
part types "$bin/mypy"
if [[ "${1:-}" != lint ]]; then
    # What test_repository runs as programs has run above; building a wheel takes half a minute.
    part repository "$bin/python" -m pytest --quiet tests/test_repository.py tests/test_verification_card.py \
        -k 'not ruff and not mypy and not shellcheck and not hadolint and not one_way and not wheel'
    # 300 tests of a second or less: nothing that starts ranks, servers or whole runs, or trains for long.
    part units "$bin/python" -m pytest --quiet --disable-warnings -m 'not (slow or dist or sglang or gpu)' \
        tests/evaluation tests/rl/advantages tests/rl/objective tests/rollout tests/track tests/test_files.py \
        tests/train/test_schedule.py
fi

if ((${#failed[@]})); then
    printf 'check: failed: %s\n' "${failed[*]}" >&2
    exit 1
fi
echo 'check: passed'
