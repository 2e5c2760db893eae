"""A chat endpoint in a thread, whose replies a test decides."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from aiohttp import web

Reply = tuple[int, Any]
"""Status and body; a body of None never comes, a str is sent as it is, a dict is the verdict of a chat completion."""


class FakeJudge:
    """The requests so far, and the function that replies."""

    def __init__(self, reply: Callable[[dict[str, Any], int], Reply]):
        """
        Args:
            reply: the shown JSON of a request and how many requests came before it -> status and body.
        """
        self._reply = reply
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.url = ""

    async def chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.keys.append(request.headers.get("Authorization"))
        status, content = self._reply(json.loads(body["messages"][1]["content"]), len(self.bodies) - 1)
        if content is None:
            await asyncio.sleep(60)
        if isinstance(content, str):
            return web.Response(status=status, text=content, content_type="application/json")
        text = content if isinstance(content, list) else json.dumps(content)
        return web.json_response({"choices": [{"message": {"content": text}}]}, status=status)


@contextmanager
def running(reply: Callable[[dict[str, Any], int], Reply]) -> Iterator[FakeJudge]:
    """The endpoint, while the block runs."""
    fake, loop, ready = FakeJudge(reply), asyncio.new_event_loop(), threading.Event()

    async def start() -> web.AppRunner:
        application = web.Application()
        application.router.add_post("/v1/chat/completions", fake.chat)
        runner = web.AppRunner(application, shutdown_timeout=0.1, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        fake.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        ready.set()
        return runner

    def run() -> None:
        asyncio.set_event_loop(loop)
        runner = loop.run_until_complete(start())
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    ready.wait(10)
    try:
        yield fake
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
