"""Variables that a launcher sets, sets in part, or left behind: understood, or an error of one line that names one."""

from __future__ import annotations

import socket

import pytest

from megatron_r1.__main__ import exit_code
from megatron_r1.errors import PlatformError
from megatron_r1.platform.launcher import (
    check_launcher,
    is_rank_zero,
    local_rank,
    local_world_size,
    rank,
    ranks_from_srun,
    tasks_of_nodes,
    without_launcher,
    world_size,
)

NAMES = ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
WHOLE = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1"} | {
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


@pytest.fixture
def variables(monkeypatch):
    """Sets these variables, and no others of a launcher."""

    def only(given: dict[str, str]) -> None:
        for name in (*NAMES, "SLURM_NTASKS"):
            monkeypatch.delenv(name, raising=False)
        for name, value in given.items():
            monkeypatch.setenv(name, value)

    only({})
    return only


def test_whole_sets_of_variables_are_read(variables):
    variables(WHOLE)
    check_launcher()
    assert (world_size(), rank(), local_world_size(), local_rank(), is_rank_zero()) == (4, 3, 2, 1, False)
    variables({name: WHOLE[name] for name in NAMES if not name.startswith("LOCAL")})
    check_launcher()
    assert (local_world_size(), local_rank()) == (4, 3)


LEFT_BEHIND = [
    {},
    {"RANK": "1"},
    {"RANK": "x", "LOCAL_RANK": ""},
    {"LOCAL_WORLD_SIZE": "0"},
    {"WORLD_SIZE": "1", "RANK": "3", "LOCAL_RANK": "7", "LOCAL_WORLD_SIZE": "8"},
    {"MASTER_ADDR": "no-such-host.invalid", "MASTER_PORT": "x"},
    {**WHOLE, "WORLD_SIZE": "1"},
]


@pytest.mark.parametrize("given", LEFT_BEHIND)
def test_what_a_launcher_left_behind_does_not_count_without_others(variables, given):
    variables(given)
    check_launcher()
    assert (world_size(), rank(), local_world_size(), local_rank(), is_rank_zero()) == (1, 0, 1, 0, True)


WRONG = [
    ("WORLD_SIZE", ""),
    ("WORLD_SIZE", "0"),
    ("WORLD_SIZE", "-2"),
    ("WORLD_SIZE", "two"),
    ("WORLD_SIZE", "2.0"),
    ("RANK", None),
    ("RANK", ""),
    ("RANK", "4"),
    ("RANK", "-1"),
    ("LOCAL_WORLD_SIZE", "0"),
    ("LOCAL_WORLD_SIZE", "5"),
    ("LOCAL_WORLD_SIZE", "all"),
    ("LOCAL_RANK", None),
    ("LOCAL_RANK", "2"),
    ("LOCAL_RANK", "1.5"),
    ("MASTER_ADDR", None),
    ("MASTER_ADDR", ""),
    ("MASTER_ADDR", "no-such-host.invalid"),
    ("MASTER_ADDR", "a" * 300),
    ("MASTER_PORT", None),
    ("MASTER_PORT", "tcp://29500"),
    ("MASTER_PORT", "0"),
    ("MASTER_PORT", "65536"),
]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_a_variable_that_is_missing_or_wrong_is_named(variables, name, value):
    variables({key: text for key, text in {**WHOLE, name: value}.items() if text is not None})
    with pytest.raises(PlatformError) as refused:
        check_launcher()
    named = f"{name} is not set" if value is None or (name, value) == ("MASTER_ADDR", "") else f"{name}={value}: "
    assert str(refused.value).startswith(named) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"WORLD_SIZE": ""}, "megatron-r1: WORLD_SIZE=: must be a whole number from 1; "),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "megatron-r1: MASTER_ADDR is not set, and WORLD_SIZE=2: "),
        ({"WORLD_SIZE": "2"}, "megatron-r1: RANK is not set, and WORLD_SIZE=2: "),
        ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_WORLD_SIZE": "0"}, "megatron-r1: LOCAL_WORLD_SIZE=0: must be"),
        ({**WHOLE, "LOCAL_RANK": "9"}, "megatron-r1: LOCAL_RANK=9: must be"),
    ],
)
def test_the_command_line_says_so_in_one_line(variables, given, line, tmp_path, capsys):
    variables(given)
    assert exit_code(["pretrain", "platform=cpu", f"root={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(line) and error.count("\n") == 1
    assert not any(tmp_path.iterdir())


def test_a_rank_without_others_tells_its_errors(variables, capsys):
    """Other ranks of a job are silent about a wrong key, because rank 0 names it."""
    variables({"RANK": "1"})
    assert exit_code(["pretrain", "nosuch=1"]) == 2
    assert "nosuch" in capsys.readouterr().err
    variables({"WORLD_SIZE": "x"})
    assert exit_code(["pretrain", "nosuch=1"]) == 2
    assert "nosuch" in capsys.readouterr().err
    variables(WHOLE)
    assert exit_code(["pretrain", "nosuch=1"]) == 2
    assert capsys.readouterr().err == ""


def test_other_processes_do_not_take_part(variables):
    variables(WHOLE)
    others = {"TORCHELASTIC_USE_AGENT_STORE": "True", "GROUP_RANK": "0", "ROLE_NAME": "default", "ROLE_WORLD_SIZE": "4"}
    of_srun = {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "4", "SLURM_NTASKS": "4"}
    kept = {"PATH": "/bin", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "0", "RANKS": "2", "SLURM_JOB_ID": "4"}
    assert without_launcher({**WHOLE, **others, **of_srun, **kept}) == kept


SRUN = {
    "SLURM_STEP_NUM_TASKS": "28",
    "SLURM_STEP_TASKS_PER_NODE": "8(x3),4",
    "SLURM_STEP_NODELIST": "node[08-11]",
    "SLURM_NODEID": "3",
    "SLURM_PROCID": "27",
    "SLURM_LOCALID": "3",
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "1",
}
FROM_SRUN = {
    "WORLD_SIZE": "28",
    "RANK": "27",
    "LOCAL_WORLD_SIZE": "4",
    "LOCAL_RANK": "3",
    "MASTER_ADDR": "node08",
    "MASTER_PORT": str(12_000 + (4711 * 16 + 1) % 20_000),
}


def test_ranks_are_those_that_srun_started():
    assert ranks_from_srun(SRUN) == FROM_SRUN
    own = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    assert ranks_from_srun(SRUN | own) == FROM_SRUN | own
    one_node = SRUN | {"SLURM_STEP_NODELIST": "node08", "SLURM_STEP_TASKS_PER_NODE": "28", "SLURM_NODEID": "0"}
    assert ranks_from_srun(one_node)["MASTER_ADDR"] == "127.0.0.1"


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"SLURM_JOB_ID": "4711", "SLURM_NTASKS": "28", "SLURM_PROCID": "0"},  # a batch script itself
        {**SRUN, "WORLD_SIZE": "16", "RANK": "9"},  # srun started torchrun
        {**SRUN, "SLURM_STEP_NUM_TASKS": "1"},
    ],
)
def test_ranks_are_not_taken_from_slurm_without_srun_or_below_torchrun(given):
    assert ranks_from_srun(given) == {}


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (
            {"SLURM_STEP_TASKS_PER_NODE": "8(x"},
            "SLURM's variables of this step make no sense: 8\\(x is no list of tasks",
        ),
        ({"SLURM_NODEID": "4"}, "make no sense"),
        ({"SLURM_STEP_NODELIST": "node[8-"}, "make no sense"),
        ({"SLURM_PROCID": None}, "SLURM_PROCID is not set, and SLURM_STEP_NUM_TASKS is"),
    ],
)
def test_a_variable_of_srun_that_makes_no_sense_is_refused(wrong, reason):
    given = {name: value for name, value in {**SRUN, **wrong}.items() if value is not None}
    with pytest.raises(PlatformError, match=reason):
        ranks_from_srun(given)


