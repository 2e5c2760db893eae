"""The command line beside refusals: help, the resolved configuration, exit codes, and what is imported when."""

from __future__ import annotations

import os
import subprocess
import sys
import zlib

import pytest
import yaml

from megatron_r1 import __version__
from megatron_r1.__main__ import exit_code
from megatron_r1.config.load import load
from megatron_r1.config.recipes import groups, recipes
from megatron_r1.config.schema import resolved
from megatron_r1.config.verbs import VERBS, Verb

HEAVY = ("torch", "megatron", "transformers", "sglang", "wandb", "numpy")
LIMIT = 5.0
"""Times the import of Hydra; with torch imported it would be 8 or more."""


@pytest.fixture
def text(run_command, hydra_seconds, request) -> str:
    """Standard output of a command that succeeds in silence and at once."""
    result = run_command(*request.param.split())
    assert (result.status, result.stderr) == (0, "")
    assert result.processor_seconds < LIMIT * hydra_seconds
    return result.stdout


@pytest.mark.parametrize("text", ["--help", "-h"], indirect=True)
def test_help_lists_verbs_groups_and_recipes_at_once(text):
    assert [verb for verb, entry in VERBS.items() if verb not in text or entry.summary not in text] == []
    text_on_one_line = " ".join(text.split())  # long lists are wrapped
    assert [
        group for group, options in groups().items() if f"{group} {', '.join(options)}" not in text_on_one_line
    ] == []
    assert ", ".join(recipes()) in text_on_one_line
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize("text", ["grpo --help", "--help grpo", "grpo rl.group_size=8 --help"], indirect=True)
def test_help_of_a_verb(text):
    assert VERBS["grpo"].summary in text and "recipe: r1_zero" in text
    assert "  rl  " in text and "  sft  " not in text


@pytest.mark.parametrize("text", ["--help rl.group_size", "grpo --help rl.group_size", "--help rl"], indirect=True)
def test_help_of_a_key(text):
    assert "rl.group_size  (whole number; default 16; at least 1)" in text
    assert "read by: grpo" in text


def test_help_imports_nothing_heavy_and_is_quick(run_command, hydra_seconds):
    result = run_command("grpo", "--help", "rl")
    assert result.status == 0 and result.processor_seconds < LIMIT / 2 * hydra_seconds


CFG_JOB = "grpo --cfg job --config-name r1_zero.yaml rl.group_size=8 seed=3"


@pytest.mark.parametrize("text", [CFG_JOB], indirect=True)
def test_cfg_job_prints_the_resolved_configuration(text):
    tree, whole = yaml.safe_load(text), resolved(load("grpo", ["rl.group_size=8", "seed=3"]))
    assert tree["rl"] == whole["rl"] and tree["reward"] == whole["reward"] and tree["seed"] == 3
    assert "sft" not in tree and "# Responses per prompt" in text


@pytest.mark.parametrize(
    "statement",
    [
        "import megatron_r1.config.load",
        "from megatron_r1.config.load import load; load('pretrain')",
        "from megatron_r1.__main__ import exit_code; assert exit_code(['pretrain', 'x=1']) == 2",
    ],
)
def test_configuration_imports_nothing_heavy(statement):
    check = f"import sys; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", f"{statement}\n{check}"], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("body", "status", "text_on_one_line"),
    [
        ("print(config.seed)", 0, ""),
        (
            "from megatron_r1.errors import Diverged\n    raise Diverged('loss is\\nnot finite')",
            86,
            "loss is not finite\n",
        ),
        (
            "from megatron_r1.errors import ConfigError\n    raise ConfigError('a', 1, 'no')",
            2,
            "megatron-r1: a=1: no\n",
        ),
        ("raise KeyboardInterrupt", 130, ""),
        ("raise ValueError('a bug')", 1, "ValueError: a bug\n"),
        ("raise FileNotFoundError(2, 'none', 'a')", 1, "FileNotFoundError: [Errno 2] none: 'a'\n"),
        ("raise OSError(28, 'No space left on device', 'a/b')", 2, "megatron-r1: a/b: No space left on device\n"),
        ("raise PermissionError(13, 'Permission denied', 'a')", 2, "megatron-r1: a: Permission denied\n"),
        ("raise OSError(122, 'Disk quota exceeded')", 2, "megatron-r1: a file: Disk quota exceeded\n"),
    ],
)
def test_stage_ends_with_the_exit_code_of_its_failure(body, status, text_on_one_line, tmp_path, monkeypatch, capsys):
    name = f"stage_ending_{zlib.crc32(body.encode())}"
    (tmp_path / f"{name}.py").write_text(f"def run(config):\n    {body}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(VERBS, "doctor", Verb(name, "doctor", "", reads=("seed",)))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0" if status == 2 else "1")  # of a refusal, the first rank alone speaks
    assert exit_code(["doctor", "seed=5"]) == status
    written = capsys.readouterr()
    assert written.err.endswith(text_on_one_line) and ("Traceback" in written.err) == (status == 1)
    assert written.out == ("5\n" if status == 0 else "")


def test_no_argument_is_help_and_no_verb_is_an_error(capsys):
    assert exit_code([]) == 0
    assert capsys.readouterr().out.startswith("usage: megatron-r1 VERB")
    assert exit_code(["--cfg", "job"]) == 2
    assert capsys.readouterr().err.startswith("megatron-r1: VERB=: must be one of pretrain")
    assert exit_code(["pretrain", "--config-name"]) == 2


def test_version_is_printed(run_command):
    assert run_command("--version").stdout == f"{__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "status"),
    [(["--help"], 141), (["check", "pretrain"], 141), (["pretrain", "--cfg", "job"], 141), (["pretrain", "x=1"], 2)],
)
def test_output_that_nobody_reads_ends_quietly(arguments, status, tmp_path):
    """As of `megatron-r1 --help | head`, and with 2>&1: Python's own print, rich's tables, and errors."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "megatron_r1", *arguments]
    errors = writer if status == 2 else subprocess.PIPE
    done = subprocess.run(command, stdout=writer, stderr=errors, cwd=tmp_path, text=True, timeout=60)
    os.close(writer)
    assert (done.returncode, done.stderr or "") == (status, "")


def test_a_connection_that_breaks_is_no_closed_output(tmp_path):
    body = "from megatron_r1.__main__ import nobody_reads; raise SystemExit(nobody_reads(BrokenPipeError()))"
    assert subprocess.run([sys.executable, "-c", body], capture_output=True).returncode == 0
