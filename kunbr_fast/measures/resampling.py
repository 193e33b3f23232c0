"""Standard errors by the bootstrap: of any statistic, over the questions that it was measured on.

Source: Efron, "Bootstrap Methods: Another Look at the Jackknife", Annals of Statistics 7, 1979.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

ROUNDS, SEED = 1000, 0


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
    draws = [random.integers(0, len(array), (rounds, len(array))) for array in arrays]
    if statistic is mean:
        return float(arrays[0][draws[0]].mean(axis=1).std(ddof=1))
    found = [statistic(*(array[draw[i]] for array, draw in zip(arrays, draws))) for i in range(rounds)]
    with np.errstate(over="ignore", invalid="ignore"):
        error = float(np.std(found, ddof=1))
    return error if math.isfinite(error) else None


def mean(values: Sequence[float]) -> float:
    return float(np.mean(values))
