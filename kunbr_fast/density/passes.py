"""Passes over samples that read the gradients of watched parameters, of each sample or of all together.

For a norm no weight gradient is held: a linear layer's gradient for one sample is dY_i^T X_i, formed a tile at a time
in the backward pass from the layer's input and the gradient of its output (`taps`, `layer_kinds`). Samples are
packed, and each one's loss stands alone in the sum, so one backward pass serves all of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from kunbr_fast.data import PackedBatch, Sample, as_samples, check_labels, pack
from kunbr_fast.data.schedule import token_batches
from kunbr_fast.density import experts
from kunbr_fast.density.layer_kinds import BY_AUTOGRAD, How, Watched, norm_of
from kunbr_fast.density.reading import Add, Again, Found, Reading, alike
from kunbr_fast.density.sums import Sums
from kunbr_fast.kernels.dispatch import resolve
from kunbr_fast.memory import OutOfMemory, Place, cannot_fit, gibibytes, is_out_of_memory, release
from kunbr_fast.model.decoder import Decoder, Stretch
from kunbr_fast.model.frozen import frozen
from kunbr_fast.model.gather import take
from kunbr_fast.model.ownership import differentiable
from kunbr_fast.model.vocabulary import check_tokens
from kunbr_fast.objectives import losses
from kunbr_fast.parallel.group import ALONE, Group

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class PassSettings:
    """How passes over samples run. None of it changes the result by more than rounding.

    batch_tokens: tokens of one packed forward and backward pass; where memory runs out, fewer.
    gradient_checkpointing: keep only each layer's input for the backward pass and run the layer again. None: if the
    model has it enabled.
    activations, directory: where activations of a streamed model wait between two layers (layers x tokens x hidden
    size), as `storage` and `directory` of `PrefixCache`. Each layer is read once on the way up and once on the way
    down, for all samples together.
    impl: who runs the kernels, "auto", "cuda", "triton" or "torch". progress: shows a bar.
    group: processes that call this together, with the same arguments (`parallel.group.joined`): each measures its part
    of the samples, and all have the whole result.
    """

    batch_tokens: int = 2048
    gradient_checkpointing: bool | None = None
    activations: str = "auto"
    directory: str | Path | None = None
    impl: str = "auto"
    progress: bool = False
    group: Group = ALONE

    @property
    def place(self) -> Place:
        return Place(self.activations, self.directory)


def checked_samples(decoder: Decoder, samples: Iterable[Any], name: str) -> list[Sample]:
    """`as_samples`, each with a loss and the model's tokens; errors call a sample `name`."""
    samples = as_samples(samples)
    names = [f"{name} {i}" for i in range(len(samples))]
    check_labels(samples, names)
    check_tokens(decoder.model, samples, names)
    return samples


