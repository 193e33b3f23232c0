"""Records from JSON arrays, CSV, Parquet, Arrow and `datasets` folders: those that JSON lines give, or an error."""

import csv
import json
import sys

import pytest

import kunbr_fast as kf
from kunbr_fast.files import tables
from kunbr_fast.files.documents import read_array

FORMS = [
    {"question": "When, q?", "choices": [1907, "19\n21", 3], "answer": 1, "fact": 7, "id": "a"},
    {"text": 'a "line", é\r\nand more', "split": "s"},
    {"prompt": "p ", "completion": " c", "alternate": " d"},
    {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "x"}], "fact": "b7"},
]


def plain(path, **options):
    return [{k: v for k, v in record.items() if k != "_where"} for record in kf.load_records(path, **options)]


def as_csv(path, records, separator=",", **options):
    names = list(dict.fromkeys(key for record in records for key in record))
    with open(path, "w", newline="", encoding=options.pop("encoding", "utf-8")) as file:
        writer = csv.writer(file, delimiter=separator, **options)
        writer.writerow(names)
        for record in records:
            cells = [record.get(name, "") for name in names]
            writer.writerow([json.dumps(cell) if isinstance(cell, list) else cell for cell in cells])
    return path


def refused(path, text, **options):
    with pytest.raises(ValueError, match=text) as error:
        kf.load_records(path, **options)
    message = str(error.value)
    assert message.startswith(str(path)) and message.isprintable() and len(message) < 400 + len(str(path)), message


# ---------------------------------------------------------------- JSON arrays


@pytest.mark.parametrize("indent, mark", [(None, ""), (2, ""), (None, "\ufeff"), (1, "\n ")])
def test_arrays(indent, mark, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(mark + json.dumps(FORMS, indent=indent) + "\n")
    assert plain(path) == FORMS
    assert [r["_where"] for r in kf.load_records(path)] == [f"{path}: entry {i}" for i in (1, 2, 3, 4)]


@pytest.mark.parametrize("text, message", [
    ('[{"text": "a"}, {"text": }]', "entry 2: not JSON .*column 26"),
    ('[{"text": "a"}', "entry 1: not JSON .*ends there"), ("[" * 99 + "]" * 99, "deeper than 64"),
    ('[{"text": "a"}]\n{"text": "b"}', "behind the array's end"), ('[{"text": "a"},]', "entry 2: not JSON"),
    ("[]", "empty: expected"), ('["a"]', "entry 1: got a str, expected an object"),
    ('[{"text": "a", "text": "b"}]', "entry 1: the key 'text' occurs twice"),
    ('[{"text": 1e999}]', "entry 1: 'text': the number 1e999"),
    ('[{"question": "q", "choices": [2.50, 3], "answer": 0}]', "entry 1: the choice 2.50 is a number"),
    ('[{"text": "a"} {"text": "b"}]', "entry 1: not JSON .*Expecting ','"), ("[1, 2", "entry 1: got a int"),
])  # fmt: skip
def test_arrays_that_are_refused(text, message, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    refused(path, message)


def test_an_entry_has_the_limit_of_a_line(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"text": "b" * 2**23}] * 3))  # all of them on one line, which is longer
    assert len(kf.load_records(path)) == 3
    path.write_text(json.dumps([{"text": "a"}, {"text": "b" * 99}]))
    with pytest.raises(ValueError, match="entry 2: more than 50 bytes"):
        list(read_array(path, 50))


# ---------------------------------------------------------------- CSV


@pytest.mark.parametrize("name, separator, options", [
    ("t.csv", ",", {}), ("t.csv", ";", {}), ("t.CSV", ",", {"encoding": "utf-8-sig"}), ("t.tsv", "\t", {}),
    ("t.csv", ",", {"lineterminator": "\n", "quoting": csv.QUOTE_ALL}),
])  # fmt: skip
def test_csv(name, separator, options, tmp_path):
    path = as_csv(tmp_path / name, FORMS, separator, **options)
    before = csv.field_size_limit()
    assert plain(path) == FORMS
    # where each row begins: the second one's text has a line end in it
    assert [r["_where"] for r in kf.load_records(path)] == [f"{path}:{n}" for n in (2, 3, 5, 6)]
    assert csv.field_size_limit() == before


