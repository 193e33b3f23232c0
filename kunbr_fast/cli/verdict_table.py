"""Verdicts on kernels as a table for a terminal."""

from __future__ import annotations

from collections import Counter

from kunbr_fast.kernels.verdicts import Verdict


def table(found: list[Verdict]) -> str:
    """One line a verdict, aligned, and how many of each there are."""
    if not found:
        return "none"
    rows = [("operation", "impl", "dtype", "kind", "error/bound", "verdict")]
    for v in sorted(found, key=lambda v: v.right):  # wrong ones first
        rows.append((*(getattr(v.target, name) for name in ("operation", "impl", "dtype", "kind")), _share(v), str(v)))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = ["  ".join([*(text.ljust(width) for text, width in zip(row, widths)), row[5]]).rstrip() for row in rows]
    count = Counter("right" if verdict.right else "WRONG" for verdict in found)
    return "\n".join([*lines, "", ", ".join(f"{number} {word}" for word, number in count.items())])


def _share(verdict: Verdict) -> str:
    if verdict.error is None or verdict.bound is None:
        return "-"
    return f"{verdict.error / verdict.bound:.2g}" if verdict.bound else f"{verdict.error:.2g}/0"
