"""Stores of copies: Triton lets each thread that holds a copy of a value store it, all to the same word at once.

sentryward does not compare what is stored and calls that a race. Here such a store is left to one of the threads, found
bit by bit: two threads that meet in one instruction and differ in one bit of their number hold copies along that bit
(Triton's layouts are linear in these bits), and the instruction is left to threads that have the bit at 0. When no more
is found the store is left to those that have all these bits at 1 as well: whoever stores, the rest has to be in order.
That the copies are equal is Triton's word, not proven here.
"""

from __future__ import annotations

import dataclasses
import re

from checker import Report, check
from launches import Launch

_STORE = re.compile(r"\s*(?:@(!?%\w+)\s+)?(st\.shared\b.*;)\s*$")


def without_locations(ptx: str) -> str:
    """Without the lines that name the source: a race is then given by its line in the PTX."""
    return re.sub(r"(?m)^\s*\.loc\b.*$", "", ptx)


def left_to(ptx: str, bits: dict[int, int], ones: bool) -> str:
    """`ptx` where the store in line `number` is left to threads with bits[number] at 0, or at 1."""
    lines = ptx.split("\n")
    for number, mask in bits.items():
        predicate, store = _STORE.match(lines[number - 1]).groups()
        also, more = (".and", f", {predicate}") if predicate else ("", "")
        lines[number - 1] = (
            "{ .reg .pred %leads; .reg .b32 %copy; mov.u32 %copy, %tid.x; "
            f"and.b32 %copy, %copy, {mask}; setp.eq{also}.u32 %leads, %copy, {mask if ones else 0}{more}; "
            f"@%leads {store} }}"
        )
    return "\n".join(lines)


def copied_bit(report: Report, ptx: str, threads: int) -> tuple[int, int] | None:
    """(line, bit) where the race is of two threads of a block in one store to shared memory that differ in one bit."""
    if not report.race:
        return None
    (line, one, space, mode), (other_line, other, _, other_mode) = report.race
    differ = one % threads ^ other % threads
    same = (
        line == other_line
        and mode == other_mode == "write"
        and space == "shared"
        and one // threads == other // threads
    )
    if not same or differ & (differ - 1) or "st.shared" not in ptx.split("\n")[line - 1]:
        return None
    return line, differ


def verify(launch: Launch) -> tuple[Report, int]:
    """(the report, how many stores of copies there are). Seconds are those of all runs together."""
    ptx, described = launch.describe()
    ptx, threads = without_locations(ptx), described["launch"]["block_dim"][0]
    bits: dict[int, int] = {}
    seconds = 0.0
    while True:
        report = check(left_to(ptx, bits, False), described, launch.seconds, launch.mebibytes)
        seconds += report.seconds
        found = copied_bit(report, ptx, threads) if launch.copies else None
        if found is None or bits.get(found[0], 0) & found[1]:
            break
        bits[found[0]] = bits.get(found[0], 0) | found[1]
    if bits and report.passed:
        report = check(left_to(ptx, bits, True), described, launch.seconds, launch.mebibytes)
        seconds += report.seconds
    return dataclasses.replace(report, seconds=seconds), len(bits)
