"""Checks of the preflight, each with what it passes and what it must find."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from pathlib import Path

import pytest

from megatron_r1.cluster.job import job_script
from megatron_r1.cluster.preflight import exchange as exchange_module
from megatron_r1.cluster.preflight import node as checks
from megatron_r1.cluster.preflight.__main__ import judges
from megatron_r1.cluster.preflight.exchange import Exchange
from megatron_r1.cluster.preflight.finding import FAILED, OK, WARNING, NodeFinding, table
from megatron_r1.cluster.request import requested_job
from megatron_r1.config.load import load
from megatron_r1.config.verbs import JobCommand
from megatron_r1.platform import shared_memory
from megatron_r1.platform.gpus import parse_gpus
from tests.support.fake_judge import running

H100 = "0, NVIDIA H100 80GB HBM3, 0, 4\n1, NVIDIA H100 80GB HBM3, 0, 4\n"
ROWS = "No, No\nNo, No\n"


def states(found) -> list[tuple[str, str]]:
    return [(one.check, one.state) for one in found]


@pytest.mark.parametrize(
    ("listed", "rows", "faults"),
    [
        (H100, ROWS, []),
        (H100, "0, 0\n0, 0\n", []),
        (H100, "", []),
        (H100.replace("HBM3, 0", "HBM3, [N/A]"), "[N/A], [N/A]\n[N/A], [N/A]\n", []),
        (
            H100.replace("1, NVIDIA H100 80GB HBM3, 0", "1, NVIDIA H100 80GB HBM3, 3"),
            ROWS,
            ["3 uncorrected ECC errors"],
        ),
        (H100, "No, No\nYes, No\n", ["waits to be remapped"]),
        (H100, "0, 0\n1, 1\n", ["waits to be remapped", "could not be remapped"]),
    ],
)
def test_faults_of_gpus_are_read_from_what_nvidia_smi_prints(listed, rows, faults):
    first, second = parse_gpus(listed, rows)
    assert (first.index, first.name, first.used_mib, first.faults) == ("0", "NVIDIA H100 80GB HBM3", 4, ())
    assert len(second.faults) == len(faults) and all(a in b for a, b in zip(faults, second.faults, strict=True))


def test_what_nvidia_smi_prints_otherwise_is_an_error():
    with pytest.raises(OSError, match="No devices were found"):
        parse_gpus("No devices were found")


def fake_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{body}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")


@pytest.mark.parametrize(
    ("expected", "listed", "state", "words"),
    [
        (2, H100, OK, "2 of NVIDIA H100"),
        (8, H100, FAILED, "2 of 8"),
        (2, H100.replace("HBM3, 0, 4", "HBM3, 7, 4"), FAILED, "GPU 0: 7 uncorrected"),
        (2, H100.replace("0, 4\n1", "0, 40000\n1"), WARNING, "memory of GPU 0"),
    ],
)
def test_gpus_are_counted_and_looked_at(tmp_path, monkeypatch, expected, listed, state, words):
    fake_nvidia_smi(tmp_path, monkeypatch, f"case $1 in *remapped*) exit 2 ;; esac\nprintf '%s' '{listed}'")
    found = list(checks.check_gpus("n1", expected))
    assert found[0].state == state and words in found[0].what
    assert (state == OK) == (not found[0].change)


def test_a_driver_that_fails_is_named(tmp_path, monkeypatch):
    fake_nvidia_smi(tmp_path, monkeypatch, "echo 'Unable to determine the device handle'; exit 6")
    (found,) = checks.check_gpus("n1", 8)
    assert found.state == FAILED and "Unable to determine" in found.what and "--exclude=n1" in found.change


def test_ports_on_which_something_listens_are_named():
    with socket.socket() as taken, socket.socket() as free:
        for probe in (taken, free):
            probe.bind(("", 0))
        taken.listen()
        port, other = taken.getsockname()[1], free.getsockname()[1]
        free.close()
        (found,) = checks.check_ports("n1", [port, other])
        assert (found.state, found.what) == (FAILED, f"{port} in use")
    (found,) = checks.check_ports("n1", [port])
    assert found.state == OK


def test_a_folder_that_is_not_there_or_full_is_named(tmp_path, monkeypatch):
    assert states(checks.check_disks("n1", tmp_path)) == [("disk", OK)]
    found = list(checks.check_disks("n1", tmp_path / "absent"))
    assert found[0].state == FAILED and "absent" in found[0].what
    monkeypatch.setattr(checks, "LEAST_DISK", 1 << 60)
    assert states(checks.check_disks("n1", tmp_path))[:2] == [("disk", FAILED)] * 2


@pytest.fixture
def memory(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "shm"
    folder.mkdir()
    monkeypatch.setattr(shared_memory, "MEMORY", folder)
    monkeypatch.setattr(checks, "LEAST_SHARED_MEMORY", 0)
    return folder


def test_only_folders_whose_job_is_known_to_be_gone_are_removed(memory, tmp_path, monkeypatch):
    """Jobs 5 and 6 of which SLURM says that they run and have ended; 8 is unknown to it, of 9 it says nothing."""
    answers = ["*=5\\ *) echo RUNNING", "*=6\\ *) echo COMPLETED", "*=8\\ *) echo Invalid job id >&2; exit 1"]
    program = tmp_path / "bin" / "squeue"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\ncase "$* " in {" ;; ".join(answers)} ;; *) exit 1 ;; esac\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    made = {}
    for job, restarts in (("7", "0"), ("7", "1"), ("5", "0"), ("6", "0"), ("8", "0"), ("9", "0"), ("", "")):
        variables = {"SLURM_JOB_ID": job, "SLURM_RESTART_COUNT": restarts} if job else {}
        made[job, restarts] = shared_memory.make_folder("weights", variables)
        (made[job, restarts] / "file").write_bytes(b"x" * 100)
    (memory / "of_another_program").mkdir()
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    found = list(checks.check_shared_memory("n1"))
    gone = {key for key, path in made.items() if not path.exists()}
    assert gone == {("7", "0"), ("6", "0"), ("8", "0")} and (memory / "of_another_program").is_dir()
    assert [one.state for one in found] == [WARNING] * 4 + [OK] and "removed" in found[-1].what


def test_folders_of_other_users_are_not_looked_at(memory, monkeypatch):
    shared_memory.make_folder("weights", {"SLURM_JOB_ID": "6"})
    monkeypatch.setattr(os, "getuid", lambda: 4321)
    assert shared_memory.left_over(memory) == []


def test_a_judge_that_answers_with_a_refusal_is_there():
    with running(lambda *_: (401, "{}")) as fake:
        (found,) = checks.check_judges("n1", [fake.url])
    assert found.state == OK
    (found,) = checks.check_judges("n1", [fake.url])
    assert found.state == FAILED and "refused" in found.what and "start it" in found.change


def test_judges_are_those_that_rewards_call():
    url = "reward.judge_config.url=http://h:1/v1"
    assert judges(load("grpo", ["init.from=a", url, "reward.judge=1.0"])) == ["http://h:1/v1"]
    assert judges(load("grpo", ["init.from=a"])) == []
    assert judges(load("pipeline")) == []


def test_a_job_checks_its_nodes_unless_it_does_without():
    def lines(*overrides: str) -> list[str]:
        command = JobCommand("pretrain", "pretrain", ("cluster.gpus_per_node=1", *overrides))
        return job_script(requested_job(command, lambda _: None)).splitlines()

    assert "preflight=true" in lines() and "environment=(MEGATRON_R1_GPUS_PER_NODE=1)" in lines()
    assert {"preflight=false", "preflight_limit_s=7"} <= {
        *lines("submit.preflight=false", "submit.preflight_limit_s=7")
    }


def run_nodes(folder: Path, silent: str = "", fault: str = "") -> dict[str, tuple[list[NodeFinding], bool]]:
    """Findings of each node's own part, and its verdict; threads are the nodes."""
    nodes, results = ("a", "b", "c"), {}

    def one(node: str) -> None:
        exchange = Exchange(folder / "run" / ".preflight" / "1", node, nodes, 1.0)
        found = exchange.share([NodeFinding(node, "disk", FAILED if node == fault else OK, "x")])
        if node == "a":
            everything = exchange.gather()
            exchange.decide(all(one.state != FAILED for one in everything))
            results["all"] = (everything, True)
        results[node] = (found, exchange.wait_for_verdict())

    threads = [threading.Thread(target=one, args=(node,)) for node in nodes if node != silent]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_nodes_see_each_other_in_the_run_folder_and_agree(tmp_path):
    results = run_nodes(tmp_path)
    assert all(verdict for _, verdict in results.values())
    assert states(results["all"][0]) == [("disk", OK), ("run folder", OK)] * 3
    results = run_nodes(tmp_path / "second", fault="b")
    assert not any(results[node][1] for node in "abc")


