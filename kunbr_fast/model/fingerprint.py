"""What tells one model, tokenizer and data from another, so that a run goes on with what it was begun with.

Of a model every bit of its weights counts, and of its configuration what its results depend on. The weights are read
once, for this and for the check that they are finite. XXH3 (128 bits) is fast enough for that, and sees any change that
comes about by itself; it is no protection against someone who searches for two models with the same digest.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import xxhash
from torch import nn

from kunbr_fast.data import is_record
from kunbr_fast.data.content import EQUAL
from kunbr_fast.files.digests import add_json, tokenizer_fingerprint, without
from kunbr_fast.files.model_config import NOT_COUNTED
from kunbr_fast.model.weights import finite, not_finite, weights_of

CHUNK = 1 << 18  # entries of a tensor that are checked and hashed at a time: they stay in the cache of a core
COPIED = 1 << 25  # of one on a device, that are copied at a time
UNREAD = ("_where", EQUAL)  # of a record


def model_fingerprint(model: nn.Module | Mapping[str, torch.Tensor], whose: str = "") -> str:
    """A digest of all weights, saved buffers and the configuration of a model, in memory or streamed.

    ValueError with the name of the first weight that holds NaN or infinity; `whose` goes before it.
    """
    digest = xxhash.xxh3_128()
    if not isinstance(model, nn.Module):
        _add_tensors(digest, ((name, model[name]) for name in model), whose)
        return digest.hexdigest()
    weights = weights_of(model)
    _add_tensors(digest, ((name, weights[name]) for name in weights), whose, model)
    _add_tensors(digest, _saved_buffers(model), whose, model, infinite=True)
    config = getattr(model, "config", None)
    values = config.to_dict() if hasattr(config, "to_dict") else {}
    add_json(digest, [type(model).__name__, without(values, NOT_COUNTED)])
    return digest.hexdigest()


def data_fingerprint(parts: Iterable[Sequence[Mapping[str, Any]]]) -> str:
    """A digest of tokens and labels of samples, and of records, but not of where they lie."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{len(part)} entries".encode())
        for entry in part:
            if not is_record(entry):
                for key in ("input_ids", "labels"):
                    digest.update(entry[key].cpu().numpy().tobytes())
            else:
                digest.update(json.dumps({k: v for k, v in entry.items() if k not in UNREAD}).encode())
    return digest.hexdigest()


def fingerprint(model: str | nn.Module, *parts: Sequence[Mapping[str, Any]], tokenizer: Any = None) -> str:
    """Tells one run from another. model: the model, or its `model_fingerprint`."""
    model = model if isinstance(model, str) else model_fingerprint(model)
    return f"{model}-{tokenizer_fingerprint(tokenizer)}-{data_fingerprint(parts)}"


def _saved_buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield f"{path}.{name}", buffer


@torch.no_grad()
def _add_tensors(
    digest: Any,
    tensors: Iterable[tuple[str, torch.Tensor]],
    whose: str,
    model: nn.Module | None = None,
    infinite: bool = False,
) -> None:
    """whose, model: as of `not_finite`. infinite: values may be (Gemma-4 has bounds in buffers), but not NaN."""
    for name, tensor in tensors:
        tensor = tensor.detach()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        on_device = tensor.device.type != "cpu"
        if on_device and tensor.is_floating_point() and not finite(tensor):  # where it is: faster than here
            if not infinite or bool(tensor.isnan().any()):
                raise not_finite(name, tensor, whose, model)
        for part in tensor.contiguous().flatten().split(COPIED if on_device else CHUNK):
            if not on_device and not _is_finite(part, infinite):
                raise not_finite(name, tensor, whose, model)
            digest.update(part.cpu().view(torch.uint8).numpy())


def _is_finite(part: torch.Tensor, infinite: bool) -> bool:
    if not part.numel() or not part.is_floating_point():
        return True
    low, high = part.aminmax()  # NaN if there is one; four times faster than isfinite
    return not math.isnan(low) if infinite else math.isfinite(low) and math.isfinite(high)
