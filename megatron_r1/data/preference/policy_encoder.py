"""Tokenises preference pairs for direct preference optimization, as the policy reads prompts and writes responses."""

from __future__ import annotations

from megatron_r1.data.chat.prompt_format import PromptFormatter
from megatron_r1.data.preference.examples import TokenizedPreference, TokenizedSequence
from megatron_r1.data.preference_example import PreferenceExample
from megatron_r1.errors import DataError


class PolicyPairEncoder:
    """Turns pairs of responses into sequences: the prompt, the whole response, the end token.

    Args:
        formatter: makes the policy's prompts.
    """

    reasoning = False

    def __init__(self, formatter: PromptFormatter):
        self.tokenizer, self._formatter = formatter.tokenizer, formatter

    def example(self, item: PreferenceExample) -> TokenizedPreference:
        """A tokenised pair; the tokens after each prompt are in the loss, the end token included.

        Raises:
            DataError: question or response contains a control token.
        """
        prompt = self._formatter.tokens(self._checked(item.question, item.question))
        # Tokenised separately from the prompt, as a policy generates them.
        texts = [self._checked(side.response, item.question) for side in item.responses]
        responses = self.tokenizer.encode_batch(texts)
        sequences = (TokenizedSequence([*prompt, *ids, self._formatter.end], len(prompt)) for ids in responses)
        return TokenizedPreference(tuple(sequences), item.safe)

    def _checked(self, text: str, question: str) -> str:
        if found := self._formatter.control_token_in(text):
            raise DataError(f"prompt={question[:40]!r}: its pair holds the control token {found}")
        return text
