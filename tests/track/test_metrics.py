"""The registry knows every metric that the package records, and nothing that it does not; the reference is its own."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_r1.config.reward import RewardConfig
from megatron_r1.config.verbs import VERBS
from megatron_r1.evaluation.benchmarks import BENCHMARKS
from megatron_r1.track import metrics
from megatron_r1.track.metrics import METRICS, PREFIXES, find, reference, reproducible

PACKAGE = Path(metrics.__file__).parents[1]
NAME = re.compile(rf"({'|'.join(PREFIXES)})/[a-z0-9_]+(/NAME)?")
COMPOSED = {
    "rollout/filtered_NAME": ("duplicates", "truncated", "zero_std_groups"),
    "moe/NAME": ("load_max", "max_violation"),
    "moe/mtp_NAME": ("load_max", "max_violation"),
}
"""Names that the package makes of others."""


def names_in_sources() -> dict[str, str]:
    """Every string of the package's code that is a metric's name, with a file that has it; not of the report."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        if (path.name == "metrics.py" and path.parent.name == "track") or path.parent.name == "report":
            continue
        for text in texts_in(ast.parse(path.read_text())):
            if text in COMPOSED or NAME.fullmatch(text):
                made = [text.replace("NAME", part) for part in COMPOSED.get(text, ("NAME",))]
                found |= dict.fromkeys(made, str(path.relative_to(PACKAGE)))
    return found


def texts_in(node: ast.AST) -> Iterator[str]:
    """The text of all literals; of formatted ones with NAME for what is put in."""
    if isinstance(node, ast.JoinedStr):
        yield "".join(str(part.value) if isinstance(part, ast.Constant) else "NAME" for part in node.values)
        return
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    for child in ast.iter_child_nodes(node):
        yield from texts_in(child)


UNPREFIXED = ("evaluation/benchmarks.py", "evaluation/summary.py", "commands/evaluate.py", "rollout/sampling_job.py")
"""Files whose metrics stand in a results file without `eval/`."""
INTERNAL = {"mismatch/tokens"}
"""Sums on the way to a metric, never recorded."""


def test_every_name_in_the_sources_is_registered():
    unknown = {}
    for name, path in names_in_sources().items():
        try:
            find(name)
        except ValueError:
            unknown[name] = path
    assert unknown.keys() == INTERNAL


def test_every_registered_name_is_in_the_sources():
    found = names_in_sources()
    for path in UNPREFIXED:
        found |= dict.fromkeys((f"eval/{text}" for text in texts_in(ast.parse((PACKAGE / path).read_text()))), path)
    lost = [metric.name for metric in METRICS if not any(metric.matches(name) for name in found)]
    assert not lost


def test_measures_of_benchmarks_are_registered():
    for benchmark in BENCHMARKS.values():
        with benchmark.measures(RewardConfig()) as measures:
            assert all(find(f"eval/{name}").commands == ("evaluate",) for name in measures.metrics)


def test_the_reference_is_up_to_date():
    assert (PACKAGE / "track" / "README.md").read_text() == reference()


def test_entries_are_whole():
    names = [metric.name for metric in METRICS]
    assert len(names) == len(set(names))
    for metric in METRICS:
        assert metric.name.split("/")[0] in PREFIXES and metric.meaning.endswith(".")
        assert metric.commands and set(metric.commands) <= VERBS.keys()


def test_unknown_names_are_refused_and_parts_of_a_family_known():
    assert find("rollout/reward/helpfulness").name == "rollout/reward/*"
    for name in ("loss", "train/lose", "rollout/rewards/x"):
        with pytest.raises(ValueError, match=name):
            metrics.check({"step": 1, name: 0.0})


def test_reproducible_leaves_out_what_varies():
    assert reproducible({"step": 1, "train/loss": 2.0, "perf/mfu": 0.1}) == {"step": 1, "train/loss": 2.0}
