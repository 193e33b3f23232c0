"""Whether a kind of launch is right: values within their bounds, nothing read or written that is not its own, and the
same bits twice."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from unittest import mock

import torch

from .cases import Case, Kind, Tensors

CANARY = 1024  # bytes before and behind each output; a multiple of what any load or tensor map is aligned to
PATIENCE = 20.0  # seconds that a GPU may take for a case once all of it is enqueued
WRONG, CANARIES, STRANGER, UNEQUAL = (
    "wrong values",
    "writes beyond an output",
    "a neighbour leaks in",
    "not deterministic",
)


class Hung(RuntimeError):
    """The device does not finish what it was given."""


@dataclasses.dataclass(frozen=True)
class Found:
    """why: None if all is right. error, bound: at the value that is worst beside its bound."""

    why: str | None
    error: float = 0.0
    bound: float = 0.0

    @property
    def ratio(self) -> float:
        return self.error / self.bound if self.bound else float(self.error > 0)


def judge(
    kind: Kind, dtype: torch.dtype, device: torch.device, begins: Callable[[str], None] = lambda name: None
) -> Found:
    """Runs every case of `kind`; the first one that is wrong ends it. Errors that a kernel raises are raised. begins:
    told each case's name before it."""
    worst = Found(None)
    for case in kind.cases:
        begins(case.name)
        found = judge_case(case, kind.impl, dtype, device)
        if found.why is not None:
            return dataclasses.replace(found, why=f"{found.why} ({case.name})")
        worst = max(worst, found, key=lambda one: one.ratio)
    return worst


def judge_case(case: Case, impl: str, dtype: torch.dtype, device: torch.device) -> Found:
    inputs = {name: t.to(device) for name, t in case.draw(dtype).items()}
    with guarded(device) as allocations:
        ours = _run(case, impl, inputs, device)
        broken = not all(_intact(number, *one) for number, one in enumerate(allocations))
    found = _compare(case, inputs, ours)
    if found.why is None and broken:
        found = dataclasses.replace(found, why=CANARIES)
    if found.why is None and not _equal(ours, _run(case, impl, inputs, device)):
        found = dataclasses.replace(found, why=UNEQUAL)
    if found.why is None and case.stranger is not None:
        mine = dict(inputs)
        mine[case.stranger.name] = inputs[case.stranger.name].clone()
        mine[case.stranger.name][case.stranger.index] = torch.nan
        with guarded(device):
            seen = _run(case, impl, mine, device)
        kept = case.stranger.kept.items()
        if not all(torch.equal(ours[name][index], seen[name][index]) for name, index in kept):
            found = dataclasses.replace(found, why=STRANGER)
    return found


def _run(case: Case, impl: str, inputs: Tensors, device: torch.device) -> Tensors:
    own = {name: torch.empty_like(t).copy_(t) for name, t in inputs.items()}  # between canaries too: some are outputs
    results = {name: t.detach() for name, t in case.run(impl, own).items()}
    finish(device)
    return results


def _compare(case: Case, inputs: Tensors, ours: Tensors) -> Found:
    """The worst value beside its bound: twice torch's own error in the same dtype, and a floor."""
    wide = {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}
    truth = case.run("torch", wide) if case.truth is None else case.truth(inputs)
    torchs = case.run("torch", {name: t.clone() for name, t in inputs.items()})
    truth = {name: t.detach() for name, t in truth.items()}
    floors = case.floors(inputs, truth)
    worst = Found(None)
    for name in ours.keys() - truth.keys():
        if bool((ours[name] != 0).any()):
            return Found(f"{WRONG}: {name} is not exact", float(ours[name].abs().max()), 0.0)
    for name, true in truth.items():
        for what in ("shape", "dtype"):
            if (got := getattr(ours[name], what)) != getattr(torchs[name], what):
                return Found(f"{WRONG}: {name} has {what} {tuple(got) if what == 'shape' else got}", float("inf"), 0.0)
        mine, other, true = (t.detach().to(true.device).double() for t in (ours[name], torchs[name], true))
        error, bound = (mine - true).abs(), 2 * (other - true).abs()
        floor = floors[name]
        if not isinstance(floor, torch.Tensor):  # of the whole
            error, bound = (torch.linalg.vector_norm(t).reshape(1) for t in (mine - true, 2 * (other - true)))
        bound = bound.nan_to_num(0.0, 0.0) + floor  # where torch itself overflows its error allows nothing
        if not error.numel():
            continue
        within = (error <= bound) & bound.isfinite()  # False for NaN
        worse = torch.where(within, error / bound.clamp_min(1e-300), torch.inf)
        at = int(worse.argmax())
        here = Found(None, float(error.flatten()[at]), float(bound.expand_as(error).flatten()[at]))
        if not bool(within.all()):
            return dataclasses.replace(
                here, why=f"{WRONG}: {name} is off by {here.error:.2g}, allowed {here.bound:.2g}"
            )
        worst = max(worst, here, key=lambda one: one.ratio)
    return worst


