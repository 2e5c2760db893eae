"""Options of servers against the installed SGLang's own fields, and what a CPU refuses."""

import ast
import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_r1.config.nodes import first_gpu
from megatron_r1.config.rollout import RolloutConfig
from megatron_r1.config.sglang import PoolConfig, ServerConfig, SGLangConfig, SpeculativeConfig
from megatron_r1.errors import ConfigError
from megatron_r1.rollout.sglang.client import Endpoint
from megatron_r1.rollout.sglang.servers import startup as starts
from megatron_r1.rollout.sglang.servers.arguments import (
    options,
    refuse_on_cpu,
    server_arguments,
    server_environment,
)
from megatron_r1.rollout.sglang.servers.supervise import CurrentWeights

EVERYTHING = ServerConfig(
    tensor_parallel=8, expert_parallel=8, data_parallel_attention=4, memory_fraction=0.8, chunked_prefill_tokens=4096,
    quantization="fp8", kv_cache_dtype="fp8_e4m3", attention_backend="flashmla", expert_dispatch="deepep",
    memory_saver=True, return_routed_experts=True, cuda_graph=False,
    speculative=SpeculativeConfig(method="mtp", steps=3, draft_tokens=4),
)  # fmt: skip


GRAPHS = "SGLANG_MEMORY_SAVER_CUDA_GRAPH"


def root_of_sglang() -> Path:
    """SGLang's sources, which are read without importing it."""
    return Path(importlib.util.find_spec("sglang").origin).parent / "srt"


@pytest.fixture(scope="module")
def fields() -> dict[str, str]:
    """Name -> declaration of every field of SGLang's ServerArgs, read without importing SGLang."""
    root = root_of_sglang() / "arg_groups" / "fields"
    return {
        node.target.id: ast.unparse(node.annotation)
        for path in root.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }


def test_every_option_is_a_field_of_sglang(fields, tmp_path):
    config = SGLangConfig(server=EVERYTHING)
    arguments = server_arguments(
        tmp_path, config, device="cuda", dtype="bfloat16", context_length=64, version="v", weights=False
    )
    assert len(arguments) > 25 and arguments.keys() - fields.keys() == set()
    kinds = {int: "int", float: "float", str: "str", bool: "bool"}
    wrong = {name for name, value in arguments.items() if kinds[type(value)] not in fields[name]}
    assert wrong <= {"moe_a2a_backend"} and "deepep" in fields["moe_a2a_backend"]


@pytest.mark.parametrize(
    ("placement", "servers", "width", "wanted", "gpus", "trainers", "first"),
    [
        ("separate", 2, 2, -1, 8, 4, 4),  # behind the trainer's
        ("separate", 2, 2, -1, 4, 4, None),  # none are left
        ("separate", 1, 1, -1, 8, 8, None),
        ("separate", 1, 1, -1, 1, 8, None),  # each rank sees its own GPU alone
        ("separate", 2, 2, 0, 4, 4, 0),
        ("separate", 8, 1, -1, 8, 0, 0),  # nothing is trained
        ("separate", 1, 1, -1, 1, 1, 0),  # the only GPU
        ("colocated", 2, 2, -1, 8, 4, 0),
        ("separate", 2, 2, 1, 8, 4, 1),
        ("separate", 3, 2, -1, 4, 1, None),
        ("separate", 1, 1, 8, 8, 1, None),
    ],
)
def test_servers_take_gpus_of_their_own_where_there_are_any(placement, servers, width, wanted, gpus, trainers, first):
    server = ServerConfig(tensor_parallel=width)
    rollout = RolloutConfig(placement=placement, sglang=SGLangConfig(servers=servers, first_gpu=wanted, server=server))
    if first is not None:
        assert first_gpu(rollout, gpus, trainers) == first
        return
    with pytest.raises(ConfigError, match=f"^rollout.sglang.servers={servers}: must fit from GPU .*are {gpus} GPUs"):
        first_gpu(rollout, gpus, trainers)


