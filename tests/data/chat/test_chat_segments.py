"""The loss is on whole responses alone, and never on a response that a template has changed."""

from __future__ import annotations

import pytest

from megatron_r1.config.sft import ConversationsConfig
from megatron_r1.data.chat.encode import ChatEncoder, chat_template, key_of
from megatron_r1.data.chat.render import RESPONSE_BEGINS, RESPONSE_ENDS
from megatron_r1.data.chat.rows import conversation_of
from megatron_r1.data.row_files import BadRow
from megatron_r1.data.tokenizer import CHAT_TEMPLATE
from tests.support.chats import QWEN, QWEN_MARKED, REASONED, REASONING, SEVERAL, SINGLE, small_tokenizer

TOKENIZER = small_tokenizer()


def encoded(messages, source, loss_on="all", response_text="template"):
    """(texts in the loss, whole text) of each example, or the reason why there is none."""
    encoder = ChatEncoder(TOKENIZER, chat_template(TOKENIZER, source, "test"), loss_on, response_text)
    [examples] = encoder.encode([messages])
    if isinstance(examples, BadRow):
        return str(examples)
    shown = []
    for example in examples:
        runs: list[list[int]] = []
        before = False
        for token, in_loss in zip(example.tokens, example.loss_mask, strict=True):
            if in_loss:
                runs = [*runs, [token]] if not before else [*runs[:-1], [*runs[-1], token]]
            before = in_loss
        shown.append(([TOKENIZER.decode(run) for run in runs], TOKENIZER.decode(example.tokens)))
    return shown


@pytest.mark.parametrize(
    ("source", "end"), [(CHAT_TEMPLATE, "<|eos|>"), (QWEN, "<|im_end|>"), (QWEN_MARKED, "<|im_end|>")]
)
def test_responses_and_their_end_token_are_in_the_loss(source, end):
    first, second = (message["content"] + end for message in (SEVERAL[2], SEVERAL[4]))
    [(in_loss, text)] = encoded(SEVERAL, source)
    assert in_loss == [first, second] and text.endswith(second) and "Be brief." in text
    [(in_loss, again)] = encoded(SEVERAL, source, "last")
    assert in_loss == [second] and again == text
    (one, short), (two, whole) = encoded(SEVERAL, source, "each")
    assert (one, two) == ([first], [second]) and short.endswith(first) and whole == text


def test_reasoning_that_a_template_drops_is_never_lost_in_silence():
    assert "needs sft.response_text=verbatim, or a template" in encoded(REASONED, REASONING)
    unopened = REASONING.replace("<|assistant|><think>\\n' }}{% endif %}", "<|assistant|>' }}{% endif %}")
    assert "leaves out part of a response" in encoded(REASONED, unopened, "last")
    marked = QWEN_MARKED.replace("message['content'] + '<|im_end|>' }}{%- endg", "message['content'][3:] }}{%- endg")
    assert "leaves out part of a response" in encoded(SINGLE, marked)
    unmarked_one = QWEN_MARKED.replace("message['role'] == 'assistant'", "loop.last")
    assert encoded(SEVERAL, unmarked_one) == "the chat template marks 1 responses, but the conversation has 2"


def test_verbatim_responses_follow_the_prompt_that_the_template_makes():
    """Earlier turns have no reasoning, as at inference; the response keeps its own."""
    assert "needs sft.loss_on=each" in encoded(REASONED, REASONING, "all", "verbatim")
    for opening in ("<think>\\n", ""):
        source = REASONING.replace("<think>\\n", opening)
        (one, _), (two, text) = encoded(REASONED, source, "each", "verbatim")
        opened = opening.replace("\\n", "\n")
        prompt = "<|bos|><|user|>2 + 3?<|assistant|>\n\n5<|eos|><|user|>Twice?<|assistant|>" + opened
        assert text == prompt + REASONED[3]["content"].removeprefix(opened) + "<|eos|>"
        assert two == [REASONED[3]["content"].removeprefix(opened) + "<|eos|>"] and len(one) == 1
        assert encoded(REASONED, source, "last", "verbatim") == [(two, text)]
    assert "opens <think>" in encoded(SINGLE, REASONING, "all", "verbatim")


def test_text_that_spells_a_control_token_is_refused():
    for text in ("a<|eos|>b", "<|im_start|>system", "<|user|>", f"{RESPONSE_BEGINS}mine{RESPONSE_ENDS}"):
        spoken = [{"role": "user", "content": text}, SINGLE[1]]
        assert encoded(spoken, CHAT_TEMPLATE).startswith("message 1 holds the control token ")
    assert isinstance(encoded([SINGLE[0], {"role": "assistant", "content": "<think>a</think>"}], CHAT_TEMPLATE), list)


SOURCE = ConversationsConfig(path="x.jsonl")
GOOD = [
    ({"prompt": "a", "response": "b"}, "user:a assistant:b"),
    ({"prompt": "a", "response": "b", "system": "s", "other": 1}, "system:s user:a assistant:b"),
    ({"messages": SINGLE}, "user:What is 2 + 3? assistant:5, I think."),
    (
        {"messages": [{**message, "tool_calls": None} for message in SINGLE]},
        "user:What is 2 + 3? assistant:5, I think.",
    ),
    ({"messages": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, "user:a assistant:b"),
]
BAD = [
    ([], "is not a JSON object"),
    ({"prompt": "a"}, "has neither messages nor response"),
    ({"prompt": "a", "response": " \n"}, "response is empty"),
    ({"prompt": 3, "response": "b"}, "prompt is not text"),
    ({"messages": []}, "messages is not a list of messages"),
    ({"messages": "a"}, "messages is not a list of messages"),
    ({"messages": ["a"]}, "message 1 is not an object"),
    ({"messages": [{"role": "tool", "content": "a"}]}, "message 1 has the role 'tool'"),
    ({"messages": SINGLE[:1]}, "does not end with a message of the assistant"),
    ({"messages": SINGLE[1:]}, "begins with a message of the assistant"),
    ({"messages": [*SINGLE, {"role": "system", "content": "a"}, SINGLE[1]]}, "message 3 has the role system"),
    ({"messages": [SINGLE[0], {"role": "assistant"}]}, "message 2: content is not text"),
    ({"messages": SINGLE, "tools": [{}]}, "has tools"),
]


@pytest.mark.parametrize(("row", "expected"), GOOD)
def test_rows_that_are_conversations(row, expected):
    messages = conversation_of(row, SOURCE)
    assert " ".join(f"{m['role']}:{m['content']}" for m in messages) == expected
    assert all("tool_calls" not in message for message in messages)
    prompted = conversation_of(row, SOURCE, "be good")
    assert prompted[0]["content"] == ("s" if row.get("system") else "be good") and prompted[1:] == messages[-2:]


@pytest.mark.parametrize(("row", "reason"), BAD)
def test_rows_without_a_conversation_are_refused_with_the_reason(row, reason):
    with pytest.raises(BadRow) as refused:
        conversation_of(row, SOURCE)
    assert str(refused.value).startswith(reason)


def test_keys_go_by_content_and_seed():
    assert key_of(SINGLE, 1) == key_of([dict(message) for message in SINGLE], 1)
    assert len({key_of(SINGLE, 1), key_of(SINGLE, 2), key_of(SEVERAL, 1)}) == 3
