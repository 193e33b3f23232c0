"""What records, samples, batches and files hold: every kind of bad value is refused by name, before any work."""

import json
import math
import os
import re
import time

import numpy as np
import pytest
import tiny_text
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BatchEncoding, PreTrainedTokenizerFast

import kunbr_fast as kf
from kunbr_fast.cli import command as cli
from kunbr_fast.data import TextSettings, as_samples, check_record, encode
from kunbr_fast.data.content import check_files
from kunbr_fast.evaluation.accuracy import prepare_questions
from kunbr_fast.model.decoder import Decoder
from kunbr_fast.run.samples import to_samples

TOKENS = {"input_ids": torch.tensor([1, 2, 3]), "labels": torch.tensor([1, 2, 3])}


# ---------------------------------------------------------------- records


@pytest.mark.parametrize("choices, message", [
    (["a", "a"], "all of them are 'a'"), (["a", " a ", "a"], "all of them are 'a'"), ([1, "1"], "all of them are 1"),
    (["a", " "], "not blank"),
    (["a", "\t\n"], "not blank"), (["a", "\u200b"], "not blank"), (["a", "\u202e\x07"], "not blank"),
    (["a", math.nan], "finite number"), ([1, math.inf], "finite number"), ([-math.inf, 2], "finite number"),
    ([1, 10**4000], "finite number"), ([1, True], "finite number"), ([1, [2]], "finite number"), ("ab", "a list of 2"),
])  # fmt: skip
def test_choices_that_cannot_be_told_apart(choices, message):
    record = {"question": "q", "choices": choices, "answer": 0}
    with pytest.raises(ValueError, match=rf"^here: .*{message}") as error:
        check_record(record, "here")
    assert len(str(error.value)) < 250 and str(error.value).isprintable()


def test_equal_choices_are_refused_by_their_letters_or_counted(tmp_path, caplog):
    """As the published birthdays have them: one question in twenty."""
    path, lists = (
        tmp_path / "q.jsonl",
        (["a", "b"], ["a", "b", "a"], [1, 2, "2"], ["é", "x", "e\u200b\u0301 "], [1.0, 2, 1]),
    )
    lists += (["Pa ris", "x", "Pa\u00a0\n ris"],)
    path.write_text("".join(json.dumps({"question": "q", "choices": c, "answer": 0}) + "\n" for c in lists))
    message = f"{path}:2: the choices A and C are equal, 'a': change one of them, or let them be (equal_choices=allow)"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        kf.load_records(path)
    for choices, letters in zip(lists[2:], ("B and C", *["A and C"] * 3)):
        with pytest.raises(ValueError, match=f"^record 0: the choices {letters} are equal"):
            encode([{"question": "q", "choices": choices, "answer": 1}], tiny_text.tokenizer())
    records = [kf.load_records(path, equal_choices="allow") for _ in range(2)][1]
    (warning,) = caplog.records
    assert warning.getMessage() == (
        f"{path}:2: two of its choices are equal, and only the one that 'answer' names counts as right (5 such "
        f"questions in {path})"
    )
    tokenizer = tiny_text.tokenizer()
    assert len(prepare_questions(tokenizer, records).answers) == 6  # what was let be once is let be everywhere
    for number, sample in enumerate(encode(records, tokenizer, alternate="wrong", seed=number) for number in range(4)):
        for entry, record in zip(sample, records):  # a wrong answer is never one that is equal to the right one
            text = tokenizer.decode(entry["alternate"]["input_ids"]).rpartition(". ")[2]
            assert text.strip() != str(record["choices"][0]).strip(), number
    with pytest.raises(ValueError, match="equal_choices='yes': expected one of error, allow"):
        kf.load_records(path, equal_choices="yes")


@pytest.mark.parametrize("choices", [["a", "A"], [1, 2.5], ["1", "1.0"], ["été", "ete"], [0.5, 1e15], ["*", "**"]])
def test_choices_that_can(choices):
    check_record({"question": "q", "choices": choices, "answer": 1}, "here")


