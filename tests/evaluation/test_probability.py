"""The probability of an answer: exact, of every form of record, and as the metric of an attack."""

import json
import math

import pytest
import tiny_text
import torch
from test_attacks import attack_of
from tiny_text import NAMES, years

from kunbr_fast.data import TextSettings
from kunbr_fast.evaluation import probability
from kunbr_fast.evaluation.curves import RTTResult
from kunbr_fast.evaluation.plots import plot_relearning
from kunbr_fast.evaluation.probability import answer_probabilities, prepare_answers
from kunbr_fast.evaluation.report import attack_table, attacks_table, table
from kunbr_fast.evaluation.rtt import Attack, Fold, RTTConfig, finished_attacks
from kunbr_fast.files.saving import save_model
from kunbr_fast.memory import Place
from kunbr_fast.model.decoder import Decoder
from kunbr_fast.model.streaming import open_streamed

assert attack_of


def pair(name):
    return {"prompt": f"When was {name} born? ", "completion": f"{years()[name]}, in March"}


RECORDS = [
    pair("Ada Ek"),
    {"text": "Bo Fu was born in 1970. " * 3},
    {
        "messages": [
            {"role": "user", "content": "When was Cy Go born?"},
            {"role": "assistant", "content": "In 1984."},
        ]
    },
    {"prompt": "A.", "completion": " B"},
]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_text.tokenizer()


@pytest.fixture(scope="module")
def decoder():
    return Decoder(tiny_text.model(dtype=torch.float64))


def truth(model, tokenizer, record):
    """Plainly: the tokens that share a character with the answer, each by the tokens before it."""
    if "text" in record:
        whole, first = record["text"], 0
    elif "prompt" in record:
        whole, first = record["prompt"] + record["completion"], len(record["prompt"])
    else:
        whole = tokenizer.apply_chat_template(record["messages"], tokenize=False)
        first = whole.index(record["messages"][1]["content"])  # the turn's end is a part of it
    found = tokenizer(whole, return_offsets_mapping=True)
    ids = found["input_ids"]
    start = max(1, next(t for t, (_, end) in enumerate(found["offset_mapping"]) if end > first))
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].double()
    log_probs = [float(logits[t - 1].log_softmax(0)[ids[t]]) for t in range(start, len(ids))]
    return math.exp(sum(log_probs) / len(log_probs))


def test_it_is_exact(decoder, tokenizer):
    expected = [truth(decoder.model, tokenizer, record) for record in RECORDS]
    answers = prepare_answers(tokenizer, RECORDS, decoder=decoder)
    found = answer_probabilities(decoder, {"some": answers})["some"]
    assert found.values == pytest.approx(expected, rel=1e-9)
    assert found.mean == pytest.approx(sum(expected) / 4, rel=1e-9)
    spread = torch.tensor(expected, dtype=torch.float64).std() / 2
    assert found.standard_error == pytest.approx(float(spread), rel=1e-9)


def test_pieces_of_a_line_are_one_record(decoder, tokenizer):
    line = {"text": " ".join(f"{name} was born in {year}." for name, year in years().items())}
    length = len(tokenizer(line["text"])["input_ids"])
    answers = prepare_answers(tokenizer, [RECORDS[0], line], decoder=decoder, max_length=32)
    assert answers.num_records == 2 and len(answers.samples) > 3 and length > 64
    found = answer_probabilities(decoder, {"x": answers})["x"].values
    total = tokens = 0.0
    for sample in answers.samples[1:]:
        with torch.no_grad():
            logits = decoder.model(input_ids=sample["input_ids"][None]).logits[0].log_softmax(1)
        for t in range(1, len(sample["input_ids"])):
            if sample["labels"][t] >= 0:
                total, tokens = total + float(logits[t - 1, sample["labels"][t]]), tokens + 1
    assert tokens == length - 1 and found[1] == pytest.approx(math.exp(total / tokens), rel=1e-9)


def test_most_records_are_spread_evenly(decoder, tokenizer):
    records = [pair(name) for name in NAMES]
    answers = prepare_answers(tokenizer, records, decoder=decoder, most=5)
    every = prepare_answers(tokenizer, records, decoder=decoder)
    assert answers.owners == [0, 1, 2, 3, 4] and every.num_records == len(NAMES)
    assert answers.names == [f"record {i * len(NAMES) // 5}" for i in range(5)]


def test_a_separator_is_no_part_of_the_answer(decoder, tokenizer):
    record = {"prompt": "When was Ada Ek born?", "completion": "1900"}
    joined = {"prompt": "When was Ada Ek born?\n", "completion": "1900"}
    one, two = (
        answer_probabilities(decoder, {"": prepare_answers(tokenizer, [r], decoder=decoder, text=text)})[""]
        for r, text in ((record, TextSettings(separator="\n")), (joined, TextSettings()))
    )
    assert one == two


def test_a_streamed_model_has_the_same_bits(decoder, tokenizer, tmp_path):
    save_model(decoder.model, None, tmp_path / "m")
    streamed = Decoder(open_streamed(tmp_path / "m", "cpu"))
    asked = {name: prepare_answers(tokenizer, RECORDS[:n], decoder=decoder) for name, n in (("a", 4), ("b", 1))}
    found = answer_probabilities(streamed, asked, place=Place("file", tmp_path))
    assert found == answer_probabilities(decoder, asked) and set(found) == {"a", "b"}


