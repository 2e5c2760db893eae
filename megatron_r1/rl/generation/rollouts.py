"""From prompts to scored samples: generate, score, filter, journal; or read the step from the journal.

A step that a killed run had already sampled is read, not sampled again.
"""

from __future__ import annotations

import random
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache

from megatron_r1.config.rl import RLConfig
from megatron_r1.config.rollout import RolloutConfig
from megatron_r1.data.chat.prompt_format import PromptFormatter
from megatron_r1.data.prompts.prompts import Prompt, Prompts
from megatron_r1.data.tokenizer import response_text
from megatron_r1.errors import NoRolloutCapacity
from megatron_r1.parallel.phases import phase
from megatron_r1.rewards.reward import Unscored
from megatron_r1.rewards.score import Score, Scorer
from megatron_r1.rewards.steps import RewardedStep
from megatron_r1.rl.generation.filters import ZERO_STD, apply_filters, build_filters, counted_as
from megatron_r1.rollout.engine import Completion, FailedRequest, Request, RolloutEngine, Sampling
from megatron_r1.rollout.journal import Journal
from megatron_r1.rollout.routed_experts import RoutedLayers
from megatron_r1.rollout.sample import Sample, StepRewards


@dataclass(frozen=True)
class Rollout:
    """The samples of one step."""

    samples: list[Sample]
    """Whole groups one after the other, numbered from 0."""
    counts: dict[str, int]
    """Groups and responses that are not trained on, by reason; and prompts that were sampled in their place."""
    seconds: float = field(default=0.0, compare=False)
    """From the first request to the last score; 0 where the journal had it."""

    def without_responses(self) -> Rollout:
        """What every rank knows of it."""
        return replace(self, samples=[replace(sample, response=None, text="") for sample in self.samples])


REFILLS = 1 << 40
"""Index of the first prompt that replaces a dropped group's. Far from the others, so that no step's prompts depend on
what another step dropped."""
UNFINISHED = "\ufffd"
"""What a decoder writes for bytes that are not yet a whole character."""


class Rollouts:
    """The rollouts of a run, by step: the same step always has the same prompts, and is sampled once.

    Several threads may take rollouts, each of another step.
    """

    def __init__(
        self,
        prompts: Prompts,
        engine: RolloutEngine,
        formatter: PromptFormatter,
        journal: Journal,
        scorer: Scorer,
        rollout: RolloutConfig,
        rl: RLConfig,
        seed: int,
        routed: RoutedLayers | None = None,
    ):
        """
        Args:
            prompts: the endless list of prompts.
            engine: samples responses.
            formatter: makes a prompt's tokens.
            journal: rollouts already sampled.
            scorer: prompts and response texts -> scores.
            routed: the layers whose experts the engine records with each response; None records none.
        """
        self._prompts, self._engine, self._formatter, self._journal = prompts, engine, formatter, journal
        self._scorer, self._rollout, self._rl, self._seed = scorer, rollout, rl, seed
        self._routed = routed
        self._filters = build_filters(rl.filters)
        self._lost_reason = ""

    def take(self, step: int, first_prompt: int) -> Rollout:
        """The rollout of `step`, whole groups one after the other.

        It is in the journal before it is returned: a run that is killed while training on it trains on the same rollout
        again, and continues with the same prompts after it.

        Raises:
            NoRolloutCapacity: no server is available, or every group failed.
        """
        no_counts = dict.fromkeys(self._count_names(), 0)
        if (found := self._journal.read_all(step)) is not None:
            samples, notes = found
            return Rollout(samples, no_counts | notes)
        started = time.perf_counter()
        rollout = self._sample(step, first_prompt)
        seconds, samples = time.perf_counter() - started, rollout.samples
        if self._rl.shuffle_rewards:
            samples = shuffle_rewards(samples, f"{self._seed} {step}")
        self._journal.write(step, samples, rollout.counts if rollout.counts != no_counts else None)
        return replace(rollout, samples=samples, seconds=seconds)

    @property
    def busy_seconds(self) -> float:
        """Seconds that the engine has spent on requests so far."""
        return self._engine.busy_seconds

    def _count_names(self) -> list[str]:
        """Names of the metrics that count groups and responses that are not trained on."""
        responses = [counted_as(name) for name in self._filters if name != ZERO_STD]
        names = ["rollout/lost_groups", "rollout/unscored_groups"]
        names += ["rollout/filtered_small_groups", *responses] if responses else []
        names += [counted_as(ZERO_STD)] if ZERO_STD in self._filters else []
        return names + (["rollout/resampled_prompts"] if self._rl.filters.max_resample_rounds else [])

    def _sample(self, step: int, first_prompt: int) -> Rollout:
        """Rounds of prompts until there are enough groups, or no further round is allowed.

        When filters drop every group, the dropped groups are used after all: a step needs samples.
        """
        counts = Counter(dict.fromkeys(self._count_names(), 0))
        used: list[list[Sample]] = []
        dropped: list[list[Sample]] = []
        index = first_prompt
        for number in range(1 + self._rl.filters.max_resample_rounds):
            if not (missing := self._rl.prompts_per_rollout - len(used)):
                break
            if number == 1:
                index = REFILLS + first_prompt * self._rl.filters.max_resample_rounds
            groups = self._round(step, number, index, missing)
            index += missing
            if number:
                counts["rollout/resampled_prompts"] += missing
            for group in groups:
                if isinstance(group, str):
                    counts[group] += 1
                    continue
                remaining, removed = apply_filters(group, self._filters)
                counts.update(removed)
                (used if remaining else dropped).append(remaining or group)
        if not (used or dropped):
            raise NoRolloutCapacity(f"step {step}: all its prompts were lost; the last one: {self._lost_reason}")
        samples = [replace(sample, group=number) for number, group in enumerate(used or dropped) for sample in group]
        return Rollout(samples, dict(counts))

    def _round(self, step: int, number: int, first_prompt: int, count: int) -> list[list[Sample] | str]:
        """The scored responses to `count` prompts; for a group that cannot be used, the metric that counts it."""
        prompts = [self._prompts.at(first_prompt + i) for i in range(count)]
        requested = [(group, prompt) for group, prompt in enumerate(prompts) for _ in range(self._rl.group_size)]
        tokens = [self._formatter.tokens(prompt.question) for prompt in prompts]
        name = f"{step}" if number == 0 else f"{step}.{number}"
        requests = [Request(f"{name}-{i}", tokens[group]) for i, (group, _) in enumerate(requested)]
        sampling = Sampling(
            temperature=self._rollout.temperature,
            top_p=self._rollout.top_p,
            max_tokens=self._rollout.max_response_tokens,
            stop_tokens=self._formatter.tokenizer.stop_tokens,
            seed=self._seed * 1_000_003 + step + number * 7_368_787,
            routed=self._routed,
        )
        outcomes = self._engine.generate(requests, sampling)
        groups: list[list[Sample] | str] = [[] for _ in prompts]
        paired = [(*request, outcome) for request, outcome in zip(requested, outcomes, strict=True)]
        completions = [(group, prompt, outcome) for group, prompt, outcome in paired if isinstance(outcome, Completion)]
        texts = [self._text(completion.response.tokens.tolist()) for _, _, completion in completions]
        openings = [self._formatter.opening(prompt.question) for prompt in prompts]
        whole = [openings[group] + text for (group, _, _), text in zip(completions, texts, strict=True)]
        with phase("rewards"):
            scores = self._scorer([prompt for _, prompt, _ in completions], whole)
        for (group, prompt, completion), text, score in zip(completions, texts, scores, strict=True):
            members = groups[group]
            if isinstance(score, Unscored):
                self._lost_reason, groups[group] = score.reason, "rollout/unscored_groups"
            elif isinstance(members, list):
                opening = openings[group]
                members.append(scored_sample(group, prompt, completion, text, score, self._text, opening))
        for group, _, outcome in paired:
            if isinstance(outcome, FailedRequest):
                self._lost_reason, groups[group] = outcome.reason, "rollout/lost_groups"
        return groups

    def _text(self, response_tokens: Sequence[int]) -> str:
        return response_text(response_tokens, self._formatter.tokenizer)


