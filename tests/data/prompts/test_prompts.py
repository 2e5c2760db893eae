"""Training prompts, held-out prompts and the reasoning-gym tasks among them."""

import random
from collections import Counter

import pytest
from reasoning_gym.arithmetic.basic_arithmetic import BasicArithmeticDataset, BasicArithmeticDatasetConfig

from megatron_r1.config.data import DataConfig
from megatron_r1.data.prompts.prompts import FilePrompts, Prompt, TrainingPrompts, eval_prompts
from megatron_r1.data.synthetic import gym
from megatron_r1.data.synthetic.expressions import in_eval_split, value
from megatron_r1.data.template import R1_ZERO_TEMPLATE, fill_template
from megatron_r1.errors import DataError
from megatron_r1.rewards.exact import same_number

CONFIG = DataConfig()


def test_template_is_the_papers():
    assert fill_template("What is 2 + 3 * 4?") == (
        "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. "
        "The assistant first thinks about the reasoning process in the mind and then provides the user with "
        "the answer. The reasoning process and answer are enclosed within <think> </think> and <answer> "
        "</answer> tags, respectively, i.e., <think> reasoning process here </think> <answer> answer here "
        "</answer>. User: What is 2 + 3 * 4?. Assistant:"
    )
    assert R1_ZERO_TEMPLATE.count("{prompt}") == 1


def test_training_prompts_are_right_and_never_held_out():
    prompts = [TrainingPrompts(CONFIG).at(index) for index in range(3000)]
    for prompt in prompts:
        assert not in_eval_split(prompt.expression, CONFIG.eval_fraction)
        assert prompt.answer == str(value(prompt.expression))
        assert prompt.expression in prompt.question
    tasks = Counter(prompt.task for prompt in prompts)
    assert set(tasks) == {"family", *gym.TASKS}
    assert abs(1 - tasks["family"] / len(prompts) - CONFIG.reasoning_gym_share) < 0.03
    assert any("\u591a\u5c11" in prompt.question for prompt in prompts)


def test_training_prompts_are_addressed_by_index():
    forward = [TrainingPrompts(CONFIG).at(index) for index in range(50)]
    prompts = TrainingPrompts(CONFIG)
    assert [prompts.at(index) for index in reversed(range(50))] == forward[::-1]
    assert [TrainingPrompts(DataConfig(seed=1)).at(index) for index in range(50)] != forward
    assert len({prompt.id for prompt in forward}) == 50


def test_eval_prompts_are_distinct_held_out_and_the_same_for_every_seed():
    prompts = eval_prompts(CONFIG, 600)
    assert len({prompt.expression for prompt in prompts}) == len({prompt.id for prompt in prompts}) == 600
    assert all(in_eval_split(prompt.expression, CONFIG.eval_fraction) for prompt in prompts)
    assert all(prompt.answer == str(value(prompt.expression)) for prompt in prompts)
    assert eval_prompts(DataConfig(seed=5), 100) == prompts[:100]


@pytest.mark.parametrize("share", [0.0, 0.2])
def test_too_many_eval_prompts_are_refused(share):
    with pytest.raises(DataError, match="eval_fraction=0.01:? holds out only"):
        eval_prompts(DataConfig(eval_fraction=0.01, reasoning_gym_share=share), 600)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_share_of_reasoning_gym_is_obeyed_at_its_ends(share):
    tasks = {TrainingPrompts(DataConfig(reasoning_gym_share=share)).at(index).task for index in range(40)}
    assert ("family" in tasks) == (share == 0.0)


def test_library_scorer_agrees_with_the_accuracy_reward():
    rng = random.Random(3)
    for _ in range(100):
        problem = gym.draw_item(rng, 0.15, evaluation=False)
        for answer in (problem.answer, str(int(problem.answer) + 1), "", "1" + problem.answer):
            expected = same_number(answer, problem.answer)
            assert gym.verify(problem.task, answer, problem.answer) == bool(expected)


def test_items_that_the_library_evaluates_left_to_right_are_skipped(monkeypatch):
    settings = BasicArithmeticDatasetConfig(
        min_terms=3, max_terms=3, min_digits=1, max_digits=1, operators=["+", "*"], allow_parentheses=False, seed=0
    )
    items = BasicArithmeticDataset(settings)
    monkeypatch.setattr(gym, "dataset", lambda task: items)
    found = [gym.item("basic_arithmetic", index) for index in range(300)]
    known = [items[index]["metadata"]["expression"] in gym.world() for index in range(300)]
    assert 0 < sum(problem is not None for problem in found) < sum(known)
    assert all(problem.answer == str(value(problem.expression)) for problem in found if problem)


def test_unknown_task_is_refused():
    with pytest.raises(DataError, match="chain_sum"):
        gym.item("poetry", 0)


def test_an_endless_list_has_every_prompt_once_before_any_again():
    prompts = [Prompt(str(number), f"{number}?", "", "", "file") for number in range(50)]
    listed, other = FilePrompts(prompts, seed=0), FilePrompts(prompts, seed=1)
    epochs = [[listed.at(50 * epoch + index).id for index in range(50)] for epoch in range(3)]
    assert all(sorted(epoch, key=int) == [prompt.id for prompt in prompts] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3 and [other.at(index).id for index in range(50)] != epochs[0]
    again = FilePrompts(prompts, seed=0)
    for index in (149, 3, 77, (1 << 40) + 5):
        assert again.at(index) == listed.at(index)
