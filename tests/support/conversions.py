"""Small native checkpoints and Hugging Face folders of any shape, and the conversions between them as the verb does."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer as Backend
from tokenizers.models import WordLevel
from torch import Tensor

from megatron_r1.checkpoint.sharded import TensorPart, WholeTensors, write_parts
from megatron_r1.checkpoint.store import CheckpointStore
from megatron_r1.commands.convert import run
from megatron_r1.config.convert import ConvertConfig
from megatron_r1.config.load import load
from megatron_r1.config.model import ModelConfig
from megatron_r1.config.run import InitConfig, RunConfig
from megatron_r1.config.schema import resolved
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.hf.families import param_mappings

TOKENS = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}


def native_weights(model: ModelConfig, seed: int = 0) -> dict[str, Tensor]:
    """Random weights of the model's own type; every matrix has a column that outweighs the rest."""
    generator = torch.Generator().manual_seed(seed)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[model.dtype]
    weights = {}
    for mapping in param_mappings(model):
        tensor = torch.randn(mapping.native_shape, generator=generator) * 0.2
        tensor[..., -1] *= 7
        weights[mapping.native] = tensor.to(torch.float32 if mapping.float32 else dtype)
    return weights


def native_run(run_folder: Path, model: ModelConfig, weights: dict[str, Tensor]) -> Path:
    """A run that has one checkpoint, of two ranks that halve every matrix."""

    def write(folder: Path) -> None:
        parts: list[list[TensorPart]] = [[], []]
        for name, tensor in weights.items():
            half = len(tensor) // 2 if tensor.dim() > 1 else 0
            for rank, (start, part) in enumerate(((0, tensor[:half]), (half, tensor[half:]))):
                if len(part):
                    parts[rank].append(
                        TensorPart(name, tuple(tensor.shape), (start,) + (0,) * (tensor.dim() - 1), part)
                    )
        for rank, own in enumerate(parts):
            write_parts(folder, "model", rank, own)
        write_tokenizer(folder / "tokenizer")

    with CheckpointStore(run_folder / "checkpoints") as store:
        store.commit(7, write, {"config": {"model": resolved(model)}, "layout": {}})
    return run_folder


def write_tokenizer(folder: Path) -> None:
    """As much of a tokenizer as an export reads."""
    backend = Backend(WordLevel({}))
    backend.add_special_tokens(list(TOKENS.values()))
    Tokenizer(backend, TOKENS).save(folder)


def convert(source: Path | str, run_folder: Path, **settings: object) -> Path:
    """`megatron-r1 convert convert.KEY=VALUE ...` in this process; returns the folder that it wrote."""
    config = replace(
        _recipe(),
        init=InitConfig(from_=str(source)),
        root=str(run_folder.parent),
        name=run_folder.name,
        convert=ConvertConfig(**settings),
    )
    run(config)
    return run_folder / "hf" if config.convert.to == "hf" else run_folder / "checkpoints" / "step-00000000"


@lru_cache
def _recipe() -> RunConfig:
    return load("convert")


def native_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a native checkpoint."""
    with WholeTensors(folder, "model") as tensors:
        return dict(tensors)


def hf_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a Hugging Face folder, as safetensors reads them."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Whether names, types, shapes and all bits are the same."""
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype
        and left[name].shape == right[name].shape
        and torch.equal(*(each[name].contiguous().view(-1).view(torch.uint8) for each in (left, right)))
        for name in left
    )


def in_precision(model: ModelConfig, precision: str) -> ModelConfig:
    return replace(model, dtype=precision)
