"""Standard errors by the bootstrap: of any statistic, over the questions that it was measured on.

Source: Efron, "Bootstrap Methods: Another Look at the Jackknife", Annals of Statistics 7, 1979.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

ROUNDS, SEED = 1000, 0
_AT_ONCE = 1 << 20  # values that are drawn together, of a mean


def bootstrap_error(
    statistic: Callable[..., float], *samples: Sequence[float] | np.ndarray, rounds: int = ROUNDS, seed: int = SEED
) -> float | None:
    """The standard deviation of statistic(*resampled), each sample drawn anew with replacement, by itself. The same
    samples give the same figure. A sample of rows (N, M) is drawn by rows: what belongs together stays together. None
    where a sample has fewer than two values, or where what was drawn has no finite statistic or deviation."""
    arrays = [np.asarray(sample, dtype=np.float64) for sample in samples]
    if min(map(len, arrays)) < 2:
        return None
    random = np.random.default_rng(seed)
    if statistic is mean:
        found = _means(arrays[0], rounds, random)
    else:
        found = [
            statistic(*(array[random.integers(0, len(array), len(array))] for array in arrays)) for _ in range(rounds)
        ]
    with np.errstate(over="ignore", invalid="ignore"):
        error = float(np.std(found, ddof=1))
    return error if math.isfinite(error) else None


def _means(array: np.ndarray, rounds: int, random: np.random.Generator) -> np.ndarray:
    """The same draws as round by round, many at a time."""
    number = len(array)
    together = max(1, _AT_ONCE // number)
    counts = [min(together, rounds - first) for first in range(0, rounds, together)]
    return np.concatenate([array[random.integers(0, number, (count, number))].mean(axis=1) for count in counts])


def mean(values: Sequence[float]) -> float:
    return float(np.mean(values))