class Measurement:
    """Passes over samples of one set of watched parameters, within `ready`."""

    def __init__(self, decoder: Decoder, watched: list[Watched], how: How, settings: PassSettings = PassSettings()):
        differentiable(decoder.model)
        self.decoder, self.watched, self.how, self.settings = decoder, watched, how, settings
        self.group, self.batch_tokens = settings.group, settings.batch_tokens
        for operation in ("grad_density", "linear_loss"):
            resolve(operation, how.impl, decoder.device)
        self.recompute = settings.gradient_checkpointing
        if self.recompute is None:
            self.recompute = any(getattr(m, "gradient_checkpointing", False) for m in decoder.model.modules())
        self.one_by_one = False  # a batch has one sample: autograd gives gradients of whole batches
        self._settled = False  # a pass has shown that every module is of its kind
        self._bar = tqdm(disable=True)
        self._warned = False

    @contextlib.contextmanager
    def ready(self, total: int, title: str = "knowledge density") -> Iterator[None]:
        """Inside, `norms` and `gradients` may run, over `total` samples in all; afterwards the model is as before."""
        total = -(-total // self.group.size)
        with frozen(self.decoder.model), contextlib.ExitStack() as stack:
            bar = tqdm(total=total, desc=title, unit="sample", leave=False, disable=not self.settings.progress)
            self._bar = stack.enter_context(bar)
            known = [item for item in self.watched if item.experts is not None and item.kind is not BY_AUTOGRAD]
            self._by_autograd(experts.check(self.decoder, known), False)
            yield

    # ------------------------------------------------ what can be asked for

    def norms(self, samples: Sequence[Sample], statistic: str, reduction: str) -> Sums:
        """The samples' statistic, summed (reduction="sample"), or that of their mean gradient."""
        sums, batches = Sums(self.decoder, self.watched, self.how, statistic), self._batches(samples, whole=True)
        if reduction == "sample":
            for found in self._each(self.group.share(samples)):
                sums.add(found, 1.0)
                del found  # before the next one is made
            sums.gather(self.group)
        elif len(batches) == 1 and self.group.size == 1 and (found := self._run(batches, self._reading(whole=True))):
            sums.add(found[0], 1.0 / len(samples))
        else:
            found: Found = {}

            def add(path: str, gradient: torch.Tensor) -> None:
                if path in self.how.tiles:
                    found[path] = self.how.tiles[path].totals(norm_of(gradient, self.how.statistic)[:, None])
                else:
                    found[path] = norm_of(gradient.flatten(1), self.how.statistic)[:, None]

            self.gradients(samples, add)
            sums.add(found, 1.0 / len(samples))
        return sums

    def gradients(self, samples: Sequence[Sample], visit: Add, squared: bool = False) -> None:
        """`visit(path, sum over samples of the parameter's gradient)`, once for each parameter that has one.

        The sum is (E, N, K) for a matrix, (E, n) for all else, in fp32 (fp64 for fp64 models), and becomes the
        caller's. Where all samples fit one batch it is made within the backward pass and nothing is held here; else
        one gradient of the watched parameters is. squared: the sum of each sample's squared gradient instead (always
        held). Of several processes each makes its part, and all visit the sum.
        """
        samples = self.group.share(samples)
        held: dict[str, torch.Tensor] = {}
        visited: set[str] = set()

        def now(path: str, gradient: torch.Tensor) -> None:
            if path not in visited:  # before it began again
                visited.add(path)
                visit(path, gradient)

        def add(path: str, gradient: torch.Tensor) -> None:
            gradient = gradient.square_() if squared else gradient
            held[path] = held[path].add_(gradient) if path in held else gradient

        done = None
        while done is None:
            held.clear()
            batches = self._batches(samples, whole=not squared)
            alone = len(batches) == 1 and not squared and self.group.size == 1
            if alone:
                self._settle(samples[0])  # what is visited is not visited again
            take = now if alone else add
            reading = self._reading(whole=not squared, add=take)
            done = self._run(batches, reading)
        self._gather(held)
        for path in list(held):
            gradient = held.pop(path)
            if path not in visited:  # before memory ran out
                visit(path, gradient)

    # ------------------------------------------------ batches, and memory that runs out

    def _batches(self, samples: Sequence[Sample], whole: bool) -> list[list[Sample]]:
        lengths = [len(s["input_ids"]) for s in samples]
        together = self.decoder.way.together(max(lengths, default=0))  # else each sample is a batch
        if not together or (self.one_by_one and not whole):
            return [[sample] for sample in samples]
        batches = token_batches(lengths, self.batch_tokens)
        return [[samples[i] for i in indices] for indices in batches]

    def _each(self, samples: Sequence[Sample]) -> Iterator[Found]:
        """The statistics of each sample, batch by batch. Where memory runs out it goes on in smaller batches."""
        left = samples
        while left:
            reading = self._reading(whole=False)
            for group in self.decoder.groups(self._batches(left, whole=False)):
                results = self._run(group, reading)
                if results is None:
                    break
                left = left[sum(map(len, group)) :]
                while results:
                    yield results.pop(0)

    def _settle(self, sample: Sample) -> None:
        """Finds out by a pass over one sample of which kind the modules are, if none has been run."""
        before = self._bar.n
        while not self._settled:
            self._run([[sample]], self._reading(whole=True))
        self._bar.n = before

    def _reading(self, whole: bool, add: Add | None = None) -> Reading:
        return Reading(self.decoder.way, self.watched, self.how, whole, add)

    def _pass(self, batches: list[PackedBatch], reading: Reading) -> list[Found]:
        """One forward and backward pass of each batch."""
        decoder, found = self.decoder, [{} for _ in batches]
        start = decoder.entry(min((item.layer for item in self.watched), default=0))

        def turn(number: int, stretch: Stretch, stop: int, dy: torch.Tensor | None) -> None:
            batch = batches[number]
            with reading.tapped(batch, range(stretch.start, stop), found[number]) as (forward_is_over, leaves):
                out = decoder.run(batch, stretch, stop)
                forward_is_over()
                if dy is None:
                    out = _loss(decoder, batch, out, self.how)
                out.backward(dy, inputs=[stretch.hidden, *leaves])
            if stretch.start == start:
                self._bar.update(batch.num_samples)

        decoder.passes(batches, start, turn, self.recompute, self.settings.place)
        return found

    def _run(self, batches: Sequence[Sequence[Sample]], reading: Reading) -> list[Found] | None:
        """What the batches yield. None: it is to begin again, with other batches or kinds. If memory ran out,
        `batch_tokens` is then half of the largest batch that can be cut."""
        before, device = self._bar.n, self.decoder.device
        try:
            results = [
                found
                for group in self.decoder.groups(batches)
                for found in self._pass([pack(samples).to(device) for samples in group], reading)
            ]
            self._settled = True
            return results
        except Again as again:
            self._by_autograd(again.items, again.one_by_one)
            self._bar.n = before
            return None
        except Exception as error:
            if isinstance(error, OutOfMemory) or not is_out_of_memory(error):
                raise
            said = str(error)
        release()
        self._bar.n = before
        divisible = [_tokens(batch) for batch in batches if len(batch) > 1]
        if not divisible:
            raise self._refusal(max(map(_tokens, batches)), said)
        self.batch_tokens = max(divisible) // 2
        if not self._warned:
            logger.warning(
                f"density: memory ran out at batches of up to {max(divisible)} tokens: it goes on in smaller ones, "
                "same result"
            )
        self._warned = True
        return None

    def _by_autograd(self, items: Mapping[str, str], one_by_one: bool) -> None:
        """From here on these watched modules, {path: what their kind cannot do}, and those like them in other layers,
        are measured by autograd."""
        for path, why in items.items():
            if sampled := [name for name in self.how.tiles if name.rpartition(".")[0] == path]:
                raise ValueError(f"{why}: no part of {sampled[0]} can be sampled: leave sample_fraction out")
        same = {alike(item) for item in self.watched if item.path in items}
        self.watched = [
            dataclasses.replace(item, kind=BY_AUTOGRAD) if alike(item) in same else item for item in self.watched
        ]
        if one_by_one and not self.one_by_one:
            slow = [item for item in self.watched if item.kind is BY_AUTOGRAD]
            logger.warning(
                f"density: {slow[0].path} ({type(slow[0].module).__name__}"
                f"{f', and {len(slow) - 1} more modules' if slow[1:] else ''}) is no product or norm that could be "
                "taken apart by sample: autograd measures it, one sample at a time (slower, the same result)"
            )
        self.one_by_one |= one_by_one

    def _refusal(self, tokens: int, said: str) -> OutOfMemory:
        cures = [] if self.recompute else ["gradient_checkpointing=True (the same result)"]
        cures += ["shorter samples (max_length)", 'fewer matrices (modules="mlp")', "a streamed model (open_streamed)"]
        weights = sum(p.nbytes for p in self.decoder.model.parameters())
        return cannot_fit(tokens, f"density: the model {gibibytes(weights)}", cures, self.decoder.device, said)

    def _gather(self, held: dict[str, torch.Tensor]) -> None:
        """Sums gradients over the processes, of which one may have none of a parameter."""
        if self.group.size == 1:
            return
        kinds: dict[str, tuple[list[int], str]] = {}
        for found in self.group.gather({path: (list(g.shape), str(g.dtype)) for path, g in held.items()}):
            kinds |= found
        for path in sorted(kinds):  # the same order everywhere
            shape, dtype = kinds[path][0], torch.float64 if kinds[path][1] == str(torch.float64) else torch.float32
            gradient = held[path] if path in held else torch.zeros(shape, dtype=dtype, device=self.decoder.device)
            self.group.sum([gradient])
            held[path] = gradient


def _tokens(samples: Sequence[Sample]) -> int:
    return sum(len(sample["input_ids"]) for sample in samples)


def _loss(decoder: Decoder, batch: PackedBatch, hidden: torch.Tensor, how: How) -> torch.Tensor:
    """The sum over samples of each one's mean NLL, from the last layer's output (T, D)."""
    rows = losses.likelihood(batch)
    final = decoder.final(take(hidden, batch.rows))
    loss, _ = losses.linear_loss(final, decoder.head, batch.targets, rows.weight, impl=how.impl)
    return loss


def inner_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(E, ...), (E, ...) -> (E,) float64: the sums of a * b, with no temporary as large as a."""
    out = torch.zeros(len(a), dtype=torch.float64, device=a.device)
    for x, y in zip(a.flatten(1).split(1 << 16, -1), b.flatten(1).split(1 << 16, -1)):
        out += (x.double() * y).sum(-1)
    return out
