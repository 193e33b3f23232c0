"""A record as the text that the model reads, and the characters of it that have a loss."""

from __future__ import annotations

import collections
import dataclasses
import functools
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

from kunbr_fast.data.chat import chat
from kunbr_fast.data.content import LETTERS
from kunbr_fast.data.records import is_record, question_prompt
from kunbr_fast.data.template import check_date
from kunbr_fast.files.shown import shown

logger = logging.getLogger(__name__)

TARGETS = ("all", "answer", "letter", "number")
SPACES = "\\ \u00a0\u2007\u2009\u202f"  # of a verbose pattern
SUPERSCRIPT = "[\u207a\u207b]?[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+"
POWER = rf"(?: (?: \^ | \*\*) [{{(]? [-+\u2212]? \d+ [}})]? | {SUPERSCRIPT} )"
# Digits of any script. Points and commas count between two of them; spaces, apostrophes and underscores before groups
# of three (or, as in India, of two and a last one of three). A minus is a sign where nothing stands before it that it
# could join to the number: 1939-1945 has none.
NUMBER = re.compile(
    rf"""(?: (?<![^\W_]) (?<![.)\]}}%\u00b0\-+\u2212\u2010-\u2015]) (?<!\d[$\u20ac\u00a3\u00a5])
             (?: [-+\u2212\u2011\uff0d] | (?<!\d\s) \u2013) )?
        (?: (?<!\w) 0 (?: [xX] [0-9a-fA-F]+ (?:_[0-9a-fA-F]+)* | [bB] [01]+ (?:_[01]+)* | [oO] [0-7]+ ) (?!\w)
          | (?: (?<![^\s\-+\u2212\u2013(\[{{"'=:<>~\u2248$\u20ac\u00a3\u00a5*/|]) \. )?
            (?: \d{{1,2}} (?:[{SPACES}] \d{{2}}){{1,6}} [{SPACES}] \d{{3}} (?!\d)
              | \d{{1,3}} (?:[{SPACES}'\u2019_] \d{{3}})+ (?!\d)
              | \d+ )
            (?: [.,\u066b\u066c] (?: \d{{3}} (?:[{SPACES}_] \d{{3}})+ (?!\d) | \d+ ) )*
            (?: [eE] [-+\u2212]? \d+ (?!\w)
              | {POWER}
              | [{SPACES}]? (?:[\u00d7xX*\u00b7\u22c5] | \\times | \\cdot) [{SPACES}]? 10 {POWER} )? )""",
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
        if not isinstance(self.separator, str):
            raise ValueError(f"separator={shown(self.separator)}: expected text, such as ' ' or ''")
        if not isinstance(self.split_long, bool):
            raise ValueError(f"split_long={shown(self.split_long)}: expected True or False")
        check_date(self.chat_date, "chat_date")


PLAIN = TextSettings()


def say_separator(separator: str, *sets: Sequence[Mapping]) -> None:
    """Says once where a run's separator is read by none of its sets, or has the name of a line end or tab in it."""
    if separator and not any(is_record(item) and "prompt" in item for items in sets for item in items):
        _say(f"separator={shown(separator)} is not used: no record of this run has a prompt and a completion")
    elif re.search(r"\\[nt]", separator):
        _say(
            f"separator={shown(separator)} has a backslash and a letter, no line end or tab: run.yaml has these as "
            r'"\n" and "\t", in double quotes'
        )


@functools.cache
def _say(text: str) -> None:
    """Once, however often a set is read."""
    logger.warning(text)


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
