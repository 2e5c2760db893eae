"""What keys mean, on the command line and in configs/README.md."""

from __future__ import annotations

import pytest
import yaml

from megatron_r1.config.describe import all_keys, commented_yaml, help_of, reference, sections_read_by
from megatron_r1.config.load import load
from megatron_r1.config.recipes import configs_folder
from megatron_r1.config.schema import resolved
from megatron_r1.config.verbs import VERBS
from megatron_r1.errors import ConfigError


def test_configs_readme_is_what_the_classes_say() -> None:
    written = (configs_folder() / "README.md").read_text(encoding="utf-8")
    assert written == reference(), "python -m megatron_r1.config.describe > configs/README.md"


def test_every_key_has_a_meaning_and_a_type() -> None:
    assert [key.path for key in all_keys() if not key.meaning or not key.kind] == []
    assert len({key.path for key in all_keys() if not key.section}) > 300


def test_help_of_a_key_says_type_unit_default_and_limits() -> None:
    text = help_of("rollout.sglang.pool.give_up_s")
    assert "number of seconds" in text and "default 900.0" in text and "at least 0.01" in text
    assert "one of" not in text and "sequence_mean, token_mean, constant" in help_of("rl.loss_aggregation")
    assert help_of("rl.loss_aggregation").endswith("read by: grpo")


def test_help_of_a_section_lists_its_keys_and_options() -> None:
    text = help_of("rl", "grpo")
    assert all(key.path in text for key in all_keys() if key.path.startswith("rl."))
    assert "options: rl=" in text and "dapo" in text


def test_help_of_a_verb_leaves_out_what_it_does_not_read() -> None:
    assert "train.micro_batch_size" in help_of("train", "pretrain")
    assert "train.micro_batch_size" not in help_of("train", "grpo")
    assert [name for name, _ in sections_read_by("convert")] == ["model", "init", "convert"]


def test_help_of_an_unknown_key_is_a_refusal() -> None:
    with pytest.raises(ConfigError, match="did you mean rl.group_size"):
        help_of("rl.num_generations")


@pytest.mark.parametrize("verb", VERBS)
def test_commented_configuration_is_yaml_with_the_values_that_the_verb_reads(verb: str) -> None:
    config = load(verb, ["name='7'"])
    text = commented_yaml(config, verb, {})
    tree, whole = yaml.safe_load(text), resolved(config)
    assert tree["name"] == "7" and tree.keys() <= whole.keys()
    for name, value in tree.items():
        assert _within(value, whole[name]), name
    assert "# Name of the run" in text and max(map(len, text.splitlines())) <= 130


def _within(part: object, whole: object) -> bool:
    if not isinstance(part, dict) or not isinstance(whole, dict):
        return part == whole
    return all(_within(value, whole[name]) for name, value in part.items())
