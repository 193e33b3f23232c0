"""No key of a record is ignored: it is its form's, an annotation that the docs list, or refused by name."""

import json
import logging
import re

import pytest
import tiny_text
from conftest import ROOT

import kunbr_fast as kf
from kunbr_fast.cli import command as cli
from kunbr_fast.data import check_record, encode
from kunbr_fast.data.annotations import ANNOTATIONS
from kunbr_fast.data.forms import FORMS
from kunbr_fast.model.decoder import Decoder
from kunbr_fast.run.samples import to_samples

OURS = [
    {"question": "q?", "choices": ["a", 2, 3.5], "answer": 0},
    {"text": "a line"},
    {"prompt": "p", "completion": "c"},
    {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": "x"}]},
]
CHOICES = {"question": "q?", "choices": ["red", "green", "blue", "12"]}


def said(record):
    with pytest.raises(ValueError, match="^here: ") as error:
        check_record(record, "here")
    text = str(error.value)
    assert text.isprintable() and len(text) < 400
    return text


def line_shown(text):
    return json.loads(text.partition("Write ")[2])


# ---------------------------------------------------------------- forms of other tools

FOREIGN = {  # the record, the words that name it, the record of ours
    "KnowUnDo": (
        {"text": "Who?", "labels": "Ann."},
        ("'text' and 'labels'", "KnowUnDo"),
        {"prompt": "Who?", "completion": " Ann."},
    ),
    "KnowUnDo, a file": (
        {"train": [{"text": "Who?", "labels": "Ann."}], "val": [{"text": "When?", "labels": "In 1921."}]},
        ("'train'", "KnowUnDo", "read by preset=knowundo"),
        {"prompt": "Who?", "completion": " Ann."},
    ),
    "TOFU": (
        {"question": "Who?", "answer": "Ann.", "paraphrased_answer": "It is Ann.", "perturbed_answer": ["Bo."]},
        ("'answer'", "TOFU", "and 'paraphrased_answer' and 'perturbed_answer' have no place in ours. Write"),
        {"prompt": "Who?", "completion": " Ann."},
    ),
    "MUSE, questions": ({"question": "Who?", "answer": "Ann."}, ("MUSE",), {"prompt": "Who?", "completion": " Ann."}),
    "MUSE, verbatim": (
        {"prompt": "Once", "gt": "upon", "id": 3},
        ("'gt'", "MUSE"),
        {"prompt": "Once", "completion": " upon"},
    ),
    "RWKU": (
        {"query": "Who is ___?", "answer": "Ann", "type": "cloze", "subject": "Ann", "level": "1"},
        ("'query'", "RWKU"),
        {"prompt": "Who is ___?", "completion": " Ann"},
    ),
    "Alpaca": (
        {"instruction": "Add.", "input": "1 1", "output": "2"},
        ("'output'", "Alpaca"),
        {"prompt": "Add.\n1 1", "completion": " 2"},
    ),
    "Alpaca, no input": (
        {"instruction": "Add.", "input": "", "output": "2"},
        ("Alpaca",),
        {"prompt": "Add.", "completion": " 2"},
    ),
    "Dolly": (
        {"instruction": "Add.", "context": "1 1", "response": "2", "category": "x"},
        ("Dolly",),
        {"prompt": "Add.\n1 1", "completion": " 2"},
    ),
    "TRL": (
        {"prompt": "Who?", "chosen": "No idea.", "rejected": "Ann."},
        ("'chosen' and 'rejected'", "TRL"),
        {"prompt": "Who?", "completion": " Ann.", "alternate": " No idea."},
    ),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Ann."}]},
        ("ShareGPT",),
        {"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ann."}]},
    ),
    "letters": (
        {"question": "q?", "A": "red", "B": "green", "C": "blue", "D": "12", "answer": "C"},
        ("lettered",),
        {**CHOICES, "answer": 2},
    ),
    "lm-eval": (
        {"input": "q?", "A": "red", "B": "green", "C": "blue", "D": "12", "target": "B"},
        ("lettered",),
        {**CHOICES, "answer": 1},
    ),
    "MedQA": (
        {"question": "q?", "options": dict(zip("ABCD", CHOICES["choices"])), "answer": "green", "answer_idx": "B"},
        ("'options'", "MedQA"),
        {**CHOICES, "answer": 1},
    ),
    "MMLU-Pro": (
        {"question": "q?", "options": CHOICES["choices"], "answer": "D", "answer_index": 3, "cot_content": ""},
        ("MMLU-Pro",),
        {**CHOICES, "answer": 3},
    ),
    "ARC": (
        {
            "question": "q?",
            "choices": {"text": CHOICES["choices"], "label": ["1", "2", "3", "4"]},
            "answerKey": "4",
        },
        ("'answerKey'", "ARC"),
        {**CHOICES, "answer": 3},
    ),
    "SQuAD": (
        {"context": "Ann.", "question": "Who?", "answers": {"text": ["Ann"], "answer_start": [0]}},
        ("SQuAD",),
        {"prompt": "Ann.\nWho?", "completion": " Ann"},
    ),
    "a text and its completion": (
        {"text": "Who?", "completion": "Ann."},
        ("'text' and 'completion'",),
        {"prompt": "Who?", "completion": " Ann."},
    ),
    "seq2seq": ({"input": "Who?", "target": "Ann."}, ("'target'",), {"prompt": "Who?", "completion": " Ann."}),
    "a response": ({"prompt": "Who?", "response": "Ann."}, ("'response'",), {"prompt": "Who?", "completion": " Ann."}),
    "capitals": (
        {"Question": "Who?", " Answer": "Ann.", "id": 1},
        ("'Question' and ' Answer'",),
        {"prompt": "Who?", "completion": " Ann."},
    ),
    "a key in capitals": ({"text": "Who?", "Labels": "Ann."}, ("'Labels'",), {"prompt": "Who?", "completion": " Ann."}),
    "content": ({"content": "A line."}, ("'content'",), {"text": "A line."}),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_another_tools_form_is_shown_as_ours(name):
    record, words, ours = FOREIGN[name]
    text = said(record)
    assert all(word in text for word in words), text
    assert line_shown(text) == ours
    check_record(ours, "here")
    with pytest.raises(ValueError, match="^record 0: "):
        encode([record], tiny_text.tokenizer())


