"""A trainer's memory that leaves and comes back: the same bits, the same views, and nothing left in between."""

from __future__ import annotations

import pytest
import torch

from megatron_r1.train.offload import Offloaded

CPU = torch.device("cpu")


def test_views_of_one_storage_stay_views_of_it():
    base = torch.arange(24, dtype=torch.float32)
    matrix, tail, other_type = base[:12].view(3, 4).t(), base[20:], base.view(torch.int32)
    alone = torch.full((5,), 7, dtype=torch.bfloat16)
    expected = [tensor.clone() for tensor in (base, matrix, tail, other_type, alone)]
    moved = Offloaded(CPU, lambda: [matrix, tail, alone, base])
    moved.offload()
    assert base.untyped_storage().nbytes() == 0 == alone.untyped_storage().nbytes()
    assert moved.nbytes == 24 * 4 + 5 * 2
    moved.offload()  # is away already
    moved.onload()
    moved.onload()
    assert moved.nbytes == 0
    for tensor, before in zip((base, matrix, tail, other_type, alone), expected, strict=True):
        assert torch.equal(tensor, before)
    tail.fill_(-1)
    assert base[20:].tolist() == [-1] * 4 and matrix.untyped_storage()._cdata == base.untyped_storage()._cdata


def test_what_is_dropped_comes_back_as_zeros_and_what_stays_does_not_move():
    gradients, weights, elsewhere = torch.ones(8), torch.ones(8), torch.ones(8, device="meta")
    moved = Offloaded(CPU, lambda: [weights[:4], elsewhere], lambda: [gradients[2:]], staying=lambda: [weights])
    moved.offload()
    assert weights.tolist() == [1] * 8 and gradients.untyped_storage().nbytes() == 0
    moved.onload()
    assert gradients.tolist() == [0] * 8


@pytest.mark.parametrize(("precision", "moments"), [("fp32", "fp32"), ("bf16", "bf16")])
def test_training_continues_bitwise_after_an_offload(new_model, precision, moments):
    from dataclasses import replace

    from megatron_r1.config.train import OptimizerConfig, TrainConfig
    from megatron_r1.train.offload import TrainerMemory
    from megatron_r1.train.optimizer import Optimizer
    from megatron_r1.train.stream import next_token_forward
    from megatron_r1.train.update import update
    from tests.support.layouts import model_of

    rows_BL = torch.randint(0, 512, (4, 33), generator=torch.Generator().manual_seed(0))

    def trained(disturbed: bool) -> dict[str, torch.Tensor]:
        model = new_model(replace(model_of("tiny"), dtype=precision))
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.startswith("mtp."))  # frozen weights have storages of their own
        optimizer = Optimizer(model, TrainConfig(optimizer=OptimizerConfig(moments_dtype=moments)))
        memory = TrainerMemory(model, optimizer)
        for _ in range(2):
            if disturbed:
                leave_and_come_back(model, optimizer, memory)
            update(model, optimizer, rows_BL.split(2), next_token_forward, 1e-3, 32)
        state = {f"{name} {key}": value for name, key, value in state_of(optimizer)}
        return state | dict(model.named_parameters()) | dict(model.named_buffers())

    found, expected = trained(True), trained(False)
    assert found.keys() == expected.keys() and any("exp_avg" in name for name in found)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def state_of(optimizer):
    for number, param_state in enumerate(optimizer.param_states()):
        yield number, "weight", param_state.weight_N
        yield from ((number, key, value) for key, value in param_state.optimizer.state[param_state.weight_N].items())


def everything(model, optimizer) -> list[torch.Tensor]:
    """All that a trainer holds between steps, looked up in another way than `TrainerMemory` does."""
    found = [tensor for tensor in [*model.parameters(), *model.buffers()] if tensor.numel()]
    found += [parameter.main_grad for parameter in model.parameters() if hasattr(parameter, "main_grad")]
    for part in optimizer._parts():
        for group in part.optimizer.param_groups:
            found += group["params"]
        found += [value for state in part.optimizer.state.values() for value in state.values()]
    return [tensor for tensor in found if isinstance(tensor, torch.Tensor) and tensor.numel()]


def leave_and_come_back(model, optimizer, memory) -> None:
    tensors = everything(model, optimizer)
    before = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    shared = [tensor.untyped_storage()._cdata for tensor in tensors]
    memory.rest.offload()
    assert all(parameter.untyped_storage().nbytes() for parameter in model.parameters()), "weights are still to be sent"
    memory.weights.offload()
    assert not [tensor.shape for tensor in tensors if tensor.untyped_storage().nbytes()], "some memory was not freed"
    assert memory.weights.nbytes + memory.rest.nbytes == sum(before.values())
    memory.weights.onload()
    memory.rest.onload()
    assert [tensor.untyped_storage()._cdata for tensor in tensors] == shared
    assert all(tensor.untyped_storage().nbytes() == before[tensor.untyped_storage()._cdata] for tensor in tensors)
