"""Prompt styles: a text around each question, such as worked examples before it or a request to rewrite a response."""

from __future__ import annotations

import re
from pathlib import Path

from megatron_r1.config.recipes import prompt_styles
from megatron_r1.data.prompts.prompts import Prompt
from megatron_r1.errors import ConfigError
from megatron_r1.files import read_text

KEY = "sample.prompt_style"
_PLACE = re.compile(r"\{(question|response)\}")


class PromptStyle:
    """A text with places for the question and, in some styles, for a given response."""

    def __init__(self, name: str):
        """
        Args:
            name: of a text in configs/prompt_style, or a file.

        Raises:
            ConfigError: there is no such text, or it has no place for the question.
        """
        shipped = prompt_styles()
        path = shipped.get(name, Path(name))
        if not path.is_file():
            raise ConfigError(KEY, name, f"must be one of {', '.join(shipped)}, or a file")
        self._text = read_text(path).removesuffix("\n")
        if "{question}" not in self._text:
            raise ConfigError(KEY, name, "must hold {question}, where the question stands")
        self.needs_response = "{response}" in self._text
        """Whether a given response stands in it."""

    def request(self, prompt: Prompt) -> str:
        """The question in its style, as the user's message."""
        places = {"question": prompt.question, "response": prompt.response}
        return _PLACE.sub(lambda place: places[place[1]], self._text)
