"""What is read of one model, in one packed pass over all texts that anybody asks about.

Who wants to know something adds texts (`Reading.add`) and asks for rows, the predictions behind a token, and for tokens
in them. Each text goes through the model once, whoever asks; what the texts of a family have in common goes through it
once too, where the model runs trees (`data.trees`). Of logits, which are made at the rows that are asked for alone, a
few numbers a row are kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping, Sequence

import numpy as np
import torch
from tqdm import tqdm

from kunbr_fast.data import PackedBatch, token_batches
from kunbr_fast.data.trees import Trees
from kunbr_fast.memory import Place, is_out_of_memory, release
from kunbr_fast.model.decoder import Decoder, Stretch
from kunbr_fast.model.frozen import evaluating
from kunbr_fast.parallel.sharded import MARK as SHARDS

BATCH_TOKENS = 4096
_LOGITS_AT_ONCE = 1 << 25  # elements of one block of fp32 logits: 128 MiB


@dataclasses.dataclass(frozen=True)
class Rows:
    """What a model says, float64 on the CPU.

    Of each row: log_sums, the log of the sum of exp(logits); best (int64), the most probable token, the first of equal
    ones; means and deviations of log p(v) over the vocabulary, under p. logits: of each token that was asked for.
    """

    log_sums: np.ndarray
    best: np.ndarray
    means: np.ndarray
    deviations: np.ndarray
    logits: np.ndarray

    def to_dict(self) -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(value) for name, value in vars(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, torch.Tensor]) -> Rows:
        return cls(**{field.name: values[field.name].numpy() for field in dataclasses.fields(cls)})


class Reading:
    """The texts, and what is asked of them, for the models of a decoder's kind.

    Where a token's prediction depends on what stands behind it or on how long the text is, each text is read by
    itself, the beginnings of others too.
    """

    def __init__(self, decoder: Decoder):
        self.apart = decoder.rotary.same_up_to != float("inf") or decoder.way.name not in ("packed", "padded")
        self.trees = Trees(joined=not self.apart)
        self._rows: dict[int, int] = {}  # of a node
        self._asked: list[tuple[int, int]] = []  # (row, token)

    def __len__(self) -> int:
        """Tokens that go through a model that runs trees."""
        return len(self.trees)

    def add(self, ids: Sequence[int], family: Hashable) -> list[int]:
        """A text; returns a number for each of its tokens, for `rows`."""
        return self.trees.add(ids, tuple(ids) if self.apart else family)

    def rows(self, nodes: Sequence[int]) -> np.ndarray:
        """Asks for the predictions behind these tokens; where in `Rows` they will be."""
        return np.array([self._rows.setdefault(node, len(self._rows)) for node in nodes], dtype=np.int64)

    def tokens(self, rows: Sequence[int], tokens: Sequence[int]) -> slice:
        """Asks for one token in each row; where in `Rows.logits` they will be."""
        first = len(self._asked)
        self._asked += zip(map(int, rows), map(int, tokens), strict=True)
        return slice(first, len(self._asked))

    def taken(self) -> Taken:
        """Of which nothing is read yet."""
        return Taken(self._rows, self._asked)

    def read(self, decoder: Decoder, place: Place | None = None, progress: str | None = None) -> Rows:
        """`read_all` of this one."""
        return read_all(decoder, [self], place, progress)[0]


@torch.no_grad()
def read_all(
    decoder: Decoder, readings: Sequence[Reading], place: Place | None = None, progress: str | None = None
) -> list[Rows]:
    """What the decoder's model says; it is in eval mode meanwhile. Readings share no batch, so each has the bits that
    it has alone, but a streamed model reads each layer once for all of them.

    place: where a streamed model's activations wait between two layers. progress: label of a progress bar; its tokens
    are those of all layers. Where memory runs out all is begun again, with half the tokens at a time."""
    samples = samples_of(decoder, readings)
    longest, tokens = max((len(nodes) for mine in samples for nodes in mine), default=0), BATCH_TOKENS
    while True:
        try:
            return _read(decoder, readings, samples, tokens, place, progress)
        except Exception as error:
            # of a model in parts the other processes go on with the next layer: none of them may begin again alone
            if not is_out_of_memory(error) or tokens <= longest or hasattr(decoder.model, SHARDS):
                raise
        release()
        tokens //= 2


def samples_of(decoder: Decoder, readings: Sequence[Reading]) -> list[list[list[int]]]:
    """Of each reading the nodes of each tree, or text, that goes through the model, the longest first: attention pads
    little."""
    samples = [one.trees.grown() if decoder.trees else one.trees.texts() for one in readings]
    return [sorted(mine, key=len, reverse=True) for mine in samples]


def groups_of(samples: Sequence[list[list[int]]], tokens: int) -> list[tuple[int, list[list[int]]]]:
    """What goes through the model together: a reading's number, and some of its `samples_of`."""
    return [
        (number, [mine[i] for i in group])
        for number, mine in enumerate(samples)
        for group in token_batches(list(map(len, mine)), tokens)
    ]


