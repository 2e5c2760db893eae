"""One whole GRPO step beside TRL's GRPOTrainer, on this machine's CPU.

    python tools/bench/grpo_step.py
    python tools/bench/grpo_step.py --model smollm2 --prompts 2 --rounds 3

A step is what a user waits for: responses are sampled and scored, the log-probs of a frozen reference are computed, and
the updates made. Ours is the step of `megatron-r1 grpo rollout=local`; TRL's is `GRPOTrainer.train` with
transformers.generate. Both start from the same weights (through our Hugging Face export), in fp32, with the same
prompts, reward function, stop tokens, longest response, number of updates, KL penalty, clipping and AdamW. Responses
are each side's own draws. TRL computes the log-probs of the policy before the updates by a forward pass more, because
generate does not keep them; ours takes those of its engine, or computes them too with `--old-logprobs trainer`.

Each side has a process of its own, in which it first tries numbers of threads; the fastest of each take turns. Before
that the two say what log-probs they give the same responses.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_r1.config.load import load
from megatron_r1.config.run import RunConfig
from megatron_r1.data.chat.prompt_format import PromptFormatter
from megatron_r1.data.prompts.prompts import Prompt, TrainingPrompts
from megatron_r1.data.synthetic.train_tokenizer import train_tokenizer
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.rewards.rubric_builder import build_rubric
from megatron_r1.rewards.score import Rubric, Score, TextRule, Weighted
from tools.bench.comparison import alternate, describe

SMOLLM2 = (
    "model=tiny_dense", "num_layers=30", "hidden_size=576", "num_attention_heads=9", "ffn_hidden_size=1536",
    "vocab_size=49152", "max_sequence_length=8192", "norm_epsilon=1e-5", "init_std=0.04",
    "attention.num_key_value_heads=3", "attention.head_dim=64", "attention.qkv_bias=false", "rope.base=100000.0",
    "rope.original_max_position=8192",
)  # fmt: skip
"""The shape of SmolLM2-135M (Llama's family)."""
MODELS = {"tiny": ("model=tiny", "init_std=0.08", "mtp.num_layers=0"), "smollm2": SMOLLM2}
LEARNING_RATE = 1e-5
GAP = 1e-4
"""Largest difference of log-probs of the two sides, in nats."""


@dataclass(frozen=True)
class Task:
    """What both sides do."""

    config: RunConfig
    stops: tuple[int, ...]
    """Tokens that end a response."""
    folder: Path
    """Holds the tokenizer and, in Hugging Face's format, the initial weights."""

    @property
    def formatter(self) -> PromptFormatter:
        return PromptFormatter(Tokenizer.load(self.folder / "tokenizer"), self.config.rollout.chat_template)

    @property
    def responses(self) -> int:
        return self.config.rl.prompts_per_rollout * self.config.rl.group_size

    def checked(self) -> list[list[int]]:
        """Token ids of sequences whose log-probs both sides give."""
        import torch

        draw = torch.Generator().manual_seed(1)
        return torch.randint(10, self.config.model.vocab_size, (3, 40), generator=draw).tolist()


def rewards_of(config: RunConfig) -> Rubric:
    """The configured ones, and one that differs even between responses of an untrained model."""
    digits = TextRule("digits", lambda text: sum(map(str.isdigit, text)) / max(1, len(text)))
    return Rubric([*build_rubric(config.reward).parts, Weighted(1.0, digits)], 0, None)


class OurSide:
    """The step of `megatron-r1 grpo rollout=local`. Writes the initial weights first."""

    def __init__(self, task: Task):
        from megatron_r1.model.build import build_model
        from megatron_r1.model.names import in_multi_token_layer
        from megatron_r1.platform import select
        from megatron_r1.rl.generation.rollouts import Rollouts
        from megatron_r1.rl.learner import Learner
        from megatron_r1.rl.loop import reinforcement_step
        from megatron_r1.rl.policy.reference import ReferencePolicy
        from megatron_r1.rollout.in_process import LocalEngine
        from megatron_r1.rollout.journal import Journal
        from megatron_r1.train.optimizer import Optimizer
        from megatron_r1.train.state import TrainState
        from tools.bench.twin import export

        class Stopping(LocalEngine):
            """Ends responses at the task's tokens."""

            def generate(self, requests: Any, sampling: Any) -> Any:
                return super().generate(requests, replace(sampling, stop_tokens=task.stops))

        config, platform, formatter = task.config, select("cpu"), task.formatter
        self.model = build_model(config.model, config.parallel, platform, seed=0)
        export(self.model, config.model, task.folder / "hf", task.folder / "tokenizer")
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(not in_multi_token_layer(name))
        self.optimizer, pad = Optimizer(self.model, config.train), formatter.tokenizer.pad
        learner = Learner(config, self.model, self.optimizer, ReferencePolicy(self.model, None), pad, "cpu")
        self.engine = Stopping(self.model, config.rollout.local_batch_size, pad)
        rollouts = Rollouts(
            TrainingPrompts(config.data),
            self.engine,
            formatter,
            Journal(task.folder / "rollouts"),
            rewards_of(config),
            config.rollout,
            config.rl,
            config.seed,
        )
        self._step = reinforcement_step(rollouts, learner, self.engine.push, config.rl.prompts_per_rollout)
        self._state = TrainState()

    def step(self) -> dict[str, float]:
        """One step: mean response length and where the time went."""
        from megatron_r1.parallel.phases import take_seconds

        take_seconds()
        self._state, metrics = self._step(self._state)
        times = {f"{phase}_seconds": seconds for phase, seconds in take_seconds().items()}
        return {"rollout/response_length": float(metrics["rollout/response_length"]), **times}

    def logprobs(self, sequences: list[list[int]]) -> Any:
        import torch

        from megatron_r1.model.build import without_multi_token_prediction

        tokens_BL = torch.tensor(sequences)
        with torch.no_grad(), without_multi_token_prediction(self.model):
            return self.model(tokens_BL, torch.arange(tokens_BL.shape[1])[None], None).float().log_softmax(-1)


class TheirSide:
    """GRPOTrainer, whose training loop waits at the start of every step."""

    def __init__(self, task: Task, wait: Callable[[dict[str, float]], None]):
        """
        Args:
            wait: called before each step with facts of the one before it; returns when the next may begin.
        """
        from datasets import Dataset
        from transformers import AutoTokenizer, TrainerCallback
        from trl import GRPOConfig, GRPOTrainer

        from tools.bench.twin import transformers_model

        rl, train, rollout = task.config.rl, task.config.train, task.config.rollout
        self.model = transformers_model(task.folder / "hf")
        self.model.generation_config.eos_token_id = list(task.stops)
        prompts, formatter, scorer = TrainingPrompts(task.config.data), task.formatter, rewards_of(task.config)
        taken = [prompts.at(index) for index in range(rl.prompts_per_rollout * 50)]
        tokenizer = AutoTokenizer.from_pretrained(task.folder / "hf")
        texts = [formatter.text(prompt.question) for prompt in taken]
        assert tokenizer(texts[0])["input_ids"] == list(formatter.tokens(taken[0].question))

        def reward(prompts: list[str], completions: list[str], index: list[int], **_: Any) -> list[float]:
            asked: list[Prompt] = [taken[one] for one in index]
            return [score.total for score in scorer(asked, completions) if isinstance(score, Score)]

        updates = rl.updates_per_rollout
        lengths: list[float] = []

        class Turns(TrainerCallback):  # type: ignore[misc]
            def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if state.global_step % updates == 0:
                    wait({"rollout/response_length": lengths[-1] if lengths else 0.0})

        def count(completion_ids: list[list[int]], **_: Any) -> list[float]:
            lengths.append(sum(map(len, completion_ids)) / len(completion_ids))
            return [0.0] * len(completion_ids)

        optimizer = train.optimizer
        settings = GRPOConfig(
            output_dir=str(task.folder / "trl"),
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            per_device_train_batch_size=task.responses // updates,
            gradient_accumulation_steps=1,
            steps_per_generation=updates,
            num_generations=rl.group_size,
            max_completion_length=rollout.max_response_tokens,
            temperature=rollout.temperature,
            top_k=0,
            beta=rl.kl_coefficient,
            epsilon=rl.clip_epsilon,
            loss_type="grpo",
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            adam_beta1=optimizer.beta1,
            adam_beta2=optimizer.beta2,
            adam_epsilon=optimizer.epsilon,
            weight_decay=optimizer.weight_decay,
            max_grad_norm=optimizer.max_grad_norm,
            max_steps=updates * 50,
            shuffle_dataset=False,
            logging_steps=10**6,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        self.trainer = GRPOTrainer(
            model=self.model,
            reward_funcs=[reward, count],
            args=settings,
            train_dataset=Dataset.from_dict({"prompt": texts, "index": list(range(len(texts)))}),
            processing_class=tokenizer,
            callbacks=[Turns()],
        )

    def logprobs(self, sequences: list[list[int]]) -> Any:
        import torch

        with torch.no_grad():
            return self.model(torch.tensor(sequences)).logits.float().log_softmax(-1)


def serve_ours(connection: Any, task: Task) -> None:
    """Log-probs first, then a step for each number of threads that comes: its seconds and facts."""
    import torch

    from megatron_r1.parallel.mesh import process_groups
    from megatron_r1.platform import select

    with process_groups(select("cpu"), task.config.parallel, seed=0, threads=1):
        side = OurSide(task)
        connection.send(side.logprobs(task.checked()).numpy())
        while (threads := connection.recv()) is not None:
            torch.set_num_threads(threads)
            started = time.perf_counter()
            facts = side.step()
            connection.send((time.perf_counter() - started, facts))


class Closed(Exception):
    """Nobody asks for further steps."""


def serve_theirs(connection: Any, task: Task) -> None:
    """The same for TRL."""
    import torch

    started: list[float] = []

    def wait(facts: dict[str, float]) -> None:
        if started:
            connection.send((time.perf_counter() - started[-1], facts))
        if (threads := connection.recv()) is None:
            raise Closed
        torch.set_num_threads(threads)
        started.append(time.perf_counter())

    side = TheirSide(task, wait)
    connection.send(side.logprobs(task.checked()).numpy())
    with suppress(Closed):
        side.trainer.train()


class Side:
    """One of the two, in a process of its own that waits while the other works."""

    def __init__(self, connection: Any):
        self._connection = connection
        self.logprobs = connection.recv()
        self.facts: list[dict[str, float]] = []

    def seconds(self, threads: int) -> float:
        self._connection.send(threads)
        seconds, facts = self._connection.recv()
        self.facts.append(facts)
        return float(seconds)


@contextmanager
def side(serve: Callable[[Any, Task], None], task: Task) -> Iterator[Side]:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(there, task), daemon=True)
    process.start()
    there.close()
    try:
        yield Side(here)
        here.send(None)
    finally:
        here.close()
        process.join(20)
        process.kill()


def task_of(given: argparse.Namespace, folder: Path) -> Task:
    first, *keys = MODELS[given.model]
    config = load(
        "grpo",
        [
            "init.from=none", "rollout=local", "train.steps=100", first, *(f"model.{key}" for key in keys),
            f"rl.prompts_per_rollout={given.prompts}", f"rl.group_size={given.group}",
            f"rl.updates_per_rollout={given.updates}", f"rollout.max_response_tokens={given.max_tokens}",
            f"rl.old_logprobs_from={given.old_logprobs}", f"train.schedule.learning_rate={LEARNING_RATE}",
            "train.schedule.warmup_steps=0", *given.set,
        ],
    )  # fmt: skip
    tokenizer = train_tokenizer(config.data)
    tokenizer.save(folder / "tokenizer")
    import torch

    # Where probabilities are nearly even, a response has about `mean_tokens` tokens before one of these comes.
    vocabulary = config.model.vocab_size
    draw = torch.Generator().manual_seed(0)
    drawn = torch.randperm(vocabulary - 10, generator=draw)[: vocabulary // given.mean_tokens] + 10
    return Task(config, (tokenizer.eos, *drawn.tolist()), folder)


def fastest(one: Side, threads: list[int], title: str) -> int:
    """The number of threads with the shortest step; the first step warms up."""
    one.seconds(threads[0])
    if len(threads) == 1:
        return threads[0]
    tried = {number: one.seconds(number) for number in threads}
    best = min(tried, key=lambda number: tried[number])
    print(f"{title}: {best} threads  (tried {', '.join(f'{n}: {seconds:.3g} s' for n, seconds in tried.items())})")
    return best


def compare(given: argparse.Namespace, task: Task) -> None:
    """Check, choose settings, measure; prints what it finds.

    Raises:
        AssertionError: the two sides do not give the same log-probs.
    """
    with side(serve_ours, task) as ours, side(serve_theirs, task) as theirs:
        gap = abs(ours.logprobs - theirs.logprobs).max()
        print(f"largest difference of log-probs at the start: {gap:.1e}")
        assert gap < GAP, "the two are not the same model"
        mine, other = fastest(ours, given.threads, "megatron_r1"), fastest(theirs, given.threads, "TRL")
        ways = {"megatron_r1": lambda: ours.seconds(mine), "TRL": lambda: theirs.seconds(other)}
        found = alternate(ways, given.rounds, warm_up=0)
    print(describe(found, base="TRL", work=task.responses, unit="responses"))
    for title, one in (("megatron_r1", ours), ("TRL", theirs)):
        facts = one.facts[-given.rounds :]
        print(title, {name: round(sum(fact[name] for fact in facts) / len(facts), 3) for name in facts[0]})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What a step is like."""
    parser.add_argument("--model", choices=MODELS, default="tiny")
    parser.add_argument("--set", nargs="*", default=[], help="other keys of `megatron-r1 grpo`")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--group", type=int, default=16, help="responses to a prompt")
    parser.add_argument("--updates", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=64, help="of a response")
    parser.add_argument("--mean-tokens", type=int, default=40, help="after which stop tokens come, about")
    parser.add_argument("--old-logprobs", choices=["rollout", "trainer"], default="rollout")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="numbers of threads that are tried")
    parser.add_argument("--rounds", type=int, default=5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        compare(given, task_of(given, Path(folder)))


if __name__ == "__main__":
    main()
