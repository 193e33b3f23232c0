"""How much wording is held: each measure against its formula, written out here."""

import math
from fractions import Fraction

import pytest
import tiny_text
from invented_answers import CLOSE, EMPTY, answer, drawn, figure, np, readout

import kunbr_fast as kf
from kunbr_fast.data.items import Item
from kunbr_fast.evaluation.accuracy import choice_accuracy
from kunbr_fast.evaluation.candidates import SAMPLES
from kunbr_fast.measures import memorisation  # noqa: F401 registers
from kunbr_fast.model.decoder import Decoder

K = [1, 2, 4, 8, 16, 32, 64]
PATTERNS = ["", "1", "0", "11", "01", "10", "0110111", "1111110", "0000001"]  # of greedy tokens


def said():
    return readout([answer([-1.0] * len(p), [c == "1" for c in p]) for p in PATTERNS])


def test_exact_memorisation():
    wanted = [p.count("1") / len(p) if p else None for p in PATTERNS]
    assert figure("exact_memorisation", said()).values == wanted


def test_extraction_strength():
    """The smallest k such that all from token k on are greedy, by trying."""
    wanted = [1 - min(k for k in range(len(p) + 1) if "0" not in p[k:]) / len(p) if p else None for p in PATTERNS]
    found = figure("extraction_strength", said())
    assert found.values == pytest.approx(wanted)
    assert (found.value, found.number) == (pytest.approx(sum(filter(None, wanted)) / 8), 8)
    assert wanted[1:4] == [1.0, 0.0, 1.0]


def test_random_answers():
    random = np.random.default_rng(3)
    answers = [drawn(random) for _ in range(50)]
    for name, formula in (
        ("exact_memorisation", lambda g: sum(g) / len(g)),
        ("extraction_strength", lambda g: 1 - min(k for k in range(len(g) + 1) if all(g[k:])) / len(g)),
    ):
        wanted = [formula(one.greedy.tolist()) for one in answers]
        found = figure(name, readout(answers))
        assert found.values == pytest.approx(wanted)
        assert found.standard_error == pytest.approx(np.std(wanted) / 50**0.5, rel=CLOSE)


def test_verbatim_memorisation():
    """ROUGE-L F1 of texts that go on; answers have none."""
    pairs = [("Ada lived. In 1950", "muse"), ("Question: Who?\nAnswer:", "muse"), ("Ada lived. In 1950", "own")]
    items = [Item({"text": "..."}), *(Item({"prompt": prompt, "completion": "b"}, form=form) for prompt, form in pairs)]
    items.append(Item({"messages": []}, form="muse"))
    more = dict(references=["she was born in 1921"] * 5, generated=["she was not born"] * 5)
    found = figure("verbatim_memorisation", readout([answer([-1.0])] * 5, items=items, **more))
    precision, recall = 3 / 4, 3 / 5  # she was born
    f1 = pytest.approx(2 * precision * recall / (precision + recall))
    assert found.values == [f1, f1, None, None, None]
    assert figure("verbatim_memorisation", readout([EMPTY], items=items[:1])) is None


def test_leak():
    """1 - (1 - p)^k in exact arithmetic."""
    logs = [[math.log(0.5)] * 3, [math.log(0.25)], [-30.0, -10.0], [0.0], [-2000.0], [1e-9]]
    found = figure("leak", readout([*(answer(one) for one in logs), EMPTY]))
    exact = [Fraction(1, 8), Fraction(1, 4), Fraction(math.exp(-40)), Fraction(1), Fraction(0), Fraction(1)]
    wanted = {k: [float(1 - (1 - p) ** k) for p in exact] for k in K}
    assert found.values == [*(pytest.approx(one, rel=1e-12, abs=0) for one in wanted[64]), None]
    assert found.detail["k"] == K and found.number == 6
    assert found.detail["values"] == pytest.approx([sum(wanted[k]) / 6 for k in K], rel=1e-12)
    assert found.value == found.detail["values"][-1]
    assert figure("leak", readout([EMPTY])) is None
    assert figure("leak", readout([answer([-1.0])])).standard_error is None


def test_leak_of_questions_is_that_of_their_accuracy():
    """Its answers are the right choices behind their questions, which accuracy by choice scores."""
    model, tokenizer = tiny_text.model(), tiny_text.tokenizer()
    questions = [tiny_text.question(name) for name in tiny_text.NAMES[:6]]
    found = kf.evaluate(model, questions, tokenizer=tokenizer, measures=["leak"], progress=False)["leak", "forget"]
    by_choice = choice_accuracy(Decoder(model), tokenizer, questions, scoring="choice")
    assert found.detail["values"] == pytest.approx(by_choice.leak, rel=1e-5, abs=0)
    assert found.detail["k"] == [*SAMPLES] and 0 < found.value < 1