@pytest.mark.parametrize("written, told", [
    ("1e-5", "1e-05"), ("1e22", None), ("2.50", "2.5"), ("3.14159265358979323846", "3.141592653589793"),
    ("-0.0", ""), ("1965.0", ""), ("0.1", ""), ("1921", ""), ("12345678901234567890", ""), ('"1e-5"', ""),
])  # fmt: skip
def test_a_number_among_choices_is_read_as_it_is_written_or_refused(tmp_path, written, told):
    path = tmp_path / "q.jsonl"
    path.write_text(f'{{"question": "q", "choices": ["a", {written}], "answer": 1, "_x": 1e-5}}')
    if told == "":
        (record,) = kf.load_records(path)
        assert f"{record['choices'][1]}" == written.strip('"')
        return
    message = f"{path}:1: the choice {written} is a number, and would be written {told or '1e+22'}: put it in quotes"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        kf.load_records(path)
    with pytest.raises(ValueError, match="^here: the choice 1e-05 .* with an exponent: put it in quotes"):
        check_record({"question": "q", "choices": ["a", 1e-5], "answer": 1}, "here")


@pytest.mark.parametrize("text", ["", " ", "\n\t", "\u200b", "\ufeff\u2060", "\x00"])
@pytest.mark.parametrize("record, key", [
    ({"text": 0}, "text"), ({"prompt": 0, "completion": "c"}, "prompt"),
    ({"prompt": "p", "completion": 0}, "completion"),
    ({"question": 0, "choices": ["a", "b"], "answer": 0}, "question"),
])  # fmt: skip
def test_text_that_nobody_sees(record, key, text):
    with pytest.raises(ValueError, match=f"^here: '{key}' must be a string that is not blank"):
        check_record({**record, key: text}, "here")


NO_NUMBERS = ("NaN", "-Infinity", "1e400", "1e-400", "9" * 30, "-" + "9" * 5000)
USED = (
    '{"question": "q", "choices": [1, X], "answer": 0}', '{"question": "q", "choices": [1, 2], "answer": X}',
    '{"text": X}', '{"prompt": X, "completion": "c"}', '{"prompt": "p", "completion": X}',
    '{"messages": [{"role": "user", "content": "c", "more": [X]}]}', '{"text": "a line", "alternate": X}',
    '{"text": "a line", "fact": X}',
)  # fmt: skip
UNUSED = (
    '{"text": "a line", "score": X, "_answer": X}', '{"prompt": "p", "completion": "c", "meta": {"a": [X]}}',
    '{"question": "q", "choices": [1, 2], "answer": 0, "id": X, "_text": X}',
)  # fmt: skip


@pytest.mark.parametrize("number", NO_NUMBERS, ids=lambda number: number[:9])
def test_numbers_are_judged_where_they_are_read(number, tmp_path):
    path = tmp_path / "r.jsonl"
    for line in UNUSED:
        path.write_text(line.replace("X", number))
        (record,) = kf.load_records(path)
        assert json.dumps(record)  # of which a run's identity is made
    for line in USED:
        path.write_text(line.replace("X", number))
        with pytest.raises(ValueError, match=r"r.jsonl:1: '\w+': .*number") as error:
            kf.load_records(path)
        assert len(str(error.value)) < 200 + len(str(path))


# ---------------------------------------------------------------- tokenizers


def tokenizer_of(model, **more):
    inner = Tokenizer(model)
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, name_or_path="the/folder", **more)


@pytest.mark.parametrize("text", ["a" * 8_000_000, "1." * 2_000_000, " " * 8_000_000 + "x", "😀" * 2_000_000])
def test_what_cannot_fit_is_not_tokenised(text):
    before = time.process_time()
    for record in ({"text": text}, {"prompt": "p", "completion": text}):
        with pytest.raises(ValueError, match="^longer than max_length=128: record 0 .more than [0-9]+ tokens"):
            encode([record], tiny_text.tokenizer(), max_length=128, text=TextSettings(split_long=False))
    with pytest.raises(ValueError, match="^longer than max_length=128: the alternate of record 0 .more than"):
        encode([{"text": "short", "alternate": text}], tiny_text.tokenizer(), max_length=128, alternate="given")
    assert time.process_time() - before < 6


def test_what_fits_is_taken_however_long_it_is():
    """A word that is not known is one token, of any length; cut in two it would be many."""
    words = models.WordPiece({"[UNK]": 0, "a": 1, "##a": 2}, unk_token="[UNK]", max_input_chars_per_word=1000)
    for length in (2**16, 2**16 + 900, 2**17, 1_000_000):
        text = "a" * (length - 2) + " a"
        (sample,) = encode([{"text": text}], tokenizer_of(words), max_length=4)
        assert sample["input_ids"].tolist() == [0, 1]
        (sample,) = encode([{"text": "a" + " " * (length - 2) + "a"}], tokenizer_of(words), max_length=4)
        assert sample["input_ids"].tolist() == [1, 1]


