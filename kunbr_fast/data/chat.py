"""A chat as the tokenizer's template writes it, and where the assistant's turns stand in it.

A template may leave a message out, trim it, cut the reasoning out of it, or write earlier turns in another way than the
last one. So it is tried: the chat is rendered once more with a word of our own, its name, in place of each content.
With the contents put back for the names, that must be the text; else the messages are looked at one by one.
"""

from __future__ import annotations

import collections
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from kunbr_fast.data.content import is_blank
from kunbr_fast.data.messages import ASSISTANT, WHETHER_LOSS, is_unread, says_something
from kunbr_fast.data.template import Template
from kunbr_fast.files.shown import plain, shown

Span = tuple[int, int]
ROLES = (ASSISTANT, "user")
# a template may write these as the user's
OTHERS = ("system", "tool", "developer", "function", "ipython", "environment")
EMPTY = re.compile(r"\s*(?:<[^<>/]+>|\[[^][/]+])?\s*(?:</[^<>]+>|\[/[^][]+])\s*")  # <think></think>, or the end of one
PIECES = re.compile(r"<[^<>]*>|\[[^][]*]|\s+|[^][<>\s]+|.")  # <|mark|>, [MARK], whitespace, a word


class Chat(NamedTuple):
    """turns: the assistant's. last: the content of the last one; empty if that has only other keys."""

    text: str
    turns: list[Span]
    last: Span


def chat(record: Mapping, tokenizer: Any, date: str) -> Chat:
    """The chat as the tokenizer's template writes it on that day, and the spans of the assistant's turns.

    A turn is the message's content, with what the template writes to end it. What it writes of further keys of the
    message (`reasoning_content`, `tool_calls`) belongs to the turn, an empty block of reasoning before it does not.
    Where the template marks what is generated (`{% generation %}`), its marks are the turns.

    Errors: ValueError with the record, the message and the cure if the template leaves out a message, a part or a key
    of it, or writes its role as another one, and if there is no assistant's turn.
    """
    messages = [{key: value for key, value in m.items() if says_something(key, value)} for m in record["messages"]]
    return _Chat(Template(tokenizer, date, record["_where"]), messages).text_and_turns()


def _meet(span: Span, others: Sequence[Span]) -> bool:
    return any(span[0] < end and begin < span[1] for begin, end in others)


