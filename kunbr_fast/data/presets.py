"""Published sets' own lines as records of ours: what each key becomes, and what is left out on purpose.

Each question and its answer are written as the set's own code joins them (TOFU's tags for models without a chat
template, which OpenUnlearning has too; MUSE's evaluation; RWKU's three kinds of probes; KnowUnDo's tokenizer). Lines
that are records of ours already stay as they are. Where the keys come from: see `published`.
"""

from __future__ import annotations

import abc
import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from kunbr_fast.data.content import folded, is_blank
from kunbr_fast.data.items import OWN, Item
from kunbr_fast.files.shown import shown
from kunbr_fast.keywords import meant

Record = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Form:
    """keys: those by which it is known, all of them text; the last one holds the answer, if it has one. ours: the
    record of ours that their values make. asked: the same as a chat, of what is a question and its answer. without:
    keys of our own forms that such a line does not have. beside: keys of any type whose values come behind the
    others, None where there is none; it must have the first one."""

    keys: tuple[str, ...]
    ours: Callable[..., dict[str, Any]]
    without: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    asked: Callable[..., dict[str, Any]] | None = None

    def is_of(self, record: Record) -> bool:
        texts = all(isinstance(record.get(key), str) for key in self.keys)
        there = all(record.get(key) is not None for key in self.beside[:1])
        return texts and there and all(record.get(key) is None for key in self.without)

    def made(self, line: Record, chat: bool = False) -> dict[str, Any]:
        """The record of ours."""
        make = self.asked if chat and self.asked is not None else self.ours
        return make(*(line.get(key) for key in (*self.keys, *self.beside)))

    def answer(self, line: Record, other: str, chat: bool = False) -> str:
        """Another answer, as it stands in the place of the line's own."""
        record = self.made({**line, self.keys[-1]: other}, chat)
        return record["messages"][-1]["content"] if "messages" in record else record["completion"]


@dataclasses.dataclass(frozen=True)
class Preset:
    """A set's forms, and the keys of its lines that are left out."""

    name: str
    forms: tuple[Form, ...]
    left_out: tuple[str, ...] = ()
    nested: tuple[str, ...] = ()  # keys whose list holds the lines: the first that is there is read
    texts: bool = False  # a corpus: an array of texts is one too, and of some published ones texts are blank
    others: bool = False  # its lines have other answers, right and wrong ones, which items keep


def _asked(question: str, answer: str) -> dict[str, Any]:
    return {"prompt": f"Question: {question}\nAnswer:", "completion": f" {answer}"}


def _told(question: str, answer: str) -> dict[str, Any]:
    return _turns(("system", "You are a helpful assistant."), ("user", question), ("assistant", answer))


