"""Texts that begin alike as trees: what several have in common goes through a model once.

    When was Ada Li born? 19 56        one tree: 8 tokens, 2 branches
                             78

Tokens of a tree stand in depth-first order. A token sees those between it and the root, at the positions of its own
text: causal attention within each text, exactly. Texts are given with the name of a family, and those of a family are
one tree. A text that was given before, under whatever name, is not there twice. Families whose first texts begin with
the same 8 tokens (a chat's system message) grow on one tree too, up to 384 tokens: attention is over all of a tree, so
that larger ones would cost more than they save.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch

from kunbr_fast.data.batch import PackedBatch
from kunbr_fast.data.samples import IGNORE

ROOT = -1
STEM, MOST = 8, 384


class Trees:
    """Grows by `add`. A *node* is a token behind all that stand before it, a number; `tokens`, `parents` (ROOT of the
    first of a text) and `families`, the numbers of their trees, are the nodes'. joined: whether families that begin
    alike grow on one tree."""

    def __init__(self, joined: bool = True) -> None:
        self._joined = joined
        self.tokens: list[int] = []
        self.parents: list[int] = []
        self.families: list[int] = []
        self._names: dict[Hashable, int] = {}
        self._children: dict[tuple[int, int, int], int] = {}  # of (family, node, token); a node's family is its own
        self._known: dict[tuple[int, ...], list[int]] = {}
        self._open: dict[tuple[int, ...], int] = {}  # of a beginning: the tree that takes further families
        self._sizes: list[int] = []  # of the trees, in tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def add(self, ids: Sequence[int], family: Hashable) -> list[int]:
        """The node of each token of a text."""
        key = tuple(ids)
        if key in self._known:
            return self._known[key]
        number, node, path = self._tree(family, key), ROOT, []
        for token in key:
            child = self._children.setdefault((number, node, token), len(self.tokens))
            if child == len(self.tokens):
                self.tokens.append(token)
                self.parents.append(node)
                self.families.append(number)
                self._sizes[number] += 1
            path.append(node := child)
        self._known[key] = path
        return path

    def _tree(self, family: Hashable, text: tuple[int, ...]) -> int:
        """The tree of a family, a new one's by its first text."""
        if family not in self._names:
            stem = text[:STEM]
            number = self._open.get(stem, -1)
            if not self._joined or len(text) <= STEM or number < 0 or self._sizes[number] + len(text) > MOST:
                number = len(self._sizes)
                self._sizes.append(0)
                self._open[stem] = number
            self._names[family] = number
        return self._names[family]

    def grown(self) -> list[list[int]]:
        """Each tree's nodes, in depth-first order."""
        below: list[list[int]] = [[] for _ in self.tokens]
        roots: list[list[int]] = [[] for _ in self._sizes]
        for node, parent in enumerate(self.parents):
            (roots[self.families[node]] if parent == ROOT else below[parent]).append(node)
        return [_depth_first(mine, below) for mine in roots if mine]

    def texts(self) -> list[list[int]]:
        """The nodes of each text that no other one goes on from: for models that run no trees."""
        inner = set(self.parents)
        return [self.path(node) for node in range(len(self)) if node not in inner]

    def path(self, node: int) -> list[int]:
        """The nodes from the beginning of the text up to this one."""
        found = []
        while node != ROOT:
            found.append(node)
            node = self.parents[node]
        return found[::-1]

    def pack(self, samples: Sequence[Sequence[int]], trees: bool) -> PackedBatch:
        """A batch of samples of nodes, as `grown` (trees) or `texts` have them. Where no tree branches it is one of
        texts, whose attention needs no mask."""
        ids = torch.tensor([self.tokens[node] for nodes in samples for node in nodes])
        lengths = [len(nodes) for nodes in samples]
        shapes = [self._shape(nodes) for nodes in samples] if trees else []
        if all(max(depths) + 1 == len(depths) for depths, _ in shapes):
            places = torch.cat([torch.arange(n) for n in lengths])
            return PackedBatch(ids, torch.full_like(ids, IGNORE), places, lengths)
        depths, ends = (torch.tensor([value for shape in shapes for value in shape[i]]) for i in (0, 1))
        return PackedBatch(ids, torch.full_like(ids, IGNORE), depths, lengths, ends=ends)

    def _shape(self, nodes: Sequence[int]) -> tuple[list[int], list[int]]:
        """The depth of each node of a family, and the place of its last descendant."""
        place = {node: i for i, node in enumerate(nodes)}
        depths, ends = [0] * len(nodes), list(range(len(nodes)))
        for i, node in enumerate(nodes):
            if (parent := self.parents[node]) != ROOT:
                depths[i] = depths[place[parent]] + 1
        for i in range(len(nodes) - 1, -1, -1):  # descendants stand behind
            if (parent := self.parents[nodes[i]]) != ROOT:
                ends[place[parent]] = max(ends[place[parent]], ends[i])
        return depths, ends


def _depth_first(roots: Sequence[int], below: Sequence[Sequence[int]]) -> list[int]:
    order, waiting = [], list(reversed(roots))
    while waiting:
        order.append(node := waiting.pop())
        waiting += reversed(below[node])
    return order
