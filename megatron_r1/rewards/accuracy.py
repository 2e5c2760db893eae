"""Accuracy reward: the verifier of the prompt's task compares the answer of a response with the true answer."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial

from megatron_r1.config.reward import RewardConfig
from megatron_r1.data.synthetic.gym import TASKS, verify
from megatron_r1.rewards.code import TASK as CODE
from megatron_r1.rewards.code import CodeReward
from megatron_r1.rewards.exact import same_choice, same_number, same_text
from megatron_r1.rewards.extract import answer_of
from megatron_r1.rewards.gym import PREFIX as GYM
from megatron_r1.rewards.gym import GymVerifier
from megatron_r1.rewards.mathematics import MathVerifier
from megatron_r1.rewards.reward import RewardPrompt, Unscored, Value

Compare = Callable[[str, str], bool]
"""Answer and true answer -> whether the answer is correct."""

COMPARE: dict[str, Compare] = {
    "number": same_number,
    "text": same_text,
    "choice": same_choice,
    **{task: partial(verify, task) for task in TASKS},
}
VERIFIERS = ("number", "text", "choice", "math", CODE)
"""Names of verifiers that the task of a prompt may be, beside reasoning-gym's."""


def is_correct(prompt: RewardPrompt, answer: str | None) -> bool:
    """Whether `answer` solves an arithmetic prompt; reasoning-gym's own scorer verifies its tasks."""
    compare = COMPARE[prompt.task] if prompt.task in TASKS else same_number
    return answer is not None and compare(answer, prompt.answer)


class Accuracy:
    """1 for a correct answer, for a program the share of tests that it passes; verified as the prompt's task says."""

    name = "accuracy"

    def __init__(self, config: RewardConfig):
        self._config = config
        self._math, self._gym = MathVerifier(config.math), GymVerifier(config.math)
        self._lock, self._code = threading.Lock(), list[CodeReward]()

    def score(self, prompts: Sequence[RewardPrompt], texts: Sequence[str]) -> list[Value]:
        """Raises PlatformError: a response has a program to run, and no sandbox works on this machine."""
        values: list[Value] = [0.0] * len(texts)
        by_verifier: dict[str, list[int]] = {}
        for index, prompt in enumerate(prompts):
            by_verifier.setdefault(self._verifier_of(prompt.task), []).append(index)
        for verifier, indices in by_verifier.items():
            verdicts = self._verify(verifier, [prompts[i] for i in indices], [texts[i] for i in indices])
            for index, value in zip(indices, verdicts, strict=True):
                values[index] = value if isinstance(value, Unscored) else float(value)
        return values

    def _verifier_of(self, task: str) -> str:
        if task.startswith(GYM):
            return GYM
        return task if task in (*VERIFIERS, *TASKS) else self._config.verifier

    def _verify(self, verifier: str, prompts: Sequence[RewardPrompt], texts: Sequence[str]) -> Sequence[Value]:
        if verifier == CODE:
            return self._code_reward().score(prompts, texts)
        answers = [answer_of(text, self._config.answer_format) for text in texts]
        truths = [prompt.answer for prompt in prompts]
        if verifier == "math":
            return self._math.verdicts(answers, truths)
        if verifier == GYM:
            return self._gym.verdicts(answers, [prompt.task for prompt in prompts], truths)
        compare = COMPARE[verifier]
        pairs = zip(answers, truths, strict=True)
        return [answer is not None and compare(answer, truth) for answer, truth in pairs]

    def _code_reward(self) -> CodeReward:
        with self._lock:
            if not self._code:
                self._code.append(CodeReward(self._config.sandbox))
            return self._code[0]

    def close(self) -> None:
        """End the worker processes."""
        self._math.close()
        self._gym.close()
