"""Records, loss targets token by token, and packing."""

import json
import re

import pytest
import tiny_text
import torch
import transformers as tf
from reference_procedure import left_padded, padded
from tiny_models import random_samples
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from kunbr_fast import data
from kunbr_fast.data import TextSettings, as_samples, encode, load_records, pack

# ---------------------------------------------------------------- tokenizers

QUESTION = {"question": "When was Ada Ek born?", "choices": [1899, 1902, "1900", 1901], "answer": 2}
WORDS = "When was Ada Ek born ? A B C D . Answer : 1899 1900 1901 1902 <assistant> Say 12 then 34".split()


def byte_level(post=None):
    tokenizer = tiny_text.tokenizer()
    if post is not None:
        end = tokenizer.convert_tokens_to_ids("<eos>")
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=post, special_tokens=[("<eos>", end)]
        )
    return tokenizer


def word_level():
    vocab = {word: i for i, word in enumerate(["<unk>", *dict.fromkeys(WORDS)])}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return tf.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")


@pytest.fixture(scope="module")
def bpe():
    return byte_level()


def labelled(sample, tokenizer):
    """The tokens with a loss, as the tokenizer spells them; also checks that each label is its own token."""
    ids, labels = sample["input_ids"], sample["labels"]
    assert ids.dtype == labels.dtype == torch.int64 and ids.shape == labels.shape
    counts = labels != -100
    assert torch.equal(labels[counts], ids[counts])
    return tokenizer.convert_ids_to_tokens(ids[counts].tolist())


def tokens_on_bytes(sample, tokenizer, text, first, stop):
    """The truth for byte-level tokenizers: each character of a token's spelling is one byte of the text, so the
    tokens that share a byte with text[first:stop] follow from counting, without the tokenizer's own offsets."""
    low, high = len(text[:first].encode()), len(text[:stop].encode())
    place, found = 0, []
    for position, token in enumerate(tokenizer.convert_ids_to_tokens(sample["input_ids"].tolist())):
        if token in tokenizer.all_special_tokens:
            continue
        if place < high and place + len(token) > low:
            found.append(position)
        place += len(token)
    assert place == len(text.encode()), "the sample is not this text"
    return found


# ---------------------------------------------------------------- reading

FORMS = [
    {"question": "q?", "choices": ["a", 2, 3.5], "answer": 0},
    {"text": "a line", "split": "kept"},
    {"prompt": "p", "completion": "c"},
    {"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": "x"}]},
]


def test_four_forms_and_where_they_came_from(tmp_path):
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_text("\n" + json.dumps(FORMS[0]) + "\n   \n" + json.dumps(FORMS[1]) + "\n")
    second.write_text(json.dumps(FORMS[2]) + "\n" + json.dumps(FORMS[3]))  # no newline at the end
    records = load_records([first, second])
    assert [r.pop("_where") for r in records] == [f"{first}:2", f"{first}:4", f"{second}:1", f"{second}:2"]
    assert records == FORMS
    assert load_records(str(second)) == load_records([second])


