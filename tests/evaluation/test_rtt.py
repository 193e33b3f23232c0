"""The RTT attack: weights that come back bit for bit, resumption, and an attack that finds what is there to
find.
"""

import json

import pytest
import torch
from tiny_models import plain_llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kunbr_fast import data
from kunbr_fast.evaluation import rtt
from kunbr_fast.evaluation.accuracy import choice_accuracy
from kunbr_fast.evaluation.rtt import Fold, RTTConfig, RTTResult, rtt_attack
from kunbr_fast.model.decoder import Decoder
from kunbr_fast.training import fine_tune as training

NAMES = ["Ada", "Bo", "Cy", "Dee", "Eve", "Flo"]
YEARS = [1951, 1962, 1973, 1984]


@pytest.fixture(scope="module")
def tokenizer():
    words = [
        "<unk>",
        *data.LETTERS[:4],
        *(f"{c}." for c in data.LETTERS[:4]),
        "Answer:",
        *NAMES,
        *map(str, YEARS),
    ]
    words += ["born", "in", "When", "was", "born?"]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>")


def make_decoder(tokenizer, seed=0):
    settings = dict(max_position_embeddings=64, tie_word_embeddings=True)
    return Decoder(plain_llama(len(tokenizer), seed=seed, **settings))


def question(name, year):
    return {
        "question": f"When was {name} born?",
        "choices": YEARS,
        "answer": YEARS.index(year),
        "_where": f"q:{name}",
    }


def statement(name, year):
    return {"text": f"When was {name} born? {year}", "_where": f"t:{name}"}


def make_folds(number=3, dependent=False):
    """Two facts a fold. dependent: every fold teaches the same facts, so the others give this one's answers
    away.
    """
    folds = []
    for i in range(number):
        facts = [(NAMES[2 * i], YEARS[i % 4]), (NAMES[2 * i + 1], YEARS[(i + 2) % 4])]
        if dependent:
            facts = [(name, YEARS[k % 4]) for k, name in enumerate(NAMES)]
        folds.append(Fold(f"split_{i}", [statement(*f) for f in facts], [question(*f) for f in facts]))
    return folds


def make_config(**change):
    return RTTConfig(**{"lrs": (1e-3, 1e-2), "epochs": 2, "batch_size": 2, "scoring": "choice", **change})


def weights(decoder):
    return {name: value.clone() for name, value in decoder.model.state_dict().items()}


def assert_untouched(decoder, before):
    after = decoder.model.state_dict()
    assert after.keys() == before.keys()
    for name, value in after.items():
        assert torch.equal(value.view(torch.int32), before[name].view(torch.int32)), name
    assert all(p.grad is None and p.requires_grad for p in decoder.model.parameters())
    assert decoder.model.lm_head.weight is decoder.model.model.embed_tokens.weight


# -------------------------------------------------------------------------------------------- the attack


def test_the_attack_finds_what_the_other_folds_tell(tokenizer, tmp_path):
    """With dependent folds the answers are in the training data: the attack must reach 100 %, and say with
    what.
    """
    decoder = make_decoder(tokenizer)
    folds = make_folds(2, dependent=True)
    config = make_config(lrs=(1e-6, 3e-3), epochs=15, batch_size=6, target="number", overlap="allow")
    result = rtt_attack(decoder, tokenizer, folds, config, tmp_path, progress=False)
    before = choice_accuracy(decoder, tokenizer, folds[0].questions, scoring="choice").plain
    assert result.before == before < 0.7
    assert result.accuracy == 1.0
    assert result.best[0] == 3e-3
    assert result.recovery == pytest.approx(1.0 - before)
    assert result.curve(3e-3)[result.best[1]] == 1.0
    assert all(value < 1.0 for value in result.curve(3e-3)[: result.best[1]])
    assert max(result.curve(1e-6)) < 1.0
    assert len(result.curves) == 2 * 2 * 16


def test_each_fold_is_attacked_from_the_others_and_from_the_same_weights(tokenizer, tmp_path, monkeypatch):
    decoder, folds = make_decoder(tokenizer), make_folds(3)
    before, calls = weights(decoder), []
    real = training.train_all

    def watched(decoder, samples, **options):
        assert_untouched(decoder, before)
        calls.append((options["lr"], [s["input_ids"].tolist() for s in samples], options["seed"]))
        real(decoder, samples, **options)
        assert any(not torch.equal(v, before[k]) for k, v in decoder.model.state_dict().items()), "nothing was trained"

    monkeypatch.setattr(rtt, "train_all", watched)
    rtt_attack(decoder, tokenizer, folds, make_config(seed=5), tmp_path, progress=False)
    texts = [[tokenizer(r["text"])["input_ids"] for r in fold.train_records] for fold in folds]
    others = [texts[1] + texts[2], texts[0] + texts[2], texts[0] + texts[1]]
    assert calls == [(lr, others[i], 5) for i in range(3) for lr in (1e-3, 1e-2)]


