"""What a number may be: one check for each type, of options, settings and arguments alike."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

from kunbr_fast.files.shown import shown

FLOAT32 = 3.4028234663852886e38, 1.401298464324817e-45  # the largest number, and the smallest above 0
_WHOLE = re.compile(r"[+-]?[0-9]{1,40}")
_REAL = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,6})?")
_SIZE = re.compile(r"([0-9]{1,40}(?:\.[0-9]{1,40})?)(?: ?(?:([KMGT])(i?)B?|B))?", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Whole:
    """Integers from `least` to `most`."""

    least: int
    most: int

    def __str__(self) -> str:
        return f"a whole number from {self.least} to {self.most}" if self.least > -(2**31) else "an integer"

    def parse(self, text: str) -> int:
        """Of ASCII digits and a sign alone: int() takes "1_000", " 1" and other scripts' digits too."""
        return self.take(int(text) if _WHOLE.fullmatch(text) else None)

    def take(self, value: Any) -> int:
        """`value` itself. ValueError that says what is expected."""
        if isinstance(value, int) and not isinstance(value, bool) and self.least <= value <= self.most:
            return value
        raise ValueError(str(self))


@dataclasses.dataclass(frozen=True)
class Real:
    """Finite numbers that fp32 holds, from `least` (where `above`, from there on without it) to `most`."""

    least: float = -math.inf
    most: float = math.inf
    above: bool = False

    def __str__(self) -> str:
        limits = [f"above {self.least:g}" if self.above else f"of at least {self.least:g}"] * (self.least > -math.inf)
        limits += [f"at most {self.most:g}"] * (self.most < math.inf)
        return f"a number {' and '.join(limits)}" if limits else "a finite number"

    def parse(self, text: str) -> float:
        return self.take(text)

    def take(self, value: Any) -> float:
        """`value`, or what a text says (a quoted one in YAML), as a float. ValueError that says what is expected."""
        if isinstance(value, str):
            value, text = float(value) if _REAL.fullmatch(value) else math.nan, value
            if value == 0 and re.search("[1-9]", re.split("[eE]", text)[0]):
                raise ValueError(f"{self}, or 0 itself: this is rounded to 0")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < math.inf:
            raise ValueError(str(self))
        if not (self.least < value if self.above else self.least <= value) or not value <= self.most:
            raise ValueError(str(self))
        largest, smallest = FLOAT32
        if value and not smallest <= abs(value) <= largest:
            raise ValueError(f"{self} that fp32 holds ({smallest:.2g} to {largest:.2g})")
        return float(value)


@dataclasses.dataclass(frozen=True)
class Bytes:
    """A number of bytes below 2^63, or "8GiB", "500 MB"; unit_needed: with a unit where it is text, and above 0."""

    unit_needed: bool = False

    def __str__(self) -> str:
        if self.unit_needed:
            return "a number above 0 and a unit, such as 24GiB, 80GB or 512MiB"
        return "bytes, such as 8GiB, 500MB or 1000000"

    def parse(self, text: str) -> int:
        return self.take(text)

    def take(self, value: Any) -> int:
        found = value if isinstance(value, int) and not isinstance(value, bool) else None
        if isinstance(value, str) and (match := _SIZE.fullmatch(value)):
            unit = (1024 if match[3] else 1000) ** ("KMGT".index(match[2].upper()) + 1) if match[2] else 1
            if match[2] or not (self.unit_needed or "." in match[1]):  # there is no part of a byte
                found = int(float(match[1]) * unit)
        if found is None or found < int(self.unit_needed):
            raise ValueError(str(self))
        if found >= 2**63:
            raise ValueError(f"{self}, below 2^63 bytes")
        return found


ANY_WHOLE, ANY = Whole(-(2**31), 2**31 - 1), Real()
NOT_NEGATIVE, ABOVE_ZERO, SHARE = Real(0), Real(0, above=True), Real(0, 1, above=True)
COUNT, COUNT_OR_NONE = Whole(1, 2**31 - 1), Whole(0, 2**31 - 1)
SECONDS = Real(0, 1e9, above=True)
BATCH = Whole(1, 2**16)  # a step's samples are in memory together
EPOCHS, EPOCHS_OR_NONE = Whole(1, 10**6), Whole(0, 10**6)
LAYERS = Whole(1, 10**4)
SEED = Whole(0, 2**32 - 1)  # what torch's generator is seeded with is up to 2e9 times as large, and has 63 bits


def check(name: str, value: Any, kind: Whole | Real | Bytes, null: bool = False) -> Any:
    """`value` as `kind` has it, or None where `null`. ValueError "name=value: expected ..."."""
    if value is None and null:
        return None
    try:
        return kind.take(value)
    except ValueError as error:
        raise ValueError(f"{name}={shown(value)}: expected {error}{' or null' if null else ''}") from None


def parse_bytes(value: int | str | None, name: str, unit_needed: bool = False) -> int | None:
    """A number of bytes as `Bytes` has it, or None. ValueError "name=value: expected ..."."""
    return check(name, value, Bytes(unit_needed), null=True)


def least(*limits: int | None) -> int | None:
    """The least of some limits; None stands for no limit."""
    return min((limit for limit in limits if limit is not None), default=None)


def rates(lrs: float | Sequence[float], name: str) -> tuple[float, ...]:
    """ValueError unless it is one learning rate above 0, or several different ones."""
    found = tuple(lrs) if isinstance(lrs, (list, tuple)) else (lrs,)
    found = tuple(check(f"{name} entry", lr, ABOVE_ZERO) for lr in found)
    if not found or len(set(found)) < len(found):
        raise ValueError(f"{name}={shown(lrs)}: expected one or more different learning rates above 0")
    return found
