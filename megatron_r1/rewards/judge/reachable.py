"""Whether a judge's endpoint answers, with or without a key."""

from __future__ import annotations

import urllib.error
import urllib.request


def unreachable(url: str, timeout_s: float) -> str:
    """Why the endpoint does not answer; empty where it does, be it with a refusal."""
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/models", timeout=timeout_s):
            return ""
    except urllib.error.HTTPError:
        return ""
    except (OSError, ValueError) as error:
        return str(getattr(error, "reason", error))
