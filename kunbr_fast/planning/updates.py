"""What an optimiser updates, in bytes."""

from __future__ import annotations

import dataclasses

STATES = {"lion": 1, "adamw": 2}


@dataclasses.dataclass(frozen=True)
class Update:
    """entries: of the weights; states: of the optimiser for each entry; master: of half-precision weights, `fp32`
    copies that are updated, `stochastic` rounding of an fp32 state's update, or `none`; on_host: the host updates a
    block that a GPU trains."""

    entries: int
    states: int
    itemsize: int
    master: str = "none"
    on_host: bool = False

    def of(self, entries: int) -> Update:
        """Of other weights in the same way."""
        return dataclasses.replace(self, entries=entries)

    @property
    def weights(self) -> int:
        """Bytes."""
        return self.entries * self.itemsize

    @property
    def has_master(self) -> bool:
        return self.master == "fp32" and self.itemsize == 2

    @property
    def master_bytes(self) -> int:
        return 4 * self.entries * self.has_master

    @property
    def state(self) -> int:
        """Bytes, without the master's."""
        return self.states * self.entries * (4 if self._wide else self.itemsize)

    @property
    def kept(self) -> int:
        """All that stays from step to step besides the weights, in bytes."""
        return self.master_bytes + self.state

    @property
    def traffic(self) -> int:
        """Bytes that one update reads and writes."""
        wide = 4 if self._wide else self.itemsize
        return self.entries * (
            2 * self.itemsize + 2 * (4 if self.has_master else self.itemsize) + wide * 2 * self.states
        )

    @property
    def _wide(self) -> bool:
        return self.master != "none" and self.itemsize == 2