def test_each_server_gets_its_first_gpu(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(starts, "Server", lambda arguments, *_: started.append(arguments.get("base_gpu_id")))
    for device in ("cuda", "cpu"):
        config = SGLangConfig(server=ServerConfig(tensor_parallel=2))
        dtype = "bfloat16" if device == "cuda" else "float32"
        several = starts.ServerFactory(tmp_path, config, tmp_path, device, dtype, 64, first_gpu=4)
        for place, folder in ((0, tmp_path), (1, None)):
            several.launch(place, Endpoint("http://a:1", "", ""), CurrentWeights(["0"], folder))
        several.close()
    assert started == [4, 6, None, None]


def test_options_have_sglangs_names():
    chosen = options(EVERYTHING)
    expected = {
        "tp_size": 8, "ep_size": 8, "dp_size": 4, "enable_dp_attention": True, "mem_fraction_static": 0.8,
        "chunked_prefill_size": 4096, "quantization": "fp8", "kv_cache_dtype": "fp8_e4m3",
        "attention_backend": "flashmla", "moe_a2a_backend": "deepep", "enable_memory_saver": True,
        "enable_return_routed_experts": True,
        "disable_cuda_graph": True, "speculative_algorithm": "NEXTN", "speculative_num_steps": 3,
        "speculative_eagle_topk": 1, "speculative_num_draft_tokens": 4,
    }  # fmt: skip
    assert chosen == expected
    assert options(ServerConfig()) == {"tp_size": 1, "ep_size": 1}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("quantization", "fp8"),
        ("kv_cache_dtype", "fp8_e5m2"),
        ("expert_dispatch", "deepep"),
        ("memory_saver", True),
        ("data_parallel_attention", 2),
        ("attention_backend", "flashinfer"),
        ("speculative", SpeculativeConfig(method="mtp")),
    ],
)
def test_what_needs_cuda_is_refused_on_a_cpu_in_one_line(tmp_path, key, value):
    server = replace(ServerConfig(tensor_parallel=2, expert_parallel=2), **{key: value})
    with pytest.raises(ConfigError, match=rf"^rollout\.sglang\.server\.{key}\S*=.*on a CPU") as error:
        server_arguments(
            tmp_path, SGLangConfig(server=server), device="cpu", dtype="float32", context_length=64, version="v"
        )
    assert "\n" not in str(error.value)
    refuse_on_cpu(replace(ServerConfig(tensor_parallel=2), attention_backend="torch_native"))


@pytest.mark.parametrize("saver", [True, False])
def test_graphs_release_their_memory_with_the_rest(saver):
    """SGLang makes CUDA graphs pausable by this variable alone; its own code reads it where it captures them."""
    given = server_environment("cuda", ServerConfig(memory_saver=saver))
    assert (given.get(GRAPHS) == "1") == saver
    backend = root_of_sglang() / "model_executor" / "runner_backend" / "full_cuda_graph_backend.py"
    assert f'enable_memory_saver\n            and get_bool_env_var("{GRAPHS}")' in backend.read_text()


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: ServerConfig(tensor_parallel=4, expert_parallel=3), "expert_parallel"),
        (lambda: ServerConfig(tensor_parallel=4, expert_parallel=2, expert_dispatch="deepep"), "expert_dispatch"),
        (lambda: ServerConfig(memory_fraction=1.5), "memory_fraction"),
        (lambda: SpeculativeConfig(steps=3), "draft_tokens"),
        (lambda: SGLangConfig(addresses=["host:1"]), "addresses"),
        (lambda: SGLangConfig(addresses=["http://a:1", "http://a:1"]), "addresses"),
        (lambda: SGLangConfig(router="http://host:1/"), "router"),
        (lambda: PoolConfig(give_up_s=0), "give_up_s"),
        (
            lambda: RolloutConfig(
                sglang=SGLangConfig(server=ServerConfig(tensor_parallel=2, data_parallel_attention=2))
            ),
            "sglang.server.data_parallel_attention",
        ),
    ],
)
def test_what_cannot_be_is_refused(make, key):
    with pytest.raises(ConfigError) as error:
        make()
    assert error.value.key == key
