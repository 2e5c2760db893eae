"""HTTP to one SGLang server: bounded in time and in bytes, and every reply checked before it is believed.

A reply that is not what was asked for raises BadReply, which names what is wrong with it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import aiohttp
import orjson
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from megatron_r1.errors import NoRolloutCapacity
from megatron_r1.rollout.sample import Completion, Request, Sampling

ATTEMPTS = 3
LARGEST_REPLY = 1 << 20
"""Bytes of a reply beyond what its tokens need."""
BYTES_A_TOKEN = 256


class BadReply(NoRolloutCapacity):
    """An SGLang server answered something that cannot be used."""


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
    """

    def __init__(self, url: str, api_key: str, admin_key: str, timeout_s: float):
        self.url, self.timeout_s = url, timeout_s
        self._authorization = {False: f"Bearer {api_key}", True: f"Bearer {admin_key}"}

    @classmethod
    def at(cls, endpoint: Endpoint, timeout_s: float) -> Self:
        return cls(endpoint.url, endpoint.api_key, endpoint.admin_key, timeout_s)

    async def generate(self, requests: Sequence[Request], sampling: Sampling, version: str) -> list[Completion]:
        """One checked completion for each request, in their order, all in one call.

        Where prompts are asked for more than once they are read first, once each: requests that arrive together would
        each read their own.
        """
        prompts = list(dict.fromkeys(request.prompt_tokens for request in requests))
        if len(prompts) < len(requests):
            await self._call("/generate", {"input_ids": prompts, "sampling_params": {"max_new_tokens": 0}})
        body = {
            "input_ids": [request.prompt_tokens for request in requests],
            "sampling_params": sampling_parameters(sampling),
            "return_logprob": True,
        }
        limit = LARGEST_REPLY + BYTES_A_TOKEN * len(requests) * (sampling.max_tokens + 16)
        replies = await self._call("/generate", body, limit=limit)
        if not isinstance(replies, list) or len(replies) != len(requests):
            count = len(replies) if isinstance(replies, list) else type(replies).__name__
            raise BadReply(f"{self.url}/generate: {len(requests)} requests but the reply has {count}")
        return [completion(reply, request, sampling, version) for reply, request in zip(replies, requests, strict=True)]

    async def update_weights(self, folder: str, version: str) -> None:
        """Load the weights of a folder, drop the cache of the old ones, stamp the version and see it stamped."""
        body = {"model_path": folder, "weight_version": version, "flush_cache": True}
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
    ) -> Any:
        """POST a JSON body (GET without one). Connection errors are tried again where a call may be repeated."""
        retrying = AsyncRetrying(
            stop=stop_after_attempt(attempts),
            wait=wait_random_exponential(multiplier=0.2, max=2.0),
            retry=retry_if_exception_type(aiohttp.ClientConnectionError),
            reraise=True,
        )
        try:
            async with asyncio.timeout(self.timeout_s):
                return await retrying(self._once, path, body, admin, limit)
        except TimeoutError:
            raise NoRolloutCapacity(f"{self.url}{path}: no reply within {self.timeout_s:g} s") from None
        except aiohttp.ClientError as error:
            raise NoRolloutCapacity(f"{self.url}{path}: {type(error).__name__}: {error}") from error

    async def _once(self, path: str, body: object | None, admin: bool, limit: int) -> Any:
        headers = {"Authorization": self._authorization[admin], "Content-Type": "application/json"}
        method, data = ("GET", None) if body is None else ("POST", orjson.dumps(body))
        timeout = aiohttp.ClientTimeout(total=None)  # the caller's deadline holds for all attempts together
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            session.request(method, self.url + path, data=data, headers=headers) as response,
        ):
            content = await _bounded(response, limit)
        try:
            reply = orjson.loads(content)
        except orjson.JSONDecodeError:
            raise BadReply(f"{self.url}{path}: status {response.status}, not JSON: {content[:200]!r}") from None
        if response.status != 200:
            raise BadReply(f"{self.url}{path}: status {response.status}: {str(reply)[:300]}")
        return reply


def sampling_parameters(sampling: Sampling) -> dict[str, Any]:
    """SGLang's names for how tokens are drawn."""
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_new_tokens": sampling.max_tokens,
        "stop_token_ids": list(sampling.stop_tokens),
    }


def completion(reply: Any, request: Request, sampling: Sampling, version: str) -> Completion:
    """A completion out of one reply of /generate; raises BadReply naming the request and what is wrong."""
    try:
        return _completion(reply, request, sampling, version)
    except (KeyError, TypeError, IndexError) as error:
        raise BadReply(f"request {request.id}: the reply lacks a field or has the wrong type: {error!r}") from None
    except ValueError as error:
        raise BadReply(f"request {request.id}: {error}") from None


def _completion(reply: Any, request: Request, sampling: Sampling, version: str) -> Completion:
    meta = reply["meta_info"]
    tokens = tuple(int(token) for token in reply["output_ids"])
    pairs = meta["output_token_logprobs"]
    if tuple(pair[1] for pair in pairs) != tokens:
        raise ValueError(f"log-probs are of {len(pairs)} tokens that are not the {len(tokens)} response tokens")
    if meta["weight_version"] != version:
        raise ValueError(f"weight version {meta['weight_version']!r} where {version!r} was expected")
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
    return Completion(request.id, request.prompt_tokens, tokens, logprobs, reason, version)


async def _bounded(response: aiohttp.ClientResponse, limit: int) -> bytes:
    content = bytearray()
    async for chunk in response.content.iter_any():
        content += chunk
        if len(content) > limit:
            raise BadReply(f"{response.url}: the reply is longer than {limit} bytes")
    return bytes(content)
