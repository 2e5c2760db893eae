"""Reward models on the page: their curves, and how right they are on held-out items beside length alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from megatron_r1.report import results
from megatron_r1.report.figures import curves
from megatron_r1.report.read import Stage


def reward_model_figures(stage: Stage) -> Iterable[str]:
    """Curves of one stage, and its accuracy table."""
    name, rows = stage.name, stage.rows
    loss = {"train/score_loss": "scores", "train/reasoning_loss": "judge's reasoning"}
    svg = curves(f"{name}-loss", rows, loss, "loss (nats)")
    yield figure(svg, "Loss on scores per item, and on the judge's reasoning per token.")
    accuracy = {"train/accuracy": "learned items, before each step", "eval/accuracy": "held-out items"}
    svg = curves(f"{name}-accuracy", rows, accuracy, "share of right scores", share=True)
    yield figure(svg, "Share of items that the scores order, or label, rightly.")
    margin = {"train/margin": "margin"}
    yield figure(curves(f"{name}-margin", rows, margin, "margin of scores"), "By how much scores tell items apart.")
    yield accuracy_table(stage.accuracy, "reward model")


def accuracy_table(found: Mapping[str, Any], judge: str) -> str:
    """Accuracy on held-out items with 95 % intervals; empty where nothing has been measured.

    Args:
        judge: what orders, or labels, the items.
    """
    shares = {judge: found.get("accuracy")}
    for group, title in (("length_baselines", "length alone, in {}"), ("by_task", f"{judge}, {{}}")):
        values = found.get(group)
        if isinstance(values, Mapping):
            shares |= {title.format(name): value for name, value in values.items()}
    lines = [
        f"<tr><td>{escape(name)}</td><td>{100 * share.mean:.1f} % "
        f'<span class="dim">({100 * share.low:.1f} to {100 * share.high:.1f})</span></td></tr>'
        for name, value in shares.items()
        if (share := results.interval_of(value))
    ]
    if not lines:
        return ""
    caption = f"{escape(str(found.get('items', '?')))} held-out items, 95 % intervals"
    head = f"<thead><tr><th>{caption}</th><th>right</th></tr></thead>"
    return f'<div class="wide"><table>{head}<tbody>{"".join(lines)}</tbody></table></div>'


def figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>" if svg else ""
