"""Offline runs are uploaded once, by wandb's own sync, to a server on this machine."""

import json
import os
import sys
from pathlib import Path

import pytest

from megatron_r1.__main__ import exit_code
from megatron_r1.config.jobs import TrackConfig
from megatron_r1.track.recipe import track_recipe
from megatron_r1.track.sync import offline_runs
from megatron_r1.track.tracker import Tracker
from tests.support.wandb_server import wandb_server


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for key in [key for key in os.environ if key.startswith("WANDB_")]:
        monkeypatch.delenv(key)
    for kind in ("CACHE", "CONFIG", "DATA", "ARTIFACT"):
        monkeypatch.setenv(f"WANDB_{kind}_DIR", str(tmp_path / "home"))
    yield
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()


def record(folder: Path, steps: range, resume_step: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text("seed: 0\n")
    settings = TrackConfig(wandb="offline", group="recipe", tags=["ours"])
    with Tracker(folder, {}, folder.name, settings, "sft", resume_step) as tracker:
        for step in steps:
            tracker.log(step, {"train/loss": 1.0 / step})


def track_sync(root: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = exit_code(["track", "sync", f"root={root}"])
    return code, capsys.readouterr().err


@pytest.mark.timeout(200)
def test_a_tree_of_runs_is_uploaded_once_and_a_resumed_run_again(tmp_path, monkeypatch, capsys):
    runs = tmp_path / "runs"
    record(runs / "recipe" / "base", range(1, 6))
    record(runs / "recipe" / "sft", range(1, 4))
    sys.modules["wandb"].teardown()  # its service, which began offline, has written all
    with wandb_server() as server:
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_MODE", "offline")
        code, shown = track_sync(runs, capsys)
        assert code == 0, shown
        assert shown.count(": uploaded") == 2
        names = {run["displayName"]: run for run in server.runs if run.get("displayName")}
        assert set(names) == {"base", "sft"}
        assert {(run["groupName"], run["jobType"], *run["tags"]) for run in names.values()} == {
            ("recipe", "sft", "sft", "ours")
        }
        steps = {run["name"]: [row["step"] for row in server.history[run["name"]]] for run in names.values()}
        assert sorted(steps.values()) == [[1, 2, 3], [1, 2, 3, 4, 5]]
        assert server.artifacts == ["config", "config"]
        before = len(server.runs)
        code, shown = track_sync(runs, capsys)
        assert code == 0 and "no offline run is left to upload" in shown and len(server.runs) == before
        [grows] = runs.glob("recipe/base/wandb/offline-*/*.wandb")
        os.utime(grows)
        assert offline_runs(runs) == [grows], "a run that still writes is uploaded again"
        os.utime(grows, ns=(0, 0))
        record(runs / "recipe" / "sft", range(3, 8), resume_step=2)
        sys.modules["wandb"].teardown()
        code, shown = track_sync(runs, capsys)
        assert code == 0 and shown.count(": uploaded") == 1
        again = server.history[names["sft"]["name"]]
        assert [row["step"] for row in again] == [1, 2, 3, 4, 5, 6, 7]


def test_a_recipe_has_its_page_and_its_samples_in_wandb(tmp_path, monkeypatch, capsys):
    recipe = tmp_path / "runs" / "small"
    (recipe / "evaluate" / "samples").mkdir(parents=True)
    (recipe / "report.html").write_text("<html></html>")
    rows = [{"prompt": "1+1", "response": "2", "reward": 1.0, "versions": [1, 2]}, {"prompt": "2+2", "truth": None}]
    (recipe / "evaluate" / "samples" / "zero.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    track_recipe(recipe, "small", TrackConfig(wandb="offline"))
    assert offline_runs(recipe) == [], "no stage is in wandb"
    (recipe / "evaluate" / "wandb").mkdir()
    track_recipe(recipe, "small", TrackConfig(wandb="offline"))
    sys.modules["wandb"].teardown()
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    with wandb_server() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        code, shown = track_sync(tmp_path, capsys)
    assert code == 0, shown
    assert {(run["groupName"], run["jobType"]) for run in server.runs if run.get("displayName")} == {
        ("small", "report")
    }
    assert sorted(server.artifacts) == ["report", "samples"]


def test_without_key_or_network_there_is_one_line(tmp_path, monkeypatch, capsys):
    record(tmp_path / "runs" / "base", range(1, 3))
    code, shown = track_sync(tmp_path / "runs", capsys)
    assert code == 2 and shown.startswith("megatron-r1: WANDB_API_KEY is not set") and shown.count("\n") == 1
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    code, shown = track_sync(tmp_path / "runs", capsys)
    assert code == 2 and shown.count("\n") == 1
    assert "WANDB_BASE_URL=http://127.0.0.1:9: cannot be reached" in shown
    assert len(offline_runs(tmp_path / "runs")) == 1
    assert exit_code(["track", f"root={tmp_path}"]) == 2 and "must be one of" in capsys.readouterr().err
    code, shown = track_sync(tmp_path / "nowhere", capsys)
    assert code == 2 and "must be a folder of runs" in shown


def test_an_upload_that_fails_is_named_and_tried_again(tmp_path, monkeypatch, capsys):
    record(tmp_path / "runs" / "base", range(1, 3))
    [file] = offline_runs(tmp_path / "runs")
    file.write_bytes(b"damaged")
    with wandb_server() as server:
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        code, shown = track_sync(tmp_path / "runs", capsys)
    assert code == 2 and "1 of 1 runs were not uploaded" in shown
    assert offline_runs(tmp_path / "runs") == [file]
