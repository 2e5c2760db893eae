"""Pairs of files and of datasets' folders, by the keys of dpo and of reward_model."""

from __future__ import annotations

import json

import pytest

from megatron_r1.config.data import DataConfig
from megatron_r1.config.dpo import DpoConfig
from megatron_r1.config.reward_model import RewardModelConfig
from megatron_r1.errors import ConfigError
from megatron_r1.preference.items import eval_items, training_items


@pytest.mark.parametrize(("section", "config"), [("dpo", DpoConfig), ("reward_model", RewardModelConfig)])
def test_a_folder_has_the_pairs_of_both_splits(tmp_path, section, config):
    for name, count in (("train-0", 3), ("train-1", 2), ("test", 1)):
        rows = [{"prompt": f"{name} {n}", "chosen": "c", "rejected": "r"} for n in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = {"source": "file", "train_file": str(tmp_path), "eval_file": str(tmp_path)}
    settings, data = config(**files), DataConfig()
    assert [item.question[:7] for item in training_items(settings, data, 9)] == ["train-0"] * 3 + ["train-1"] * 2
    assert [item.question for item in eval_items(settings, data)] == ["test 0"]
    assert len(eval_items(config(**files, eval_split="train"), data)) == 5
    for given, key in (({"train_split": "dev"}, "train_file"), ({"subset": "x"}, "subset")):
        with pytest.raises(ConfigError, match=rf"^{section}\.{key}="):
            training_items(config(**files, **given), data, 9)
