"""What a suite says of its cases, and how a case becomes rows: first the gate, then memory, then time.

A case is one operation at one shape. It draws its inputs, and names variants: ours, by implementation, and rivals,
which are found at run time. Every variant of a case does the same work; the gate says so: before anything is timed,
a kernel of ours goes through the proof's table (gate.py), and each variant runs on a small sibling of the shape and is
held against fp64. One that is wrong or cannot run here is left out, and a row says why. Where that leaves none of ours,
as all are wrong, the case gives no numbers.

Variants then take turns in one process with a square matrix product and a copy, whose rates are the roofline: the time
that the needed FLOPs or the needed bytes take at these rates, whichever is longer. FLOPs and bytes are those that the
operation needs, not those that a variant spends.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import importlib
import logging
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from kunbr_fast.benchmarks import measure
from kunbr_fast.benchmarks.gate import why_wrong
from kunbr_fast.benchmarks.rows import COLUMNS, WRONG, Measured, rounded
from kunbr_fast.benchmarks.suites import SUITES
from kunbr_fast.kernels import dispatch
from kunbr_fast.kernels.errors import Unavailable
from kunbr_fast.memory import is_out_of_memory, release

logger = logging.getLogger(__name__)

RIVAL_LIMIT = 0.05  # largest relative error of a rival: some round what we keep in fp32
BASELINE_LIMIT = 0.2  # of the one that our own limit comes from: beyond it, the case itself is ill-conditioned
CPU_ROOFLINE, GPU_ROOFLINE = (1536, 128 << 20), (8192, 1 << 30)  # side of the square product, bytes of the copy


class Skip(Exception):
    """A variant cannot run here, and why."""


class Wrong(Exception):
    """Ours gave other results than they should: no numbers."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What the user asked for; a suite chooses the rest by the device. None: its own choice.

    quick: one small case a suite, to see that all works. compile: torch.compile's variants, on a CPU too. say: told
    what begins within a case that takes minutes.
    """

    device: torch.device = torch.device("cpu")
    dtype: torch.dtype | None = None
    models: tuple[str, ...] | None = None
    tokens: tuple[str, ...] | None = None
    variants: tuple[str, ...] | None = None
    quick: bool = False
    compile: bool = False
    tiles: bool = False
    seconds: float | None = None
    repeats: int | None = None
    say: Callable[[str], None] = lambda text: None

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def the_dtype(self) -> torch.dtype:
        return self.dtype or (torch.bfloat16 if self.gpu else torch.float32)

    def choose(self, quick: Any, cpu: Any, gpu: Any) -> Any:
        """A suite's own choice."""
        return quick if self.quick else gpu if self.gpu else cpu

    def the_models(self, cpu: Sequence[str] = ("SmolLM2-135M",)) -> Sequence[str]:
        return self.models or self.choose(["SmolLM2-135M"], cpu, ["Llama-3-8B"])

    def the_tokens(self, quick: Sequence[int], cpu: Sequence[int], gpu: Sequence[int]) -> Sequence[int]:
        """Of suites whose samples are of one length."""
        if self.tokens is None:
            return self.choose(quick, cpu, gpu)
        return [int(tokens) for tokens in self.tokens if tokens != "ragged"]

    @property
    def settings(self) -> str:
        """What changes the numbers of a case, or what there is of it, as one text."""
        found = [name for name in ("quick", "compile", "tiles") if getattr(self, name)]
        limits = {"seconds": self.seconds, "repeats": self.repeats}
        found += [f"{name}={value:g}" for name, value in limits.items() if value is not None]
        return ", ".join(found + ([f"variants={'|'.join(self.variants)}"] if self.variants else []))


