"""Who judges an answer: the task's own verifier, inside the weighted rewards."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from megatron_r1.config.reward import RewardConfig
from megatron_r1.data.prompts.prompts import Prompt
from megatron_r1.data.synthetic.gym import TASKS, verify
from megatron_r1.errors import ConfigError
from megatron_r1.rewards.accuracy import same_number
from megatron_r1.rewards.code import TASK as CODE
from megatron_r1.rewards.code import CodeReward
from megatron_r1.rewards.custom import CustomReward, CustomStepRewards
from megatron_r1.rewards.exact import same_choice, same_text
from megatron_r1.rewards.extract import answer_of
from megatron_r1.rewards.format import format_reward
from megatron_r1.rewards.gym import PREFIX as GYM
from megatron_r1.rewards.gym import GymVerifier
from megatron_r1.rewards.judge.reward import JudgeReward
from megatron_r1.rewards.language import language_consistency, question_language
from megatron_r1.rewards.length import overlong
from megatron_r1.rewards.mathematics import MathVerifier
from megatron_r1.rewards.repetition import repetition
from megatron_r1.rewards.reward import RewardPrompt, Rule, Unscored, Value
from megatron_r1.rewards.score import Rubric, Score, Weighted, WeightedSteps
from megatron_r1.rewards.steps import arithmetic_steps

Scorer = Callable[[Sequence[Prompt], Sequence[str]], list[Score | Unscored]]
"""Prompts and response texts -> scores; may be called by several threads."""

VERIFIERS = ("number", "text", "choice", "math", "code")
"""Tasks that a prompt may name to say how its answer is judged, beside reasoning-gym's."""


def is_correct(prompt: Prompt, answer: str | None) -> bool:
    """Whether `answer` solves an arithmetic prompt; reasoning-gym's tasks are judged by its own scorer."""
    if answer is None:
        return False
    if prompt.task in TASKS:
        return verify(prompt.task, answer, prompt.answer)
    return same_number(answer, prompt.answer)


class Accuracy:
    """1 for a right answer, the share of tests passed for a program; each prompt by the verifier of its task."""

    name = "accuracy"

    def __init__(self, config: RewardConfig):
        self._config = config
        self._math, self._gym = MathVerifier(config.math), GymVerifier(config.math)
        self._lock, self._code = threading.Lock(), list[CodeReward]()

    def score(self, prompts: Sequence[RewardPrompt], texts: Sequence[str]) -> list[Value]:
        """Raises PlatformError: a program is to be run, and there is no sandbox here."""
        values: list[Value] = [0.0] * len(texts)
        by_kind: dict[str, list[int]] = {}
        for place, prompt in enumerate(prompts):
            by_kind.setdefault(self._kind(prompt.task), []).append(place)
        for kind, places in by_kind.items():
            judged = self._judge(kind, [prompts[place] for place in places], [texts[place] for place in places])
            for place, value in zip(places, judged, strict=True):
                values[place] = value if isinstance(value, Unscored) else float(value)
        return values

    def _kind(self, task: str) -> str:
        if task.startswith(GYM):
            return GYM
        return task if task in (*VERIFIERS, *TASKS) else self._config.verifier

    def _judge(self, kind: str, prompts: Sequence[RewardPrompt], texts: Sequence[str]) -> Sequence[Value]:
        if kind == CODE:
            return self._programs().score(prompts, texts)
        answers = [answer_of(text, self._config.answer_format) for text in texts]
        truths = [prompt.answer for prompt in prompts]
        if kind == "math":
            return self._math.verdicts(answers, truths)
        if kind == GYM:
            return self._gym.verdicts(answers, [prompt.task for prompt in prompts], truths)
        pairs = list(zip(answers, truths, strict=True))
        if kind in TASKS:
            return [
                answer is not None and verify(kind, answer, truth)
                for answer, truth in zip(answers, truths, strict=True)
            ]
        same = {"number": same_number, "text": same_text, "choice": same_choice}[kind]
        return [answer is not None and same(answer, truth) for answer, truth in pairs]

    def _programs(self) -> CodeReward:
        with self._lock:
            if not self._code:
                self._code.append(CodeReward(self._config.sandbox))
            return self._code[0]

    def close(self) -> None:
        """End the worker processes."""
        self._math.close()
        self._gym.close()


def rule_scorer(
    config: RewardConfig, count_tokens: Callable[[str], int] | None = None, models: Sequence[Weighted] = ()
) -> Scorer:
    """The configured rewards.

    Args:
        models: rewards by models, which whoever calls has at work.
        count_tokens: the length of a response text, for the penalty on length.

    Raises:
        ConfigError: the user's own function cannot be loaded, or a length is wanted that nobody can tell.
    """
    rules = [Weighted(config.accuracy, Accuracy(config))] if config.accuracy else []

    def add(weight: float, name: str, rule: Callable[[RewardPrompt, str], float]) -> None:
        if weight:
            rules.append(Weighted(weight, Rule(name, rule)))

    def in_language(prompt: RewardPrompt, text: str) -> float:
        target = config.target_language
        return language_consistency(text, question_language(prompt.question) if target == "question" else target)

    add(config.format, "format", lambda _, text: format_reward(text, config.format_style))
    add(config.language, "language", in_language)
    add(config.repetition, "repetition", lambda _, text: repetition(text, config.repetition_ngram_size))
    if config.overlong:
        if count_tokens is None:
            raise ConfigError("reward.overlong", config.overlong, "must be 0 where no tokenizer counts a response")
        count, longest, buffer = count_tokens, config.overlong_tokens, config.overlong_buffer
        add(config.overlong, "overlong", lambda _, text: overlong(count(text), longest, buffer))
    if config.custom:
        rules.append(Weighted(config.custom, CustomReward(config.custom_function)))
    if config.judge:
        rules.append(Weighted(config.judge, JudgeReward(config.judge_config)))
    rules += models
    return Rubric(rules, config.retries, step_rewards(config))


def step_rewards(config: RewardConfig) -> WeightedSteps | None:
    """What rewards single steps; None where nothing does.

    Raises:
        ConfigError: the user's own function cannot be loaded.
    """
    if not config.steps:
        return None
    return WeightedSteps(
        config.steps,
        arithmetic_steps if config.step_rewards == "arithmetic" else CustomStepRewards(config.step_rewards),
    )
