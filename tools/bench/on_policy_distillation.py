"""On-policy distillation beside fine-tuning on the teacher's samples: divergence from the teacher per sampled token.

    python tools/bench/on_policy_distillation.py
    python tools/bench/on_policy_distillation.py --seeds 0 --updates 20

A sparse teacher and a dense student are pre-trained on the same text of the generated world, the student for fewer
steps. Then the student learns, always from the same start, by batches of as many sampled responses:

| method | whose samples | loss |
|---|---|---|
| on-policy | the student's | the reverse KL divergence to the teacher over the whole vocabulary |
| on-policy x4 | the student's | the same, four updates on each batch |
| sampled | the student's | the log-ratio of each sampled token as its advantage |
| off-policy | the teacher's | as on-policy |
| SFT | the teacher's | cross-entropy, each batch once |
| SFT x4 | the teacher's | the same, and three more updates on earlier batches after each new one |

Each method has the learning rate, of a few, with which it comes closest to the teacher on a seed that the table does
not show. Measured on held-out prompts: KL(student || teacher) and KL(teacher || student) per token of the student's
samples, and KL(teacher || student) on the teacher's samples, which SFT minimises.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megatron_r1.config.load import load
from megatron_r1.config.run import RunConfig

METHODS = {
    "on-policy": ("rl.kl_estimator=exact", "rl.kl_placement=loss"),
    "on-policy x4": (
        "rl.kl_estimator=exact",
        "rl.kl_placement=loss",
        "rl.objective=grpo",
        "rl.epochs_per_rollout=4",
    ),
    "sampled": ("rl.kl_estimator=k1", "rl.kl_placement=advantage"),
    "off-policy": ("rl.kl_estimator=exact", "rl.kl_placement=loss"),
    "SFT": (),
    "SFT x4": (),
}
"""Overrides of the methods that learn from the teacher's probabilities; the others have none."""
REPLAYS = {"SFT": 0, "SFT x4": 3}
RATES = (3e-4, 1e-3)
TUNING_SEED = 1000
"""The seed on which learning rates are chosen, where there are several."""
COMMON = ("track=off", "platform=cpu", "threads=1", "model.mtp.num_layers=0")


@dataclass(frozen=True)
class Settings:
    """The sizes of the experiment."""

    folder: Path
    updates: int
    responses: int
    eval_prompts: int
    eval_interval: int
    teacher_steps: int
    student_steps: int
    documents: int
    rates: Sequence[float]
    methods: Sequence[str]


class Divergences(NamedTuple):
    """In nats per token."""

    reverse: float
    """KL(student || teacher) on the student's samples."""
    forward: float
    """KL(teacher || student) on the student's samples."""
    forward_on_teacher: float
    """KL(teacher || student) on the teacher's samples."""


class Point(NamedTuple):
    """A place on a curve."""

    tokens: int
    """Sampled so far."""
    divergences: Divergences


def pretrained(settings: Settings, name: str, steps: int, seed: int, *overrides: str) -> str:
    """The run `name`, pre-trained unless it exists."""
    from megatron_r1.commands import pretrain

    if not (settings.folder / name).exists():
        warmup = f"train.schedule.warmup_steps={min(20, steps // 2)}"
        sizes = (
            warmup,
            f"data.num_documents={settings.documents}",
            "train.save_interval=100000",
            f"train.steps={steps}",
            f"seed={seed}",
            f"name={name}",
        )
        pretrain.run(load("pretrain", [*COMMON, *overrides, *sizes, f"root={settings.folder}"]))
    return str(settings.folder / name)


