"""What training raises where it goes to NaN, infinity or beyond a limit."""

from __future__ import annotations

from collections.abc import Mapping


class Diverged(RuntimeError):
    """Training went to NaN, infinity, or a retain loss beyond its limit; the weights are those before the bad step."""

    def __init__(self, where: str, metrics: Mapping[str, float | None]):
        self.where, self.metrics = where, dict(metrics)
        shown = ", ".join(f"{k} {v:.4g}" for k, v in metrics.items() if isinstance(v, float))
        super().__init__(
            f"diverged at {where} ({shown}). Gradient ascent has no lower bound: lower the learning rate, raise "
            "retain_coeff, set forget_loss_cap (for example 10), train fewer epochs, or take another objective"
        )
