"""What `kunbr-fast prove --json` has proven: a table, or the variants of a suite that may be timed.

    python benchmarks/scripts/proven.py verdicts.jsonl              one line a verdict
    python benchmarks/scripts/proven.py verdicts.jsonl density      what to give --variants, one a line

An implementation of ours is a suite's variant if every operation in it has verdicts and all of them are right: a kernel
that is wrong is not timed, and one that hangs would take the others' numbers with it. What is left out is said on
standard error. Where there is no such file, or for a suite that has no kernel of its own, nothing: then all are timed.
Nothing here needs torch. torch.compile is never among the variants, as it takes minutes.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

OPTIMIZERS = ("lion", "adamw")
LAYER = ("rms_norm", "swiglu", "rotary")
SUITES = {  # suite: (operations, others that are timed beside ours)
    "density": (("grad_density",), ("bare", "grouped_mm")),
    "linear_loss": (("linear_loss",), ("eager", "F.linear_cross_entropy", "liger", "cut-cross-entropy")),
    "optimizer": (
        OPTIMIZERS,
        ("eager", "lion-pytorch", "lion-pytorch foreach", "lion-pytorch triton", "torch.optim foreach"),
    ),
    "norms": (("rms_norm", "layer_norm", "swiglu", "rotary"), ("eager", "F.rms_norm", "liger")),
    "cover_layer": (LAYER, ("eager", "liger")),
    "step": (
        ("linear_loss", "lion", *LAYER),
        ("reference", "frozen eager", "frozen, liger", "torch, graph"),
    ),
}
# suite: {variant: (implementation, the kinds of launches that the suite makes of it, None for all)}
IMPLEMENTATIONS = {
    "density": {
        "cuda": ("cuda", ("hopper", "portable")),
        "tile csrc portable": ("cuda", ("portable",)),
        "tile csrc hopper": ("cuda", ("hopper",)),
        "triton": ("triton", ("short", "long")),
    },
    "optimizer": {"cuda": ("cuda", None), "triton": ("triton", None)},
    "step": {"triton": ("triton", None), "triton, graph": ("triton", None)},
}
DEFAULT = {"triton": ("triton", None)}


def read(path: Path) -> list[dict[str, Any]]:
    """The verdicts, without a last line that a kill has cut short and without what is none."""
    found = []
    for line in path.read_text().splitlines():
        try:
            verdict = json.loads(line)
            found += [verdict] if {"operation", "impl", "dtype", "kind", "right"} <= set(verdict) else []
        except (ValueError, TypeError):
            continue
    return found


def why_not(
    verdicts: list[dict[str, Any]], operations: tuple[str, ...], impl: str, kinds: tuple[str, ...] | None
) -> str | None:
    """Why `impl` is not to be timed in bf16 (optimisers: in fp32, too), None if it is."""
    for operation in operations:
        dtypes = ("bf16", "fp32") if operation in OPTIMIZERS else ("bf16",)
        of = [v for v in verdicts if (v["operation"], v["impl"]) == (operation, impl) and v["dtype"] in dtypes]
        of = [v for v in of if kinds is None or v["kind"] in kinds]
        if not of:
            return f"{operation}: not proven"
        for verdict in of:
            if not verdict["right"]:
                return f"{operation} {verdict['dtype']} {verdict['kind']}: {verdict.get('why')}"
    return None


def line(verdict: dict[str, Any]) -> str:
    """Of the table."""
    name = " ".join(str(verdict[key]) for key in ("operation", "impl", "dtype", "kind"))
    if not verdict["right"]:
        return f"WRONG  {name}: {verdict.get('why')}"
    times = [f"{t['torch_ms'] / t['ours_ms']:.2f}x {t['mode']} {t['size']}" for t in verdict.get("times") or ()]
    return f"right  {name}: torch's time over ours {', '.join(times) or 'not measured'}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verdicts", type=Path)
    parser.add_argument("suite", nargs="?")
    arguments = parser.parse_args()
    if arguments.suite is None:
        verdicts = read(arguments.verdicts) if arguments.verdicts.exists() else []
        print("\n".join([*map(line, verdicts), f"{sum(v['right'] for v in verdicts)} of {len(verdicts)} are right"]))
        return 0
    if arguments.suite not in SUITES or not arguments.verdicts.exists():
        return 0
    verdicts, (operations, others) = read(arguments.verdicts), SUITES[arguments.suite]
    print("torch", *others, sep="\n")
    for variant, (impl, kinds) in IMPLEMENTATIONS.get(arguments.suite, DEFAULT).items():
        why = why_not(verdicts, operations, impl, kinds)
        if why is None:
            print(variant)
        else:
            print(f"{variant} is not timed: {why}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