class Classroom:
    """A teacher, a student at its start, and prompts."""

    def __init__(self, settings: Settings, seed: int, teacher: str, student: str):
        from megatron_r1.data.prompts.prompts import TrainingPrompts, eval_prompts
        from megatron_r1.runs.initial_weights import find_weights
        from megatron_r1.runs.prompts import prompt_formatter

        self.settings, self.seed, self._names = settings, seed, (teacher, student)
        self._student = find_weights(student)
        config = self.config("on-policy", settings.rates[0])
        self._formatter = prompt_formatter(config, self._student.tokenizer(), config.model.max_sequence_length)
        self._training, self._rollout = TrainingPrompts(config.data), config.rollout
        self._held_out = eval_prompts(config.data, settings.eval_prompts)
        self.teacher = self._built(find_weights(teacher))
        self.teacher.requires_grad_(False)
        self._teacher_samples = self._sampled(self.teacher, self._held_out, 7)

    def config(self, method: str, rate: float) -> RunConfig:
        teacher, student = self._names
        settings = (
            f"init.from={student}", f"rl.teacher.from={teacher}", f"train.schedule.learning_rate={rate}",
            "train.schedule.lr_decay_style=constant", "train.schedule.warmup_steps=5",
            "train.optimizer.weight_decay=0.0", "rollout=local", "rollout.max_response_tokens=64",
            "rl=on_policy_distillation", "reward=none",
            f"rl.prompts_per_rollout={self.settings.responses}", f"seed={self.seed}",
        )  # fmt: skip
        return load("grpo", [*COMMON, *settings, *METHODS[method]])

    def curve(self, method: str, rate: float) -> Iterator[Point]:
        """The student's way from its start, by one method."""
        from megatron_r1.train.optimizer import Optimizer

        config, student = self.config(method, rate), self._built(self._student)
        optimizer = Optimizer(student, config.train)
        learns: Callable[[int], int]
        learns = (self._supervised if method in REPLAYS else self._distilling)(method, config, student, optimizer)
        tokens = 0
        yield Point(tokens, self._measured(student))
        for step in range(self.settings.updates):
            tokens += learns(step)
            if (step + 1) % self.settings.eval_interval == 0:
                yield Point(tokens, self._measured(student))

    def _distilling(self, method: str, config: RunConfig, student: Any, optimizer: Any) -> Callable[[int], int]:
        from megatron_r1.rl.learner import Learner
        from megatron_r1.rl.policy.teacher import TeacherPolicy
        from megatron_r1.train.state import TrainState

        teacher = TeacherPolicy(self.teacher, config.model.vocab_size)
        learner = Learner(config, student, optimizer, teacher, self._formatter.tokenizer.pad, "cpu")
        state, speaker = TrainState(), self.teacher if method == "off-policy" else student

        def learn(step: int) -> int:
            nonlocal state
            samples = self._batch(speaker, step)
            state, _ = learner.learn(samples, state)
            return sum(sample.response_length for sample in samples)

        return learn

    def _supervised(self, method: str, config: RunConfig, student: Any, optimizer: Any) -> Callable[[int], int]:
        from megatron_r1.train.routing import FROZEN
        from megatron_r1.train.schedule import learning_rate

        FROZEN.apply(student, 0)
        batches: list[Sequence[Any]] = []
        draw = random.Random(self.seed)

        def learn(step: int) -> int:
            batches.append(self._batch(self.teacher, step))
            again = draw.choices(batches, k=REPLAYS[method])
            rate = learning_rate(config.train.schedule, step + 1, config.train.steps, 0)
            for samples in (batches[-1], *again):
                self._cross_entropy_update(student, optimizer, samples, rate)
            return sum(sample.response_length for sample in batches[-1])

        return learn

    def _cross_entropy_update(self, student: Any, optimizer: Any, samples: Sequence[Any], rate: float) -> None:
        from megatron_r1.rl.policy.batch import most_inputs
        from megatron_r1.rl.policy.policy import Policy
        from megatron_r1.train.update import update

        batch, policy = self._micro_batch(samples), Policy(student, 1.0)

        def forward(model: Any, batch: Any) -> Any:
            def loss_function(scores: Any) -> Any:
                loss = -scores.log_probs.where(batch.mask_BL, 0.0).sum() / batch.mask_BL.sum()
                return loss, {"train/loss": loss.detach()}

            return policy.scores(model, batch), loss_function

        update(student, optimizer, [batch], forward, rate, most_inputs([batch]), reduce="sum")

    def _measured(self, student: Any) -> Divergences:
        own = self._sampled(student, self._held_out, 7)
        return Divergences(
            self._divergence(student, self.teacher, own),
            self._divergence(self.teacher, student, own),
            self._divergence(self.teacher, student, self._teacher_samples),
        )

    def _divergence(self, model: Any, other: Any, samples: Sequence[Any]) -> float:
        """KL(model || other) over the whole vocabulary, per token of the samples."""
        import torch

        from megatron_r1.model.scores import head_weight
        from megatron_r1.rl.policy.batch import response_part
        from megatron_r1.rl.policy.policy import FrozenLogProbs, Policy

        batch = self._micro_batch(samples)
        fixed = FrozenLogProbs(None, None, Policy(other, 1.0).hidden_by_sample([batch]), head_weight(other).detach())
        found = Policy(model, 1.0).divergence_by_sample([batch], fixed.reference_distribution)
        return float(torch.cat([response_part(samples[index], values) for index, values in found.items()]).mean())

    def _micro_batch(self, samples: Sequence[Any]) -> Any:
        from megatron_r1.rl.policy.batch import make_batch

        return make_batch(samples, range(len(samples)), self._formatter.tokenizer.pad, "cpu")

    def _batch(self, model: Any, step: int) -> list[Any]:
        """The samples of one update: the same prompts for every method."""
        first = (self.seed * self.settings.updates + step) * self.settings.responses
        prompts = [self._training.at(first + index) for index in range(self.settings.responses)]
        return self._sampled(model, prompts, self.seed * 100_003 + step)

    def _sampled(self, model: Any, prompts: Sequence[Any], seed: int) -> list[Any]:
        from megatron_r1.rewards.score import Score
        from megatron_r1.rl.generation.rollouts import scored_sample
        from megatron_r1.rollout.engine import Request, Sampling
        from megatron_r1.rollout.in_process import LocalEngine

        tokenizer = self._formatter.tokenizer
        limit = self._rollout.max_response_tokens
        sampling = Sampling(1.0, 1.0, limit, tokenizer.stop_tokens, seed)
        requests = [Request(str(n), self._formatter.tokens(prompt.question)) for n, prompt in enumerate(prompts)]
        found = LocalEngine(model, self._rollout.local_batch_size, tokenizer.pad).generate(requests, sampling)
        pairs = enumerate(zip(prompts, found, strict=True))
        return [scored_sample(n, prompt, one, "", Score(0.0, {}), tokenizer.decode) for n, (prompt, one) in pairs]

    def _built(self, weights: Any) -> Any:
        from megatron_r1.config.parallel import ParallelConfig
        from megatron_r1.platform import select
        from megatron_r1.runs.second_model import second_model

        return second_model(weights.model, ParallelConfig(), select("cpu"), weights.tensors)