def test_tasks_of_nodes_are_read():
    assert tasks_of_nodes("8(x3),4") == [8, 8, 8, 4] and tasks_of_nodes("2") == [2]


def test_a_task_of_a_job_that_srun_did_not_start_is_refused(variables):
    variables({"SLURM_NTASKS": "8"})
    with pytest.raises(PlatformError, match="^SLURM_NTASKS=8: srun has to start these tasks .*WORLD_SIZE=1 runs one"):
        check_launcher()
    variables({"SLURM_NTASKS": "8", "WORLD_SIZE": "1"})
    check_launcher()


def test_a_rank_that_sees_one_gpu_takes_it(variables, monkeypatch):
    """As SLURM gives each task its own with --gpus-per-task=1."""
    from megatron_r1.platform import Platform

    variables(WHOLE)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert Platform("cuda", "nccl", transformer_engine=False).device == "cuda:0"
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert Platform("cuda", "nccl", transformer_engine=False).device == "cuda:1"


def test_a_port_in_use_is_named(variables, run_python):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        given = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        assert run_python(given) == f"MASTER_PORT={port}: is in use on this machine; choose another"


def test_an_interface_that_does_not_exist_is_named(variables, run_python):
    assert run_python({"GLOO_SOCKET_IFNAME": "eth77"}).startswith("the ranks cannot join (GLOO_SOCKET_IFNAME=eth77): ")


JOIN = """
from megatron_r1.config.parallel import ParallelConfig
from megatron_r1.errors import PlatformError
from megatron_r1.parallel.mesh import process_groups
from megatron_r1.platform import Platform
try:
    with process_groups(Platform("cpu", "gloo", False), ParallelConfig(), 0, 1):
        pass
except PlatformError as error:
    print(error)
"""


@pytest.fixture
def run_python():
    """Joins the ranks in a process of its own; returns the error."""
    import os
    import subprocess
    import sys

    def run(given: dict[str, str]) -> str:
        done = subprocess.run(
            [sys.executable, "-c", JOIN], env=os.environ | given, capture_output=True, text=True, timeout=60, check=True
        )
        return done.stdout.strip()

    return run
