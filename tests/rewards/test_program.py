"""The program of a response among examples of its input, its output and its calls."""

from __future__ import annotations

import pytest

from megatron_r1.rewards.program import find_program

PROGRAM = "print(input())"
FENCED = f"```python\n{PROGRAM}\n```"
FUNCTION = "def add(a, b):\n    return a + b"


@pytest.mark.parametrize(
    ("response", "program"),
    [
        ("<think>```python\nwrong\n```</think> <answer>\n```python\nright\n```\n</answer>", "right\n"),
        ("<answer>if a < b: print(a)</answer>", "if a < b: print(a)"),
        ("<think>x</think> first\n```\none\n```\nthen\n```c++\ntwo\n```\n", "two\n"),
        ("```python\nx = 1\n```", "x = 1\n"),
        ("<think>```python\nx = 1\n```</think> no code", None),
        ("<answer></answer>", None),
        ("<answer>```python\n\n```</answer>", None),
        ("print(1)", None),
        ("```python\n" + "x" * (1 << 19) + "\n```", None),
    ],
)
def test_the_program_is_found_in_the_response(response, program):
    assert find_program(response) == program


@pytest.mark.parametrize(
    "response",
    [
        f"{FENCED}\nFor the input 3 it prints:\n```\n3\n```",
        f"Given\n```\n3\n```\nthe program is\n{FENCED}",
        f"```text\na much longer example of what may be read from the input\n```\n{FENCED}",
        f'{FENCED}\nOutput:\n```json\n{{"a much longer": "example"}}\n```\n```bash\npython program.py < in\n```',
        FENCED.replace("\n", "\r\n"),
        "1. Program:\n" + "".join(f"   {line}\n" for line in FENCED.split("\n")),
        "- the program\n\n" + "".join(f"\t{line}\n" for line in FENCED.split("\n")),
        f"```Python\n{PROGRAM}\n```",
        f'```py title="a.py"\n{PROGRAM}\n```',
        f"~~~python3\n{PROGRAM}\n~~~",
        f"````python\n{PROGRAM}\n````",
        f"``` python  \n{PROGRAM}\n```  ",
        f"```{{.python}}\n{PROGRAM}\n```",
        f"<answer>{FENCED}</answer>",
        f"<answer>\n```python\n{PROGRAM}\n</answer>",
        f"Either <answer>```\n3\n```</answer> or <answer>{FENCED}</answer>",
        f"```\n{PROGRAM}\n```",
        f"```{PROGRAM}```",
        f"<think>```python\nfirst_try_that_is_much_longer()\n```</think>\n{FENCED}",
        f"{FENCED}\nThe first line:\n```python\ninput()\n```",
    ],
)
def test_examples_and_fences_of_every_kind(response):
    program = find_program(response, "python")
    assert program is not None and program.strip() == PROGRAM


@pytest.mark.parametrize(
    "response",
    [
        f"```python\n{FUNCTION}\n```\nExample usage:\n```python\nprint(add(1, 2), add(3, 4), add(5, 6), add(7))\n```",
        f"```python\nimport long_example\nprint('add', add(1, 2))\n```\n```python\n{FUNCTION}\n```",
        f"```\n{FUNCTION}\n```\n```python\nassert add(1, 2) == 3\n```",
        f"```python\ndef add(a, b): ...\n```\nand whole:\n```python\n{FUNCTION}\n```",
        f"```python\ndef add_all(numbers):\n    return sum(numbers) + 0 + 0 + 0\n```\n```python\n{FUNCTION}\n```",
        f"```python\nresult = add(1, 2)\nprint(result, 'is the result')\n```\n\n```python\n{FUNCTION}\n```",
    ],
)
def test_the_block_that_defines_the_function_is_the_program(response):
    program = find_program(response, "python", "add")
    assert program is not None and program.strip() == FUNCTION


def test_a_program_may_print_tags():
    program = "print('<answer>5</answer>')"
    assert find_program(f"<think>x</think> <answer>```python\n{program}\n```</answer>", "python") == f"{program}\n"
    assert find_program(f"<answer>{program}</answer>") == program


def test_each_language_has_its_own_blocks():
    both = f"{FENCED}\n```c++\nint main() {{}}\n```"
    assert find_program(both, "python") == f"{PROGRAM}\n" and find_program(both, "cpp") == "int main() {}\n"
    assert find_program("```cpp\nint main() {}\n```\n```\na longer example of output\n```", "cpp") == "int main() {}\n"
