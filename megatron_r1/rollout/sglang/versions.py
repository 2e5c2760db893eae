"""Which weights an answer may come from: those that were current when it was asked for, or newer ones.

An answer that weights changed under has several versions. SGLang tells them by spans of its tokens; here they are the
version of the first token and, for every change, the place of the first token after it.
"""

from __future__ import annotations

from collections.abc import Container
from itertools import pairwise
from typing import Any


class Versions:
    """The versions that servers were given, in order."""

    def __init__(self, first: str):
        self._given = [first]

    @property
    def current(self) -> str:
        """The version that was given last."""
        return self._given[-1]

    def give(self, version: str) -> None:
        """The servers have another version from now on."""
        self._given.append(version)

    def from_now_on(self) -> Container[str]:
        """The current version and whatever is given later."""
        return _Since(self._given, len(self._given) - 1)


class _Since:
    def __init__(self, given: list[str], start: int):
        self._given, self._start = given, start

    def __contains__(self, version: object) -> bool:
        return version in self._given[self._start :]

    def __str__(self) -> str:
        return repr(self._given[self._start])


def versions_of(meta: dict[str, Any], tokens: int, allowed: Container[str]) -> tuple[str, tuple[tuple[int, str], ...]]:
    """Version of the first token, and (place, version) of each token from which on it is another.

    Args:
        meta: ``meta_info`` of a reply.
        tokens: of the response.
        allowed: versions that any of them may have.

    Raises:
        ValueError: the spans do not cover the response, or one has another version.
    """
    last = meta["weight_version"]
    spans = meta.get("weight_versions") or [{"version": last, "start": 0, "end": tokens}]
    places = [0, *(span["end"] for span in spans)]
    if [span["start"] for span in spans] != places[:-1] or places[-1] != tokens or places != sorted(set(places)):
        raise ValueError(f"weight versions are of other tokens than the {tokens} of the response: {str(spans)[:200]}")
    for version in (last, *(span["version"] for span in spans)):
        if version not in allowed:
            raise ValueError(f"weight version {version!r} where {allowed} was expected")
    changes = [(span["start"], span["version"]) for span in spans]
    later = tuple(new for old, new in pairwise(changes) if new[1] != old[1])
    return changes[0][1], later