def curves(settings: Settings, seed: int, teacher: str, methods: dict[str, Sequence[float]]) -> dict[Any, list[Point]]:
    """(method, learning rate) -> its curve, for one seed."""
    from megatron_r1.config.parallel import ParallelConfig
    from megatron_r1.parallel.mesh import process_groups
    from megatron_r1.platform import select

    student = pretrained(settings, f"student-{seed}", settings.student_steps, seed, "model=tiny_dense")
    with process_groups(select("cpu"), ParallelConfig(), seed, 1):
        room = Classroom(settings, seed, teacher, student)
        found = {}
        for method, rates in methods.items():
            for rate in rates:
                found[method, rate] = list(room.curve(method, rate))
                print(f"seed {seed} {method} {rate:g}: {found[method, rate][-1]}", file=sys.stderr, flush=True)
        return found


def best_rates(found: dict[Any, list[Point]]) -> dict[str, Sequence[float]]:
    """Of each method the learning rate with the lowest reverse divergence at the end."""
    last = {key: points[-1].divergences.reverse for key, points in found.items()}
    return {method: [min((key for key in last if key[0] == method), key=last.__getitem__)[1]] for method, _ in last}


def table(by_seed: Sequence[dict[Any, list[Point]]]) -> Iterator[str]:
    """Rows of Markdown: each measure along the curves, the mean over seeds and the range."""
    methods = [*by_seed[0]]
    yield "| measure | update | " + " | ".join(f"{method}, rate {rate:g}" for method, rate in methods) + " |"
    yield "|---|---|" + "---|" * len(methods)
    for number, measure in enumerate(Divergences._fields):
        for index in range(len(by_seed[0][methods[0]])):
            cells = []
            for method in methods:
                points = [of_seed[method][index] for of_seed in by_seed]
                values = [point.divergences[number] for point in points]
                tokens = sum(point.tokens for point in points) / len(points)
                spread = f"{sum(values) / len(values):.4f} ({min(values):.4f}-{max(values):.4f})"
                cells.append(f"{spread} at {tokens:.0f} tokens")
            yield f"| {measure} | {index} | " + " | ".join(cells) + " |"


def run(settings: Settings, seeds: Sequence[int]) -> list[str]:
    """The table's rows."""
    teacher = pretrained(settings, "teacher", settings.teacher_steps, 0, "model=tiny")
    rates = dict.fromkeys(settings.methods, settings.rates)
    if len(settings.rates) > 1:
        rates = best_rates(curves(settings, TUNING_SEED, teacher, rates))
    return list(table([curves(settings, seed, teacher, rates) for seed in seeds]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--rates", type=float, nargs="+", default=RATES, help="learning rates, of which each method's best"
    )
    parser.add_argument("--methods", nargs="+", default=[*METHODS], choices=METHODS)
    parser.add_argument("--folder", type=Path, help="keeps the pre-trained models; default: a temporary one")
    for name, value, meaning in (
        ("updates", 24, "batches of samples"),
        ("responses", 48, "sampled responses of a batch"),
        ("eval-prompts", 96, "held-out prompts"),
        ("eval-interval", 6, "updates between measurements"),
        ("teacher-steps", 1200, "steps of the teacher's pre-training"),
        ("student-steps", 300, "steps of the student's pre-training"),
        ("documents", 100_000, "documents of the generated world"),
    ):
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{meaning}; default {value}")
    given = vars(parser.parse_args())
    seeds, folder = given.pop("seeds"), given.pop("folder")
    with tempfile.TemporaryDirectory() as temporary:
        print("\n".join(run(Settings(folder or Path(temporary), **given), seeds)))


if __name__ == "__main__":
    main()
