"""The judge's verdicts as a reward, and as preferences for the training of a reward model.

The judge compares in both orders equally often, and each order has half of the weight: a preference for the response
that comes first then cancels out (DeepSeek-R1 report v2, section 3.1: the mean of four comparisons in random order).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

from megatron_r1.config.reward import JudgeConfig
from megatron_r1.rewards.judge.client import Judge
from megatron_r1.rewards.judge.questions import MARGINS, Ask, comparison, correctness
from megatron_r1.rewards.reward import RewardPrompt, Unscored, Value
from megatron_r1.rewards.summary import summary

Triple = tuple[str, str, str]
"""Question, first response, second response."""


class JudgeReward:
    """A value from 0 to 1 for each response: its comparison with the reference, or the share of votes for correct.

    The judge sees the summary of a response, not its reasoning. A response without a verdict is `Unscored`, never 0.
    """

    name = "judge"

    def __init__(self, config: JudgeConfig, part: Callable[[str], str] = summary):
        """
        Args:
            part: response -> the part that the judge sees.

        Raises:
            ConfigError: no endpoint is named.
        """
        self._config, self._part, self.judge = config, part, Judge(config)

    def score(self, prompts: Sequence[RewardPrompt], texts: Sequence[str]) -> list[Value]:
        """A value for each response text, in order."""
        parts = [self._part(text) for text in texts]
        if self._config.mode == "comparison":
            triples = [(prompt.question, part, prompt.answer) for prompt, part in zip(prompts, parts, strict=True)]
            margins = self.margins(triples)
            return [margin if isinstance(margin, Unscored) else (margin + 2) / 4 for margin in margins]
        votes = self._config.votes
        queries = [
            correctness(prompt.question, prompt.answer, part)
            for prompt, part in zip(prompts, parts, strict=True)
            for _ in range(votes)
        ]
        replies = self.judge.ask_all(queries)
        return [mean_of_orders([replies[start : start + votes]]) for start in range(0, len(replies), votes)]

    def margins(self, triples: Sequence[Triple]) -> list[Value]:
        """How much better each first response is than the second, from -2 to 2: the mean over both orders."""
        half = max(1, self._config.votes // 2)
        queries: list[Ask] = []
        for question, first, second in triples:
            queries += [comparison(question, first, second)] * half + [comparison(question, second, first)] * half
        replies = [MARGINS[reply] if isinstance(reply, str) else reply for reply in self.judge.ask_all(queries)]
        result: list[Value] = []
        for start in range(0, len(replies), 2 * half):
            plain, swapped = replies[start : start + half], replies[start + half : start + 2 * half]
            result.append(mean_of_orders([plain, [-reply if isinstance(reply, float) else reply for reply in swapped]]))
        return result


def mean_of_orders(orders: Sequence[Sequence[Any]]) -> Value:
    """The mean over orders of the mean of their votes; exceptions among the replies are no votes.

    Where an order has no vote, the response is unscored, for the reason of the last failure: the other order alone
    would be biased by the judge's preference for a position.
    """
    counted = [[float(reply) for reply in replies if not isinstance(reply, Exception)] for replies in orders]
    if all(counted):
        return fmean(map(fmean, counted))
    last = [reply for replies in orders for reply in replies if isinstance(reply, Exception)][-1]
    return Unscored(f"judge: {type(last).__name__}: {last}")
