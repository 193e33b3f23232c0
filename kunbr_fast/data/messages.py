"""The messages of a chat: what each must have, and which of its keys need not be read."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Collection, Mapping
from typing import Any

from kunbr_fast.data.forms import is_annotation
from kunbr_fast.files.shown import shown

ASSISTANT = "assistant"
# other names of the assistant's role, whose turns would have no loss
ALIKE = frozenset(
    "assist aiassistant assistantai gpt chatgpt model aimodel languagemodel llm bot aibot robot chatbot ai".split()
)
TOOLS = ("tool", "function", "ipython", "environment", "observation")
# What an API wants in a tool's message, and few templates write: which call it answers, and which tool.
OF_TOOLS = frozenset(("tool_call_id", "call_id", "tool_name", "name"))
# names that say which messages have a loss, or how much: train_on_turn, lossMask; and those of which it is known how
WHETHER_LOSS = re.compile(r"(?:^|[\W_]|(?<=[a-z])(?=[A-Z]))(?i:weight|train|loss|mask|ignor|skip|learn|superv)")
HOW = frozenset("weight loss_weight loss has_loss train trainable train_on_turn".split())
FORM = '{"role": str, "content": str}'


def check_messages(messages: Any, where: str) -> None:
    """ValueError, beginning with `where`, unless each message has a role and a content, and the assistant's has its
    name."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{where}: 'messages' must be a list of {FORM}, got {shown(messages)}")
    for number, message in enumerate(messages, 1):
        of = f"message {number} of {len(messages)}"
        if (wrong := _wrong(message)) is not None:
            raise ValueError(f"{where}: 'messages' must be a list of {FORM}, and {of} is {shown(message)}{wrong}")
        if _means_assistant(message["role"]):
            raise ValueError(
                f"{where}: {of} has the role {shown(message['role'], 40)}, and only turns of the role 'assistant' have "
                "a loss: write 'assistant' if it is one"
            )


def _wrong(message: Any) -> str | None:
    """The cure for what is no message; None for one that is."""
    if not isinstance(message, dict):
        return ""
    if {"from", "value"} <= message.keys():
        return ": write 'role' (user, assistant, system) for 'from', and 'content' for 'value'"
    if not isinstance(message.get("role"), str):
        return ": its 'role' must be a string: user, assistant, system"
    content = message.get("content")
    if isinstance(content, str):
        return None
    if isinstance(content, list):
        return ": its content is a list of parts: join their texts into one string"
    if content is None:
        return ': it has no content: write "content": "" beside its other keys, or leave the message out'
    return ": its content must be a string"


def _means_assistant(role: str) -> bool:
    """Whether a role that is not 'assistant' is so by its letters: 'Assistant ', 'GPT-4', 'asistant'."""
    if role in (ASSISTANT, "user", "system", *TOOLS):
        return False
    letters = re.sub(r"[\W\d_]+", "", unicodedata.normalize("NFKC", role)).casefold()[:40]
    return letters in ALIKE or bool(difflib.get_close_matches(letters, [ASSISTANT], 1, 0.88))


def without_keys(messages: Any, ignored: Collection[str]) -> Any:
    """The messages without these keys, but for those that each must have."""
    if not isinstance(messages, list):
        return messages
    left_out = {*ignored} - {"role", "content"}
    return [
        {key: value for key, value in m.items() if key not in left_out} if isinstance(m, dict) else m for m in messages
    ]


def says_something(key: str, value: Any) -> bool:
    """Whether a template could write something of it: exports have `"tool_calls": []`, `"function_call": null`."""
    return key in ("role", "content") or not (value is None or isinstance(value, (list, dict)) and not value)


def is_unread(message: Mapping[str, Any], key: str) -> bool:
    """Whether a key of a message need not be read: an annotation, or one that says what is so: that a turn of the
    assistant's has a loss, and another message none."""
    value, role = message[key], message["role"]
    if value == "" or isinstance(key, str) and key.startswith("_"):
        return True
    if key == "name" or key in OF_TOOLS:
        return role in TOOLS
    says_how = key in HOW and isinstance(value, (bool, int, float))
    return is_annotation(key) or (says_how and value == (role == ASSISTANT))
