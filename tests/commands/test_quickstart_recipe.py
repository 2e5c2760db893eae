"""The whole recipe at toy length, as a person starts it: interrupted, continued, repeated."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SHORT = [
    "rollout=local",
    "threads=1",
    "train.schedule.warmup_steps=1",
    "data.num_documents=2000",
    "train.log_interval=1",
    "train.save_interval=2",
    "model.num_layers=2",
    "rl.prompts_per_rollout=4",
    "rl.group_size=4",
    "evaluate.num_prompts=16",
    "evaluate.samples_per_prompt=2",
    "track.wandb=offline",
]
STAGES = {"pretrain": ["train.steps=6"], "r1_zero": ["train.steps=3", "init.from='{pretrain}'"]}


def recipe(folder: Path) -> list[str]:
    """The command: the quickstart with every stage made short."""
    overrides = [f"pipeline.stages.{name}.overrides={_list(lines)}" for name, lines in STAGES.items()]
    return [
        *(sys.executable, "-m", "megatron_r1", "pipeline", "--config-name", "quickstart"),
        *(f"root='{folder}'", "name=short", "platform=cpu", f"pipeline.overrides={_list(SHORT)}", *overrides),
    ]


def _list(lines: list[str]) -> str:
    return "[" + ",".join(f'"{line}"' for line in lines) + "]"


def start(folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(recipe(folder), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def wait(process: subprocess.Popen[str], seconds: float) -> tuple[int, str]:
    try:
        output, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        raise
    return process.returncode, output + errors


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.timeout(300)
def test_the_recipe_survives_a_signal_and_ends_with_a_report(tmp_path):
    process = start(tmp_path)
    metrics = tmp_path / "short" / "pretrain" / "metrics.jsonl"
    deadline = time.monotonic() + 90
    while not (metrics.exists() and metrics.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    code, said = wait(process, 60)
    assert code == 85, said
    stopped = rows(metrics.parent)[-1]["step"]
    assert stopped < 6

    code, said = wait(start(tmp_path), 200)
    assert code == 0, said
    runs = tmp_path / "short"
    assert [row["step"] for row in rows(runs / "pretrain")] == list(range(1, 7))
    assert [row["step"] for row in rows(runs / "r1_zero")] == [1, 2, 3]
    results = json.loads((runs / "evaluate" / "results.json").read_text())
    assert list(results["models"]) == ["base", "r1_zero"] and results["prompts"] == 16
    assert "<html" in (runs / "report.html").read_text()
    assert (runs / "r1_zero" / "rollouts" / "step-00000003.jsonl").exists()

    started = time.monotonic()
    code, said = wait(start(tmp_path), 60)
    assert code == 0 and said.count("done before") == 5
    assert time.monotonic() - started < 20

    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = runs / "convert" / "hf"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.num_hidden_layers == 2
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "2 + 3?"}], tokenize=False)
    assert "2 + 3?" in chat


def test_a_run_refuses_another_configuration_and_says_what_changed(tmp_path):
    folder = tmp_path / "short" / "pretrain"
    command = [sys.executable, "-m", "megatron_r1", "pretrain", f"root='{folder.parent}'", "name=pretrain"]
    from megatron_r1.config.load import load, write_yaml

    folder.mkdir(parents=True)
    write_yaml(load("pretrain", ["name=pretrain", f"root='{folder.parent}'"]), folder / "config.yaml")
    done = subprocess.run([*command, "seed=7", "platform=cpu"], capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert "seed: 0 -> 7" in done.stderr and "Traceback" not in done.stderr
