"""Settings of the launcher for OpenUnlearning, and how it refuses a run."""

from __future__ import annotations

import dataclasses
from typing import Any

from kunbr_fast.kernels.dispatch import IMPLEMENTATIONS


class Refused(SystemExit):
    """A run that cannot begin; the message says what is missing and the cure."""

    def __init__(self, message: str):
        super().__init__(f"kunbr_fast.integrations.open_unlearning: {message}")


@dataclasses.dataclass(frozen=True)
class Options:
    """What stands under `kunbr_fast` in the config."""

    patch: bool = False
    impl: str = "auto"
    measure: bool = False

    def __post_init__(self) -> None:
        for name in ("patch", "measure"):
            if not isinstance(getattr(self, name), bool):
                raise Refused(f"kunbr_fast.{name}={getattr(self, name)!r}: expected true or false")
        if self.impl not in ("auto", *IMPLEMENTATIONS):
            raise Refused(f"kunbr_fast.impl={self.impl!r}: expected one of auto, {', '.join(IMPLEMENTATIONS)}")

    @classmethod
    def of(cls, values: Any) -> Options:
        """From the config's node (a mapping, or None where there is none)."""
        values = dict(values or {})
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = [str(name) for name in values if name not in known]
        if unknown:
            raise Refused(f"unknown setting kunbr_fast.{unknown[0]}: known are {', '.join(known)}")
        return cls(**values)
