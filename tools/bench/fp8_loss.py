"""What FP8 costs in training loss, beside bf16 and beside what a change of one unit in the last place costs.

    python tools/bench/fp8_loss.py [--steps N] [--seeds 0 1 2] [--folder runs/fp8_loss]

Trains one small model (7 M parameters, 256 wide, latent attention, 8 experts) on the same data in several number
formats and several seeds, a process a run, one thread each; runs that are finished are not repeated. Prints a table
and writes fp8_loss.svg and fp8_loss.json beside the runs.

The measure is the report's relative loss error (DeepSeek-V3, appendix B.1): (loss - loss in bf16) / loss in bf16, both
losses on the same batches and exponentially smoothed over steps with 0.9 as there, here averaged over the last half of
the steps. Two runs that differ in one last digit come to differ in loss, too: that floor is measured with bf16 from
weights of which one in each matrix was moved to the next number of its type. Because errors below the floor cannot be
seen that way, the variants are also compared without training, at the weights that bf16 ends with.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megatron_r1.files import write_whole

SMOOTHING = 0.9
BASELINE, FLOOR, SAME_WEIGHTS = "bf16", "bf16, one unit in the last place off", "at the same weights"
VARIANTS: dict[str, list[str]] = {
    BASELINE: [],
    FLOOR: [],
    "fp8, as the report": ["fp8=deepseek"],
    "fp8, gradients in 128x128": ["fp8=deepseek", "fp8.gradient_tiling=128x128"],
    "fp8, a scale a tensor": [
        *("fp8=deepseek", "fp8.activation_tiling=tensor", "fp8.gradient_tiling=tensor"),
        "fp8.weight_tiling=tensor",
    ],
}
SHARED = ("steps", "batch", "documents", "probes", "folder")
"""Arguments that a run's own process is given, too."""
SETTINGS = [
    *("model.hidden_size=256", "model.num_layers=4", "model.num_attention_heads=4", "model.ffn_hidden_size=512"),
    *("model.attention.q_lora_rank=128", "model.attention.kv_lora_rank=128", "model.attention.qk_nope_head_dim=64"),
    *("model.attention.qk_rope_head_dim=64", "model.attention.v_head_dim=64", "model.moe.ffn_hidden_size=256"),
    # 0.006 at the width of 7168, carried over by 1 / sqrt(width).
    *("model.init_std=0.032", "model.mtp.num_layers=0", "model.dtype=bf16"),
    *("train.sequence_length=64", "train.schedule.learning_rate=2e-3"),
    *("platform=cpu", "threads=1"),
]


def main(arguments: Sequence[str] | None = None) -> None:
    options = parsed(arguments)
    if options.one:
        kind, seed = options.one[0], int(options.one[1])
        with process(seed) as platform:
            same = kind == SAME_WEIGHTS
            result = at_the_same_weights(seed, options, platform) if same else train(kind, seed, options, platform)[0]
        save(options, kind, seed, result)
        return
    for seed in options.seeds:
        for kind in (*VARIANTS, SAME_WEIGHTS):
            if not path_of(options, kind, seed).exists():
                repeat = [f"--{key}={getattr(options, key)}" for key in SHARED]
                subprocess.run([sys.executable, __file__, *repeat, "--one", kind, str(seed)], check=True)
    runs = {variant: [read(options, variant, seed) for seed in options.seeds] for variant in VARIANTS}
    same_weights = [read(options, SAME_WEIGHTS, seed) for seed in options.seeds]
    errors = {variant: [error_of(run, runs[BASELINE][i]) for i, run in enumerate(runs[variant])] for variant in runs}
    print(table(runs, errors), same_weights_table(same_weights), sep="\n\n")
    found = {**summary(options, runs, errors), "at_the_same_weights": same_weights}
    (options.folder / "fp8_loss.json").write_text(json.dumps(found, indent=1))
    draw(runs, options.folder / "fp8_loss.svg")


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=16, help="sequences of 64 tokens a step")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--documents", type=int, default=30_000, help="documents of text to generate")
    parser.add_argument("--probes", type=int, default=8, help="batches compared at the same weights")
    parser.add_argument("--folder", type=Path, default=Path("runs/fp8_loss"))
    parser.add_argument("--one", nargs=2, metavar=("VARIANT", "SEED"), help="a single run, without a table")
    return parser.parse_args(arguments)


def process(seed: int) -> Any:
    """This process as the only rank: a context that gives the platform."""
    import contextlib

    from megatron_r1.config.parallel import ParallelConfig
    from megatron_r1.platform import select

    @contextlib.contextmanager
    def only_rank() -> Any:
        platform = select("cpu")
        from megatron_r1.parallel.mesh import process_groups

        with process_groups(platform, ParallelConfig(), seed, 1):
            yield platform

    return only_rank()


