"""Checks of the tokenizer, the chat template and the rows of data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

from megatron_r1.check.finding import Check, Finding, Job, finding_of, passed, refused, unknown, warning
from megatron_r1.checkpoint.manifest import read_manifest
from megatron_r1.config.keys import reads
from megatron_r1.data.chat.closing import closing_tokens
from megatron_r1.data.chat.encode import chat_template, control_tokens, template_source
from megatron_r1.data.chat.prompt_format import NO_TEMPLATE
from megatron_r1.data.pretraining.packed import tokenizer_folder
from megatron_r1.data.prompts.files import read_prompts
from megatron_r1.data.row_files import rows_of
from megatron_r1.data.row_sources import RowSource
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import ConfigError, UserError
from megatron_r1.runs.prompts import prompt_formatter
from megatron_r1.runs.source import find_checkpoint, hf_folder

ROWS = 1000
"""Rows of a file that are read, from the first."""


def tokenizer_of(job: Job) -> Tokenizer | None:
    """The tokenizer of the weights, or of the first tokenised dataset; None where none is there yet.

    Raises:
        DataError: it cannot be read.
    """
    source, indexed = job.config.init.from_, job.config.data.indexed
    if source and source not in job.made_before:
        folder = hf_folder(source) or find_checkpoint(source, read_manifest)[0] / "tokenizer"
        return Tokenizer.load(folder)
    if not source and job.verb == "pretrain" and job.config.data.source == "indexed" and indexed.datasets:
        return Tokenizer.load(tokenizer_folder(indexed))
    return None


def _with_tokenizer(find: Callable[[Job, Tokenizer], Iterator[Finding]]) -> Callable[[Job], Iterator[Finding]]:
    """A check that needs a tokenizer, as a check of any job."""

    def found(job: Job) -> Iterator[Finding]:
        try:
            tokenizer = tokenizer_of(job)
            if tokenizer is None:
                yield unknown("there is no tokenizer yet") if job.config.init.from_ else passed("made by the run")
            else:
                yield from find(job, tokenizer)
        except ConfigError as error:
            yield unknown("not checked: the weights are missing") if error.key == "init.from" else finding_of(error)
        except UserError as error:
            yield finding_of(error)

    return found


def _vocabulary(job: Job, tokenizer: Tokenizer) -> Iterator[Finding]:
    size, needed = job.config.model.vocab_size, tokenizer.vocab_size
    if reads(job.verb, "model") and needed > size:
        yield refused(f"model.vocab_size={size}: the tokenizer's largest id is {needed - 1}", f"take at least {needed}")
    else:
        yield passed(f"ids to {tokenizer.vocab_size - 1}, responses end at {[*tokenizer.stop_tokens]}")


def _template(job: Job, tokenizer: Tokenizer) -> Iterator[Finding]:
    key = "sft.chat_template" if job.verb == "sft" else "rollout.chat_template"
    name = job.config.sft.chat_template if job.verb == "sft" else job.config.rollout.chat_template
    if job.verb != "sft":
        prompt_formatter(job.config, tokenizer)
    if name == NO_TEMPLATE:
        yield passed("no template")
        return
    template = chat_template(tokenizer, template_source(name, tokenizer, key), name, job.config.rollout.template_date)
    ends = closing_tokens(template, control_tokens(tokenizer))
    if not ends:
        yield warning(
            f"{key}={name}: no control token ends a response", "take a template that ends turns, or train the end"
        )
    else:
        yield passed(f"renders; a response ends in {ends[0]}")


def _prompts(job: Job, tokenizer: Tokenizer) -> Iterator[Finding]:
    longest = job.config.model.max_sequence_length if reads(job.verb, "model") or job.model_known else 0
    formatter = prompt_formatter(job.config, tokenizer, longest)
    found = read_prompts(job.config.data.prompts, formatter.check, limit=ROWS)
    text = f"{len(found.prompts)} prompts read"
    if not found.prompts:
        yield refused(f"data.prompts.path={job.config.data.prompts.path}: no prompts", found.bad_rows[0])
    elif found.bad_rows:
        yield warning(f"{text}, {len(found.bad_rows)} bad rows", found.bad_rows[0])
    else:
        yield passed(text)


def _files(job: Job) -> Iterator[Finding]:
    """What a job reads: prompts with its tokenizer, of other files the first rows."""
    config, sources = job.config, dict[str, Path | RowSource]()
    if reads(job.verb, "data.prompts") and config.data.prompts.path and not _is_made(job, config.data.prompts.path):
        yield from _with_tokenizer(_prompts)(job)
    if reads(job.verb, "sft"):
        sources |= {f"sft.datasets.{name}.path": RowSource.of(one, f"sft.datasets.{name}")
                    for name, one in config.sft.datasets.items() if not _is_made(job, one.path)}  # fmt: skip
    for section in ("dpo", "reward_model"):
        if reads(job.verb, f"{section}.train_file"):
            named = {f"{section}.{key}": getattr(getattr(config, section), key) for key in ("train_file", "eval_file")}
            sources |= {key: Path(path) for key, path in named.items() if path and not _is_made(job, path)}
    if job.verb == "pretrain" and config.data.source == "indexed":
        for name, one in config.data.indexed.datasets.items():
            if not Path(one.path).is_dir():
                yield refused(f"data.indexed.datasets.{name}.path={one.path}: no such folder", "run tools/tokenise.py")
    for key, source in sources.items():
        yield from _rows(key, source)


def _rows(key: str, source: Path | RowSource) -> Iterator[Finding]:
    try:
        files = source.files() if isinstance(source, RowSource) else [source]
        count = sum(1 for _ in islice(rows_of(files), ROWS))
    except (UserError, OSError) as error:
        yield finding_of(error) if isinstance(error, UserError) else refused(f"{key}: {error}", "name a file of rows")
        return
    yield passed(f"{key}: {count} rows read") if count else refused(f"{key}: no rows", "name a file of rows")


def _is_made(job: Job, path: str) -> bool:
    return path in job.made_before


CHECKS = (
    Check(19, "tokenizer against vocabulary", _with_tokenizer(_vocabulary), lambda job: reads(job.verb, "init.from")),
    Check(20, "chat template", _with_tokenizer(_template), lambda job: job.verb in ("grpo", "sft", "sample", "dpo")),
    Check(21, "data", _files, lambda job: reads(job.verb, "data") or reads(job.verb, "sft")),
)
