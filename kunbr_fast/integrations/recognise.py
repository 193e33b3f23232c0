"""A loss function that is a weighted sum of token losses, recognised by its gradient."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from kunbr_fast.data import IGNORE, PackedBatch, Sample
from kunbr_fast.integrations.padded_pass import forwards
from kunbr_fast.model.decoder import Decoder


@dataclasses.dataclass(frozen=True)
class TokenSum:
    """A loss on a padded grid that is a sum over rows of weight * NLL.

    inputs: of the model's call, by name. live (B, L) bool: the rows with a weight; targets (B, L), weights (B, L).
    """

    inputs: dict[str, Any]
    live: torch.Tensor
    targets: torch.Tensor
    weights: torch.Tensor

    def samples(self, decoder: Decoder) -> tuple[list[Sample], torch.Tensor] | None:
        """Each line of the padded grid with a loss as a sample, and the (R,) weights in the order of their packed
        batch's rows; None where a place in the padding has a weight, or its position counts.

        A target is the label of the token after its row, which need not be that token; one after the last token brings
        a token of its own."""
        ids, mask, positions = _inputs((), self.inputs)
        samples, kept = [], []
        ids, mask, live, targets = ids.cpu(), mask.cpu(), self.live.cpu(), self.targets.cpu()
        positions = torch.arange(ids.shape[1]).expand_as(ids) if positions is None else positions.cpu()
        for row in range(len(ids)):
            if not bool(live[row].any()):
                continue
            if bool((live[row] & ~mask[row]).any()):
                return None
            real = torch.nonzero(mask[row]).flatten()
            first, stop = int(real[0]), int(real[-1]) + 1
            place = positions[row, first:stop]
            if stop - first != len(real) or bool((place.diff() != 1).any()):
                return None
            if int(place[0]) and not positions_are_relative(decoder):
                return None
            own, counts = ids[row, first:stop], live[row, first:stop]
            labels = torch.cat([torch.tensor([IGNORE]), torch.where(counts, targets[row, first:stop], IGNORE)])
            own = torch.cat([own, labels[-1:]])
            length = len(own) if bool(counts[-1]) else len(own) - 1
            samples.append({"input_ids": own[:length], "labels": labels[:length]})
            kept.append(self.weights[row][self.live[row]])
        return samples, torch.cat(kept)


def recognise(decoder: Decoder, get_loss: Callable[[nn.Module], torch.Tensor]) -> TokenSum | None:
    """`get_loss(model)` as a sum over rows of weight * NLL; None where it is anything else.

    The model runs without its layers, and its head gives made-up logits z (B, L, V). At z = 0 the gradient of such a
    sum is weight * (1/V - onehot(target)) in each row, which tells weights and targets. At a second z, with likely and
    unlikely targets, the sum and the loss must have the same value; so a loss that is bent (NPO), capped or smoothed is
    told apart.
    """
    head, calls, points = decoder.head, [], []
    wide = torch.promote_types(decoder.dtype, torch.float32)
    size = head.linear.out_features

    def value(point: torch.Tensor | None = None) -> torch.Tensor | None:
        def logits(hidden: torch.Tensor, *args: Any) -> torch.Tensor:
            shape = (*hidden.shape[:-1], size)
            leaf = hidden.new_zeros(shape, dtype=wide) if point is None or point.shape != shape else point
            points.append(leaf.detach().requires_grad_())
            return points[-1].clone()  # the loss may write into it

        calls.clear()
        points.clear()
        seen = decoder.model.register_forward_pre_hook(
            lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
        )
        skipped = forwards(decoder.layers, lambda *_: lambda hidden, *args, **kwargs: hidden)
        with seen, skipped, forwards([head.linear], lambda *_: logits), torch.enable_grad():
            loss = get_loss(decoder.model)
        good = isinstance(loss, torch.Tensor) and loss.numel() == 1 and loss.requires_grad
        return loss.sum() if good and len(calls) == len(points) == 1 else None

    loss = value()
    inputs = _inputs(*calls[0]) if loss is not None else None
    if inputs is None or points[0].shape[:2] != inputs[0].shape:
        return None
    (gradient,) = torch.autograd.grad(loss, points.pop(), allow_unused=True)
    if gradient is None:
        return None
    loss = loss.detach()  # its graph holds as much as z
    tolerance = torch.finfo(torch.float32).eps ** 0.5  # transformers' own losses are fp32 for any model
    scale, norm = head.scale, gradient.norm()
    (high, highest), (low, lowest) = gradient.max(-1, keepdim=True), gradient.min(-1, keepdim=True)
    targets = torch.where(high > -low, highest, lowest)
    weights = gradient.gather(-1, targets) / (scale * (1 / size - 1))  # (B, L, 1)
    gradient -= scale * weights / size
    gradient.scatter_add_(-1, targets, scale * weights)
    live = weights[..., 0] != 0
    total = weights.abs().sum() * math.log(size)
    if (
        not bool(live.any())
        or not bool(gradient.norm() <= tolerance * norm)
        or not bool((loss - weights.sum() * math.log(size)).abs() <= tolerance * total)
    ):
        return None
    generator = torch.Generator(gradient.device).manual_seed(0)
    point = gradient.normal_(0, 10, generator=generator)
    point[:, ::2].scatter_add_(-1, targets[:, ::2], torch.full_like(targets[:, ::2], 50, dtype=wide))
    second = value(point)
    if second is None or not torch.equal(_inputs(*calls[0])[0], inputs[0]):
        return None
    z = point[live] * scale
    z = z if head.softcap is None else torch.tanh(z / head.softcap) * head.softcap
    nll = torch.nn.functional.cross_entropy(z, targets[live][:, 0], reduction="none")
    terms = weights[live][:, 0] * nll
    if not bool((second.detach() - terms.sum()).abs() <= tolerance * terms.abs().sum()):
        return None
    args, kwargs = calls[0]
    given = {**kwargs, **({"input_ids": args[0]} if args else {})}
    return TokenSum({k: v for k, v in given.items() if k != "labels"}, live, targets[..., 0], weights[..., 0])


def _inputs(args: tuple, kwargs: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None:
    """input_ids, attention mask and position_ids (B, L) of a call of the model; None for a call of another kind."""
    given = {name: x for name, x in kwargs.items() if isinstance(x, torch.Tensor)}
    if len(args) == 1:
        given["input_ids"] = args[0]
    if (
        len(args) > 1
        or "input_ids" not in given
        or given.keys() - {"input_ids", "attention_mask", "position_ids", "labels"}
    ):
        return None
    if kwargs.get("past_key_values") is not None:
        return None
    ids, mask, positions = (given.get(name) for name in ("input_ids", "attention_mask", "position_ids"))
    mask = torch.ones_like(ids) if mask is None else mask
    if bool(((mask != 0) & (mask != 1)).any()):  # numbers of samples, say, which models read in their own ways
        return None
    good = all(x is None or x.shape == ids.shape for x in (mask, positions)) and ids.dim() == 2
    return (ids, mask.bool(), positions) if good else None


@torch.no_grad()
def positions_are_relative(decoder: Decoder) -> bool:
    """Whether nothing but differences of positions counts: a model that adds positions to its embeddings says no."""
    if decoder.way.name != "packed":  # its own forward makes the positions
        return False
    first = decoder.probe
    other = PackedBatch(first.input_ids, first.labels, first.position_ids + 8, first.lengths)
    return torch.equal(decoder.embed(first), decoder.embed(other))
