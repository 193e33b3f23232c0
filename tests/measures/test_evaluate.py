"""`evaluate`: each figure that likelihoods make is that of one forward a text, whatever goes through the model together."""

import copy

import evaluation_inputs as inputs
import plain_measures
import pytest
import torch
from evaluation_inputs import SETS

import kunbr_fast as kf
from kunbr_fast.evaluation import candidates
from kunbr_fast.measures.suites import chosen

LIKELIHOODS = [one.name for one in chosen("all") if not {"generation", "states", "attack", "original"} & {*one.needs}]
CUT = 40  # tokens, less than the long line has
# angles by length: no text is read inside of a longer one
MODELS = ["llama", "gpt2", "gemma2", "mamba", "phi3, longrope", "llama, dynamic NTK"]


@pytest.fixture(scope="module")
def tokenizer():
    return inputs.tokenizer()


def evaluate(model, tokenizer, sets=SETS, **more):
    how = {"tokenizer": tokenizer, "measures": LIKELIHOODS, "progress": False, **more}
    how = {name: value for name, value in how.items() if value is not None}
    rest = {name: items for name, items in sets.items() if name != "forget"}
    return kf.evaluate(model, sets["forget"], **rest, **how)


@pytest.mark.parametrize("name", MODELS)
def test_figures_are_those_of_one_forward_a_text(name, tokenizer, monkeypatch):
    monkeypatch.setattr(candidates, "TEXTS", 10**6)  # smooth accuracy over all candidates
    model, retrained = inputs.model(name), inputs.model(name, seed=1)
    found = evaluate(model, tokenizer, retrained=retrained, max_length=CUT)
    truth = plain_measures.figures(model, tokenizer, SETS, retrained, CUT)
    ours = {(one.measure.name, one.set): one.found.value for one in found.figures if one.model == "result"}
    assert ours.keys() == truth.keys()
    # gemma2's softmax, the norms and the angles of all are in fp32
    assert ours == pytest.approx(truth, rel=1e-5 if name == "gemma2" else 1e-7)
