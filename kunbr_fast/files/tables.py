"""Tables as rows, each a dict: CSV and TSV, Parquet, Arrow, and folders that `datasets.save_to_disk` has written.

Parquet and Arrow are known by their first bytes, whatever they are called; CSV and TSV, whose contents can be anything,
by their names. Parquet and Arrow need pyarrow (the extra `tables`). A cell of a CSV is text, or None where it is empty.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import itertools
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from kunbr_fast.files.documents import LIMIT, raw_lines, read_json, regular
from kunbr_fast.files.scalars import Unread
from kunbr_fast.files.shown import plain, shown

Rows = Iterator[tuple[str, dict[str, Any]]]  # each with where it is: "f.csv:12", "f.parquet: row 7"
SUFFIXES = {".csv": "", ".tsv": "\t"}  # and the separator, if it is known
SPLITS, STATE = "dataset_dict.json", "state.json"  # of a folder
INDEX = "_index"  # pandas writes the rows' numbers as a column without a name
BATCH = 256  # rows


def table(path: str | Path) -> tuple[str, Rows] | None:
    """What kind of table this is ("csv", "parquet" or "arrow") and its rows; None for what is none."""
    if os.path.isdir(path):
        return _folder(Path(path))
    regular(path)
    with contextlib.suppress(OSError), open(path, "rb") as file:  # who reads it says more
        head = file.read(64)
        if head.startswith(b"PAR1"):
            return "parquet", _parquet(path)
        if head.startswith((b"ARROW1\0", b"\xff\xff\xff\xff")):
            return "arrow", _arrow([path], plain(path))
        if Path(path).suffix.lower() in SUFFIXES and not head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith((b"{", b"[")):
            return "csv", _csv(path, SUFFIXES[Path(path).suffix.lower()])
    return None


# ---------------------------------------------------------------- CSV


def _csv(path: str | Path, separator: str) -> Rows:
    where, header = plain(path), []
    lines = (line for _, line in raw_lines(path, newline=""))
    first = next(lines, "").lstrip("\ufeff")
    separator = separator or next((mark for mark in ",;\t" if mark in first), ",")
    reader = csv.reader(itertools.chain([first], lines), delimiter=separator, strict=True)
    while True:
        at = f"{where}:{reader.line_num + 1}"  # where the row begins
        try:
            row = _next(reader)
        except csv.Error as error:
            cure = "a cell with a quote in it is in quotes, and has it twice"
            raise ValueError(f"{at}: not CSV ({plain(error, 80)}): {cure}") from None
        if row is None:
            return
        if not row or (not any(row) and len(row) == 1):  # a blank line
            continue
        if not header:
            header = _names(row, at)
        elif len(row) != len(header):
            raise ValueError(
                f"{at}: {len(row)} cells, and {len(header)} columns in the header: put a cell with a "
                f"{'tab' if separator == chr(9) else shown(separator)} in it in quotes"
            )
        else:
            yield at, {name: cell or None for name, cell in zip(header, row)}


def _next(reader: Any) -> list[str] | None:
    """The next row, None behind the last. Cells may be as long as lines may; the limit is the process's."""
    before = csv.field_size_limit(LIMIT)
    try:
        return next(reader, None)
    finally:
        csv.field_size_limit(before)


def _names(row: Sequence[str], where: str) -> list[str]:
    names = [INDEX if number == 0 and not name else name for number, name in enumerate(row)]
    if "" in names:
        raise ValueError(f"{where}: column {names.index('') + 1} has no name: give it one, or delete it")
    _check_different(names, where)
    return names


def _check_different(names: Sequence[str], where: str) -> None:
    name, count = max(Counter(names).items(), key=lambda item: item[1], default=("", 0))
    if count > 1:
        raise ValueError(f"{where}: {count} columns are called {shown(name)}: keep one")


# ---------------------------------------------------------------- Parquet and Arrow


def _pyarrow(where: str, what: str) -> Any:
    try:
        import pyarrow
    except ImportError:
        raise ValueError(
            f"{where}: {what}, which takes pyarrow to read: pip install pyarrow, or write it as JSON lines (pandas' "
            "to_json(NAME, orient='records', lines=True))"
        ) from None
    return pyarrow


