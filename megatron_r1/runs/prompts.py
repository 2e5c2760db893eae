"""The questions of a run: a world's or a file's, and how they are asked."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path

import orjson

from megatron_r1.config.run import RunConfig
from megatron_r1.data.chat.prompt_format import PromptFormatter
from megatron_r1.data.prompts.files import FilePrompts, PromptFile, read_prompts
from megatron_r1.data.prompts.prompts import Prompt, TrainingPrompts
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import DataError
from megatron_r1.files import write_whole
from megatron_r1.data.prompts.prompts import Prompts

logger = logging.getLogger(__name__)

BAD_ROWS, PINNED = "bad_rows.txt", "prompts.sha256"


def prompt_formatter(config: RunConfig, tokenizer: Tokenizer) -> PromptFormatter:
    """How this run puts questions to its model; raises as `Asking`."""
    return PromptFormatter(tokenizer, config.rollout.chat_template, config.rollout.system_prompt)


def prompts_of_file(config: RunConfig, formatter: PromptFormatter, limit: int = 0) -> PromptFile | None:
    """What the run's own file holds; None where it asks a world's questions. Raises as `read_prompts`."""
    return read_prompts(config.data.prompts, formatter.check, limit) if config.data.prompts.path else None


def training_prompts(config: RunConfig, found: PromptFile | None) -> Prompts:
    """The endless list of questions that reinforcement learning asks."""
    return FilePrompts(found.prompts, config.data.seed) if found else TrainingPrompts(config.data)


def keep(found: PromptFile | None, folder: Path) -> None:
    """Name bad rows in the run's folder, and hold a run that goes on to the questions that it began with.

    Raises:
        DataError: the file's questions are no longer those.
    """
    if found is None:
        return
    name_bad_rows(found, folder)
    pinned, digest = folder / PINNED, digest_of_prompts(found.prompts)
    if not pinned.is_file():
        write_whole(pinned, digest.encode())
    elif pinned.read_text() != digest:
        raise DataError(f"{folder}: its questions are no longer those that it began with; choose another name")


def name_bad_rows(found: PromptFile, folder: Path) -> None:
    """Leave the names of rows that are left out in the run's folder."""
    if found.bad_rows:
        write_whole(folder / BAD_ROWS, "".join(f"{line}\n" for line in found.bad_rows).encode())
        logger.warning("%d rows are left out, each named in %s", len(found.bad_rows), folder / BAD_ROWS)


def digest_of_prompts(prompts: Sequence[Prompt]) -> str:
    """SHA-256 in hex of what is asked and what is true."""
    rows = [(prompt.id, prompt.question, prompt.answer, prompt.task) for prompt in prompts]
    return hashlib.sha256(orjson.dumps(rows)).hexdigest()