def test_choices_in_columns_of_their_own(tmp_path):
    path = tmp_path / "mmlu.csv"
    path.write_text(",question,A,B,C,D,answer\n0,q?,1.50,x,y,,B\n1,r?,1,2,3,4,3\n")
    columns = dict.fromkeys("ABCD", "choices")
    records = plain(path, columns=columns)
    assert records[0] == {"_index": "0", "question": "q?", "choices": ["1.50", "x", "y"], "answer": 1}
    assert records[1]["choices"] == ["1", "2", "3", "4"] and records[1]["answer"] == 3
    with pytest.raises(
        ValueError, match="a lettered question's form .read by --forget-columns or its like, A=choices B=choices"
    ):
        kf.load_records(path)


def test_an_answer_that_is_a_letter_or_a_choice(tmp_path):
    path = tmp_path / "l.csv"
    path.write_text("question,A,B,answer\nq,B,x,B\n")  # "B" is the text of A and the letter of B
    refused(path, r":2: 'answer' must be the index", columns=dict.fromkeys("AB", "choices"))
    path.write_text("question,A,B,C,answer\nq,x,,y,A\n")
    refused(path, r":2: the choice 'B' is empty", columns=dict.fromkeys("ABC", "choices"))


@pytest.mark.parametrize("text, message", [
    ("text,id\na,1\nb\n", r":3: 1 cells, and 2 columns"), ("text\na, b\n", r":2: 2 cells, and 1 columns .* ',' in it"),
    ("text,text\na,b\n", ":1: 2 columns are called 'text'"), ("text,\na,b\n", ":1: column 2 has no name"),
    ("text\n", "empty: expected"), ('text\n"a"b\n', ":2: not CSV"), ('text\n"a\nb', ":2: not CSV"),
    ("prompt,completion\na,\n", ":2: 'completion' must be a string"), ("text\n \n", ":2: 'text' must be a string"),
    ("question,choices,answer\nq,\"['a', 'b']\",0\n", r":2: 'choices' is .*expected a list of JSON"),
    ('question,choices,answer\nq,"[2.50, 3]",0\n', r":2: 'choices': the choice 2.50 is a number"),
    ('question,choices,answer\nq,"[2, 3]",2\n', r":2: 'answer' must be .*counted from 0"),
    ("text,label\na,1\n", ":2: 'label' beside text would not be used"),
])  # fmt: skip
def test_csv_that_is_refused(text, message, tmp_path):
    path = tmp_path / "t.csv"
    path.write_bytes(text.encode())
    refused(path, message)


def test_lines_of_json_in_a_table_are_read_as_such(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text(json.dumps({"text": "a"}))
    assert plain(path) == [{"text": "a"}]


def test_long_cells(tmp_path):
    path = as_csv(tmp_path / "t.csv", [{"text": "word " * 50_000}])  # beyond csv's own limit
    assert len(plain(path)[0]["text"]) == 250_000


# ---------------------------------------------------------------- columns


@pytest.mark.parametrize("columns, message", [
    ({"question": "promt"}, "columns: 'question' as 'promt': no key .*did you mean 'prompt'"),
    ({"a": "text", "b": "text"}, "columns: 'a' and 'b' are both 'text'"),
])  # fmt: skip
def test_columns_that_are_wrong(columns, message, tmp_path):
    path = tmp_path / "f.jsonl"
    path.write_text('{"question": "q", "answer": "a"}\n')
    with pytest.raises(ValueError, match=message):
        kf.load_records(path, columns=columns)


def test_columns(tmp_path):
    path, pair = tmp_path / "f.jsonl", {"question": "prompt", "answer": "completion"}
    path.write_text('{"question": "q", "answer": " a", "id": 1}\n{"text": "ours", "answer": null}\n')
    assert plain(path, columns=pair) == [{"prompt": "q", "completion": " a", "id": 1}, {"text": "ours"}]
    refused(path, "columns: no line has 'anser'.*mean 'answer'", columns=pair | {"anser": "alternate"})
    refused(path, ":1: .*no line so far has 'anser'.*mean 'answer'", columns={"anser": "completion"})
    refused(path, ":1: it has 'question' itself", columns={"answer": "question"})
    path.write_text('{"question": "q", "answer": " a", "id": 1, "note2": 1}\n')
    refused(path, ":1: 'note2' beside", columns=pair | {"id": "fact"})
    assert plain(path, columns=pair | {"id": "fact"}, ignore_keys=["note2"])[0]["fact"] == 1
    path.write_text('{"prompt": "c", "completion": "p"}\n')
    swapped = {"prompt": "completion", "completion": "prompt"}
    assert plain(path, columns=swapped) == [{"prompt": "p", "completion": "c"}]
    path.write_text('{"question": "q", "options": [2.50, 3], "answer": 0}\n')
    refused(path, ":1: the choice 2.50 is a number", columns={"options": "choices"})


# ---------------------------------------------------------------- Parquet, Arrow, datasets


@pytest.fixture
def arrow():
    pytest.importorskip("pyarrow.parquet", reason="Parquet and Arrow take pyarrow (the extra `tables`)")
    return sys.modules["pyarrow"]


def save_to_disk(folder, table, parts=1, name="data"):
    """A folder as `datasets` writes it: streams of Arrow, named in state.json."""
    from pyarrow import ipc

    folder.mkdir(parents=True)
    files = [f"{name}-{i:05d}-of-{parts:05d}.arrow" for i in range(parts)]
    size = -(-table.num_rows // parts)
    for i, file in enumerate(files):
        with ipc.new_stream(folder / file, table.schema) as stream:
            stream.write_table(table.slice(i * size, size))
    state = {"_data_files": [{"filename": file} for file in files], "_format_columns": None, "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")
    return folder


ROWS = [
    {"question": "q?", "choices": ["1907", "x"], "answer": 1, "fact": 3, "score": 0.5},
    {"text": "a line"},
    {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "x", "name": None}]},
]
READ = [ROWS[0], ROWS[1], {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "x"}]}]


