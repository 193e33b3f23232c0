"""`evaluate`: each figure of likelihoods is that of one forward a text, and what it leaves behind."""

import copy
import gc
import weakref

import evaluation_inputs as inputs
import plain_measures
import pytest
import torch
from evaluation_inputs import SETS
from streamed_models import whole

import kunbr_fast as kf
from kunbr_fast.data.trees import Trees
from kunbr_fast.evaluation import candidates
from kunbr_fast.evaluation.folds import Fold
from kunbr_fast.evaluation.rtt import RTTConfig
from kunbr_fast.measures import evaluate as module
from kunbr_fast.measures.suites import chosen
from kunbr_fast.model.decoder import Decoder
from kunbr_fast.model.streaming import open_streamed

LIKELIHOODS = [one.name for one in chosen("all") if not {"generation", "states", "attack", "original"} & {*one.needs}]
CUT = 40  # tokens, less than the long line has
# angles by length: no text is read inside of a longer one
MODELS = ["llama", "gpt2", "gemma2", "mamba", "phi3, longrope", "llama, dynamic NTK"]


@pytest.fixture(scope="module")
def tokenizer():
    return inputs.tokenizer()


def evaluate(model, tokenizer, sets=SETS, **more):
    how = {"tokenizer": tokenizer, "progress": False, **more}
    rest = {name: items for name, items in sets.items() if name != "forget"}
    return kf.evaluate(model, sets["forget"], **rest, **how)


@pytest.mark.parametrize("name", MODELS)
def test_figures_are_those_of_one_forward_a_text(name, tokenizer, monkeypatch):
    monkeypatch.setattr(candidates, "TEXTS", 10**6)  # smooth accuracy over all candidates
    model, retrained = inputs.model(name), inputs.model(name, seed=1)
    found = evaluate(model, tokenizer, retrained=retrained, max_length=CUT, measures=LIKELIHOODS)
    truth = plain_measures.figures(model, tokenizer, SETS, retrained, CUT)
    ours = {(one.measure.name, one.set): one.found.value for one in found.figures if one.model == "result"}
    assert ours.keys() == truth.keys()
    # gemma2's softmax, the norms and the angles of all are in fp32
    assert ours == pytest.approx(truth, rel=1e-5 if name == "gemma2" else 1e-7)


def values(found):
    return {(one.measure.name, one.set, one.model): one.found for one in found.figures}


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer):
    """Of the result and the original, fp32."""
    made = {}
    for seed, name in enumerate(("result", "original")):
        made[name] = tmp_path_factory.mktemp(name)
        inputs.model("llama", seed, torch.float32).save_pretrained(made[name])
        tokenizer.save_pretrained(made[name])
    return made


@pytest.fixture(scope="module")
def core(folders, tokenizer, tmp_path_factory):
    """Of the folders."""
    out = tmp_path_factory.mktemp("core")
    return evaluate(folders["result"], tokenizer, original=folders["original"], output_dir=out)


def test_folders_and_modules_say_the_same_and_modules_stay_as_they_were(folders, core, tokenizer, tmp_path):
    models = {name: whole(path) for name, path in folders.items()}
    models["result"].train()
    models["result"].lm_head.weight.requires_grad_(False)
    before = {name: copy.deepcopy(model.state_dict()) for name, model in models.items()}
    found = evaluate(models["result"], tokenizer, original=models["original"], output_dir=tmp_path)
    prints = [{name: of["fingerprint"] for name, of in one.models.items()} for one in (found, core)]
    assert prints[0] == prints[1] and len(set(prints[0].values())) == 2
    assert values(found) == values(core) and len(values(found)) > 50
    for model in models.values():
        flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        wrong = [name for name, flag in flags.items() if flag != (model is models["original"] or "lm_head" not in name)]
        assert not wrong and all(parameter.grad is None for parameter in model.parameters())
    assert models["result"].training and models["result"].model.training and not models["original"].training
    for name, model in models.items():
        assert all(torch.equal(value, before[name][key]) for key, value in model.state_dict().items())
    assert {name: of["path"] for name, of in core.models.items()} == {
        n: str(folders[n]) for n in ("original", "result")
    }


def test_a_module_is_as_it_was_after_an_error_too(folders, tokenizer, monkeypatch):
    model = whole(folders["result"]).train()
    monkeypatch.setattr(Decoder, "final", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate(model, tokenizer)
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())


def test_an_attack_leaves_the_model_as_it_was(folders, tokenizer):
    model = whole(folders["result"]).train()
    before = copy.deepcopy(model.state_dict())
    halves = [[inputs.question(name) for name in inputs.NAMES[first : first + 2]] for first in (0, 2)]
    folds = [Fold(f"f{i}", records, records) for i, records in enumerate(halves)]
    attack = RTTConfig(lrs=(1e-2,), epochs=1, scoring="choice")
    found = evaluate(model, tokenizer, suite="muse", stream=False, max_new_tokens=2, attack=attack, folds=folds)
    assert found["recovery", "forget"].number == 4 and found.rtt.num_questions == 4
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())


