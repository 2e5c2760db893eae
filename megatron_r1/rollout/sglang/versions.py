"""The weight versions that a completion may have: the one that was current when it was requested, or newer ones.

A response that was generated while weights changed has several versions. SGLang reports them by spans of its tokens;
here they are the version of the first token and, for every change, the index of the first token after it.
"""

from __future__ import annotations

from collections.abc import Container
from itertools import pairwise
from typing import Any


class Versions:
    """The versions that the servers have had, in order."""

    def __init__(self, first: str):
        self._all = [first]

    @property
    def current(self) -> str:
        """The newest version."""
        return self._all[-1]

    def add(self, version: str) -> None:
        """The servers have a newer version from now on."""
        self._all.append(version)

    def from_now_on(self) -> Container[str]:
        """The current version and all that are added later."""
        return VersionsSince(self._all, len(self._all) - 1)


class VersionsSince:
    """The versions of a growing list from an index on."""

    def __init__(self, versions: list[str], start: int):
        self._versions, self._start = versions, start

    def __contains__(self, version: object) -> bool:
        return version in self._versions[self._start :]

    def __str__(self) -> str:
        return repr(self._versions[self._start])


def parse_versions(
    meta: dict[str, Any], tokens: int, allowed: Container[str]
) -> tuple[str, tuple[tuple[int, str], ...]]:
    """Version of the first token, and (index, version) of each token at which the version changes.

    Args:
        meta: ``meta_info`` of a reply.
        tokens: length of the response.
        allowed: versions that any of them may have.

    Raises:
        ValueError: the spans do not cover the response, or one has another version.
    """
    last = meta["weight_version"]
    spans = meta.get("weight_versions") or [{"version": last, "start": 0, "end": tokens}]
    bounds = [0, *(span["end"] for span in spans)]
    if [span["start"] for span in spans] != bounds[:-1] or bounds[-1] != tokens or bounds != sorted(set(bounds)):
        raise ValueError(f"weight versions are of other tokens than the {tokens} of the response: {str(spans)[:200]}")
    for version in (last, *(span["version"] for span in spans)):
        if version not in allowed:
            raise ValueError(f"weight version {version!r} where {allowed} was expected")
    starts = [(span["start"], span["version"]) for span in spans]
    changes = tuple(new for old, new in pairwise(starts) if new[1] != old[1])
    return starts[0][1], changes