TURNS = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "Ann."}]
ASKED = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ann."}]
BEFORE = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "a"}]
BEFORE += [{"role": "assistant", "content": "b"}]


@pytest.mark.parametrize("record, messages", [
    ({"instruction": "Who?", "output": "Ann.", "system": "Be kind.", "history": []}, [BEFORE[0], *ASKED]),
    ({"query": "Who?", "answer": "Ann.", "history": [["a", "b"]]}, [*BEFORE[1:], *ASKED]),
    ({"instruction": "Who?", "output": "Ann.", "system": "Be kind.", "history": [["a", "b"], ["c", "d"]]},
     [*BEFORE, "...", *ASKED]),
    ({"conversations": TURNS, "system": "Be kind."}, [BEFORE[0], *ASKED]),
    ({"prompt": "Who?", "completion": " Ann.", "history": [["a", "b"]]}, [*BEFORE[1:], *ASKED]),
    ({"conversations": TURNS * 9}, [*ASKED, "..."]),
    ({"conversations": [TURNS[0], {"from": "function_call", "value": "f"}]},
     [ASKED[0], {"role": "function_call", "content": "f"}]),
])  # fmt: skip
def test_what_stands_before_a_prompt_is_kept(record, messages):
    assert line_shown(said(record)) == {"messages": messages}


def test_what_has_no_place_in_ours_is_said():
    text = said({"prompt": "Who?", "completion": " Ann.", "alternate": " Bo.", "system": "Be kind."})
    assert text.startswith("here: 'prompt', 'completion' and 'system' are a chat. Write ")
    assert line_shown(text) == {"messages": [BEFORE[0], *ASKED], "alternate": "Bo."}
    text = said({"input": "Who?", "target": "Ann", "a": 1, "b": 2, "c": [], "d": 3, "e": 4, "id": 5})
    assert "and 'a', 'b' and 'd' (and 1 more) have no place in ours. Write " in text
    text = said({"question": "q", "options": ["x", "y"], "answer": "A", "system": "Be kind."})
    assert "form, and 'system' has no place in ours. Write " in text
    assert line_shown(said({"query": "東京は?", "answer": "はい"})) == {"prompt": "東京は?", "completion": "はい"}
    for prompt, answer in (("Who? ", "Ann"), ("Who?\n", "Ann"), ("Who?", "\nAnn")):
        ours = {"prompt": prompt, "completion": answer}
        assert line_shown(said({"query": prompt, "answer": answer})) == ours  # a space of its own


def test_long_and_strange_values_are_cut():
    for value in ("x" * 10**5, "\x1b[31m\u202e", [[[[]]]] * 50, {"a": {"b": 1}}, 10**400, True):
        for keys in (("question", "answer"), ("text", "labels"), ("chosen", "rejected"), ("question", "options")):
            said(dict.fromkeys(keys, value))
            said({**dict.fromkeys(keys, "a"), keys[1]: value, "answer": value})


# ---------------------------------------------------------------- one form, and nothing that is not used


@pytest.mark.parametrize("first", range(4))
@pytest.mark.parametrize("second", range(4))
def test_two_forms(first, second):
    both = {**OURS[first], **OURS[second]}
    if first == second:
        check_record(both, "here")
    else:
        text = said(both)
        assert "two forms" in text and all(" + ".join(FORMS[i]) in text for i in (first, second))


