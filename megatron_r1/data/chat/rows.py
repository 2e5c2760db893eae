"""A row of a dataset as a conversation: messages with roles, or a prompt and its response."""

from __future__ import annotations

from typing import Any

from megatron_r1.config.sft import ConversationsConfig
from megatron_r1.data.row_files import BadRow

ROLES = ("system", "user", "assistant")
_OTHER_NAMES = {"human": "user", "gpt": "assistant"}

Conversation = list[dict[str, Any]]
"""Messages, each with `role` and `content`, and further fields that a chat template may read."""


def conversation_of(row: Any, config: ConversationsConfig, system_prompt: str = "") -> Conversation:
    """The conversation of a row; its last message is the assistant's.

    Args:
        row: content of a line of JSONL or of a row of a table.
        system_prompt: put before a conversation that has none of its own; empty puts none.

    Raises:
        BadRow: the row is no such conversation.
    """
    if not isinstance(row, dict):
        raise BadRow("is not a JSON object")
    if row.get("tools"):
        raise BadRow("has tools, which are not supported")
    if row.get(config.messages_field) is not None:
        messages = _messages(row[config.messages_field], config.messages_field)
    else:
        messages = _prompt_and_response(row, config)
    if system_prompt and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system_prompt})
    return messages


def _prompt_and_response(row: dict[str, Any], config: ConversationsConfig) -> Conversation:
    messages = []
    fields = {"system": config.system_field, "user": config.prompt_field, "assistant": config.response_field}
    for role, name in fields.items():
        if role == "system" and not row.get(name):
            continue
        if name not in row:
            raise BadRow(f"has neither {config.messages_field} nor {name}")
        messages.append({"role": role, "content": _text(row[name], name)})
    return messages


def _messages(value: Any, name: str) -> Conversation:
    if not isinstance(value, list) or not value:
        raise BadRow(f"{name} is not a list of messages")
    messages = []
    for number, item in enumerate(value, 1):
        where = f"message {number}"
        if not isinstance(item, dict):
            raise BadRow(f"{where} is not an object")
        # In a table, fields that a message lacks are None.
        message = {key: part for key, part in item.items() if part is not None}
        role = message.pop("role", message.pop("from", None))
        role = _OTHER_NAMES.get(role, role) if isinstance(role, str) else role
        if role not in ROLES:
            raise BadRow(f"{where} has the role {role!r}; known are {', '.join(ROLES)}")
        if role == "system" and number > 1:
            raise BadRow(f"{where} has the role system, which only the first may have")
        content = _text(message.pop("content", message.pop("value", None)), f"{where}: content")
        messages.append({"role": role, "content": content, **message})
    if messages[-1]["role"] != "assistant":
        raise BadRow("does not end with a message of the assistant")
    if messages[0]["role"] == "assistant":
        raise BadRow("begins with a message of the assistant")
    return messages


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"{name} is not text")
    if not value.strip():
        raise BadRow(f"{name} is empty")
    return value
