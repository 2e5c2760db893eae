"""The weight versions that a completion may have: the one that was current when it was requested, or newer ones.

A response that was generated while weights changed has several versions. SGLang reports them by spans of its tokens;
here they are the version of the first token and, for every change, the index of the first token after it.
"""

from __future__ import annotations

from collections.abc import Container


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
