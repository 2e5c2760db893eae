"""Nodes exchange what they found by files of the run folder, so that the exchange itself checks that it is shared.

Each node writes NODE.json and reads every other node's; then writes NODE.read.json with what came of that. The first
node reads those, and writes verdict.json, for which all ranks wait.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from megatron_r1.cluster.preflight.finding import FAILED, OK, NodeFinding
from megatron_r1.files import write_whole

CHECK = "run folder"
POLL_S = 0.2
VERDICT = "verdict.json"
CHANGE = "put the run (root=) on a disk that all nodes share"


class Exchange:
    """One node's side."""

    def __init__(self, folder: Path, node: str, nodes: Sequence[str], wait_s: float):
        """
        Args:
            folder: of this attempt of the job, in the run folder.
            node: this one's name.
            nodes: of all nodes, the first one first.
            wait_s: seconds for another node's file to appear.
        """
        self._folder, self._node, self._nodes, self._wait_s = folder, node, nodes, wait_s

    def share(self, findings: Iterable[NodeFinding]) -> list[NodeFinding]:
        """Write this node's findings, and read every other node's; returns what came of that.

        Raises:
            OSError: the folder cannot be written.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        _write(self._folder / f"{self._node}.json", findings)
        missing = self._wait_for([f"{node}.json" for node in self._nodes], self._wait_s)
        found = [
            NodeFinding(self._node, CHECK, FAILED, f"does not see what {name.removesuffix('.json')} wrote", CHANGE)
            for name in missing
        ]
        found = found or [NodeFinding(self._node, CHECK, OK, f"{self._folder.parent.parent}: written and read by all")]
        _write(self._folder / f"{self._node}.read.json", found)
        return found

    def gather(self) -> list[NodeFinding]:
        """On the first node: all findings of all nodes; a node that is silent is one."""
        # A node waits for the others before it says what it could not read.
        missing = self._wait_for([f"{node}.read.json" for node in self._nodes], 1.5 * self._wait_s)
        found = []
        for node in self._nodes:
            for name in (f"{node}.json", f"{node}.read.json"):
                if (path := self._folder / name).is_file():
                    found += [NodeFinding(**one) for one in json.loads(path.read_text())]
            if f"{node}.read.json" in missing:
                found.append(
                    NodeFinding(node, CHECK, FAILED, "the node does not answer", "read its log beside this one")
                )
        return found

    def decide(self, ok: bool) -> None:
        """On the first node: tell all ranks whether to go on."""
        write_whole(self._folder / VERDICT, json.dumps(ok).encode())

    def wait_for_verdict(self) -> bool:
        """Whether all nodes are as they must be; no where the first node does not say so."""
        if self._wait_for([VERDICT], 3 * self._wait_s):
            return False
        ok: bool = json.loads((self._folder / VERDICT).read_text())
        return ok

    def _wait_for(self, names: Sequence[str], wait_s: float) -> list[str]:
        """Names of files that do not appear in time."""
        deadline, missing = time.monotonic() + wait_s, list(names)
        while True:
            # A listing, not a look at each file: network file systems remember for a while that a file was not there.
            present = set(os.listdir(self._folder)) if self._folder.is_dir() else set()
            missing = [name for name in missing if name not in present]
            if not missing or time.monotonic() > deadline:
                return missing
            time.sleep(POLL_S)


def _write(path: Path, findings: Iterable[NodeFinding]) -> None:
    write_whole(path, json.dumps([asdict(one) for one in findings]).encode())
