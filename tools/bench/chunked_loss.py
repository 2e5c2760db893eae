"""Time and memory of GRPO's loss by token scores in chunks, beside all logits at once, TRL's own and Liger's.

    python tools/bench/chunked_loss.py [--tokens 4096] [--vocab-size 129280] [--width 256] [--rounds 3] [--entropy]

Every way starts from hidden states and the head, on a CPU, and ends with the gradients of both:

    in chunks         this package's, as it trains
    all at once       the logits of all tokens and `log_softmax`
    TRL from logits   `selective_log_softmax` and `entropy_from_logits`, which takes chunks of tokens
    TRL in chunks     `ChunkedLogProbFunction` as its GRPOTrainer calls it: chunks of the vocabulary, here by torch
    Liger in chunks   `LigerFusedLinearGRPOLoss`, a response at a time and its vocabulary in chunks, by torch

All but the last give each token's entropy too, which both trainers log. TRL is in the environment of the tests; Liger
is not: `pip install --target FOLDER --no-deps liger-kernel` and `PYTHONPATH=FOLDER`. A way that cannot run says why.
Memory is the process's high-water mark beyond what it held before and beyond the two gradients, which any way returns.

Shapes: T tokens, B responses of L tokens, D width, V vocabulary.
"""

from __future__ import annotations

import argparse
import gc
import re
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_r1.model.lm_head import CHUNK_LOGITS, Head
from megatron_r1.model.vocab_parallel import score_tokens
from megatron_r1.rl.objective.aggregation import BatchTotals
from megatron_r1.rl.objective.objective import Objective, ObjectiveInputs
from megatron_r1.rl.objective.policy_terms import Clip
from tools.bench.comparison import alternate, describe

CLIP = Clip(0.2, 0.2)
ENTROPY = 0.01
TRL_CHUNK = 32_768
"""Rows of the head at a time in TRL's trainers."""


class Inputs(NamedTuple):
    hidden_TD: Tensor
    weight_VD: Tensor
    targets_T: Tensor
    old_logprobs_T: Tensor
    advantages_B: Tensor


Scores = tuple[Tensor, Tensor]
"""Log-probabilities and entropies, [T]."""
Loss = Callable[[Inputs], Tensor]


class Measured(NamedTuple):
    seconds: float
    """Median of the rounds."""
    extra_bytes: int
    """The most of the rounds."""
    loss: float
    gradients: tuple[Tensor, Tensor]


def drawn(tokens: int, width: int, vocab_size: int, responses: int) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    hidden_TD = torch.randn(tokens, width, generator=generator)
    weight_VD = torch.randn(vocab_size, width, generator=generator) / width**0.5
    targets_T = torch.randint(0, vocab_size, (tokens,), generator=generator)
    inputs = Inputs(hidden_TD, weight_VD, targets_T, torch.empty(0), torch.randn(responses, generator=generator))
    with torch.no_grad():
        logprobs_T, _ = in_chunks(inputs, CHUNK_LOGITS)
    old_T = logprobs_T + 0.2 * torch.randn(tokens, generator=generator)
    return inputs._replace(
        hidden_TD=hidden_TD.requires_grad_(), weight_VD=weight_VD.requires_grad_(), old_logprobs_T=old_T
    )


def in_chunks(inputs: Inputs, chunk_logits: int) -> Scores:
    group = dist.group.WORLD
    assert group is not None
    head = Head(inputs.weight_VD, group)
    scores = score_tokens(inputs.hidden_TD, inputs.targets_T, head, chunk_logits=chunk_logits)
    return scores.log_probs, scores.entropy


def all_at_once(inputs: Inputs) -> Scores:
    log_probs_TV = (inputs.hidden_TD @ inputs.weight_VD.t()).log_softmax(-1)
    entropy_T = -(log_probs_TV.exp() * log_probs_TV).sum(-1)
    return log_probs_TV.gather(-1, inputs.targets_T[:, None])[:, 0], entropy_T


def trl_from_logits(inputs: Inputs) -> Scores:
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    logits_1TV = (inputs.hidden_TD @ inputs.weight_VD.t())[None]
    # TRL goes through the rows of [B, L, V] one by one.
    rows_BLV = logits_1TV.view(len(inputs.advantages_B), -1, logits_1TV.shape[-1])
    log_probs_BL = selective_log_softmax(rows_BLV, inputs.targets_T.view(rows_BLV.shape[:2]))
    return log_probs_BL.flatten(), entropy_from_logits(rows_BLV).flatten()


def trl_in_chunks(inputs: Inputs) -> Scores:
    from trl.kernels import ChunkedLogProbFunction

    log_probs_T, entropy_T, *_ = ChunkedLogProbFunction.apply(
        inputs.hidden_TD, inputs.weight_VD, None, inputs.targets_T, 1.0, TRL_CHUNK, None, 1.0, ("entropy",)
    )
    return log_probs_T, entropy_T


def grpo_loss(scores: Callable[[Inputs], Scores], entropy_coefficient: float, inputs: Inputs) -> Tensor:
    """The mean over all tokens."""
    shape = len(inputs.advantages_B), -1
    log_probs_BL, entropy_BL = (values_T.view(shape) for values_T in scores(inputs))
    objective = Objective(CLIP, aggregation="token_mean", entropy_coefficient=entropy_coefficient)
    mask_BL = torch.ones_like(log_probs_BL, dtype=torch.bool)
    given = ObjectiveInputs(
        log_probs_BL, inputs.old_logprobs_T.view(shape), inputs.advantages_B, mask_BL, entropy_BL=entropy_BL
    )
    loss, _ = objective.loss(given, BatchTotals(len(mask_BL), mask_BL.numel()))
    return loss


