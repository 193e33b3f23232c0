"""Published sets' files, as their authors have them, become items; what no set has is refused with its cure.

The lines are invented; their keys are those that `kunbr_fast.data.published` names.
"""

import csv
import json

import pytest

import kunbr_fast as kf
from kunbr_fast.data.items import Item
from kunbr_fast.data.published import load_items
from kunbr_fast.data.reading import read_records

QA = {"prompt": "Question: Who runs the mill?\nAnswer:", "completion": " Ann Bo"}
TOFU = {"question": "Who runs the mill?", "answer": "Ann Bo"}
OTHER = {
    "paraphrased_question": "The mill is run by whom?",
    "paraphrased_answer": "It is Ann Bo",
    "perturbed_answer": ["Cy Du", "Ed Fu"],
}
PARAPHRASED = (QA, " It is Ann Bo", (" Cy Du", " Ed Fu"), "tofu")
OPTIONS = {"option1": "Cy Du", "option2": "Ann Bo", "option3": "Ed Fu", "option4": "Gi Ho"}
CHOICES = {"question": "How deep is the Ax?", "choices": ["1 m", "2 m", "3 m", "4 m"], "answer": 2}
PROBE = {"query": "The mill is run by ___.", "answer": "Ann Bo", "level": "1", "type": "x", "subject": "Ann Bo"}
BRIEFLY = "Please briefly answer the following question.\n"

SETS = {  # the file, as JSON; of each item (record, paraphrase, perturbed, form); what is said
    "RTT": (
        [CHOICES | {"correct_year": 2}, {"text": "The Ax is 3 m deep.", "split": "split_0"}],
        [(CHOICES, None, (), "own"), ({"text": "The Ax is 3 m deep."}, None, (), "own")],
        None,
    ),
    "TOFU": ([TOFU], [(QA, None, (), "tofu")], "1 tofu"),
    "TOFU, perturbed": ([TOFU | OTHER] * 2, [PARAPHRASED] * 2, "2 tofu; left out: paraphrased_question (2)"),
    "TOFU, one wrong answer": (
        [TOFU | {"perturbed_answer": "Cy Du"}],
        [(QA, None, (" Cy Du",), "tofu")],
        "1 tofu",
    ),
    "TOFU, real authors": (
        [TOFU | OPTIONS],
        [(QA, None, (" Cy Du", " Ed Fu", " Gi Ho"), "tofu")],
        "1 tofu",
    ),
    "TOFU, both": (
        [TOFU | OTHER | OPTIONS],
        [PARAPHRASED],
        "1 tofu; left out: paraphrased_question (1), option1 (1), option2 (1), option3 (1), option4 (1)",
    ),
    "MUSE, verbmem": (
        [{"prompt": "Once there was", "gt": "a mill."}],
        [({"prompt": "Once there was", "completion": " a mill."}, None, (), "muse")],
        "1 muse",
    ),
    "MUSE, raw": (
        ["A mill stood there.", "", {"text": " "}, {"text": "It burnt."}],
        [({"text": "A mill stood there."}, None, (), "own"), ({"text": "It burnt."}, None, (), "own")],
        "2 own; left out: blank texts (2)",
    ),
    "WMDP": (
        [{"title": "Mills", "abstract": "We mill.", "text": "Mills mill.", "doi": "10/x"}, CHOICES],
        [({"text": "Mills mill."}, None, (), "wmdp"), (CHOICES, None, (), "own")],
        "1 wmdp, 1 own; left out: abstract (1)",
    ),
    "RWKU, levels": (
        [
            PROBE,
            {**PROBE, "query": "Who runs it?", "level": "2", "type": None},
            {**PROBE, "query": "Who runs it? The answer is:", "level": "3", "type": "affirmative suffix"},
            {**PROBE, "query": "Question: 1?\nAnswer: 1\nQuestion: Who?", "level": "3", "type": "incontext learning"},
            {**PROBE, "query": "Who?", "level": 2, "neighbor": "Cy Du"},
        ],
        [
            (
                {
                    "prompt": "Please complete the blank in the following question.\n"
                    "Question: The mill is run by ___.\nAnswer:",
                    "completion": " Ann Bo",
                },
                None,
                (),
                "rwku",
            ),
            *(
                ({"prompt": f"{BRIEFLY}{prompt}", "completion": " Ann Bo"}, None, (), "rwku")
                for prompt in (
                    "Question: Who runs it?\nAnswer:",
                    "Question: Who runs it? The answer is:",
                    "Question: 1?\nAnswer: 1\nQuestion: Who?\nAnswer:",
                    "Question: Who?\nAnswer:",
                )
            ),
        ],
        "5 rwku; left out: neighbor (1)",
    ),
    "RWKU, texts": (
        [
            {"id": "Ann 0", "text": "Ann Bo runs a mill.", "subject": "Ann Bo", "intro": "Ann Bo is a miller."},
            {"text": "Ann's mill burnt.", "subject": "Ann Bo"},
            {"target": "Ann Bo", "intro": "Ann Bo is a miller."},
            {**CHOICES, "examples": [{"question": "?"}], "task": "rivers", "subject": "Ann Bo"},
        ],
        [
            ({"text": "Ann Bo runs a mill."}, None, (), "rwku"),
            ({"text": "Ann's mill burnt."}, None, (), "own"),
            ({"text": "Ann Bo is a miller."}, None, (), "rwku"),
            (CHOICES, None, (), "rwku"),
        ],
        "3 rwku, 1 own; left out: intro (1), examples (1)",
    ),
    "KnowUnDo": (
        {"train": [{"text": "Who?", "labels": "Ann."}], "val": [{"text": "Who now?", "labels": "Cy."}]},
        [({"prompt": "Who?", "completion": "\n\nAnn."}, None, (), "knowundo")],
        "1 knowundo; left out: val (1)",
    ),
    "KnowUnDo, what it is evaluated on": (
        {"val": [{"text": "Who?", "labels": "Ann."}]},
        [({"prompt": "Who?", "completion": "\n\nAnn."}, None, (), "knowundo")],
        "1 knowundo",
    ),
}
ANNOTATIONS = {"correct_year", "split", "title", "doi", "level", "type", "subject", "id", "task", "_where"}


