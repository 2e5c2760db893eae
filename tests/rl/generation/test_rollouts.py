"""Rollouts by the in-process engine: which prompts, in which order, sampled once, and the control experiment."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_r1.config.run import RunConfig
from megatron_r1.data.chat.prompt_format import PromptFormatter
from megatron_r1.data.prompts.prompts import TrainingPrompts
from megatron_r1.data.synthetic.expressions import careful_steps
from megatron_r1.data.synthetic.train_tokenizer import train_tokenizer
from megatron_r1.data.tokenizer import response_text
from megatron_r1.rewards.rubric_builder import build_rubric
from megatron_r1.rewards.score import Score
from megatron_r1.rewards.steps import RewardedStep
from megatron_r1.rl.generation.rollouts import Rollouts, shuffle_rewards
from megatron_r1.rl.loop import step_metrics
from megatron_r1.rl.policy.batch import make_batch
from megatron_r1.rollout.engine import Completion
from megatron_r1.rollout.journal import Journal
from tests.support.samples import make_response, prompt_of, tokens_of


@pytest.fixture(scope="module")
def config():
    config = RunConfig()
    config.data.num_documents, config.data.reasoning_gym_share = 400, 0.0
    config.rl.prompts_per_rollout, config.rl.group_size, config.rollout.max_response_tokens = 3, 4, 8
    return config


@pytest.fixture(scope="module")
def tokenizer(config):
    return train_tokenizer(config.data)


@pytest.fixture(scope="module")
def formatter(tokenizer):
    return PromptFormatter(tokenizer, "r1_zero")


@pytest.fixture
def rollouts(tiny, config, tokenizer, formatter, tmp_path):
    from megatron_r1.rollout.in_process import LocalEngine

    engine = LocalEngine(tiny, 12, tokenizer.pad)
    engine.push("0")

    def make(**rl) -> Rollouts:
        for name, value in {"shuffle_rewards": False, **rl}.items():
            setattr(config.rl, name, value)
        prompts, journal = TrainingPrompts(config.data), Journal(tmp_path / "rollouts")
        scorer = build_rubric(config.reward)
        return Rollouts(prompts, engine, formatter, journal, scorer, config.rollout, config.rl, config.seed)

    return make


def test_whole_groups_respond_to_consecutive_prompts(rollouts, config, tokenizer, formatter):
    samples = rollouts().take(step=0, first_prompt=5).samples
    prompts = TrainingPrompts(config.data)
    assert [sample.group for sample in samples] == [0] * 4 + [1] * 4 + [2] * 4
    for sample in samples:
        prompt = prompts.at(5 + sample.group)
        assert sample.prompt_id == prompt.id
        assert prompt_of(sample) == formatter.tokens(prompt.question) and prompt_of(sample)[0] == tokenizer.bos
        assert sample.text == response_text(tokens_of(sample), tokenizer)
        assert sample.reward == build_rubric(config.reward)([prompt], [sample.text])[0].total
    assert len({tokens_of(sample) for sample in samples[:4]}) > 1


def test_rewards_read_the_response_with_what_the_prompt_opened(tiny, config, tokenizer, tmp_path):
    from megatron_r1.rollout.in_process import LocalEngine

    (tmp_path / "opens.jinja").write_text("{{ bos_token + messages[0]['content'] + '<think>\\n' }}")
    read: list[str] = []

    def scorer(prompts, texts):
        read.extend(texts)
        return [Score(0.0, {}, (RewardedStep(len("<think>\n") + 1, 1.0),)) for text in texts]

    engine, journal = LocalEngine(tiny, 12, tokenizer.pad), Journal(tmp_path / "opened")
    formatter = PromptFormatter(tokenizer, str(tmp_path / "opens.jinja"))
    parts = TrainingPrompts(config.data), engine, formatter, journal, scorer, config.rollout, config.rl, config.seed
    samples = Rollouts(*parts).take(step=0, first_prompt=0).samples
    assert sorted(read) == sorted(f"<think>\n{sample.text}" for sample in samples)
    # The step that ends with the first character ends at the first token that has one.
    for sample in samples:
        texts = [tokenizer.decode(tokens_of(sample)[: n + 1], skip_special=True) for n in range(len(tokens_of(sample)))]
        assert sample.steps[0][0] == next(
            n for n, text in enumerate(texts) if text.rstrip("\ufffd") or n == len(texts) - 1
        )


def test_a_step_is_sampled_once_and_read_from_the_journal_after(rollouts, tiny):
    first = rollouts().take(step=2, first_prompt=0).samples
    assert rollouts().take(step=2, first_prompt=100).samples == first
    other = rollouts().take(step=3, first_prompt=0).samples
    assert [prompt_of(s) for s in other] == [prompt_of(s) for s in first]
    assert [tokens_of(s) for s in other] != [tokens_of(s) for s in first]


def test_shuffled_rewards_are_the_same_rewards_elsewhere(rollouts):
    samples = rollouts().take(step=0, first_prompt=0).samples
    numbered = [type(s)(**{**fields(s), "reward": float(i)}) for i, s in enumerate(samples)]
    shuffled = shuffle_rewards(numbered, seed=1)
    assert sorted(s.reward for s in shuffled) == [s.reward for s in numbered] != [s.reward for s in shuffled]
    assert [tokens_of(s) for s in shuffled] == [tokens_of(s) for s in numbered]
    assert shuffle_rewards(numbered, seed=1) == shuffled != shuffle_rewards(numbered, seed=2)
    assert (
        rollouts(shuffle_rewards=True).take(step=9, first_prompt=0).samples
        == rollouts().take(step=9, first_prompt=0).samples
    )


def test_rows_hold_each_response_at_the_positions_that_predict_it(rollouts):
    samples = rollouts().take(step=0, first_prompt=0).samples
    rows = make_batch(samples, [7, 0, 11], pad_token=3, device="cpu")
    assert rows.indices_B.tolist() == [7, 0, 11]
    inputs_BL, targets_BL = rows.rows(rows.inputs_1T), rows.rows(rows.targets_1T)
    for row, sample_index in enumerate([7, 0, 11]):
        sample, mask_L = samples[sample_index], rows.mask_BL[row]
        assert tuple(targets_BL[row][mask_L].tolist()) == tokens_of(sample)
        assert rows.rollout_logprobs_BL[row][mask_L].tolist() == sample.response.logprobs.tolist()
        start = len(prompt_of(sample))
        assert inputs_BL[row][mask_L][0] == prompt_of(sample)[-1] and int(mask_L.float().argmax()) == start - 1
        assert not rows.rollout_logprobs_BL[row][~mask_L].any()


def fields(sample) -> dict:
    return {name: getattr(sample, name) for name in type(sample).__dataclass_fields__}


class Worked:
    """Responds to every prompt with correct working, or every other time with wrong working."""

    busy_seconds = 0.0

    def __init__(self, prompts, formatter):
        self._thoughts = {formatter.tokens(p.question): thoughts(p.expression) for p in prompts}
        self._tokenizer = formatter.tokenizer

    def generate(self, requests, sampling):
        return [self._answer(request, number % 2) for number, request in enumerate(requests)]

    def _answer(self, request, wrong):
        text = f"<think>{self._thoughts[request.prompt_tokens][wrong]}</think> <answer>0</answer>"
        tokens = (*self._tokenizer.encode(text), self._tokenizer.eos)
        return Completion(request.id, make_response(request.prompt_tokens, tokens, (-0.5,) * len(tokens)), "stop", "0")


def thoughts(expression: str) -> tuple[str, str]:
    steps = [f"{left} {operator} {right} = {result}" for left, operator, right, result in careful_steps(expression)]
    return ", ".join(steps), f"1 + 1 = 3, {steps[0]}"


def test_steps_of_a_response_come_with_the_token_that_ends_each(config, tokenizer, formatter, tmp_path):
    prompts = TrainingPrompts(config.data)
    engine = Worked([prompts.at(index) for index in range(3)], formatter)
    config.reward.steps, config.reward.step_rewards = 0.5, "arithmetic"
    scorer = build_rubric(config.reward)
    config.reward.steps, config.reward.step_rewards = 0.0, ""
    journal = Journal(tmp_path / "rollouts")
    rollout = Rollouts(prompts, engine, formatter, journal, scorer, config.rollout, config.rl, config.seed).take(0, 0)
    assert journal.read(0) == rollout.samples and len(rollout.samples) == 12
    for number, sample in enumerate(rollout.samples):
        (first, one), (second, other) = sample.steps
        assert (one, other) == ((0.0, 0.5) if number % 2 else (0.5, 0.5))
        for end in (first, second):
            read = tokenizer.decode(tokens_of(sample)[: end + 1])
            assert read[-1].isdigit() and "=" in read
        assert tokenizer.decode(tokens_of(sample)[: second + 2]).endswith("</think>")
        assert set(sample.reward_parts) == {"accuracy", "format"} and sample.reward == sum(sample.reward_parts.values())
    assert step_metrics(rollout.samples) == {"rollout/rewarded_steps": 2.0, "rollout/step_reward": 0.375}
    assert step_metrics([replace(sample, steps=()) for sample in rollout.samples]) == {}
