"""What the proof of Lion and AdamW runs. Sizes are elements of the parameter; a call is one step.

A target's dtype is the parameter's. Beside it: gradients and state of the same dtype or of fp32, and for fp32
parameters a copy in half precision, written in the same pass. And the flag for what is not finite.
"""

from __future__ import annotations

import torch

from ..proof.cases import EPS, Case, Kind, Shape, Stranger, Tensors
from . import op, reference

LR, BLOCK = 1e-2, 16384  # elements of a block of threads: csrc's, and 16 of Triton's
TIMED = (2**18, 2**22, 2**26)
# gradient, state, copy; None: of the parameter's dtype, or no copy
FULL = [(None, None, None), (torch.bfloat16, None, torch.bfloat16), (torch.float16, None, torch.float16)]
HALF = [(None, None, None), (None, torch.float32, None), (torch.float32, torch.float32, None)]


def kinds(operation: str) -> list[Kind]:
    found = []
    for impl in ("cuda", "triton"):
        cases = [_case(operation, BLOCK + 1147, number, 0.1, 3) for number in range(3)]
        cases += [_case(operation, 1, 0, 0.1, 1), _case(operation, 63, 1, 0.0, 1000, flag=None)]
        cases.append(_case(operation, BLOCK + 1147, 1, 0.1, 3, seed=7))
        cases.append(_case(operation, BLOCK + 1147, 1, 0.1, 3, flag=1))
        cases += [_not_finite(operation, *spoilt) for spoilt in SPOILT]
        found.append(Kind(operation, impl, cases, [_shape(operation, size) for size in TIMED]))
    return found


def _case(
    name: str, size: int, number: int, weight_decay: float, step: int, seed: int | None = None, flag: int | None = 0
) -> Case:
    """number: of the dtypes in FULL, for fp32 parameters, or in HALF. seed: bf16 is rounded stochastically. flag: what
    it holds before; None: there is none."""

    def draw(dtype):
        return _draw(name, size, number, dtype, flag)

    def run(impl, inputs):
        return _step(name, impl, inputs, weight_decay, step, seed)

    results = [n for n in ("param", "m", "v") if n != "v" or name == "adamw"]
    stranger = Stranger("grad", 0, dict.fromkeys(results, slice(1, None)))
    label = f"{size} elements, dtypes {number}, step {step}, weight decay {weight_decay}"
    label += ", stochastic" * (seed is not None) + {None: ", no flag", 0: "", 1: ", a flag that is set"}[flag]
    return Case(label, draw, run, floors, stranger=stranger)


def _draw(name: str, size: int, number: int, dtype: torch.dtype, flag: int | None) -> Tensors:
    grad, state, half = (FULL if dtype == torch.float32 else HALF)[number]
    generator = torch.Generator().manual_seed(0)

    def random(scale, dtype):
        return (torch.randn(size, generator=generator, dtype=torch.float64) * scale).to(dtype)

    found = {"param": random(1.0, dtype), "grad": random(0.1, grad or dtype), "m": random(0.1, state or dtype)}
    if name == "adamw":
        found["v"] = random(0.1, state or dtype) ** 2
    found |= {"half": torch.full((size,), torch.nan, dtype=half)} if half else {}
    return found | ({} if flag is None else {"bad": torch.full((1,), flag, dtype=torch.int32)})


# what is not finite in the end: one weight; the copy of a weight (of half-precision weights: the state); a gradient.
# Dtypes, weight decay, place: in a block of threads that is full, and the last element
SPOILT = [("weight", 0, 300.0, 5), ("copy", 1, 0.0, -1), ("copy", 2, 0.0, 5), ("gradient", 1, 0.1, -1)]


def _not_finite(name: str, what: str, number: int, weight_decay: float, at: int) -> Case:
    """One element becomes infinite or NaN: all others are as they are without it, and the flag says so."""
    size = BLOCK + 1147
    others = torch.arange(size) != at % size

    def draw(dtype):
        found = _draw(name, size, number, dtype, 0)
        if what == "weight":  # times 1 - 3
            found["param"][at] = 0.9 * torch.finfo(dtype).max
        elif what == "gradient":
            found["grad"][at] = torch.nan
        elif dtype == torch.float32:  # rounded up to infinity
            found["param"][at] = 1e5 if "half" in found and found["half"].dtype == torch.float16 else 3.4e38
        elif name == "lion":  # its sign is finite
            found["m"][at] = torch.inf
        else:  # a ratio of 0
            found["v"][at] = torch.inf
        return found

    def run(impl, inputs):
        found = _step(name, impl, inputs, weight_decay, 3, None, spoilt=True)
        return {key: t[others.to(t.device)] if t.numel() == size else t for key, t in found.items()}

    def floor(inputs, truth):
        return floors({key: t[others.to(t.device)] if t.numel() == size else t for key, t in inputs.items()}, truth)

    return Case(f"{what} not finite, dtypes {number}, element {at}", draw, run, floor)


