"""One real SGLang server on the CPU: its numbers against transformers, its doors, and its end."""

import random
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest
import torch

from megatron_r1.config.sglang import SGLangConfig
from megatron_r1.errors import ConfigError, NoRolloutCapacity
from megatron_r1.rollout.engine import Engine
from megatron_r1.rollout.sample import Request, Sampling
from megatron_r1.rollout.sglang.engine import SGLangEngine

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
    prompt = len(completion.prompt_tokens)
    tokens = torch.tensor([completion.prompt_tokens + completion.response_tokens])
    with torch.no_grad():
        logprobs = (model(tokens).logits[0] / temperature).log_softmax(-1)
    return logprobs[prompt - 1 : -1].gather(1, tokens[0, prompt:, None])[:, 0]


def largest_difference(model, completions, temperature: float = 1.0) -> float:
    return max(
        (reference_logprobs(model, one, temperature) - torch.tensor(one.logprobs)).abs().max().item()
        for one in completions
    )


def test_keeps_order_and_protocol(engine):
    assert isinstance(engine, Engine)
    asked = requests(seed=1)
    completions = engine.generate(asked, FREE)
    assert [one.request_id for one in completions] == [one.id for one in asked]
    assert [one.prompt_tokens for one in completions] == [one.prompt_tokens for one in asked]
    assert {one.weight_version for one in completions} == {"initial"}
    assert engine.generate([], FREE) == []


def test_logprobs_match_transformers_through_ten_updates(engine, models):
    folders, built = models
    assert largest_difference(built[0], engine.generate(requests(seed=2), FREE)) < 1e-4
    for step in range(1, 11):
        engine.update_weights(folders[step], f"step-{step}")
        completions = engine.generate(requests(seed=2), FREE)  # the same prompts: a cache not dropped would show
        assert {one.weight_version for one in completions} == {f"step-{step}"}
        assert largest_difference(built[step], completions) < 1e-4
        assert largest_difference(built[step - 1], completions) > 1e-2
    engine.update_weights(folders[0], "back")


def test_more_requests_than_run_at_a_time(engine, models):
    completions = engine.generate(requests(seed=3, prompts=20, each=4), FREE)
    assert largest_difference(models[1][0], completions) < 1e-4


def test_temperature_divides_the_logits_of_logprobs(engine, models):
    completions = engine.generate(requests(seed=4), Sampling(0.6, 1.0, 12, (), 0))
    assert largest_difference(models[1][0], completions, temperature=0.6) < 1e-4


def test_greedy_takes_the_most_likely_token(engine, models):
    for one in engine.generate(requests(seed=5, each=1), Sampling(0.0, 1.0, 12, (), 0)):
        tokens = torch.tensor([one.prompt_tokens + one.response_tokens])
        with torch.no_grad():
            best = models[1][0](tokens).logits[0].argmax(-1)
        assert tuple(best[len(one.prompt_tokens) - 1 : -1].tolist()) == one.response_tokens


def test_stop_tokens_end_a_response_and_belong_to_it(engine):
    stops = tuple(range(3, 60))
    completions = engine.generate(requests(seed=6, prompts=16), Sampling(1.0, 1.0, 12, stops, 0))
    stopped = [one for one in completions if one.finish_reason == "stop"]
    assert len(stopped) > 16
    for one in completions:
        assert not set(one.response_tokens[:-1]) & set(stops)
        if one.finish_reason == "stop":
            assert one.response_tokens[-1] in {*stops, 2}
        else:
            assert len(one.response_tokens) == 12


def test_whole_context_can_be_used_and_no_more(engine):
    prompt = Request("long", tuple(range(3, 3 + CONTEXT - 12)))
    (one,) = engine.generate([prompt], Sampling(1.0, 1.0, 12, (), 0))
    assert one.finish_reason == "stop" or len(one.response_tokens) == 12
    with pytest.raises(ConfigError, match="at most 64"):
        engine.generate([prompt], Sampling(1.0, 1.0, 13, (), 0))


def status(url: str, key: str | None, body: bytes | None = None) -> int:
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    try:
        return urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=20).status
    except urllib.error.HTTPError as error:
        return error.code


def test_doors_open_to_their_own_key_alone(engine):
    (server,) = engine.servers
    assert server.url.startswith("http://127.0.0.1:")
    for path in ("/update_weights_from_disk", "/pause_generation", "/load_lora_adapter_from_tensors", "/abort_request"):
        for key in (None, "wrong", server.endpoint.api_key):
            assert status(server.url + path, key, b"{}") in (401, 403), (path, key)
    for path in ("/model_info", "/server_info"):
        for key in (None, "wrong", server.endpoint.admin_key):
            assert status(server.url + path, key) in (401, 403), (path, key)
    assert status(server.url + "/generate", None, b"{}") in (401, 403)
    assert status(server.url + "/model_info", server.endpoint.api_key) == 200


def test_keys_stand_in_no_command_line_environment_or_log(engine):
    (server,) = engine.servers
    process = psutil.Process(server.process.pid)
    for one in [process, *process.children(recursive=True)]:
        told = Path(f"/proc/{one.pid}/cmdline").read_bytes() + Path(f"/proc/{one.pid}/environ").read_bytes()
        assert server.endpoint.api_key.encode() not in told
        assert server.endpoint.admin_key.encode() not in told
    log = server.log.read_text()
    assert "api_key" in log  # SGLang does write its arguments there
    assert server.endpoint.api_key not in log
    assert server.endpoint.admin_key not in log


def test_plugin_is_at_work(engine):
    log = engine.servers[0].log.read_text()
    backend = "TorchNativeAttnBackend._run_sdpa_forward"
    for target in (f"{backend}_decode", f"{backend}_extend", "engine._set_envs_and_config"):
        assert any("Applied 1 hook(s)" in line and target in line for line in log.splitlines()), target


def test_weights_that_cannot_be_loaded_are_one_line(engine, tmp_path):
    with pytest.raises(NoRolloutCapacity, match="were not loaded|status 400") as error:
        engine.update_weights(tmp_path / "nothing", "bad")
    assert "\n" not in str(error.value)
    assert engine.version == "back"


def test_idle_server_does_not_spin(engine):
    process = psutil.Process(engine.servers[0].process.pid)

    def seconds() -> float:
        return sum(sum(one.cpu_times()[:2]) for one in [process, *process.children(recursive=True)])

    before = seconds()
    psutil.cpu_percent(interval=2.0)
    assert seconds() - before < 0.5


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
