"""A teacher in the reference policy's place: on-policy distillation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from megatron_r1.config.run import RunConfig
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.model.chunks import Model
from megatron_r1.model.scores import head_weight
from megatron_r1.model.shards import Shard
from megatron_r1.parallel.mesh import tensor_parallel_group
from megatron_r1.runs.initial_weights import InitialModel
from megatron_r1.runs.teacher import TeacherSource, find_teacher

KEY = "rl.teacher.from"


class TeacherPolicy:
    """A frozen model of any shape; the loss is the policy's KL divergence from it. Checkpoints do not contain it."""

    def __init__(self, model: Model, vocab_size: int):
        """
        Args:
            model: the bare model, frozen, divided among the ranks by the policy's process groups.
            vocab_size: rows of the policy's whole head; the teacher's may have more, which have no tokens.
        """
        self._model, self.vocab_size = model, vocab_size

    def saved(self) -> Iterator[tuple[str, Shard]]:
        return iter(())

    def after_rollout(self, rollouts: int, sync_interval: int) -> None:
        """A teacher stays as it is."""

    @contextmanager
    def in_place(self) -> Iterator[Model]:
        yield self._model

    def head(self) -> Tensor:
        """The rows of its head that this rank has of the policy's, [V, D]. Collective over tensor-parallel ranks."""
        rows_VD, group = head_weight(self._model).detach(), tensor_parallel_group()
        if rows_VD.shape[0] * group.size() == self.vocab_size:
            return rows_VD
        parts = [torch.empty_like(rows_VD) for _ in range(group.size())]
        torch.distributed.all_gather(parts, rows_VD.contiguous(), group=group)
        return torch.cat(parts)[: self.vocab_size].chunk(group.size())[group.rank()].clone()


def find_policy_teacher(config: RunConfig, tokenizer: Tokenizer) -> InitialModel | None:
    """The configured teacher; None where there is no teacher.

    Args:
        tokenizer: the policy's.

    Raises:
        ConfigError: there is no model, or it cannot teach this policy.
    """
    source, rows = TeacherSource(config.rl.teacher.from_, KEY), config.model.vocab_size
    if not source.source:
        return None
    # A sequence has a token of the prompt at the least.
    length = "rollout.max_response_tokens + 1", config.rollout.max_response_tokens + 1
    found = find_teacher(source, config, tokenizer, length)
    if found.model.vocab_size < rows:
        raise source.refusal(f"must have model.vocab_size={rows} rows in its head, but has {found.model.vocab_size}")
    return found
