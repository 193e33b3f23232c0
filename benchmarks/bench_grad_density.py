"""Statistics of each sample's weight gradient, one layer at a time, against everything else that computes them.

    python benchmarks/bench_grad_density.py                        # CPU: two small models, minutes; GPU: all shapes
    python benchmarks/bench_grad_density.py --models Llama-3-8B --tokens 128 --csv benchmarks/results/gpu.csv
    KUNBR_AUTOTUNE=1 python ... / python ... --tiles               # tuned / every tile of the table as a variant

Ours: `torch`, `triton` (grad_l1), `triton all` (three statistics in one launch), `gram` (grad_l2sq only).
Rivals, found at run time:
  bare          each sample's product written to memory, no statistic: what the others are compared with; on a GPU the
                fastest of single, batched and grouped products
  grouped_mm    all gradients in memory, then abs and sum; grouped_norm: the same, reduced in one pass
  loop          a backward per sample (its forward untimed), then .grad.abs().sum()
  func          torch.func per-sample gradients, which run the layer's forward too
  opacus        ghost norm, L2 only
  compiled      torch.compile of bmm, abs and sum
Samples are padded for func, opacus and compiled before the clock starts.

Before timing, each variant runs on three samples of a small sibling of the shape and is compared with fp64: no numbers
if ours is wrong. Its results at the timed shape are compared with ours. Variants take turns in one process.
TFLOP/s count 2*T*N*K over all samples, whatever a variant does. The roofline is the larger of FLOPs over the rate of a
square product, and one reading of the inputs over the rate of a copy, both timed in the same rounds.
"""

import argparse
import contextlib
import dataclasses
import functools
import os
import statistics
import sys
import time

import torch
import torch.nn.functional as F

from kunbr_fast import dispatch
from kunbr_fast.benchmarks.measure import add_rows, interleaved, peak_memory, percentile, ratio, spare_cores
from kunbr_fast.benchmarks.shapes import MODELS, equal, ragged
from kunbr_fast.kernels import operators

GPU = torch.cuda.is_available()
TOKENS = (32, 64, 128, 256, 512, 2048)
DW_LIMIT = (24 if GPU else 2) << 30  # bytes of per-sample gradients that a rival may hold
CHUNK = (8 if GPU else 1) << 30  # bytes of them that torch.func holds at a time
CPU_ROOFLINE, GPU_ROOFLINE = (1536, 128 << 20), (8192, 1 << 30)  # side of the square product, bytes of the copy
OURS_LIMIT, RIVAL_LIMIT = 1e-5, 0.05  # largest relative error of a sample's statistic; bf16 rivals round dW


class Skip(Exception):
    """A variant cannot run, and why."""


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """One layer's x (T, K) and dy (T, N), packed samples."""

    x: torch.Tensor
    dy: torch.Tensor
    lengths: list[int]

    @classmethod
    def draw(cls, N, K, lengths, dtype, device, seed=0):
        generator = torch.Generator(device).manual_seed(seed)
        x, dy = (torch.randn(sum(lengths), n, generator=generator, device=device).to(dtype) for n in (K, N))
        return cls(x, dy, lengths)

    @property
    def N(self):
        return self.dy.shape[1]

    @property
    def K(self):
        return self.x.shape[1]

    @property
    def flops(self):
        return 2 * sum(self.lengths) * self.N * self.K

    @property
    def input_bytes(self):
        return (self.x.numel() + self.dy.numel()) * self.x.element_size()

    @property
    def dw_bytes(self):
        """Of all samples' gradients."""
        return len(self.lengths) * self.N * self.K * self.x.element_size()

    @functools.cached_property
    def cu_seqlens(self):
        return torch.tensor([0, *self.lengths]).cumsum(0).to(self.x.device, torch.int32)

    def parts(self):
        return list(zip(self.x.split(self.lengths), self.dy.split(self.lengths)))

    @functools.cached_property
    def padded(self):
        """(B, L, K) and (B, L, N): views where samples are of one length, else zeros after each one's end."""
        if len(set(self.lengths)) == 1:
            return tuple(t.unflatten(0, (len(self.lengths), -1)) for t in (self.x, self.dy))
        return tuple(
            torch.nn.utils.rnn.pad_sequence(t.split(self.lengths), batch_first=True) for t in (self.x, self.dy)
        )

    def truth(self):
        """{statistic: (B,) float64} in float64."""
        dw = [dy.double().T @ x.double() for x, dy in self.parts()]
        return {
            "grad_l1": torch.stack([g.abs().sum() for g in dw]),
            "grad_l2sq": torch.stack([g.square().sum() for g in dw]),
        }


