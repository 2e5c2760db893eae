"""Code reward: a program is compiled where its language needs it, run on tests in the sandbox, and scored by how many
it passes (DeepSeek-R1, section 2.2.2: feedback by a compiler on predefined test cases).

There are two kinds of tests. By input and output: the program runs once for each test, in a sandbox of its own, and its
output is compared outside, so that the program cannot read expected outputs. By calls of a function (Python): see
sandbox/inside.py.

The truth of a `code` prompt is one JSON object: {"language": "python" or "cpp", "inputs": [...], "outputs": [...]}, or
{"language": "python", "entry_point": NAME, "setup": CODE, "tests": [CODE, ...]}.
"""

from __future__ import annotations

import ast
import json
import secrets
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from megatron_r1.config.reward import SandboxConfig
from megatron_r1.errors import DataError
from megatron_r1.rewards.program import find_program
from megatron_r1.rewards.reward import RewardPrompt, Unscored, Value
from megatron_r1.rewards.sandbox.command import PYTHON, WORK
from megatron_r1.rewards.sandbox.inside import NO_PYTHON
from megatron_r1.rewards.sandbox.run import Finished, Sandbox, SandboxDown

TASK = "code"
LANGUAGES = ("python", "cpp")
BINARY_BYTES = 64 << 20
COMPILER_MEMORY = 4
"""Memory of a compiler as a multiple of a program's."""
COMPILE = f"g++ -std=c++17 -O1 -pipe -x c++ /program.cpp -o {WORK}/program >&2 && exec cat {WORK}/program"
HARNESS = Path(__file__).parent / "sandbox" / "inside.py"


@dataclass(frozen=True, slots=True)
class CodeTests:
    """The tests of one prompt."""

    language: str
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    entry_point: str = ""
    setup: str = ""
    """Code that the tests need, run before each."""
    tests: tuple[str, ...] = ()
    """Code that calls `entry_point` and raises for a wrong result."""

    def __len__(self) -> int:
        return len(self.tests) or len(self.inputs)


@dataclass(frozen=True, slots=True)
class CodeResult:
    """Result of a program on its tests."""

    passed: int
    tests: int
    ended: str
    """done, compile_error, or the limit that ended a run: time, memory, disk, processes or output."""
    message: str = ""
    """Error message of the compiler."""

    @property
    def pass_rate(self) -> float:
        return self.passed / self.tests


@lru_cache(1024)
def read_tests(text: str) -> CodeTests:
    """The tests of a prompt.

    Raises:
        DataError: they do not have the form that this module describes.
    """
    try:
        found: dict[str, Any] = {name: value for name, value in json.loads(text).items() if value is not None}
        parts: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in found.items()}
        tests = CodeTests(**parts)
        lists = tests.inputs, tests.outputs, tests.tests
        if not all(isinstance(one, tuple) for one in lists) or not isinstance(tests.entry_point, str):
            raise TypeError("inputs, outputs and tests are lists of text, entry_point is text")
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(f"the tests of a code prompt are invalid: {error}") from None
    texts: list[Any] = [*tests.inputs, *tests.outputs, *tests.tests, tests.entry_point, tests.setup]
    by_call = bool(tests.tests) and tests.entry_point.isidentifier() and tests.language == "python"
    by_text = not tests.tests and len(tests.inputs) == len(tests.outputs) > 0
    if tests.language not in LANGUAGES or not all(isinstance(part, str) for part in texts) or not (by_call or by_text):
        raise DataError(
            "the tests of a code prompt are invalid: they need language python or cpp, and as many inputs as outputs "
            "or an entry_point with tests"
        )
    for code in (tests.setup, *tests.tests):
        _check_syntax(code)
    return tests


def _check_syntax(code: str) -> None:
    try:
        ast.parse(code)
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        line = getattr(error, "lineno", None)
        where = f" line {line}:" if line else ""
        raise DataError(f"the tests of a code prompt are invalid:{where} {getattr(error, 'msg', error)}") from None


