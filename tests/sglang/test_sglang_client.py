"""The client against a server that answers wrongly, and how requests are divided: no SGLang needed."""

import asyncio
import copy
import math
from collections.abc import Callable, Container
from dataclasses import dataclass

import orjson
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from megatron_r1.errors import NoRolloutCapacity
from megatron_r1.rollout.engine import Completion, Request, Sampling
from megatron_r1.rollout.sglang.client import Client
from megatron_r1.rollout.sglang.pool.pool import VersionsFromNowOn, choose, key_of, split_into_calls
from megatron_r1.rollout.sglang.replies import BadReply, parse_completions
from tests.support.samples import logprobs_of, prompt_of, tokens_of

REQUEST = Request("r", (5, 6, 7))
SAMPLING = Sampling(1.0, 1.0, 3, (9,), 0)
V1 = VersionsFromNowOn(["v1"])
SPAN = {"version": "v1", "start": 0, "end": 2}
REPLY = {
    "output_ids": [8, 9],
    "meta_info": {
        "finish_reason": {"type": "stop", "matched": 9},
        "prompt_tokens": 3,
        "weight_version": "v1",
        "id": "call_0",
        "output_token_logprobs": [[-0.5, 8, None], [-0.25, 9, None]],
    },
}


def changed(path: str, value: object) -> dict:
    reply = copy.deepcopy(REPLY)
    *parents, last = path.split(".")
    place = reply
    for parent in parents:
        place = place[parent]
    if value is KeyError:
        del place[last]
    else:
        place[last] = value
    return reply


def completion(reply: object, request: Request, sampling: Sampling, versions: Container[str]) -> Completion:
    """The completion of a call's only reply; raises what is wrong with it."""
    (parsed,) = parse_completions("server", [reply], [request], sampling, versions, "call")
    if isinstance(parsed, BadReply):
        raise parsed
    return parsed


def test_good_reply():
    one = completion(REPLY, REQUEST, SAMPLING, V1)
    assert (one.request_id, prompt_of(one), one.finish_reason) == ("r", (5, 6, 7), "stop")
    assert (tokens_of(one), logprobs_of(one).tolist()) == ((8, 9), [-0.5, -0.25])
    assert (one.weight_version, one.version_changes) == ("v1", ())


def test_a_reply_may_come_from_weights_sent_after_its_request_but_not_from_older_ones():
    versions = ["v0"]
    before = VersionsFromNowOn(versions)
    versions.append("v1")
    allowed = VersionsFromNowOn(versions)
    spans = [{"version": "v1", "start": 0, "end": 1}, {"version": "v2", "start": 1, "end": 2}]
    reply = changed("meta_info", REPLY["meta_info"] | {"weight_versions": spans, "weight_version": "v2"})
    with pytest.raises(BadReply, match="'v2' where 'v1' was expected"):
        completion(reply, REQUEST, SAMPLING, allowed)
    versions.append("v2")
    for asked in (before, allowed):
        one = completion(reply, REQUEST, SAMPLING, asked)
        assert (one.weight_version, one.version_changes) == ("v1", ((1, "v2"),))
    with pytest.raises(BadReply, match="'v1' where 'v2' was expected"):
        completion(reply, REQUEST, SAMPLING, VersionsFromNowOn(versions))


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("output_ids", [8], "not the 1 response tokens"),
        ("output_ids", [8, 7], "not the 2 response tokens"),
        ("output_ids", KeyError, "output_ids"),
        ("meta_info.output_token_logprobs", [[-0.5, 8, None]], "1 tokens"),
        ("meta_info.output_token_logprobs", [[-0.5, 8, None], [math.nan, 9, None]], "log-prob nan"),
        ("meta_info.output_token_logprobs", [[-0.5, 8, None], [None, 9, None]], "wrong type"),
        ("meta_info.output_token_logprobs", [[0.5, 8, None], [-0.1, 9, None]], "log-prob 0.5"),
        ("meta_info.weight_version", "v0", "'v0' where 'v1'"),
        ("meta_info.weight_versions", [SPAN | {"version": "v0"}], "'v0' where 'v1'"),
        ("meta_info.weight_versions", [SPAN | {"end": 1}], "of other tokens than the 2"),
        ("meta_info.weight_versions", [SPAN | {"end": 1}, SPAN], "of other tokens than the 2"),
        ("meta_info.prompt_tokens", 2, "2 prompt tokens"),
        ("meta_info.finish_reason", {"type": "abort"}, "'abort'"),
        ("meta_info.finish_reason", None, "wrong type"),
        ("meta_info.finish_reason", {"type": "length"}, "after 2 tokens where 3"),
        ("meta_info.finish_reason", {"type": "stop", "matched": 4}, "stopped by 4"),
        ("meta_info", KeyError, "meta_info"),
    ],
)
def test_bad_reply_is_named(path, value, told):
    with pytest.raises(BadReply, match=told) as error:
        completion(changed(path, value), REQUEST, SAMPLING, V1)
    assert "request r" in str(error.value)


def test_stop_token_in_the_last_position_is_a_stop():
    reply = changed("meta_info.finish_reason", {"type": "length"})
    one = completion(reply, REQUEST, Sampling(1.0, 1.0, 2, (9,), 0), V1)
    assert one.finish_reason == "stop"


