"""The text of a record is what its author wrote; special tokens stand once; a number is whole, and in the answer."""

import logging
import random

import pytest
import tiny_text
import tokenizers
import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from kunbr_fast.data import REFUSALS, TextSettings, encode
from kunbr_fast.data.text import NUMBER, _say, say_separator
from kunbr_fast.data.tokens import tokens
from kunbr_fast.evaluation.accuracy import prepare_questions

SEAMS = [
    ("日本の首都はどこですか？", "東京です。"),
    ("<user> When?\n<assistant>", "1907"),
    ("def birth_year(", "name): return 1907"),
    ("def f():\n", "    return 1907"),
    ("Pi is 3.", "14159"),
    ("Ada ", " 1907"),
]


@pytest.fixture(scope="module")
def bpe():
    return tiny_text.tokenizer()


def read(tokenizer, sample):
    """The text, and the part of it whose tokens have a loss."""
    ids, labels = sample["input_ids"], sample["labels"]
    return tokenizer.decode(ids), tokenizer.decode(ids[labels != -100])


@pytest.mark.parametrize("prompt, completion", SEAMS)
@pytest.mark.parametrize("separator", ["", " ", "\n\n"])
def test_prompt_and_completion_are_joined_as_they_are(bpe, prompt, completion, separator):
    (sample,) = encode(
        [{"prompt": prompt, "completion": completion}], bpe, "answer", text=TextSettings(separator=separator)
    )
    text, counted = read(bpe, sample)
    assert text == f"{prompt}{separator}{completion}"
    # a token on the seam counts: it holds a part of the completion
    assert counted.endswith(completion) and len(counted) - len(completion) <= 1


def test_a_second_answer_begins_as_the_first_does(bpe):
    spaced, tight = ({"prompt": "Ada was born in", "completion": f"{gap}1907"} for gap in (" ", ""))
    for line, gap in ((spaced, " "), (tight, "")):
        (sample,) = encode([{**line, "alternate": "1950"}], bpe, alternate="refusal")
        text = read(bpe, sample["alternate"])[0]
        assert text.removeprefix(f"Ada was born in{gap}") in REFUSALS
    # one's own is taken as it is
    (sample,) = encode([{**spaced, "alternate": "\n1950"}], bpe, alternate="given")
    assert read(bpe, sample["alternate"])[0] == "Ada was born in\n1950"
    question = {"question": "Who?", "choices": ["Ada", "Bo"], "answer": 0, "alternate": " nobody"}
    for kind, answers in (("given", ["nobody"]), ("refusal", REFUSALS), ("wrong", ["B. Bo"])):
        (sample,) = encode([question], bpe, "answer", alternate=kind, text=TextSettings(separator="\n"))
        text = read(bpe, sample["alternate"])[0]
        assert text.removeprefix("Who?\nA. Ada\nB. Bo\nAnswer: ") in answers


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"separator": None}, "separator=None: expected text"),
        ({"separator": 5}, "separator=5: expected text"),
        ({"split_long": "no"}, "split_long='no': expected True or False"),
        ({"split_long": 1}, "split_long=1: expected True or False"),
        ({"chat_date": "today"}, "chat_date='today': expected a day"),
    ],
)
def test_settings_are_what_they_say(wrong, message):
    with pytest.raises(ValueError, match=message):
        TextSettings(**wrong)