def test_parquet_and_arrow(arrow, tmp_path):
    from pyarrow import ipc

    table = arrow.Table.from_pylist([*ROWS, *ROWS], schema=arrow.schema([
        ("question", arrow.string()), ("choices", arrow.list_(arrow.large_string())), ("answer", arrow.float64()),
        ("fact", arrow.int8()), ("score", arrow.float32()), ("text", arrow.dictionary(arrow.int32(), arrow.string())),
        ("messages", arrow.list_(arrow.struct([(k, arrow.string()) for k in ("role", "content", "name")]))),
    ]))  # fmt: skip
    arrow.parquet.write_table(table, tmp_path / "t.jsonl", row_group_size=2)  # known by its bytes, not by its name
    with ipc.new_file(tmp_path / "f.arrow", table.schema) as file:
        file.write_table(table, 2)
    with ipc.new_stream(tmp_path / "s.arrow", table.schema) as file:
        file.write_table(table)
    save_to_disk(tmp_path / "forget", table, 4)
    for name in ("t.jsonl", "f.arrow", "s.arrow", "forget"):
        path = tmp_path / name
        assert plain(path) == [*READ, *READ], name
        assert type(plain(path)[0]["answer"]) is int
        assert [r["_where"] for r in kf.load_records(path)] == [f"{path}: row {n}" for n in range(1, 7)]


@pytest.mark.parametrize("make, message", [
    (lambda a: {"text": a.array([1, 2], a.timestamp("s"))}, "row 1: 'text': the column holds timestamp"),
    (lambda a: {"text": a.array([b"a", b"b"])}, "row 1: 'text': the column holds binary"),
    (lambda a: {"text": ["a", "b"], "image": a.array([b"a", b"b"])}, "row 1: 'image' beside text would not be used"),
    (lambda a: {"text": ["a", "b"], "fact": a.array([1, 2], a.date32())}, "row 1: 'fact': the column holds date32"),
    (lambda a: {"text": ["a", "b"], "alternate": a.array([b"a", b"b"])}, "row 1: 'alternate': the column holds bin"),
    (lambda a: {"question": ["q"], "choices": [[1.5, 2]], "answer": [0]}, "row 1: the choice 1.5 is a float of a tab"),
    (lambda a: {"question": ["q"], "choices": [["a", "b"]], "answer": [0.5]}, "row 1: 'answer' must be the index"),
    (lambda a: {"text": ["a", 'b' * (2**24 + 1)]}, "row 2: more than 16 MiB"),
    (lambda a: {"text": ["a", " "]}, "row 2: 'text' must be a string that is not blank"),
    (lambda a: {"text": a.array([], a.string())}, "empty: expected"),
])  # fmt: skip
def test_rows_that_are_refused(make, message, arrow, tmp_path):

    table = arrow.table(make(arrow))
    arrow.parquet.write_table(table, tmp_path / "t.parquet")
    refused(tmp_path / "t.parquet", message)
    refused(save_to_disk(tmp_path / "t", table), message)


