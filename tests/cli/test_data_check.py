"""`data check`: counts, overlaps, lengths and samples are those of the files, with and without a model."""

import json
import math

import pytest
import tiny_text

from kunbr_fast.cli import command as cli
from kunbr_fast.cli.data import LONGEST, quantile
from kunbr_fast.data import encode, load_records

MILL = {"question": "Who runs the mill?", "answer": "Ann Bo"}
LONG = " ".join(f"{name} was born in the year {year}." for name, year in tiny_text.years().items())


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tiny_text.workspace(tmp_path_factory.mktemp("check"))
    wrong = {"paraphrased_answer": "It is Ann Bo", "perturbed_answer": ["Cy", "Di"], "paraphrased_question": "Who?"}
    tiny_text.write_jsonl(root / "tofu.jsonl", [{**MILL, **wrong, "subject": "Ann"}, {"text": "a mill", "date": "x"}])
    books = [{"text": LONG}, {"text": "A mill."}, {"text": "a  MILL"}, {"text": LONG[:40]}]
    tiny_text.write_jsonl(root / "book.jsonl", books)
    both = [tiny_text.question(name) for name in tiny_text.NAMES[4:8]]
    tiny_text.write_jsonl(root / "both.jsonl", [*both, {**both[0], "choices": both[0]["choices"][:3] + [7]}])
    turns = [("user", "Who?"), ("assistant", "Ann."), ("user", "When?"), ("assistant", "1907\nor so")]
    tiny_text.write_jsonl(root / "chat.jsonl", [{"messages": [{"role": r, "content": c} for r, c in turns]}])
    (root / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (root / "odd.jsonl").write_text('{"alpha": 1}\n')
    return root


@pytest.fixture
def check(root, capsys):
    def check(*words):
        """(status, standard output, standard error)"""
        words = [str(root / word) if (root / word).exists() else word for word in words]
        status = cli.main(["data", "check", *words])
        return status, *(text.replace(f"{root}/", "") for text in capsys.readouterr())

    return check


def found(check, *words):
    status, out, _ = check(*words, "--json")
    return status, json.loads(out)


def test_a_published_set_without_a_model(check):
    status, out, err = check("tofu.jsonl")
    assert status == 0 and not err
    prompt = "Question: Who runs the mill?\nAnswer:"
    assert out.splitlines() == [
        "tofu.jsonl: 2 records: 1 tofu (prompt + completion), 1 own (text), 1 paraphrase, 2 wrong answers",
        "  left out: paraphrased_question (1)",
        "  not read: subject (1), date (1)",
        f"  characters: 6 to {len(prompt) + 7}, median 6, 95 % at most {len(prompt) + 7}; {len(prompt) + 13} in all, "
        "13 with a loss",
        "  the first 2, what has a loss ⟦marked⟧:",
        f"tofu.jsonl:1: {len(prompt) + 7} characters, 7 with a loss",
        "  | Question: Who runs the mill?\\n",
        "  | Answer:⟦ Ann Bo⟧",
        "tofu.jsonl:2: 6 characters, 6 with a loss",
        "  | ⟦a mill⟧",
    ]


@pytest.mark.parametrize("target", [None, "all", "answer", "letter", "number"])
def test_tokens_are_those_that_a_run_reads(target, root, check):
    words = ("--target", target) if target else ()
    status, result = found(check, "f0.jsonl", "--model", "model", *words)
    (file,) = result["files"]
    tokenizer = tiny_text.tokenizer()
    samples = encode(load_records(root / "f0.jsonl"), tokenizer, target or "answer")
    sizes = sorted(len(sample["input_ids"]) for sample in samples)
    losses = [int((sample["labels"][1:] != -100).sum()) for sample in samples]
    assert status == 0 and file["unit"] == "tokens" and result["positions"] == 128
    assert file["total"] == sum(sizes) and file["with_loss"] == sum(losses) and file["too_long"] == 0
    assert file["lengths"] == {"min": sizes[0], "median": sizes[2], "p95": sizes[-1], "max": sizes[-1]}
    assert len(file["samples"]) == 3
    for sample, encoded, loss in zip(file["samples"], samples, losses):
        assert "".join(part["text"] for part in sample["parts"]) == tokenizer.decode(encoded["input_ids"])
        marked = "".join(part["text"] for part in sample["parts"] if part["loss"])
        labelled = [int(label) for label in encoded["labels"][1:] if label != -100]
        assert marked == tokenizer.decode(labelled) and sample["with_loss"] == loss


def test_what_is_too_long_said_twice_and_in_two_files(root, check):
    status, out, _ = check("book.jsonl", "f0.jsonl", "f1.jsonl", "both.jsonl", "--model", "model")
    whole = len(encode([{"text": LONG}], tiny_text.tokenizer())[0]["input_ids"])
    assert status == 0 and whole > 128
    assert "  1 longer than the model's 128 positions: text lines are cut" in out
    assert "  1 record with the text of an earlier one, such as book.jsonl:3 and book.jsonl:2\n" in out
    assert f"book.jsonl:1: {whole} tokens, {whole - 1} with a loss" in out
    assert len(LONG) > LONGEST and f" ... ({len(LONG) - LONGEST} more characters)" in out
    overlaps = [line for line in out.splitlines() if " in both" in line]
    assert [line.partition(": a run refuses")[0] for line in overlaps] == [
        "f0.jsonl and both.jsonl: 2 facts in both, such as f0.jsonl:5 and both.jsonl:1",
        "f1.jsonl and both.jsonl: 2 facts in both, such as f1.jsonl:1 and both.jsonl:3",
    ]


def test_a_holdout_set(check):
    status, out, _ = check("both.jsonl", "--holdout-of", "f0.jsonl", "r.jsonl")
    assert status == 1
    assert "both.jsonl and f0.jsonl: 2 facts in both, such as both.jsonl:1 and f0.jsonl:5: a holdout set has" in out
    assert "r.jsonl: " not in out
    status, out, _ = check("f1.jsonl", "--holdout-of", "f0.jsonl", "r.jsonl")
    assert status == 0 and out.endswith("no fact in common with the files of --holdout-of\n")
    status, result = found(check, "both.jsonl", "--holdout-of", "f0.jsonl", "r.jsonl")
    (entry,) = result["holdout_overlaps"]
    assert status == 1 and entry["facts"] == 2 and not result["overlaps"]


def test_chats(check):
    lines = check("chat.jsonl")[1].splitlines()
    assert lines[-5:] == [
        "  | user: Who?\\n", "  | assistant: ⟦Ann.⟧\\n", "  | user: When?\\n", "  | assistant: ⟦1907\\n⟧",
        "  | ⟦or so⟧\\n",
    ]  # fmt: skip
    out = check("chat.jsonl", "--model", "model", "--target", "answer")[1]
    assert "  | <assistant>⟦ Ann." in out
    status, _, err = check("chat.jsonl", "--target", "number")
    assert status == 2 and "--target number of a chat takes --model" in err
    out = check("tofu.jsonl", "--chat", "--model", "model")[1]
    assert "1 tofu (messages)" in out and "  | <user> Who runs the mill?" in out


def test_columns_presets_keys_and_equal_choices(root, check, tmp_path):
    path = tiny_text.write_jsonl(tmp_path / "c.jsonl", [{"ask": "Ada?", "reply": " 1907", "hint": 1}])
    words = ("--columns", "ask=prompt", "reply=completion")
    assert check(str(path), *words)[0] == 2
    status, result = found(check, str(path), *words, "--ignore-keys", "hint")
    assert status == 0 and result["files"][0]["forms"][0] == {
        "form": "own", "record": "prompt + completion", "records": 1
    }  # fmt: skip
    assert check("tofu.jsonl", "--preset", "muse")[0] == 2
    assert found(check, "tofu.jsonl", "--preset", "tofu")[1]["files"][0]["wrong_answers"] == 2
    equal = {"question": "q?", "choices": ["a", "a", "b"], "answer": 2}
    path = tiny_text.write_jsonl(tmp_path / "e.jsonl", [equal])
    status, result = found(check, str(path))
    assert status == 0 and result["files"][0]["equal_choices"] == {"records": 1, "first": f"{path}:1"}


@pytest.mark.parametrize("words, message", [
    (("bad.jsonl",), "kunbr-fast: bad.jsonl:2: not JSON"),
    (("f0.jsonl", "odd.jsonl"), "odd.jsonl:1: unknown form with keys ['alpha']"),
    (("none.jsonl",), "none.jsonl: no such file"),
    (("f0.jsonl", "--holdout-of", "bad.jsonl"), "bad.jsonl:2: not JSON"),
    (("book.jsonl", "--target", "letter"), "target='letter' needs question lines"),
    (("f0.jsonl", "--model", "f1.jsonl"), "f1.jsonl"),
])  # fmt: skip
def test_what_cannot_be_read_is_one_line(words, message, check):
    status, out, err = check(*words, "--quiet")
    assert status == 2 and message in err and err.count("\n") == 1 and not out


@pytest.mark.parametrize("words, message", [
    (["chek", "f.jsonl"], "unknown 'chek' (did you mean check?)"), (["check"], "required: FILE"),
    (["check", "f.jsonl", "f.jsonl"], "'f.jsonl' is given twice"),
])  # fmt: skip
def test_a_wrong_command_line(words, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["data", *words])
    assert message in capsys.readouterr().err


def test_names_and_texts_are_shown_and_do_nothing(tmp_path, capsys):
    path = tiny_text.write_jsonl(tmp_path / "a\x1b[2J\u202e.jsonl", [{"text": "x\x1b[31m⟦y⟧", "_\x1b[2J": 1}])
    assert cli.main(["data", "check", str(path)]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out and "\u202e" not in out and r"  | ⟦x\x1b[31m\u27e6y\u27e7⟧" in out


def test_quantiles_are_nearest_ranks():
    sizes = [(7 * i) % 101 for i in range(1, 101)]
    for share in (0.0, 0.01, 0.5, 0.95, 0.951, 1.0):
        least = next(size for size in sorted(sizes) if sum(other <= size for other in sizes) >= share * len(sizes))
        assert quantile(sizes, share) == least
    assert quantile([3], 0.5) == 3 and math.isclose(quantile([1, 2], 0.5), 1)


def test_the_real_data(shared_data, capsys):
    files = [str(shared_data / "random_birthdays" / f"split_{i}.jsonl") for i in (0, 1)]
    assert cli.main(["data", "check", *files, "--json", "--quiet"]) == 0
    found = json.loads(capsys.readouterr().out)["files"]
    assert [entry["records"] for entry in found] == [157, 157]
    assert [entry["equal_choices"]["records"] for entry in found] == [10, 8]
    assert found[1]["repeated"]["first"] == [f"{files[1]}:{line}" for line in (81, 89)]
