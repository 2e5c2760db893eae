"""What launch/README.md shows: three commands from clone to a job's script, and a command for every number of GPUs."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_r1.check import slurm, storage
from megatron_r1.check.finding import State
from megatron_r1.check.run import check_command
from megatron_r1.check.slurm import Partition
from megatron_r1.cluster.request import command_to_check, requested_job
from megatron_r1.commands import submit
from megatron_r1.config.verbs import VERBS, JobCommand
from tests.launch.test_setup import checkout

__all__ = ["checkout"]

README = (Path(__file__).resolve().parents[2] / "launch/README.md").read_text(encoding="utf-8")
CLONE, SETUP, SUBMIT = re.findall(r"```bash\n(.*?)\n```", README, re.DOTALL)[0].splitlines()
ROWS = re.findall(r"\| `(submit .*--config-name .*)` \|$", README.split("## Which recipe")[1].split("\n## ")[0], re.M)
BROUGHT = {18, 19, 21}
"""Checks of weights, tokenizer and data, which a user brings."""
MEMORY, ENGINE = 13, 14


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster with room on its disk and a partition of 512 nodes."""
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda path: SimpleNamespace(free=1e17))
    monkeypatch.setattr(slurm, "partitions", lambda: [Partition("gpu", None, 512, 0)])


def submitted(line: str) -> JobCommand:
    """The job of a command line of `submit`."""
    words = shlex.split(line)
    verb, *rest = words[words.index("submit") + 1 :]
    named = rest[:1] == ["--config-name"]
    return JobCommand(verb, rest[1] if named else VERBS[verb].recipe, tuple(rest[2 * named :]))


def test_the_second_command_sets_up(checkout: Path) -> None:
    assert CLONE.startswith("git clone ")
    done = subprocess.run(["bash", "-c", SETUP], cwd=checkout, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr.endswith("setup: done\n")


def test_the_third_command_shows_the_job_of_moonlight_on_two_nodes(capsys: pytest.CaptureFixture[str]) -> None:
    assert SUBMIT.startswith(".venv/bin/megatron-r1 submit ") and "dry_run=true" in SUBMIT
    assert submit.run_command(submitted(SUBMIT)) == 0
    shown = capsys.readouterr().out.splitlines()
    assert "#SBATCH --nodes=2" in shown and "#SBATCH --gpus-per-node=8" in shown
    (arguments,) = [line for line in shown if line.startswith("arguments=")]
    assert "model=moonlight_16b" in arguments and "platform=cuda" in arguments
    assert "  num_layers: 27" in shown, "the resolved configuration"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: " ".join(row.split()[1:5]))
def test_check_passes_the_command_for_a_number_of_gpus(row: str) -> None:
    command = submitted(row)
    to_check = command_to_check(command, requested_job(command, lambda _: None))
    if command.verb == "pipeline":
        return  # tests/check looks at the stages of all recipes
    report = check_command(to_check)
    assert {number: report.findings[number] for number in report.refused if number not in BROUGHT} == {}
    states = {report.state(number) for number in (MEMORY, ENGINE)}
    assert states <= {State.PASSED, State.WARNING, State.NOT_APPLICABLE}


def test_there_is_a_command_for_one_gpu_one_node_two_and_more() -> None:
    found = {}
    for row in ROWS:
        keys = dict(re.findall(r" ([\w.]+)=(\d+)", row))
        gpus = int(keys.get("nodes", 1)) * int(keys.get("cluster.gpus_per_node", 8))
        found.setdefault(gpus, set()).add(submitted(row).verb)
    assert all(found[gpus] >= {"pretrain", "sft"} for gpus in (1, 8, 16)) and "pretrain" in found[1024]
    assert all({"grpo", "pipeline"} & found[gpus] for gpus in (1, 8, 16, 32, 640))
