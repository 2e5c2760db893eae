"""GSM8K's protocol from its published file to the results, through a real server: every row is accounted for."""

from __future__ import annotations

import json

import pytest

from tests.support.jobs import Job, run_alone
from tests.support.texts import GSM8K, NO_GSM8K

MODEL = ["platform=cpu", "threads=1", "seed=3"]
TRAIN = [
    "pretrain", *MODEL, "track=off", "train.steps=2", "train.schedule.warmup_steps=1", "data.num_documents=2000",
    "train.save_interval=2", "train.sequence_length=64", "train.global_batch_size=2", "train.micro_batch_size=2",
    "model.num_layers=2", "model.mtp.num_layers=0", "model.max_sequence_length=1536",
]  # fmt: skip
EVALUATE = [
    "evaluate", *MODEL, "evaluate=gsm8k", f"data.prompts.path='{GSM8K}/test.jsonl'", "evaluate.num_prompts=24",
    "evaluate.samples_per_prompt=2", "rollout.chat_template=r1_zero", "rollout.max_response_tokens=16",
    "rollout.sglang.max_total_tokens=16384", "rollout.sglang.max_running_requests=32",
]  # fmt: skip


@pytest.mark.sglang
@pytest.mark.skipif(not GSM8K.is_dir(), reason=NO_GSM8K)
def test_gsm8k_from_its_file_to_the_results(tmp_path):
    assert (base := run_alone(Job(TRAIN, tmp_path, "base"))).returncode == 0, base.stderr
    job = Job([*EVALUATE, f"init.from='{tmp_path}/base'"], tmp_path, "gsm8k")
    assert (done := run_alone(job)).returncode == 0, done.stderr
    published = [json.loads(line) for line in (GSM8K / "test.jsonl").read_text().splitlines()[:24]]
    rows = [json.loads(line) for line in (job.folder / "samples" / "model.jsonl").read_text().splitlines()]
    modes = [("greedy", 0)] * 24 + [("sampled", sample) for _ in range(24) for sample in range(2)]
    assert [(row["mode"], row["sample"]) for row in rows] == modes
    indices = [*range(24), *(index for index in range(24) for _ in range(2))]
    for index, row in zip(indices, rows, strict=True):
        assert row["prompt"] == str(index + 1) and row["question"].startswith(published[index]["question"])
        assert "\\boxed{}" in row["question"] and row["task"] == "number"
        assert published[index]["answer"].endswith(f"#### {row['truth']}") and 1 <= row["response_tokens"] <= 16
    results = json.loads((job.folder / "results.json").read_text())
    protocol = {"benchmark": "gsm8k", "prompts": 24, "samples": 2, "temperature": 0.6, "top_p": 0.95}
    assert {key: results[key] for key in protocol} == protocol
    model = results["models"]["model"]
    rights = [row["reward_parts"]["accuracy"] for row in rows if row["mode"] == "sampled"]
    assert model["sampled"]["correct_any_format"]["mean"] == pytest.approx(sum(rights) / 48)
    assert set(model["pass_at_k"]["correct_any_format"]) == set(model["cons_at_k"]) == {"1", "2"}
