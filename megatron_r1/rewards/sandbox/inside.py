"""Runs inside the sandbox, never outside: calls a program's function from tests that the program cannot reach.

The program runs in a child process, which is forked before the tests are read and has none of this process's
descriptors. For the tests, its function is replaced by one that sends the arguments to the child and receives the
result as plain data: numbers, text and containers of them. So the program can neither read the tests, nor replace
`assert`, nor return an object that equals everything. The results of the tests go through a pipe that the child does
not have, each with a secret word that only the caller knows. The program can kill its parent, but then no test passes.

Standard input: one line of JSON, {"word", "setup", "entry_point", "tests"}. Standard output: a line for each passed
test, `WORD INDEX`. Exit status 3: Python cannot parse the program; the error is on standard error.
"""

from __future__ import annotations

import json
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import CodeType
    from typing import Any

LONGEST_LINE = 1 << 24
LARGEST_PLAIN_INT = 1 << 256
NO_PYTHON = 3
TAGS = {"tuple": tuple, "set": set, "frozenset": frozenset}


class Gone(BaseException):
    """The child has ended; no subclass of Exception, so that no test mistakes it for an exception of the program."""


def encode(value: Any, depth: int = 0) -> Any:
    """Plain data as JSON; containers that JSON lacks become {tag: contents}."""
    if depth > 200:
        raise TypeError("is nested too deeply")
    if value is None or isinstance(value, (bool, str, float)):
        return value
    if isinstance(value, int):
        return value if abs(value) < LARGEST_PLAIN_INT else {"int": hex(value)}
    if isinstance(value, list):
        return [encode(item, depth + 1) for item in value]
    if isinstance(value, dict):
        return {"dict": [[encode(key, depth + 1), encode(item, depth + 1)] for key, item in value.items()]}
    for tag, kind in TAGS.items():
        if isinstance(value, kind):
            return {tag: [encode(item, depth + 1) for item in value]}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": value.hex()}
    raise TypeError(f"{type(value).__name__} is no plain data")


def decode(value: Any) -> Any:
    """The inverse of `encode`."""
    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    ((tag, content),) = value.items()
    if tag == "dict":
        return {decode(key): decode(item) for key, item in content}
    if tag == "int":
        return int(content, 16)
    if tag == "complex":
        return complex(*content)
    if tag == "bytes":
        return bytes.fromhex(content)
    return TAGS[str(tag)](decode(item) for item in content)


def serve(code: CodeType, requests: int, replies: int, entry_point: str) -> None:
    """The child process: runs the program and answers calls of its function until the pipe is closed."""
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    program: dict[str, Any] = {"__name__": "program"}
    exec(code, program)
    function = program[entry_point]
    with os.fdopen(requests, "rb") as requests_file, os.fdopen(replies, "wb") as replies_file:
        for line in requests_file:
            try:
                arguments, named = decode(json.loads(line))
                reply = {"value": encode(function(*arguments, **named))}
            except Exception as error:
                reply = {"error": type(error).__name__}
            replies_file.write(json.dumps(reply).encode() + b"\n")
            replies_file.flush()


def remote(requests: int, replies: int) -> Callable[..., Any]:
    """A function that calls the program's function in the child."""
    requests_file, replies_file = os.fdopen(requests, "wb"), os.fdopen(replies, "rb")

    def call(*arguments: Any, **named: Any) -> Any:
        question = json.dumps(encode([list(arguments), named])).encode() + b"\n"
        try:
            requests_file.write(question)
            requests_file.flush()
        except OSError:
            raise Gone from None
        line = replies_file.readline(LONGEST_LINE)
        if not line.endswith(b"\n"):
            raise Gone
        reply = json.loads(line)
        if "value" in reply:
            return decode(reply["value"])
        kind = getattr(__builtins__, str(reply["error"]), RuntimeError)
        is_exception = isinstance(kind, type) and issubclass(kind, Exception)
        raise (kind if is_exception else RuntimeError)("in the program")

    return call


def main(entry_point: str) -> None:
    """Fork the child, read the tests and run each."""
    if os.path.exists("/proc"):  # exists on every machine, but not in the sandbox
        raise SystemExit("inside.py: runs in the sandbox only")
    try:
        with open("/program.py", encoding="utf-8") as file:
            code = compile(file.read(), "program.py", "exec")
    except Exception as error:
        os.write(2, f"{type(error).__name__}: {error}".encode(errors="replace"))
        os._exit(NO_PYTHON)
    down, up = os.pipe(), os.pipe()
    if os.fork() == 0:
        os.close(down[1])
        os.close(up[0])
        try:
            serve(code, down[0], up[1], entry_point)
        finally:
            os._exit(1)
    os.close(down[0])
    os.close(up[1])
    verdicts = os.fdopen(os.dup(1), "w")
    null = os.open(os.devnull, os.O_RDWR)
    job = json.loads(sys.stdin.readline())
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    function = remote(down[1], up[0])
    for index, test in enumerate(job["tests"]):
        tests: dict[str, Any] = {"__name__": "tests"}
        try:
            exec(compile(job["setup"], "setup.py", "exec"), tests)
            tests[entry_point] = function
            exec(compile(test, "test.py", "exec"), tests)
        except BaseException:
            continue
        verdicts.write(f"{job['word']} {index}\n")
        verdicts.flush()
    os._exit(0)


if __name__ == "__main__":
    sys.set_int_max_str_digits(0)
    main(sys.argv[1])
