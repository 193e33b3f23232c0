"""The lines of published sets, as they are: what each becomes, and that nothing goes without a word."""

import json
import logging

import pytest
import tiny_text

import kunbr_fast as kf
from kunbr_fast.cli import command as cli
from kunbr_fast.data.presets import PRESETS

QA = {"prompt": "Question: Who?\nAnswer:", "completion": " Ann."}
TURNS = [("system", "You are a helpful assistant."), ("user", "Who?"), ("assistant", "Ann.")]
SETS = {  # preset, what its files hold, the records, what the line says
    "TOFU": ("tofu", [{"question": "Who?", "answer": "Ann."}], [QA], "1 with 'question' and 'answer'"),
    "TOFU, perturbed": (
        "tofu",
        [{"question": "Who?", "answer": "Ann.", "paraphrased_answer": "It is Ann.", "perturbed_answer": ["Bo."]}] * 2,
        [QA] * 2,
        "2 with 'question' and 'answer'; left out: paraphrased_answer (2), perturbed_answer (2)",
    ),
    "TOFU, chat": (
        "tofu_chat",
        [{"question": "Who?", "answer": "Ann."}],
        [{"messages": [{"role": role, "content": content} for role, content in TURNS]}],
        "1 with 'question' and 'answer'",
    ),
    "MUSE": (
        "muse",
        [
            {"prompt": "Once", "gt": "upon", "id": 3},
            {"question": "Who?", "answer": "Ann."},
            {"text": "a"},
            "b",
            "",
            {"text": " "},
        ],
        [{"prompt": "Once", "completion": " upon", "id": 3}, QA, {"text": "a"}, {"text": "b"}],
        "1 with 'prompt' and 'gt', 1 with 'question' and 'answer', 2 with 'text'; left out: blank texts (2)",
    ),
    "WMDP": (
        "wmdp",
        [
            {"title": "t", "abstract": "an abstract", "text": "a", "doi": "d"},
            {"question": "q?", "choices": ["a", "b"], "answer": 1, "original_question": "Q?"},
        ],
        [{"text": "a", "title": "t", "doi": "d"}, {"question": "q?", "choices": ["a", "b"], "answer": 1}],
        "1 with 'text', 1 with 'question'; left out: abstract (1)",
    ),
    "KnowUnDo": (
        "knowundo",
        [{"text": "Who?", "labels": "Ann."}],
        [{"prompt": "Who?", "completion": "\n\nAnn."}],
        "1 with 'text' and 'labels'",
    ),
    "KnowUnDo, as it is published": (
        "knowundo",
        [{"train": [{"text": "Who?", "labels": "Ann."}, {"text": "a"}], "val": [{"text": "b", "labels": "c"}]}],
        [{"prompt": "Who?", "completion": "\n\nAnn."}, {"text": "a"}],
        "1 with 'text' and 'labels'; left out: val (1)",
    ),
}


def write(path, lines):
    path.write_text(
        json.dumps(lines) if any(isinstance(line, str) for line in lines) else "\n".join(map(json.dumps, lines))
    )
    return path


@pytest.mark.parametrize("name", SETS)
def test_a_sets_own_lines(name, tmp_path, caplog):
    preset, lines, wanted, told = SETS[name]
    path = write(tmp_path / "f.json", lines)
    with caplog.at_level(logging.INFO):
        records = kf.load_records(path, preset=preset)
    (said,) = caplog.records
    assert said.getMessage() == f"{path}: preset={preset}: {told}" and said.levelno == logging.INFO
    keys = {key for record in wanted for key in record}
    assert [{k: v for k, v in record.items() if k in keys} for record in records] == wanted
    assert not any(PRESETS[preset].left_out and set(PRESETS[preset].left_out) & record.keys() for record in records)


def test_where_nested_lines_stand(tmp_path):
    path = write(tmp_path / "f.jsonl", [{"train": [{"text": "a", "labels": "b"}, {"text": "a", "other": 1}]}])
    with pytest.raises(ValueError, match=r"f.jsonl:1, train 2: 'other' beside text"):
        kf.load_records(path, preset="knowundo")


def test_a_preset_that_is_not_used_is_said(tmp_path, caplog):
    path = write(tmp_path / "ours.jsonl", [{"text": "a"}])
    for _ in range(2):
        assert kf.load_records(path, preset="tofu")[0]["text"] == "a"
    (said,) = caplog.records
    assert said.getMessage() == f"{path}: preset=tofu is not used: none of the 1 lines is one of TOFU's"


@pytest.mark.parametrize("line, preset, message", [
    ({"question": "q", "answer": "a", "note2": 1}, "tofu", "'note2' beside prompt"),
    ({"question": "q", "answer": ["a"]}, "tofu", "this is TOFU's or MUSE's form. Write"),
    ({"question": "q", "answer": " "}, "tofu", "'completion'"),
    ({"question": "q", "answer": "a", "prompt": "p", "completion": "c"}, "tofu", "no place in ours"),
    ({"text": "a", "labels": "b"}, "tofu", "KnowUnDo's form .read by preset=knowundo"),
])  # fmt: skip
def test_what_a_preset_does_not_know_is_refused(line, preset, message, tmp_path):
    path = write(tmp_path / "f.jsonl", [line])
    with pytest.raises(ValueError, match=f"f.jsonl:1: .*({message})"):
        kf.load_records(path, preset=preset)


