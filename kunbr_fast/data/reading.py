"""Records from files: lines of JSON, JSON arrays, and tables (see `files.tables`)."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kunbr_fast.data.columns import CHOICES, Columns
from kunbr_fast.data.content import ALLOWANCES, EQUAL, LETTERS, equal_pair, not_as_written
from kunbr_fast.data.forms import FACT, FORMS
from kunbr_fast.data.items import Item
from kunbr_fast.data.messages import without_keys
from kunbr_fast.data.presets import TABLED, Lines, Reader
from kunbr_fast.data.records import checked_record, warn
from kunbr_fast.files.documents import is_array, parse_json, read_array, read_lines, read_text
from kunbr_fast.files.shown import plain, shown
from kunbr_fast.files.tables import table

logger = logging.getLogger(__name__)


class Entry(NamedTuple):
    """What a file holds in one place. text: its JSON. kind: "json", "csv", "parquet" or "arrow"."""

    where: str
    value: Any
    text: str | None
    kind: str


def load_records(
    paths: str | Path | Sequence[str | Path],
    ignore_keys: Iterable[str] = (),
    equal_choices: str = "error",
    columns: Mapping[str, str] | None = None,
    preset: str | None = None,
) -> list[dict]:
    """Reads files into records; `record["_where"]` says where each came from ("f.jsonl:3", "f.parquet: row 3").

    paths: JSON lines, JSON arrays, CSV (.csv, .tsv), Parquet, Arrow, and folders of `datasets.save_to_disk`.
    ignore_keys: keys that are left out, of records and of messages, as if they were not there. equal_choices: "allow"
    for questions of which some choices are equal; one warning a file counts them. columns: {"question": "prompt"} has
    "question" read as "prompt"; several may be the "choices", in their order. preset: "tofu", "tofu_chat", "muse",
    "wmdp" or "knowundo" for lines as these sets have them. Blank lines are skipped.

    Errors: ValueError "file:line: ..." for a line that is not JSON, has no known form, a key that would not be used, a
    wrong answer index or equal choices; ValueError for a file without a record, and for a column that is in no line.
    """
    return read_records(paths, ignore_keys, equal_choices, columns, preset)


def read_records(
    paths: str | Path | Sequence[str | Path],
    ignore_keys: Iterable[str] = (),
    equal_choices: str = "error",
    columns: Mapping[str, str] | None = None,
    preset: str | None = None,
    say: Callable[[str], None] = logger.info,
) -> list[dict]:
    """`load_records`. say: gets the line that tells what a preset did."""
    read = files(paths, ignore_keys, equal_choices, columns, preset, lambda: Reader(preset) if preset else None, say)
    return [item.record for file in read for item in file]


def files(
    paths: str | Path | Sequence[str | Path],
    ignore_keys: Iterable[str],
    equal_choices: str,
    columns: Mapping[str, str] | None,
    preset: str | None,
    reader: Callable[[], Lines | None],
    say: Callable[[str], None],
) -> list[File]:
    """The files, checked but not yet read. reader: makes what reads the lines of one of them."""
    if equal_choices not in ALLOWANCES:
        raise ValueError(f"equal_choices={shown(equal_choices)}: expected one of {', '.join(ALLOWANCES)}")
    if columns and preset:
        raise ValueError(f"columns and preset={shown(preset)} both say what keys mean: give one of them")
    paths, ignored = [paths] if isinstance(paths, (str, Path)) else list(paths), frozenset(ignore_keys)
    if not paths:
        raise ValueError("no file was given: expected at least one")
    equal = equal_choices == "allow"
    return [File(path, ignored, equal, Columns(columns) if columns else None, reader(), say) for path in paths]


def entries(path: str | Path, whole: bool = False) -> Iterator[Entry]:
    """What the file, or the folder, holds. whole: it may be one JSON object over several lines."""
    if re.fullmatch(r"[\w.-]+/[\w-]+", str(path)) and not os.path.lexists(path):
        raise ValueError(
            f"{plain(path)}: no such file: a data set of the Hub is written to a folder first "
            "(datasets.load_dataset(...).save_to_disk(FOLDER), then FOLDER/train)"
        )
    if (found := table(path)) is not None:
        kind, rows = found
        yield from (Entry(where, row, None, kind) for where, row in rows)
        return
    name, first = plain(path), True
    if is_array(path):
        yield from (_json(text, f"{name}: entry {place}") for place, text in read_array(path))
        return
    for number, line in read_lines(path):
        if first and whole and _is_open(line):
            yield _json(read_text(path), name)._replace(where=f"{name}:{number}")
            return
        if first and (other := _no_lines(line)):
            raise ValueError(f"{name}:{number}: {other}")
        first = False
        yield _json(line, f"{name}:{number}")


def _json(text: str, where: str) -> Entry:
    return Entry(where, parse_json(text, where, strict=False), text, "json")  # its annotations are never read


def _is_open(first: str) -> bool:
    """Whether the first line is the beginning of an object that goes on, as `json.dump(..., indent=2)` breaks it."""
    return first.startswith("{") and first.rstrip().endswith(("{", "[", ",", ":"))


def _no_lines(first: str) -> str | None:
    """What a file is that has JSON or a table in it, but no line of its own for each record, by its first line."""
    line = first.strip()
    if line == "{":
        return "an object over several lines, expected one object a line: jq -c . FILE > FILE.jsonl writes that"
    if not line.startswith("{"):
        names = [name.strip().strip('"').lower() for name in line.replace("\t", ",").replace(";", ",").split(",")]
        if len(names) > 1 and any(name in form for form in FORMS for name in names):
            columns = f"a table (CSV) with the columns {shown(names, 80)}"
            return f"{columns}, expected one JSON object a line: a table is read where its name ends in .csv or .tsv"
    return None


class File:
    """The items of one file, or folder, read once: iterating it checks them, and tells at the end what a preset did."""

    def __init__(
        self,
        path: str | Path,
        ignored: frozenset[str],
        equal: bool,
        columns: Columns | None,
        reader: Lines | None,
        say: Callable[[str], None],
    ):
        self.path, self.ignored, self.equal, self.columns, self.reader = path, ignored, equal, columns, reader
        self._say = say

    def __iter__(self) -> Iterator[Item]:
        name, count, alike = plain(self.path), 0, []
        for entry in entries(self.path, whole=self.reader is not None):
            for item in self._items(entry):
                count += 1
                if equal_pair(item.record.get("choices", ())):
                    alike.append(item.record["_where"])
                yield item
        if not count:
            raise ValueError(f"{name}: empty: expected at least one JSON line, or row")
        if self.columns is not None and (unseen := self.columns.unseen):
            raise ValueError(f"{name}: columns: no line has {unseen}")
        if self.reader is not None and (told := self.reader.told(count)):
            (self._say if self.reader.used else warn)(f"{name}: {told}")
        if alike:
            warn(
                f"{alike[0]}: two of its choices are equal, and only the one that 'answer' names counts as right "
                f"({len(alike)} such question{'s' * (len(alike) > 1)} in {name})"
            )

    def _items(self, entry: Entry) -> Iterator[Item]:
        for place, value in self.reader.split(entry.value) if self.reader else [("", entry.value)]:
            try:
                nested = {"where": f"{entry.where}{place}", "text": None} if place else {}
                yield self._item(value, entry._replace(**nested))
            except ValueError as error:
                if self.columns is None or not (unseen := self.columns.unseen):
                    raise
                raise ValueError(f"{error} (columns: no line so far has {unseen})") from error

    def _item(self, value: Any, entry: Entry) -> Item:
        where = entry.where
        if not isinstance(value, dict):
            cure = ": preset=muse reads arrays of texts" if isinstance(value, str) else ""
            raise ValueError(f'{where}: got a {type(value).__name__}, expected an object such as {{"text": ...}}{cure}')
        line = self._named(value, where)
        if entry.kind == "csv" and self.reader is not None and self.reader.kept:
            lists = [key for key in TABLED if (line.get(key) or "").lstrip().startswith("[")]
            line = _listed_cells(line, lists, where)
        item = Item(line) if self.reader is None else self.reader.item(line, where)
        record = dict(item.record)
        if entry.kind == "csv":
            record = _typed(record, where)
        if isinstance(record.get("choices"), list):
            self._check_floats(record["choices"], entry)
            record = self._indexed(record, entry.kind)
            record = {**record, EQUAL: True} if self.equal else record
        return dataclasses.replace(item, record=checked_record(record, where))

    def _named(self, value: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Without the keys that are left out, under our names."""
        record = dict(value)
        if self.ignored:
            record = {key: value for key, value in record.items() if key not in self.ignored}
            if "messages" in record:
                record["messages"] = without_keys(record["messages"], self.ignored)
        return record if self.columns is None else self.columns.renamed(record, where)

    def _check_floats(self, choices: Sequence[Any], entry: Entry) -> None:
        """ValueError for a choice that would be written otherwise than its author wrote it."""
        if not any(isinstance(choice, float) for choice in choices) or entry.kind == "csv":
            return
        texts = None
        if entry.text is not None:
            texts = self._named(json.loads(entry.text, parse_float=str, parse_int=str), entry.where)["choices"]
        _check_written(choices, texts, entry.where)

    def _indexed(self, record: dict[str, Any], kind: str) -> dict[str, Any]:
        """With the answer as an index, where a table or several columns have it as something else."""
        answer, choices = record.get("answer"), record["choices"]
        if kind in ("parquet", "arrow") and isinstance(answer, float) and answer.is_integer():
            return {**record, "answer": int(answer)}  # pandas makes floats of whole numbers beside nulls
        lettered = kind == "csv" or (self.columns is not None and self.columns.several)
        if lettered and isinstance(answer, str):
            letter = answer.strip()
            if letter and letter in LETTERS[: len(choices)] and letter not in map(str, choices):
                return {**record, "answer": LETTERS.index(letter)}
        return record