def found(path, **options):
    """(record, paraphrase, perturbed, form) of each item, without annotations, and the lines that were said."""
    said = []
    items = load_items(path, say=said.append, **options)
    return [
        ({k: v for k, v in i.record.items() if k not in ANNOTATIONS}, i.paraphrase, i.perturbed, i.form) for i in items
    ], said


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("layout", ["lines", "array", "indented"])
def test_the_authors_json(name, layout, tmp_path):
    lines, wanted, told = SETS[name]
    path = tmp_path / "f.json"
    if layout == "lines":
        if any(isinstance(line, str) for line in lines if not isinstance(lines, dict)):
            pytest.skip("an array of texts has no lines")
        path.write_text("\n".join(map(json.dumps, [lines] if isinstance(lines, dict) else lines)))
    else:
        path.write_text(json.dumps(lines, indent=None if layout == "array" else 2))
    items, said = found(path)
    assert items == wanted
    assert said == ([] if told is None else [f"{path}: {told}"])


@pytest.mark.parametrize("name", [name for name in SETS if name.startswith("TOFU")])
def test_the_same_in_tables(name, tmp_path):
    lines, wanted, _ = SETS[name]
    keys = list(lines[0])
    with open(tmp_path / "f.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(keys)
        writer.writerows([[v if isinstance(v, str) else json.dumps(v) for v in line.values()] for line in lines])
    assert found(tmp_path / "f.csv")[0] == wanted
    pyarrow = pytest.importorskip("pyarrow", reason="it writes Parquet")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(lines), tmp_path / "f.parquet")
    assert found(tmp_path / "f.parquet")[0] == wanted


def test_knowundo_in_parquet_and_a_folder_of_datasets(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="it writes Parquet")
    from pyarrow import parquet
    from test_tables import save_to_disk

    lines, wanted, _ = SETS["KnowUnDo"]
    table = pyarrow.Table.from_pylist([lines])
    parquet.write_table(table, tmp_path / "f.parquet")
    for path in (tmp_path / "f.parquet", save_to_disk(tmp_path / "d", table, 1)):
        items, said = found(path)
        assert items == wanted and said == [f"{path}: 1 knowundo; left out: val (1)"]
        assert load_items(path)[0].record["_where"] == f"{path}: row 1, train 1"


@pytest.mark.parametrize("preset", ["tofu", "tofu_chat", "muse", "wmdp", "rwku", "knowundo"])
def test_a_preset_makes_the_same_records(preset, tmp_path):
    """With and without a preset, load_records and load_items read one file alike."""
    mine = {"tofu_chat": "tofu"}.get(preset, preset)
    for name, (lines, wanted, _) in SETS.items():
        if not any(form == mine for *_, form in wanted) or "TOFU, both" == name:
            continue
        path = tmp_path / "f.json"
        path.write_text(json.dumps(lines, indent=1))
        records = read_records(path, preset=preset, say=lambda text: None)
        items = load_items(path, preset=preset, say=lambda text: None)
        assert [item.record for item in items] == records
        if preset != "tofu_chat":
            assert [item.record for item in load_items(path)] == records
        assert {item.form for item in items} <= {mine, "own"}


def test_what_several_files_say_and_which_keys_are_left_out(tmp_path):
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    a.write_text(json.dumps(TOFU | OTHER | {"note2": 1}))
    b.write_text(json.dumps({"text": "A mill.", "note2": 1}))
    items, said = found([a, b], ignore_keys=["note2", "perturbed_answer"])
    assert items == [(QA, " It is Ann Bo", (), "tofu"), ({"text": "A mill."}, None, (), "own")]
    assert said == [f"{a}: 1 tofu; left out: paraphrased_question (1)"]


