"""Implementations that are right or wrong in one way each, for tests of the proof: on a CPU, in its child process."""

import os
import signal
import time

import torch

from kunbr_fast.kernels.proof import child
from kunbr_fast.kernels.proof.cases import Case, Kind, Shape, Stranger

SIZE = 1000
WAYS = ("right", "one element", "slow", "hangs", "dies", "exits", "changes", "leaks", "beyond", "unwritten", "raises",
        "out of memory", "wrong shape", "long", "too large to time")  # fmt: skip
_calls = {"count": 0}


def draw(dtype):
    return {"x": torch.arange(SIZE).to(dtype) / SIZE}


def doubled(way, impl, inputs):
    """y = 2 * x."""
    x = inputs["x"]
    if impl == "torch":
        return {"y": 2 * x}
    _calls["count"] += 1
    y = torch.empty_like(x)
    if way == "unwritten":
        y[:-1] = 2 * x[:-1]
        return {"y": y}
    torch.mul(x, 2, out=y)
    if way == "one element":
        y[123] += 0.5
    elif way == "long":
        time.sleep(1)
    elif way == "hangs":
        time.sleep(1e6)
    elif way == "dies":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif way == "exits":
        print("the driver has gone", flush=True)
        os.write(2, b"something before\nno such instruction\n")
        os._exit(3)
    elif way == "changes":
        y[0] += 1e-8 * _calls["count"]
    elif way == "leaks":
        y += 0 * x[0]
    elif way == "beyond":
        y.as_strided((SIZE + 1,), (1,))[SIZE] = 3
    elif way == "raises":
        raise ValueError("no such tile\nand more of it")
    elif way == "out of memory":
        raise torch.OutOfMemoryError("CUDA out of memory")
    elif way == "wrong shape":
        y = y[1:]
    return {"y": y}


def timed(way, impl, inputs):
    if way == "too large to time":
        raise torch.OutOfMemoryError("CUDA out of memory")
    time.sleep({"torch": 0.010}.get(impl, 0.030 if way == "slow" else 0.002))


def find(target):
    way = target.kind
    floors = lambda inputs, truth: {"y": 1e-6 * truth["y"].abs() + 1e-7}  # noqa: E731
    case = Case("all", draw, lambda impl, inputs: doubled(way, impl, inputs), floors,
                stranger=Stranger("x", 0, {"y": slice(1, None)}))  # fmt: skip
    shape = Shape(4096, lambda device, dtype: {}, lambda impl, inputs: timed(way, impl, inputs))
    return Kind("doubling", "triton", [case] * (3 if way == "long" else 1), [shape], way)


if __name__ == "__main__":
    child.main(find)
