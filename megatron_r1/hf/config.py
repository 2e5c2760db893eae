"""config.json of a DeepSeek-V3 folder, in the released one's style, and the view of a folder for SGLang on CPU."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_r1.config.model import ModelConfig, RopeConfig
from megatron_r1.errors import ConfigError, DataError
from megatron_r1.hf.publish import published

DTYPE_NAMES = {"fp32": "float32", "bf16": "bfloat16"}
"""Spelling of `model.precision` in config.json."""


LATENT_NORM_EPSILON = 1e-6
"""DeepSeek-V3's modelling code fixes this for the norms of the latents, whatever `rms_norm_eps` says."""


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
    ids = {token["content"]: token["id"] for token in read_json(vocabulary).get("added_tokens", [])}

    def token_id(key: str) -> int | None:
        token = named.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None and token not in ids:
            raise DataError(f"{vocabulary}: {key} {token!r} is not among the added tokens")
        return ids.get(token)

    return SpecialTokens(token_id("bos_token"), token_id("eos_token"), token_id("pad_token"))


def hf_config(
    model: ModelConfig, tokens: SpecialTokens | None = None, dtype: str | None = None, include_mtp: bool = True
) -> dict[str, Any]:
    """The content of config.json for weights of `model`, keys as in DeepSeek-V3's release.

    Args:
        model: shape of the model.
        tokens: ids for generation; unknown ones are null.
        dtype: "float32" or "bfloat16"; by default as `model.precision`.
        include_mtp: whether the weights hold the multi-token layers.

    Raises:
        ConfigError: no DeepSeek-V3 config describes this model.
    """
    check_exportable(model)
    tokens = tokens or SpecialTokens()
    attention, moe = model.attention, model.moe
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": tokens.bos,
        "eos_token_id": tokens.eos,
        "ep_size": 1,
        "first_k_dense_replace": moe.first_dense_layers,
        "hidden_act": "silu",
        "hidden_size": model.hidden_size,
        "initializer_range": model.init_std,
        "intermediate_size": model.ffn_hidden_size,
        "kv_lora_rank": attention.kv_lora_rank,
        "max_position_embeddings": model.max_sequence_length,
        "model_type": "deepseek_v3",
        "moe_intermediate_size": moe.ffn_hidden_size,
        "moe_layer_freq": 1,
        "n_group": moe.num_groups,
        "n_routed_experts": moe.num_experts,
        "n_shared_experts": moe.num_shared_experts,
        "norm_topk_prob": True,
        "num_attention_heads": model.num_attention_heads,
        "num_experts_per_tok": moe.top_k,
        "num_hidden_layers": model.num_layers,
        "num_key_value_heads": model.num_attention_heads,
        "num_nextn_predict_layers": model.mtp.num_layers if include_mtp else 0,
        "pad_token_id": tokens.pad,
        "q_lora_rank": attention.q_lora_rank or None,
        "qk_nope_head_dim": attention.qk_nope_head_dim,
        "qk_rope_head_dim": attention.qk_rope_head_dim,
        "rms_norm_eps": model.norm_epsilon,
        "rope_scaling": _yarn(model.rope) if model.rope.factor > 1 else None,
        "rope_theta": model.rope.base,
        "routed_scaling_factor": moe.scaling_factor,
        "scoring_func": "sigmoid",
        "tie_word_embeddings": False,
        "topk_group": moe.group_top_k,
        "topk_method": "noaux_tc",
        "torch_dtype": dtype or DTYPE_NAMES[model.precision],
        "use_cache": True,
        "v_head_dim": attention.v_head_dim,
        "vocab_size": model.vocab_size,
    }


def check_exportable(model: ModelConfig) -> None:
    """Refuse a model that DeepSeek-V3 code elsewhere would load and then compute differently.

    Every DeepSeek-V3 implementation ranks a group by the sum of its best 2 experts; megatron-core takes the best
    top_k / group_top_k. They agree at V3's 8 of 4 groups, and where all groups are kept anyway.
    """
    moe = model.moe
    if model.norm_epsilon != LATENT_NORM_EPSILON:
        raise ConfigError("model.norm_epsilon", model.norm_epsilon, f"must be {LATENT_NORM_EPSILON} to be exported")
    if moe.score_function != "sigmoid":
        raise ConfigError("model.moe.score_function", moe.score_function, "must be sigmoid: DeepSeek-V3 has no other")
    if moe.num_experts // moe.num_groups < 2:
        raise ConfigError("model.moe.num_groups", moe.num_groups, "must leave at least 2 experts in a group")
    if moe.group_top_k < moe.num_groups and moe.top_k != 2 * moe.group_top_k:
        allowed = f"must be {2 * moe.group_top_k} (2 a group), or group_top_k={moe.num_groups} (all groups)"
        raise ConfigError("model.moe.top_k", moe.top_k, allowed)


def generation_config(tokens: SpecialTokens) -> dict[str, Any]:
    """The content of generation_config.json: where to stop; temperature and the like are left to the caller."""
    ids = {"bos_token_id": tokens.bos, "eos_token_id": tokens.eos, "pad_token_id": tokens.pad}
    known = {key: value for key, value in ids.items() if value is not None}
    return {"_from_model_config": True, "do_sample": True, **known}


def serving_view(folder: Path, view: Path) -> Path:
    """Make `view` a folder that SGLang serves on CPU: links to everything in `folder`, with a config.json of its own.

    SGLang's rotary positions on CPU exist for YaRN only. A model without YaRN gets it with factor 1 in the view, which
    leaves frequencies and the softmax scale as they are; the cache of positions is as long as the original context
    times the factor, hence the full context. `num_nextn_predict_layers` stays what the export says it holds, because
    SGLang skips layers beyond the decoder's only where it is positive: a weight push is best exported without them.

    Returns:
        `view`.

    Raises:
        DataError: `folder` is no export, or `view` exists and is something else.
    """
    config = read_json(folder / "config.json")
    if not config.get("rope_scaling"):
        plain = RopeConfig(factor=1.0, original_max_position=config["max_position_embeddings"])
        config["rope_scaling"] = _yarn(plain)
    config["dtype"] = config.pop("torch_dtype")
    with published(view) as unfinished:
        for file in sorted(folder.resolve().iterdir()):
            if file.name != "config.json":
                (unfinished / file.name).symlink_to(file)
        write_json(unfinished / "config.json", config)
    return view


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; DataError names the file when there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {getattr(error, 'strerror', None) or 'is no JSON'}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: must hold a JSON object")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _yarn(rope: RopeConfig) -> dict[str, Any]:
    return {
        "beta_fast": rope.beta_fast,
        "beta_slow": rope.beta_slow,
        "factor": rope.factor,
        "mscale": rope.mscale,
        "mscale_all_dim": rope.mscale_all_dim,
        "original_max_position_embeddings": rope.original_max_position,
        "type": "yarn",
    }
