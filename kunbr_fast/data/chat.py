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
from typing import Any

from kunbr_fast.data.template import Template
from kunbr_fast.files.shown import plain, shown

Span = tuple[int, int]
ROLES = ("assistant", "user", "system")
OTHERS = ("system", "tool", "developer", "function", "ipython", "environment")  # which a template may write as another
NOTHING = ("", [], {})  # values of a key that say nothing
PIECES = re.compile(r"<[^<>]*>|\[[^][]*]|\s+|[^][<>\s]+|.")  # <|mark|>, [MARK], whitespace, a word


def chat(record: Mapping, tokenizer: Any, date: str) -> tuple[str, list[Span]]:
    """The chat as the tokenizer's template writes it on that day, and the spans of the assistant's turns.

    A turn is the message's content, with what the template writes to end it. If the message has more keys that the
    template writes (`reasoning_content`, `tool_calls`), it begins where the generation prompt ends. Where the template
    marks what is generated (`{% generation %}`), its marks are the turns.

    Errors: ValueError with the record, the message and the cure if the template leaves out a message, a part or a key
    of it, or writes its role as another one, and if there is no assistant's turn.
    """
    messages = [{key: value for key, value in m.items() if value is not None} for m in record["messages"]]
    return _Chat(Template(tokenizer, date, record["_where"]), messages).text_and_turns()


class _Chat:
    """contents: where each message's content stands in the text, without whitespace around it; None of blank ones."""

    contents: list[Span | None]

    def __init__(self, template: Template, messages: Sequence[Mapping]):
        self.template, self.messages = template, messages
        self.text = template(messages)
        self.word = "Zq"
        while self.word in self.text:
            self.word += "q"

    def text_and_turns(self) -> tuple[str, list[Span]]:
        keyed = {i for i in range(len(self.messages)) if self._has_other_keys(i)}
        self._check_roles()
        self.contents = self._located()
        own = [i for i, m in enumerate(self.messages) if m["role"] == "assistant" and (self.contents[i] or i in keyed)]
        if not own:
            raise ValueError(f"{self.template.where}: no assistant message to learn from (role 'assistant', not blank)")
        if turns := self.template.generated(self.messages, self.text):
            return self.text, turns
        without = [i for i in own if i not in keyed]
        ending = self._ending(without[-1]) if without else ""
        return self.text, [self._with_keys(i) if i in keyed else self._ended(i, ending) for i in own]

    # ---------------------------------------------------------------- where a turn begins and ends

    def _ending(self, i: int) -> str:
        """What the template writes behind the content of message i where the chat ends with it."""
        if i == len(self.messages) - 1 and not self._parts(i)[2]:
            return self.text[self.contents[i][1] :]
        last = {**self.messages[i], "content": self._name(i)}
        rendered = self.template.attempt([*map(self._stand_in, range(i)), last])
        return (rendered or "").partition(self._name(i))[2]

    def _ended(self, i: int, ending: str) -> Span:
        begin, end = self.contents[i]
        space = self._parts(i)[2]  # of the content, unless the template trims it
        ends = [self._behind(end, ending)]
        if space and self.text.startswith(space, end):
            ends.append(self._behind(end + len(space), ending))
        return begin, max(ends)

    def _behind(self, end: int, ending: str) -> int:
        """Where as much of `ending` as stands at `end` ends. Whole pieces: <|end|> and <|user|> begin alike."""
        for piece in [ending] if self.text.startswith(ending, end) else PIECES.findall(ending):
            if not self.text.startswith(piece, end):
                break
            end += len(piece)
        return end

    def _with_keys(self, i: int) -> Span:
        before = self.template.attempt(self.messages[:i], add_generation_prompt=True)
        begin = len(os.path.commonprefix([self.text, before or ""]))
        if content := self.contents[i]:
            begin = min(begin, content[0]) if before else content[0]
        end = content[1] if content else begin
        after = self.template.attempt(self.messages[: i + 1]) or ""
        return begin, self._behind(end, after[end:]) if self.text.startswith(after[:end]) else end

    # ---------------------------------------------------------------- whether all of the messages is in the text

    def _located(self) -> list[Span | None]:
        rendered = self.template.attempt([self._stand_in(i) for i in range(len(self.messages))])
        places = None if rendered is None else self._filled(rendered)
        found: list[Span | None] = []
        for i, message in enumerate(self.messages):
            if not self._parts(i)[1]:
                found.append(None)
                continue
            spans = self._alone(i) if places is None else places[i]
            if not spans:
                raise self._wrong(i, "leaves it out", "leave it out, or put its text into another message")
            if len(spans) > 1 and message["role"] == "assistant":
                raise self._wrong(i, f"writes it {len(spans)} times", "change the template")
            found.append(spans[0])
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
        if role != "assistant" and not (missing := self._missing_words()):
            return [(0, 0)]  # it is all there, in another form, and where need not be known
        if "</think>" in core:
            last = i == max(j for j, m in enumerate(self.messages) if m["role"] == "assistant")
            cure = "give it without" if last else "give it without, or make it the last turn of a record of its own"
            raise self._wrong(i, "does not write its reasoning (<think>) as it stands", cure)
        what = (
            "does not write it as it stands" if role == "assistant" else f"leaves out a part of it ({shown(missing)})"
        )
        raise self._wrong(i, what, "write it otherwise")

    def _around_changes(self, i: int, rendered: str) -> list[Span]:
        """Where the content stands whole around all that differs between the text and `rendered`, which has its name.

        A template that takes a content apart and writes its tags again may put other whitespace around them.
        """
        front = len(os.path.commonprefix([self.text, rendered]))
        shortest = min(len(self.text), len(rendered)) - front
        back = len(os.path.commonprefix([self.text[::-1], rendered[::-1]])[:shortest])
        pieces = re.split(r"\s*(<[^<>\s]+>)\s*", self._parts(i)[1])
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
        others = [key for key, value in message.items() if key not in ("role", "content") and value not in NOTHING]
        for key in others:
            value = {} if not isinstance(message[key], str) else {key: self._name(i)}
            for other in ({name: message[name] for name in message if name != key}, {**message, **value}):
                if other != message and self._with(i, other) == self.text:
                    raise self._wrong(i, f"does not read its {shown(key)}", f"leave {shown(key)} out")
        return bool(others)

    def _check_roles(self) -> None:
        for i, message in enumerate(self.messages):
            role = message["role"] if self._parts(i)[1] else "user"  # a blank one says nothing as any
            for other in ("assistant",) if role in OTHERS else () if role in ROLES else ROLES:
                if self._with(i, {**message, "role": other}) == self.text:
                    raise self._wrong(i, f"writes this role as {other!r}", f"give it the role {other!r}")

    def _wrong(self, i: int, what: str, cure: str) -> ValueError:
        of = f"{self.template.where}: message {i + 1} of {len(self.messages)} ({plain(self.messages[i]['role'], 40)})"
        return ValueError(f"{of}: the chat template of {self.template.name} {what}: {cure}, or use prompt + completion")

    # ---------------------------------------------------------------- contents and their names

    def _with(self, i: int, other: Mapping) -> str | None:
        """The text with another message in place of message i."""
        return self.template.attempt([*self.messages[:i], other, *self.messages[i + 1 :]])

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
