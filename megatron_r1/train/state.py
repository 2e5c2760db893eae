"""The progress of a run, which is saved with every checkpoint."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """Progress of a run. Frozen: each step makes a new one."""

    step: int = 0
    """Finished steps (in reinforcement learning: rollouts)."""
    updates: int = 0
    """Optimizer updates."""
    consumed_tokens: int = 0
    """Tokens trained on."""
    data_position: int = 0
    """Sequences (or prompts) consumed from the data."""
    skipped_in_row: int = 0
    """Consecutive updates skipped for non-finite gradients."""

    def advance(self, **changes: int) -> TrainState:
        """The state after one more step with these changes."""
        return replace(self, step=self.step + 1, **changes)

    def as_dict(self) -> dict[str, int]:
        return asdict(self)
