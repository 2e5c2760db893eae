"""HTTP to one SGLang server: bounded in time and in bytes, and every reply checked before it is believed.

A reply that is not what was asked for raises BadReply, which names what is wrong with it.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import secrets
from collections.abc import Awaitable, Container, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Self

import aiohttp
import orjson
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from megatron_r1.errors import NoRolloutCapacity
from megatron_r1.rollout.routed_experts import RoutedExperts
from megatron_r1.rollout.sample import Completion, Request, Sampling
from megatron_r1.rollout.sglang.versions import versions_of

ATTEMPTS = 3
CONNECT_S = 10.0
REFUSALS = (400, 413, 422)
"""Statuses that speak of the request rather than of the server."""
LARGEST_REPLY = 1 << 20
"""Bytes of a reply beyond what its tokens need."""
BYTES_A_TOKEN = 96


NAME = secrets.token_hex(8)
"""Tells this program's requests from those of others at the same servers."""
_NUMBER = itertools.count()


class BadReply(NoRolloutCapacity):
    """An SGLang server answered something that cannot be used."""


class Refused(BadReply):
    """A server will not do what it was asked for, and neither will another one."""


@dataclass(frozen=True)
class Endpoint:
    """Where a server is and what opens it. May be handed to another process in memory; printed, it shows no key."""

    url: str
    """``http://host:port``."""
    api_key: str = field(repr=False)
    """Opens generation."""
    admin_key: str = field(repr=False)
    """Opens control."""


