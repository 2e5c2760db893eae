"""The tokens with which a chat template closes a response: a model that is trained with it ends its responses so.

They need not be the tokenizer's end token: base models that end texts in <|endoftext|> have templates that close turns
with <|im_end|>.
"""

from __future__ import annotations

import re

from megatron_r1.data.chat.render import CannotRender, ChatTemplate

_RESPONSE = "5, I think."
_CONVERSATION = ({"role": "user", "content": "2 + 3?"}, {"role": "assistant", "content": _RESPONSE})


def closing_tokens(template: ChatTemplate, control: re.Pattern[str]) -> list[str]:
    """Control tokens that follow a response, the nearest first; none where the template refuses a conversation.

    Args:
        control: matches control tokens.
    """
    try:
        text = template.render(_CONVERSATION).text
    except CannotRender:
        return []
    _, found, after = text.rpartition(_RESPONSE)
    return list(dict.fromkeys(control.findall(after))) if found else []


def is_closed(template: ChatTemplate, control: re.Pattern[str]) -> bool:
    """Whether what is trained on of a response ends in a control token; true where the template refuses to tell."""
    try:
        rendered = template.render(_CONVERSATION)
    except CannotRender:
        return True
    start, stop = rendered.responses[-1] if rendered.responses else (0, len(rendered.text))
    _, found, after = rendered.text[start:stop].rpartition(_RESPONSE)
    return not found or control.search(after) is not None
