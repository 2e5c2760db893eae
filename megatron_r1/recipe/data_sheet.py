"""The data sheet of a generated dataset: where its rows are from, what each filter did, and what was written."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from megatron_r1.config.run import RunConfig
from megatron_r1.config.schema import resolved
from megatron_r1.files import digest_of, write_whole
from megatron_r1.recipe.outputs import Kept
from megatron_r1.recipe.review import Review
from megatron_r1.recipe.screening import Screened
from megatron_r1.recipe.selection import Selection, SelectionStep
from megatron_r1.recipe.sources import ScannedSource, held_out_files

logger = logging.getLogger(__name__)

SHEET, PAGE = "sheet.json", "sheet.md"


@dataclass(frozen=True)
class DataSheet:
    """What a curation did. Its record names no time and no machine: equal data have equal sheets."""

    config: RunConfig
    scanned: Sequence[ScannedSource]
    screened: Screened
    selection: Selection
    kept: Kept
    review: Review
    written: Mapping[str, int]
    """Name of each output -> its rows."""

    def record(self, folder: Path) -> dict[str, Any]:
        """The content of sheet.json."""
        curate, prompts = self.config.curate, self.kept.prompts
        record = {
            "seed": self.config.seed,
            "sources": [self._source(each) for each in self.scanned],
            "filters": list(self._filters()),
            "quotas": self._quotas(),
            "settings": {name: resolved(curate)[name] for name in ("filters", "limits", "verdict", "style")},
            "held_out": {"files": held_out_files(curate.held_out)} | resolved(curate.held_out),
            "outputs": {
                name: {"rows": rows, "sha256": digest_of(folder / name)} for name, rows in self.written.items()
            },
        }
        if prompts:
            record["prompts"] = [_step(step) for step in prompts.steps]
        if curate.review:
            record["review"] = {"file": curate.review, "sha256": digest_of(Path(curate.review))} | self.review.counts()
        return record

    def _source(self, scanned: ScannedSource) -> dict[str, Any]:
        versions = self.screened.versions.get(scanned.name, [])
        domain = self.config.curate.sources[scanned.name].domain
        kept = int((self.screened.facts["source"][self.selection.kept] == self._index(scanned.name)).sum())
        return scanned.as_record() | {
            "rows": scanned.rows, "kept": kept, "domain": domain or "of each row", "weight_versions": versions,
        }  # fmt: skip

    def _index(self, source: str) -> int:
        return self.screened.sources.index(source)

    def _filters(self) -> Iterator[dict[str, Any]]:
        """Rows in and out of each filter, in the order in which they are applied."""
        rows = len(self.screened.facts)
        for name, by_source in self.screened.drops().items():
            yield self._filter(name, rows, by_source)
            rows -= int(by_source.sum())
        for step in self.selection.steps:
            sources = self.screened.facts["source"][step.dropped]
            yield self._filter(step.name, step.rows_in, np.bincount(sources, minlength=len(self.screened.sources)))

    def _filter(self, name: str, rows_in: int, by_source: np.ndarray) -> dict[str, Any]:
        dropped = int(by_source.sum())
        counts = dict(zip(self.screened.sources, by_source.tolist(), strict=True))
        return {"name": name, "in": rows_in, "dropped": dropped, "out": rows_in - dropped, "dropped_by_source": counts}

    def _quotas(self) -> dict[str, dict[str, int]]:
        """Domain -> rows that are kept, its quota, and how many are missing."""
        domains = self.screened.facts["domain"][self.selection.kept]
        quotas = self.config.curate.quotas
        found = {}
        for domain in dict.fromkeys([*self.screened.domains, *quotas]):
            rows = int((domains == self.screened.domains.get(domain, -1)).sum())
            found[domain] = {"rows": rows}
            if domain in quotas:
                found[domain] |= {"quota": quotas[domain], "shortfall": quotas[domain] - rows}
        return found


def write_sheet(folder: Path, record: dict[str, Any]) -> None:
    """Write sheet.json and the same as a page of Markdown."""
    write_whole(folder / PAGE, markdown(record).encode())
    write_whole(folder / SHEET, orjson.dumps(record, option=orjson.OPT_INDENT_2))


def warn_of_shortfalls(record: Mapping[str, Any]) -> None:
    """Log every domain that has fewer rows than its quota, and decisions of a person whose rows were not found."""
    for domain, found in record["quotas"].items():
        if found.get("shortfall"):
            logger.warning("quota of %s: %d of %d rows", domain, found["rows"], found["quota"])
    if lost := record.get("review", {}).get("without a row"):
        logger.warning("%s: %d decisions are about rows that no source holds", record["review"]["file"], lost)


def markdown(record: Mapping[str, Any]) -> str:
    """The sheet for people."""
    lines = ["# Data sheet", "", f"Seed {record['seed']}.", "", "## Sources", ""]
    lines += table(
        ("source", "domain", "rows", "kept", "weights", "files"),
        (
            (
                source["name"],
                source["domain"],
                source["rows"],
                source["kept"],
                _weights(source),
                "<br>".join(f"{file['path']} ({file['sha256'][:12]})" for file in source["files"]),
            )
            for source in record["sources"]
        ),
    )
    lines += ["", "## Filters", "", *_steps("rows", record["filters"])]
    if prompts := record.get("prompts"):
        lines += ["", "## Prompts", "", *_steps("prompts", prompts)]
    lines += ["", "## Domains", ""]
    lines += table(
        ("domain", "rows", "quota", "shortfall"),
        (
            (name, each["rows"], each.get("quota", ""), each.get("shortfall", ""))
            for name, each in record["quotas"].items()
        ),
    )
    if review := record.get("review"):
        counts = ", ".join(f"{value} {name}" for name, value in review.items() if name not in ("file", "sha256"))
        lines += ["", "## Review", "", f"{review['file']}: {counts}."]
    lines += ["", "## Outputs", ""]
    outputs = ((name, output["rows"], output["sha256"]) for name, output in record["outputs"].items())
    lines += table(("file", "rows", "SHA-256"), outputs)
    return "\n".join([*lines, ""])


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Lines of a Markdown table."""
    cells = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(str(cell) for cell in row)} |" for row in cells]


def _steps(what: str, steps: Iterable[Mapping[str, Any]]) -> list[str]:
    rows = ([step[key] for key in ("name", "in", "dropped", "out")] for step in steps)
    return table(("filter", f"{what} in", "dropped", "out"), rows)


def _weights(source: Mapping[str, Any]) -> str:
    sampled_from = source["sampled_from"] or {}
    digest = sampled_from.get("weights_sha256") or ""
    names = [f"{sampled_from['weights']} ({digest[:12]})"] if sampled_from.get("weights") else []
    return ", ".join([*names, *source["weight_versions"]])


def _step(step: SelectionStep) -> dict[str, Any]:
    dropped = len(step.dropped)
    return {"name": step.name, "in": step.rows_in, "dropped": dropped, "out": step.rows_in - dropped}
