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
# Digits of any script. Points and commas count between two of them; spaces and apostrophes before groups of three. A
# minus is a sign where nothing stands before it that it could join to the number: 1939-1945 has none.
NUMBER = re.compile(
    r"""(?: (?<![^\s(\[{"'=:<>~≈$€£¥]) [-+\u2212] )?
        (?: (?<![^\s\-+\u2212]) \. )?
        (?: \d{1,3} (?:[\ \u00a0\u2009\u202f'\u2019] \d{3})+ (?!\d) | \d+ )
        (?: [.,\u066b\u066c] \d+ )*
        (?: [eE] [-+\u2212]? \d+ (?!\w) )?""",
    re.VERBOSE,
)
# <think>...</think> and its like in published models; also one that the prompt has opened, or that is not closed
_THINK = r"[<\[◁]{}(?:think|thinking|thought|thoughts|reasoning)\|?[>\]▷]"
_OPENED, _CLOSED = _THINK.format(r"\|?(?:seed:|start_|begin_of_)?"), _THINK.format(r"(?:/(?:seed:)?|\|end_(?:of_)?)")
REASONING = re.compile(
    rf"{_OPENED}.*?{_CLOSED}|\A(?:(?!{_OPENED}).)*?{_CLOSED}|{_OPENED}.*\Z", re.DOTALL | re.IGNORECASE
)


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
    where, last = record["_where"], None
    if "question" in record:
        prompt, letter = question_prompt(record), LETTERS[record["answer"]]
        text = f"{prompt} {letter}. {record['choices'][record['answer']]}"
        answer, special = [(len(prompt) + 1, len(text))], True
    elif "text" in record:
        text, answer, special = record["text"], None, True
    elif "prompt" in record:
        before = f"{record['prompt']}{settings.separator}"
        text = f"{before}{record['completion']}"
        answer, special = [(len(before), len(text))], True
    else:
        text, answer, last = chat(record, tokenizer, settings.chat_date)
        special = False
    if target == "all":
        return text, None, special
    if target == "number":
        return text, [_last_number(text, last or (answer and answer[-1]), where)], special
    if target == "letter":
        if "question" not in record:
            raise ValueError(f"{where}: target='letter' needs question lines, got {sorted(set(record) - {'_where'})}")
        return text, [(answer[0][0], answer[0][0] + 1)], special
    if answer is None:
        raise ValueError(f"{where}: target='answer' does not apply to a text line: use 'all' or 'number'")
    return text, answer, special


def _last_number(text: str, answer: tuple[int, int] | None, where: str) -> tuple[int, int]:
    """Where it stands in the answer, which reasoning is no part of; in a text line, which has none, anywhere."""
    first, stop = answer or (0, len(text))
    asked = text[first:stop]
    found = asked if answer is None else REASONING.sub(lambda block: "\n" * len(block[0]), asked)
    numbers = collections.deque(NUMBER.finditer(found), maxlen=1)
    if not numbers:
        what, cure = ("the text", "'all'") if answer is None else ("the answer", "'answer' or 'all'")
        what += " behind its reasoning" * (found != asked)
        raise ValueError(
            f"{where}: target='number' but there is no digit in {what} {shown(asked, 80)}: use {cure} for such lines"
        )
    begin, end = numbers[-1].span()
    return first + begin, first + end
