"""What one check found on one node."""

from __future__ import annotations

from dataclasses import dataclass

OK, WARNING, FAILED = "ok", "warning", "FAILED"
STATES = (OK, WARNING, FAILED)
"""A later one outweighs an earlier one."""


@dataclass(frozen=True, slots=True)
class NodeFinding:
    """One check's result on one node."""

    node: str
    check: str
    state: str
    """One of `STATES`."""
    what: str
    change: str = ""
    """What to do."""


def table(findings: list[NodeFinding]) -> str:
    """One row for each check, with the nodes on which it passed of those that made it; then one line for each node on
    which it is not ok."""
    rows = [("check", "nodes", "state", "found")]
    for check in dict.fromkeys(one.check for one in findings):
        own = [one for one in findings if one.check == check]
        worst = max((one.state for one in own), key=STATES.index)
        nodes = {one.node for one in own}
        sound = nodes - {one.node for one in own if one.state == FAILED}
        shown = next(one.what for one in own if one.state == worst)
        rows.append((check, f"{len(sound)}/{len(nodes)}", worst, shown))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [
        "  ".join([*(text.ljust(width) for text, width in zip(row, widths, strict=False)), row[3]]) for row in rows
    ]
    lines += [line_of(one) for one in findings if one.state != OK]
    return "\n".join(lines)


def line_of(finding: NodeFinding) -> str:
    change = f": {finding.change}" if finding.change else ""
    return f"preflight: {finding.state} on {finding.node}: {finding.check}: {finding.what}{change}"
