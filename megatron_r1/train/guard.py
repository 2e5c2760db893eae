"""What happens when a gradient is not finite: nobody updates, and after a few in a row the run stops."""

from __future__ import annotations

from megatron_r1.errors import Diverged


def count_skips(skipped_in_row: int, skipped: bool, allowed: int, step: int) -> int:
    """Skips in a row after this update.

    Raises:
        Diverged: more than `allowed` in a row.
    """
    if not skipped:
        return 0
    if skipped_in_row + 1 > allowed:
        raise Diverged(
            f"step {step}: gradients were not finite {skipped_in_row + 1} updates in a row "
            f"(train.max_skipped_steps={allowed}); weights are those of the last finite update"
        )
    return skipped_in_row + 1
