"""Where programs that this one starts put their sockets and caches, on machines where the usual places do not do."""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path

from megatron_r1.errors import PlatformError

logger = logging.getLogger(__name__)

SOCKET_BYTES = 107
"""Longest path of a Unix socket (unix(7): sun_path)."""
INSIDE = len("/megatron_r1-server-XXXXXXXX/pymp-XXXXXXXX/listener-XXXXXXXX")
"""What libraries add to the path of the folder for temporary files."""
OTHERS = ("/tmp", "/var/tmp")


def folder_for_sockets() -> Path:
    """The folder for temporary files (TMPDIR), or where its path is too long, another that exists everywhere.

    Raises:
        PlatformError: none of them can be written.
    """
    own = tempfile.gettempdir()
    for folder in (own, *OTHERS):
        if len(os.fsencode(folder)) + INSIDE <= SOCKET_BYTES and os.access(folder, os.W_OK | os.X_OK):
            if folder != own:
                logger.info("TMPDIR=%s is too long for sockets: those of servers are in %s", own, folder)
            return Path(folder)
    raise PlatformError(
        f"TMPDIR={own}: must have at most {SOCKET_BYTES - INSIDE} characters for the sockets of servers: "
        f"{' and '.join(OTHERS)} cannot be written either"
    )


def home_for_caches(folder: Path) -> dict[str, str]:
    """HOME for a program that keeps caches there: `folder` where the user's own cannot be written, else unchanged."""
    if os.access(os.path.expanduser("~"), os.W_OK | os.X_OK):
        return {}
    return {"HOME": str(folder)}
