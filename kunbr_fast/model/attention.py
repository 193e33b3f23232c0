"""Causal attention over packed samples, for transformers' attention interface."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from kunbr_fast.data import PackedBatch
from kunbr_fast.model import compat
from kunbr_fast.model.gather import take, to_places
from kunbr_fast.values import least

ATTENTION = "kunbr_packed"
MASKS = "kunbr_masks"  # under which a model is asked for its masks, and never run


class _Here(NamedTuple):
    batch: PackedBatch
    window: int | None


# What runs now. Not a layer's keyword argument: some layers do not hand theirs on.
_here: contextvars.ContextVar[_Here | None] = contextvars.ContextVar("kunbr_batch", default=None)


@contextlib.contextmanager
def of(batch: PackedBatch, window: int | None = None) -> Iterator[None]:
    """Inside, `packed_attention` is of this batch. window: the sliding window of the layer's mask, which is not made
    here."""
    token = _here.set(_Here(batch, window))
    try:
        yield
    finally:
        _here.reset(token)


@contextlib.contextmanager
def named(config: Any, name: str) -> Iterator[None]:
    """Inside, the model's configuration names this attention."""
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    kunbr_rows: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention within each sample of the batch that `of` names. query (1, Hq, T, d), key and value (1, Hkv, T, d) ->
    (1, T, Hq, d).

    kunbr_rows: the batch's labelled rows; queries are of these alone then: (1, Hq, R, d) -> (1, R, Hq, d).
    options: of the interface, `scaling`, `dropout` (which must be 0), `sliding_window`, `softcap`, and `s_aux` (Hq,), a
    sink: one more score of each query, whose share of the softmax goes nowhere.

    The samples are laid out right-padded, (B, Hq, Lmax, d). Padded keys lie to the right of real queries, so causality
    masks them; padded queries are dropped on the way back.
    """
    here = _here.get()
    if here is None:
        raise ValueError(f"{type(module).__name__} ran with attention of packed samples, and no batch: use a Decoder")
    if dropout := options.get("dropout", 0.0):
        raise ValueError(f"attention dropout of {dropout} is active: call model.eval() first")
    batch, longest = here.batch, max(here.batch.lengths)
    softcap, sink = options.get("softcap"), options.get("s_aux")
    plain = softcap is None and sink is None
    window = least(options.get("sliding_window"), here.window)

    place = torch.arange(longest, device=query.device)
    queries = place[None]  # positions within their samples, (1 or B, Lmax or Rmax)
    if kunbr_rows is None:
        index, back = batch.pad_index, None if batch.pad_index is None else batch.unpad_index
    else:
        index, back, queries = batch.row_grid
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, heads, d)
    keys = batch.pad_index, None if batch.pad_index is None else batch.unpad_index
    grids = to_places((query, index, back), (key, *keys), (value, *keys))
    query, key, value = (x.unflatten(0, (batch.num_samples, -1)).transpose(1, 2) for x in grids)
    allowed = None  # (1 or B, 1, queries, keys); None: all that causality allows
    narrow = window is not None and longest > window
    if batch.ends is not None:
        allowed = _in_trees(batch, window if narrow else None)
    elif narrow or kunbr_rows is not None or not plain:
        distance = (queries[:, :, None] - place)[:, None]
        allowed = distance >= 0
        if narrow:
            allowed &= distance < window
    groups, scaling = query.shape[1] // key.shape[1], options.get("scaling")
    if plain:
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=allowed, is_causal=allowed is None, scale=scaling, enable_gqa=groups != 1
        )
    else:  # SDPA has neither: the plain formula, softmax in fp32 as the models' own code has it
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        scores = query @ key.transpose(2, 3) * scale
        scores = scores if softcap is None else torch.tanh(scores / softcap) * softcap
        scores = scores.masked_fill(~allowed, float("-inf"))
        if sink is None:
            share = _softmax(scores, batch.lengths, kunbr_rows is None)
        else:
            further = sink.view(1, -1, 1, 1).to(scores.dtype).expand(*scores.shape[:3], 1)
            wide = torch.promote_types(scores.dtype, torch.float32)
            share = torch.cat([scores, further], -1).softmax(-1, dtype=wide)[..., :-1]
        out = share.to(query.dtype) @ value
    out = out.transpose(1, 2).flatten(0, 1)  # (B * Lmax, Hq, d)
    if back is not None:
        out = take(out, back)
    return out[None], None


def _in_trees(batch: PackedBatch, window: int | None) -> torch.Tensor:
    """(B, 1, Lmax, Lmax), which keys a query sees where samples are trees: those between it and the root. Tokens stand
    in depth-first order, so a token's descendants are those from its own place to its end."""
    ends, depths = (
        (x if batch.pad_index is None else x[batch.pad_index]).view(batch.num_samples, 1, -1)
        for x in (batch.ends, batch.position_ids)
    )
    place = torch.arange(ends.shape[-1], device=ends.device)
    allowed = (place[:, None] >= place) & (place[:, None] <= ends)
    if window is not None:
        allowed &= depths.mT - depths < window
    return allowed[:, None]


def _softmax(scores: torch.Tensor, lengths: list[int], square: bool) -> torch.Tensor:
    """(B, H, queries, keys) in fp32; square: the queries are the samples' tokens, as the keys are.

    Of an fp64 model each sample by itself: the order of an fp32 sum depends on how many keys there are, so a sample's
    result would depend on the longest one of its batch, by more than fp64 rounds.
    """
    if scores.dtype != torch.float64 or len(lengths) == 1:
        return scores.softmax(-1, dtype=torch.float32)
    queries, keys = scores.shape[-2:]
    found = []
    for part, n in zip(scores, lengths):
        rows = n if square else queries  # a padded query may have no key of its sample
        own = part[:, :rows, :n].softmax(-1, dtype=torch.float32)
        found.append(F.pad(own, (0, keys - n, 0, queries - rows)))
    return torch.stack(found)


def register() -> None:
    """Makes `packed_attention` known to transformers, as ATTENTION; ValueError where that cannot be."""
    if compat.AttentionInterface is None:
        raise ValueError(
            f"transformers {compat.VERSION} lets no attention function be named in a model's configuration, so it "
            f"cannot run packed samples: install transformers >= {compat.PACKED_SINCE}, better >= 5"
        )
    compat.AttentionInterface.register(ATTENTION, packed_attention)
    if compat.AttentionMaskInterface is not None:
        compat.AttentionMaskInterface.register(MASKS, _window_as_mask)


def _window_as_mask(*args: Any, local_size: int | None = None, **kwargs: Any) -> torch.Tensor | None:
    return None if local_size is None else torch.full((1, 1, 1, 1), local_size)


def window_of(values: Iterable[Any]) -> int | None:
    """The window that `_window_as_mask` has put in place of a mask, among the arguments of a layer."""
    found = (x for x in values if isinstance(x, torch.Tensor) and x.shape == (1, 1, 1, 1) and x.dtype == torch.int64)
    return next(map(int, found), None)


def check_places(config: Any, batch: PackedBatch, name: str) -> None:
    """ValueError where the model would take places in the batch for places in a sample: Llama 4 scales its attention
    by them, from some place on, in layers without RoPE."""
    first = config.floor_scale if getattr(config, "attn_temperature_tuning", False) else None
    apart = batch.num_samples > 1 or batch.ends is not None
    if first is not None and apart and batch.num_tokens >= first:
        raise ValueError(
            f"{batch.num_samples} samples or trees of {batch.num_tokens} tokens in one batch: from {first} tokens on "
            f"{name} scales its attention by a token's place in the batch; make batches smaller"
        )