def scored_sample(
    group: int,
    prompt: Prompt,
    completion: Completion,
    text: str,
    score: Score,
    decode: Callable[[Sequence[int]], str],
    opening: str = "",
) -> Sample:
    """A completion with its score.

    Args:
        decode: tokens -> text.
        opening: what the prompt held of the response, which was scored with it.
    """
    steps = [step._replace(end=step.end - len(opening)) for step in score.steps if step.end > len(opening)]
    return Sample(
        prompt_id=prompt.id,
        group=group,
        prompt_length=len(completion.response.prompt_tokens),
        response_length=len(completion.response.tokens),
        weight_version=completion.weight_version,
        finish_reason=completion.finish_reason,
        reward=score.total,
        reward_parts=score.parts,
        version_changes=completion.version_changes,
        steps=steps_at_tokens(steps, completion.response.tokens.tolist(), decode) if steps else (),
        text=text,
        response=completion.response,
    )


def steps_at_tokens(
    steps: Sequence[RewardedStep], tokens: Sequence[int], decode: Callable[[Sequence[int]], str]
) -> StepRewards:
    """The token that completes each step of a response's text, and the step's reward.

    The sampled tokens need not be those that the tokenizer would make of the text, so tokens are decoded rather than
    the text encoded: about log2(tokens) times for each step.

    Args:
        decode: tokens -> text; `steps` are those of the text of all `tokens`.
    """

    @cache
    def length_of(count: int) -> int:
        """Characters of the text of the first `count` tokens, without an unfinished one at its end."""
        return len(decode(tokens[:count]).rstrip(UNFINISHED))

    counts = range(1, len(tokens))
    return tuple((bisect_left(counts, step.end, key=length_of), step.value) for step in steps)


def shuffle_rewards(samples: list[Sample], seed: str) -> list[Sample]:
    """The same samples with shuffled rewards, for a control experiment."""
    rewards = [(sample.reward, sample.reward_parts) for sample in samples]
    random.Random(seed).shuffle(rewards)
    return [
        replace(sample, reward=reward, reward_parts=parts)
        for sample, (reward, parts) in zip(samples, rewards, strict=True)
    ]