class Client:
    """Calls to one server.

    Args:
        url: ``http://host:port``.
        api_key: opens generation.
        admin_key: opens control.
        timeout_s: seconds that one call may take.
        session: keeps connections from call to call, in the loop that it was made in; without it each call has its own.
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
        """For each request, in their order, its checked completion or what is wrong with it, all in one call.

        All tokens must come from weights of one of `versions`, which may grow meanwhile.

        Where prompts are asked for more than once they are read first, once each: requests that arrive together would
        each read their own. Nothing is tried again.

        Raises:
            NoRolloutCapacity: there was no reply, or (BadReply) it is none to these requests.
        """
        timeout_s = self.timeout_s if timeout_s is None else timeout_s
        name = f"{NAME}-{next(_NUMBER)}"
        try:
            async with asyncio.timeout(timeout_s):
                replies = await self._generate(requests, sampling, name)
        except TimeoutError:
            raise NoRolloutCapacity(f"{self.url}/generate: no reply within {timeout_s:g} s") from None
        if not isinstance(replies, list) or len(replies) != len(requests):
            count = len(replies) if isinstance(replies, list) else type(replies).__name__
            raise BadReply(f"{self.url}/generate: {len(requests)} requests but the reply has {count}")
        return [
            checked(reply, request, sampling, versions, f"{name}_{place}")
            for place, (reply, request) in enumerate(zip(replies, requests, strict=True))
        ]

    async def _generate(self, requests: Sequence[Request], sampling: Sampling, name: str) -> Any:
        prompts = list(dict.fromkeys(request.prompt_tokens for request in requests))
        if len(prompts) < len(requests):
            read = {"input_ids": prompts, "sampling_params": {"max_new_tokens": 0}}
            await self._call("/generate", read, attempts=1, limit=LARGEST_REPLY + BYTES_A_TOKEN * 16 * len(prompts))
        body = {
            "input_ids": [request.prompt_tokens for request in requests],
            "sampling_params": sampling_parameters(sampling),
            "return_logprob": True,
            "return_routed_experts": sampling.routed is not None,
            "rid": name,  # SGLang appends the place in the call; a router takes one name only
        }
        limit = LARGEST_REPLY + BYTES_A_TOKEN * len(requests) * (sampling.max_tokens + 16)
        if routed := sampling.routed:
            tokens = sum(len(request.prompt_tokens) + sampling.max_tokens for request in requests)
            limit += 6 * tokens * routed.layers * routed.top_k  # base64 of int32
        return await self._call("/generate", body, limit=limit, attempts=1)

    async def progress(self) -> tuple[Any, ...]:
        """What changes as the server works: tokens while it has requests, else the sign of life of its scheduler."""
        await self._call("/health", None, attempts=1, parse=False)
        reply = await self._call("/v1/loads?include=core", None, attempts=1)
        try:
            return tuple(marker for load in reply["loads"] for marker in _marker(load))
        except (KeyError, TypeError) as error:
            raise BadReply(f"{self.url}/v1/loads: the reply lacks a field: {error!r}") from None

    async def load_weights(self, folder: str, version: str, flush_cache: bool = True) -> None:
        """Load the weights of a folder, drop the cache of the old ones, stamp the version and see it stamped."""
        body = {"model_path": folder, "weight_version": version, "flush_cache": flush_cache}
        await self._control("/update_weights_from_disk", body, attempts=ATTEMPTS)
        await self.confirm(version)

    async def confirm(self, version: str) -> None:
        """Raise BadReply unless the server says that its weights have this version."""
        if (served := await self.weight_version()) != version:
            raise BadReply(f"{self.url}: serves weight version {served!r} after an update to {version!r}")

    async def weight_version(self) -> str:
        """The version that the server says its weights have."""
        reply = await self._call("/model_info", None)
        if not isinstance(reply, dict) or "weight_version" not in reply:
            raise BadReply(f"{self.url}/model_info: no weight_version in the reply")
        return reply["weight_version"]

    async def begin_update(self) -> None:
        """Open the session in which `receive` is allowed."""
        await self._control("/begin_weight_update", {})

    async def end_update(self) -> None:
        """Close the session: the weights are made ready for use."""
        await self._control("/end_weight_update", {})

    async def pause(self, mode: str) -> None:
        """Stop generating; what becomes of answers under way see pause.py."""
        await self._call("/pause_generation", {"mode": mode}, admin=True)

    async def resume(self) -> None:
        """Go on after `pause`."""
        await self._call("/continue_generation", {"torch_empty_cache": False}, admin=True)

    async def join_group(self, name: str, backend: str, address: str, port: int, rank: int, world_size: int) -> None:
        """Have the server's ranks join a process group of which this program is rank 0; the first of them is `rank`."""
        body = {
            "group_name": name, "backend": backend, "master_address": address, "master_port": port,
            "rank_offset": rank, "world_size": world_size,
        }  # fmt: skip
        await self._control("/init_weights_update_group", body)

    async def leave_group(self, name: str) -> None:
        await self._control("/destroy_weights_update_group", {"group_name": name})

    async def receive(self, group: str, tensors: dict[str, Any], flush_cache: bool, version: str | None) -> None:
        """Load the bucket that is being broadcast in `group`; returns when that is done.

        Args:
            group: name of the process group.
            tensors: ``names``, ``dtypes`` and ``shapes`` of what the bucket holds, in its order.
            flush_cache: drop the cache of the old weights, and stamp `version`.
        """
        body = {"load_format": "flattened_bucket", "group_name": group, "flush_cache": flush_cache, **tensors}
        await self._control("/update_weights_from_distributed", body | {"weight_version": version})

    async def receive_shared(self, handles: Sequence[bytes], flush_cache: bool, version: str | None) -> None:
        """Load a bucket out of memory that the server maps (shared.py); returns when that is done.

        Args:
            handles: by rank of the server.
            flush_cache: see `receive`.
        """
        tensors = [base64.b64encode(handle).decode() for handle in handles]
        body = {"load_format": "flattened_bucket", "serialized_named_tensors": tensors, "flush_cache": flush_cache}
        await self._control("/update_weights_from_tensor", body | {"weight_version": version})

    async def stop_all(self) -> None:
        """End whatever the server still generates, such as for calls that were given up."""
        await self._call("/abort_request", {"rid": "", "abort_all": True}, admin=True, attempts=1, parse=False)

    async def flush(self, wait_s: float) -> None:
        """Drop the cache; the server can only when it is idle, which it is waited for.

        Raises:
            BadReply: it was not, in that time.
        """
        await self._call(f"/flush_cache?timeout={wait_s:g}", {}, admin=True, attempts=1, parse=False)

    async def release_memory(self, tags: Sequence[str]) -> None:
        """Give memory back. A server dies of this unless it is idle and holds what the tags name (memory.py)."""
        await self._call("/release_memory_occupation", {"tags": list(tags)}, admin=True, attempts=1)

    async def resume_memory(self, tags: Sequence[str]) -> None:
        """Take memory again. A server dies of this unless it has given back what the tags name (memory.py)."""
        await self._call("/resume_memory_occupation", {"tags": list(tags)}, admin=True, attempts=1)

    async def checksums(self) -> dict[str, str]:
        """Checksum of every weight that the server holds, by SGLang's name; by rank where it has several."""
        reply = await self._control("/weights_checker", {"action": "checksum"}, limit=16 * LARGEST_REPLY)
        try:
            ranks = [rank["checksums"] for rank in reply["ranks"]]
            if len(ranks) == 1:
                return dict(ranks[0])
            return {f"{name}@{rank}": value for rank, sums in enumerate(ranks) for name, value in sums.items()}
        except (KeyError, TypeError, AttributeError) as error:
            raise BadReply(f"{self.url}/weights_checker: the reply lacks a field: {error!r}") from None

    async def _control(self, path: str, body: object, attempts: int = 1, limit: int = LARGEST_REPLY) -> dict[str, Any]:
        """A call that must report success."""
        reply = await self._call(path, body, admin=True, limit=limit, attempts=attempts)
        if not (isinstance(reply, dict) and reply.get("success") is True):
            message = reply.get("message") if isinstance(reply, dict) else reply
            raise BadReply(f"{self.url}{path}: {str(message)[:300]}")
        return reply

    async def _call(
        self,
        path: str,
        body: object | None,
        *,
        admin: bool = False,
        limit: int = LARGEST_REPLY,
        attempts: int = ATTEMPTS,
        parse: bool = True,
    ) -> Any:
        """POST a JSON body (GET without one). Connection errors are tried again where a call may be repeated."""
        if attempts == 1 and self._session:
            return await self._within(self._once(path, body, admin, limit, parse), path)
        retrying = AsyncRetrying(
            stop=stop_after_attempt(attempts),
            wait=wait_random_exponential(multiplier=0.2, max=2.0),
            retry=retry_if_exception_type(aiohttp.ClientConnectionError),
            reraise=True,
        )
        return await self._within(retrying(self._once, path, body, admin, limit, parse), path)

    async def _within(self, call: Awaitable[Any], path: str) -> Any:
        try:
            async with asyncio.timeout(self.timeout_s):
                return await call
        except TimeoutError:
            raise NoRolloutCapacity(f"{self.url}{path}: no reply within {self.timeout_s:g} s") from None
        except aiohttp.ClientError as error:
            raise NoRolloutCapacity(f"{self.url}{path}: {type(error).__name__}: {error}") from error

    async def _once(self, path: str, body: object | None, admin: bool, limit: int, parse: bool) -> Any:
        headers = {"Authorization": self._authorization[admin], "Content-Type": "application/json"}
        method, data = ("GET", None) if body is None else ("POST", orjson.dumps(body))
        async with (
            nullcontext(self._session) if self._session else new_session() as session,
            session.request(method, self.url + path, data=data, headers=headers, allow_redirects=False) as response,
        ):
            content = await _bounded(response, limit)
        if not parse and response.status == 200:
            return None
        try:
            if response.content_type != "application/json":
                raise ValueError(f"its content type is {response.content_type}")
            reply = orjson.loads(content)
        except ValueError as error:
            where, what = f"{self.url}{path}: status {response.status}", f"not JSON: {content[:200]!r} ({error})"
            raise BadReply(f"{where}, {what}") from None
        if response.status != 200:
            kind = Refused if response.status in REFUSALS else BadReply
            raise kind(f"{self.url}{path}: status {response.status}: {str(reply)[:300]}")
        return reply


