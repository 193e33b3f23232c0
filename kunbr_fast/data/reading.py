"""Records from files: lines of JSON, JSON arrays, and tables (see `files.tables`)."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kunbr_fast.data.columns import Columns
from kunbr_fast.data.content import ALLOWANCES, EQUAL, LETTERS, equal_pair, not_as_written
from kunbr_fast.data.forms import FACT, FORMS
from kunbr_fast.data.messages import without_keys
from kunbr_fast.data.presets import Reader
from kunbr_fast.data.records import checked_record, warn
from kunbr_fast.files.documents import is_array, parse_json, read_array, read_lines
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
    if equal_choices not in ALLOWANCES:
        raise ValueError(f"equal_choices={shown(equal_choices)}: expected one of {', '.join(ALLOWANCES)}")
    if columns and preset:
        raise ValueError(f"columns and preset={shown(preset)} both say what keys mean: give one of them")
    paths, ignored = [paths] if isinstance(paths, (str, Path)) else list(paths), frozenset(ignore_keys)
    if not paths:
        raise ValueError("no file was given: expected at least one")
    records: list[dict] = []
    for path in paths:
        name = plain(path)
        read = _File(ignored, equal_choices == "allow", Columns(columns) if columns else None, preset)
        found = [record for entry in entries(path) for record in read.records(entry)]
        if not found:
            raise ValueError(f"{name}: empty: expected at least one JSON line, or row")
        if read.columns is not None and (unseen := read.columns.unseen):
            raise ValueError(f"{name}: columns: no line has {unseen}")
        if read.preset is not None:
            (say if read.preset.used else warn)(f"{name}: {read.preset.told(len(found))}")
        if alike := [record["_where"] for record in found if equal_pair(record.get("choices", ()))]:
            warn(
                f"{alike[0]}: two of its choices are equal, and only the one that 'answer' names counts as right "
                f"({len(alike)} such question{'s' * (len(alike) > 1)} in {name})"
            )
        records += found
    return records


def entries(path: str | Path) -> Iterator[Entry]:
    """What the file, or the folder, holds."""
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
        if first and (other := _no_lines(line)):
            raise ValueError(f"{name}:{number}: {other}")
        first = False
        yield _json(line, f"{name}:{number}")


def _json(text: str, where: str) -> Entry:
    return Entry(where, parse_json(text, where, strict=False), text, "json")  # its annotations are never read


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


class _File:
    """How the entries of one file become records."""

    def __init__(self, ignored: frozenset[str], equal: bool, columns: Columns | None, preset: str | None):
        self.ignored, self.equal, self.columns = ignored, equal, columns
        self.preset = Reader(preset) if preset else None

    def records(self, entry: Entry) -> Iterator[dict]:
        for place, value in self.preset.lines(entry.value) if self.preset else [("", entry.value)]:
            try:
                yield self._record(value, entry._replace(where=f"{entry.where}{place}"))
            except ValueError as error:
                if self.columns is None or not (unseen := self.columns.unseen):
                    raise
                raise ValueError(f"{error} (columns: no line so far has {unseen})") from error

    def _record(self, value: Any, entry: Entry) -> dict:
        where = entry.where
        if not isinstance(value, dict):
            cure = ": preset=muse reads arrays of texts" if isinstance(value, str) else ""
            raise ValueError(f'{where}: got a {type(value).__name__}, expected an object such as {{"text": ...}}{cure}')
        record = self._named(value, where)
        if self.preset is not None:
            record = self.preset.record(record)
        if entry.kind == "csv":
            record = _typed(record, where)
        if isinstance(record.get("choices"), list):
            self._check_floats(record["choices"], entry)
            record = self._indexed(record, entry.kind)
            record = {**record, EQUAL: True} if self.equal else record
        return checked_record(record, where)

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
    found = dict(record)
    for key in ("choices", "messages"):
        if isinstance(cell := found.get(key), str):
            found[key] = _listed(cell, f"{where}: {key!r}")
    if found.get("choices") is not None and isinstance(answer := found.get("answer"), str):
        whole = re.fullmatch(r"(\d{1,3})(\.0)?", answer.strip(), re.ASCII)
        found["answer"] = int(whole[1]) if whole else answer
    if isinstance(fact := found.get(FACT), str) and re.fullmatch("0|[1-9][0-9]{0,17}", fact):
        found[FACT] = int(fact)
    return found


def _listed(cell: str, where: str) -> list[Any]:
    try:
        value = parse_json(cell, where)
    except ValueError:
        value = None
    if not isinstance(value, list):
        raise ValueError(
            f'{where} is {shown(cell)}, expected a list of JSON, such as ["a", "b"], or columns of their own, which '
            "columns A=choices B=choices names"
        )
    _check_written(value, json.loads(cell, parse_float=str, parse_int=str), where)
    return value
