"""Templates render as transformers renders them, and cannot do what a template must not."""

from __future__ import annotations

import datetime

import pytest

from megatron_r1.config.rollout import RolloutConfig
from megatron_r1.config.sft import SftConfig
from megatron_r1.data.chat.encode import ChatEncoder, chat_template
from megatron_r1.data.chat.render import R1_ZERO, CannotRender, ChatTemplate
from megatron_r1.data.row_files import BadRow
from megatron_r1.data.template import fill_template
from megatron_r1.data.tokenizer import CHAT_TEMPLATE
from megatron_r1.errors import ConfigError, DataError
from tests.support.chats import QWEN, QWEN_MARKED, REASONED, REASONING, SEVERAL, SINGLE, small_tokenizer

HOSTILE = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.append(1) }}",
    "{{ messages.__init__.__globals__ }}",
    "{% for m in messages %}{{ m.update({'content': ''}) }}{% endfor %}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    small_tokenizer().save(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("source", [CHAT_TEMPLATE, QWEN, QWEN_MARKED, REASONING])
@pytest.mark.parametrize("messages", [SINGLE, SEVERAL, REASONED])
def test_text_is_what_transformers_renders(theirs, source, messages):
    template = chat_template(small_tokenizer(), source, "test")
    for several in (messages, messages[:-1]):
        for add_generation_prompt in (False, True):
            options = {"chat_template": source, "tokenize": False, "add_generation_prompt": add_generation_prompt}
            try:
                expected = theirs.apply_chat_template(several, **options)
            except Exception as error:
                assert "no system here" in str(error)
                with pytest.raises(CannotRender, match="no system here"):
                    template.render(several, add_generation_prompt)
                continue
            assert template.render(several, add_generation_prompt).text == expected


def test_marked_responses_are_what_transformers_marks(theirs):
    """transformers masks tokens; the masks agree up to the end token of the last response."""
    found = theirs.apply_chat_template(
        SEVERAL, chat_template=QWEN_MARKED, return_assistant_tokens_mask=True, return_dict=True
    )
    encoder = ChatEncoder(small_tokenizer(), chat_template(small_tokenizer(), QWEN_MARKED, "test"), "all", "template")
    [examples] = encoder.encode([SEVERAL])
    assert not isinstance(examples, BadRow)
    [example] = examples
    count = len(example.tokens)
    assert example.tokens == found["input_ids"][:count]
    assert [int(flag) for flag in example.loss_mask] == found["assistant_masks"][:count]
    assert not any(found["assistant_masks"][count:])


@pytest.mark.parametrize("source", HOSTILE)
def test_templates_stay_in_the_sandbox(source):
    with pytest.raises((DataError, CannotRender)) as refused:
        ChatTemplate(source, {}, "hostile").render(SINGLE)
    assert "\n" not in str(refused.value)
    assert SINGLE[0]["content"] == "What is 2 + 3?"


def test_a_template_that_reaches_out_is_an_error_of_the_data():
    with pytest.raises(DataError, match=r"^chat template hostile: tries what no template may"):
        ChatTemplate("{{ messages.append(1) }}", {}, "hostile").render(SINGLE)


def test_a_template_that_is_none_is_refused_with_its_line():
    with pytest.raises(DataError, match=r"^chat template broken: line 2: "):
        ChatTemplate("\n{% for %}", {}, "broken")


def test_r1_zero_has_the_prompts_of_reinforcement_learning():
    template = chat_template(small_tokenizer(), R1_ZERO, "r1_zero")
    rendered = template.render(SINGLE)
    assert rendered.text == "<|bos|>" + fill_template("What is 2 + 3?") + "5, I think.<|eos|>"
    assert rendered.text[slice(*rendered.responses[0])] == "5, I think.<|eos|>"
    assert template.render(SINGLE[:1], add_generation_prompt=True).text == "<|bos|>" + fill_template("What is 2 + 3?")
    with pytest.raises(CannotRender, match="r1_zero"):
        template.render(SEVERAL)


DATED = [
    "{%- set today = strftime_now('%d %B %Y') -%}Today is {{ today }}.",
    "{{ strftime_now('%Y-%m-%d') }}",
    "{%- set date_string = strftime_now('%d %b %Y') if strftime_now is defined else '26 Jul 2024' %}{{ date_string }}",
    "{%- macro head() %}Date: {{ strftime_now('%A, %j %U') }}{%- endmacro %}{{ head() }}",
    "{% if not day is defined %}{% set day = strftime_now(format='%B %d, %Y') %}{% endif %}[{{ day }}]",
    "{% for m in messages %}{% if loop.first %}{{ strftime_now('%y%m%d') }}{% endif %}{{ m.content }}{% endfor %}",
]


@pytest.mark.parametrize("source", DATED)
def test_a_template_knows_the_day_of_the_run(theirs, source):
    options = {"chat_template": source.replace("format=", ""), "tokenize": False}
    before = datetime.date.today().isoformat()
    expected = theirs.apply_chat_template(SINGLE, **options)
    if before == datetime.date.today().isoformat():
        found = ChatTemplate(options["chat_template"], {}, "dated", before).render(SINGLE)
        assert found.text == expected
    fixed = ChatTemplate(options["chat_template"], {}, "dated", "2001-02-03").render(SINGLE).text
    assert any(
        day in fixed for day in ("03 February 2001", "2001-02-03", "03 Feb 2001", "Saturday, 034", "y 03, 2", "010203")
    )


@pytest.mark.parametrize("source", DATED)
def test_a_template_that_needs_a_day_is_refused_as_a_template(source):
    template = ChatTemplate(source, {}, "dated")
    if "is defined else" in source:  # it has a day of its own
        assert template.render(SINGLE).text == "26 Jul 2024"
        return
    with pytest.raises(DataError, match=r"^chat template dated: needs a date .*set template_date=YYYY-MM-DD"):
        template.render(SINGLE)


def test_a_day_that_no_template_reads_is_refused():
    with pytest.raises(DataError, match="reads no date, and template_date=2001-02-03"):
        ChatTemplate(CHAT_TEMPLATE, {}, "test", "2001-02-03")
    for day in ("today", "2001-2-3", "2001-02-30"):
        for config in (SftConfig, RolloutConfig):
            with pytest.raises(ConfigError, match=f"^template_date={day}: must be a day"):
                config(template_date=day)
