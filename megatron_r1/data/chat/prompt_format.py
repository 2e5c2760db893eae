"""Formats a question as a prompt: the chat template around it, and the tokens of the whole."""

from __future__ import annotations

from megatron_r1.data.chat.encode import chat_template, control_tokens, template_source
from megatron_r1.data.chat.render import CannotRender
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import ConfigError

KEY = "rollout.chat_template"
NO_TEMPLATE = "none"


class PromptFormatter:
    """Turns questions into prompts."""

    def __init__(self, tokenizer: Tokenizer, template: str, system_prompt: str = ""):
        """
        Args:
            template: r1_zero, none, tokenizer or a file, as in `RolloutConfig`.
            system_prompt: system message before each question; empty for none.

        Raises:
            ConfigError: there is no such template, or it refuses a question.
            DataError: Jinja cannot parse the template.
        """
        self.tokenizer, self._control, self._system = tokenizer, control_tokens(tokenizer), system_prompt
        self._template = None
        if template == NO_TEMPLATE:
            return
        self._template = chat_template(tokenizer, template_source(template, tokenizer, KEY), template)
        try:
            self.text("2 + 3?")
        except CannotRender as error:
            asked = "a system prompt and a question" if system_prompt else "a question"
            raise ConfigError(KEY, template, f"must take {asked}: {error}") from error

    def text(self, question: str) -> str:
        """The prompt as text, special tokens spelt out."""
        if self._template is None:
            return self.tokenizer.decode(self.tokenizer.begin) + self._system + question
        system = [{"role": "system", "content": self._system}] if self._system else []
        return self._template.render([*system, {"role": "user", "content": question}], add_generation_prompt=True).text

    def tokens(self, question: str) -> tuple[int, ...]:
        """The prompt as token ids."""
        return tuple(self.tokenizer.encode(self.text(question)))

    def check(self, question: str) -> None:
        """Refuse a question that contains a control token.

        Raises:
            ValueError: names the token.
        """
        if found := self.control_token_in(question):
            raise ValueError(f"the question holds the control token {found}")

    def control_token_in(self, text: str) -> str | None:
        """The first control token that `text` spells; None where there is none."""
        found = self._control.search(text)
        return found and found[0]
