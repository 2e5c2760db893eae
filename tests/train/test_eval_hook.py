"""What is measured during training, and in which rows it stands."""

from __future__ import annotations

from megatron_r1.train.hooks.eval import EvalHook
from megatron_r1.train.state import TrainState


def rows_of(losses: list[float], start: int, steps: int, before: dict[str, float] | None = None) -> list[dict]:
    waiting = iter(losses)
    hook = EvalHook(lambda: {"loss": next(waiting)}, 2, steps, before)
    rows: list[dict] = [{} for _ in range(start, steps)]
    for step, row in enumerate(rows, start + 1):
        hook.after_step(TrainState(step=step), row)
    assert next(waiting, None) is None  # measured only at the interval
    return rows


def test_every_so_many_steps_and_at_the_end():
    assert rows_of([2.0, 1.0, 0.5], 0, 5) == [{}, {"loss": 2.0}, {}, {"loss": 1.0}, {"loss": 0.5}]


def test_what_was_measured_before_training_is_in_the_first_row_alone():
    assert rows_of([2.0, 1.0], 0, 3, {"loss_before": 3.0}) == [{"loss_before": 3.0}, {"loss": 2.0}, {"loss": 1.0}]
    assert rows_of([1.0, 0.5], 3, 5, {"loss_before": 3.0})[0] == {"loss_before": 3.0, "loss": 1.0}
