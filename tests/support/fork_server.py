"""Python programs in forks of one process that has imported their libraries, which is most of what a short one costs.

    run_forked("megatron_r1", "sample", "name=one")           # what `python -W ignore -m megatron_r1 sample ...` does
    run_forked_to_the_end(folder / "program.py", folder)      # a file, which must succeed
    run_forked_to_the_end("tests/dist/ranks_layouts.py", folder, ranks=2)

A program starts with the environment and the folder of its caller, has an output and a process group of its own, and
ends as an interpreter does. Two things differ from a fresh interpreter: what the program imports is there before, and
the order of sets is that of all other forks. One fresh start of each verb is therefore left to other tests.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import gc
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from importlib import import_module
from pathlib import Path

from tests.support.forked_ranks import fork_ranks

VERBS = ("pretrain", "sft", "reward_model", "dpo", "grpo", "sample", "evaluate", "convert")
"""Whose modules are imported before the forks."""
LIBRARIES = ("torch._dynamo", "reasoning_gym")
"""Imported with them: torch's first optimizer and the first prompt would, in every fork."""
START_S = 120.0


class ForkServer:
    """The process that forks, as those who have programs to run see it; it ends with them.

    Args:
        module: which calls `serve`; started with the arguments.
    """

    def __init__(self, module: str, *arguments: str) -> None:
        self._command = [sys.executable, "-W", "ignore", "-m", module, *arguments]
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, *arguments: object, seconds: float) -> subprocess.CompletedProcess[str]:
        """Run a program to its end; no process of its group is left behind.

        Raises:
            subprocess.TimeoutExpired: the program still ran after so many seconds.
        """
        words = [*map(str, arguments)]
        with tempfile.TemporaryDirectory() as folder:
            outputs = [Path(folder, name) for name in ("stdout", "stderr")]
            request = {"arguments": words, "folder": str(Path.cwd()), "environment": dict(os.environ)}
            code = self._request(request | {"outputs": [*map(str, outputs)]}, seconds)
            texts = [path.read_text(errors="replace") for path in outputs]
        if code is None:
            late = subprocess.TimeoutExpired(words, seconds, *texts)
            late.add_note("\n".join(texts))
            raise late
        return subprocess.CompletedProcess(words, code, *texts)

    def _request(self, request: dict[str, object], seconds: float) -> int | None:
        """Exit code of a program; None when it had to be ended."""
        if self._process is None:
            self._process = subprocess.Popen(self._command, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            atexit.register(self._process.communicate)  # with nothing to say, which ends it
        assert self._process.stdin
        code = None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            group = self._answer(START_S)
            assert group, f"{self._command} forks no process"
            try:
                code = self._answer(seconds)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(group, signal.SIGKILL)
        finally:
            if code is None:  # it may still answer, when nobody reads it
                atexit.unregister(self._process.communicate)
                self._process.kill()
                self._process.communicate()
                self._process = None
        return code

    def _answer(self, seconds: float) -> int | None:
        """The number in the server's next line; None when none comes in so many seconds."""
        assert self._process and self._process.stdout
        if not select.select([self._process.stdout], [], [], seconds)[0]:
            return None
        line = self._process.stdout.readline()
        assert line, f"{self._command} has ended"
        return int(line)


def serve(run: Callable[[list[str]], int]) -> None:
    """Fork a process for each request that comes by stdin, until that ends: its id is answered, then its exit code.

    Args:
        run: a program, from its arguments to its exit code; it may raise SystemExit as well.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # nothing else goes to those who read the answers
    gc.collect()
    gc.freeze()  # what all forks share is not searched in each
    for line in sys.stdin:
        request = json.loads(line)
        if not (pid := os.fork()):
            _begin(request["folder"], request["environment"], request["outputs"])
            sys.exit(run(request["arguments"]))
        print(pid, file=answers, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=answers, flush=True)


def _begin(folder: str, environment: dict[str, str], outputs: list[str]) -> None:
    """Make a fork what its caller would have started."""
    os.setpgid(0, 0)
    for descriptor, path in enumerate([os.devnull, *outputs]):
        opened = os.open(path, os.O_RDWR | os.O_CREAT)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)


def run_on_ranks(arguments: list[str]) -> int:
    """Exit code of [--ranks N] and a program with its arguments, which runs on so many forks of this process."""
    parser = argparse.ArgumentParser(prog="fork_server")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("program", nargs=argparse.REMAINDER)
    settings = parser.parse_args(arguments)
    if settings.ranks > 1:
        return fork_ranks(settings.ranks, lambda: run_program(settings.program))
    run_program(settings.program)
    return 0


def run_program(words: list[str]) -> None:
    """Run a file, or a module by its name, as `python` does."""
    program, sys.argv = words[0], [*words]
    if program.endswith(".py"):
        runpy.run_path(program, run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)


@cache
def _of_verbs() -> ForkServer:
    return ForkServer("tests.support.fork_server")


def run_forked(*program: object, ranks: int = 1, seconds: float = 100) -> subprocess.CompletedProcess[str]:
    """Run a program, or a module by its name, with its arguments to its end, on a CPU with torch's parts.

    Args:
        ranks: that run it, if more than one; the first that fails ends the others.
    """
    return _of_verbs().run("--ranks", ranks, *program, seconds=seconds)


def run_forked_to_the_end(*program: object, ranks: int = 1, seconds: float = 100) -> None:
    """The same of a program that must succeed."""
    must_succeed(run_forked(*program, ranks=ranks, seconds=seconds))


def must_succeed(done: subprocess.CompletedProcess[str]) -> None:
    """Fail with all that a program has printed, if it failed."""
    assert done.returncode == 0, f"{done.args}\n{done.stdout}\n{done.stderr}"


def import_verbs() -> None:
    """Import what verbs on a CPU do."""
    from megatron_r1.platform import select as select_platform

    select_platform("cpu")
    for verb in VERBS:
        import_module(f"megatron_r1.commands.{verb}")
    for library in LIBRARIES:
        import_module(library)


if __name__ == "__main__":
    import_verbs()
    serve(run_on_ranks)