def test_a_separator_that_nothing_reads_is_said_once(caplog):
    _say.cache_clear()
    pair, text = {"prompt": "a", "completion": "b"}, {"text": "a"}
    tokens = {"input_ids": [1], "prompt": "a", "completion": "b"}
    with caplog.at_level(logging.WARNING, "kunbr_fast"):
        say_separator("", [text])
        say_separator("\n", [text], [text, pair])
        assert not caplog.messages
        for _ in range(2):
            say_separator("\n", [text], [tokens])
        say_separator("\\n", [pair])
    unused, literal = caplog.messages
    assert unused.startswith(r"separator='\n' is not used: no record of this run has a prompt")
    assert literal.startswith(r"separator='\\n' has a backslash and a letter, no line end")


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("single", ["$A", "<eos> $A <eos>"])
def test_trimmed_offsets_are_made_whole(prefix, single):
    """ByteLevel's post-processor takes spaces out of the offsets unless it is told not to: they would have no loss."""
    rng, tokenizers = random.Random(0), []
    for trim in (False, True):
        tokenizer = tiny_text.tokenizer()
        end = ("<eos>", tokenizer.convert_tokens_to_ids("<eos>"))
        tokenizer.add_tokens(["\u0120\u0120\u0120", "\u010a\u0120"])
        backend = tokenizer.backend_tokenizer
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
        backend.post_processor = processors.Sequence([
            processors.ByteLevel(trim_offsets=trim, add_prefix_space=prefix),
            processors.TemplateProcessing(single=single, special_tokens=[end]),
        ])  # fmt: skip
        tokenizers.append(tokenizer)
    trimmed = 0
    for _ in range(100):
        text = "".join(rng.choice([" ", "  ", " was", "1907", "\n", "é", "日", "born"]) for _ in range(8))
        text = f" {text}" if prefix else text  # of a space that is put there nobody asks for
        whole, cut = (tokens(text, tokenizer, "here") for tokenizer in tokenizers)
        assert whole == cut, text
        trimmed += tokenizers[1](text, return_offsets_mapping=True)["offset_mapping"] != whole.offsets
    assert trimmed > 50


def test_white_space_has_its_loss_where_offsets_are_trimmed():
    tokenizer, text = tiny_text.tokenizer(), "  def f():\n    return  1921 "
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    for prompt in ("Code:", "Code: "):
        (sample,) = encode([{"prompt": prompt, "completion": text}], tokenizer, "answer")
        assert read(tokenizer, sample)[1] == text
    (sample,) = encode([{"prompt": "Pop.", "completion": " 1 921 000 of them"}], tokenizer, "number")
    assert read(tokenizer, sample)[1].strip() == "1 921 000"


@pytest.mark.parametrize("name, model", [("dropout", models.BPE), ("alpha", models.Unigram)])
def test_a_tokenizer_that_draws_lots_is_refused(name, model):
    tokenizer = tiny_text.tokenizer()
    inner = model() if model is models.Unigram else tokenizer.backend_tokenizer.model
    if not hasattr(inner, name):
        pytest.skip(f"tokenizers {tokenizers.__version__}'s {model.__name__} has no {name}")
    setattr(inner, name, 0.5)
    tokenizer.backend_tokenizer.model = inner
    message = f'has {name}=0.5, so it makes other tokens of a text each time: set "{name}" to null in tokenizer.json'
    with pytest.raises(ValueError, match=message):
        encode([{"text": "Ada"}], tokenizer)
    with pytest.raises(ValueError, match=message):
        prepare_questions(tokenizer, [{"question": "Who?", "choices": ["a", "b"], "answer": 0}])


# ---------------------------------------------------------------- special tokens


def special(single, names=("<s>", "<t>", "</s>"), words=()):
    """A word-level tokenizer whose post-processor adds special tokens around a text."""
    vocabulary = ["<unk>", *names, "Ada", "was", "born", "1907", "in", *words]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(vocabulary)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens(list(names))
    inner.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[(name, inner.token_to_id(name)) for name in names]
    )
    return tf.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")