BAD_LINES = {
    "{'text': 'x'}": "not JSON",
    '{"text": "cut': "not JSON",
    '{"text": "x"} {"text": "y"}': "not JSON",
    '{"question": "q", "choices": ["a", "b"], "answer": %s}' % ("9" * 5000): "of 5000 characters does not fit",
    "[" * 100_000: "nested deeper than 64 levels",
    '["text"]': "got a list",
    '"text"': "got a str",
    "null": "got a NoneType",
    "{}": "unknown form",
    '{"Text": "x"}': "unknown form with keys",
    '{"text": ""}': "'text' must be a string that is not blank",
    '{"text": 3}': "'text' must be a string that is not blank",
    '{"text": null}': "'text' must be a string that is not blank",
    '{"text": "half a pair \\ud83d"}': "not valid Unicode",
    '{"prompt": "p"}': "'completion' must be",
    '{"completion": "p"}': "'prompt' must be",
    '{"prompt": "p", "completion": ["c"]}': "'completion' must be",
    '{"messages": []}': "'messages' must be",
    '{"messages": "hello"}': "'messages' must be",
    '{"messages": [{"role": "user"}]}': "'messages' must be",
    '{"messages": [{"role": "user", "content": 3}]}': "'messages' must be",
    '{"question": "", "choices": ["a", "b"], "answer": 0}': "'question' must be",
    '{"question": "q", "answer": 0}': "'choices' must be",
    '{"question": "q", "choices": ["a"], "answer": 0}': "'choices' must be a list of 2 to 10",
    '{"question": "q", "choices": {"a": 1, "b": 2}, "answer": 0}': "'choices' must be",
    '{"question": "q", "choices": "ab", "answer": 0}': "'choices' must be",
    '{"question": "q", "choices": ["a", ""], "answer": 0}': "each of 'choices'",
    '{"question": "q", "choices": ["a", true], "answer": 0}': "each of 'choices'",
    '{"question": "q", "choices": ["a", null], "answer": 0}': "each of 'choices'",
    '{"question": "q", "choices": ["a", "b"]}': "'answer' must be the index",
    '{"question": "q", "choices": ["a", "b"], "answer": 2}': "0 to 1, got 2",
    '{"question": "q", "choices": ["a", "b"], "answer": -1}': "0 to 1, got -1",
    '{"question": "q", "choices": ["a", "b"], "answer": true}': "0 to 1, got True",
    '{"question": "q", "choices": ["a", "b"], "answer": "0"}': "0 to 1, got '0'",
    '{"question": "q", "choices": ["a", "b"], "answer": 1.0}': "0 to 1, got 1.0",
    json.dumps({"question": "q", "choices": list("abcdefghijk"), "answer": 0}): "'choices' must be a list of 2 to 10",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: line[:40])
def test_a_malformed_line_is_named(line, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"text": "fine"}\n\n' + line + '\n{"text": "fine"}\n')
    with pytest.raises(ValueError) as error:
        load_records(path)
    assert str(error.value).startswith(f"{path}:3: ")
    assert BAD_LINES[line] in str(error.value)
    assert len(str(error.value)) < 400 and str(error.value).isprintable()


def test_bad_files(tmp_path):
    with pytest.raises(ValueError, match="no file was given"):
        load_records([])
    with pytest.raises(ValueError, match="nowhere.jsonl: no such file"):
        load_records(tmp_path / "nowhere.jsonl")
    with pytest.raises(ValueError, match="locuslab/TOFU: no such file: a data set of the Hub is written to a folder"):
        load_records("locuslab/TOFU")
    with pytest.raises(ValueError, match="got a directory, expected a file"):
        load_records(tmp_path)
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n  \n")
    good = tmp_path / "good.jsonl"
    good.write_text('{"text": "x"}')
    with pytest.raises(ValueError, match="empty.jsonl: empty"):
        load_records([good, empty])
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes('{"text": "é"}'.encode("latin-1"))
    with pytest.raises(ValueError, match="latin.jsonl:1: not UTF-8"):
        load_records(latin)


# ---------------------------------------------------------------- targets


def test_the_prompt_is_the_evaluations_own_form():
    expected = "When was Ada Ek born?\nA. 1899\nB. 1902\nC. 1900\nD. 1901\nAnswer:"
    assert data.question_prompt(QUESTION) == expected


def question_text(record):
    return f"{data.question_prompt(record)} {data.LETTERS[record['answer']]}. {record['choices'][record['answer']]}"


@pytest.mark.parametrize("post", [None, "<eos> $A", "$A <eos>"], ids=["plain", "begin", "end"])
def test_question_targets_byte_level(post):
    tokenizer = byte_level(post)
    text = question_text(QUESTION)
    first = len(text) - len("C. 1900")
    spans = {"answer": (first, len(text)), "letter": (first, first + 1), "number": (len(text) - 4, len(text))}
    for target, span in spans.items():
        (sample,) = encode([QUESTION], tokenizer, target)
        expected = tokens_on_bytes(sample, tokenizer, text, *span)
        assert torch.nonzero(sample["labels"] != -100).flatten().tolist() == expected, target
        spelled = "".join(labelled(sample, tokenizer))
        assert spelled == {"answer": "ĠC.Ġ1900", "letter": "ĠC", "number": "Ġ1900"}[target] or (
            target == "number" and spelled == "1900"
        )
    (whole,) = encode([QUESTION], tokenizer, "all")
    assert torch.equal(whole["labels"], whole["input_ids"])
    assert tokenizer.decode(whole["input_ids"], skip_special_tokens=True) == text
    ends = tokenizer.convert_tokens_to_ids("<eos>")
    assert (int(whole["input_ids"][0]) == ends) == (post == "<eos> $A")
    assert (int(whole["input_ids"][-1]) == ends) == (post == "$A <eos>")