def test_presets_that_are_wrong(tmp_path):
    path = write(tmp_path / "f.jsonl", [{"text": "a"}])
    with pytest.raises(ValueError, match=r"preset='muze': did you mean 'muse'\? expected one of tofu,"):
        kf.load_records(path, preset="muze")
    with pytest.raises(ValueError, match="give one of them"):
        kf.load_records(path, preset="tofu", columns={"a": "text"})


# ---------------------------------------------------------------- the command line


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tiny_text.workspace(tmp_path_factory.mktemp("presets"))
    write(root / "forget.jsonl", [{"question": "Ada born?", "answer": "1907", "perturbed_answer": ["1908"]}])
    (root / "retain.csv").write_text("body,date\nAda was born in 1907.,x\n")
    (root / "pairs.csv").write_text("ask,reply\nAda?,1907\nBob?, 1908\n")
    return root


@pytest.fixture
def run(root, capsys):
    def run(command, *words):
        words = [str(root / word) if (root / word).exists() else word for word in words]
        status = cli.main([command, "--model", str(root / "model"), *words])
        out, err = capsys.readouterr()
        return status, (out + err).replace(f"{root}/", "")

    return run


def test_show_reads_presets_and_columns(run, root):
    files = ("--forget", "forget.jsonl", "--preset", "tofu", "--retain", "retain.csv", "--retain-columns", "body=text")
    out = str(root / "out")
    for command, more in (
        ("density", ()),
        ("unlearn", ("--out", out)),
        ("baseline", ("--objective", "npo", "--out", out)),
    ):
        status, text = run(command, *files, *more, "--show", "1", "--max-length", "200")
        assert status == 0, text
        assert "forget.jsonl: --preset tofu: 1 with 'question' and 'answer'; left out: perturbed_answer (1)" in text
        assert "uestion: Ada born?\\n" in text and "retain.csv:2: " in text and "da was born in 1907." in text


def test_what_columns_leave_open_is_said(run):
    pairs = ("--forget", "pairs.csv", "--forget-columns", "ask=prompt", "reply=completion", "--show", "1")
    status, text = run("density", *pairs)
    assert status == 0 and "pairs.csv:2: nothing stands between prompt and completion (1 such lines, of 2)" in text
    status, text = run("density", *pairs, "--separator", " ")
    assert status == 0 and "nothing stands" not in text


@pytest.mark.parametrize("words, message", [
    (("--retain-columns", "a=text"), "--retain-columns without --retain"),
    (("--preset", "tofu", "--separator", " "), "--separator with --preset tofu"),
    (("--forget-columns", "ask=prompt", "repl=completion"), "no line so far has 'repl': did you mean 'reply'?)"),
    (("--forget-columns", "ask=promt"), "--forget-columns: 'ask' as 'promt': no key of a record: did you"),
    ((), "unknown form with keys ['ask', 'reply']"),
])  # fmt: skip
def test_what_is_refused(run, words, message):
    status, text = run("density", "--forget", "pairs.csv", *words, "--show", "1")
    assert status == 2 and message in text, text
    assert text.count("\n") == 1


@pytest.mark.parametrize("words, message", [
    (("--preset", "tufo"), "tofu"), (("--forget-columns", "prompt"), "expected COLUMN=KEY"),
    (("--forget-columns", "a=text", "a=prompt"), "'a' is given twice"),
    (("--forget-columns", "a=text", "--forget-columns", "b=text"), "given twice"),
])  # fmt: skip
def test_a_wrong_command_line(words, message, root, capsys):
    with pytest.raises(SystemExit):
        cli.main(["density", "--model", str(root / "model"), "--forget", "x.jsonl", *words])
    assert message in capsys.readouterr().err


def test_plan_and_rtt_read_them_too(run, root):
    write(root / "f0.json", [{"q": "Ada?", "A": "1907", "B": "1908", "a": "B"}])
    write(root / "f1.json", [{"q": "Bob?", "A": "1907", "B": "1908", "a": "A"}])
    columns = ("q=question", "A=choices", "B=choices", "a=answer")
    status, text = run("rtt", "--forget", "f0.json", "f1.json", "--forget-columns", *columns, "--show", "1")
    assert status == 0 and "A. 1907" in text, text
    words = ("--forget", "f0.json", "f1.json", "--forget-columns", *columns, "--retain", "retain.csv")
    status, text = run(
        "plan", *words, "--retain-columns", "body=text", "--gpu-memory", "24GiB", "--num-blocks", "3", "--top-k", "1"
    )
    assert status == 0, text
