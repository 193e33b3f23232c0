"""Host time of each fused operation: what Python, autograd and torch take before a kernel runs.

    [TRITON_INTERPRET=1] python benchmarks/scripts/host_cost.py [OPERATION ...] [--impl torch]

Microseconds of a forward, and of a forward and backward, at a tiny shape, the least of 25 rounds. On a GPU wall time,
Triton's own launches included, none of which is waited for. Without one (TRITON_INTERPRET=1) CPU time, and a launch
does nothing: what is ours alone.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

import torch

from kunbr_fast.kernels.gated.op import swiglu
from kunbr_fast.kernels.launch import Call
from kunbr_fast.kernels.linear_loss.op import linear_loss
from kunbr_fast.kernels.norms.op import layer_norm, rms_norm
from kunbr_fast.kernels.optimizers.op import AdamW, Lion
from kunbr_fast.kernels.rotary.op import apply_rotary

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDS, TIMES = 25, 100

Run = Callable[[], object]


class _Empty(torch.autograd.Function):
    """The least that an operation can cost."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, dy):
        return torch.empty_like(ctx.saved_tensors[0])


def operations(impl: str) -> dict[str, tuple[Run, list[torch.Tensor]]]:
    """name -> (forward, the inputs whose gradients are asked for; none: there is no backward)"""

    def zeros(*size, grad=True, dtype=torch.bfloat16):
        return torch.zeros(size, dtype=dtype, device=DEVICE, requires_grad=grad)

    x, residual, gate, up = (zeros(1, 8, 64) for _ in range(4))
    frozen, trained, bias = zeros(64, grad=False), zeros(64), zeros(64, grad=False)
    q, k, cos = zeros(1, 2, 8, 32), zeros(1, 1, 8, 32), zeros(1, 8, 32, grad=False)
    hidden, head = zeros(8, 16), zeros(32, 16, grad=False)  # on a CPU its products count
    targets, weights = torch.zeros(8, dtype=torch.int64, device=DEVICE), zeros(8, grad=False, dtype=torch.float32)
    lion, adamw = (kind([zeros(64, dtype=torch.float32)], 1e-3, impl=impl) for kind in (Lion, AdamW))
    dw, how = zeros(64, grad=False), dict(impl=impl)
    return {
        "an empty autograd.Function": (lambda: _Empty.apply(x), [x]),
        "rms_norm": (lambda: rms_norm(x, frozen, 1e-6, **how), [x]),
        "rms_norm, weight trained": (lambda: rms_norm(x, trained, 1e-6, **how), [x, trained]),
        "rms_norm, residual": (lambda: rms_norm(x, frozen, 1e-6, residual=residual, **how), [x, residual]),
        "layer_norm": (lambda: layer_norm(x, frozen, bias, 1e-6, **how), [x]),
        "swiglu": (lambda: swiglu(gate, up, **how), [gate, up]),
        "rotary": (lambda: apply_rotary(q, k, cos, cos, **how), [q, k]),
        "linear_loss": (lambda: linear_loss(hidden, head, None, targets, weights, **how)[0], [hidden]),
        "lion": (lambda: lion.update(dw), []),
        "adamw": (lambda: adamw.update(dw), []),
    }


def with_backward(forward: Run, inputs: list[torch.Tensor]) -> Run:
    out = forward()
    dys = [torch.zeros_like(y) for y in (out if isinstance(out, tuple) else (out,))]

    def run():
        torch.autograd.grad(forward(), inputs, dys if isinstance(out, tuple) else dys[0])

    return run


def microseconds(run: Run) -> float:
    best = float("inf")
    clock = (
        time.perf_counter if DEVICE == "cuda" else time.process_time
    )  # other processes' share of a CPU counts for nothing
    for _ in range(ROUNDS):
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        start = clock()
        for _ in range(TIMES):
            run()
        best = min(best, clock() - start)
    return best / TIMES * 1e6


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="OPERATION", help="only these")
    parser.add_argument("--impl", default="triton", help="triton or torch (which computes, on a CPU in this time)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    launch = Call.launch
    if DEVICE == "cpu":
        Call.launch = lambda self: None
    try:
        found = operations(options.impl)
        if unknown := set(options.names) - set(found):
            parser.error(f"unknown operation {unknown.pop()!r}: expected {', '.join(found)}")
        for name in options.names or found:
            forward, inputs = found[name]
            both = f"{microseconds(with_backward(forward, inputs)):9.1f}" if inputs else ""
            print(f"{name:28}{microseconds(forward):9.1f}{both}", flush=True)
    finally:
        Call.launch = launch
    return 0


if __name__ == "__main__":
    sys.exit(main())