def test_columns_of_annotations_may_hold_anything(arrow, tmp_path):

    table = arrow.table({"text": ["a"], "date": arrow.array([1], arrow.date32()), "_image": arrow.array([b"x"])})
    arrow.parquet.write_table(table, tmp_path / "t.parquet")
    assert plain(tmp_path / "t.parquet")[0]["text"] == "a"
    arrow.parquet.write_table(table.append_column("audio", arrow.array([b"x"])), tmp_path / "t.parquet")
    assert plain(tmp_path / "t.parquet", ignore_keys=["audio"])[0]["text"] == "a"


def test_damaged_tables(arrow, tmp_path):

    table = arrow.table({"text": [f"line {i}" for i in range(999)]})
    arrow.parquet.write_table(table, tmp_path / "t.parquet")
    whole = (tmp_path / "t.parquet").read_bytes()
    for data in (whole[:-9], whole[: len(whole) // 2], b"PAR1\x15\x04", whole[:50] + b"\xff" * 40 + whole[90:]):
        (tmp_path / "t.parquet").write_bytes(data)
        refused(tmp_path / "t.parquet", "not a whole Parquet table")
    folder = save_to_disk(tmp_path / "d", table)
    (file,) = folder.glob("*.arrow")
    file.write_bytes(file.read_bytes()[:700])
    refused(file, "not a whole Arrow table")
    refused(folder, "not a whole Arrow table")
    file.unlink()
    refused(folder, "no such file")


def test_folders(arrow, tmp_path):
    table = arrow.table({"text": ["a"]})
    for split in ("forget", "retain"):
        save_to_disk(tmp_path / "d" / split, table)
    (tmp_path / "d" / "dataset_dict.json").write_text('{"splits": ["forget", "retain"]}')
    refused(tmp_path / "d", f"a DatasetDict of forget, retain: name one of them, such as {tmp_path}/d/forget")
    state = tmp_path / "d" / "forget" / "state.json"
    good = json.loads(state.read_text())
    for wrong, message in (
        ({"_indices_data_files": [{"filename": "i.arrow"}]}, r"flatten_indices\(\)"),
        ({"_data_files": [{"filename": "../retain/data-00000-of-00001.arrow"}]}, "names no data files"),
        ({"_data_files": []}, "names no data files"),
    ):
        state.write_text(json.dumps(good | wrong))
        refused(tmp_path / "d" / "forget", message)
    (tmp_path / "hub" / "data").mkdir(parents=True)
    (tmp_path / "hub" / "data" / "train.parquet").touch()
    refused(tmp_path / "hub", "a folder of Parquet tables: name one of them")


def test_folders_that_datasets_writes(tmp_path):
    datasets = pytest.importorskip("datasets", reason="what it writes is written here by hand too")
    rows = datasets.Dataset.from_list([{"text": f"line {i}", "id": i} for i in range(9)])
    rows.save_to_disk(str(tmp_path / "all"), num_shards=2)
    datasets.DatasetDict({"forget": rows.shuffle(0).select(range(4))}).save_to_disk(str(tmp_path / "d"))
    assert plain(tmp_path / "all") == rows.to_list()
    assert plain(tmp_path / "d" / "forget") == rows.shuffle(0).select(range(4)).to_list()
    refused(tmp_path / "d", "a DatasetDict of forget: name one of them")


def test_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "t.parquet").write_bytes(b"PAR1\x15\x04")
    refused(tmp_path / "t.parquet", "a Parquet table, which takes pyarrow to read: pip install pyarrow")
    assert tables.table(tmp_path / "t.parquet")[0] == "parquet"


# ---------------------------------------------------------------- published sets, written as tables


@pytest.mark.parametrize("name", ["random_birthdays/split_0", "years/split_1", "mmlu/mmlu_STEM"])
def test_published_sets_come_back_equal(name, shared_data, tmp_path):
    lines = [json.loads(line) for line in (shared_data / f"{name}.jsonl").read_text().splitlines()]
    wanted = plain(shared_data / f"{name}.jsonl", equal_choices="allow")
    (tmp_path / "a.json").write_text(json.dumps(lines))
    files = [tmp_path / "a.json", as_csv(tmp_path / "t.csv", lines)]
    try:
        from pyarrow import Table, parquet
    except ImportError:
        pass  # the two others are there
    else:
        table = Table.from_pylist(lines)
        parquet.write_table(table, tmp_path / "t.parquet")
        files += [tmp_path / "t.parquet", save_to_disk(tmp_path / "d", table, 3)]
    for path in files:
        found = plain(path, equal_choices="allow")
        if path.suffix == ".csv":  # annotations are text there
            found = [r | ({"correct_year": int(r["correct_year"])} if "correct_year" in r else {}) for r in found]
        assert found == wanted, path
