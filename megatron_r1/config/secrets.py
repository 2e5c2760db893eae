"""Secrets: which names of variables mean one, and texts in which they are masked."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping

MASK = "***"
SHORTEST = 6
"""Characters of the shortest value that is masked: shorter ones stand in ordinary text."""
SECRET_NAME = re.compile(
    r"(?:^|_)(?:API_?KEYS?|KEY|TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|JWT)(?:_|$)", re.IGNORECASE
)
PUBLISHED_FORMS = re.compile(
    r"\b(?:sk-[\w-]{16,}|hf_\w{16,}|gh[opsru]_\w{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|AKIA[A-Z0-9]{16}"
    r"|xox[abprs]-[\w-]{10,})"
)
"""Forms of keys that their services publish: OpenAI, Hugging Face, GitHub, GitLab, AWS, Slack."""
IN_ADDRESS = re.compile(r"(\w://)[^\s/@:]*:[^\s/@]+@")
ASSIGNED = re.compile(r"\b([A-Z][A-Z0-9_]*)(['\"]?\s*[=:]\s*['\"]?)([^\s'\";$][^\s'\";]*)")


def is_secret(name: str) -> bool:
    """Whether a variable of this name holds a secret, such as WANDB_API_KEY or HF_TOKEN."""
    return SECRET_NAME.search(name) is not None


def secrets_of(environment: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """The values of an environment that are secrets by their names, longest first."""
    found = {value.strip() for name, value in environment.items() if is_secret(name)}
    return tuple(sorted((value for value in found if len(value) >= SHORTEST), key=lambda value: (-len(value), value)))


def without_secrets(text: str, secrets: Iterable[str]) -> str:
    """The text with these values, keys of published forms, passwords in addresses and values of secret names masked."""
    for value in secrets:
        text = text.replace(value, MASK)
    text = PUBLISHED_FORMS.sub(MASK, text)
    text = IN_ADDRESS.sub(rf"\1{MASK}@", text)
    return ASSIGNED.sub(lambda found: f"{found[1]}{found[2]}{MASK}" if is_secret(found[1]) else found[0], text)
