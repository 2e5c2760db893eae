"""A language model as a judge, behind an OpenAI-compatible endpoint such as SGLang's."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_r1.config.checks import at_least, one_of, within
from megatron_r1.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class JudgeConfig:
    """Whom to ask, and how often. The key is read from JUDGE_API_KEY in the environment, and from nowhere else."""

    url: str = ""
    """Of the API, up to and including its version: http://host:port/v1."""
    model: str = "default"
    """Name of the model, as the endpoint knows it."""
    mode: str = "comparison"
    """comparison (with the prompt's reference answer, in both orders) or correctness (right or not, by that answer)."""
    votes: int = 4
    """Verdicts on each answer; of a comparison half in either order."""
    temperature: float = 0.6
    """Of the judge's sampling."""
    max_tokens: int = 1024
    """Longest verdict, its analysis included."""
    analysis_characters: int = 2000
    """Longest analysis before the verdict, so that a judge which rambles still comes to one; 0 sets no limit."""
    timeout_s: float = 120.0
    """Seconds that one call may take."""
    attempts: int = 3
    """Calls for one verdict before it is given up, whether the endpoint failed or gave no verdict."""
    concurrency: int = 32
    """Calls at a time."""

    def __post_init__(self) -> None:
        one_of(self, "mode", ("comparison", "correctness"))
        within(self, 0.0, 2.0, "temperature")
        at_least(self, 0, "analysis_characters")
        at_least(self, 1, "votes", "max_tokens", "attempts", "concurrency")
        within(self, 0.1, 3600.0, "timeout_s")
        if self.mode == "comparison" and self.votes % 2:
            raise ConfigError("votes", self.votes, "must be even: as many in either order")
        if self.url and not self.url.startswith(("http://", "https://")):
            raise ConfigError("url", self.url, "must begin with http:// or https://")
