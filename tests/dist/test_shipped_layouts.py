"""Layouts of configs/parallel with the switches and the precision of their jobs, built on ranks that do not exist."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_r1.check.layout_files import LayoutJob, layout_files, layout_jobs
from megatron_r1.config.load import load
from tests.support.fork_server import run_forked_to_the_end

pytestmark = [pytest.mark.dist, pytest.mark.timeout(600)]


def _model(job: LayoutJob) -> str:
    return next(line for line in job.command.overrides if line.startswith("model="))


JOBS = {f"{job.layout}-{_model(job)}": job for path in layout_files() for job in layout_jobs(path)[::-1]}
"""The first job of each layout for each of its models."""
ONE_OF_EACH_MODEL = {_model(job): name for name, job in JOBS.items()}.values()
"""Those that are built in every run of the tests; all others in the slow ones."""
NAMES = [pytest.param(name, marks=[] if name in ONE_OF_EACH_MODEL else pytest.mark.slow) for name in JOBS]


def _described(job: LayoutJob) -> dict[str, Any]:
    command = job.command
    ranks = load(command.verb, command.overrides, command.recipe).check.ranks
    on_cpus = [*command.overrides, "performance.moe_token_dispatcher_type=alltoall"]  # DeepEP is for GPUs
    return {"ranks": ranks, "recipe": command.recipe, "overrides": on_cpus, "verb": command.verb}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> dict[str, Any]:
    """What one process found of the layouts whose tests were chosen."""
    tests = (item for item in request.session.items if isinstance(item, pytest.Function) and item.path == request.path)
    chosen = [test.callspec.params["name"] for test in tests]
    file = tmp_path_factory.mktemp("layouts") / "jobs"
    file.with_suffix(".json").write_text(json.dumps([_described(JOBS[name]) for name in chosen]))
    program = Path(__file__).parents[1] / "support" / "fake_ranks.py"
    run_forked_to_the_end(program, file, seconds=560)
    return dict(zip(chosen, json.loads(file.with_suffix(".found.json").read_text()), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_layout_is_built_with_its_switches(found: dict[str, Any], name: str) -> None:
    result = found[name]
    assert "held" in result, result
    print(f"{name}: {result['seconds']:.1f} s")
    assert {stage: part["numbers"] for stage, part in result["held"].items()} == result["expected"]
