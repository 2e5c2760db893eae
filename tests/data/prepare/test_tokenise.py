"""A folder from files: complete, the same for any number of workers, gone on with after a stop, honest about rows."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from megatron_r1.config.data import DataConfig
from megatron_r1.data.prepare import tokenise as module
from megatron_r1.data.prepare.options import TokeniseOptions
from megatron_r1.data.prepare.tokenise import tokenise
from megatron_r1.data.pretraining.shards import open_shards
from megatron_r1.data.synthetic.train_tokenizer import train_tokenizer
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import ConfigError, DataError, FolderInUse
from tests.support.texts import contents, some_texts, write_jsonl

TEXTS = some_texts(1500, longest=20)
TEN = "one two three four five six seven eight nine ten"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """a.jsonl, b.txt, c.jsonl, and a tokenizer."""
    folder = tmp_path_factory.mktemp("inputs")
    write_jsonl(folder / "a.jsonl", TEXTS[:900])
    (folder / "b.txt").write_text(TEXTS[900])
    write_jsonl(folder / "c.jsonl", TEXTS[901:])
    train_tokenizer(DataConfig(num_documents=200)).save(folder / "tokenizer")
    return folder


@pytest.fixture
def options(inputs) -> TokeniseOptions:
    names = tuple(str(inputs / name) for name in ("a.jsonl", "b.txt", "c.jsonl"))
    return TokeniseOptions(inputs=names, fim_rate=0.0, shard_bytes=15_000)


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory) -> dict[str, bytes]:
    """What two workers make."""
    folder = tmp_path_factory.mktemp("whole")
    names = tuple(str(inputs / name) for name in ("a.jsonl", "b.txt", "c.jsonl"))
    progress: list[module.TokeniseProgress] = []
    options = TokeniseOptions(inputs=names, fim_rate=0.0, shard_bytes=15_000)
    tokenise(options, inputs / "tokenizer", folder, 2, on_progress=progress.append)
    sizes = sum(Path(name).stat().st_size for name in names)
    assert [p.done_bytes for p in progress] == sorted(p.done_bytes for p in progress)
    assert (progress[0].done_bytes, progress[-1].done_bytes, progress[-1].total_bytes) == (0, sizes, sizes)
    assert progress[-1].documents == len(TEXTS)
    return contents(folder)


def test_every_document_is_there_once_in_order(whole, inputs, tmp_path):
    for name, content in whole.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    shards, tokenizer = open_shards(tmp_path), Tokenizer.load(tmp_path / "tokenizer")
    assert len(shards.parts) > 5
    texts = [tokenizer.decode(shards.tokens(n, 1, int(length) - 1)) for n, length in enumerate(shards.lengths)]
    assert texts == TEXTS
    totals = shards.manifest["totals"]
    assert totals["documents"] == totals["rows"] == len(TEXTS) and totals["tokens"] == shards.lengths.sum()
    assert whole["quarantine.txt"] == b"" and "work" not in {name.split("/")[0] for name in whole}


@pytest.mark.parametrize("workers", [1, 3])
def test_the_number_of_workers_changes_no_byte(whole, inputs, options, tmp_path, workers):
    tokenise(options, inputs / "tokenizer", tmp_path, workers)
    assert contents(tmp_path) == whole


def test_a_stopped_job_does_the_rest(whole, inputs, options, tmp_path):
    class Stop(Exception):
        pass

    def stop(progress):
        if progress.documents:
            raise Stop

    with pytest.raises(Stop):
        tokenise(options, inputs / "tokenizer", tmp_path, 1, on_progress=stop)
    done = {path: path.stat().st_mtime_ns for path in tmp_path.glob("shard-*.bin")}
    assert 0 < len(done) < sum(name.endswith(".bin") for name in whole)
    (tmp_path / "shard-00099.1.tmp.bin").write_bytes(b"left by a kill")
    lost = sorted(done)[0]
    lost.unlink()  # its record alone does not make it done
    tokenise(options, inputs / "tokenizer", tmp_path, 1)
    assert contents(tmp_path) == whole
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in done.items() if path != lost)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert tokenise(options, inputs / "tokenizer", tmp_path, 1)["documents"] == len(TEXTS)
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}


def test_another_job_does_not_mix_in(whole, inputs, options, tmp_path):
    for name, content in whole.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=r"seed=0, not 1"):
        tokenise(replace(options, seed=1), inputs / "tokenizer", tmp_path)
    other = train_tokenizer(DataConfig(num_documents=300, vocab_size=600))
    other.save(tmp_path / "other")
    with pytest.raises(DataError, match="another tokenizer"):
        tokenise(options, tmp_path / "other", tmp_path)
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange/file").write_text("")
    with pytest.raises(DataError, match="holds file; must be empty"):
        tokenise(options, inputs / "tokenizer", tmp_path / "strange")
    copied = shutil.copytree(inputs, tmp_path / "inputs")
    own = replace(options, inputs=(str(copied / "c.jsonl"),))
    tokenise(own, inputs / "tokenizer", tmp_path / "own")
    with (copied / "c.jsonl").open("a") as file:
        file.write('{"text": "more"}\n')
    with pytest.raises(DataError, match=r"other inputs: .*c\.jsonl has changed"):
        tokenise(own, inputs / "tokenizer", tmp_path / "own")


def test_two_programs_do_not_share_a_folder(inputs, options, tmp_path):
    descriptor = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(FolderInUse, match="is in use"):
        tokenise(options, inputs / "tokenizer", tmp_path)
    os.close(descriptor)


def test_dropped_rows_are_listed_and_limited(inputs, tmp_path):
    lines = [json.dumps({"text": f"good {n}"}) for n in range(300)]
    lines[7], lines[250] = '{"text": 1}', "{"
    lines[100] = json.dumps({"text": f"so {TEN}."})
    rows, held = tmp_path / "rows.jsonl", tmp_path / "held.jsonl"
    rows.write_text("\n".join(lines))
    held.write_text(json.dumps({"question": f"{TEN}?"}) + '\n{"question": "short"}\n')
    options = TokeniseOptions(
        inputs=(str(rows),),
        fim_rate=0.0,
        shard_bytes=1000,
        decontaminate=(str(held),),
        decontaminate_fields=("question",),
    )
    with pytest.raises(
        DataError, match=r"max_bad_rows=1: 2 rows cannot be used; the first: .*rows\.jsonl:8:field text"
    ):
        tokenise(options, inputs / "tokenizer", tmp_path / "out", 1, max_bad_rows=1)
    totals = tokenise(options, inputs / "tokenizer", tmp_path / "out", 1, max_bad_rows=2)
    assert totals["documents"] == 297 and (totals["bad"], totals["contaminated"]) == (2, 1)
    assert totals["too_short_to_match"] == 1
    assert (tmp_path / "out/quarantine.txt").read_text().splitlines() == [
        f"{rows}:8:field text is not text",
        f"{rows}:101:shares 10 words in a row with {held}:1",
        f"{rows}:251:is not JSON (unexpected end of data)",
    ]
    assert len(open_shards(tmp_path / "out").lengths) == 297


def test_nothing_but_bad_rows_leaves_no_shard(inputs, tmp_path):
    (tmp_path / "a.jsonl").write_text("{}\n")
    options = TokeniseOptions(inputs=(str(tmp_path / "a.jsonl"),), fim_rate=0.0)
    assert tokenise(options, inputs / "tokenizer", tmp_path / "out", 1, max_bad_rows=1)["bad"] == 1
    assert len(open_shards(tmp_path / "out").lengths) == 0 and not list((tmp_path / "out").glob("shard*"))


def test_a_bad_evaluation_row_is_refused_before_any_work(inputs, options, tmp_path):
    (tmp_path / "held.jsonl").write_text('{"text": "a"}\n{}\n')
    with pytest.raises(DataError, match=r"held\.jsonl:2:field text is missing"):
        tokenise(replace(options, decontaminate=(str(tmp_path / "held.jsonl"),)), inputs / "tokenizer", tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_a_killed_worker_is_one_line(whole, inputs, options, tmp_path):
    def kill(progress):
        for child in psutil.Process().children():
            if "spawn_main" in " ".join(child.cmdline()):
                child.send_signal(signal.SIGKILL)

    with pytest.raises(DataError, match="a worker was killed"):
        tokenise(options, inputs / "tokenizer", tmp_path, 1, on_progress=kill)
    tokenise(options, inputs / "tokenizer", tmp_path, 1)
    assert contents(tmp_path) == whole


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": ()}, "inputs=: must name at least one file"),
        ({"inputs": ("a", "a")}, "inputs=a a: must not name one twice"),
        ({"fields": ()}, "fields=: must name at least one field"),
        ({"fim_rate": 1.1}, r"fim_rate=1\.1: must lie between"),
        ({"punctuation_split_rate": -0.1}, r"punctuation_split_rate=-0\.1: must lie between"),
        ({"ngram": 1}, "ngram=1: must be at least 2"),
        ({"shard_bytes": 0}, "shard_bytes=0: must be at least 1"),
    ],
)
def test_options_out_of_range_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        TokeniseOptions(**{"inputs": ("a",)} | change)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: flip(folder / "shard-00001.bin"), r"shard-00001\.bin: has SHA-256 .* instead of"),
        (lambda folder: flip(folder / "shard-00001.idx"), r"shard-00001\.idx: has SHA-256"),
        (lambda folder: flip(folder / "tokenizer/tokenizer.json"), r"tokenizer\.json: has SHA-256"),
        (lambda folder: (folder / "shard-00001.bin").unlink(), r"shard-00001\.bin: cannot be read"),
        (lambda folder: (folder / "shard-00001.bin").write_bytes(b"x"), r"shard-00001\.bin: has 1 bytes instead of"),
        (lambda folder: flip(folder / "manifest.json"), r"manifest\.json: is damaged"),
        (lambda folder: (folder / "manifest.json").unlink(), r"holds no manifest\.json: must be the finished output"),
    ],
)
def test_damage_is_detected_on_opening(whole, tmp_path, damage, message):
    for name, content in whole.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    open_shards(tmp_path)
    damage(tmp_path)
    with pytest.raises(DataError, match=message):
        open_shards(tmp_path)
    if "SHA-256" in message and "idx" not in message:
        assert len(np.unique(open_shards(tmp_path, hashes=False).lengths)) > 1


def flip(path: Path) -> None:
    """Change the last bit of a byte in the middle."""
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
