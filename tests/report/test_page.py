"""The page holds what the runs recorded, needs nothing else, and shows hostile text as text."""

import math
import random
import re
import shutil
import subprocess
from html.parser import HTMLParser

import orjson
import pytest

from megatron_r1.report.figures import by_minutes, comparison, curves, heat_map, series, stacked_times, thinned
from megatron_r1.report.page import write_report
from megatron_r1.report.read import read_recipe
from megatron_r1.report.times import times_of
from megatron_r1.track.record import Record

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """Elements with their attributes, text outside style, and whether every element is closed in order."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.words = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())

    @property
    def ids(self):
        return {attributes["id"] for _, attributes in self.elements if "id" in attributes}


def pretrain_row(step, generator):
    loss = 1.2 + 4 * math.exp(-step / 40) + generator.gauss(0, 0.05)
    return {
        "train/loss": loss,
        "train/mtp_loss": loss + 0.4,
        "train/gradient_norm": 0.5 + generator.random(),
        "train/learning_rate": 3e-3 * (1 - step / 400),
        "perf/tokens_per_second": 9000 + generator.gauss(0, 300),
        "perf/mfu": 0.2,
        "moe/load_max": 1.6,
        "moe/mtp_load_max": 1.2,
        "moe/max_violation": 0.3,
        **({} if step % 10 else {"moe/load": {"layer 2": [1.6, 0.4, 0.9, 1.1], "mtp 1": [1.2, 0.8, 1.0, 1.0]}}),
        "train/consumed_tokens": 1280 * step,
    }


def sft_row(step, generator):
    return {
        "train/loss": 0.5 - step / 100,
        **({} if step % 5 else {"eval/loss": 0.6 - step / 100}),
        "train/tokens": 900 + generator.randrange(50),
        "train/loss_tokens": 300 + generator.randrange(50),
        "train/packing_efficiency": 0.9,
        "train/token_imbalance": 0.01,
        "train/gradient_norm": 1.0,
        "train/learning_rate": 1e-5,
    }


def rl_row(step, generator):
    accuracy = 0.8 / (1 + math.exp(-(step - 20) / 5))
    return {
        "rollout/reward": accuracy + 0.1,
        "rollout/accuracy": accuracy,
        "rollout/format": min(1, 0.5 + step / 40),
        "policy/kl": 0.001 * step,
        "policy/entropy": 1.5 - step / 60,
        "policy/clip_fraction": 0.02 * generator.random(),
        "rollout/response_length": 20 + step / 3,
        "rollout/mixed_language": 0.2,
        "rollout/reflection_words": step / 10,
        "train/gradient_norm": 0.3,
        "train/learning_rate": 1e-4,
        **({} if step > 1 else {"perf/phase_seconds/start": 40.0}),
        "perf/phase_seconds/rollout": 2 + generator.random(),
        "perf/phase_seconds/update": 3.0,
        "perf/phase_seconds/weight_sync": 0.1,
        **({} if step % 10 else spread_row("update", (2.8, 2.9, 3.2), 5)),
        **({} if step != 20 else {"perf/stragglers": {"rank 5 on node-<2>": 1.62}}),
        "perf/trainer_idle": 0.4,
        "perf/engine_idle": 0.6,
        "rollout/staleness_max": 2,
        "rollout/staleness_mean": 1.5,
        "mismatch/logprob_max_abs": 1e-5 * (1 + generator.random()),
    }


def spread_row(phase, extent, slowest):
    kinds = dict(zip(("min", "median", "max"), extent, strict=True))
    found = {f"perf/phase_seconds_{kind}/{phase}": seconds for kind, seconds in kinds.items()}
    return {**found, f"perf/slowest_rank/{phase}": slowest}


def share(mean):
    return {"mean": mean, "low": mean - 0.03, "high": mean + 0.03}


def model_result(accuracy):
    ways = {"correct_any_format": share(accuracy), "correct_tagged": share(accuracy - 0.05), "format": share(0.9)}
    return {"greedy": ways, "sampled": ways, "by_task": {"chain": share(accuracy), "product": share(accuracy / 2)}}


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A finished recipe and its page."""
    home = tmp_path_factory.mktemp("finished")
    fill(home / "quickstart")
    write_report(home / "quickstart", home / "report.html")
    return home


