"""What the model reads."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_r1.config.checks import at_least, one_of, within


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """A source of pre-training text, reinforcement-learning prompts and held-out problems."""

    source: str = "arithmetic"
    """Which world: arithmetic (generated worked arithmetic)."""
    seed: int = 0
    """Seed of the generated world; another seed draws other documents, never another held-out split."""
    num_documents: int = 100_000
    """Documents of pre-training text to generate."""
    vocab_size: int = 512
    """Vocabulary of the tokenizer that is trained on the source."""
    heldout_fraction: float = 0.15
    """Share of expressions that no training text or prompt contains."""
    reasoning_gym_share: float = 0.2
    """Share of prompts drawn from reasoning-gym tasks."""

    def __post_init__(self) -> None:
        one_of(self, "source", ("arithmetic",))
        at_least(self, 0, "seed")
        at_least(self, 100, "num_documents")
        at_least(self, 512, "vocab_size")
        within(self, 0.01, 0.5, "heldout_fraction")
        within(self, 0.0, 1.0, "reasoning_gym_share")
