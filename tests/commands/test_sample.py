"""Sampling jobs from the command line: killed and started again they end as if nothing had happened."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_r1.config.keys import only_read
from tests.support.fork_server import run_forked, run_forked_to_the_end

MODEL = ["platform=cpu", "threads=1", "seed=3", "rollout=local", "track=off", "rollout.max_response_tokens=12"]
DYING = """
import os, sys
from megatron_r1 import files
from megatron_r1.config.keys import only_read
from megatron_r1.__main__ import exit_code
from megatron_r1.rollout import sampling_job

written, write = [], files.write_whole

def dies(path, content):
    write(path, content)
    written.append(path)
    if len(written) == 3:  # the plan and two parts
        os._exit(9)

if __name__ == "__main__":
    sampling_job.write_whole = dies
    sys.exit(exit_code(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A folder with a model that two steps have trained, and prompts."""
    root = tmp_path_factory.mktemp("runs")
    steps = ["train.steps=2", "train.schedule.warmup_steps=1", "data.num_documents=300", "train.save_interval=2"]
    shape = ["train.sequence_length=32", "train.global_batch_size=2", "train.micro_batch_size=2"]
    base = [*only_read("pretrain", MODEL), *steps, *shape, f"root='{root}'", "name=base"]
    run_forked_to_the_end("megatron_r1", "pretrain", *base)
    rows = [{"question": f"What is {n}+{n}?", "answer": 2 * n} for n in range(10)]
    (root / "opens.jinja").write_text("{{ bos_token + messages[0]['content'] + '<think>' }}")
    (root / "mine.py").write_text(
        "def score(prompts, responses, answers, tasks):\n"
        "    return [float(response.startswith('<think>')) for response in responses]\n"
    )
    (root / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{\n")
    return root


def job(root: Path, name: str) -> list[str]:
    sample = ["sample.samples_per_prompt=2", "sample.prompts_per_part=4", "sample.max_prompts=0"]
    keys = [*sample, "data.prompts.max_bad_rows=1", f"data.prompts.path='{root}/prompts.jsonl'"]
    keys += [
        f"rollout.chat_template='{root}/opens.jinja'",
        "reward.custom=1",
        f"reward.custom_function='{root}/mine.py:score'",
    ]
    keys += [f"init.from='{root}/base'", f"root='{root}'", f"name={name}"]
    return ["megatron_r1", "sample", *only_read("sample", MODEL), *keys]


def test_every_prompt_gets_scored_responses(root):
    command = [sys.executable, "-W", "ignore", "-m", *job(root, "whole")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in (root / "whole" / "samples.jsonl").read_text().splitlines()]
    assert [(row["id"], row["sample"]) for row in rows] == [(str(n), i) for n in range(1, 11) for i in range(2)]
    for row in rows:
        assert row["truth"] == str(2 * (int(row["id"]) - 1)) and row["question"] in row["prompt"]
        assert row["reward"] == pytest.approx(sum(row["reward_parts"].values()))
        assert row["reward_parts"]["custom"] == 1.0, "rewards read the response with the tag that its prompt opened"
        assert row["prompt"].endswith("<think>") and not row["response"].startswith("<think>")
        assert 1 <= row["response_tokens"] <= 12 and row["logprob"] < 0 and row["finish_reason"] in ("stop", "length")
    assert (root / "whole" / "bad_rows.txt").read_text().startswith(f"{root}/prompts.jsonl:11: is not JSON")
    assert "20 samples of 10 prompts" in done.stderr and "1 bad rows dropped" in done.stderr
    totals = json.loads((root / "whole" / "done.json").read_text())
    assert totals["samples"] == 20 and totals["mean_reward"] == pytest.approx(sum(r["reward"] for r in rows) / 20)


def test_a_killed_job_resumes_and_refuses_other_prompts(root):
    (root / "dying.py").write_text(DYING)
    assert run_forked(root / "dying.py", *job(root, "killed")[1:]).returncode == 9
    parts = root / "killed" / "parts"
    before = {path.name: path.stat().st_mtime_ns for path in parts.glob("*.jsonl")}
    assert 0 < len(before) < 3
    assert run_forked(*job(root, "killed")).returncode == 0
    for name, written in before.items():
        assert (parts / name).stat().st_mtime_ns == written
    whole, killed = ((root / name / "samples.jsonl").read_bytes() for name in ("whole", "killed"))
    assert killed == whole
    plan = json.loads((parts / "plan.json").read_text())
    (parts / "plan.json").write_text(json.dumps(plan | {"texts_sha256": "another"}))
    refused = run_forked(*job(root, "killed"))
    assert refused.returncode == 3 and "of other prompts or weights" in refused.stderr


def test_parquet_holds_the_same_rows(root):
    from pyarrow import parquet

    assert run_forked(*job(root, "columns"), "sample.format=parquet").returncode == 0
    rows = parquet.read_table(root / "columns" / "samples.parquet").to_pylist()
    expected = [json.loads(line) for line in (root / "columns" / "parts" / "000000.jsonl").read_text().splitlines()]
    assert len(rows) == 20 and rows[: len(expected)] == expected


def test_a_style_that_rewrites_shows_the_response_of_each_row(root):
    (root / "mine.txt").write_text("{question} Draft: {response}")
    rows = [{"question": f"What is {n}+{n}?", "answer": 2 * n, "response": f"= {2 * n}"} for n in range(2)]
    (root / "drafts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    style = [f"sample.prompt_style='{root}/mine.txt'", f"data.prompts.path='{root}/drafts.jsonl'"]
    done = run_forked(*job(root, "rewritten"), *style)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in (root / "rewritten" / "samples.jsonl").read_text().splitlines()]
    assert [row["given_response"] for row in found] == ["= 0", "= 0", "= 2", "= 2"]
    assert all(f"{row['question']} Draft: {row['given_response']}" in row["prompt"] for row in found)
    assert {row["task"] for row in found} == {"file"}
    refused = run_forked(*job(root, "generated"), "data.prompts.path=''", "sample.max_prompts=2", style[0])
    assert refused.returncode == 2 and "shows responses: name their rows in data.prompts.path" in refused.stderr