def _step(
    name: str, impl: str, inputs: Tensors, weight_decay: float, step: int, seed: int | None, spoilt: bool = False
) -> Tensors:
    """What one step makes of the inputs, which it writes to, and by how much what has to be exact is off. spoilt:
    whether something that it writes is not finite."""
    state = [inputs["m"], inputs["v"]] if name == "adamw" else [inputs["m"]]
    numbers = (step, LR, 0.9, 0.999, 1e-8) if name == "adamw" else (LR, 0.9, 0.99)
    tensors = [inputs["param"], inputs["grad"], *state]
    truth = tensors[0].dtype == torch.float64  # which is not rounded, and has no entry for what is exact
    half, bad = (None, None) if truth else (inputs.get("half"), inputs.get("bad"))
    grad, flagged = inputs["grad"].clone(), None if bad is None else bad.clone()
    random = {"seed": seed} if seed is not None and half is None and tensors[0].dtype == torch.bfloat16 else {}
    random |= {"step": step} if random and name == "lion" else {}
    same = [t.clone() for t in tensors] if random else []
    op.implementation(name, inputs["param"], impl)[1](*tensors, *numbers, weight_decay, half=half, bad=bad, **random)
    exact = {} if truth else {"grad": inputs["grad"].double() - grad.double()}
    if bad is not None:
        written = [tensors[0], *state, *([] if half is None else [half])]
        wrong = torch.stack([~t.isfinite().all() for t in written]).any()
        exact["flag"] = (bad - torch.maximum(flagged, wrong.int())).double()
        exact |= {"case": (~wrong).double().reshape(1)} if spoilt else {}
    if random:  # of the same bits as torch's, but where fp32 sums differ: any bits would be within a rounding
        getattr(reference, f"{name}_")(*same, *numbers, weight_decay, **random)
        apart = (inputs["param"] != same[0]).double().mean()
        exact["random bits"] = torch.where(apart > 0.01, apart, 0.0)
    exact |= {"copy": half.double() - inputs["param"].to(half.dtype).double()} if half is not None else {}
    return dict(zip(("param", "m", "v"), [inputs["param"], *state])) | exact


def floors(inputs: Tensors, truth: Tensors) -> Tensors:
    """One rounding of each result, a whole eps as it may be stochastic, and those of fp32 sums."""
    param, grad, m = (inputs[name].double() for name in ("param", "grad", "m"))
    size, moved = grad.abs() + m.abs(), (truth["param"] - param).abs()
    found = {
        "param": 4 * EPS * param.abs() + 8 * EPS * moved + 4 * EPS * LR,
        "m": 4 * EPS * size,
        "v": 4 * EPS * size**2,
    }
    eps = {name: torch.finfo(inputs[name].dtype).eps for name in truth}
    return {name: found[name] + eps[name] * truth[name].abs() for name in truth}


def _torchs_adamw(inputs: Tensors) -> None:
    """What runs where "auto" takes torch: `op.TorchAdamW`, which wants a gradient of its own dtype."""
    param, half = inputs["param"], inputs.get("half")
    if "step" not in inputs:
        inputs["step"] = torch.ones((), device=param.device)
    vectors = [[t] for t in (param, inputs["grad"].to(param.dtype), inputs["m"], inputs["v"])]
    settings = dict(lr=1e-7, beta1=0.9, beta2=0.999, weight_decay=0.0, eps=1e-8, amsgrad=False, maximize=False)
    torch._fused_adamw_(*vectors, [], [inputs["step"]], **settings)
    if half is not None:
        half.copy_(param)
    reference.note_not_finite(inputs["bad"], param if half is None else half, inputs["v"])


def _shape(name: str, size: int) -> Shape:
    def draw(device, dtype):
        master = dtype == torch.float32  # with bf16 gradients, and a bf16 copy
        narrow = torch.bfloat16 if master else dtype
        found = {"param": torch.randn(size, device=device).to(dtype)}
        found |= {"grad": torch.randn(size, device=device).to(narrow), "m": torch.zeros(size, device=device).to(dtype)}
        found |= {"v": torch.zeros_like(found["m"])} if name == "adamw" else {}
        found |= {"bad": torch.zeros(1, dtype=torch.int32, device=device)}
        return found | ({"half": torch.empty(size, device=device, dtype=narrow)} if master else {})

    def run(impl, inputs):
        if impl == "torch" and name == "adamw":
            return _torchs_adamw(inputs)
        state = [inputs[key] for key in ("m", "v") if key in inputs]
        numbers = (3, 1e-7, 0.9, 0.999, 1e-8) if name == "adamw" else (1e-7, 0.9, 0.99)
        update = op.implementation(name, inputs["param"], impl)[1]
        update(inputs["param"], inputs["grad"], *state, *numbers, 0.0, half=inputs.get("half"), bad=inputs["bad"])

    return Shape(size, draw, run)