def _equal(a: Tensors, b: Tensors) -> bool:
    """Bit by bit: NaN equals itself."""
    return all(torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (a[name], b[name]))) for name in a)


def finish(device: torch.device) -> None:
    """Waits for the device; `Hung` if it takes longer than `PATIENCE`. A wait of torch's own could not be ended."""
    if device.type != "cuda":
        return
    event, begin = torch.cuda.Event(), time.monotonic()
    event.record(torch.cuda.current_stream(device))
    while not event.query():
        if time.monotonic() - begin > PATIENCE:
            raise Hung(f"not done after {PATIENCE:.0f} s")
        time.sleep(1e-4)


# ---------------------------------------------------------------- outputs between canaries


@contextlib.contextmanager
def guarded(device: torch.device) -> Iterator[list[tuple[torch.Tensor, int]]]:
    """Inside, memory that Python code asks torch for on `device` is NaN (all bits set), between canaries, NaN as well
    for who reads beyond, and each one's own for who copies beyond.

    Yields what was given: all of its memory, and how many bytes of that were asked for.
    """
    given: list[tuple[torch.Tensor, int]] = []
    empty = torch.empty

    def strided(size, stride, dtype):
        elements = 1 + sum((n - 1) * s for n, s in zip(size, stride)) if all(size) else 0
        nbytes = elements * dtype.itemsize
        memory = empty(nbytes + nbytes % 2 + 2 * CANARY, dtype=torch.uint8, device=device)
        memory.view(torch.int16).fill_(_canary(len(given)))
        memory[CANARY : CANARY + nbytes] = 0xFF
        given.append((memory, nbytes))
        # not a view: whether a tensor is one decides what may be overwritten
        return empty(0, dtype=dtype, device=device).set_(
            memory.untyped_storage(), CANARY // dtype.itemsize, tuple(size), tuple(stride)
        )

    def like(original):
        """Asks `original` on the meta device for the shape, strides and dtype."""

        def replaced(*arguments, **options):
            where = options.get("device")
            if where is None and isinstance(arguments[0], torch.Tensor):
                where = arguments[0].device
            if torch.device(where or "cpu").type != device.type:
                return original(*arguments, **options)
            options.pop("pin_memory", None)
            arguments = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments]
            found = original(*arguments, **options | {"device": "meta"})
            return strided(found.shape, found.stride(), found.dtype)

        return replaced

    with contextlib.ExitStack() as stack:
        for owner, names in ((torch, ("empty", "empty_like", "empty_strided")), (torch.Tensor, ("new_empty",))):
            for name in names:
                stack.enter_context(mock.patch.object(owner, name, like(getattr(owner, name))))
        yield given


def _canary(number: int) -> int:
    """Two bytes of the canaries of that allocation: NaN in bf16 and fp16, and twice in fp32."""
    return 0x7F81 + number % 126


def _intact(number: int, memory: torch.Tensor, nbytes: int) -> bool:
    words, after = memory.view(torch.int16), (CANARY + nbytes + 1) // 2
    return bool((words[: CANARY // 2] == _canary(number)).all() and (words[after:] == _canary(number)).all())