@dataclasses.dataclass(frozen=True)
class Variant:
    """`make()` builds what it needs, untimed, and returns the function that is timed, or raises `Skip`.

    That function returns {name: tensor} of what the gate compares, or None. ours: held to our limits. standing_bytes:
    bytes that stay between two calls (weights, optimiser state, caches), or a function that says so after the first
    one; None where variants share all of it. spent_flops: a function that counts those of a call, where variants differ
    in them.
    """

    name: str
    make: Callable[[], Callable[[], Mapping[str, torch.Tensor] | None]]
    ours: bool = False
    standing_bytes: int | Callable[[], int] | None = None
    spent_flops: Callable[[], int] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Case(abc.ABC):
    """One operation at one shape.

    suite, model, label: what names the row. tokens: T, for plots. baseline: the variant that speed-ups are over, plain
    torch in the same dtype, by which our error is judged too.
    """

    suite: str
    model: str
    label: str
    tokens: int
    options: Options
    baseline: str = "eager"

    def __str__(self) -> str:
        return f"{self.suite}: {self.model}, {self.label}"

    def identity(self) -> dict[str, Any]:
        """What names all of its rows."""
        return {
            "suite": self.suite, "model": self.model, "case": self.label, "tokens": self.tokens,
            "dtype": str(self.dtype)[6:],
        }  # fmt: skip

    @property
    def device(self) -> torch.device:
        return self.options.device

    @property
    def dtype(self) -> torch.dtype:
        return self.options.the_dtype

    @property
    @abc.abstractmethod
    def flops(self) -> int:
        """That the operation needs."""

    @property
    @abc.abstractmethod
    def nbytes(self) -> int:
        """That have to be read and written once."""

    @abc.abstractmethod
    def draw(self) -> Any:
        """Inputs on the device, the same at each call."""

    @abc.abstractmethod
    def variants(self, data: Any) -> list[Variant]:
        """All there are; `Variant.make` says whether one can run."""

    @abc.abstractmethod
    def small(self) -> Case:
        """The sibling whose results are checked: odd sizes, any dtype but fp64 as this one's."""

    @abc.abstractmethod
    def truth(self, data: Any) -> Mapping[str, torch.Tensor]:
        """What the variants should return, in fp64 from the same inputs."""

    def floor(self) -> float:
        """The relative error that ours may have whatever the baseline's: a few roundings of the result."""
        return 4 * torch.finfo(self.dtype).eps

    def limit(self, baseline: float) -> float:
        """The largest error that ours may have where the baseline has that one."""
        return 2 * baseline + self.floor()

    def error(self, found: Mapping[str, torch.Tensor], truth: Mapping[str, torch.Tensor]) -> float:
        """The largest of the relative errors of `found`."""
        return max(relative_error(found[name], truth[name]) for name in found)

    def known(self, data: Any) -> list[torch.Tensor]:
        """Weights and other tensors that are no part of what autograd keeps for the backward pass."""
        return []

    counts_kept = False  # whether variants run autograd, so that there is something to keep
    truth_is = "fp64"  # in words

    def allowed(self, variant: Variant, baseline: float) -> float:
        """The largest error that a variant may have where the baseline has that one."""
        if variant.ours:
            return self.limit(baseline)
        return BASELINE_LIMIT if variant.name == self.baseline else RIVAL_LIMIT

    def implemented(
        self, make: Callable[[str], Callable], *operations: str, kinds: Callable[[], tuple[str, ...]] = tuple
    ) -> list[Variant]:
        """A variant of ours for each implementation of the first of these operations: make(impl) is its `make`, where
        all of them can run and are right. kinds: gives those of `need`."""

        def variant(impl):
            def made():
                for operation in operations:
                    need(operation, impl, self.device, self.dtype, kinds())
                return make(impl)

            return Variant(impl, made, ours=True)

        return [variant(impl) for impl in implementations(operations[0])]

    def chosen(self, data: Any) -> list[Variant]:
        wanted = self.options.variants
        return [v for v in self.variants(data) if wanted is None or v.name in wanted or v.name == self.baseline]

    def gate(self) -> tuple[dict[str, float | None], dict[str, str]]:
        """({variant: error, None where it returns nothing}, {variant: why it is left out}). `Wrong` where none of ours
        is within its limit, and one is beyond."""
        small = self.small()
        data = small.draw()
        truth, errors, left_out = small.truth(data), {}, {}
        variants = sorted(small.chosen(data), key=lambda v: v.name != self.baseline)
        for variant in variants:
            with forgiving(variant, left_out):
                found = variant.make()()
                error = None if found is None else small.error(found, truth)
                limit = small.allowed(variant, errors.get(self.baseline) or 0.0)
                if error is not None and not error <= limit:
                    said = f" (limit {limit:.1e})" if variant.ours else ""
                    raise Skip(f"{WRONG}{error:.1e} from {self.truth_is}{said}")
                errors[variant.name] = error
        ours = [v.name for v in variants if v.ours]
        wrong = {name: why.removeprefix(WRONG) for name, why in left_out.items() if why.startswith(WRONG)}
        if any(name in wrong for name in ours) and not any(name in errors for name in ours):
            raise Wrong(f"{'; '.join(f'{name} is {wrong[name]}' for name in ours if name in wrong)}: no numbers")
        return errors, left_out

    def rows(self) -> list[dict[str, Any]]:
        """One for each variant. `Wrong` where `gate` says so, or where ours differ from each other."""
        errors, left_out = self.gate()
        data = self.draw()
        variants, running, known, first = self.chosen(data), {}, {}, {}
        for variant in variants:
            name = variant.name
            if name not in errors:
                continue
            with forgiving(variant, left_out):
                run = variant.make()
                found = run()
                known[name] = {"error": errors[name], "peak_bytes": measure.peak_memory(run, self.device)}
                if self.counts_kept:
                    known[name]["kept_bytes"] = measure.kept_bytes(run, self.known(data))
                if variant.spent_flops is not None:
                    known[name]["spent_flops"] = variant.spent_flops()
                stays = variant.standing_bytes
                known[name]["standing_bytes"] = stays() if callable(stays) else stays
                if variant.ours and found is not None:  # at the timed shape ours have to agree with each other
                    apart = self.error(found, {key: first.setdefault(key, found[key]) for key in found})
                    if not apart <= 8 * self.floor():
                        raise Wrong(f"{name} and those before it are {apart:.1e} apart: no numbers")
                running[name] = run
            found = run = None
        first.clear()
        while True:
            try:
                times, rates, others = measure_rounds(running, self.options)
                break
            except torch.OutOfMemoryError:
                if not running:
                    raise
            largest = max(running, key=lambda name: known[name]["peak_bytes"] or 0)
            del running[largest]
            left_out[largest] = "out of memory beside the others"
            clear()
        shared = dict(baseline=times.get(self.baseline), rates=rates, others=others)
        return [
            self.row(variant.name, variant.ours, Measured(times[variant.name], **shared, **known[variant.name]))
            if variant.name in times
            else self.row(variant.name, variant.ours, note=f"not run: {left_out[variant.name]}")
            for variant in variants
        ]

    def rows_without(self, why: str) -> list[dict[str, Any]]:
        """Rows that say why this case has no numbers."""
        try:
            names = [(variant.name, variant.ours) for variant in self.chosen(self.small().draw())]
        except Exception:  # what kept it from being measured may keep this from being drawn too
            names = [("torch", True)]
        return [self.row(name, ours, note=f"not run: {why}") for name, ours in names]

    def row(self, variant: str, ours: bool, found: Measured | None = None, note: str = "") -> dict[str, Any]:
        row = dict.fromkeys(COLUMNS, "") | {
            **self.identity(), "variant": variant, "ours": int(ours), "note": note, "settings": self.options.settings,
            "gflop": rounded(self.flops / 1e9), "mib": rounded(self.nbytes / 2**20),
        }  # fmt: skip
        if found is not None:
            row |= found.columns(self.flops, self.nbytes)
            row["baseline"] = "" if found.baseline is None else self.baseline
        return row