class _Chat:
    """contents: where each message's content stands in the text, without whitespace around it; None of blank ones."""

    contents: list[Span | None]

    def __init__(self, template: Template, messages: Sequence[Mapping]):
        self.template, self.messages = template, messages
        self.text = template(messages)
        self.marks = template.generated(messages, self.text)
        self.word = "Zq"
        while self.word in self.text:
            self.word += "q"

    def text_and_turns(self) -> Chat:
        keyed = {i for i in range(len(self.messages)) if self._has_other_keys(i)}
        self._check_roles()
        self.contents = self._located()
        turns = [i for i, m in enumerate(self.messages) if m["role"] == ASSISTANT]
        own = [i for i in turns if i in keyed or not is_blank(self.messages[i]["content"])]
        if not own:
            raise ValueError(f"{self.template.where}: no assistant message to learn from (role 'assistant', not blank)")
        if self.marks:
            with_loss = [i for i in own if not (place := self.contents[i]) or _meet(place, self.marks)]
            return Chat(self.text, self.marks, self.contents[(with_loss or own)[-1]] or (0, 0))
        for i in own:
            if self.contents[i]:
                self.contents[i] = self._from_whitespace(i)
        endings = self._endings(own[-1])
        spans = [self._ended(self._with_keys(i) if i in keyed else self.contents[i], i, endings) for i in own]
        return Chat(self.text, spans, self.contents[own[-1]] or (0, 0))

    # ---------------------------------------------------------------- where a turn begins and ends

    def _from_whitespace(self, i: int) -> Span:
        """The content of message i with as much of the whitespace before it as the template keeps."""
        (begin, end), space, content = self.contents[i], self._parts(i)[0], self.messages[i]["content"]
        if space:
            without = self._with(i, {**self.messages[i], "content": content[len(space) :]}) or self.text
            kept = len(self.text) - len(without)
            if kept > 0 and self.text.endswith(space[-kept:], 0, begin):
                if self.text[: begin - kept] + self.text[begin:] == without:
                    begin -= kept
        return begin, end

    def _endings(self, i: int) -> list[str]:
        """What the template writes behind a content, the last turn's message i: where the chat ends with it, and where
        it goes on, as far as a generation prompt behind it tells."""
        message, behind, last = self.messages[i], self._parts(i)[2], i == len(self.messages) - 1
        before, named = [*map(self._stand_in, range(i))], {"role": ASSISTANT, "content": self._name(i)}
        if last and message.keys() == {"role", "content"} and not behind:
            endings = [self.text[self.contents[i][1] :]]
        else:
            endings = [(self.template.attempt([*before, named]) or "").partition(self._name(i))[2]]
        if last and not any(m["role"] == ASSISTANT for m in before):
            return endings
        bare, prompted = (self.template.attempt(before, add_generation_prompt=on) or "" for on in (False, True))
        prompt = prompted[len(bare) :] if prompted.startswith(bare) else ""
        going_on = self.template.attempt([*before, named], add_generation_prompt=True) or ""
        if prompt and going_on.endswith(prompt):
            endings.append(going_on.removesuffix(prompt).partition(self._name(i))[2])
        return endings

    def _ended(self, span: Span, i: int, endings: Sequence[str]) -> Span:
        begin, end = span
        space = self._parts(i)[2]  # of the content, unless the template trims it
        begins = [end, end + len(space)] if space and self.text.startswith(space, end) else [end]
        return begin, max(self._behind(at, ending) for at in begins for ending in endings)

    def _behind(self, end: int, ending: str) -> int:
        """Where as much of `ending` as stands at `end` ends. Whole pieces: <|end|> and <|user|> begin alike."""
        for piece in [ending] if self.text.startswith(ending, end) else PIECES.findall(ending):
            if not self.text.startswith(piece, end):
                break
            end += len(piece)
        return end

    def _with_keys(self, i: int) -> Span:
        """The content of message i and what its further keys have put around it, in whole pieces."""
        content, others = self.contents[i], [span for j, span in enumerate(self.contents) if span and j != i]
        begin, end = content or (len(self.text), 0)
        without = self._with(i, {key: self.messages[i][key] for key in ("role", "content")})
        if without is not None:
            front, back = self._same_ends(without)
            low = max((last for _, last in others if last <= front), default=0)
            pieces = [low + m.start() for m in PIECES.finditer(self.text[low:])] + [len(self.text)]
            begin = min(begin, max(at for at in pieces if at <= front))
            back = len(self.text) - min(back, len(self.text) - begin, len(without) - begin)
            end = max(end, min(at for at in pieces if at >= back))
        prompt, after = self._prompt(i), self.template.attempt(self.messages[: i + 1])
        if prompt and (without is None or prompt <= begin):
            empty = EMPTY.match(self.text, prompt, begin)  # reasoning that the template adds, and nobody has given
            begin = empty.end() if empty else prompt
            if without is None and after and self.text.startswith(after):
                end = len(after)
        if begin >= end:
            raise self._wrong(i, "does not tell where its keys stand", "write them into the content")
        if any(first < end and last > begin for first, last in others):
            raise self._wrong(i, "writes its keys in more than one place", "write them into the content")
        return begin, end

    def _prompt(self, i: int) -> int:
        """Where the generation prompt ends that message i follows; 0 if the text has another one, or none."""
        before = self.template.attempt(self.messages[:i], add_generation_prompt=True)
        if not before or not self.text.startswith(before) or before == self.template.attempt(self.messages[:i]):
            return 0
        return len(before)

    def _same_ends(self, other: str) -> tuple[int, int]:
        """How many characters another text has in common with the text at its beginning, and how many at its end."""
        backwards = os.path.commonprefix([self.text[::-1], other[::-1]])
        return len(os.path.commonprefix([self.text, other])), len(backwards)

    # ---------------------------------------------------------------- whether all of the messages is in the text

    def _located(self) -> list[Span | None]:
        wanted = [i for i in range(len(self.messages)) if self._parts(i)[1]]
        # contents with tags are what a template may take apart
        for named in (set(wanted), {i for i in wanted if "<" not in self.messages[i]["content"]}):
            replaced = [self._stand_in(i) if i in named else m for i, m in enumerate(self.messages)]
            rendered = self.template.attempt(replaced)
            places = None if rendered is None else self._filled(rendered)
            if places is not None:
                break
        found: list[Span | None] = [None] * len(self.messages)
        for i in wanted:
            spans = places[i] if places is not None and i in named else self._alone(i)
            if not spans:
                in_parts = {**self.messages[i], "content": [{"type": "text", "text": self._name(i)}]}
                if self._name(i) in (self._with(i, in_parts) or ""):
                    raise self._wrong(i, "takes contents in parts only, not as text", "take another template")
                raise self._wrong(i, "leaves it out", "leave it out, or put its text into another message")
            if len(spans) > 1 and self.messages[i]["role"] == ASSISTANT:
                raise self._wrong(i, f"writes it {len(spans)} times", "change the template")
            found[i] = spans[0]
        return found

    def _filled(self, rendered: str) -> dict[int, list[Span]] | None:
        """Where the contents stand in the text, if that is `rendered` with each content in place of its name."""
        places: dict[int, list[Span]] = collections.defaultdict(list)
        at = last = 0
        for match in re.finditer(rf"{self.word}(\d+)z", rendered):
            between, i = rendered[last : match.start()], int(match[1])
            begin, last = at + len(between), match.end()
            form = next((form for form in self._forms(i) if self.text.startswith(form, begin)), None)
            if form is None or not self.text.startswith(between, at):
                return None
            at = begin + len(form)
            places[i].append((begin, at))
        return places if self.text[at:] == rendered[last:] else None

    def _alone(self, i: int) -> list[Span]:
        """Where the content of message i stands in the text; [] if the text does not depend on it."""
        rendered = self._with(i, self._stand_in(i))
        if rendered == self.text:
            return []
        if rendered is not None and (places := self._filled(rendered)) is not None:
            return places[i]
        if spans := self._around_changes(i, rendered or ""):
            return spans
        core, role = self._parts(i)[1], self.messages[i]["role"]
        if role != ASSISTANT and not (missing := self._missing_words()):
            return [(0, 0)]  # it is all there, in another form, and where need not be known
        if "</think>" in core:
            last = i == max(j for j, m in enumerate(self.messages) if m["role"] == ASSISTANT)
            cure = "give it without" if last else "give it without, or make it the last turn of a record of its own"
            raise self._wrong(i, "does not write its reasoning (<think>) as it stands", cure)
        what = "does not write it as it stands"
        if role != ASSISTANT:
            what = f"leaves out a part of it ({shown(missing)})"
        raise self._wrong(i, what, "write it otherwise")

    def _around_changes(self, i: int, rendered: str) -> list[Span]:
        """Where the content stands whole around all that differs between the text and `rendered`, which has its name.

        A template that takes a content apart and writes its tags again may put other whitespace around them.
        """
        front, back = self._same_ends(rendered)
        back = min(back, len(self.text) - front, len(rendered) - front)
        pieces = [piece.strip() for piece in re.split(r"(<[^<>\s]+>)", self._parts(i)[1])]
        spans = [m.span() for m in re.finditer(r"\s*".join(re.escape(p) for p in pieces if p), self.text)]
        return [(begin, end) for begin, end in spans if begin <= front and end >= len(self.text) - back]

    def _missing_words(self) -> list[str]:
        """Words that the messages have more often than the text."""

        def words(text: str) -> collections.Counter[str]:
            return collections.Counter(re.findall(r"\w+|[^\w\s]", text))

        return list(sum((words(m["content"]) for m in self.messages), collections.Counter()) - words(self.text))

    def _has_other_keys(self, i: int) -> bool:
        """Whether message i says more than role and content. What it says there must make a difference to the text."""
        message = self.messages[i]
        others = [key for key in message if key not in ("role", "content") and not is_unread(message, key)]
        for key in others:
            changes = [{other: message[other] for other in message if other != key}]
            if isinstance(message[key], str):
                changes.append({**message, key: self._name(i)})
            what, cure = f"does not read its {shown(key)}", f"leave {shown(key)} out (--ignore-keys does)"
            unread = any(self._is_the_same(i, changed) for changed in changes)
            if unread and WHETHER_LOSS.search(str(key)):  # leaving it out would put a loss where none is to be
                unread = self._is_the_same(i, {**message, key: not message[key]})
                what += ", and all of the assistant's turns have a loss alike"
                cure = "split the chat so that only turns with a loss are the assistant's"
            if unread:
                raise self._wrong(i, what, cure)
        return bool(others)

    def _check_roles(self) -> None:
        for i, message in enumerate(self.messages):
            role = message["role"]
            if role in ROLES or not self._parts(i)[1]:
                continue
            alike = [other for other in ROLES if self._with(i, {**message, "role": other}) == self.text]
            if len(alike) == 1 and (role not in OTHERS or alike == ["assistant"]):  # both: roles make no difference
                cure = "put its text into a user's message" if role in OTHERS else f"give it the role {alike[0]!r}"
                raise self._wrong(i, f"writes this role as {alike[0]!r}", cure)

    def _wrong(self, i: int, what: str, cure: str) -> ValueError:
        of = f"{self.template.where}: message {i + 1} of {len(self.messages)} ({plain(self.messages[i]['role'], 40)})"
        return ValueError(f"{of}: the chat template of {self.template.name} {what}: {cure}, or use prompt + completion")

    # ---------------------------------------------------------------- contents and their names

    def _with(self, i: int, other: Mapping) -> str | None:
        """The text with another message in place of message i."""
        return self.template.attempt(self._replaced(i, other))

    def _is_the_same(self, i: int, other: Mapping) -> bool:
        """Whether another message in place of message i makes no difference to the text and its marks."""
        messages = self._replaced(i, other)
        return self.template.attempt(messages) == self.text and (
            self.template.generated(messages, self.text) == self.marks
        )

    def _replaced(self, i: int, other: Mapping) -> list[Mapping]:
        return [*self.messages[:i], other, *self.messages[i + 1 :]]

    def _name(self, i: int) -> str:
        return f"{self.word}{i}z"

    def _parts(self, i: int) -> tuple[str, str, str]:
        """A content's leading whitespace, what is between, and its trailing whitespace."""
        content = self.messages[i]["content"]
        core = content.strip()
        begin = content.find(core) if core else len(content)
        return content[:begin], core, content[begin + len(core) :]

    def _forms(self, i: int) -> tuple[str, str]:
        """A content as it is and as JSON has it."""
        core = self._parts(i)[1]
        return core, json.dumps(core, ensure_ascii=False)[1:-1]

    def _stand_in(self, i: int) -> Mapping:
        """Message i with its name for a content; a blank one is left, as templates ask whether there is any."""
        before, core, behind = self._parts(i)
        return {**self.messages[i], "content": f"{before}{self._name(i)}{behind}"} if core else self.messages[i]
