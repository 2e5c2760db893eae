"""Prompt styles: shipped texts, files of a user, and rows whose response a style shows."""

from __future__ import annotations

import json

import pytest

from megatron_r1.config.data import PromptsConfig
from megatron_r1.config.recipes import configs_folder
from megatron_r1.data.prompts.files import read_prompts
from megatron_r1.data.prompts.prompts import Prompt
from megatron_r1.data.prompts.style import PromptStyle
from megatron_r1.errors import ConfigError, DataError

SHIPPED = ("direct", "few_shot", "general", "plain", "rewrite", "summary")
PROMPT = Prompt("1", "What is {response} + 2?", "5", "", "file", "It is \\boxed{5}.")


def test_every_shipped_style_is_explained_and_shows_the_question() -> None:
    folder = configs_folder() / "prompt_style"
    stems = sorted(path.stem for path in folder.glob("*.txt"))
    assert {*SHIPPED} <= {*stems}
    table = (folder / "README.md").read_text()
    assert [name for name in SHIPPED if f"| `{name}` |" not in table] == []
    assert [name for name in stems if PROMPT.question not in PromptStyle(name).request(PROMPT)] == []


@pytest.mark.parametrize("name", SHIPPED)
def test_question_and_response_stand_where_the_style_puts_them(name) -> None:
    style = PromptStyle(name)
    message = style.request(PROMPT)
    assert message.count(PROMPT.question) == 1, "a place in a question is text, and is not filled"
    assert style.needs_response == (name in ("rewrite", "summary")) == (PROMPT.response in message)
    assert PromptStyle("plain").request(PROMPT) == PROMPT.question


def test_cold_start_styles_ask_for_what_the_papers_ask_for() -> None:
    texts = {name: PromptStyle(name).request(PROMPT) for name in SHIPPED}
    assert texts["few_shot"].count("<think>") == 4 and "60 * 2 = 120" in texts["few_shot"]
    assert "Check the result" in texts["direct"] and "correct it" in texts["direct"]
    assert "in the language of the problem" in texts["rewrite"] and "without code blocks" in texts["rewrite"]


def test_a_style_of_a_user_is_a_file_with_a_place_for_the_question(tmp_path) -> None:
    (tmp_path / "mine.txt").write_text("Q: {question}\nA: {answer}\n")
    assert PromptStyle(str(tmp_path / "mine.txt")).request(PROMPT) == f"Q: {PROMPT.question}\nA: {{answer}}"
    (tmp_path / "none.txt").write_text("Solve it.")
    with pytest.raises(ConfigError, match="must hold {question}"):
        PromptStyle(str(tmp_path / "none.txt"))
    with pytest.raises(ConfigError, match="must be one of direct, few_shot, .* or a file"):
        PromptStyle("fewshot")


def test_rows_of_a_style_that_shows_responses_must_have_one(tmp_path) -> None:
    path = tmp_path / "samples.jsonl"
    rows = [{"question": "1 + 1?", "truth": 2, "response": "two"}, {"question": "1 + 2?", "truth": 3}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = PromptsConfig(path=str(path), answer_field="truth", max_bad_rows=1)
    shown: list[str] = []
    found = read_prompts(config, shown.append, request=PromptStyle("rewrite").request, response_field="response")
    assert [prompt.response for prompt in found.prompts] == ["two"] and "two" in shown[0]
    assert found.bad_rows == [f"{path}:2: response is not text, and the prompt style shows it"]
    with pytest.raises(DataError, match="response is not text"):
        read_prompts(PromptsConfig(path=str(path), answer_field="truth"), len, response_field="response")
