"""Group-relative advantages: a response's reward relative to those of the other responses to the same prompt.

Pure. A group whose rewards are all equal has advantages of exactly 0, and there is no division by 0. Legend: N groups
(prompts), G responses per group, L positions, R tokens of a response.
"""

# ruff: noqa: F722 - shapes stand in annotations as text

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from jaxtyping import Float
from torch import Tensor

from megatron_r1.rl.advantages.estimators import AdvantageInputs, RolloutAdvantages
from megatron_r1.rl.policy.batch import PerSample, at_positions

STD_KINDS = ("population", "sample", "none")


def group_advantages(rewards_NG: Float[Tensor, "N G"], std: str = "population") -> Float[Tensor, "N G"]:
    """(r - mean of its group) / standard deviation of its group (DeepSeekMath, section 4.1.2).

    Args:
        rewards_NG: one row per prompt, one reward per response.
        std: the divisor: `population` divides squares by G, `sample` by G - 1, `none` leaves the difference as it is.
    Returns:
        advantages, in the type of the rewards; computed in float64.
    Raises:
        ValueError: `std` is not one of the three.
    """
    if std not in STD_KINDS:
        raise ValueError(f"std={std}: must be one of {', '.join(STD_KINDS)}")
    exact_NG = rewards_NG.double()
    centred_NG = exact_NG - exact_NG.mean(dim=1, keepdim=True)
    # Equal rewards have advantages of 0; comparing them is exact, while their rounded mean may differ from each.
    equal_N1 = exact_NG.amax(dim=1, keepdim=True) == exact_NG.amin(dim=1, keepdim=True)
    if std != "none":
        squares_N1 = centred_NG.square().sum(dim=1, keepdim=True)
        deviation_N1 = (squares_N1 / max(exact_NG.shape[1] - (std == "sample"), 1)).sqrt()
        centred_NG = centred_NG / deviation_N1.masked_fill(equal_N1, 1.0)
    return centred_NG.masked_fill(equal_N1, 0.0).to(rewards_NG.dtype)


def process_advantages(
    step_rewards: Sequence[Sequence[float]],
    step_ends: Sequence[Sequence[int]],
    length: int,
    std: str = "population",
) -> Float[Tensor, "G L"]:
    """Advantages of tokens from rewards of the steps of each response of a group (DeepSeekMath, section 4.1.3).

    Rewards are normalised over all steps of all responses; a token's advantage is the sum of those of the steps that
    end at it or later; several may end at one token.

    Args:
        step_rewards: of each response, in order; a response may have none.
        step_ends: the last token of each step, as an index into its response, in order.
        length: tokens of the longest response, L.
        std: as of `group_advantages`, over all steps.
    Raises:
        ValueError: ends that do not ascend, lie beyond `length` or are not as many as rewards.
    """
    flat = [reward for rewards in step_rewards for reward in rewards]
    result_GL = torch.zeros(len(step_rewards), length)
    if not flat:
        return result_GL
    normalised = iter(group_advantages(torch.tensor([flat], dtype=torch.float64), std)[0].tolist())
    for row_L, rewards, ends in zip(result_GL, step_rewards, step_ends, strict=True):
        if len(ends) != len(rewards) or list(ends) != sorted(ends) or any(not 0 <= end < length for end in ends):
            raise ValueError(
                f"step_ends={list(ends)}: must ascend below {length}, one for each of {len(rewards)} rewards"
            )
        for end in ends:
            row_L[: end + 1] += next(normalised)
    return result_GL


def ragged_group_advantages(
    rewards: Float[Tensor, " B"], sizes: Sequence[int], std: str = "population"
) -> Float[Tensor, " B"]:
    """`group_advantages` of groups that may differ in size, one after the other.

    Args:
        sizes: responses of each group; they add up to B.
    """
    if len(set(sizes)) <= 1:
        return group_advantages(rewards.view(len(sizes), -1), std).flatten()
    return torch.cat([group_advantages(group[None], std).flatten() for group in rewards.split(list(sizes))])


class GroupAdvantages:
    """A response compared with the other responses to the same prompt (DeepSeekMath, section 4.1.2)."""

    def __init__(self, std: str):
        """
        Args:
            std: of `group_advantages`.
        """
        self._std = std

    def estimate(self, inputs: AdvantageInputs) -> RolloutAdvantages:
        # Computed on whole groups, although their responses are divided among mini-batches.
        sizes = [len(group) for group in _groups(inputs)]
        return RolloutAdvantages(dict(enumerate(ragged_group_advantages(_rewards(inputs), sizes, self._std))))


class ProcessAdvantages:
    """Process supervision: a step compared with all steps of the responses to a prompt (DeepSeekMath, section 4.1.3).

    The reward of the whole response counts as one more step, which ends with the response. Without other steps, every
    token has the advantage that `GroupAdvantages` gives to the response.
    """

    def __init__(self, std: str):
        """
        Args:
            std: of `process_advantages`.
        """
        self._std = std

    def estimate(self, inputs: AdvantageInputs) -> RolloutAdvantages:
        outcomes = _rewards(inputs).tolist()
        by_sample: PerSample = {}
        for group in _groups(inputs):
            samples = [inputs.samples[index] for index in group]
            ends = [[*(end for end, _ in s.steps), s.response_length - 1] for s in samples]
            values = [[*(v for _, v in inputs.samples[index].steps), outcomes[index]] for index in group]
            longest = max(sample.response_length for sample in samples)
            advantages_GR = process_advantages(values, ends, longest, self._std)
            by_sample |= {
                index: at_positions(s, row_R) for index, s, row_R in zip(group, samples, advantages_GR, strict=True)
            }
        return RolloutAdvantages(by_sample)


def _rewards(inputs: AdvantageInputs) -> Tensor:
    """Of responses, [samples], less the penalties."""
    rewards = torch.tensor([sample.reward for sample in inputs.samples])
    return rewards if inputs.penalties is None else rewards - inputs.penalties.per_sample


def _groups(inputs: AdvantageInputs) -> list[list[int]]:
    """Indices of each group's samples."""
    indices = range(len(inputs.samples))
    return [list(group) for _, group in groupby(indices, key=lambda index: inputs.samples[index].group)]
