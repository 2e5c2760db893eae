"""Accuracy of a rule that sees only the length of responses: the baseline for a reward model's accuracy.

The rule is the best one on the training examples: for pairs, longer or shorter is better; for labelled responses, a
length from which responses are safe or unsafe. It is then measured on validation examples. Ties count as half.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megatron_r1.data.preference_example import PreferenceExample

Length = Callable[[str], int]


def length_baseline(
    training: Sequence[PreferenceExample], evaluation: Sequence[PreferenceExample], length: Length
) -> list[float]:
    """1, 0 or 0.5 for each validation example: whether the best rule by `length` of the response is right on it."""
    if evaluation[0].rejected is not None:
        longer = [_longer_is_better(item, length) for item in training]
        sign = sum(longer) * 2 >= len(longer)
        return [value if sign else 1 - value for value in (_longer_is_better(item, length) for item in evaluation)]
    lengths = [length(item.chosen.response) for item in training]
    best = max(
        (
            sum((size >= least) == (item.safe == long_is_safe) for size, item in zip(lengths, training, strict=True)),
            least,
            long_is_safe,
        )
        for least in sorted(set(lengths))
        for long_is_safe in (True, False)
    )
    _, least, long_is_safe = best
    return [float((length(item.chosen.response) >= least) == (item.safe == long_is_safe)) for item in evaluation]


def _longer_is_better(item: PreferenceExample, length: Length) -> float:
    chosen, rejected = (length(side.response) for side in item.responses)
    return (chosen > rejected) + 0.5 * (chosen == rejected)
