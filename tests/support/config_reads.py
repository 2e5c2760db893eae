"""Which configuration keys each verb's code reads, found in the source without running it.

A small type inference over the syntax trees: a name is a configuration section because it is annotated as one, or
because it was assigned from an attribute of one. Every `section.field` outside of `megatron_r1.config` is a read. A
verb's reads are those of all modules that its module imports, directly or not: too many rather than too few.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_origin

import megatron_r1
from megatron_r1.config.run import RunConfig
from megatron_r1.config.schema import kinds_of
from megatron_r1.config.verbs import VERBS

PACKAGE = Path(megatron_r1.__file__).parent
PASSING = ("replace", "deepcopy", "zip", "enumerate", "list", "sorted")
"""Functions that give back their first argument, or its items."""
Kinds = frozenset[type]
NOTHING: Kinds = frozenset()


def sections_in(kind: Any) -> Kinds:
    """The section classes that a declared type holds: itself, one of a union, or the items of a list or dict."""
    if isinstance(kind, UnionType) or get_origin(kind) in (list, dict):
        return frozenset().union(*(sections_in(part) for part in get_args(kind)))
    return frozenset([kind]) if hasattr(kind, "__dataclass_fields__") else NOTHING


@cache
def section_classes(section: Any = RunConfig) -> dict[str, Any]:
    """Class name -> class, of every section."""
    found = {section.__name__: section}
    for kind in kinds_of(section).values():
        for part in sections_in(kind):
            found |= section_classes(part)
    return found


@cache
def paths_of_sections() -> dict[type, list[str]]:
    """Section class -> every dotted key where it stands."""
    found: dict[type, list[str]] = {RunConfig: [""]}
    waiting: list[tuple[Any, str]] = [(RunConfig, "")]
    while waiting:
        section, path = waiting.pop()
        for key, kind in kinds_of(section).items():
            for part in sections_in(kind):
                found.setdefault(part, []).append(f"{path}{key}.")
                waiting.append((part, f"{path}{key}."))
    return found


@cache
def tree_of(module: str) -> ast.Module:
    """The syntax tree of a module."""
    return ast.parse(file_of(module).read_text(encoding="utf-8"))


def file_of(module: str) -> Path:
    """Where a module of the package would be; nothing is imported to find it."""
    path = PACKAGE.parent / module.replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


@cache
def imports_of(module: str) -> frozenset[str]:
    """Modules of the package that a module imports when it runs, in its functions too."""
    found: set[str] = set()
    for node in _running(tree_of(module)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("megatron_r1"):
            found.add(node.module)
            found |= {f"{node.module}.{name.name}" for name in node.names if _is_module(f"{node.module}.{name.name}")}
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names if name.name.startswith("megatron_r1")}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("megatron_r1."):
            found |= {node.value} if _is_module(node.value) else set()
    return frozenset(name for name in found if _is_module(name))


@cache
def closure_of(module: str) -> frozenset[str]:
    """A module and all that it imports, without the configuration itself."""
    visited: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name not in visited and not name.startswith("megatron_r1.config"):
            visited.add(name)
            waiting += imports_of(name)
    return frozenset(visited)


@cache
def keys_read_by(verb: str) -> frozenset[str]:
    """Dotted keys of all fields that the verb's modules read."""
    found: set[str] = set()
    for module in closure_of(VERBS[verb].module):
        for section, name in reads_of(module):
            found |= {f"{path}{name.removesuffix('_')}" for path in paths_of_sections()[section]}
    return frozenset(found)


@cache
def reads_of(module: str) -> frozenset[tuple[type, str]]:
    """Section class and field of every read in a module."""
    reader = _Reader()
    reader.visit(tree_of(module))
    return frozenset(reader.found)


def _is_module(name: str) -> bool:
    return file_of(name).is_file()


