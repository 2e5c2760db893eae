"""Accuracy reward: the verifier of the prompt's task compares the answer of a response with the true answer."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from functools import partial

from megatron_r1.config.reward import RewardConfig
from megatron_r1.data.prompts.files import TASK as UNNAMED
from megatron_r1.data.synthetic.arithmetic import FAMILY
from megatron_r1.data.synthetic.gym import TASKS, verify
from megatron_r1.errors import DataError
from megatron_r1.rewards.code import TASK as CODE
from megatron_r1.rewards.code import CodeReward, read_tests
from megatron_r1.rewards.exact import chosen_letter, plain_quantity, same_choice, same_number, same_text
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
MAX_SHOWN = 60
"""Characters of a true answer in an error."""
PROSE_WORDS = 6
"""Words from which a true answer is prose, which no response repeats word for word, and no expression."""


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
        for verifier, indices in self._by_verifier(prompts).items():
            verdicts = self._verify(verifier, [prompts[i] for i in indices], [texts[i] for i in indices])
            for index, value in zip(indices, verdicts, strict=True):
                values[index] = value if isinstance(value, Unscored) else float(value)
        return values

    def correct(self, prompts: Sequence[RewardPrompt], texts: Sequence[str]) -> list[bool]:
        """Whether each response is correct as a whole; a program that passes some of its tests is not."""
        return [value == 1.0 for value in self.score(prompts, texts)]

    def answer(self, text: str) -> str | None:
        """The answer of a response, where the configuration looks for it; None where there is none."""
        return answer_of(text, self._config.answer_format)

    def has_answers(self, prompt: RewardPrompt) -> bool:
        """Whether responses have answers that can be compared with each other; programs cannot."""
        return self._verifier_of(prompt.task) != CODE

    def same_answer(self, prompt: RewardPrompt, answer: str, other: str) -> bool:
        """Whether two answers are the same text, or equal by the verifier that compares answers with the truth."""
        verifier = self._verifier_of(prompt.task)
        if same_text(answer, other):
            return True
        if verifier == "math":
            return self._math.is_correct(answer, other) is True
        return verifier in COMPARE and COMPARE[verifier](answer, other)

    def truth_problems(self, prompts: Sequence[RewardPrompt]) -> list[str]:
        """For each prompt of a file why no response to it could be correct; empty where one can be.

        Every verifier must find the true answer correct as an answer, or, where it takes tests, be able to read them.
        """
        problems = [""] * len(prompts)
        for verifier, indices in self._by_verifier(prompts).items():
            found = self._unreadable(verifier, [prompts[index] for index in indices])
            for index, problem in zip(indices, found, strict=True):
                problems[index] = problem
        known = ", ".join((*VERIFIERS, *TASKS, f"{GYM}NAME"))
        for index, prompt in enumerate(prompts):
            if prompt.task not in (UNNAMED, FAMILY, *VERIFIERS, *TASKS) and not prompt.task.startswith(GYM):
                problems[index] = f"there is no task {prompt.task[:MAX_SHOWN]!r}: it must be one of {known}"
        return problems

    def _unreadable(self, verifier: str, prompts: Sequence[RewardPrompt]) -> Sequence[str]:
        truths = [prompt.answer for prompt in prompts]
        if verifier == CODE:
            return [_raised(read_tests, truth) for truth in truths]
        if verifier == GYM:
            return self._gym.truth_problems([prompt.task for prompt in prompts], truths)
        if verifier == "math":
            equal = self._equal_themselves(truths)
            return [_problem(verifier, e and not _is_prose(t), t) for e, t in zip(equal, truths, strict=True)]
        readers: dict[str, Callable[[str], object]] = {"choice": chosen_letter, "text": str.strip}
        readable = readers.get(verifier, plain_quantity)
        return [_problem(verifier, readable(truth) not in (None, ""), truth) for truth in truths]

    def _equal_themselves(self, truths: Sequence[str]) -> list[bool]:
        """Whether math-verify finds each truth equal to itself; a deadline passes on a busy machine once, not twice."""
        verdicts = self._math.verdicts(truths, truths)
        failed = [truth for truth, verdict in zip(truths, verdicts, strict=True) if verdict is not True]
        again = iter(self._math.verdicts(failed, failed))
        return [verdict is True or next(again) is True for verdict in verdicts]

    def _by_verifier(self, prompts: Sequence[RewardPrompt]) -> dict[str, list[int]]:
        """Indices of the prompts that each verifier verifies."""
        found: dict[str, list[int]] = {}
        for index, prompt in enumerate(prompts):
            found.setdefault(self._verifier_of(prompt.task), []).append(index)
        return found

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


def truth_problems(config: RewardConfig, prompts: Sequence[RewardPrompt]) -> list[str]:
    """As `Accuracy.truth_problems`, with workers of its own; no verifier reads truths with an accuracy of weight 0, or
    of domains that it does not score."""
    problems = [""] * len(prompts)
    verified = [index for index, prompt in enumerate(prompts) if config.scores(Accuracy.name, prompt.domain)]
    if not (config.accuracy and verified):
        return problems
    accuracy = Accuracy(config)
    try:
        for index, problem in zip(verified, accuracy.truth_problems([prompts[i] for i in verified]), strict=True):
            problems[index] = problem
        return problems
    finally:
        accuracy.close()


def _problem(verifier: str, readable: bool, truth: str) -> str:
    if readable:
        return ""
    shown = truth if len(truth) <= MAX_SHOWN else f"{truth[:MAX_SHOWN]}..."
    others = "reward.verifier=math reads expressions, text compares words"
    if verifier in ("math", "choice", "text"):
        others = "data.prompts.answer_pattern or answer_function can find it, and a row's task names another verifier"
    return f"the verifier {verifier} cannot read its true answer {' '.join(shown.split())!r}; {others}"


def _is_prose(truth: str) -> bool:
    return len(re.findall(r"(?<![\\A-Za-z])[A-Za-z]{3,}", re.sub(r"\\[a-z]+\{[^{}]*\}", "", truth))) >= PROSE_WORDS


def _raised(read: Callable[[str], object], truth: str) -> str:
    try:
        read(truth)
    except DataError as error:
        return str(error)
    return ""
