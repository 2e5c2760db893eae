"""Prompts by the template of R1-Zero, the model's own, or none, as transformers renders them."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from megatron_r1.data.chat.prompt_format import PromptFormatter
from megatron_r1.data.template import fill_template
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import ConfigError, DataError
from tests.support.chats import small_tokenizer

TOKENIZER = small_tokenizer()
QUESTION = "What is 2 + 3?"


def test_r1_zero_is_the_reports_template_after_the_beginning_of_a_document():
    formatter = PromptFormatter(TOKENIZER, "r1_zero")
    assert formatter.tokens(QUESTION) == (*TOKENIZER.begin, *TOKENIZER.encode(fill_template(QUESTION)))
    assert formatter.text(QUESTION) == "<|bos|>" + fill_template(QUESTION)


def test_without_a_template_the_question_is_the_prompt():
    assert PromptFormatter(TOKENIZER, "none").tokens(QUESTION) == (*TOKENIZER.begin, *TOKENIZER.encode(QUESTION))
    assert PromptFormatter(TOKENIZER, "none", "Be brief. ").text(QUESTION) == f"<|bos|>Be brief. {QUESTION}"


@pytest.mark.parametrize("system", ["", "Think first."])
def test_the_tokenizers_own_template_is_what_transformers_renders(system, tmp_path):
    TOKENIZER.save(tmp_path)
    theirs = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    messages = [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": QUESTION}]
    expected = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert list(PromptFormatter(TOKENIZER, "tokenizer", system).tokens(QUESTION)) == expected


def test_a_vocabulary_without_a_begin_token_begins_with_the_text():
    settings = {key: value for key, value in TOKENIZER.settings.items() if key != "bos_token"}
    bare = Tokenizer(TOKENIZER.backend, settings)
    assert (
        PromptFormatter(bare, "r1_zero").text(QUESTION)
        == fill_template(QUESTION)
        == PromptFormatter(bare, "none").text(fill_template(QUESTION))
    )


def test_templates_that_cannot_format_a_question_are_refused_at_the_start(tmp_path):
    with pytest.raises(ConfigError, match=r"^rollout\.chat_template=r1_zero: must take a system prompt and a question"):
        PromptFormatter(TOKENIZER, "r1_zero", "You are kind.")
    with pytest.raises(ConfigError, match=r"^rollout\.chat_template=gone: must be r1_zero, tokenizer or a file"):
        PromptFormatter(TOKENIZER, "gone")
    (tmp_path / "broken").write_text("{% if %}")
    with pytest.raises(DataError, match="chat template .*broken: line 1"):
        PromptFormatter(TOKENIZER, str(tmp_path / "broken"))


@pytest.mark.parametrize(
    ("ends", "opening"),
    [
        ("<think>\n", "<think>\n"),
        ("<think>", "<think>"),
        ("<think>\n\n</think>\n\n", ""),
        ("<think>so", ""),
        ("", ""),
        ("</think> <think> ", "<think> "),
    ],
)
def test_what_a_template_already_opens_of_the_response_is_known(tmp_path, ends, opening):
    template = tmp_path / "opens.jinja"
    begin = "{{ bos_token }}Think in <think> tags. {% for m in messages %}{{ m['content'] }}{% endfor %}"
    template.write_text(begin + "{% if add_generation_prompt %}{{ " + repr(f"|{ends}") + " }}{% endif %}")
    formatter = PromptFormatter(TOKENIZER, str(template))
    assert formatter.opening(QUESTION) == opening
    assert formatter.instructions == f"<|bos|>Think in <think> tags. |{ends}"


def test_a_question_may_open_the_response_itself():
    assert PromptFormatter(TOKENIZER, "none").opening("What is 1+1? <think>\n") == "<think>\n"
    assert PromptFormatter(TOKENIZER, "none").opening("What is a <think> tag?") == ""


def test_a_question_with_a_control_token_is_refused():
    formatter = PromptFormatter(TOKENIZER, "r1_zero")
    formatter.check("What is <think>?")
    for token in ("<|eos|>", "<|user|>"):
        with pytest.raises(ValueError, match="the question holds the control token"):
            formatter.check(f"a {token} b")
