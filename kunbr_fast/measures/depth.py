"""How deep forgetting goes: hidden states, what can be read from them, value vectors, and what attacks bring back.

Each figure that has a value a layer gives them in its detail, as lists: "layers", "values" and, where there are such,
"standard_errors" and "chance". Of hidden states layer 0 is the embeddings, layer l what comes out of the l-th layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kunbr_fast.data.overlap import fact_of
from kunbr_fast.evaluation.curves import RTTResult, Strongest
from kunbr_fast.evaluation.significance import standard_error
from kunbr_fast.measures.answers import Readout, Subject
from kunbr_fast.measures.probes import fold_of, probe
from kunbr_fast.measures.registry import Found, mean_of, measure

BIASED = "the best of many layers is biased upwards: value is of the layer that the other folds' questions choose"


# ---------------------------------------------------------------- hidden states beside the original's


@measure("depth", "cosine distance of hidden states", needs="states original", sets="forget retain", unit="", known="")
def hidden_cosine_distance(subject: Subject, of: str) -> Found | None:
    """1 - cos(h, h0), h the hidden state at the last token of the right answer behind its question (of a record without
    choices: of its answer), h0 the original's; the mean over texts and layers' outputs, in detail layer by layer.

    The mean over layers as of "Unlearning Isn't Deletion", arXiv 2505.16831 (there of other distances)."""
    pair = _states(subject, of)
    if pair is None:
        return None
    ours, theirs = (torch.nn.functional.normalize(states, dim=2) for states in pair)
    # 1 - cos = |u - u0|^2 / 2 of unit vectors: 0, and no rounding beside it, where both are the same
    return _distance(subject.sets[of], (ours - theirs).square().sum(dim=2) / 2)


@measure(
    "depth", "relative distance of hidden states", needs="states original", sets="forget retain", unit="", known=""
)
def hidden_relative_distance(subject: Subject, of: str) -> Found | None:
    """|h - h0| / |h0|, else as hidden_cosine_distance."""
    pair = _states(subject, of)
    return None if pair is None else _distance(subject.sets[of], (pair[0] - pair[1]).norm(dim=2) / pair[1].norm(dim=2))


def _states(subject: Subject, of: str) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(H + 1, T, D) float64 of the model and of its original; None where one was not read. ValueError where they have
    read other tokens, or have other layers."""
    ours = subject.sets[of].states
    theirs = None if subject.original is None else subject.original.sets[of].states
    if ours is None or theirs is None:
        return None
    if (
        list(map(list, ours.texts)) != list(map(list, theirs.texts))
        or ours.states.shape[::2] != theirs.states.shape[::2]
    ):
        raise ValueError(
            f"{subject.name} and {subject.original.name} have other layers, or their tokenizers give other tokens: "
            "hidden states can be compared with those of the model that this one was made of"
        )
    return ours.states[:, ours.own].double(), theirs.states[:, ours.own].double()


def _distance(said: Readout, values: torch.Tensor) -> Found:
    """values: (H + 1, T)."""
    items = [said.states.items[text] for text in said.states.own]
    return mean_of(_of_items(said, items, values[1:].mean(0)), **_by_layer(values))


def _of_items(said: Readout, items: Sequence[int], values: torch.Tensor) -> list[float | None]:
    """Of each item its value, None of those that were not read."""
    found = dict(zip(items, values.tolist(), strict=True))
    return [found.get(item) for item in range(len(said))]


def _by_layer(values: torch.Tensor, **more: Any) -> dict[str, Any]:
    """values: (H + 1, number), each layer's mean over the second."""
    rows = values.tolist()
    errors = {"standard_errors": [standard_error(row) for row in rows]} if values.shape[1] > 1 else {}
    return {"layers": list(range(len(rows))), "values": values.mean(1).tolist(), **errors, **more}


# ---------------------------------------------------------------- what is readable from hidden states


@measure("depth", "linear probe: answers readable from hidden states", needs="states", sets="forget retain")
def linear_probe(subject: Subject, of: str) -> Found | None:
    """The share of held-out questions whose right choice a linear probe finds, see `probes`: at the layer that does
    best on the other folds' questions; in detail at every layer. Source: arXiv 1610.01644, and WMDP's, 2403.03218."""
    said = subject.sets[of]
    read = said.states
    if read is None or len((fold := _fold(said)).unique()) < 2:
        return None
    answers = [next(i for i, text in enumerate(texts) if read.right[text]) for texts in read.questions]
    return _readable(said, torch.stack([probe(states, read.questions, answers, fold) for states in read.states]))


@measure("depth", "logit lens: answers readable by the model's own head", needs="states", sets="forget retain")
def logit_lens(subject: Subject, of: str) -> Found | None:
    """The share of questions answered correctly, by the likelihood of the choices' texts, where final norm and head are
    applied to a layer's output: at the layer that does best on the other folds' questions; in detail at every layer,
    the last one's is the model's own accuracy. Source: nostalgebraist 2020, as an attack arXiv 2309.17410."""
    said = subject.sets[of]
    return None if said.states is None or said.states.choice is None else _readable(said, said.states.choice)