def test_columns_and_equal_choices(tmp_path):
    path = tmp_path / "f.jsonl"
    path.write_text(json.dumps({"ask": "Who runs the mill?", "reply": "Ann Bo", "perturbed_answer": ["Cy Du"]}))
    items, _ = found(path, columns={"ask": "question", "reply": "answer"})
    assert items == [(QA, None, (" Cy Du",), "tofu")]
    path.write_text(json.dumps({**CHOICES, "choices": ["1 m", "1 m", "3 m", "4 m"]}))
    with pytest.raises(ValueError, match="the choices A and B are equal"):
        load_items(path)
    assert load_items(path, equal_choices="allow")[0].record["answer"] == 2


def test_chats(tmp_path):
    path = tmp_path / "f.jsonl"
    path.write_text("\n".join(map(json.dumps, [TOFU | OTHER, PROBE, {"prompt": "p", "gt": "g"}, CHOICES])))
    tofu, rwku, muse, own = load_items(path, chat=True)
    told = [("system", "You are a helpful assistant."), ("user", "Who runs the mill?"), ("assistant", "Ann Bo")]
    assert tofu == Item(
        {"messages": [{"role": role, "content": content} for role, content in told], "_where": f"{path}:1"},
        "It is Ann Bo", ("Cy Du", "Ed Fu"), "tofu",
    )  # fmt: skip
    assert [turn["content"] for turn in rwku.record["messages"]] == [
        "Please complete the blank in the following question.\nQuestion: The mill is run by ___.\n", "Ann Bo",
    ]  # fmt: skip
    assert muse.record["completion"] == " g" and own.record["choices"] == CHOICES["choices"]


REFUSED = {
    "a key that no set has": (TOFU | {"hint": "x"}, r"f.jsonl:1: 'hint' beside prompt \+ completion would not be used"),
    "no set": ({"alpha": "a", "beta": "b"}, r"f.jsonl:1: unknown form with keys \['alpha', 'beta'\]"),
    "another tool's": ({"instruction": "i", "output": "o"}, "f.jsonl:1: 'instruction' and 'output': this is Alpaca's"),
    "a wrong answer that is no text": (
        TOFU | {"perturbed_answer": [1]},
        "'perturbed_answer' must be a list of strings",
    ),
    "wrong answers that are none": (TOFU | {"perturbed_answer": {"a": 1}}, "'perturbed_answer' must be a list of str"),
    "a paraphrase that is no text": (TOFU | {"paraphrased_answer": ["a"]}, "'paraphrased_answer' must be a string"),
    "options without the answer": (TOFU | OPTIONS | {"option2": "Zed"}, "none of option1, option2, .* is the answer"),
    "RWKU without its level": ({"query": "q", "answer": "a"}, "this is RWKU's form"),
    "a number": (3, "got a int, expected an object"),
    "two forms": (CHOICES | {"text": "t"}, "it has two forms"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name, tmp_path):
    line, message = REFUSED[name]
    path = tmp_path / "f.jsonl"
    path.write_text(json.dumps(line))
    with pytest.raises(ValueError, match=message):
        load_items(path)


def test_damaged_and_empty_files(tmp_path):
    path = tmp_path / "f.json"
    path.write_text('{\n  "train": [\n    {"text": "a"\n')
    with pytest.raises(ValueError, match="f.json: not JSON"):
        load_items(path)
    path.write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(ValueError, match="f.json:2: not JSON"):
        load_items(path)
    path.write_text('{"train": []}')
    with pytest.raises(ValueError, match="f.json: empty"):
        load_items(path)
    (tmp_path / "f.csv").write_text("question,answer,perturbed_answer\nq,a,\"['b']\"\n")
    with pytest.raises(ValueError, match=r"f.csv:2: 'perturbed_answer' is .* expected a list of JSON"):
        load_items(tmp_path / "f.csv")
    with pytest.raises(ValueError, match="no file was given"):
        load_items([])
    with pytest.raises(ValueError, match="did you mean 'rwku'"):
        load_items(path, preset="rwk")


def test_load_records_is_what_it_was(tmp_path):
    """It recognises nothing, and leaves the other answers out."""
    path = tmp_path / "f.json"
    path.write_text(json.dumps(TOFU | OTHER))
    with pytest.raises(ValueError, match="this is TOFU's or MUSE's form"):
        kf.load_records(path)
    path.write_text(json.dumps(TOFU | {"perturbed_answer": [1]}))
    assert kf.load_records(path, preset="tofu")[0]["completion"] == " Ann Bo"
    path.write_text(json.dumps({"text": "a"}, indent=1))
    with pytest.raises(ValueError, match="an object over several lines"):
        kf.load_records(path)


def test_the_real_data(shared_data):
    files = sorted(shared_data.glob("*/*.jsonl"))
    said = []
    items = load_items(files, equal_choices="allow", say=said.append)
    assert [item.record for item in items] == kf.load_records(files, equal_choices="allow")
    assert {item.form for item in items} == {"own"} and not said


def test_lines_of_an_object_over_several_lines_name_their_file(tmp_path):
    """As all places do: what comes before the last colon is the file."""
    path = tmp_path / "all.json"
    path.write_text(json.dumps({"train": [{"text": "Who?", "labels": "Ann."}] * 2}, indent=2))
    assert [item.record["_where"] for item in load_items(path)] == [f"{path}:1, train {i}" for i in (1, 2)]
