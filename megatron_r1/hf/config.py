"""config.json of a Hugging Face folder, in the releases' style, and the view of a folder for SGLang on CPU."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_r1.config.model import DTYPE_NAMES, ModelConfig, RopeConfig
from megatron_r1.errors import DataError
from megatron_r1.files import read_json
from megatron_r1.hf.families import family_of
from megatron_r1.hf.families.family import written_rope, written_yarn
from megatron_r1.hf.publish import published

QUANTIZATION_CONFIG: dict[str, Any] = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}
"""`quantization_config` of the release's config.json; the blocks are those of fp8_blocks.py."""


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """Ids of the tokens that generation needs; None where the tokenizer has no such token."""

    bos: int | None = None
    eos: int | None = None
    pad: int | None = None


def special_tokens(tokenizer_folder: Path) -> SpecialTokens:
    """Read the ids from `tokenizer_config.json` and `tokenizer.json`.

    Raises:
        DataError: a file is missing or a named token has no id.
    """
    named, vocabulary = read_json(tokenizer_folder / "tokenizer_config.json"), tokenizer_folder / "tokenizer.json"
    content = read_json(vocabulary)
    words = content.get("model", {}).get("vocab", {})
    # Some kinds of vocabularies list their tokens in the order of ids.
    ids = words if isinstance(words, dict) else {word: number for number, (word, *_) in enumerate(words)}
    ids = ids | {token["content"]: token["id"] for token in content.get("added_tokens", [])}

    def token_id(key: str) -> int | None:
        token = named.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None and token not in ids:
            raise DataError(f"{vocabulary}: {key} {token!r} is not in the vocabulary")
        return ids.get(token)

    return SpecialTokens(token_id("bos_token"), token_id("eos_token"), token_id("pad_token"))


def hf_config(
    model: ModelConfig, tokens: SpecialTokens | None = None, dtype: str | None = None, include_mtp: bool = True
) -> dict[str, Any]:
    """The content of config.json for weights of `model`, keys as in the family's releases.

    Args:
        model: shape of the model.
        tokens: ids for generation; unknown ones are null.
        dtype: "float32" or "bfloat16"; by default as `model.dtype`.
        include_mtp: whether the weights hold the multi-token layers.

    Raises:
        ConfigError: code of the model's family elsewhere would compute another model.
    """
    check_exportable(model)
    family, tokens = family_of(model), tokens or SpecialTokens()
    return {
        "architectures": [family.architecture],
        "attention_dropout": 0.0,
        "bos_token_id": tokens.bos,
        "eos_token_id": tokens.eos,
        "hidden_act": "silu",
        "hidden_size": model.hidden_size,
        "initializer_range": model.init_std,
        "intermediate_size": model.ffn_hidden_size,
        "max_position_embeddings": model.max_sequence_length,
        "model_type": family.model_type,
        "num_attention_heads": model.num_attention_heads,
        "num_hidden_layers": model.num_layers,
        "pad_token_id": tokens.pad,
        "rms_norm_eps": model.norm_epsilon,
        "rope_scaling": written_rope(model.rope),
        "rope_theta": model.rope.base,
        "tie_word_embeddings": model.tied_embeddings,
        "torch_dtype": dtype or DTYPE_NAMES[model.dtype],
        "use_cache": True,
        "vocab_size": model.vocab_size,
        **family.config(model, include_mtp),
    }


def in_format(config: dict[str, Any], format: str) -> dict[str, Any]:
    """A config.json for the same model's weights in another format: fp32, bf16 or fp8.

    `auto_map` goes, because it names code that no folder from here carries.
    """
    config = {key: value for key, value in config.items() if key not in ("auto_map", "dtype", "quantization_config")}
    config["torch_dtype"] = DTYPE_NAMES.get(format, "bfloat16")
    return config | ({"quantization_config": QUANTIZATION_CONFIG} if format == "fp8" else {})


def format_of(config: dict[str, Any]) -> str:
    """The format that a config.json says its folder's weights have: fp32, bf16 or fp8.

    Raises:
        ValueError: another type or kind of quantisation.
        KeyError: it does not say.
    """
    dtype = config.get("torch_dtype") or config["dtype"]
    format = {name: precision for precision, name in DTYPE_NAMES.items()}.get(dtype)
    if format is None:
        raise ValueError(f"torch_dtype={dtype}: must be one of {', '.join(DTYPE_NAMES.values())}")
    quantisation = config.get("quantization_config")
    if quantisation is None:
        return format
    if not isinstance(quantisation, dict):
        raise ValueError(f"quantization_config={quantisation}: must be an object")
    for key, value in QUANTIZATION_CONFIG.items():
        needed = key in ("quant_method", "weight_block_size")
        if (found := quantisation.get(key, None if needed else value)) != value:
            raise ValueError(f"quantization_config.{key}={found}: must be {value}")
    if format != "bf16":
        raise ValueError(f"torch_dtype={dtype}: must be bfloat16 beside quantization_config")
    return "fp8"


def check_exportable(model: ModelConfig) -> None:
    """Refuse a model that the family's code elsewhere would load and then compute differently.

    Raises:
        ConfigError: names the field.
    """
    family_of(model).check(model)


def generation_config(tokens: SpecialTokens, settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The content of generation_config.json.

    Args:
        tokens: ids of the tokenizer.
        settings: settings of the model that this one was made of, its end tokens among them; without, the file says
            where to stop, and leaves temperature and the like to the caller.
    """
    ids = {"bos_token_id": tokens.bos, "eos_token_id": tokens.eos, "pad_token_id": tokens.pad}
    known = {key: value for key, value in ids.items() if value is not None}
    settings = settings or {"_from_model_config": True, "do_sample": True}
    # In the order of the settings, so that a conversion there and back gives the same file.
    return {**settings, **known, **settings}


def serving_view(folder: Path, view: Path) -> Path:
    """Make `view` a folder that SGLang serves on CPU: links to everything in `folder`, with a config.json of its own.

    For latent attention, SGLang's rotary positions on CPU exist for YaRN only. A model without gets it with factor 1 in
    the view, which leaves frequencies and the softmax scale as they are; the cache of positions is as long as the
    original context times the factor, hence the full context. `num_nextn_predict_layers` stays what the export says it
    holds, because SGLang skips layers beyond the decoder's only where it is positive: a weight push is best exported
    without them.

    Returns:
        `view`.

    Raises:
        DataError: `folder` is no export, or `view` exists and is something else.
    """
    config = read_json(folder / "config.json")
    if config["model_type"].startswith("deepseek") and not config.get("rope_scaling"):
        plain = RopeConfig(factor=1.0, original_max_position=config["max_position_embeddings"])
        config["rope_scaling"] = written_yarn(plain)
    config["dtype"] = config.pop("torch_dtype")
    with published(view) as unfinished:
        for file in sorted(folder.resolve().iterdir()):
            if file.name != "config.json":
                (unfinished / file.name).symlink_to(file)
        write_json(unfinished / "config.json", config)
    return view


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
