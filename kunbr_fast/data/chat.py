"""A chat as the tokenizer's template writes it, and where the assistant's turns stand in it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kunbr_fast.files.models import reason
from kunbr_fast.files.shown import plain, shown


def chat(record: Mapping, tokenizer: Any, date: str) -> tuple[str, list[tuple[int, int]]]:
    """The chat as the tokenizer's template writes it, and the spans of the assistant's turns."""
    where, messages = record["_where"], record["messages"]
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(f"{where}: 'messages' need a tokenizer with a chat template; use prompt + completion")

    if not isinstance(tokenizer.chat_template, (str, Mapping)):
        raise ValueError(
            f"{named(tokenizer)}: its tokenizer's chat_template is {shown(tokenizer.chat_template)}, expected text"
        )

    def written(part: list[dict], **options: bool) -> str:
        try:
            return tokenizer.apply_chat_template(part, tokenize=False, **options)
        except Exception as error:  # whatever the template's own code raises
            raise ValueError(
                f"{where}: the tokenizer's chat template does not take these messages: {reason(error)} (the template "
                f"of {named(tokenizer)})"
            ) from error

    text = written(messages)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before, after = written(messages[:i], add_generation_prompt=True), written(messages[: i + 1])
            if not (text.startswith(before) and text.startswith(after.rstrip())):
                raise ValueError(f"{where}: this chat template rewrites earlier turns; use prompt + completion")
            spans.append((len(before), len(after)))
    if not spans:
        raise ValueError(f"{where}: no assistant message to learn from")
    return text, spans


def named(tokenizer: Any) -> str:
    return plain(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)
