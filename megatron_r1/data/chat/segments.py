"""Which text of a conversation is learned: answers, and nothing else.

Where a template does not mark answers itself, they are found by difference: the text of a conversation up to an answer,
then with it. That holds only if each is a prefix of the next, which is checked. DeepSeek-R1's template and others take
the reasoning out of earlier answers, and some out of all: then a conversation has no one text in which every answer
stands as it was given, and each answer is learned after the prompt that the template makes of the turns before it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_r1.data.chat.render import ChatTemplate, Message
from megatron_r1.data.chat.rows import Conversation
from megatron_r1.data.row_files import BadRow


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of text, tokenised by itself: a prompt is tokenised before its answer exists."""

    text: str
    in_loss: bool
    """Whether it is a response, whose tokens are trained on."""


class ConversationSegmenter:
    """Cuts conversations into segments.

    Args:
        template: makes their text.
        end: text of the end token, which closes an answer that is taken verbatim.
        control: matches the tokens that a template may close an answer with.
        learn: all, last or each; answers: template or verbatim, as in `SftConfig`.
    """

    def __init__(self, template: ChatTemplate, end: str, control: re.Pattern[str], learn: str, answers: str):
        self._template, self._end, self._learn, self._answers = template, end, learn, answers
        self._closed = re.compile(rf"(.*(?:{control.pattern}))(\s*)", re.DOTALL)

    def examples(self, messages: Conversation) -> list[list[Segment]]:
        """What is learned of a conversation: examples, each of segments in order.

        Raises:
            BadRow: the template cannot show it so that every answer stands in it.
        """
        places = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        if self._learn == "each":
            return [self._segments(messages[: place + 1], [place]) for place in places]
        return [self._segments(messages, places if self._learn == "all" else places[-1:])]

    def _segments(self, messages: Sequence[Message], trained_on: Sequence[int]) -> list[Segment]:
        marked = self._template.marks_answers and self._answers == "template"
        return self._by_marks(messages, len(trained_on)) if marked else self._by_difference(messages, trained_on)

    def _by_marks(self, messages: Sequence[Message], count: int) -> list[Segment]:
        """The last `count` answers as the template marks them."""
        rendered = self._template.render(messages)
        contents = [message["content"] for message in messages if message["role"] == "assistant"]
        if len(rendered.answers) != len(contents):
            raise BadRow(f"the chat template marks {len(rendered.answers)} answers where {len(contents)} are")
        segments, at = [], 0
        for (start, stop), content in list(zip(rendered.answers, contents, strict=True))[-count:]:
            _check_kept(content, rendered.text[start:stop])
            segments += [Segment(rendered.text[at:start], False), Segment(rendered.text[start:stop], True)]
            at = stop
        return [*segments, Segment(rendered.text[at:], False)]

    def _by_difference(self, messages: Sequence[Message], trained_on: Sequence[int]) -> list[Segment]:
        segments: list[Segment] = []
        before = ""
        for index in trained_on:
            prompt = self._template.render(messages[:index], answer_follows=True).text
            if not prompt.startswith(before):
                raise BadRow(
                    f"the chat template changes what stands before message {index + 1}: needs sft.loss_on=each"
                )
            answer = self._answer(prompt, messages[: index + 1])
            segments.append(Segment(prompt[len(before) :], False))
            # Line breaks after the end token are the template's, not the model's.
            closed = self._closed.fullmatch(answer)
            text, rest = closed.groups() if closed else (answer, "")
            segments += [Segment(text, True), Segment(rest, False)]
            before = prompt + answer
        return segments

    def _answer(self, prompt: str, messages: Sequence[Message]) -> str:
        """The text of the last message, after `prompt`."""
        content = messages[-1]["content"]
        if self._answers == "verbatim":
            for opened in ("<think>\n", "<think>"):
                if prompt.endswith(opened):
                    if not content.startswith(opened):
                        raise BadRow(f"the chat template opens {opened.strip()} and the answer does not begin with it")
                    return f"{content[len(opened) :]}{self._end}"
            return f"{content}{self._end}"
        text = self._template.render(messages).text
        if not text.startswith(prompt):
            raise BadRow(
                "the chat template's prompt is no prefix of prompt and answer: needs sft.response_text=verbatim, or a "
                "template with generation marks"
            )
        answer = text[len(prompt) :]
        opened = "<think>" if prompt.rstrip().endswith("<think>") else ""
        _check_kept(content, opened + answer)
        return answer


def _check_kept(content: str, answer: str) -> None:
    """An answer must be in the text whole; templates may trim and set its lines otherwise."""
    if "".join(content.split()) not in "".join(answer.split()):
        raise BadRow(
            "the chat template leaves out part of an answer: needs sft.response_text=verbatim, or sft.loss_on=each"
        )
