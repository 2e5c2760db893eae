"""The precision section: DeepSeek's recipe by name, and what is refused."""

from __future__ import annotations

import pytest

from megatron_r1.config.load import load
from megatron_r1.config.precision import LINEARS, PrecisionConfig
from megatron_r1.config.schema import convert
from megatron_r1.errors import ConfigError


def test_the_recipe_by_name_differs_from_full_precision_in_one_key():
    full, fp8 = (load("pretrain", [f"precision={name}"]).precision for name in ("full", "deepseek_fp8"))
    assert (full.linears, fp8.linears) == ("full", "fp8")
    fp8.linears = "full"
    assert full == fp8 == PrecisionConfig()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("linears", "e5m2", "linears=e5m2: must be one of full, fp8"),
        ("gradients", "128x1", "gradients=128x1: must be one of 1x128, 128x128, tensor"),
        ("activations", "1x64", "activations=1x64: must be one of 1x128, 128x128, tensor"),
        ("weights", "1x128", "weights=1x128: must be one of 128x128, tensor"),
        ("stay_high", ["eh_pro"], "stay_high=eh_pro: each must be one of self_attention.linear_q_proj, "),
        ("stay_high", ["output_layer"], "stay_high=output_layer: each must be one of "),
        ("power_of_two_inputs", ["eh_proj"], "power_of_two_inputs=eh_proj: is in stay_high"),
        ("e5m6_inputs", ["linear_proj"], "e5m6_inputs=linear_proj: each must be one of "),
    ],
)
def test_what_is_no_recipe_is_refused(key, value, message):
    with pytest.raises(ConfigError) as refused:
        convert(PrecisionConfig, {key: value})
    assert str(refused.value).startswith(message)


def test_a_recipe_that_quantises_nothing_is_refused():
    nothing = {"power_of_two_inputs": [], "power_of_two_gradients": [], "e5m6_inputs": []}
    with pytest.raises(ConfigError, match="stay_high=14: names every linear layer"):
        convert(PrecisionConfig, {"stay_high": list(LINEARS), **nothing})
