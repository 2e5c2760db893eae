"""A function of the user's own: named on the command line, called in batches, and every mistake in it one line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_r1.config.load import load
from megatron_r1.errors import ConfigError
from megatron_r1.rewards.custom import CustomReward, CustomRewardFailed, CustomStepRewards
from megatron_r1.rewards.reward import Unscored

EXAMPLE = Path(__file__).parents[2] / "configs" / "reward" / "custom_example.py"


@dataclass
class RewardPrompt:
    id: str = "1"
    question: str = "2 + 12?"
    answer: str = "14"
    task: str = "number"


@pytest.fixture
def own(tmp_path):
    def write(text: str) -> str:
        file = tmp_path / "my_reward.py"
        file.write_text(text)
        return f"{file}:score"

    return write


def ask(location: str, texts: tuple[str, ...] = ("a", "bb")) -> list[float | Unscored]:
    return CustomReward(location).score([RewardPrompt()] * len(texts), texts)


def test_the_function_gets_everything_by_name(own):
    location = own("""
def score(prompts, responses, answers, tasks):
    assert (prompts, answers, tasks) == (["2 + 12?"] * 2, ["14"] * 2, ["number"] * 2)
    return [len(response) for response in responses]
""")
    assert ask(location) == [1.0, 2.0] and CustomReward(location).name == "custom"


def test_the_example_works():
    right, wrong, longer = ask(f"{EXAMPLE}:score", ("it is 14.", "15", "x" * 1000 + "<answer>14</answer>"))
    assert right > longer > 0.9 > wrong


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "there is no file"),
        ("def score(: pass", "the file cannot be loaded: my_reward.py:1: SyntaxError"),
        ("x = 1\nraise ValueError('at\\nload')", "the file cannot be loaded: my_reward.py:2: ValueError: at load"),
        ("import no_such_module", "my_reward.py:1: ModuleNotFoundError: No module named 'no_such_module'"),
        ("def other(**_): pass", "my_reward.py has no function score"),
        ("score = 1", "my_reward.py has no function score"),
    ],
)
def test_a_file_that_cannot_be_loaded_is_a_config_error(own, tmp_path, text, message):
    location = f"{tmp_path / 'absent.py'}:score" if text is None else own(text)
    with pytest.raises(ConfigError, match=message) as refused:
        CustomReward(location)
    assert refused.value.key == "reward.custom_function" and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return [1 / 0]", "raised my_reward.py:2: ZeroDivisionError"),
        ("raise KeyError('a\\nb')", "raised my_reward.py:2: KeyError"),
        ("return [1.0]", "returned 1 numbers for 2 responses"),
        ("return 1.0", "must return numbers"),
        ("return None", "must return numbers"),
        ("return ['a', 'b']", "must return numbers"),
        ("return [1.0, float('nan')]", "must return numbers \\(nan is not finite\\)"),
        ("return [1.0, float('inf')]", "must return numbers \\(inf is not finite\\)"),
    ],
)
def test_an_error_of_the_function_ends_the_run_with_one_line(own, body, message):
    with pytest.raises(CustomRewardFailed, match=message) as failed:
        ask(own(f"def score(**_):\n    {body}"))
    assert "reward.custom_function=" in str(failed.value) and "\n" not in str(failed.value)


def test_another_signature_is_named(own):
    with pytest.raises(CustomRewardFailed, match="TypeError: score\\(\\) got an unexpected keyword argument"):
        ask(own("def score(responses): return [0.0, 0.0]"))


def test_steps_come_with_their_ends_in_the_response(own):
    def steps(body: str) -> list:
        return CustomStepRewards(own(f"def score(responses, **_):\n    return {body}"))(
            [RewardPrompt()] * 2, ("abc", "defg")
        )

    assert steps("[[(len(r), 1), (len(r), 0.5)] for r in responses]") == [[(3, 1.0), (3, 0.5)], [(4, 1.0), (4, 0.5)]]
    assert steps("[[], [(1, -1.0)]]") == [[], [(1, -1.0)]]
    for body, message in (
        ("[[(2, 1.0), (1, 1.0)], []]", "returned steps that end at \\[2, 1\\]: must ascend, up to the 3 characters"),
        ("[[(4, 1.0)], []]", "up to the 3 characters"),
        ("[[(0, 1.0)], []]", "must ascend"),
        ("[[(1, float('nan'))], []]", "must return lists of \\(end, reward\\)"),
        ("[[1.0], []]", "must return lists of \\(end, reward\\)"),
        ("[[]]", "returned 1 lists of \\(end, reward\\) for 2 responses"),
    ):
        with pytest.raises(CustomRewardFailed, match=message) as failed:
            steps(body)
        assert "reward.step_rewards=" in str(failed.value) and "\n" not in str(failed.value)


def test_on_the_command_line():
    reward = load("grpo", ["reward=my_reward.py:score"]).reward
    assert (reward.custom_function, reward.custom, reward.accuracy, reward.format) == (
        "my_reward.py:score",
        1.0,
        0.0,
        0.0,
    )
    reward = load("grpo", ["reward.custom_function=folder/my_reward.py:score", "reward.custom=0.5"]).reward
    assert (reward.custom_function, reward.custom, reward.accuracy) == ("folder/my_reward.py:score", 0.5, 1.0)
    for overrides, message in (
        (
            ["reward.custom_function=my_reward:score", "reward.custom=1"],
            "reward.custom_function=my_reward:score: must be FILE.py:NAME",
        ),
        (["reward=my_reward.py:"], "reward.custom_function=my_reward.py:: must be FILE.py:NAME"),
        (["reward.custom=1"], "reward.custom=1.0: is the weight of reward.custom_function"),
        (["reward.custom_function=a.py:f"], "reward.custom=0.0: is the weight of reward.custom_function"),
        (["reward.steps=1", "rl=process"], "reward.steps=1.0: is the weight of reward.step_rewards"),
        (
            ["reward=steps", "reward.step_rewards=equations"],
            "reward.step_rewards=equations: must be arithmetic or FILE.py:NAME",
        ),
        (["reward=nowhere"], "reward=nowhere: must be one of"),
    ):
        with pytest.raises(ConfigError, match=message):
            load("grpo", overrides)


@pytest.mark.parametrize("preset", ["basic", "basic_language", "steps", "paper", "r1", "dapo", "custom"])
def test_every_preset_composes(preset):
    assert load("grpo", [f"reward={preset}"]).reward is not None


def test_presets_are_the_sources_weights():
    def weights(preset: str) -> dict[str, float]:
        reward = load("sample", [f"reward={preset}"]).reward
        names = ("accuracy", "format", "language", "overlong", "repetition", "custom")
        return {name: value for name in names if (value := getattr(reward, name))}

    assert weights("basic") == {"accuracy": 1.0, "format": 0.1}
    assert weights("basic_language") == {"accuracy": 1.0, "language": 0.2}
    assert weights("paper") == {"accuracy": 1.0, "format": 1.0}
    assert weights("r1") == {"accuracy": 1.0, "format": 1.0, "language": 1.0}
    assert weights("dapo") == {"accuracy": 1.0, "overlong": 0.5}
    assert weights("custom") == {"custom": 1.0}
