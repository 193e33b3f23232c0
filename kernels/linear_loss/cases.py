"""What the proof of head and loss runs. Sizes are labelled rows; a call makes the loss and the gradients."""

from __future__ import annotations

import contextlib
import dataclasses
from unittest import mock

import torch

from ..proof.cases import EPS, Case, Kind, Shape, Stranger, Tensors
from . import op

TIMED_ROWS, TIMED_HEAD = (64, 512, 2048), (128256, 4096)  # Llama-3-8B's


@dataclasses.dataclass(frozen=True)
class Head:
    """rows of D, a vocabulary of V; what the head has, and whose gradients are asked for. chunked: in several
    chunks, as at the size of a model."""

    R: int
    D: int
    V: int
    bias: bool = False
    capped: bool = False
    scale: float = 1.0
    softcap: float | None = None
    trained: tuple[str, ...] = ("hidden",)
    chunked: bool = False


def kinds(operation: str) -> list[Kind]:
    cases = [
        _case(Head(9, 16, 63, bias=True, trained=("hidden", "weight", "bias"))),
        _case(Head(70, 136, 300)),  # a frozen head's
        # several tiles of a row and a part of one, in each dtype, as with a model's vocabulary
        _case(Head(33, 63, 9220, bias=True, capped=True, scale=0.5, softcap=20.0)),
        _case(Head(33, 64, 17384, trained=("hidden", "weight"))),
        _case(Head(130, 64, 257, bias=True, capped=True, trained=("hidden", "weight", "bias"), chunked=True)),
    ]
    return [Kind(operation, "triton", cases, [_shape(rows) for rows in TIMED_ROWS])]


def _case(head: Head) -> Case:
    def draw(dtype):
        generator = torch.Generator().manual_seed(0)

        def random(*shape):
            return torch.randn(*shape, generator=generator)

        found = {"hidden": random(head.R, head.D).to(dtype), "weight": (random(head.V, head.D) / 2).to(dtype)}
        found |= {"bias": random(head.V).to(dtype)} if head.bias else {}
        found["targets"] = torch.randint(0, head.V, (head.R,), generator=generator)
        found["row_weights"] = random(head.R)  # of both signs
        # below and above what a row's loss is, which is about log V
        cap = torch.tensor([0.5, 1.5, torch.inf]).repeat(head.R)[: head.R] * torch.tensor(float(head.V)).log()
        return found | ({"nll_cap": cap} if head.capped else {})

    has = ", ".join(name for name in ("bias", "capped", "chunked") if getattr(head, name))
    label = f"{head.R} rows, {head.V}x{head.D}, {has or 'plain'}, gradients of {' and '.join(head.trained)}"
    kept = {"nll": slice(1, None), "dhidden": slice(1, None)}
    stranger = Stranger("hidden", 0, kept)
    return Case(label, draw, lambda impl, inputs: _results(head, impl, inputs),
                lambda inputs, truth: floors(head, inputs, truth), stranger=stranger)  # fmt: skip


def _results(head: Head, impl: str, inputs: Tensors) -> Tensors:
    given = {name: inputs[name].detach().requires_grad_(name in head.trained) for name in ("hidden", "weight")}
    bias = inputs["bias"].detach().requires_grad_("bias" in head.trained) if head.bias else None
    wanted = [t for t in (*given.values(), bias) if t is not None and t.requires_grad]
    with _small_chunks() if head.chunked and impl == "triton" else contextlib.nullcontext():
        loss, nll = op.linear_loss(
            *(*given.values(), bias, inputs["targets"], inputs["row_weights"], inputs.get("nll_cap")),
            op.Logits(head.scale, head.softcap), impl,
        )  # fmt: skip
    grads = torch.autograd.grad(loss, wanted)
    return {"loss": loss, "nll": nll} | dict(zip((f"d{name}" for name in head.trained), grads))


def _small_chunks():
    """Inside, a chunk's logits are 64 KiB: those of a model's size would take a quarter of a GiB."""
    from . import triton_kernel

    return mock.patch.object(triton_kernel, "CHUNK_BYTES", 1 << 16)


def floors(head: Head, inputs: Tensors, truth: Tensors) -> dict[str, float]:
    """fp32 roundings at the size of the largest logit, which is what exp and log work on: four for nll and the loss. A
    gradient is rounded once more, as stored. Of each whole result: its norm."""
    hidden, weight, row_weights = (inputs[name].detach().double() for name in ("hidden", "weight", "row_weights"))
    size = float(hidden.norm(dim=1).max() * weight.norm(dim=1).max()) * head.scale
    floor = 4 * EPS * max(1.0, size if head.softcap is None else head.softcap)
    eps = torch.finfo(inputs["hidden"].dtype).eps
    found = {"nll": floor * head.R**0.5, "loss": floor * head.R**0.5 * float(row_weights.norm())}
    return {name: found.get(name, (eps + floor) * float(true.norm())) for name, true in truth.items()}


def _shape(rows: int) -> Shape:
    head = Head(rows, TIMED_HEAD[1], TIMED_HEAD[0])

    def draw(device, dtype):
        weight = torch.empty(TIMED_HEAD, device=device, dtype=dtype).normal_(std=0.02)
        targets = torch.randint(0, TIMED_HEAD[0], (rows,), device=device)
        hidden = torch.randn(rows, TIMED_HEAD[1], device=device).to(dtype)
        return {"hidden": hidden, "weight": weight, "targets": targets, "row_weights": torch.ones_like(targets) / rows}

    return Shape(rows, draw, lambda impl, inputs: _results(head, impl, inputs))
