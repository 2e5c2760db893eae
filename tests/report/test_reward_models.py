"""What the page shows of a reward model's run."""

from __future__ import annotations

import json

from megatron_r1.report.page import render
from megatron_r1.report.read import read_recipe

SHARE = {"mean": 0.925, "low": 0.9, "high": 0.95}


def test_curves_and_accuracy_are_shown(tmp_path):
    run = tmp_path / "helpfulness"
    run.mkdir()
    row = {
        "train/loss": 0.5,
        "train/score_loss": 0.4,
        "train/reasoning_loss": 0.1,
        "train/accuracy": 0.7,
        "train/margin": 0.2,
    }
    rows = [{"step": step, **row, **({"eval/accuracy": 0.8} if step == 2 else {})} for step in (1, 2, 3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {"items": 512, "accuracy": SHARE, "length_baselines": {"<b>": SHARE}, "by_task": {"list": SHARE}}
    (run / "accuracy.json").write_text(json.dumps(found))
    recipe = read_recipe(tmp_path)
    assert [stage.kind for stage in recipe.stages] == ["reward_model"]
    html = render(recipe)
    for curve in (
        "loss-train/score_loss",
        "loss-train/reasoning_loss",
        "accuracy-eval/accuracy",
        "margin-train/margin",
    ):
        assert f'id="curve-helpfulness-{curve}"' in html
    assert "512 held-out examples" in html
    assert html.count("92.5 %") == 3
    assert "length alone, in &lt;b&gt;" in html


def test_a_run_without_accuracy_has_curves_alone(tmp_path):
    (tmp_path / "safety").mkdir()
    (tmp_path / "safety" / "metrics.jsonl").write_text(
        json.dumps({"step": 1, "train/score_loss": 0.7, "train/margin": 0.0}) + "\n"
    )
    (tmp_path / "safety" / "accuracy.json").write_text('{"accuracy": 3')
    html = render(read_recipe(tmp_path))
    assert "curve-safety-loss-train/score_loss" in html
    assert "held-out examples, 95" not in html