def config_of(variant: str, seed: int, options: argparse.Namespace, *more: str) -> Any:
    """The configuration of a run, from the pre-training recipe."""
    from megatron_r1.config.load import load

    batch = [f"train.global_batch_size={options.batch}", f"train.micro_batch_size={options.batch}"]
    size = [f"data.num_documents={options.documents}", f"train.steps={options.steps}"]
    warmup = [f"train.schedule.warmup_steps={options.steps // 10}"]
    return load("pretrain", [*SETTINGS, *batch, *size, *warmup, f"seed={seed}", *VARIANTS[variant], *more])


def train(variant: str, seed: int, options: argparse.Namespace, platform: Any) -> tuple[dict[str, Any], Any, Any]:
    """Train one variant; process groups must exist.

    Returns:
        What is kept (loss of each step, parameters of the model, seconds of this process's time on a core), the model,
        the corpus.
    """
    from megatron_r1.commands.pretrain import pretraining_step
    from megatron_r1.data.pretraining.corpus import build_corpus
    from megatron_r1.data.synthetic.train_tokenizer import train_tokenizer
    from megatron_r1.model.build import build_model
    from megatron_r1.train.optimizer import Optimizer
    from megatron_r1.train.state import TrainState

    config = config_of(variant, seed, options)
    tokenizer, folder = train_tokenizer(config.data), options.folder / "data"
    corpus = build_corpus(config.data, tokenizer, config.train.sequence_length, seed, folder)
    model = build_model(config.model, config.parallel, platform, seed, precision=config.fp8)
    if variant == FLOOR:
        move_one_unit(model)
    optimizer = Optimizer(model, config.train)
    this: Any = SimpleNamespace(config=config, model=model, optimizer=optimizer, platform=platform)
    step, state, losses = pretraining_step(this, corpus), TrainState(), []
    started = time.process_time()
    while state.step < options.steps:
        state, row = step(state)
        losses.append(row["train/loss"])
        if state.step % 25 == 0:
            print(
                f"{variant}, seed {seed}: step {state.step}/{options.steps}, loss {row['train/loss']:.4f}",
                file=sys.stderr,
            )
    result = {
        "losses": losses,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "core_seconds": time.process_time() - started,
    }
    return result, model, corpus


def at_the_same_weights(seed: int, options: argparse.Namespace, platform: Any) -> dict[str, Any]:
    """Errors of each variant's loss and gradient against fp32, at the weights that the baseline ends with.

    Without training there is no chaos: what differs is the arithmetic alone.

    Returns:
        Variant -> `loss`, the relative error of the mean loss over some batches that training had not reached, and
        `gradient`, |gradient - gradient in fp32| / |gradient in fp32| over all parameters, mean over the batches.
    """
    import torch

    from megatron_r1.model.build import native_tensors

    _, trained, corpus = train(BASELINE, seed, options, platform)
    weights = {name: tensor.clone() for name, tensor in native_tensors(trained)}
    first = options.steps * options.batch
    batches = [torch.from_numpy(corpus.batch(first + i * options.batch, options.batch)) for i in range(options.probes)]
    still = "model.moe.bias_update_rate=0.0"
    exact = list(passes(config_of(BASELINE, seed, options, still, "model.dtype=fp32"), weights, batches, platform))
    errors = {}
    for variant in (variant for variant in VARIANTS if variant != FLOOR):
        found = passes(config_of(variant, seed, options, still), weights, batches, platform)
        pairs = [(loss, float((g - exact[i][1]).norm() / exact[i][1].norm())) for i, (loss, g) in enumerate(found)]
        loss = sum(loss for loss, _ in pairs) / sum(loss for loss, _ in exact) - 1
        errors[variant] = {"loss": loss, "gradient": statistics.fmean(error for _, error in pairs)}
    return errors


def passes(config: Any, weights: dict[str, Any], batches: Sequence[Any], platform: Any) -> Iterator[tuple[float, Any]]:
    """Loss and gradient, all parameters in one row, of each batch."""
    import torch

    from megatron_r1.model.build import build_model
    from megatron_r1.model.forward_backward import forward_backward
    from megatron_r1.model.shards import load_whole_tensors
    from megatron_r1.train.optimizer import Optimizer
    from megatron_r1.train.stream import next_token_forward

    model = build_model(config.model, config.parallel, platform, config.seed, precision=config.fp8)
    load_whole_tensors(model, weights)
    optimizer = Optimizer(model, config.train)
    for batch in batches:
        optimizer.zero_gradients()
        found = forward_backward(model, optimizer.chunks, [batch], next_token_forward, config.train.sequence_length)
        parameters: list[Any] = [*model.parameters()]
        gradient = torch.cat([parameter.main_grad.flatten() for parameter in parameters])
        yield float(found.logged[0]["train/loss"]), gradient


def move_one_unit(model: Any) -> None:
    """Move the first number of each matrix to the next one that its type can hold."""
    import torch

    for parameter in model.parameters():
        if parameter.dim() == 2:
            first = parameter.detach().view(-1)[:1]
            first.copy_(torch.nextafter(first, torch.full_like(first, float("inf"))))


def path_of(options: argparse.Namespace, variant: str, seed: int) -> Path:
    """Where a finished run is."""
    folder: Path = options.folder
    slug = "".join(letter if letter.isalnum() else "-" for letter in variant)
    return folder / f"{slug}-seed{seed}-{options.steps}x{options.batch}.json"


