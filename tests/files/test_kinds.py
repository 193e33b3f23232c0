"""What is another file than its name says: named with the cure, wherever it is read."""

import bz2
import gzip
import json
import lzma
import os
import pickle
import shutil

import pytest
import tiny_text

import kunbr_fast as kf
from kunbr_fast.files.headers import Header
from kunbr_fast.files.kinds import told
from kunbr_fast.files.models import ModelFolder, load_tokenizer
from kunbr_fast.run.config import KUnBRConfig

LINES = b'{"text": "a line"}\n{"text": "another line"}\n'
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize 12345\n" % (b"4d7a" * 16)
KINDS = {  # the first bytes, and what the message says
    "git-lfs": (POINTER, "a git-lfs pointer, not the file itself: git lfs pull"),
    "gzip": (gzip.compress(LINES), "compressed by gzip: unpack it"),
    "bzip2": (bz2.compress(LINES), "compressed by bzip2"),
    "xz": (lzma.compress(LINES), "compressed by xz"),
    "zstd": (b"\x28\xb5\x2f\xfd\x04\x00", "compressed by zstd"),
    "zip": (b"PK\x03\x04" + bytes(99), "a zip archive"),
    "Parquet": (b"PAR1\x15\x04", "a Parquet table: only records"),
    "Arrow": (b"ARROW1\x00\x00\xff\xff", "an Arrow table"),
    "pickle": (pickle.dumps({"a": 1}), "a pickle"),
    "GGUF": (b"GGUF\x03\x00\x00\x00", "a GGUF file"),
    "a web page": (b"\n<!DOCTYPE html>\n<html>404</html>", "a web page"),
    "UTF-16": (LINES.decode().encode("utf-16"), "UTF-16 text, not UTF-8 text: save the file as UTF-8"),
    "UTF-16 LE": (LINES.decode().encode("utf-16-le"), "UTF-16 text"),
    "UTF-16 BE": (LINES.decode().encode("utf-16-be"), "UTF-16 text"),
    "UTF-32": (LINES.decode().encode("utf-32"), "UTF-32 text"),
    "NUL bytes": (bytes(4096), "NUL bytes"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    tiny_text.tokenizer().save_pretrained(path)
    return path


@pytest.mark.parametrize("name", KINDS)
def test_every_reader_names_it(name, tmp_path, folder):
    data, message = KINDS[name]
    readers = {"r.jsonl": kf.load_records, "run.yaml": KUnBRConfig.load, "model.safetensors": Header.read}
    if name in ("Parquet", "Arrow"):
        del readers["r.jsonl"]  # tests/data/test_tables.py
    if name.startswith("UTF"):
        del readers["model.safetensors"]  # it begins with a number
    for file, read in readers.items():
        path = tmp_path / file
        path.write_bytes(data)
        with pytest.raises(ValueError, match=f"^{path}: {message}"):
            read(path)
    assert told(data) and told(data).isprintable()


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "tokenizer.model"])
def test_a_tokenizers_files(file, tmp_path, folder):
    shutil.copytree(folder, tmp_path / "m")
    path = tmp_path / "m" / file
    good = path.read_bytes() if path.exists() else b"{}"
    if file == "tokenizer.model":
        path.write_bytes(POINTER)
        load_tokenizer(tmp_path / "m")  # of a clone without it: tokenizer.json alone is read
        (tmp_path / "m" / "tokenizer.json").unlink()
    for data, message in ((POINTER, "a git-lfs pointer"), (b"\xef\xbb\xbf" + good, "begins with a byte order mark")):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=f"^{path}: {message}"):
            load_tokenizer(tmp_path / "m")


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_a_models_settings(file, tmp_path):
    tiny_text.model().save_pretrained(tmp_path)
    good = (tmp_path / file).read_bytes()
    for data, message in ((POINTER, "a git-lfs pointer"), (b"\xef\xbb\xbf" + good, "begins with a byte order mark")):
        (tmp_path / file).write_bytes(data)
        with pytest.raises(ValueError, match=f"^{tmp_path / file}: {message}"):
            ModelFolder(tmp_path)


def test_weights_that_are_a_pointer(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(POINTER)
    with pytest.raises(ValueError, match=f"^{path}: a git-lfs pointer, not the file itself: git lfs pull"):
        Header.read(path)


@pytest.mark.parametrize("text", [
    LINES, b"", b"{", b"version: 1\n", b"seed: 1", b"PK: 1", b"BZh: 1", "é".encode(), b"<|im_start|>", b"GG", b"\xff",
    b"# version https://git-lfs.github.com/spec/v1", '{"text": "日本"}'.encode(),
])  # fmt: skip
def test_text_is_none_of_them(text):
    assert told(text) is None


# ---------------------------------------------------------------- lines that are right, or almost


@pytest.mark.parametrize("text", [
    b"\xef\xbb\xbf" + LINES, LINES.replace(b"\n", b"\r\n"), b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n"),
    LINES.replace(b"\n", b"\r"), b"\xef\xbb\xbf\xef\xbb\xbf" + LINES, LINES + b"\xef\xbb\xbf", LINES.rstrip(),
    LINES.replace(b"\n", b"\n\xef\xbb\xbf\n", 1), b"\n\n" + LINES,
])  # fmt: skip
def test_marks_and_ends_of_lines(text, tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_bytes(text)
    assert [record["text"] for record in kf.load_records(path)] == ["a line", "another line"]


def test_files_with_marks_one_after_the_other(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_bytes((b"\xef\xbb\xbf" + LINES) * 3)
    assert len(kf.load_records(path)) == 6
    path.write_bytes(b'{"text": "a\xef\xbb\xbfb"}')  # one in a string is text
    assert kf.load_records(path)[0]["text"] == "a\ufeffb"


def test_separators_of_unicode_end_no_line(tmp_path):
    path, text = tmp_path / "r.jsonl", "a\u2028b\u2029c\x85d\u000be"
    path.write_text(json.dumps({"text": text}, ensure_ascii=False).replace("\\u000b", "\\u000b") + "\n")
    assert kf.load_records(path)[0]["text"] == text


ALMOST = {
    "an object in lines": (json.dumps({"text": "a"}, indent=1), ":1: an object over several lines"),
    "CSV": ("question,choices,answer\nq,a,0\n", r":1: a table \(CSV\) with the columns \['question'"),
    "CSV, quoted": ('"text","split"\n"a","b"\n', r":1: a table"),
    "TSV": ("prompt\tcompletion\np\tc\n", r":1: a table"),
    "NUL bytes at the end": (LINES.decode() + "\0" * 9, ":3: a NUL byte at column 1"),
    "NUL in a line": ('{"text": "a\0b"}', ":1: a NUL byte at column 12"),
}


@pytest.mark.parametrize("name", ALMOST)
def test_what_is_almost_lines(name, tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text(ALMOST[name][0])
    with pytest.raises(ValueError, match=f"^{path}{ALMOST[name][1]}") as error:
        kf.load_records(path)
    assert str(error.value).isprintable() and len(str(error.value)) < 300 + len(str(path))


@pytest.mark.parametrize("make, message", [
    (os.mkdir, "got a directory, expected a file: name one of the files in it"),
    (os.mkfifo, "got a pipe, socket or device, expected a file: write it to a file first"),
])  # fmt: skip
def test_what_is_no_file(make, message, tmp_path):
    path = tmp_path / "r.jsonl"
    make(path)
    for read in (kf.load_records, KUnBRConfig.load):
        with pytest.raises(ValueError, match=f"^{path}: {message}"):
            read(path)
