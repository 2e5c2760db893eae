"""curate from the command line: what it keeps and drops, its data sheet, and a job that is killed and started again."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest

from megatron_r1.__main__ import exit_code
from megatron_r1.config.data import PromptsConfig
from megatron_r1.config.reward import RewardConfig
from megatron_r1.config.sft import ConversationsConfig
from megatron_r1.data.chat.rows import conversation_of
from megatron_r1.data.preference.examples import read_preferences
from megatron_r1.data.prompts.files import read_prompts
from megatron_r1.data.row_sources import RowSource
from megatron_r1.files import digest_of
from megatron_r1.rewards.accuracy import truth_problems
from megatron_r1.rewards.judge import client
from tests.support.fake_judge import running

QUESTION = "What is 2 + 3 * 4?"
RIGHT = "<think>3 * 4 = 12, 2 + 12 = 14</think> <answer>14</answer>"


def sample(response: str = RIGHT, **fields) -> dict:
    return {"id": "1", "question": QUESTION, "response": response, "truth": "14", "task": "number"} | fields


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def curate(tmp_path: Path, *overrides: str, name: str = "c", code: int = 0) -> Path:
    """Run the verb in this process; returns the run's folder."""
    assert exit_code(["curate", f"root={tmp_path}", f"name={name}", *overrides]) == code
    return tmp_path / name


def test_each_filter_drops_its_fault_and_the_sheet_counts_it(tmp_path) -> None:
    rows = [
        sample(weight_version="step-3"),
        sample(RIGHT.replace("2 + 12", "2  +  12")),
        sample(RIGHT.replace("14", "20")),
        sample("<think>先算3 * 4 = 12</think> <answer>14</answer>"),
        sample("<think>3 * 4", finish_reason="length"),
        sample(""),
    ]
    path = write_rows(tmp_path / "s.jsonl", rows)
    folder = curate(tmp_path, f"curate.sources.a.path={path}")
    kept = read_rows(folder / "conversations.jsonl")
    assert [row["messages"] for row in kept] == [
        [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": RIGHT}]
    ]
    sheet = json.loads((folder / "sheet.json").read_text())
    dropped = {row["name"]: row["dropped"] for row in sheet["filters"] if row["dropped"]}
    assert dropped == {"finished": 1, "length": 1, "language": 1, "right": 1, "duplicate": 1}
    assert sheet["sources"][0]["weight_versions"] == ["step-3"] and sheet["filters"][-1]["out"] == 1
    assert sorted(row["filter"] for row in read_rows(folder / "dropped.jsonl")) == [
        "duplicate", "finished", "language", "length", "right",
    ]  # fmt: skip


def test_general_data_without_truths_pass_where_their_source_skips_the_verdict(tmp_path) -> None:
    general = write_rows(tmp_path / "g.jsonl", [{"messages": [
        {"role": "user", "content": "Say hello."}, {"role": "assistant", "content": "Hello!"}]}])  # fmt: skip
    refused = curate(tmp_path, f"curate.sources.g.path={general}", name="refused")
    kept = curate(tmp_path, f"curate.sources.g={{path: '{general}', skip: [format, reasoning, right]}}", name="kept")
    assert [len(read_rows(folder / "conversations.jsonl")) for folder in (refused, kept)] == [0, 1]


def test_a_resumed_job_screens_only_what_is_missing(tmp_path) -> None:
    path = write_rows(tmp_path / "s.jsonl", [sample(RIGHT + " " * n, id=str(n)) for n in range(5)])
    job = (
        f"curate.sources.a.path={path}",
        "curate.rows_per_part=2",
        "curate.duplicates=false",
        "curate.near_duplicates=off",
        "curate.shuffle=false",
    )
    folder = curate(tmp_path, *job)
    written = (folder / "conversations.jsonl").read_bytes()
    parts = sorted((folder / "parts").glob("0*.json"))
    before = {part: part.stat().st_mtime_ns for part in parts}
    parts[1].unlink()
    (folder / "conversations.jsonl").unlink()
    curate(tmp_path, *job)
    assert (folder / "conversations.jsonl").read_bytes() == written
    assert [part for part in parts if part.stat().st_mtime_ns != before[part]] == [parts[1]]
    write_rows(path, [sample(RIGHT)])
    (folder / "parts" / "plan.json").unlink()  # as a kill may leave it
    curate(tmp_path, *job)
    assert len(read_rows(folder / "conversations.jsonl")) == 1, "other sources are screened anew"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "curate.sources={}"),
        (["curate.sources.a.path=none.jsonl"], "curate.sources.a.path=none.jsonl: no such file"),
        (["curate.sources.a.path=x.jsonl", "curate.filters=[rihgt]"], "curate.filters=rihgt: must be one of finished"),
        (["curate.sources.a={path: x.jsonl, skip: [judge2]}"], "curate.sources.a.skip=judge2: must be one of"),
    ],
)
def test_a_wrong_setting_is_one_line(tmp_path, capsys, overrides, message) -> None:
    curate(tmp_path, *overrides, code=2)
    assert message in capsys.readouterr().err


