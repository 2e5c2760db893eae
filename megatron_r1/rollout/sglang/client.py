"""HTTP to one SGLang server, bounded in time and in bytes; replies are parsed in replies.py."""

from __future__ import annotations

import asyncio
import base64
import itertools
import secrets
from collections.abc import Container, Coroutine, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Self

import aiohttp
import orjson

from megatron_r1.errors import NoRolloutCapacity
from megatron_r1.rollout.engine import Completion, Request, Sampling
from megatron_r1.rollout.sglang.pool.retries import backoff_s
from megatron_r1.rollout.sglang.replies import BadReply, Refused, parse_checksums, parse_completions, parse_load

ATTEMPTS = 3
"""Of calls that may be repeated."""
CONNECT_S = 10.0
RETRY_S, LONGEST_RETRY_S = 0.2, 2.0
REFUSALS = (400, 413, 422)
"""HTTP statuses that blame the request rather than the server."""
LARGEST_REPLY = 1 << 20
"""Bytes of a reply beyond what its tokens need."""
BYTES_PER_TOKEN = 96

PROCESS_ID = secrets.token_hex(8)
"""Tells this process's requests from those of others at the same servers."""
_CALL_NUMBER = itertools.count()


@dataclass(frozen=True)
class Endpoint:
    """A server's address and keys. May be handed to another process in memory; printed, it shows no key."""

    url: str
    """``http://host:port``."""
    api_key: str = field(repr=False)
    """Allows generation."""
    admin_key: str = field(repr=False)
    """Allows control."""


