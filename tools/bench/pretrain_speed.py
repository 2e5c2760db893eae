"""Our training step beside transformers' DeepseekV3 with torch's fused AdamW, on this machine's CPU.

    python tools/bench/pretrain_speed.py tiny --batch 16 --length 64
    python tools/bench/pretrain_speed.py small --batch 8 --length 512 --rounds 5

Same weights (through our Hugging Face export), same tokens, fp32, no multi-token prediction and no balancing, which
transformers does not have. Both clip the gradient and update by AdamW. Each side has a process of its own, in which it
first tries its settings: threads, and for transformers the implementations of its experts; the fastest of each then
take turns. Losses of the first steps must agree.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from megatron_r1.config.load import load
from megatron_r1.config.model import ModelConfig
from megatron_r1.config.run import RunConfig
from megatron_r1.config.train import OptimizerConfig
from tools.bench.comparison import alternate, describe

EXPERTS = ("eager", "grouped_mm", "batched_mm")
"""Implementations of experts that transformers offers on a CPU. The last copies the weights for every token."""
LEARNING_RATE = 1e-4
"""Small, so that the second losses still agree: a token near a tie of two experts goes elsewhere by a rounding."""
CHECKED_STEPS = 2


@dataclass(frozen=True)
class Task:
    """What both sides do."""

    config: RunConfig
    batch: int
    length: int
    folder: Path
    """Of the initial weights, in Hugging Face's format."""

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    def rows(self, step: int) -> Any:
        """Tokens of a step: int64 [B, L + 1], drawn evenly."""
        import torch

        generator = torch.Generator().manual_seed(step)
        vocabulary = self.config.model.vocab_size
        return torch.randint(0, vocabulary, (self.batch, self.length + 1), generator=generator)


@dataclass(frozen=True)
class Setting:
    """How a side runs."""

    threads: int
    experts: str = ""

    def __str__(self) -> str:
        return f"{self.threads} thread{'s'[: self.threads - 1]}{', ' + self.experts if self.experts else ''}"


TrainingStep = Callable[[int, Setting], float]
"""Number of a step, and how to run it -> its loss before the update."""


def our_step(task: Task) -> Iterator[TrainingStep]:
    """The update of `pretrain`. Writes the initial weights first."""
    from megatron_r1.platform import select

    platform = select("cpu")  # before megatron-core is imported
    from megatron_r1.hf.config import SpecialTokens, generation_config, hf_config
    from megatron_r1.hf.export import hf_tensors, write_folder
    from megatron_r1.model.build import build_model, native_tensors
    from megatron_r1.parallel.mesh import process_groups
    from megatron_r1.train.metrics import logged_metrics
    from megatron_r1.train.optimizer import Optimizer
    from megatron_r1.train.routing import pretraining_policy
    from megatron_r1.train.stream import StreamReader
    from megatron_r1.train.update import update

    config = task.config
    with process_groups(platform, config.parallel, seed=0, threads=1):
        model = build_model(config.model, config.parallel, platform, seed=0)
        written = hf_tensors(native_tensors(model), config.model, include_mtp=False)
        generation = generation_config(SpecialTokens())
        write_folder(written, task.folder, hf_config(config.model, include_mtp=False), generation)
        optimizer, reader, policy = Optimizer(model, config.train), StreamReader("cpu"), pretraining_policy(config)

        def step(number: int, setting: Setting) -> float:
            policy.apply(model, 0)
            micro_batches = reader.micro_batches(task.rows(number).numpy(), 0, 1, task.batch)
            result = update(model, optimizer, micro_batches, reader.forward, LEARNING_RATE, task.length, task.batch)
            return logged_metrics(result)["train/loss"]

        yield step


