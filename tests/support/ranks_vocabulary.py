"""Starts four gloo ranks: scores and most likely tokens by heads shared out over 1, 2 and 4 ranks, against float64 over
the whole vocabulary.

ranks_vocabulary.py FOLDER: each rank writes FOLDER/rank-N.json: of `scores` and of `top tokens`, case -> quantity ->
relative difference. The ranks are forked once torch is imported, which takes longer than all that they do.
"""

from __future__ import annotations

import json
import multiprocessing
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_r1.model.lm_head import Head
from megatron_r1.model.vocab_parallel import ReferenceHidden, TokenScores, score_tokens
from megatron_r1.model.vocab_parallel_topk import topk_logprobs

RANKS = 4
WIDTH, OTHER_WIDTH, ROWS, TOKENS = 24, 16, 48, (3, 7)
VOCAB_SIZES = {"whole": None, "padded": 43, "ranks without words": 10}
TARGETS = {"one target": (), "four targets": (4,)}
MANY = 20
"""Most likely tokens: more than the rows of one of four ranks."""


def exact_scores(
    hidden: Tensor, weight: Tensor, targets: Tensor, other: ReferenceHidden, temperature: float
) -> TokenScores:
    """In float64, with the logits of all tokens."""
    log_p = (hidden @ weight.t() / temperature).log_softmax(-1)
    log_q = (other.hidden_TD.double() @ other.weight_VD.double().t() / temperature).log_softmax(-1)
    single = targets.dim() == 2
    chosen = log_p.gather(-1, targets[..., None] if single else targets)
    probs = log_p.exp()
    return TokenScores(
        chosen[..., 0] if single else chosen, -(probs * log_p).sum(-1), (probs * (log_p - log_q)).sum(-1)
    )


def difference(found: Tensor, exact: Tensor) -> float:
    return (
        float((found.double() - exact).norm() / exact.norm()) if exact.numel() and exact.any() else float(found.any())
    )


def compare(
    group: dist.ProcessGroup, vocab_size: int | None, more: tuple[int, ...], kind: torch.dtype
) -> dict[str, float]:
    """Relative differences of values, and of the gradients of their weighted sum."""
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    generator = torch.Generator().manual_seed(7)
    hidden, other_hidden = (torch.randn(*TOKENS, width, generator=generator) for width in (WIDTH, OTHER_WIDTH))
    # Logits of a deviation of 1.4: of larger ones, fp32 itself rounds the probabilities off by more than is allowed.
    weight, other_weight = (
        torch.randn(ROWS, width, generator=generator) / width**0.5 for width in (WIDTH, OTHER_WIDTH)
    )
    count = vocab_size or ROWS
    targets = torch.randint(0, count, (*TOKENS, *more), generator=generator)
    exact = [hidden.double().requires_grad_(), weight.double().requires_grad_()]
    wanted = exact_scores(exact[0], exact[1][:count], targets, ReferenceHidden(other_hidden, other_weight[:count]), 0.7)
    mine = [hidden.to(kind).requires_grad_(), weight.chunk(ranks)[rank].to(kind).requires_grad_()]
    found = score_tokens(
        mine[0],
        targets,
        Head(mine[1], group, vocab_size),
        temperature=0.7,
        reference=ReferenceHidden(other_hidden.to(kind), other_weight.chunk(ranks)[rank].to(kind)),
        chunk_logits=5 * ROWS // ranks,
    )
    weights = [torch.randn(values.shape, generator=generator) for values in found]
    torch.autograd.backward(found, [w.to(kind) for w in weights])
    torch.autograd.backward(wanted, [w.double() for w in weights])
    dist.all_reduce(mine[0].grad, group=group)
    pairs = dict(zip(TokenScores._fields, zip(found, wanted, strict=True), strict=True))
    pairs |= {
        "hidden gradient": (mine[0].grad, exact[0].grad),
        "head gradient": (mine[1].grad, exact[1].grad.chunk(ranks)[rank]),
    }
    return {name: difference(x.detach(), y.detach()) for name, (x, y) in pairs.items()}


def compare_top(
    group: dist.ProcessGroup, vocab_size: int | None, k: int, ties: bool, kind: torch.dtype
) -> dict[str, float]:
    """How many of the K most likely tokens differ from those of a stable sort, and the largest error of probabilities.

    With `ties` logits are whole numbers, so that many are equal in any precision.
    """
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    generator = torch.Generator().manual_seed(11)
    if ties:
        hidden, weight = (
            torch.randint(-1, 2, shape, generator=generator).float() for shape in ((*TOKENS, WIDTH), (ROWS, WIDTH))
        )
    else:
        hidden = torch.randn(*TOKENS, WIDTH, generator=generator)
        weight = torch.randn(ROWS, WIDTH, generator=generator) / WIDTH**0.5
    exact = (hidden.double() @ weight[: vocab_size or ROWS].double().t() / 0.7).log_softmax(-1)
    values, ids = (x[..., :k] for x in exact.sort(dim=-1, descending=True, stable=True))
    assert torch.equal(values, exact.topk(k).values) and (values.diff() == 0).any() == ties
    head = Head(weight.chunk(ranks)[rank].to(kind), group, vocab_size)
    found = topk_logprobs(hidden.to(kind), head, k, temperature=0.7, chunk_logits=5 * ROWS // ranks)
    assert found.log_probs.dtype == kind
    return {"ids": float((found.ids != ids).sum()), "log-probs": difference(found.log_probs, values)}


def one_rank(rank: int, folder: Path) -> None:
    signal.alarm(100)  # whatever happens to the others, no rank waits for ever
    store = dist.FileStore(str(folder / "store"), RANKS)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    found: dict[str, dict[str, dict[str, float]]] = {"scores": {}, "top words": {}}
    for ranks in (1, 2, 4):
        group, _ = dist.new_subgroups(ranks)
        for name, vocab_size in VOCAB_SIZES.items():
            for kind in (torch.float32, torch.float64):
                precision = str(kind).removeprefix("torch.")
                for targets, more in TARGETS.items():
                    case = f"TP{ranks}, {name}, {targets}, {precision}"
                    found["scores"][case] = compare(group, vocab_size, more, kind)
                for k in (3, min(MANY, vocab_size or ROWS)):
                    for ties in (False, True):
                        case = f"TP{ranks}, {name}, {k} words{', ties' * ties}, {precision}"
                        found["top words"][case] = compare_top(group, vocab_size, k, ties, kind)
    dist.destroy_process_group()
    (folder / f"rank-{rank}.json").write_text(json.dumps(found))


def main(folder: Path) -> None:
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=one_rank, args=(rank, folder)) for rank in range(RANKS)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    sys.exit(any(process.exitcode for process in ranks))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
