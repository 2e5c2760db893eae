"""Rewards together: each prompt by its task's verifier, weights and breakdown, and unscored responses."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest

from megatron_r1.config.reward import MathConfig, RewardConfig, SandboxConfig
from megatron_r1.data.prompts.prompts import Prompt
from megatron_r1.errors import ConfigError, DataError, PlatformError
from megatron_r1.rewards import score as score_module
from megatron_r1.rewards.accuracy import Accuracy
from megatron_r1.rewards.reward import Unscored
from megatron_r1.rewards.rubric_builder import build_rubric
from megatron_r1.rewards.score import Rubric, Score, TextRule, Weighted


def prompt(answer: str, task: str, question: str = "?") -> Prompt:
    return Prompt("train-0", question, answer, "", task)


def tagged(answer: str, thought: str = "so") -> str:
    return f"<think>{thought}</think> <answer>{answer}</answer>"


@pytest.fixture(scope="module")
def accuracy():
    accuracy = Accuracy(RewardConfig(math=MathConfig(timeout_s=60.0, workers=1), sandbox=SandboxConfig(wall_s=60.0)))
    yield accuracy
    accuracy.close()


def test_every_task_has_its_verifier(accuracy):
    entry = json.dumps({"answer": "olleh", "metadata": {}})
    cases = [
        ("14", "family", "14.0", 1.0),
        ("14", "chain_sum", "14", 1.0),
        ("14", "number", "15", 0.0),
        ("a b", "text", "a  b", 1.0),
        ("B", "choice", "(b)", 1.0),
        ("\\frac12", "math", "0.5", 1.0),
        ("\\frac12", "number", "0.5", 0.0),
        (entry, "reasoning_gym:letter_jumble", "olleh", 1.0),
        (entry, "reasoning_gym:letter_jumble", "hello", 0.0),
        ("14", "file", "14", 1.0),
    ]
    prompts = [prompt(answer, task) for answer, task, _, _ in cases]
    assert accuracy.score(prompts, [tagged(answer) for _, _, answer, _ in cases]) == [case[3] for case in cases]
    assert accuracy.score(prompts, ["no answer"] * len(cases)) == [0.0] * len(cases)
    with ThreadPoolExecutor(8) as threads:
        texts = [tagged("0.5")] * 3
        batches = threads.map(lambda _: accuracy.score([prompt("\\frac12", "math")] * 3, texts), range(20))
        assert list(batches) == [[1.0] * 3] * 20


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is not installed")
def test_programs_are_scored_beside_other_tasks(accuracy):
    tests = json.dumps({"language": "python", "inputs": ["1", "2"], "outputs": ["1", "4"]})
    prompts = [prompt(tests, "code"), prompt("14", "number"), prompt(tests, "code")]
    texts = [tagged("print(int(input()) ** 2)"), tagged("14"), tagged("print(1)")]
    assert accuracy.score(prompts, texts) == [1.0, 1.0, 0.5]


def test_programs_are_refused_without_a_sandbox(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    tests = json.dumps({"language": "python", "inputs": ["1"], "outputs": ["1"]})
    with pytest.raises(PlatformError, match="install bubblewrap"):
        build_rubric(RewardConfig())([prompt(tests, "code")], [tagged("print(1)")])


@pytest.mark.parametrize(
    "task", ["spiral_matrix", "string_insertion", "countdown", "simple_integration", "no_such_task"]
)
def test_verifiers_that_run_answers_are_refused(accuracy, task):
    with pytest.raises(DataError, match=f"task=reasoning_gym:{task}: "):
        accuracy.score([prompt("{}", f"reasoning_gym:{task}")], [tagged("1")])


def test_weights_and_breakdown():
    config = RewardConfig(
        accuracy=1.0, format=0.5, language=0.25, overlong=0.1, repetition=2.0, repetition_ngram_size=2
    )
    config.overlong_tokens, config.overlong_buffer = 60, 50
    scorer = build_rubric(config, count_tokens=len)
    text = tagged("14", "yes yes yes \u662f")
    (found,) = scorer([prompt("14", "number", "how many?")], [text])
    parts = {"accuracy": 1.0, "format": 0.5, "language": 0.25 * 0.75, "overlong": -0.1 * (len(text) - 10) / 50}
    parts["repetition"] = 2.0 * repetition_of(text)
    assert found.parts == pytest.approx(parts) and found.total == pytest.approx(sum(parts.values()))
    (chinese,) = scorer([prompt("14", "number", "\u591a\u5c11")], [text])
    assert chinese.parts["language"] == pytest.approx(0.25 * 0.25)


def repetition_of(text: str) -> float:
    """By hand: think yes yes yes shi think answer answer, in runs of two words."""
    all_words = ["think", "yes", "yes", "yes", "\u662f", "think", "answer", "answer"]
    runs = list(pairwise(all_words))
    assert "think" in text
    return len(set(runs)) / len(runs) - 1


def test_rewards_without_a_weight_are_not_computed():
    (found,) = build_rubric(RewardConfig(accuracy=0.0, format=1.0))([prompt("no tests", "code")], [tagged("x")])
    assert found == Score(1.0, {"format": 1.0})
    with pytest.raises(ConfigError, match="reward.overlong"):
        build_rubric(RewardConfig(overlong=1.0))


class Flaky:
    """A reward whose service fails the first times that it is asked about some texts."""

    name = "judge"

    def __init__(self, failures: dict[str, int]):
        self.failures, self.requests = failures, list[list[str]]()

    def score(self, prompts, texts):
        self.requests.append(list(texts))
        values = []
        for text in texts:
            self.failures[text] = self.failures.get(text, 0) - 1
            values.append(Unscored(f"no reply about {text}") if self.failures[text] >= 0 else 1.0)
        return values


def test_unscored_responses_are_retried_and_are_not_zero(monkeypatch):
    pauses: list[float] = []
    monkeypatch.setattr(score_module.time, "sleep", pauses.append)
    flaky = Flaky({"b": 1, "c": 99, "d": 2})
    rubric = Rubric([Weighted(0.5, flaky), Weighted(1.0, TextRule("other", lambda text: 2.0))], retries=2)
    found = rubric([prompt("", "number")] * 4, ["a", "b", "c", "d"])
    well = Score(2.5, {"judge": 0.5, "other": 2.0})
    assert found == [well, well, Unscored("no reply about c"), well]
    assert flaky.requests == [["a", "b", "c", "d"], ["b", "c", "d"], ["c", "d"]] and pauses == [0.5, 1.0]


def test_a_prompts_domain_decides_which_rewards_score_its_responses():
    """R1's second reinforcement learning: rules for reasoning, a reward model elsewhere, the format everywhere."""
    asked: dict[str, list[str]] = {"helpfulness": [], "harmlessness": []}

    class Model:
        def __init__(self, name: str):
            self.name = name

        def score(self, prompts, texts):
            asked[self.name] += [prompt.id for prompt in prompts]
            return [2.0 for _ in texts]

    config = RewardConfig(
        format=0.5, domains={"accuracy": "reasoning", "helpfulness": "helpfulness", "harmlessness": "harmlessness"}
    )
    rubric = build_rubric(config, models=[Weighted(0.25, Model(name)) for name in asked])
    domains = ("reasoning", "helpfulness", "harmlessness", "reasoning", "helpfulness")
    prompts = [Prompt(str(n), "?", "14", "", "number", domain=domain) for n, domain in enumerate(domains)]
    scores = rubric(prompts, [*[tagged("14")] * 4, "no tags"])
    assert [score.parts for score in scores if isinstance(score, Score)] == [
        {"accuracy": 1.0, "format": 0.5},
        {"format": 0.5, "helpfulness": 0.5},
        {"format": 0.5, "harmlessness": 0.5},
        {"accuracy": 1.0, "format": 0.5},
        {"format": 0.0, "helpfulness": 0.5},
    ]
    assert asked == {"helpfulness": ["1", "4"], "harmlessness": ["2"]}
    assert [score.total for score in scores if isinstance(score, Score)] == [1.5, 1.0, 1.0, 1.5, 0.5]
    rubric(prompts[:1], [tagged("14")])
    assert asked == {"helpfulness": ["1", "4"], "harmlessness": ["2"]}, "a model without responses is not called"