def save(options: argparse.Namespace, variant: str, seed: int, run: dict[str, Any]) -> None:
    """Write a finished run; it is there whole or not at all."""
    path = path_of(options, variant, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(run).encode())


def read(options: argparse.Namespace, variant: str, seed: int) -> dict[str, Any]:
    run: dict[str, Any] = json.loads(path_of(options, variant, seed).read_text())
    return run


def smoothed(losses: Sequence[float]) -> list[float]:
    """Exponential moving average, each step's weight 1 - SMOOTHING, without the start's bias."""
    total, weight, result = 0.0, 0.0, []
    for loss in losses:
        total = SMOOTHING * total + (1 - SMOOTHING) * loss
        weight = SMOOTHING * weight + 1 - SMOOTHING
        result.append(total / weight)
    return result


def relative_errors(run: dict[str, Any], baseline: dict[str, Any]) -> list[float]:
    """(loss - loss of the baseline) / loss of the baseline at each step, both smoothed."""
    pairs = zip(smoothed(run["losses"]), smoothed(baseline["losses"]), strict=True)
    return [mine / theirs - 1 for mine, theirs in pairs]


def error_of(run: dict[str, Any], baseline: dict[str, Any]) -> dict[str, float]:
    """Of the last half of the steps: mean size of the relative error, and mean with its sign."""
    late = relative_errors(run, baseline)[len(run["losses"]) // 2 :]
    return {"size": statistics.fmean(map(abs, late)), "signed": statistics.fmean(late)}


def table(runs: dict[str, list[dict[str, Any]]], errors: dict[str, list[dict[str, float]]]) -> str:
    """One line a variant: final loss, size of the relative error by seed, and the signed one's mean."""
    lines = [f"{'variant':38} {'loss at the end':>16}  relative error by seed (mean size)   signed mean  core seconds"]
    for variant, of_seed in runs.items():
        final = statistics.fmean(smoothed(run["losses"])[-1] for run in of_seed)
        sizes = " ".join(f"{error['size']:8.3%}" for error in errors[variant])
        signed = statistics.fmean(error["signed"] for error in errors[variant])
        size = statistics.fmean(error["size"] for error in errors[variant])
        seconds = statistics.fmean(run["core_seconds"] for run in of_seed)
        lines.append(f"{variant:38} {final:16.4f}  {sizes} ({size:.3%})   {signed:+11.3%}  {seconds:12.0f}")
    return "\n".join(lines)


def same_weights_table(same_weights: list[dict[str, Any]]) -> str:
    """One line a variant: relative error of the loss by seed, and of the gradient."""
    lines = [f"{'at the weights that bf16 ends with':38} relative loss error by seed   relative gradient error by seed"]
    for variant in (variant for variant in VARIANTS if variant != FLOOR):
        losses = " ".join(f"{of_seed[variant]['loss']:+9.4%}" for of_seed in same_weights)
        gradients = " ".join(f"{of_seed[variant]['gradient']:8.3%}" for of_seed in same_weights)
        lines.append(f"{variant:38} {losses}   {gradients}")
    return "\n".join(lines)


def summary(options: argparse.Namespace, runs: dict[str, Any], errors: dict[str, Any]) -> dict[str, Any]:
    return {
        "steps": options.steps,
        "tokens_per_step": options.batch * 64,
        "seeds": options.seeds,
        "parameters": runs[BASELINE][0]["parameters"],
        "errors": errors,
        "final_losses": {
            variant: [smoothed(run["losses"])[-1] for run in of_seed] for variant, of_seed in runs.items()
        },
    }


def draw(runs: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Loss of the baseline, and size of the relative error of each variant, mean over seeds, by step."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    colours = dict(zip(VARIANTS, ("#647084", "#97a1b1", "#3b82f6", "#e08a00", "#c2559d"), strict=True))
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for variant, of_seed in runs.items():
        steps = range(1, len(of_seed[0]["losses"]) + 1)
        curves = [smoothed(run["losses"]) for run in of_seed]
        left.plot(
            steps, [statistics.fmean(at) for at in zip(*curves, strict=True)], color=colours[variant], label=variant
        )
        if variant != BASELINE:
            errors = [relative_errors(run, runs[BASELINE][i]) for i, run in enumerate(of_seed)]
            sizes = [statistics.fmean(map(abs, at)) for at in zip(*errors, strict=True)]
            right.plot(steps, sizes, color=colours[variant], linewidth=1.2)
    right.axhline(0.0025, color="#b4372f", linewidth=0.8, linestyle="--")
    right.set_yscale("log")
    right.yaxis.set_major_formatter(PercentFormatter(1.0))
    left.set(xlabel="step", ylabel="loss in nats per token")
    right.set(xlabel="step", ylabel="relative loss error, mean size")
    for axes in (left, right):
        axes.grid(True, linewidth=0.4, alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    figure.savefig(path)


if __name__ == "__main__":
    main()