def _check_written(choices: Sequence[Any], texts: Sequence[str] | None, where: str) -> None:
    """texts: as they are in the file; None for a table of floats, which has none."""
    for number, choice in enumerate(choices):
        if isinstance(choice, float):
            if texts is None:
                raise ValueError(
                    f"{where}: the choice {choice} is a float of a table, which does not say how it is written: make "
                    "the column text, or whole numbers"
                )
            if texts[number] != str(choice):
                raise not_as_written(texts[number], str(choice), where)


# ---------------------------------------------------------------- CSV, where all is text


def _typed(record: dict[str, Any], where: str) -> dict[str, Any]:
    """A row's cells as what a record has under their names."""
    found = _listed_cells(record, ("choices", "messages"), where)
    if found.get("choices") is not None and isinstance(answer := found.get("answer"), str):
        whole = re.fullmatch(r"(\d{1,3})(\.0)?", answer.strip(), re.ASCII)
        found["answer"] = int(whole[1]) if whole else answer
    if isinstance(fact := found.get(FACT), str) and re.fullmatch("0|[1-9][0-9]{0,17}", fact):
        found[FACT] = int(fact)
    return found


def _listed_cells(record: Mapping[str, Any], keys: Sequence[str], where: str) -> dict[str, Any]:
    cells = {key: record[key] for key in keys if isinstance(record.get(key), str)}
    return {**record, **{key: _listed(cell, key, where) for key, cell in cells.items()}}


def _listed(cell: str, key: str, where: str) -> list[Any]:
    try:
        value = parse_json(cell, where)
    except ValueError:
        value = None
    if not isinstance(value, list):
        own = ", or columns of their own, which columns A=choices B=choices names" if key == CHOICES else ""
        raise ValueError(f'{where}: {key!r} is {shown(cell)}, expected a list of JSON, such as ["a", "b"]{own}')
    _check_written(value, json.loads(cell, parse_float=str, parse_int=str), f"{where}: {key!r}")
    return value
