"""Python programs in forks of one process that has imported their libraries, which is most of what a short one costs.

    run_forked("megatron_r1", "sample", "name=one")           # what `python -W ignore -m megatron_r1 sample ...` does
    run_forked_to_the_end(folder / "program.py", folder)      # a file, which must succeed
    run_forked_to_the_end("tests/dist/ranks_layouts.py", folder, ranks=2)
    fork_server().start([*torchrun(2), "program.py"], logs)   # two ranks, forks as well, which a test then disturbs

A program starts with the environment and the folder of its caller, has an output and a process group of its own, and
ends as an interpreter does. Two things differ from a fresh interpreter: what the program imports is there before, and
the order of sets is that of all other forks. Tests of the command line, of kills and of recipes start some afresh.
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
from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module
from pathlib import Path

import psutil

from tests.support.forked_ranks import fork_ranks

VERBS = ("pretrain", "sft", "reward_model", "dpo", "grpo", "sample", "evaluate", "convert")
"""Whose modules are imported before the forks."""
LIBRARIES = ("torch._dynamo", "reasoning_gym", "torch.distributed.run")
"""Imported with them: torch's first optimizer, the first prompt and torchrun would, in every fork."""
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
            outputs = Path(folder, "stdout"), Path(folder, "stderr")
            program = self.start(words, outputs)
            try:
                code = program.wait(seconds)
            except subprocess.TimeoutExpired as error:
                texts = [path.read_text(errors="replace") for path in outputs]
                late = subprocess.TimeoutExpired(words, seconds, *texts)
                late.add_note("\n".join(texts))
                raise late from error
            finally:
                program.end()
            texts = [path.read_text(errors="replace") for path in outputs]
        return subprocess.CompletedProcess(words, code, *texts)

    def start(self, words: list[str], outputs: tuple[Path, Path], variables: Mapping[str, str] | None = None) -> Forked:
        """Start a program, with more variables of the environment; until it has ended, no other can be started.

        Args:
            outputs: files to which stdout and stderr are added.
        """
        if self._process is None:
            self._process = subprocess.Popen(self._command, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            atexit.register(self._process.communicate)  # with nothing to say, which ends it
        assert self._process.stdin
        request = {"arguments": words, "folder": str(Path.cwd()), "environment": os.environ | (variables or {})}
        try:
            self._process.stdin.write(json.dumps(request | {"outputs": [*map(str, outputs)]}).encode() + b"\n")
            group = self.answer(START_S)
            assert group, f"{self._command} forks no process"
        except BaseException:
            self.give_up()
            raise
        return Forked(self, group)

    def give_up(self) -> None:
        """End the process: it may still answer, when nobody reads it."""
        if self._process:
            atexit.unregister(self._process.communicate)
            self._process.kill()
            self._process.communicate()
            self._process = None

    def answer(self, seconds: float) -> int | None:
        """The number in the server's next line; None when none comes in so many seconds."""
        assert self._process and self._process.stdout
        if not select.select([self._process.stdout], [], [], seconds)[0]:
            return None
        line = self._process.stdout.readline()
        assert line, f"{self._command} has ended"
        return int(line)


class Forked:
    """A program in a fork, with what is used of subprocess.Popen.

    Attributes:
        pid: of the program, and of the group of its processes.
    """

    def __init__(self, server: ForkServer, pid: int):
        self.pid = pid
        self._server, self._code = server, None

    def poll(self) -> int | None:
        """The exit code; None while the program runs."""
        return self._answer(0.0)

    def wait(self, timeout: float) -> int:
        """The exit code.

        Raises:
            subprocess.TimeoutExpired: the program still runs after so many seconds.
        """
        code = self._answer(timeout)
        if code is None:
            raise subprocess.TimeoutExpired("a fork", timeout)
        return code

    def processes(self) -> list[psutil.Process]:
        """Those of its group that have not ended."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
                if os.getpgid(process.pid) == self.pid and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def end(self) -> None:
        """Leave no process of its group behind, and no answer that nobody has read."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        if self._code is None:
            self._server.give_up()

    def _answer(self, seconds: float) -> int | None:
        if self._code is None:
            self._code = self._server.answer(seconds)
        return self._code


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
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
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
def fork_server() -> ForkServer:
    """Of programs on a CPU with torch's parts, verbs among them."""
    return ForkServer("tests.support.fork_server")


def torchrun(ranks: int) -> tuple[str, ...]:
    """Words before a file that torchrun runs on so many ranks, which it forks."""
    forking = ("--standalone", f"--nproc-per-node={ranks}", "--start-method=fork", "--run-path")
    return "torch.distributed.run", *forking


def run_forked(*program: object, ranks: int = 1, seconds: float = 100) -> subprocess.CompletedProcess[str]:
    """Run a program, or a module by its name, with its arguments to its end, on a CPU with torch's parts.

    Args:
        ranks: that run it, if more than one; the first that fails ends the others.
    """
    return fork_server().run("--ranks", ranks, *program, seconds=seconds)


def run_forked_to_the_end(*program: object, ranks: int = 1, seconds: float = 100) -> None:
    """The same of a program that must succeed."""
    must_succeed(run_forked(*program, ranks=ranks, seconds=seconds))


def must_succeed(done: subprocess.CompletedProcess[str]) -> None:
    """Fail with all that a program has printed, if it failed."""
    assert done.returncode == 0, f"{done.args}\n{done.stdout}\n{done.stderr}"


def import_verbs(*verbs: str) -> None:
    """Import what these verbs on a CPU do, or all."""
    from megatron_r1.platform import select as select_platform

    select_platform("cpu")
    for verb in verbs or VERBS:
        import_module(f"megatron_r1.commands.{verb}")
    for library in LIBRARIES:
        import_module(library)


if __name__ == "__main__":
    import_verbs()
    serve(run_on_ranks)
