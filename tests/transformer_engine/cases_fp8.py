"""FP8 on Transformer Engine, in a process of it (test_fp8.py): no stage builds a micro-batch that it refuses.

Every stage learns from real micro-batches in FP8. Of many drawn ones a layer's products alone are computed, of as many
tokens: Transformer Engine's own checks of shapes, which are Python, and those of its products (fp8.py) look at nothing
else. Products are compared with those of `megatron_r1.model.fp8`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from megatron.core.fp8_utils import get_fp8_context

from megatron_r1.commands.sft import reader_of
from megatron_r1.config.cross_checks import check_fp8_sequences
from megatron_r1.config.fp8 import Fp8Config
from megatron_r1.config.model import AttentionConfig, ModelConfig, MoeConfig
from megatron_r1.config.parallel import ParallelConfig
from megatron_r1.config.performance import PerformanceConfig
from megatron_r1.config.run import RunConfig
from megatron_r1.config.train import TrainConfig
from megatron_r1.data.preference.examples import TokenizedPreference, TokenizedSequence
from megatron_r1.errors import ConfigError
from megatron_r1.model.build import build_model, without_multi_token_prediction
from megatron_r1.model.fp8.apply import INPUT_IN_BF16, TRANSFORMER_ENGINE
from megatron_r1.model.fp8.quantise import BLOCK, E4M3, TILE, through
from megatron_r1.model.reward_head import add_reward_head
from megatron_r1.parallel.mesh import process_groups
from megatron_r1.platform import select
from megatron_r1.preference.dpo import DirectPreference
from megatron_r1.preference.reward_model import RewardModel
from megatron_r1.rl.learner import Learner
from megatron_r1.rl.policy.policy import Policy
from megatron_r1.rl.policy.reference import ReferencePolicy
from megatron_r1.train.offload import TrainerMemory
from megatron_r1.train.optimizer import Optimizer
from megatron_r1.train.packed import PackedReader
from megatron_r1.train.state import TrainState
from megatron_r1.train.stream import next_token_forward
from megatron_r1.train.update import update
from tests.support.forked_ranks import fork_ranks
from tests.support.fp8_shape import fp8_shape
from tests.support.packing_cases import chat_batch, packed_batch
from tests.support.samples import make_sample

DRAWS = 120
FP8 = Fp8Config(enabled=True)


def shape() -> ModelConfig:
    """Sides of all matrices are multiples of 16, few of 128."""
    return ModelConfig(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        ffn_hidden_size=96,
        dtype="bf16",
        attention=AttentionConfig(
            q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16
        ),
        moe=MoeConfig(num_experts=4, top_k=2, ffn_hidden_size=32),
    )


def config_of(**sft: Any) -> RunConfig:
    config = RunConfig(model=shape(), fp8=FP8, train=TrainConfig(steps=100))
    config.rl.prompts_per_rollout, config.rl.group_size, config.rl.updates_per_rollout = 2, 2, 1
    config.rl.tokens_per_micro_batch = 60
    for key, value in sft.items():
        setattr(config.sft, key, value)
    return config


def fp8_model(platform: Any, performance: PerformanceConfig | None = None) -> Any:
    return build_model(shape(), ParallelConfig(), platform, 0, performance, FP8)


@dataclass
class Stage:
    """A stage's model and optimizer, and how it learns from a few drawn examples, or only runs over many."""

    model: Any
    optimizer: Optimizer
    chance: np.random.Generator

    def tokens(self, low: int, high: int) -> list[int]:
        return self.chance.integers(5, 512, self.chance.integers(low, high)).tolist()

    def length(self, high: int) -> int:
        """Of sequences that nothing pads: one that the config accepts."""
        return 16 * int(self.model.config.tensor_model_parallel_size) * int(self.chance.integers(1, high))


def pretraining(stage: Stage, count: int) -> int:
    reader, passes = PackedReader(True, 1, "cpu"), 0
    while passes < count:
        length, rows = stage.length(6), int(stage.chance.integers(1, 4))
        micro_batches = reader.micro_batches(packed_batch(rows, length, passes), 0, 1, rows)
        run(stage, micro_batches, reader.forward, length, count == 1)
        passes += len(micro_batches)
    return passes


