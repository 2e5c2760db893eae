"""A row of a dataset as a conversation: messages with roles, or a prompt and its response.

Whatever a row says about a message is honoured or refuses the row: a response with `weight` or `loss` 0 stays out of
the loss, and further fields reach the chat template, which must read them (encode.py).
"""

from __future__ import annotations

from typing import Any

from megatron_r1.config.sft import ConversationsConfig
from megatron_r1.data.row_files import MEDIA_FIELDS, PROMPT_FIELDS, TOOL_FIELDS, BadRow, as_object, refuse_fields

ROLES = ("system", "user", "assistant")
_OTHER_NAMES = {"human": "user", "gpt": "assistant"}
IN_LOSS = "in_loss"
"""Field of a message that is False for a response that must not be trained on, and absent in all others."""
_TEXT_FIELDS = ("content", "value")
_LOSS_FIELDS = ("weight", "loss")

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
    row = as_object(row)
    refuse_fields(row, (*TOOL_FIELDS, *MEDIA_FIELDS, "chat_template_kwargs"))
    if row.get(config.messages_field) is not None:
        messages = _messages(row[config.messages_field], config.messages_field)
        _add_system(messages, row.get(config.system_field), config.system_field)
    else:
        messages = _prompt_and_response(row, config)
    if system_prompt and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system_prompt})
    return messages


def _add_system(messages: Conversation, system: Any, name: str) -> None:
    """Put the system prompt of a row's own field before its messages."""
    if not system:
        return
    if messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": _text(system, name)})
    elif messages[0]["content"] != system:
        raise BadRow(f"has {name} and a message of the role system")


def _prompt_and_response(row: dict[str, Any], config: ConversationsConfig) -> Conversation:
    messages = []
    fields = {"system": config.system_field, "user": config.prompt_field, "assistant": config.response_field}
    for role, name in fields.items():
        if role == "system" and not row.get(name):
            continue
        if name not in row:
            raise BadRow(f"has neither {config.messages_field} nor {name}")
        messages.append({"role": role, "content": _text(row[name], name)})
    refuse_fields(row, (name for name in PROMPT_FIELDS if name not in fields.values()))
    return messages


def _messages(value: Any, name: str) -> Conversation:
    if not isinstance(value, list) or not value:
        raise BadRow(f"{name} is not a list of messages")
    messages = [_message(item, number) for number, item in enumerate(value, 1)]
    if messages[-1]["role"] != "assistant":
        raise BadRow("does not end with a message of the assistant")
    if messages[0]["role"] == "assistant":
        raise BadRow("begins with a message of the assistant")
    if not any(message["role"] == "assistant" and message.get(IN_LOSS, True) for message in messages):
        raise BadRow("has no response to train on: the weight or loss of all of them is 0")
    return messages


def _message(item: Any, number: int) -> dict[str, Any]:
    where = f"message {number}"
    if not isinstance(item, dict):
        raise BadRow(f"{where} is not an object")
    # In a table, fields that a message lacks are None; elsewhere they may be empty, which says nothing either.
    message = {name: part for name, part in item.items() if part not in (None, [], "") or name in _TEXT_FIELDS}
    role = message.pop("role", message.pop("from", None))
    role = _OTHER_NAMES.get(role, role) if isinstance(role, str) else role
    if role not in ROLES:
        raise BadRow(f"{where} has the role {role!r}; known are {', '.join(ROLES)}")
    if role == "system" and number > 1:
        raise BadRow(f"{where} has the role system, which only the first may have")
    refuse_fields(message, TOOL_FIELDS, f"{where} ")
    flags = [_flag(message.pop(name), f"{where}: {name}") for name in _LOSS_FIELDS if name in message]
    content = _text(message.pop("content", message.pop("value", None)), f"{where}: content")
    if IN_LOSS in message:
        raise BadRow(f"{where} has the unknown field {IN_LOSS}")
    if len(set(flags)) > 1:
        raise BadRow(f"{where} has a weight and a loss that differ")
    if True in flags and role != "assistant":
        raise BadRow(f"{where} has the role {role}, and only responses of the assistant are trained on")
    unlearned = {IN_LOSS: False} if False in flags and role == "assistant" else {}
    return {"role": role, "content": content, **message, **unlearned}


def _flag(value: Any, name: str) -> bool:
    if value not in (0, 1):
        raise BadRow(f"{name} is {value!r}, and must be 0 or 1")
    return bool(value)


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"{name} is not text")
    if not value.strip():
        raise BadRow(f"{name} is empty")
    return value
