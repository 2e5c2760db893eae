"""sft as a person calls it: a model of another project in, a better one out, which is what it says it is."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_r1.commands.sft import check, with_epoch_steps
from megatron_r1.config.load import load
from megatron_r1.config.model import GroupedAttentionConfig
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import ConfigError
from megatron_r1.hf.config import hf_config
from megatron_r1.runs.initial_weights import find_weights
from megatron_r1.track.metrics import reproducible
from tests.support.chats import QWEN_MARKED, small_tokenizer
from tests.support.conversions import convert, same_bits
from tests.support.fork_server import run_forked_to_the_end
from tests.support.launching import run_to_the_end
from tests.support.recorded import unregistered

SHAPE = ["model=tiny_dense", "model.num_layers=2", "model.vocab_size=516", "model.hidden_size=64"]
KINDS = {
    "qwen": [*SHAPE, "model.tied_embeddings=true"],
    "llama": [*SHAPE, "model.attention.qkv_bias=false", "model.tied_embeddings=false", "model.rope.base=5e5"],
}
EVAL_EXAMPLES, BAD = 24, 2


@pytest.fixture(scope="module")
def dialogues(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sums in one turn and in two, with and without a system prompt; two rows are broken."""
    rows: list[Any] = []
    for number in range(240):
        a, b = number % 12, number % 7
        turns = [("user", f"{a} + {b}?"), ("assistant", f"{a + b}")]
        if number % 3 == 0:
            turns += [("user", "And one more?"), ("assistant", f"{a + b + 1}")]
        if number % 4 == 0:
            turns = [("system", f"Be brief, {number}."), *turns]
        rows.append({"messages": [{"role": role, "content": text} for role, text in turns]})
    rows[17:17] = [{"messages": []}, {"prompt": "alone"}]
    path = tmp_path_factory.mktemp("dialogues") / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module", params=["qwen", pytest.param("llama", marks=pytest.mark.slow)])
def trained(
    request: pytest.FixtureRequest, dialogues: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[str]]:
    """A model that transformers made, fine-tuned; and the command that did it."""
    base = tmp_path_factory.mktemp(request.param)
    publish(base / "hf", request.param, KINDS[request.param])
    command = [
        *KINDS[request.param],
        *("sft.source=files", f"sft.datasets.sums.path='{dialogues}'", "sft.chat_template=tokenizer"),
        *(f"sft.max_bad_rows={BAD}", f"sft.eval_examples={EVAL_EXAMPLES}", "sft.eval_interval=2", "sft.epochs=2"),
        *("train.sequence_length=96", "train.schedule.learning_rate=3e-3", "train.schedule.warmup_steps=1"),
        *("train.global_batch_size=16", "train.micro_batch_size=8", "train.save_interval=5"),
        *(f"init.from='hf:{base / 'hf'}'", f"root='{base}'", "name=run", "platform=cpu", "threads=1", "track=off"),
    ]
    run_to_the_end([sys.executable, "-m", "megatron_r1", "sft", *command], seconds=110)
    return base / "run", command


