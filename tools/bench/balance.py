"""Does the balancing bias do what the auxiliary loss does, at no cost in loss? Pre-trains one small model four ways.

    python tools/bench/balance.py [--root runs/balance] [--steps 300] [--seeds 0] [--arms bias ...] [key=value ...]

Each arm is an ordinary pre-training run below ROOT: the same command again resumes where it stopped, and runs that are
done are only read. Prints a table and writes ROOT/report.html. A run of 300 steps takes seven minutes on one core.

The model is 256 wide and has 6.3 million parameters. A batch of 4,096 tokens makes 1,024 visits to each of 16 experts
on average, which alone would leave a standard deviation of about 3 % in a load, were tokens independent.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_r1.report.page import write_report
from megatron_r1.track.record import read_metrics

SETTINGS = [
    *("threads=1", "track=off", "data.num_documents=60000"),
    *("model.num_layers=5", "model.hidden_size=256", "model.ffn_hidden_size=512", "model.init_std=0.03"),
    *("model.attention.q_lora_rank=128", "model.attention.kv_lora_rank=64", "model.mtp.num_layers=0"),
    *("model.moe.num_experts=16", "model.moe.top_k=4", "model.moe.ffn_hidden_size=96"),
    *("model.moe.num_groups=4", "model.moe.group_top_k=2"),
    *("train.sequence_length=64", "train.global_batch_size=64", "train.micro_batch_size=32"),
    *("train.schedule.warmup_steps=20", "train.schedule.learning_rate=2e-3"),
    *("train.save_interval=50", "train.log_interval=25"),
]


@dataclass(frozen=True)
class Arm:
    """One way to balance."""

    bias_rate: float
    sequence_loss: float

    def settings(self) -> list[str]:
        return [
            f"model.moe.bias_update_rate={self.bias_rate}",
            f"model.moe.sequence_loss_coefficient={self.sequence_loss}",
        ]


ARMS = {
    "bias": Arm(1e-3, 1e-4),  # DeepSeek-V3
    "bias_fast": Arm(1e-2, 1e-4),  # for runs that are too short for the paper's step
    "auxiliary": Arm(0.0, 1e-3),  # DeepSeek-V2-Lite's weight
    "neither": Arm(0.0, 0.0),
}


def main() -> None:
    options, extra = _arguments()
    for seed in options.seeds:
        for name in options.arms:
            run = ["pretrain", f"root='{options.root}'", f"name={name}_{seed}", f"seed={seed}", "platform=cpu"]
            settings = [*SETTINGS, f"train.steps={options.steps}", *ARMS[name].settings(), *extra]
            # One after the other: each in a process of its own, as megatron-core's state is one a process.
            subprocess.run([sys.executable, "-m", "megatron_r1", *run, *settings], check=True)
    print_table(
        [(name, seed, measure(options.root / f"{name}_{seed}")) for name in options.arms for seed in options.seeds]
    )
    write_report(options.root, options.root / "report.html")
    print(f"figures: {options.root / 'report.html'}")


def _arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--root", type=Path, default=Path("runs/balance"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument("extra", nargs="*", metavar="key=value")
    options = parser.parse_args()
    return options, options.extra


def measure(run: Path) -> dict[str, float]:
    """What a run came to, over its last third."""
    rows: list[dict[str, Any]] = read_metrics(run / "metrics.jsonl")
    last = rows[-(len(rows) // 3) :]
    load_SL = np.array([[*row["moe/layer_load_max"].values()] for row in last])
    return {
        "p95": float(np.percentile(load_SL, 95)),
        "median": float(np.median(load_SL)),
        "largest": float(load_SL.max()),
        "violation": last[-1]["moe/max_violation"],
        "loss": float(np.mean([row["train/loss"] for row in last])),
        "first_even": first_even(rows),
    }


def first_even(rows: list[dict[str, Any]], bound: float = 1.3, window: int = 20) -> float:
    """First step from which, for `window` steps, 95 % of max/mean loads are at most `bound`; NaN if there is none."""
    load_SL = np.array([[*row["moe/layer_load_max"].values()] for row in rows])
    for start in range(len(rows) - window + 1):
        if np.percentile(load_SL[start : start + window], 95) <= bound:
            return float(rows[start]["step"])
    return float("nan")


def print_table(results: list[tuple[str, int, dict[str, float]]]) -> None:
    """One line a run."""
    columns = ("p95", "median", "largest", "violation", "loss", "first_even")
    print("| arm | seed | bias rate | sequence loss | " + " | ".join(columns) + " |")
    print("|---" * (4 + len(columns)) + "|")
    for name, seed, found in results:
        arm, numbers = ARMS[name], " | ".join(f"{found[column]:.4g}" for column in columns)
        print(f"| {name} | {seed} | {arm.bias_rate:g} | {arm.sequence_loss:g} | {numbers} |")


if __name__ == "__main__":
    main()
