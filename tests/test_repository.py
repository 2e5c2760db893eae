"""The repository keeps its own rules: style, types, layers, scripts, what code may do, and a README that is true."""

from __future__ import annotations

import ast
import fnmatch
import functools
import graphlib
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "megatron_r1"
TOP_LEVEL = {"pyproject.toml", "README.md", "LICENSE", "megatron_r1", "launch", "configs", "tools", "tests"}
# Made by running or building, and ignored by git.
BY_PRODUCTS = {"runs", "build", "dist", "wandb", "__pycache__", "*.egg-info"}
FUNCTION_LINES, FILE_LINES, LINE_LENGTH = 80, 450, 120


def run(*command: str | Path, deadline: int = 100) -> None:
    """Run a checker of the environment that runs the tests; its findings are the failure's message."""
    program = Path(sys.executable).with_name(str(command[0]))
    done = subprocess.run(
        [program, *command[1:]], cwd=ROOT, capture_output=True, text=True, timeout=deadline, check=False
    )
    assert done.returncode == 0, f"{command[0]} found:\n{done.stdout}{done.stderr}"


def python_files(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


CODE = python_files("megatron_r1", "tools")
EVERYTHING = [*CODE, *python_files("tests")]


@functools.cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# Checkers.


def test_ruff_check() -> None:
    run("ruff", "check", ".")


def test_ruff_format() -> None:
    run("ruff", "format", "--check", ".")


@pytest.mark.timeout(600)
def test_mypy() -> None:
    run("mypy", deadline=580)  # what pyproject.toml names: the package, the tools and the tests


def test_imports_go_one_way() -> None:
    run("lint-imports", "--no-cache")


def runtime_imports(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Import statements that are carried out, those inside functions too; not what only type checkers read."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif not (isinstance(child, ast.If) and dotted(child.test).endswith("TYPE_CHECKING")):
            yield from runtime_imports(child)


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def import_graph(sources: dict[str, ast.Module]) -> dict[str, set[str]]:
    """Module -> modules of ours that it imports."""
    graph: dict[str, set[str]] = {}
    for module, source in sources.items():
        imported: set[str] = set()
        for statement in runtime_imports(source):
            if isinstance(statement, ast.Import):
                imported |= {alias.name for alias in statement.names}
            elif statement.module:
                whole = {f"{statement.module}.{alias.name}" for alias in statement.names}
                imported |= {name if name in sources else name.rpartition(".")[0] for name in whole}
        graph[module] = (imported & sources.keys()) - {module}
    return graph


def circle(graph: dict[str, set[str]]) -> list[str]:
    """One circle of the graph, or nothing."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


@pytest.mark.parametrize(
    ("first", "found"),
    [
        ("from b import x", ["a", "b", "a"]),
        ("def f():\n    import b", ["a", "b", "a"]),
        ("if TYPE_CHECKING:\n    import b", []),
        ("import c", []),
    ],
)
def test_a_circle_of_imports_is_found(first: str, found: list[str]) -> None:
    assert circle(import_graph({"a": ast.parse(first), "b": ast.parse("import a"), "c": ast.parse("")})) in (
        found,
        found[1:2] + found[:2],
    )


def test_no_files_import_each_other_in_a_circle() -> None:
    package = {module_name(path): tree(path) for path in python_files("megatron_r1")}
    assert circle(import_graph(package)) == []


def shell_scripts() -> list[Path]:
    folders = (ROOT / "launch", ROOT / "tools")
    return [*sorted(path for folder in folders for path in folder.rglob("*.sh")), ROOT / ".ci/run"]


def test_shellcheck() -> None:
    run("shellcheck", *shell_scripts())


@pytest.mark.skipif(
    not Path(sys.executable).with_name("hadolint").exists(), reason="needs launch/setup.sh: no hadolint"
)
def test_hadolint() -> None:
    run("hadolint", ROOT / "launch" / "Containerfile")


def test_scripts_can_be_run() -> None:
    scripts = shell_scripts()
    assert [name(path) for path in scripts if not os.access(path, os.X_OK)] == []


# What code may do.


def dotted(node: ast.expr) -> str:
    """`torch.load` for the expression torch.load; the last name alone where the rest is no plain name."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        head = dotted(node.value)
        return f"{head}.{node.attr}" if head else node.attr
    return ""


def keyword(call: ast.Call, wanted: str) -> object:
    values = [item.value for item in call.keywords if item.arg == wanted]
    return values[0].value if values and isinstance(values[0], ast.Constant) else (values[0] if values else None)


SANDBOXED = "megatron_r1/rewards/sandbox/inside.py"
"""The one file that executes what it reads: it runs inside the sandbox only."""
FORBIDDEN_CALLS = {"eval", "exec", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "marshal.loads"}
FORBIDDEN_NAMES = {
    ("pickle", "load"),
    ("pickle", "loads"),
    ("pickle", "Unpickler"),
    ("dill", "load"),
    ("dill", "loads"),
    ("joblib", "load"),
    ("hydra.utils", "instantiate"),
    ("hydra.utils", "call"),
}


def forbidden(module: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, what) of everything that would execute what it reads."""
    for node in ast.walk(module):
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (node.module, alias.name) in FORBIDDEN_NAMES:
                    yield node.lineno, f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Attribute):
            owner, _, attribute = dotted(node).rpartition(".")
            if any(attribute == bad and owner in (source, f"_{source}") for source, bad in FORBIDDEN_NAMES):
                yield node.lineno, dotted(node)
        elif isinstance(node, ast.Call):
            called = dotted(node.func)
            if called in FORBIDDEN_CALLS:
                yield node.lineno, called
            if called.rpartition(".")[2] == "instantiate":
                yield node.lineno, called
            if called == "torch.load" and keyword(node, "weights_only") is not True:
                yield node.lineno, "torch.load without weights_only=True"
            if keyword(node, "weights_only") is False:
                yield node.lineno, "weights_only=False"
            for option in ("shell", "trust_remote_code", "allow_pickle"):
                if keyword(node, option) not in (None, False):
                    yield node.lineno, f"{option}=True"


@pytest.mark.parametrize(
    "text",
    [
        "eval('1')",
        "exec(text)",
        "import pickle\npickle.load(file)",
        "from pickle import loads",
        "loader = pickle.Unpickler",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "subprocess.run('ls', shell=True)",
        "subprocess.run('ls', shell=flag)",
        "AutoModel.from_pretrained(folder, trust_remote_code=True)",
        "yaml.load(text)",
        "hydra.utils.instantiate(config)",
        "from hydra.utils import instantiate",
        "instantiate(config)",
        "numpy.load(path, allow_pickle=True)",
        "os.system('ls')",
    ],
)
def test_forbidden_code_is_seen(text: str) -> None:
    assert list(forbidden(ast.parse(text)))


@pytest.mark.parametrize(
    "text",
    ["torch.load(path, weights_only=True)", "model.eval()", "subprocess.run(['ls'], shell=False)", "json.load(x)"],
)
def test_ordinary_code_is_let_through(text: str) -> None:
    assert not list(forbidden(ast.parse(text)))


def test_nothing_read_is_executed() -> None:
    outside = [path for path in CODE if name(path) != SANDBOXED]
    found = [f"{name(path)}:{line}: {what}" for path in outside for line, what in forbidden(tree(path))]
    assert found == []


# Size and words.


def functions(module: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(module) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def test_functions_are_short() -> None:
    long = [
        f"{name(path)}:{function.lineno}: {function.name} has {lines} lines"
        for path in CODE
        for function in functions(tree(path))
        if (lines := (function.end_lineno or 0) - function.lineno + 1) > FUNCTION_LINES
    ]
    assert long == []


def test_files_are_short() -> None:
    counts = {name(path): len(path.read_text(encoding="utf-8").splitlines()) for path in EVERYTHING}
    assert {path: lines for path, lines in counts.items() if lines > FILE_LINES} == {}


def test_lines_are_short_everywhere() -> None:
    folders = [ROOT / "launch", ROOT / "configs", ROOT / ".github"]
    paths = [path for folder in folders for path in folder.rglob("*.*") if path.suffix != ".md"] + shell_scripts()
    long = [
        f"{name(path)}:{number}"
        for path in paths
        if path.is_file()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if len(line) > LINE_LENGTH
    ]
    assert long == []


def test_every_module_says_what_it_is() -> None:
    assert [name(path) for path in EVERYTHING if not ast.get_docstring(tree(path))] == []


def test_no_class_name_has_two_meanings() -> None:
    found: dict[str, list[str]] = {}
    for path in python_files(PACKAGE):
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name.lstrip("_"), []).append(name(path))
    assert {kind: paths for kind, paths in found.items() if len(paths) > 1} == {}


def test_every_package_folder_is_a_package() -> None:
    folders = {path.parent for path in python_files("megatron_r1")}
    assert [name(folder) for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []


def test_nothing_is_left_for_later() -> None:
    marks = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|X" + r"XX)\b")
    found = [
        f"{name(path)}:{number}"
        for path in EVERYTHING
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if marks.search(line)
    ]
    assert found == []


# The tree.


def test_top_level_holds_what_it_should() -> None:
    entries = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    extra = {entry for entry in entries if not any(fnmatch.fnmatch(entry, known) for known in TOP_LEVEL | BY_PRODUCTS)}
    assert extra == set()
    assert TOP_LEVEL - {"tools"} <= entries


def readme_tree() -> list[str]:
    """Paths that README's annotated tree names: its first fenced block after the heading `## The tree`."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = text.split("## The tree", 1)[1].split("```", 2)[1]
    paths: list[str] = []
    parents: list[str] = []
    for line in block.splitlines()[1:]:
        if not line.strip():
            continue
        depth = (len(line) - len(line.lstrip())) // 2
        entry = line.split()[0]
        parents = [*parents[:depth], entry.rstrip("/")]
        path = "/".join(parents)
        assert (ROOT / path).exists(), f"README names {path}, which does not exist"
        assert (ROOT / path).is_dir() == entry.endswith("/"), f"README: {path} is a folder if and only if it ends in /"
        assert len(line.split()) > 1, f"README says nothing about {path}"
        paths.append(path)
    return paths


def test_readme_tree_is_the_tree() -> None:
    named = readme_tree()
    assert len(named) == len(set(named))
    package = {name(path.parent) for path in python_files("megatron_r1")}
    package_files = {name(path) for path in (ROOT / "megatron_r1").glob("*.py")} - {"megatron_r1/__init__.py"}
    programs = {name(path) for folder in ("launch", "tools") for path in (ROOT / folder).glob("*.*")}
    configs = {name(path) for path in (ROOT / "configs").iterdir() if path.is_dir()}
    assert sorted((package | package_files | programs | configs | TOP_LEVEL - {"tools"}) - set(named)) == []


def test_readme_commands_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [script for script in re.findall(r"\blaunch/[\w.-]+\.sh\b", text) if not (ROOT / script).is_file()] == []
    recipes = re.findall(r"--config-name[ =]([a-z]\w*)", text)
    assert [recipe for recipe in recipes if not (ROOT / "configs" / f"{recipe}.yaml").is_file()] == []


def test_locks_pin_every_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    lines = [line for line in (ROOT / "launch/lock/cpu.txt").read_text().splitlines() if line and line[0] != "#"]
    assert [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.+!]+", line)] == []
    pinned = dict(line.lower().replace("_", "-").split("==") for line in lines)
    for requirement in wanted:
        package, _, version = requirement.partition("==")
        package = re.split(r"[\[>=<]", package)[0].lower().replace("_", "-")
        assert package in pinned, f"launch/lock/cpu.txt lacks {package}"
        assert not version or pinned[package] == version


def normalised(distribution: str) -> str:
    return re.sub(r"[-_.]+", "-", re.split(r"[\[>=<;! ]", distribution)[0]).lower()


@functools.cache
def installed() -> Mapping[str, list[str]]:
    """Module -> the distributions that bring it; takes seconds."""
    return importlib.metadata.packages_distributions()


def distributions_of(module: str) -> set[str]:
    """Names of the installed distributions that bring a module; the module's own name where none is installed."""
    return {normalised(found) for found in installed().get(module, [module])}


OPTIONAL = {"transformer-engine", "megatron-fsdp"}
"""Imported only where they are installed; extras, or parts of another distribution."""


def test_every_import_of_the_package_is_declared() -> None:
    imported: dict[str, Path] = {}
    for path in python_files("megatron_r1"):
        for statement in runtime_imports(tree(path)):
            names = [alias.name for alias in statement.names] if isinstance(statement, ast.Import) else []
            names += [statement.module] if isinstance(statement, ast.ImportFrom) and statement.module else []
            imported |= {dotted_name.partition(".")[0]: path for dotted_name in names}
    foreign = {module: path for module, path in imported.items() if module not in {*sys.stdlib_module_names, PACKAGE}}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {normalised(requirement) for requirement in project["dependencies"]}
    undeclared = [
        f"{name(path)}: {module}"
        for module, path in foreign.items()
        if not distributions_of(module) & (declared | OPTIONAL)
    ]
    assert undeclared == []
    unused = declared - {found for module in foreign for found in distributions_of(module)}
    assert unused == set(), "declared as needed at run time and never imported"


def test_wheel_carries_the_configs(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", tmp_path, ROOT], check=True, timeout=100, capture_output=True)
    (wheel,) = tmp_path.glob("megatron_r1-*.whl")
    listing = subprocess.run(
        [sys.executable, "-m", "zipfile", "-l", wheel], check=True, timeout=30, capture_output=True, text=True
    ).stdout
    shipped = set(re.findall(r"^megatron_r1/_configs/(\S+)", listing, re.MULTILINE))
    assert shipped == {path.relative_to(ROOT / "configs").as_posix() for path in (ROOT / "configs").rglob("*.*")}
