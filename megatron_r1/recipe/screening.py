"""Screens all rows of the sources by the filters of single rows, in parts that a killed job does not repeat.

A part keeps facts about its rows (`facts.py`) and never their text. So memory grows with the number of rows, by 43
bytes each and by 256 more for those that pass, and not with the length of responses; of text, the rows of one part are
held.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import batched
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import orjson
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_r1.config.curate import CurateConfig
from megatron_r1.errors import DataError
from megatron_r1.files import read_json, write_whole
from megatron_r1.recipe.candidate import Candidate
from megatron_r1.recipe.facts import FACTS, KEPT, as_array, facts_of, signature_text, signatures_array
from megatron_r1.recipe.filters.filter import Filter
from megatron_r1.recipe.filters.right import Verdicts
from megatron_r1.recipe.plain_text import signed_text
from megatron_r1.recipe.review import Review
from megatron_r1.recipe.sources import BadCandidate, read_candidates

logger = logging.getLogger(__name__)

BAD_ROW = "bad_row"
"""What drops rows that cannot be read."""
PLAN = "plan.json"


class Dropped(NamedTuple):
    """A row that a filter dropped, and why."""

    row: int
    """Index among all rows."""
    reason: str
    """Name of the filter."""
    why: str


@dataclass(frozen=True)
class Screened:
    """All rows of the sources after the filters of single rows."""

    facts: np.ndarray
    """[rows] of FACTS."""
    reasons: tuple[str, ...]
    """Names of what drops rows, in order: BAD_ROW, then the filters."""
    sources: tuple[str, ...]
    domains: Mapping[str, int]
    """Name -> index."""
    dropped: list[Dropped]
    """Some rows of each filter, from the first of each part."""
    versions: Mapping[str, list[str]]
    """Source -> weight versions that its rows record."""
    signatures: np.ndarray
    """[passed, SIZE] MinHashes of the responses of rows that passed all filters, ascending; none where not needed."""

    def signatures_of(self, rows: np.ndarray) -> np.ndarray:
        """[rows, SIZE] MinHashes of rows, given by their indices, which passed all filters."""
        passed = np.flatnonzero(self.facts["reason"] == KEPT)
        return self.signatures[np.searchsorted(passed, rows)]

    def in_domain(self, domain: str) -> np.ndarray:
        """[rows] whether each row is of the domain."""
        found: np.ndarray = self.facts["domain"] == self.domains.get(domain, len(self.domains))
        return found

    def drops(self) -> dict[str, np.ndarray]:
        """What drops rows -> [sources] how many rows of each source it dropped."""
        facts, sources = self.facts, len(self.sources)
        return {
            name: np.bincount(facts["source"][facts["reason"] == index], minlength=sources)
            for index, name in enumerate(self.reasons)
        }


class Screening:
    """The parts of one curation."""

    def __init__(
        self,
        folder: Path,
        config: CurateConfig,
        filters: Mapping[str, Filter],
        verdicts: Verdicts,
        review: Review,
        plan: Mapping[str, Any],
    ):
        """
        Args:
            plan: what all parts depend on; parts of another plan are removed.
        """
        self._folder, self._config, self._filters = folder, config, filters
        self._verdicts, self._review = verdicts, review
        self._reasons = (BAD_ROW, *filters)
        self._sources = tuple(config.sources)
        folder.mkdir(parents=True, exist_ok=True)
        path, text = folder / PLAN, orjson.dumps(plan, option=orjson.OPT_INDENT_2 | orjson.OPT_SORT_KEYS)
        if (recorded := path.read_bytes() if path.is_file() else b"") != text:
            if recorded:
                logger.warning("%s: its parts are of other sources or settings; screening again", folder)
            for part in folder.glob("[0-9]*.json"):
                part.unlink()
            write_whole(path, text)  # only now: a kill before leaves parts that the next run removes

    def run(self, rows: int) -> Screened:
        """Screen all parts that are not written yet, and gather all.

        Args:
            rows: number of rows of all sources, for the progress bar.

        Raises:
            DataError: more rows cannot be read than are allowed.
        """
        console = Console(stderr=True)
        columns = (TextColumn("curate"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        size, paths, bad = self._config.rows_per_part, [], 0
        with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
            task = bar.add_task("curate", total=rows)
            for number, part in enumerate(batched(read_candidates(self._config, self._review), size)):
                bad += self._count_bad(part, bad)
                paths.append(self._folder / f"{number:06d}.json")
                if not paths[-1].is_file():
                    write_whole(paths[-1], orjson.dumps(self._screen(part, number * size)))
                signed_text.cache_clear()
                bar.advance(task, len(part))
        return self._gathered(paths)

    def _count_bad(self, part: Sequence[Candidate | BadCandidate], before: int) -> int:
        bad = [row for row in part if isinstance(row, BadCandidate)]
        if before + len(bad) > self._config.max_bad_rows:
            last = bad[self._config.max_bad_rows - before]
            allowed = f"curate.max_bad_rows={self._config.max_bad_rows} may be bad"
            raise DataError(f"{last.location}: {last.reason}; {allowed}")
        return len(bad)

    def _screen(self, part: Sequence[Candidate | BadCandidate], first: int) -> dict[str, Any]:
        """The content of a part: facts of its rows, and some of those that each filter dropped."""
        why = {index: (BAD_ROW, row.reason) for index, row in enumerate(part) if isinstance(row, BadCandidate)}
        indices = [index for index in range(len(part)) if index not in why]
        candidates = self._verdicts([row for row in part if isinstance(row, Candidate)])
        for position, found in screen(candidates, self._filters, self._skipped()).items():
            why[indices[position]] = found
        rows = [*part]
        for index, candidate in zip(indices, candidates, strict=True):
            rows[index] = candidate
        shown = _first_of_each(why, self._config.dropped_examples)
        near = self._config.near_duplicates != "off"
        return {
            "rows": [self._facts(row, why.get(index)) for index, row in enumerate(rows)],
            "dropped": [[first + index, *why[index]] for index in shown],
            "versions": sorted({(row.source, row.weight_version) for row in candidates if row.weight_version}),
            "signatures": [
                signature_text(row) for index, row in zip(indices, candidates, strict=True) if near and index not in why
            ],
        }

    def _skipped(self) -> dict[str, list[str]]:
        return {name: source.skip for name, source in self._config.sources.items()}

    def _facts(self, row: Candidate | BadCandidate, why: tuple[str, str] | None) -> list[Any]:
        reason = self._reasons.index(why[0]) if why else KEPT
        return facts_of(row, self._sources.index(row.source), reason)

    def _gathered(self, paths: Sequence[Path]) -> Screened:
        domains: dict[str, int] = {}
        versions: dict[str, set[str]] = {}
        dropped: list[Dropped] = []
        arrays, signatures = [np.empty(0, dtype=FACTS)], [signatures_array(())]
        for path in paths:
            part = read_json(path)
            arrays.append(as_array(part["rows"], domains))
            signatures.append(signatures_array(part["signatures"]))
            dropped += [Dropped(*each) for each in part["dropped"]]
            for source, version in part["versions"]:
                versions.setdefault(source, set()).add(version)
        return Screened(
            facts=np.concatenate(arrays),
            reasons=self._reasons,
            sources=self._sources,
            domains=domains,
            dropped=dropped,
            versions={source: sorted(names) for source, names in versions.items()},
            signatures=np.concatenate(signatures),
        )


def _first_of_each(why: Mapping[int, tuple[str, str]], count: int) -> list[int]:
    """The first `count` rows of each filter, ascending."""
    counts: Counter[str] = Counter()
    shown = []
    for index in sorted(why):
        counts[why[index][0]] += 1
        shown += [index] if counts[why[index][0]] <= count else []
    return shown


def screen(
    candidates: Sequence[Candidate], filters: Mapping[str, Filter], skipped: Mapping[str, Sequence[str]]
) -> dict[int, tuple[str, str]]:
    """Index of each dropped candidate -> the first filter that refuses it, and why.

    Args:
        skipped: source -> filters that its rows pass unchecked.
    """
    dropped: dict[int, tuple[str, str]] = {}
    for name, filter in filters.items():
        indices = [
            index
            for index, candidate in enumerate(candidates)
            if index not in dropped and name not in skipped.get(candidate.source, ())
        ]
        reasons = filter([candidates[index] for index in indices])
        dropped |= {index: (name, why) for index, why in zip(indices, reasons, strict=True) if why}
    return dropped
