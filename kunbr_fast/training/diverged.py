"""What training raises where it goes to NaN, infinity or beyond a limit."""

from __future__ import annotations

from collections.abc import Mapping

UPDATE = "its update left weights or optimiser state that are not finite"
LOSS = "after its update the loss or a gradient is not finite"


class Diverged(RuntimeError):
    """Training went to NaN, infinity, or a retain loss beyond its limit.

    where: the stage and the step. Where a loss or a gradient is not finite, the weights are those before that step's
    update; where cause is `UPDATE` or `LOSS`, that update has destroyed them.
    lower: the setting that is to be lowered. resume: what a resumed run would do, a sentence; "" where none can.
    """

    def __init__(
        self, where: str, metrics: Mapping[str, float | None], cause: str = "", lower: str = "the learning rate"
    ):
        self.where, self.metrics, self.resume = where, dict(metrics), ""
        shown = ", ".join(f"{k} {v:.4g}" for k, v in metrics.items() if isinstance(v, float))
        said = f"diverged at {where}" + f" ({shown})" * bool(shown) + f": {cause}" * bool(cause)
        super().__init__(
            f"{said}. Gradient ascent has no lower bound: lower {lower}, raise retain_coeff, set forget_loss_cap (for "
            "example 10), train fewer epochs, or take another objective"
        )
