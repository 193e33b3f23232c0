"""What a model is asked about a set: prompts, references, what is left out, and what is refused."""

import evaluation_inputs as inputs
import pytest
import torch
from evaluation_inputs import NAMES, asked, chat, line, pair
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import kunbr_fast as kf
from kunbr_fast.data.items import Item
from kunbr_fast.evaluation.reading import Reading
from kunbr_fast.evaluation.rtt import RTTConfig
from kunbr_fast.measures import passes
from kunbr_fast.measures.asked import AskedSet, Asking
from kunbr_fast.model.decoder import Decoder


@pytest.fixture(scope="module")
def tokenizer():
    return inputs.tokenizer()


@pytest.fixture(scope="module")
def model():
    return inputs.model("llama")


def evaluate(model, tokenizer, forget, **more):
    return kf.evaluate(model, forget, **{"tokenizer": tokenizer, "progress": False, **more})


def asked_set(model, tokenizer, items, **settings):
    decoder = Decoder(model)
    return AskedSet(Reading(decoder), "forget", items, tokenizer, decoder, Asking(**settings))


def test_prompts_and_references(model, tokenizer):
    before = chat(NAMES[0]).record["messages"]
    two = Item({"messages": [*before, *chat(NAMES[1]).record["messages"]]})
    items = [asked(NAMES[2]), pair(NAMES[3]), line(NAMES[4], NAMES[5]), chat(NAMES[6]), two]
    found = asked_set(model, tokenizer, items, most_new=5)
    question, first, text, one, last = (tokenizer.decode(ids) for ids in found.prompts)
    assert question == "When was Ada Go born?" and found.references[0] == str(inputs.years()[NAMES[2]])
    assert first == "When was Ada Hu born?" and found.references[1] == f"In {inputs.years()[NAMES[3]]}."
    whole = tokenizer(items[2].record["text"])["input_ids"]
    assert found.prompts[2] == whole[: len(whole) // 2] and len(whole) > 12
    assert found.references[2] == tokenizer.decode(whole[len(whole) // 2 :][:5]).strip()
    assert one == f"<user> When was {NAMES[6]} born?\n<assistant> "
    before, asked_last = (f"<user> When was {name} born?\n<assistant> " for name in NAMES[:2])
    assert last == f"{before}In 1900.\n{asked_last}"
    assert found.references[3:] == [f"In {inputs.years()[name]}." for name in (NAMES[6], NAMES[1])]


def test_an_answer_of_a_chat_is_all_its_turns_and_other_answers_stand_in_the_last(model, tokenizer):
    turns = [*chat(NAMES[0]).record["messages"], *chat(NAMES[1]).record["messages"]]
    other = [*turns[:-1], {"role": "assistant", "content": "In 2001."}]
    both = [Item({"messages": turns}, "In 2001.", ("In 2001.",)), Item({"messages": other})]
    found = evaluate(model, tokenizer, both, measures=["probability", "probability_against_wrong"])
    one, two = found["probability", "forget"].values
    assert one != two
    assert found["probability_against_wrong", "forget"].values == [pytest.approx(one / (one + two)), None]


def test_an_item_whose_answer_has_no_token_is_refused(model, tokenizer):
    with pytest.raises(ValueError, match="forget record 1: no token with a loss is left"):
        evaluate(model, tokenizer, [line(NAMES[0]), Item({"text": "A"})])


def test_examples_are_what_is_asked_and_what_is_said(model, tokenizer):
    forget = [asked(NAMES[0]), pair(NAMES[1]), chat(NAMES[2]), line(NAMES[3])]
    found = evaluate(model, tokenizer, forget, original=inputs.model("llama", seed=1))
    assert [one["question"] for one in found.examples[:3]] == [f"When was {name} born?" for name in NAMES[:3]]
    assert f"{forget[3].record['text']}".startswith(found.examples[3]["question"])
    right = [str(inputs.years()[name]) for name in NAMES[:3]]
    assert [one["answer"] for one in found.examples[:3]] == [right[0], f"In {right[1]}.", f"In {right[2]}."]
    told = found["accuracy_choice", "forget"].values[0]
    assert found.examples[0]["result"] in map(str, forget[0].record["choices"])
    assert (found.examples[0]["result"] == right[0]) == bool(told)
    probability = found["probability", "forget"].values[1]
    assert found.examples[1]["result"] == f"probability of the answer {probability:.3g}"
    said = evaluate(model, tokenizer, forget, suite="muse", max_new_tokens=4).examples
    assert [one["question"] for one in said] == [one["question"] for one in found.examples]
    with torch.no_grad():
        ids = tokenizer("When was Ada Fu born?", return_tensors="pt")["input_ids"]
        made = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)[
            0, ids.shape[1] :
        ]
    cut = [*made.tolist(), 2].index(2)  # the configuration's end
    assert said[1]["result"] == tokenizer.decode(made[:cut], skip_special_tokens=True).strip()


def without_letters():
    """Digits, and all else as one unknown token."""
    words = {"?": 0, **{f"{digit}": digit + 1 for digit in range(10)}, "born": 11, "When": 12}
    inner = Tokenizer(models.WordLevel(words, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Digits(True)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="?")


def test_a_tokenizer_without_letters_has_no_accuracy_by_letter_and_it_is_said(model):
    found = evaluate(model, without_letters(), [asked(name) for name in NAMES[:4]], suite="all", max_new_tokens=2)
    names = {figure.measure.name for figure in found.figures}
    assert {"accuracy_choice", "logit_lens"} <= names and not {name for name in names if "letter" in name}
    why = {one["measure"]: one["why"] for one in found.missing}
    for name in ("accuracy_letter", "accuracy_letter_calibrated", "logit_lens_letter"):
        assert why[name] == "needs a tokenizer that has one token for each of the letters of the choices"
    assert why["verbatim_memorisation"] == "does not apply to these records"


def test_one_question_is_too_few_whatever_the_tokenizer(model, tokenizer):
    found = evaluate(model, tokenizer, [asked(NAMES[0])], suite="all", max_new_tokens=2)
    why = {one["measure"]: one["why"] for one in found.missing}
    for name in ("accuracy_letter_calibrated", "linear_probe", "logit_lens", "logit_lens_letter"):
        assert why[name] == "needs two questions or more, of different facts"
    assert "accuracy_letter" not in why


def test_a_prompt_without_room_for_its_answer_is_named_before_anything_is_read(model, tokenizer, monkeypatch):
    monkeypatch.setattr(passes, "read_all", lambda *a, **k: 1 / 0)
    long = Item({"prompt": "When was Ada Ek born? " * 16, "completion": "1900", "_where": "f.jsonl:7"})
    with pytest.raises(ValueError, match=r"f.jsonl:7: its prompt has \d+ tokens and 60 are to be generated .* 128 pos"):
        evaluate(model, tokenizer, [pair(NAMES[0]), long], suite="tofu", max_new_tokens=60)


def test_what_is_too_long_for_the_model_is_named(model, tokenizer):
    with pytest.raises(ValueError, match="longer than max_length=128: forget record 1 "):
        evaluate(model, tokenizer, [pair(NAMES[0]), Item({"prompt": "born " * 200, "completion": "1900"})])


def test_another_answer_of_a_text_line_is_refused(model, tokenizer):
    with pytest.raises(ValueError, match="forget record 0: a text line has no answer that another one could stand"):
        evaluate(model, tokenizer, [Item({"text": "A B C"}, perturbed=("D",))], suite="tofu", stream=False)


def test_what_is_not_finite_is_told(model, tokenizer):
    found = asked_set(model, tokenizer, [pair(NAMES[0]), asked(NAMES[1])])
    read = found.reading.read(Decoder(model))
    found.readout(read)
    read.log_sums[:2] = float("nan")
    with pytest.raises(FloatingPointError, match="the model's answer to .* is not a finite number.*have diverged"):
        found.readout(read)


def test_a_model_that_has_diverged_is_told(tokenizer, tmp_path):
    model = inputs.model("llama", dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight[3, 3] = float("nan")
    with pytest.raises(ValueError, match="the result model's lm_head.weight: .*NaN or infinite"):
        evaluate(model, tokenizer, [pair(NAMES[0])], output_dir=tmp_path)
    with pytest.raises(ValueError, match="lm_head.weight: .*NaN or infinite"):
        evaluate(model, tokenizer, [pair(NAMES[0])])


WRONG = {
    "no records": (dict(forget=[]), "no records of what was to be forgotten"),
    "a record of no form": (dict(forget=[{"prompt": "A"}]), "forget record 0"),
    "of the holdout": (dict(holdout=[{"text": "A B"}, {"text": 1, "_where": "h.jsonl:2"}]), "h.jsonl:2"),
    "an unknown measure": (dict(measures=["probabilty"]), "measure 'probabilty': did you mean 'probability'"),
    "an unknown suite": (dict(suite="tofo"), "suite='tofo': did you mean 'tofu'"),
    "a name in place of a list": (dict(measures="probability"), r"measures='probability': expected a list .*\['prob"),
    "no holdout": (dict(measures=["mia_loss"]), "measure mia_loss needs records that no model was trained on"),
    "no original": (dict(measures=["value_vector_cosine"]), r"needs the model before unlearning \(original="),
    "no retrained": (dict(measures=["forget_quality"]), "needs a model trained without the forget set"),
    "no attack": (dict(measures=["recovery"]), "needs an attack"),
    "no retain": (dict(measures=["model_utility"]), "model_utility needs a retain set"),
    "a count": (dict(records=0), "records"),
    "settings without folds": (dict(attack=RTTConfig()), "attack and folds: give both"),
    "limits of no task": (dict(lm_eval_limit=3), "lm_eval_limit without lm_eval"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_told_before_anything_is_computed(name, model, tokenizer, monkeypatch):
    changes, message = WRONG[name]
    monkeypatch.setattr(passes, "Decoder", lambda *a: 1 / 0)
    how = {"forget": [pair(NAMES[0])], **changes}
    with pytest.raises(ValueError, match=message):
        evaluate(model, tokenizer, how.pop("forget"), **how)


PACKAGES = {"rouge_score.rouge_scorer": "tofu", "scipy.stats": "tofu", "lm_eval": "core"}


@pytest.mark.parametrize("package", PACKAGES)
def test_a_missing_package_is_told_before_anything_is_computed(package, model, tokenizer, monkeypatch):
    from kunbr_fast.measures import texts

    texts._scorer.cache_clear()
    texts.rouge.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, package, None)
    monkeypatch.setattr(passes, "Decoder", lambda *a: 1 / 0)
    how = {"lm_eval": ["mmlu"]} if package == "lm_eval" else {}
    with pytest.raises(ValueError, match=r"needs? .*pip install 'kunbr-fast\[(evaluate|lm-eval)\]'"):
        evaluate(model, tokenizer, [pair(NAMES[0])], suite=PACKAGES[package], retrained=model, **how)
