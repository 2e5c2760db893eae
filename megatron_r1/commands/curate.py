"""curate: filters, balances and mixes generated data, and writes what training reads, with a data sheet."""

from __future__ import annotations

from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from megatron_r1.config.run import RunConfig
from megatron_r1.config.schema import resolved
from megatron_r1.files import digest_of
from megatron_r1.recipe.data_sheet import DataSheet, warn_of_shortfalls, write_sheet
from megatron_r1.recipe.filters.build import build_filters, contamination
from megatron_r1.recipe.filters.right import Verdicts
from megatron_r1.recipe.outputs import Kept, dropped_examples, write_outputs
from megatron_r1.recipe.pairs import preference_pairs
from megatron_r1.recipe.pass_rates import pass_rates
from megatron_r1.recipe.review import read_review
from megatron_r1.recipe.screening import BAD_ROW, Screened, Screening
from megatron_r1.recipe.selection import Selection, select
from megatron_r1.recipe.sources import ScannedSource, check_sources, held_out_files, scan_sources
from megatron_r1.rewards.accuracy import Accuracy
from megatron_r1.runs.folder import mark_done, open_run_folder

PARTS = "parts"


def run(config: RunConfig) -> None:
    """Curate, or resume a curation."""
    curate = config.curate
    check_sources(curate)
    review, filters = read_review(curate.review), build_filters(config)
    folder = open_run_folder(config)
    scanned = scan_sources(curate)
    rows = sum(source.rows for source in scanned)
    with closing(Accuracy(config.reward)) if curate.verdict == "verify" else nullcontext() as accuracy:
        without_verdict = [name for name, source in curate.sources.items() if "right" in source.skip]
        verdicts = Verdicts(accuracy, without_verdict)
        screening = Screening(folder / PARTS, curate, filters, verdicts, review, plan_of(config, scanned))
        screened = screening.run(rows)
    selection = select(screened, curate, config.seed)
    kept = chosen(config, screened, selection)
    held_out = contamination(config) if kept.prompts else None
    written = write_outputs(folder, curate, kept, rows, review, held_out)
    record = DataSheet(config, scanned, screened, selection, kept, review, written).record(folder)
    write_sheet(folder, record)
    report(folder, record)
    mark_done(folder, {"outputs": record["outputs"]})


def plan_of(config: RunConfig, scanned: list[ScannedSource]) -> dict[str, Any]:
    """What the parts of a curation depend on."""
    review = config.curate.review
    return {
        "curate": resolved(config.curate),
        "eval_fraction": config.data.eval_fraction,
        "verifier": config.reward.verifier,
        "answer_format": config.reward.answer_format,
        "judge": resolved(config.reward.judge_config),
        "sources": [source.as_record() for source in scanned],
        "held_out": held_out_files(config.curate.held_out),
        "review_sha256": digest_of(Path(review)) if review else None,
    }


def chosen(config: RunConfig, screened: Screened, selection: Selection) -> Kept:
    """The rows that the outputs need."""
    curate, rows = config.curate, selection.kept
    if not {"conversations", "samples", "review"} & {*curate.outputs}:
        rows = rows[:0]
    if curate.shuffle:
        rows = np.random.default_rng([config.seed, 5]).permutation(rows)
    facts = screened.facts
    readable = facts["reason"] != screened.reasons.index(BAD_ROW)
    return Kept(
        rows=rows,
        dropped=dropped_examples(screened, selection, curate.dropped_examples, config.seed),
        prompts=pass_rates(facts, readable, curate.pass_rate) if "prompts" in curate.outputs else None,
        pairs=preference_pairs(screened, selection.kept, curate.pairs, config.seed)
        if "pairs" in curate.outputs
        else [],
    )


def report(folder: Path, record: dict[str, Any]) -> None:
    """Show what each filter dropped, and what was written."""
    warn_of_shortfalls(record)
    console = Console(stderr=True)
    for row in [*record["filters"], *record.get("prompts", ())]:
        line = f"  {row['name']:<16} {row['in']:>11,} in {row['dropped']:>11,} dropped {row['out']:>11,} out"
        console.print(line, soft_wrap=True, highlight=False)
    for name, output in record["outputs"].items():
        console.print(f"{folder}/{name}: {output['rows']:,} rows", soft_wrap=True, highlight=False)
