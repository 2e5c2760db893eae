"""Reward models: what they learn from and how it is read."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_r1.config.checks import at_least, check_files, one_of


@dataclass(kw_only=True, slots=True)
class RewardModelConfig:
    """A scalar head on a language model; DeepSeek-R1 report (v2), section 3.1."""

    objective: str = "pairwise"
    """pairwise (the better of two responses, Bradley-Terry: helpfulness) or pointwise (safe or not, cross-entropy)."""
    scored_part: str = "summary"
    """What of a response is scored: summary (what follows the reasoning: helpfulness) or response (all of it)."""
    source: str = "assistant"
    """Where labelled responses come from: assistant (generated, see data.source=assistant) or file."""
    train_file: str = ""
    """JSONL of source=file: prompt, chosen, rejected; or prompt, response, safe."""
    eval_file: str = ""
    """The same, of what is measured and never learned; where source is file."""
    chat_template: str = "r1_zero"
    """What surrounds a question: r1_zero (the template of DeepSeek-R1-Zero) or none (the question is the prompt)."""
    num_examples: int = 16_000
    """Pairs or labelled responses to generate; where source is assistant."""
    critique_loss_weight: float = 0.0
    """Weight of the token loss on the judge's reasoning, which then stands between response and score; 0 has none."""
    max_critique_tokens: int = 32
    """Longest reasoning that the model writes before it scores; where critique_loss_weight is not 0."""
    epochs: int = 1
    """Times that every item is learned; train.steps may end the run before."""
    eval_examples: int = 512
    """Items that are measured; where source is assistant."""
    eval_interval: int = 100
    """Steps between measurements; there is one after the last step too."""

    def __post_init__(self) -> None:
        one_of(self, "objective", ("pairwise", "pointwise"))
        one_of(self, "scored_part", ("summary", "response"))
        one_of(self, "source", ("assistant", "file"))
        one_of(self, "chat_template", ("r1_zero", "none"))
        at_least(self, 1, "num_examples", "max_critique_tokens", "epochs", "eval_examples", "eval_interval")
        at_least(self, 0, "critique_loss_weight")
        check_files(self)
