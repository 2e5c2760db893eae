"""Bytes of one rank by what they are for, and what a GPU's process takes beside its tensors."""

from __future__ import annotations

from dataclasses import dataclass, field

MIB, GB = 2**20, 10**9
CUDA_CONTEXT = 1.5e9
"""Bytes of CUDA's context, kernels, cuBLAS and NCCL of a process: unverified, of what peers report, 1 to 2 GB."""
FRAGMENTATION = 0.04
"""Share of the other bytes that the allocator cannot use: 3 to 7 % on B200 (tests/memory/test_published_peaks.py)."""


@dataclass(slots=True)
class MemoryParts:
    """Bytes of one rank at the moment of its largest need, by what they are for."""

    parts: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    def add(self, name: str, amount: float) -> None:
        """Add bytes under a name; none leave no part."""
        if amount:
            self.parts[name] = self.parts.get(name, 0.0) + amount

    def of(self, *names: str) -> float:
        """Bytes of some parts, whichever there are."""
        return sum(self.parts.get(name, 0.0) for name in names)

    def copy(self) -> MemoryParts:
        return MemoryParts({**self.parts})

    def add_process(self) -> None:
        """Add what a process on a GPU takes beside its tensors, and what its allocator cannot use."""
        self.add("CUDA and NCCL", CUDA_CONTEXT)
        self.add("fragmentation", FRAGMENTATION * self.total)

    def text(self) -> str:
        """The parts in gigabytes, largest first."""
        ordered = sorted(self.parts.items(), key=lambda part: -part[1])
        return ", ".join(f"{name} {amount / GB:.3g}" for name, amount in ordered)
