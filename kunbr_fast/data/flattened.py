"""Rows of a batch that hold several samples end to end, without padding between them: taken apart exactly.

What tells where a sample ends, each as transformers and its neighbours write it:

    position_ids                    0 1 2 0 1 0 1 2   they begin again with each sample (DataCollatorWithFlattening)
    attention_mask                  1 1 1 2 2 3 3 3   the samples' numbers, 0 is padding (multipack)
    seq_idx                         0 0 0 1 1 2 2 2   the samples' numbers
    cu_seq_lens_q, cu_seq_lens_k    0 3 5 8           where they begin, and the end; of a batch of one row

Where a batch has several of these they must say the same. position_ids that only count a row's tokens are taken too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from kunbr_fast.files.shown import shown

OFFSETS = ("cu_seq_lens_q", "cu_seq_lens_k")
LONGEST = ("max_length_q", "max_length_k")
KEYS = ("position_ids", "seq_idx", *OFFSETS, *LONGEST)


def tensor_of(item: Mapping[str, Any], key: str, where: str, expected: str = "integers of 64 bits") -> torch.Tensor:
    """What a sample or batch holds under `key`, as a dense tensor."""
    value = item[key]
    try:
        if isinstance(value, (list, tuple)) and value and all(map(torch.is_tensor, value)):
            value = torch.stack(list(value))
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:  # ragged, text, None, or an integer of more than 64 bits
        raise ValueError(f"{where}: {_ragged(value, key) or f'{key}={shown(value)}: expected {expected}'}") from error
    if tensor.is_nested or tensor.layout is not torch.strided:
        raise ValueError(f"{where}: {key} is nested or sparse: give a dense tensor, or samples of their own")
    if tensor.is_meta:
        raise ValueError(f"{where}: {key} is on the meta device, which holds no values: give it on the host")
    return tensor


def integers(item: Mapping[str, Any], key: str, where: str) -> torch.Tensor:
    """`tensor_of` integers."""
    tensor = tensor_of(item, key, where)
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise ValueError(f"{where}: {key} of {str(tensor.dtype)[6:]}: expected integers")
    return tensor.long()


def _ragged(value: Any, key: str) -> str | None:
    """Which row is of another length than the first."""
    rows = value if isinstance(value, (list, tuple)) else ()
    lengths = [len(row) for row in rows if hasattr(row, "__len__") and not isinstance(row, (str, Mapping))]
    if len(lengths) < len(rows) or len(set(lengths)) < 2:
        return None
    other = next(i for i, length in enumerate(lengths) if length != lengths[0])
    return (
        f"row {other} of {key} has {lengths[other]} tokens, row 0 has {lengths[0]}: pad them (tokenizer.pad, with an "
        "attention_mask), or give each as a sample of its own"
    )


def pieces(
    item: Mapping[str, Any], mask: torch.Tensor | None, labels: torch.Tensor, ids: torch.Tensor, where: str
) -> list[tuple[int, slice]]:
    """The samples of a (B, T) batch: each one's row and tokens. mask: the attention mask, or None where there is none.

    ValueError, beginning with `where`, where what tells them apart is none of the above, or contradicts another.
    """
    rows, length = ids.shape
    spans = [slice(0, length)] * rows if mask is None else [_unpadded(row, where) for row in mask]
    told = {}
    if mask is not None and bool((mask > 1).any()):
        told["attention_mask"] = [_numbered(row[span], where) for row, span in zip(mask, spans)]
    if item.get("position_ids") is not None:
        positions = _like(item, "position_ids", ids, where)
        told["position_ids"] = [_restarts(row[span], span.start, where) for row, span in zip(positions, spans)]
    if item.get("seq_idx") is not None:
        told["seq_idx"] = [_changes(row[s], where) for row, s in zip(_like(item, "seq_idx", ids, where), spans)]
    told |= {key: _offsets(item, key, spans, where) for key in OFFSETS if item.get(key) is not None}
    first = next(iter(told), None)
    for key in told:
        if told[key] != told[first]:
            raise ValueError(f"{where}: {first} and {key} do not tell the same samples apart: give the right one alone")
    found = []
    for row, span in enumerate(spans):
        starts = [span.start, *(span.start + start for start in told[first][row])] if told else [span.start]
        cut = [slice(start, stop) for start, stop in zip(starts, [*starts[1:], span.stop])]
        found += [(row, piece) for piece in _without_padding(cut, ids[row], labels[row])]
    longest = max((piece.stop - piece.start for _, piece in found), default=0)
    for key in LONGEST:
        if item.get(key) is not None and bool((integers(item, key, where) < longest).any()):
            raise ValueError(
                f"{where}: {key}={shown(item[key])}, but a sample has {longest} tokens: give position_ids or "
                f"{OFFSETS[0]} that tell the samples apart"
            )
    return found


def _unpadded(mask: torch.Tensor, where: str) -> slice:
    kept = torch.nonzero(mask).flatten()
    if len(kept) == 0 or int(kept[-1] - kept[0]) + 1 != len(kept):
        raise ValueError(f"{where}: its attention mask is empty or has a hole, which packing cannot keep")
    return slice(int(kept[0]), int(kept[-1]) + 1)


def _like(item: Mapping[str, Any], key: str, ids: torch.Tensor, where: str) -> torch.Tensor:
    """A (B, T) tensor of integers, which may be given for all rows at once."""
    found = integers(item, key, where)
    if found.shape not in (ids.shape, (1, ids.shape[1]), ids.shape[1:]):
        raise ValueError(f"{where}: {key} {tuple(found.shape)} and input_ids {tuple(ids.shape)} differ")
    return found.expand(ids.shape)


def _numbered(numbers: torch.Tensor, where: str) -> list[int]:
    steps = numbers.diff()
    if int(numbers[0]) != 1 or bool(((steps != 0) & (steps != 1)).any()):
        raise ValueError(
            f"{where}: its attention mask {_few(numbers)} has other values than 0 and 1, and does not number samples "
            "end to end (1, 1, 2, 2, 2, 3): give 1 for a token and 0 for padding"
        )
    return _places(steps != 0)


def _restarts(positions: torch.Tensor, start: int, where: str) -> list[int]:
    again = positions.diff() != 1
    begins = torch.cat([positions[:1], positions[1:][again]])
    if bool((begins != 0).any()) and (len(begins) > 1 or int(begins[0]) != start):
        raise ValueError(
            f"{where}: position_ids {_few(positions)} neither count the tokens from 0 nor begin at 0 with each sample: "
            "leave them out where a row is one sample, else give samples of their own"
        )
    return _places(again)


def _changes(numbers: torch.Tensor, where: str) -> list[int]:
    if bool((numbers.diff() < 0).any()):
        raise ValueError(f"{where}: seq_idx {_few(numbers)} goes back: expected the samples' numbers (0, 0, 1, 1, 2)")
    return _places(numbers.diff() != 0)


def _offsets(item: Mapping[str, Any], key: str, spans: list[slice], where: str) -> list[list[int]]:
    offsets = integers(item, key, where).flatten()
    length = spans[0].stop - spans[0].start
    good = len(spans) == 1 and len(offsets) > 1 and int(offsets[0]) == 0 and int(offsets[-1]) == length
    if not good or bool((offsets.diff() <= 0).any()):
        raise ValueError(
            f"{where}: {key} {_few(offsets)} does not divide one row of {length} tokens (of {len(spans)} rows): "
            "expected 0, where each sample but the first begins, and the row's length"
        )
    return [offsets[1:-1].tolist()]


def _without_padding(cut: list[slice], ids: torch.Tensor, labels: torch.Tensor) -> list[slice]:
    """Without the padding at the end of a flattened row (to a multiple of 8, say): the same token again and again, each
    a sample of its own, none with a label."""
    end = len(cut)
    while (
        end > 1
        and cut[end - 1].stop - cut[end - 1].start == 1
        and int(labels[cut[end - 1].start]) == -100
        and int(ids[cut[end - 1].start]) == int(ids[-1])
    ):
        end -= 1
    return cut[:end]


def _places(starts: torch.Tensor) -> list[int]:
    """Where samples begin, but for the first."""
    return (torch.nonzero(starts).flatten() + 1).tolist()


def _few(values: torch.Tensor) -> str:
    return shown(values[:12].tolist(), 60)
