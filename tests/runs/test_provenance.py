"""What the record of an attempt holds, and that nothing that a run or a job writes holds a secret."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_r1.cluster.job import image_digest, job_script
from megatron_r1.cluster.request import requested_job
from megatron_r1.commands.submit import write_job
from megatron_r1.config.verbs import JobCommand
from megatron_r1.files import digest_of
from megatron_r1.runs import provenance
from megatron_r1.runs.provenance import newest_record, record_attempt
from tests.support.repositories import git, repository

ROOT = Path(__file__).resolve().parents[2]
PLANTED = {
    name: secrets.token_hex(20)
    for name in ("WANDB_API_KEY", "JUDGE_API_KEY", "HF_TOKEN", "SGLANG_API_KEY", "SGLANG_ADMIN_API_KEY", "DB_PASSWORD")
}


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    folder = repository(tmp_path / "checkout", {"megatron_r1/a.py": "a = 1\n", "launch/lock/cpu.txt": "torch==1\n"})
    monkeypatch.setattr(provenance, "PACKAGE", folder / "megatron_r1")
    return folder


def records(folder: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted((folder / "provenance").glob("*.json"))]


def test_each_attempt_has_a_record_of_its_own(checkout, tmp_path, monkeypatch):
    run = tmp_path / "run"
    run.mkdir()
    record_attempt(run)
    (checkout / "megatron_r1/a.py").write_text("a = 2\n")
    (checkout / "note.txt").touch()
    for name, value in {"JOB_ID": "77", "JOB_NODELIST": "n[1-2]", "RESTART_COUNT": "1"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("MEGATRON_R1_IMAGE", "/images/a.sqsh")
    monkeypatch.setenv("MEGATRON_R1_IMAGE_DIGEST", "sha256:ab")
    monkeypatch.setattr(sys, "argv", ["megatron-r1", "sft", "--config-name", "sft_distill_r1", "seed=3"])
    record_attempt(run)
    record_attempt(run)
    first, second, third = records(run)
    assert [first["attempt"], second["attempt"], third["attempt"]] == [1, 2, 3]
    commit = git(checkout, "rev-parse", "HEAD")
    assert first["git"]["commit"] == second["git"]["commit"] == commit
    assert (first["git"]["dirty"], second["git"]["dirty"]) == (False, True) and "diff" not in first["git"]
    assert second["git"]["untracked"] == ["note.txt"] and second["git"]["branch"] == "work"
    assert (run / second["git"]["diff"]).read_text() == git(checkout, "diff", "HEAD") + "\n"
    assert second["git"]["diff"] == third["git"]["diff"], "attempts with the same changes share a file"
    assert first["slurm"] is None and first["container"] is None
    assert second["slurm"]["job"] == "77" and second["slurm"]["nodes"] == "n[1-2]"
    assert second["slurm"]["restarts"] == "1"
    assert second["container"] == {"image": "/images/a.sqsh", "digest": "sha256:ab"}
    assert second["command"]["verb"] == "sft" and second["command"]["overrides"] == ["seed=3"]
    assert second["command"]["recipe"] == "sft_distill_r1"
    assert newest_record(run) == third and third["versions"]["torch"] and third["lock"]["file"]


def test_another_program_has_only_its_command_line(checkout, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pytest", "tests"])
    assert provenance.attempt_facts()[0]["command"] == {"line": [sys.executable, "pytest", "tests"]}


def test_secrets_are_masked_in_record_and_diff(checkout, tmp_path, monkeypatch):
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    (checkout / "megatron_r1/a.py").write_text(f"key = '{PLANTED['HF_TOKEN']}'\n")
    monkeypatch.setattr(sys, "argv", ["megatron-r1", "sft", f"init.from=http://u:pw@h/{PLANTED['DB_PASSWORD']}"])
    run = tmp_path / "run"
    run.mkdir()
    record_attempt(run)
    (record,) = records(run)
    assert record["git"]["diff_masked"] and "key = '***'" in (run / record["git"]["diff"]).read_text()
    assert record["command"]["overrides"] == ["init.from=http://***@h/***"]
    assert found_in(run) == []


def found_in(*folders: Path) -> list[str]:
    """Files below the folders, and names, that hold a planted secret."""
    found = []
    for path in (path for folder in folders for path in folder.rglob("*")):
        text = path.read_bytes() if path.is_file() else b""
        found += [f"{path}: {name}" for name, value in PLANTED.items() if value.encode() in text + bytes(path)]
    return found


def test_a_digest_is_that_of_the_image_or_unknown(tmp_path):
    image = tmp_path / "a.sif"
    assert image_digest("docker://a/b@sha256:12") == "sha256:12"
    image.write_bytes(b"image")
    assert image_digest(str(image)) == ""
    record = tmp_path / "a.sif.sha256"
    record.write_text(f"{digest_of(image)}  a.sif\n")
    assert image_digest(str(image)) == f"sha256:{digest_of(image)}"
    os.utime(image, (later := record.stat().st_mtime + 9, later))
    assert image_digest(str(image)) == "", "the image is newer than what is recorded of it"


def test_a_job_names_its_image_to_its_run():
    overrides = ("cluster=pyxis", "cluster.image=docker://a/b@sha256:12", "nodes=2", "train.global_batch_size=256")
    (line,) = [
        line
        for line in job_script(
            requested_job(JobCommand("pretrain", "pretrain", overrides), lambda _: None)
        ).splitlines()
        if line.startswith("environment=")
    ]
    assert "MEGATRON_R1_IMAGE=docker://a/b@sha256:12 MEGATRON_R1_IMAGE_DIGEST=sha256:12" in line


def test_nothing_that_a_run_or_a_job_writes_has_a_planted_secret(tmp_path, monkeypatch):
    """A run with everything that writes: its logs, its record, wandb's own files offline; and a job's folder."""
    (tmp_path / ".env").write_text("".join(f"{name}={value}\n" for name, value in PLANTED.items()))
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    overrides = [
        *("platform=cpu", "threads=1", "name=planted", "train.steps=1", "train.schedule.warmup_steps=0"),
        *("data.num_documents=200", "train.global_batch_size=2", "train.micro_batch_size=2"),
    ]
    home = {"HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT), "WANDB_MODE": "offline"}
    (tmp_path / "home").mkdir()
    command = [sys.executable, "-m", "megatron_r1", "pretrain", *overrides]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | home, capture_output=True, text=True, timeout=300, check=True
    )
    profile = ["cluster.gpus_per_node=1", f"cluster.env_file={tmp_path}/.env"]
    job = requested_job(JobCommand("pretrain", "pretrain", (*overrides[2:], *profile)), lambda _: None)
    monkeypatch.chdir(tmp_path)
    write_job(job, tmp_path / "runs" / "planted")
    (tmp_path / ".env").unlink()
    (tmp_path / "output.txt").write_text(done.stdout + done.stderr)
    written = {path.name for path in tmp_path.rglob("*")}
    assert {"0001.json", "metrics.jsonl", "train.sh", "config.yaml"} <= written
    (offline,) = (tmp_path / "runs/planted/wandb").glob("offline-run-*/*.wandb")
    assert newest_record(tmp_path / "runs/planted")["git"]["commit"].encode() in offline.read_bytes()
    assert found_in(tmp_path) == []
