"""What megatron-core keeps of routing for the whole process."""

from __future__ import annotations

import sys


def forget_routing() -> None:
    """Drop what routers have recorded, in tensors as long as the first model is deep, and the scale of their loss, in
    the shape of the first."""
    if logging := sys.modules.get("megatron.core.transformer.moe.moe_logging"):
        logging.destroy_moe_metrics_tracker()
    if scales := sys.modules.get("megatron.core.transformer.moe.moe_utils"):
        scales.MoEAuxLossAutoScaler.main_loss_backward_scale = None
