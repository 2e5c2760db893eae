"""evaluate: accuracy of one or several models on held-out prompts, greedy and sampled, by one engine."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import orjson

from megatron_r1.checkpoint.store import step_folders
from megatron_r1.config.initial_model import check_same_model
from megatron_r1.config.run import RunConfig
from megatron_r1.data.chat.prompt_format import PromptFormatter
from megatron_r1.data.prompts.files import PromptFile, read_prompts
from megatron_r1.data.prompts.prompts import Prompt
from megatron_r1.data.prompts.published import PUBLISHED, with_known_fields
from megatron_r1.data.tokenizer import response_text
from megatron_r1.errors import ConfigError
from megatron_r1.evaluation.benchmarks import BENCHMARKS, Benchmark, Measures
from megatron_r1.evaluation.summary import EvaluatedResponse, ModeScores, curve_of
from megatron_r1.evaluation.tables import show
from megatron_r1.files import digest_of, read_json, write_whole
from megatron_r1.rewards.accuracy import truth_problems
from megatron_r1.rollout.engine import Request, RolloutEngine, Sampling, require_completions
from megatron_r1.runs.folder import mark_done, open_run_folder
from megatron_r1.runs.inference_engine import inference_engine
from megatron_r1.runs.initial_weights import Weights, find_weights
from megatron_r1.runs.prompts import digest_of_prompts, list_bad_records, prompt_formatter

logger = logging.getLogger(__name__)


def run(config: RunConfig) -> None:
    """Evaluate each model on the same held-out prompts; models that an earlier call finished are not sampled again."""
    sources = sources_of(config)
    folder = open_run_folder(config)
    models = {
        name: find_weights(source, f"evaluate.models.{name}", config.init.weights) for name, source in sources.items()
    }
    first = next(iter(models.values()))
    check_alike(models, sources)
    formatter = prompt_formatter(config, first.tokenizer(), first.model.max_sequence_length)
    benchmark = BENCHMARKS.get(config.evaluate.benchmark, BENCHMARKS["arithmetic"])
    prompts = held_out_prompts(config, benchmark, formatter, folder)
    finished = {name: ModelResult.of(folder, name, found, prompts) for name, found in models.items()}
    if todo := [name for name, one in finished.items() if one.result is None]:
        current = dict(first.tensors)
        with (
            inference_engine(config, first, current, folder) as (engine, sync),
            benchmark.measures(config.reward) as measures,
        ):
            for name in todo:
                logger.info("evaluating %s (%s)", name, models[name].folder)
                current.update(models[name].tensors)
                sync.push(name)
                samples = folder / "samples" / f"{name}.jsonl"
                finished[name].write(measure(engine, formatter, prompts, measures, config, samples))
    by_model = {name: one.result for name, one in finished.items() if one.result is not None}
    results = {
        "benchmark": config.evaluate.benchmark,
        "prompts": len(prompts),
        "samples": config.evaluate.samples_per_prompt,
        "temperature": config.evaluate.temperature,
        "top_p": config.rollout.top_p,
        "max_response_tokens": config.rollout.max_response_tokens,
        "models": by_model,
    }
    if config.evaluate.every:
        results["curve"] = curve_of({int(name.rpartition("-")[2]): result for name, result in by_model.items()})
    write_whole(folder / "results.json", json.dumps(results, indent=1).encode())
    show(results)
    mark_done(folder, {name: next(iter(result["sampled"].values())) for name, result in by_model.items()})


def sources_of(config: RunConfig) -> dict[str, str]:
    """The models to evaluate by name: those of `evaluate.models`, kept checkpoints of a run, or the one of `init.from`.

    Raises:
        ConfigError: there is none.
    """
    settings, source = config.evaluate, config.init.from_
    if not (settings.models or source):
        raise ConfigError("evaluate.models", "{}", "needs a model: evaluate.models.NAME=RUN or init.from=RUN")
    if not settings.every:
        return dict(settings.models) or {"model": source}
    kept = sorted(step_folders(Path(source) / "checkpoints"))
    if not kept:
        raise ConfigError("evaluate.every", settings.every, f"needs a run with checkpoints in init.from={source}")
    chosen = dict.fromkeys([*kept[settings.every - 1 :: settings.every], kept[-1]])
    return {path.name: str(path) for _, path in chosen}


def check_alike(models: Mapping[str, Weights], sources: Mapping[str, str]) -> None:
    """Refuse models that one engine cannot evaluate one after the other.

    Raises:
        ConfigError: one has another shape or vocabulary than the first.
    """
    first = next(iter(models.values()))
    tokenizer = first.tokenizer()
    for name, found in models.items():
        key = f"evaluate.models.{name}"
        check_same_model(first.model, found.model, f"{key}={sources[name]}")
        if not tokenizer.has_same_vocabulary(found.tokenizer()):
            raise ConfigError(key, sources[name], "must have the first model's vocabulary: its ids are of other tokens")


def held_out_prompts(config: RunConfig, benchmark: Benchmark, formatter: PromptFormatter, folder: Path) -> list[Prompt]:
    """The prompts of the benchmark or of the configured file, each with the configured instruction after it."""
    instruction = f"\n\n{config.evaluate.instruction}" if config.evaluate.instruction else ""
    if file := read_file(config, lambda question: formatter.check(question + instruction)):
        list_bad_records([file], folder)
    prompts = file.prompts if file else benchmark.prompts(config.data, config.evaluate.num_prompts)
    return [replace(prompt, question=prompt.question + instruction) for prompt in prompts]


def read_file(config: RunConfig, check: Callable[[str], None]) -> PromptFile | None:
    """The prompts of the configured file; None where the benchmark has its own.

    Raises:
        ConfigError: the benchmark needs its own prompts, or a file and there is none.
    """
    prompts, benchmark = config.data.prompts, config.evaluate.benchmark
    problems, limit = partial(truth_problems, config.reward), config.evaluate.num_prompts
    if benchmark in PUBLISHED:
        convert = PUBLISHED[benchmark](config.seed)
        return read_prompts(with_known_fields(prompts, benchmark), check, limit, problems, convert)
    if not prompts.path:
        return None
    if benchmark != "arithmetic":
        raise ConfigError("data.prompts.path", prompts.path, f"must be empty with evaluate.benchmark={benchmark}")
    return read_prompts(prompts, check, limit, problems)


@dataclass
class ModelResult:
    """The result of one model in a file of its own, so that a killed evaluation does not repeat finished models."""

    path: Path
    depends_on: dict[str, str]
    """Digests of the weights and of the prompts; the run's folder pins the configuration."""
    result: dict[str, Any] | None
    """None until the model was evaluated."""

    @classmethod
    def of(cls, folder: Path, name: str, found: Weights, prompts: Sequence[Prompt]) -> ModelResult:
        """What an earlier call left, if it was of the same weights and prompts."""
        path = folder / "models" / f"{name}.json"
        depends_on = {"weights": digest_of_weights(found.folder), "prompts": digest_of_prompts(prompts)}
        written = read_json(path) if path.is_file() else {}
        return cls(path, depends_on, written.get("result") if written.get("depends_on") == depends_on else None)

    def write(self, result: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, orjson.dumps({"depends_on": self.depends_on, "result": result}))
        self.result = result