def test_question_targets_word_level():
    tokenizer = word_level()
    for target, expected in {"answer": ["C", ".", "1900"], "letter": ["C"], "number": ["1900"]}.items():
        (sample,) = encode([QUESTION], tokenizer, target)
        assert labelled(sample, tokenizer) == expected
        assert bool((sample["labels"][-len(expected) :] != -100).all()) or target == "letter"
    # "letter" is the one after "Answer:", not the equal one in the list of choices
    (sample,) = encode([QUESTION], tokenizer, "letter")
    place = int(torch.nonzero(sample["labels"] != -100))
    assert tokenizer.convert_ids_to_tokens(sample["input_ids"][place - 2 : place].tolist()) == ["Answer", ":"]


@pytest.mark.parametrize("answer", range(4))
def test_every_letter(bpe, answer):
    (sample,) = encode([{**QUESTION, "answer": answer}], bpe, "letter")
    assert labelled(sample, bpe) == ["Ġ" + "ABCD"[answer]]


@pytest.mark.parametrize(
    "prompt, completion, text",
    [
        ("Say", "12 then 34", "Say12 then 34"),
        ("Say ", "12 then 34", "Say 12 then 34"),
        ("Say", " 12 then 34", "Say 12 then 34"),
        ("Say\n", "12 then 34", "Say\n12 then 34"),
        ("é ü", "ü é", "é üü é"),
    ],
)
def test_prompt_and_completion(bpe, prompt, completion, text):
    record = {"prompt": prompt, "completion": completion}
    (whole,) = encode([record], bpe, "all")
    assert bpe.decode(whole["input_ids"]) == text and torch.equal(whole["labels"], whole["input_ids"])
    (sample,) = encode([record], bpe, "answer")
    first = len(text) - len(completion)
    expected = tokens_on_bytes(sample, bpe, text, first, len(text))
    assert torch.nonzero(sample["labels"] != -100).flatten().tolist() == expected
    assert 0 < len(expected) < len(sample["labels"])
    if "34" in completion:
        (sample,) = encode([record], bpe, "number")
        assert "".join(labelled(sample, bpe)).strip("Ġ") == "34"


def test_number_is_the_last_one_only(bpe):
    for text, digits in [("born in 1973.", "1973"), ("12 and 7 pigs", "7"), ("x1999y", "1999")]:
        (sample,) = encode([{"text": text}], bpe, "number")
        start = text.rindex(digits)
        expected = tokens_on_bytes(sample, bpe, text, start, start + len(digits))
        assert torch.nonzero(sample["labels"] != -100).flatten().tolist() == expected
    (sample,) = encode([{"text": "Say 12 then 34 ."}], word_level(), "number")
    assert labelled(sample, word_level()) == ["34"]


def test_chat_marks_every_assistant_turn(bpe):
    turns = [("user", "Say 12"), ("assistant", "34"), ("user", "Ada"), ("assistant", "Ek 7")]
    record = {"messages": [{"role": r, "content": c} for r, c in turns]}
    text = "<user> Say 12\n<assistant> 34\n<user> Ada\n<assistant> Ek 7\n"
    (whole,) = encode([record], bpe, "all")
    assert bpe.decode(whole["input_ids"]) == text
    (sample,) = encode([record], bpe, "answer")
    expected = []
    for answer in ("34\n", "Ek 7\n"):
        start = text.index("<assistant> " + answer) + len("<assistant> ")
        expected += tokens_on_bytes(sample, bpe, text, start, start + len(answer))
    assert torch.nonzero(sample["labels"] != -100).flatten().tolist() == expected
    # a tokenizer with a begin token of its own must not add it: the template is the whole text
    (begun,) = encode([record], byte_level("<eos> $A"), "all")
    assert torch.equal(begun["input_ids"], whole["input_ids"])