def new_session() -> aiohttp.ClientSession:
    """Connections without limits of their own: callers bound their number and their time.

    SGLang closes what is idle for five seconds; what is kept for less is never used while that happens.
    """
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=3.0, use_dns_cache=True)
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S)
    return aiohttp.ClientSession(connector=connector, timeout=timeout)


def _marker(load: dict[str, Any]) -> tuple[Any, ...]:
    waiting, running = load["num_waiting_reqs"], load["num_running_reqs"]
    if not (waiting or running):
        return (load["timestamp"],)
    return running, waiting, load["num_used_tokens"], load["total_prefill_uncached_tokens"]


def sampling_parameters(sampling: Sampling) -> dict[str, Any]:
    """SGLang's names for how tokens are drawn."""
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_new_tokens": sampling.max_tokens,
        "stop_token_ids": list(sampling.stop_tokens),
    }


def checked(
    reply: Any, request: Request, sampling: Sampling, versions: Container[str], name: str
) -> Completion | BadReply:
    """The completion out of one reply of /generate, or what is wrong with it; `name` is what the server was told."""
    try:
        good = completion(reply, request, sampling, versions)
    except BadReply as error:
        return error
    if (answered := reply["meta_info"].get("id")) != name:
        return BadReply(f"request {request.id}: the reply is to {str(answered)[:80]!r}, another request")
    return good