def _running(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those that only a type checker sees."""
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        return
    yield node
    for child in ast.iter_child_nodes(node):
        yield from _running(child)


@cache
def returned_sections() -> dict[str, Kinds]:
    """Function or property name -> the section that it is annotated to return, over the whole package."""
    found: dict[str, Kinds] = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.returns is not None and (kinds := _annotated(node.returns)):
                found[node.name] = kinds
    return found


@cache
def attributes() -> dict[str, Kinds]:
    """Attribute name -> the section that classes of the package annotate it as, or set it to."""
    found: dict[str, Kinds] = {}
    for path in PACKAGE.rglob("*.py"):
        if path.is_relative_to(PACKAGE / "config"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                for name, kinds in _attributes_of(node):
                    found[name] = found.get(name, NOTHING) | kinds
    return found


def _attributes_of(node: ast.ClassDef) -> Iterator[tuple[str, Kinds]]:
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            yield statement.target.id, _annotated(statement.annotation)
        if isinstance(statement, ast.FunctionDef):
            reader = _Reader()
            reader.visit(statement)
            yield from ((name[5:], kinds) for name, kinds in reader.assigned.items() if name.startswith("self."))


def _annotated(node: ast.expr) -> Kinds:
    """The sections whose names stand in an annotation."""
    names = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
    names |= {
        name
        for part in ast.walk(node)
        if isinstance(part, ast.Constant) and isinstance(part.value, str)
        for name in part.value.replace("|", " ").split()
    }
    return frozenset(section_classes()[name] for name in names & section_classes().keys())


class _Reader(ast.NodeVisitor):
    """Walks through functions in order and notes what is read of a section."""

    def __init__(self) -> None:
        self.found: set[tuple[type, str]] = set()
        self.assigned: dict[str, Kinds] = {}

    def visit_arg(self, node: ast.arg) -> None:
        if node.annotation is not None:
            self._bind(node.arg, _annotated(node.annotation))

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self.generic_visit(node)
        self._bind(ast.unparse(node.target), _annotated(node.annotation))

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target in node.targets:
            self._assign(target, node.value)

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        self.generic_visit(node)
        self._assign(node.target, node.value)

    def visit_For(self, node: ast.For) -> None:
        self._iterate(node.target, node.iter)
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        self._iterate(node.target, node.iter)
        self.generic_visit(node)

    def visit_ListComp(self, node: ast.ListComp) -> None:
        self._comprehend(node)

    def visit_SetComp(self, node: ast.SetComp) -> None:
        self._comprehend(node)

    def visit_GeneratorExp(self, node: ast.GeneratorExp) -> None:
        self._comprehend(node)

    def visit_DictComp(self, node: ast.DictComp) -> None:
        self._comprehend(node)

    def visit_With(self, node: ast.With) -> None:
        for item in node.items:
            if item.optional_vars is not None:
                self._assign(item.optional_vars, item.context_expr)
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        for section in self._kinds(node.value):
            self._read(section, node.attr)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        """`getattr(section, name)` and `asdict(section)` may read every field."""
        if isinstance(node.func, ast.Name) and node.func.id in ("getattr", "asdict", "attrgetter") and node.args:
            for section in self._kinds(node.args[0]):
                for name in section.__dataclass_fields__:  # type: ignore[attr-defined]
                    self._read(section, name)
        self.generic_visit(node)

    def _comprehend(self, node: ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp) -> None:
        for part in node.generators:
            self.visit(part)
        self.generic_visit(node)

    def _read(self, section: type, name: str) -> None:
        if name in section.__dataclass_fields__:  # type: ignore[attr-defined]
            self.found.add((section, name))
        elif hasattr(section, name):
            self.found |= {(section, field) for field in _fields_of_method(section, name)}

    def _bind(self, name: str, kinds: Kinds) -> None:
        if kinds:
            self.assigned[name] = kinds

    def _assign(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
            for part, given in zip(target.elts, value.elts, strict=True):
                self._assign(part, given)
        else:
            self._bind(ast.unparse(target), self._kinds(value))

    def _iterate(self, target: ast.expr, over: ast.expr) -> None:
        kinds = self._kinds(over)
        for name in ast.walk(target):
            if isinstance(name, ast.Name):
                self._bind(name.id, kinds)

    def _kinds(self, node: ast.expr) -> Kinds:
        """The sections that an expression may be."""
        known = self.assigned.get(ast.unparse(node))
        if known is not None:
            return known
        if isinstance(node, ast.Attribute):
            found: Kinds = NOTHING
            for section in self._kinds(node.value):
                field = section.__dataclass_fields__.get(node.attr)  # type: ignore[attr-defined]
                found |= sections_in(kinds_of(section)[node.attr.removesuffix("_")]) if field else NOTHING
            return found or (attributes_now().get(node.attr, NOTHING) if not self._kinds(node.value) else NOTHING)
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name):
                if node.func.id in section_classes():
                    return frozenset([section_classes()[node.func.id]])
                if node.func.id in PASSING and node.args:
                    return self._kinds(node.args[0])
                return returned_sections().get(node.func.id, NOTHING)
            if isinstance(node.func, ast.Attribute):
                return self._kinds(node.func.value) or returned_sections().get(node.func.attr, NOTHING)
        if isinstance(node, ast.Subscript):
            return self._kinds(node.value)
        if isinstance(node, ast.IfExp):
            return self._kinds(node.body) | self._kinds(node.orelse)
        if isinstance(node, ast.BoolOp):
            return frozenset().union(*(self._kinds(value) for value in node.values))
        return NOTHING


_COLLECTING: list[bool] = []


def attributes_now() -> dict[str, Kinds]:
    """`attributes`, and nothing while they are being collected."""
    if _COLLECTING:
        return {}
    _COLLECTING.append(True)
    try:
        return attributes()
    finally:
        _COLLECTING.clear()


@cache
def _fields_of_method(section: type, name: str) -> frozenset[str]:
    """Fields that a method or property of a section reads of its own."""
    found: set[str] = set()
    for node in ast.walk(tree_of(section.__module__)):
        if isinstance(node, ast.ClassDef) and node.name == section.__name__:
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and method.name == name:
                    for part in ast.walk(method):
                        if isinstance(part, ast.Attribute) and ast.unparse(part.value) == "self":
                            if part.attr in section.__dataclass_fields__:  # type: ignore[attr-defined]
                                found.add(part.attr)
                            else:
                                found |= _fields_of_method(section, part.attr)
    return frozenset(found)