def test_encode_refusals(bpe):
    line = {"text": "no digit here", "_where": "f.jsonl:3"}
    with pytest.raises(ValueError, match="target='loss': expected one of all, answer, letter, number"):
        encode([line], bpe, "loss")
    with pytest.raises(ValueError, match="no records"):
        encode([], bpe)
    with pytest.raises(ValueError, match="f.jsonl:3: target='number' but there is no digit"):
        encode([line], bpe, "number")
    with pytest.raises(ValueError, match="f.jsonl:3: target='letter' needs question lines, got .*text"):
        encode([line], bpe, "letter")
    with pytest.raises(ValueError, match="f.jsonl:3: target='answer' does not apply to a text line"):
        encode([line], bpe, "answer")
    with pytest.raises(ValueError, match="f.jsonl:4: no token with a loss is left for target='all'"):
        encode([{"text": "A", "_where": "f.jsonl:4"}], word_level())
    with pytest.raises(ValueError, match="f.jsonl:5: 'completion' must be a string that is not blank, got ''"):
        encode([{"prompt": "A", "completion": "", "_where": "f.jsonl:5"}], bpe, "answer")
    # the only labelled token is the first, which nothing predicts
    with pytest.raises(ValueError, match="no token with a loss is left"):
        encode([{"text": "1900 A"}], word_level(), "number")

    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="Slow gives no character offsets"):
        encode([line], Slow())


def test_records_that_were_not_read_from_a_file_are_checked_too(bpe):
    good = {"text": "fine"}
    with pytest.raises(ValueError, match="record 1: 'answer' must be the index of the right choice, 0 to 3, got -1"):
        encode([good, {**QUESTION, "answer": -1}], bpe)
    with pytest.raises(ValueError, match="record 1: 'answer' must be the index"):
        encode([good, {**QUESTION, "answer": 4}], bpe)
    with pytest.raises(ValueError, match="record 2: unknown form with keys"):
        encode([good, good, {"context": "x"}], bpe)


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"answer": -1}, "'answer' must be the index"),
        ({"answer": "B"}, "'answer' must be the index of the right choice, 0 to 3, got 'B': write 1"),
        ({"weight": 5}, "'weight' beside question"),
        ({"question": None}, "'question' must be a string"),
        ({"choices": ["a", "a", "b"]}, "the choices A and B are equal"),
    ],
)
def test_records_of_a_file_that_were_changed_since_are_checked_again(bpe, tmp_path, changed, message):
    tiny_text.write_jsonl(tmp_path / "f.jsonl", [QUESTION])
    (record,) = load_records(tmp_path / "f.jsonl")
    with pytest.raises(ValueError, match=f"^{re.escape(str(tmp_path))}/f.jsonl:1: {message}"):
        encode([{**record, **changed}], bpe)
    assert encode([{**record, "answer": 1}], bpe)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"max_length": "5"}, "max_length='5': expected a whole number above 0, or None"),
        ({"max_length": 3.5}, "max_length=3.5: expected"),
        ({"max_length": 0}, "max_length=0: expected"),
        ({"max_length": True}, "max_length=True: expected"),
        ({"seed": "1"}, "seed='1': expected a whole number"),
        ({"text": "\n"}, "text='.n': expected TextSettings"),
        ({"records": {"text": "a"}}, "expected a list of records"),
        ({"records": ["a"]}, "record 0: got 'a', expected a mapping"),
    ],
)
def test_arguments_of_encode_are_checked(bpe, wrong, message):
    with pytest.raises(ValueError, match=message):
        encode(**{"records": [{"text": "fine"}], "tokenizer": bpe, **wrong})


def test_long_samples_are_reported_not_cut(bpe):
    records = [{"text": "word " * n, "_where": f"f.jsonl:{n}"} for n in (1, 2, 30, 31, 32, 33, 34)]
    lengths = [len(bpe(r["text"])["input_ids"]) for r in records]
    with pytest.raises(ValueError) as error:
        encode(records, bpe, max_length=lengths[1], text=TextSettings(split_long=False))
    assert f"f.jsonl:30 ({lengths[2]} tokens)" in str(error.value) and "and 2 more" in str(error.value)
    assert "f.jsonl:2 " not in str(error.value)
    bpe.model_max_length, before = 3, bpe.model_max_length
    try:
        exact = encode(records, bpe, max_length=max(lengths))
    finally:
        bpe.model_max_length = before
    assert [len(s["input_ids"]) for s in exact] == lengths


