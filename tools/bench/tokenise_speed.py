"""Tokenising beside `datasets` with `tokenizers` doing the same: JSONL in, token ids on disk, on all cores, in turns.

`tools/bench/tokenise_speed.py FILE --tokenizer FOLDER [--fields question answer] [--repeat 8] [--rounds 5]`

Each way is a process of its own, and what counts is all that it does, from its start to its last byte. `datasets` maps
with as many processes as there are cores, or with the tokenizer's own threads: the faster one is what ours is compared
with. Both sides must give the same ids. Repetitions of the file make tokens familiar to both sides, so a file that is
long by itself says more.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from tools.bench.comparison import Way, alternate, describe, seconds_of

WAYS = {
    "datasets, processes": "map(batched=True) in as many processes as cores",
    "datasets, threads": "the same in one process, with the tokenizer's threads",
    "tokenise": "begin and end tokens only, as above",
    "tokenise, all": "with infilling, split punctuation and 10-gram decontamination",
}
CORES = len(os.sched_getaffinity(0))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="JSONL")
    parser.add_argument("--tokenizer", required=True, type=Path, metavar="FOLDER")
    parser.add_argument("--fields", nargs="+", default=["text"])
    parser.add_argument("--decontaminate", type=Path, metavar="FILE", help="for the last way")
    parser.add_argument("--repeat", type=int, default=8, help="copies of the file that make the input")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def with_datasets(given: argparse.Namespace) -> None:
    """What a user of the two libraries would write."""
    import datasets
    from tokenizers import Tokenizer

    datasets.disable_progress_bars()
    tokenizer = Tokenizer.from_file(str(given.tokenizer / "tokenizer.json"))

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        texts = ["\n".join(parts) for parts in zip(*(batch[name] for name in given.fields), strict=True)]
        found = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return {"ids": [[0, *encoding.ids, 1] for encoding in found]}

    rows = datasets.load_dataset("json", data_files=str(given.file), split="train", cache_dir=str(given.output))
    # A name for the result spares the hashing of the tokenizer, which finds results of earlier calls.
    processes = CORES if given.way == "datasets, processes" else None
    rows.map(
        encode,
        batched=True,
        remove_columns=rows.column_names,
        new_fingerprint="ids",
        num_proc=processes,
        cache_file_name=str(given.output / "ids.arrow"),
    )


def with_tokenise(given: argparse.Namespace) -> None:
    """The same by this package."""
    from megatron_r1.data.prepare.options import TokeniseOptions
    from megatron_r1.data.prepare.tokenise import tokenise

    rate = 0.1 if given.way == "tokenise, all" else 0.0
    options = TokeniseOptions(
        inputs=(str(given.file),),
        fields=tuple(given.fields),
        fim_rate=rate,
        punctuation_split_rate=rate,
        decontaminate=(str(given.decontaminate),) if rate and given.decontaminate else (),
        shard_bytes=4 << 20,  # enough of them for all cores
    )
    tokenise(options, given.tokenizer, given.output, CORES)


def start(way: str, given: argparse.Namespace, source: Path, output: Path) -> None:
    """One way, in a process of its own.

    Raises:
        SystemExit: it failed.
    """
    command = [sys.executable, __file__, str(source), "--way", way, "--output", str(output)]
    command += ["--tokenizer", str(given.tokenizer), "--fields", *given.fields]
    command += ["--decontaminate", str(given.decontaminate)] if given.decontaminate else []
    threads = "true" if way == "datasets, threads" else "false"
    settings = {"TOKENIZERS_PARALLELISM": threads, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if subprocess.run(command, env=os.environ | settings, check=False).returncode:
        raise SystemExit(f"{way}: failed")


def ids_of(output: Path) -> np.ndarray:
    """All token ids that a way wrote, in order."""
    if not (output / "manifest.json").exists():
        import datasets

        files = sorted(output.glob("ids*.arrow"))
        return np.concatenate(
            [datasets.Dataset.from_file(str(file)).data.column("ids").combine_chunks().flatten() for file in files]
        )
    from megatron_r1.data.pretraining.shards import open_shards

    return np.concatenate([part.tokens for part in open_shards(output).parts])


def main() -> None:
    given = arguments()
    if given.way:
        (with_datasets if given.way.startswith("datasets") else with_tokenise)(given)
        return
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "input.jsonl"
        source.write_bytes(given.file.read_bytes() * given.repeat)
        tokens = {}
        for way in list(WAYS)[:3]:
            start(way, given, source, Path(folder) / way)
            ids = ids_of(Path(folder) / way).astype(np.int64)
            tokens[way] = len(ids), hashlib.sha256(ids).hexdigest()
        if len(set(tokens.values())) > 1:
            raise SystemExit(f"the ways give other tokens: {tokens}")

        def measured(way: str) -> Way:
            def once() -> float:
                with tempfile.TemporaryDirectory() as output:
                    return seconds_of(lambda: start(way, given, source, Path(output) / "out"))()

            return once

        found = alternate({way: measured(way) for way in WAYS}, given.rounds, warm_up=0)
        print(f"{source.stat().st_size / 1e6:.1f} MB, {given.rounds} rounds, {CORES} cores")
    count = next(iter(tokens.values()))[0]
    base = min(list(WAYS)[:2], key=lambda way: statistics.median(found[way]))
    print(describe(found, base, count / 1e6, "M tokens"))


if __name__ == "__main__":
    main()