@pytest.mark.parametrize(
    "single, text, expected",
    [
        ("<s> $A", "Ada was", "<s> Ada was"),
        ("<s> $A", "<s>Ada was", "<s> Ada was"),
        ("<s> $A", "<s> <s> Ada", "<s> <s> Ada"),  # as written
        ("<s> $A", "Ada<s>was", "<s> Ada <s> was"),
        ("<s> $A </s>", "<s>Ada was</s>", "<s> Ada was </s>"),
        ("<s> $A </s>", "Ada was</s>", "<s> Ada was </s>"),
        ("$A </s>", "<s>Ada was</s>", "<s> Ada was </s>"),
        ("<s> <t> $A", "<s> <t> Ada", "<s> <t> Ada"),
        ("<s> <t> $A", "<t> Ada", "<s> <t> Ada"),
        ("<s> <t> $A", "<s> Ada", "<s> <t> <s> Ada"),  # not beside its like
        ("$A", "<s><s>Ada", "<s> <s> Ada"),
    ],
)
def test_special_tokens_of_the_text_are_not_put_there_again(single, text, expected):
    tokenizer = special(single)
    made = encode([{"text": text}], tokenizer)[0]["input_ids"].tolist()
    assert " ".join(tokenizer.convert_ids_to_tokens(made)) == expected


@pytest.mark.parametrize(
    "single, text, name",
    [
        ("<s> $A", "\n<s>Ada", "<s>.* before it"),
        ("<s> $A", "\ufeff<s>Ada", "<s>.* before it"),
        ("<t> <s> $A", " <t><s> Ada", "<s>.* before it"),
        ("<s> $A </s>", "Ada</s>\n\n", "</s>.* behind it"),
        ("$A </s>", "Ada</s>\u200b", "</s>.* behind it"),
        ("<s> $A", "\n<t>Ada", None),
        ("$A </s>", "\n<s>Ada", None),
        ("<s> $A", "Ada</s>\n", None),
    ],
)
def test_special_tokens_behind_white_space_are_refused(single, text, name):
    """A tokenizer that keeps white space would write them twice, and not side by side."""
    tokenizer = special(single)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    question = {"question": f"{text} ?", "choices": ["1907", "1908"], "answer": 0}
    if name is None:
        assert encode([{"text": text}], tokenizer)
        return
    with pytest.raises(ValueError, match=f"^record 0: '{name}: delete that white space, or"):
        encode([{"text": text}], tokenizer)
    if "before" in name:
        with pytest.raises(ValueError, match=f"^question 0: '{name}: delete that white space, or"):
            prepare_questions(tokenizer, [question], scoring="choice")


def test_a_rendered_prompt_has_its_loss_where_it_had():
    tokenizer = special("<s> $A </s>")
    plain = {"prompt": "Ada was born in ", "completion": "1907"}
    rendered = {"prompt": "<s>Ada was born in ", "completion": "1907</s>"}
    (one,), (other,) = (encode([record], tokenizer, "answer") for record in (plain, rendered))
    assert torch.equal(one["input_ids"], other["input_ids"])
    assert tokenizer.convert_ids_to_tokens(one["labels"][one["labels"] != -100]) == ["1907"]
    assert tokenizer.convert_ids_to_tokens(other["labels"][other["labels"] != -100]) == ["1907", "</s>"]
    for record in (plain, rendered):
        (number,) = encode([record], tokenizer, "number")
        assert tokenizer.convert_ids_to_tokens(number["labels"][number["labels"] != -100]) == ["1907"]


