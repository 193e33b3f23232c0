"""Published sets' own lines as records of ours: what each key becomes, and what is left out on purpose.

Each question and its answer are written as the set's own code joins them (TOFU's tags for models without a chat
template, which OpenUnlearning has too; MUSE's evaluation; KnowUnDo's tokenizer). Lines that are records of ours already
stay as they are.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from kunbr_fast.data.content import is_blank
from kunbr_fast.files.shown import shown
from kunbr_fast.keywords import meant

Record = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Form:
    """keys: those by which it is known, all of them text. ours: the record of ours that their values make. without:
    keys of our own forms that such a line does not have."""

    keys: tuple[str, ...]
    ours: Callable[..., dict[str, Any]]
    without: tuple[str, ...] = ()

    def is_of(self, record: Record) -> bool:
        texts = all(isinstance(record.get(key), str) for key in self.keys)
        return texts and all(record.get(key) is None for key in self.without)


@dataclasses.dataclass(frozen=True)
class Preset:
    """A set's forms, and the keys of its lines that are left out."""

    name: str
    forms: tuple[Form, ...]
    left_out: tuple[str, ...] = ()
    nested: str | None = None  # a key whose list holds the lines
    texts: bool = False  # a corpus: an array of texts is one too, and of some published ones texts are blank


def _asked(question: str, answer: str) -> dict[str, Any]:
    return {"prompt": f"Question: {question}\nAnswer:", "completion": f" {answer}"}


def _told(question: str, answer: str) -> dict[str, Any]:
    turns = (("system", "You are a helpful assistant."), ("user", question), ("assistant", answer))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def _behind(mark: str) -> Callable[[str, str], dict[str, Any]]:
    return lambda prompt, completion: {"prompt": prompt, "completion": f"{mark}{completion}"}


def _text(text: str) -> dict[str, Any]:
    return {"text": text}


_ANSWERS = (
    "paraphrased_answer",
    "perturbed_answer",
    "paraphrased_question",
    "option1",
    "option2",
    "option3",
    "option4",
)
PRESETS = {
    "tofu": Preset("TOFU", (Form(("question", "answer"), _asked, ("choices",)),), _ANSWERS),
    "tofu_chat": Preset("TOFU", (Form(("question", "answer"), _told, ("choices",)),), _ANSWERS),
    "muse": Preset(
        "MUSE",
        (
            Form(("question", "answer"), _asked, ("choices",)),
            Form(("prompt", "gt"), _behind(" ")),
            Form(("text",), _text),
        ),
        texts=True,
    ),
    "wmdp": Preset(
        "WMDP", (Form(("text",), _text), Form(("question",), lambda q: {"question": q})), ("abstract",), texts=True
    ),
    "knowundo": Preset("KnowUnDo", (Form(("text", "labels"), _behind("\n\n")),), ("val",), nested="train"),
}


class Reader:
    """One file's lines by a preset; counts what it did."""

    def __init__(self, name: str):
        if name not in PRESETS:
            raise ValueError(f"preset={shown(name)}{meant(name, PRESETS) or ':'} expected one of {', '.join(PRESETS)}")
        self._name, self._preset = name, PRESETS[name]
        self._forms: Counter[str] = Counter()
        self._left_out: Counter[str] = Counter()

    def lines(self, value: Any) -> list[tuple[str, Any]]:
        """What a line stands for: itself, or the lines in it, each with its place in the line."""
        key = self._preset.nested
        if key is not None and isinstance(value, dict) and isinstance(value.get(key), list):
            self._drop(value)
            return [(f", {key} {number}", line) for number, line in enumerate(value[key], 1)]
        if self._preset.texts and isinstance(value, str):
            value = {"text": value}
        if self._preset.texts and isinstance(value, dict) and value.get("text") is not None:
            if isinstance(value["text"], str) and is_blank(value["text"]):
                self._left_out["blank texts"] += 1
                return []
        return [("", value)]

    def record(self, line: Record) -> dict[str, Any]:
        """The record of ours, with the keys that the preset does not know, for the caller to judge."""
        form = next((form for form in self._preset.forms if form.is_of(line)), None)
        if form is None:
            return dict(line)
        ours = form.ours(*(line[key] for key in form.keys))
        if any(line.get(key) is not None for key in ours.keys() - {*form.keys}):
            return dict(line)  # of two forms
        self._forms[" and ".join(map(repr, form.keys))] += 1
        dropped = self._drop(line)
        rest = {key: value for key, value in line.items() if key not in (*form.keys, *ours) and key not in dropped}
        return ours | rest

    def _drop(self, line: Record) -> list[str]:
        dropped = [key for key in self._preset.left_out if line.get(key) is not None]
        self._left_out.update(dropped)
        return dropped

    @property
    def used(self) -> bool:
        """Whether a line was the preset's."""
        return bool(self._forms)

    def told(self, lines: int) -> str:
        """What it did, in one line. lines: of the file."""
        if not self.used:
            return f"preset={self._name} is not used: none of the {lines} lines is one of {self._preset.name}'s"
        forms = ", ".join(f"{count} with {keys}" for keys, count in self._forms.items())
        left = ", ".join(f"{key} ({count})" for key, count in self._left_out.items())
        return f"preset={self._name}: {forms}" + (f"; left out: {left}" if left else "")
