"""The recipe as a whole on its page: graph, times, results of all stages, generated data; any of it may be missing."""

from __future__ import annotations

import json
import re
import shutil

import orjson
import pytest

from megatron_r1.report.graph import graph_svg, needs_of
from megatron_r1.report.page import write_report
from megatron_r1.report.read import read_recipe
from megatron_r1.report.recipe import stage_tables
from tests.report.test_page import Page, share

BY_K = {"1": share(0.4), "2": share(0.5), "4": share(0.6)}


def result(mean: float) -> dict:
    sampled = {"correct_any_format": share(mean), "correct_tagged": share(mean - 0.1), "format": share(0.9)}
    behaviour = {
        "mixed_language": share(0.3),
        "response_length": {"mean": 41.5, "low": 40.0, "high": 43.0},
        "reflection_words": {"mean": 1.25, "low": 1.0, "high": 1.5},
    }
    return {
        "greedy": sampled,
        "sampled": sampled,
        "pass_at_k": {"correct_any_format": BY_K},
        "cons_at_k": BY_K,
        "behaviour": {"greedy": behaviour, "sampled": behaviour},
    }


def stage(name: str, verb: str, state: str = "done", seconds: float = 90.0, **more) -> dict:
    settings = {"router policy": "frozen" if verb == "grpo" else ""}
    return {"name": name, "verb": verb, "state": state, "seconds": seconds, "settings": settings, "inputs": {}, **more}


STAGES = [
    stage("pretrain", "pretrain", seconds=300),
    stage("r1_zero", "grpo", inputs={"base": "pretrain.checkpoint"}),
    stage("zero_scores", "evaluate", inputs={"model": "r1_zero.checkpoint"}),
    stage("base_scores", "evaluate", inputs={"model": "pretrain.checkpoint"}),
    stage("data", "curate", inputs={"samples": "r1_zero.samples"}, needs=["base_scores"]),
    stage("sft", "sft", "stale", 0.0, inputs={"rows": "data.conversations"}, why="rows <changed>"),
]
SHEET = {
    "seed": 3,
    "sources": [{"name": "zero", "domain": "math", "rows": 120, "files": []}],
    "filters": [{"name": "wrong answer", "in": 120, "dropped": 45, "out": 75}],
    "outputs": {"conversations.jsonl": {"rows": 75, "sha256": "0"}},
}


@pytest.fixture
def recipe(tmp_path):
    folder = tmp_path / "r1_tiny"
    for name, mean in (("zero_scores", 0.8), ("base_scores", 0.2)):
        (folder / name).mkdir(parents=True)
        results = {"benchmark": "arithmetic", "prompts": 9, "samples": 4, "models": {"model": result(mean)}}
        if name == "zero_scores":
            point = {"mean": 0.5, "low": 0.4, "high": 0.6}
            results["curve"] = {"correct_any_format": [{"step": step, **point} for step in (2, 4)]}
        (folder / name / "results.json").write_bytes(orjson.dumps(results))
    (folder / "data").mkdir()
    (folder / "data" / "sheet.json").write_text(json.dumps(SHEET))
    (folder / "pipeline.json").write_text(json.dumps({"recipe": "r1_tiny", "stages": STAGES, "mermaid": ""}))
    (folder / "replaced" / "old-1").mkdir(parents=True)
    (folder / "replaced" / "results.json").write_text("{}")
    return folder


def page_of(recipe) -> Page:
    write_report(recipe, recipe / "report.html")
    return Page((recipe / "report.html").read_text())


def test_the_graph_has_a_box_and_an_edge_for_everything(recipe):
    page = page_of(recipe)
    boxes = [
        attributes["class"]
        for tag, attributes in page.elements
        if tag == "g" and "stage" in attributes.get("class", "")
    ]
    assert boxes == ["stage done"] * 5 + ["stage stale"]
    edges = [attributes["class"] for tag, attributes in page.elements if tag == "path" and "class" in attributes]
    assert sorted(edges) == ["follows"] + ["takes"] * 5  # none passes another row
    assert "sft: stale" in page.text and "pretrain: done, 5.0 min" in page.text and "rows <changed>" in page.text


