"""Where responses end: the tokens with which templates close them, those of generation_config.json, the tokenizer's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from megatron_r1.config.sft import SftConfig
from megatron_r1.data.chat.closing import closing_tokens, is_closed
from megatron_r1.data.chat.encode import ChatEncoder, chat_template, control_tokens
from megatron_r1.data.chat.prompt_format import PromptFormatter
from megatron_r1.data.chat.render import R1_ZERO
from megatron_r1.data.chat.store import inference_tokenizer
from megatron_r1.data.preference.policy_encoder import PolicyPairEncoder
from megatron_r1.data.preference_example import LabelledResponse, PreferenceExample
from megatron_r1.data.tokenizer import CHAT_TEMPLATE, Tokenizer, response_text
from megatron_r1.errors import ConfigError, DataError
from tests.support.chats import QWEN, QWEN_MARKED, REASONING, small_tokenizer

LLAMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content"
    " | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
GEMMA = (
    "{% for m in messages %}{{ '<start_of_turn>' + m.role + '\\n' + m.content + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
ENDLESS = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
MARKED_BEFORE_ITS_END = QWEN_MARKED.replace(
    "message['content'] + '<|im_end|>' }}{%- endgeneration %}",
    "message['content'] }}{%- endgeneration %}{{- '<|im_end|>' }}",
)
CLOSED = {
    "qwen": (QWEN, ["<|im_end|>"]),
    "marked": (QWEN_MARKED, ["<|im_end|>"]),
    "marked before its end": (MARKED_BEFORE_ITS_END, ["<|im_end|>"]),
    "the tokenizer's own": (CHAT_TEMPLATE, ["<|eos|>"]),
    "without reasoning": (REASONING, ["<|eos|>"]),
    "r1_zero": (R1_ZERO, ["<|eos|>"]),
    "llama": (LLAMA, ["<|eot_id|>"]),
    "gemma": (GEMMA, ["<end_of_turn>"]),
    "two ends": (QWEN + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}", ["<|im_end|>", "<|eos|>"]),
    "endless": (ENDLESS, []),
    "refuses": ("{{ raise_exception('no') }}", []),
}


@pytest.fixture(scope="module")
def words() -> Tokenizer:
    """The small tokenizer with the control tokens of several templates; Gemma's is not special."""
    backend = Backend.from_str(small_tokenizer().backend.to_str())
    backend.add_special_tokens([AddedToken(t, special=True) for t in ("<|eot_id|>", "<|start_header_id|>")])
    backend.add_tokens([AddedToken("<end_of_turn>", special=False)])
    return Tokenizer(backend, small_tokenizer().settings)


@pytest.mark.parametrize("name", CLOSED)
def test_the_tokens_that_close_a_response(name: str, words: Tokenizer, tmp_path: Path) -> None:
    source, expected = CLOSED[name]
    control = control_tokens(words.stopping_at([words.id("<end_of_turn>")]))
    assert closing_tokens(chat_template(words, source, name), control) == expected
    assert is_closed(chat_template(words, source, name), control) == (name not in ("endless", "marked before its end"))


@pytest.mark.parametrize("name", [name for name in CLOSED if name != "refuses"])
def test_prompts_of_a_template_stop_at_its_ends_and_the_tokenizers(name: str, words: Tokenizer, tmp_path: Path) -> None:
    source, expected = CLOSED[name]
    (tmp_path / "template.jinja").write_text(source)
    tokenizer = words.stopping_at([words.id("<end_of_turn>")]) if name == "gemma" else words
    formatter = PromptFormatter(tokenizer, str(tmp_path / "template.jinja"))
    ends = [words.id(text) for text in expected]
    assert set(formatter.tokenizer.stop_tokens) == {words.eos, *ends}
    assert formatter.end == [*ends, words.eos][0]
    pair = PreferenceExample("sum", LabelledResponse("2 + 3?", "5"), LabelledResponse("2 + 3?", "6"))
    example = PolicyPairEncoder(formatter).example(pair)
    assert [sequence.tokens[-1] for sequence in example.sequences] == [formatter.end] * 2


def test_a_response_is_read_without_what_ends_it(words: Tokenizer) -> None:
    """Special or not: text that a reward reads holds no end token."""
    end = words.id("<end_of_turn>")
    tokens = words.encode("5 apples")
    assert response_text([*tokens, end], words) == "5 apples<end_of_turn>"
    assert response_text([*tokens, end], words.stopping_at([end])) == response_text(tokens, words) == "5 apples"
    assert response_text([], words) == ""


@pytest.mark.parametrize("name", ["endless", "marked before its end"])
def test_a_template_that_ends_no_response_is_refused_in_fine_tuning(
    name: str, words: Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / "template.jinja").write_text(CLOSED[name][0])
    settings = SftConfig(chat_template=str(tmp_path / "template.jinja"))
    with pytest.raises(ConfigError, match=r"sft\.chat_template=.*must close a response") as error:
        inference_tokenizer(settings, words)
    assert "\n" not in str(error.value)
    verbatim = SftConfig(chat_template=str(tmp_path / "template.jinja"), response_text="verbatim")
    assert inference_tokenizer(verbatim, words).settings["chat_template"] == CLOSED[name][0]