def test_the_real_data(shared_data, bpe):
    files = sorted(shared_data.glob("*/*.jsonl"))
    assert len(files) >= 30
    with pytest.raises(ValueError, match="split_0.jsonl:14: the choices . and . are equal"):
        load_records(shared_data / "random_birthdays" / "split_0.jsonl")
    records = load_records(files, equal_choices="allow")
    assert sum(1 for f in files for line in f.read_text().splitlines() if line.strip()) == len(records)
    questions = [r for r in records if data.is_question(r)]
    assert len(questions) > 3000 and len(records) - len(questions) > 3000
    some = questions[::7]
    for target in ("answer", "letter"):
        for record, sample in zip(some, encode(some, bpe, target)):
            letter = "ABCD"[record["answer"]]
            spelled = bpe.convert_tokens_to_string(labelled(sample, bpe))
            assert spelled == (
                f" {letter}" if target == "letter" else f" {letter}. {record['choices'][record['answer']]}"
            )
            assert bpe.decode(sample["input_ids"]) == question_text(record)
    born = [r for r in records if "random_birthdays" in r["_where"] and "text" in r]
    for record, sample in zip(born, encode(born, bpe, "number")):
        year = bpe.convert_tokens_to_string(labelled(sample, bpe)).strip()
        assert len(year) == 4 and year.isdigit() and year in record["text"]
    for record, sample in zip(records[::3], encode(records[::3], bpe, "all")):
        assert bool((sample["labels"] != -100).all()), record


# ---------------------------------------------------------------- packing


def same(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs):
        assert torch.equal(a["input_ids"], b["input_ids"]) and torch.equal(a["labels"], b["labels"])


@pytest.mark.parametrize("side", [padded, left_padded])
@pytest.mark.parametrize("pad", [0, 5])
def test_padded_batches_become_the_same_samples(side, pad):
    samples = random_samples(7)
    ids, mask, labels = side(samples, pad)
    assert bool((mask == 0).any())
    same(as_samples([{"input_ids": ids, "attention_mask": mask, "labels": labels}]), samples)
    same(as_samples({"input_ids": ids, "attention_mask": mask, "labels": labels}), samples)
    as_lists = {"input_ids": ids.tolist(), "attention_mask": mask.tolist(), "labels": labels.tolist()}
    same(as_samples(tf.BatchEncoding(as_lists)), samples)
    halves = [{"input_ids": ids[i], "attention_mask": mask[i], "labels": labels[i]} for i in range(7)]
    same(as_samples(halves), samples)
    same(
        as_samples(iter([{"input_ids": ids[:3], "attention_mask": mask[:3], "labels": labels[:3]}, *halves[3:]])),
        samples,
    )
    no_labels = as_samples({"input_ids": ids, "attention_mask": mask})
    same(no_labels, [{"input_ids": s["input_ids"], "labels": s["input_ids"]} for s in samples])
    # labels at padded places (as if the collator had forgotten to mask them) have no part either
    careless = torch.where(mask.bool(), labels, ids)
    same(as_samples({"input_ids": ids, "attention_mask": mask, "labels": careless}), samples)