@contextlib.contextmanager
def _reading(where: str, what: str) -> Iterator[None]:
    """ValueError, in one line, for what pyarrow says of a damaged file."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        said = plain(" ".join(str(error).split()), 160)
        raise ValueError(f"{where}: not a whole {what} ({said}): make or copy it again") from error


def _parquet(path: str | Path) -> Rows:
    where, what = plain(path), "Parquet table"
    _pyarrow(where, f"a {what}")
    import pyarrow.parquet as parquet

    with _reading(where, what):
        file = parquet.ParquetFile(path)
    with file:
        yield from _rows(file.schema_arrow, functools.partial(file.iter_batches, BATCH), where, what)


def _arrow(paths: Sequence[str | Path], where: str) -> Rows:
    """The rows of files, one after the other, which are all parts of one table."""
    what, first = "Arrow table", 0
    pyarrow = _pyarrow(where, f"an {what}")
    for path in paths:
        with contextlib.ExitStack() as held:
            with _reading(plain(path), what):
                source = held.enter_context(pyarrow.memory_map(os.fspath(path)))
                if source.read(6) == b"ARROW1":
                    file = held.enter_context(pyarrow.ipc.open_file(source))
                    batches = functools.partial(_batches, file)
                else:
                    source.seek(0)
                    file = held.enter_context(pyarrow.ipc.open_stream(source))
                    batches = functools.partial(iter, file)
            for number, row in enumerate(_rows(file.schema, batches, where, what, first), first + 1):
                first = number
                yield row


def _batches(file: Any) -> Iterator[Any]:
    for number in range(file.num_record_batches):
        yield file.get_batch(number)


def _rows(schema: Any, batches: Any, where: str, what: str, first: int = 0) -> Rows:
    """batches: yields them, given the names of the columns to read, if not all."""
    _check_different(schema.names, where)
    unread = {field.name: _unread(field.type) for field in schema if not _is_readable(field.type)}
    names = [name for name in schema.names if name not in unread]
    number = first
    with _reading(where, what):
        source = batches(columns=names) if unread and names and what.startswith("Parquet") else batches()
    while True:
        with _reading(where, what):
            batch = next(source, None)
        if batch is None:
            return
        for start in range(0, batch.num_rows, BATCH):
            with _reading(where, what):
                part = batch.slice(start, BATCH).select([name for name in names if name in batch.schema.names])
                rows = part.to_pylist() if names else [{}] * min(BATCH, batch.num_rows - start)
            for row in rows:
                number += 1
                at = f"{where}: row {number}"
                if sum(map(_size, row.values())) > LIMIT:
                    raise ValueError(f"{at}: more than {LIMIT // 2**20} MiB: split it, or shorten it")
                yield at, {key: _without_nulls(value) for key, value in row.items()} | unread


def _unread(kind: Any) -> Unread:
    """Stands in such a column's place; whoever reads it is told why."""
    text = Unread(kind)
    text.why = f"the column holds {plain(kind, 60)}: expected text, whole numbers, or lists of them"
    return text


def _is_readable(kind: Any) -> bool:
    """Whether Python has these values as they are."""
    from pyarrow import types

    if types.is_dictionary(kind) or types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _is_readable(kind.value_type)
    if types.is_struct(kind):
        return all(_is_readable(kind.field(i).type) for i in range(kind.num_fields))
    plain_types = (types.is_string, types.is_large_string, types.is_string_view, types.is_integer, types.is_floating)
    return any(is_it(kind) for is_it in (*plain_types, types.is_boolean, types.is_null))


def _size(value: Any) -> int:
    """About how many characters it has."""
    if isinstance(value, dict):
        return sum(map(_size, value.values()))
    return sum(map(_size, value)) if isinstance(value, list) else len(value) if isinstance(value, str) else 8


def _without_nulls(value: Any) -> Any:
    """A table has each key in each of its mappings, null where there is none."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


# ---------------------------------------------------------------- folders


def _folder(path: Path) -> tuple[str, Rows] | None:
    where = plain(path)
    if (path / SPLITS).is_file():
        splits = read_json(path / SPLITS, dict[str, Any]).get("splits")
        names = splits if isinstance(splits, list) and splits and all(isinstance(s, str) for s in splits) else ["SPLIT"]
        listed = ", ".join(plain(name, 40) for name in names)
        raise ValueError(f"{where}: a DatasetDict of {listed}: name one of them, such as {plain(path / names[0])}")
    if not (path / STATE).is_file():
        if tables := sorted([*path.glob("*.parquet"), *path.glob("*/*.parquet")]):
            raise ValueError(f"{where}: a folder of Parquet tables: name one of them, such as {plain(tables[0])}")
        return None
    state = read_json(path / STATE, dict[str, Any])
    if state.get("_indices_data_files"):
        raise ValueError(f"{where}: its rows are chosen by an index: flatten_indices(), and save_to_disk again")
    files = state.get("_data_files")
    named = [file.get("filename") for file in files if isinstance(file, dict)] if isinstance(files, list) else []
    if not named or len(named) != len(files) or any(not name or Path(str(name)).name != name for name in named):
        raise ValueError(f"{where}: its {STATE} names no data files: expected a folder that save_to_disk has written")
    for name in named:
        regular(path / name)
    return "arrow", _arrow([path / name for name in named], where)