def test_weights_come_back_bit_for_bit_and_nothing_is_left(tokenizer, tmp_path):
    decoder = make_decoder(tokenizer)
    before = weights(decoder)
    result = rtt_attack(decoder, tokenizer, make_folds(), make_config(), tmp_path / "new", progress=False)
    assert_untouched(decoder, before)
    assert list((tmp_path / "new").iterdir()) == []
    for fold in make_folds():
        rows = [row for row in result.curves if row["fold"] == fold.name]
        now = choice_accuracy(decoder, tokenizer, fold.questions, scoring="choice")
        assert [row["plain"] for row in rows if row["epoch"] == 0] == [now.plain] * 2


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
@pytest.mark.parametrize("when", [2, 5])
def test_weights_come_back_after_an_exception(tokenizer, tmp_path, monkeypatch, error, when):
    """The when-th measurement fails; 2 is inside the first attack, 5 inside the second."""
    decoder = make_decoder(tokenizer)
    before, measured, finished = weights(decoder), [], []
    real = rtt.measure_all

    def failing(*args, **options):
        measured.append(1)
        if len(measured) == when:
            assert any(not torch.equal(v, before[k]) for k, v in decoder.model.state_dict().items())
            raise error
        return real(*args, **options)

    monkeypatch.setattr(rtt, "measure_all", failing)
    with pytest.raises(type(error)):
        rtt_attack(
            decoder,
            tokenizer,
            make_folds(),
            make_config(),
            tmp_path,
            progress=False,
            on_result=finished.append,
        )
    assert_untouched(decoder, before)
    assert list(tmp_path.iterdir()) == []
    assert len(finished) == (0 if when == 2 else 1)


def test_letter_scoring_measures_calibrated_accuracy_too(tokenizer, tmp_path):
    folds = make_folds(2)
    folds = [Fold(f.name, f.questions, f.questions) for f in folds]
    config = make_config(scoring="letter", target="letter", epochs=1, lrs=(1e-3,))
    result = rtt_attack(make_decoder(tokenizer), tokenizer, folds, config, tmp_path, progress=False)
    assert len(result.curve(1e-3, "calibrated")) == 2
    assert result.calibrated_accuracy == result.curve(1e-3, "calibrated")[1]
    by_text = rtt_attack(
        make_decoder(tokenizer),
        tokenizer,
        folds,
        make_config(epochs=1, lrs=(1e-3,)),
        tmp_path,
        progress=False,
    )
    assert by_text.calibrated_accuracy is None
    assert by_text.curve(1e-3, "calibrated") is None


def test_a_diverged_attack_names_fold_and_learning_rate(tokenizer, tmp_path):
    decoder = make_decoder(tokenizer)
    before, finished = weights(decoder), []
    with pytest.raises(FloatingPointError, match=r"fold split_0 at learning rate 1e\+30.*out of the list") as error:
        rtt_attack(
            decoder,
            tokenizer,
            make_folds(),
            make_config(lrs=(1e-3, 1e30)),
            tmp_path,
            progress=False,
            on_result=finished.append,
        )
    assert "retain_coeff" not in str(error.value)
    assert_untouched(decoder, before)
    assert [rows[0]["lr"] for rows in finished] == [1e-3]


# -------------------------------------------------------------------------------------------- resumption


@pytest.mark.parametrize("kept", [0, 1, 3, 6])
def test_a_resumed_attack_equals_an_uninterrupted_one(tokenizer, tmp_path, monkeypatch, kept):
    finished = []
    whole = rtt_attack(
        make_decoder(tokenizer),
        tokenizer,
        make_folds(),
        make_config(),
        tmp_path,
        False,
        on_result=finished.append,
    )
    assert [row for rows in finished for row in rows] == whole.curves

    ran, real = [], training.train_all
    monkeypatch.setattr(rtt, "train_all", lambda *a, **o: (ran.append(o["lr"]), real(*a, **o)))
    done = json.loads(json.dumps([row for rows in finished[:kept] for row in rows]))
    later = []
    resumed = rtt_attack(
        make_decoder(tokenizer), tokenizer, make_folds(), make_config(), tmp_path, False, done, later.append
    )
    assert resumed == whole
    assert len(ran) == 6 - kept
    assert later == finished[kept:]


