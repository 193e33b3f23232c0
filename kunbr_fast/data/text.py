"""A record as the text that the model reads, and the characters of it that have a loss."""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from kunbr_fast.data.chat import chat
from kunbr_fast.data.content import LETTERS
from kunbr_fast.data.records import question_prompt
from kunbr_fast.data.template import check_date
from kunbr_fast.files.shown import shown

TARGETS = ("all", "answer", "letter", "number")


@dataclasses.dataclass(frozen=True)
class TextSettings:
    """How a record becomes text.

    separator: what stands between prompt and completion; they are joined as they are by default.
    chat_date: the day (YYYY-MM-DD) that a chat template writes where it asks for today's; the default is the one that
    Llama 3's own templates have.
    split_long: a text line of more than max_length tokens becomes several samples; else it is an error.
    """

    separator: str = ""
    chat_date: str = "2024-07-26"
    split_long: bool = True

    def __post_init__(self) -> None:
        check_date(self.chat_date, "chat_date")


PLAIN = TextSettings()


def text_and_spans(
    record: Mapping, tokenizer: Any, target: str, settings: TextSettings
) -> tuple[str, list[tuple[int, int]] | None, bool]:
    """The text, the character spans that count (None: all), and whether the tokenizer adds special tokens."""
    where = record["_where"]
    if "question" in record:
        prompt, letter = question_prompt(record), LETTERS[record["answer"]]
        text = f"{prompt} {letter}. {record['choices'][record['answer']]}"
        answer, special = [(len(prompt) + 1, len(text))], True
    elif "text" in record:
        text, answer, special = record["text"], None, True
    elif "prompt" in record:
        prompt, completion = record["prompt"], record["completion"]
        text = f"{prompt}{settings.separator}{completion}"
        answer, special = [(len(text) - len(completion.lstrip()), len(text))], True
    else:
        text, answer, special = *chat(record, tokenizer, settings.chat_date), False
    if target == "all":
        return text, None, special
    if target == "number":
        numbers = collections.deque(re.finditer(r"\d+", text), maxlen=1)
        if not numbers:
            raise ValueError(f"{where}: target='number' but there is no digit in {shown(text, 80)}")
        return text, [numbers[-1].span()], special
    if target == "letter":
        if "question" not in record:
            raise ValueError(f"{where}: target='letter' needs question lines, got {sorted(set(record) - {'_where'})}")
        return text, [(answer[0][0], answer[0][0] + 1)], special
    if answer is None:
        raise ValueError(f"{where}: target='answer' does not apply to a text line: use 'all' or 'number'")
    return text, answer, special
