"""The journal gives back what was written, or says that it cannot."""

import math
from dataclasses import replace

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_r1.errors import DataError
from megatron_r1.rollout.journal import FlatResponses, Journal
from megatron_r1.rollout.sample import Sample
from tests.support.samples import make_response, make_sample

SAMPLES = [
    make_sample(
        prompt_tokens=(1, 2, 3), response_tokens=(4, 5), logprobs=(-math.pi, -1e-300), weight_version="v1",
        text="4 5\u2028\n\x00", reward=1.1, reward_parts={"format": 0.1},
    ),
    make_sample(response_tokens=(6,), logprobs=(-0.1,), finish_reason="length", text="\u4e94"),
]  # fmt: skip


@st.composite
def samples(draw) -> Sample:
    count = draw(st.integers(1, 5))
    tokens = st.integers(0, 2**31 - 1)
    return make_sample(
        prompt_id=draw(st.text(st.characters(exclude_categories=["Cs"]))),
        group=draw(st.integers(0, 2**40)),
        prompt_tokens=tuple(draw(st.lists(tokens, max_size=5))),
        response_tokens=tuple(draw(st.lists(tokens, min_size=count, max_size=count))),
        logprobs=tuple(draw(st.lists(st.floats(-(2.0**100), 0.0, width=32), min_size=count, max_size=count))),
        weight_version=draw(st.text("abc-123")),
        finish_reason=draw(st.sampled_from(["stop", "length"])),
        text=draw(st.text(st.characters(exclude_categories=["Cs"]))),
        reward=draw(st.floats(allow_nan=False, allow_infinity=False)),
        in_loss=draw(st.booleans()),
        version_changes=tuple(
            (index, draw(st.text("ab"))) for index in sorted(draw(st.sets(st.integers(0, count - 1)))) if index
        ),
        steps=tuple(
            (index, draw(st.floats(allow_nan=False, allow_infinity=False)))
            for index in sorted(draw(st.lists(st.integers(0, count - 1), max_size=3)))
        ),
        reward_parts=draw(st.dictionaries(st.text("abc"), st.floats(allow_nan=False, allow_infinity=False))),
    )


@settings(deadline=None, max_examples=100)
@given(st.lists(samples(), max_size=4))
def test_samples_come_back_equal(tmp_path_factory, written):
    journal = Journal(tmp_path_factory.mktemp("journal"))
    journal.write(3, written)
    read = journal.read(3)
    assert read is not None and read == written
    for found, expected in zip(read, written, strict=True):  # -0.0 and types too
        assert str(found) == str(expected)
        assert found.response.logprobs.tobytes() == expected.response.logprobs.tobytes()


def test_absent_step_is_none_and_a_step_can_be_written_again(tmp_path):
    journal = Journal(tmp_path / "deep" / "journal")
    assert journal.read(1) is None
    journal.write(1, SAMPLES)
    journal.write(1, SAMPLES[:1])
    assert journal.read(1) == SAMPLES[:1]
    assert [path.name for path in journal.folder.iterdir()] == ["step-00000001.rollout"]


@pytest.mark.parametrize("notes", [None, {"prompts": 7}])
def test_every_torn_or_changed_file_is_refused(tmp_path, notes):
    journal = Journal(tmp_path)
    path = journal.write(1, SAMPLES, notes)
    whole = path.read_bytes()
    damaged = [whole[:length] for length in range(len(whole))]
    damaged += [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in range(len(whole))]
    damaged += [whole + b"\n", whole[:-32], b"null\n", b"[]\n", b"{}\n"]
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(DataError, match="step-00000001.rollout"):
            journal.read(1)
    path.write_bytes(whole)
    assert journal.read_all(1) == (SAMPLES, notes or {})


def test_file_of_another_step_is_refused(tmp_path):
    journal = Journal(tmp_path)
    journal.write(1, SAMPLES).rename(tmp_path / "step-00000002.rollout")
    with pytest.raises(DataError, match="of step 1"):
        journal.read(2)


def test_crash_before_the_rename_leaves_the_step_absent(tmp_path, monkeypatch):
    def crash(descriptor: int) -> None:
        raise OSError("no space left")

    journal = Journal(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr("megatron_r1.files.os.fsync", crash)
        journal.write(1, SAMPLES)
    assert Journal(tmp_path).read(1) is None
    assert list(tmp_path.iterdir()) == []


def test_prune_removes_what_is_before(tmp_path):
    journal = Journal(tmp_path)
    for step in (1, 2, 10):
        journal.write(step, SAMPLES)
    journal.prune(before_step=2)
    assert journal.steps() == [2, 10]


def by_weights(version: int, changed: int = 0) -> list[Sample]:
    """The samples of a rollout; some tokens of one are by newer weights where `changed` names them."""
    one = replace(SAMPLES[0], weight_version=f"{version}", version_changes=((1, f"{changed}"),) if changed else ())
    return [one, replace(SAMPLES[1], weight_version=f"{version}")]


@pytest.mark.parametrize(
    ("at", "removed"),
    [
        (7, []),  # all of its rollouts are there: it goes on exactly
        (10, []),
        (5, [8, 9]),  # 6 is sampled anew: 7 was begun before it, 8 and 9 were sampled by weights of step 6 and later
    ],
)
def test_rollouts_of_lost_weights_are_removed(at, removed, tmp_path):
    journal = Journal(tmp_path)
    for step, samples in {4: by_weights(3), 7: by_weights(5), 8: by_weights(5, 6), 9: by_weights(8)}.items():
        journal.write(step, samples)
    assert journal.remove_of_other_weights(at) == removed
    assert journal.steps() == [step for step in (4, 7, 8, 9) if step not in removed]


def test_header_is_readable(tmp_path):
    path = Journal(tmp_path).write(7, SAMPLES)
    first_line, _, rest = path.read_bytes().partition(b"\n")
    header = orjson.loads(first_line)
    assert (header["step"], header["samples"]) == (7, 2)
    assert header["arrays"][1:3] == [["<i4", [7]], ["<f4", [3]]]
    assert np.frombuffer(rest, "<i4", 7, 2 * 3 * 4).tolist() == [1, 2, 3, 4, 5, 1, 6]


def test_flat_responses_are_views_that_come_back_as_they_were():
    experts = np.arange(6, dtype=np.uint8).reshape(3, 1, 2)
    plain, recorded = (
        make_response((1, 2), (3, 4), (-0.5, -0.25)),
        make_response((1, 2), (3, 4), (-0.5, -0.25), experts),
    )
    responses = [plain, make_response((), (7,), (-1.0,)), recorded, plain]
    flat = FlatResponses.of(responses)
    back = flat.responses()
    assert back == responses and FlatResponses.of([]).responses() == []
    assert flat.tokens.tolist() == [1, 2, 3, 4, 7, 1, 2, 3, 4, 1, 2, 3, 4]
    assert all(np.shares_memory(one.tokens, flat.tokens) for one in back)