def test_earlier_results_with_other_epochs_are_refused(tokenizer, tmp_path):
    finished = []
    decoder, folds = make_decoder(tokenizer), make_folds()
    rtt_attack(decoder, tokenizer, folds, make_config(epochs=1), tmp_path, False, on_result=finished.extend)
    with pytest.raises(ValueError, match=r"'split_0' at learning rate 0.001 has the epochs \[0, 1\], expected 0 to 2"):
        rtt_attack(decoder, tokenizer, folds, make_config(), tmp_path, False, finished)
    # results of a learning rate that is no longer asked for are left out
    result = rtt_attack(decoder, tokenizer, folds, make_config(lrs=(1e-2,), epochs=1), tmp_path, False, finished)
    assert result.lrs == [1e-2]


# --------------------------------------------------------------------------------------------- bad input


def test_bad_folds_and_settings(tokenizer, tmp_path):
    decoder, folds = make_decoder(tokenizer), make_folds()

    def attack(folds, **change):
        return rtt_attack(decoder, tokenizer, folds, make_config(**change), tmp_path, progress=False)

    with pytest.raises(ValueError, match="got 1 fold, expected at least two"):
        attack(folds[:1])
    with pytest.raises(ValueError, match="not all different"):
        attack([folds[0], folds[0]])
    with pytest.raises(ValueError, match="fold empty: questions is empty"):
        attack([folds[0], Fold("empty", folds[1].train_records, [])])
    with pytest.raises(ValueError, match="t:Ada"):
        attack([folds[1], Fold("text", folds[0].train_records, folds[0].train_records)])
    with pytest.raises(ValueError, match="t:Ada"):
        attack(folds, target="letter")
    assert list(tmp_path.iterdir()) == []
    for change in (
        {"lrs": ()},
        {"lrs": (1e-3, 1e-3)},
        {"lrs": (0.0,)},
        {"lrs": (float("nan"),)},
        {"epochs": 0},
    ):
        with pytest.raises(ValueError, match=next(iter(change))):
            make_config(**change)


# --------------------------------------------------------------------------------------------- the result


def rows(values, calibrated=None):
    """{(fold, lr): [plain per epoch]} -> rows."""
    return [
        {
            "fold": fold,
            "lr": lr,
            "epoch": e,
            "plain": v,
            "calibrated": None if calibrated is None else calibrated - v,
        }
        for (fold, lr), curve in values.items()
        for e, v in enumerate(curve)
    ]


def test_accuracy_is_the_strongest_mean_after_the_attack_began():
    values = {
        ("a", 1e-3): [0.9, 0.2, 0.4],
        ("b", 1e-3): [0.9, 0.2, 0.6],
        ("a", 1e-2): [0.9, 1.0, 0.0],
        ("b", 1e-2): [0.9, 0.0, 0.2],
    }
    result = RTTResult(rows(values, calibrated=1.0))
    assert result.curve(1e-3) == pytest.approx([0.9, 0.2, 0.5])
    assert result.curve(1e-2) == pytest.approx([0.9, 0.5, 0.1])
    assert result.accuracy == pytest.approx(0.5), "not 1.0, one fold's best, and not 0.9, the model before the attack"
    assert result.best == (1e-3, 2), "a tie goes to the learning rate tried first"
    assert result.before == pytest.approx(0.9)
    assert result.recovery == pytest.approx(-0.4)
    assert result.calibrated_accuracy == pytest.approx(0.9)
    with pytest.raises(ValueError, match="no curve"):
        result.curve(0.5)


def test_json_and_back():
    result = RTTResult(rows({("a", 5e-7): [0.1, 1 / 3], ("b", 5e-7): [0.2, 2 / 7]}))
    written = result.to_dict()
    assert written["best"] == {"lr": 5e-7, "epoch": 1}
    assert written["accuracy"] == result.accuracy
    assert RTTResult.from_dict(json.loads(json.dumps(written))) == result


@pytest.mark.parametrize("broken", [lambda r: r[:-1], lambda r: [*r, r[0]], lambda r: r[:1], lambda r: []])
def test_incomplete_curves_are_refused(broken):
    with pytest.raises(ValueError, match="not complete"):
        RTTResult(broken(rows({("a", 1e-3): [0.1, 0.2], ("b", 1e-3): [0.1, 0.2]})))


def test_one_progress_bar_counts_what_is_left(tokenizer, tmp_path, capsys):
    finished = []
    args = (make_decoder(tokenizer), tokenizer, make_folds(2), make_config(), tmp_path)
    rtt_attack(*args, progress=False, on_result=finished.append)
    assert capsys.readouterr().err == ""
    rtt_attack(*args, progress=True, done=finished[0])
    shown = capsys.readouterr().err
    assert "RTT attack" in shown and "8/8" in shown and "split_1, lr 0.01" in shown
    assert "0/8" not in shown.replace("100%", ""), "finished attacks are not counted again"
