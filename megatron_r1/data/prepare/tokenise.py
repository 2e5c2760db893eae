"""Tokenise files into a folder of shards with many workers; a restart after a kill makes the missing shards.

The same files and options give the same bytes for any number of workers and however often the program was killed: the
plan decides the shards, random draws are addressed by file and row, and a shard without a record is made again.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import wait as wait_for_end
from pathlib import Path
from typing import Any

import orjson

from megatron_r1.data.prepare.decontaminate import Evaluation, NgramIndex
from megatron_r1.data.prepare.encode import DocumentEncoder
from megatron_r1.data.prepare.options import TokeniseOptions
from megatron_r1.data.prepare.plan import Plan, check_same, make_plan
from megatron_r1.data.prepare.shard import WORK, ShardMaker, read_record
from megatron_r1.data.prepare.sources import InputSpan, read, scan
from megatron_r1.data.pretraining.shards import QUARANTINE, TOKENIZER, read_manifest, write_manifest
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import DataError
from megatron_r1.files import canonical_json, digest_of, take_lock, write_whole

POLL_S = 0.2


@dataclass(frozen=True, slots=True)
class TokeniseProgress:
    """Progress of the program."""

    done_bytes: int
    total_bytes: int
    documents: int
    """In complete shards."""
    tokens: int
    bad_rows: int


OnProgress = Callable[[TokeniseProgress], None]


def tokenise(
    options: TokeniseOptions,
    tokenizer_folder: Path,
    folder: Path,
    workers: int = 1,
    max_bad_rows: int = 0,
    on_progress: OnProgress = lambda progress: None,
) -> dict[str, Any]:
    """Tokenise the options' inputs into `folder`, or finish a folder that an earlier call left incomplete.

    Args:
        tokenizer_folder: with `tokenizer.json` and `tokenizer_config.json`; a copy goes into `folder`.
        folder: output; created if missing. After a kill, the same folder again.
        workers: number of processes.
        max_bad_rows: rows that may be quarantined; with more, the program stops with an error.
        on_progress: called with the progress, several times a second.

    Returns:
        The totals that the manifest records.

    Raises:
        ConfigError: an input or option cannot be used.
        DataError: an input cannot be read, the folder was started with other options, or too many rows are bad.
            Complete shards stay.
    """
    tokenizer = Tokenizer.load(tokenizer_folder)
    plan = make_plan(options, tokenizer)
    contamination = NgramIndex(evaluations(options), options.ngram)
    DocumentEncoder(tokenizer, options, contamination)  # fails here, once, rather than in every worker
    folder.mkdir(parents=True, exist_ok=True)
    with take_lock(folder, "two programs cannot write to one folder"):
        if manifest := read_manifest(folder):
            check_same(manifest["plan"], plan.description, folder)
            shutil.rmtree(folder / WORK, ignore_errors=True)
            totals: dict[str, Any] = manifest["totals"]
            return totals
        _pin(folder, plan, tokenizer)
        records = _make_shards(folder, options, plan, workers, max_bad_rows, on_progress)
        return _finish(folder, plan, records, len(contamination.too_short))


def _pin(folder: Path, plan: Plan, tokenizer: Tokenizer) -> None:
    """Write the plan into a new folder, or compare it with the folder's own; remove half-written files of a kill."""
    pinned = folder / WORK / "plan.json"
    if pinned.exists():
        check_same(orjson.loads(pinned.read_bytes()), plan.description, folder)
    elif others := [path.name for path in folder.iterdir() if path.name not in (WORK, TOKENIZER)]:
        raise DataError(f"{folder}: holds {sorted(others)[0]}; must be empty or the unfinished output of this program")
    for left in (*folder.glob("*.tmp*"), *folder.glob(f"{WORK}/*.tmp")):
        left.unlink()
    (folder / WORK).mkdir(exist_ok=True)
    tokenizer.save(folder / TOKENIZER)
    write_whole(pinned, canonical_json(plan.description))


