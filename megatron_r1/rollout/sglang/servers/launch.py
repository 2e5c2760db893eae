"""Entry point of one SGLang server process: ``python -m megatron_r1.rollout.sglang.servers.launch``.

The first line on standard input is the server's arguments as JSON, its keys included, so that no key stands in argv or
in an environment; in logs the keys print as stars. Standard input stays open as long as the program that started this
one lives: at its end, however it comes, the whole process group of this server is killed.
"""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_r1.rollout.sglang.servers.leftovers import mapped_segments, remove

PARENT_POLL_S = 1.0


class Secret(str):
    """A string whose representation does not show it: SGLang logs all its arguments."""

    def __repr__(self) -> str:
        return "'***'"


def _die_with_parent(parent: int) -> None:
    """Kill this process group as soon as standard input ends or another process adopts this one."""

    def watch() -> None:
        while os.getppid() == parent:
            readable, _, _ = select.select([0], [], [], PARENT_POLL_S)
            if readable and not os.read(0, 1):
                break
        remove(Path(os.environ["TMPDIR"]), mapped_segments(os.getpgrp()))
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, name="die-with-parent", daemon=True).start()


def _first_line() -> bytes:
    """Read unbuffered: what follows belongs to the watching thread."""
    line = bytearray()
    while (byte := os.read(0, 1)) and byte != b"\n":
        line += byte
    return bytes(line)


def _keep_control_closed() -> None:
    """Have control endpoints of included routers opened by the admin key alone, as their marks say.

    SGLang 0.5.23 looks for the mark of the first route that matches. FastAPI from 0.16x on keeps an included router as
    one route without a mark, so that the user key opened what is inside it.
    """
    from sglang.srt.utils import auth
    from starlette.routing import Match

    found_outside = auth._get_auth_level_from_app_and_scope

    def level(app: Any, scope: dict[str, Any]) -> Any:
        for included in app.router.routes:
            for route in getattr(getattr(included, "original_router", None), "routes", ()):
                if route.matches(scope)[0] == Match.FULL:
                    return getattr(route.endpoint, "_auth_level", auth.AuthLevel.NORMAL)
        return found_outside(app, scope)

    auth._get_auth_level_from_app_and_scope = level


def _name_segments(folder: str) -> None:
    """Have SGLang name its segments of shared memory after the server's folder: 0.5.23 gives them a name by chance."""
    from sglang.srt.server_args import PortArgs

    made_by_chance = PortArgs.init_new

    def named(*arguments: Any, **options: Any) -> Any:
        return replace(made_by_chance(*arguments, **options), instance_id=folder)

    PortArgs.init_new = staticmethod(named)


def load_sglang() -> None:
    """Import SGLang, with its plugins and this project's changes to it."""
    import sglang.launch_server
    import sglang.srt.server_args  # noqa: F401 (imported for later)
    from sglang.srt.plugins import load_plugins

    logging.getLogger().setLevel(logging.INFO)  # plugins load before SGLang sets its log level
    load_plugins()
    _keep_control_closed()


def main(parent: int | None = None) -> None:
    """Serve until the program or the parent ends.

    Args:
        parent: process that this one was forked from; None where the program itself started it.
    """
    if os.getpgrp() != os.getpid():
        raise SystemExit("this server ends by killing its process group, so it must lead one: start it in a session")
    arguments = json.loads(_first_line())
    program = arguments.pop("parent")
    _die_with_parent(parent or program)
    for key in ("api_key", "admin_api_key"):
        arguments[key] = Secret(arguments[key])
    from sglang.srt.plugins.hook_registry import HookRegistry

    from megatron_r1.rollout.sglang import delta as deltas

    if parent:
        deltas.register()  # the parent has loaded all but what this server's own environment asks for
        HookRegistry.apply_hooks()
    else:
        load_sglang()
    _name_segments(Path(os.environ["TMPDIR"]).name)

    from sglang.launch_server import run_server
    from sglang.srt.server_args import ServerArgs

    logging.getLogger(__name__).info("changed by plugins: %s", ", ".join(sorted(HookRegistry._patched)) or "nothing")
    run_server(ServerArgs(**arguments))


if __name__ == "__main__":
    main()