@pytest.fixture
def recipe(template, tmp_path):
    """A copy that a test may change, with fewer rows: quicker to draw."""
    folder = shutil.copytree(template / "quickstart", tmp_path / "quickstart")
    for metrics in folder.glob("*/metrics.jsonl"):
        metrics.write_bytes(b"".join(metrics.read_bytes().splitlines(keepends=True)[:3]))
    return folder


@pytest.fixture
def html(template):
    return (template / "report.html").read_text()


@pytest.fixture
def page(html):
    return Page(html)


def written(recipe):
    write_report(recipe, recipe.parent / "report.html")
    return Page((recipe.parent / "report.html").read_text())


def fill(folder):
    generator = random.Random(0)
    for name, steps, row_of in (("pretrain", 300, pretrain_row), ("cold_start", 20, sft_row), ("r1_zero", 50, rl_row)):
        stage = folder / name
        (stage / "checkpoints" / "step-00000050").mkdir(parents=True)
        (stage / "checkpoints" / "step-00000050" / "weights.safetensors").write_bytes(b"\0" * 2048)
        record = Record(stage / "metrics.jsonl")
        for step in range(1, steps + 1):
            record.append(step, row_of(step, generator))
        record.close()
        (stage / "config.yaml").write_text(f"name: {name}\nnote: <script>alert(1)</script>\n")
        (stage / "environment.json").write_bytes(orjson.dumps({"python": "3.12.1", "packages": {"torch": "2.14.1"}}))
    (folder / "evaluate" / "samples").mkdir(parents=True)
    results = {"prompts": 512, "samples": 4, "models": {"base": model_result(0.25), "r1_zero": model_result(0.8)}}
    (folder / "evaluate" / "results.json").write_bytes(orjson.dumps(results))
    for name in ("base", "r1_zero"):
        rows = [
            {
                "prompt": f"p{i}",
                "question": f"What is {i} + 3 * 4?",
                "truth": str(i + 12),
                "response": f"{name} says <think>3 * 4 = 12</think> <script>alert('{i}')</script>",
                "reward_parts": {"accuracy": float(i % 2), "format": 1.0},
            }
            for i in range(12)
            for _ in range(2)
        ]
        (folder / "evaluate" / "samples" / f"{name}.jsonl").write_bytes(b"".join(orjson.dumps(r) + b"\n" for r in rows))


def test_page_is_whole_small_and_needs_nothing_else(template, html, page):
    assert 50_000 < len(html) < 1_500_000
    assert [path.name for path in template.iterdir() if path.is_file()] == ["report.html"]
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "img", "link", "iframe", "object", "a"}
    for _, attributes in page.elements:
        for key in ("src", "href", "xlink:href"):
            assert attributes.get(key, "#").startswith("#")
        assert not any(key.startswith("on") for key in attributes)


def test_headline_has_shares_intervals_and_the_gain(page):
    assert "25.0 % of cases before (base) and in 80.0 % after (r1_zero): +55.0 points" in page.text
    assert "intervals do not overlap" in page.text
    assert "80.0 % (77.0 to 83.0)" in page.text
    assert "512 held-out prompts; 4 sampled responses" in page.text
    assert "product" in page.text and "12.5 % (9.5 to 15.5)" in page.text


def test_overlapping_intervals_are_called_so(tmp_path):
    (tmp_path / "recipe" / "evaluate").mkdir(parents=True)
    results = {"prompts": 512, "samples": 4, "models": {"base": model_result(0.25), "r1_zero": model_result(0.28)}}
    (tmp_path / "recipe" / "evaluate" / "results.json").write_bytes(orjson.dumps(results))
    assert "intervals overlap" in written(tmp_path / "recipe").text


def test_general_tasks_have_measures_of_their_own(tmp_path):
    (tmp_path / "recipe" / "evaluate").mkdir(parents=True)
    models = {
        name: {way: {"helpful": share(mean), "safe": share(0.9), "format": share(1.0)} for way in ("greedy", "sampled")}
        for name, mean in (("base", 0.3), ("tuned", 0.7))
    }
    results = {"prompts": 256, "samples": 4, "models": models}
    (tmp_path / "recipe" / "evaluate" / "results.json").write_bytes(orjson.dumps(results))
    page = written(tmp_path / "recipe")
    assert (
        "Sampled responses are as requested in 30.0 % of cases before (base) and in 70.0 % after (tuned)" in page.text
    )
    assert "safe, sampled" in page.text and "correct tagged" not in page.text and "by hidden rules" in page.text


