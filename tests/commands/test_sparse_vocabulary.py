"""A vocabulary whose ids have gaps: its largest id counts, and every verb refuses a model without a row for it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megatron_r1.__main__ import exit_code
from megatron_r1.data.tokenizer import Tokenizer
from tests.support.hf_folders import ROWS, write_folder_of

VERBS = {
    "pretrain": ["init.from=hf:{}"],
    "sft": ["init.from=hf:{}"],
    "grpo": ["init.from=hf:{}", "rollout=local"],
    "reward_model": ["init.from=hf:{}"],
    "dpo": ["init.from=hf:{}"],
    "sample": ["init.from=hf:{}", "rollout=local"],
    "evaluate": ["evaluate.models.it=hf:{}", "rollout=local"],
    "convert": ["init.from=hf:{}"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder_of("llama", tmp_path_factory.mktemp("sparse") / "folder")


def spread(folder: Path, distance: int) -> None:
    """Move the last ordinary words' ids up, so that there is a gap below them."""
    tree = json.loads((folder / "tokenizer.json").read_text())
    added = {token["id"] for token in tree["added_tokens"]}
    words = tree["model"]["vocab"]
    for word, number in words.items():
        words[word] = number + distance * (number >= 300 and number not in added)
    (folder / "tokenizer.json").write_text(json.dumps(tree))


@pytest.mark.parametrize("verb", VERBS)
def test_an_id_beyond_the_embedding_is_refused_by_every_verb(verb, folder, tmp_path, capsys) -> None:
    shutil.copytree(folder, tmp_path / "gap")
    spread(tmp_path / "gap", 400)
    tokenizer = Tokenizer.load(tmp_path / "gap")
    assert len(tokenizer.backend.get_vocab()) < ROWS < tokenizer.vocab_size
    arguments = [override.format(tmp_path / "gap") for override in VERBS[verb]]
    platform = [] if verb == "convert" else ["platform=cpu"]
    assert exit_code([verb, *arguments, *platform, f"root={tmp_path}", "name=run"]) == 2
    written = capsys.readouterr().err.splitlines()
    message = f"model.vocab_size={ROWS}: must be above {tokenizer.vocab_size - 1}, the tokenizer's largest id"
    assert written[-1].startswith(f"megatron-r1: {message}") and "Traceback" not in "".join(written)
    assert not [path for path in (tmp_path / "run").rglob("*") if path.suffix == ".safetensors"]


@pytest.mark.parametrize(("spare", "status"), [(0, 2), (1, 0), (20, 0)])
def test_a_gap_within_the_embedding_is_no_fault(spare: int, status: int, folder, tmp_path, capsys) -> None:
    """The row of the largest id must be there; rows beyond it may be."""
    shutil.copytree(folder, tmp_path / "gap")
    spread(tmp_path / "gap", ROWS - spare - Tokenizer.load(folder).vocab_size + 3)
    largest = Tokenizer.load(tmp_path / "gap").vocab_size - 1
    assert largest == ROWS - spare
    assert exit_code(["convert", f"init.from=hf:{tmp_path}/gap", f"root={tmp_path}", "name=run"]) == status
    assert (str(largest) in capsys.readouterr().err) == (status == 2)


def test_rows_that_the_tokenizer_needs_are_not_cut(folder, tmp_path, capsys) -> None:
    needed = Tokenizer.load(folder).vocab_size
    arguments = ["convert", f"init.from=hf:{folder}", f"root={tmp_path}"]
    assert exit_code([*arguments, "name=cut", f"convert.vocab_size={needed - 1}"]) == 2
    assert f"convert.vocab_size={needed - 1}: must be above {needed - 1}" in capsys.readouterr().err
    assert exit_code([*arguments, "name=kept", f"convert.vocab_size={needed}"]) == 0


def test_models_of_an_evaluation_must_have_one_vocabulary(folder, tmp_path, capsys) -> None:
    shutil.copytree(folder, tmp_path / "other")
    spread(tmp_path / "other", 1)
    models = [f"evaluate.models.one=hf:{folder}", f"evaluate.models.two=hf:{tmp_path}/other"]
    assert exit_code(["evaluate", *models, "platform=cpu", "rollout=local", f"root={tmp_path}", "name=run"]) == 2
    assert "evaluate.models.two=hf:" in (said := capsys.readouterr().err) and "first model's vocabulary" in said