def test_rows_that_cannot_be_read_are_named_or_counted(tmp_path, capsys) -> None:
    path = tmp_path / "s.jsonl"
    path.write_text(json.dumps(sample()) + "\n{\n" + json.dumps({"question": 3}) + "\n")
    curate(tmp_path, f"curate.sources.a.path={path}", code=3)
    assert f"{path}:2: is not JSON" in capsys.readouterr().err
    folder = curate(tmp_path, f"curate.sources.a.path={path}", "curate.max_bad_rows=2", name="lenient")
    sheet = json.loads((folder / "sheet.json").read_text())
    assert [sheet["filters"][0][key] for key in ("name", "in", "dropped", "out")] == ["bad_row", 3, 2, 1]


OUTPUTS = "curate.outputs=[conversations,samples,prompts,pairs,review]"


@pytest.fixture
def samples(tmp_path) -> Path:
    """Three samples each of two prompts: right, right in other words, wrong."""
    rows = []
    for id, question, truth, first in (("1", QUESTION, 14, "3 * 4 = 12"), ("2", "What is 5 + 2 * 2?", 9, "2 * 2 = 4")):
        thoughts = (f"{first}, and the rest is {truth}", f"The product comes first. {first}. Then I add: {truth}.")
        responses = [f"<think>{thought}</think> <answer>{truth}</answer>" for thought in thoughts]
        responses.append(f"<think>{first}, so that makes {truth + 1}</think> <answer>{truth + 1}</answer>")
        fields = {"question": question, "truth": str(truth), "id": id}
        rows += [sample(response, reward=float(n < 2), **fields) for n, response in enumerate(responses)]
    return write_rows(tmp_path / "s.jsonl", rows)


def test_every_output_is_read_by_the_verb_that_it_is_for(tmp_path, samples) -> None:
    folder = curate(tmp_path, f"curate.sources.a.path={samples}", OUTPUTS)
    conversations = read_rows(folder / "conversations.jsonl")
    assert len(conversations) == 4 and all(conversation_of(row, ConversationsConfig(path="-")) for row in conversations)
    config = PromptsConfig(path=str(folder / "prompts.jsonl"), id_field="id")
    prompts = read_prompts(config, len, truth_problems=partial(truth_problems, RewardConfig())).prompts
    assert [(prompt.question, prompt.answer, prompt.task) for prompt in prompts] == [
        (QUESTION, "14", "number"), ("What is 5 + 2 * 2?", "9", "number"),
    ]  # fmt: skip
    assert [row["pass_rate"] for row in read_rows(folder / "prompts.jsonl")] == [pytest.approx(2 / 3)] * 2
    pairs = [*read_preferences(RowSource(folder / "pairs.jsonl"), pairwise=True)]
    assert [("14" in pair.chosen.response, "15" in pair.rejected.response) for pair in pairs[:1]] == [(True, True)]
    assert len(pairs) == 2 and read_rows(folder / "samples.jsonl")[0].keys() >= {
        "question",
        "response",
        "truth",
        "task",
    }
    again = curate(tmp_path, f"curate.sources.a.path={folder}/samples.jsonl", name="again")
    assert len(read_rows(again / "conversations.jsonl")) == 4
    sheet = json.loads((folder / "sheet.json").read_text())
    for name, output in sheet["outputs"].items():
        assert output == {"rows": len(read_rows(folder / name)), "sha256": digest_of(folder / name)}
    assert not [*folder.glob("*.tmp")]


