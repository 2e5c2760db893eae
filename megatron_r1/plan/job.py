"""A job whose memory and time are planned: configuration, machine, and what the software stack does."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_r1.config.hardware import Gpu
from megatron_r1.config.run import RunConfig


@dataclass(frozen=True, slots=True)
class Stack:
    """What a software stack does, beside what the configuration says."""

    name: str = "megatron_r1"
    older: bool = False
    """Whether it is without the fused kernels of 2026 (constants.older)."""
    cuda_graphs: float = 0.0
    """Share of the kernels that CUDA graphs launch."""
    fp8_dispatch: bool = False
    """Whether tokens go to experts in FP8."""
    fp8_attention: bool = False
    """Whether attention multiplies in FP8 where linear layers do."""
    schedule: str = "1F1B"
    """1F1B (interleaved where parallel.virtual_pipeline is above 1) or DualPipe."""
    overlapped_share: float = 0.34
    """Share of the exchange's seconds by which overlapping it with computation shortens a step. megatron-core: 3.7 of
    10.8 s of Qwen3-30B-A3B on 16 H100 (Megatron-Bridge, skills/nemo-mbridge-perf-expert-parallel-overlap), in which the
    slower computation is counted."""
    dispatch_share: float = 0.0
    """Share of the multiprocessors that the exchange takes from computation, beyond what `overlapped_share` counts."""
    fp8_share: float = 0.0
    """Share of the peak that products in FP8 reach where a profile of this software shows it; 0: constants.matrix."""
    gradient_bytes: int = 4
    """Bytes of a gradient to which micro-batches add, and that ranks sum."""


@dataclass(frozen=True, slots=True)
class TrainingJob:
    """Supervised training: a step is one optimizer update."""

    config: RunConfig
    gpu: Gpu
    ranks: int
    imbalance: float = 1.0
    """Tokens of the busiest rank's experts over the mean: 1 where routing is forced to be even."""
    stack: Stack = Stack()
    attended: float = 1.0
    """Share of a sequence that a token's own document has: below 1 where several lie end to end in it."""

    @property
    def data_parallel(self) -> int:
        degrees = self.config.parallel
        return max(1, self.ranks // (degrees.tensor * degrees.pipeline * degrees.context))

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a step on one rank."""
        train = self.config.train
        return max(1, train.global_batch_size // (self.data_parallel * train.micro_batch_size))

    @property
    def tokens(self) -> float:
        """Tokens of a micro-batch on one rank, before tensor-parallel ranks share them."""
        train = self.config.train
        return train.micro_batch_size * train.sequence_length / self.config.parallel.context
