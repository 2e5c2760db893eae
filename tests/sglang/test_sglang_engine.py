"""One real SGLang server on the CPU: its numbers against transformers, its doors, and its end."""

import ast
import contextlib
import importlib.util
import json
import random
import re
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest
import torch

from megatron_r1.config.sglang import SGLangConfig
from megatron_r1.errors import ConfigError, NoRolloutCapacity
from megatron_r1.rollout.engine import Request, RolloutEngine, Sampling
from megatron_r1.rollout.sglang.engine import SGLangEngine
from tests.support.agreement import disagreement
from tests.support.samples import logprobs_of, prompt_of, row_of, tokens_of

pytestmark = [pytest.mark.sglang]
CONTEXT = 64
VOCABULARY = 160
FREE = Sampling(temperature=1.0, top_p=1.0, max_tokens=12, stop_tokens=(), seed=0)


@pytest.fixture(scope="module")
def engine(models, tmp_path_factory):
    folders, _ = models
    config = SGLangConfig(max_running_requests=32, max_total_tokens=4096, request_timeout_s=60.0)
    with SGLangEngine(
        folders[0], config, tmp_path_factory.mktemp("logs"), "cpu", "float32", context_length=CONTEXT
    ) as engine:
        yield engine


def requests(seed: int, prompts: int = 4, each: int = 2) -> list[Request]:
    draw = random.Random(seed)
    tokens = [tuple(draw.randrange(3, VOCABULARY) for _ in range(draw.randrange(1, 40))) for _ in range(prompts)]
    return [Request(f"{prompt}-{i}", tokens[prompt]) for prompt in range(prompts) for i in range(each)]


def reference_logprobs(model, completion, temperature: float = 1.0) -> torch.Tensor:
    prompt = len(prompt_of(completion))
    tokens = row_of(completion)
    with torch.no_grad():
        logprobs = (model(tokens).logits[0] / temperature).log_softmax(-1)
    return logprobs[prompt - 1 : -1].gather(1, tokens[0, prompt:, None])[:, 0]


def difference_from(model, completions, temperature: float = 1.0) -> float:
    return disagreement(
        (reference_logprobs(model, one, temperature) - logprobs_of(one)).abs().max().item() for one in completions
    )


def test_keeps_order_and_protocol(engine):
    assert isinstance(engine, RolloutEngine)
    asked = requests(seed=1)
    completions = engine.generate(asked, FREE)
    assert [one.request_id for one in completions] == [one.id for one in asked]
    assert [prompt_of(one) for one in completions] == [one.prompt_tokens for one in asked]
    assert {one.weight_version for one in completions} == {"initial"}
    assert engine.generate([], FREE) == []


def test_logprobs_match_transformers_through_ten_updates(engine, models):
    folders, built = models
    assert difference_from(built[0], engine.generate(requests(seed=2), FREE)) < 1e-4
    for step in range(1, 11):
        engine.load_weights(folders[step], f"step-{step}")
        completions = engine.generate(requests(seed=2), FREE)  # the same prompts: a cache not dropped would show
        assert {one.weight_version for one in completions} == {f"step-{step}"}
        assert difference_from(built[step], completions) < 1e-4
        assert difference_from(built[step - 1], completions) > 1e-2
    engine.load_weights(folders[0], "back")


def test_more_requests_than_run_at_a_time(engine, models):
    completions = engine.generate(requests(seed=3, prompts=20, each=4), FREE)
    assert difference_from(models[1][0], completions) < 1e-4


def test_temperature_divides_the_logits_of_logprobs(engine, models):
    completions = engine.generate(requests(seed=4), Sampling(0.6, 1.0, 12, (), 0))
    assert difference_from(models[1][0], completions, temperature=0.6) < 1e-4


def test_greedy_takes_the_most_likely_token(engine, models):
    for one in engine.generate(requests(seed=5, each=1), Sampling(0.0, 1.0, 12, (), 0)):
        tokens = row_of(one)
        with torch.no_grad():
            best = models[1][0](tokens).logits[0].argmax(-1)
        assert tuple(best[len(prompt_of(one)) - 1 : -1].tolist()) == tokens_of(one)


def test_stop_tokens_end_a_response_and_belong_to_it(engine):
    stops = tuple(range(3, 60))
    completions = engine.generate(requests(seed=6, prompts=16), Sampling(1.0, 1.0, 12, stops, 0))
    stopped = [one for one in completions if one.finish_reason == "stop"]
    assert len(stopped) > 16
    for one in completions:
        assert not set(tokens_of(one)[:-1]) & set(stops)
        if one.finish_reason == "stop":
            assert tokens_of(one)[-1] in {*stops, 2}
        else:
            assert len(tokens_of(one)) == 12


def test_whole_context_can_be_used_and_no_more(engine):
    prompt = Request("long", tuple(range(3, 3 + CONTEXT - 12)))
    (one,) = engine.generate([prompt], Sampling(1.0, 1.0, 12, (), 0))
    assert one.finish_reason == "stop" or len(tokens_of(one)) == 12
    with pytest.raises(ConfigError, match="at most 64"):
        engine.generate([prompt], Sampling(1.0, 1.0, 13, (), 0))


