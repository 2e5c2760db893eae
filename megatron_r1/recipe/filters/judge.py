"""judge: a language model finds the answer right where rules cannot tell (DeepSeek-R1 report, section 2.3.3:
DeepSeek-V3 compares the prediction with the true answer)."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_r1.errors import UserError
from megatron_r1.recipe.candidate import Candidate
from megatron_r1.rewards.judge.reward import JudgeReward
from megatron_r1.rewards.reward import Unscored


class JudgeFilter:
    """Drops what the judge gives less than a score."""

    def __init__(self, reward: JudgeReward, least: float):
        """
        Args:
            least: of the judge's scores, 0 to 1, that keeps a row.
        """
        self._reward, self._least = reward, least

    def __call__(self, candidates: Sequence[Candidate]) -> list[str]:
        """Why each is dropped.

        Raises:
            UserError: the judge gave no verdict; the same command resumes the job.
        """
        scores = self._reward.score(candidates, [candidate.response for candidate in candidates])
        reasons = []
        for candidate, score in zip(candidates, scores, strict=True):
            if isinstance(score, Unscored):
                raise UserError(f"{candidate.location}: could not be scored by the judge: {score.reason}")
            reasons.append("" if score >= self._least else f"the judge scored it {score:.2f}")
        return reasons