@pytest.mark.parametrize(
    ("style", "expected"),
    [
        ("as_sampled", RIGHT),
        ("think", "<think>\n3 * 4 = 12, 2 + 12 = 14\n</think>\n\n14"),
        ("r1_zero", "<think>3 * 4 = 12, 2 + 12 = 14</think> <answer>14</answer>"),
        ("special_token", "|special_token|3 * 4 = 12, 2 + 12 = 14|special_token|14"),
    ],
)
def test_styles_of_a_conversation(tmp_path, style, expected) -> None:
    path = write_rows(tmp_path / "s.jsonl", [sample()])
    folder = curate(tmp_path, f"curate.sources.a.path={path}", f"curate.style={style}")
    assert read_rows(folder / "conversations.jsonl")[0]["messages"][-1]["content"] == expected


def decided(review: list[dict], edited: str) -> list[dict]:
    """The rows of a review with decisions: accept and edit one prompt's, reject and leave open the other's."""
    decisions = {"14": [("accept", ""), ("edit", edited)], "9": [("Reject", ""), ("", "")]}
    return [
        row | dict(zip(("decision", "edited"), decisions[row["truth"]].pop(0), strict=True)) for row in review
    ] + [review[0] | {"id": "0123456789abcdef", "decision": "reject"}]  # fmt: skip


def test_a_person_accepts_rejects_edits_and_leaves_open(tmp_path, samples) -> None:
    source = f"curate.sources.a.path={samples}"
    review = read_rows(curate(tmp_path, source, OUTPUTS) / "review.jsonl")
    assert [row["decision"] for row in review] == [""] * 4
    edited = "<think>Twelve and two make fourteen, as 3 * 4 = 12.</think> <answer>14</answer>"
    path = write_rows(tmp_path / "reviewed.jsonl", decided(review, edited))
    second = curate(tmp_path, source, f"curate.review={path}", name="second")
    texts = {row["messages"][-1]["content"] for row in read_rows(second / "conversations.jsonl")}
    accepted = next(row for row in review if row["truth"] == "14")["response"]
    left_open = [row for row in review if row["truth"] == "9"][1]["response"]
    assert texts == {accepted, edited, left_open}
    sheet = json.loads((second / "sheet.json").read_text())
    counts = {"accept": 1, "reject": 2, "edit": 1, "undecided": 1, "without a row": 1}
    assert {name: sheet["review"][name] for name in counts} == counts
    held = curate(tmp_path, source, f"curate.review={path}", "curate.undecided=hold", name="held")
    assert len(read_rows(held / "conversations.jsonl")) == 2


def test_an_edit_passes_the_filters_like_any_other_response(tmp_path, samples) -> None:
    source = f"curate.sources.a.path={samples}"
    review = read_rows(curate(tmp_path, source, OUTPUTS) / "review.jsonl")
    wrong = "<think>Twelve and two make thirteen, as 3 * 4 = 12.</think> <answer>13</answer>"
    path = write_rows(tmp_path / "reviewed.jsonl", decided(review, wrong))
    second = curate(tmp_path, source, f"curate.review={path}", name="second")
    sheet = json.loads((second / "sheet.json").read_text())
    assert {row["name"]: row["dropped"] for row in sheet["filters"]}["right"] == 3
    assert wrong not in (second / "conversations.jsonl").read_text()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": "1", "decision": "maybe"}, "decision is 'maybe': must be accept, reject, edit or empty"),
        ({"id": "1", "decision": "edit"}, "its decision is edit, and edited is not text"),
        ({"decision": "accept"}, "has no id"),
    ],
)
def test_an_unknown_decision_is_named_by_its_row(tmp_path, samples, capsys, row, message) -> None:
    path = write_rows(tmp_path / "reviewed.jsonl", [{"id": "0", "decision": ""}, row])
    curate(tmp_path, f"curate.sources.a.path={samples}", f"curate.review={path}", code=3)
    assert f"{path}:2: {message}" in capsys.readouterr().err


