"""The names of a run's stages, and which block is trained when."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from kunbr_fast.run.config import KUnBRConfig


def layers(block: range) -> str:
    """A block's first and last layer, as people read them."""
    return f"{block.start}-{block.stop - 1}"


class Stage(str):
    """A stage's name in state.json and in the report: the group (such as "blocks"), then what is unique in it."""

    @property
    def group(self) -> str:
        return self.partition(".")[0]

    @property
    def block(self) -> range | None:
        """The block of a visit."""
        if self.group != "blocks":
            return None
        start, stop = self.rpartition(".")[2].split("-")
        return range(int(start), int(stop))

    @classmethod
    def evaluation(cls, model: str) -> Stage:
        return cls(f"evaluation.{model}")

    @classmethod
    def attack(cls, fold: str, lr: float, kind: str = "full") -> Stage:
        return cls(f"rtt.{fold}.{lr:g}" + f".{kind}" * (kind != "full"))


BEGIN, WARMUP, DENSITY, SELECTION, MERGE, RTT = map(Stage, "begin warmup density selection merge rtt".split())
ORIGINAL, ORIGINAL_HIDDEN = Stage("reference"), Stage("reference.blocks")  # the original's values
STATES = Stage("states")  # its hidden states, which no file has: a resumed run makes them again


@dataclasses.dataclass(frozen=True)
class Visit:
    """One training of a block: in which round, and which of the `num_blocks` chosen blocks."""

    round: int
    index: int
    block: range
    num_blocks: int

    @property
    def stage(self) -> Stage:
        return Stage(f"blocks.{self.round}.{self.block.start}-{self.block.stop}")

    @property
    def number(self) -> int:
        """Seeds the visit's data order (the warm-up's number is 0). It does not depend on when the visit is made."""
        return 1 + self.round * self.num_blocks + self.index

    def in_round(self, number: int) -> Visit:
        """The same block's visit in another round."""
        return dataclasses.replace(self, round=number)


def visits(config: KUnBRConfig, blocks: Sequence[range]) -> list[Visit]:
    """All visits in the order in which they are trained. Independent blocks do not see each other, so a block's rounds
    follow each other and the prefix cache rolls forward once; cumulative ones go round by round."""
    found = [
        Visit(round_, index, block, len(blocks))
        for round_ in range(config.rounds)
        for index, block in enumerate(blocks)
    ]
    return sorted(found, key=lambda visit: visit.index) if config.insertion == "independent" else found
