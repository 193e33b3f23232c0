"""One launch that is to be verified, as a value."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Launch:
    """`describe` gives the PTX and sentryward's description of the launch; it compiles, so it is called when needed.

    copies: threads that hold copies of a value may store it to the same word (copies.py)
    beyond: why the launch is not expected to be verified, or ""
    """

    kernel: str
    label: str
    architecture: str
    describe: Callable[[], tuple[str, dict]]
    copies: bool = False
    beyond: str = ""
    seconds: int = 900
    mebibytes: int = 4000
