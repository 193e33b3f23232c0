"""Documents: JSON, JSON lines and YAML, read with limits and checked by type.

Everything that is read comes through here, so a file can be of any origin. What is refused, each in one line that names
the file: pipes, devices and directories (before they are opened); what is no text (`kinds`); more bytes or deeper
nesting than any of our documents has; text that is not UTF-8; keys that occur twice, of which a parser keeps one
without a word; NaN, infinity and numbers that do not fit in 64 bits; YAML's aliases (394 bytes of them can stand for
all memory), tags, dates and numbers in base 8 or 60. What comes back is made of dict, list, str, int, float, bool and
None alone.

`kind` is a type of Python's or a msgspec Struct: dict[str, float], a TypedDict, `int | None`. A value of a Struct or a
dataclass comes back as one; nothing is converted but an int where a float is expected.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from kunbr_fast.files.kinds import HEAD, check_kind
from kunbr_fast.files.scalars import Refused, integer, no_number, or_text, real
from kunbr_fast.files.shown import plain, shown

DEPTH = 64  # our deepest document has 7
LIMIT = 16 * 2**20  # bytes; parsed, 16 MiB of empty lists take 0.5 GB
ARRAY_LIMIT = 2**31  # of an array, whose entries have the other limit
YAML_LIMIT = 2**16  # PyYAML takes up to 10 us a byte


# ---------------------------------------------------------------- files


def read_json(path: str | Path, kind: Any = None, limit: int = LIMIT) -> Any:
    """The value of a JSON file, checked against `kind` (None: any). ValueError names the file."""
    return parse_json(read_text(path, limit), plain(path), kind)


def read_yaml(path: str | Path, kind: Any = None, limit: int = YAML_LIMIT) -> Any:
    """The value of a YAML file, checked against `kind` (None: any). ValueError names the file and the line."""
    return parse_yaml(read_text(path, limit), plain(path), kind)


def read_lines(path: str | Path, limit: int = LIMIT) -> Iterator[tuple[int, str]]:
    """(number from 1, text) of each line that is not blank. ValueError names the file and the line."""
    for number, line in raw_lines(path, limit):
        line = line.lstrip("\ufeff")  # files with a byte order mark, one after the other
        if line and not line.isspace():
            yield number, line


def raw_lines(path: str | Path, limit: int = LIMIT, newline: str | None = None) -> Iterator[tuple[int, str]]:
    """(number from 1, text) of each line, blank or not. newline: as of `open`."""
    where, number = regular(path), 0
    try:
        with open(path, "rb") as file:
            check_kind(file.read(HEAD), where)
        # what is not UTF-8 becomes lone surrogates, so that the error can name the line
        with open(path, encoding="utf-8", errors="surrogateescape", newline=newline) as file:
            while line := file.readline(limit + 1):
                number += 1
                if len(line) > limit or (not line.isascii() and len(line.encode(errors="surrogateescape")) > limit):
                    raise ValueError(f"{where}:{number}: a line of more than {_size(limit)}: split it, or shorten it")
                if not line.isascii():
                    _check_unicode(line, f"{where}:{number}")
                if "\0" in line:
                    at = f"{where}:{number}: a NUL byte at column {line.index(chr(0)) + 1}"
                    raise ValueError(f"{at}: the file is damaged, or no text: make or copy it again")
                yield number, line
    except OSError as error:
        raise ValueError(f"{where}: {error.strerror}: expected a file that can be read") from error


def read_text(path: str | Path, limit: int = LIMIT) -> str:
    """A file's text, without a byte order mark. ValueError for more than `limit` bytes and for what is not UTF-8."""
    where = regular(path)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size  # as much memory as is asked for is taken at once
            data = file.read(min(size, limit) + 1) if size else file.read(limit + 1)
    except OSError as error:
        raise ValueError(f"{where}: {error.strerror}: expected a file that can be read") from error
    if len(data) > limit:
        raise ValueError(f"{where}: more than {_size(limit)}: larger than any file of its kind; is it another one?")
    check_kind(data[:HEAD], where)
    return _decoded(data, where).removeprefix("\ufeff")


def regular(path: str | Path) -> str:
    """The file's name for messages. Opening a pipe would wait for ever, and opening a device may do anything."""
    where = plain(path)
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError as error:
        raise ValueError(f"{where}: no such file") from error
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL
        raise ValueError(f"{where}: {getattr(error, 'strerror', None) or error}: expected a file") from error
    if not stat.S_ISREG(mode):
        if stat.S_ISDIR(mode):
            raise ValueError(f"{where}: got a directory, expected a file: name one of the files in it")
        raise ValueError(f"{where}: got a pipe, socket or device, expected a file: write it to a file first")
    if not os.access(path, os.R_OK):
        raise ValueError(f"{where}: may not be read: change its permissions")
    return where


def _size(limit: int) -> str:
    return f"{limit // 2**20} MiB" if limit >= 2**20 else f"{limit} bytes"