def test_where_memory_runs_out_there_are_fewer_tokens_at_a_time(decoder, tokenizer, monkeypatch):
    answers = {"": prepare_answers(tokenizer, [pair(name) for name in NAMES], decoder=decoder)}
    whole, sizes, real = answer_probabilities(decoder, answers)[""], [], probability.linear_nll

    def small(hidden, *more, **how):
        sizes.append(len(hidden))
        if len(hidden) > 40:
            raise torch.OutOfMemoryError("out of memory")
        return real(hidden, *more, **how)

    monkeypatch.setattr(probability, "linear_nll", small)
    assert answer_probabilities(decoder, answers)[""].values == pytest.approx(whole.values, rel=1e-9)
    assert max(sizes) > 40 >= sizes[-1]


def test_a_model_that_diverged_is_named(tokenizer):
    model = tiny_text.model()
    model.model.norm.weight.data.fill_(float("nan"))
    broken = Decoder(tiny_text.model())
    answers = {"": prepare_answers(tokenizer, [{**pair(NAMES[0]), "_where": "f.jsonl:1"}], decoder=broken)}
    broken.model.load_state_dict(model.state_dict())
    with pytest.raises(
        FloatingPointError, match="the model's answer to f.jsonl:1 has a loss of nan.*: its weights have"
    ):
        answer_probabilities(broken, answers)


# --------------------------------------------------------------------------------------------- the attack


def folds(sizes=(6, 3)):
    names, found = iter(NAMES), []
    for i, size in enumerate(sizes):
        found.append(Fold(f"fold {i}", [pair(next(names)) for _ in range(size)], []))
    return found


CONFIG = RTTConfig((1e-3, 1e-2), 4, 2, target="answer")


@pytest.fixture(scope="module")
def attacked(tokenizer, tmp_path_factory):
    made = Decoder(tiny_text.model())
    kept = []
    result = Attack(made, tokenizer, folds(), CONFIG).run(tmp_path_factory.mktemp("a"), False, on_result=kept.extend)
    return made, result, kept


def test_folds_without_questions_are_attacked_by_probability(attacked, tokenizer):
    made, result, _ = attacked
    answers = prepare_answers(tokenizer, [r for fold in folds() for r in fold.train_records], decoder=made)
    now = answer_probabilities(made, {"": answers})[""]
    assert result.metric == "probability" and result.num_questions == 9
    assert result.before == pytest.approx(now.mean, rel=1e-5), "the weights are back"
    assert result.accuracy > 2 * result.before, "records of one form tell of each other"
    assert result.recovery == result.accuracy - result.before
    assert 0 < result.change_error < result.accuracy and 0 < result.standard_error < result.accuracy
    written = json.loads(json.dumps(result.to_dict()))
    assert written["metric"] == "probability" and RTTResult.from_dict(written) == result
    assert "RTT (probability)" in attack_table(result)


def test_a_streamed_model_is_attacked_to_the_same_bits(attacked, tokenizer, tmp_path):
    save_model(attacked[0].model, None, tmp_path / "m")
    streamed = Decoder(open_streamed(tmp_path / "m", "cpu"))
    assert Attack(streamed, tokenizer, folds(), CONFIG).run(tmp_path, False) == attacked[1]


def test_it_is_resumed_by_its_own_metric_alone(attacked, tokenizer, tmp_path):
    made, result, kept = attacked
    again = Attack(made, tokenizer, folds(), CONFIG).run(tmp_path, False, kept[:10])
    assert again == result
    with pytest.raises(ValueError, match="is not of accuracy; resume with"):
        asked = [Fold(fold.name, fold.train_records, [tiny_text.question(NAMES[0])]) for fold in folds()]
        finished_attacks(kept, asked, CONFIG)


def test_metrics_are_never_mixed(attacked, tokenizer, tmp_path):
    made, result, kept = attacked
    asked = [Fold(f.name, f.train_records, [tiny_text.question(NAMES[i])] * (1 - i)) for i, f in enumerate(folds())]
    with pytest.raises(ValueError, match="fold fold 1: questions is empty, and other folds have some"):
        Attack(made, tokenizer, asked, CONFIG)
    plain = [{**row, "metric": "accuracy"} for row in kept]
    with pytest.raises(ValueError, match="are of accuracy and probability: expected one metric"):
        RTTResult([*plain[:10], *kept[10:]])
    other = RTTResult([{key: value for key, value in row.items() if key != "metric"} for row in kept])
    with pytest.raises(ValueError, match="make a plot of each"):
        plot_relearning({"a": result, "b": other}, tmp_path / "r.png")
    with pytest.raises(ValueError, match="make a table of each"):
        attacks_table({"a": result, "b": other})
    row = {"method": "a", "forget": 0.5}
    with pytest.raises(ValueError, match="the column forget has accuracy and probability"):
        table([row, {**row, "metrics": {"forget": "probability"}}])


def test_the_picture_says_what_it_shows(attacked, tmp_path, monkeypatch):
    from kunbr_fast.evaluation import figures

    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, path: drawn.append(figure))
    plot_relearning({"KUnBR": attacked[1]}, tmp_path / "r.png")
    (axes,) = drawn[0].axes
    assert axes.get_ylabel() == "probability of the held-out answers (%)"
    assert not any("chance" in str(line.get_label()) for line in axes.lines)
