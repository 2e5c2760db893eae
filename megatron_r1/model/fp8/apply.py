"""Decides which linear layers of a model multiply in FP8, for both backends.

Every module that holds a matrix is looked at by name: it is a linear layer that `config.fp8` knows, or one that
always stays high, or an error. So nothing new in a model is quantised, or left out, unnoticed.

Under tensor parallelism 128-wide blocks are cut from each rank's shard, as Transformer Engine cuts them. They are the
blocks of the whole weight only where a shard's side is a multiple of 128; where it is not, the layout changes the
scales, which is allowed and listed (`Fp8Plan.cut`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

from megatron_r1.config.fp8 import LINEARS, ROWS, Fp8Config, check_tilings
from megatron_r1.errors import ConfigError
from megatron_r1.model.chunks import Model, chunks
from megatron_r1.model.fp8.linear import LinearRecipe, multiply, parallel_multiply
from megatron_r1.model.fp8.quantise import BLOCK, E4M3, E5M6, TILE, WHOLE
from megatron_r1.model.te_layout_modules import DuplicatedLinear, GroupedLinear
from megatron_r1.platform import Platform

TRANSFORMER_ENGINE = "Transformer Engine's Float8BlockScaling"
INPUT_IN_BF16 = "the input is kept in bf16 for the backward pass"
POWERS_OF_TWO = (
    "all scales are powers of two, not those of power_of_two_inputs and power_of_two_gradients alone "
    "(NVTE_FP8_BLOCK_SCALING_FP32_SCALES=1 in the environment: none is)"
)
DEPARTURES = (
    "inputs are kept in E4M3, also those of e5m6_inputs, or in bf16 where `quantised` says so",
    "tiles of an input by token, for the gradient of the weight, are cut from the unquantised input",
    "tokens of a micro-batch, and of each expert, are padded to a multiple of 16",
)
"""Where Transformer Engine does otherwise than the report; beside its scales."""
ALWAYS_HIGH = ("embedding.word_embeddings", "output_layer", "mlp.router")
TILINGS = {"1x128": TILE, "128x128": BLOCK, "tensor": WHOLE}


@dataclass
class Fp8Plan:
    """What was decided for one rank's part of a model."""

    quantised: dict[str, str] = field(default_factory=dict)
    """Module name -> how its operands are quantised."""
    high: list[str] = field(default_factory=list)
    """Modules with a matrix that are not quantised."""
    cut: list[str] = field(default_factory=list)
    """Quantised modules whose weight's blocks are not those of the whole weight, because a shard ends within one."""
    departures: list[str] = field(default_factory=list)
    """Where the backend does otherwise than DeepSeek-V3's report."""

    def lines(self) -> list[str]:
        """The plan as text for the user, with layers of a kind together."""
        kinds: dict[str, str] = {kind_of(name): recipe for name, recipe in self.quantised.items()}
        counts = Counter(map(kind_of, self.quantised))
        result = [f"fp8: {kind} x {counts[kind]}: {recipe}" for kind, recipe in kinds.items()]
        high = Counter(map(kind_of, self.high))
        result.append(f"high: {', '.join(f'{kind} x {count}' for kind, count in high.items())}")
        result += [f"fp8: unlike the report: {departure}" for departure in self.departures]
        if self.cut:
            names = ", ".join(dict.fromkeys(map(kind_of, self.cut)))
            result.append(f"fp8: shards of {names} end within a block of 128: another layout has other scales")
        return result


def merge_plans(plans: Iterable[Fp8Plan]) -> Fp8Plan:
    """The plan of a whole model from those of its parts, which may overlap."""
    whole = Fp8Plan()
    for plan in plans:
        whole.quantised |= plan.quantised
        whole.high += [name for name in plan.high if name not in whole.high]
        whole.cut += [name for name in plan.cut if name not in whole.cut]
        whole.departures = whole.departures or plan.departures
    return whole


def kind_of(name: str) -> str:
    """The end of a module's name that says which matrix it holds.

    Raises:
        ConfigError: the module is none that FP8 knows.
    """
    for kind in (*LINEARS, *ALWAYS_HIGH):
        if name == kind or name.endswith(f".{kind}"):
            return kind
    raise ConfigError("fp8.enabled", True, f"{name} holds a matrix of a kind that is not known to FP8")


def use_fp8(model: Model, fp8: Fp8Config, platform: Platform) -> Fp8Plan:
    """Let the linear layers of a built model multiply in FP8.

    Args:
        model: this rank's part, of Transformer Engine's modules or torch's.
        fp8: for which `wants_fp8`.
        platform: of the model.

    Raises:
        ConfigError: no linear layer would be quantised, or one is not known, or its size is none that multiplies in
            FP8.
    """
    plan = Fp8Plan(departures=_departures() if platform.transformer_engine else [])
    for name, module in _named_in_the_whole(model):
        weight = _matrix(module)
        if weight is None:
            continue
        kind = kind_of(name)
        if kind in ALWAYS_HIGH or kind in fp8.exclude_modules:
            plan.high.append(name)
            if platform.transformer_engine and kind in LINEARS:
                _keep_high(module)
            continue
        recipe = recipe_of(kind, fp8)
        if platform.transformer_engine:
            _check_sides(name, weight)
            plan.quantised[name] = _transformer_engine_recipe(module)
        else:
            _emulate(name, module, recipe)
            plan.quantised[name] = str(recipe)
        if fp8.weight_tiling == "128x128" and _shard_ends_within_a_block(weight):
            plan.cut.append(name)
    if not plan.quantised:
        raise ConfigError("fp8.enabled", True, "no linear layer of this model would be quantised")
    return plan


