"""What a rank reads to restore an optimizer: its share, a parameter at a time."""

from __future__ import annotations

from dataclasses import replace

import torch

from megatron_r1.config.train import TrainConfig
from tests.support.layouts import model_of
from tests.support.live_bytes import LiveBytes


def test_a_rank_reads_what_it_stores_one_parameter_at_a_time(new_model):
    from megatron_r1.train.optimizer import MOMENTS, Optimizer
    from megatron_r1.train.optimizer_state import OptimizerState

    config = model_of("tiny")
    config.dtype = "bf16"
    model = new_model(config)
    optimizer = Optimizer(model, TrainConfig())
    state = OptimizerState(model, optimizer)
    # As on the first of two data-parallel ranks: every second parameter's state is with the other.
    elsewhere = list(state._locations)[::2]
    for key in elsewhere:
        state._locations[key] = replace(state._locations[key], param_state=None)
    stored = {id(p): p for p in model.parameters() if id(p) in state._locations and id(p) not in elsewhere}
    read: dict[str, int] = {}

    def number(kind, shard):
        read[kind] = read.get(kind, 0) + shard.tensor.numel()
        return torch.full_like(shard.tensor, 0.5)

    masters = [each.weight_N for each in optimizer.param_states()]
    with LiveBytes([*model.parameters(), *model.buffers(), *masters]) as live:
        state.load(number, updates=3)
    kept = sum(parameter.numel() for parameter in stored.values())
    assert read == dict.fromkeys(("master", *MOMENTS), kept)
    largest = 4 * max(parameter.numel() for parameter in stored.values())
    # Beside the moments, which are new: one parameter's room and what is read into it.
    assert live.most <= 2 * 4 * kept + 3 * largest
    (first, *_) = (each for each in optimizer.param_states() if id(each.parameter) in stored)
    assert first.optimizer.state[first.weight_N][MOMENTS[0]].unique().tolist() == [0.5]
