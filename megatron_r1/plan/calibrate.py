"""Scales the constants to a finished run, and says how sure that is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median, quantiles

import orjson

from megatron_r1.config.hardware import Gpu
from megatron_r1.config.load import read_yaml
from megatron_r1.config.run import RunConfig
from megatron_r1.config.schema import convert
from megatron_r1.errors import ConfigError
from megatron_r1.plan.constants import Constants
from megatron_r1.plan.job import TrainingJob
from megatron_r1.plan.pipeline_time import simulated_step
from megatron_r1.plan.step import count

WARM_UP = 5
"""First steps of a run, which compile and allocate, and are left out."""
FEWEST = 3
"""Steps that are needed."""
OTHER_LAYOUTS = 0.15
"""Relative error of other layouts on the same GPUs and software after one was calibrated: nine of ten published rows
are within it (README.md of this folder, column `calibrated`)."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """Constants that make the model right for one run."""

    constants: Constants
    scale: float
    """Measured over predicted seconds of a step."""
    steps: int
    """Steps that were measured."""
    spread: float
    """Half the distance between the quartiles of the measured steps, over their median."""

    @property
    def uncertainty(self) -> float:
        """Relative error to expect of a step's seconds on another layout."""
        return OTHER_LAYOUTS + self.spread

    def text(self) -> str:
        """What was found, in a line."""
        return (
            f"calibrated on {self.steps} steps: {self.scale:.2f} times the predicted seconds, "
            f"quartiles +-{self.spread:.1%}; other layouts within about {self.uncertainty:.0%}"
        )


def calibrate(folder: Path, gpu: Gpu, gpus: int, imbalance: float, constants: Constants) -> Calibration:
    """Scale all rates by what a run of `pretrain` took, and the shares of overlap not: one layout cannot tell
    computation from exchange.

    Args:
        folder: of the run, with config.yaml and metrics.jsonl.
        gpus: GPUs of the run.

    Raises:
        ConfigError: the folder is no run with enough steps.
    """
    config = convert(RunConfig, read_yaml(folder / "config.yaml"))
    tokens = config.train.global_batch_size * config.train.sequence_length
    seconds = [tokens / rate for rate in _rates(folder / "metrics.jsonl")][WARM_UP:]
    if len(seconds) < FEWEST:
        allowed = f"needs at least {WARM_UP + FEWEST} steps with perf/tokens_per_second in metrics.jsonl"
        raise ConfigError("plan.calibrate", folder, allowed)
    predicted = simulated_step(count(TrainingJob(config, gpu, gpus, imbalance)), constants).total
    middle = median(seconds)
    low, _, high = quantiles(seconds, n=4)
    return Calibration(
        scaled(constants, middle / predicted), middle / predicted, len(seconds), (high - low) / 2 / middle
    )


def scaled(constants: Constants, factor: float) -> Constants:
    """Constants with which every step takes `factor` times as long."""
    return replace(
        constants,
        matrix=constants.matrix / factor,
        attention=constants.attention / factor,
        memory=constants.memory / factor,
        link=constants.link / factor,
        launch=constants.launch * factor,
        exchange=constants.exchange * factor,
    )


def _rates(path: Path) -> list[float]:
    """Tokens per second of each recorded step."""
    try:
        rows = [orjson.loads(line) for line in path.read_bytes().splitlines()]
    except (OSError, orjson.JSONDecodeError) as error:
        raise ConfigError("plan.calibrate", path.parent, f"must be the folder of a run: {error}") from None
    return [row["perf/tokens_per_second"] for row in rows if row.get("perf/tokens_per_second")]