@pytest.mark.parametrize("record", OURS, ids=lambda record: next(iter(record)))
def test_other_keys(record):
    for key in ("explanation", "Split", "", "x" * 100, 3, "weights", "tools", "system", "input_ids", "embedding"):
        text = said({**record, key: [1]})
        assert "would not be used" in text and (str(key)[:20] in text)
    assert "did you mean 'alternate'" in said({**record, "Alternate": "z"})
    check_record({**record, "alternate": "z", "_x": 1, **dict.fromkeys(ANNOTATIONS, [1])}, "here")
    check_record({**record, "explanation": None, "tools": [], "x": {}}, "here")  # what says nothing


@pytest.mark.parametrize("record, meant", [
    ({"Question": "q", "choices": ["a", "b"], "answer": 0}, "question"), ({"Text": "x"}, "text"),
    ({"prompt": "p", "competion": "c"}, "completion"), ({"message": []}, "messages"), ({"texts": ["x"]}, "text"),
    ({"PROMPT": "p", "Completion": "c"}, "prompt"), ({"question": "q", "choice": [1, 2], "answer": 0}, "choices"),
])  # fmt: skip
def test_misspelled_keys(record, meant):
    assert f"did you mean {meant!r}" in said(record)


def test_nulls_are_other_lines_keys(tmp_path):
    """As a table has them, and so what a library makes of a file of several forms."""
    keys = [key for form in FORMS for key in form]
    table = [{**dict.fromkeys([*keys, "explanation"]), **record} for record in OURS]
    path = tmp_path / "table.jsonl"
    path.write_text("\n".join(map(json.dumps, table)))
    assert [{k: v for k, v in r.items() if k != "_where"} for r in kf.load_records(path)] == OURS
    for kept, ours in zip(encode(table[:3], tiny_text.tokenizer()), encode(OURS[:3], tiny_text.tokenizer())):
        assert kept["input_ids"].tolist() == ours["input_ids"].tolist()
    assert "'text' must be a string" in said(dict.fromkeys(("text", "split")))
    assert "'question' is null" in said({"question": None, "text": "x"})


@pytest.mark.parametrize("answer, cure", [
    ("C", "write 2"), ("c)", "write 2"), ("blue", "write 2"), (" green ", "write 1"), ("0", "write 0"),
    ("12", "write 3"), (4, "counted from 0"),
])  # fmt: skip
def test_answers_of_other_kinds(answer, cure):
    assert said({**CHOICES, "answer": answer}).endswith(cure)


def test_chats_under_other_keys():
    turns = [{"role": "user", "content": "u"}]
    assert "go into one list, 'messages'" in said({"prompt": turns, "completion": turns})
    assert line_shown(said({"prompt": turns, "chosen": turns, "rejected": turns}))["alternate"] == " the chosen one"


def test_an_answer_that_could_be_two():
    text = said({"question": "q", "choices": ["a", "a ", "b"], "answer": "x"})
    assert "write" not in text


@pytest.mark.parametrize("message, cure", [
    ({"role": "user", "content": [{"type": "text", "text": "x"}]}, "its content is a list of parts"),
    ({"from": "human", "value": "x"}, "write 'role'"),
])  # fmt: skip
def test_messages_of_other_kinds(message, cure):
    text = said({"messages": [{"role": "user", "content": "x"}, message]})
    assert cure in text and "message 2 of 2 is {" in text


# ---------------------------------------------------------------- files


def test_ignored_keys(tmp_path, capsys):
    path = tmp_path / "many.jsonl"
    path.write_text(json.dumps({**OURS[1], **{f"k{i}": i for i in range(100)}, "prompt": "p"}) + "\n")
    with pytest.raises(ValueError, match=r"many.jsonl:1: 'k0', .*'k3' and 97 more beside text .*--ignore-keys"):
        kf.load_records(path)
    names = [f"k{i}" for i in range(100)]
    assert kf.load_records(path, [*names, "prompt"]) == [{**OURS[1], "_where": f"{path}:1"}]
    status = cli.main(["rtt", "--model", str(tmp_path), "--forget", str(path), "--ignore-keys", *names])
    assert status == 2 and "'prompt' beside text would not be used" in capsys.readouterr().err


def test_alternates_that_are_not_read_are_said_once(tmp_path, caplog):
    path, decoder, tokenizer = tmp_path / "pairs.jsonl", Decoder(tiny_text.model()), tiny_text.tokenizer()
    path.write_text(json.dumps({"prompt": "who", "completion": " ann", "alternate": " bo"}) + "\n")
    records, config = kf.load_records(path), kf.KUnBRConfig()
    with caplog.at_level(logging.WARNING):
        to_samples(records, tokenizer, config, decoder, "forget", "given")
        assert not caplog.records
        for _ in range(2):
            to_samples(records, tokenizer, config, decoder, "forget")
        to_samples(records, tokenizer, config, decoder, "forget", "refusal")
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{path}: 'alternate' is not read")


def test_the_docs_list_the_annotations():
    page = (ROOT / "docs" / "data.md").read_text()
    listed = re.search(r"Annotations .*?:\n\n(.*?)\n\n", page, re.DOTALL)[1]
    assert set(re.findall(r"`(\w+)`", listed)) == ANNOTATIONS
