"""A job that samples responses to many prompts in parts, and publishes them as one file."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_r1.config.run import RunConfig
from megatron_r1.data.chat.prompt_format import PromptFormatter
from megatron_r1.data.prompts.prompts import Prompt
from megatron_r1.data.prompts.style import PromptStyle
from megatron_r1.data.tokenizer import Tokenizer, response_text
from megatron_r1.errors import DataError, UserError
from megatron_r1.files import digest_of, replacing, write_whole
from megatron_r1.rewards.accuracy import Accuracy
from megatron_r1.rewards.reward import Unscored
from megatron_r1.rewards.score import Score, Scorer
from megatron_r1.rollout.engine import Request, RolloutEngine, Sampling, require_completions

logger = logging.getLogger(__name__)

PLAN = "plan.json"


def plan_of(
    config: RunConfig, prompts: Sequence[Prompt], formatter: PromptFormatter, style: PromptStyle, weights: Path
) -> dict[str, Any]:
    """What the parts of a job depend on: parts of one job have the same plan."""
    records = [(prompt.id, formatter.text(style.request(prompt)), prompt.answer) for prompt in prompts]
    texts = hashlib.sha256(orjson.dumps(records)).hexdigest()
    manifest = weights / "manifest.json"
    return {
        "prompts": len(prompts),
        "texts_sha256": texts,
        "weights": str(weights),
        "weights_sha256": digest_of(manifest) if manifest.is_file() else None,
        "seed": config.seed,
    }


@dataclass
class SamplingJob:
    """Prompts in parts, each of which is sampled, scored and written as a whole."""

    folder: Path
    prompts: Sequence[Prompt]
    formatter: PromptFormatter
    style: PromptStyle
    config: RunConfig
    plan: dict[str, Any]
    """What all parts depend on."""

    def __post_init__(self) -> None:
        """Raises DataError: the folder holds parts of another job."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path, plan = self.folder / PLAN, orjson.dumps(self.plan, option=orjson.OPT_INDENT_2)
        if path.is_file() and path.read_bytes() != plan:
            raise DataError(f"{path}: its parts are of other prompts or weights; choose another name")
        write_whole(path, plan)
        size = self.config.sample.prompts_per_part
        self._starts = range(0, len(self.prompts), size)

    @property
    def paths(self) -> list[Path]:
        """The files of all parts, in order."""
        return [self.folder / f"{number:06d}.jsonl" for number in range(len(self._starts))]

    def missing(self) -> Iterator[int]:
        """Numbers of the parts that are not written yet."""
        return (number for number, path in enumerate(self.paths) if not path.is_file())

    def sample(
        self,
        numbers: Sequence[int],
        engine: RolloutEngine,
        tokenizer: Tokenizer,
        scorer: Scorer,
        any_format: Accuracy,
    ) -> None:
        """Sample and write parts.

        Args:
            any_format: says which responses are correct, in whatever format.
        """
        console = Console(stderr=True)
        columns = (TextColumn("sample"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        text = TextColumn("{task.fields[speed]}")
        tokens, started = 0, time.perf_counter()
        with Progress(*columns, text, console=console, disable=not console.is_terminal) as bar:
            task = bar.add_task("sample", total=len(self.prompts), speed="")
            bar.advance(task, len(self.prompts) - sum(len(self._prompts_of(number)) for number in numbers))
            for number in numbers:
                rows = list(self._sample_part(number, engine, tokenizer, scorer, any_format))
                body = b"".join(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in rows)
                write_whole(self.paths[number], body)
                tokens += sum(row["response_tokens"] for row in rows)
                speed = f"{tokens / (time.perf_counter() - started):,.0f} tokens/s"
                bar.update(task, advance=len(self._prompts_of(number)), speed=speed)
        logger.info("sampled %d parts: %s", len(numbers), speed)

    def _prompts_of(self, number: int) -> Sequence[Prompt]:
        start = self._starts[number]
        return self.prompts[start : start + self.config.sample.prompts_per_part]

    def _sample_part(
        self, number: int, engine: RolloutEngine, tokenizer: Tokenizer, scorer: Scorer, any_format: Accuracy
    ) -> Iterator[dict[str, Any]]:
        config, prompts = self.config, self._prompts_of(number)
        drawn = [(prompt, index) for prompt in prompts for index in range(config.sample.samples_per_prompt)]
        user_messages = {prompt.id: self.style.request(prompt) for prompt in prompts}
        tokens = {id: self.formatter.tokens(message) for id, message in user_messages.items()}
        requests = [Request(f"{prompt.id}#{index}", tokens[prompt.id]) for prompt, index in drawn]
        rollout = config.rollout
        sampling = Sampling(
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            max_tokens=rollout.max_response_tokens,
            stop_tokens=tokenizer.stop_tokens,
            seed=config.seed * 1_000_003 + number,
        )
        completions = require_completions(engine.generate(requests, sampling))
        texts = [response_text(completion.response.tokens.tolist(), tokenizer) for completion in completions]
        openings = {id: self.formatter.opening(message) for id, message in user_messages.items()}
        whole = [openings[prompt.id] + text for (prompt, _), text in zip(drawn, texts, strict=True)]
        scores = scored([prompt for prompt, _ in drawn], whole, scorer)
        correct = any_format.correct([prompt for prompt, _ in drawn], whole)
        for (prompt, index), completion, text, score, right in zip(
            drawn, completions, texts, scores, correct, strict=True
        ):
            yield {
                "id": prompt.id,
                "sample": index,
                "question": prompt.question,
                "truth": prompt.answer,
                "task": prompt.task,
                "prompt": self.formatter.text(user_messages[prompt.id]),
                **({"given_response": prompt.response} if self.style.needs_response else {}),
                "response": text,
                "response_tokens": len(completion.response.tokens),
                "logprob": float(completion.response.logprobs.sum(dtype=np.float64)),
                "finish_reason": completion.finish_reason,
                "weight_version": completion.weight_version,
                "reward": score.total,
                "reward_parts": score.parts,
                "correct": right,
            }


def scored(prompts: Sequence[Prompt], texts: Sequence[str], scorer: Scorer) -> list[Score]:
    """The scores of all texts.

    Raises:
        UserError: one could not be scored, for no fault of its own; the same command resumes the job.
    """
    scores = scorer(prompts, texts)
    if failed := [score for score in scores if isinstance(score, Unscored)]:
        raise UserError(f"{len(failed)} of {len(texts)} responses could not be scored: {failed[0].reason}")
    return [score for score in scores if isinstance(score, Score)]


def publish(job: SamplingJob, folder: Path, format: str) -> tuple[Path, dict[str, Any]]:
    """Write all parts into one file of the run's folder; returns the file and totals over its samples."""
    rows, correct_somewhere, tokens, rewards, correct = 0, set[str](), 0, 0.0, 0
    for row in job_records(job):
        rows, tokens = rows + 1, tokens + row["response_tokens"]
        rewards, correct = rewards + row["reward"], correct + row["correct"]
        correct_somewhere |= {row["id"]} if row["correct"] else set()
    target = folder / f"samples.{format}"
    (_write_parquet if format == "parquet" else _write_jsonl)(job, target)
    totals = {
        "file": str(target),
        "prompts": len(job.prompts),
        "samples": rows,
        "response_tokens": tokens,
        "mean_reward": rewards / rows,
        "correct": correct / rows,
        "correct_in_any_sample": len(correct_somewhere) / len(job.prompts),
    }
    return target, totals


def job_records(job: SamplingJob) -> Iterator[dict[str, Any]]:
    """The records of all parts, in order."""
    for path in job.paths:
        with path.open("rb") as file:
            yield from map(orjson.loads, file)


def _write_jsonl(job: SamplingJob, target: Path) -> None:
    with replacing(target) as part, part.open("wb") as file:
        for path in job.paths:
            file.write(path.read_bytes())


def _write_parquet(job: SamplingJob, target: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    rows, writer = job_records(job), None
    with replacing(target) as part:
        try:
            while batch := list(islice(rows, 4096)):
                table = pyarrow.Table.from_pylist(batch, schema=writer.schema if writer else None)
                writer = writer or parquet.ParquetWriter(part, table.schema)
                writer.write_table(table)
        finally:
            if writer:
                writer.close()
