"""Which answers of a rollout are learned from."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_r1.config.checks import one_of, within


@dataclass(kw_only=True, slots=True)
class FilterConfig:
    """What happens to answers and groups before they are learned from; see rl/generation/filters.py for the sources."""

    equal_groups: str = "keep"
    """Groups whose rewards are all equal, so that they teach nothing: keep or drop (dynamic sampling)."""
    extra_rounds: int = 0
    """Rounds of further prompts, at most, that take the place of dropped groups."""
    truncated: str = "keep"
    """Answers that the length limit cut off: keep, mask (count in the baseline, are not learned from) or drop."""
    repeats: str = "keep"
    """Answers of a group that say the same, token for token: keep, or drop all but the first."""

    def __post_init__(self) -> None:
        one_of(self, "equal_groups", ("keep", "drop"))
        one_of(self, "truncated", ("keep", "mask", "drop"))
        one_of(self, "repeats", ("keep", "drop"))
        within(self, 0, 100, "extra_rounds")
