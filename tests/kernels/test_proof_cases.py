"""The table that the proof goes by (kernels/proof, kernels/*/cases.py): every case on the GPU where there is one, else
in Triton's interpreter; that each density case is of its kind; and that the gate can fail."""

import dataclasses

import pytest
import torch

pytest.importorskip("triton", reason="triton is made for Linux only")

from kunbr_fast.kernels import dispatch, tiles
from kunbr_fast.kernels.grad_density import kinds as density_kinds
from kunbr_fast.kernels.launch import Call
from kunbr_fast.kernels.proof import cases, gate

# of what the interpreter's numpy makes of NaN
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ALL = [kind for operation in dispatch.OPERATIONS for kind in cases.kinds(operation)]
DENSITY = [kind for kind in ALL if kind.operation == "grad_density"]
HOPPER = {"hopper": True, "portable": False}  # of kinds by whether the GPU has compute capability 9.0


def label(target, case=None):
    return "-".join(str(target).split() + ([] if case is None else [case.name.replace(" ", "_")]))


def judged():
    """(target, case) of all; in the interpreter those of `quick`."""
    found = [(target, case) for target in cases.targets(DEVICE) for case in cases.kind_of(target).cases]
    return [one for one in found if DEVICE.type == "cuda" or quick(*one)]


def quick(target, case):
    """One dtype of each kind, two of optimisers. Of density kinds by row, which compile as the others but for one
    argument, one; of their cases the first, and one of each other statistic; of "short" all."""
    if target.operation == "grad_density":
        if target.kind.endswith("by row") and target.kind != "any by row":
            return False
        first = cases.kind_of(target).cases[0]
        if target.kind != "short" and case.name != first.name and case.name.startswith("grad_l1"):
            return False
    both = target.operation in ("lion", "adamw") or target.kind == "fp32"
    return target.dtype in (("bf16", "fp32") if both else ("bf16",))


def marks(target, case):
    """What takes the interpreter longest, of what other cases and test_grad_density_triton have."""
    dear = target.kind in ("short", "fp32") and case.name.startswith("grad_l1")
    return pytest.mark.slow if DEVICE.type == "cpu" and dear else ()


@pytest.mark.parametrize("target, case", [pytest.param(*one, id=label(*one), marks=marks(*one)) for one in judged()])
def test_every_case(target, case):
    found = gate.judge_case(case, target.impl, cases.DTYPES[target.dtype], DEVICE)
    assert found.why is None and 0 <= found.error <= found.bound < float("inf")


def test_all_that_a_kernel_serves_has_a_kind():
    for operation in dispatch.OPERATIONS:
        impls = {impl for impl in ("cuda", "triton") if dispatch.has(operation, impl)}
        assert {kind.impl for kind in cases.kinds(operation)} == impls
    for impl in ("cuda", "triton"):
        for suffix in ("", " by row"):
            served = {(k.name, d) for k in DENSITY if k.impl == impl and k.name.endswith(" by row") == bool(suffix)
                      for d in k.dtypes}  # fmt: skip
            names = ("short", "long", "any") if impl == "triton" else ("hopper", "portable")
            expected = {(name + suffix, dtype) for name in names for dtype in ("bf16", "fp16")}
            assert served == expected | {(("fp32" if impl == "triton" else "portable") + suffix, "fp32")}
    targets = [target for kind in ALL for target in kind.targets()]
    assert len(set(targets)) == len(targets) and all(kind.cases and kind.shapes for kind in ALL)
    for kind in ALL:
        assert len({case.name for case in kind.cases}) == len(kind.cases), "two cases of one name"
        assert all(cases.kind_of(target).name == kind.name for target in kind.targets())
    with pytest.raises(ValueError, match="no kind of launch lion triton bf16 short"):
        cases.kind_of(cases.Target("lion", "triton", "bf16", "short"))


# ---------------------------------------------------------------- density: inputs and kinds


def kind_of_launch(impl, inputs, along):
    dys = [t for name, t in inputs.items() if name.startswith("dy")]
    return density_kinds.kinds_of_launch(inputs["x"], dys, len(inputs["cu_seqlens"]) - 1, along)[impl]


@pytest.mark.parametrize("kind", DENSITY, ids=lambda kind: f"{kind.impl}-{kind.name.replace(' ', '_')}")
def test_inputs_lead_to_the_kind_that_they_stand_for(kind, monkeypatch):
    """Also those that are timed, which are drawn without memory."""
    along = "row" if kind.name.endswith(" by row") else None
    for name in kind.dtypes:
        dtype = cases.DTYPES[name]
        drawn = [(case.name, case.draw(dtype)) for case in kind.cases]
        drawn += [(f"{shape.size} tokens", shape.draw(torch.device("meta"), dtype)) for shape in kind.shapes]
        for of, inputs in drawn:
            hopper = HOPPER.get(kind.name.partition(" ")[0], False)
            monkeypatch.setattr(density_kinds, "_is_hopper", lambda device, hopper=hopper: hopper)
            assert kind_of_launch(kind.impl, inputs, along) == kind.name, (name, of)


