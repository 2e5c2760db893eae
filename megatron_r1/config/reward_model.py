"""Training of reward models: examples, scored part, critiques."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_r1.config.checks import at_least, check_files, one_of


@dataclass(kw_only=True, slots=True)
class RewardModelConfig:
    """A scalar head on a language model; DeepSeek-R1 report (v2), section 3.1."""

    objective: str = "pairwise"
    """pairwise (preference pairs, Bradley-Terry loss: helpfulness) or pointwise (safe or unsafe, cross-entropy)."""
    scored_part: str = "summary"
    """Scored part of a response: summary (the text after the reasoning: helpfulness) or response (all of it)."""
    source: str = "assistant"
    """Source of the labelled responses: assistant (generated, see data.source=assistant) or file."""
    train_file: str = ""
    """File of training examples with the fields prompt, chosen and rejected, or prompt, response and safe (.jsonl,
    .json, .parquet, .arrow, .csv; JSON also gzipped), or the folder of a Hugging Face dataset; where source is file."""
    eval_file: str = ""
    """File or folder of validation examples with the same fields; where source is file."""
    train_split: str = "train"
    """Split to read from a folder of training examples."""
    eval_split: str = "test"
    """Split to read from a folder of validation examples."""
    subset: str = ""
    """Configuration to read from a folder that has several; empty takes the one that its README calls default."""
    chat_template: str = "r1_zero"
    """Template around a question: r1_zero (of DeepSeek-R1-Zero) or none (the question is the prompt)."""
    num_examples: int = 16_000
    """Pairs or labelled responses to generate; where source is assistant."""
    critique_loss_weight: float = 0.0
    """Weight of the token loss on the critique, which the model then writes between response and score; 0 has none."""
    max_critique_tokens: int = 32
    """Longest critique that the model writes before it scores; where critique_loss_weight is above 0."""
    epochs: int = 1
    """Passes over the training examples; train.steps may end the run before."""
    eval_examples: int = 512
    """Validation examples; where source is assistant."""
    eval_interval: int = 100
    """Steps between evaluations; the last step is always followed by one."""

    def __post_init__(self) -> None:
        one_of(self, "objective", ("pairwise", "pointwise"))
        one_of(self, "scored_part", ("summary", "response"))
        one_of(self, "source", ("assistant", "file"))
        one_of(self, "chat_template", ("r1_zero", "none"))
        at_least(self, 1, "num_examples", "max_critique_tokens", "epochs", "eval_examples", "eval_interval")
        at_least(self, 0, "critique_loss_weight")
        check_files(self)
