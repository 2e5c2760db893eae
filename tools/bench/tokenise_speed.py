"""Tokens per second of one core, beside `datasets` with `tokenizers` doing the same: JSONL in, token ids on disk.

`tools/bench/tokenise_speed.py FILE --tokenizer FOLDER [--fields question answer] [--repeat 8] [--rounds 3]`

The kinds take turns, each in a process of its own with one worker and one thread. A second is a second of a core
(user and system, children included), so that other work on the machine does not count; what counts is all that a
process does, from its start to its last byte.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

KINDS = {
    "datasets": "datasets + tokenizers, map(batched=True)",
    "plain": "tokenise, begin and end tokens only",
    "full": "tokenise, infilling, split punctuation, 10-gram decontamination",
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="JSONL")
    parser.add_argument("--tokenizer", required=True, type=Path, metavar="FOLDER")
    parser.add_argument("--fields", nargs="+", default=["text"])
    parser.add_argument("--decontaminate", type=Path, metavar="FILE", help="for the third kind")
    parser.add_argument("--repeat", type=int, default=8, help="copies of the file that make the input")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--measure", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def with_datasets(given: argparse.Namespace) -> int:
    """What a user of the two libraries would write."""
    import datasets
    import pyarrow.compute
    from tokenizers import Tokenizer

    datasets.disable_progress_bars()
    tokenizer = Tokenizer.from_file(str(given.tokenizer / "tokenizer.json"))

    def encode(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        texts = ["\n".join(parts) for parts in zip(*(batch[name] for name in given.fields), strict=True)]
        found = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return {"ids": [[0, *encoding.ids, 1] for encoding in found]}

    rows = datasets.load_dataset("json", data_files=str(given.file), split="train", cache_dir=str(given.output))
    # A name for the result spares the hashing of the tokenizer, which finds results of earlier calls.
    done = rows.map(encode, batched=True, remove_columns=rows.column_names, new_fingerprint="ids")
    return int(pyarrow.compute.sum(pyarrow.compute.list_value_length(done.data.column("ids"))).as_py())


def with_tokenise(given: argparse.Namespace) -> int:
    """The same by this package, one worker."""
    from megatron_r1.data.prepare.options import TokeniseOptions
    from megatron_r1.data.prepare.tokenise import tokenise

    rate = 0.1 if given.measure == "full" else 0.0
    against = (str(given.decontaminate),) if given.measure == "full" and given.decontaminate else ()
    options = TokeniseOptions(
        inputs=(str(given.file),),
        fields=tuple(given.fields),
        fim_rate=rate,
        punctuation_split_rate=rate,
        decontaminate=against,
    )
    return int(tokenise(options, given.tokenizer, given.output)["tokens"])


def measured(kind: str, given: argparse.Namespace, source: Path) -> tuple[int, float]:
    """Tokens and seconds of a core."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, str(source), "--measure", kind, "--output", f"{folder}/out"]
        command += ["--tokenizer", str(given.tokenizer), "--fields", *given.fields]
        command += ["--decontaminate", str(given.decontaminate)] if given.decontaminate else []
        quiet = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | quiet) as process:
            assert process.stdout is not None
            output = process.stdout.read()
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{kind}: failed with exit code {process.returncode}")
        return json.loads(output)["tokens"], usage.ru_utime + usage.ru_stime


def main() -> None:
    given = arguments()
    if given.measure:
        tokens = with_datasets(given) if given.measure == "datasets" else with_tokenise(given)
        print(json.dumps({"tokens": tokens}))
        return
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "input.jsonl"
        source.write_bytes(given.file.read_bytes() * given.repeat)
        rates: dict[str, list[float]] = {kind: [] for kind in KINDS}
        for _ in range(given.rounds):
            for kind in KINDS:
                tokens, seconds = measured(kind, given, source)
                rates[kind].append(tokens / seconds)
        print(f"{source.stat().st_size / 1e6:.1f} MB, {given.rounds} rounds; tokens per second of a core, median (all)")
    base = statistics.median(rates["datasets"])
    for kind, title in KINDS.items():
        median = statistics.median(rates[kind])
        every = " ".join(f"{rate:.0f}" for rate in rates[kind])
        print(f"{title:<66} {median:>9.0f}  {median / base:.2f} times datasets  ({every})")


if __name__ == "__main__":
    main()
