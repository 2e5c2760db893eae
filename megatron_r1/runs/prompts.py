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
from megatron_r1.errors import ConfigError, DataError
from megatron_r1.files import write_whole

logger = logging.getLogger(__name__)

BAD_ROWS, LEFT_OUT, PINNED = "bad_rows.txt", "left_out.txt", "prompts.sha256"


def prompt_formatter(config: RunConfig, tokenizer: Tokenizer, max_sequence_length: int = 0) -> PromptFormatter:
    """The configured chat template, for prompts that leave room for a response; raises as `PromptFormatter`.

    Args:
        max_sequence_length: of the model that responds; 0 where none does.

    Raises:
        ConfigError: no prompt would have room.
    """
    rollout, left = config.rollout, 0
    if max_sequence_length and (left := max_sequence_length - config.rollout.max_response_tokens) < 1:
        allowed = f"must be below model.max_sequence_length={max_sequence_length}, which holds the prompt too"
        raise ConfigError("rollout.max_response_tokens", rollout.max_response_tokens, allowed)
    template, system = rollout.chat_template, rollout.system_prompt
    return PromptFormatter(tokenizer, template, system, date=rollout.template_date, max_tokens=left)


def pin_prompts(files: Sequence[PromptFile], folder: Path) -> None:
    """List bad rows of the prompt files in the run's folder, and refuse to resume the run with other prompts.

    Args:
        files: none where the prompts are synthetic.

    Raises:
        DataError: the files' prompts changed since the run started.
    """
    if not files:
        return
    list_bad_records(files, folder)
    pinned, digest = folder / PINNED, digest_of_prompts([prompt for file in files for prompt in file.prompts])
    if not pinned.is_file():
        write_whole(pinned, digest.encode())
    elif pinned.read_text() != digest:
        raise DataError(f"{folder}: the prompt file changed since this run started; choose another name")


def list_bad_records(files: Sequence[PromptFile], folder: Path) -> None:
    """Say what was read otherwise than it stands in the files; write rows that are not used, with their reasons."""
    for note in (note for file in files for note in file.notes):
        logger.warning("prompts: %s", note)
    for name, what, lines in (
        (BAD_ROWS, "rows of the prompt file dropped", [line for file in files for line in file.bad_rows]),
        (LEFT_OUT, "prompts left out by their pass rates", [line for file in files for line in file.left_out]),
    ):
        if lines:
            write_whole(folder / name, "".join(f"{line}\n" for line in lines).encode())
            logger.warning("%d %s; see %s", len(lines), what, folder / name)


def digest_of_prompts(prompts: Sequence[Prompt]) -> str:
    """SHA-256 in hex of questions, answers and tasks."""
    records = [(prompt.id, prompt.question, prompt.answer, prompt.task) for prompt in prompts]
    return hashlib.sha256(orjson.dumps(records)).hexdigest()
