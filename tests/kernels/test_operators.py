"""Operators that run their function at once where nobody looks."""

import sys
import traceback

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

from kunbr_fast.benchmarks.scripts import host_cost
from kunbr_fast.kernels.launch import Call
from kunbr_fast.kernels.operators import custom_op

wrapped = []  # whether each run went through torch's wrapper


def _note():
    wrapped.append(any("torch/_library" in frame.filename for frame in traceback.extract_stack()))


@custom_op("test_scaled", "(Tensor[] xs, Tensor? y, float by) -> Tensor[]")
def scaled(xs, y, by):
    _note()
    return [x * by for x in xs] + ([] if y is None else [y * by])


@custom_op("test_scale_", "(Tensor(a!)[] xs, Tensor(b!) y, float by) -> ()", ("xs", "y"))
def scale_(xs, y, by):
    _note()
    for x in (*xs, y):
        x.data.mul_(by)  # as a kernel does: no version counter sees it


@scaled.register_fake
def _(xs, y, by):
    return [torch.empty_like(x) for x in xs] + ([] if y is None else [torch.empty_like(y)])


@pytest.fixture(autouse=True)
def _clear():
    wrapped.clear()


class Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func._schema.name)
        return func(*args, **(kwargs or {}))


class Marked(torch.Tensor):
    seen = []

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(func._schema.name)
        with no_dispatch():
            return func(*args, **(kwargs or {}))


def test_the_short_way_and_the_operator_give_the_same():
    x, y = torch.randn(3), torch.nn.Parameter(torch.randn(2))
    with torch.no_grad():
        short = scaled([x], y, 2.0)
        assert wrapped == [False]
        long = torch.ops.kunbr_fast.test_scaled([x], y, 2.0)
        assert wrapped == [False, True]
    assert [torch.equal(a, b) for a, b in zip(short, long, strict=True)] == [True, True]
    assert torch.equal(short[0], 2 * x)


def test_who_looks_at_operators_sees_them():
    x = torch.randn(3)
    with Names() as mode:
        scaled([x], None, 2.0)
    assert "kunbr_fast::test_scaled" in mode.seen
    with FakeTensorMode():
        (fake,) = scaled([torch.empty(3, 4)], None, 2.0)
    assert fake.shape == (3, 4) and type(fake) is not torch.Tensor
    with FakeTensorMode() as mode:
        made = torch.empty(3)
    assert type(scaled([made], None, 2.0)[0]) is not torch.Tensor  # outside of its mode
    wrapped.clear()
    (found,) = scaled([x.as_subclass(Marked)], None, 2.0)
    assert Marked.seen[0] == "kunbr_fast::test_scaled" and wrapped == [True]
    assert torch.equal(found.as_subclass(torch.Tensor), 2 * x)


def test_a_compiler_sees_them():
    graphs = []

    def backend(module, inputs):
        graphs.append([str(node.target) for node in module.graph.nodes])
        return module

    x = torch.randn(3)
    (found,) = torch.compile(lambda x: scaled([x], None, 2.0), backend=backend, fullgraph=True)(x)
    assert torch.equal(found, 2 * x) and "kunbr_fast.test_scaled.default" in graphs[0]


def test_writing_counts_in_version_counters():
    x, z, y = (torch.ones(3) for _ in range(3))
    before = [t._version for t in (x, z, y)]
    scale_([x, z], y, 2.0)
    assert wrapped == [False] and all(t.tolist() == [2.0] * 3 for t in (x, z, y))
    assert [t._version for t in (x, z, y)] == [version + 1 for version in before]
    w = torch.ones(3, requires_grad=True)
    loss = (w * y).sum()
    scale_([x], y, 2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with torch.inference_mode():
        x, y = torch.ones(3), torch.ones(3)
        scale_([x], y, 3.0)
    assert x.tolist() == y.tolist() == [3.0] * 3


@pytest.mark.parametrize("name", host_cost.operations("triton"))
def test_no_operation_pays_for_the_wrapper(name, monkeypatch):
    """A forward and backward of each runs no line of torch's operator wrappers, and one launch each way."""
    launched, files = [], set()
    monkeypatch.setattr(Call, "launch", lambda call: launched.append(call))
    forward, inputs = host_cost.operations("triton")[name]
    run = host_cost.with_backward(forward, inputs) if inputs else forward
    launched.clear()
    sys.setprofile(lambda frame, event, argument: files.add(frame.f_code.co_filename))
    try:
        run()
    finally:
        sys.setprofile(None)
    assert not [file for file in files if "torch/_library" in file] and any("kernels" in file for file in files)
    expected = {
        "an empty autograd.Function": 0,
        "linear_loss": 1,
        "lion": 1,
        "adamw": 1,
    }  # the loss' forward does it all
    assert len(launched) == expected.get(name, 2)


def test_the_script_prints_what_it_measures(monkeypatch, capsys):
    monkeypatch.setattr(host_cost, "ROUNDS", 2)
    launch = Call.launch
    assert host_cost.main(["rms_norm", "lion"]) == 0
    (norm, forward, both), (lion, update) = (line.split() for line in capsys.readouterr().out.splitlines())
    assert (norm, lion) == ("rms_norm", "lion") and 0 < float(forward) < float(both) and float(update) > 0
    assert Call.launch is launch
    with pytest.raises(SystemExit):
        host_cost.main(["gelu"])