def fine_tuning(stage: Stage, count: int, packing: str) -> int:
    device: Any = SimpleNamespace(device="cpu")
    this: Any = SimpleNamespace(config=config_of(packing=packing), model=stage.model, platform=device)
    reader = reader_of(this)
    passes = 0
    while passes < count:
        rows, length = 4, stage.length(8)
        micro_batches = reader.micro_batches(chat_batch(rows, length, passes), 0, 1, int(stage.chance.integers(1, 3)))
        run(stage, micro_batches, reader.forward, reader.shape(length, 2)[0], count == 1)
        passes += len(micro_batches)
    return passes


def preferences(stage: Stage, count: int) -> int:
    def pair() -> TokenizedPreference:
        prompt = stage.tokens(1, 20)
        return TokenizedPreference(
            tuple(TokenizedSequence([*prompt, *stage.tokens(1, 30)], len(prompt)) for _ in range(2)), True
        )

    size = int(stage.chance.integers(1, 4))
    preference = DirectPreference(stage.model, ReferencePolicy(stage.model), 0.1, 0.0, 0, "cpu")
    pairs = [pair() for _ in range(count * size)]
    if count == 1:
        assert not preference.learn(stage.optimizer, pairs, 1e-3, size)[0].skipped
    else:
        assert all(np.isfinite(preference.gaps(pairs, size)))
    return count


def reward_model(stage: Stage, count: int) -> int:
    def sequence() -> TokenizedSequence:
        tokens = stage.tokens(4, 40)
        return TokenizedSequence(tokens, len(tokens) - 2)

    size = int(stage.chance.integers(1, 4))
    model = RewardModel(stage.model, True, 0.5, 0, "cpu")
    pairs = [TokenizedPreference((sequence(), sequence()), True) for _ in range(count * size)]
    if count == 1:
        micro_batches = model.micro_batches(pairs, 0, 1, size)
        run(stage, micro_batches, model.forward, micro_batches[0].inputs_BL.shape[1], True)
    else:
        sequences = [sequence.tokens for pair in pairs for sequence in pair.sequences]
        assert all(np.isfinite(model.scores(sequences, 2 * size)))
    return count


def reinforcement(stage: Stage, count: int) -> int:
    samples = [
        make_sample(
            prompt_id=f"p{index // 2}", group=index // 2, reward=float(index % 2),
            prompt_tokens=tuple(stage.tokens(1, 20)), response_tokens=tuple(stage.tokens(1, 40)),
        )
        for index in range(4 if count == 1 else 3 * count)
    ]  # fmt: skip
    learner = Learner(config_of(), stage.model, stage.optimizer, ReferencePolicy(stage.model), 0, "cpu")
    if count == 1:
        state, metrics = learner.learn(samples, TrainState())
        assert state.updates == 1 and np.isfinite(metrics["policy/loss"])
        return 1
    [mini_batch] = learner._mini_batches(samples, 0)
    Policy(stage.model, 1.0).logprobs_by_sample(mini_batch.micro_batches)
    return len(mini_batch.micro_batches)


def run(stage: Stage, micro_batches: Sequence[Any], forward: Callable[..., Any], length: int, learns: bool) -> None:
    """An update, or a pass without gradient."""
    if learns:
        assert not update(stage.model, stage.optimizer, micro_batches, forward, 1e-3, length).skipped
        return
    from megatron_r1.model.forward_backward import forward_only

    forward_only(stage.model, micro_batches, lambda model, batch: forward(model, batch)[0], length)


STAGES: dict[str, Callable[[Stage, int], int]] = {
    "pretrain": pretraining,
    "sft packed": lambda stage, count: fine_tuning(stage, count, "best_fit"),
    "sft": lambda stage, count: fine_tuning(stage, count, "none"),
    "dpo": preferences,
    "reward_model": reward_model,
    "grpo": reinforcement,
}