class Client:
    """Calls to one server.

    Args:
        url: ``http://host:port``.
        api_key: allows generation.
        admin_key: allows control.
        timeout_s: seconds that one call may take.
        session: reuses connections, in the loop that it was made in; without it each call has its own connection.
    """

    def __init__(
        self, url: str, api_key: str, admin_key: str, timeout_s: float, session: aiohttp.ClientSession | None = None
    ):
        self.url, self.timeout_s = url, timeout_s
        self._authorization = {False: f"Bearer {api_key}", True: f"Bearer {admin_key}"}
        self._session = session

    @classmethod
    def at(cls, endpoint: Endpoint, timeout_s: float, session: aiohttp.ClientSession | None = None) -> Self:
        return cls(endpoint.url, endpoint.api_key, endpoint.admin_key, timeout_s, session)

    async def generate(
        self, requests: Sequence[Request], sampling: Sampling, versions: Container[str], timeout_s: float | None = None
    ) -> list[Completion | BadReply]:
        """For each request, in order, its validated completion or what is wrong with it, all in one call.

        All tokens must come from weights of one of `versions`, which may grow meanwhile.

        Prompts that several requests share are prefilled first, once each: requests that arrive together would each
        prefill their own. Nothing is retried.

        Raises:
            NoRolloutCapacity: there was no reply, or (BadReply) it is none to these requests.
        """
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        call_id = f"{PROCESS_ID}-{next(_CALL_NUMBER)}"
        prompts = list(dict.fromkeys(request.prompt_tokens for request in requests))
        try:
            async with asyncio.timeout(timeout_s):
                if len(prompts) < len(requests):
                    prefill = {"input_ids": prompts, "sampling_params": {"max_new_tokens": 0}}
                    limit = LARGEST_REPLY + BYTES_PER_TOKEN * 16 * len(prompts)
                    await self._call("/generate", prefill, limit=limit)
                body, limit = generate_body(requests, sampling, call_id), longest_reply(requests, sampling)
                replies = await self._call("/generate", body, limit=limit)
        except TimeoutError:
            raise NoRolloutCapacity(f"{self.url}/generate: no reply within {timeout_s:g} s") from None
        return parse_completions(f"{self.url}/generate", replies, requests, sampling, versions, call_id)

    async def progress(self) -> tuple[Any, ...]:
        """What changes while the server works (`parse_load`); also checks that it answers /health."""
        await self._call("/health", None, parse=False)
        return parse_load(f"{self.url}/v1/loads", await self._call("/v1/loads?include=core", None))

    async def load_weights(self, folder: str, version: str, flush_cache: bool = True) -> None:
        """Load the weights of a folder, drop the cache of the old ones, stamp the version and confirm the stamp."""
        body = {"model_path": folder, "weight_version": version, "flush_cache": flush_cache}
        await self._call("/update_weights_from_disk", body, control=True, attempts=ATTEMPTS)
        await self.confirm(version)

    async def confirm(self, version: str) -> None:
        """Raise BadReply unless the server reports this weight version."""
        if (served := await self.weight_version()) != version:
            raise BadReply(f"{self.url}: serves weight version {served!r} after an update to {version!r}")

    async def weight_version(self) -> str:
        """The weight version that the server reports."""
        reply = await self._call("/model_info", None, attempts=ATTEMPTS)
        if not isinstance(reply, dict) or "weight_version" not in reply:
            raise BadReply(f"{self.url}/model_info: no weight_version in the reply")
        return str(reply["weight_version"])

    async def begin_update(self) -> None:
        """Open the session in which `receive` is allowed."""
        await self._call("/begin_weight_update", {}, control=True)

    async def end_update(self) -> None:
        """Close the session: the server makes the weights ready for use."""
        await self._call("/end_weight_update", {}, control=True)

    async def pause(self, mode: str) -> None:
        """Stop generating; pause.py says what happens to responses in flight."""
        await self._call("/pause_generation", {"mode": mode}, admin=True, attempts=ATTEMPTS)

    async def resume(self) -> None:
        """Resume generating after `pause`."""
        await self._call("/continue_generation", {"torch_empty_cache": False}, admin=True, attempts=ATTEMPTS)

    async def join_group(self, name: str, backend: str, address: str, port: int, rank: int, world_size: int) -> None:
        """Have the server's ranks join a process group whose rank 0 is this process; the first of them is `rank`."""
        body = {
            "group_name": name, "backend": backend, "master_address": address, "master_port": port,
            "rank_offset": rank, "world_size": world_size,
        }  # fmt: skip
        await self._call("/init_weights_update_group", body, control=True)

    async def leave_group(self, name: str) -> None:
        await self._call("/destroy_weights_update_group", {"group_name": name}, control=True)

    async def receive(self, group: str, tensors: dict[str, Any], flush_cache: bool, version: str | None) -> None:
        """Load the bucket that is being broadcast in `group`; returns when the server has loaded it.

        Args:
            group: name of the process group.
            tensors: the bucket's ``load_format``, and ``names``, ``dtypes`` and ``shapes`` of its tensors, in order.
            flush_cache: drop the cache of the old weights, and stamp `version`.
        """
        body = {"group_name": group, "flush_cache": flush_cache, **tensors}
        await self._call("/update_weights_from_distributed", body | {"weight_version": version}, control=True)

    async def receive_shared(self, handles: Sequence[bytes], flush_cache: bool, version: str | None) -> None:
        """Load a bucket from memory that the server maps (ipc_sender.py); returns when the server has loaded it.

        Args:
            handles: by rank of the server.
            flush_cache: see `receive`.
        """
        tensors = [base64.b64encode(handle).decode() for handle in handles]
        body = {"load_format": "flattened_bucket", "serialized_named_tensors": tensors, "flush_cache": flush_cache}
        await self._call("/update_weights_from_tensor", body | {"weight_version": version}, control=True)

    async def abort_all(self) -> None:
        """Abort whatever the server still generates, such as for calls that were given up."""
        await self._call("/abort_request", {"rid": "", "abort_all": True}, admin=True, parse=False)

    async def flush(self, wait_s: float) -> None:
        """Drop the cache; the server can only while it is idle, and waits so long for that.

        Raises:
            BadReply: it was not idle in that time.
        """
        await self._call(f"/flush_cache?timeout={wait_s:g}", {}, admin=True, parse=False)

    async def release_memory(self, tags: Sequence[str]) -> None:
        """Release memory. A server crashes unless it is idle and holds what the tags name (memory.py)."""
        await self._call("/release_memory_occupation", {"tags": list(tags)}, admin=True)

    async def resume_memory(self, tags: Sequence[str]) -> None:
        """Allocate memory again. A server crashes unless it has released what the tags name (memory.py)."""
        await self._call("/resume_memory_occupation", {"tags": list(tags)}, admin=True)

    async def checksums(self) -> dict[str, str]:
        """Checksum of every weight that the server holds (`parse_checksums`)."""
        path = "/weights_checker"
        reply = await self._call(path, {"action": "checksum"}, control=True, limit=16 * LARGEST_REPLY)
        return parse_checksums(f"{self.url}{path}", reply)

    async def _call(
        self,
        path: str,
        body: object | None,
        *,
        admin: bool = False,
        control: bool = False,
        limit: int = LARGEST_REPLY,
        attempts: int = 1,
        parse: bool = True,
    ) -> Any:
        """POST a JSON body (GET without one), within `timeout_s` in all.

        Args:
            admin: with the admin key.
            control: the same, and the reply must report success.
            limit: most bytes of the reply.
            attempts: how often the call is made when connections fail; more than 1 only where it may be repeated.
            parse: whether a reply of status 200 is JSON that the caller wants.
        """
        try:
            async with asyncio.timeout(self.timeout_s):
                for attempt in range(1, attempts + 1):
                    try:
                        reply = await self._attempt(path, body, admin or control, limit, parse)
                        break
                    except aiohttp.ClientConnectionError:
                        if attempt == attempts:
                            raise
                        await asyncio.sleep(backoff_s(attempt, RETRY_S, LONGEST_RETRY_S))
        except TimeoutError:
            raise NoRolloutCapacity(f"{self.url}{path}: no reply within {self.timeout_s:g} s") from None
        except aiohttp.ClientError as error:
            raise NoRolloutCapacity(f"{self.url}{path}: {type(error).__name__}: {error}") from error
        if control and not (isinstance(reply, dict) and reply.get("success") is True):
            message = reply.get("message") if isinstance(reply, dict) else reply
            raise BadReply(f"{self.url}{path}: {str(message)[:300]}")
        return reply

    async def _attempt(self, path: str, body: object | None, admin: bool, limit: int, parse: bool) -> Any:
        headers = {"Authorization": self._authorization[admin], "Content-Type": "application/json"}
        method, data = ("GET", None) if body is None else ("POST", orjson.dumps(body))
        content = bytearray()
        async with (
            nullcontext(self._session) if self._session else new_session() as session,
            session.request(method, self.url + path, data=data, headers=headers, allow_redirects=False) as response,
        ):
            if (announced := response.content_length or 0) > limit:
                raise BadReply(f"{self.url}{path}: the reply of {announced} bytes is longer than {limit} bytes")
            async for chunk in response.content.iter_any():
                content += chunk
                if len(content) > limit:
                    raise BadReply(f"{self.url}{path}: the reply is longer than {limit} bytes")
        if not parse and response.status == 200:
            return None
        try:
            if response.content_type != "application/json":
                raise ValueError(f"its content type is {response.content_type}")
            reply = orjson.loads(content)
        except ValueError as error:
            where, what = f"{self.url}{path}: status {response.status}", f"not JSON: {bytes(content[:200])!r} ({error})"
            raise BadReply(f"{where}, {what}") from None
        if response.status != 200:
            kind = Refused if response.status in REFUSALS else BadReply
            raise kind(f"{self.url}{path}: status {response.status}: {str(reply)[:300]}")
        return reply


