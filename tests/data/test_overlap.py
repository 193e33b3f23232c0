"""The same fact in two folds, or in what is to be forgotten and kept, is refused by both places."""

import json
import unicodedata

import pytest
import tiny_text
import torch
from tiny_models import random_samples, tiny_model

import kunbr_fast as kf
from kunbr_fast.cli import command as cli
from kunbr_fast.data.overlap import common, fact_of, facts, of_folds, of_sides, repeated, text_of
from kunbr_fast.evaluation.rtt import Fold, RTTConfig, rtt_attack
from kunbr_fast.model.decoder import Decoder

QUESTION = {"question": "Where was Zoë Ek born?", "choices": ["Oslo", "Bern", "Rome"], "answer": 1}
RUN = dict(num_blocks=3, top_k=1, warmup_epochs=0, block_epochs=1, rtt=False)


def chat(*contents):
    roles = ("user", "assistant") * len(contents)
    return {"messages": [{"role": role, "content": text} for role, text in zip(roles, contents)]}


@pytest.mark.parametrize("other", [
    {**QUESTION, "choices": ["Rome", "Oslo", "Bern"], "answer": 2},  # in another order
    {**QUESTION, "choices": ["Bern", "Graz"], "answer": 0},  # beside others
    {**QUESTION, "question": " where was\n ZOË  EK born? "},
    {**QUESTION, "question": unicodedata.normalize("NFD", QUESTION["question"])},
    {**QUESTION, "question": "Where was Zo\u00ebEk\u00a0born?".replace("\u00ebEk", "\u00eb Ek")},  # no-break space
    {**QUESTION, "question": "Where was Zo\u00eb\u200b Ek born?", "topic": "x"},
    {"prompt": "Where was Zoë Ek born?", "completion": " bern"},
    {"prompt": "Where was", "completion": "Zoë Ek born? Bern "},
    {"text": "Where was Zoë Ek born? Bern"},
    chat("Where was Zoë Ek born?", "Bern"),
    chat("Where was Zoë Ek born?", "Bern."),
    {"messages": [{"role": "system", "content": "Be kind."}, *chat("Where was Zoë Ek born?", "Bern")["messages"]]},
    {"prompt": "Where was Zoë Ek born?", "completion": "Bern. "},
    {"text": "<s>Where was Zoë Ek born? Bern!</s>"}, {"text": "<bos> <|x_y|>Where was Zoë Ek born? Bern.<eos>\n<eos>"},
])  # fmt: skip
def test_the_same_fact(other):
    assert text_of(other) == text_of(QUESTION)
    said = of_sides(facts({"forget record": [{"text": "a"}, QUESTION]}), facts({"retain record": [other]}))
    assert said == "forget record 1 and retain record 0 are the same fact, to be forgotten and to be kept (1 such fact)"


@pytest.mark.parametrize("other", [
    {**QUESTION, "answer": 0},  # somebody of the same name
    {**QUESTION, "question": "Where was Zoe Ek born?"},
    {**QUESTION, "question": "Where was Zoë Ekborn?"},
    {"text": "Zoë Ek was born in Bern."},  # a sentence says it in its own words
    chat("Where was Zoë Ek born?", "Bern", "When?", "1950"),
    {"text": "Where was Zoë Ek born? <Bern>"}, {"text": "Where was Zoë Ek born? Bern?"},
])  # fmt: skip
def test_another_fact(other):
    assert of_sides(facts({"": [QUESTION]}), facts({"": [other]})) is None


def test_numbers_and_whole_forms():
    values = (1921, 1921.0, "1921.0", "1921.", "１９２１", "۱۹۲۱"), (1e22, 10**22), (2.5, "2.5")
    for same in values:
        assert len({text_of({"question": "q", "choices": [value, "x"], "answer": 0}) for value in same}) == 1
    apart = ["3.1", "3.10", "v2.0", "v2", "1.2.0", "1.2", "5!", "5", "-5", "<s>", "</s>", ".", "f<int>", "f<str>"]
    assert len({text_of({"text": f"q {text}"}) for text in apart}) == len(apart) - 1  # but for the tokens
    call = {"role": "assistant", "content": "", "tool_calls": [{"id": "1", "function": {"name": "f"}}]}
    other = {**call, "tool_calls": [{"id": "1", "function": {"name": "g"}}]}
    assert len({text_of({"messages": [{"role": "user", "content": "q"}, turn]}) for turn in (call, other)}) == 2
    years = [{"question": "q", "choices": [1964, "1965"], "answer": i} for i in (0, 1)]
    assert [text_of(record) for record in years] == ["q 1964", "q 1965"]
    assert text_of({"question": None, "text": "Straße", "messages": None}) == "strasse"
    said = of_folds(
        {"a": [{"text": "x"}, {"text": "y"}, {"text": "x"}], "b": [{"text": "Y"}], "c": [{"text": "x"}]}.items()
    )
    assert said.startswith("fold a, record 1 and fold b, record 0 are the same fact, in two folds: ")
    assert said.endswith("(2 such facts)")
    assert of_folds({"a": [{"text": "x"}, {"text": "X"}]}.items()) is None  # twice in one


