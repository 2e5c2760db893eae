"""Direct preference optimization: its preference pairs and its loss."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_r1.config.checks import at_least, check_files, one_of, within
from megatron_r1.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class DpoConfig:
    """Training on preference pairs without a reward model (Rafailov et al. 2023, equation 7)."""

    beta: float = 0.1
    """Strength of the penalty for leaving the reference policy, which is the model at the start."""
    label_smoothing: float = 0.0
    """Assumed probability that the labels of a pair are swapped; 0 trusts every label."""
    source: str = "assistant"
    """Source of the pairs: assistant (generated, see data.source=assistant) or file."""
    train_file: str = ""
    """File of training pairs with the fields prompt, chosen and rejected (.jsonl, .json, .parquet, .arrow, .csv; JSON
    also gzipped), or the folder of a Hugging Face dataset; where source is file."""
    eval_file: str = ""
    """File or folder of validation pairs with the same fields; where source is file."""
    train_split: str = "train"
    """Split to read from a folder of training pairs."""
    eval_split: str = "test"
    """Split to read from a folder of validation pairs."""
    subset: str = ""
    """Configuration to read from a folder that has several; empty takes the one that its README calls default."""
    num_pairs: int = 16_000
    """Pairs to generate; where source is assistant."""
    epochs: int = 1
    """Passes over the training pairs; train.steps may end the run before."""
    eval_examples: int = 256
    """Validation pairs; where source is assistant."""
    eval_interval: int = 100
    """Steps between evaluations; the last step is always followed by one."""

    def __post_init__(self) -> None:
        within(self, 1e-6, 1e6, "beta")
        if not 0 <= self.label_smoothing < 0.5:
            allowed = "must be at least 0 and below 0.5: at 0.5 labels carry no information"
            raise ConfigError("label_smoothing", self.label_smoothing, allowed)
        one_of(self, "source", ("assistant", "file"))
        at_least(self, 1, "num_pairs", "epochs", "eval_examples", "eval_interval")
        check_files(self)