def _decoded(data: bytes, where: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: not UTF-8 text (byte {data[error.start]:#04x} at {error.start}): save the file as UTF-8"
        ) from error


def _check_unicode(line: str, where: str) -> None:
    try:
        line.encode()
    except UnicodeEncodeError as error:
        bad = f"byte {ord(line[error.start]) - 0xDC00:#04x} at column {error.start + 1}"
        raise ValueError(f"{where}: not UTF-8 text ({bad}): save the file as UTF-8") from error


# ---------------------------------------------------------------- JSON


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise Refused(f"the key {shown(twice)} occurs twice: keep one")
    return found


_NUMBERS = {"parse_int": integer, "parse_float": real, "parse_constant": no_number}
_JSON = json.JSONDecoder(object_pairs_hook=_object, **_NUMBERS)
_LENIENT = json.JSONDecoder(object_pairs_hook=_object, **{name: or_text(parse) for name, parse in _NUMBERS.items()})


def parse_json(text: str | bytes, where: str, kind: Any = None, strict: bool = True) -> Any:
    """The value of a JSON text, checked against `kind` (None: any). ValueError begins with `where`, which is to be
    printable (`plain`). strict=False: numbers that are not taken are `Unread` texts, for the caller to refuse."""
    if isinstance(text, bytes):
        text = _decoded(text, where)
    try:
        _check_depth(text)
        value = (_JSON if strict else _LENIENT).decode(text)
        if "\\" in text and re.search(r"\\u[dD][89a-fA-F]", text):  # JSON can spell half of a surrogate pair
            json.dumps(value, ensure_ascii=False).encode()
    except Refused as error:
        raise ValueError(f"{where}: {error}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: {_json_error(error)}") from None  # it holds the whole text
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: not valid Unicode ({error.reason}): {shown(text.strip())}") from None
    except RecursionError as error:  # the caller itself is deep
        raise ValueError(f"{where}: nested too deep to be read from here") from error
    return value if kind is None else checked(value, kind, where)


def _json_error(error: json.JSONDecodeError) -> str:
    text = error.doc
    if not text or text.isspace():
        return "empty: expected JSON"
    at = f"line {error.lineno}, column {error.colno}" if "\n" in text.strip() else f"column {error.colno}"
    cut = "; the text ends there" if error.pos >= len(text.rstrip()) or "Unterminated" in error.msg else ""
    start = max(0, error.pos - 20)
    found = ("..." if start else "") + shown(text[start : start + 80].strip())
    return f"not JSON ({error.msg.removesuffix(' at')} at {at}{cut}): {found}"


def _check_depth(text: str) -> None:
    """Before parsing: C's stack has no limit of its own where a program has lifted Python's."""
    if text.count("[") + text.count("{") <= DEPTH:
        return
    outside = "".join(text.replace("\\\\", "").replace('\\"', "").split('"')[::2])  # of strings
    brackets = outside.encode(errors="replace").translate(None, _NO_BRACKETS)
    for _ in range(DEPTH):  # each round takes the innermost ones away
        length = len(brackets)
        brackets = brackets.replace(b"[]", b"").replace(b"{}", b"")
        if len(brackets) == length:
            break
    if brackets.count(b"[") + brackets.count(b"{") > (DEPTH if len(brackets) == length else 0):
        raise Refused(f"nested deeper than {DEPTH} levels")


_NO_BRACKETS = bytes(byte for byte in range(256) if byte not in b"[]{}")


def is_array(path: str | Path) -> bool:
    """Whether a file begins as a JSON array. ValueError for what is no file that can be read."""
    where = regular(path)
    try:
        with open(path, "rb") as file:
            return file.read(HEAD).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
    except OSError as error:
        raise ValueError(f"{where}: {error.strerror}: expected a file that can be read") from error


def read_array(path: str | Path, limit: int = LIMIT) -> Iterator[tuple[int, str]]:
    """(number from 1, text) of each entry of a JSON array, of at most `limit` characters each. ValueError names the
    file, and the entry that is not JSON."""
    where, text = plain(path), read_text(path, ARRAY_LIMIT)
    try:
        _check_depth(text)
    except Refused as error:
        raise ValueError(f"{where}: {error}") from error
    place, number, end = text.index("[") + 1, 0, False
    while not end:
        number += 1
        try:
            start = _next(text, place)
            if number == 1 and text[start : start + 1] == "]":
                return
            place = _SPANS.raw_decode(text, start)[1]
            if place - start > limit:
                raise ValueError(f"{where}: entry {number}: more than {_size(limit)}: split it, or shorten it")
            yield number, text[start:place]
            place = _next(text, place)
            if text[place : place + 1] not in (",", "]"):
                raise json.JSONDecodeError("Expecting ',' or ']'", text, place)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: entry {number}: {_json_error(error)}") from None  # it holds the whole text
        end, place = text[place] == "]", place + 1
    if rest := text[place:].strip():
        raise ValueError(f"{where}: {shown(rest)} behind the array's end: expected one array, or one object a line")


def _next(text: str, place: int) -> int:
    """Where what follows white space begins."""
    return _SPACE.match(text, place).end()


_SPACE = re.compile("[ \t\n\r]*")
_SPANS = json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=str)  # where values end, and no more


# ---------------------------------------------------------------- YAML


def parse_yaml(text: str, where: str, kind: Any = None) -> Any:
    """The value of one YAML document (1.1, but 1e-5 is a number, as in 1.2), checked against `kind` (None: any); None
    where it is empty. ValueError begins with `where`, which is to be printable (`plain`)."""
    import yaml

    from kunbr_fast.files import yaml_nodes

    try:
        value = yaml_nodes.value_of(text, DEPTH)
    except Refused as error:
        raise ValueError(f"{where}:{error.line}: {error}") from error
    except yaml.MarkedYAMLError as error:
        said = " ".join(part for part in (error.context, error.problem) if part)
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"{where}{line}: not YAML ({plain(said, 160)})") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{where}: not YAML ({plain(' '.join(str(error).split()), 160)})") from error
    return value if kind is None else checked(value, kind, where)


