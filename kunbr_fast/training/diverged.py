"""What training raises where it goes to NaN, infinity or beyond a limit."""

from __future__ import annotations

from collections.abc import Container, Mapping

UPDATE = "its update left weights or optimiser state that are not finite"
LOSS = "after its update the loss or a gradient is not finite"
# What else helps where the objective has gone too far: by the setting that is changed, as `KUnBRConfig` names them.
ASCENT = {
    "retain_coeff": "raise retain_coeff",
    "forget_loss_cap": "set forget_loss_cap (for example 10)",
    "epochs": "train fewer epochs",
    "objective": "take another objective",
}


class Diverged(RuntimeError):
    """Training went to NaN, infinity, or a retain loss beyond its limit.

    where: the stage and the step. Where a loss or a gradient is not finite, the weights are those before that step's
    update; where cause is `UPDATE` or `LOSS`, that update has destroyed them.
    cures: what helps, by the setting that is changed. resume: what a resumed run would do, a sentence; "" where none
    can.
    """

    def __init__(
        self,
        where: str,
        metrics: Mapping[str, float | None],
        cause: str = "",
        cures: Mapping[str, str] | None = None,
    ):
        self.where, self.metrics, self.resume = where, dict(metrics), ""
        self.cures = dict({"lr": "lower the learning rate"} | ASCENT if cures is None else cures)
        self._locked: list[str] | None = None
        shown = ", ".join(f"{k} {v:.4g}" for k, v in metrics.items() if isinstance(v, float))
        super().__init__(f"diverged at {where}" + f" ({shown})" * bool(shown) + f": {cause}" * bool(cause))

    def resumable(self, sentence: str, locked: Container[str]) -> None:
        """What a resumed run would do, and the settings of `cures` that it would refuse to have changed."""
        self.resume, self._locked = sentence, [name for name in self.cures if name in locked]

    def __str__(self) -> str:
        free = [cure for name, cure in self.cures.items() if name not in (self._locked or ())]
        locked = [self.cures[name] for name in self._locked or ()]
        if not locked:
            return f"{self.args[0]}. To cure it {_either(free)}"
        new = f"in a new run (another output directory) {_either(locked)}"
        if not free:
            return f"{self.args[0]}. Nothing that a resumed run may change cures it: {new}"
        return f"{self.args[0]}. To cure it {_either(free)}, on resuming too; or {new}"


def _either(cures: list[str]) -> str:
    return ", ".join(cures[:-1]) + " or " * (len(cures) > 1) + cures[-1]
