"""How well length alone tells better from worse: what a reward model's accuracy must be held against.

The rule is the best one on the learned items: longer or shorter is better; for labelled responses, from which length
on. It is then measured on held-out ones. Ties count as half.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megatron_r1.data.preference_example import PreferenceExample

Length = Callable[[str], int]


def length_baseline(
    learned: Sequence[PreferenceExample], heldout: Sequence[PreferenceExample], length: Length
) -> list[float]:
    """1, 0 or a half for each held-out item: whether the best rule by `length` of the response is right on it."""
    if heldout[0].rejected is not None:
        longer = [_longer_is_better(item, length) for item in learned]
        sign = sum(longer) * 2 >= len(longer)
        return [value if sign else 1 - value for value in (_longer_is_better(item, length) for item in heldout)]
    lengths = [length(item.chosen.response) for item in learned]
    best = max(
        (
            sum((size >= least) == (item.safe == long_is_safe) for size, item in zip(lengths, learned, strict=True)),
            least,
            long_is_safe,
        )
        for least in sorted(set(lengths))
        for long_is_safe in (True, False)
    )
    _, least, long_is_safe = best
    return [float((length(item.chosen.response) >= least) == (item.safe == long_is_safe)) for item in heldout]


def _longer_is_better(item: PreferenceExample, length: Length) -> float:
    better, worse = (length(side.response) for side in item.responses)
    return (better > worse) + 0.5 * (better == worse)
