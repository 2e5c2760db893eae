"""submit: what is shown of a job, and that a job which a check refuses is never submitted."""

from __future__ import annotations

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


def test_a_recipe_whose_last_stage_is_refused_leaves_no_job_queued(capsys, monkeypatch, tmp_path):
    programs = {"sbatch": SBATCH, "scancel": '#!/bin/bash\necho "scancel $*" >>calls\n', "squeue": "#!/bin/bash\n"}
    for name, text in programs.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    machine = ("cluster.gpus_per_node=0", "cluster.ranks_per_node=1", "platform=cpu")
    with pytest.raises(PlatformError, match="QOSMaxSubmitJobPerUserLimit"):
        run_command(JobCommand("pipeline", "quickstart", (*machine, "until=evaluate")))
    calls = Path("calls").read_text().splitlines()
    assert calls == ["sbatch --hold", "sbatch --dependency=afterok:101", "sbatch --dependency=afterok:102",
                     "scancel 101 102"]  # fmt: skip
    assert "cancelled: job 101 102" in capsys.readouterr().out


def test_without_slurm_one_line_says_what_is_missing(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")
    machine = ("cluster.gpus_per_node=0", "cluster.ranks_per_node=1", "platform=cpu")
    with pytest.raises(PlatformError, match="squeue: no such program: .* dry_run=true"):
        run_command(JobCommand("pretrain", "pretrain", machine))
    assert not list(tmp_path.iterdir())
