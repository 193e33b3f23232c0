"""Shapes that benchmarks run at: those of models by name, and samples with their lengths."""

import dataclasses
from collections.abc import Sequence

import torch

from kunbr_fast.data import IGNORE, Sample


@dataclasses.dataclass(frozen=True)
class Shape:
    """A decoder's sizes, from its config.json."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int
    tied: bool = False  # head and embedding are one

    def projections(self) -> dict[str, tuple[int, int]]:
        """(N, K), out and in features, of the MLP's matrices; gate has up's."""
        return {"up": (self.intermediate, self.hidden), "down": (self.hidden, self.intermediate)}


MODELS = {
    "Llama-3-8B": Shape(4096, 14336, 32, 32, 8, 128256),
    "Qwen2.5-7B": Shape(3584, 18944, 28, 28, 4, 152064),
    "Llama-3.2-1B": Shape(2048, 8192, 16, 32, 8, 128256, tied=True),
    "SmolLM2-135M": Shape(576, 1536, 30, 9, 3, 49152, tied=True),
}


def odd(shape: Shape) -> Shape:
    """Of a gate's sibling: small and of odd sizes, but for heads, by whose width kernels differ."""
    head = 64 if shape.hidden // shape.heads >= 64 else 16
    return Shape(hidden=6 * head, intermediate=123, layers=1, heads=6, key_value_heads=2, vocabulary=64)


def ragged(count: int, seed: int = 0) -> list[int]:
    """Lengths of `count` samples as questions have them: log-normal with a mean of 44 tokens, from 8 to 224."""
    draw = torch.randn(count, generator=torch.Generator().manual_seed(seed))
    return (37.8 * (0.55 * draw).exp()).round().clamp(8, 224).int().tolist()


def wmdp(count: int, seed: int = 0) -> list[int]:
    """Lengths as WMDP's questions have them: log-normal with a mean of 77 tokens, from 20 to 224."""
    draw = torch.randn(count, generator=torch.Generator().manual_seed(seed))
    return (68 * (0.5 * draw).exp()).round().clamp(20, 224).int().tolist()


def samples(lengths: Sequence[int], vocabulary: int, target: str = "all") -> list[Sample]:
    """Random tokens; labels on all of them, or ("letter") on one near the end alone."""
    generator, found = torch.Generator().manual_seed(0), []
    for n in lengths:
        ids = torch.randint(3, vocabulary, (n,), generator=generator)
        labels = ids.clone() if target == "all" else torch.where(torch.arange(n) == n - 4, ids, IGNORE)
        found.append({"input_ids": ids, "labels": labels})
    return found


def questions(count: int, vocabulary: int, target: str = "all") -> list[Sample]:
    """`samples` of WMDP's lengths."""
    return samples(wmdp(count), vocabulary, target)


def equal(length: int, tokens: int) -> list[int]:
    """As many samples of `length` as have at least `tokens` tokens."""
    return [length] * -(-tokens // length)