@pytest.mark.parametrize("kind", [k for k in DENSITY if k.impl == "triton"], ids=lambda k: k.name.replace(" ", "_"))
def test_the_launcher_takes_that_kind(kind, monkeypatch):
    """Each entry of the tiles that is of the kind: of "short", those for samples of up to 32 and 64 tokens too."""

    class Chosen(Exception):
        pass

    def choose(device, name, shape, run):
        raise Chosen(name)

    monkeypatch.setattr(tiles, "choose", choose)
    chosen, name = set(), kind.name.partition(" ")[0]
    for case in kind.cases:
        inputs = {name: t.to(DEVICE) for name, t in case.draw(cases.DTYPES[kind.dtypes[0]]).items()}
        with pytest.raises(Chosen) as reason:
            case.run("triton", inputs)
        chosen.add(str(reason.value))
    assert chosen == {entry for _, entry in tiles.TABLE if entry.partition(" ")[0] == name}


# ---------------------------------------------------------------- the gate can fail


def pretended(case, change=lambda results: None):
    """The case with results that are as good as can be, but for a change: the truth, rounded once."""

    def run(impl, inputs):
        found = case.run("torch", {name: t.clone() for name, t in inputs.items()})
        if impl == "torch":
            return found
        wide = {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}
        truth = case.run("torch", wide) if case.truth is None else case.truth(inputs)
        # what has no entry in the truth is exact
        found = {name: truth[name].detach().to(t.dtype) if name in truth else t for name, t in found.items()}
        change(found)
        return found

    return dataclasses.replace(case, run=run)


PER_KIND = [k for k in ALL if k.impl == "triton" and not k.name.endswith(" by row")]


@pytest.mark.parametrize("kind", PER_KIND, ids=lambda kind: f"{kind.operation}-{kind.name}")
@pytest.mark.slow
def test_each_result_of_each_case_counts(kind):
    """The truth, rounded, is right; with one result off by a twentieth it is wrong, in whatever dtype."""
    for case in kind.cases:
        for name in kind.dtypes:
            dtype = cases.DTYPES[name]
            fine = gate.judge_case(pretended(case), "ours", dtype, torch.device("cpu"))
            assert fine.why is None, (case.name, name)
            for result in case.run("torch", case.draw(dtype)):
                off = pretended(case, lambda found, result=result: found.update({result: found[result] * 1.05 + 1e-4}))
                why = gate.judge_case(off, "ours", dtype, torch.device("cpu")).why
                assert why is not None and why.startswith(f"{gate.WRONG}: {result} is "), (case.name, name, result)


SPOILED = [("lion", "all", "fp32", "param", 0), ("adamw", "all", "fp32", "exp_avg_sq", 0),
           ("swiglu", "all", "fp32", "y", 0), ("rms_norm", "all", "fp32", "y", 0), ("rotary", "all", "fp32", "y0", 1),
           ("linear_loss", "all", "fp32", "nll", 0), ("grad_density", "any", "bf16", "out", 2)]  # fmt: skip


@pytest.mark.parametrize("operation, kind, dtype, argument, number", SPOILED)
def test_a_kernel_that_is_wrong_is_seen(operation, kind, dtype, argument, number, monkeypatch):
    """Ours, but for what a launch leaves in one of its tensors: a hundredth too much; one element beyond; the last one
    of other bits each time."""
    kind = cases.kind_of(cases.Target(operation, "triton", dtype, kind))
    kind = dataclasses.replace(kind, cases=kind.cases[number : number + 1])
    launch, turns = Call.launch, iter(range(1 << 20))

    def too_large(t):
        t *= 1.01

    def beyond(t):
        t.as_strided((1,), (1,), t.storage_offset() + t.numel()).zero_()

    def differs(t):
        last = t.as_strided((1,), (1,), t.storage_offset() + t.numel() - 1)
        last.view(torch.uint8)[0] ^= next(turns) % 4  # a call may launch twice

    def judge(spoil):
        def spoiled(self):
            launch(self)
            if argument in self.arguments:
                spoil(self.arguments[argument])

        monkeypatch.setattr(Call, "launch", spoiled)
        return gate.judge(kind, cases.DTYPES[dtype], DEVICE).why

    assert judge(lambda t: None) is None
    for spoil, why in ((too_large, gate.WRONG), (beyond, gate.CANARIES), (differs, gate.UNEQUAL)):
        said = judge(spoil)
        assert said is not None and said.startswith(why) and said.endswith(f" ({kind.cases[0].name})")
