"""Which text of a conversation is in the loss: the responses, and nothing else.

Where a chat template does not mark responses itself, they are found by difference: the conversation is rendered without
a response, then with it. That works only if the first text is a prefix of the second, which is checked. The templates
of DeepSeek-R1 and others remove the reasoning from earlier responses, and some remove it from all of them. No single
text then holds every response unchanged; `sft.loss_on=each` makes one example of each response, after the prompt that
the template makes of the turns before it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_r1.data.chat.render import ChatTemplate, Message
from megatron_r1.data.chat.rows import IN_LOSS, Conversation
from megatron_r1.data.row_files import BadRow

REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
"""Fields in which a message may hold the reasoning of its response, beside `content`; a chat template reads one."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of text that is tokenised separately, as a prompt is at inference, before its response exists."""

    text: str
    in_loss: bool
    """Whether it is a response, whose tokens are trained on."""


class ConversationSegmenter:
    """Cuts conversations into segments.

    Args:
        template: renders them.
        end: text of the end token, appended to a verbatim response.
        control: matches the tokens with which a template may end a response.
        loss_on: all, last or each, as in `SftConfig`.
        response_text: template or verbatim, as in `SftConfig`.
    """

    def __init__(self, template: ChatTemplate, end: str, control: re.Pattern[str], loss_on: str, response_text: str):
        self._template, self._end, self._loss_on, self._response_text = template, end, loss_on, response_text
        self._closed = re.compile(rf"(.*(?:{control.pattern}))(\s*)", re.DOTALL)

    def examples(self, messages: Conversation) -> list[list[Segment]]:
        """The examples that a conversation makes, each a list of segments in order.

        Raises:
            BadRow: the template changes or drops a response that is in the loss.
        """
        responses = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        considered = responses[-1:] if self._loss_on == "last" else responses
        trained_on = [index for index in considered if messages[index].get(IN_LOSS, True)]
        if not trained_on:
            raise BadRow("its last response has the weight or loss 0, and sft.loss_on=last trains on no other")
        plain = [{name: part for name, part in message.items() if name != IN_LOSS} for message in messages]
        if self._loss_on == "each":
            return [self._segments(plain[: index + 1], [index]) for index in trained_on]
        return [self._segments(plain, trained_on)]

    def _segments(self, messages: Sequence[Message], trained_on: Sequence[int]) -> list[Segment]:
        marked = self._template.marks_responses and self._response_text == "template"
        return self._by_marks(messages, trained_on) if marked else self._by_difference(messages, trained_on)

    def _by_marks(self, messages: Sequence[Message], trained_on: Sequence[int]) -> list[Segment]:
        """Segments with the responses as the template marks them."""
        rendered = self._template.render(messages)
        responses = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        if len(rendered.responses) != len(responses):
            marked = f"the chat template marks {len(rendered.responses)} responses"
            raise BadRow(f"{marked}, but the conversation has {len(responses)}")
        segments, at = [], 0
        for index, (start, stop) in zip(responses, rendered.responses, strict=True):
            if index not in trained_on:
                continue
            _check_complete(messages[index], rendered.text[start:stop])
            segments += [Segment(rendered.text[at:start], False), Segment(rendered.text[start:stop], True)]
            at = stop
        return [*segments, Segment(rendered.text[at:], False)]

    def _by_difference(self, messages: Sequence[Message], trained_on: Sequence[int]) -> list[Segment]:
        segments: list[Segment] = []
        before = ""
        for index in trained_on:
            prompt = self._template.render(messages[:index], add_generation_prompt=True).text
            if not prompt.startswith(before):
                raise BadRow(f"the chat template changes the text before message {index + 1}: needs sft.loss_on=each")
            response = self._response(prompt, messages[: index + 1])
            segments.append(Segment(prompt[len(before) :], False))
            # Line breaks after the end token are the template's, not the model's.
            closed = self._closed.fullmatch(response)
            text, rest = closed.groups() if closed else (response, "")
            segments += [Segment(text, True), Segment(rest, False)]
            before = prompt + response
        return segments

    def _response(self, prompt: str, messages: Sequence[Message]) -> str:
        """The text of the last message, after `prompt`."""
        message, content = messages[-1], messages[-1]["content"]
        if self._response_text == "verbatim":
            if lost := [name for name in REASONING_FIELDS if name in message]:
                raise BadRow(f"has {lost[0]}, which sft.response_text=verbatim would leave out")
            for opened in ("<think>\n", "<think>"):
                if prompt.endswith(opened):
                    if not content.startswith(opened):
                        raise BadRow(
                            f"the chat template opens {opened.strip()}, but the response does not begin with it"
                        )
                    return f"{content[len(opened) :]}{self._end}"
            return f"{content}{self._end}"
        text = self._template.render(messages).text
        if not text.startswith(prompt):
            raise BadRow(
                "the chat template's prompt is no prefix of prompt and response: needs sft.response_text=verbatim, "
                "or a template with generation marks"
            )
        response = text[len(prompt) :]
        opened = "<think>" if prompt.rstrip().endswith("<think>") else ""
        _check_complete(message, opened + response)
        return response


def _check_complete(message: Message, response: str) -> None:
    """The rendered text must contain the whole response; a template may trim it and break its lines differently."""
    rendered = "".join(response.split())
    if "".join(message["content"].split()) not in rendered:
        raise BadRow(
            "the chat template leaves out part of a response: needs sft.response_text=verbatim, or sft.loss_on=each"
        )
    for name in REASONING_FIELDS:
        if "".join(str(message.get(name, "")).split()) not in rendered:
            raise BadRow(f"the chat template leaves out the {name} of a response: needs sft.loss_on=each")