def publish(folder: Path, kind: str, shape: list[str]) -> None:
    """A model as transformers draws and writes it, with a tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model = load("sft", shape).model
    assert isinstance(model.attention, GroupedAttentionConfig)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(hf_config(model)))
    torch.manual_seed(1)
    theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    assert type(theirs).__name__.lower().startswith(kind)
    theirs.save_pretrained(folder)
    settings = {**small_tokenizer().settings, "chat_template": QWEN_MARKED, "eos_token": "<|im_end|>"}
    if kind == "qwen":  # Qwen's have no begin token
        settings = {name: value for name, value in settings.items() if name != "bos_token"}
    Tokenizer(small_tokenizer().backend, settings).save(folder)


def sft(command: list[str]) -> None:
    run_forked_to_the_end("megatron_r1", "sft", *command, seconds=110)


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.timeout(240)
def test_a_fine_tuned_model_has_the_same_loss_in_transformers(trained, dialogues, tmp_path):
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    run, _ = trained
    rows = rows_of(run)
    folder = convert(run, tmp_path / "converted", to="hf", dtype="fp32")
    # By its file: AutoTokenizer gives every Qwen model the vocabulary that cuts text as Qwen does.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    ids, masks = encoded_by_transformers(tokenizer, dialogues)
    measured = eval_rows_of(run, ids)
    assert len(measured) >= EVAL_EXAMPLES - 1
    for source, expected in ((run.parent / "hf", rows[0]["eval/loss_before"]), (folder, rows[-1]["eval/loss"])):
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
        total, count = 0.0, 0
        for row in measured:
            tokens, targets = torch.tensor(ids[row]), np.flatnonzero(masks[row])
            with torch.no_grad():
                log_probs_LV = model(tokens[None]).logits[0].log_softmax(-1)
            total -= float(log_probs_LV[targets - 1, tokens[targets]].sum())
            count += len(targets)
        print(f"{source.name}: {expected:.6f} here, {total / count:.6f} in transformers")
        assert total / count == pytest.approx(expected, rel=1e-5)
    assert rows[-1]["eval/loss"] < 0.6 * rows[0]["eval/loss_before"]


def encoded_by_transformers(tokenizer: Any, dialogues: Path) -> tuple[list[list[int]], list[list[int]]]:
    """Ids and loss masks of every good row, up to the end of the last response."""
    ids, masks = [], []
    for line in dialogues.read_text().splitlines():
        if messages := json.loads(line).get("messages"):
            found = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
            end = max(np.flatnonzero(found["assistant_masks"])) + 1
            ids.append(found["input_ids"][:end])
            masks.append(found["assistant_masks"][:end])
    return ids, masks


def eval_rows_of(run: Path, ids: list[list[int]]) -> list[int]:
    """Which of the rows the run uses for validation, found by their tokens."""
    [folder] = (run / "data").glob("examples-*")
    lengths, evaluation = (np.load(folder / f"{name}.npy") for name in ("lengths", "heldout"))
    examples = np.split(np.fromfile(folder / "tokens.bin", np.int32), np.cumsum(lengths)[:-1])
    assert len(examples) == len(ids) and all(
        example.tolist() == theirs for example, theirs in zip(examples, ids, strict=True)
    )
    return np.flatnonzero(evaluation).tolist()


def test_metrics_count_the_tokens_trained_on(trained):
    run, _ = trained
    rows, done = rows_of(run), json.loads((run / "done.json").read_text())
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1)) and done["step"] == len(rows)
    assert rows[-1]["train/epoch"] == 2 and rows[0]["train/epoch"] < 0.5
    assert unregistered(rows, "sft") == []
    for row in rows:
        assert 0 < row["train/loss_tokens"] < row["train/tokens"] and row["train/token_imbalance"] == 0
        assert 0 < row["train/packing_efficiency"] <= 1
    full = sum(row["train/packing_efficiency"] for row in rows[:-1]) / (len(rows) - 1)
    print(f"{full:.3f} of the positions hold tokens")
    assert full > 0.8
    # Both epochs have every training token once.
    lengths, evaluation = (np.load(next((run / "data").glob(f"*/{name}.npy"))) for name in ("lengths", "heldout"))
    assert sum(row["train/tokens"] for row in rows) == done["consumed_tokens"] == 2 * lengths[~evaluation].sum()
    assert sum(row["train/examples"] for row in rows) == 2 * (~evaluation).sum()
    assert len((run / "bad_rows.txt").read_text().splitlines()) == BAD
    saved = Tokenizer.load(next((run / "checkpoints").iterdir()) / "tokenizer")
    assert saved.settings["chat_template"] == QWEN_MARKED


@pytest.fixture(scope="module")
def taught(trained, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A smaller model, distilled from the trained one beside the conversations; and the command that did it."""
    teacher, command = trained
    if "model.tied_embeddings=true" not in command:
        pytest.skip("distillation is tested with one family; the other is the fixture's other parameter")
    base, smaller = tmp_path_factory.mktemp("taught"), ["model.num_layers=1", "model.hidden_size=32"]
    smaller.append("model.vocab_size=520")
    publish(base / "hf", "qwen", [*KINDS["qwen"], *smaller])
    settings = (f"sft.teacher.from='{teacher}'", "sft.teacher.weight=0.75", "sft.teacher.top_k=16")
    command = [*command, *smaller, *settings, f"init.from='hf:{base / 'hf'}'", f"root='{base}'"]
    sft(command)
    return base / "run", command


