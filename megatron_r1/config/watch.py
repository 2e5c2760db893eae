"""Deadlines of the phases of a training run, and what it does about spikes."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_r1.config.checks import at_least
from megatron_r1.errors import ConfigError

SHORTEST_S = 1.0


@dataclass(kw_only=True, slots=True)
class WatchConfig:
    """Deadlines: when one has passed, every rank writes its stacks and the run ends with exit code 89, which a job
    restarts. A deadline is for one phase at a time, and begins anew with every update of a step; time in which a rank
    waits for others outside of collective operations does not count."""

    start_deadline_s: float = 3600.0
    """Seconds for each part of the start: reading weights or a checkpoint, starting servers; 0 is no deadline."""
    rollout_deadline_s: float = 14400.0
    """Seconds for a rollout, and for scoring it; 0 is no deadline."""
    step_deadline_s: float = 3600.0
    """Seconds for each other part of a step: an update, all forward passes before it, a weight sync; 0 is no
    deadline."""
    evaluation_deadline_s: float = 7200.0
    """Seconds for an evaluation during training; 0 is no deadline."""
    save_deadline_s: float = 3600.0
    """Seconds for a save; 0 is no deadline."""
    heartbeat_deadline_s: float = 600.0
    """Seconds without a sign of life after which a rank, or its machine, counts as lost; 0 is no deadline."""
    spike_sigmas: float = 6.0
    """Standard deviations above the running median of 128 steps from which a loss or gradient norm is reported as a
    spike; 0 reports none."""
    max_rewinds: int = 0
    """How often a run may go back to its newest checkpoint before a spike, to skip the data of the spike from then on.
    It ends with exit code 85, after which the same command, as a job that restarts, goes back. 0 never does."""
    rewind_after_spikes: int = 3
    """Consecutive steps with a spike after which the run goes back. A single high gradient is clipped."""
    rewind_margin_steps: int = 0
    """Steps before the spike that are undone too, and whose data is skipped."""

    def __post_init__(self) -> None:
        at_least(self, 0, *self.__slots__)
        at_least(self, 1, "rewind_after_spikes")
        if self.max_rewinds and not self.spike_sigmas:
            raise ConfigError("max_rewinds", self.max_rewinds, "needs spike_sigmas above 0, by which spikes are found")
        for name in (name for name in self.__slots__ if name.endswith("_deadline_s")):
            if 0 < (value := getattr(self, name)) < SHORTEST_S:
                raise ConfigError(name, value, f"must be 0, for no deadline, or at least {SHORTEST_S:.0f} s")
