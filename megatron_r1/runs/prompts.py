"""The prompts of a run: their template, and the check that the prompt file stays the same."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path

import orjson

from megatron_r1.config.run import RunConfig
from megatron_r1.data.chat.prompt_format import PromptFormatter
from megatron_r1.data.prompts.files import PromptFile, read_prompts
from megatron_r1.data.prompts.prompts import FilePrompts, Prompt, Prompts, TrainingPrompts
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import DataError
from megatron_r1.files import write_whole

logger = logging.getLogger(__name__)

BAD_ROWS, PINNED = "bad_rows.txt", "prompts.sha256"


def prompt_formatter(config: RunConfig, tokenizer: Tokenizer) -> PromptFormatter:
    """The configured chat template; raises as `PromptFormatter`."""
    return PromptFormatter(tokenizer, config.rollout.chat_template, config.rollout.system_prompt)


def pin_prompts(file: PromptFile | None, folder: Path) -> None:
    """List bad rows of the prompt file in the run's folder, and refuse to resume the run with other prompts.

    Args:
        file: None where the prompts are synthetic.

    Raises:
        DataError: the file's prompts changed since the run started.
    """
    if file is None:
        return
    list_bad_records(file, folder)
    pinned, digest = folder / PINNED, digest_of_prompts(file.prompts)
    if not pinned.is_file():
        write_whole(pinned, digest.encode())
    elif pinned.read_text() != digest:
        raise DataError(f"{folder}: the prompt file changed since this run started; choose another name")


def list_bad_records(file: PromptFile, folder: Path) -> None:
    """Write the dropped rows with their reasons to the run's folder."""
    if file.bad_rows:
        write_whole(folder / BAD_ROWS, "".join(f"{line}\n" for line in file.bad_rows).encode())
        logger.warning("%d rows of the prompt file dropped; see %s", len(file.bad_rows), folder / BAD_ROWS)


def digest_of_prompts(prompts: Sequence[Prompt]) -> str:
    """SHA-256 in hex of questions, answers and tasks."""
    records = [(prompt.id, prompt.question, prompt.answer, prompt.task) for prompt in prompts]
    return hashlib.sha256(orjson.dumps(records)).hexdigest()
