"""A server that speaks SGLang's /generate with toy answers, and misbehaves on command. A process of its own:

    python tests/support/fake_sglang.py '{"share": 0.02, "seed": 1}'

prints its port and serves until standard input ends. Every answer is a function of the prompt alone (`toy_answer`), so
that whoever reads it can tell whether it is right. `share` is the probability of each of FAULTS, drawn for each call;
`POST /fake/behave {"fault": NAME}` makes every call misbehave one way, `{"fault": ""}` none, `{"share": S}` draws.
"""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import orjson
from aiohttp import web

FAULTS = (
    "hang", "slow_bytes", "error_500", "reset", "half_json", "wrong_count", "nan_logprob", "wrong_version",
    "huge_body", "wrong_content_type", "empty_reply", "duplicate", "unauthorised", "another_request",
)  # fmt: skip
HUGE_BYTES = 1 << 30
KEY, ADMIN_KEY = "user-key", "admin-key"


def toy_answer(prompt: Sequence[int], longest: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Tokens and log-probs of the answer to a prompt."""
    draw = sum((index + 1) * token for index, token in enumerate(prompt))
    length = 1 + draw % longest
    tokens = tuple(3 + (draw + 7 * index) % 997 for index in range(length))
    return tokens, tuple(-(1 + token * 31 % 97) / 100 for token in tokens)


def reply_to(prompt: Sequence[int], name: str, longest: int, version: str) -> dict[str, Any]:
    tokens, logprobs = toy_answer(prompt, longest)
    if longest == 0:
        return {"output_ids": [], "meta_info": {"id": name}}
    reason = (
        {"type": "length", "length": longest} if len(tokens) == longest else {"type": "stop", "matched": tokens[-1]}
    )
    return {
        "output_ids": tokens,
        "meta_info": {
            "id": name,
            "finish_reason": reason,
            "prompt_tokens": len(prompt),
            "weight_version": version,
            "output_token_logprobs": [[p, t, None] for p, t in zip(logprobs, tokens, strict=True)],
        },
    }


class Fake:
    """State of the server, and its handlers."""

    def __init__(self, share: float = 0.0, seed: int = 0, version: str = "v", seconds: float = 0.0):
        self.share, self.version, self.seconds = share, version, seconds
        self.fault, self.counts = "", Counter[str]()
        self._draw = random.Random(seed)

    def application(self) -> web.Application:
        application = web.Application(client_max_size=1 << 28)
        router = application.router
        router.add_post("/generate", self.generate)
        router.add_get("/health", self.health)
        router.add_get("/v1/loads", self.loads)
        router.add_get("/model_info", self.model_info)
        router.add_post("/update_weights_from_disk", self.update)
        router.add_post("/fake/behave", self.behave)
        router.add_get("/fake/counts", self.tell_counts)
        return application

    async def generate(self, request: web.Request) -> web.StreamResponse:
        body = orjson.loads(await request.read())
        fault = self.fault or self._drawn()
        self.counts["calls"] += 1
        self.counts["requests"] += len(body["input_ids"])
        self.counts[f"fault {fault}"] += bool(fault)
        if request.headers.get("Authorization") != f"Bearer {KEY}" or fault == "unauthorised":
            return web.json_response({"error": "Unauthorized"}, status=401)
        if self.seconds:
            await asyncio.sleep(self.seconds)
        longest = body["sampling_params"]["max_new_tokens"]
        names = [f"{body.get('rid')}_{index}" for index in range(len(body["input_ids"]))]
        if longest == 0:
            return json_reply([{"output_ids": [], "meta_info": {"id": name}} for name in names])
        replies = [
            reply_to(prompt, name, longest, self.version) for prompt, name in zip(body["input_ids"], names, strict=True)
        ]
        return await self._misbehave(fault, request, replies) if fault else json_reply(replies)

    def _drawn(self) -> str:
        index = self._draw.random()
        return FAULTS[int(index / self.share)] if index < self.share * len(FAULTS) else ""

    async def _misbehave(self, fault: str, request: web.Request, replies: list[dict]) -> web.StreamResponse:
        first = replies[0]["meta_info"]
        content = orjson.dumps(replies)
        if fault in ("hang", "slow_bytes", "huge_body", "reset"):
            return await self._drip(fault, request, content)
        if fault == "error_500":
            return web.json_response({"error": "out of memory"}, status=500)
        if fault == "refused":
            return web.json_response({"error": "too long"}, status=400)
        if fault == "half_json":
            return web.Response(body=content[: len(content) // 2], content_type="application/json")
        if fault == "wrong_content_type":
            return web.Response(body=content, content_type="text/html")
        if fault == "wrong_count":
            first["output_token_logprobs"].pop()
        elif fault == "nan_logprob":
            first["output_token_logprobs"][0][0] = float("nan")
        elif fault == "wrong_version":
            first["weight_version"] = "of another time"
        elif fault == "empty_reply":
            replies = []
        elif fault == "duplicate":
            replies.append(replies[0])
        elif fault == "another_request":
            replies[0] = reply_to([1, 2, 3], "somebody else's", len(replies[0]["output_ids"]), self.version)
            replies[0]["meta_info"]["prompt_tokens"] = first["prompt_tokens"]
        return web.Response(body=json.dumps(replies).encode(), content_type="application/json")  # NaN is no JSON

    async def _drip(self, fault: str, request: web.Request, content: bytes) -> web.StreamResponse:
        """Answers that take their time, or for ever, or break off."""
        if fault == "hang":
            await asyncio.sleep(3600)
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        if fault == "reset":
            await response.write(content[:10])
            assert request.transport
            request.transport.abort()
            return response
        if fault == "slow_bytes":
            for byte in content:
                await response.write(bytes([byte]))
                await asyncio.sleep(0.5)
        block = b" " * (1 << 20)
        for _ in range(HUGE_BYTES // len(block)):
            await response.write(block)
        return response

    async def health(self, _: web.Request) -> web.Response:
        return web.Response()

    async def loads(self, _: web.Request) -> web.Response:
        self.counts["loads"] += 1
        moved = 0 if self.fault == "hang" else self.counts["loads"]
        return web.json_response({"loads": [
            {"num_running_reqs": 0, "num_waiting_reqs": 0, "timestamp": moved,
             "num_used_tokens": 0, "total_prefill_uncached_tokens": 0}]})  # fmt: skip

    async def model_info(self, _: web.Request) -> web.Response:
        return web.json_response({"weight_version": self.version})

    async def update(self, request: web.Request) -> web.Response:
        if request.headers.get("Authorization") != f"Bearer {ADMIN_KEY}":
            return web.json_response({"error": "Unauthorized"}, status=401)
        self.version = (await request.json())["weight_version"]
        return web.json_response({"success": True})

    async def behave(self, request: web.Request) -> web.Response:
        for name, value in (await request.json()).items():
            setattr(self, name, value)
        return web.json_response({})

    async def tell_counts(self, _: web.Request) -> web.Response:
        return web.json_response(self.counts)


def json_reply(value: object) -> web.Response:
    return web.Response(body=orjson.dumps(value), content_type="application/json")


async def serve(options: dict[str, Any]) -> None:
    runner = web.AppRunner(Fake(**options).application(), shutdown_timeout=0.1, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, backlog=2048).start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)


class Running:
    """A fake in a process of its own."""

    def __init__(self, **options: Any):
        self.process = subprocess.Popen(
            [sys.executable, __file__, json.dumps(options)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.url = ""

    def wait(self) -> None:
        assert self.process.stdout
        self.url = f"http://127.0.0.1:{int(self.process.stdout.readline())}"

    def behave(self, **options: Any) -> None:
        post = urllib.request.Request(self.url + "/fake/behave", json.dumps(options).encode(), method="POST")
        urllib.request.urlopen(post, timeout=10).read()

    def counts(self) -> Counter[str]:
        return Counter(json.loads(urllib.request.urlopen(self.url + "/fake/counts", timeout=10).read()))


@contextmanager
def fakes(count: int, **options: Any) -> Iterator[list[Running]]:
    """So many fakes, each with a seed of its own."""
    running = [Running(**{"seed": number, **options}) for number in range(count)]
    try:
        for one in running:
            one.wait()
        yield running
    finally:
        for one in running:
            one.process.kill()
            one.process.communicate()


if __name__ == "__main__":
    import logging
    import os

    logging.disable()  # connections that the other side cuts are not this program's trouble
    asyncio.run(serve(json.loads(sys.argv[1] if len(sys.argv) > 1 else "{}")))
    os._exit(0)
