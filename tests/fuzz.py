"""Damaged and hostile documents, the same at each run: what every reader must answer with one line.

`mutated` changes bytes, `replaced` puts something else in one place of a parsed value, `HOSTILE_JSON` and
`HOSTILE_YAML` are whole documents. `one_line(error, name)` is what all of them must end with.
"""

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

DEEP: Any = None
for _ in range(40):
    DEEP = [DEEP]

# what stands in a place that expects something else; all of it can be written as JSON
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 7, 2**31, 2**63, 2**64, -(2**70), 10**30, 10**400),
    *(0.5, -0.5, 1e39, 1e308, 5e-324, float("nan"), float("inf")),
    *("", " ", "0", "x" * 5000, "../../victim", "/etc/passwd", "a\x00b", "\x1b[31m\n", "\u202eabc", "$x$", "é"),
    *([], {}, [None], [[]], {"": 0}, {"a": {"b": []}}, [0] * 1000, DEEP, {"x" * 3000: 1}, [1, "2", None]),
)

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi")
)
DIGITS = "9" * 100_000
HOSTILE_JSON: dict[str, bytes] = {
    "empty": b"",
    "blank": b" \n\n",
    "null": b"null",
    "cut short": b'{"a": [1, 2',
    "cut in a string": b'{"a": "bc',
    "garbage behind": b'{"a": 1} x',
    "two documents": b'{"a": 1}\n{"a": 2}',
    "a key twice": b'{"a": 1, "a": 2}',
    "NaN": b'{"a": NaN}',
    "Infinity": b'{"a": -Infinity}',
    "1e999": b'{"a": 1e999}',
    "30 digits": b'{"a": 123456789012345678901234567890}',
    "400 digits": b'{"a": %s}' % (b"1" * 400),
    "10^5 digits": b'{"a": %s}' % DIGITS.encode(),
    "10^5 decimals": b'{"a": 0.%s}' % DIGITS.encode(),
    "not UTF-8": b'{"a": "\xff\xfe"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "half a surrogate": b'{"a": "\\ud800"}',
    "half a surrogate as a key": b'{"\\udfff": 1}',
    "a raw control character": b'{"a": "\x01"}',
    "NUL": b"\x00" * 100,
    "a wrong escape": b'{"a": "\\x41"}',
    "single quotes": b"{'a': 1}",
    "2000 lists": b"[" * 2000 + b"]" * 2000,
    "10^6 lists, open": b"[" * 10**6,
    "10^6 lists": b"[" * 10**6 + b"]" * 10**6,
    "10^5 objects": b'{"a":' * 10**5 + b"1" + b"}" * 10**5,
    "brackets that do not match": b"[}" * 1000,
    "a comment": b'{"a": 1} // x',
    "pickle": b"\x80\x04\x95\x0b\x00\x00\x00",
    "zip": b"PK\x03\x04" + bytes(range(256)),
}
HOSTILE_YAML: dict[str, bytes] = {
    "aliases that multiply": BOMB.encode(),
    "an alias": b"a: &x 1\nb: *x",
    "an alias of itself": b"&x [*x]",
    "a key twice": b"seed: 1\nseed: 2",
    "a key twice in a mapping": b"objective_options: {beta: 1, beta: 2}",
    "a merge": b"<<: {seed: 1}",
    "2000 lists": b"[" * 2000 + b"]" * 2000,
    "10^4 lists, open": b"[" * 10**4,
    "2000 lists in lines": b"- " * 2000 + b"x",
    "2000 mappings": b"{a: " * 2000 + b"}" * 2000,
    "deep keys": b"? " * 2000,
    "a Python object": b"seed: !!python/object/apply:os.system ['true']",
    "a tag": b"seed: !int 3",
    "binary": b"seed: !!binary aGFsbG8=",
    "a set": b"!!set {a, b}",
    "two documents": b"---\nseed: 1\n---\nseed: 2\n",
    "base 60": b"seed: 1:30",
    "base 8": b"seed: 010",
    "a date": b"seed: 2024-01-01",
    ".inf": b"block_lr: .inf",
    ".nan": b"block_lr: .NaN",
    "1e999": b"block_lr: 1e999",
    "30 digits": b"seed: 123456789012345678901234567890",
    "400 digits": b"seed: " + b"1" * 400,
    "10^4 digits": b"seed: " + b"9" * 10**4,
    "a key that is a bool": b"on: 1",
    "a key that is a number": b"1: 1",
    "a key that is a list": b"? [a]\n: 1",
    "not UTF-8": b"seed: \xff",
    "UTF-16": "seed: 1".encode("utf-16"),
    "half a surrogate": b'target: "\\ud800"',
    "a control character": b"target: \x1b[31m",
    "NUL": b"\x00" * 10,
    "a tab": b"seed:\n\t- 1",
    "cut short": b"seed: [1, 2",
    "an open quote": b'target: "all',
    "a list": b"- 1\n- 2",
    "a word": b"hello",
    "10^5 bytes": b"a" * 10**5,
}


def mutated(data: bytes, seed: int, count: int) -> Iterator[bytes]:
    """`count` copies of `data`, each with one to four places changed, cut, doubled or overwritten."""
    random_ = random.Random(seed)
    for _ in range(count):
        found = bytearray(data)
        for _ in range(random_.randint(1, 4)):
            at = random_.randrange(len(found) + 1)
            length = min(random_.choice((1, 1, 2, 8, 64)), len(found) - at)
            kind = random_.randrange(6)
            if kind == 0 and length:
                found[at] ^= 1 << random_.randrange(8)
            elif kind == 1:
                del found[at : at + length]
            elif kind == 2:
                found[at:at] = found[at : at + length] * random_.choice((1, 3))
            elif kind == 3:
                found[at : at + length] = random_.choice(
                    (b"", b"\x00", b"\xff", b"[", b"}", b'"', b"\\", b",", b":", b"null", b"NaN", b"-", b"1e999", b"\n")
                )
            elif kind == 4:
                found[at : at + length] = random_.randbytes(length)
            elif at:
                del found[at:]
        yield bytes(found)


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of every value inside a parsed document, its own (empty) first."""
    yield path
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(item, (*path, key))


def replaced(value: Any, seed: int, count: int) -> Iterator[Any]:
    """`count` copies of a parsed document, each with one place replaced by one of VALUES, left out, or given twice."""
    random_, found = random.Random(seed), list(places(value))
    for _ in range(count):
        path = random_.choice(found)
        new = copy.deepcopy(random_.choice(VALUES))
        if not path:
            yield new
            continue
        changed = copy.deepcopy(value)
        holder = changed
        for key in path[:-1]:
            holder = holder[key]
        kind = random_.randrange(8)
        if kind == 0:
            del holder[path[-1]]
        elif kind == 1 and isinstance(holder, dict):
            holder[random_.choice(("extra", "", "\x1b", "_where"))] = new
        elif kind == 1:
            holder.append(new)
        else:
            holder[path[-1]] = new
        yield changed


def as_json(value: Any) -> bytes:
    """With NaN, infinity and numbers of any length, which a careless writer makes."""
    return json.dumps(value).encode()


def one_line(error: BaseException, name: Any = "") -> None:
    """Asserts that an error is a message for the user: one line, short, and it names the file."""
    text = str(error)
    assert isinstance(error, ValueError) and not isinstance(error, UnicodeError), repr(error)[:300]
    assert text.isprintable() and len(text) < 400 + len(str(name)), text[:600]
    assert str(name) in text, text[:400]
