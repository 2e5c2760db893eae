"""Times real training steps while their rows go to wandb in one state of its network after the other, in one process.

    python -m tests.support.tracked_steps FOLDER ROUNDS STEPS

Prints a JSON object: state -> of each round, medians over its steps: seconds of a step (`step`), processor seconds of
the thread that trains (`training`) and of all others (`others`), and the seconds that the tracker took (`tracker`).
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

STATES = ("disabled", "offline", "closed port", "black hole")


@contextmanager
def server_in(state: str) -> Iterator[str]:
    """Address of a server in this state: one that refuses connections, or one that accepts them and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if state == "black hole":
            listener.listen(100)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def main(root: Path, rounds: int, steps: int) -> dict[str, list[dict[str, float]]]:
    from megatron_r1.platform import select

    select("cpu")
    import wandb

    from megatron_r1.commands.pretrain import SHOWN, open_corpus, pretraining_step
    from megatron_r1.config.jobs import TrackConfig
    from megatron_r1.config.load import load
    from megatron_r1.runs.training_run import training_run
    from megatron_r1.track import wandb_run
    from megatron_r1.track.tracker import Tracker
    from megatron_r1.train.hooks import Hook, Hooks
    from megatron_r1.train.loop import train
    from megatron_r1.train.state import TrainState

    wandb_run.START_TIMEOUT_S = wandb_run.FINISH_TIMEOUT_S = 3.0
    os.environ["WANDB_API_KEY"] = "0" * 40
    total = rounds * len(STATES) * steps
    short = ["train.schedule.warmup_steps=2", f"train.steps={total}", f"train.save_interval={total}"]
    config = load("pretrain", [f"root={root}", "name=run", "platform=cpu", "threads=1", "track=off", *short])
    corpus, tokenizer = open_corpus(config, None)
    seconds: dict[str, list[dict[str, float]]] = {state: [] for state in STATES}

    class Turns(Hook):
        """Opens and closes a tracker around each block of steps, and times the steps in between."""

        def __init__(self) -> None:
            self._times: list[tuple[float, float, float, float]] = []
            self._open(0)

        def _open(self, block: int) -> None:
            # Each round begins with another state, so that none always follows the same one.
            self._state = STATES[(block + block // len(STATES)) % len(STATES)]
            self._server = server_in(self._state)
            os.environ["WANDB_BASE_URL"] = self._server.__enter__()
            setting = self._state if self._state in ("disabled", "offline") else "online"
            self._tracker = Tracker(root / f"block-{block}", {}, "block", TrackConfig(wandb=setting), "pretrain")
            self._started = time.perf_counter(), time.thread_time(), time.process_time()

        def after_step(self, state: TrainState, row: dict[str, Any]) -> None:
            before = time.perf_counter()
            self._tracker.log(state.step, row)
            now, (wall, thread, process) = time.perf_counter(), self._started
            training = time.thread_time() - thread
            self._times.append((now - wall, training, time.process_time() - process - training, now - before))
            if state.step % steps == 0:
                medians = [median(kind) for kind in zip(*self._times, strict=True)]
                seconds[self._state].append(dict(zip(("step", "training", "others", "tracker"), medians, strict=True)))
                self._times.clear()
                self._tracker.close()
                wandb.teardown()
                self._server.__exit__(None, None, None)
                if state.step < total:
                    self._open(state.step // steps)
            self._started = time.perf_counter(), time.thread_time(), time.process_time()

    with training_run(config, tokenizer, None) as run:
        hooks = Hooks([run.hooks(SHOWN, "pretrain"), Turns()])
        train(run.state, pretraining_step(run, corpus), hooks, total)
    return seconds


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
