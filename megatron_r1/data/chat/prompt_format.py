"""Formats a question as a prompt: the chat template around it, and the tokens of the whole."""

from __future__ import annotations

from megatron_r1.data.chat.closing import closing_tokens
from megatron_r1.data.chat.encode import chat_template, control_tokens, template_source
from megatron_r1.data.chat.render import CannotRender
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import ConfigError

KEY = "rollout.chat_template"
NO_TEMPLATE = "none"
PROBE = "2 + 3?"
THINK = "<think>"
"""Opens the reasoning of a response."""


class PromptFormatter:
    """Turns questions into prompts."""

    def __init__(
        self, tokenizer: Tokenizer, template: str, system_prompt: str = "", *, date: str = "", max_tokens: int = 0
    ):
        """
        Args:
            template: r1_zero, none, tokenizer or a file, as in `RolloutConfig`.
            system_prompt: system message before each question; empty for none.
            date: day that the template knows, as in `ChatTemplate`.
            max_tokens: longest prompt that leaves room for a response; 0 sets no limit.

        Raises:
            ConfigError: there is no such template, or it refuses a question.
            DataError: Jinja cannot parse the template.
        """
        self._control, self._system, self._max_tokens = control_tokens(tokenizer), system_prompt, max_tokens
        self.tokenizer = tokenizer
        """Its responses also end at the tokens with which the template closes them."""
        self.end = tokenizer.eos
        """The token that follows a response."""
        self._template = None
        if template == NO_TEMPLATE:
            return
        self._template = chat_template(tokenizer, template_source(template, tokenizer, KEY), template, date)
        try:
            self.text(PROBE)
        except CannotRender as error:
            asked = "a system prompt and a question" if system_prompt else "a question"
            raise ConfigError(KEY, template, f"must take {asked}: {error}") from error
        if closing := [tokenizer.id(text) for text in closing_tokens(self._template, self._control)]:
            self.tokenizer, self.end = tokenizer.stopping_at(closing), closing[0]

    def text(self, question: str) -> str:
        """The prompt as text, special tokens spelt out."""
        if self._template is None:
            return self.tokenizer.decode(self.tokenizer.begin) + self._system + question
        system = [{"role": "system", "content": self._system}] if self._system else []
        return self._template.render([*system, {"role": "user", "content": question}], add_generation_prompt=True).text

    def tokens(self, question: str) -> tuple[int, ...]:
        """The prompt as token ids."""
        return tuple(self.tokenizer.encode(self.text(question)))

    @property
    def instructions(self) -> str:
        """What every prompt says beside the question: the template's own words and the system prompt."""
        return self.text(PROBE).replace(PROBE, "")

    def opening(self, question: str) -> str:
        """What the prompt already holds of the response: a think tag that its end opens; empty for nothing."""
        _, tag, after = self.text(question).rpartition(THINK)
        return tag + after if not after.strip() else ""

    def check(self, question: str) -> None:
        """Refuse a question that contains a control token, or that leaves no room for a response.

        Raises:
            ValueError: names the token, or the lengths.
        """
        if found := self.control_token_in(question):
            raise ValueError(f"the question holds the control token {found}")
        if self._max_tokens and (length := len(self.tokens(question))) > self._max_tokens:
            raise ValueError(
                f"its prompt has {length} tokens; model.max_sequence_length minus rollout.max_response_tokens leaves "
                f"{self._max_tokens}"
            )

    def control_token_in(self, text: str) -> str | None:
        """The first control token that `text` spells; None where there is none."""
        found = self._control.search(text)
        return found and found[0]