def digest_of_weights(folder: Path) -> str:
    """SHA-256 in hex of a checkpoint's manifest, which has its files' own; of a Hugging Face folder's names, sizes and
    times."""
    if (manifest := folder / "manifest.json").is_file():
        return digest_of(manifest)
    files = [(path.name, path.stat()) for path in sorted(folder.iterdir()) if path.is_file()]
    listed = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in files]
    return hashlib.sha256(orjson.dumps(listed)).hexdigest()


def measure(
    engine: RolloutEngine,
    formatter: PromptFormatter,
    prompts: Sequence[Prompt],
    measures: Measures,
    config: RunConfig,
    samples_file: Path,
) -> dict[str, Any]:
    """Results of the engine's weights, greedy and sampled, with 95 % intervals; writes responses to `samples_file`."""
    settings = config.evaluate
    openings = [formatter.opening(prompt.question) for prompt in prompts]
    modes = {"greedy": (1, 0.0), "sampled": (settings.samples_per_prompt, settings.temperature)}
    scores: dict[str, ModeScores] = {}
    samples_file.parent.mkdir(parents=True, exist_ok=True)
    with samples_file.open("w", encoding="utf-8") as file:
        for mode, (count, temperature) in modes.items():
            responses = _responses(engine, formatter, prompts, count, temperature, config)
            scores[mode] = ModeScores(measures, prompts, responses, openings)
            for row in _rows(mode, prompts, scores[mode]):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
    return {
        **{mode: found.means() for mode, found in scores.items()},
        "by_task": scores["sampled"].by_task(),
        "pass_at_k": scores["sampled"].pass_at_k(),
        "cons_at_k": scores["sampled"].cons_at_k(),
        "behaviour": {mode: found.behaviour() for mode, found in scores.items()},
    }


def _rows(mode: str, prompts: Sequence[Prompt], found: ModeScores) -> Iterator[dict[str, Any]]:
    """Every response with its scores, for the file of samples."""
    for index, prompt in enumerate(prompts):
        for sample, response in enumerate(found.responses[index]):
            parts = {"accuracy": found.main[index][sample], "format": found.scores["format"][index][sample]}
            yield {
                "prompt": prompt.id,
                "question": prompt.question,
                "truth": prompt.answer,
                "task": prompt.task,
                "mode": mode,
                "sample": sample,
                "response": response.text,
                "response_tokens": response.tokens,
                "truncated": response.truncated,
                "reward_parts": parts,
            }


def _responses(
    engine: RolloutEngine,
    formatter: PromptFormatter,
    prompts: Sequence[Prompt],
    count: int,
    temperature: float,
    config: RunConfig,
) -> list[list[EvaluatedResponse]]:
    """`count` responses per prompt."""
    tokenizer = formatter.tokenizer
    tokens = [formatter.tokens(prompt.question) for prompt in prompts]
    requests = [Request(f"{index}-{i}", tokens[index]) for index in range(len(prompts)) for i in range(count)]
    sampling = Sampling(
        temperature, config.rollout.top_p, config.rollout.max_response_tokens, tokenizer.stop_tokens, config.seed
    )
    responses = [
        EvaluatedResponse(
            response_text(completion.response.tokens.tolist(), tokenizer),
            len(completion.response.tokens),
            completion.finish_reason == "length",
        )
        for completion in require_completions(engine.generate(requests, sampling))
    ]
    return [responses[start : start + count] for start in range(0, len(responses), count)]
