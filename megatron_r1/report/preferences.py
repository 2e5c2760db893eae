"""Direct preference optimization on the page: its curves, and how implicit rewards order held-out pairs."""

from __future__ import annotations

from collections.abc import Iterable

from megatron_r1.report.figures import curves
from megatron_r1.report.read import Stage
from megatron_r1.report.reward_models import accuracy_table, figure


def preference_figures(stage: Stage) -> Iterable[str]:
    """Curves of one stage, and its accuracy table."""
    name, rows = stage.name, stage.rows
    svg = curves(f"{name}-loss", rows, {"train/loss": "loss"}, "loss (nats per pair)")
    yield figure(svg, "Loss on pairs; where policy and reference agree it is 0.69.")
    accuracy = {"train/accuracy": "learned pairs, before each step", "eval/accuracy": "held-out pairs"}
    svg = curves(f"{name}-accuracy", rows, accuracy, "share of pairs in order", share=True)
    yield figure(svg, "Share of pairs whose better answer has the higher implicit reward.")
    margin = {"train/margin": "learned pairs, before each step", "eval/margin": "held-out pairs"}
    caption = "By how much the implicit reward of the better answer is above the other's."
    yield figure(curves(f"{name}-margin", rows, margin, "margin of rewards"), caption)
    rewards = {"train/chosen_reward": "better answer", "train/rejected_reward": "the other"}
    caption = "Implicit rewards: beta times how much likelier an answer is than under the reference."
    yield figure(curves(f"{name}-rewards", rows, rewards, "implicit reward"), caption)
    yield accuracy_table(stage.accuracy, "implicit reward")