def test_what_packing_cannot_keep_is_refused():
    ids = torch.arange(8).view(2, 4)
    hole = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1]])
    with pytest.raises(ValueError, match="sample 0: its attention mask is empty or has a hole"):
        as_samples({"input_ids": ids, "attention_mask": hole})
    with pytest.raises(ValueError, match="is empty or has a hole"):
        as_samples({"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]])})
    with pytest.raises(ValueError, match=r"sample 0: labels \(2, 3\) and input_ids \(2, 4\) differ"):
        as_samples({"input_ids": ids, "labels": ids[:, :3]})
    for mask in (torch.ones(2, 3), torch.ones(2, 5), torch.ones(1, 4), torch.ones(2, 1, 4, 4)):
        with pytest.raises(ValueError, match="sample 0: attention_mask .* and input_ids .* differ"):
            as_samples({"input_ids": ids, "attention_mask": mask})
    with pytest.raises(ValueError, match="sample 0: attention_mask .* differ"):
        as_samples([{"input_ids": ids[0], "attention_mask": torch.ones(3)}])
    with pytest.raises(ValueError, match=r"expected \(T,\) or \(B, T\)"):
        as_samples({"input_ids": ids[None]})
    with pytest.raises(TypeError, match="sample 1: got list"):
        as_samples([{"input_ids": ids[0]}, [1, 2]])
    with pytest.raises(TypeError, match=r"sample 0: got dict with the keys \['text'\], expected a mapping"):
        as_samples([{"text": "x"}])
    with pytest.raises(ValueError, match="no samples"):
        as_samples([])
    with pytest.raises(ValueError, match="an empty batch"):
        pack([])
    with pytest.raises(ValueError, match="sample 1 of the batch has no token"):
        pack([{"input_ids": ids[0], "labels": ids[0]}, {"input_ids": ids[0, :0], "labels": ids[0, :0]}])


@pytest.mark.parametrize("lengths", [[1], [3], [3, 3], [1, 4, 2], [5, 1, 1, 3]])
def test_packed_batch_against_a_loop(lengths):
    generator = torch.Generator().manual_seed(len(lengths))
    samples = []
    for n in lengths:
        ids = torch.randint(3, 90, (n,), generator=generator)
        samples.append({"input_ids": ids, "labels": torch.where(torch.rand(n, generator=generator) < 0.6, ids, -100)})
    batch = pack(samples)
    rows, targets, owner, grid = [], [], [], []
    start = 0
    for number, sample in enumerate(samples):
        n = len(sample["input_ids"])
        for t in range(n - 1):
            if sample["labels"][t + 1] != -100:
                rows.append(start + t)
                targets.append(int(sample["labels"][t + 1]))
                owner.append(number)
        grid += [start + t for t in range(n)] + [None] * (max(lengths) - n)
        start += n
    assert batch.lengths == lengths and batch.num_samples == len(lengths) and batch.num_tokens == start
    assert batch.rows.tolist() == rows and batch.targets.tolist() == targets and batch.row_sample.tolist() == owner
    assert batch.rows_per_sample.tolist() == [owner.count(i) for i in range(len(lengths))]
    assert batch.cu_seqlens.tolist() == [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    assert batch.position_ids.tolist() == [t for n in lengths for t in range(n)]
    assert batch.unpad_index.tolist() == [grid.index(t) for t in range(start)]
    if None in grid:
        owner_of_place = [place // max(lengths) for place in range(len(grid))]
        for place, (packed, wanted) in enumerate(zip(batch.pad_index.tolist(), grid, strict=True)):
            assert packed == wanted or wanted is None
            assert (
                int(batch.sample_of_token[packed]) == owner_of_place[place]
            )  # even a padded place is its own sample's
    else:
        assert batch.pad_index is None


INDICES = (
    "cu_seqlens sample_of_token rows targets row_sample rows_per_sample pad_index unpad_index row_grid row_counts"
).split()


@pytest.mark.parametrize("lengths", [[3, 5, 2], [4, 4]])
def test_index_tensors_are_made_on_the_host(lengths):
    """On the meta device nothing can be read back: what a batch there knows of its tokens, it knows from the host."""
    samples = [{"input_ids": torch.arange(n) + 3, "labels": torch.arange(n) + 3} for n in lengths]
    batch = pack(samples)
    moved = batch.to("meta")
    assert moved.device.type == "meta" and moved.host is batch and batch.host is batch
    for name in INDICES:
        mine, its = getattr(batch, name), getattr(moved, name)
        if name == "row_counts":
            assert its == mine == [n - 1 for n in lengths]
        elif mine is None:
            assert its is None and name == "pad_index" and len(set(lengths)) == 1
        else:
            for a, b in zip(*((x if isinstance(x, tuple) else (x,)) for x in (mine, its)), strict=True):
                assert b.device.type == "meta" and b.shape == a.shape and b.dtype == a.dtype == torch.int64
    back = moved.to("cpu")
    assert torch.equal(back.input_ids, batch.input_ids) and torch.equal(back.rows, batch.rows)


def test_pack_takes_samples_of_any_device_to_the_host():
    batch = pack([{"input_ids": torch.tensor([5, 6]), "labels": torch.tensor([5, 6])}], torch.zeros(2, 4), 3)
    assert batch.device.type == "cpu" and batch.layer == 3
    assert batch.to("meta").hidden.device.type == "meta"
