"""What stands in the loop of Trainer for a wrapped model and for batches; callbacks that lead it through the stages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback


class AsItIs(nn.Module):
    """Makes Trainer believe that the model is already wrapped, so that it skips DDP."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.module = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing, as in `StageOptimizer`."""


class First(TrainerCallback):
    """The first of the callbacks, so that all others see how many steps there are, and at the end the result."""

    def __init__(self, begin: Callable[[Any], None], end: Callable[[], None]):
        self._begin, self._end = begin, end

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begin(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._end()


class Last(TrainerCallback):
    """The last of the callbacks, while it trains: who stops between two micro-batches does so after their step."""

    _stop = False

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._stop |= control.should_training_stop
        control.should_training_stop = control.should_epoch_stop = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= self._stop
        self._stop = False


class Epoch(torch.utils.data.Dataset):
    """Each micro-batch's number in its epoch; which samples that means is the schedule's business."""

    def __init__(self, num_samples: int):
        self.num_samples = num_samples

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, number: int) -> dict[str, int]:
        return {"number": number}
