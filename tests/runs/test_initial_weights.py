"""Which weights a run may start from, and what its positions may be then."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
import torch

from megatron_r1.checkpoint.store import OneRank
from megatron_r1.config.initial_model import check_same_model
from megatron_r1.config.load import load
from megatron_r1.config.model import ModelConfig, MoeConfig
from megatron_r1.config.schema import convert, resolved
from megatron_r1.errors import ConfigError
from megatron_r1.runs.initial_weights import InitialModel, Weights


@lru_cache
def preset(name: str) -> ModelConfig:
    return load("pretrain", [f"model={name}"]).model


def model_of(changes: str, model: str = "tiny") -> ModelConfig:
    tree = resolved(preset(model))
    for change in changes.split():
        path, value = change.split("=")
        *sections, key = path.split(".")
        section = tree
        for name in sections:
            section = section[name]
        section[key] = type(section[key])(float(value))
    return convert(ModelConfig, tree)


YARN = "rope.factor=4 rope.original_max_position=64"
ALLOWED = [
    ("", "init_std=0.02 moe.bias_update_rate=0"),
    ("", "max_sequence_length=128"),
    ("max_sequence_length=64", f"{YARN} max_sequence_length=256"),
    ("", f"{YARN} max_sequence_length=256 rope.mscale=0.707 rope.mscale_all_dim=0.707"),
    (f"{YARN} max_sequence_length=256", f"{YARN} max_sequence_length=128"),
    (f"{YARN} max_sequence_length=256", f"{YARN} rope.factor=8 max_sequence_length=512"),
    ("rope.original_max_position=2048 rope.beta_fast=16", ""),
]
REFUSED = [
    ("", "hidden_size=64", "model.hidden_size=64"),
    ("", "rope.base=5e4", "model.rope.base=50000.0"),
    (YARN, "", "model.rope.factor=1.0"),
    (YARN, f"{YARN} rope.mscale=0.707", "model.rope.mscale=0.707"),
    (YARN, f"{YARN} rope.factor=8 rope.original_max_position=128", "model.rope.original_max_position=128"),
    (f"{YARN} max_sequence_length=64", f"{YARN} max_sequence_length=257", "model.max_sequence_length=257"),
    ("", f"{YARN} max_sequence_length=257", "model.max_sequence_length=257"),
]


@pytest.mark.parametrize(("found", "wanted"), ALLOWED)
def test_weights_that_serve(found, wanted):
    check_same_model(model_of(wanted), model_of(found), "runs/base")


@pytest.mark.parametrize(("found", "wanted", "key"), REFUSED)
def test_weights_that_do_not(found, wanted, key):
    with pytest.raises(ConfigError) as error:
        check_same_model(model_of(wanted), model_of(found), "runs/base")
    assert str(error.value).startswith(f"{key}: ") and "\n" not in str(error.value)


def test_dense_weights_do_not_serve_a_sparse_model():
    with pytest.raises(ConfigError, match=r"^model\.attention\.kind=latent: must be grouped"):
        check_same_model(model_of(""), model_of("ffn_hidden_size=256 tied_embeddings=0", "tiny_dense"), "runs/base")


def test_a_dense_model_serves_whatever_is_said_of_experts_that_it_has_not():
    dense = preset("tiny_dense")
    check_same_model(dense, replace(dense, moe=MoeConfig.none()), "hf:folder")
    assert dense.moe != MoeConfig.none()


def test_multi_token_layers_are_left_out_where_the_run_has_none():
    tensors = {name: torch.zeros(1) for name in ("decoder.layers.0.x", "mtp.layers.0.x", "embedding.mtp_x")}
    folders, model = (Path("tokenizer"), Path("folder")), model_of("mtp.num_layers=1")
    initial = InitialModel(model, *folders, lambda _: Weights(model, tensors, *folders))
    assert initial.serving(model_of("mtp.num_layers=1")) is initial
    served = initial.serving(model_of("mtp.num_layers=0"))
    assert set(served.weights(OneRank()).tensors) == {"decoder.layers.0.x", "embedding.mtp_x"}
    assert served.model.mtp.num_layers == 0


def test_each_context_recipe_starts_from_the_one_before():
    stages = [load("pretrain", [], recipe) for recipe in ("context_32k", "context_128k")]
    weights = preset("v3_671b")
    for stage in stages:
        check_same_model(stage.model, weights, "runs/before")
        weights = stage.model
        assert stage.train.sequence_length * stage.train.global_batch_size == 62_914_560
    with pytest.raises(ConfigError, match=r"model\.max_sequence_length"):
        check_same_model(model_of("max_sequence_length=32768", "v3_671b"), model_of("", "v3_671b"), "runs/before")
