"""Full-parameter training of any model, and plain fine-tuning by it: the RTT attack, teaching."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tqdm import tqdm

from kunbr_fast.data import Sample, pack
from kunbr_fast.data.schedule import Schedule
from kunbr_fast.model.decoder import Decoder
from kunbr_fast.model.frozen import frozen
from kunbr_fast.objectives.batch import StepBatch
from kunbr_fast.objectives.original import Parts
from kunbr_fast.parallel.sharded import shards_of
from kunbr_fast.training.full import FullTraining
from kunbr_fast.training.sharded import ShardedTraining
from kunbr_fast.training.streamed_full import StreamedFullTraining
from kunbr_fast.training.training import Training


def full_training(decoder: Decoder, *args: Any, **how: Any) -> FullTraining:
    """`FullTraining` of the decoder's model; of a streamed one, which must be `writable`, a `StreamedFullTraining`; of
    one that is in parts (`sharded`) a `ShardedTraining`, by all its ranks."""
    kind = FullTraining if shards_of(decoder.model) is None else ShardedTraining
    return (StreamedFullTraining if decoder.streamed else kind)(decoder, *args, **how)


def train_all(
    decoder: Decoder,
    samples: Sequence[Sample],
    *,
    epochs: int,
    batch_size: int,
    seed: int = 0,
    on_epoch: Callable[[int], None] | None = None,
    on_step: Callable[[dict], None] | None = None,
    progress: str | None = None,
    **settings: Any,
) -> None:
    """Plain fine-tuning of all parameters in place: `fine_tune`. settings: fields of `FullSettings` and `Execution`."""
    how = dict(epochs=epochs, batch_size=batch_size, seed=seed, on_epoch=on_epoch, on_step=on_step, progress=progress)
    with frozen(decoder.model):
        fine_tune(full_training(decoder, **settings), samples, **how)


def fine_tune(
    training: Training,
    samples: Sequence[Sample],
    *,
    epochs: int,
    batch_size: int,
    seed: int = 0,
    on_epoch: Callable[[int], None] | None = None,
    on_step: Callable[[dict], None] | None = None,
    progress: str | None = None,
) -> None:
    """Minimises the mean over samples of each one's mean NLL.

    on_epoch(n) is called after epoch n = 1, 2, ... and may evaluate the model. Raises `Diverged`, also where the last
    update has destroyed the weights.
    """
    decoder = training.decoder
    schedule = Schedule(len(samples), 0, batch_size, 1, epochs, seed)
    for step in tqdm(range(len(schedule)), desc=progress, unit="step", leave=False, disable=progress is None):
        indices, _ = schedule[step]
        packed = pack([samples[i] for i in indices]).to(decoder.device)
        metrics = training.step_packed(StepBatch(packed, Parts.of(retain=len(indices))))
        if on_step is not None:
            on_step(metrics)
        if (step + 1) % schedule.steps_per_epoch == 0:
            training.check() if step + 1 == len(schedule) else training.check_update()
            if on_epoch is not None:
                with torch.no_grad():
                    on_epoch((step + 1) // schedule.steps_per_epoch)
