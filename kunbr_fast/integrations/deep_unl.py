"""`DEEP_UNL`, the class of the KUnBR authors' script, on this engine: their work_flow.py runs with one import changed.

    from unlearning_way.Biru import DEEP_UNL                    # before
    from kunbr_fast.integrations.deep_unl import DEEP_UNL       # after

What their class does (github llmgfffffff/Beyond-Superficial-Forgetting-KUnBR, unlearning_way/Biru.py), re-told: the
model of `base_model` is M_u, the one at `compare_model_path` is M0. An epoch is one visit of a block: M_u's block goes
into M0, `base_model.eval` sees M0 with it, the block is trained there by gradient difference with a new Lion, and
goes back. There is no density: the first `choose_num` blocks with fewer than `compare_train_times` visits are next.

Of `base_model` only this is used: `model`, `lr`, `retain_coeff`, `batch_size`, `eval_every`, `epochs` (for epochs=None),
`val_forget_dataset`, `val_retain_dataset` (sequences that can be sliced), `get_loss(batch=, model=)`,
`eval(time=, dataset=, task_name=, model=)`, `eval_on_RTV(epoch, name)`, and `load_llm(path)` only where
`compare_model_path` is no directory with safetensors of the same names.

Same result, less work:

- One model in memory. M0's weights are read from its directory into `base_model.model` itself, M_u's are in a file
  meanwhile, and come back whenever `eval_on_RTV` or the caller looks.
- Layers below the block run once for each batch and block, not once for each step.
- `get_loss` stays the judge of what is trained, and is asked once for each batch, with made-up logits: if its answer is
  a weighted sum of negative log-likelihoods of tokens (it is judged by its gradient at one point and its value at two),
  then these weights go to the packed pass and the fused loss, and `get_loss` is not called again for that batch.
- Any other loss, and one that counts padded places (a mean over the whole padded grid does), is trained by `get_loss`
  itself on the model's own padded forward pass, with the layers below the block left out.

Kept as they are: 32 layers are taken for granted (`num_layers`), so 32 // block_num layers make a block; once every block
has had its visits, a further epoch trains all visited blocks at once; the learning rate is constant; the retain batch of
step i is `i * random.randint(1, 10000) % len(retain_batches)` from Python's global generator, so step 0 has batch 0.
Differences: dropout is off; NaN stops the run (`Diverged`); after any exception `base_model.model` is M_u with the
visits that were finished; `get_loss` must depend on nothing but its arguments; there is no `compare_model` to look at.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from kunbr_fast.data import IGNORE, PackedBatch, Sample
from kunbr_fast.data.batch import join
from kunbr_fast.files.tensors import Shards, WeightSnapshot, open_tensors, save_tensors
from kunbr_fast.model.decoder import Decoder, Stretch
from kunbr_fast.model.finite import finite
from kunbr_fast.model.prefix_cache import PrefixCache
from kunbr_fast.objectives import losses
from kunbr_fast.training.block import BlockTraining
from kunbr_fast.training.diverged import Diverged
from kunbr_fast.training.reinserted import reinserted

logger = logging.getLogger(__name__)


class DEEP_UNL:
    """The authors' class: same arguments, same `dynamic_deep_unlearning`. See the module.

    num_layers: what their script has built in. master_weights: fp32 copies of half-precision weights for the optimiser,
    which theirs has not: at its learning rate of 2e-7 most fp16 updates are rounded away. impl: as in `reinserted`.
    work_dir: where files of the size of the model go meanwhile (default: the system's temporary directory).

    Errors: ValueError for arguments out of range, a compare model of other names or shapes, or a block without layers
    (before anything is trained).
    """

    def __init__(
        self,
        base_model: Any = None,
        block_num: int = 8,
        choose_num: int = 1,
        compare_model_path: str | None = None,
        compare_train_times: int = 1,
        *,
        num_layers: int = 32,
        master_weights: bool = False,
        impl: str = "auto",
        work_dir: str | Path | None = None,
    ):
        if base_model is None or compare_model_path is None:
            raise ValueError("base_model (with M_u) and compare_model_path (M0) are needed")
        if not 1 <= block_num <= num_layers:
            raise ValueError(f"block_num={block_num}: expected 1 to {num_layers}")
        for name, value in (("choose_num", choose_num), ("compare_train_times", compare_train_times)):
            if value < 1:
                raise ValueError(f"{name}={value}: expected 1 or more")
        self.base_model, self.model, self.lr = base_model, base_model.model, base_model.lr
        self.block_num, self.choose_num, self.compare_train_times = block_num, choose_num, compare_train_times
        self.block_size = num_layers // block_num
        self.history_cache = {f"block{i}": 0 for i in range(block_num)}  # visits
        self.master_weights, self.impl = master_weights, impl
        self.decoder = Decoder(self.model)
        self._work = tempfile.TemporaryDirectory(prefix="kunbr-deep-", dir=work_dir)
        self._original = self._find_original(compare_model_path)

    def _find_original(self, path: str | Path) -> Shards | WeightSnapshot:
        """M0's weights on disk: its own files, or what `load_llm` loads."""
        parameters = dict(self.model.named_parameters())
        found: Shards | WeightSnapshot | None = None
        if any(Path(path).glob("*.safetensors")):
            found = Shards(path)
        if found is None or not all(name in found for name in parameters):
            logger.warning(
                f"{path}: no safetensors with this model's own tensor names: load_llm loads it, and for a moment two models "
                "are in memory"
            )
            found = WeightSnapshot.save(self.base_model.load_llm(path), Path(self._work.name) / "original.safetensors")
        for name, parameter in parameters.items():
            if name not in found:
                raise ValueError(f"{path} has no {name}: the compare model is not of the model's architecture")
            shape = tuple(found[name].shape)
            if shape != tuple(parameter.shape):
                raise ValueError(f"{name} is {shape} in {path} and {tuple(parameter.shape)} in the model")
        return found

    # ------------------------------------------------ which block

    def _next(self) -> list[str]:
        waiting = [name for name, visits in self.history_cache.items() if visits < self.compare_train_times]
        return waiting[: self.choose_num] if waiting else list(self.history_cache)

    def _layers(self, names: Sequence[str]) -> range:
        """The layers of blocks that follow each other, which the chosen ones always do."""
        numbers = [int(name.removeprefix("block")) for name in names]
        start, stop = numbers[0] * self.block_size, (numbers[-1] + 1) * self.block_size
        if numbers[-1] * self.block_size >= self.decoder.num_layers:
            raise ValueError(
                f"{names[-1]} begins at layer {numbers[-1] * self.block_size} of {self.decoder.num_layers}: give num_layers="
                f"{self.decoder.num_layers}, or fewer epochs"
            )
        return range(start, min(stop, self.decoder.num_layers))

    def _check_plan(self, epochs: int) -> None:
        kept = dict(self.history_cache)
        try:
            for _ in range(epochs):
                names = self._next()
                self._layers(names)
                for name in names:
                    self.history_cache[name] += 1
        finally:
            self.history_cache = kept

    # ------------------------------------------------ training

    def dynamic_deep_unlearning(self, epochs: int | None = 8) -> None:
        """`epochs` visits; `base_model.model` is then M_u with the trained blocks. The data sets are read once, here."""
        base = self.base_model
        epochs = base.epochs if epochs is None else epochs
        print(f"num_epochs: {epochs}")
        self._check_plan(epochs)
        forget, retain = self._batches(base.val_forget_dataset), self._batches(base.val_retain_dataset)
        if not retain:
            raise ValueError("val_retain_dataset is empty: expected at least one point")
        base.eval_on_RTV(0, "dynamic_GD_deep_unlearning")
        if epochs == 0:
            return
        own = _OwnForward(self.decoder)
        with tempfile.TemporaryDirectory(dir=self._work.name) as work:
            unlearned = _Unlearned(self.model, Path(work))
            inside = True  # whether the model holds M_u
            try:
                for epoch in range(epochs):
                    if inside:
                        inside = False
                        _fill(self.model, self._original)
                    self._visit(unlearned, forget, retain, epoch, own)
                    if (epoch + 1) % base.eval_every == 0:
                        unlearned.restore(self.model)
                        inside = True
                        base.eval_on_RTV(epoch + 1, "dynamic_GD_deep_unlearning")
            finally:
                if not inside:
                    unlearned.restore(self.model)

    def _batches(self, points: Sequence) -> list[_Batch]:
        size = self.base_model.batch_size
        return [_Batch(points[i : i + size], self.base_model.get_loss) for i in range(0, len(points), size)]

    def _visit(
        self, unlearned: _Unlearned, forget: list[_Batch], retain: list[_Batch], epoch: int, own: _OwnForward
    ) -> None:
        base, names = self.base_model, self._next()
        block = self._layers(names)
        for name in names:
            self.history_cache[name] += 1
        print(f"epoch {epoch}: {', '.join(names)}, layers {block.start} to {block.stop - 1}")
        with reinserted(
            self.decoder,
            unlearned,
            block,
            self.lr,
            base.retain_coeff,
            optimizer="lion",
            master_weights=self.master_weights,
            impl=self.impl,
        ) as training:
            accuracy = base.eval(
                time=epoch, dataset=base.val_forget_dataset, task_name="eval on compare_model", model=self.model
            )
            print(f"compare_model acc:{accuracy}")
            self.model.eval()  # whatever `eval` left it in
            for i, batch in enumerate(tqdm(forget, desc=f"deep GD unlearning epoch {epoch}")):
                other = retain[i * random.randint(1, 10000) % len(retain)]
                _update(training, self._loss(training, batch, other, own))
        unlearned.keep(f"layers-{block.start}-{block.stop}.safetensors")

    def _loss(self, training: BlockTraining, forget: _Batch, retain: _Batch, own: _OwnForward) -> torch.Tensor:
        start, coeff = training.block.start, self.base_model.retain_coeff
        if not all([batch.look(self.decoder) for batch in (forget, retain)]):
            if not own.kept:
                logger.warning(
                    "get_loss is no weighted sum of token losses, or counts padding: it trains on the model's own padded "
                    "pass, with full logits, and what is saved are the layers below the block"
                )
            with own.above(start):
                return -forget.get_loss(self.model) + coeff * retain.get_loss(self.model)
        batch = join(forget.packed(start), retain.packed(start))
        hidden = self.decoder.run(batch, Stretch(start, batch.hidden), rows=True)
        weights = torch.cat([-forget.weights, coeff * retain.weights])
        hidden = self.decoder.final(hidden)
        return losses.linear_loss(hidden, self.decoder.head, batch.targets, weights, impl=self.impl)[0]


def _update(training: BlockTraining, loss: torch.Tensor) -> None:
    loss.backward()
    if not finite(loss, training.flat.grad):
        where = f"block {training.block.start}-{training.block.stop - 1}, step {training.steps}"
        raise Diverged(where, {"loss": float(loss.detach())})
    training.flat.step(training.optimizer)
    training.steps += 1


# ---------------------------------------------------------------- weights


@torch.no_grad()
def _fill(model: nn.Module, weights: Shards | WeightSnapshot) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(weights[name])


class _Unlearned:
    """M_u on disk: its weights as they were, and a file for each visited block. What `reinserted` puts back waits for
    `keep`."""

    def __init__(self, model: nn.Module, directory: Path):
        self.directory, self.back = directory, {}
        first = WeightSnapshot.save(model, directory / "unlearned.safetensors").path
        self.files = {name: first for name, _ in model.named_parameters()}

    def __contains__(self, name: object) -> bool:
        return name in self.files

    def __getitem__(self, name: str) -> torch.Tensor:
        with open_tensors(self.files[name]) as file:
            return file.get_tensor(name)

    def __setitem__(self, name: str, value: torch.Tensor) -> None:
        self.back[name] = value

    def keep(self, file: str) -> None:
        save_tensors(self.directory / file, self.back)
        self.files |= {name: self.directory / file for name in self.back}
        self.back = {}

    def restore(self, model: nn.Module) -> None:
        _fill(model, self)


# ---------------------------------------------------------------- batches


class _Batch:
    """A batch of the script's points, and what its loss turned out to be."""

    def __init__(self, points: Any, get_loss: Callable[..., torch.Tensor]):
        self._points, self._get_loss = points, get_loss
        self.samples: list[Sample] | None = None
        self.weights: torch.Tensor | None = None
        self._looked, self._cache = False, None

    def get_loss(self, model: nn.Module) -> torch.Tensor:
        return self._get_loss(batch=self._points, model=model)

    def look(self, decoder: Decoder) -> bool:
        """Whether the loss is a weighted sum over tokens; its samples and weights are then known."""
        if not self._looked:
            self._looked, state = True, random.getstate()
            with torch.random.fork_rng(devices=[]):
                found = recognise(decoder, self.get_loss)
            random.setstate(state)
            if found is not None:
                self.samples, self.weights = found
                self._cache = PrefixCache(decoder, self.samples)
            else:
                logger.info(
                    "get_loss is no weighted sum over unpadded tokens: it trains on the model's own padded pass"
                )
        return self._cache is not None

    def packed(self, start: int) -> PackedBatch:
        self._cache.advance(start)
        return self._cache.batch(range(len(self.samples)))


@contextlib.contextmanager
def _forwards(modules: Sequence[nn.Module], make: Callable[[int, Callable], Callable]) -> Iterator[None]:
    """Inside, each module's forward is make(its number, the one it had)."""
    before = [(module, module.__dict__.get("forward")) for module in modules]
    try:
        for index, module in enumerate(modules):
            module.forward = make(index, module.forward)
        yield
    finally:
        for module, forward in before:
            module.__dict__.pop("forward", None)
            if forward is not None:
                module.forward = forward


def recognise(
    decoder: Decoder, get_loss: Callable[[nn.Module], torch.Tensor]
) -> tuple[list[Sample], torch.Tensor] | None:
    """`get_loss(model)` as sum over labelled rows of weight * NLL: the samples (padding dropped) and the (R,) weights in
    the order of their packed batch's rows; None where it is anything else.

    The model runs without its layers, and its head gives made-up logits z (B, L, V). At z = 0 the gradient of such a sum
    is weight * (1/V - onehot(target)) in each row, which tells weights and targets. At a second z, with likely and
    unlikely targets, the sum and the loss must have the same value; so a loss that is bent (NPO), capped or smoothed is
    told apart.
    """
    head, calls, points = decoder.head, [], []
    wide = torch.promote_types(decoder.dtype, torch.float32)
    size = head.linear.out_features

    def value(point: torch.Tensor | None = None) -> torch.Tensor | None:
        def logits(hidden: torch.Tensor, *args: Any) -> torch.Tensor:
            shape = (*hidden.shape[:-1], size)
            leaf = hidden.new_zeros(shape, dtype=wide) if point is None or point.shape != shape else point
            points.append(leaf.detach().requires_grad_())
            return points[-1].clone()  # the loss may write into it

        calls.clear()
        points.clear()
        seen = decoder.model.register_forward_pre_hook(
            lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
        )
        skipped = _forwards(decoder.layers, lambda *_: lambda hidden, *args, **kwargs: hidden)
        with seen, skipped, _forwards([head.linear], lambda *_: logits), torch.enable_grad():
            loss = get_loss(decoder.model)
        good = isinstance(loss, torch.Tensor) and loss.numel() == 1 and loss.requires_grad
        return loss.sum() if good and len(calls) == len(points) == 1 else None

    loss = value()
    inputs = _inputs(*calls[0]) if loss is not None else None
    if inputs is None or points[0].shape[:2] != inputs[0].shape:
        return None
    (gradient,) = torch.autograd.grad(loss, points.pop(), allow_unused=True)
    if gradient is None:
        return None
    loss = loss.detach()  # its graph holds as much as z
    tolerance = torch.finfo(torch.float32).eps ** 0.5  # transformers' own losses are fp32 for any model
    scale, norm = head.scale, gradient.norm()
    (high, highest), (low, lowest) = gradient.max(-1, keepdim=True), gradient.min(-1, keepdim=True)
    targets = torch.where(high > -low, highest, lowest)
    weights = gradient.gather(-1, targets) / (scale * (1 / size - 1))  # (B, L, 1)
    gradient -= scale * weights / size
    gradient.scatter_add_(-1, targets, scale * weights)
    live = weights[..., 0] != 0
    total = weights.abs().sum() * math.log(size)
    if (
        not bool(live.any())
        or not bool(gradient.norm() <= tolerance * norm)
        or not bool((loss - weights.sum() * math.log(size)).abs() <= tolerance * total)
    ):
        return None
    generator = torch.Generator(gradient.device).manual_seed(0)
    point = gradient.normal_(0, 10, generator=generator)
    point[:, ::2].scatter_add_(-1, targets[:, ::2], torch.full_like(targets[:, ::2], 50, dtype=wide))
    second = value(point)
    if second is None or not torch.equal(_inputs(*calls[0])[0], inputs[0]):
        return None
    z = point[live] * scale
    z = z if head.softcap is None else torch.tanh(z / head.softcap) * head.softcap
    nll = torch.nn.functional.cross_entropy(z, targets[live][:, 0], reduction="none")
    terms = weights[live][:, 0] * nll
    if not bool((second.detach() - terms.sum()).abs() <= tolerance * terms.abs().sum()):
        return None
    return _samples(decoder, *inputs, live, targets[..., 0], weights[..., 0])


def _inputs(args: tuple, kwargs: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None:
    """input_ids, attention mask and position_ids (B, L) of a call of the model; None for a call of another kind."""
    given = {name: x for name, x in kwargs.items() if isinstance(x, torch.Tensor)}
    if len(args) == 1:
        given["input_ids"] = args[0]
    if (
        len(args) > 1
        or "input_ids" not in given
        or given.keys() - {"input_ids", "attention_mask", "position_ids", "labels"}
    ):
        return None
    if kwargs.get("past_key_values") is not None:
        return None
    ids, mask, positions = (given.get(name) for name in ("input_ids", "attention_mask", "position_ids"))
    mask = torch.ones_like(ids) if mask is None else mask
    good = all(x is None or x.shape == ids.shape for x in (mask, positions)) and ids.dim() == 2
    return (ids, mask.bool(), positions) if good else None


def _samples(
    decoder: Decoder,
    ids: torch.Tensor,
    mask: torch.Tensor,
    positions: torch.Tensor | None,
    live: torch.Tensor,
    targets: torch.Tensor,
    weights: torch.Tensor,
) -> tuple[list[Sample], torch.Tensor] | None:
    """Each line of the padded grid with a loss as a sample. A target is the label of the token after its row, which need
    not be that token; one after the last token brings a token of its own."""
    samples, kept = [], []
    ids, mask, live, targets = ids.cpu(), mask.cpu(), live.cpu(), targets.cpu()
    positions = torch.arange(ids.shape[1]).expand_as(ids) if positions is None else positions.cpu()
    for row in range(len(ids)):
        if not bool(live[row].any()):
            continue
        real = torch.nonzero(mask[row]).flatten()
        first, stop = int(real[0]), int(real[-1]) + 1
        place = positions[row, first:stop]
        if stop - first != len(real) or bool((live[row] & ~mask[row]).any()) or bool((place.diff() != 1).any()):
            return None
        if int(place[0]) and not _relative(decoder):
            return None
        own, counts = ids[row, first:stop], live[row, first:stop]
        labels = torch.cat([torch.tensor([IGNORE]), torch.where(counts, targets[row, first:stop], IGNORE)])
        own = torch.cat([own, labels[-1:]])
        length = len(own) if bool(counts[-1]) else len(own) - 1
        samples.append({"input_ids": own[:length], "labels": labels[:length]})
        kept.append(weights[row][live[row].to(weights.device)])
    return samples, torch.cat(kept)


@torch.no_grad()
def _relative(decoder: Decoder) -> bool:
    """Whether nothing but differences of positions counts: a model that adds positions to its embeddings says no."""
    first = decoder.probe
    other = PackedBatch(first.input_ids, first.labels, first.position_ids + 8, first.lengths)
    return torch.equal(decoder.layer_calls(first)[0], decoder.layer_calls(other)[0])


# ---------------------------------------------------------------- the model's own padded pass


class _OwnForward:
    """The model's own forward pass, in which the layers below the block run once for each padded batch. Their outputs
    (B, L, D) are kept in main memory."""

    def __init__(self, decoder: Decoder):
        self.decoder = decoder
        self.kept: dict[str, tuple[int, torch.Tensor]] = {}

    @contextlib.contextmanager
    def above(self, start: int) -> Iterator[None]:
        """Inside, calls of the model give what they gave, and run layers `start` and above only, where they can."""
        key, layer, hidden = "", 0, None

        def begin(_: nn.Module, args: tuple, kwargs: dict) -> None:
            nonlocal key, layer, hidden
            key = _digest(args, kwargs)
            layer, hidden = self.kept.get(key, (0, None))
            if layer > start:
                layer, hidden = 0, None

        def make(index: int, forward: Callable) -> Callable:
            def run(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
                if index < layer:
                    return x
                if index == layer and hidden is not None:
                    x = hidden.to(x.device)
                if index == start and (hidden is None or layer < start):
                    self.kept[key] = start, x.detach().cpu()
                return forward(x, *args, **kwargs)

            return run

        with (
            self.decoder.model.register_forward_pre_hook(begin, with_kwargs=True),
            _forwards(self.decoder.layers[: start + 1], make),
        ):
            yield


def _digest(args: tuple, kwargs: dict) -> str:
    """What a call was given, so that the same call is known again."""
    digest = hashlib.sha256()
    for name, item in [*enumerate(args), *sorted(kwargs.items())]:
        if isinstance(item, torch.Tensor):
            flat = item.detach().cpu().contiguous()
            digest.update(repr((name, flat.dtype, tuple(flat.shape))).encode())
            digest.update(flat.flatten().view(torch.uint8).numpy().tobytes())
        else:
            digest.update(repr((name, item)).encode())
    return digest.hexdigest()
