"""The forward pass of sampling against the training forward pass of the same model, position by position."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_r1.config.fp8 import Fp8Config
from megatron_r1.config.load import load
from megatron_r1.config.parallel import ParallelConfig
from megatron_r1.model.build import build_model, without_multi_token_prediction
from tests.support.fp8_shape import fp8_shape
from tests.support.layouts import model_of
from tests.support.unsettle import unsettled

PROMPTS, STEPS = (5, 9, 2), 6
YARN = ("rope.factor=4", "rope.original_max_position=16", "rope.mscale=0.7")
LLAMA3 = ("rope.scaling=llama3", "rope.factor=8", "rope.original_max_position=32", "rope.beta_fast=4")
DENSE = ("model=tiny_dense", "model.attention.qkv_bias=false", "model.tied_embeddings=false")
SHAPES: dict[str, tuple[str, ...]] = {
    "yarn": tuple(f"model.{key}" for key in YARN),
    "llama3": (*DENSE, *(f"model.{key}" for key in LLAMA3)),
    "softmax scores": ("model.moe.score_function=softmax", "model.mtp.num_layers=0"),
    "no shared experts": ("model.moe.num_shared_experts=0", "model.moe.first_dense_layers=0"),
}


def decoded(model: Any, sequences: list[list[int]]) -> list[torch.Tensor]:
    """Log-probs [STEPS + 1, V] after each sequence's prompt and after each of its next tokens, all sequences at once.

    Half way the sequences are selected anew: another order, one twice.
    """
    from megatron_r1.model.decode import Cache, Decoder

    longest = max(PROMPTS)
    padding = [longest - length for length in PROMPTS]
    prompts_BL = torch.tensor(
        [[0] * count + row[:n] for count, row, n in zip(padding, sequences, PROMPTS, strict=True)]
    )
    order = [0, 1, 2]
    with torch.inference_mode():
        cache, decoder = Cache(longest + STEPS, torch.tensor(padding)), Decoder(model)
        found = [[row] for row in decoder.logits(prompts_BL, cache)]
        for step in range(STEPS):
            if step == STEPS // 2:
                cache, order = cache.select(torch.tensor([2, 0, 0, 1])), [2, 0, 0, 1]
                assert cache.sequences == 4
            next_BL = torch.tensor([[sequences[one][PROMPTS[one] + step]] for one in order])
            for one, row in zip(order, decoder.logits(next_BL, cache), strict=True):
                if len(found[one]) == step + 1:
                    found[one].append(row)
                else:
                    assert torch.allclose(found[one][-1], row, atol=1e-5)  # the second of a pair
    return [torch.stack(rows).log_softmax(-1) for rows in found]


def gaps(model: Any) -> torch.Tensor:
    """Differences between the log-probs of the two forward passes."""
    draw = torch.Generator().manual_seed(4)
    vocabulary = model.vocab_size
    sequences = [torch.randint(1, vocabulary, (length + STEPS,), generator=draw).tolist() for length in PROMPTS]
    found = []
    for length, sequence, logprobs_SV in zip(PROMPTS, sequences, decoded(model, sequences), strict=True):
        tokens_BL = torch.tensor([sequence])
        with torch.no_grad(), without_multi_token_prediction(model):
            whole_LV = model(tokens_BL, torch.arange(tokens_BL.shape[1])[None], None)[0].log_softmax(-1)
        found.append((logprobs_SV - whole_LV[length - 1 :]).abs().flatten())
    return torch.cat(found)


@pytest.mark.parametrize(
    "shape", ["tiny", "tiny_dense", "direct_query", "grouped_bias", "grouped_norm", "grouped_experts", *SHAPES]
)
def test_it_gives_the_log_probs_of_the_training_forward_pass(new_model, shape):
    config = load("pretrain", ["model.init_std=0.08", *SHAPES[shape]]).model if shape in SHAPES else model_of(shape)
    assert gaps(unsettled(new_model(config))).max() < 1e-5


def test_in_fp8_it_quantises_what_the_training_forward_pass_quantises(one_rank):
    """A sum in another order may round to another number of FP8 here and there, never mostly."""
    model = unsettled(build_model(fp8_shape(), ParallelConfig(), one_rank, 0, precision=Fp8Config(enabled=True)))
    assert gaps(model).median() < 1e-5
