"""What happens to responses in flight when weights change.

| pause | responses in flight | after the update they | caches of the old weights |
|---|---|---|---|
| finish | are waited for: the update begins when they are done | | dropped |
| abort | end where they are, with the reason `abort`: only for responses to other programs | | dropped |
| retract | release their cache and wait | are prefilled again and continue under the new weights | dropped |
| in_place | are paused | continue, on keys and values of the old weights | reused, by later requests too |

With retract and in_place one response has several weight versions, which SGLang reports token by token
(`weight_versions`).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Pause:
    """A way to hold a server while its weights change."""

    mode: str | None
    """SGLang's name; None does not pause it."""
    flush_cache: bool = True
    """Whether the cache is dropped with the last bucket. SGLang cannot while responses are paused."""


FINISH = Pause(None)
PAUSES = {
    "finish": FINISH,
    "abort": Pause("abort"),
    "retract": Pause("retract"),
    "in_place": Pause("in_place", flush_cache=False),
}
"""By the name in the configuration."""
