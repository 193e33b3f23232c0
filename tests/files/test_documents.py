"""What is read: each kind of damaged or hostile document ends with one line that names the file."""

import json
import os
from typing import Literal, TypedDict

import fuzz
import msgspec
import pytest
from helpers import python

from kunbr_fast.files import documents
from kunbr_fast.files.documents import parse_json, parse_yaml, read_json, read_lines, read_yaml
from kunbr_fast.files.shown import plain, shown


class Entry(TypedDict):
    size: int
    parts: list[float]


class Index(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    files: dict[str, Entry]
    kind: Literal["old", "new"] = "new"
    pair: tuple[int, int] | None = None


GOOD = {"name": "é \n\x1b", "files": {"a": {"size": 1, "parts": [0.1, 2]}, "b": {"size": -(2**63), "parts": []}}}


def refused(call, *arguments):
    with pytest.raises(ValueError) as caught:
        call(*arguments)
    fuzz.one_line(caught.value, plain(arguments[0]))
    return str(caught.value)


def test_good_documents(tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(fuzz.as_json(GOOD))
    assert read_json(path) == GOOD == read_json(path, dict)
    found = read_json(path, Index)
    assert found.name == GOOD["name"] and found.files == GOOD["files"] and found.pair is None
    deepest = "[" * documents.DEPTH + "]" * documents.DEPTH
    assert json.dumps(parse_json(deepest, "x"), separators=(",", ":")) == deepest
    assert parse_json(b'["\\ud83d\\ude00", 18446744073709551615, 1e308, "[[["]', "x")[:2] == ["😀", 2**64 - 1]
    brackets = json.dumps(['"[{' * 100, "\\", '\\"]]' * 100])
    assert parse_json(brackets, "x") == json.loads(brackets)  # in text they are no depth


def test_a_byte_order_mark_is_skipped(tmp_path):
    path = tmp_path / "x"
    path.write_text('{"a": 1}', encoding="utf-8-sig")
    assert read_json(path) == read_yaml(path) == {"a": 1}
    assert [line for _, line in read_lines(path)] == ['{"a": 1}']


@pytest.mark.parametrize("name", [name for name in fuzz.HOSTILE_JSON if name != "null"])
def test_hostile_json(tmp_path, name):
    path = tmp_path / "x.json"
    path.write_bytes(fuzz.HOSTILE_JSON[name])
    refused(read_json, path)


@pytest.mark.parametrize("name", fuzz.HOSTILE_YAML)
def test_hostile_yaml(tmp_path, name):
    path = tmp_path / "x.yaml"
    path.write_bytes(fuzz.HOSTILE_YAML[name])
    refused(read_yaml, path, dict)


def test_a_raised_recursion_limit_is_no_danger():
    """C's stack ends where Python's limit does not hold."""
    code = "import sys, fuzz\nfrom kunbr_fast.files.documents import *\nsys.setrecursionlimit(10**9)\n"
    code += "for parse, texts in ((parse_json, fuzz.HOSTILE_JSON), (parse_yaml, fuzz.HOSTILE_YAML)):\n"
    code += "    for text in texts.values():\n        try:\n            parse(text.decode('latin-1'), 'x')\n"
    code += "        except ValueError as error:\n            pass\nprint('whole')"
    done = python("-c", code)
    assert done.stdout.strip() == "whole", done.stderr[-500:]


def test_what_yaml_means():
    text = "a: 1e-5\nb: 1E3\nc: on\nd: ~\ne: '1:30'\nf: 0x1F\ng: 1_000\nh: [1, x, {y: -.5}]\ni: 2.\nj: +3\nk: \"010\"\n"
    found = {"a": 1e-5, "b": 1e3, "c": True, "d": None, "e": "1:30", "f": 31, "g": 1000, "h": [1, "x", {"y": -0.5}]}
    assert parse_yaml(text, "x") == found | {"i": 2.0, "j": 3, "k": "010"}
    assert parse_yaml("", "x") is None and parse_yaml("# nothing", "x") is None
    said = [refused(lambda where, t=t: parse_yaml(t, where), "x") for t in ("\na: 1:30", "a: 010", "a: 2024-01-01")]
    assert "x:2: a: '1:30' is read as a number in base 60" in said[0]
    assert "base 8" in said[1] and "is read as a date" in said[2]
    assert "unquoted on, off, yes and no" in refused(lambda where: parse_yaml("a: off", where, dict[str, str]), "x")


def test_types():
    for value, said in {
        "[]": "x: got [], expected a mapping",
        '{"name": "a"}': "x: files is missing",
        '{"name": null, "files": {}}': "x: name: got None, expected text",
        '{"name": "a", "files": {"p": {"size": 1, "parts": []}, "q\\u001b": {"size": 1.5, "parts": []}}}': (
            "x: files.q\\x1b.size: got 1.5, expected a whole number"
        ),
        '{"name": "a", "files": {"p": {"size": 1, "parts": [1, "2"]}}}': "files.p.parts[1]: got '2', expected a number",
        '{"name": "a", "files": {}, "pair": [1]}': "x: pair: got [1], expected a list of length 2",
        '{"name": "a", "files": {}, "kind": "no"}': "x: kind: got 'no', which is none of",
        '{"name": "a", "files": {}, "na\\nme - at `$.q[0]": 1}': "x: unknown key 'na\\nme",
    }.items():
        assert said in refused(lambda where, v=value: parse_json(v, where, Index), "x")


def test_fuzz_of_bytes_and_of_values():
    good = fuzz.as_json(GOOD)
    texts = [*fuzz.mutated(good, 1, 1500), *map(fuzz.as_json, fuzz.replaced(GOOD, 2, 1500))]
    taken = 0
    for text in texts:
        for parse in (parse_json, parse_yaml):
            try:
                found = parse(text.decode("utf-8", "replace"), "x.json", Index)
            except ValueError as error:
                fuzz.one_line(error, "x.json")
            else:
                taken += isinstance(found, Index) and isinstance(found.name, str)
    assert 50 < taken < len(texts)


def test_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    odd = [
        tmp_path,
        tmp_path / "pipe",
        "/dev/zero",
        "/dev/null",
        tmp_path / "none",
        tmp_path / "loop",
        "a\0b",
        "x" * 9999,
    ]
    for path in odd:
        for read in (read_json, read_yaml, lambda p: list(read_lines(p))):
            refused(read, path)
    strange = tmp_path / "\x1b[31m\n\u202e.json"
    strange.write_text("{")
    assert r"\x1b[31m\n\u202e.json" in refused(read_json, strange)


def test_size(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b'["' + b"a" * 100 + b'"]\n')
    assert "more than 99 bytes" in refused(read_json, path, None, 99)
    assert "more than 99 bytes" in refused(read_yaml, path, None, 99)
    assert "x:1: a line of more than 99 bytes" in refused(lambda p: list(read_lines(p, 99)), path)
    path.write_text("é" * 50 + "\n")  # 51 characters
    assert "x:1: a line of more than 99 bytes" in refused(lambda p: list(read_lines(p, 99)), path)
    assert len(list(read_lines(path, 101))) == 1
    path.write_bytes(b"1\n\n2\xff\n")
    assert "x:3: not UTF-8 text (byte 0xff at column 2)" in refused(lambda p: list(read_lines(p)), path)


WORST = {
    "60 MB in a line": lambda: b'{"text": "' + b"a" * 60_000_000 + b'"}',
    "60 MB of lists": lambda: b"[" + b"[]," * 20_000_000 + b"1]",
    "16 MiB of lists": lambda: b"[" + b"[]," * (5 * 2**20) + b"1]",
    "10^6 lists": lambda: fuzz.HOSTILE_JSON["10^6 lists"],
    "10^5 digits": lambda: fuzz.HOSTILE_JSON["10^5 digits"],
    "aliases": lambda: fuzz.HOSTILE_YAML["aliases that multiply"],
    "10^4 lists in YAML": lambda: fuzz.HOSTILE_YAML["10^4 lists, open"],
    "64 KiB of YAML": lambda: b"- - - - a\n" * 6000,
}


WORST_CODE = """
import resource, sys, yaml, msgspec
from kunbr_fast.files.documents import read_json, read_lines, read_yaml
resource.setrlimit(resource.RLIMIT_AS, (2**30, 2**30))
for path in sys.argv[1:]:
    for read in (read_json, read_yaml, lambda path: list(read_lines(path))):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_utime
        try:
            read(path)
            said = "taken"
        except ValueError as error:
            said = str(error)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_utime - before, said)
"""


def test_time_and_memory(tmp_path):
    """At most 2 s of the processor (4 here, where other tests run beside it), and 1 GiB of address space."""
    for name, data in WORST.items():
        (tmp_path / name).write_bytes(data())
    done = python("-c", WORST_CODE, *(tmp_path / name for name in WORST))
    assert done.returncode == 0, done.stderr[-500:]
    lines = done.stdout.splitlines()
    assert len(lines) == 3 * len(WORST)
    for line in lines:
        assert float(line.partition(" ")[0]) < 4 and len(line) < 400, line[:500]


def test_shown():
    loop = []
    loop.append(loop)
    wide = {str(i): [i] * 10 for i in range(10**5)}
    for value in (
        10**5000,
        "a" * 10**6,
        loop,
        wide,
        "\x1b\n\u202e" * 50,
        fuzz.DEEP,
        b"\0" * 99,
        {1: {2: 3}},
        fuzz.VALUES,
    ):
        text = shown(value)
        assert len(text) <= 60 and text.isprintable()
    assert shown(10**5000) == "an integer of 16610 bits" and shown("a" * 99, 20) == "'" + "a" * 16 + "..."
    for value in (None, True, 1.5, "x", (1,), [1, "a"], {"a": {"b": ()}}, b"x", 2**100):
        assert shown(value) == repr(value)
    assert plain("a\x1b\u202eb") == r"a\x1b\u202eb" and len(plain("x" * 999)) == 303
