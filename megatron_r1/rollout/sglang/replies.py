"""Parses what SGLang servers reply: a reply that is not what was requested becomes a BadReply that names its fault."""

from __future__ import annotations

from array import array
from collections.abc import Container, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from megatron_r1.errors import NoRolloutCapacity
from megatron_r1.rollout.engine import Completion, Request, Response, Sampling, int32
from megatron_r1.rollout.routed_experts import parse_routed_experts


class BadReply(NoRolloutCapacity):
    """An SGLang server replied something that cannot be used."""


class Refused(BadReply):
    """A server refuses a request, and so would any other server."""


def parse_completions(
    where: str, replies: Any, requests: Sequence[Request], sampling: Sampling, versions: Container[str], call_id: str
) -> list[Completion | BadReply]:
    """The reply of one /generate call: for each request, in order, its completion or what is wrong with it.

    Args:
        where: address of the server's endpoint, for messages; so in the other functions.
        versions: that the weights of any token may have.
        call_id: the ``rid`` of the call; the server appends each request's index to it.

    Raises:
        BadReply: the reply is none to these requests.
    """
    if not isinstance(replies, list) or len(replies) != len(requests):
        count = len(replies) if isinstance(replies, list) else type(replies).__name__
        raise BadReply(f"{where}: {len(requests)} requests but the reply has {count}")
    parsed: list[Completion | BadReply] = []
    for index, (reply, request) in enumerate(zip(replies, requests, strict=True)):
        try:
            parsed.append(parse_completion(reply, request, sampling, versions, f"{call_id}_{index}"))
        except (KeyError, TypeError, IndexError) as error:
            fault = f"the reply lacks a field or has the wrong type: {error!r}"
            parsed.append(BadReply(f"request {request.id}: {fault}"))
        except ValueError as error:
            parsed.append(BadReply(f"request {request.id}: {error}"))
    return parsed


def parse_completion(
    reply: Any, request: Request, sampling: Sampling, versions: Container[str], reply_id: str
) -> Completion:
    """One entry of a reply.

    Raises:
        ValueError, KeyError, TypeError, IndexError: it is no usable completion of this request.
    """
    meta = reply["meta_info"]
    tokens, pairs = reply["output_ids"], meta["output_token_logprobs"]
    if [pair[1] for pair in pairs] != tokens:
        raise ValueError(f"log-probs are of {len(pairs)} tokens that are not the {len(tokens)} response tokens")
    version, version_changes = parse_versions(meta, len(tokens), versions)
    if meta["prompt_tokens"] != len(request.prompt_tokens):
        raise ValueError(f"{meta['prompt_tokens']} prompt tokens were read of {len(request.prompt_tokens)}")
    reason = meta["finish_reason"]["type"]
    if reason == "length" and len(tokens) != sampling.max_tokens:
        raise ValueError(f"ends for length after {len(tokens)} tokens where {sampling.max_tokens} are allowed")
    if reason == "stop" and meta["finish_reason"]["matched"] != tokens[-1]:
        raise ValueError(f"stopped by {meta['finish_reason']['matched']!r}, which is not its last token {tokens[-1]}")
    if reason == "length" and tokens[-1] in sampling.stop_tokens:
        reason = "stop"  # the last allowed token is a stop token: SGLang checks the length first
    experts = None
    if sampling.routed:
        inputs = len(request.prompt_tokens) + len(tokens) - 1
        experts = parse_routed_experts(meta["routed_experts"], inputs, sampling.routed)
    if (replied_id := meta.get("id")) != reply_id:
        raise ValueError(f"the reply is to {str(replied_id)[:80]!r}, another request")
    logprobs = np.frombuffer(array("f", [pair[0] for pair in pairs]), np.float32)
    response = Response(int32(request.prompt_tokens), int32(tokens), logprobs, experts)
    return Completion(request.id, response, reason, version, version_changes)


def parse_load(where: str, reply: Any) -> tuple[Any, ...]:
    """What of /v1/loads changes as the server works: tokens while it has requests, else its scheduler's time stamp.

    Raises:
        BadReply: a field is missing.
    """
    markers: list[Any] = []
    try:
        for load in reply["loads"]:
            waiting, running = load["num_waiting_reqs"], load["num_running_reqs"]
            if waiting or running:
                markers += [running, waiting, load["num_used_tokens"], load["total_prefill_uncached_tokens"]]
            else:
                markers.append(load["timestamp"])
    except (KeyError, TypeError) as error:
        raise BadReply(f"{where}: the reply lacks a field: {error!r}") from None
    return tuple(markers)


def parse_checksums(where: str, reply: Any) -> dict[str, str]:
    """Checksum of every weight by SGLang's name; ``name@rank`` where the server has several ranks.

    Raises:
        BadReply: a field is missing.
    """
    try:
        ranks = [rank["checksums"] for rank in reply["ranks"]]
        if len(ranks) == 1:
            return dict(ranks[0])
        return {f"{name}@{rank}": value for rank, sums in enumerate(ranks) for name, value in sums.items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise BadReply(f"{where}: the reply lacks a field: {error!r}") from None


def parse_versions(
    meta: dict[str, Any], tokens: int, allowed: Container[str]
) -> tuple[str, tuple[tuple[int, str], ...]]:
    """Version of the first token, and (index, version) of each token at which the version changes.

    Args:
        meta: ``meta_info`` of a reply.
        tokens: length of the response.
        allowed: versions that any of them may have.

    Raises:
        ValueError: the spans do not cover the response, or one has another version.
    """
    last = meta["weight_version"]
    spans = meta.get("weight_versions") or [{"version": last, "start": 0, "end": tokens}]
    bounds = [0, *(span["end"] for span in spans)]
    if [span["start"] for span in spans] != bounds[:-1] or bounds[-1] != tokens or bounds != sorted(set(bounds)):
        raise ValueError(f"weight versions are of other tokens than the {tokens} of the response: {str(spans)[:200]}")
    for version in (last, *(span["version"] for span in spans)):
        if version not in allowed:
            raise ValueError(f"weight version {version!r} where {allowed} was expected")
    starts = [(span["start"], span["version"]) for span in spans]
    changes = tuple(new for old, new in pairwise(starts) if new[1] != old[1])
    return starts[0][1], changes
