"""Supervised fine-tuning: conversations, their tokenisation, the loss mask; and a teacher."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_r1.config.checks import at_least, iso_date, one_of, within
from megatron_r1.errors import ConfigError

TAILS = ("rest", "renormalise", "drop")
"""How the distillation loss treats the tokens beyond a teacher's K most likely ones."""


@dataclass(kw_only=True, slots=True)
class TeacherConfig:
    """Distillation from a teacher's probabilities (Hinton et al. 2015) in supervised fine-tuning."""

    from_: str = ""
    """Run directory, checkpoint directory or hf:FOLDER of a model of any shape with the student's vocabulary; empty has
    no teacher. Written `sft.teacher.from`."""
    top_k: int = 64
    """The teacher's most likely tokens that enter the loss at each position; at most the vocabulary."""
    tail: str = "rest"
    """How the loss treats all other tokens: rest (one event for all of them), renormalise (the K tokens are the whole
    vocabulary) or drop (left out of the sum)."""
    temperature: float = 1.0
    """Temperature of both models' probabilities; the divergence is multiplied by its square."""
    weight: float = 0.5
    """Share of the divergence in the loss: (1 - weight) x cross-entropy + weight x divergence."""

    def __post_init__(self) -> None:
        at_least(self, 1, "top_k")
        one_of(self, "tail", TAILS)
        within(self, 1e-3, 1e3, "temperature")
        if not 0 < self.weight <= 1:
            raise ConfigError("weight", self.weight, "must be above 0 and at most 1")
        if self.tail == "renormalise" and self.top_k == 1:
            raise ConfigError(
                "top_k", 1, "must be at least 2 with tail=renormalise: a single token would have probability 1"
            )


@dataclass(kw_only=True, slots=True)
class ConversationsConfig:
    """One source of conversations: rows with messages, or with a prompt and a response."""

    path: str = ""
    """A file (.jsonl, .json, .parquet, .arrow, .csv; JSON also gzipped), or the folder of a Hugging Face dataset."""
    split: str = "train"
    """Split to read from a folder."""
    subset: str = ""
    """Configuration to read from a folder that has several; empty takes the one that its README calls default."""
    messages_field: str = "messages"
    """Field with a list of {role, content}; rows without it have a prompt and a response."""
    prompt_field: str = "prompt"
    """Field with the prompt."""
    response_field: str = "response"
    """Field with the response."""
    system_field: str = "system"
    """Field with the system prompt; a row may lack it."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ConfigError("path", self.path, "must name a file of rows or a dataset's folder")


@dataclass(kw_only=True, slots=True)
class SftConfig:
    """Supervised fine-tuning; DeepSeek-V3 report, section 5.1, and DeepSeek-R1 report, sections 2.3.1 and 2.3.3."""

    source: str = "arithmetic"
    """Source of the conversations: arithmetic (worked problems of the generated world, as cold-start data), assistant
    (general tasks, and data.arithmetic_share of worked problems among them) or files."""
    datasets: dict[str, ConversationsConfig] = field(default_factory=dict)
    """Name -> source of conversations; read where source is files."""
    num_conversations: int = 4000
    """Conversations to generate; where source is a generated world."""
    chat_template: str = "r1_zero"
    """r1_zero (DeepSeek-R1-Zero's template for one question), tokenizer (the tokenizer's own), or a file with one."""
    template_date: str = ""
    """Day that a chat template learns from strftime_now, YYYY-MM-DD; empty: none, and a template that cannot do without
    is refused."""
    system_prompt: str = ""
    """System prompt of conversations that have none of their own."""
    loss_on: str = "all"
    """Responses in the loss: all of a conversation, the last one, or each in an example of its own, after the prompt
    that the template makes of the turns before it."""
    response_text: str = "template"
    """template (a response as the template renders it) or verbatim (as in the row, with the end token): for templates
    that remove the reasoning from responses."""
    overlong: str = "drop"
    """Examples longer than a sequence: drop them, or truncate them at the end."""
    packing: str = "best_fit"
    """best_fit (several examples share a sequence, none attends to another) or none (one example per sequence)."""
    epochs: int = 2
    """Passes over the training examples; train.steps may end the run before."""
    eval_examples: int = 128
    """Conversations for validation, which are not trained on."""
    eval_interval: int = 50
    """Steps between evaluations of the validation loss; there is one before the first step and after the last too."""
    max_bad_rows: int = 0
    """Bad rows that may be dropped, each listed in bad_rows.txt; more than this are an error."""
    max_bad_share: float = 0.0
    """The same as a share of all rows; the larger of the two limits holds."""
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    """A teacher for distillation, beside the conversations."""

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
        iso_date(self, "template_date")
        if self.teacher.from_ and self.packing != "best_fit":
            raise ConfigError("packing", self.packing, "must be best_fit with teacher.from")
