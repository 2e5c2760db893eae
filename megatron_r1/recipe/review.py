"""Decisions of a person about rows: accept, reject, or edit with another text for the response.

Rows are known by the hash of question and response, so that a decision holds in whatever order rows are read. An edited
response passes the filters like any other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_r1.data.row_files import BadRow, as_object, rows_of
from megatron_r1.data.row_sources import RowSource
from megatron_r1.errors import DataError
from megatron_r1.recipe.candidate import Candidate

KEY = "curate.review"
DECISIONS = ("accept", "reject", "edit", "")


@dataclass(frozen=True)
class Review:
    """The decisions of a file."""

    decisions: Mapping[str, str]
    """Id of a row -> accept, reject or edit; rows without a decision are not in it."""
    edited: Mapping[str, str]
    """Id of a row -> its edited response."""
    rows: int = 0
    """Rows of the file."""
    matched: set[str] = field(default_factory=set)
    """Ids of decisions whose rows were read."""

    def decided(self, candidate: Candidate) -> Candidate:
        """A candidate with what the person decided about it."""
        id = review_id(candidate) if self.decisions else ""
        if not (decision := self.decisions.get(id, "")):
            return candidate
        self.matched.add(id)
        return replace(candidate, decision=decision, response=self.edited.get(id, candidate.response))

    def counts(self) -> dict[str, int]:
        """Rows of the file by decision."""
        counts = Counter(self.decisions.values())
        other = {"undecided": self.rows - len(self.decisions), "without a row": len(self.decisions) - len(self.matched)}
        return {name: counts[name] for name in DECISIONS if name} | other


NO_REVIEW = Review({}, {})


def review_id(candidate: Candidate) -> str:
    """Id of a row in review.jsonl."""
    return f"{candidate.text_key:016x}"


def review_row(candidate: Candidate) -> dict[str, Any]:
    """A row of review.jsonl, for a person to fill in `decision`."""
    return {
        "id": review_id(candidate),
        "source": candidate.source,
        "question": candidate.question,
        "response": candidate.response,
        "truth": candidate.answer,
        "decision": "",
        "edited": "",
    }


def read_review(path: str) -> Review:
    """The decisions of a file.

    Raises:
        ConfigError: there is no such file.
        DataError: names the row whose decision is unknown, that is edited without a text, or that has no id or the id
            of another row.
    """
    if not path:
        return NO_REVIEW
    decisions: dict[str, str] = {}
    edited: dict[str, str] = {}
    ids: set[str] = set()
    for location, _, content in rows_of(RowSource(Path(path), path_key=KEY).files()):
        try:
            id, decision, text = _decision(content)
            if id in ids:
                raise BadRow(f"its id {id} is another row's")
        except BadRow as error:
            raise DataError(f"{location}: {error}") from error
        ids.add(id)
        decisions |= {id: decision} if decision else {}
        edited |= {id: text} if decision == "edit" else {}
    return Review(decisions, edited, len(ids))


def _decision(content: Any) -> tuple[str, str, str]:
    """Id, decision and edited response of a row."""
    row = as_object(content)
    id, decision, text = row.get("id"), row.get("decision") or "", row.get("edited") or ""
    if not isinstance(id, str) or not id:
        raise BadRow("has no id")
    decision = decision.strip().lower() if isinstance(decision, str) else decision
    if decision not in DECISIONS:
        raise BadRow(f"decision is {decision!r}: must be accept, reject, edit or empty")
    if not isinstance(text, str) or (decision == "edit" and not text.strip()):
        raise BadRow("its decision is edit, and edited is not text")
    return id, decision, text


def rejected(candidate: Candidate, undecided: str) -> str:
    """Why a person's decision, or the lack of one where `undecided` is hold, drops a row."""
    if candidate.decision == "reject":
        return "a person rejected it"
    return "no person decided about it" if undecided == "hold" and not candidate.decision else ""
