"""The planner's page, whose tables the fits keep between comments."""

from __future__ import annotations

from pathlib import Path

import megatron_r1.plan

README = Path(megatron_r1.plan.__file__).with_name("README.md")


def keep_table(begin: str, table: str, end: str) -> None:
    """Put a table in the place of the one between two comments."""
    before, _, rest = README.read_text().partition(begin)
    README.write_text(before + begin + table + end + rest.partition(end)[2])
