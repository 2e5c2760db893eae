"""Which answers of a rollout are learned from."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_r1.config.checks import one_of, within


@dataclass(kw_only=True, slots=True)
class FilterConfig:
    """What happens to answers and groups before they are learned from; see rl/generation/filters.py for the sources."""

    zero_std_groups: str = "keep"
    """Groups whose rewards are all equal, so that they teach nothing: keep or drop (dynamic sampling)."""
    max_resample_rounds: int = 0
    """Rounds of further prompts, at most, that take the place of dropped groups."""
    truncated: str = "keep"
    """Answers that the length limit cut off: keep, mask (count in the baseline, are not learned from) or drop."""
    duplicates: str = "keep"
    """Answers of a group that say the same, token for token: keep, or drop all but the first."""

    def __post_init__(self) -> None:
        one_of(self, "zero_std_groups", ("keep", "drop"))
        one_of(self, "truncated", ("keep", "mask", "drop"))
        one_of(self, "duplicates", ("keep", "drop"))
        within(self, 0, 100, "max_resample_rounds")
