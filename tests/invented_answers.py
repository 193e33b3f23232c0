"""What no model has said: answers of invented likelihoods, and readouts of them."""

import numpy as np

from kunbr_fast.data.items import Item
from kunbr_fast.measures.answers import Answer, Readout, Subject
from kunbr_fast.measures.registry import MEASURES
from kunbr_fast.measures.resampling import ROUNDS

# A standard deviation of so many draws is itself known to 1/sqrt(2 (n - 1)), relative: five of these are a bound
CLOSE = 5 / (2 * (ROUNDS - 1)) ** 0.5


def answer(log_probs, greedy=None, text="an answer", means=None, deviations=None):
    log_probs = np.array(log_probs, dtype=np.float64)
    n = len(log_probs)
    greedy = np.zeros(n, bool) if greedy is None else np.array(greedy, dtype=bool)
    means, deviations = (
        np.full(n, other) if one is None else np.array(one) for one, other in ((means, -2.0), (deviations, 1.0))
    )
    return Answer(np.arange(n), log_probs, greedy, means, deviations, text)


def drawn(random, n=None):
    """An answer of random likelihoods."""
    n = int(random.integers(1, 9)) if n is None else n
    words = " ".join(random.choice(["ada", "bo", "was", "born", "in", "1921", "paris"], n))
    return answer(
        -random.exponential(1.5, n), random.random(n) < 0.5, words, -random.exponential(2, n), random.random(n)
    )


EMPTY = answer([])


def readout(answers, *, paraphrases=None, perturbed=None, items=None, **others):
    number = len(answers)
    items = items or [Item({"prompt": "Who?", "completion": " Ada."}, form="tofu") for _ in range(number)]
    return Readout(items, answers, paraphrases or [None] * number, perturbed or [()] * number, **others)


def random_readout(seed, number, **others):
    """Items with a paraphrase and three wrong answers."""
    random = np.random.default_rng(seed)
    own, paraphrases = ([drawn(random) for _ in range(number)] for _ in range(2))
    perturbed = [[drawn(random) for _ in range(3)] for _ in range(number)]
    return readout(own, paraphrases=paraphrases, perturbed=perturbed, **others)


def subject(retrained=None, **sets):
    return Subject("result", sets, retrained=retrained)


def figure(name, said, of="forget"):
    """The measure of a readout that stands in the set, or of a Subject."""
    return MEASURES[name](said if isinstance(said, Subject) else subject(**{of: said}), of)