def their_step(task: Task) -> Iterator[TrainingStep]:
    """What a user of transformers and torch would write."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(task.folder, dtype=torch.float32, attn_implementation="sdpa")
    model.train()
    given: OptimizerConfig = task.config.train.optimizer
    parameters = list(model.parameters())
    # Norms do not decay, as in megatron-core.
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": given.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    betas = given.beta1, given.beta2
    optimizer = torch.optim.AdamW(groups, LEARNING_RATE, betas, given.epsilon, fused=True)

    def step(number: int, setting: Setting) -> float:
        if model.config._experts_implementation != setting.experts:
            model.set_experts_implementation(setting.experts)
        rows_BL = task.rows(number)
        inputs_BL, labels_BL = rows_BL[:, :-1].contiguous(), rows_BL[:, 1:].contiguous()
        loss = model(input_ids=inputs_BL, labels=labels_BL, shift_labels=labels_BL, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, given.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    yield step


def serve(connection: Any, make: Callable[[Task], Iterator[TrainingStep]], task: Task) -> None:
    """Run steps as asked: their number and setting -> seconds and loss. Ends when the other end closes."""
    import torch

    for step in make(task):
        connection.send("ready")
        while True:
            try:
                number, setting = connection.recv()
            except EOFError:
                break
            torch.set_num_threads(setting.threads)
            started = time.perf_counter()
            loss = step(number, setting)
            connection.send((time.perf_counter() - started, loss))


class Side:
    """One of the two trainers, in a process of its own that waits while the other trains."""

    def __init__(self, connection: Any):
        self._connection, self._steps = connection, 0
        connection.recv()

    def step(self, setting: Setting) -> tuple[float, float]:
        """Seconds and loss of the next step."""
        self._connection.send((self._steps, setting))
        self._steps += 1
        found: tuple[float, float] = self._connection.recv()
        return found

    def seconds(self, setting: Setting) -> float:
        return self.step(setting)[0]


@contextmanager
def side(make: Callable[[Task], Iterator[TrainingStep]], task: Task) -> Iterator[Side]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, make, task), daemon=True)
    process.start()
    theirs.close()
    try:
        yield Side(ours)
    finally:
        ours.close()
        process.join(20)
        process.kill()


def fastest(trainer: Side, settings: list[Setting], rounds: int, title: str) -> Setting:
    """The setting with the least median of seconds."""
    found = alternate({str(one): lambda one=one: trainer.seconds(one) for one in settings}, rounds)  # type: ignore[misc]
    best = min(settings, key=lambda one: statistics.median(found[str(one)]))
    tried = ", ".join(f"{name}: {statistics.median(seconds):.3g} s" for name, seconds in found.items())
    print(f"{title}: {best}  (tried {tried})")
    return best


def matmul_seconds(threads: int, width: int = 1024) -> Callable[[], float]:
    """A way that measures one fp32 product of two [width, width] matrices, the best of several."""
    import torch

    left, right = torch.rand(width, width), torch.rand(width, width)

    def way() -> float:
        torch.set_num_threads(threads)
        best = float("inf")
        for _ in range(10):
            started = time.perf_counter()
            left @ right
            best = min(best, time.perf_counter() - started)
        return best

    return way


def task_of(model: str, batch: int, length: int, folder: Path) -> Task:
    """The task with a preset's shape, without what only one side has."""
    plain = ["model.mtp.num_layers=0", "model.moe.sequence_loss_coefficient=0", "model.moe.bias_update_rate=0"]
    sizes = [f"train.sequence_length={length}", f"train.global_batch_size={batch}", f"train.micro_batch_size={batch}"]
    config = load("pretrain", [f"model={model}", "model.dtype=fp32", *plain, *sizes])
    return Task(config, batch, length, folder)


def model_flops(model: ModelConfig, length: int) -> float:
    from megatron_r1.model.flops import flops_per_token

    return flops_per_token(model, length)


def compare(given: argparse.Namespace, task: Task) -> dict[str, list[float]]:
    """Check, choose settings, measure; prints what it finds.

    Raises:
        AssertionError: the two sides do not compute the same losses.
    """
    with side(our_step, task) as ours, side(their_step, task) as theirs:
        first = Setting(given.threads[0]), Setting(given.threads[0], "eager")
        for number in range(CHECKED_STEPS):
            mine, other = ours.step(first[0])[1], theirs.step(first[1])[1]
            print(f"loss of step {number + 1}: {mine:.6f} and {other:.6f}")
            assert abs(mine - other) <= given.tolerance * abs(other), "the two do not compute the same"
        my_settings = [Setting(threads) for threads in given.threads]
        their_settings = [Setting(threads, experts) for threads, experts in product(given.threads, given.experts)]
        mine_best = fastest(ours, my_settings, given.trials, "megatron_r1")
        their_best = fastest(theirs, their_settings, given.trials, "transformers")
        found = alternate(
            {
                "megatron_r1": lambda: ours.seconds(mine_best),
                "transformers": lambda: theirs.seconds(their_best),
                "matmul": matmul_seconds(mine_best.threads),
            },
            given.rounds,
        )
    product_seconds = found.pop("matmul")
    print(describe(found, base="transformers", work=task.tokens, unit="tokens"))
    rate = 2 * 1024**3 / statistics.median(product_seconds)
    flops = model_flops(task.config.model, task.length) * task.tokens
    share = flops / statistics.median(found["megatron_r1"]) / rate
    print(f"megatron_r1: {share:.1%} of the {rate / 1e9:.0f} GFLOP/s that a 1024-cube fp32 product reaches")
    return found


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a preset in configs/model with latent attention, as tiny or small")
    parser.add_argument("--batch", type=int, default=16, help="sequences of a step, in one micro-batch")
    parser.add_argument("--length", type=int, default=64, help="tokens of a sequence")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="numbers of threads that both sides try")
    parser.add_argument("--experts", nargs="+", choices=EXPERTS, default=EXPERTS, help="of transformers, to be tried")
    parser.add_argument("--trials", type=int, default=3, help="steps by which each side chooses its setting")
    parser.add_argument("--rounds", type=int, default=15, help="measured steps of each side")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="largest relative difference of losses")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    given = parsed(arguments)
    with tempfile.TemporaryDirectory() as folder:
        compare(given, task_of(given.model, given.batch, given.length, Path(folder) / "hf"))


if __name__ == "__main__":
    main()
