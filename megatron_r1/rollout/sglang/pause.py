"""What becomes of answers that are under way when weights change.

| pause | answers under way | after the update they | caches of the old weights |
|---|---|---|---|
| finish | are waited for: the update begins when they are done | | dropped |
| abort | end where they are, with the reason `abort`: only for others' answers | | dropped |
| retract | give up their cache and wait | are read again and go on under the new weights | dropped |
| in_place | stand still | go on, on keys and values of the old weights | kept, for later requests too |

With retract and in_place one answer has several weight versions, which SGLang tells token by token (`weight_versions`).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Pause:
    """A way to hold a server while its weights change."""

    mode: str | None
    """SGLang's name; None does not pause it."""
    flush_cache: bool = True
    """Whether the cache is dropped with the last bucket. SGLang cannot while answers stand still."""


FINISH = Pause(None)
PAUSES = {
    "finish": FINISH,
    "abort": Pause("abort"),
    "retract": Pause("retract"),
    "in_place": Pause("in_place", flush_cache=False),
}
"""By the name in the configuration."""
