"""AdamW that stores its moments in another type, or in other memory, than it computes updates in."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim.adamw import adamw


class OffloadedMomentsAdamW(torch.optim.AdamW):
    """AdamW over fp32 weights whose moments are rounded to `dtype` and moved to `device` after each update.

    DeepSeek-V3 stores both moments in bf16, and weights and gradients in fp32 (report, section 3.3.3). Parameters are
    updated one after the other, so that at most one has its moments in fp32 at a time.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], dtype: torch.dtype, device: str | None = None):
        """
        Args:
            groups: parameter groups of another Adam, with their learning rate, betas, epsilon and decay.
            dtype: of the moments between updates.
            device: of the moments between updates; None is the device of their parameter.
        """
        # The base class accepts leaf tensors only; the distributed optimizer updates views of buffers.
        super().__init__([torch.zeros(1)])
        self.param_groups = list(groups)
        self._dtype, self._device = dtype, device

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(group, parameter, parameter.grad)

    def _update(self, group: dict[str, Any], parameter: torch.Tensor, gradient: torch.Tensor) -> None:
        state = self.state[parameter]
        if not state:
            resting = torch.zeros_like(parameter, dtype=self._dtype, device=self._device)
            state |= {"step": torch.zeros(()), "exp_avg": resting, "exp_avg_sq": resting.clone()}
        working = {key: state[key].to(parameter.device, parameter.dtype) for key in ("exp_avg", "exp_avg_sq")}
        adamw(
            [parameter],
            [gradient],
            [working["exp_avg"]],
            [working["exp_avg_sq"]],
            [],
            [state["step"]],
            foreach=False,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        for key, moment in working.items():
            state[key].copy_(moment)
