"""Keys from the environment; no message shows one."""

from __future__ import annotations

import os

from megatron_r1.errors import PlatformError


def api_key(name: str) -> str:
    """The key in an environment variable, without the line break of the file that it came from; empty for none.

    Raises:
        PlatformError: no HTTP header can carry it.
    """
    key = os.environ.get(name, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise PlatformError(f"{name}: must be printable ASCII characters, to be sent in a header (value not shown)")
    return key
