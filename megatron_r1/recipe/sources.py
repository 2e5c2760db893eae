"""Reads the sources of a curation as candidates, always in the same order, so that a row is known by its index."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_r1.config.curate import CurateConfig, CurateSourceConfig, HeldOutConfig
from megatron_r1.data.row_files import BadRow, numbered_rows, rows_of
from megatron_r1.data.row_sources import RowSource
from megatron_r1.errors import ConfigError
from megatron_r1.files import digest_of, read_json
from megatron_r1.recipe.candidate import Candidate, candidate_of
from megatron_r1.recipe.review import NO_REVIEW, Review


@dataclass(frozen=True, slots=True)
class BadCandidate:
    """A row that cannot be read."""

    source: str
    location: str
    reason: str


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file of a source as it was read."""

    path: str
    sha256: str
    rows: int


@dataclass(frozen=True, slots=True)
class ScannedSource:
    """A source as it was read: its files, and what is known of the model that wrote it."""

    name: str
    path: str
    files: tuple[SourceFile, ...]
    sampled_from: dict[str, Any] | None
    """Weights that a run of `sample` used, and the hash of their manifest; None where the files lie in no such run."""

    @property
    def rows(self) -> int:
        return sum(file.rows for file in self.files)

    def as_record(self) -> dict[str, Any]:
        return asdict(self)


def check_sources(config: CurateConfig) -> None:
    """Refuse a curation without sources, and one whose sources name no rows.

    Raises:
        ConfigError: names the key.
    """
    if not config.sources:
        raise ConfigError("curate.sources", "{}", "must name a source: curate.sources.NAME.path=FILE")
    for name, source in config.sources.items():
        _row_source(name, source).files()


def scan_sources(config: CurateConfig) -> list[ScannedSource]:
    """Hash every file and count its rows; raises as `rows_of`."""
    scanned = []
    for name, source in config.sources.items():
        files = [
            SourceFile(str(path), digest_of(path), sum(1 for _ in numbered_rows(path)))
            for path in _row_source(name, source).files()
        ]
        scanned.append(ScannedSource(name, source.path, tuple(files), _sampled_from(Path(files[0].path))))
    return scanned


def read_candidates(config: CurateConfig, review: Review = NO_REVIEW) -> Iterator[Candidate | BadCandidate]:
    """All rows of all sources, in order, as a person decided about them."""
    for name, source in config.sources.items():
        for location, id, row in rows_of(_row_source(name, source).files()):
            try:
                yield review.decided(candidate_of(row, name, source, location, id))
            except BadRow as error:
                yield BadCandidate(name, location, str(error))


def held_out_files(config: HeldOutConfig) -> list[dict[str, str]]:
    """Path and hash of every file with evaluation prompts; raises as `RowSource.files`."""
    files = [file for path in config.paths for file in held_out_source(path, config).files()]
    return [{"path": str(file), "sha256": digest_of(file)} for file in files]


def held_out_source(path: str, config: HeldOutConfig) -> RowSource:
    """The rows of one path with evaluation prompts."""
    return RowSource(Path(path), config.split, "", "curate.held_out.paths", "curate.held_out.split")


def _row_source(name: str, source: CurateSourceConfig) -> RowSource:
    keys = (f"curate.sources.{name}.{key}" for key in ("path", "split", "subset"))
    return RowSource(Path(source.path), source.split, source.subset, *keys)


def _sampled_from(file: Path) -> dict[str, Any] | None:
    """The weights that the run of `sample` that wrote a file recorded."""
    plan = file.parent / "parts" / "plan.json"
    if not plan.is_file():
        return None
    recorded = read_json(plan)
    return {name: recorded.get(name) for name in ("weights", "weights_sha256", "seed")}