def _read(
    decoder: Decoder,
    readings: Sequence[Reading],
    samples: Sequence[list[list[int]]],
    tokens: int,
    place: Place | None,
    progress: str | None,
) -> list[Rows]:
    groups = groups_of(samples, tokens)
    batches = (readings[number].trees.pack(group, decoder.trees).to(decoder.device) for number, group in groups)
    counts = [sum(map(len, group)) for _, group in groups]
    out, layers = [one.taken() for one in readings], range(decoder.num_layers)
    bar = tqdm(total=sum(counts), desc=progress, unit="token", unit_scale=True, leave=False, disable=progress is None)
    # not inference_mode: tensors that a model keeps from here (rotary tables) serve training too
    with evaluating(decoder.model), bar:
        for at, batch, arrived, stretch in decoder.forward_to(batches, layers, place) if groups else ():
            if layers[-1] in arrived:
                number, group = groups[at]
                out[number].take(decoder, batch, stretch, [node for nodes in group for node in nodes])
            bar.update(counts[at] * len(arrived) / len(layers))
    return [one.rows() for one in out]


class Taken:
    """What is read of one `Reading`. rows: of the nodes that are asked for; asked: (row, token)."""

    def __init__(self, rows: Mapping[int, int], asked: Sequence[tuple[int, int]]):
        self._left, self._asked = dict(rows), asked
        self._of: dict[int, list[int]] = {}  # of a row: which of the asked tokens are in it
        for at, (row, _) in enumerate(asked):
            self._of.setdefault(row, []).append(at)
        self._numbers: list[int] = []  # of the rows, in the order in which they were read
        self._read: list[torch.Tensor] = []  # (R, 5): log sums, best, means and squares below the largest, its -log p
        self._places: list[int] = []  # of the logits
        self._logits: list[torch.Tensor] = []

    def take(self, decoder: Decoder, batch: PackedBatch, stretch: Stretch, nodes: Sequence[int]) -> None:
        """nodes: of the batch's tokens. A node that several texts have (of a model that runs no trees) is read once."""
        places = [(place, self._left.pop(node)) for place, node in enumerate(nodes) if node in self._left]
        if not places:
            return
        at, rows = zip(*places)
        hidden = decoder.run(batch, stretch)[torch.tensor(at, device=decoder.device)]
        at_once = max(1, _LOGITS_AT_ONCE // decoder.config.vocab_size)
        for first in range(0, len(rows), at_once):
            logits = decoder.head(decoder.final(hidden[first : first + at_once]))
            self._of_logits(logits.to(torch.promote_types(logits.dtype, torch.float32)), rows[first : first + at_once])

    def _of_logits(self, logits: torch.Tensor, rows: Sequence[int]) -> None:
        wanted = [(i, at) for i, row in enumerate(rows) for at in self._of.get(row, ())]
        if wanted:
            places = torch.tensor([[i, self._asked[at][1]] for i, at in wanted], device=logits.device)
            self._logits.append(logits[places[:, 0], places[:, 1]].double())
            self._places += [at for _, at in wanted]
        best = logits.argmax(1)
        most = logits.gather(1, best[:, None])
        below = logits.sub_(most)  # the largest is 0: one exp serves the sum and the moments
        weights = below.exp()
        sums = weights.sum(1).double()
        weighted = weights.mul_(below)
        means = weighted.sum(1).double() / sums
        squares = weighted.mul_(below).sum(1).double() / sums
        self._read.append(torch.stack([most[:, 0].double() + sums.log(), best.double(), means, squares, sums.log()], 1))
        self._numbers += rows

    def rows(self) -> Rows:
        numbers, found = np.array(self._numbers, dtype=np.int64), np.empty((len(self._numbers), 5))
        found[numbers] = torch.cat(self._read).cpu().numpy() if self._read else found
        logits = np.empty(len(self._asked))
        logits[self._places] = torch.cat(self._logits).cpu().numpy() if self._logits else logits
        log_sums, best, means, squares, least = found.T
        deviations = np.sqrt(np.maximum(squares - means**2, 0))
        return Rows(log_sums, best.astype(np.int64), means - least, deviations, logits)
