"""Parameters are those of the released models, activations those of the schedules, checkpoints as large as written."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_r1.config.load import load
from megatron_r1.config.run import RunConfig
from megatron_r1.memory.chunks import PipelineRanks, chunks_of_ranks, parameters_of_rank
from megatron_r1.memory.parameters import mtp_layer, of_model
from megatron_r1.memory.parts import MemoryParts
from megatron_r1.memory.passes import passes_at_peak
from megatron_r1.memory.storage import checkpoint_bytes
from megatron_r1.memory.trainer import Pass, job_memory
from tests.support.fork_server import run_forked_to_the_end


def predicted(config: RunConfig, ranks: int, gpu: bool = False) -> list[MemoryParts]:
    degrees, train = config.parallel, config.train
    share = train.global_batch_size * degrees.tensor * degrees.pipeline * degrees.context // ranks
    tokens = train.micro_batch_size * train.sequence_length // degrees.context
    return job_memory(config, "pretrain", ranks, Pass(tokens, share // train.micro_batch_size), gpu)


@pytest.mark.parametrize("changed", [(), ("train.ema_decay=0.9", "train.optimizer.moments_dtype=bf16")])
def test_a_checkpoint_has_as_many_bytes_as_are_predicted(changed: tuple[str, ...], tmp_path: Path) -> None:
    overrides = ["platform=cpu", "track=off", "train.steps=1", "train.schedule.warmup_steps=0", *changed]
    overrides += ["data.num_documents=300", "threads=1", f"root={tmp_path}"]
    run_forked_to_the_end("megatron_r1", "pretrain", *overrides)
    (step,) = (tmp_path / "pretrain/checkpoints").glob("step-*")
    tensors = sum(path.stat().st_size for path in step.glob("*.safetensors") if not path.name.startswith("random"))
    assert checkpoint_bytes(load("pretrain", overrides), "pretrain") == pytest.approx(tensors, rel=0.02)


@pytest.mark.parametrize(
    ("model", "main", "mtp"), [("v3_671b", 671_026_404_352, 11_610_067_968), ("qwen2_5_0_5b", 494_032_768, 0)]
)
def test_parameters_are_those_of_the_released_model(model: str, main: int, mtp: int) -> None:
    """Without the routers' balancing biases, which are buffers."""
    config = load("pretrain", [f"model={model}", "train.sequence_length=128"]).model
    layers = mtp_layer(config).total * config.mtp.num_layers
    assert (of_model(config).total - layers, layers) == (main, mtp)


INTERLEAVED = "model.num_layers=12 parallel.pipeline=2 parallel.virtual_pipeline=3"
"""Each rank has two chunks that hold the same."""


@pytest.mark.parametrize("layout", ["", "parallel.tensor=2", "parallel.expert=4", "parallel.pipeline=4", INTERLEAVED])
def test_ranks_hold_the_whole_model_between_them(layout: str) -> None:
    config = load("pretrain", f"model=tiny {layout}".split())
    degrees = config.parallel
    held = [parameters_of_rank(chunks, config.model) for chunks in chunks_of_ranks(config.model, degrees)]
    copies = config.model.vocab_size * config.model.hidden_size * (degrees.pipeline > 1)  # of multi-token layers
    assert sum(one.total for one in held) == of_model(config.model).total + copies
    assert sum(one.experts_of_rank(degrees) for one in held) * degrees.expert == of_model(config.model).experts


def test_ranks_train_the_whole_model_but_what_is_frozen() -> None:
    config = load("pretrain", f"model=tiny {INTERLEAVED} routing.train_weights=false".split())
    model, ranks = config.model, PipelineRanks(config, "grpo")
    frozen = mtp_layer(model).total * model.mtp.num_layers
    frozen += model.hidden_size * model.moe.num_experts * (model.num_layers - model.moe.first_dense_layers)
    assert frozen and sum(one.total for one in ranks.held) - sum(one.total for one in ranks.trained) == frozen


NVIDIA = (
    "model=v3_671b train=pretrain_v3 train.global_batch_size=16384 train.schedule.batch_ramp.tokens=0 "
    "parallel.tensor=2 parallel.pipeline=8 parallel.virtual_pipeline=4 parallel.expert=64 "
    "parallel.pipeline_layout='Et|(tt|)*30mL'"
)
"""NVIDIA's layout of DeepSeek-V3 on 1,024 H100 (Megatron-Bridge, DEEPSEEK_V3_PRETRAIN_CONFIG_H100), in BF16."""


@pytest.mark.parametrize(("recompute", "fits"), [("[mla_up_proj,mlp]", True), ("[]", False)])
def test_v3_on_nvidias_h100_layout_fits_80_gb_with_its_recomputation_alone(recompute: str, fits: bool) -> None:
    config = load("pretrain", [*NVIDIA.split(), f"performance.recompute_modules={recompute}"])
    stages = predicted(config, 1024, gpu=True)
    worst = max(stages, key=lambda stage: stage.total)
    print(worst.text())
    assert len(stages) == 8 and (worst.total < 80e9) is fits
    assert worst.total < 100e9 and {"weights", "gradients", "optimizer", "activations"} <= worst.parts.keys()


def test_passes_in_flight_are_those_of_megatron_cores_schedules() -> None:
    plain = load("pretrain", ["model=tiny", "parallel.pipeline=4"]).parallel
    assert [passes_at_peak(rank, plain, 8, [1.0]) for rank in range(4)] == [(4,), (3,), (2,), (1,)]
    assert passes_at_peak(0, plain, 2, [1.0]) == (2,)
    interleaved = load("pretrain", ["model=tiny", "parallel.pipeline=2", "parallel.virtual_pipeline=2"]).parallel
    # Warm-up of rank 0: 2 passes for the later rank, 2 of the first chunk's group, and one: three of the first chunk.
    assert [passes_at_peak(rank, interleaved, 8, [1.0, 1.0]) for rank in range(2)] == [(3, 2), (2, 1)]
    assert passes_at_peak(0, interleaved, 8, [1.0, 1.0], overlapped=True) == (4, 2)  # one more in pairs that overlap
    assert passes_at_peak(0, interleaved, 8, [3.0, 1.0]) == (4, 1)  # later, where the first chunk keeps most