async def run_all[Result](calls: Sequence[Coroutine[Any, Any, Result]]) -> list[Result]:
    """Run calls at the same time; the first failure cancels the others."""
    tasks = [asyncio.ensure_future(call) for call in calls]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


def new_session() -> aiohttp.ClientSession:
    """Connections without limits of their own: callers bound their number and their time.

    SGLang closes connections that are idle for five seconds; one that is kept for less is never closed while in use.
    """
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=3.0, use_dns_cache=True)
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S)
    return aiohttp.ClientSession(connector=connector, timeout=timeout)


def generate_body(requests: Sequence[Request], sampling: Sampling, call_id: str) -> dict[str, Any]:
    """The body of /generate, in SGLang's names."""
    return {
        "input_ids": [request.prompt_tokens for request in requests],
        "sampling_params": {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_new_tokens": sampling.max_tokens,
            "stop_token_ids": list(sampling.stop_tokens),
        },
        "return_logprob": True,
        "return_routed_experts": sampling.routed is not None,
        "rid": call_id,  # SGLang appends the index in the call; a router takes one id only
    }


def longest_reply(requests: Sequence[Request], sampling: Sampling) -> int:
    """Most bytes of the reply to these requests."""
    limit = LARGEST_REPLY + BYTES_PER_TOKEN * len(requests) * (sampling.max_tokens + 16)
    if routed := sampling.routed:
        tokens = sum(len(request.prompt_tokens) + sampling.max_tokens for request in requests)
        limit += 6 * tokens * routed.layers * routed.top_k  # base64 of int32
    return limit