def stage_of(model: Any) -> Stage:
    add_reward_head(model)
    return Stage(model, Optimizer(model, TrainConfig(steps=100)), np.random.default_rng(0))


def learn_on_two_ranks() -> None:
    """Every stage once; micro-batches are padded to what tensor-parallel ranks send one another in FP8, where they are.

    In pre-training and fine-tuning they are as long as the sequences, of which the short ones here are sent in bf16.
    """
    parallel, platform = ParallelConfig(tensor=2), select("cpu")
    with process_groups(platform, parallel, seed=0, threads=1):
        stage = stage_of(build_model(replace(fp8_shape(), dtype="bf16"), parallel, platform, 0, None, FP8))
        in_bf16 = set()
        for name, learn in STAGES.items():
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                learn(stage, 1)
            if any("all-gather in high precision" in str(one.message) for one in said):
                in_bf16.add(name)
        assert in_bf16 and in_bf16 <= {"pretrain", "sft packed", "sft"}, in_bf16


def test_every_stage_learns_on_two_tensor_parallel_ranks() -> None:
    """Forked before this process has groups of its own."""
    assert not torch.distributed.is_initialized(), "run this test first"
    assert fork_ranks(2, learn_on_two_ranks) == 0


@pytest.fixture(scope="module")
def stage(one_rank: Any) -> Stage:
    return stage_of(fp8_model(one_rank))


def one_product(model: Any, tokens: int) -> None:
    """Forward and backward through one of the model's linear layers."""
    module = model.decoder.layers[0].self_attention.linear_proj
    with torch.enable_grad(), get_fp8_context(model.config):
        x_TK = torch.ones(tokens, module.weight.shape[1], dtype=torch.bfloat16, requires_grad=True)
        module(x_TK)[0].sum().backward()
    assert x_TK.grad is not None