def test_curves_are_present_with_labels_and_units(page):
    curves = {
        "r1_zero": (
            *("reward-rollout/reward", "reward-rollout/accuracy", "reward-rollout/format"),
            *("length-rollout/response_length", "kl-policy/kl", "entropy-policy/entropy", "time-rollout"),
            *("time-update", "time-weight_sync", "idle-perf/engine_idle", "stale-rollout/staleness_mean"),
            *("language-rollout/mixed_language", "reflection-rollout/reflection_words"),
        ),
        "pretrain": (
            *("loss-train/loss", "loss-train/mtp_loss", "load-moe/load_max", "load-moe/mtp_load_max"),
            *("violation-moe/max_violation", "experts"),
        ),
        "cold_start": ("loss-train/loss", "loss-eval/loss", "packing-train/packing_efficiency"),
    }
    expected = {f"curve-{stage}-{curve}" for stage, of_stage in curves.items() for curve in of_stage}
    assert "Supervised fine-tuning" in page.text
    assert expected <= page.ids
    for label in ("loss (nats per token)", "response length (tokens)", "KL (nats per token)", "tokens per second"):
        assert label in page.text


def test_the_time_of_a_stage_is_a_table_by_phase_with_the_slowest_rank(page):
    """The start takes 40 s, 50 updates 150 s, 5 rows have a spread."""
    table = page.text[page.text.index("Where the time went") :]
    assert "phase time share s a step: min median max slowest rank update 150.0 s" in table
    assert "2.8 2.9 3.2 5 (5 of 5 times)" in table and "start 40.0 s" in table
    shares = [float(share) for share in re.findall(r" s (\d+\.\d) %", table.partition("Slow rank")[0])]
    assert len(shares) == 4 and sum(shares) == pytest.approx(100, abs=0.3)
    assert "Slow rank: rank 5 on node-<2>: 1.6 times the median (step 20)" in table
    assert page.text.count("Where the time went") == 1  # other stages have no times


def test_a_step_is_stacked_by_phase_whatever_phases_it_has():
    rows = [
        {"step": 1, "perf/phase_seconds/start": 99.0, "perf/phase_seconds/update": 3.0},
        {"step": 2, "perf/phase_seconds/update": 3.0, "perf/phase_seconds/save": 1.0},
        {"step": 3, "train/loss": 1.0},
    ]
    svg = stacked_times("f", rows)
    assert re.findall(r'id="curve-f-([a-z_]+)"', svg) == ["update", "save"]
    assert "time of a step (s)" in svg and ">save<" in svg and ">start<" not in svg


def test_times_of_one_rank_have_no_spread():
    rows = [{"step": step, "perf/phase_seconds/update": 3.0, "perf/phase_seconds/step": 1.0} for step in (1, 2)]
    found = times_of(rows)
    assert found["header"] == ["phase", "time", "share"] and found["slow"] == []
    assert found["lines"] == [["update", "6.0 s", "75.0 %"], ["step", "2.0 s", "25.0 %"]]
    assert times_of([{"step": 1}])["lines"] == []


def test_model_text_is_shown_and_not_interpreted(html, page):
    assert "r1_zero says <think>3 * 4 = 12</think> <script>alert('1')</script>" in page.text
    assert "note: <script>alert(1)</script>" in page.text
    assert "think" not in {tag for tag, _ in page.elements}
    assert "&lt;think&gt;" in html and "<think>" not in html and "<script" not in html


def test_responses_to_the_same_question_are_side_by_side(page):
    blocks = [attributes for tag, attributes in page.elements if attributes.get("class") == "answer"]
    assert len(blocks) == 2 * 10
    at = [page.text.index(f"{name} says") for name in ("base", "r1_zero")]
    assert page.text.index("What is 0 + 3 * 4? (answer: 12)") < at[0] < at[1] < page.text.index("What is 1 + 3 * 4?")


def test_versions_and_files_are_listed(page):
    assert "packages.torch 2.14.1" in page.text
    assert "pretrain/checkpoints/step-00000050/ 2 KiB" in page.text
    assert "pretrain/metrics.jsonl" in page.text


@pytest.mark.parametrize(
    ("lost", "sections"), [("pretrain", 1), ("r1_zero", 1), ("evaluate", 2), ("evaluate/samples", 1), (".", 6)]
)
def test_missing_stage_is_shown_as_missing(recipe, lost, sections):
    shutil.rmtree(recipe / lost)
    page = written(recipe)
    assert sum(attributes.get("class") == "missing" for _, attributes in page.elements) == sections