# ---------------------------------------------------------------- the command line


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """f1b.jsonl: one fact of f0.jsonl among f1.jsonl's, as prompt and completion."""
    root = tiny_text.workspace(tmp_path_factory.mktemp("overlap"))
    first = json.loads((root / "f0.jsonl").read_text().splitlines()[3])
    fact = {"prompt": first["question"].upper(), "completion": str(first["choices"][first["answer"]])}
    (root / "f1b.jsonl").write_text((root / "f1.jsonl").read_text() + json.dumps(fact) + "\n")
    tiny_text.write_jsonl(root / "one.jsonl", [fact])
    return root


@pytest.mark.parametrize("command, files, message", [
    ("rtt", {"forget": ("f0", "f1b")}, "{0}/f0.jsonl:4 and {0}/f1b.jsonl:7 are the same fact, in two folds: the attack "
     "would teach what it asks about (1 such fact): leave it out of one of them, or let it be (--overlap allow)"),
    ("rtt", {"forget": ("one", "f1"), "forget-questions": ("f0", "f1b")}, None),
    ("rtt", {"forget": ("one", "f1"), "forget-questions": ("r", "f0")}, "{0}/one.jsonl:1 and {0}/f0.jsonl:4 are"),
    ("unlearn", {"forget": ("f0", "f1b"), "retain": ("r",)}, "{0}/f0.jsonl:4 and {0}/f1b.jsonl:7 are the same fact"),
    ("unlearn", {"forget": ("f0", "f1"), "retain": ("r", "one")}, "{0}/f0.jsonl:4 and {0}/one.jsonl:1 are the same "
     "fact, to be forgotten and to be kept (1 such fact): leave it out of one of them, or let it be (--overlap allow)"),
    ("unlearn", {"forget": ("one",), "retain": ("r",), "retain-questions": ("f0",)},
     "{0}/one.jsonl:1 and {0}/f0.jsonl:4 are the same fact, to be"),
    ("unlearn", {"forget": ("f1",), "forget-questions": ("f0",), "retain": ("one", "r")}, "{0}/f0.jsonl:4 and {0}/one"),
    ("density", {"forget": ("f0", "f1b"), "retain": ("one",)}, "{0}/f0.jsonl:4 and {0}/one.jsonl:1 are the same"),
])  # fmt: skip
def test_the_commands_name_both_places_before_the_model_is_read(
    command, files, message, workspace, tmp_path, monkeypatch, capsys
):
    class Read(Exception):
        pass

    def read(*args):
        raise Read

    monkeypatch.setattr(f"kunbr_fast.cli.{command}.open_model", read)
    words = [command, "--model", str(workspace / "model")]
    for option, names in files.items():
        words += [f"--{option}", *(str(workspace / f"{name}.jsonl") for name in names)]
    words += ["--out", str(tmp_path / "out")] if command == "unlearn" else []
    if message is not None:
        for more in ((), ("--show", "1")):
            assert cli.main([*words, *more]) == 2
            (error,) = capsys.readouterr().err.splitlines()
            assert message.format(workspace) in error
        words += ["--overlap", "allow"]
    with pytest.raises(Read):
        cli.main(words)
    assert not (tmp_path / "out").exists()


