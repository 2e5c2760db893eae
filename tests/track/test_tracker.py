"""wandb gets the rows of the local record, offline, and can never stop a run."""

import logging
import os
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import orjson
import pytest

from megatron_r1.config.jobs import TrackConfig
from megatron_r1.errors import PlatformError
from megatron_r1.track import wandb_run
from megatron_r1.track.identity import wandb_mode
from megatron_r1.track.metrics import METRICS
from megatron_r1.track.record import read_metrics
from megatron_r1.track.tracker import Tracker

BLOCK = 32768


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch):
    """wandb's caches and settings stay inside the test's folder; its service ends with the test."""
    for key in [key for key in os.environ if key.startswith("WANDB_")]:
        monkeypatch.delenv(key)
    for kind in ("CACHE", "CONFIG", "DATA", "ARTIFACT"):
        monkeypatch.setenv(f"WANDB_{kind}_DIR", str(tmp_path / "home"))
    yield
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()


def offline_records(path: Path):
    """The records of an offline run file: a 7-byte header, then a LevelDB log (blocks of 32 KiB) of protobufs."""
    from wandb.proto.wandb_internal_pb2 import Record

    data = path.read_bytes()
    assert data[:4] in (b":W&B", b"")
    position, parts = 7, []
    while position + 7 <= len(data):
        if BLOCK - position % BLOCK < 7:
            position += BLOCK - position % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        if position + 7 + length > len(data):  # still being written
            return
        parts.append(data[position + 7 : position + 7 + length])
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield Record.FromString(b"".join(parts))
            parts = []


def wandb_rows(run_folder: Path, expected: int):
    """History rows of all offline runs in a run folder, oldest run first, and the ids of those runs.

    wandb's service writes its last block a moment after a run was closed: waits for the expected number of rows.
    """
    for _ in range(100):
        rows, ids = [], set()
        for path in sorted(run_folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_ctime_ns):
            records = list(offline_records(path))
            ids |= {record.run.run_id for record in records if record.WhichOneof("record_type") == "run"}
            rows += [record.history for record in records if record.WhichOneof("record_type") == "history"]
        if len(rows) >= expected:
            break
        time.sleep(0.1)
    return [plain(row) for row in rows], ids


def plain(history):
    items = {item.key or ".".join(item.nested_key): item.value_json for item in history.item}
    return {key: orjson.loads(text) for key, text in items.items() if not key.startswith("_")}


def row_of(step):
    return {"train/loss": 1.0 / step, "moe/load": [0.25, 0.75], "train/consumed_tokens": 640 * step}


def track(folder, steps, resume_step=0, setting="auto", **settings):
    config = {"model": {"num_layers": 4}, "init": {"from": ""}}
    section = TrackConfig(wandb=setting, **settings)
    with Tracker(folder, config, "pretrain", section, "pretrain", resume_step) as tracker:
        for step in steps:
            tracker.log(step, row_of(step))


def test_offline_run_has_the_rows_of_the_record(tmp_path, capfd):
    track(tmp_path / "run", range(1, 31))
    rows, ids = wandb_rows(tmp_path / "run", 30)
    assert rows == read_metrics(tmp_path / "run" / "metrics.jsonl") == [{"step": s} | row_of(s) for s in range(1, 31)]
    assert len(ids) == 1
    output = capfd.readouterr()
    assert output.out == output.err == ""


def test_resume_continues_the_wandb_run_without_duplicates(tmp_path):
    folder = tmp_path / "run"
    track(folder, range(1, 11))
    track(folder, range(7, 9), resume_step=6)
    track(folder, range(7, 13), resume_step=6)
    rows, ids = wandb_rows(folder, 12)
    assert len(ids) == 1
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert rows == read_metrics(folder / "metrics.jsonl")
    track(folder, [1])
    assert wandb_rows(folder, 1) == ([{"step": 1} | row_of(1)], ids), "killed before its first checkpoint"


def sample_tables(run_folder: Path, expected: int) -> list[dict[str, Any]]:
    """Content of each table of samples in the offline run, in the order of its records."""
    for _ in range(100):
        (path,) = run_folder.glob("wandb/offline-run-*/*.wandb")
        found = [record.artifact for record in offline_records(path) if record.artifact.type == "samples"]
        if len(found) >= expected:
            break
        time.sleep(0.1)
    contents = [artifact.manifest.contents for artifact in found]
    return [orjson.loads(Path(content[0].local_path).read_bytes()) for content in contents]


def test_tables_of_samples_are_in_the_offline_run_once_each_after_a_resume(tmp_path):
    folder = tmp_path / "run"

    def sampled(steps, resume_step=0, setting="offline"):
        with Tracker(folder, {}, "rl", TrackConfig(wandb=setting), "grpo", resume_step) as tracker:
            for step in steps:
                tracker.add_samples(
                    step, [{"step": step, "response": "4 \u00e9", "reward": 0.5, "attempt": resume_step}]
                )
                tracker.log(step, row_of(step))

    sampled([1, 2, 3])
    sampled([4, 5], resume_step=2)
    tables = sample_tables(folder, 4)
    assert [table["columns"] for table in tables] == [["step", "response", "reward", "attempt"]] * 4
    assert [table["data"] for table in tables] == [
        [[step, "4 \u00e9", 0.5, attempt]] for step, attempt in ((1, 0), (2, 0), (4, 2), (5, 2))
    ]
    assert len(list((folder / "tables").iterdir())) == 4


def test_a_table_that_cannot_be_written_ends_no_run(tmp_path, caplog):
    with Tracker(tmp_path, {}, "rl", TrackConfig(wandb="disabled"), "grpo") as tracker:
        (tmp_path / "tables").write_text("in the way")
        tracker.add_samples(1, [])
    assert "step 1: no table of samples: " in caplog.text


