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
WHOLE = "user:What is 2 + 3? assistant:5, I think."
GOOD = [
    ({"prompt": "a", "response": "b"}, "user:a assistant:b"),
    ({"prompt": "a", "response": "b", "system": "s", "other": 1}, "system:s user:a assistant:b"),
    ({"messages": SINGLE}, WHOLE),
    ({"messages": [{**message, "tool_calls": None} for message in SINGLE]}, WHOLE),
    ({"messages": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, "user:a assistant:b"),
    ({"messages": [{**message, "tool_calls": [], "name": "", "weight": None} for message in SINGLE]}, WHOLE),
    ({"system": "s", "messages": SINGLE}, f"system:s {WHOLE}"),
    ({"system": "s", "messages": [{"role": "system", "content": "s"}, *SINGLE]}, f"system:s {WHOLE}"),
    ({"messages": SINGLE, "images": [], "tools": None, "prompt": "again", "score": 3}, WHOLE),
    ({"prompt": "a", "response": "b", "input": "", "history": [], "system": ""}, "user:a assistant:b"),
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
    ({"messages": SINGLE, "images": ["a.png"]}, "has images"),
    ({"messages": SINGLE, "chat_template_kwargs": {"thinking": True}}, "has chat_template_kwargs"),
    ({"messages": [SINGLE[0], {**SINGLE[1], "tool_calls": [{"id": 1}]}]}, "message 2 has tool_calls"),
    ({"messages": [SINGLE[0], {**SINGLE[1], "function_call": {"name": "f"}}]}, "message 2 has function_call"),
    ({"system": "other", "messages": SEVERAL}, "has system and a message of the role system"),
    ({"system": ["s"], "messages": SINGLE}, "system is not text"),
    ({"prompt": "a", "response": "b", "input": "c"}, "has input, which nothing reads"),
    ({"prompt": "a", "response": "b", "history": [["c", "d"]]}, "has history, which nothing reads"),
    ({"messages": [SINGLE[0], {**SINGLE[1], "weight": 0.5}]}, "message 2: weight is 0.5, and must be 0 or 1"),
    ({"messages": [SINGLE[0], {**SINGLE[1], "loss": "0"}]}, "message 2: loss is '0', and must be 0 or 1"),
    ({"messages": [SINGLE[0], {**SINGLE[1], "loss": 0, "weight": 1}]}, "message 2 has a weight and a loss that differ"),
    ({"messages": [{**SINGLE[0], "weight": 1}, SINGLE[1]]}, "message 1 has the role user, and only responses"),
    ({"messages": [SINGLE[0], {**SINGLE[1], "weight": 0}]}, "has no response to train on"),
    ({"messages": [SINGLE[0], {**SINGLE[1], "in_loss": True}]}, "message 2 has the unknown field in_loss"),
]


@pytest.mark.parametrize(("row", "expected"), GOOD)
def test_rows_that_are_conversations(row, expected):
    messages = conversation_of(row, SOURCE)
    assert " ".join(f"{m['role']}:{m['content']}" for m in messages) == expected
    prompted = conversation_of(row, SOURCE, "be good")
    assert prompted[0]["content"] == ("s" if row.get("system") else "be good") and prompted[1:] == messages[-2:]
    assert all(message.keys() == {"role", "content"} for message in messages)


@pytest.mark.parametrize(("row", "reason"), BAD)
def test_rows_without_a_conversation_are_refused_with_the_reason(row, reason):
    with pytest.raises(BadRow) as refused:
        conversation_of(row, SOURCE)
    assert str(refused.value).startswith(reason)


def flagged(**flags) -> list:
    """A conversation of three turns; `a1={"weight": 0}` marks the first response."""
    row = [{"role": "user" if n % 2 == 0 else "assistant", "content": f"{'qa'[n % 2]}{n // 2}"} for n in range(6)]
    marked = [{**message, **flags.get(message["content"], {})} for message in row]
    return conversation_of({"messages": marked}, SOURCE)


UNLEARNED = [
    ({"weight": 0}, {"weight": 1}),
    ({"weight": 0.0}, {}),
    ({"loss": 0}, {"loss": 1}),
    ({"loss": False}, {"loss": True}),
    ({"weight": 0, "loss": False}, {"weight": None}),
]


@pytest.mark.parametrize("source", [CHAT_TEMPLATE, QWEN, QWEN_MARKED])
@pytest.mark.parametrize(("out", "kept"), UNLEARNED)
def test_a_response_that_its_row_marks_is_not_in_the_loss(source, out, kept):
    end = "<|eos|>" if source == CHAT_TEMPLATE else "<|im_end|>"
    [(_, text)] = encoded(flagged(), source)
    for unlearned in ("a0", "a1", "a2"):
        marks = {name: out if name == unlearned else kept for name in ("a0", "a1", "a2")}
        others = [f"{name}{end}" for name in ("a0", "a1", "a2") if name != unlearned]
        [(in_loss, whole)] = encoded(flagged(**marks, q0={"weight": 0}), source)
        # Nothing is learned after the last response that is, so nothing stands there.
        assert in_loss == others and text.startswith(whole)
        assert [one for one, _ in encoded(flagged(**marks), source, "each")] == [[other] for other in others]
    assert encoded(flagged(a0=out), source, "last") == encoded(flagged(), source, "last")
    assert "sft.loss_on=last trains on no other" in encoded(flagged(a2=out), source, "last")


THINKING = QWEN_MARKED.replace(
    "{{- message['content'] + '<|im_end|>' }}{%- endg",
    "{%- if message.reasoning_content is string %}"
    "{{- '<think>\\n' + message.reasoning_content.strip() + '\\n</think>\\n\\n' }}{%- endif %}"
    "{{- message['content'] + '<|im_end|>' }}{%- endg",
)
LATEST = QWEN.replace(
    "'\\n' + message['content']",
    "'\\n' + (('<think>' + message.get('thinking', '') + '</think>')"
    " if loop.last and message.role == 'assistant' else '') + message['content']",
)


def test_reasoning_beside_the_content_is_learned_where_the_template_writes_it():
    messages = [SINGLE[0], {**SINGLE[1], "reasoning_content": " 2 + 3\nis 5 "}]
    [(in_loss, _)] = encoded(messages, THINKING)
    assert in_loss == ["<think>\n2 + 3\nis 5\n</think>\n\n5, I think.<|im_end|>"]
    several = [*messages, SINGLE[0], {**SINGLE[1], "thinking": "again 5"}]
    assert "message 2 has the field reasoning_content" in encoded(several, LATEST)
    several[1] = {**SINGLE[1], "thinking": "is 5"}
    assert "message 4: needs sft.loss_on=each" in encoded(several, LATEST)
    first, second = encoded(several, LATEST, "each")
    assert first[0] == ["<think>is 5</think>5, I think.<|im_end|>"]
    assert second[0] == ["<think>again 5</think>5, I think.<|im_end|>"]
    forgetful = THINKING.replace("is string", "is string and loop.last")
    several = [*messages, *messages]
    assert "leaves out the reasoning_content of a response: needs sft.loss_on=each" in encoded(several, forgetful)
    assert [one for one, _ in encoded(several, forgetful, "each")] == [in_loss, in_loss]


@pytest.mark.parametrize("loss_on", ["all", "last", "each"])
@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking", "name", "train", "masked", "extra"])
def test_a_field_that_the_template_does_not_read_refuses_the_row(name, loss_on):
    messages = [SINGLE[0], {**SINGLE[1], name: "x"}]
    for source in (CHAT_TEMPLATE, QWEN, QWEN_MARKED):
        assert (
            encoded(messages, source, loss_on)
            == f"message 2 has the field {name}, which the chat template does not read"
        )


def test_reasoning_beside_a_verbatim_response_refuses_the_row():
    messages = [SINGLE[0], {**SINGLE[1], "reasoning_content": "x"}]
    assert "response_text=verbatim would leave out" in encoded(messages, THINKING, "all", "verbatim")


def test_keys_go_by_content_and_seed():
    assert key_of(SINGLE, 1) == key_of([dict(message) for message in SINGLE], 1)
    assert len({key_of(SINGLE, 1), key_of(SINGLE, 2), key_of(SEVERAL, 1)}) == 3
