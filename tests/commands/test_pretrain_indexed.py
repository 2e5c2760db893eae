"""Pre-training from tokenised shards, from text to a checkpoint, by the command line."""

from __future__ import annotations

import json

from megatron_r1.config.data import DataConfig
from megatron_r1.data.prepare.options import TokeniseOptions
from megatron_r1.data.prepare.tokenise import tokenise
from megatron_r1.data.synthetic.train_tokenizer import train_tokenizer
from megatron_r1.data.tokenizer import Tokenizer
from tests.support.fork_server import run_forked_to_the_end
from tests.support.texts import some_texts, write_jsonl


def test_text_becomes_a_trained_model(tmp_path):
    train_tokenizer(DataConfig(num_documents=200)).save(tmp_path / "tokenizer")
    for name, count in (("a", 300), ("b", 100)):
        path = write_jsonl(tmp_path / f"{name}.jsonl", some_texts(count, seed=count))
        tokenise(TokeniseOptions(inputs=(str(path),), fim_rate=0.0), tmp_path / "tokenizer", tmp_path / name)
    overrides = [
        "data=indexed",
        f"data.indexed.datasets.a.path='{tmp_path}/a'",
        "data.indexed.datasets.a.weight=3",
        f"data.indexed.datasets.b.path='{tmp_path}/b'",
        "data.indexed.cross_document_attention=false",
        *("model.num_layers=2", "train.steps=6", "train.schedule.warmup_steps=1", "train.log_interval=1"),
        *(f"root='{tmp_path}'", "name=run", "platform=cpu", "threads=1", "track=off"),
    ]
    run_forked_to_the_end("megatron_r1", "pretrain", *overrides)
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert rows[-1]["train/loss"] < rows[0]["train/loss"] and rows[-1]["train/mtp_loss"] < rows[0]["train/mtp_loss"]
    (checkpoint,) = (tmp_path / "run/checkpoints").glob("step-*")
    saved = Tokenizer.load(checkpoint / "tokenizer").fingerprint()
    assert saved == Tokenizer.load(tmp_path / "tokenizer").fingerprint()