def test_a_node_that_is_silent_is_named_by_all(tmp_path):
    results = run_nodes(tmp_path, silent="c")
    assert not results["a"][1] and not results["b"][1]
    assert [one.what for one in results["b"][0]] == ["does not see what c wrote"]
    silent = [one for one in results["all"][0] if one.node == "c"]
    assert [(one.state, one.what) for one in silent] == [(FAILED, "the node does not answer")]


def test_a_run_folder_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(OSError, match="run"):
        Exchange(tmp_path / "run" / "1", "a", ["a"], 1.0).share([])


def test_a_verdict_that_never_comes_is_no(tmp_path, monkeypatch):
    monkeypatch.setattr(exchange_module, "POLL_S", 0.01)
    start = time.monotonic()
    assert not Exchange(tmp_path / "never", "b", ["a", "b"], 0.1).wait_for_verdict()
    assert time.monotonic() - start >= 0.3
    (tmp_path / exchange_module.VERDICT).write_text(json.dumps(True))
    assert Exchange(tmp_path, "b", ["a", "b"], 0.1).wait_for_verdict()


def test_the_table_has_a_row_for_a_check_and_a_line_for_a_failure():
    found = [
        NodeFinding("a", "GPUs", OK, "8 of H100"),
        NodeFinding("b", "GPUs", FAILED, "7 of 8", "leave it out"),
        NodeFinding("a", "disk", OK, "room"),
        NodeFinding("b", "disk", WARNING, "little room"),
    ]
    lines = table(found).splitlines()
    assert [line.split() for line in lines[1:3]] == [
        ["GPUs", "1/2", "FAILED", "7", "of", "8"],
        ["disk", "2/2", "warning", "little", "room"],
    ]
    assert lines[3:] == [
        "preflight: FAILED on b: GPUs: 7 of 8: leave it out",
        "preflight: warning on b: disk: little room",
    ]
