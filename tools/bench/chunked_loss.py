"""Time and memory of token scores in chunks beside the same with all logits at once, forward and backward, on a CPU.

`tools/bench/chunked_loss.py [--tokens 4096] [--width 1024] [--vocab-size 129280] [--repeats 1] [--entropy]`. Beside it
stand torch's own cross-entropy over all logits, and this package's with one chunk. Seconds are of wall and of
processor, which other programs on the machine disturb less. Memory is the process's high-water mark beyond what it held
before and beyond the two gradients, which any way of computing them must return.
"""

from __future__ import annotations

import argparse
import gc
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import cross_entropy

from megatron_r1.model.lm_head import CHUNK_LOGITS, Head
from megatron_r1.model.vocab_parallel import score_tokens


class Inputs(NamedTuple):
    hidden_TD: Tensor
    weight_VD: Tensor
    targets_T: Tensor


class Measured(NamedTuple):
    seconds: float
    """The shortest of the repeats."""
    processor_seconds: float
    extra_bytes: int
    """The most of the repeats."""
    loss: float
    gradients: tuple[Tensor, Tensor]


def drawn(tokens: int, width: int, vocab_size: int) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    hidden_TD = torch.randn(tokens, width, generator=generator)
    weight_VD = torch.randn(vocab_size, width, generator=generator) / width**0.5
    return Inputs(
        hidden_TD.requires_grad_(),
        weight_VD.requires_grad_(),
        torch.randint(0, vocab_size, (tokens,), generator=generator),
    )


def in_chunks(inputs: Inputs, chunk_logits: int, entropy: float) -> Tensor:
    group = dist.group.WORLD
    assert group is not None
    head = Head(inputs.weight_VD, group)
    scores = score_tokens(inputs.hidden_TD, inputs.targets_T, head, chunk_logits=chunk_logits)
    loss = -scores.log_probs.mean()
    return loss - entropy * scores.entropy.mean() if entropy else loss


def all_at_once(inputs: Inputs, entropy: float) -> Tensor:
    """By torch's own operations on the logits of all tokens."""
    logits_TV = inputs.hidden_TD @ inputs.weight_VD.t()
    loss = cross_entropy(logits_TV, inputs.targets_T)
    if not entropy:
        return loss
    log_probs_TV = logits_TV.log_softmax(-1)
    return loss + entropy * (log_probs_TV.exp() * log_probs_TV).sum(-1).mean()


def resident(field: str) -> int:
    """Bytes of this process's memory: VmRSS now, VmHWM at most since the last reset."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def measure(loss_of: Callable[[], Tensor], inputs: Inputs, repeats: int) -> Measured:
    seconds, processor, extra, loss = [], [], [], 0.0
    for _ in range(repeats):
        inputs.hidden_TD.grad = inputs.weight_VD.grad = None
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
        before, started, used = resident("VmRSS"), time.perf_counter(), time.process_time()
        value = loss_of()
        torch.autograd.backward(value)
        seconds.append(time.perf_counter() - started)
        processor.append(time.process_time() - used)
        extra.append(resident("VmHWM") - before - inputs.hidden_TD.nbytes - inputs.weight_VD.nbytes)
        loss = float(value.detach())
    gradients = inputs.hidden_TD.grad, inputs.weight_VD.grad
    assert gradients[0] is not None and gradients[1] is not None
    return Measured(min(seconds), min(processor), max(extra), loss, (gradients[0], gradients[1]))


def against_float64(inputs: Inputs, measured: Measured, tokens: int = 256) -> tuple[float, float]:
    """Relative difference of the loss's gradients of some tokens' hidden states, and of the loss over those tokens."""
    hidden_TD = inputs.hidden_TD[:tokens].detach().double().requires_grad_()
    exact = cross_entropy(hidden_TD @ inputs.weight_VD.detach().double().t(), inputs.targets_T[:tokens])
    torch.autograd.backward(exact * tokens / len(inputs.hidden_TD))
    with torch.no_grad():
        some = Inputs(inputs.hidden_TD[:tokens], inputs.weight_VD, inputs.targets_T[:tokens])
        loss = float(in_chunks(some, CHUNK_LOGITS, 0.0))
    assert hidden_TD.grad is not None
    difference = (measured.gradients[0][:tokens].double() - hidden_TD.grad).norm() / hidden_TD.grad.norm()
    return float(difference), abs(loss - float(exact.detach())) / float(exact.detach())


def compared(given: argparse.Namespace) -> dict[str, Measured]:
    """Each way by name; the same inputs."""
    inputs, entropy = drawn(given.tokens, given.width, given.vocab_size), 0.01 * given.entropy
    ways: dict[str, Callable[[], Tensor]] = {
        "in chunks": lambda: in_chunks(inputs, given.chunk_logits, entropy),
        "one chunk": lambda: in_chunks(inputs, given.tokens * given.vocab_size, entropy),
        "all at once": lambda: all_at_once(inputs, entropy),
    }
    torch.autograd.backward(in_chunks(Inputs(*(x[:64] for x in inputs)), given.chunk_logits, entropy))
    found = {name: measure(way, inputs, given.repeats) for name, way in ways.items()}
    logits = given.tokens * given.vocab_size * 4
    print(
        f"{given.tokens} tokens, width {given.width}, vocabulary {given.vocab_size}: "
        f"fp32 logits are {logits / 2**20:.0f} MiB"
    )
    for name, one in found.items():
        other = found["all at once"]
        print(
            f"{name:12} {one.seconds:7.2f} s ({one.seconds / other.seconds:.2f}), "
            f"processor {one.processor_seconds:7.2f} s ({one.processor_seconds / other.processor_seconds:.2f}), "
            f"extra memory {one.extra_bytes / 2**20:7.0f} MiB ({one.extra_bytes / logits:.3f} of the logits), "
            f"loss {one.loss:.6f}"
        )
    if not entropy:
        gradient, loss = against_float64(inputs, found["in chunks"])
        print(f"in chunks against float64: loss {loss:.1e}, gradient of hidden states {gradient:.1e} (256 tokens)")
    return found


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, default in {"tokens": 4096, "width": 1024, "vocab_size": 129_280, "repeats": 1, "threads": 1}.items():
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
