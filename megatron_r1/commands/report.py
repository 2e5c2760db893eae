"""report: one page about the runs of a recipe."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from megatron_r1.config.run import RunConfig
from megatron_r1.errors import ConfigError
from megatron_r1.report.page import write_report
from megatron_r1.runs.folder import mark_done, open_run_folder


def run(config: RunConfig) -> None:
    """Write ``report.html`` over the runs in `root`."""
    root = Path(config.root)
    if not root.is_dir():
        raise ConfigError("root", config.root, "must be a folder of runs")
    target = root / "report.html"
    write_report(root, target)
    mark_done(open_run_folder(config), {"report": target})
    Console(stderr=True).print(f"report: {target}")