# ---------------------------------------------------------------- types


def checked(value: Any, kind: Any, where: str) -> Any:
    """`value` as a `kind`. ValueError "WHERE: a.b: got ..., expected ..."."""
    import msgspec

    try:
        return msgspec.convert(value, kind, strict=True)
    except msgspec.ValidationError as error:
        said, path = _said(error)
    except UnicodeEncodeError as error:  # of a value that no reader here has seen
        raise ValueError(f"{where}: not valid Unicode: {shown(value)}") from error

    def fails_so(changed: Any) -> bool:
        try:
            msgspec.convert(changed, kind, strict=True)
        except msgspec.ValidationError as error:
            return _said(error) == (said, path)
        return False

    keys, got = _place(value, path, fails_so)
    at = plain("".join(f"[{key}]" if isinstance(key, int) else f".{plain(key, 60)}" for key in keys), 150)
    raise ValueError(f"{where}: {_expectation(at.removeprefix('.'), got, said)}")


def _said(error: Exception) -> tuple[str, str]:
    """(what msgspec says, where: "$.a[...][0]")."""
    said, _, path = str(error).rpartition(" - at `")
    return (said, path.removesuffix("`").removeprefix("key` in `")) if said else (path, "$")


def _place(value: Any, path: str, fails_so: Callable[[Any], bool]) -> tuple[list[str | int], Any]:
    """The keys that lead to what `path` means, and what is there. `[...]` is one of a mapping's keys, which msgspec
    does not tell: the half of the mapping that fails the same way has it."""
    keys: list[str | int] = []
    here = value
    for name, index in re.findall(r"\.([^.\[\]]+)|\[([^\]]+)\]", path):
        if index == "...":
            items = list(here.items()) if isinstance(here, dict) else []
            while len(items) > 1:
                half = items[: len(items) // 2]
                items = half if fails_so(_replaced(value, keys, dict(half))) else items[len(half) :]
            if not items:
                break
            value = _replaced(value, keys, dict(items))
            key = items[0][0]
        else:
            key = name or int(index)
        try:
            here = here[key]
        except (LookupError, TypeError):  # a key of the document's that looks like msgspec's own words
            break
        keys.append(key)
    return keys, here


def _replaced(value: Any, keys: Sequence[str | int], new: Any) -> Any:
    """A copy of `value`, along `keys`, with `new` at their end."""
    if not keys:
        return new
    copy = value.copy()
    copy[keys[0]] = _replaced(value[keys[0]], keys[1:], new)
    return copy


WORDS = {
    "str": "text",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "array": "a list",
    "object": "a mapping",
    "null": "null",
}


def _expectation(at: str, got: Any, said: str) -> str:
    """What msgspec says, in this package's words, about what is `at` a place."""
    name = f"{at}: " if at else ""
    if match := re.match(r"Object (missing required|contains unknown) field `(.*?)`?$", said, re.DOTALL):
        field = plain(f"{at}.{match[2]}" if at else match[2], 150)
        return f"{field} is missing" if match[1].startswith("missing") else f"{name}unknown key {shown(match[2])}"
    if match := re.match(r"Expected `([^`]*)`(?: (?:of )?(length )?([^,]*))?", said):
        kinds = " or ".join(WORDS.get(word, word) for word in match[1].split(" | "))
        more = f" {'of length ' if match[2] else ''}{match[3]}" if match[3] else ""
        hint = " (unquoted on, off, yes and no are true and false)" if isinstance(got, bool) else ""
        return f"{name}got {shown(got)}, expected {kinds}{more}{hint}"
    return f"{name}got {shown(got)}, which is none of the values that it can have"