# ---------------------------------------------------------------- variants: case -> function that returns (B,) or None


def ours(case, impl, names=("grad_l1",), form="auto", returns="grad_l1"):
    if impl == "triton":
        reason = dispatch.why_not("grad_density", "triton", case.x.device)
        if reason:
            raise Skip(reason)
    arguments = dict(max_seqlen=max(case.lengths), statistics=names, form=form, impl=impl)
    return lambda: operators.grad_density(case.x, [case.dy], case.cu_seqlens, **arguments)[0][returns]


def one_tile(case, tile):
    from kunbr_fast.kernels.grad_density import launch

    return lambda: launch(case.x, [case.dy], case.cu_seqlens, ("grad_l1",), tile=tile)[0][0]


def bare(case):
    """On a GPU the fastest of three: one product a sample, one batched (equal samples), one grouped."""
    # On a CPU new memory costs more than the product of a short sample: one buffer for all.
    parts, out = case.parts(), None if case.x.is_cuda else torch.empty(case.N, case.K, dtype=case.dy.dtype)

    def one_by_one():
        for x, dy in parts:
            torch.mm(dy.t(), x, out=out)

    if not case.x.is_cuda:
        return one_by_one
    ways = [one_by_one]
    if len(set(case.lengths)) == 1 and case.dw_bytes <= DW_LIMIT:
        x, dy = case.padded
        ways.append(lambda: void(torch.bmm(dy.mT, x)))
    with contextlib.suppress(Skip):
        product = grouped_products(case)
        ways.append(lambda: void(product()))
    for run in ways:
        run()
    times, _ = interleaved(dict(enumerate(ways)), case.x.device, 3, 0)
    return ways[min(times, key=lambda way: min(times[way]))]


def void(_):
    return None


def grouped_products(case):
    """A function that returns all dW_i, (B, N, K)."""
    grouped_mm = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
    if grouped_mm is None:
        raise Skip("this torch has no grouped_mm")
    if 2 * case.dw_bytes > DW_LIMIT:
        raise Skip(f"would hold {2 * case.dw_bytes / 2**30:.0f} GiB")
    ends = case.cu_seqlens[1:]
    try:
        grouped_mm(case.dy.t(), case.x, offs=ends)
    except (RuntimeError, NotImplementedError) as error:
        raise Skip(f"grouped_mm: {str(error).splitlines()[0][:120]}") from error
    return lambda: grouped_mm(case.dy.t(), case.x, offs=ends)


def grouped(case):
    product = grouped_products(case)
    return lambda: product().abs().sum((1, 2), dtype=torch.float32)


def grouped_norm(case):
    product = grouped_products(case)
    return lambda: torch.linalg.vector_norm(product(), 1, (1, 2), dtype=torch.float32)


def loop(case):
    weight = torch.zeros(case.N, case.K, dtype=case.x.dtype, device=case.x.device, requires_grad=True)
    graphs = [(F.linear(x, weight), dy) for x, dy in case.parts()]

    def run():
        sums = []
        for y, dy in graphs:
            y.backward(dy, retain_graph=True)
            sums.append(weight.grad.abs().sum(dtype=torch.float32))
            weight.grad = None
        return torch.stack(sums)

    return run