def first_line(reason: BaseException) -> str:
    return (str(reason).strip().partition("\n")[0] or repr(reason))[:160]


@contextlib.contextmanager
def forgiving(variant: Variant, left_out: dict[str, str]) -> Iterator[None]:
    """Notes in `left_out` why a variant cannot run. Whatever a rival raises, ours is still measured; a bug in ours is
    raised."""
    try:
        yield
    except Exception as reason:
        harmless = isinstance(reason, (Skip, Unavailable)) or is_out_of_memory(reason)
        if isinstance(reason, Wrong) or (variant.ours and not harmless):
            raise
        left_out[variant.name] = first_line(reason)


def relative_error(found: torch.Tensor, truth: torch.Tensor) -> float:
    """|found - truth| / |truth|, Euclidean, in fp64; infinite where found is not finite."""
    found, truth = found.detach().double(), truth.detach().double()
    error = float(torch.linalg.vector_norm(found - truth))
    size = float(torch.linalg.vector_norm(truth))
    if not bool(found.isfinite().all()):
        return float("inf")
    return error / size if size else error


def measure_rounds(running: Mapping[str, Callable], options: Options):
    """({variant: milliseconds of each round}, (FLOP/s, bytes/s) of the same rounds, cores that others used)."""
    side, size = GPU_ROOFLINE if options.gpu else CPU_ROOFLINE
    if options.quick:
        side, size = side // 8, size // 64
    a, b = (torch.randn(side, side, device=options.device).to(options.the_dtype) for _ in range(2))
    c, source = torch.empty_like(a), torch.ones(size, dtype=torch.int8, device=options.device)
    target = torch.empty_like(source)
    everything = {
        **running,
        "roofline: matmul": lambda: torch.mm(a, b, out=c),
        "roofline: copy": lambda: target.copy_(source),
    }
    for run in everything.values():  # clocks, caches and the caching allocator as they will be
        run()
    repeats = options.repeats or (3 if options.quick else 30 if options.gpu else 7)
    seconds = options.seconds if options.seconds is not None else (0.0 if options.quick else 4.0)
    times, others = measure.interleaved(everything, options.device, repeats, seconds)
    matmul, copy = (statistics.median(times.pop(f"roofline: {name}")) / 1e3 for name in ("matmul", "copy"))
    return times, (2 * side**3 / matmul, 2 * size / copy), others


