"""What the page shows of a run on pairs of responses."""

from __future__ import annotations

import json

from megatron_r1.report.page import render
from megatron_r1.report.read import read_recipe

SHARE = {"mean": 0.925, "low": 0.9, "high": 0.95}


def test_curves_and_accuracy_are_shown(tmp_path):
    run = tmp_path / "dpo"
    run.mkdir()
    row = {
        "train/loss": 0.5,
        "train/accuracy": 0.7,
        "train/margin": 0.2,
        "train/chosen_reward": 0.1,
        "train/rejected_reward": -0.1,
    }
    measured = {"eval/accuracy": 0.8, "eval/margin": 0.3}
    rows = [{"step": step, **row, **(measured if step == 2 else {})} for step in (1, 2, 3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (run / "accuracy.json").write_text(json.dumps({"items": 256, "accuracy": SHARE, "by_task": {"<b>": SHARE}}))
    recipe = read_recipe(tmp_path)
    assert [stage.kind for stage in recipe.stages] == ["preference"]
    html = render(recipe)
    assert "<h2>Direct preference optimization</h2>" in html
    for curve in ("loss-train/loss", "accuracy-eval/accuracy", "margin-eval/margin", "rewards-train/rejected_reward"):
        assert f'id="curve-dpo-{curve}"' in html
    assert "256 held-out examples" in html and html.count("92.5 %") == 2
    assert "implicit reward, &lt;b&gt;" in html and "reward model" not in html
