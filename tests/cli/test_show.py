"""--show: what is trained can be looked at before anything is."""

import json
import re
import sys

import pytest
import tiny_text

from kunbr_fast.cli import main
from kunbr_fast.files import models

TOO_LONG = " ".join(f"{name} was born in {year}." for name, year in tiny_text.years().items())


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tiny_text.workspace(tmp_path_factory.mktemp("show"))
    tiny_text.write_jsonl(root / "book.jsonl", [{"text": TOO_LONG}])
    odd = [{"prompt": "Say \x1b[31m⟦x⟧\\n\n", "completion": "é ü\n1907\u202e\n"}, {"prompt": "é", "completion": "1"}]
    tiny_text.write_jsonl(root / "odd.jsonl", odd)
    tiny_text.write_jsonl(root / "dpo.jsonl", [{"prompt": "Ada was", "completion": " 1", "alternate": " 22"}])
    return root


@pytest.fixture
def shown(root, capsys, monkeypatch):
    """What a command prints, and that it reads no weights and writes nothing."""

    def no_weights(*arguments, **options):
        raise AssertionError("weights were read")

    for name in ("load_model", "open_streamed"):
        monkeypatch.setattr(f"kunbr_fast.cli.inputs.{name}", no_weights)
    monkeypatch.setattr(models.ModelFolder, "on_meta", no_weights)

    def run(command, *words):
        before = sorted(root.rglob("*"))
        words = [str(root / word) if (root / word).exists() else word for word in words]
        assert main([command, "--model", str(root / "model"), *words]) == 0
        assert sorted(root.rglob("*")) == before
        return capsys.readouterr().out.replace(f"{root}/", "")

    return run


def marked(text):
    """The parts in brackets, lines put together."""
    return re.findall("⟦(.*?)⟧", text.replace("\\n⟧\n  | ⟦", "\\n"))


def test_density_shows_both_sets(shown):
    out = shown(
        "density",
        "--forget",
        "f0.jsonl",
        "--retain",
        "odd.jsonl",
        "--show",
        "1",
        "--target",
        "answer",
        "--out",
        "x.json",
    )
    lines = out.splitlines()
    assert re.fullmatch(
        r"forget: 6 lines, 6 samples, at most 128 tokens each; \d+ tokens, \d+ with a loss ⟦marked⟧ .*", lines[0]
    )
    question = tiny_text.question(tiny_text.NAMES[0])
    right = f" {'ABCD'[question['answer']]}. {question['choices'][question['answer']]}"
    assert lines[2:8] == [
        f"  | {question['question']}\\n",
        *(f"  | {letter}. {choice}\\n" for letter, choice in zip("ABCD", question["choices"])),
        f"  | Answer:⟦{right}⟧",
    ]
    # of what is not a mark of ours nothing looks like one, and a terminal obeys nothing
    assert lines[9].startswith("odd.jsonl:1: ")
    assert lines[10:] == [r"  | Say \x1b[31m\u27e6x\u27e7\\n\n", r"  | ⟦é ü\n⟧", r"  | ⟦1907\u202e\n⟧"]
    assert "odd.jsonl:2" not in out and "\x1b" not in out


def test_pieces_folds_and_second_answers_are_shown(shown):
    questions = ["--forget-questions", "f0.jsonl", "f1.jsonl"]
    out = shown("rtt", "--forget", "book.jsonl", "f1.jsonl", *questions, "--show", "9", "--rtt-target", "all")
    assert out.startswith("fold book: 1 line, ") and "\nfold f1: 6 lines, 6 samples" in out
    pieces = re.findall(r"book.jsonl:1, piece (\d) of (\d): (\d+) tokens, (\d+) with a loss", out)
    assert len(pieces) == int(pieces[0][1]) > 1 and all(int(tokens) <= 128 for _, _, tokens, _ in pieces)
    # each character but the first token's once
    assert TOO_LONG.endswith("".join(marked(out)[1 : 1 + len(pieces)]))
    more = ["--out", "none", "--objective", "dpo", "--target", "answer", "--show", "1"]
    out = shown("unlearn", "--forget", "dpo.jsonl", "--retain", "f0.jsonl", *more)
    assert re.search(r"^its alternate: \d+ tokens, \d with a loss\n  \| Ada was⟦ 22⟧$", out, re.M)
    assert "  | Ada was⟦ 1⟧\n" in out


def test_a_separator_is_shown_as_it_was_read(shown, root, capsys):
    words = ("density", "--forget", "dpo.jsonl", "--show", "1", "--target", "answer", "--separator")
    assert "  | Ada was\\n\n  | ⟦ 1⟧\n" in shown(*words, r"\n")
    assert r"  | Ada was\t⟦ 1⟧" in shown(*words, r"\t")
    assert r"  | Ada was\\n⟦ 1⟧" in shown(*words, r"\\n")
    with pytest.raises(SystemExit, match="2"):
        main([*words[:1], "--model", str(root / "model"), *words[1:], r"\d"])
    assert r"argument --separator: '\\d': expected n (line end)" in capsys.readouterr().err


def test_json_has_the_same(shown):
    found = json.loads(shown("density", "--forget", "f0.jsonl", "book.jsonl", "--show", "7", "--json"))
    assert found["max_length"] == 128
    (forget,) = found["sets"]
    assert forget["set"] == "forget" and forget["lines"] == 7 and len(forget["shown"]) == 7 < forget["samples"]
    assert all(not one["parts"][0]["loss"] and one["parts"][1]["loss"] for one in forget["shown"])
    assert forget["shown"][-1]["where"].endswith("book.jsonl:1, piece 1 of 2")
    assert TOO_LONG.startswith("".join(part["text"] for part in forget["shown"][-1]["parts"]))


def test_a_terminal_gets_colours_unless_it_wants_none(shown, monkeypatch):
    words = ("density", "--forget", "dpo.jsonl", "--show", "1", "--target", "answer")
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda self: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert "  | Ada was\x1b[1;4;32m 1\x1b[0m\n" in shown(*words)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "  | Ada was⟦ 1⟧\n" in shown(*words)


def test_an_error_is_found_in_any_line(root, capsys):
    tiny_text.write_jsonl(root / "bad.jsonl", [{"text": "in 1907"}, {"text": "no number"}])
    words = ["--model", root / "model", "--forget", root / "bad.jsonl", "--show", "1", "--target", "number"]
    assert main(["density", *map(str, words)]) == 2
    assert "bad.jsonl:2: target='number' but there is no digit" in capsys.readouterr().err
