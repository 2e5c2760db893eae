"""Direct preference optimization: training on pairs of responses without a reward model.

Pure. Legend: P pairs, L token positions.
"""

# ruff: noqa: F722 - shapes stand in annotations as text

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import logsigmoid


def response_logprob(logprobs_BL: Float[Tensor, "B L"], mask_BL: Bool[Tensor, "B L"]) -> Float[Tensor, " B"]:
    """log p(response): the sum over its tokens."""
    return torch.where(mask_BL, logprobs_BL, 0.0).sum(dim=1)


def dpo_loss(
    chosen_P: Float[Tensor, " P"],
    rejected_P: Float[Tensor, " P"],
    reference_chosen_P: Float[Tensor, " P"],
    reference_rejected_P: Float[Tensor, " P"],
    *,
    beta: float,
    label_smoothing: float = 0.0,
    num_pairs: int | None = None,
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """-log sigmoid(beta (log-ratio of the chosen - of the rejected)) (Rafailov et al. 2023, equation 7), and metrics.

    Args:
        chosen_P, rejected_P: log-probabilities of whole responses under the policy (`response_logprob`).
        reference_chosen_P, reference_rejected_P: under the reference policy; no gradient flows into them.
        beta: strength of the penalty for leaving the reference policy; above 0.
        label_smoothing: assumed probability that the labels of a pair are swapped (Mitchell 2023, "A note on DPO with
            noisy preferences", equation 3, conservative DPO).
        num_pairs: pairs of the global batch, which divide the sums, so that losses of micro-batches add up; None is P.
    Returns:
        the loss, and without gradient `train/` metrics: `chosen_reward`, `rejected_reward`, `margin` (beta x
        log-ratios), `accuracy`.
    """
    chosen_P = beta * (chosen_P - reference_chosen_P.detach())
    rejected_P = beta * (rejected_P - reference_rejected_P.detach())
    margin_P = chosen_P - rejected_P
    loss_P = -(1 - label_smoothing) * logsigmoid(margin_P) - label_smoothing * logsigmoid(-margin_P)
    pairs = num_pairs if num_pairs is not None else len(margin_P)
    per_pair = {
        "train/chosen_reward": chosen_P,
        "train/rejected_reward": rejected_P,
        "train/margin": margin_P,
        "train/accuracy": (margin_P > 0).to(margin_P.dtype),
    }
    return loss_P.sum() / pairs, {name: value_P.detach().sum() / pairs for name, value_P in per_pair.items()}