def completion(reply: Any, request: Request, sampling: Sampling, versions: Container[str]) -> Completion:
    """A completion out of one reply of /generate; raises BadReply naming the request and what is wrong."""
    try:
        return _completion(reply, request, sampling, versions)
    except (KeyError, TypeError, IndexError) as error:
        raise BadReply(f"request {request.id}: the reply lacks a field or has the wrong type: {error!r}") from None
    except ValueError as error:
        raise BadReply(f"request {request.id}: {error}") from None


def _completion(reply: Any, request: Request, sampling: Sampling, versions: Container[str]) -> Completion:
    meta = reply["meta_info"]
    tokens = tuple(int(token) for token in reply["output_ids"])
    pairs = meta["output_token_logprobs"]
    if tuple(pair[1] for pair in pairs) != tokens:
        raise ValueError(f"log-probs are of {len(pairs)} tokens that are not the {len(tokens)} response tokens")
    version, version_changes = versions_of(meta, len(tokens), versions)
    if meta["prompt_tokens"] != len(request.prompt_tokens):
        raise ValueError(f"{meta['prompt_tokens']} prompt tokens were read of {len(request.prompt_tokens)}")
    reason = meta["finish_reason"]["type"]
    if reason == "length" and len(tokens) != sampling.max_tokens:
        raise ValueError(f"ends for length after {len(tokens)} tokens where {sampling.max_tokens} are allowed")
    if reason == "stop" and meta["finish_reason"]["matched"] != tokens[-1]:
        raise ValueError(f"stopped by {meta['finish_reason']['matched']!r}, which is not its last token {tokens[-1]}")
    if reason == "length" and tokens[-1] in sampling.stop_tokens:
        reason = "stop"  # the last allowed token is a stop token: SGLang looks at the length first
    logprobs = tuple(float(pair[0]) for pair in pairs)
    routed = None
    if sampling.routed:
        inputs = len(request.prompt_tokens) + len(tokens) - 1
        routed = RoutedExperts.from_sglang(meta["routed_experts"], inputs, sampling.routed)
    return Completion(request.id, request.prompt_tokens, tokens, logprobs, reason, version, routed, version_changes)


async def _bounded(response: aiohttp.ClientResponse, limit: int) -> bytes:
    if (announced := response.content_length or 0) > limit:
        raise BadReply(f"{response.url}: the reply of {announced} bytes is longer than {limit} bytes")
    content = bytearray()
    async for chunk in response.content.iter_any():
        content += chunk
        if len(content) > limit:
            raise BadReply(f"{response.url}: the reply is longer than {limit} bytes")
    return bytes(content)
