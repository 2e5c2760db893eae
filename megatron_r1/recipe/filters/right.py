"""right: the verifier of the row's task finds the response correct (DeepSeek-R1 report, section 2.3.3: rejection
sampling keeps correct responses only)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from megatron_r1.errors import UserError
from megatron_r1.recipe.candidate import RIGHT, UNKNOWN, WRONG, Candidate
from megatron_r1.rewards.accuracy import Accuracy
from megatron_r1.rewards.reward import Unscored

PROBLEMS = {UNKNOWN: "has no true answer to compare with", WRONG: "its answer is wrong", RIGHT: ""}


def wrong(candidate: Candidate) -> str:
    """Why a response does not count as right."""
    return PROBLEMS[candidate.verdict]


class Verdicts:
    """Says which responses are right, by a verifier or by what their rows record."""

    def __init__(self, accuracy: Accuracy | None, skipped: Collection[str] = ()):
        """
        Args:
            accuracy: verifies responses; None takes the rows' own verdicts.
            skipped: sources whose responses no verifier can judge.
        """
        self._accuracy, self._skipped = accuracy, skipped

    def __call__(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """The candidates with their verdicts.

        Raises:
            UserError: a verifier failed, for no fault of a response; the same command resumes the job.
        """
        if self._accuracy is None:
            return [row if row.correct is None else replace(row, verdict=int(row.correct)) for row in candidates]
        result = list(candidates)
        indices = [index for index, row in enumerate(candidates) if self._has_truth(row)]
        rows = [candidates[index] for index in indices]
        values = self._accuracy.score(rows, [row.response for row in rows])
        for index, row, value in zip(indices, rows, values, strict=True):
            if isinstance(value, Unscored):
                raise UserError(f"{row.location}: could not be verified: {value.reason}")
            result[index] = replace(row, verdict=RIGHT if value == 1.0 else WRONG)
        return result

    def _has_truth(self, row: Candidate) -> bool:
        return bool(row.answer and row.response) and row.source not in self._skipped
