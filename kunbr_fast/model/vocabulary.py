"""Whether tokens are those of a model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from kunbr_fast.data import PackedBatch, Sample


def check_tokens(model: nn.Module, samples: Sequence[Sample], names: Iterable[str]) -> None:
    """ValueError that names the first sample with a token, or a label, that the model has no embedding for."""
    names = list(names)
    check_vocabulary(model, (sample["input_ids"] for sample in samples), names)
    check_vocabulary(model, (sample["labels"].clamp(min=0) for sample in samples), names, "label")


def check_batch(model: nn.Module, batch: PackedBatch) -> None:
    """`check_tokens` of a batch, at one look where all is well."""
    rows, host = model.get_input_embeddings().weight.shape[0], batch.host
    if int(host.input_ids.min()) >= 0 and int(torch.maximum(host.input_ids, host.labels).max()) < rows:
        return
    parts = zip(host.input_ids.split(host.lengths), host.labels.split(host.lengths))
    samples = [{"input_ids": ids, "labels": labels} for ids, labels in parts]
    check_tokens(model, samples, [f"sample {i} of the batch" for i in range(len(samples))])


def check_vocabulary(model: nn.Module, ids: Iterable[torch.Tensor], names: Iterable[str], what: str = "token") -> None:
    """ValueError that names the first of `ids` with a token id that has no embedding."""
    rows = model.get_input_embeddings().weight.shape[0]
    for tensor, name in zip(ids, names):
        low, high = (int(value) for value in tensor.aminmax()) if tensor.numel() else (0, 0)
        if low < 0 or high >= rows:
            raise ValueError(
                f"{name}: {what} id {low if low < 0 else high}, but the model embeds {rows}: tokenizer and model "
                "do not belong together"
            )