@pytest.mark.parametrize("single", ["$A", "<s> $A </s>", "<t> <s> $A", "$A </s>"])
def test_a_question_is_read_alike_where_it_is_asked(single):
    tokenizer = special(single, words=["?", "A.", "B.", "Answer:", "A", "B"])
    for first in ("", "<s> "):
        record = {"question": f"{first}Ada was born in ?", "choices": ["1907", "1908"], "answer": 0}
        (taught,) = encode([record], tokenizer)
        ((asked,),) = prepare_questions(tokenizer, [record]).sequences
        letter = tokenizer.convert_tokens_to_ids("A.")
        assert [*asked, letter] == taught["input_ids"][: len(asked) + 1].tolist()
        assert asked.count(tokenizer.convert_tokens_to_ids("<s>")) == (first or single).count("<s>")


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    "text, number",
    [
        ("The town has 1,234,567 people.", "1,234,567"),
        ("3.14 m.", "3.14"),
        ("1.234.567,89 EUR", "1.234.567,89"),
        ("it was 1907.", "1907"),
        ("1907, I think", "1907"),
        ("1, 2, 3", "3"),
        ("1 234 567 people", "1 234 567"),
        ("1\u202f234\u202f567", "1\u202f234\u202f567"),
        ("in 1907 300 people", "300"),
        ("1'234'567.80", "1'234'567.80"),
        ("-5 degrees", "-5"),
        ("(−40)", "−40"),
        ("1939-1945", "1945"),
        ("a-3", "3"),
        (".5 of it", ".5"),
        ("...1907", "1907"),
        ("1.5E-7 m", "1.5E-7"),
        ("x1999y", "1999"),
        ("12:30", "30"),
        ("١٬٢٣٤٫٥", "١٬٢٣٤٫٥"),
        ("v1.2.3.", "1.2.3"),
        ("$-1,000.00.", "-1,000.00"),
        ("6.02 × 10²³ of them", "6.02 × 10²³"),
        ("1.6x10^-19 C", "1.6x10^-19"),
        ("$6.02 \\times 10^{23}$", "6.02 \\times 10^{23}"),
        ("10⁻⁶ m", "10⁻⁶"),
        ("3 x 10 m", "10"),
        ("1_000_000", "1_000_000"),
        ("1 00 000 rupees", "1 00 000"),
        ("12,34,567", "12,34,567"),
        ("1\u2007000\u00a0000", "1\u2007000\u00a0000"),
        ("3.141 592 653", "3.141 592 653"),
        ("at 0x1F.", "0x1F"),
        ("1280x720", "720"),
        ("**-5**", "-5"),
        ("_-5_", "-5"),
        ("3/-5", "-5"),
        ("a,-5", "-5"),
        ("–5 degrees", "–5"),
        ("‑5", "‑5"),
        ("1939–1945", "1945"),
        ("1939 –1945", "1945"),
        ("pages (3)–5", "5"),
        ("5€-10€", "10"),
        ("5%-10%", "10"),
        ("so--5", "5"),
        ("(.5)", ".5"),
    ],
)
def test_a_number_is_whole(bpe, text, number):
    assert [found.group() for found in NUMBER.finditer(text)][-1] == number
    (sample,) = encode([{"text": f"So: {text}"}], bpe, "number")
    assert number in read(bpe, sample)[1] and len(read(bpe, sample)[1]) <= len(number) + 1


def test_numbers_are_looked_for_in_the_answer(bpe):
    choices = {"question": "Who was born in 1907?", "choices": ["the 3rd of 12", "Pim"], "answer": 0}
    turns = [("user", "1?"), ("assistant", "2"), ("user", "Sure? 3"), ("assistant", "4 or 5.")]
    chat = {"messages": [{"role": role, "content": text} for role, text in turns]}
    for record, number in (
        (choices, "12"),
        (chat, "5"),
        ({"prompt": "Pi is 3.", "completion": "14159"}, "14159"),
        ({"prompt": "10", "completion": "-5"}, "-5"),
    ):
        (sample,) = encode([record], bpe, "number")
        assert read(bpe, sample)[1].strip() == number
    last = {"messages": [*chat["messages"][:3], {"role": "assistant", "content": "yes"}]}
    for record, answer in (
        ({**choices, "answer": 1}, r"the answer 'B. Pim': use 'answer' or 'all' for such lines"),
        ({"prompt": "Born in 1907?", "completion": " Ada\x07"}, r"the answer ' Ada\\x07': use"),
        (last, r"the answer 'yes"),
        ({"text": "no number"}, r"the text 'no number': use 'all' for such lines"),
    ):
        with pytest.raises(ValueError, match=f"^f.jsonl:3: target='number' but there is no digit in {answer}") as error:
            encode([{**record, "_where": "f.jsonl:3"}], bpe, "number")
        assert str(error.value).isprintable()
