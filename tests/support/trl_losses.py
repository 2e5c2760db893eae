"""TRL's own loss functions on given log-probabilities: its trainers' methods with a stand-in for trainer and model."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


def _accelerator() -> Any:
    return SimpleNamespace(
        gather=lambda x: x,
        gather_for_metrics=lambda x: x,
        reduce=lambda x, reduction: x,
        num_processes=1,
        device=torch.device("cpu"),
    )


def trl_policy_loss(
    logprobs_BL: Tensor,
    old_logprobs_BL: Tensor | None,
    advantages: Tensor,
    mask_BL: Tensor,
    *,
    loss_type: str,
    low: float,
    high: float,
    level: str = "token",
    reference_logprobs_BL: Tensor | None = None,
    beta: float = 0.0,
    entropy_BL: Tensor | None = None,
    entropy_coefficient: float = 0.0,
    correction_BU: Tensor | None = None,
    longest: int = 0,
) -> Tensor:
    """GRPOTrainer's loss of one batch."""
    from trl import GRPOTrainer

    entropies_BL = torch.zeros_like(logprobs_BL) if entropy_BL is None else entropy_BL
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs_BL, entropies_BL, None),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=level,
        beta=beta,
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None),
        loss_type=loss_type,
        epsilon_low=low,
        # Its limit on CISPO's weights is the weight itself.
        epsilon_high=1 + high if loss_type == "cispo" else high,
        use_vllm=correction_BU is not None,
        vllm_importance_sampling_correction=correction_BU is not None,
        model=SimpleNamespace(training=False),
        _entropy_bonus_enabled=entropy_coefficient != 0,
        use_adaptive_entropy=False,
        entropy_coef=entropy_coefficient,
        max_completion_length=longest,
        current_gradient_accumulation_steps=1,
        _metrics={"eval": defaultdict(list)},
        accelerator=_accelerator(),
    )
    tokens_BL = torch.zeros_like(mask_BL, dtype=torch.long)
    inputs = {
        "prompt_ids": tokens_BL[:, :1],
        "prompt_mask": torch.ones_like(tokens_BL[:, :1]),
        "completion_ids": tokens_BL,
        "completion_mask": mask_BL.long(),
        "advantages": advantages,
        "ref_per_token_logps": reference_logprobs_BL,
        "importance_sampling_ratio": correction_BU,
        "num_items_in_batch": mask_BL.sum(),
    }
    if old_logprobs_BL is not None:
        inputs["old_per_token_logps"] = old_logprobs_BL
    return GRPOTrainer._compute_loss(trainer, None, inputs)


def trl_dpo_loss(chosen_PL: Tensor, rejected_PL: Tensor, reference: tuple[Tensor, Tensor], beta: float) -> Tensor:
    """DPOTrainer's sigmoid loss of pairs whose log-probabilities of tokens are given, 0 outside of the response."""
    from trl import DPOTrainer

    both = torch.cat([chosen_PL, rejected_PL])
    options = SimpleNamespace(
        log_probs=both, entropy=torch.zeros_like(both), mean_logits=torch.zeros_like(both), is_top1=both == 0
    )
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        accelerator=_accelerator(),
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=["sigmoid"],
        loss_weights=[1.0],
        label_smoothing=0.0,
        use_weighting=False,
        beta=beta,
        _metrics={"eval": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
    )
    tokens = torch.zeros(len(both), both.shape[1] + 1, dtype=torch.long)
    inputs = {
        "input_ids": tokens,
        "attention_mask": torch.ones_like(tokens),
        "completion_mask": torch.ones_like(tokens),
        "ref_chosen_logps": reference[0].sum(1),
        "ref_rejected_logps": reference[1].sum(1),
    }
    return DPOTrainer._compute_loss(trainer, lambda **_: options, inputs, False)
