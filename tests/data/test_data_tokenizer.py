"""The tokenizer's promises, and that transformers reads its files as we do."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r1.config.data import DataConfig
from megatron_r1.data.prompts.prompts import TrainingPrompts
from megatron_r1.data.synthetic.arithmetic import worked_documents
from megatron_r1.data.synthetic.train_tokenizer import train_tokenizer
from megatron_r1.data.template import fill_template
from megatron_r1.data.tokenizer import ADDED, ROLES, TAGS, Tokenizer
from megatron_r1.errors import DataError

CONFIG = DataConfig(num_documents=3000)
TOKENIZER = train_tokenizer(CONFIG)
RESPONSES = [
    "<think>a</think> <answer>1</answer>",
    " 14",
    "14",
    "= 14",
    "\n",
    "\n\n14",
    ". Assistant:",
    " A: 2",
    "",
    "\u7b54\uff1a7",
]


def test_vocabulary_is_within_its_size_and_dense():
    assert TOKENIZER.vocab_size <= CONFIG.vocab_size
    assert sorted(TOKENIZER.backend.get_vocab().values()) == list(range(TOKENIZER.vocab_size))
    assert (TOKENIZER.pad, TOKENIZER.bos, TOKENIZER.eos) == (0, 1, 2)


@pytest.mark.parametrize("vocab_size", [512, 1024])
def test_template_is_short(vocab_size):
    tokenizer = train_tokenizer(DataConfig(num_documents=3000, vocab_size=vocab_size))
    length = len(tokenizer.encode(fill_template("")))
    print(f"the template costs {length} tokens at vocabulary {vocab_size}")
    assert length <= 25 < 48
    assert tokenizer.vocab_size <= vocab_size


def test_numbers_are_single_tokens():
    assert all(len(TOKENIZER.encode(str(number))) == 1 for number in range(200))
    assert all(len(TOKENIZER.encode(f"{n} + {n} = {n}")) == 5 for n in (0, 10, 110, 101, 199))


def test_documents_are_compact():
    texts = [document.response for document in worked_documents(CONFIG)]
    lengths = [len(ids) for ids in TOKENIZER.encode_batch(texts)]
    assert sum(lengths) / len(lengths) < 16
    assert TOKENIZER.encode_batch(texts[:20]) == [TOKENIZER.encode(text) for text in texts[:20]]


@settings(deadline=None, max_examples=300)
@given(st.text())
def test_any_text_survives(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@settings(deadline=None, max_examples=300)
@given(
    st.lists(
        st.sampled_from(
            [*TAGS, *ROLES, *ADDED[:3], " ", "1", "999", "\n", "\u7b54", "Assistant:", "  ", "\\", "e\u0301"]
        )
    )
)
def test_any_mixture_of_tokens_survives(parts):
    text = "".join(parts)
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_documents_may_be_tokenised_in_two_parts():
    for document in worked_documents(CONFIG):
        prompt, response = document.prompt, document.response
        assert TOKENIZER.encode(prompt) + TOKENIZER.encode(response) == TOKENIZER.encode(prompt + response)


@settings(deadline=None, max_examples=200)
@given(st.text() | st.sampled_from(RESPONSES), st.integers(0, 200))
def test_a_prompt_and_any_response_may_be_tokenised_separately(response, index):
    for prompt in (
        fill_template(TrainingPrompts(CONFIG).at(index).question),
        "Q: What is 1 + 2 * 3?\nA: ",
        "\u95ee\uff1a1\n\u7b54\uff1a",
        "1 + 2 * 3\n",
    ):
        assert TOKENIZER.encode(prompt) + TOKENIZER.encode(response) == TOKENIZER.encode(prompt + response)


def test_tags_outlive_skipping_and_special_tokens_do_not():
    assert TOKENIZER.bos is not None
    text = TOKENIZER.encode("<|user|>2<think>3</think> <answer>4</answer>")
    ids = [TOKENIZER.bos, *text, TOKENIZER.eos, TOKENIZER.pad]
    assert TOKENIZER.decode(ids, skip_special=True) == "2<think>3</think> <answer>4</answer>"
    assert TOKENIZER.decode(ids) == "<|bos|><|user|>2<think>3</think> <answer>4</answer><|eos|><|pad|>"


def test_training_repeats(tmp_path):
    assert train_tokenizer(CONFIG).backend.to_str() == TOKENIZER.backend.to_str()


def test_save_and_load(tmp_path):
    TOKENIZER.save(tmp_path / "tokenizer")
    loaded = Tokenizer.load(tmp_path / "tokenizer")
    text = fill_template("What is 2 + 3 * 4?") + "<think>\u5148\u7b97</think> \U0001f600 1234567"
    assert loaded.encode(text) == TOKENIZER.encode(text)
    assert (loaded.vocab_size, loaded.eos) == (TOKENIZER.vocab_size, TOKENIZER.eos)


def test_transformers_reads_the_same_tokenizer(tmp_path):
    from transformers import AutoTokenizer

    TOKENIZER.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    texts = [document.prompt + document.response for document in worked_documents(DataConfig(num_documents=500))]
    texts += ["", " ", "a  b .", "199 1234567", "\u00e9\u4f60\U0001f600", "<|user|>x<think>", "don't , stop ."]
    for text in texts:
        ids = TOKENIZER.encode(text)
        assert theirs.encode(text) == ids
        assert theirs.decode(ids) == text == TOKENIZER.decode(ids)
        assert theirs.decode(ids, skip_special_tokens=True) == TOKENIZER.decode(ids, skip_special=True)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (
        TOKENIZER.bos,
        TOKENIZER.eos,
        TOKENIZER.pad,
    )
    assert len(theirs) == TOKENIZER.vocab_size


def test_chat_template(tmp_path):
    from transformers import AutoTokenizer

    TOKENIZER.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    prompt = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert prompt == "<|bos|><|system|>s<|user|>q<|assistant|>"
    with_response = theirs.apply_chat_template([*chat, {"role": "assistant", "content": "a"}], tokenize=False)
    assert with_response == prompt + "a<|eos|>"
    ids = theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert ids == TOKENIZER.encode(prompt)


def test_missing_damaged_and_foreign_files_are_named(tmp_path):
    with pytest.raises(DataError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="is not a tokenizer file"):
        Tokenizer.load(tmp_path)
    with pytest.raises(DataError, match="vocabulary"):
        TOKENIZER.id("<nothing>")


def test_the_byte_order_marks_of_its_files_are_no_part_of_them(tmp_path):
    TOKENIZER.save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    for file in tmp_path.iterdir():
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    loaded = Tokenizer.load(tmp_path)
    assert loaded.fingerprint() == TOKENIZER.fingerprint() and loaded.settings["chat_template"] == "{{ messages }}"
