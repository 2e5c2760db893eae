"""Checks of rewards: functions and reward models that they name, the sandbox, the judge."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from megatron_r1.check.finding import Check, Finding, Job, finding_of, passed, refused, warning
from megatron_r1.checkpoint.manifest import read_manifest
from megatron_r1.config.keys import reads
from megatron_r1.errors import PlatformError, UserError
from megatron_r1.rewards.judge.reachable import unreachable
from megatron_r1.rewards.sandbox.command import find_tools
from megatron_r1.runs.source import find_checkpoint

JUDGE_TIMEOUT_S = 2.0


def _rewards(job: Job) -> Iterator[Finding]:
    reward = job.config.reward
    for key in ("custom_function", "step_rewards"):
        location = getattr(reward, key)
        if ".py:" in location:
            yield from _function(f"reward.{key}", location)
    for name, source in reward.models.items():
        if source not in job.made_before:
            try:
                find_checkpoint(source, read_manifest, f"reward.{name}_model")
            except UserError as error:
                yield finding_of(error)
    if reward.accuracy and job.config.reward.verifier:
        try:
            find_tools()
        except PlatformError as error:
            yield warning(f"here: {error}", "needed on the nodes only where prompts have tests; see doctor there")
    if reward.judge:
        yield _judge(reward.judge_config.url)


def _function(key: str, location: str) -> Iterator[Finding]:
    """The file is parsed, not run."""
    file, _, name = location.rpartition(":")
    path = Path(file).expanduser()
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"), filename=file)
    except (OSError, SyntaxError, UnicodeDecodeError) as error:
        yield refused(f"{key}={location}: {error}", "name a Python file that can be read, FILE.py:NAME")
        return
    bound = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    bound |= {target.id for node in tree.body if isinstance(node, ast.Assign) for target in node.targets
              if isinstance(target, ast.Name)}  # fmt: skip
    if name not in bound and not any(isinstance(node, ast.Import | ast.ImportFrom) and any(
            name in (alias.name, alias.asname) for alias in node.names) for node in tree.body):  # fmt: skip
        yield refused(f"{key}={location}: the file has no function {name}", f"it has {', '.join(sorted(bound))}")


def _judge(url: str) -> Finding:
    if reason := unreachable(url, JUDGE_TIMEOUT_S):
        return warning(
            f"reward.judge_config.url={url}: not reached from here ({reason})", "start it before the job starts"
        )
    return passed(f"the judge at {url} answers")


CHECKS = (Check(24, "rewards, sandbox, judge", _rewards, lambda job: reads(job.verb, "reward.custom_function")),)
