"""init.from is all that a verb needs to know of a model: shape, type, context, end tokens, settings of sampling."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_r1.config.load import read_yaml
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.rollout.journal import Journal
from tests.support.chats import small_tokenizer
from tests.support.folder_verbs import ALWAYS, VERBS
from tests.support.fork_server import run_forked_to_the_end
from tests.support.hf_folders import SHAPES
from tests.support.samples import row_of

pytestmark = pytest.mark.timeout(240)
SUPPORT = Path(__file__).parents[1] / "support"
END, EOS = (small_tokenizer().id(token) for token in ("<|im_end|>", "<|eos|>"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("named-once")
    run_forked_to_the_end(SUPPORT / "folder_verbs.py", folder, seconds=200)
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, dict[str, int]]:
    return json.loads((folder / "found.json").read_text())


@pytest.mark.parametrize("kind", SHAPES)
def test_verbs_take_the_model_from_the_folder(kind: str, folder: Path, found) -> None:
    assert found[kind] == dict.fromkeys(ALWAYS[kind], 0)
    check_models(folder, kind, ALWAYS[kind])


@pytest.mark.slow
def test_every_other_verb_takes_it_from_there_too(tmp_path: Path) -> None:
    run_forked_to_the_end(SUPPORT / "folder_verbs.py", tmp_path, "--others", seconds=200)
    for kind, codes in json.loads((tmp_path / "found.json").read_text()).items():
        assert codes == dict.fromkeys(VERBS.keys() - ALWAYS[kind], 0), kind
        check_models(tmp_path, kind, list(codes))


def check_models(folder: Path, kind: str, verbs: list[str]) -> None:
    """What runs say of their model is what the folder of their family says."""
    said = json.loads((folder / kind / "config.json").read_text())
    for verb in verbs:
        model = read_yaml(folder / f"{kind}-{verb}" / "config.yaml")["model"]
        assert (model["hidden_size"], model["vocab_size"], model["max_sequence_length"], model["dtype"]) == (
            said["hidden_size"], said["vocab_size"], said["max_position_embeddings"], "fp32",
        )  # fmt: skip
        if verb not in ("sample", "evaluate"):
            assert list((folder / f"{kind}-{verb}/checkpoints").glob("step-*/manifest.json"))


def test_a_run_names_its_model_as_a_folder_does(folder: Path, found) -> None:
    assert set(found["run"].values()) == {0}
    trained, next_one = (read_yaml(folder / name / "config.yaml")["model"] for name in ("deepseek_v3-sft", "run-grpo"))
    assert next_one == trained
    changed = read_yaml(folder / "run-changed/config.yaml")["model"]
    assert {key: value for key, value in changed.items() if value != trained[key]} == {
        "dtype": "bf16",
        "max_sequence_length": 300,
    }


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("name", ["sample", "after"])
def test_a_response_ends_where_the_chat_template_ends_it(name: str, folder: Path, found) -> None:
    """The tokenizer's end token is another; before fine-tuning with the template, and after it."""
    assert set(found["ending"].values()) == {0}
    samples = rows(folder / f"ending-{name}/samples.jsonl")
    assert {(row["finish_reason"], row["response_tokens"], row["response"]) for row in samples} == {("stop", 1, "")}


def test_rollouts_end_there_too(folder: Path, found) -> None:
    samples = Journal(folder / "ending-grpo/rollouts").read(1)
    assert [int(row_of(sample)[0, -1]) for sample in samples] == [END] * 4
    assert [sample.response_length for sample in samples] == [1] * 4


@pytest.mark.parametrize("name", ["grpo-export", "sft-export", "again"])
def test_end_tokens_and_settings_of_sampling_are_exported(name: str, folder: Path, found) -> None:
    source, settings = (
        json.loads((path / "generation_config.json").read_text())
        for path in (folder / "ending", folder / f"ending-{name}/hf")
    )
    assert sorted(settings.pop("eos_token_id")) == sorted([END, EOS]) and source.pop("eos_token_id") == EOS
    assert settings.items() >= {key: source[key] for key in ("temperature", "top_k", "repetition_penalty")}.items()
    assert set(Tokenizer.load(folder / f"ending-{name}/hf").stop_tokens) == {END, EOS}


@torch.no_grad()
def test_transformers_ends_there_too(folder: Path, found) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    exported = folder / "ending-sft-export/hf"
    words, model = AutoTokenizer.from_pretrained(exported), AutoModelForCausalLM.from_pretrained(exported)
    prompt = words.apply_chat_template(
        [{"role": "user", "content": "2 + 3?"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    tokens = model.generate(**prompt, max_new_tokens=8, do_sample=False)[0, prompt["input_ids"].shape[1] :].tolist()
    assert tokens == [END]
