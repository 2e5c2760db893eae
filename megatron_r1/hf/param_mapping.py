"""One parameter mapping: a megatron-core tensor and the Hugging Face tensors that hold the same numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor  # a config.json is read before torch is imported

from megatron_r1.config.model import MoeConfig

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ParamMapping:
    """One megatron-core tensor and its Hugging Face parts, joined along dimension 0."""

    native: str
    """Name in megatron-core."""
    hf: tuple[str, ...]
    """Names in Hugging Face, in the order of the native tensor's parts."""
    part_shapes: tuple[Shape, ...]
    """Shape of each Hugging Face part."""
    copies: tuple[str, ...] = ()
    """Further Hugging Face names that repeat the whole tensor."""
    groups: int = 1
    """Parts alternate in the native tensor this many times: [q k v] for each key-value head."""
    float32: bool = False
    """Stored in float32 whatever the model's type is (the router's balancing bias)."""
    quantised: bool = False
    """Stored in FP8, each part with its block scales, where a release is in FP8 (linear layers but `eh_proj`)."""

    @property
    def native_shape(self) -> Shape:
        return (sum(shape[0] for shape in self.part_shapes), *self.part_shapes[0][1:])

    @property
    def hf_shapes(self) -> dict[str, Shape]:
        """Shape of every Hugging Face tensor of the mapping, copies included."""
        return dict(zip(self.hf, self.part_shapes, strict=True)) | dict.fromkeys(self.copies, self.native_shape)

    def split(self, native: Tensor) -> list[Tensor]:
        """The Hugging Face parts of a native tensor: views where parts do not alternate."""
        sizes = [shape[0] // self.groups for shape in self.part_shapes]
        return [part.flatten(0, 1) for part in native.unflatten(0, (self.groups, -1)).split(sizes, 1)]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The native tensor of Hugging Face's parts; a single part is given back as it is."""
        if len(parts) == 1:
            return parts[0]
        import torch

        return torch.cat([part.unflatten(0, (self.groups, -1)) for part in parts], 1).flatten(0, 1)


def same_tensor(native: str, hf: str, *shape: int, copies: tuple[str, ...] = (), float32: bool = False) -> ParamMapping:
    """A tensor that both sides hold alike."""
    return ParamMapping(native, (hf,), (shape,), copies, float32=float32)


def linear_weight(native: str, hf: str, out_features: int, in_features: int) -> ParamMapping:
    """The weight of a linear layer that both sides hold alike."""
    return ParamMapping(native, (hf,), ((out_features, in_features),), quantised=True)


def gated_feed_forward(native: str, expert: str, hf: str, hidden: int, width: int) -> Iterator[ParamMapping]:
    """The two maps of a gated feed-forward: the gate lies before the up-projection in the first.

    Args:
        expert: number that megatron-core appends to the weights of one of several experts; else empty.
    """
    gate_and_up = (f"{hf}.gate_proj.weight", f"{hf}.up_proj.weight")
    shapes = ((width, hidden), (width, hidden))
    yield ParamMapping(f"{native}.linear_fc1.weight{expert}", gate_and_up, shapes, quantised=True)
    yield linear_weight(f"{native}.linear_fc2.weight{expert}", f"{hf}.down_proj.weight", hidden, width)


def dense_feed_forward(native: str, hf: str, hidden: int, width: int) -> Iterator[ParamMapping]:
    """A dense layer's feed-forward with its norm, which is fused into the first map."""
    norm = f"{native}.mlp.linear_fc1.layer_norm_weight"
    yield same_tensor(norm, f"{hf}.post_attention_layernorm.weight", hidden)
    yield from gated_feed_forward(f"{native}.mlp", "", f"{hf}.mlp", hidden, width)


def sparse_feed_forward(native: str, hf: str, hidden: int, moe: MoeConfig) -> Iterator[ParamMapping]:
    """A sparse layer's router and experts, with their norm, which stands alone."""
    native_mlp, hf_mlp, width = f"{native}.mlp", f"{hf}.mlp", moe.ffn_hidden_size
    yield same_tensor(f"{native}.pre_mlp_layernorm.weight", f"{hf}.post_attention_layernorm.weight", hidden)
    yield same_tensor(f"{native_mlp}.router.weight", f"{hf_mlp}.gate.weight", moe.num_experts, hidden)
    if moe.score_function == "sigmoid":
        bias = f"{hf_mlp}.gate.e_score_correction_bias"
        yield same_tensor(f"{native_mlp}.router.expert_bias", bias, moe.num_experts, float32=True)
    for expert in range(moe.num_experts):
        names = f"{native_mlp}.experts", str(expert), f"{hf_mlp}.experts.{expert}"
        yield from gated_feed_forward(*names, hidden, width)
    if moe.num_shared_experts:
        names = f"{native_mlp}.shared_experts", "", f"{hf_mlp}.shared_experts"
        yield from gated_feed_forward(*names, hidden, moe.num_shared_experts * width)
