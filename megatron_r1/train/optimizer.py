"""The optimizer: megatron-core's, over its gradient buffers.

Its moments are named after the parameters they belong to, so that a checkpoint can be read by name.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer.optimizer import MegatronOptimizer
from torch import Tensor

from megatron_r1.config.train import TrainConfig

MOMENTS = ("exp_avg", "exp_avg_sq")


class Optimizer:
    """AdamW over a model's gradient buffers.

    Attributes:
        model: the model, wrapped so that backward passes fill its gradient buffers.
    """

    def __init__(self, model: GPTModel, train: TrainConfig):
        """
        Args:
            model: parameters that need no gradient are left alone.
            train: optimizer and schedule settings.
        """
        self.model = DistributedDataParallel(
            model.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model
        )
        settings = train.optimizer
        config = MegatronOptimizerConfig(
            optimizer="adam",
            lr=train.schedule.learning_rate,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.beta1,
            adam_beta2=settings.beta2,
            adam_eps=settings.epsilon,
            clip_grad=settings.clip_norm,
            bf16=model.config.bf16,
            params_dtype=model.config.params_dtype,
            use_distributed_optimizer=False,
        )
        self._inner = get_megatron_optimizer(config, [self.model], get_standard_config_overrides(config))
        self._names = {id(parameter): name for name, parameter in model.named_parameters()}
        # With bf16 weights the optimizer steps fp32 copies of them.
        self._masters = {
            name: parameter.main_param
            for name, parameter in model.named_parameters()
            if getattr(parameter, "main_param", None) is not None
        }
        self._names |= {id(master): name for name, master in self._masters.items()}

    def zero_gradients(self) -> None:
        """Clear the gradient buffers."""
        self.model.zero_grad_buffer()
        self._inner.zero_grad()

    def gradients_finite(self) -> bool:
        """Whether this rank's gradient buffers hold only finite numbers."""
        buffers = (*self.model.buffers, *self.model.expert_parallel_buffers)
        return all(bool(torch.isfinite(buffer.grad_data.sum())) for buffer in buffers)

    def step(self, learning_rate: float) -> float:
        """Clip, then update the parameters.

        Returns:
            Global gradient norm before clipping.
        """
        for optimizer in self._parts():
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * group.get("lr_mult", 1.0)
        _, norm, _ = self._inner.step()
        return float(norm or 0.0)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """State by name: ``exp_avg/``, ``exp_avg_sq/``, ``step/`` (``master/`` for bf16) and the parameter's name."""
        for name, master in self._masters.items():
            yield f"master/{name}", master
        for name, state in self._states():
            for key in (*MOMENTS, "step"):
                yield f"{key}/{name}", torch.as_tensor(state[key])

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Restore what `tensors` gave; every entry must be there, or none where no update had been made."""
        with torch.no_grad():
            for name, master in self._masters.items():
                master.copy_(tensors[f"master/{name}"])
        if not any(key.startswith("step/") for key in tensors):
            return
        for part in self._parts():
            for parameter in (p for group in part.optimizer.param_groups for p in group["params"]):
                name = self._names[id(parameter)]
                part.optimizer.state[parameter] = {key: tensors[f"{key}/{name}"].clone() for key in (*MOMENTS, "step")}

    def _parts(self) -> list[MegatronOptimizer]:
        return getattr(self._inner, "chained_optimizers", [self._inner])

    def _states(self) -> Iterator[tuple[str, dict]]:
        for part in self._parts():
            for parameter, state in part.optimizer.state.items():
                yield self._names[id(parameter)], state
