"""Rejection sampling on a set with planted faults: no faulty row is kept, and no clean one dropped."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest

from megatron_r1.__main__ import exit_code
from tests.support.planted import PLANTS, draw, duplicates, faults

CLEAN, EACH = 500, 50


@pytest.fixture(scope="module", params=[11])
def curated(request, tmp_path_factory):
    """Kind of each row that went in, of each that was kept, and the filter that dropped examples of each kind."""
    rng, used = random.Random(request.param), set[str]()
    clean = [draw(rng, used) for _ in range(CLEAN)]
    rows = [("clean", solved.row(f"clean-{number}")) for number, solved in enumerate(clean)]
    rows += faults(rng, used, EACH)
    rng.shuffle(rows)
    rows += duplicates(rng, clean, EACH)
    root = tmp_path_factory.mktemp("planted")
    path = root / "samples.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for _, row in rows))
    keys = [f"curate.sources.planted.path={path}", "curate.dropped_examples=100000"]
    assert exit_code(["curate", f"root={root}", "name=c", *keys]) == 0
    kept = [json.loads(line) for line in (root / "c" / "conversations.jsonl").read_text().splitlines()]
    dropped = [json.loads(line) for line in (root / "c" / "dropped.jsonl").read_text().splitlines()]
    kinds = {row["response"]: kind for kind, row in reversed(rows)}
    return (
        Counter(kind for kind, _ in rows),
        Counter(row["id"].rpartition("-")[0] for row in kept),
        [(kinds[row["response"]], row["filter"], row["why"], row["response"]) for row in dropped],
    )


def test_no_clean_row_is_dropped(curated) -> None:
    _, kept, dropped = curated
    assert [row for row in dropped if row[0] == "clean" and row[1] != "duplicate"] == []
    assert kept["clean"] == CLEAN


def test_no_faulty_row_of_any_kind_is_kept(curated) -> None:
    planted, kept, _ = curated
    kinds = [*PLANTS, "copied", "reformatted", "reworded"]
    assert len(kinds) >= 12 and {planted[kind] for kind in kinds} == {EACH}
    assert {kind: count for kind, count in kept.items() if kind != "clean"} == {}


FILTER_OF = {
    "wrong": {"right"}, "mixed_sentence": {"language"}, "mixed_word": {"language"}, "other_language": {"language"},
    "truncated": {"finished"}, "never_closed": {"finished"}, "no_reasoning": {"format", "reasoning"},
    "trivial_reasoning": {"reasoning", "tags"}, "no_summary": {"format"}, "leaked_tag": {"format", "finished", "tags"},
    "repetition": {"repetition"}, "repeated_reasoning": {"repetition"}, "long_paragraph": {"paragraphs"},
    "code_block": {"code"}, "code_lines": {"code"}, "summary_disagrees_with_reasoning": {"agreement"},
    "summary_with_two_answers": {"agreement", "right"}, "answer_from_nowhere": {"agreement", "language"},
    "broken_characters": {"readable"}, "signs_only": {"readable"},
}  # fmt: skip


@pytest.mark.parametrize("kind", FILTER_OF)
def test_each_fault_is_dropped_by_the_filter_against_it(curated, kind) -> None:
    _, _, dropped = curated
    assert {filter for planted, filter, *_ in dropped if planted == kind} <= FILTER_OF[kind]
