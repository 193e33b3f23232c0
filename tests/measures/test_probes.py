"""Linear probes: a plain formula, planted directions, ties."""

import numpy as np
import pytest
import torch

from kunbr_fast.measures import probes


def planted(strength, questions=60, width=40, choices=(4,), seed=0):
    """States with a direction that the right choice has more of, beside what a question's choices share."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    direction = noise(width)
    rows, spans, answers = [], [], []
    for i in range(questions):
        number, first = choices[i % len(choices)], spans[-1].stop if spans else 0
        spans.append(range(first, first + number))
        answers.append(int(torch.randint(0, number, (), generator=generator)))
        x = noise(number, width) + 5 * noise(width)
        x[answers[-1]] += strength * direction
        rows.append(x)
    return torch.cat(rows) * torch.logspace(-3, 3, width), spans, answers


def probe(states, spans, answers):
    """Each question is about a fact of its own."""
    return probes.probe(states, spans, answers, probes.fold_of(range(len(spans))))


def plain_probe(states, spans, answers, facts=None):
    """By least squares over the features, numpy, with the penalty as further rows; fold i % 5, i the question's number,
    or its fact."""
    x, right = states.double().numpy().copy(), []
    y = np.zeros(len(x))
    for span, answer in zip(spans, answers):
        rows = slice(span.start, span.stop)
        x[rows] -= x[rows].mean(0)
        y[rows.start + answer] = 1
        y[rows] -= y[rows].mean()
    fold = (np.arange(len(spans)) if facts is None else np.array(facts)) % 5
    for i, (span, answer) in enumerate(zip(spans, answers)):
        train = np.concatenate([np.arange(s.start, s.stop) for s, f in zip(spans, fold) if f != fold[i]])
        size = np.sqrt((x[train] ** 2).mean(0))
        z = x[train] / size
        penalty = np.linalg.eigvalsh(z @ z.T).mean()
        w = np.linalg.lstsq(
            np.vstack([z, np.sqrt(penalty) * np.eye(z.shape[1])]), np.append(y[train], np.zeros(z.shape[1])), rcond=None
        )[0]
        right.append(float(np.argmax(x[span.start : span.stop] / size @ w) == answer))
    return right


@pytest.mark.parametrize(("width", "strength"), [(12, 0.4), (300, 0.1)])  # fewer and more features than texts
def test_the_plain_formula(width, strength):
    made = planted(strength, width=width, choices=(4, 2, 5))
    found, truth = probe(*made).tolist(), plain_probe(*made)
    assert found == truth and 20 < sum(truth) < 50


def test_a_layer_that_knows_and_one_that_does_not():
    knows, says_nothing = (probe(*planted(strength, questions=200)).mean() for strength in (1.5, 0.0))
    assert knows > 0.9
    assert abs(says_nothing - 0.25) < 3 * (0.25 * 0.75 / 200) ** 0.5  # three standard errors of guessing


def test_what_is_learned_from_a_question_does_not_answer_it():
    """More features than texts: a probe that saw its own questions would answer all of them."""
    assert probe(*planted(0.0, questions=200, width=2000)).mean() < 0.4


def test_ties_are_shared_and_the_same_state_everywhere_is_chance():
    _, spans, answers = planted(0.0, questions=10)
    assert probe(torch.ones(40, 8), spans, answers).tolist() == [0.25] * 10
    states = torch.zeros(40, 2)
    for span, answer in zip(spans, answers):
        states[span.start + answer] = states[span.start + (answer + 1) % 4] = 1.0  # two of four look right
    assert probe(states, spans, answers).tolist() == [0.5] * 10


def test_facts_are_dealt_out():
    assert probes.fold_of(list("abacdefga")).tolist() == [0, 1, 0, 2, 3, 4, 0, 1, 0]


def test_one_question_has_no_others():
    with pytest.raises(ValueError, match="1 facts: a probe is trained on some"):
        probe(torch.ones(4, 2), [range(4)], [0])