def liger(inputs: Inputs) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    # Compiled, only the arithmetic on log-probs is; the products are not.
    loss_of = LigerFusedLinearGRPOLoss(
        beta=0.0, compiled=False, use_ref_model=False, epsilon_low=CLIP.low, epsilon_high=CLIP.high, loss_type="bnpo"
    )
    shape = len(inputs.advantages_B), -1
    hidden_BLD = inputs.hidden_TD.view(*shape, inputs.hidden_TD.shape[-1])
    targets_BL, old_BL = inputs.targets_T.view(shape), inputs.old_logprobs_T.view(shape)
    loss: Tensor = loss_of(
        hidden_BLD,
        inputs.weight_VD,
        targets_BL,
        torch.ones_like(old_BL),
        inputs.advantages_B,
        old_per_token_logps=old_BL,
    )[0]
    return loss


def resident(field: str) -> int:
    """Bytes of this process's memory: VmRSS now, VmHWM at most since the last reset."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


class Measurement:
    """Runs one way and keeps what it took."""

    def __init__(self, loss_of: Loss, inputs: Inputs):
        self._loss_of, self._inputs = loss_of, inputs
        self.seconds, self.extra_bytes, self.loss = list[float](), 0, 0.0
        self.gradients = torch.empty(0), torch.empty(0)

    def __call__(self) -> float:
        inputs = self._inputs
        inputs.hidden_TD.grad = inputs.weight_VD.grad = None
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        before, started = resident("VmRSS"), time.perf_counter()
        loss = self._loss_of(inputs)
        torch.autograd.backward(loss)
        seconds = time.perf_counter() - started
        extra = resident("VmHWM") - before - inputs.hidden_TD.nbytes - inputs.weight_VD.nbytes
        self.extra_bytes, self.loss = max(self.extra_bytes, extra), float(loss.detach())
        assert inputs.hidden_TD.grad is not None and inputs.weight_VD.grad is not None
        self.gradients = inputs.hidden_TD.grad, inputs.weight_VD.grad
        return seconds


def ways(given: argparse.Namespace) -> dict[str, Loss]:
    """Each way that can run here; those that cannot are named with the reason."""
    entropy = ENTROPY * given.entropy
    scores: dict[str, Callable[[Inputs], Scores]] = {
        "in chunks": partial(in_chunks, chunk_logits=given.chunk_logits),
        "all at once": all_at_once,
        "TRL from logits": trl_from_logits,
        "TRL in chunks": trl_in_chunks,
    }
    found: dict[str, Loss] = {name: partial(grpo_loss, way, entropy) for name, way in scores.items()}
    if entropy:
        print("Liger in chunks: left out: it has no entropy bonus")
    else:
        found["Liger in chunks"] = liger
    small = drawn(16, 8, 32, 2)
    for name in list(found):
        try:
            found[name](small)
        except ImportError as error:
            print(f"{name}: left out: {error}")
            del found[name]
    return found


def against_float64(inputs: Inputs, measured: Measured) -> float:
    """Relative difference of the gradient of the first response's hidden states from float64's."""
    length = len(inputs.hidden_TD) // len(inputs.advantages_B)
    hidden_LD = inputs.hidden_TD[:length].detach().double().requires_grad_()
    some = Inputs(
        hidden_LD,
        inputs.weight_VD.detach().double(),
        inputs.targets_T[:length],
        inputs.old_logprobs_T[:length].double(),
        inputs.advantages_B[:1].double(),
    )
    torch.autograd.backward(grpo_loss(all_at_once, 0.0, some) / len(inputs.advantages_B))
    assert hidden_LD.grad is not None
    return float((measured.gradients[0][:length].double() - hidden_LD.grad).norm() / hidden_LD.grad.norm())


def compared(given: argparse.Namespace) -> dict[str, Measured]:
    """Each way by name; the same inputs."""
    inputs = drawn(given.tokens, given.width, given.vocab_size, given.responses)
    measurements = {name: Measurement(loss_of, inputs) for name, loss_of in ways(given).items()}
    seconds = alternate(measurements, given.rounds)
    logits = given.tokens * given.vocab_size * 4
    print(
        f"{given.tokens} tokens in {given.responses} responses, width {given.width}, vocabulary {given.vocab_size}, "
        f"{torch.get_num_threads()} threads: fp32 logits are {logits / 2**20:.0f} MiB"
    )
    print(describe(seconds, base="all at once"))
    found = {
        name: Measured(statistics.median(seconds[name]), one.extra_bytes, one.loss, one.gradients)
        for name, one in measurements.items()
    }
    expected = found["all at once"]
    for name, one in found.items():
        differences = [
            float((mine - theirs).norm() / theirs.norm())
            for mine, theirs in zip(one.gradients, expected.gradients, strict=True)
        ]
        print(
            f"{name:15} extra memory {one.extra_bytes / 2**20:6.0f} MiB, {one.extra_bytes / logits:.3f} of the logits; "
            f"loss {one.loss:.7f}, gradients within {max(differences):.1e} of all at once"
        )
        assert max(differences) < 1e-4, name
    if not given.entropy:
        print(f"in chunks against float64: gradient of hidden states {against_float64(inputs, found['in chunks']):.1e}")
    return found


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    sizes = {"tokens": 4096, "responses": 8, "width": 256, "vocab_size": 129_280, "rounds": 3, "threads": 2}
    for name, default in sizes.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    parser.add_argument("--chunk-logits", type=int, default=CHUNK_LOGITS)
    parser.add_argument("--entropy", action="store_true", help="with an entropy bonus")
    return parser.parse_args(arguments)


def main() -> None:
    given = parsed()
    torch.set_num_threads(given.threads)
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        compared(given)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