def wants_fp8(fp8: Fp8Config, platform: Platform) -> bool:
    """Whether linear layers are to multiply in FP8.

    Raises:
        ConfigError: they are, in a way that the platform cannot; names the key.
    """
    if not fp8.enabled:
        return False
    if platform.name == "cuda" and not platform.transformer_engine:
        raise ConfigError("fp8.enabled", True, "needs Transformer Engine on CUDA, which is not installed")
    if platform.transformer_engine:
        check_tilings(fp8)
    return True


def recipe_of(kind: str, fp8: Fp8Config) -> LinearRecipe:
    """How linear layers of one kind are quantised."""
    return LinearRecipe(
        activations=TILINGS[fp8.activation_tiling],
        gradients=TILINGS[fp8.gradient_tiling],
        weights=TILINGS[fp8.weight_tiling],
        power_of_two_inputs=kind in fp8.power_of_two_inputs,
        power_of_two_gradients=kind in fp8.power_of_two_gradients,
        saved=E5M6 if kind in fp8.e5m6_inputs else E4M3,
    )


def _named_in_the_whole(model: Model) -> Iterator[tuple[str, Any]]:
    """Modules by name, backbone layers by their number in the whole model: a pipeline stage counts its own from 0."""
    for part in chunks(model):
        numbers = {f"decoder.layers.{i}": layer.layer_number - 1 for i, layer in enumerate(part.decoder.layers)}
        for name, module in part.named_modules():
            layer = ".".join(name.split(".")[:3])
            yield (f"decoder.layers.{numbers[layer]}{name[len(layer) :]}" if layer in numbers else name), module


def _matrix(module: Any) -> Tensor | None:
    """The matrix that the module itself holds, the first of several."""
    own = dict(module.named_parameters(recurse=False))
    return next((own[name] for name in ("weight", "weight0") if name in own and own[name].dim() == 2), None)


def _emulate(name: str, module: Any, recipe: LinearRecipe) -> None:
    """Let a torch module multiply quantised operands."""
    if isinstance(module, DuplicatedLinear | GroupedLinear):
        module.multiply = partial(multiply, recipe=recipe)
    elif isinstance(module, ColumnParallelLinear | RowParallelLinear):
        # The method that both call for their product; gathering and reduction around it stay as they are.
        module._forward_impl = parallel_multiply(recipe)
    else:
        raise ConfigError("fp8.enabled", True, f"{name} is a {type(module).__name__}, which cannot multiply so")


def _check_sides(name: str, weight: Tensor) -> None:
    if any(side % ROWS for side in weight.shape):
        shape = " x ".join(map(str, weight.shape))
        allowed = f"{name} has {shape} numbers on a rank, but Transformer Engine multiplies multiples of {ROWS} in FP8"
        raise ConfigError("fp8.enabled", True, f"{allowed}: name its kind in fp8.exclude_modules")


def _departures() -> list[str]:
    """Where Transformer Engine does otherwise than the report in this process."""
    from transformer_engine.common.recipe import Float8BlockScaling

    rounded = Float8BlockScaling().fp8_quant_fwd_inp.power_2_scale
    exact = "no scale is a power of two on purpose, not those of power_of_two_inputs and power_of_two_gradients either"
    return [POWERS_OF_TWO if rounded else exact, *DEPARTURES]


def _transformer_engine_recipe(module: Any) -> str:
    """How one of Transformer Engine's modules is quantised; megatron-core lets some keep their input as it is."""
    kept = getattr(module, "save_original_input", False)
    return f"{TRANSFORMER_ENGINE}; {INPUT_IN_BF16}" if kept else TRANSFORMER_ENGINE


def _keep_high(module: Any) -> None:
    """Let one of Transformer Engine's modules run outside FP8: megatron-core's own per-module override."""
    from megatron.core.extensions.transformer_engine import TEQuantizationParams, TEQuantizationRecipe

    module.te_quant_params = TEQuantizationParams(TEQuantizationRecipe(), None)


def _shard_ends_within_a_block(weight: Tensor) -> bool:
    if not getattr(weight, "tensor_model_parallel", False):
        return False
    expert = not getattr(weight, "allreduce", True)
    size = (
        parallel_state.get_expert_tensor_parallel_world_size()
        if expert
        else parallel_state.get_tensor_model_parallel_world_size()
    )
    return size > 1 and weight.shape[weight.partition_dim] % BLOCK[weight.partition_dim] != 0  # type: ignore[attr-defined]