# ---------------------------------------------------------------- all cases


def all_cases(suites: Sequence[str], options: Options) -> list[Case]:
    """ValueError for a suite that there is not."""
    found = []
    for suite in dict.fromkeys(suites):
        if suite not in SUITES:
            raise ValueError(f"unknown suite {suite!r}: expected some of {', '.join(SUITES)}")
        found += importlib.import_module(f"kunbr_fast.benchmarks.suites.{suite}").cases(options)
    return found


def run(
    cases: Sequence[Case], budget: float = float("inf"), on_case: Callable[[Case], None] = lambda case: None
) -> Iterator[tuple[Case, list[dict[str, Any]], Exception | None]]:
    """For each case (case, its rows, None), or, where it gave no numbers, (case, rows that say so, why): `Wrong`, or
    `Skip` for want of time, memory or something else."""
    begin = time.perf_counter()
    for case in cases:
        why = None
        if time.perf_counter() - begin > budget:
            why = Skip(f"the {budget:.0f} s are over")
        else:
            on_case(case)
            why, rows = _rows(case)
        if why is not None:
            rows = case.rows_without(first_line(why))
        clear()
        about = measure.about(case.device)
        yield case, [row | about for row in rows], why


def clear() -> None:
    """Gives back what nobody uses any more, compiled functions and what they hold too."""
    torch._dynamo.reset()
    release()


def _rows(case: Case) -> tuple[Exception | None, list[dict[str, Any]]]:
    """Apart from `run`, so that a traceback does not keep what the case has drawn."""
    try:
        return None, case.rows()
    except (Wrong, Skip) as reason:
        return type(reason)(str(reason)), []
    except Exception as reason:
        if is_out_of_memory(reason):
            return Skip(f"out of memory: {first_line(reason)}"), []
        logger.exception("%s", case)  # the other cases' numbers are worth having
        return Wrong(f"{type(reason).__name__}: {first_line(reason)}"), []


# ---------------------------------------------------------------- what suites share


def implementations(operation: str) -> list[str]:
    """Every implementation that this release has of an operation, "torch" first."""
    return [impl for impl in reversed(dispatch.IMPLEMENTATIONS) if dispatch.has(operation, impl)]


def need(operation: str, impl: str, device: torch.device, dtype: torch.dtype, kinds: tuple[str, ...] = ()) -> None:
    """`Skip` where `impl` cannot run `operation` here, or is wrong. dtype: the table's, of an optimiser the weights'.
    kinds: of launch that the case leads to, of an operation that has several; (): all."""
    reason = dispatch.why_not(operation, impl, device)
    if reason is not None:
        raise Skip(reason)
    reason = why_wrong(operation, impl, dtype, device, kinds)
    if reason is not None:
        raise Skip(f"{WRONG}{reason}")


def imported(module: str, package: str):
    """A rival's module; `Skip` where it is not installed or cannot be imported."""
    try:
        return importlib.import_module(module)
    except Exception as error:  # ImportError, and whatever a package raises that needs a GPU to be imported
        raise Skip(f"{package} cannot be imported ({first_line(error)})") from error


def compiled(options: Options, function: Callable) -> Callable:
    """torch.compile of `function`; `Skip` on a CPU without --compile, where it takes minutes."""
    if not (options.gpu or options.compile):
        raise Skip("torch.compile takes minutes on a CPU: --compile")
    torch._dynamo.reset()
    return torch.compile(function)
