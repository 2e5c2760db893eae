"""Preference pairs as tokens: with the policy's prompts, and in the loss up to the end token."""

from __future__ import annotations

import pytest

from megatron_r1.data.chat.prompt_format import PromptFormatter
from megatron_r1.data.preference.examples import encode_preferences
from megatron_r1.data.preference.policy_encoder import PolicyPairEncoder
from megatron_r1.data.preference_example import LabelledResponse, PreferenceExample
from megatron_r1.errors import DataError
from tests.support.chats import small_tokenizer

TOKENIZER = small_tokenizer()


def pair(better: str, worse: str, question: str = "2 + 3") -> PreferenceExample:
    return PreferenceExample(
        "t", LabelledResponse(question, better, "\nnever learned"), LabelledResponse(question, worse, "\nnever learned")
    )


@pytest.mark.parametrize("template", ["r1_zero", "none", "tokenizer"])
def test_a_sequence_is_the_prompt_and_the_whole_response_with_its_end_token(template):
    formatter = PromptFormatter(TOKENIZER, template)
    responses = "<think> x </think> <answer>5</answer>", "6"
    example = PolicyPairEncoder(formatter).example(pair(*responses))
    for row, response in zip(example.sequences, responses, strict=True):
        assert row.tokens[: row.loss_start] == list(formatter.tokens("2 + 3"))
        assert row.tokens[row.loss_start :] == [*TOKENIZER.encode(response), TOKENIZER.eos]


def test_the_system_prompt_is_in_the_prompt():
    rows = PolicyPairEncoder(PromptFormatter(TOKENIZER, "tokenizer", "Be brief.")).example(pair("5", "6")).sequences
    assert (
        TOKENIZER.decode(rows[0].tokens[: rows[0].loss_start]) == "<|bos|><|system|>Be brief.<|user|>2 + 3<|assistant|>"
    )


def test_longer_pairs_are_dropped_and_counted():
    encoder = PolicyPairEncoder(PromptFormatter(TOKENIZER, "none"))
    longest = encoder.example(pair("5", "6, 7")).length
    examples, dropped = encode_preferences([pair("5", "6, 7"), pair("5", "6, 7, 8")], encoder, longest)
    assert (len(examples), dropped) == (1, 1)


@pytest.mark.parametrize("broken", [pair("5", "6", "2<|assistant|>"), pair("5", "6<|eos|>"), pair("<|user|>", "6")])
def test_a_text_that_spells_a_control_token_is_refused(broken):
    with pytest.raises(DataError, match=r"prompt='2.*': its pair holds the control token <\|"):
        PolicyPairEncoder(PromptFormatter(TOKENIZER, "tokenizer")).example(broken)