def test_a_shortfall_of_a_quota_is_named(tmp_path, samples) -> None:
    quotas = "curate.quotas={math: 100, general: 2}"
    folder = curate(tmp_path, f"curate.sources.a={{path: '{samples}', domain: math}}", quotas)
    sheet = json.loads((folder / "sheet.json").read_text())
    assert sheet["quotas"]["math"] == {"rows": 4, "quota": 100, "shortfall": 96}
    assert sheet["quotas"]["general"] == {"rows": 0, "quota": 2, "shortfall": 2}
    assert "| math | 4 | 100 | 96 |" in (folder / "sheet.md").read_text()


def test_a_summary_of_given_reasoning_is_put_behind_it(tmp_path) -> None:
    row = sample("Three times four is 12; the answer is 14.", given_response=RIGHT)
    path = write_rows(tmp_path / "s.jsonl", [row])
    folder = curate(tmp_path, f"curate.sources.a={{path: '{path}', reasoning_field: given_response}}")
    content = read_rows(folder / "conversations.jsonl")[0]["messages"][-1]["content"]
    assert content == "<think>3 * 4 = 12, 2 + 12 = 14</think>\n\nThree times four is 12; the answer is 14."


def test_held_out_prompts_are_in_no_output(tmp_path, samples) -> None:
    held_out = write_rows(tmp_path / "test.jsonl", [{"question": QUESTION.replace("2", "two").upper()}])
    keys = (f"curate.sources.a.path={samples}", OUTPUTS, f"curate.held_out.paths=['{held_out}']")
    folder = curate(tmp_path, *keys)
    for name in ("conversations", "samples", "prompts", "pairs", "review"):
        text = (folder / f"{name}.jsonl").read_text()
        assert QUESTION not in text and "5 + 2 * 2" in text, name
    prompts = curate(tmp_path, *keys[:1], "curate.filters=[]", "curate.outputs=[prompts]", keys[2], name="prompts")
    assert (prompts / "prompts.jsonl").read_bytes() == (folder / "prompts.jsonl").read_bytes()
    sheet = json.loads((folder / "sheet.json").read_text())
    assert sheet["prompts"][-1] == {"name": "contamination", "in": 2, "dropped": 1, "out": 1}
    assert sheet["held_out"]["files"] == [{"path": str(held_out), "sha256": digest_of(held_out)}]


def test_the_judges_verdict_keeps_or_drops_and_a_judge_that_is_down_is_no_verdict(
    tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(client, "FIRST_PAUSE_S", 0.01)
    path = write_rows(tmp_path / "s.jsonl", [sample(), sample(RIGHT.replace("14", "15"), id="2")])

    def job(url: str, name: str, code: int = 0) -> Path:
        judge = f"reward.judge_config={{url: '{url}', mode: correctness, votes: 1, attempts: 1}}"
        keys = (f"curate.sources.a.path={path}", "curate.filters=[judge]", "reward.judge=1", judge)
        return curate(tmp_path, *keys, name=name, code=code)

    with running(lambda shown, _: (200, {"analysis": "", "correct": shown["answer"] == "14"})) as judge:
        folder = job(judge.url, "judged")
    assert [row["id"] for row in read_rows(folder / "conversations.jsonl")] == ["1"]
    assert [row["why"] for row in read_rows(folder / "dropped.jsonl")] == ["the judge scored it 0.00"]
    with running(lambda shown, _: (500, "down")) as judge:
        folder = job(judge.url, "down", code=1)
    assert not [*folder.glob("parts/0*")] and f"{path}:1: could not be scored by the judge" in capsys.readouterr().err