def status(url: str, key: str | None, body: bytes | None = None) -> int:
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    try:
        return urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=20).status
    except urllib.error.HTTPError as error:
        return error.code


def announced() -> dict[bool, set[tuple[str, str]]]:
    """Method and path of SGLang's endpoints as its source declares them, by whether they are control."""
    found: dict[bool, set[tuple[str, str]]] = {True: set(), False: set()}
    root = Path(importlib.util.find_spec("sglang").origin).parent / "srt" / "entrypoints"
    for name in ("http_server.py", "elastic_ep.py", "v1_loads.py"):
        for function in ast.walk(ast.parse((root / name).read_text())):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                marks = [ast.unparse(one) for one in function.decorator_list]
                control = any(mark.startswith("auth_level(AuthLevel.ADMIN") for mark in marks)
                for mark in marks:
                    if match := re.match(r"(?:app|router)\.(get|post|put|delete|api_route)\('([^']*)'", mark):
                        methods = re.findall(r"'([A-Z]+)'", mark.partition("methods=")[2]) or [match[1].upper()]
                        found[control] |= {(method, match[2]) for method in methods}
    return found


def test_every_door_opens_to_its_own_key_alone(engine):
    (server,) = engine.servers
    key, doors = server.endpoint.api_key, announced()
    served = json.loads(ask(server.url + "/openapi.json", key)[1])["paths"]
    there = {(method.upper(), path) for path, methods in served.items() for method in methods}
    control = doors[True] & there
    # What a flag of the server adds is missing from what it serves, nothing else may be.
    assert {path for _, path in doors[True] - there} <= {"/dumper/{method}"}
    assert len(control) > 50 and ("POST", "/update_weights_from_disk") in control
    for method, path in sorted(control):
        for wrong in (None, "wrong", key, server.endpoint.admin_key[:-1]):
            assert ask(server.url + path, wrong, method)[0] == 401, (method, path, wrong)
    open_to_all = ("/health", "/ready", "/metrics")
    others = {(method, path) for method, path in there - control if not path.startswith(open_to_all)}
    assert len(others) > 30
    for method, path in sorted(others):
        for wrong in (None, "wrong", server.endpoint.admin_key):
            assert ask(server.url + path, wrong, method)[0] == 401, (method, path, wrong)
    print(f"{len(control)} control and {len(others)} other endpoints refused")
    assert ask(server.url + "/model_info", key)[0] == 200


def ask(url: str, key: str | None, method: str = "GET") -> tuple[int, bytes]:
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    body = None if method == "GET" else b"{}"
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, headers, method=method), timeout=20) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        return error.code, b""


def test_keys_stand_in_no_command_line_environment_log_or_file(engine):
    (server,) = engine.servers
    keys = (server.endpoint.api_key.encode(), server.endpoint.admin_key.encode())
    seen = 0
    for process in Path("/proc").glob("[0-9]*"):
        for name in ("cmdline", "environ"):
            with contextlib.suppress(OSError):
                told = (process / name).read_bytes()
                seen += 1
                assert not any(key in told for key in keys), process
    assert seen > 20
    log = server.log.read_bytes()
    assert b"api_key" in log  # SGLang does write its arguments there
    files = [server.log, *(path for path in server.folder.rglob("*") if path.is_file())]
    assert not any(key in path.read_bytes() for path in files for key in keys)
    assert not any(key.decode() in text for key in keys for text in (repr(server.endpoint), repr(engine.endpoints)))


def test_plugin_is_at_work(engine):
    lines = engine.servers[0].log.read_text().splitlines()
    (changed,) = (line for line in lines if "changed by plugins: " in line)
    backend = "TorchNativeAttnBackend._run_sdpa_forward"
    for target in (f"{backend}_decode", f"{backend}_extend", "engine._set_envs_and_config"):
        assert target in changed


def test_weights_that_cannot_be_loaded_are_one_line(engine, tmp_path):
    with pytest.raises(NoRolloutCapacity, match="were not loaded|status 400") as error:
        engine.load_weights(tmp_path / "nothing", "bad")
    assert "\n" not in str(error.value)
    assert engine.version == "back"


def test_idle_server_sleeps(engine):
    process = psutil.Process(engine.servers[0].process.pid)

    def seconds() -> float:
        return sum(sum(one.cpu_times()[:2]) for one in [process, *process.children(recursive=True)])

    time.sleep(1.0)  # what was asked before comes to rest
    before, began = seconds(), time.monotonic()
    time.sleep(6.0)  # its watch looks at it meanwhile
    share = (seconds() - before) / (time.monotonic() - began)
    print(f"idle server: {share:.1%} of a core")
    assert share < 0.15  # one that polls takes a whole core; the watch's calls 3 to 9 %, as fast as the core is


def test_close_leaves_no_process_and_no_folder(engine):
    (server,) = engine.servers
    process = psutil.Process(server.process.pid)
    family = [process, *process.children(recursive=True)]
    assert len(family) >= 3
    engine.close()
    assert not [one for one in family if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
    assert not server.folder.exists()
    assert not server.accepts()
    engine.close()