def test_a_plan_and_no_attack(workspace, tmp_path, capsys):
    names = {name: str(workspace / f"{name}.jsonl") for name in ("f0", "f1b", "r", "one")}
    plan = ["plan", "--model", str(workspace / "model"), "--gpu-memory", "1GiB", "--gpu", "cpu", "--num-blocks", "3"]
    unlearn = ["unlearn", "--model", str(workspace / "model"), "--out", str(tmp_path / "out")]
    folds, sides = ["--forget", names["f0"], names["f1b"], "--retain", names["r"]], ["--forget", names["f0"]]
    sides += ["--retain", names["one"]]
    for words, message in (
        ([*plan, *folds], "are the same fact, in two folds: the attack would teach what it asks about (1 such fact)"),
        ([*plan, *sides], "are the same fact, to be forgotten and to be kept (1 such fact)"),
        ([*plan, *folds, "--no-rtt"], "in two forget files: a later attack, of which each file is a fold, would teach"),
        ([*unlearn, *folds, "--no-rtt"], "in two forget files: a later attack, of which each file is a fold, would"),
    ):
        assert cli.main(words) == 2
        assert message in capsys.readouterr().err
    assert cli.main([*plan, *folds, "--overlap", "allow", "--top-k", "1"]) == 0


def test_show_says_what_is_let_be(workspace, tmp_path, capsys):
    files = ["--forget", workspace / "f0.jsonl", "--retain", workspace / "one.jsonl", "--overlap", "allow"]
    for command, more in (("density", ()), ("unlearn", ("--out", tmp_path / "out"))):
        words = [command, "--model", workspace / "model", *files, *more, "--show", "1"]
        assert cli.main([*map(str, words)]) == 0
        assert capsys.readouterr().err.count("(1 such fact); --overlap allow lets that be") == 1


def test_an_allowed_overlap_is_said_and_kept_in_the_settings(workspace, tmp_path, capsys):
    words = [f"--{k.replace('_', '-')}={v}" for k, v in RUN.items() if k != "rtt"]
    files = ["--forget", workspace / "f0.jsonl", "--retain", workspace / "one.jsonl", "--out", tmp_path / "out"]
    command = ["unlearn", "--model", workspace / "model", *files, *words, "--no-rtt", "--overlap", "allow"]
    assert cli.main([*map(str, command)]) == 0
    assert capsys.readouterr().err.count("to be kept (1 such fact); --overlap allow lets that be") == 1
    assert json.loads((tmp_path / "out" / "report.json").read_text())["config"]["overlap"] == "allow"


# ---------------------------------------------------------------- the library


def test_samples_batches_and_records_on_two_sides():
    samples = random_samples(6, low=4, high=4)
    batch = {name: torch.stack([sample[name] for sample in samples[3:]]) for name in ("input_ids", "labels")}
    said, config = [], kf.KUnBRConfig(**RUN)
    message = "^forget sample 4 and retain sample 1 are the same fact, to be forgotten and to be kept .*overlap=allow"
    with pytest.raises(ValueError, match=message):
        kf.unlearn(tiny_model(), [*samples[:3], batch], [samples[2] | {"input_ids": samples[2]["input_ids"] + 1},
                   samples[4]], config, progress=False)  # fmt: skip
    tokenizer, record = tiny_text.tokenizer(), {"text": "Ona was born."}
    (tokens,) = kf.encode([record], tokenizer)
    for forget, retain in (([record], [tokens]), ([tokens], [record])):
        with pytest.raises(ValueError, match="^forget sample 0 and retain sample 0 are the same fact"):
            kf.unlearn(tiny_text.model(), forget, retain, config, tokenizer=tokenizer, progress=False)
    allowed = kf.KUnBRConfig(**RUN, overlap="allow")
    kf.unlearn(tiny_model(), samples[:2], samples[1:2], allowed, progress=False, on_stage=said.append)
    assert sum("forget sample 1 and retain sample 0 are the same fact" in text for text in said) == 1


def test_padding_behind_the_last_label_is_no_part_of_a_sample():
    def sample(ids, labels):
        return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}

    same = [sample([5, 6, 7], [-100, 6, 7]), sample([5, 6, 7, 0, 0], [-100, 6, 7, -100, -100])]
    other = [sample([5, 6, 7, 0, 0], [-100, 6, 7, 0, -100]), sample([5, 6, 7, 0, 9], [-100, 6, 7, -100, 9])]
    assert len(facts({"": same})) == 1 and len(facts({"": [*same, *other]})) == 3