def test_a_stage_is_drawn_below_all_that_it_needs():
    svg = graph_svg(STAGES)
    tops = dict(
        zip([each["name"] for each in STAGES], map(int, re.findall(r'<rect x="-?\d+" y="(\d+)"', svg)), strict=True)
    )
    assert all(tops[need] < tops[each["name"]] for each in STAGES for need in needs_of(each))


def test_a_graph_with_a_circle_or_without_inputs_is_drawn_too():
    circle = [stage("a", "sft", inputs={"x": "b.checkpoint"}), stage("b", "sft", inputs={"x": "a.checkpoint"})]
    assert graph_svg(circle).count("<rect") == 2
    assert graph_svg([*STAGES, stage("last", "sft", inputs={"x": "pretrain.c", "y": "sft.c"})]).count("takes far") == 1
    assert graph_svg([{"name": "<x>"}]).count("&lt;x&gt;") == 1 and graph_svg([{"verb": "sft"}]) == graph_svg([]) == ""


def test_results_of_all_stages_stand_in_one_table_in_the_recipes_order(recipe):
    [table] = stage_tables(read_recipe(recipe))
    assert table["benchmark"] == "arithmetic" and [label for label, _ in table["rows"]] == ["pretrain", "r1_zero"]
    assert table["columns"] == [
        "correct any format", "correct tagged", "format", "pass@4", "cons@4", "mixed language", "response length",
        "reflection words",
    ]  # fmt: skip
    assert table["shares"] == [True] * 6 + [False] * 2
    text = page_of(recipe).text
    assert "80.0 % (77.0 to 83.0)" in text and "41.5 (40 to 43)" in text and "1.25 (1 to 1.5)" in text


def test_times_settings_and_generated_data_are_on_the_page(recipe):
    text = page_of(recipe).text
    assert "5 of 6 stages are done" in text and "all 11.0 min" in text and "45.5 %" in text
    assert "router policy" in text and "frozen" in text
    assert "wrong answer 120 45 75" in text and "zero math 120" in text and "conversations.jsonl 75" in text


def test_checkpoints_over_training_are_a_curve(recipe):
    assert "curve-zero_scores-correct_any_format-correct_any_format" in page_of(recipe).ids


@pytest.mark.parametrize("lost", ["pipeline.json", "data", "zero_scores/results.json", "base_scores"])
def test_a_page_without_a_part_is_written(recipe, lost):
    shutil.rmtree(recipe / lost) if (recipe / lost).is_dir() else (recipe / lost).unlink()
    assert page_of(recipe).text.startswith("r1_tiny")


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("pipeline.json", '{"stages": [{"name": "a", "inputs": 3, "needs": "b", "seconds": "x", "settings": []}, 4]}'),
        ("pipeline.json", '{"stages": {}}'),
        ("data/sheet.json", '{"filters": [3], "sources": {}, "outputs": []}'),
        (
            "zero_scores/results.json",
            '{"models": {"model": {"sampled": 3, "pass_at_k": [], "behaviour": {}}}, "curve": 3}',
        ),
    ],
)
def test_odd_content_is_no_error(recipe, file, content):
    (recipe / file).write_text(content)
    assert page_of(recipe).text.startswith("r1_tiny")


def test_figures_are_drawn_once_while_metrics_stay_the_same(recipe, monkeypatch):
    from megatron_r1.report import page

    drawn = []

    def figures_of(stage):
        drawn.append(stage.name)
        return []

    monkeypatch.setattr(page, "figures_of", figures_of)
    (recipe / "pretrain").mkdir()
    (recipe / "pretrain" / "metrics.jsonl").write_text('{"step": 1, "train/loss": 2.0}\n')
    page_of(recipe)
    page_of(recipe)
    assert drawn == ["pretrain"]
    (recipe / "pretrain" / "metrics.jsonl").write_text(
        '{"step": 1, "train/loss": 2.0}\n{"step": 2, "train/loss": 1.0}\n'
    )
    page_of(recipe)
    assert drawn == ["pretrain"] * 2
