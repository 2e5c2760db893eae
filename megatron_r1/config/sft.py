"""Supervised fine-tuning: which conversations, how they become tokens, which tokens count; and a teacher."""

from __future__ import annotations

from dataclasses import dataclass, field

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


@dataclass(kw_only=True, slots=True)
class ConversationsConfig:
    """One source of conversations: rows with messages, or with a prompt and a response."""

    path: str = ""
    """A .jsonl or .parquet file, or the folder of a Hugging Face dataset."""
    split: str = "train"
    """Of a folder, the split to read."""
    messages_field: str = "messages"
    """Field that holds a list of {role, content}; rows without it are prompt and response."""
    prompt_field: str = "prompt"
    """Field that holds the question."""
    response_field: str = "response"
    """Field that holds the answer."""
    system_field: str = "system"
    """Field that holds the system prompt; a row may lack it."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ConfigError("path", self.path, "must name a .jsonl or .parquet file or a dataset's folder")


@dataclass(kw_only=True, slots=True)
class SftConfig:
    """Supervised fine-tuning; DeepSeek-V3 report, section 5.1, and DeepSeek-R1 report, sections 2.3.1 and 2.3.3."""

    source: str = "arithmetic"
    """What to learn from: arithmetic (worked problems of the generated world, as cold-start data), assistant (general
    tasks, and data.arithmetic_share of worked problems among them) or files."""
    datasets: dict[str, ConversationsConfig] = field(default_factory=dict)
    """Name -> source of conversations; read where source is files."""
    num_conversations: int = 4000
    """Conversations to generate; where source is a generated world."""
    chat_template: str = "r1_zero"
    """r1_zero (one question in DeepSeek-R1-Zero's words), tokenizer (the tokenizer's own), or a file with one."""
    system_prompt: str = ""
    """Put before conversations that have none of their own."""
    loss_on: str = "all"
    """Which answers: all of a conversation, the last alone, or each as an example of its own, after the prompt that
    the template makes of the turns before it."""
    response_text: str = "template"
    """template (as the template writes an answer) or verbatim (as it stands in the row, and the end token): for
    templates that cut the reasoning out of answers."""
    overlong: str = "drop"
    """What becomes of an example longer than a sequence: drop or truncate, at its end."""
    packing: str = "best_fit"
    """best_fit (several examples share a sequence, none sees another) or none (one to a sequence)."""
    epochs: int = 2
    """Times that every example is learned; train.steps may end the run before."""
    eval_examples: int = 128
    """Conversations that are not learned but measured."""
    eval_interval: int = 50
    """Steps between measurements of the loss on them; it is measured before the first step and after the last too."""
    max_bad_rows: int = 0
    """Rows that may be left out, each named in bad_rows.txt, before the run is refused."""
    max_bad_share: float = 0.0
    """The same as a share of all rows; the larger of the two counts."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """A model to learn from beside the conversations."""

    def __post_init__(self) -> None:
        one_of(self, "source", ("arithmetic", "assistant", "files"))
        one_of(self, "loss_on", ("all", "last", "each"))
        one_of(self, "response_text", ("template", "verbatim"))
        one_of(self, "overlong", ("drop", "truncate"))
        one_of(self, "packing", ("best_fit", "none"))
        at_least(self, 1, "num_conversations", "epochs", "eval_interval")
        at_least(self, 0, "eval_examples", "max_bad_rows")
        within(self, 0.0, 1.0, "max_bad_share")
        if not self.chat_template:
            raise ConfigError("chat_template", self.chat_template, "must be r1_zero, tokenizer or a file")
        if self.teacher.from_ and self.packing != "best_fit":
            raise ConfigError("packing", self.packing, "must be best_fit with teacher.from")