def test_fine_tuning_leaves_a_tokenizer_that_ends_as_the_template(words: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "template.jinja").write_text(QWEN)
    after = inference_tokenizer(SftConfig(chat_template=str(tmp_path / "template.jinja")), words)
    after.save(tmp_path / "saved")
    again = Tokenizer.load(tmp_path / "saved")
    assert again.stop_tokens == after.stop_tokens == (words.eos, words.id("<|im_end|>"))
    assert again.settings["chat_template"] == QWEN and again.eos == words.eos


def test_a_verbatim_response_ends_as_the_template_ends_it(words: Tokenizer) -> None:
    encoder = ChatEncoder(words, chat_template(words, QWEN, "qwen"), "last", "verbatim")
    ((example,),) = encoder.encode([[{"role": "user", "content": "2?"}, {"role": "assistant", "content": "3"}]])
    learned = [token for token, in_loss in zip(example.tokens, example.loss_mask, strict=True) if in_loss]
    assert learned[-1] == words.id("<|im_end|>")


def saved(folder: Path, words: Tokenizer, generation: object = None, config: object = None) -> Path:
    words.save(folder)
    for name, content in (("generation_config.json", generation), ("config.json", config)):
        if content is not None:
            (folder / name).write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("generation", "config", "ends"),
    [
        (None, None, ["<|eos|>"]),
        ({"eos_token_id": "<|im_end|>"}, None, ["<|eos|>", "<|im_end|>"]),
        ({"eos_token_id": ["<|im_end|>", "<|eot_id|>"]}, None, ["<|eos|>", "<|im_end|>", "<|eot_id|>"]),
        ({"eos_token_id": ["<|im_end|>", "<|eos|>"]}, {"eos_token_id": "<|eot_id|>"}, ["<|eos|>", "<|im_end|>"]),
        ({"temperature": 0.6}, {"eos_token_id": ["<|eot_id|>"]}, ["<|eos|>", "<|eot_id|>"]),
        (None, {"eos_token_id": "<|im_end|>"}, ["<|eos|>", "<|im_end|>"]),
        ({"eos_token_id": None}, {"eos_token_id": None}, ["<|eos|>"]),
    ],
)
def test_end_tokens_of_a_folder(generation, config, ends: list[str], words: Tokenizer, tmp_path: Path) -> None:
    def ids(content: dict | None) -> dict | None:
        """With ids for the tokens."""
        named = (content or {}).get("eos_token_id")
        found = [words.id(name) for name in named] if isinstance(named, list) else words.id(named) if named else None
        return content and (content | {"eos_token_id": found} if "eos_token_id" in content else content)

    loaded = Tokenizer.load(saved(tmp_path / "folder", words, ids(generation), ids(config)))
    assert [loaded.decode([token]) for token in loaded.stop_tokens] == ends
    loaded.save(tmp_path / "again")
    again = Tokenizer.load(tmp_path / "again")
    assert again.stop_tokens == loaded.stop_tokens and again.generation == loaded.generation


@pytest.mark.parametrize(
    ("end", "message"),
    [
        ("ordinary", "must be a control token of the tokenizer, not the ordinary"),
        (100_000, "eos_token_id=100000: must be a control token of the tokenizer, it has no such token"),
        (-1, "eos_token_id=-1: "),
        ("<|im_end|>", "eos_token_id=<|im_end|>: "),
        ([[2]], r"eos_token_id=\[2\]: "),
    ],
)
def test_an_end_token_that_ends_nothing_is_refused(end, message: str, words: Tokenizer, tmp_path: Path) -> None:
    end = words.encode("7")[0] if end == "ordinary" else end
    with pytest.raises(DataError, match=message.replace("|", "\\|")) as error:
        Tokenizer.load(saved(tmp_path / "folder", words, {"eos_token_id": end}))
    assert "\n" not in str(error.value)


def test_companions_go_where_the_tokenizer_goes(words: Tokenizer, tmp_path: Path) -> None:
    folder = saved(tmp_path / "folder", words, {"temperature": 0.6, "top_k": 20})
    contents = {
        "special_tokens_map.json": b"{}",
        "LICENSE.txt": b"free",
        "additional_chat_templates/rag.jinja": b"{{ 1 }}",
    }
    for name, content in contents.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    Tokenizer.load(folder).stopping_at([words.id("<|im_end|>")]).with_template(QWEN).save(tmp_path / "again")
    assert {name: (tmp_path / "again" / name).read_bytes() for name in contents} == contents
    settings = json.loads((tmp_path / "again/generation_config.json").read_text())
    assert settings == {"temperature": 0.6, "top_k": 20, "eos_token_id": [words.eos, words.id("<|im_end|>")]}
