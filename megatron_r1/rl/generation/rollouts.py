"""From prompts to scored samples: ask the engine, score, journal; or read what the journal already holds."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from megatron_r1.config.rl import RLConfig
from megatron_r1.config.rollout import RolloutConfig
from megatron_r1.data.chat.prompt_format import PromptFormatter
from megatron_r1.data.prompts.prompts import Prompt, Prompts
from megatron_r1.data.tokenizer import response_text
from megatron_r1.errors import NoRolloutCapacity
from megatron_r1.rewards.reward import Unscored
from megatron_r1.rewards.rubric_builder import Scorer
from megatron_r1.rewards.score import Score
from megatron_r1.rl.generation.filters import ZERO_STD, chosen, counted_as, filtered
from megatron_r1.rl.generation.step_rewards import steps_at_tokens
from megatron_r1.rollout.engine import RolloutEngine
from megatron_r1.rollout.journal import Journal
from megatron_r1.rollout.routed_experts import RoutedLayers
from megatron_r1.rollout.sample import Completion, FailedRequest, Request, Sample, Sampling


@dataclass(frozen=True)
class Rollout:
    """What one step learns from."""

    samples: list[Sample]
    """Whole groups one after the other, numbered from 0."""
    counts: dict[str, int]
    """Groups and answers that are not learned from, by why; and prompts that were asked in their place."""
    seconds: float = field(default=0.0, compare=False)
    """From the first question to the last score; 0 where the journal had it."""


REFILLS = 1 << 40
"""Where the prompts begin that take the place of those that teach nothing. They are far from the others, so no step's
prompts depend on the luck of another."""


class Rollouts:
    """The rollouts of a run, by step: the same step always takes the same prompts, and is sampled once.

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
            engine: who answers.
            asking: how they are asked, and in which tokens.
            journal: rollouts already sampled.
            scorer: prompts and response texts -> scores.
            routed: the layers whose experts are wanted with each answer.
        """
        self._prompts, self._engine, self._asking, self._journal = prompts, engine, formatter, journal
        self._scorer, self._rollout, self._rl, self._seed = scorer, rollout, rl, seed
        self._routed = routed
        self._filters = chosen(rl.filters)
        self._lost_because = ""

    def take(self, step: int, first_prompt: int) -> Rollout:
        """The rollout of `step`, whole groups one after the other.

        It is in the journal before it is returned: a run that is killed while it trains on it trains on the same one
        again, and goes on with the same prompts after it.

        Raises:
            NoRolloutCapacity: nobody is there to answer, or every prompt was lost.
        """
        usual = dict.fromkeys(self._names(), 0)
        if (found := self._journal.read_all(step)) is not None:
            samples, notes = found
            return Rollout(samples, usual | notes)
        started = time.perf_counter()
        rollout = self._sample(step, first_prompt)
        seconds, samples = time.perf_counter() - started, rollout.samples
        if self._rl.shuffle_rewards:
            samples = shuffle_rewards(samples, f"{self._seed} {step}")
        self._journal.write(step, samples, rollout.counts if rollout.counts != usual else None)
        return replace(rollout, samples=samples, seconds=seconds)

    @property
    def busy_seconds(self) -> float:
        """Seconds that the engine has spent answering so far."""
        return self._engine.busy_seconds

    def _names(self) -> list[str]:
        """Under which names groups and answers are counted that are not learned from."""
        answers = [counted_as(name) for name in self._filters if name != ZERO_STD]
        groups = [
            "rollout/lost_groups",
            "rollout/unscored_groups",
            *(["rollout/filtered_small_groups"] if answers else []),
        ]
        equal = [counted_as(ZERO_STD)] if ZERO_STD in self._filters else []
        return (
            groups + answers + equal + (["rollout/resampled_prompts"] if self._rl.filters.max_resample_rounds else [])
        )

    def _sample(self, step: int, first_prompt: int) -> Rollout:
        """Rounds of prompts until there are groups enough, or no further round is allowed.

        When no group at all teaches anything, those that were dropped for it are kept: a step needs something to do.
        """
        counts = Counter(dict.fromkeys(self._names(), 0))
        kept: list[list[Sample]] = []
        idle: list[list[Sample]] = []
        place = first_prompt
        for number in range(1 + self._rl.filters.max_resample_rounds):
            if not (wanted := self._rl.prompts_per_rollout - len(kept)):
                break
            if number == 1:
                place = REFILLS + first_prompt * self._rl.filters.max_resample_rounds
            groups = self._round(step, number, place, wanted)
            place += wanted
            if number:
                counts["rollout/resampled_prompts"] += wanted
            for group in groups:
                if isinstance(group, str):
                    counts[group] += 1
                    continue
                left, removed = filtered(group, self._filters)
                counts.update(removed)
                (kept if left else idle).append(left or group)
        if not (kept or idle):
            raise NoRolloutCapacity(f"step {step}: all its prompts were lost; the last one: {self._lost_because}")
        samples = [replace(sample, group=number) for number, group in enumerate(kept or idle) for sample in group]
        return Rollout(samples, dict(counts))

    def _round(self, step: int, number: int, first_prompt: int, count: int) -> list[list[Sample] | str]:
        """The scored answers to `count` prompts; a group that cannot be used is the name under which it counts."""
        prompts = [self._prompts.at(first_prompt + i) for i in range(count)]
        asked = [(group, prompt) for group, prompt in enumerate(prompts) for _ in range(self._rl.group_size)]
        tokens = [self._asking.tokens(prompt.question) for prompt in prompts]
        name = f"{step}" if number == 0 else f"{step}.{number}"
        requests = [Request(f"{name}-{i}", tokens[group]) for i, (group, _) in enumerate(asked)]
        sampling = Sampling(
            temperature=self._rollout.temperature,
            top_p=self._rollout.top_p,
            max_tokens=self._rollout.max_response_tokens,
            stop_tokens=(self._asking.tokenizer.eos,),
            seed=self._seed * 1_000_003 + step + number * 7_368_787,
            routed=self._routed,
        )
        outcomes = self._engine.generate(requests, sampling)
        groups: list[list[Sample] | str] = [[] for _ in prompts]
        answered = [(*place, outcome) for place, outcome in zip(asked, outcomes, strict=True)]
        completions = [(group, prompt, answer) for group, prompt, answer in answered if isinstance(answer, Completion)]
        texts = [self._text(answer.response_tokens) for _, _, answer in completions]
        scores = self._scorer([prompt for _, prompt, _ in completions], texts)
        for (group, prompt, completion), text, score in zip(completions, texts, scores, strict=True):
            members = groups[group]
            if isinstance(score, Unscored):
                self._lost_because, groups[group] = score.reason, "rollout/unscored_groups"
            elif isinstance(members, list):
                sample = scored_sample(group, prompt, completion, text, score)
                steps = steps_at_tokens(score.steps, completion.response_tokens, self._text)
                members.append(replace(sample, steps=steps))
        for group, _, outcome in answered:
            if isinstance(outcome, FailedRequest):
                self._lost_because, groups[group] = outcome.reason, "rollout/lost_groups"
        return groups

    def _text(self, response_tokens: Sequence[int]) -> str:
        return response_text(response_tokens, self._asking.tokenizer)


def scored_sample(group: int, prompt: Prompt, completion: Completion, text: str, score: Score) -> Sample:
    """An answer with what it is worth, but for its steps."""
    return Sample(
        prompt_id=prompt.id,
        group=group,
        prompt_tokens=completion.prompt_tokens,
        response_tokens=completion.response_tokens,
        logprobs=completion.logprobs,
        weight_version=completion.weight_version,
        finish_reason=completion.finish_reason,
        text=text,
        reward=score.total,
        reward_parts=score.parts,
        routed_experts=completion.routed_experts,
        version_changes=completion.version_changes,
    )


def shuffle_rewards(samples: list[Sample], seed: str) -> list[Sample]:
    """The same answers with each other's rewards: what a control experiment learns from."""
    rewards = [(sample.reward, sample.reward_parts) for sample in samples]
    random.Random(seed).shuffle(rewards)
    return [
        replace(sample, reward=reward, reward_parts=parts)
        for sample, (reward, parts) in zip(samples, rewards, strict=True)
    ]