def test_torn_files_are_no_error(recipe):
    for path in recipe.rglob("*.json*"):
        path.write_bytes(path.read_bytes()[:-40])
    assert "No model has been evaluated." in written(recipe).text


def test_the_kind_of_a_stage_follows_from_its_metrics(recipe):
    assert {stage.name: stage.kind for stage in read_recipe(recipe).stages} == {
        "pretrain": "pretrain",
        "cold_start": "sft",
        "r1_zero": "rl",
        "evaluate": "other",
    }


def test_figure_draws_every_point_where_it_belongs():
    rows = [{"step": step, "loss": value} for step, value in enumerate([4.0, 1.0, 3.0, math.nan, 2.0])]
    svg = curves("f", rows, {"loss": "loss"}, "loss (nats)")
    drawn = svg[svg.index('id="curve-f-loss"') :].split(' d="')[1].split('"')[0]
    points = [tuple(map(float, line.split()[-2:])) for line in drawn.splitlines() if line]
    xs, ys = zip(*points, strict=True)
    assert len(points) == 4
    assert (xs[3] - xs[0]) / (xs[1] - xs[0]) == pytest.approx(4, abs=1e-3)
    assert (ys[0] - ys[1]) / (ys[0] - ys[3]) == pytest.approx(3 / 2, abs=1e-3)
    assert ys[0] < ys[1], "4 is drawn above 1"


def test_heat_map_has_a_cell_for_every_value_and_more_colour_for_more_load():
    svg = heat_map("f", {"layer 2": [0.0, 1.0, 2.0], "mtp 1": [1.0, 5.0, 1.0]}, "expert", "load (1 is an even share)")
    cells = svg[svg.index('id="curve-f"') :].split("</g>")[0]
    fills = re.findall(r"fill: (#[0-9a-f]{6})", cells)
    assert len(fills) == 6 and fills[1] == fills[3] == fills[5] and fills[2] == fills[4]
    red, blue = (int(fills[2][at : at + 2], 16) for at in (1, 5))
    assert red > blue and len(set(fills)) == 3
    for word in ("layer 2", "mtp 1", "expert", "load (1 is an even share)"):
        assert word in svg
    assert "<image" not in svg


def test_stages_are_drawn_side_by_side(recipe):
    assert not any(name.startswith("curve-all-") for name in written(recipe).ids)
    shutil.copytree(recipe / "pretrain", recipe / "other")
    shutil.copytree(recipe / "r1_zero", recipe / "ahead")
    kinds = {"loss": ("pretrain", "other"), "load": ("pretrain", "other"), "minutes": ("r1_zero", "ahead")}
    assert {f"curve-all-{kind}-{run}" for kind, runs in kinds.items() for run in runs} <= written(recipe).ids


def test_minutes_are_of_steps_alone_and_need_times_in_every_row():
    rows = [
        {"step": step, "perf/phase_seconds/rollout": 24, "perf/phase_seconds/update": 36.0, **beside}
        for step, beside in ((3, {"perf/phase_seconds/start": 500.0}), (4, {}))
    ]
    assert [row["step"] for row in by_minutes(rows)] == [1.0, 2.0] and by_minutes([*rows, {"step": 5}]) == []


def test_figures_without_values_are_empty():
    assert curves("f", [{"step": 1, "loss": math.nan}], {"loss": "loss"}, "loss") == ""
    assert stacked_times("f", [{"step": 1, "perf/phase_seconds/start": 1.0}]) == ""
    assert heat_map("f", {}, "expert", "load") == ""
    assert comparison("f", {"a": [{"step": 1, "loss": 1.0}], "b": []}, "loss", "loss") == ""
    assert series([{"step": 3, "moe/load": [0.1, 0.7]}, {"step": 4}], "moe/load") == ([3.0], [0.7])
    assert thinned(([0.0, 1, 2, 3, 4], [1.0, 3, 5, 7, 9]), 3) == ([0.5, 2.5, 4.0], [2.0, 6.0, 9.0])


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_page_renders_in_a_browser(template, tmp_path):
    picture = tmp_path / "page.png"
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    command += ["--window-size=1200,3000", f"--screenshot={picture}", (template / "report.html").as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    assert picture.stat().st_size > 50_000
