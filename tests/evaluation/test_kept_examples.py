"""The few records that a report shows, with what each model answers: the same ones before, after and under attack."""

import pytest
import tiny_text

from kunbr_fast.data.canonical import answered, asked, canonical
from kunbr_fast.evaluation.accuracy import Accuracy, choice_accuracy
from kunbr_fast.evaluation.curves import RTTResult
from kunbr_fast.evaluation.examples import LONGEST, MOST, Examples, answers_at, places_in
from kunbr_fast.evaluation.folds import Fold
from kunbr_fast.evaluation.probability import Probability
from kunbr_fast.evaluation.rtt import Attack, RTTConfig
from kunbr_fast.files.documents import checked
from kunbr_fast.model.decoder import Decoder
from kunbr_fast.run.state_format import Result

QUESTIONS = [tiny_text.question(name) for name in tiny_text.NAMES]


def folds(*sizes, questions=True):
    found, first = [], 0
    for number, size in enumerate(sizes):
        part = QUESTIONS[first : first + size]
        found.append(Fold(f"f{number}", part, part if questions else []))
        first += size
    return found


@pytest.mark.parametrize(
    "sizes, expected",
    [
        ((6, 6), [[0, 1, 3, 4], [0, 1, 3, 4]]),  # 0, 1.5, 3, 4.5 ... of twelve, rounded down
        ((3, 2), [[0, 1, 2], [0, 1]]),
        ((1, 1, 14), [[0], [], [0, 2, 4, 6, 8, 10, 12]]),
    ],
)
def test_they_are_spread_evenly_over_all_folds(sizes, expected):
    assert places_in(folds(*sizes)) == expected
    assert places_in(folds(*sizes, questions=False)) == expected
    assert sum(map(len, places_in(folds(12, 12)))) == MOST


def test_they_are_the_folds_wherever_these_stand_in_the_set():
    measured = QUESTIONS[:12][::-1]
    found = Examples.of([{**record, "_where": "elsewhere"} for record in measured], folds(6, 6))
    assert found.of_folds and found.places == [11 - i for i in (0, 1, 3, 4, 6, 7, 9, 10)]
    other = Examples.of(QUESTIONS[12:], folds(6, 6))
    assert not other.of_folds and other.places == [0, 1, 3, 4, 6, 7, 9, 10]
    assert Examples.of([], ()).records == []


def test_what_is_shown_of_questions_and_of_other_records():
    found = Examples.of(QUESTIONS[:2], folds(1, 1))
    shown = found.shown([0, 1], [2, 3], [1, 1], "state")
    texts = [[str(choice) for choice in record["choices"]] for record in QUESTIONS[:2]]
    assert shown[0] == {
        "question": "When was Ada Ek born?", "answer": "1900",
        "original": texts[0][0], "result": texts[0][2], "attacked": texts[0][1],
    }  # fmt: skip
    assert [row["attacked"] for row in found.shown([0, 1], [2, 3], None, "state")] == [None, None]
    assert found.shown(None, [2, 3], None, "state") == []  # of a state by an earlier version
    for wrong in ([0], [0, 4], [0, 0.5]):
        with pytest.raises(ValueError, match=r"state: (answers to \[2, 1, 2\] examples, expected 2|choice )"):
            found.shown([0, 1], wrong, None, "state")
    line = {"text": "x" * (LONGEST + 1)}
    (row,) = Examples.of([line], ()).shown([0.8312], [0.0214], [0.5], "state")
    assert row == {
        "question": "", "answer": "x" * (LONGEST - 1) + "…",
        "original": "probability 0.83", "result": "probability 0.021", "attacked": None,
    }  # fmt: skip


def test_what_a_record_asks_and_answers():
    chat = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ada"}]
    cases = {
        ("When was Ada Ek born?", "1900"): QUESTIONS[0],
        ("Born?", "1900"): {"prompt": "Born?", "completion": " 1900"},
        ("Who?", "Ada"): {"messages": [{"role": "system", "content": "s"}, *chat, {"role": "user", "content": "?"}]},
        ("", "a line"): {"text": "a line"},
    }
    for expected, record in cases.items():
        assert (asked(record), answered(record)) == expected


def test_a_record_has_one_text_whatever_file_it_came_from():
    record = {"question": "q é", "choices": [1999, "2000"], "answer": 0}
    other = {"answer": 0, "_where": "f.csv:2", "id": 7, "choices": ["1999", "2000"], "question": "q é", "text": None}
    assert canonical(record) == canonical(other) == '{"answer":0,"choices":["1999","2000"],"question":"q \\u00e9"}'
    differ = [{"answer": 1}, {"question": "q e"}, {"fact": "x"}, {"alternate": 1}, {"choices": [1999.0, "2000"]}]
    assert len({canonical({**record, **change}) for change in ({}, *differ)}) == 6


@pytest.mark.parametrize("questions", [True, False])
def test_an_attack_keeps_the_answers_to_its_folds_examples(questions, tmp_path):
    model, tokenizer = tiny_text.model(), tiny_text.tokenizer()
    decoder, parts = Decoder(model), folds(6, 6)
    if not questions:
        lines = [{"prompt": asked(record), "completion": f" {answered(record)}"} for record in QUESTIONS[:12]]
        parts = [Fold("f0", lines[:6], []), Fold("f1", lines[6:], [])]
    config = RTTConfig(lrs=(1e-3, 1e-2), epochs=1, target="letter" if questions else "answer", attacks=("full", "int8"))
    found = Attack(decoder, tokenizer, parts, config).run(tmp_path, progress=False)
    assert all(len(row["answers"]) == 4 for row in found.curves)
    before = [row["answers"] for row in found.curves if row["epoch"] == 0 and row["lr"] == 1e-3]
    if questions:
        plain = [choice_accuracy(decoder, tokenizer, fold.questions).predictions for fold in parts]
        assert before == [[part[i] for i in (0, 1, 3, 4)] for part in plain]
    attack, lr, epoch = found.strongest
    rows = {row["fold"]: row for row in found.curves if (row["attack"], row["lr"], row["epoch"]) == (attack, lr, epoch)}
    assert found.answers == rows["f0"]["answers"] + rows["f1"]["answers"]
    assert RTTResult.from_dict(found.to_dict()) == found
    earlier = [{key: value for key, value in row.items() if key != "answers"} for row in found.curves]
    assert RTTResult(earlier).answers == []


def test_answers_of_either_measurement():
    assert answers_at(Accuracy(0.5, None, [3, 1, 2], 3), [2, 0]) == [2, 3]
    assert answers_at(Probability([0.123456, 1.0]), [0, 1]) == [0.1235, 1.0]


def test_answers_in_a_state_are_choices_or_probabilities():
    of = {"plain": 1.0, "calibrated": None, "num_questions": 2}
    for answers, right in (([0, 9], True), ([0.5], True), ([10], False), ([-1], False), ([1.5], False), ("0", False)):
        try:
            checked({"accuracy": {"forget": {**of, "answers": answers}}}, Result, "state")
        except ValueError:
            assert not right
        else:
            assert right, answers
