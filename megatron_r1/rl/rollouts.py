"""From prompts to scored samples: ask the engine, score, journal; or read what the journal already holds."""

from __future__ import annotations

import random
from dataclasses import replace

from megatron_r1.config.rl import RLConfig
from megatron_r1.config.rollout import RolloutConfig
from megatron_r1.data.prompts import Prompt, TrainingPrompts
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.rl.scoring import Scorer
from megatron_r1.rollout.choose import SyncedEngine
from megatron_r1.rollout.engine import all_answered
from megatron_r1.rollout.journal import Journal
from megatron_r1.rollout.sample import Completion, Request, Sample, Sampling


def prompt_tokens(prompt: Prompt, tokenizer: Tokenizer) -> tuple[int, ...]:
    """A prompt as the engine gets it: the beginning of a document, then the prompt's text."""
    return (tokenizer.bos, *tokenizer.encode(prompt.text))


def response_text(response_tokens: tuple[int, ...], tokenizer: Tokenizer) -> str:
    """A response as rewards read it, without the end-of-document token."""
    return tokenizer.decode(response_tokens, skip_special=True)


class Rollouts:
    """The rollouts of a run, by step: the same step always takes the same prompts, and is sampled once."""

    def __init__(
        self,
        prompts: TrainingPrompts,
        engine: SyncedEngine,
        tokenizer: Tokenizer,
        journal: Journal,
        scorer: Scorer,
        rollout: RolloutConfig,
        rl: RLConfig,
        seed: int,
    ):
        """
        Args:
            prompts: the endless list of prompts.
            engine: who answers.
            journal: rollouts already sampled.
            scorer: prompt and response text -> score.
        """
        self._prompts, self._engine, self._tokenizer, self._journal = prompts, engine, tokenizer, journal
        self._scorer, self._rollout, self._rl, self._seed = scorer, rollout, rl, seed

    def take(self, step: int, first_prompt: int) -> list[Sample]:
        """The samples of `step`, whole groups one after the other.

        They are in the journal before they are returned: a run that is killed while it trains on them trains on the
        same ones again.
        """
        samples = self._journal.read(step)
        if samples is None:
            samples = self._sample(step, first_prompt)
            if self._rl.shuffle_rewards:
                samples = shuffle_rewards(samples, f"{self._seed} {step}")
            self._journal.write(step, samples)
        return samples

    def _sample(self, step: int, first_prompt: int) -> list[Sample]:
        prompts = [self._prompts.at(first_prompt + i) for i in range(self._rl.prompts_per_rollout)]
        asked = [(group, prompt) for group, prompt in enumerate(prompts) for _ in range(self._rl.group_size)]
        tokens = [prompt_tokens(prompt, self._tokenizer) for prompt in prompts]
        requests = [Request(f"{step}-{i}", tokens[group]) for i, (group, _) in enumerate(asked)]
        sampling = Sampling(
            temperature=self._rollout.temperature,
            top_p=self._rollout.top_p,
            max_tokens=self._rollout.max_response_tokens,
            stop_tokens=(self._tokenizer.eos,),
            seed=self._seed * 1_000_003 + step,
        )
        completions = all_answered(self._engine.engine.generate(requests, sampling))
        return [
            self._score(group, prompt, completion)
            for (group, prompt), completion in zip(asked, completions, strict=True)
        ]

    def _score(self, group: int, prompt: Prompt, completion: Completion) -> Sample:
        text = response_text(completion.response_tokens, self._tokenizer)
        score = self._scorer(prompt, text)
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
        )


def shuffle_rewards(samples: list[Sample], seed: str) -> list[Sample]:
    """The same answers with each other's rewards: what a control experiment learns from."""
    rewards = [(sample.reward, sample.reward_parts) for sample in samples]
    random.Random(seed).shuffle(rewards)
    return [
        replace(sample, reward=reward, reward_parts=parts)
        for sample, (reward, parts) in zip(samples, rewards, strict=True)
    ]
