"""evaluate: accuracy of one or several models on held-out prompts, greedy and sampled, by one engine."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_r1.config.run import RunConfig
from megatron_r1.data.chat.prompt_format import PromptFormatter
from megatron_r1.data.prompts.prompts import Prompt
from megatron_r1.data.tokenizer import Tokenizer, response_text
from megatron_r1.errors import ConfigError
from megatron_r1.evaluation.benchmarks import BENCHMARKS, Metric
from megatron_r1.evaluation.intervals import clustered
from megatron_r1.files import write_whole
from megatron_r1.rollout.engine import Request, RolloutEngine, Sampling, require_completions
from megatron_r1.runs.folder import mark_done, open_run_folder
from megatron_r1.runs.inference_engine import inference_engine
from megatron_r1.runs.initial_weights import check_same_model, find_weights
from megatron_r1.runs.prompts import prompt_formatter

logger = logging.getLogger(__name__)


def run(config: RunConfig) -> None:
    """Evaluate each model on the same held-out prompts."""
    sources = config.evaluate.models or ({"model": config.init.from_} if config.init.from_ else {})
    if not sources:
        raise ConfigError("evaluate.models", "{}", "needs a model: evaluate.models.NAME=RUN or init.from=RUN")
    folder = open_run_folder(config)
    which = config.init.weights
    models = {name: find_weights(source, f"evaluate.models.{name}", which) for name, source in sources.items()}
    first = next(iter(models.values()))
    for name, found in models.items():
        check_same_model(first.model, found.model, f"evaluate.models.{name}={sources[name]}")
    formatter = prompt_formatter(config, Tokenizer.load(first.tokenizer_folder))
    benchmark = BENCHMARKS[config.evaluate.benchmark]
    prompts = benchmark.prompts(config.data, config.evaluate.num_prompts)
    results: dict[str, Any] = {"prompts": len(prompts), "samples": config.evaluate.samples_per_prompt, "models": {}}
    current = dict(first.tensors)
    with inference_engine(config, first, current, folder) as (engine, sync):
        for name, found in models.items():
            logger.info("evaluating %s (%s)", name, found.folder)
            current.update(found.tensors)
            sync.push(name)
            file = folder / "samples" / f"{name}.jsonl"
            results["models"][name] = measure(engine, formatter, prompts, benchmark.metrics, config, file)
    write_whole(folder / "results.json", json.dumps(results, indent=1).encode())
    show(results)
    first_metric = next(iter(benchmark.metrics))
    mark_done(folder, {name: result["sampled"][first_metric] for name, result in results["models"].items()})


def measure(
    engine: RolloutEngine,
    formatter: PromptFormatter,
    prompts: Sequence[Prompt],
    metrics: Mapping[str, Metric],
    config: RunConfig,
    samples_file: Path,
) -> dict[str, Any]:
    """Metrics of the engine's weights, greedy and sampled, with 95 % intervals; writes responses to `samples_file`."""
    first = next(iter(metrics))
    samples_file.parent.mkdir(parents=True, exist_ok=True)
    settings = config.evaluate
    result: dict[str, Any] = {}
    with samples_file.open("w", encoding="utf-8") as file:
        for mode, count, temperature in (
            ("greedy", 1, 0.0),
            ("sampled", settings.samples_per_prompt, settings.temperature),
        ):
            responses = _responses(engine, formatter, prompts, count, temperature, config)
            scores = {
                name: [
                    [metric(prompt, text) for text in texts] for prompt, texts in zip(prompts, responses, strict=True)
                ]
                for name, metric in metrics.items()
            }
            for index, (prompt, texts) in enumerate(zip(prompts, responses, strict=True)):
                parts = {"accuracy": scores[first][index][0], "format": scores["format"][index][0]}
                row = {
                    "prompt": prompt.id,
                    "question": prompt.question,
                    "truth": prompt.answer,
                    "task": prompt.task,
                    "mode": mode,
                    "response": texts[0],
                    "reward_parts": parts,
                }
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            result[mode] = {name: _interval(values) for name, values in scores.items()}
            if mode == "sampled":
                result["by_task"] = {
                    task: _interval([v for p, v in zip(prompts, scores[first], strict=True) if p.task == task])
                    for task in sorted({prompt.task for prompt in prompts})
                }
    return result


def _interval(values: Sequence[Sequence[float]]) -> dict[str, float]:
    return clustered([sum(row) / len(row) for row in values])._asdict()


def _responses(
    engine: RolloutEngine,
    formatter: PromptFormatter,
    prompts: Sequence[Prompt],
    count: int,
    temperature: float,
    config: RunConfig,
) -> list[list[str]]:
    """`count` responses per prompt, as text."""
    tokenizer = formatter.tokenizer
    tokens = [formatter.tokens(prompt.question) for prompt in prompts]
    requests = [Request(f"{index}-{i}", tokens[index]) for index in range(len(prompts)) for i in range(count)]
    sampling = Sampling(
        temperature, config.rollout.top_p, config.rollout.max_response_tokens, (tokenizer.eos,), config.seed
    )
    completions = require_completions(engine.generate(requests, sampling))
    texts = [response_text(completion.response.tokens.tolist(), tokenizer) for completion in completions]
    return [texts[start : start + count] for start in range(0, len(texts), count)]


def show(results: Mapping[str, Any]) -> None:
    """Print the results as a table."""
    table = Table(title=f"{results['prompts']} held-out prompts, {results['samples']} samples each, 95 % intervals")
    metrics = next(iter(results["models"].values()))["greedy"]
    for column in ("model", "mode", *metrics):
        table.add_column(column)
    for name, result in results["models"].items():
        for mode in ("greedy", "sampled"):
            cells = [f"{v['mean']:.3f} [{v['low']:.3f}, {v['high']:.3f}]" for v in result[mode].values()]
            table.add_row(name, mode, *cells)
    Console().print(table)