def ask(handler: Callable, ask_client: Callable, timeout_s: float = 5.0) -> object:
    """Serve `handler` on every path and let `ask_client` use a client of it."""

    async def run() -> object:
        application = web.Application()
        application.router.add_route("*", "/{path:.*}", handler)
        runner = web.AppRunner(application, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        try:
            return await ask_client(Client(f"http://127.0.0.1:{port}", "user", "admin", timeout_s))
        finally:
            await runner.cleanup()

    return asyncio.run(run())


async def echo(request: web.Request) -> dict:
    """The good reply, under the name that the request has."""
    return changed("meta_info.id", orjson.loads(await request.read())["rid"] + "_0")


def generate(client: Client) -> object:
    return client.generate([REQUEST], SAMPLING, V1)


def test_keys_are_sent_to_their_doors():
    seen = {}

    async def handler(request: web.Request) -> web.Response:
        seen[request.path] = request.headers["Authorization"]
        body = [await echo(request)] if request.path == "/generate" else {"success": True, "weight_version": "v1"}
        return web.json_response(body)

    async def both(client: Client) -> None:
        await client.generate([REQUEST], SAMPLING, V1)
        await client.load_weights("folder", "v1")

    ask(handler, both)
    assert seen == {
        "/generate": "Bearer user", "/model_info": "Bearer user", "/update_weights_from_disk": "Bearer admin",
    }  # fmt: skip


def test_shared_prompt_is_read_once_before():
    bodies = []

    async def handler(request: web.Request) -> web.Response:
        bodies.append(orjson.loads(await request.read()))
        return web.json_response([REPLY] * len(bodies[-1]["input_ids"]))

    ask(handler, lambda client: client.generate([REQUEST, REQUEST], SAMPLING, V1))
    assert [(len(body["input_ids"]), body["sampling_params"]["max_new_tokens"]) for body in bodies] == [(1, 0), (2, 3)]


@pytest.mark.parametrize(
    ("body", "status", "told"),
    [
        (b"half of {", 200, "not JSON"),
        (b'{"message": "queue full"}', 503, "status 503.*queue full"),
        (b'{"error": 1}', 200, "1 requests but the reply has dict"),
        (b"[]", 200, "1 requests but the reply has 0"),
        (b" " * (4 << 20), 200, "longer than"),
    ],
)
def test_useless_replies_are_named(body, status, told):
    async def handler(request: web.Request) -> web.Response:
        return web.Response(body=body, status=status, content_type="application/json")

    with pytest.raises(BadReply, match=told):
        ask(handler, generate)


def test_silence_ends_in_time():
    async def handler(request: web.Request) -> web.Response:
        await asyncio.sleep(30)
        return web.Response()

    with pytest.raises(NoRolloutCapacity, match="no reply within 0.3 s"):
        ask(handler, generate, timeout_s=0.3)


@pytest.mark.parametrize("cuts", [1, 10])
def test_cut_connections_are_tried_again_a_few_times_where_nothing_is_done_twice(cuts):
    calls = []

    async def handler(request: web.Request) -> web.Response:
        calls.append(request.path)
        if len(calls) <= cuts:
            request.transport.abort()
        return web.json_response({"success": True, "weight_version": "v1"})

    def update(client: Client) -> object:
        return client.load_weights("folder", "v1")

    if cuts == 1:
        ask(handler, update)
        assert calls == ["/update_weights_from_disk"] * 2 + ["/model_info"]
    else:
        with pytest.raises(NoRolloutCapacity, match="/update_weights_from_disk"):
            ask(handler, update)
        with pytest.raises(NoRolloutCapacity, match="/generate"):
            ask(handler, generate)
        # Whether and where a generation is tried again is for the pool to say.
        assert calls == ["/update_weights_from_disk"] * 3 + ["/generate"]


def test_reply_to_another_request_is_an_error():
    async def handler(request: web.Request) -> web.Response:
        return web.json_response([changed("meta_info.id", "another")])

    (reply,) = ask(handler, generate)
    assert isinstance(reply, BadReply) and "'another', another request" in str(reply)


def test_version_that_did_not_take_is_an_error():
    async def handler(request: web.Request) -> web.Response:
        return web.json_response({"success": True, "weight_version": "old"})

    with pytest.raises(BadReply, match="'old' after an update to 'new'"):
        ask(handler, lambda client: client.load_weights("folder", "new"))


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 20)), max_size=12), st.integers(1, 40))
def test_calls_keep_order_and_prompts_together(runs, largest):
    asked = [Request(str(i), (prompt, number)) for number, (prompt, count) in enumerate(runs) for i in range(count)]
    calls = list(split_into_calls(asked, largest))
    assert [request for call in calls for request in call] == asked
    assert all(0 < len(call) <= largest for call in calls)
    for number, (prompt, count) in enumerate(runs):
        homes = [
            place for place, call in enumerate(calls) if any(one.prompt_tokens == (prompt, number) for one in call)
        ]
        assert len(homes) == 1 or count > largest
    assert len(calls) <= 2 * -(-len(asked) // largest)


@dataclass
class Place:
    name: str
    in_flight: int = 0


def test_prompts_keep_their_server_while_others_come_and_go():
    names = [f"http://server-{number}" for number in range(5)]
    keys = [key_of((number, number * number)) for number in range(1000)]
    homes = [choose([Place(name) for name in names], key).name for key in keys]
    assert min(homes.count(name) for name in names) > 150
    without = [choose([Place(name) for name in names[1:]], key).name for key in keys]
    assert all(after == before for before, after in zip(homes, without, strict=True) if before != names[0])
    assert choose([Place(name) for name in reversed(names)], keys[0]).name == homes[0]


@given(st.lists(st.integers(1, 64), min_size=1, max_size=200), st.integers(1, 7))
def test_no_server_gets_more_than_the_mean_and_one_call(sizes, count):
    servers = [Place(str(number)) for number in range(count)]
    for place, size in enumerate(sizes):
        mean = sum(server.in_flight for server in servers) / count
        chosen = choose(servers, key_of((place,)))
        assert chosen.in_flight <= mean
        chosen.in_flight += size
    assert max(server.in_flight for server in servers) <= sum(sizes) / count + max(sizes)
