"""A text as a tokenizer's tokens: special ones once, and where a text is too long to be tokenised at all."""

from __future__ import annotations

import dataclasses
from typing import Any

from kunbr_fast.data.content import is_blank
from kunbr_fast.data.samples import too_long
from kunbr_fast.data.template import named
from kunbr_fast.files.models import reason
from kunbr_fast.files.shown import shown

SPACE = "\u0120"  # how byte-level tokens have it
BEGINNING = 2**16  # characters of a longer text that are looked at first


@dataclasses.dataclass(frozen=True)
class Tokens:
    """offsets: each token's characters (first, end), empty for one that the tokenizer has added. head, tail: how many
    special tokens (BOS, EOS) the tokenizer puts at either end."""

    ids: list[int]
    offsets: list[tuple[int, int]]
    head: int = 0
    tail: int = 0


def tokens(text: str, tokenizer: Any, where: str, special: bool = True) -> Tokens:
    """What the tokenizer makes of a text. special: with the special tokens that it adds by itself; where the text
    brings them already, as a rendered prompt does, they stand there once.

    ValueError that begins with `where` if the tokenizer fails. It raises bare Exceptions, and where its Rust code
    panics a BaseException.
    """
    try:
        made = tokenizer(
            text,
            return_offsets_mapping=True,
            return_special_tokens_mask=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            add_special_tokens=special,
            truncation=False,
            verbose=False,  # no word on the longest text that the tokenizer knows of
        )
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        what = f"the tokenizer of {named(tokenizer)} fails on this text"
        raise ValueError(f"{where}: {what}: {reason(error)}") from error
    ids, added = made["input_ids"], made["special_tokens_mask"]
    offsets = _untrimmed(text, made.tokens(), made["offset_mapping"], added)
    if not special or 0 not in added:
        return Tokens(ids, offsets)
    head, tail = added.index(0), added[::-1].index(0)
    stop = len(ids) - tail
    # of the tokens that are there twice, side by side, those that the tokenizer has added go
    begun, ended = twice(ids[:head], ids[head:stop]), twice(ids[stop:][::-1], ids[head:stop][::-1])
    if not (begun and ended) and (is_blank(text[:1]) or is_blank(text[-1:])):
        own = [(token, *offset) for token, offset in zip(ids[head:stop], offsets[head:stop])]
        _check_ends(text, own, (ids[:head], ids[stop:]), tokenizer, where)
    if begun or ended:
        ids, offsets = ([*part[: head - begun], *part[head:stop], *part[stop + ended :]] for part in (ids, offsets))
    return Tokens(ids, offsets, head, tail)


def _untrimmed(text: str, names: list[str], offsets: list[tuple[int, int]], added: list[int]) -> list[tuple[int, int]]:
    """Offsets in which each token has all its characters. ByteLevel's post-processor takes spaces out of them, unless
    it is told not to: of a token of spaces alone nothing is left. What else is empty has all that lies between the
    tokens beside it."""
    found = []
    for name, (begin, end), new in zip(names, offsets, added):
        lead, trail = len(name) - len(name.lstrip(SPACE)), len(name) - len(name.rstrip(SPACE))
        spaces = " " * lead
        if new or not (lead or trail):
            pass
        elif begin >= end and lead == len(name):
            if text[:end].endswith(spaces):
                begin = end - lead
            elif text.startswith(spaces, end):
                end += lead
        else:
            if not text.startswith(spaces, begin) and text[:begin].endswith(spaces):
                begin -= lead
            spaces = " " * trail
            if not text[:end].endswith(spaces) and text.startswith(spaces, end):
                end += trail
        found.append((begin, end))
    return found if all(begin < end or new for (begin, end), new in zip(found, added)) else _filled(text, found, added)


def _filled(text: str, offsets: list[tuple[int, int]], added: list[int]) -> list[tuple[int, int]]:
    """Offsets in which an empty one of a token of the text is all that lies between the others."""
    following, after = [], len(text)
    for (begin, end), new in zip(reversed(offsets), reversed(added)):
        following.append(after)
        after = begin if begin < end and not new else after
    found, last = [], 0
    for (begin, end), new, after in zip(offsets, added, reversed(following)):
        if not new and begin < end:
            last = end
        elif not new:
            begin, end = last, max(last, after)
        found.append((begin, end))
    return found


def _check_ends(
    text: str, own: list[tuple[int, int, int]], added: tuple[list[int], list[int]], tokenizer: Any, where: str
) -> None:
    """ValueError where the text has, behind white space, what the tokenizer adds at that end: it would be there twice.
    own: the text's tokens (id, first, end)."""
    first = next((i for i, c in enumerate(text) if not is_blank(c)), len(text))
    last = len(text) - next((i for i, c in enumerate(reversed(text)) if not is_blank(c)), len(text))
    ends = (
        (first, added[0], [token for token, begin, _ in own if begin >= first], "before"),
        (len(text) - last, added[1][::-1], [token for token, _, end in own if end <= last][::-1], "behind"),
    )
    for blank, special, tokens_, side in ends:
        if blank and twice(special, tokens_):
            name = shown(tokenizer.convert_ids_to_tokens(special[-1]))
            raise ValueError(
                f"{where}: {name} would be there twice: the tokenizer adds it, and the text has it with white space "
                f"{side} it: delete that white space, or {name}"
            )


def check_repeatable(tokenizer: Any) -> None:
    """ValueError for a tokenizer that draws lots: BPE's dropout, and Unigram's sampling."""
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    for name in ("dropout", "alpha"):
        if value := getattr(model, name, None):
            raise ValueError(
                f"the tokenizer of {named(tokenizer)}: its model has {name}={value:g}, so it makes other tokens of a "
                f'text each time: set "{name}" to null in tokenizer.json'
            )


def twice(added: list[int], text: list[int]) -> int:
    """How many of the last `added` tokens the text begins with."""
    return next((n for n in range(min(len(added), len(text)), 0, -1) if added[-n:] == text[:n]), 0)


def check_beginning(text: str, tokenizer: Any, max_length: int | None, where: str, why: str) -> None:
    """ValueError for a long text whose beginning has too many tokens: all of it would take minutes and gigabytes.

    How many characters a token may have, nobody can say: a word of any length may be one unknown token. The tokens in
    the first half of a beginning are taken to be those of the whole text. why: nothing is cut.
    """
    size = BEGINNING
    while max_length is not None and size < len(text):
        ends = tokens(text[:size], tokenizer, where, False).offsets
        count = sum(begin < end <= size // 2 for begin, end in ends)
        if count > max_length:
            raise too_long(f"{where} (more than {count} tokens)", max_length, why)
        size *= 4