@pytest.mark.parametrize("name", STAGES)
def test_none_of_the_drawn_micro_batches_is_refused(stage: Stage, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens: list[int] = []

    def layers(hidden_states: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        tokens.append(hidden_states.shape[:-1].numel())
        one_product(stage.model, tokens[-1])
        return hidden_states

    monkeypatch.setattr(stage.model.decoder, "forward", layers)
    with without_multi_token_prediction(stage.model):
        assert STAGES[name](stage, DRAWS) >= DRAWS
    assert len(tokens) >= DRAWS and len({*tokens}) > 3


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_learns(stage: Stage, name: str) -> None:
    before = stage.model.decoder.layers[1].mlp.experts.linear_fc1.weight0.clone()
    STAGES[name](stage, 1)
    assert not torch.equal(stage.model.decoder.layers[1].mlp.experts.linear_fc1.weight0, before)


@pytest.mark.parametrize("length", [12, 24, 32])
def test_the_config_refuses_the_lengths_that_do_not_multiply(stage: Stage, length: int) -> None:
    config = config_of()
    config.train.sequence_length = length
    rows_BL = torch.randint(5, 512, (1, length + 1), generator=torch.Generator().manual_seed(0))
    if length % 16 == 0:
        check_fp8_sequences(config)
        run(stage, [rows_BL], next_token_forward, length, True)
        return
    with pytest.raises(ConfigError, match=f"train.sequence_length={length}: must be a multiple of 16 x"):
        check_fp8_sequences(config)
    with pytest.raises(ValueError, match="divisible by 8|caller must pad"):
        run(stage, [rows_BL], next_token_forward, length, True)


def test_products_are_those_of_the_cpu_with_scales_of_powers_of_two(one_rank: Any) -> None:
    model = fp8_model(one_rank)
    module = model.decoder.layers[0].self_attention.linear_proj
    recorded: dict[str, torch.Tensor] = {}
    module.register_forward_hook(lambda _, inputs, output: recorded.update(x=inputs[0].detach(), y=output[0].detach()))
    module.register_full_backward_hook(lambda _, dx, dy: recorded.update(dx=dx[0], dy=dy[0]))
    rows_BL = torch.randint(5, 512, (1, 161), generator=torch.Generator().manual_seed(0))
    optimizer = Optimizer(model, TrainConfig(steps=100))
    optimizer.zero_gradients()
    from megatron_r1.model.forward_backward import forward_backward

    forward_backward(model, optimizer.chunks, [rows_BL], next_token_forward, 160)
    weight = module.weight.detach()
    x_TK, dy_TN = (recorded[key].flatten(0, -2) for key in ("x", "dy"))
    by_channel, by_token = (lambda m: through(m, TILE, E4M3, True)), (lambda m: through(m, TILE.turned(), E4M3, True))
    w_NK = through(weight, BLOCK, E4M3, True)
    for key, expected in (
        ("y", by_channel(x_TK) @ w_NK.t()),
        ("dx", by_channel(dy_TN) @ w_NK),
        ("dw", by_token(dy_TN).t() @ by_token(x_TK)),
    ):
        found = module.weight.main_grad if key == "dw" else recorded[key].flatten(0, -2)
        torch.testing.assert_close(found.float(), expected.to(torch.bfloat16).float(), rtol=1e-2, atol=1e-6, msg=key)


@pytest.mark.parametrize("recomputed", [[], ["layernorm", "mla_up_proj", "moe_act"]])
def test_the_plan_says_which_inputs_are_kept_in_bf16(one_rank: Any, recomputed: list[str]) -> None:
    plan, layer = fp8_model(one_rank, PerformanceConfig(recompute_modules=recomputed)).fp8_plan, "decoder.layers.1."
    of_layer = {name.removeprefix(layer): recipe for name, recipe in plan.quantised.items() if name.startswith(layer)}
    kept = {name for name, recipe in of_layer.items() if recipe != TRANSFORMER_ENGINE}
    expected = {"self_attention.linear_proj", "mlp.shared_experts.linear_fc1"}
    if recomputed:
        attention = {f"self_attention.linear_{which}_down_proj" for which in ("q", "kv")}
        expected |= attention | {"mlp.experts.linear_fc2"}
    assert kept == expected
    assert any(INPUT_IN_BF16 in line for line in plan.lines())
    assert any("powers of two" in line for line in plan.departures) and set(plan.high) >= {"mtp.layers.0.eh_proj"}


def test_matrices_that_do_not_multiply_are_refused(one_rank: Any) -> None:
    with pytest.raises(ConfigError, match="decoder.layers.0.mlp.linear_fc1 has 200 x 64 numbers on a rank"):
        build_model(replace(shape(), ffn_hidden_size=100), ParallelConfig(), one_rank, 0, None, FP8)


def test_the_quantised_weights_follow_the_weights(stage: Stage) -> None:
    """A reference policy swaps weights in place, for passes without an update between them."""
    reference = ReferencePolicy(stage.model)
    preference = DirectPreference(stage.model, reference, 0.1, 0.0, 0, "cpu")
    pairs = [
        TokenizedPreference(tuple(TokenizedSequence(stage.tokens(8, 30), 3) for _ in range(2)), True) for _ in range(4)
    ]
    before = preference.gaps(pairs, 2)
    for _ in range(2):  # the second quantises other weights than the reference's
        preference.learn(stage.optimizer, pairs, 1e-2, 2)
    assert preference.gaps(pairs, 2) != before
    with reference.in_place():
        assert preference.gaps(pairs, 2) == before


def test_quantised_weights_leave_the_device_with_the_weights(stage: Stage) -> None:
    rows_BL = torch.randint(5, 512, (1, 33), generator=torch.Generator().manual_seed(0))
    memory = TrainerMemory(stage.model, stage.optimizer)
    run(stage, [rows_BL], next_token_forward, 32, True)
    copies = [
        buffer
        for module in stage.model.modules()
        for copy in getattr(module, "_fp8_workspaces", {}).values()
        for buffer in copy.get_data_tensors()
        if buffer is not None
    ]
    assert len(copies) > 40
    memory.weights.offload()
    assert not any(buffer.untyped_storage().nbytes() for buffer in copies)
    memory.weights.onload()
    run(stage, [rows_BL], next_token_forward, 32, True)
