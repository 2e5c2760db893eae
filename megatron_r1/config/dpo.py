"""Direct preference optimization: which pairs of answers are learned from, and how strongly."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_r1.config.checks import at_least, check_files, one_of, within
from megatron_r1.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class DpoConfig:
    """Learning from pairs of answers without a reward model (Rafailov et al. 2023, equation 7)."""

    beta: float = 0.1
    """How strongly the policy is held to the reference, which is the model at the start."""
    label_smoothing: float = 0.0
    """Chance that a pair's label is wrong; 0 trusts every label."""
    source: str = "assistant"
    """Where pairs come from: assistant (generated, see data.source=assistant) or file."""
    train_file: str = ""
    """JSONL of source=file: prompt, chosen, rejected."""
    eval_file: str = ""
    """The same, of what is measured and never learned; where source is file."""
    num_pairs: int = 16_000
    """Pairs to generate; where source is assistant."""
    epochs: int = 1
    """Times that every pair is learned; train.steps may end the run before."""
    eval_examples: int = 256
    """Pairs that are measured; where source is assistant."""
    eval_interval: int = 100
    """Steps between measurements; there is one after the last step too."""

    def __post_init__(self) -> None:
        within(self, 1e-6, 1e6, "beta")
        if not 0 <= self.label_smoothing < 0.5:
            allowed = "must be at least 0 and below 0.5, where labels would say nothing"
            raise ConfigError("label_smoothing", self.label_smoothing, allowed)
        one_of(self, "source", ("assistant", "file"))
        at_least(self, 1, "num_pairs", "epochs", "eval_examples", "eval_interval")
        check_files(self)
