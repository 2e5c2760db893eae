"""A whole step of `pretrain` beside the same step in a bare megatron-core loop, on this machine.

    python tools/bench/step_overhead.py [--steps 60] [key=value ...]

Ours is the command itself: reader, schedule, update, checks, metrics, hooks, rows on disk. The bare loop has a model
of the same weights and spec, megatron-core's DistributedDataParallel, its distributed optimizer and its schedule, and
keeps nothing but the loss. It takes its step inside ours, as the last hook, so that the two alternate in one process.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from typing import Any

from megatron_r1.platform import select

PLATFORM = select("cpu")

import torch  # noqa: E402

from megatron_r1.commands.pretrain import SHOWN, open_corpus, pretraining_step  # noqa: E402
from megatron_r1.config.load import load  # noqa: E402
from megatron_r1.config.run import RunConfig  # noqa: E402
from megatron_r1.model.build import build_model  # noqa: E402
from megatron_r1.runs.training_run import training_run  # noqa: E402
from megatron_r1.train.hooks import Hook, Hooks  # noqa: E402
from megatron_r1.train.hooks.balance import BalanceHook  # noqa: E402
from megatron_r1.train.loop import train  # noqa: E402
from megatron_r1.train.schedule import learning_rate  # noqa: E402
from megatron_r1.train.state import TrainState  # noqa: E402
from tools.bench.comparison import describe  # noqa: E402

WARM_UP = 3
BareStep = Callable[[Any, float], float]
"""Sequences [B, L + 1] and a learning rate -> the loss."""


def bare_step(config: RunConfig, platform: Any) -> BareStep:
    """The step as it would be written with megatron-core alone."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer, get_standard_config_overrides
    from megatron.core.pipeline_parallel import get_forward_backward_func

    settings = config.train.optimizer
    model: Any = build_model(config.model, config.parallel, platform, config.seed)
    model.config.finalize_model_grads_func = finalize_model_grads
    wrapped = DistributedDataParallel(
        model.config, DistributedDataParallelConfig(use_distributed_optimizer=True), model
    )
    given = OptimizerConfig(
        optimizer="adam",
        lr=config.train.schedule.learning_rate,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        adam_eps=settings.epsilon,
        clip_grad=settings.max_grad_norm,
        params_dtype=torch.float32,
        use_distributed_optimizer=True,
    )
    optimizer = get_megatron_optimizer(given, [wrapped], get_standard_config_overrides(given))
    run_passes = get_forward_backward_func()
    size, length = config.train.micro_batch_size, config.train.sequence_length
    positions_BL = torch.arange(length).expand(size, length)

    def forward(batches: Any, module: Any) -> tuple[Any, Any]:
        tokens_BL = next(batches)
        output_BL = module(tokens_BL[:, :-1].contiguous(), positions_BL, None, labels=tokens_BL[:, 1:].contiguous())

        def loss_function(output_BL: Any) -> tuple[Any, dict[str, Any]]:
            loss = output_BL.mean()
            return loss, {"loss": loss.detach().clone()}

        return output_BL, loss_function

    def step(tokens_BL: Any, rate: float) -> float:
        micro_batches = torch.split(tokens_BL, size)
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        losses = run_passes(
            forward_step_func=forward,
            data_iterator=iter(micro_batches),
            model=[wrapped],
            num_microbatches=len(micro_batches),
            seq_length=length,
            micro_batch_size=size,
            forward_only=False,
        )
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("lr_mult", 1.0)
        optimizer.step()
        return sum(float(entry["loss"]) for entry in losses) / len(losses)

    return step


class BareLoop(Hook):
    """Takes the bare step after each of ours, and the time of both.

    Attributes:
        seconds: of each step, by who took it.
        losses: of each step, likewise.
    """

    def __init__(self, step: BareStep, batch: Callable[[TrainState], Any], rate: Callable[[TrainState], float]):
        """
        Args:
            step: the bare step.
            batch: the sequences of the step before a state.
            rate: the learning rate of that step.
        """
        self._step, self._batch, self._rate = step, batch, rate
        self.seconds: dict[str, list[float]] = {"whole step": [], "bare loop": []}
        self.losses: dict[str, list[float]] = {"whole step": [], "bare loop": []}
        self._started = time.perf_counter()

    def after_step(self, state: TrainState, row: dict[str, Any]) -> None:
        self.seconds["whole step"].append(time.perf_counter() - self._started)
        self.losses["whole step"].append(row["train/loss"])
        tokens_BL, rate = self._batch(state), self._rate(state)
        started = time.perf_counter()
        self.losses["bare loop"].append(self._step(tokens_BL, rate))
        self.seconds["bare loop"].append(time.perf_counter() - started)
        self._started = time.perf_counter()


def measure(config: RunConfig) -> BareLoop:
    """The run of `config` with the bare loop in it."""
    corpus, tokenizer = open_corpus(config, None)
    with training_run(config, tokenizer, None) as run:
        settings = config.train
        balance = BalanceHook(settings.balance_window, settings.log_interval, run.extra)
        hooks = run.hooks(SHOWN, "pretrain", balance.tensors, first=[balance])

        def batch(state: TrainState) -> Any:
            position = state.data_position - settings.global_batch_size
            return torch.from_numpy(corpus.batch(position, settings.global_batch_size))

        def rate(state: TrainState) -> float:
            return learning_rate(settings.schedule, state.step, settings.steps, state.consumed_tokens)

        bare = BareLoop(bare_step(config, run.platform), batch, rate)
        train(run.state, pretraining_step(run, corpus), Hooks([hooks, bare]), settings.steps)
    return bare


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("extra", nargs="*", metavar="key=value", help="of pretrain; by default its recipe on tiny")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as root:
        always = [f"root={root}", "name=overhead", "platform=cpu", f"train.steps={given.steps}", "track=off"]
        config = load(
            "pretrain", [*always, f"train.save_interval={given.steps}", "train.schedule.warmup_steps=2", *given.extra]
        )
        bare = measure(config)
    ours, theirs = bare.losses.values()
    worst = max(abs(mine - other) / other for mine, other in zip(ours[:WARM_UP], theirs[:WARM_UP], strict=True))
    print(f"losses of the first {WARM_UP} steps differ by {worst:.1e} at most")
    assert worst < 1e-4, "the two do not compute the same"
    found = {name: seconds[WARM_UP:] for name, seconds in bare.seconds.items()}
    tokens = config.train.global_batch_size * config.train.sequence_length
    print(describe(found, base="bare loop", work=tokens, unit="tokens"))


if __name__ == "__main__":
    main()
