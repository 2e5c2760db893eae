"""FP8 training of linear layers (DeepSeek-V3 report, section 3.3)."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_r1.config.checks import one_of
from megatron_r1.errors import ConfigError

ROWS = 16
"""Transformer Engine multiplies FP8 matrices whose sides are multiples of this, tokens included."""
GATHERED_ROWS = 128
"""Tensor-parallel ranks send one another their tokens in FP8 where each has a multiple of this, else in bf16."""
LINEARS = (
    "self_attention.linear_q_proj",
    "self_attention.linear_q_down_proj",
    "self_attention.linear_q_up_proj",
    "self_attention.linear_kv_down_proj",
    "self_attention.linear_kv_up_proj",
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
    "mlp.shared_experts.linear_fc1",
    "mlp.shared_experts.linear_fc2",
    "mlp.experts.linear_fc1",
    "mlp.experts.linear_fc2",
    "eh_proj",
)
"""Every kind of linear layer that may be quantised, by the end of its name."""


@dataclass(kw_only=True, slots=True)
class Fp8Config:
    """Number formats of the matrix products in linear layers; parameters and all other layers keep `model.dtype`.

    A tiling is the number of rows and columns of a matrix that share one scale: 1x128 runs along the dimension that a
    product sums over, so the operands of the weight gradient are tiled 128x1, along the tokens.

    On CUDA the recipe is Transformer Engine's: its tilings are the defaults, all its scales are powers of two, and it
    saves nothing in E5M6, whatever the last three keys are. A run's `precision.json` says so, layer by layer.
    """

    enabled: bool = False
    """Whether linear layers multiply in FP8 (E4M3 operands in forward, input-gradient and weight-gradient products)."""
    activation_tiling: str = "1x128"
    """Tiling of a linear layer's input: 1x128, 128x128 or tensor."""
    gradient_tiling: str = "1x128"
    """Tiling of the gradient of its output: 1x128, 128x128 or tensor."""
    weight_tiling: str = "128x128"
    """Tiling of its weight: 128x128 or tensor."""
    exclude_modules: list[str] = field(default_factory=lambda: ["eh_proj"])
    """Linear layers without FP8; the embedding, the output head, routers, norms and attention never use it."""
    power_of_two_inputs: list[str] = field(
        default_factory=lambda: ["self_attention.linear_proj", "mlp.experts.linear_fc1"]
    )
    """Linear layers whose inputs have power-of-two scales: after attention, and inputs of the experts."""
    power_of_two_gradients: list[str] = field(default_factory=lambda: ["mlp.experts.linear_fc2"])
    """Linear layers whose output gradients have power-of-two scales: of the experts' outputs."""
    e5m6_inputs: list[str] = field(default_factory=lambda: ["self_attention.linear_proj"])
    """Linear layers whose input is saved for the backward pass in E5M6 instead of E4M3."""

    def __post_init__(self) -> None:
        one_of(self, "activation_tiling", ("1x128", "128x128", "tensor"))
        one_of(self, "gradient_tiling", ("1x128", "128x128", "tensor"))
        one_of(self, "weight_tiling", ("128x128", "tensor"))
        for key in ("exclude_modules", "power_of_two_inputs", "power_of_two_gradients", "e5m6_inputs"):
            for name in getattr(self, key):
                if name not in LINEARS:
                    raise ConfigError(key, name, f"each must be one of {', '.join(LINEARS)}")
                if key != "exclude_modules" and name in self.exclude_modules:
                    raise ConfigError(key, name, "is in exclude_modules, so it is not quantised")
        if set(self.exclude_modules) >= set(LINEARS):
            raise ConfigError(
                "exclude_modules", len(self.exclude_modules), "names every linear layer: take enabled=false"
            )


def check_tilings(fp8: Fp8Config) -> None:
    """Refuse tilings that Transformer Engine's recipe does not have.

    Raises:
        ConfigError: names the key.
    """
    for key, only in (("activation_tiling", "1x128"), ("gradient_tiling", "1x128"), ("weight_tiling", "128x128")):
        if (value := getattr(fp8, key)) != only:
            raise ConfigError(f"fp8.{key}", value, f"must be {only} with Transformer Engine")