def _make_shards(
    folder: Path, options: TokeniseOptions, plan: Plan, workers: int, max_bad_rows: int, on_progress: OnProgress
) -> list[dict[str, Any]]:
    """Make the missing shards; returns every shard's record, in order."""
    records = {number: record for number in range(len(plan.shards)) if (record := read_record(folder, number))}
    left = [number for number in range(len(plan.shards)) if number not in records]
    before = sum(span.size for number in records for span in plan.shards[number])
    context = mp.get_context("spawn")  # a fork would copy the locks of running threads
    done_bytes = context.Value("q", before)

    def report_progress() -> None:
        counts = [record["counts"] for record in records.values()]
        documents, tokens = (sum(count[key] for count in counts) for key in ("documents", "tokens"))
        on_progress(TokeniseProgress(done_bytes.value, plan.input_bytes, documents, tokens, len(_bad_rows(records))))

    report_progress()
    _check_bad_rows(records, max_bad_rows)
    if not left:
        return [records[number] for number in range(len(plan.shards))]
    pool = ProcessPoolExecutor(
        min(workers, len(left)), context, initializer=_start_worker, initargs=(folder, options, done_bytes)
    )
    try:
        waiting: set[Future[Any]] = {pool.submit(_make_shard, number, plan.shards[number]) for number in left}
        while waiting:
            finished, waiting = wait(waiting, POLL_S, FIRST_COMPLETED)
            for future in finished:
                number, record = future.result()
                records[number] = record
                _check_bad_rows(records, max_bad_rows)
            report_progress()
    except BrokenProcessPool as error:
        raise DataError(f"{folder}: a worker was killed; the same command resumes") from error
    finally:
        pool.shutdown(cancel_futures=True)
    return [records[number] for number in range(len(plan.shards))]


def _bad_rows(records: dict[int, dict[str, Any]]) -> list[str]:
    return [row for _, record in sorted(records.items()) for row in record["bad"]]


def _check_bad_rows(records: dict[int, dict[str, Any]], limit: int) -> None:
    if len(bad := _bad_rows(records)) > limit:
        raise DataError(f"max_bad_rows={limit}: {len(bad)} rows cannot be used; the first: {bad[0]}")


_maker: ShardMaker
"""One per worker process; made once, because a large tokenizer takes a second to load."""


def _start_worker(folder: Path, options: TokeniseOptions, done_bytes: Any) -> None:
    global _maker
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # One worker process runs on each core that the user gives: threads inside a worker would compete for these cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = Tokenizer.load(folder / TOKENIZER)
    encoder = DocumentEncoder(tokenizer, options, NgramIndex(evaluations(options), options.ngram))

    def on_progress(size: int) -> None:
        with done_bytes.get_lock():
            done_bytes.value += size

    _maker = ShardMaker(folder, options.inputs, options.fields, tokenizer.vocab_size, encoder, on_progress)


def _end_with_parent() -> None:
    """Exit with the parent process: without it, a worker would wait for work forever."""
    parent = mp.parent_process()
    assert parent is not None
    wait_for_end([parent.sentinel])
    os._exit(1)


def _make_shard(number: int, spans: list[InputSpan]) -> tuple[int, dict[str, Any]]:
    return number, _maker.make(number, spans)


def evaluations(options: TokeniseOptions) -> Iterator[Evaluation]:
    """The texts of the evaluation files.

    Raises:
        DataError: a row cannot be used; evaluation rows are never dropped.
    """
    for path in options.decontaminate:
        for span in scan(path, 0, options.shard_bytes).spans:
            for row in read(path, span, options.decontaminate_fields or options.fields):
                if row.problem:
                    raise DataError(f"{path}:{row.number}:{row.problem}")
                yield Evaluation(f"{path}:{row.number}", row.text)


def _finish(folder: Path, plan: Plan, records: list[dict[str, Any]], too_short: int) -> dict[str, Any]:
    """Write quarantine and manifest, which completes the folder; returns the manifest's totals."""
    left_out = [row for record in records for row in (*record["bad"], *record["contaminated"])]
    write_whole(folder / QUARANTINE, "".join(f"{row}\n" for row in left_out).encode())
    totals = {key: sum(record["counts"][key] for record in records) for key in records[0]["counts"]} if records else {}
    totals |= {key: sum(len(record[key]) for record in records) for key in ("bad", "contaminated")}
    totals["too_short_to_match"] = too_short
    files = {name: file for record in records for name, file in record["files"].items()}
    for path in (folder / QUARANTINE, *sorted((folder / TOKENIZER).iterdir())):
        files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": digest_of(path)}
    shards = [record["name"] for record in records if record["files"]]
    write_manifest(folder, {"plan": plan.description, "totals": totals, "shards": shards, "files": files})
    shutil.rmtree(folder / WORK)
    return totals