class PanicException(BaseException):
    """As pyo3's."""


def test_a_tokenizer_that_fails_names_the_record_and_its_folder(monkeypatch):
    records = [{"text": "known known"}, {"text": "b"}]
    tokenizer = tokenizer_of(models.WordPiece({"known": 0}))
    with pytest.raises(ValueError, match="^record 1: the tokenizer of the/folder fails on this text: .*UNK") as error:
        encode(records, tokenizer)
    assert str(error.value).isprintable()

    def raising(error):
        def call(*args, **kwargs):
            raise error

        return call

    monkeypatch.setattr(type(tokenizer), "__call__", raising(PanicException("index out of\nbounds")))
    with pytest.raises(ValueError, match="^record 0: the tokenizer of the/folder fails on this text: .*index") as error:
        encode(records, tokenizer)
    assert str(error.value).isprintable()
    monkeypatch.setattr(type(tokenizer), "__call__", raising(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        encode(records, tokenizer)


def test_a_chat_template_that_fails_names_the_folder():
    chat = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    for template, message in (
        (5, "^the/folder: its tokenizer's chat_template is 5, expected text$"),
        ("{{ 1 / 0 }}", "^record 0: .*does not take these messages: .*zero .the template of the/folder"),
        ("{% nothing %}", "^record 0: .*the template of the/folder"),
    ):
        tokenizer = tokenizer_of(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
        tokenizer.chat_template = template
        with pytest.raises(ValueError, match=message) as error:
            encode(chat, tokenizer)
        assert str(error.value).isprintable()


# ---------------------------------------------------------------- samples and batches


def of(**changes):
    return {**TOKENS, **changes}


BAD_SAMPLES = {
    "no mapping": 3, "labels alone": {"labels": [1, 2]}, "no token": of(input_ids=[], labels=[]),
    "floats": of(input_ids=torch.tensor([1.0, 2.0, 3.0])), "float labels": of(labels=[0.5, 1, 2]),
    "bools": of(input_ids=[True, False, True]), "complex": of(labels=torch.tensor([1j, 1, 1])),
    "text": of(input_ids="abc"), "texts": of(input_ids=["a", "b", "c"]), "nothing": of(input_ids=[1, None, 3]),
    "ragged": {"input_ids": [[1, 2], [3]]}, "65 bits": of(input_ids=[1, 2**64, 3]),
    "400 digits": of(labels=[1, 10**400, 3]),
    "unsigned": of(input_ids=np.array([1, 2**63, 3], dtype=np.uint64)), "a number": of(input_ids=5),
    "three axes": of(input_ids=torch.ones(1, 1, 3, dtype=torch.long), labels=torch.ones(1, 1, 3, dtype=torch.long)),
    "other lengths": of(labels=[1, 2]), "a mask of floats": of(attention_mask=[0.5, 1, 1]),
    "a hole": of(attention_mask=[1, 0, 1]),
    "a mask of text": of(attention_mask="110"), "a mask of nothing": of(attention_mask=[0, 0, 0]),
    "an additive mask": of(attention_mask=[-1e9, 0, 0]), "a negative token": of(input_ids=[1, -1, 3]),
    "a negative label": of(labels=[1, -1, 3]), "another negative label": of(labels=[-100, -101, 3]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_SAMPLES)
def test_bad_samples_are_named(name):
    with pytest.raises((ValueError, TypeError), match=r"^sample 1: ") as error:
        as_samples([TOKENS, BAD_SAMPLES[name]])
    assert len(str(error.value)) < 250 and str(error.value).isprintable()


def test_good_samples():
    batch = BatchEncoding(
        {"input_ids": [[1, 2, 0], [3, 4, 5]], "attention_mask": [[1, 1, 0], [1, 1, 1]]}, tensor_type="pt"
    )
    found = as_samples([TOKENS, of(labels=[-100, 2, -100]), {"input_ids": np.array([7, 8], dtype=np.int32)}, batch])
    assert [sample["input_ids"].tolist() for sample in found] == [[1, 2, 3], [1, 2, 3], [7, 8], [1, 2], [3, 4, 5]]
    assert found[1]["labels"].tolist() == [-100, 2, -100] and found[0]["input_ids"].dtype == torch.int64


@pytest.fixture(scope="module")
def decoder():
    return Decoder(tiny_text.model())


@pytest.mark.parametrize("key", ["input_ids", "labels"])
@pytest.mark.parametrize("beyond", [0, 1, 2**40])
def test_tokens_beyond_the_vocabulary(key, beyond, decoder):
    rows = decoder.model.get_input_embeddings().weight.shape[0]
    bad = of(**{key: torch.tensor([1, 2, rows + beyond])})
    what = {"input_ids": "token", "labels": "label"}[key]
    config = kf.KUnBRConfig(num_blocks=3, top_k=1)
    for run, name in (
        (lambda: kf.knowledge_density(decoder, [TOKENS, bad]), "sample 1"),
        (lambda: to_samples([TOKENS, bad], None, config, decoder, "forget"), "forget sample 1"),
        (lambda: kf.unlearn(decoder.model, [TOKENS], [TOKENS, bad], config), "retain sample 1"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"^{name}: {what} id {rows + beyond}, but the model embeds {rows}"):
            run()


def test_records_and_samples_do_not_mix(decoder):
    for data in ([TOKENS, {"text": "a"}], [{"text": "a"}, TOKENS], [TOKENS, 3], [None]):
        with pytest.raises(ValueError, match="^the forget set: entry [01] is "):
            to_samples(data, tiny_text.tokenizer(), kf.KUnBRConfig(), decoder, "forget")


# ---------------------------------------------------------------- files


def lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_a_file_is_on_one_side(tmp_path):
    a, b = lines(tmp_path / "a.jsonl", {"text": "a"}), lines(tmp_path / "b.jsonl", {"text": "b"})
    os.symlink(a, tmp_path / "link")
    os.link(a, tmp_path / "hard")
    for other in (a, str(tmp_path / "." / "a.jsonl"), str(tmp_path / "link"), str(tmp_path / "hard")):
        with pytest.raises(ValueError, match="^--forget: .* is given twice"):
            check_files({"--forget": [a, other]}, {"--retain": [b]})
        with pytest.raises(ValueError, match="^--retain: .* is the same file as --forget .*cannot be kept"):
            check_files({"--forget": [a]}, {"--retain": [b, other]})
        with pytest.raises(ValueError, match="^--retain-questions: .* is the same file as --forget-questions"):
            check_files({"--forget-questions": [a]}, {"--retain-questions": [other]})
        check_files({"--forget": [a], "--forget-questions": [other]}, {"--retain": [b], "--retain-questions": None})


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return tiny_text.workspace(tmp_path_factory.mktemp("content"))


def test_the_command_line_says_which_file(workspace, tmp_path, capsys):
    f, r, text = (str(workspace / name) for name in ("f0.jsonl", "r.jsonl", "text.jsonl"))
    lines(workspace / "text.jsonl", {"text": "a b"}, {"text": "c d"})
    model = ["--model", str(workspace / "model")]
    unlearn = ["unlearn", *model, "--out", str(tmp_path / "out"), "--forget"]
    for words, message in (
        ([*unlearn, f, f, "--retain", r], "argument --forget: "),
        ([*unlearn, f, "--retain", f], "--retain: "),
        ([*unlearn, f, "--retain", r, "--retain-questions", f], "--retain-questions: "),
        ([*unlearn, f, "--retain", r, "--forget-questions", text], "--forget-questions: "),
        ([*unlearn, f, "--retain", r, "--retain-questions", text], "--retain-questions: "),
        (["rtt", *model, "--forget", f, r, "--forget-questions", r, text], "--forget-questions: "),
        (["density", *model, "--forget", f, "--retain", f, "--statistic", "cosine"], "--retain: "),
        (["plan", *model, "--gpu-memory", "24GiB", "--forget", f, "--retain", f], "--retain"),
    ):  # fmt: skip
        try:
            status = cli.main(words)
        except SystemExit as exit:
            status = exit.code
        error = capsys.readouterr().err.splitlines()[-1]
        assert status == 2 and message in error and not (tmp_path / "out").exists(), error


@pytest.mark.parametrize("key", ["input_ids", "labels"])
def test_a_step_names_the_sample_of_its_batch(key):
    model = tiny_text.model()
    rows = model.get_input_embeddings().weight.shape[0]
    bad = of(**{key: torch.tensor([1, rows, 2])})
    with kf.reinserted(model, tiny_text.model(seed=1), block=range(1, 3), lr=1e-3) as training:
        for forget, retain, place in (([TOKENS, bad], [TOKENS], 1), ([TOKENS], [TOKENS, bad], 2)):
            with pytest.raises(ValueError, match=f"^sample {place} of the batch: .* id {rows}, but the model embeds"):
                training.step(forget, retain)
        assert training.step([TOKENS], [TOKENS])["forget_loss"] > 0