KILLED = """
import os, signal, sys
from pathlib import Path
import tests.track.test_tracker as t

folder, resume_step, last, wait = Path(sys.argv[1]), *map(int, sys.argv[2:])
tracker = t.Tracker(folder, {}, "pretrain", t.TrackConfig(wandb="offline"), "pretrain", resume_step)
for step in range(resume_step + 1, last + 1):
    tracker.log(step, t.row_of(step))
if wait:  # until wandb's service has written rows
    t.wandb_rows(folder, 1)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_run_that_is_killed_again_and_again_has_each_step_once(tmp_path):
    """Each attempt resumes at its newest checkpoint, before the last row: a requeue or the next job of a chain."""
    folder = tmp_path / "run"
    attempts = [("0", "600", "1"), ("500", "900", "1"), ("800", "800", "0")]
    for attempt in attempts:
        command = [sys.executable, "-c", KILLED, str(folder), *attempt]
        done = subprocess.run(command, cwd=Path(__file__).parents[2], timeout=100)
        assert done.returncode == -9
        steps = [row["step"] for row in wandb_rows(folder, 0)[0]]
        assert steps == sorted(set(steps)), "no step twice, whatever was killed when"
    track(folder, range(801, 1021), resume_step=800)
    rows, ids = wandb_rows(folder, 1020)
    assert [row["step"] for row in rows] == list(range(1, 1021))
    assert rows == read_metrics(folder / "metrics.jsonl")
    assert len(ids) == 1 and len(list(folder.glob("wandb/*offline-run-*"))) == 1


def test_disabled_writes_no_wandb_folder(tmp_path):
    track(tmp_path / "run", [1], setting="disabled")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    ("setting", "environment", "mode"),
    [
        ("auto", {}, "offline"),
        ("auto", {"WANDB_API_KEY": ""}, "offline"),
        ("auto", {"WANDB_API_KEY": "k"}, "online"),
        ("auto", {"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, "offline"),
        ("auto", {"WANDB_API_KEY": "k", "WANDB_MODE": "dryrun"}, "offline"),
        ("auto", {"WANDB_MODE": ""}, "offline"),
        ("online", {"WANDB_MODE": "nonsense"}, "online"),
        ("online", {}, "online"),
        ("offline", {"WANDB_API_KEY": "k"}, "offline"),
        ("disabled", {"WANDB_API_KEY": "k"}, "disabled"),
    ],
)
def test_mode_is_chosen_before_wandb_starts(setting, environment, mode):
    assert wandb_mode(setting, environment) == mode


def test_a_mode_that_wandb_does_not_have_is_named():
    with pytest.raises(PlatformError, match=r"^WANDB_MODE=ofline: must be one of online, offline, disabled"):
        wandb_mode("auto", {"WANDB_MODE": "ofline"})


def test_online_without_a_network_warns_and_records_offline(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(wandb_run, "START_TIMEOUT_S", 2.0)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    with caplog.at_level(logging.WARNING, "megatron_r1"):
        track(tmp_path / "run", [1, 2], setting="online")
    assert "wandb could not start" in caplog.text
    assert [row["step"] for row in read_metrics(tmp_path / "run" / "metrics.jsonl")] == [1, 2]
    rows, _ = wandb_rows(tmp_path / "run", 2)
    assert [row["step"] for row in rows] == [1, 2]


def test_failure_while_logging_warns_once_and_the_record_continues(tmp_path, caplog, monkeypatch):
    import wandb

    def refuse(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(wandb.Run, "log", refuse)
    with (
        caplog.at_level(logging.WARNING, "megatron_r1"),
        Tracker(tmp_path, {}, "run", TrackConfig(wandb="offline"), "sft") as tracker,
    ):
        for step in (1, 2, 3):
            tracker.log(step, {"train/loss": 1.0 / step})
    warnings = [record.getMessage() for record in caplog.records if record.name.startswith("megatron_r1")]
    assert [warning.split(":")[0] for warning in warnings] == ["wandb failed"]
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 3


def records_of(folder: Path, kind: str, enough: int) -> list[Any]:
    """Records of one kind that all offline runs of a folder hold, once there are as many as are expected."""
    for _ in range(100):
        paths = folder.glob("wandb/offline-run-*/*.wandb")
        found = [
            record for path in paths for record in offline_records(path) if record.WhichOneof("record_type") == kind
        ]
        if len(found) >= enough:
            break
        time.sleep(0.1)
    return [getattr(record, kind) for record in found]


def test_wandb_knows_axis_and_direction_of_each_metric_and_where_the_run_belongs(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_TAGS", "night, pretrain")
    folder = tmp_path / "quickstart" / "run"
    settings = {"entity": "team", "group": "quickstart", "tags": ["ours"], "notes": "why", "project": "r1"}
    track(folder, [1], setting="offline", **settings)
    defined = {record.name or record.glob_name: record for record in records_of(folder, "metric", len(METRICS))}
    assert {metric.name for metric in METRICS if not metric.table} <= defined.keys()
    lower, higher = defined["train/loss"].summary, defined["rollout/reward"].summary
    assert (lower.min, lower.max, higher.min, higher.max) == (True, False, False, True)
    assert all(record.step_metric == "step" or name == "step" for name, record in defined.items() if name[0] != "_")
    [run] = records_of(folder, "run", 1)
    assert (run.run_group, run.job_type, [*run.tags]) == ("quickstart", "pretrain", ["pretrain", "ours", "night"])
    assert (run.entity, run.project, run.display_name, run.notes) == ("team", "r1", "pretrain", "why")


def test_wandb_is_not_imported_until_a_run_is_opened():
    code = "import sys, megatron_r1.track.tracker; print('wandb' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == ["False", "False"]
