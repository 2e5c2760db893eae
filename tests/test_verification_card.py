"""The card of what is verified claims nothing without a command that exists and a figure."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CARD = ROOT / "tests" / "verification.md"
ALLOWED = {"yes", "TE", "unverified", "-"}
"""TE: shown on Transformer Engine without a GPU, by tests that are in tests/transformer_engine."""
FAMILIES = 8


def rows() -> list[list[str]]:
    """The table of claims, which is the first; measurements follow in tables of their own."""
    after = CARD.read_text().splitlines()
    after = after[next(number for number, line in enumerate(after) if line.startswith("| claim ")) :]
    lines = list(itertools.takewhile(lambda line: line.startswith("|"), after))
    header, rule, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len(header) == 1 + FAMILIES + 2 and set("".join(rule)) == {"-"}
    return rows


def test_every_claim_is_answered_for_every_family():
    found = rows()
    assert len({row[0] for row in found}) == len(found) > 10
    for row in found:
        assert len(row) == 1 + FAMILIES + 2, row[0]
        assert set(row[1 : 1 + FAMILIES]) <= ALLOWED, row[0]


def test_what_is_verified_has_a_figure_and_a_command_that_is_there():
    for claim, *answers, command, figures in rows():
        paths = [word for word in re.findall(r"[\w/.-]+", command) if "/" in word]
        assert all((ROOT / path).exists() for path in paths), claim
        assert figures, claim
        if "yes" in answers:
            assert paths, claim
        if "TE" in answers:
            assert "tests/transformer_engine" in command, claim


def test_what_only_a_gpu_can_show_has_a_test_that_is_there():
    section = CARD.read_text().partition("## What only a GPU can show")[2].partition("\n## ")[0]
    named = set(re.findall(r"test_\w+\.py", section))
    assert named == {path.name for path in (ROOT / "tests/gpu").glob("test_*.py")}
