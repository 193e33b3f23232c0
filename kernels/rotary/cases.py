"""What the proof of the rotary embedding runs. Sizes are elements of q; a call is a forward and its backward."""

from __future__ import annotations

import torch

from ..proof.cases import EPS, Case, Kind, Shape, Stranger, Tensors
from . import op

TIMED_TOKENS, TIMED_HEADS, TIMED_FEATURES = (512, 2048, 8192), (32, 8), 128


def kinds(operation: str) -> list[Kind]:
    cases = [
        _case((2, 5, 8), (6, 2), 8),
        _case((1, 3, 63), (3, 1), 62),
        _case((3, 2, 128), (33, 17), 96, rows=3),
        _case((2, 7, 12), (4, 4), 4, way="over"),  # q and k themselves are overwritten
        _case((2, 9, 64), (9, 3), 64, way="no gradient"),
        _case((2, 5, 16), (4, 2), 16, way="of one product"),
    ]
    return [Kind(operation, "triton", cases, [_shape(T) for T in TIMED_TOKENS])]


def _case(shape: tuple[int, int, int], heads: tuple[int, int], r: int, rows: int = 1, way: str = "new") -> Case:
    B, T, d = shape

    def draw(dtype):
        generator = torch.Generator().manual_seed(0)
        sizes = {"q": heads[0], "k": heads[1], "dq'": heads[0], "dk'": heads[1]}
        found = {name: torch.randn(B, T, H, d, generator=generator).to(dtype) for name, H in sizes.items()}
        # of any size and not the same twice, so that a transpose is told from an inverse and the halves from each other
        return found | {name: torch.randn(rows, T, r, generator=generator).to(dtype) for name in ("cos", "sin")}

    names = ("q'", "k'") if way == "no gradient" else ("q'", "k'", "dq", "dk")
    return Case(
        f"{B}x{T}x{d}, {heads[0]} and {heads[1]} heads, {r} rotated, {way}", draw,
        lambda impl, inputs: _results(impl, inputs, way), floors, truth=lambda inputs: _truth(inputs, way),
        stranger=Stranger("q", (slice(None), 0), dict.fromkeys(names, (slice(None), slice(None), slice(1, None)))),
    )  # fmt: skip


def _results(impl: str, inputs: Tensors, way: str) -> Tensors:
    """way: "new": gradients of leaves; "over": of results, which are overwritten; "no gradient": they are, too; "of one
    product": of leaves whose tokens lie further apart than the results'."""
    # in memory (B, T, H, d), as a model views its projections' outputs
    views = [inputs[name].transpose(1, 2) for name in ("q", "k")]
    if way == "of one product":
        views = torch.cat(views, 1).transpose(1, 2).contiguous().transpose(1, 2).split([x.shape[1] for x in views], 1)
    if way == "no gradient":
        with torch.no_grad():
            return dict(zip(("q'", "k'"), op.apply_rotary(*views, inputs["cos"], inputs["sin"], impl=impl)))
    leaves = [t.detach().requires_grad_() for t in views]
    given = [leaf * 1 for leaf in leaves] if way == "over" else leaves
    out = op.apply_rotary(*given, inputs["cos"], inputs["sin"], impl=impl)
    dys = [inputs[name].transpose(1, 2) for name in ("dq'", "dk'")]
    results = [t.detach() for t in out]
    return dict(zip(("q'", "k'", "dq", "dk"), (*results, *torch.autograd.grad(out, leaves, dys))))


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: float = -1.0) -> torch.Tensor:
    """The text of the formula. sign=1: of every term's size, for sizes of all."""
    r = cos.shape[-1]
    half = torch.cat((sign * x[..., r // 2 : r], x[..., : r // 2]), -1)
    return torch.cat((x[..., :r] * cos[:, None] + half * sin[:, None], x[..., r:]), -1)


def _differentiated(inputs: Tensors, way: str, sign: float) -> Tensors:
    leaves = [inputs[name].transpose(1, 2).detach().requires_grad_() for name in ("q", "k")]
    out = [rotated(leaf, inputs["cos"], inputs["sin"], sign) for leaf in leaves]
    found = {"q'": out[0].detach(), "k'": out[1].detach()}
    if way == "no gradient":
        return found
    grads = torch.autograd.grad(out, leaves, [inputs[name].transpose(1, 2) for name in ("dq'", "dk'")])
    return found | {"dq": grads[0], "dk": grads[1]}


def _truth(inputs: Tensors, way: str) -> Tensors:
    return _differentiated({name: t.double() for name, t in inputs.items()}, way, -1.0)


def floors(inputs: Tensors, truth: Tensors) -> Tensors:
    """Two products and a sum in fp32, and one rounding (a whole eps where Triton's interpreter cuts bf16 off)."""
    way = "new" if "dq" in truth else "no gradient"
    sizes = _differentiated({name: t.double().abs() for name, t in inputs.items()}, way, 1.0)
    dtype = inputs["q"].dtype
    info, rounding = torch.finfo(dtype), 1.0 if dtype == torch.bfloat16 and inputs["q"].device.type == "cpu" else 0.5
    return {
        name: 2 * EPS * sizes[name] + rounding * info.eps * truth[name].abs() + info.tiny * info.eps for name in truth
    }


def _shape(T: int) -> Shape:
    def draw(device, dtype):
        sizes = dict(zip(("q", "k", "dq'", "dk'"), TIMED_HEADS * 2))
        found = {name: torch.randn(1, T, H, TIMED_FEATURES, device=device).to(dtype) for name, H in sizes.items()}
        return found | {name: torch.randn(1, T, TIMED_FEATURES, device=device).to(dtype) for name in ("cos", "sin")}

    return Shape(T * TIMED_HEADS[0] * TIMED_FEATURES, draw, lambda impl, inputs: _results(impl, inputs, "new"))