def func(case):
    weight = torch.zeros(case.N, case.K, dtype=case.x.dtype, device=case.x.device)
    x, dy = case.padded
    each = torch.func.vmap(lambda x, dy: torch.func.vjp(lambda w: F.linear(x, w), weight)[1](dy)[0])
    step = max(1, CHUNK * len(x) // max(1, case.dw_bytes))

    def run():
        chunks = zip(x.split(step), dy.split(step))
        return torch.cat([each(a, b).abs().sum((1, 2), dtype=torch.float32) for a, b in chunks])

    return run


def opacus(case):
    try:
        from opacus.grad_sample.linear import compute_linear_norm_sample
    except ImportError as error:
        raise Skip(f"opacus cannot be imported ({error})") from error
    layer = torch.nn.Linear(case.K, case.N, bias=False, device="meta", dtype=case.x.dtype)
    x, dy = case.padded
    return lambda: compute_linear_norm_sample(layer, [x], dy)[layer.weight].double().square()


@functools.cache
def compiled_plain():
    return torch.compile(lambda x, dy: torch.bmm(dy.mT, x).abs().sum((1, 2), dtype=torch.float32), dynamic=True)


def compiled(case):
    if case.dw_bytes > DW_LIMIT:
        raise Skip(f"would hold {case.dw_bytes / 2**30:.0f} GiB")
    x, dy = case.padded
    return lambda: compiled_plain()(x, dy)


ALL = ("grad_l1", "grad_l2sq", "grad_linf")
VARIANTS = {
    "bare": bare,
    "triton": lambda case: ours(case, "triton"),
    "triton all": lambda case: ours(case, "triton", ALL),
    "torch": lambda case: ours(case, "torch"),
    "gram": lambda case: ours(case, "torch", ("grad_l2sq",), "gram", "grad_l2sq"),
    "grouped_mm": grouped,
    "grouped_norm": grouped_norm,
    "loop": loop,
    "func": func,
    "opacus": opacus,
    "compiled": compiled,
}
L2 = ("gram", "opacus")  # what returns grad_l2sq
OURS = ("triton", "triton all", "torch", "gram")


def variants_for(case, arguments):
    """The chosen variants, and with --tiles one for each candidate tile."""
    chosen = {name: VARIANTS[name] for name in arguments.variants}
    if arguments.tiles:
        from kunbr_fast.kernels import config

        mean = sum(case.lengths) / len(case.lengths)
        kind = "fp32" if case.x.dtype == torch.float32 else "short" if mean <= config.SHORT_MEAN_TOKENS else "long"
        for tile in config.TABLE[config.architecture(case.x.device), kind]:
            chosen[f"tile {tile}"] = functools.partial(one_tile, tile=tile)
    return chosen


def is_ours(name):
    return name in OURS or name.startswith("tile ")


# ---------------------------------------------------------------- one row: a shape, timed


def worst(found, truth):
    return float(((found.double() - truth).abs() / truth).max()) if found.isfinite().all() else float("inf")


def gate(N, K, lengths, arguments, skipped):
    """{variant: largest relative error on a small sibling of the shape}. Ours wrong: exit."""
    small = [max(16, round(n / 32 / 8) * 8) for n in (N, K)]
    case = Case.draw(*small, lengths[:3], arguments.dtype, arguments.device, seed=1)
    truth, errors = case.truth(), {}
    for name, make in variants_for(case, arguments).items():
        try:
            found = make(case)()
        except Exception as reason:  # whatever a rival raises here, ours is still measured
            if is_ours(name) and not isinstance(reason, Skip):
                raise
            skipped.setdefault(name, str(reason).partition("\n")[0] or repr(reason))
            continue
        errors[name] = 0.0 if found is None else worst(found, truth["grad_l2sq" if name in L2 else "grad_l1"])
        if not errors[name] <= (OURS_LIMIT if is_ours(name) else RIVAL_LIMIT):
            if is_ours(name):
                sys.exit(f"{name} at {small[0]}x{small[1]}, {lengths[:3]} tokens: relative error {errors[name]:.1e}, "
                         f"limit {OURS_LIMIT:.0e}: no numbers")  # fmt: skip
            skipped[name] = f"wrong: relative error {errors.pop(name):.1e}"
    return errors


def measure(case, errors, arguments, skipped):
    """{variant: milliseconds of each round}, {variant: peak bytes}, (FLOP/s, bytes/s) of the ceilings in the same
    rounds, and the cores that others used meanwhile."""
    device = case.x.device
    side, size = GPU_ROOFLINE if case.x.is_cuda else CPU_ROOFLINE
    a, b = (torch.randn(side, side, device=device).to(case.x.dtype) for _ in range(2))
    c, source = torch.empty_like(a), torch.ones(size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    running = {"matmul": lambda: torch.mm(a, b, out=c), "copy": lambda: target.copy_(source)}
    for run in running.values():
        run()
    peaks, results = {}, {}
    for name, make in variants_for(case, arguments).items():
        if name not in errors:
            continue
        try:
            running[name] = make(case)
            results[name] = running[name]()
            with_buffer = name == "bare" and not case.x.is_cuda  # made beforehand, but not an input
            peaks[name] = peak_memory((lambda make=make: make(case)()) if with_buffer else running[name], device)
        except (Skip, torch.OutOfMemoryError) as reason:
            running.pop(name, None), results.pop(name, None)
            skipped[name] = str(reason).splitlines()[0]
    for statistic in ("grad_l1", "grad_l2sq"):
        found = {n: r for n, r in results.items() if r is not None and (n in L2) == (statistic == "grad_l2sq")}
        truth = next((r.double() for n, r in found.items() if is_ours(n)), None)
        for name, result in found.items():
            error = 0.0 if truth is None else worst(result, truth)
            if not error <= (10 * OURS_LIMIT if is_ours(name) else RIVAL_LIMIT):
                sys.exit(f"{name} and ours differ by {error:.1e} at {case.N}x{case.K}, {case.lengths}: no numbers")
    results.clear()
    if case.x.is_cuda:
        for run in running.values():  # clocks and caching allocator as they will be
            run()
    times, others = interleaved(running, device, arguments.repeats, arguments.seconds)
    matmul, copy = (statistics.median(times.pop(name)) / 1e3 for name in ("matmul", "copy"))
    return times, peaks, (2 * side**3 / matmul, 2 * size / copy), others


def row(model, projection, label, case, arguments, skipped):
    errors = gate(case.N, case.K, case.lengths, arguments, skipped)
    times, peaks, (flop_rate, byte_rate), others = measure(case, errors, arguments, skipped)
    floor = max(case.flops / flop_rate, case.input_bytes / byte_rate) * 1e3
    rows = []
    for name, values in times.items():
        ms = statistics.median(values)
        rows.append(
            {
                "benchmark": "grad_density", "model": model, "projection": projection, "N": case.N, "K": case.K,
                "length": label, "samples": len(case.lengths), "tokens": sum(case.lengths),
                "dtype": str(arguments.dtype)[6:], "variant": name,
                "statistic": "none" if name == "bare" else "grad_l2sq" if name in L2
                else "+".join(ALL) if name == "triton all" else "grad_l1",
                "ms": round(ms, 4), "p20_ms": round(percentile(values, 0.2), 4),
                "p80_ms": round(percentile(values, 0.8), 4), "rounds": len(values),
                "tflop_per_s": round(case.flops / ms / 1e9, 4), "roofline_percent": round(100 * floor / ms, 1),
                "over_bare": round(ratio(times, name, "bare"), 3) if "bare" in times else "",
                "peak_mib": "" if peaks[name] is None else round(peaks[name] / 2**20, 1),
                "error": float(f"{errors[name]:.1e}"),
                "matmul_tflop_per_s": round(flop_rate / 1e12, 4), "copy_gb_per_s": round(byte_rate / 1e9, 1),
                "others_cores": "" if others is None else round(others, 2),
            }
        )  # fmt: skip
    return rows


# ---------------------------------------------------------------- the whole run


HEAD = (f"{'variant':<14} {'ms':>9} {'p20':>9} {'p80':>9} {'TFLOP/s':>8} {'% roof':>7} {'/ bare':>7} {'peak MiB':>9} "
        f"{'error':>8}")  # fmt: skip


def show(rows):
    r = rows[0]
    disturbed = r["others_cores"] != "" and r["others_cores"] > spare_cores()
    print(f"\n{r['model']} {r['projection']} {r['N']}x{r['K']} {r['dtype']}: {r['samples']} samples of {r['length']}, "
          f"{r['tokens']} tokens; matmul {r['matmul_tflop_per_s']:.4g} TFLOP/s, copy {r['copy_gb_per_s']:.4g} GB/s, "
          f"{r['rounds']} rounds" + (f", DISTURBED: others used {r['others_cores']} cores" if disturbed else "") + "\n"
          + HEAD)  # fmt: skip
    for r in rows:
        name = r["variant"] + (" (L2)" if r["variant"] in L2 else "")
        over, peak, error = r["over_bare"], r["peak_mib"], "" if r["variant"] == "bare" else f"{r['error']:.1e}"
        print(f"{name:<14} {r['ms']:9.3f} {r['p20_ms']:9.3f} {r['p80_ms']:9.3f} {r['tflop_per_s']:8.4g} "
              f"{r['roofline_percent']:7.1f} {over:>7} {peak:>9} {error:>8}")  # fmt: skip
    sys.stdout.flush()


def summary(shapes):
    """Ours at each shape over bare and against the fastest rival of the same statistic, and the issue's goals."""
    best = "triton" if any(r["variant"] == "triton" for rows in shapes for r in rows) else "torch"
    print(f"\n{best}, grad_l1, against the fastest rival (above 1.00: ours is faster); gram, grad_l2sq, against opacus")
    print(f"{'shape':<38} {'TFLOP/s':>8} {'% roof':>7} {'/ bare':>7} {'rival':>14} {'ours is':>8} {'gram is':>8}")
    lost = 0
    goals = []
    for rows in shapes:
        by = {r["variant"]: r for r in rows}
        if best not in by:
            continue
        mine = by[best]
        rivals = [r for n, r in by.items() if not is_ours(n) and n not in ("bare", *L2)]
        rival = min(rivals, key=lambda r: r["ms"], default=None)
        label = f"{mine['model']} {mine['projection']} T={mine['length']}"
        gain = rival["ms"] / mine["ms"] if rival else None
        slower = rival is not None and gain < 1
        lost += slower
        l2 = f"{by['opacus']['ms'] / by['gram']['ms']:.2f}x" if "opacus" in by and "gram" in by else ""
        print(f"{label:<38} {mine['tflop_per_s']:8.4g} {mine['roofline_percent']:7.1f} {mine['over_bare']:>7} "
              f"{rival['variant'] if rival else '':>14} {f'{gain:.2f}x' if rival else '':>8} {l2:>8}"
              f"{'  LOST' if slower else ''}")  # fmt: skip
        if best == "triton" and (mine["N"], mine["K"]) == (14336, 4096) and mine["length"] != "ragged":
            wanted = 400 if mine["length"] == 128 else 600 if mine["length"] >= 512 else None
            if wanted:
                goals.append((f"{label}: TFLOP/s", mine["tflop_per_s"], ">=", wanted))
        if best == "triton" and mine["length"] != "ragged" and mine["length"] <= 128 and "grouped_mm" in by:
            goals.append((f"{label}: times grouped_mm", by["grouped_mm"]["ms"] / mine["ms"], ">=", 2.0))
        if best == "torch" and mine["model"] == "Llama-3.2-1B" and mine["over_bare"] != "":
            goals.append((f"{label}: over bare", mine["over_bare"], "<=", 1.5))
    print(f"slower than the fastest rival at {lost} of {len(shapes)} shapes")
    for what, value, sign, wanted in goals:
        met = value >= wanted if sign == ">=" else value <= wanted
        print(f"goal {'met   ' if met else 'MISSED'} {what} {value:.2f}, wanted {sign} {wanted}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    small = [name for name in MODELS if name in ("Llama-3.2-1B", "SmolLM2-135M")]
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS) if GPU else small)
    parser.add_argument("--projections", nargs="+", choices=["up", "down"], default=["up", "down"])
    lengths = [*map(str, TOKENS), "ragged"]
    parser.add_argument("--tokens", nargs="+", default=lengths if GPU else ["32", "128", "512", "ragged"],
                        help="of each sample, and/or ragged: mean 44, at most 224")  # fmt: skip
    parser.add_argument("--min-tokens", type=int, default=2048 if GPU else 256, help="of a batch [%(default)s]")
    parser.add_argument("--dtype", default="bfloat16" if GPU else "float32", help="[%(default)s]")
    parser.add_argument("--device", default="cuda" if GPU else "cpu", help="[%(default)s]")
    default = [name for name in VARIANTS if GPU or name != "compiled"]  # minutes to compile on a CPU
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=default)
    parser.add_argument("--compile", action="store_true", help="with torch.compile, on a CPU too")
    parser.add_argument("--tiles", action="store_true", help="each candidate of kernels/config.py's table is a variant")
    parser.add_argument("--repeats", type=int, default=30 if GPU else 7, help="rounds of a shape [%(default)s]")
    parser.add_argument("--seconds", type=float, default=20.0 if GPU else 4.0,
                        help="for the rounds of a shape [%(default)s]")  # fmt: skip
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds after which no shape is begun")
    parser.add_argument("--csv", help="append rows here, shape by shape")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("TRITON_INTERPRET=1 is set: interpreted kernels are not what is measured; unset it")
    arguments.dtype = getattr(torch, arguments.dtype)
    if arguments.compile and "compiled" not in arguments.variants:
        arguments.variants.append("compiled")
    begin, shapes, skipped, left_out = time.perf_counter(), [], {}, []
    print(f"{torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}, {arguments.dtype}, {arguments.device}")
    for model in arguments.models:
        for projection in arguments.projections:
            N, K = MODELS[model].projections()[projection]
            for label in arguments.tokens:
                if time.perf_counter() - begin > arguments.budget:
                    left_out.append(f"{model} {projection} {label}")
                    continue
                label = label if label == "ragged" else int(label)
                few = ragged(max(3, round(arguments.min_tokens / 44)))
                batch = few if label == "ragged" else equal(label, arguments.min_tokens)
                case = Case.draw(N, K, batch, arguments.dtype, arguments.device)
                known = dict(skipped)
                shapes.append(row(model, projection, label, case, arguments, skipped))
                show(shapes[-1])
                for name, reason in skipped.items():
                    if known.get(name) != reason:
                        print(f"{name:<14} not run: {reason}")
                if arguments.csv:
                    add_rows(arguments.csv, shapes[-1], kernels=True, quiet=True)
    summary(shapes)
    if left_out:
        print(f"left out, {arguments.budget:.0f} s were over: {', '.join(left_out)}")
    print(f"{time.perf_counter() - begin:.0f} s, load {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
