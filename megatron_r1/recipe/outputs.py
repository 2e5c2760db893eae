"""Writes what a curation keeps, and some of what it drops.

One pass over the sources puts the rows that are written into a temporary file, from which every output takes them in
its own order. No text is held but that of one row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import batched
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from megatron_r1.config.curate import CurateConfig
from megatron_r1.errors import DataError
from megatron_r1.files import replacing
from megatron_r1.recipe.candidate import Candidate
from megatron_r1.recipe.filters.filter import Filter
from megatron_r1.recipe.pairs import Pair
from megatron_r1.recipe.pass_rates import CONTAMINATION, PromptRates
from megatron_r1.recipe.review import Review, review_row
from megatron_r1.recipe.screening import Dropped, Screened
from megatron_r1.recipe.selection import Selection
from megatron_r1.recipe.sources import read_candidates
from megatron_r1.recipe.spool import Spool
from megatron_r1.rewards.extract import ANSWER, END_ANSWER, END_THINK, THINK

DROPPED = "dropped"
SPECIAL_TOKEN = "|special_token|"
ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class Kept:
    """What is written, as rows of the sources."""

    rows: np.ndarray
    """[rows] of conversations and samples, in the order in which they are written."""
    dropped: list[Dropped]
    """Examples for dropped.jsonl."""
    prompts: PromptRates | None = None
    pairs: list[Pair] = field(default_factory=list)

    def written(self, total: int) -> np.ndarray:
        """[total] which rows of the sources are written to any file."""
        mask = np.zeros(total, dtype=bool)
        mask[self.rows] = True
        mask[[each.row for each in self.dropped]] = True
        mask[[row for pair in self.pairs for row in pair]] = True
        if self.prompts:
            mask[self.prompts.rows] = True
        return mask


def write_outputs(
    folder: Path, config: CurateConfig, kept: Kept, total: int, review: Review, contamination: Filter | None
) -> dict[str, int]:
    """Write the files that `curate.outputs` names, and dropped.jsonl; each appears complete or not at all.

    Args:
        total: rows of all sources.
        contamination: drops prompts, where these are written; None keeps all.

    Returns:
        Name of each file -> its rows.
    """
    with Spool(folder / "rows.tmp") as spool:
        written = kept.written(total)
        for index, candidate in enumerate(read_candidates(config, review)):
            if written[index] and isinstance(candidate, Candidate):
                spool.add(index, candidate)
        makers: dict[str, Iterable[Mapping[str, Any]]] = {
            "conversations": (conversation(each, config.style) for each in spool.read(kept.rows)),
            "samples": map(sample, spool.read(kept.rows)),
            "review": map(review_row, spool.read(np.sort(kept.rows))),
            "prompts": prompts(spool, kept.prompts, contamination) if kept.prompts else (),
            "pairs": (pair_row(spool, pair) for pair in kept.pairs),
            DROPPED: dropped_rows(spool, kept.dropped),
        }
        names = [*config.outputs, DROPPED]
        return {f"{name}.jsonl": write_rows(folder / f"{name}.jsonl", makers[name]) for name in names}


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Write rows; returns how many."""
    count = 0
    with replacing(path) as part, part.open("wb") as file:
        for row in rows:
            file.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))
            count += 1
    return count


def conversation(candidate: Candidate, style: str) -> dict[str, Any]:
    """A row as supervised fine-tuning reads it."""
    messages = [*candidate.before, {"role": "assistant", "content": spelt(candidate, style)}]
    return {"messages": messages, **_names(candidate)}


def spelt(candidate: Candidate, style: str) -> str:
    """A response in the style; one without reasoning is its summary alone, but in the style as_sampled."""
    if style == "as_sampled":
        return candidate.response
    reasoning, summary = candidate.reasoning, candidate.summary
    if style == "r1_zero":
        summary = f"{ANSWER}{summary}{END_ANSWER}"
        return f"{THINK}{reasoning}{END_THINK} {summary}" if reasoning else summary
    if not reasoning:
        return summary
    if style == "think":
        return f"{THINK}\n{reasoning}\n{END_THINK}\n\n{summary}"
    return f"{SPECIAL_TOKEN}{reasoning}{SPECIAL_TOKEN}{summary}"


def sample(candidate: Candidate) -> dict[str, Any]:
    """A row with question and response, as the verb sample and another curation read it."""
    row = {"question": _only_question(candidate), "response": candidate.response, "truth": candidate.answer}
    return row | _names(candidate)


def prompts(spool: Spool, rates: PromptRates, contamination: Filter | None) -> Iterator[dict[str, Any]]:
    """Prompts with their pass rates, without those that are held out; these become a step of `rates`."""
    held_out = np.zeros(len(rates.rows), dtype=bool)
    for batch in batched(enumerate(spool.read(rates.rows.tolist())), ROWS_AT_ONCE):
        questions = [replace(candidate, response="") for _, candidate in batch]
        problems = contamination(questions) if contamination else [""] * len(batch)
        for (index, candidate), problem in zip(batch, problems, strict=True):
            held_out[index] = bool(problem)
            if not problem:
                yield prompt_row(candidate, rates.rate(index), int(rates.samples[index]))
    rates.drop(CONTAMINATION, held_out)


def prompt_row(candidate: Candidate, rate: float | None, samples: int) -> dict[str, Any]:
    """A prompt as grpo and sample read it, with its difficulty."""
    row = {"question": _only_question(candidate), "answer": candidate.answer} | _names(candidate)
    return row | {"pass_rate": rate, "samples": samples}


def pair_row(spool: Spool, pair: Pair) -> dict[str, Any]:
    """A pair as dpo and reward_model read it."""
    chosen, rejected = spool.read(pair)
    texts = {"prompt": _only_question(chosen), "chosen": chosen.response, "rejected": rejected.response}
    return texts | _names(chosen) | {"chosen_reward": chosen.reward, "rejected_reward": rejected.reward}


def dropped_rows(spool: Spool, dropped: list[Dropped]) -> Iterator[dict[str, Any]]:
    """Examples of what each filter dropped, and why."""
    for each, candidate in zip(dropped, spool.read(each.row for each in dropped), strict=True):
        fields = {"filter": each.reason, "why": each.why, "location": candidate.location, "source": candidate.source}
        yield fields | {"question": candidate.question, "response": candidate.response, "truth": candidate.answer}


def dropped_examples(screened: Screened, selection: Selection, count: int, seed: int) -> list[Dropped]:
    """At most `count` dropped rows of each filter and each step of the selection, drawn by `seed`."""
    rng = np.random.default_rng([seed, 4])
    examples: list[Dropped] = []
    for name in screened.reasons[1:]:  # a row that cannot be read cannot be shown
        found = [each for each in screened.dropped if each.reason == name]
        examples += [found[index] for index in sorted(rng.permutation(len(found))[:count])]
    for step in selection.steps:
        examples += [Dropped(int(row), step.name, "") for row in sorted(rng.permutation(step.dropped)[:count])]
    return examples


def _only_question(candidate: Candidate) -> str:
    """The question of a row that has nothing else before its response.

    Raises:
        DataError: it has, and the output has no place for it.
    """
    if len(candidate.before) > 1:
        raise DataError(f"{candidate.location}: has messages before its question, which only conversations can hold")
    return candidate.question


def _names(candidate: Candidate) -> dict[str, str]:
    return {"id": candidate.id, "source": candidate.source, "domain": candidate.domain, "task": candidate.task}
