"""submit: what is shown of a job, and that a job which a check refuses is never submitted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_r1.commands.submit import run_command
from megatron_r1.config.verbs import JobCommand
from megatron_r1.errors import ExitCode, PlatformError

REFUSED = ("cluster.gpus_per_node=2", "parallel.context=2")
"""On GPUs, sequences are divided in BF16 only."""


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_refused_job_is_shown_in_a_dry_run_and_never_submitted(dry_run, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")  # without sbatch, submission itself would be another error
    overrides = (*REFUSED, f"submit.dry_run={str(dry_run).lower()}")
    assert run_command(JobCommand("pretrain", "pretrain", overrides)) == ExitCode.BAD_CONFIG
    script, table, verdict = capsys.readouterr().out.partition("megatron-r1 check pretrain")
    assert ("#SBATCH --gpus-per-node=2" in script) == dry_run and "the job is refused" in verdict and table
    assert not list(tmp_path.iterdir())


SBATCH = """#!/bin/bash
if [[ $1 == --test-only ]]; then exit 0; fi
echo "sbatch ${*:2:1}" >>calls
if (($(wc -l <calls) == 3)); then echo "error: QOSMaxSubmitJobPerUserLimit" >&2; exit 1; fi
echo "10$(wc -l <calls)"
"""
"""A SLURM whose limit is two jobs of a user, which needs its accounting."""


ON_CPUS = ("cluster.gpus_per_node=0", "cluster.ranks_per_node=1", "platform=cpu")


@pytest.fixture
def slurm(monkeypatch, tmp_path) -> Callable[[], list[str]]:
    """Programs of SLURM that note how they are called, and what they were called with; `queue` is what squeue shows."""
    (tmp_path / "queue").touch()
    note = 'echo "${0##*/} $*" >>calls\n'
    programs = {
        "sbatch": SBATCH,
        "squeue": "#!/bin/bash\ncat queue\n",
        "scancel": f"#!/bin/bash\n{note}",
        "scontrol": f"#!/bin/bash\n[[ $1 == release ]] || exit 1\n{note}",  # and shows no partitions
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    return lambda: Path("calls").read_text().splitlines() if Path("calls").exists() else []


def test_a_recipe_whose_last_stage_is_refused_leaves_no_job_queued(slurm, capsys):
    with pytest.raises(PlatformError, match="QOSMaxSubmitJobPerUserLimit"):
        run_command(JobCommand("pipeline", "quickstart", (*ON_CPUS, "until=evaluate")))
    assert slurm() == ["sbatch --hold", "sbatch --dependency=afterok:101", "sbatch --dependency=afterok:102",
                       "scancel 101 102"]  # fmt: skip
    assert "cancelled: job 101 102" in capsys.readouterr().out


def test_the_first_stage_is_held_until_all_others_wait_for_it(slurm):
    assert run_command(JobCommand("pipeline", "quickstart", (*ON_CPUS, "until=r1_zero"))) == ExitCode.DONE
    assert slurm() == ["sbatch --hold", "sbatch --dependency=afterok:101", "scontrol release 101"]


@pytest.mark.parametrize("recipe", [("pretrain", "pretrain"), ("pipeline", "quickstart")])
def test_a_job_alone_is_not_held(slurm, recipe):
    until = ("until=pretrain",) if recipe[0] == "pipeline" else ()
    assert run_command(JobCommand(*recipe, (*ON_CPUS, *until))) == ExitCode.DONE
    assert len(slurm()) == 1 and "--hold" not in slurm()[0]


@pytest.mark.parametrize(
    ("job", "queued", "refused"),
    [
        ("pretrain pretrain", "runs/pretrain/jobs/train.sh", True),
        ("pretrain pretrain name=other", "runs/pretrain/jobs/train.sh", False),
        ("pretrain pretrain restart=singleton submit.generations=2", "runs/pretrain/jobs/train.sh", False),
        ("pipeline quickstart until=r1_zero", "runs/quickstart/jobs/quickstart.r1_zero/jobs/one_node.sh", True),
        ("pipeline quickstart until=pretrain", "runs/quickstart/jobs/quickstart.r1_zero/jobs/one_node.sh", False),
    ],
)
def test_a_run_has_one_job_in_the_queue(slurm, tmp_path, job, queued, refused):
    """But for restart=singleton, whose jobs start one after the other."""
    Path("queue").write_text(f"90 (null)\n91 {tmp_path}/{queued}\n")
    verb, recipe, *overrides = job.split()
    command = JobCommand(verb, recipe, (*ON_CPUS, *overrides))
    if not refused:
        assert run_command(command) == ExitCode.DONE
        return
    with pytest.raises(PlatformError, match="^job 91 of runs/.* runs or waits: cancel it first"):
        run_command(command)
    assert slurm() == [] and not Path("runs").exists()


def test_without_slurm_one_line_says_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(PlatformError, match="squeue: no such program: .* dry_run=true"):
        run_command(JobCommand("pretrain", "pretrain", ON_CPUS))
    assert not list(tmp_path.iterdir())
