"""Tokenise text into megatron-core's indexed format: `tools/tokenise.py FILE... --tokenizer FOLDER --output FOLDER`.

JSON Lines, a JSON array, Parquet, Arrow, plain text (one document a file) and the folders of Hugging Face datasets. The
same command again goes on after a kill. What is left out, bad rows and rows that an evaluation set contains, is listed
in OUTPUT/quarantine.txt as file:row:reason.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from megatron_r1.data.prepare.options import TokeniseOptions
from megatron_r1.data.prepare.sources import input_files
from megatron_r1.data.prepare.tokenise import TokeniseProgress, tokenise
from megatron_r1.data.row_files import FORMATS
from megatron_r1.errors import ExitCode, UserError

LINE_S = 10.0
"""Seconds between lines where there is no terminal for a bar."""


def arguments() -> argparse.Namespace:
    defaults = TokeniseOptions(inputs=("-",))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("inputs", nargs="+", metavar="FILE", help=f"{FORMATS}, .txt or a dataset's folder, in this order")
    add("--split", default="train", help="of a folder (default: train)")
    add("--subset", default="", help="configuration of a folder that has several (default: its README's)")
    add("--tokenizer", required=True, type=Path, metavar="FOLDER", help="tokenizer.json and tokenizer_config.json")
    add("--output", required=True, type=Path, metavar="FOLDER", help="where the shards go")
    add("--fields", nargs="+", default=defaults.fields, help="of a row; one line break between them (default: text)")
    add("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: cores)")
    add("--seed", type=int, default=defaults.seed)
    add("--fim-rate", type=float, default=defaults.fim_rate, help="share of documents that fill in the middle")
    add(
        "--punctuation-split-rate",
        type=float,
        default=defaults.punctuation_split_rate,
        help="share of the tokens of punctuation and line breaks that are split",
    )
    add("--decontaminate", nargs="+", default=(), metavar="FILE", help="evaluation sets to stay clear of")
    add("--decontaminate-split", default="test", help="of a folder of --decontaminate (default: test)")
    add("--decontaminate-fields", nargs="+", default=(), help="of an evaluation row (default: as --fields)")
    add("--ngram", type=int, default=defaults.ngram, help="words in a row that count as contamination")
    add("--shard-mib", type=float, default=defaults.shard_bytes / 2**20, help="MiB of input per shard")
    add("--max-bad-rows", type=int, default=100, help="rows that may be quarantined before the work stops")
    return parser.parse_args()


class Bar:
    """A progress bar on a terminal, elsewhere a line now and then."""

    def __init__(self) -> None:
        self._console = Console(file=sys.stderr, highlight=False)
        columns = (BarColumn(), DownloadColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self.progress = Progress(
            TextColumn("tokenise"),
            *columns,
            TextColumn("{task.fields[counts]}"),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self.progress.add_task("tokenise", total=None, counts="")
        self._spoken = time.monotonic()

    def on_progress(self, status: TokeniseProgress) -> None:
        counts = f"{status.documents} documents  {status.tokens} tokens  {status.bad_rows} bad rows"
        self.progress.update(self._task, total=status.total_bytes, completed=status.done_bytes, counts=counts)
        if not self._console.is_terminal and time.monotonic() - self._spoken > LINE_S:
            self._spoken = time.monotonic()
            share = status.done_bytes / max(1, status.total_bytes)
            self._console.print(f"tokenise {share:.1%}  {counts}", soft_wrap=True)


def main() -> int:
    given = arguments()
    bar = Bar()
    try:
        options = TokeniseOptions(
            inputs=input_files(given.inputs, given.split, given.subset, "inputs"),
            fields=tuple(given.fields),
            seed=given.seed,
            fim_rate=given.fim_rate,
            punctuation_split_rate=given.punctuation_split_rate,
            decontaminate=input_files(given.decontaminate, given.decontaminate_split, "", "decontaminate"),
            decontaminate_fields=tuple(given.decontaminate_fields),
            ngram=given.ngram,
            shard_bytes=int(given.shard_mib * 2**20),
        )
        with bar.progress:
            totals = tokenise(
                options, given.tokenizer, given.output, max(1, given.workers), given.max_bad_rows, bar.on_progress
            )
    except UserError as error:
        print(f"tokenise: {' '.join(str(error).split())}", file=sys.stderr)
        return int(error.exit_code)
    print("  ".join(f"{name} {count}" for name, count in totals.items()))
    return int(ExitCode.DONE)


if __name__ == "__main__":
    sys.exit(main())
