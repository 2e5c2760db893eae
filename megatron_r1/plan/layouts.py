"""All layouts that a job may have on a number of GPUs, without those that its configuration's rules refuse."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, cast

from megatron_r1.config.cross_checks import check_batch, check_degrees, check_division, check_sequences
from megatron_r1.config.hardware import Gpu
from megatron_r1.config.keys import reads
from megatron_r1.config.model import GroupedAttentionConfig
from megatron_r1.config.parallel import ParallelConfig
from megatron_r1.config.run import RunConfig
from megatron_r1.errors import ConfigError

POWERS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
VIRTUAL = (1, 2, 3, 4, 6, 8, 12)
LONG = 8192
"""Tokens of a sequence from which on ranks may share it."""
RECOMPUTED = (
    (),
    ("moe_act",),
    ("mla_up_proj",),
    ("layernorm", "moe_act"),
    ("layernorm", "mla_up_proj", "moe_act"),
    ("mla_up_proj", "mlp"),
    ("layernorm", "mla_up_proj", "mlp", "moe_act", "shared_experts"),
    ("core_attn", "layernorm", "mla_up_proj", "mlp", "moe_act", "shared_experts"),
    ("core_attn", "layernorm", "mla_up_proj", "mlp", "moe"),
)
"""Sets of modules that are computed again, from the cheapest to the one that saves most."""
RECOMPUTED_GROUPED = ((), ("moe_act",), ("layernorm", "moe_act"), ("layernorm", "mlp"), ("layernorm", "mlp", "moe"),
                      ("core_attn", "layernorm", "mlp", "moe"))  # fmt: skip
"""The same without latent attention."""


@dataclass(frozen=True, slots=True)
class Fixed:
    """Keys that the command line itself sets: they are not searched."""

    keys: frozenset[str] = frozenset()

    def choices[T](self, key: str, value: T, options: Sequence[T]) -> Sequence[T]:
        """The one value of a key that is set, or all options."""
        return (value,) if key in self.keys or any(key.startswith(f"{one}.") for one in self.keys) else options


def layouts(config: RunConfig, verb: str, gpu: Gpu, gpus: int, fixed: Fixed) -> Iterator[RunConfig]:
    """Configurations of all legal layouts on this many GPUs, without recomputation.

    The degrees are powers of two, as those of nodes and experts are; a degree that the command line sets is kept.
    """
    for degrees in _degrees(config, verb, gpu, gpus, fixed):
        data_parallel = gpus // (degrees.tensor * degrees.pipeline * degrees.context)
        for size in _micro_batches(config, verb, data_parallel, fixed):
            train = config.train if size is None else replace(config.train, micro_batch_size=size)
            found = replace(config, parallel=degrees, train=train)
            if size is None or _fits_batch(found, gpus):
                yield from _overlapping(found, verb, fixed)


def recomputations(config: RunConfig, fixed: Fixed) -> Iterator[RunConfig]:
    """A layout with each set of recomputed modules, the cheapest first."""
    grouped = isinstance(config.model.attention, GroupedAttentionConfig)
    options = [list(names) for names in (RECOMPUTED_GROUPED if grouped else RECOMPUTED)]
    if not config.model.moe.num_experts:
        options = [names for names in options if not {"moe", "moe_act", "shared_experts"} & set(names)]
    for names in fixed.choices("performance.recompute_modules", list(config.performance.recompute_modules), options):
        overlaps = config.performance.overlap_moe_expert_parallel_comm
        if not (overlaps and "moe" in names):
            yield replace(config, performance=replace(config.performance, recompute_modules=names))


def _degrees(config: RunConfig, verb: str, gpu: Gpu, gpus: int, fixed: Fixed) -> Iterator[ParallelConfig]:
    model, given = config.model, config.parallel
    length = config.train.sequence_length if reads(verb, "train.sequence_length") else model.max_sequence_length
    interleaves = verb in ("pretrain", "sft") or "parallel.virtual_pipeline" in fixed.keys
    divides = verb == "pretrain" and length >= LONG
    powers = [power for power in POWERS if power <= gpus]
    for tensor in fixed.choices("parallel.tensor", given.tensor, [one for one in powers if one <= gpu.per_node]):
        for pipeline in fixed.choices("parallel.pipeline", given.pipeline, powers):
            virtual = VIRTUAL if interleaves and pipeline > 1 else (1,)
            for stages in fixed.choices("parallel.virtual_pipeline", given.virtual_pipeline, virtual):
                for expert, expert_tensor in _expert_degrees(config, tensor, powers, fixed):
                    for context in fixed.choices("parallel.context", given.context, powers[:5] if divides else (1,)):
                        found = _legal(config, gpus, length, tensor=tensor, pipeline=pipeline, expert=expert,
                                       expert_tensor=expert_tensor, virtual_pipeline=stages,
                                       context=context)  # fmt: skip
                        if found:
                            yield found


def _expert_degrees(config: RunConfig, tensor: int, powers: Sequence[int], fixed: Fixed) -> Iterator[tuple[int, int]]:
    """Ranks that share the experts, and ranks that share each expert: at most as many as share other matrices.

    The second only where more ranks cannot share the experts: as many of the first hold the same, send no token twice
    and multiply wider matrices. Of 1,316 pairs of layouts that differ in this alone, all but 11 are faster so.
    """
    given, number = config.parallel, config.model.moe.num_experts
    experts = [power for power in powers if power <= max(1, number)]
    tried = fixed.choices("parallel.expert", given.expert, experts)
    for expert in tried:
        more = tried is experts and number % (2 * expert) == 0
        tensors = [1] if more else [power for power in powers if power <= tensor]
        for expert_tensor in fixed.choices("parallel.expert_tensor", given.expert_tensor, tensors):
            yield expert, expert_tensor


def _legal(config: RunConfig, gpus: int, length: int, **degrees: int) -> ParallelConfig | None:
    """These degrees, or None where a rule of the configuration refuses them."""
    if degrees["tensor"] * degrees["pipeline"] * degrees["context"] > gpus:
        return None
    try:
        found = replace(config.parallel, **cast(dict[str, Any], degrees))
        check_degrees(found, gpus)
        check_division(found, config.model)
        check_sequences(found, length)
    except ConfigError:
        return None
    return found


def _micro_batches(config: RunConfig, verb: str, data_parallel: int, fixed: Fixed) -> Sequence[int | None]:
    """Sizes of a micro-batch to try; None where the verb does not read them."""
    if not reads(verb, "train.micro_batch_size"):
        return (None,)
    share = config.train.global_batch_size // data_parallel
    tokens = config.train.sequence_length
    options = [size for size in (1, 2, 4, 8, 16, 32) if size <= share and (size == 1 or size * tokens <= 65536)]
    return fixed.choices("train.micro_batch_size", config.train.micro_batch_size, options)


def _fits_batch(config: RunConfig, gpus: int) -> bool:
    try:
        check_batch(config, gpus)
    except ConfigError:
        return False
    return True


def _overlapping(config: RunConfig, verb: str, fixed: Fixed) -> Iterator[RunConfig]:
    """With the fastest dispatcher, and with the experts' exchange behind computation where that is possible."""
    degrees, performance = config.parallel, config.performance
    shared = degrees.expert * degrees.expert_tensor > 1
    dispatcher = fixed.choices(
        "performance.moe_token_dispatcher_type", performance.moe_token_dispatcher_type,
        ["deepep" if shared else "alltoall"],
    )[0]  # fmt: skip
    changed = replace(performance, moe_token_dispatcher_type=dispatcher, overlap_grad_reduce=True)
    possible = (
        verb == "pretrain"
        and degrees.expert > 1
        and config.model.dtype == "bf16"
        and config.model.mtp.num_layers <= 1
        and (degrees.virtual_pipeline > 1 or degrees.pipeline == 1)
    )
    for overlap in fixed.choices(
        "performance.overlap_moe_expert_parallel_comm", performance.overlap_moe_expert_parallel_comm,
        (False, True) if possible else (False,),
    ):  # fmt: skip
        try:
            yield replace(config, performance=replace(changed, overlap_moe_expert_parallel_comm=overlap))
        except ConfigError:
            continue


def changed_keys(config: RunConfig, given: RunConfig) -> list[str]:
    """Overrides that make `given` the configuration of a layout."""
    found = []
    for section in ("parallel", "performance"):
        new, old = getattr(config, section), getattr(given, section)
        for item in fields(new):
            value = getattr(new, item.name)
            if value != getattr(old, item.name):
                found.append(f"{section}.{item.name}={_spelt(value)}")
    if config.train.micro_batch_size != given.train.micro_batch_size:
        found.append(f"train.micro_batch_size={config.train.micro_batch_size}")
    return found


def _spelt(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f"[{','.join(map(str, value))}]" if isinstance(value, list) else str(value)
