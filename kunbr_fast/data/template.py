"""A tokenizer's chat template: the text that it makes of messages, on one fixed day, with its own marks of what is
generated.

Both are macros put before the template's text. (transformers hands no function to a template, and passing the day by a
variable would need one; a macro of the same name hides the `strftime_now` that reads the clock.)
"""

from __future__ import annotations

import datetime
import functools
import json
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

from kunbr_fast.files.models import reason
from kunbr_fast.files.shown import plain, shown

MARK = "kunbr_fast_generation"  # the macro in place of {% generation %}
OPENED, CLOSED = f"<{MARK}>", f"</{MARK}>"
_GENERATION = re.compile(r"(\{%[-+]?\s*)(end)?generation(\s*[-+]?%\})")

_STRFTIME = (
    "{%- macro strftime_now(format) -%}{%- for piece in format.split('%%') -%}{%- set now = namespace(text=piece) -%}"
    "{%- for name, value in KNOWN if name in piece -%}{%- set now.text = now.text.replace(name, value) -%}"
    "{%- endfor -%}{{ '' if loop.first else '%' }}{{ now.text }}{%- endfor -%}{%- endmacro %}"
)


def check_date(date: object, name: str) -> None:
    """ValueError, beginning with the setting's name, unless it is a day as YYYY-MM-DD."""
    try:
        if datetime.date.fromisoformat(date).isoformat() == date:  # type: ignore[arg-type]
            return
    except (TypeError, ValueError):
        pass
    raise ValueError(f"{name}={shown(date)}: expected a day as YYYY-MM-DD, such as 2024-07-26")


def named(tokenizer: Any) -> str:
    return plain(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)


class Template:
    """The template of a tokenizer, as of one day. where: of the record, for messages."""

    def __init__(self, tokenizer: Any, date: str, where: str):
        self.tokenizer, self.where, self.name = tokenizer, where, named(tokenizer)
        if not getattr(tokenizer, "chat_template", None):
            raise ValueError(f"{where}: 'messages' need a tokenizer with a chat template; use prompt + completion")
        if not isinstance(tokenizer.chat_template, (str, Mapping)):
            raise ValueError(
                f"{self.name}: its tokenizer's chat_template is {shown(tokenizer.chat_template)}, expected text"
            )
        try:
            source = tokenizer.get_chat_template()  # of several the default one
        except Exception as error:
            raise self._refused(error) from error
        self.source = _on_day(source, date)

    def __call__(self, messages: Sequence[Mapping], **options: bool) -> str:
        """The text. Errors: ValueError where the template does not take the messages."""
        try:
            return self._render(self.source, messages, **options)
        except Exception as error:  # whatever the template's own code raises
            raise self._refused(error) from error

    def attempt(self, messages: Sequence[Mapping], **options: bool) -> str | None:
        """The text, or None where the template does not take the messages."""
        try:
            return self._render(self.source, messages, **options) if messages else None
        except Exception:
            return None

    def generated(self, messages: Sequence[Mapping], text: str) -> list[tuple[int, int]]:
        """What the template marks as generated in `text`, which it makes of the messages; [] where it marks nothing."""
        if not _GENERATION.search(self.source):
            return []
        try:
            marked = self._render(_marking(self.source), messages)
        except Exception:
            return []
        spans, pieces, at, begin = [], [], 0, None
        for piece in re.split(f"({OPENED}|{CLOSED})", marked):
            if piece == OPENED:
                begin = at
            elif piece == CLOSED and begin is not None:
                spans.append((begin, at))
                begin = None
            elif piece != CLOSED:
                pieces.append(piece)
                at += len(piece)
        # a template that works on its own output, which the marks then change, is taken as one without
        return [span for span in spans if span[0] < span[1]] if "".join(pieces) == text else []

    def _render(self, source: str, messages: Sequence[Mapping], **options: bool) -> str:
        return self.tokenizer.apply_chat_template(list(messages), tokenize=False, chat_template=source, **options)

    def _refused(self, error: Exception) -> ValueError:
        return ValueError(
            f"{self.where}: the tokenizer's chat template does not take these messages: {reason(error)} (the template "
            f"of {self.name}): change the messages, or use prompt + completion"
        )


@functools.lru_cache(maxsize=16)
def _on_day(source: str, date: str) -> str:
    """The template with a `strftime_now` whose clock stands at midnight of the day."""
    if "strftime_now" not in source:
        return source
    day = datetime.datetime.fromisoformat(date)
    names = [f"%{flag}{letter}" for flag in ("", "-") for letter in string.ascii_letters if letter != "s"]
    values = {name: day.strftime(name) for name in names}  # %s would depend on the time zone
    known = json.dumps([[name, value] for name, value in values.items() if "%" not in value])
    return f"{_STRFTIME.replace('KNOWN', known)}\n{source}"  # a line end after a tag is left out


@functools.lru_cache(maxsize=16)
def _marking(source: str) -> str:
    """The template with marks in its text in place of those that transformers keeps beside it (and puts in the wrong
    place inside a macro)."""
    calls = _GENERATION.sub(lambda m: f"{m[1]}endcall{m[3]}" if m[2] else f"{m[1]}call {MARK}(){m[3]}", source)
    return f"{{%- macro {MARK}() -%}}{OPENED}{{{{ caller() }}}}{CLOSED}{{%- endmacro %}}\n{calls}"