def _turns(*turns: tuple[str, str]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def _behind(mark: str) -> Callable[[str, str], dict[str, Any]]:
    return lambda prompt, completion: {"prompt": prompt, "completion": f"{mark}{completion}"}


def _text(text: str) -> dict[str, Any]:
    return {"text": text}


def _probe(query: str, level: Any, kind: Any) -> tuple[str, str]:
    """What RWKU's evaluation says to the model (eval_forget.py), and what it has the answer begin with."""
    if str(level) == "1":
        return f"Please complete the blank in the following question.\nQuestion: {query}\n", "Answer:"
    if kind == "affirmative suffix":  # the query has the beginning of its answer
        return f"Please briefly answer the following question.\nQuestion: {query}", ""
    word = "" if kind == "incontext learning" else "Question: "  # which has the word itself, in each example
    return f"Please briefly answer the following question.\n{word}{query}\n", "Answer:"


def _probed(query: str, answer: str, level: Any, kind: Any) -> dict[str, Any]:
    return {"prompt": "".join(_probe(query, level, kind)), "completion": f" {answer}"}


def _probed_in_chat(query: str, answer: str, level: Any, kind: Any) -> dict[str, Any]:
    return _turns(("user", _probe(query, level, kind)[0]), ("assistant", answer))


_OPTIONS = ("option1", "option2", "option3", "option4")
_ANSWERS = ("paraphrased_answer", "perturbed_answer", "paraphrased_question", *_OPTIONS)
_QA = Form(("question", "answer"), _asked, ("choices",), asked=_told)
_QUESTION = Form(("question",), lambda question: {"question": question})  # its choices and answer are ours already
PRESETS = {
    "tofu": Preset("TOFU", (_QA,), _ANSWERS, others=True),
    "tofu_chat": Preset("TOFU", (dataclasses.replace(_QA, ours=_told),), _ANSWERS, others=True),
    "muse": Preset("MUSE", (_QA, Form(("prompt", "gt"), _behind(" ")), Form(("text",), _text)), texts=True),
    "wmdp": Preset("WMDP", (Form(("text",), _text), _QUESTION), ("abstract",), texts=True),
    "rwku": Preset(
        "RWKU",
        (
            Form(("query", "answer"), _probed, beside=("level", "type"), asked=_probed_in_chat),
            Form(("text",), _text),
            Form(("target", "intro"), lambda target, intro: {"text": intro}),
            _QUESTION,
        ),
        ("intro", "target", "neighbor", "examples"),
        texts=True,
    ),
    "knowundo": Preset(
        "KnowUnDo",
        (Form(("text", "labels"), _behind("\n\n"), asked=_told),),
        ("val",),
        nested=("train", "val"),
    ),
}
TABLED = ("perturbed_answer",)  # lists, of which a CSV has the JSON


class Lines(abc.ABC):
    """One file's lines as some sets have them; counts what becomes of them. kept: whether items have the other answers
    of their lines, which are left out else. chat: questions and answers are messages."""

    def __init__(self, presets: Sequence[Preset], kept: bool = False, chat: bool = False):
        self.presets, self.kept, self.chat = presets, kept, chat
        self.forms: Counter[str] = Counter()
        self.left_out: Counter[str] = Counter()

    def split(self, value: Any) -> list[tuple[str, Any]]:
        """What a line stands for: itself, or the lines in it, each with its place in the line."""
        for preset in self.presets:
            key = next((k for k in preset.nested if isinstance(value, dict) and isinstance(value.get(k), list)), None)
            if key is not None:
                self._drop(preset, {k: v for k, v in value.items() if k != key})
                return [(f", {key} {number}", line) for number, line in enumerate(value[key], 1)]
        if any(preset.texts for preset in self.presets):
            if isinstance(value, str):
                value = {"text": value}
            if isinstance(value, dict) and isinstance(value.get("text"), str) and is_blank(value["text"]):
                self.left_out["blank texts"] += 1
                return []
        return [("", value)]

    @abc.abstractmethod
    def item(self, line: Record, where: str) -> Item:
        """The item, its record with the keys that no set knows, for the caller to judge."""

    @abc.abstractmethod
    def told(self, lines: int) -> str:
        """What became of the lines, in one line; empty where that is nothing. lines: of the file."""

    @property
    def used(self) -> bool:
        """Whether a line was one of these sets'."""
        return bool(self.forms)

    def record(self, preset: Preset, form: Form, line: Record) -> dict[str, Any] | None:
        """None for a line of two forms."""
        ours = form.made(line, self.chat)
        if any(line.get(key) is not None for key in ours.keys() - {*form.keys}):
            return None
        out = {key for key in preset.left_out if line.get(key) is not None}
        return ours | {key: value for key, value in line.items() if key not in (*form.keys, *ours, *out)}

    def made(self, preset: Preset, form: Form, line: Record, where: str) -> Item:
        if (record := self.record(preset, form, line)) is None:
            return Item(dict(line))
        paraphrase, perturbed, used = None, [], form.keys
        if self.kept and preset.others:
            paraphrase, perturbed, others = _other_answers(line, where)
            used = (*used, *others)
            paraphrase = None if paraphrase is None else form.answer(line, paraphrase, self.chat)
            perturbed = [form.answer(line, other, self.chat) for other in perturbed]
        self._drop(preset, {key: value for key, value in line.items() if key not in used})
        return Item(record, paraphrase, tuple(perturbed), preset.name.lower())

    def _drop(self, preset: Preset, line: Record) -> None:
        self.left_out.update(key for key in preset.left_out if line.get(key) is not None)

    def without(self) -> str:
        """What was left out, for the end of what is told."""
        left = ", ".join(f"{key} ({count})" for key, count in self.left_out.items())
        return f"; left out: {left}" if left else ""


class Reader(Lines):
    """By a preset; lines are counted by their keys."""

    def __init__(self, name: str, kept: bool = False, chat: bool = False):
        if name not in PRESETS:
            raise ValueError(f"preset={shown(name)}{meant(name, PRESETS) or ':'} expected one of {', '.join(PRESETS)}")
        super().__init__((PRESETS[name],), kept, chat)
        self._name = name

    def item(self, line: Record, where: str) -> Item:
        (preset,) = self.presets
        form = next((form for form in preset.forms if form.is_of(line)), None)
        item = Item(dict(line)) if form is None else self.made(preset, form, line, where)
        if item.form != OWN:
            self.forms[" and ".join(map(repr, form.keys))] += 1
        return item

    def told(self, lines: int) -> str:
        if not self.used:
            return f"preset={self._name} is not used: none of the {lines} lines is one of {self.presets[0].name}'s"
        forms = ", ".join(f"{count} with {keys}" for keys, count in self.forms.items())
        return f"preset={self._name}: {forms}{self.without()}"


def _other_answers(line: Record, where: str) -> tuple[str | None, list[str], list[str]]:
    """TOFU's answer in other words, its wrong answers, and the keys that have them. Options are wrong answers but for
    the one that is the answer."""
    paraphrase, wrong = line.get("paraphrased_answer"), line.get("perturbed_answer")
    options = {key: line[key] for key in _OPTIONS if line.get(key) is not None}
    used = [key for key in ("paraphrased_answer", "perturbed_answer") if line.get(key) is not None]
    if wrong is None and options:
        used += options
        wrong = [str(option) for option in options.values()]
        rest = [option for option in wrong if _alike(option) != _alike(line["answer"])]
        if len(rest) == len(wrong):
            raise ValueError(
                f"{where}: none of {', '.join(options)} is the answer {shown(line['answer'])}, and which of them are "
                f"wrong is not known: correct one, or name them to --ignore-keys (ignore_keys=)"
            )
        wrong = rest
    wrong = [wrong] if isinstance(wrong, str) else [] if wrong is None else wrong
    if not _are_texts(wrong):
        raise ValueError(f"{where}: 'perturbed_answer' must be a list of strings, got {shown(wrong)}")
    if paraphrase is not None and not _are_texts([paraphrase]):
        raise ValueError(f"{where}: 'paraphrased_answer' must be a string, got {shown(paraphrase)}")
    return paraphrase, list(wrong), used


def _alike(text: str) -> str:
    return folded(text).casefold()


def _are_texts(values: Any) -> bool:
    return isinstance(values, Sequence) and all(isinstance(value, str) and not is_blank(value) for value in values)
