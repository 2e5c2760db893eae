"""Mixtures of prompts: shares, the step from which a source takes part, and the same prompt at every call."""

from __future__ import annotations

from collections import Counter

import pytest

from megatron_r1.config.data import DataConfig, MixedPromptsConfig, PromptsConfig
from megatron_r1.data.prompts.files import PromptFile
from megatron_r1.data.prompts.mixture import ONLY, StepPositions, prompt_files, training_prompts
from megatron_r1.data.prompts.prompts import FilePrompts, Prompt, Prompts, TrainingPrompts
from megatron_r1.errors import ConfigError

REFILLS, ROUNDS, PER_STEP, STEPS = 1 << 40, 3, 32, 100
POSITIONS = StepPositions(PER_STEP, REFILLS, ROUNDS)


def listed(prefix: str, count: int, domain: str = "reasoning") -> PromptFile:
    prompts = [Prompt(f"{prefix}{number}", f"{number}?", "1", "", "file", domain=domain) for number in range(count)]
    return PromptFile(prompts, [])


def mixed(**sources: MixedPromptsConfig) -> Prompts:
    config = DataConfig(mixture=sources)
    files = {name: listed(name[0], 50) for name, source in sources.items() if source.prompts.path}
    return training_prompts(config, files, POSITIONS, STEPS)


def source(path: str = "rows.jsonl", **settings) -> MixedPromptsConfig:
    return MixedPromptsConfig(prompts=PromptsConfig(path=path), **settings)


def of_steps(prompts: Prompts, first: int, last: int) -> list[str]:
    return [prompts.at(index).id for index in range(first * PER_STEP, last * PER_STEP)]


@pytest.mark.parametrize(("from_step", "first"), [(70, 70), (-25, 75), (-1000, 0), (0, 0)])
def test_a_source_takes_part_from_its_step_on_with_its_share(from_step, first):
    prompts = mixed(reasoning=source(share=3.0), general=source(share=1.0, from_step=from_step))
    assert {id[0] for id in of_steps(prompts, 0, first)} <= {"r"}
    later = Counter(id[0] for id in of_steps(prompts, first, STEPS))
    assert later["g"] / later.total() == pytest.approx(0.25, abs=0.05)
    assert "g" in {id[0] for id in of_steps(prompts, first, first + 1)}


def test_prompts_in_place_of_dropped_ones_are_of_their_own_step():
    prompts = mixed(reasoning=source(), general=source(from_step=40))
    for step, allowed in ((0, "r"), (39, "r"), (40, "rg"), (99, "rg")):
        start = REFILLS + step * PER_STEP * ROUNDS
        found = {prompts.at(index).id[0] for index in range(start, start + PER_STEP * ROUNDS)}
        assert found == set(allowed), step


def test_every_call_gives_the_same_prompt_and_a_pass_none_twice():
    sources = {"reasoning": source(), "general": source()}
    prompts, again = mixed(**sources), mixed(**sources)
    ids = [prompts.at(index).id for index in range(300)]
    assert [again.at(index).id for index in reversed(range(300))] == ids[::-1]
    for start in range(0, 300, 50):
        assert len(set(ids[start : start + 50])) == 50
    assert {id for id in ids if id[0] == "g"} != {f"g{number}" for number in range(25)}


def test_worlds_are_sources_too_and_their_tasks_have_domains():
    prompts = mixed(reasoning=MixedPromptsConfig(), general=MixedPromptsConfig(world="assistant"))
    found = [prompts.at(index) for index in range(400)]
    by_task = {prompt.task: prompt.domain for prompt in found}
    assert by_task["family"] == "reasoning" and by_task["capitals"] == "helpfulness"
    assert by_task["make"] == "harmlessness"
    assert Counter(prompt.domain for prompt in found)["reasoning"] == pytest.approx(200, abs=50)


def test_without_a_mixture_the_file_or_the_world_is_the_only_source():
    config, file = DataConfig(prompts=PromptsConfig(path="rows.jsonl")), listed("f", 5)
    assert list(prompt_files(config)) == [ONLY] and prompt_files(DataConfig()) == {}
    found = training_prompts(config, {ONLY: file}, POSITIONS, STEPS)
    assert [found.at(index) for index in range(9)] == [FilePrompts(file.prompts, 0).at(index) for index in range(9)]
    world = training_prompts(DataConfig(), {}, POSITIONS, STEPS)
    assert world.at(7) == TrainingPrompts(DataConfig()).at(7)
    sources = DataConfig(mixture={"a": source("a.jsonl"), "b": MixedPromptsConfig()})
    assert {name: one.path for name, one in prompt_files(sources).items()} == {"a": "a.jsonl"}


def test_steps_without_prompts_and_two_ways_to_name_them_are_refused():
    with pytest.raises(ConfigError, match=r"^data\.mixture\.general\.from_step=5: must be 0 for one source"):
        mixed(late=source(from_step=9), general=source(from_step=5))
    with pytest.raises(ConfigError, match=r"^prompts\.path=rows\.jsonl: must be empty with mixture"):
        DataConfig(mixture={"a": source()}, prompts=PromptsConfig(path="rows.jsonl"))
