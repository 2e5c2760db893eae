"""What direct preference optimization refuses before anything is loaded."""

from __future__ import annotations

import pytest

from megatron_r1.config.cross_checks import check_layout
from megatron_r1.config.load import load
from megatron_r1.errors import ConfigError

FILES = ["dpo.source=file", "dpo.train_file=a.jsonl", "dpo.eval_file=b.jsonl"]
INTERLEAVED = ["parallel.pipeline=2", "parallel.virtual_pipeline=2", "train.micro_batch_size=8"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["dpo.beta=0"], "dpo.beta=0.0: must lie between"),
        (["dpo.label_smoothing=0.5"], "dpo.label_smoothing=0.5: must be at least 0 and below 0.5"),
        (["dpo.label_smoothing=-0.1"], "dpo.label_smoothing=-0.1: must be at least 0 and below 0.5"),
        (["dpo.source=web"], "dpo.source=web: must be one of assistant, file"),
        (["dpo.epochs=0"], "dpo.epochs=0: must be at least 1"),
        (["dpo.train_file=a.jsonl"], "dpo.train_file=a.jsonl: must be empty: source is assistant"),
        (FILES[:2], "dpo.eval_file=: must name a file or the folder of a dataset"),
    ],
)
def test_what_is_not_allowed_is_one_line(overrides, message):
    with pytest.raises(ConfigError) as refused:
        load("dpo", overrides)
    assert str(refused.value).startswith(message) and "\n" not in str(refused.value)


def test_files_may_replace_the_generated_pairs():
    settings = load("dpo", FILES).dpo
    assert (settings.source, settings.train_file, settings.eval_file) == ("file", "a.jsonl", "b.jsonl")


@pytest.mark.parametrize("verb", ["dpo", "reward_model"])
@pytest.mark.parametrize(
    ("overrides", "ranks", "message"),
    [
        (["parallel.context=2"], 2, "parallel.context=2: must be 1"),
        (INTERLEAVED, 2, "parallel.virtual_pipeline=2: must be 1"),
        (
            ["parallel.expert=2", "performance.moe_token_dispatcher_type=allgather"],
            2,
            "performance.moe_token_dispatcher_type=allgather: needs",
        ),
        (["train.global_batch_size=16"], 3, "train.global_batch_size=16: must be a multiple of the 3"),
    ],
)
def test_layouts_that_preferences_do_not_support_are_refused(verb, overrides, ranks, message):
    with pytest.raises(ConfigError) as refused:
        check_layout(load(verb, overrides), verb, ranks)
    assert str(refused.value).startswith(message)


def test_tensor_pipeline_expert_and_data_parallel_ranks_are_let_through():
    check_layout(load("dpo", ["parallel.tensor=2", "parallel.pipeline=2", "parallel.expert=2"]), "dpo", 8)