def same_output(output: bytes, expected: str) -> bool:
    """Whether the outputs are equal, except for white space at the ends of lines and empty lines at the end."""

    def plain(text: str) -> list[str]:
        return [line.rstrip() for line in text.rstrip().split("\n")]

    return plain(output.decode(errors="replace")) == plain(expected)


def run_tests(program: str, tests: CodeTests, sandbox: Sandbox) -> CodeResult:
    """Run a program on its tests.

    Raises:
        SandboxDown: the sandbox failed, and nothing is known about the program.
    """
    if tests.tests:
        return _by_calls(program, tests, sandbox)
    body = program.encode(errors="replace")
    command, files = [*PYTHON, "/program.py"], {"/program.py": body}
    if tests.language == "cpp":
        compiled = sandbox.run(
            ["/bin/sh", "-c", COMPILE],
            {"/program.cpp": body},
            output_bytes=BINARY_BYTES,
            memory_mib=sandbox.config.memory_mib * COMPILER_MEMORY,
        )
        if not compiled.well:
            message = " ".join(compiled.errors.decode(errors="replace").split())[:500]
            return CodeResult(0, len(tests), "compile_error", message or compiled.ended)
        command, files = ["/program"], {"/program": compiled.output}
    passed, ended = 0, "done"
    for given, expected in zip(tests.inputs, tests.outputs, strict=True):
        run = sandbox.run(command, files, given.encode())
        passed += run.well and same_output(run.output, expected)
        ended = ended if run.ended == "itself" else run.ended
        if run.ended != "itself" or (passed == 0 and _does_not_compile(run)):
            break  # a program that hangs on one test would most likely hang on all
    return CodeResult(passed, len(tests), "compile_error" if passed == 0 and _does_not_compile(run) else ended)


def _by_calls(program: str, tests: CodeTests, sandbox: Sandbox) -> CodeResult:
    word = secrets.token_hex(16)
    job = {"word": word, "setup": tests.setup, "entry_point": tests.entry_point, "tests": tests.tests}
    files = {"/program.py": program.encode(errors="replace"), "/harness.py": HARNESS.read_bytes()}
    run = sandbox.run([*PYTHON, "/harness.py", tests.entry_point], files, json.dumps(job).encode() + b"\n")
    if run.ended == "itself" and run.code == NO_PYTHON:
        return CodeResult(0, len(tests), "compile_error", run.errors.decode(errors="replace")[:500])
    message = set(run.output.decode(errors="replace").splitlines())
    passed = sum(f"{word} {index}" in message for index in range(len(tests)))
    return CodeResult(passed, len(tests), "done" if run.ended == "itself" else run.ended)


def _does_not_compile(run: Finished) -> bool:
    """Whether Python could not parse /program.py."""
    lines = run.errors.splitlines()
    return run.code == 1 and bool(lines) and lines[-1].split(b":")[0] in (b"SyntaxError", b"IndentationError")


class CodeReward:
    """The share of its tests that a response's program passes."""

    name = "accuracy"

    def __init__(self, config: SandboxConfig):
        """Raises PlatformError: no sandbox works on this machine."""
        self._sandbox, self._per_test = Sandbox(config), config.per_test
        self._parallel = config.max_parallel

    def score(self, prompts: Sequence[RewardPrompt], texts: Sequence[str]) -> list[Value]:
        with ThreadPoolExecutor(self._parallel, "sandbox") as threads:
            return list(threads.map(self._one, prompts, texts))

    def _one(self, prompt: RewardPrompt, text: str) -> Value:
        tests = read_tests(prompt.answer)
        program = find_program(text, tests.language, tests.entry_point)
        if program is None:
            return 0.0
        try:
            result = run_tests(program, tests, self._sandbox)
        except SandboxDown as error:
            return Unscored(f"sandbox: {error}")
        return result.pass_rate if self._per_test else float(result.passed == result.tests)
