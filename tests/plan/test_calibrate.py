"""Constants scaled to a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_r1.config.hardware import GPUS
from megatron_r1.config.load import load, write_yaml
from megatron_r1.errors import ConfigError
from megatron_r1.plan.calibrate import OTHER_LAYOUTS, calibrate
from megatron_r1.plan.constants import Constants
from megatron_r1.plan.job import TrainingJob
from megatron_r1.plan.pipeline_time import simulated_step
from megatron_r1.plan.step import count

H100 = GPUS["H100"]
CONFIG = load("pretrain", ["model=moonlight_16b", "parallel.expert=8", "train.sequence_length=4096",
                           "train.micro_batch_size=1", "train.global_batch_size=64"])  # fmt: skip


def seconds(constants: Constants, layout: str = "") -> float:
    config = load("pretrain", ["model=moonlight_16b", "train.sequence_length=4096", "train.micro_batch_size=1",
                               "train.global_batch_size=64", *layout.split()]) if layout else CONFIG  # fmt: skip
    return simulated_step(count(TrainingJob(config, H100, 16, 1.1)), constants).total


def run_of(folder: Path, steps: list[float]) -> Path:
    write_yaml(CONFIG, folder / "config.yaml")
    rows = [{"step": number, "perf/tokens_per_second": 64 * 4096 / one} for number, one in enumerate(steps)]
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_a_slower_run_slows_every_layout_by_its_factor(tmp_path: Path) -> None:
    step = 1.25 * seconds(Constants())
    steps = [9 * step, *[step * (1 + 0.02 * (number % 3 - 1)) for number in range(30)]]
    found = calibrate(run_of(tmp_path, steps), H100, 16, 1.1, Constants())
    assert found.scale == pytest.approx(1.25, rel=0.01) and found.steps == 26
    assert seconds(found.constants) == pytest.approx(step, rel=0.01)
    other = "parallel.pipeline=2 parallel.expert=4"
    assert seconds(found.constants, other) == pytest.approx(1.25 * seconds(Constants(), other), rel=0.01)
    assert OTHER_LAYOUTS < found.uncertainty < OTHER_LAYOUTS + 0.05 and "26 steps" in found.text()


def test_a_run_with_few_steps_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs at least 8 steps"):
        calibrate(run_of(tmp_path, [1.0] * 7), H100, 16, 1.1, Constants())
    with pytest.raises(ConfigError):
        calibrate(tmp_path / "none", H100, 16, 1.1, Constants())