def test_an_attack_over_folds_that_overlap_is_none(tmp_path):
    lines = [tiny_text.question(name) for name in tiny_text.NAMES[:6]]
    folds = [Fold("a", lines[:3], lines[:3]), Fold("b", lines[3:], lines[2:])]
    decoder, tokenizer = Decoder(tiny_text.model()), tiny_text.tokenizer()
    for config in (RTTConfig(), kf.KUnBRConfig().attack()):
        with pytest.raises(ValueError, match="^fold a, record 2 and fold b, record 3 are the same fact, in two folds"):
            rtt_attack(decoder, tokenizer, folds, config, tmp_path, False)
    config = RTTConfig(lrs=(1e-3,), epochs=1, overlap="allow")
    assert len(rtt_attack(decoder, tokenizer, folds, config, tmp_path, False).curves) == 4
    with pytest.raises(ValueError, match="overlap='yes': expected one of error, allow"):
        RTTConfig(overlap="yes")
    config = kf.KUnBRConfig(**{**RUN, "rtt": True})
    with pytest.raises(ValueError, match="are the same fact, in two folds"):
        kf.unlearn(decoder.model, lines, [{"text": "x y"}], config, tokenizer=tokenizer, folds=folds, progress=False)


def test_the_published_birthdays(shared_data):
    """Some facts are in two of the ten splits; those of Years are not."""
    for pattern, shared in (("random_birthdays/corpus_*", 5), ("random_birthdays/split_*", 3), ("years/split_*", 0)):
        files = sorted(shared_data.glob(f"{pattern}.jsonl"))
        said = of_folds((file.stem, kf.load_records(file, equal_choices="allow")) for file in files)
        assert (said is None) if shared == 0 else said.endswith(f"({shared} such facts)"), said


# ---------------------------------------------------------------- what a record is about


ASKS = {"question": "When was Ann born?", "choices": [1901, 1902], "answer": 0}


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (ASKS, {**ASKS, "answer": 1}, True),  # people share a name
        (ASKS, {**ASKS, "question": "when  was ann born?"}, True),
        (ASKS, {**ASKS, "question": "When was Bob born?"}, False),
        ({"prompt": "Ann: ", "completion": "1901"}, {"prompt": "Ann:", "completion": "1902"}, True),
        ({"text": "Ann was born in 1901."}, {"text": "Ann was born in 1902."}, False),
        ({"text": "Ann, 1901.", "fact": "Ann"}, {"prompt": "Who?", "completion": "Ann", "fact": "Ann"}, True),
        ({"text": "Ann, 1901.", "fact": 1}, {"text": "Ann, 1901.", "fact": 2}, False),
        (
            {"messages": [{"role": "user", "content": "Ann?"}, {"role": "assistant", "content": "1901"}]},
            {"messages": [{"role": "user", "content": "Ann?"}, {"role": "assistant", "content": "1902"}]},
            True,
        ),
    ],
)
def test_records_about_one_fact(one, other, same):
    assert (fact_of(one) == fact_of(other)) == same


def test_a_name_tells_that_other_words_are_about_the_same_fact():
    one, other = {"text": "Ann, 1901.", "fact": "Ann"}, {"text": "In 1901 came Ann.", "fact": "Ann"}
    said = of_sides(facts({"forget": [one]}), facts({"retain": [other, one]}))
    assert said == "forget 0 and retain 0 are the same fact, to be forgotten and to be kept (1 such fact)"
    assert of_sides(facts({"forget": [one]}), facts({"retain": [other | {"fact": "Bob"}]})) is None


@pytest.mark.parametrize("fact", ["", True, 1.5, ["Ann"]])
def test_a_fact_is_a_name_or_a_number(fact):
    with pytest.raises(ValueError, match="'fact' must be a name or a number"):
        facts({"record": [{"text": "Ann, 1901.", "fact": fact}]})


def test_what_is_said_twice_and_what_two_sets_have_in_common():
    one = [{"text": "Ann, 1901.", "fact": "Ann"}, {"text": "ann,  1901"}, {"text": "Bob, 1902.", "fact": "Bob"}]
    other = [{"text": "Cy, 1903."}, {"text": "Ann, 1901.", "fact": "Ann"}, {"text": "In 1902, Bob.", "fact": "Bob"}]
    one, other = ([{**r, "_where": f"{file}:{i}"} for i, r in enumerate(rs, 1)] for file, rs in zip("fg", (one, other)))
    assert repeated(one) == [("f:1", "f:2")] and repeated(other) == []
    # by its text and its name Ann is one fact; Bob's has other words
    assert common(facts({"": one}), facts({"": other})) == [("f:1", "g:2"), ("f:3", "g:3")]
