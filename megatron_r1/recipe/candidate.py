"""A candidate: one row of a source with its question and response, however the source spells it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_r1.config.curate import CurateSourceConfig
from megatron_r1.config.sft import ConversationsConfig
from megatron_r1.data.chat.rows import conversation_of
from megatron_r1.data.prompts.files import TASK
from megatron_r1.data.row_files import BadRow, as_object
from megatron_r1.recipe.plain_text import signed_text
from megatron_r1.rewards.extract import END_THINK, THINK, split_reasoning
from megatron_r1.rewards.summary import summary

UNKNOWN, WRONG, RIGHT = -1, 0, 1
"""Verdicts on a response; UNKNOWN where there is no true answer to compare it with."""
_CONVERSATIONS = ConversationsConfig(path="rows")


@dataclass(frozen=True, slots=True)
class Candidate:
    """One row of a source; it is also a prompt as rewards read it."""

    source: str
    """Name of its source."""
    location: str
    """file:row."""
    id: str
    domain: str
    question: str
    """The last message of the user."""
    response: str
    """The whole response; empty where the row is a prompt."""
    before: tuple[Mapping[str, Any], ...]
    """The messages before the response."""
    answer: str = ""
    """The true answer; empty where the row has none."""
    task: str = TASK
    finish_reason: str = ""
    """stop or length of a sample; empty where the row does not say."""
    reward: float | None = None
    correct: bool | None = None
    """As the row records it."""
    weight_version: str = ""
    verdict: int = UNKNOWN
    decision: str = ""
    """Of a person: accept, reject, edit (of which `response` is the result), or empty for none."""

    @property
    def reasoning(self) -> str:
        """The text of the reasoning; empty where the response has none."""
        return split_reasoning(self.response).reasoning.strip()

    @property
    def summary(self) -> str:
        """The text after the reasoning, without answer tags around it."""
        return summary(self.response).strip()

    @property
    def prompt_key(self) -> int:
        """64-bit hash of the messages before the response, in the form in which they are compared."""
        return hash_of(signed_text(message["content"]) for message in self.before)

    @property
    def text_key(self) -> int:
        """64-bit hash of question and response, in the form in which they are compared."""
        return hash_of([*(signed_text(message["content"]) for message in self.before), signed_text(self.response)])


def candidate_of(row: Any, source: str, config: CurateSourceConfig, location: str, id: str) -> Candidate:
    """The candidate of a row: a sample, a conversation, or else a prompt.

    Raises:
        BadRow: the row is none of them.
    """
    row = as_object(row)
    is_sample = config.question_field in row
    if is_sample:
        question, response = row[config.question_field], row.get(config.response_field) or ""
        before: tuple[Mapping[str, Any], ...] = ({"role": "user", "content": question},)
    else:
        *earlier, last = conversation_of(row, _CONVERSATIONS)
        before, response = tuple(earlier), last["content"]
        question = earlier[-1]["content"]
    for name, text in ((config.question_field, question), (config.response_field, response)):
        if not isinstance(text, str):
            raise BadRow(f"{name} is not text")
    if not question.strip():
        raise BadRow(f"{config.question_field} is empty")
    if config.reasoning_field and (given := _text(row, config.reasoning_field)):
        response = f"{THINK}{_reasoning_of(given)}{END_THINK}\n\n{response}"
    return Candidate(
        source=source,
        location=location,
        id=_text(row, "id") or id,
        domain=config.domain or _text(row, "domain") or source,
        question=question,
        response=_with_opening(response),
        before=before,
        answer=_text(row, config.truth_field) or _text(row, "answer"),
        task=_text(row, "task") or TASK,
        finish_reason=_text(row, "finish_reason"),
        reward=_number(row, "reward"),
        correct=row["correct"] if isinstance(row.get("correct"), bool) else None,
        weight_version=_text(row, "weight_version"),
    )


def _text(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value).strip()
    if value is None:
        return ""
    raise BadRow(f"{name} is neither text nor a number")


def _number(row: Mapping[str, Any], name: str) -> float | None:
    value = row.get(name)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _reasoning_of(response: str) -> str:
    """The reasoning of a response; all of it where it has no think tags."""
    parts = split_reasoning(response)
    return (parts.reasoning or parts.summary).strip()


def _with_opening(response: str) -> str:
    """The response with the think tag that its prompt may have opened."""
    return THINK + response if END_THINK in response and THINK not in response else response


def hash_of(texts: Iterable[str]) -> int:
    """64-bit hash of texts of one line each."""
    lines = "\n".join(texts).encode(errors="replace")
    return int.from_bytes(hashlib.blake2b(lines, digest_size=8).digest(), "little")
