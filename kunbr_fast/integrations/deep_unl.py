"""`DEEP_UNL`, the class of the KUnBR authors' script, on this engine: their work_flow.py runs with one import changed.

    from unlearning_way.Biru import DEEP_UNL                    # before
    from kunbr_fast.integrations.deep_unl import DEEP_UNL       # after

What their class does (github llmgfffffff/Beyond-Superficial-Forgetting-KUnBR, unlearning_way/Biru.py), re-told: the
model of `base_model` is M_u, the one at `compare_model_path` is M0. An epoch is one visit of a block: M_u's block goes
into M0, `base_model.eval` sees M0 with it, the block is trained there by gradient difference with a new Lion, and
goes back. There is no density: the first `choose_num` blocks with fewer than `compare_train_times` visits are next.

Of `base_model` only this is used: `model`, `lr`, `retain_coeff`, `batch_size`, `eval_every`, `epochs` (for
epochs=None), `val_forget_dataset`, `val_retain_dataset` (sequences that can be sliced), `get_loss(batch=, model=)`,
`eval(time=, dataset=, task_name=, model=)`, `eval_on_RTV(epoch, name)`, and `load_llm(path)` only where
`compare_model_path` is no directory with safetensors of the same names.

Same result, less work:

- One model in memory. M0's weights are read from its directory into `base_model.model` itself, M_u's are in a file
  meanwhile, and come back whenever `eval_on_RTV` or the caller looks.
- Layers below the block run once for each batch and block, not once for each step.
- `get_loss` stays the judge of what is trained, and is asked once for each batch, with made-up logits: if its answer is
  a weighted sum of negative log-likelihoods of tokens (it is judged by its gradient at one point and its value at two),
  then these weights go to the packed pass and the fused loss, and `get_loss` is not called again for that batch.
- Such a sum that counts padded places (a mean over the whole padded grid) goes to the fused loss behind the model's own
  padded forward pass: no logits are kept. Any other loss is trained by `get_loss` itself on that pass. In both the
  layers below the block are left out where they have run; every place has a loss, so there is little more to save.

Kept as they are: 32 layers are taken for granted (`num_layers`), so 32 // block_num layers make a block; once every
block has had its visits, a further epoch trains all visited blocks at once; the learning rate is constant; the retain
batch of step i is `i * random.randint(1, 10000) % len(retain_batches)` from Python's global generator, so step 0 has
batch 0. Differences: dropout is off; NaN stops the run (`Diverged`); after any exception `base_model.model` is M_u with
the visits that were finished; `get_loss` must depend on nothing but its arguments; there is no `compare_model` to look
at.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import random
import tempfile
import weakref
from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from kunbr_fast.data import PackedBatch, Sample
from kunbr_fast.data.batch import join
from kunbr_fast.files.scratch import scratch
from kunbr_fast.files.shards import Shards, has_weights
from kunbr_fast.files.tensors import WeightSnapshot, save_tensors
from kunbr_fast.integrations.padded_pass import OwnForward, forwards
from kunbr_fast.integrations.recognise import TokenSum, recognise
from kunbr_fast.keywords import taken
from kunbr_fast.model.decoder import Decoder, Stretch
from kunbr_fast.model.ownership import trainable
from kunbr_fast.model.prefix_cache import PrefixCache
from kunbr_fast.model.weights import finite
from kunbr_fast.objectives import losses
from kunbr_fast.training.block import BlockTraining
from kunbr_fast.training.diverged import Diverged
from kunbr_fast.training.reinserted import reinserted
from kunbr_fast.training.settings import check_master_weights

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Options:
    """What `DEEP_UNL` takes beside the arguments of the authors' class.

    num_layers: what their script has built in. master_weights: as in `BlockSettings`; theirs has none: at its learning
    rate of 2e-7 most fp16 updates are rounded away. impl: as in `reinserted`.
    work_dir: where files of the size of the model go meanwhile (default: the system's temporary directory).
    """

    num_layers: int = 32
    master_weights: str = "none"
    impl: str = "auto"
    work_dir: str | Path | None = None

    def __post_init__(self) -> None:
        check_master_weights(self.master_weights)


class DEEP_UNL:
    """The authors' class: same arguments, same `dynamic_deep_unlearning`. See the module. options: as in `Options`.

    Errors: ValueError for arguments out of range, a model that is not all to be trained (PEFT, frozen parameters,
    offloaded weights), a compare model of other names or shapes, or a block without layers
    (before anything is trained).
    """

    def __init__(
        self,
        base_model: Any = None,
        block_num: int = 8,
        choose_num: int = 1,
        compare_model_path: str | None = None,
        compare_train_times: int = 1,
        **options: Any,
    ):
        self.options = taken(Options, options, "DEEP_UNL")
        num_layers = self.options.num_layers
        if base_model is None or compare_model_path is None:
            missing = "base_model (with M_u)" if base_model is None else "compare_model_path (a folder with M0)"
            raise ValueError(f"DEEP_UNL: {missing} is missing: give both")
        if not 1 <= block_num <= num_layers:
            raise ValueError(f"block_num={block_num}: expected 1 to {num_layers}")
        for name, value in (("choose_num", choose_num), ("compare_train_times", compare_train_times)):
            if value < 1:
                raise ValueError(f"{name}={value}: expected 1 or more")
        self.base_model, self.model, self.lr = base_model, base_model.model, base_model.lr
        self.block_num, self.choose_num, self.compare_train_times = block_num, choose_num, compare_train_times
        self.block_size = num_layers // block_num
        self.history_cache = {f"block{i}": 0 for i in range(block_num)}  # visits
        trainable(self.model, "DEEP_UNL")
        self.decoder = Decoder(self.model)
        check_master_weights(self.options.master_weights, self.decoder.dtype)
        stack = contextlib.ExitStack()
        self._work = stack.enter_context(scratch("kunbr-fast-", self.options.work_dir))
        weakref.finalize(self, stack.close)
        self._original = self._find_original(compare_model_path)

    def _find_original(self, path: str | Path) -> Shards | WeightSnapshot:
        """M0's weights on disk: its own files, or what `load_llm` loads."""
        parameters = dict(self.model.named_parameters())
        found = Shards(path) if has_weights(path) else None
        if found is None or not all(name in found for name in parameters):
            logger.warning(
                f"{path}: no safetensors with this model's own tensor names: load_llm loads it, and for a moment two "
                "models are in memory"
            )
            found = WeightSnapshot.save(self.base_model.load_llm(path), self._work / "original.safetensors")
        for name, parameter in parameters.items():
            if name not in found:
                raise ValueError(
                    f"{path} has no {name}: it is not of the model's architecture: give its original as "
                    "compare_model_path"
                )
            shape = tuple(found[name].shape)
            if shape != tuple(parameter.shape):
                raise ValueError(
                    f"{name} is {shape} in {path} and {tuple(parameter.shape)} in the model: give its original as "
                    "compare_model_path"
                )
        return found

    # ------------------------------------------------ which block

    def _plan(self, epochs: int) -> list[list[str]]:
        """The names of the blocks of each epoch to come."""
        visits, plan = dict(self.history_cache), []
        for _ in range(epochs):
            waiting = [name for name, count in visits.items() if count < self.compare_train_times]
            plan.append(waiting[: self.choose_num] if waiting else list(visits))
            self._layers(plan[-1])
            visits |= {name: visits[name] + 1 for name in plan[-1]}
        return plan

    def _layers(self, names: Sequence[str]) -> range:
        """The layers of blocks that follow each other, which the chosen ones always do."""
        numbers = [int(name.removeprefix("block")) for name in names]
        start, stop = numbers[0] * self.block_size, (numbers[-1] + 1) * self.block_size
        if numbers[-1] * self.block_size >= self.decoder.num_layers:
            raise ValueError(
                f"{names[-1]} begins at layer {numbers[-1] * self.block_size} of {self.decoder.num_layers}: give "
                f"num_layers={self.decoder.num_layers}, or fewer epochs"
            )
        return range(start, min(stop, self.decoder.num_layers))

    # ------------------------------------------------ training

    def dynamic_deep_unlearning(self, epochs: int | None = 8) -> None:
        """`epochs` visits; `base_model.model` is then M_u with the trained blocks. The data sets are read once,
        here."""
        trainable(self.model, "DEEP_UNL")  # once more: it may have been frozen since
        base = self.base_model
        epochs = base.epochs if epochs is None else epochs
        print(f"num_epochs: {epochs}")
        plan = self._plan(epochs)
        forget, retain = self._batches(base.val_forget_dataset), self._batches(base.val_retain_dataset)
        if not retain:
            raise ValueError("val_retain_dataset is empty: expected at least one point")
        base.eval_on_RTV(0, "dynamic_GD_deep_unlearning")
        if epochs == 0:
            return
        self._own = OwnForward(self.decoder)
        with tempfile.TemporaryDirectory(dir=self._work) as work:
            unlearned = _Written(WeightSnapshot.save(self.model, Path(work) / "model.safetensors"))  # M_u
            inside = True  # whether the model holds M_u
            try:
                for epoch, names in enumerate(plan):
                    if inside:
                        inside = False
                        _fill(self.model, self._original)
                    self._visit(epoch, names, unlearned, forget, retain)
                    if (epoch + 1) % base.eval_every == 0:
                        _fill(self.model, unlearned)
                        inside = True
                        base.eval_on_RTV(epoch + 1, "dynamic_GD_deep_unlearning")
            finally:
                if not inside:
                    _fill(self.model, unlearned)

    def _batches(self, points: Sequence) -> list[_Batch]:
        size = self.base_model.batch_size
        return [_Batch(points[i : i + size], self.base_model.get_loss) for i in range(0, len(points), size)]

    def _visit(
        self, epoch: int, names: list[str], unlearned: _Written, forget: list[_Batch], retain: list[_Batch]
    ) -> None:
        base, block, trained = self.base_model, self._layers(names), {}
        for name in names:
            self.history_cache[name] += 1
        print(f"epoch {epoch}: {', '.join(names)}, layers {block.start} to {block.stop - 1}")
        with reinserted(
            self.decoder,
            ChainMap(trained, unlearned),
            block,
            self.lr,
            base.retain_coeff,
            optimizer="lion",
            master_weights=self.options.master_weights,
            impl=self.options.impl,
        ) as training:
            accuracy = base.eval(
                time=epoch, dataset=base.val_forget_dataset, task_name="eval on compare_model", model=self.model
            )
            print(f"compare_model acc:{accuracy}")
            self.model.eval()  # whatever `eval` left it in
            for i, batch in enumerate(tqdm(forget, desc=f"deep GD unlearning epoch {epoch}")):
                other = retain[i * random.randint(1, 10000) % len(retain)]
                _update(training, self._loss(training, batch, other))
        file = unlearned.directory / f"layers-{block.start}-{block.stop}.safetensors"
        save_tensors(file, trained)
        unlearned.add(WeightSnapshot(file))

    def _loss(self, training: BlockTraining, forget: _Batch, retain: _Batch) -> torch.Tensor:
        start, coeff = training.block.start, self.base_model.retain_coeff
        for batch in (forget, retain):
            batch.look(self.decoder)
        if forget.sum is None or retain.sum is None:
            self._say(
                "get_loss is no weighted sum of token losses: it trains on the model's own padded pass, with full "
                "logits, and what is saved are the layers below the block"
            )
            with self._own.above(start):
                return -forget.get_loss(self.model) + coeff * retain.get_loss(self.model)
        if not (forget.packs and retain.packs):
            self._say(
                "get_loss counts padding: it trains on the model's own padded pass, with the fused loss, and what is "
                "saved are the layers below the block and the logits"
            )
            with self._own.above(start):
                return -self._on_grid(forget.sum) + coeff * self._on_grid(retain.sum)
        batch = join(forget.packed(start), retain.packed(start))
        hidden = self.decoder.run(batch, Stretch(batch.layer, batch.hidden), rows=True)
        weights = torch.cat([-forget.weights, coeff * retain.weights])
        hidden = self.decoder.final(hidden)
        return losses.linear_loss(hidden, self.decoder.head, batch.targets, weights, impl=self.options.impl)[0]

    def _on_grid(self, given: TokenSum) -> torch.Tensor:
        """The loss, from the model's own forward pass up to its head."""
        hidden = []

        def kept(x: torch.Tensor, *args: Any) -> torch.Tensor:
            hidden.append(x)
            return x[..., :1]  # logits, which nobody reads

        with forwards([self.decoder.head.linear], lambda *_: kept):
            self.model(**given.inputs)
        rows, targets, weights = (x[given.live] for x in (hidden[0], given.targets, given.weights))
        return losses.linear_loss(rows, self.decoder.head, targets, weights, impl=self.options.impl)[0]

    def _say(self, text: str) -> None:
        if not self._own.kept:  # once
            logger.warning(text)


def _update(training: BlockTraining, loss: torch.Tensor) -> None:
    loss.backward()
    if not finite(loss, *training.gradients()):
        raise Diverged(training.where(), {"loss": float(loss.detach())})
    training.update()


class _Written(Mapping[str, torch.Tensor]):
    """Weights on disk, each in the file that was written last. directory: of the files."""

    def __init__(self, first: WeightSnapshot):
        self.directory = first.path.parent
        self._files: dict[str, WeightSnapshot] = {}
        self.add(first)

    def add(self, file: WeightSnapshot) -> None:
        self._files |= dict.fromkeys(file, file)

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._files[name][name]


@torch.no_grad()
def _fill(model: nn.Module, weights: Mapping[str, torch.Tensor] | Shards | WeightSnapshot) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(weights[name])


# ---------------------------------------------------------------- batches


class _Batch:
    """A batch of the script's points, and what its loss turned out to be."""

    def __init__(self, points: Any, get_loss: Callable[..., torch.Tensor]):
        self._points, self._get_loss = points, get_loss
        self.sum: TokenSum | None = None
        self.samples: list[Sample] | None = None
        self.weights: torch.Tensor | None = None
        self._looked, self._cache = False, None

    def get_loss(self, model: nn.Module) -> torch.Tensor:
        return self._get_loss(batch=self._points, model=model)

    @property
    def packs(self) -> bool:
        """Whether the loss is a weighted sum over tokens that are no padding."""
        return self._cache is not None

    def look(self, decoder: Decoder) -> bool:
        """`packs`, once the loss was asked; what it is a sum of is then known."""
        if not self._looked:
            self._looked, state = True, random.getstate()
            with torch.random.fork_rng(devices=[]):
                self.sum = recognise(decoder, self.get_loss)
            random.setstate(state)
            found = None if self.sum is None else self.sum.samples(decoder)
            if found is not None:
                self.samples, self.weights = found
                self._cache = PrefixCache(decoder, self.samples)
        return self.packs

    def packed(self, start: int) -> PackedBatch:
        self._cache.advance(start)
        return self._cache.batch(range(len(self.samples)))
