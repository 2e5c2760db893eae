"""megatron_r1's command line with one rank that kills itself at a named point of a save.

torchrun ... dying_ranks.py VERB KEY=VALUE ...; MEGATRON_R1_DIES says where: JSON of point, rank and how often the point
is passed before.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

POINTS = {
    "verifying": None,
    "snapshot": None,
    "before_write": 0,
    "mid_shard": None,
    "after_write": None,
    "before_manifest": 0,
    "before_rename": 0,
    "before_last_fsync": 0,
    "before_prune": 0,
    "mid_prune": 0,
}
"""Point -> the only rank that passes it; None where all do."""


class Death:
    """Comes when the point has been passed often enough."""

    def __init__(self, passes: int):
        self.left = passes

    def pass_by(self) -> None:
        self.left -= 1
        if self.left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def before(self, owner: Any, name: str, here: Callable[..., bool] = lambda *_: True) -> None:
        function = getattr(owner, name)

        def dying(*arguments: Any, **keywords: Any) -> Any:
            if here(*arguments):
                self.pass_by()
            return function(*arguments, **keywords)

        setattr(owner, name, dying)

    def after(self, owner: Any, name: str) -> None:
        function = getattr(owner, name)

        def dying(*arguments: Any, **keywords: Any) -> Any:
            result = function(*arguments, **keywords)
            self.pass_by()
            return result

        setattr(owner, name, dying)


def arm(point: str, passes: int) -> None:
    """Put death at the point."""
    from megatron_r1.checkpoint import store, tensor_file
    from megatron_r1.runs.snapshot import Snapshot
    from megatron_r1.runs.training_run import TrainingRun

    death = Death(passes)
    if point == "verifying":
        death.before(store, "verify")
    elif point == "snapshot":
        death.before(TrainingRun, "snapshot")
    elif point == "before_write":
        death.after(store.CheckpointStore, "_prepare")
    elif point == "mid_shard":
        death.left += 100 * passes + 7  # tensors, not saves
        death.after(tensor_file.TensorFile, "write")
    elif point == "after_write":
        death.after(Snapshot, "write")
    elif point == "before_manifest":
        death.before(store, "write_manifest")
    elif point == "before_rename":
        death.before(store.CheckpointStore, "_publish")
    elif point == "before_last_fsync":
        death.before(store, "sync", lambda path: path.name == "checkpoints")
    elif point == "before_prune":
        death.before(store.CheckpointStore, "_discard")
    elif point == "mid_prune":
        remove = shutil.rmtree

        def half(path: Path, *arguments: Any, **keywords: Any) -> None:
            if path.name.startswith(".trash-"):
                next(path.glob("*.safetensors")).unlink()
                death.pass_by()
            remove(path, *arguments, **keywords)

        store.shutil.rmtree = half


if __name__ == "__main__":
    order = json.loads(os.environ["MEGATRON_R1_DIES"])
    if int(os.environ["RANK"]) == order["rank"]:
        from megatron_r1.platform import select

        select("cpu")  # before anything imports megatron.core
        arm(order["point"], order["passes"])
    from megatron_r1.__main__ import main

    sys.argv[0] = "megatron-r1"
    main()
