"""Pairs of answers as tokens, as a policy is asked and answers: what direct preference optimization learns from."""

from __future__ import annotations

from megatron_r1.data.chat.prompt_format import Asking
from megatron_r1.data.preference.examples import Example, Row
from megatron_r1.data.preference_items import Item
from megatron_r1.errors import DataError


class AnswerEncoder:
    """Turns pairs of responses into rows: the prompt, the whole response, the end token.

    Args:
        asking: how questions are put to the policy.
    """

    reasoning = False

    def __init__(self, asking: Asking):
        self.tokenizer, self._asking = asking.tokenizer, asking

    def example(self, item: Item) -> Example:
        """A pair; of each row, what follows the prompt is learned, the end token included.

        Raises:
            DataError: question or response spells a token that steers the chat, and would become it.
        """
        question = item.first.question
        prompt = self._asking.tokens(self._checked(question, question))
        # Apart from the prompt, as a policy reads and writes them.
        answers = self.tokenizer.encode_batch([self._checked(side.response, question) for side in item.sides])
        rows = (Row([*prompt, *answer, self.tokenizer.eos], len(prompt)) for answer in answers)
        return Example(tuple(rows), item.safe)

    def _checked(self, text: str, question: str) -> str:
        if found := self._asking.control_token_in(text):
            raise DataError(f"prompt={question[:40]!r}: its pair holds the control token {found}")
        return text
