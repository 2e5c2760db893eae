"""Penalty for responses that are too long."""

from __future__ import annotations


def overlong(tokens: int, longest: int, buffer: int) -> float:
    """Soft overlong punishment, from 0 down to -1 (DAPO, section 3.4, equation 13).

    0 up to `longest - buffer` tokens, then linear down to -1 at `longest`, and -1 beyond.
    """
    return max(-1.0, min(0.0, (longest - buffer - tokens) / buffer))