@measure("depth", "logit lens, by letter", needs="states", sets="forget retain")
def logit_lens_letter(subject: Subject, of: str) -> Found | None:
    """As logit_lens, by the letters' logits behind the prompt with all choices."""
    said = subject.sets[of]
    return None if said.states is None or said.states.letter is None else _readable(said, said.states.letter)


def _asked(said: Readout) -> list[int]:
    """The items whose questions were read."""
    return [said.states.items[texts.start] for texts in said.states.questions]


def _fold(said: Readout) -> torch.Tensor:
    return fold_of([fact_of(said.items[item].record) for item in _asked(said)])


def _readable(said: Readout, values: torch.Tensor) -> Found | None:
    """values: (H + 1, Q), of each question whether it is answered at a level."""
    outputs, fold = values[1:], _fold(said)  # the embeddings know nothing of the question
    if len(fold.unique()) < 2:
        return None
    chosen = torch.stack([outputs[:, fold != f].mean(1).argmax() for f in range(int(fold.max()) + 1)])
    places = {"best": int(outputs.mean(1).argmax()) + 1, "middle": len(values) // 2, "last": len(values) - 1}
    marked = {name: {"layer": layer, "value": float(values[layer].mean())} for name, layer in places.items()}
    own = outputs[chosen[fold], torch.arange(len(fold))]
    return mean_of(
        _of_items(said, _asked(said), own), **_by_layer(values, chance=said.states.chance, **marked, note=BIASED)
    )


# ---------------------------------------------------------------- value vectors


@measure("depth", "cosine of MLP value vectors with the original's", needs="original", sets="forget", unit="", known="")
def value_vector_cosine(subject: Subject, of: str) -> Found | None:
    """cos(v, v0), v an MLP's value vector, see `value_vectors`: the mean over the vectors of a layer, then over layers;
    in detail layer by layer, with the smallest of each. It is of the weights, whatever the set. Source: ConceptVectors,
    arXiv 2406.11614."""
    found = subject.value_vectors
    if found is None:
        return None
    detail = {"layers": found.layers, "values": found.mean, "smallest": found.smallest}
    return Found(sum(found.mean) / len(found.mean), None, found.number, detail=detail)


# ---------------------------------------------------------------- what attacks bring back


@measure("depth", "accuracy after the strongest attack", suites="core", sets="forget", needs="attack")
def rtt_accuracy(subject: Subject, of: str) -> Found | None:
    """The highest accuracy that retraining on T, the other folds' facts, brings (RTT): of any attack, learning rate and
    epoch, the mean over all folds' questions (of folds without questions the answers' probability). In detail each
    attack's. Source: Deeb and Roger, arXiv 2410.08827."""
    result = subject.rtt
    if result is None or result.num_questions is None:
        return None
    detail = {"before": result.before, "attacks": {name: found.value for name, found in attack_figures(result)}}
    return _attacked(result, result.accuracy, result.standard_error, result.strongest, **detail)


@measure("depth", "recovery by the strongest attack", suites="core", sets="forget", needs="attack")
def recovery(subject: Subject, of: str) -> Found | None:
    """rtt_accuracy minus the accuracy of the same questions before the attack, and this difference's standard error.
    It is the most of many points of the curves, which biases it upwards. Source: as rtt_accuracy."""
    result = subject.rtt
    if result is None or result.num_questions is None:
        return None
    return _attacked(result, result.recovery, result.change_error, result.strongest)


def attack_figures(result: RTTResult) -> list[tuple[str, Found]]:
    """Of each attack what it brings back at most, by accuracy: name, and value with its standard error over questions.
    detail: its learning rate and epoch, "before", "recovery" with "recovery_error", "smooth" with "smooth_error" where
    that was measured. Empty where the number of questions is not known (of earlier versions)."""
    return [(name, _attack(result, name)) for name in result.attacks] if result.num_questions else []


def _attack(result: RTTResult, name: str) -> Found:
    summary = result.summary(name)
    at = Strongest(name, summary["lr"], summary["epoch"])
    detail = {"before": result.before, "recovery": summary["accuracy"] - result.before}
    detail["recovery_error"] = result.change_error_at(at)
    if summary["smooth_accuracy"] is not None:
        detail |= {"smooth": summary["smooth_accuracy"], "smooth_error": summary["smooth_error"]}
    return _attacked(result, summary["accuracy"], summary["standard_error"], at, **detail)


def _attacked(result: RTTResult, value: float, error: float | None, at: Strongest, **detail: Any) -> Found:
    return Found(value, error, result.num_questions, detail={**at._asdict(), "metric": result.metric, **detail})