@pytest.mark.timeout(240)
def test_a_smaller_model_is_distilled_from_a_teacher(taught):
    rows = rows_of(taught[0])
    assert unregistered(rows, "sft") == []
    for row in rows:
        assert row["train/loss"] == pytest.approx(
            0.25 * row["train/cross_entropy"] + 0.75 * row["train/distillation_loss"], rel=1e-5
        )
    measured = [row for row in rows if "eval/loss" in row]
    assert all(row["eval/perplexity"] == pytest.approx(np.exp(row["eval/loss"])) for row in measured)
    first, last = rows[0], rows[-1]
    print({name: (first[name], last[name]) for name in ("train/cross_entropy", "train/distillation_loss")})
    assert last["train/distillation_loss"] < 0.5 * first["train/distillation_loss"]
    assert measured[-1]["eval/loss"] < 0.8 * first["eval/loss_before"]


@pytest.mark.timeout(240)
def test_a_resumed_run_ends_like_an_undisturbed_one(taught, tmp_path):
    """Beside a teacher, which no checkpoint holds."""
    run, command = taught
    undisturbed = shutil.copytree(run, tmp_path / "undisturbed")
    shutil.rmtree(max((run / "checkpoints").glob("step-*")))
    (run / "done.json").unlink()
    stopped = int(max((run / "checkpoints").glob("step-*")).name.removeprefix("step-"))
    assert 0 < stopped < len(rows_of(run))
    sft(command)
    for found, expected in zip(rows_of(run), rows_of(undisturbed), strict=True):
        assert reproducible(found) == reproducible(expected)
    assert rows_of(run)[-1]["perf/mfu"] != rows_of(undisturbed)[-1]["perf/mfu"]  # they are other rows
    assert same_bits(*(dict(find_weights(str(each)).tensors) for each in (run, undisturbed)))


def test_steps_are_those_of_the_epochs_or_fewer():
    config = load("sft", ["train.global_batch_size=8", "train.micro_batch_size=8"])
    assert with_epoch_steps(config, 81).train.steps == 11 and with_epoch_steps(config, 80).train.steps == 10
    short = replace(config, train=replace(config.train, steps=7))
    assert with_epoch_steps(short, 81).train.steps == 7
    with pytest.raises(ConfigError, match=r"^train\.schedule\.warmup_steps=5: must be below train.steps=2$"):
        with_epoch_steps(config, 16)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["init.from=a", "sft.source=files"], "sft.datasets={}: must name a source"),
        (
            ["init.from=a", "train.schedule.batch_ramp.tokens=9", "train.schedule.batch_ramp.start=8"],
            "train.schedule.batch_ramp.tokens=9: must be 0",
        ),
        (["init.from=a", "parallel.context=2"], "sft.packing=best_fit: must be none where parallel.context"),
    ],
)
def test_what_it_cannot_do_is_refused(overrides, message):
    with pytest.raises(ConfigError) as refused:
        check(load("sft", overrides))
    assert str(refused.value).startswith(message)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(300)
def test_interleaved_stages_train_and_evaluate_unpacked_examples_as_one_rank(dialogues, tmp_path):
    shape = [*KINDS["llama"], "model.num_layers=4"]
    publish(tmp_path / "hf", "llama", shape)
    common = [
        *shape,
        *("sft.source=files", f"sft.datasets.sums.path='{dialogues}'", "sft.chat_template=tokenizer"),
        *(
            f"sft.max_bad_rows={BAD}",
            f"sft.eval_examples={EVAL_EXAMPLES}",
            "sft.packing=none",
            "train.steps=3",
            "train.schedule.warmup_steps=1",
        ),
        *("train.sequence_length=96", "train.global_batch_size=16", "train.micro_batch_size=4"),
        *(f"init.from='hf:{tmp_path / 'hf'}'", f"root='{tmp_path}'", "platform=cpu", "threads=1", "track=off"),
    ]
    sft([*common, "name=one"])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    stages = ["parallel.pipeline=2", "parallel.virtual_pipeline=2", "name=stages"]
    run_to_the_end([*launcher, "megatron_r1", "sft", *common, *stages], seconds=200)
    one, several = (rows_of(tmp_path / name) for name in ("one", "stages"))
    assert len(one) == len(several) == 3 and "eval/loss_before" in one[0] and "eval/loss" in one[-1]
    for key in ("train/loss", "train/gradient_norm", "eval/loss_before", "eval/loss"):
        found, expected = ([row[key] for row in rows if key in row] for rows in (several, one))
        assert found == pytest.approx(expected, rel=1e-5), key
