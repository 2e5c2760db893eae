"""The engine of verbs that sample from a model without training it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from megatron_r1.config.run import RunConfig
from megatron_r1.platform import select
from megatron_r1.rollout.engine import RolloutEngine, WeightSync
from megatron_r1.rollout.factory import sglang_engine
from megatron_r1.rollout.in_process import LocalEngine
from megatron_r1.runs.initial_weights import Weights


@contextmanager
def inference_engine(
    config: RunConfig, first: Weights, current: dict[str, Tensor], folder: Path
) -> Iterator[tuple[RolloutEngine, WeightSync]]:
    """The configured engine, and the sync that loads the tensors that are in `current` at that time."""
    platform = select(config.platform)
    if config.rollout.engine == "sglang":
        with sglang_engine(
            config.rollout, first.model, lambda: current.items(), first.tokenizer_folder, folder / "logs", platform.name
        ) as engine_and_sync:
            yield engine_and_sync
        return
    from megatron_r1.model.build import build_model
    from megatron_r1.model.shards import load_whole_tensors
    from megatron_r1.parallel.mesh import process_groups

    with process_groups(
        platform, config.parallel, config.seed, config.threads, config.distributed_timeout_minutes
    ):
        model = build_model(first.model, config.parallel, platform, config.seed)

        class LoadingEngine(LocalEngine):
            def push(self, version: str) -> None:
                load_whole_tensors(model, current)
                super().push(version)

        engine = LoadingEngine(model, config.rollout.local_batch_size, first.tokenizer().pad)
        yield engine, engine