def test_a_streamed_model_has_the_same_bits(folders, core, tokenizer):
    found = evaluate(folders["result"], tokenizer, original=folders["original"], stream=True)
    assert values(found) == values(core)
    more = evaluate(folders["result"], tokenizer, suite="tofu", stream=True)
    assert {one["measure"] for one in more.missing} >= {"rouge_l_recall", "model_utility"}
    assert not {one.measure.name for one in more.figures} & {"rouge_l_recall", "model_utility"}
    with pytest.raises(ValueError, match="measure exact_match needs a model in memory"):
        evaluate(folders["result"], tokenizer, measures=["exact_match"], stream=True)
    with pytest.raises(ValueError, match="measure exact_match needs a model in memory"):
        evaluate(open_streamed(folders["result"], "cpu"), tokenizer, measures=["exact_match"])


def test_of_folders_one_is_in_memory_at_a_time(folders, tokenizer, monkeypatch):
    real, before = module.load_model, []

    def load(*arguments):
        gc.collect()
        assert all(one() is None for one in before), "an earlier model is still there"
        before.append(weakref.ref(made := real(*arguments)))
        return made

    monkeypatch.setattr(module, "load_model", load)
    more = {name: folders["original"] for name in ("original", "retrained")}
    evaluate(folders["result"], tokenizer, suite="all", max_new_tokens=4, layer_records=2, **more)
    assert len(before) == 3


def test_what_texts_have_in_common_goes_through_a_model_once(tokenizer, monkeypatch):
    """Tokens of the batches: the different beginnings of an item's texts, and of no two items together."""
    packed, real = [], Trees.pack
    monkeypatch.setattr(Trees, "pack", lambda *a: packed.append(real(*a)) or packed[-1])
    sets = {name: [item for item in items if "question" not in item.record] for name, items in SETS.items()}
    model = inputs.model("llama")
    made = Decoder(model)  # compares itself with the model, on batches of its own
    packed.clear()
    monkeypatch.setattr("kunbr_fast.measures.passes.Decoder", lambda model: made)
    every = ["accuracy_letter", "accuracy_choice", "probability", "truth_share", "perplexity"]
    evaluate(model, tokenizer, sets, measures=every)
    beginnings = set()
    for name, items in sets.items():
        for i, item in enumerate(items):
            others = [text for text in (item.paraphrase, *item.perturbed) if text is not None]
            for record in [item.record, *(plain_measures.answered(item.record, text) for text in others)]:
                ((ids, _),) = plain_measures.pieces_of(record, tokenizer)
                beginnings |= {(name, i, tuple(ids[: n + 1])) for n in range(len(ids))}
    assert sum(batch.num_tokens for batch in packed) == len(beginnings)
    questions = {name: [item for item in items if "question" in item.record] for name, items in SETS.items()}
    del questions["holdout"]
    tokens = []
    for names in (every, every[:1], every[1:]):
        packed.clear()
        evaluate(model, tokenizer, questions, measures=names)
        tokens.append(sum(batch.num_tokens for batch in packed))
    asked = [item.record["question"] for items in questions.values() for item in items]
    shared = sum(len(ids) for ids in tokenizer(asked)["input_ids"])  # by the letters' prompts and all other texts
    assert tokens[0] == tokens[1] + tokens[2] - shared and shared > 20


def test_twice_the_same_bits_whatever_other_sets_there_are(folders, core, tokenizer):
    model = whole(folders["result"])
    found = values(evaluate(model, tokenizer))
    assert found == {key: one for key, one in values(core).items() if key[2] == "result"}
    alone = values(evaluate(model, tokenizer, {"forget": SETS["forget"]}))
    assert alone == {key: one for key, one in found.items() if key[1] == "forget" and "mia" not in key[0]}


def test_records_are_spread_evenly_and_counted(folders, tokenizer):
    found = evaluate(folders["result"], tokenizer, records=3, measures=["probability"])
    assert {name: (of["records"], of["of"]) for name, of in found.sets.items()} == {
        "forget": (3, 10), "retain": (3, 4), "holdout": (3, 6)
    }  # fmt: skip
    few = {"forget": [SETS["forget"][i] for i in (0, 3, 6)]}
    alone = evaluate(folders["result"], tokenizer, few, measures=["probability"])
    assert found["probability", "forget"] == alone["probability", "forget"]
    assert found.sets["forget"]["forms"] == {"own": 2, "tofu": 1}
    assert found.sets["forget"]["fingerprint"] == alone.sets["forget"]["fingerprint"]
    with pytest.raises(KeyError, match="exact_match"):
        found["exact_match", "forget"]
