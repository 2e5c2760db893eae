"""A teacher: another model, whose most likely words are learned beside the words that were written."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_r1.config.checks import at_least, one_of, within
from megatron_r1.errors import ConfigError

TAILS = ("rest", "renormalise", "drop")
"""What can become of the words beyond a teacher's K most likely ones."""


@dataclass(kw_only=True, slots=True)
class TeacherConfig:
    """Distillation from a teacher's probabilities (Hinton et al. 2015) in supervised fine-tuning."""

    from_: str = ""
    """Run directory, checkpoint directory or hf:FOLDER of a model of any shape with the student's words; empty has no
    teacher. Written `sft.teacher.from`."""
    top_k: int = 64
    """Most likely words of the teacher that are learned at each token; at most the vocabulary."""
    tail: str = "rest"
    """What becomes of the other words: rest (one event for all of them), renormalise (the K are taken for the whole
    vocabulary) or drop (left out of the sum)."""
    temperature: float = 1.0
    """Of both models' probabilities; the divergence is multiplied by its square."""
    weight: float = 0.5
    """Share of the divergence in the loss: (1 - weight) x cross-entropy + weight x divergence."""

    def __post_init__(self) -> None:
        at_least(self, 1, "top_k")
        one_of(self, "tail", TAILS)
        within(self, 1e-3, 1e3, "temperature")
        if not 0 < self.weight <= 1:
            raise ConfigError("weight", self.weight, "must be above 0 and at most 1")
        if self.tail == "renormalise" and self.top_k == 1:
            raise ConfigError("top_k", 1, "must be at least 2 with tail=renormalise: one word alone is always certain")
