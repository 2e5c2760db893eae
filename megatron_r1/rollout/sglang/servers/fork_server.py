"""Forks SGLang servers for one program: ``python -m megatron_r1.rollout.sglang.servers.fork_server``.

This process imports SGLang once, ten seconds of a core, for all servers of a program and for their restarts. It listens
on its standard input, a socket: a request is in JSON the environment of a new server, with the descriptors of
its standard input, its log, its folder's lock and a pipe. Into the pipe go the server's process id and, after its end,
its exit status. It ends with the program, and its servers end with it (launch.py watches their parent).

Only for the CPU: an accelerator's state does not survive a fork.
"""

from __future__ import annotations

import gc
import json
import os
import select
import socket
import struct
import sys
import tempfile
from contextlib import suppress
from importlib import import_module
from typing import NamedTuple

from megatron_r1.rollout.sglang.servers import launch

SIZE = struct.Struct("!I")
"""Bytes of a request, sent before it."""
DESCRIPTORS = 4
"""That come with a request: standard input, log, lock, pipe."""
PARENT_POLL_S = 1.0
TITLE = f"{sys.executable} -m {launch.__name__}"
"""Command line of a forked server: that of one which was executed."""
LATER = (
    "sglang.srt.entrypoints.http_server",
    "sglang.srt.managers.detokenizer_manager",
    "sglang.srt.managers.scheduler",
    "sglang.srt.managers.tp_worker",
    "sglang.srt.models.registry",
)
"""Modules that SGLang imports only as its processes start."""


class ForkRequest(NamedTuple):
    environment: dict[str, str]
    descriptors: list[int]


class ForkedServer(NamedTuple):
    pid: int
    pipe: int


def receive(control: socket.socket) -> ForkRequest | None:
    """The next request; None when the program has ended."""
    size, descriptors, *_ = socket.recv_fds(control, SIZE.size, DESCRIPTORS)
    if not size:
        return None
    content = control.recv(SIZE.unpack(size)[0], socket.MSG_WAITALL)
    return ForkRequest(json.loads(content), descriptors)


def fork_servers(control: socket.socket, program: int) -> bool:
    """Returns True in each server, and False in this process once the program has ended."""
    running: dict[int, ForkedServer] = {}
    while os.getppid() == program:
        ready, _, _ = select.select([control.fileno(), *running], [], [], PARENT_POLL_S)
        for ended in running.keys() & ready:
            server = running.pop(ended)
            _tell(server.pipe, os.waitstatus_to_exitcode(os.waitpid(server.pid, 0)[1]))
            os.close(server.pipe)
            os.close(ended)
        if control.fileno() in ready:
            if not (request := receive(control)):
                return False
            if not (pid := os.fork()):
                _become(request, [control.detach(), *running, *(server.pipe for server in running.values())])
                return True
            *given, pipe = request.descriptors
            for descriptor in given:
                os.close(descriptor)
            _tell(pipe, pid)
            running[os.pidfd_open(pid)] = ForkedServer(pid, pipe)
    return False


def _tell(pipe: int, number: int) -> None:
    with suppress(BrokenPipeError):  # the program has closed this server
        os.write(pipe, b"%d\n" % number)


def _become(request: ForkRequest, others: list[int]) -> None:
    """Make this process what it were if it had been executed with the request's environment and descriptors."""
    import numpy
    import setproctitle

    os.setsid()
    standard_input, log, _, pipe = request.descriptors
    for number, descriptor in ((0, standard_input), (1, log), (2, log)):
        os.dup2(descriptor, number)
    for descriptor in {standard_input, log, pipe, *others} - {0}:
        os.close(descriptor)
    setproctitle.setproctitle(TITLE)  # it finds its place by the environment that this process began with
    os.environ.clear()
    os.environ.update(request.environment)
    tempfile.tempdir = None  # what was read from TMPDIR
    numpy.random.seed()  # Python's own generator seeds itself anew; two servers must not draw the same


def main() -> None:
    program = os.getppid()
    control = socket.socket(fileno=os.dup(0))
    gc.disable()  # what is imported stays: looking through it again and again is a fifth of the time
    launch.load_sglang()
    for name in LATER:
        import_module(name)
    gc.freeze()  # a collection would write to every page that servers share with this process
    gc.enable()
    this = os.getpid()
    if fork_servers(control, program):
        launch.main(parent=this)


if __name__ == "__main__":
    main()
