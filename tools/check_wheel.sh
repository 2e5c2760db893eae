#!/usr/bin/env bash
# Shows that a wheel is complete: tools/check_wheel.sh [FOLDER]
# Builds it, installs it with the dependencies that it declares into an empty virtual environment, and there, outside of
# the checkout, imports every module of the package and composes every recipe. The first time it takes about 15 GB of
# disk and a quarter of an hour: SGLang's dependencies are those of a GPU. With FOLDER, what is there is used again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
checkout="$PWD"
bash launch/setup.sh
folder="${1:-}"
if [[ -z "$folder" ]]; then
    folder="$(mktemp -d)"
    trap 'rm -rf "$folder"' EXIT
fi
mkdir -p "$folder"
folder="$(cd "$folder" && pwd)"

rm -f "$folder"/*.whl
.venv/bin/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$folder" .
[[ -x "$folder/venv/bin/python" ]] || .venv/bin/python -m venv "$folder/venv"
# Versions are those that pip resolved for gpu.txt; without them its search for a set that agrees takes long.
grep --invert-match '^#' launch/lock/gpu.txt >"$folder/constraints.txt"
pip=("$folder/venv/bin/python" -m pip --disable-pip-version-check --quiet)
"${pip[@]}" install --constraint "$folder/constraints.txt" "$folder"/*.whl
"${pip[@]}" install --force-reinstall --no-deps "$folder"/*.whl
"${pip[@]}" check

cd "$folder"
env --unset=PYTHONPATH "$folder/venv/bin/python" - "$checkout" <<'PYTHON'
import importlib
import pkgutil
import sys
from pathlib import Path

import megatron_r1
from megatron_r1.config.load import as_yaml, load
from megatron_r1.config.recipes import recipes
from megatron_r1.config.verbs import VERBS
from megatron_r1.platform import select

package = Path(megatron_r1.__file__).parent
assert not package.is_relative_to(sys.argv[1]), f"{package} is the checkout's"
for verb, recipe in [*((verb, None) for verb in VERBS), *(("pretrain", recipe) for recipe in recipes())]:
    as_yaml(load(verb, [], recipe))
select("cpu")  # before anything imports megatron.core
modules = [module.name for module in pkgutil.walk_packages([str(package)], "megatron_r1.")]
modules = [name for name in modules if not name.endswith(".__main__") and ".stubs" not in name]
for name in modules:
    importlib.import_module(name)
print(f"{len(modules)} modules imported from {package}; {len(recipes())} recipes and {len(VERBS)} verbs composed")
PYTHON
