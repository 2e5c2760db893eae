"""How far an engine's log-probabilities are from the trainer's, with routing replay and without: bf16, on this machine.

`tools/bench/routing_replay.py [--engine sglang] [--layers 8] [--experts 32] [--seeds 3]`. The model has random weights,
large enough for probabilities to differ. Of every response's tokens: mean and 99th percentile of the absolute
difference, and the share of the engine's choices of experts that the trainer's routers would have made otherwise.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_r1.platform import select

PLATFORM = select("cpu")

import torch  # noqa: E402

from megatron_r1.config.data import DataConfig  # noqa: E402
from megatron_r1.config.load import load  # noqa: E402
from megatron_r1.config.model import ModelConfig  # noqa: E402
from megatron_r1.config.parallel import ParallelConfig  # noqa: E402
from megatron_r1.config.rollout import RolloutConfig  # noqa: E402
from megatron_r1.config.sglang import ServerConfig, SGLangConfig  # noqa: E402
from megatron_r1.data.synthetic.train_tokenizer import train_tokenizer  # noqa: E402
from megatron_r1.model.build import build_model, native_tensors  # noqa: E402
from megatron_r1.model.replay import RoutingReplay  # noqa: E402
from megatron_r1.parallel.mesh import process_groups  # noqa: E402
from megatron_r1.rl.policy.batch import make_batch  # noqa: E402
from megatron_r1.rl.policy.policy import Policy  # noqa: E402
from megatron_r1.rollout.engine import Completion, Request, RolloutEngine, Sampling, require_completions  # noqa: E402  # noqa: E402
from megatron_r1.rollout.factory import sglang_engine  # noqa: E402
from megatron_r1.rollout.in_process import LocalEngine  # noqa: E402
from megatron_r1.rollout.routed_experts import RoutedLayers  # noqa: E402
from megatron_r1.rollout.sample import Sample  # noqa: E402

PROMPTS, PROMPT_TOKENS = 64, 12


def shape_of(given: argparse.Namespace) -> ModelConfig:
    groups = [f"model.moe.num_groups={given.experts // 8}", f"model.moe.group_top_k={max(1, given.experts // 16)}"]
    size = [f"model.num_layers={given.layers}", f"model.moe.num_experts={given.experts}", "model.moe.top_k=4"]
    return load("pretrain", ["model.init_std=0.08", "model.dtype=bf16", *size, *groups]).model


@contextmanager
def engine_of(kind: str, model: torch.nn.Module, shape: ModelConfig, replay: RoutingReplay) -> Iterator[RolloutEngine]:
    if kind == "local":
        yield LocalEngine(model, PROMPTS, 0, replay)
        return
    server = ServerConfig(return_routed_experts=True)
    rollout = RolloutConfig(sglang=SGLangConfig(max_running_requests=64, max_total_tokens=16_384, server=server))
    with tempfile.TemporaryDirectory() as folder:
        train_tokenizer(DataConfig(num_documents=2000)).save(Path(folder) / "tokenizer")
        place = (Path(folder) / "tokenizer", Path(folder) / "logs", "cpu")
        with sglang_engine(rollout, shape, lambda: native_tensors(model), *place) as (engine, sync):
            sync.push("0")
            yield engine


def as_sample(completion: Completion) -> Sample:
    return Sample(
        prompt_id=completion.request_id,
        group=0,
        prompt_length=PROMPT_TOKENS,
        response_length=len(completion.response.tokens),
        weight_version=completion.weight_version,
        finish_reason=completion.finish_reason,
        reward=0.0,
        reward_parts={},
        response=completion.response,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=["sglang", "local"], default="sglang")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--experts", type=int, default=32, help="a multiple of 16")
    parser.add_argument("--tokens", type=int, default=48, help="of a response")
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    gains = []
    for seed in range(given.seeds):
        with process_groups(PLATFORM, ParallelConfig(), seed=seed, threads=1):
            means = measure(given, seed)
        gains.append(means["off"] / means["on"])
    print(f"replay makes the mean difference {statistics.median(gains):.2f} times smaller ({min(gains):.2f} at least)")


def measure(given: argparse.Namespace, seed: int) -> dict[str, float]:
    shape = shape_of(given)
    moe, model = shape.moe, build_model(shape, ParallelConfig(), PLATFORM, seed)
    replay = RoutingReplay(model, moe.first_dense_layers)
    draw = torch.Generator().manual_seed(seed)
    prompts_BL = torch.randint(5, shape.vocab_size, (PROMPTS, PROMPT_TOKENS), generator=draw)
    requests = [Request(str(number), tuple(prompt)) for number, prompt in enumerate(prompts_BL.tolist())]
    layers = RoutedLayers(shape.num_layers, moe.first_dense_layers, moe.top_k)
    sampling = Sampling(1.0, 1.0, given.tokens, (2,), seed, layers)
    with engine_of(given.engine, model, shape, replay) as engine:
        completions = require_completions(engine.generate(requests, sampling))
    rows = make_batch([as_sample(one) for one in completions], range(PROMPTS), 0, "cpu")
    means = {}
    for name, used in (("off", None), ("on", replay)):
        log_probs_BL = rows.gather(Policy(model, 1.0, used).logprobs_by_sample([rows]))
        gap_N = (log_probs_BL - rows.rollout_logprobs_BL).abs()[rows.mask_BL]
        means[name] = float(gap_N.mean())
        said = (
            f"mean {means[name]:.5f}, 99th percentile {float(gap_N.quantile(0.99)):.4f}, most {float(gap_N.max()):.3f}"
        )
        print(f"seed {seed}, {len(gap_N)} tokens, replay {name}: {said}")
    replayed, mismatches = replay.count()
    print(f"seed {seed}: {mismatches} of {replayed} choices would have been others ({mismatches / replayed:.2%})")
    return means


if __name__ == "__main__":
    main()
