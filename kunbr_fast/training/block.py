"""The training of a re-inserted block. Cover layers (all the others) are the original model's and frozen, so no layer
that unlearning has changed stands between the loss and the block.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import nn

from kunbr_fast.data import PackedBatch
from kunbr_fast.memory import gibibytes
from kunbr_fast.model.blocks import check_block
from kunbr_fast.model.decoder import FROM_EMBEDDINGS, Decoder, Stretch
from kunbr_fast.model.frozen import constants
from kunbr_fast.model.low_precision import Cover
from kunbr_fast.model.ownership import check_data
from kunbr_fast.model.weights import other_names, owners
from kunbr_fast.objectives.batch import PartLoss, Role, StepBatch
from kunbr_fast.objectives.criterion import Criterion
from kunbr_fast.objectives.losses import RowWeights, weighted_pass
from kunbr_fast.objectives.original import measure, together
from kunbr_fast.training.adversary import FlatAdversary, FullAdversary
from kunbr_fast.training.flat_buffer import FlatBuffer
from kunbr_fast.training.graphs import Capture, StepGraphs, capture_cuda
from kunbr_fast.training.settings import BlockSettings, Execution
from kunbr_fast.training.training import Training

VANISH = "take master_weights fp32 (or, in bf16, stochastic), or a float32 model"


def block_tensors(decoder: Decoder, block: range) -> dict[str, nn.Parameter]:
    """The block's parameters by their names in the whole model; refuses parameters shared with other modules."""
    inside = {}
    if not any(map(decoder.runs, check_block(block, decoder.num_layers))):
        raise ValueError(
            f"{decoder.layer_path(block.start)} does not run in the model's own forward on text, so nothing trains it: "
            "choose another block"
        )
    for index in block:
        for name, parameter in decoder.layers[index].named_parameters(remove_duplicate=False):
            inside[f"{decoder.layer_path(index)}.{name}"] = parameter
    uses = owners(decoder.model)
    for name, parameter in inside.items():
        if others := other_names(uses, parameter, name):
            raise ValueError(f"{name} is tied to {others}: a block with shared weights cannot be trained alone")
    return inside


def _masks(
    mask: Mapping[str, torch.Tensor], decoder: Decoder, block: range, parameters: Mapping[str, nn.Parameter]
) -> list[torch.Tensor | None]:
    """The mask of each of the block's parameters, None where it has none."""
    known = {name for name, _ in decoder.model.named_parameters(remove_duplicate=False)}
    for name, part in mask.items():
        if name not in known:
            raise ValueError(
                f"mask: {decoder.name} has no parameter {name}: a mask goes by names of named_parameters()"
            )
        if not isinstance(part, torch.Tensor) or part.dtype != torch.bool:
            got = part.dtype if isinstance(part, torch.Tensor) else type(part).__name__
            raise TypeError(f"mask of {name} is {got}: expected a torch.bool tensor, True where the weight may change")
        if name in parameters and part.shape != parameters[name].shape:
            raise ValueError(
                f"mask of {name} is {tuple(part.shape)}: expected {tuple(parameters[name].shape)}, its shape"
            )
    masks = [mask.get(name) for name in parameters]
    if not any(part is None or bool(part.any()) for part in masks):
        raise ValueError(f"the mask lets no weight of block {block.start}-{block.stop - 1} change: leave the block out")
    return masks


def _values(unlearned: Mapping[str, torch.Tensor], parameters: Mapping[str, nn.Parameter]) -> list[torch.Tensor]:
    """The block's weights in the unlearned model, checked."""
    missing = [name for name in parameters if name not in unlearned]
    if missing:
        raise ValueError(f"the unlearned model has no {missing[0]}: it is not of the original's architecture")
    values = [unlearned[name] for name in parameters]
    for (name, parameter), value in zip(parameters.items(), values):
        check_data(f"the unlearned model's {name}", value)
        if value.shape != parameter.shape:
            raise ValueError(
                f"{name}: {tuple(value.shape)} in the unlearned model, {tuple(parameter.shape)} in the original"
            )
        if not bool(value.isfinite().all()):
            raise ValueError(f"{name}: the unlearned model holds NaN or infinite values here; its training diverged")
    return values


class BlockTraining(Training):
    """Trains the active block inside the original model. Made by `reinserted`.

    unlearned: holds the block's weights in M_u, by name. cover: the cover in low precision, None where it is exact.
    """

    def __init__(
        self,
        decoder: Decoder,
        block: range,
        unlearned: Mapping[str, torch.Tensor],
        criterion: Criterion,
        settings: BlockSettings,
        execution: Execution,
        cover: Cover | None = None,
    ):
        super().__init__(decoder, criterion, settings, execution, f"block {block.start}-{block.stop - 1}")
        self.stage = self.name
        self.block, self.cover = block, cover
        self.graphs: StepGraphs | None = None
        self.adversary_graphs: StepGraphs | None = None  # a graph holds the addresses of the weights that it reads
        self.parameters = block_tensors(decoder, block)
        values = _values(unlearned, self.parameters)  # what comes from a file is in memory for a moment only
        fixed = constants(decoder.model)
        own = {n: torch.zeros_like(p, dtype=torch.bool) for n, p in self.parameters.items() if n in fixed}
        mask = {**(settings.mask or {}), **own}
        masks = _masks(mask, decoder, block, self.parameters) if mask else None
        self._kept = {name: (p.data, p.grad) for name, p in self.parameters.items()}
        self._all: dict[str, nn.Parameter] = {}  # the model's, where an adversary changes them
        self._away: dict[str, torch.Tensor] = {}  # values whose storage is freed meanwhile
        params, impl, master = list(self.parameters.values()), execution.impl, settings.master_weights == "fp32"
        try:
            with torch.no_grad():
                self.flat = FlatBuffer(params, values, master, masks, execution.optimizer_device)
                del values
                if self.flat.on_host:
                    impl = "torch"  # the update's: kernels are for the model's device
                    self._send_away()
            settings.warn_if_updates_vanish([self.flat.param], VANISH)
            self.optimizer = settings.make_optimizer([self.flat.param], impl)
            adversary, seed = settings.adversary, settings.adversary_rounding
            if settings.reaches_model:
                self._all = {n: p for n, p in decoder.model.named_parameters() if n not in fixed}
                self.adversary = FullAdversary(adversary, execution.impl, seed, self._all, self._zero)
            elif adversary is not None:
                self.adversary = FlatAdversary(adversary, impl, seed, self.flat, params)
        except BaseException:
            self.take_out()
            raise
        for parameter in params:
            parameter.requires_grad_(True)
        if execution.cuda_graphs:
            self.use_graphs()

    # ------------------------------------------------ training

    def _backward(self, step: StepBatch) -> PartLoss:
        own = step.role is Role.TRAINED
        if self.settings.reaches_model and not own:
            step = self._measured(step, FROM_EMBEDDINGS)  # of the original, whose weights `at` takes away
        elif self.graphs is not None and (rows := self.criterion_of(step.role).weights(step)) is not None:
            self._check_layer(step.packed)
            graphs = self.graphs if own else self.adversary_graphs
            with self.at(step.role):
                return PartLoss(*graphs(step.packed, RowWeights(rows.weight * step.shares.factor, rows.cap)))
        return super()._backward(step)

    def drop_gradient(self) -> None:
        """Forgets what has been accumulated; lets go of CUDA graphs too."""
        self._zero()
        for graphs in (self.graphs, self.adversary_graphs):
            if graphs is not None:
                graphs.drop()

    def _zero(self) -> None:
        """No gradient in the block, none at all elsewhere."""
        self.flat.grad.zero_()
        for name, parameter in self._all.items():
            if name not in self.parameters:
                parameter.grad = None

    def _memory(self) -> tuple[str, list[str]]:
        flat, size = self.flat, self.flat.weights.nbytes
        state = [self.flat.param, *self.optimizer.state[flat.param].values()]
        state = sum(x.nbytes for x in state if isinstance(x, torch.Tensor) and x.data_ptr() != flat.weights.data_ptr())
        where = "on the host" if flat.on_host else "on the device"
        what = (
            f"{self.name}: weights {gibibytes(size)}, gradient {gibibytes(size)}, "
            f"master weights and optimiser state {gibibytes(state)} {where}"
        )
        cures = []
        if not flat.on_host:
            cures.append(f'optimizer_device="host" (the same result, {gibibytes(state + size)} less on the device)')
        if self.graphs is not None:
            cures.append("cuda_graphs=False")
        cures += self.settings.instead_of_masters(flat.weights.dtype)
        cures += ["smaller blocks (num_blocks)", "shorter samples (max_length)", "a streamed model (open_streamed)"]
        return what, cures

    def gradients(self) -> list[torch.Tensor]:
        return [self.flat.grad]

    def check_in_place(self) -> None:
        """RuntimeError where another has put the block's weights elsewhere: no update would reach them."""
        views = self.flat.views(self.flat.weights)
        for (name, parameter), view in zip(self.parameters.items(), views, strict=True):
            if parameter.data_ptr() != view.data_ptr():
                raise RuntimeError(
                    f"{name} is no longer where its training updates it: something has moved or cast the model "
                    "(model.to(...) in a callback): let it do so with a copy (copy.deepcopy(model))"
                )

    def _update(self) -> None:
        self.flat.step(self.optimizer)

    def loss(self, step: StepBatch) -> PartLoss:
        self._check_layer(step.packed)
        criterion = self.criterion_of(step.role)
        if self.settings.reaches_model and step.role is not Role.TRAINED:  # no layer is the original's
            everything = Stretch(recompute=self.execution.gradient_checkpointing)
            stretch = everything if step.role is Role.RELEARNED else self._stretch(step.packed, cached=False)
            return criterion(self.decoder, step, stretch, impl=self.execution.impl)
        stretch = self._stretch(step.packed)
        return criterion(self.decoder, self._measured(step, stretch), stretch, impl=self.execution.impl)

    def _passes(self, steps: list[StepBatch]) -> Iterable[PartLoss]:
        if len(steps) > 1 and steps[0].original is None and self.criterion_of(steps[0].role).layers is not None:
            steps = [self._measured(step, self._stretch(step.packed)) for step in steps]
            found = together([step.original for step in steps])  # the spread is that of the whole batch
            steps = [dataclasses.replace(step, original=values) for step, values in zip(steps, found)]
        return super()._passes(steps)

    def _measured(self, step: StepBatch, stretch: Stretch) -> StepBatch:
        """The batch with the original's values: its own, or by a forward pass with the block's original weights."""
        decoder, needs, impl = self.decoder, self.criterion_of(step.role).needs, self.execution.impl
        if step.original is not None or not needs:
            return step
        with self._original():
            found = measure(decoder, step.packed, step.parts, needs, stretch=stretch, impl=impl)
        return dataclasses.replace(step, original=found)

    def use_graphs(self, capture: Capture | None = capture_cuda) -> None:
        """From here on steps run as CUDA graphs, where the objective allows it; capture: as in `StepGraphs`."""
        self.graphs = StepGraphs(self.decoder, self._weighted, self.flat.grad, capture)
        if self.adversary is not None and not self.settings.reaches_model:
            self.adversary_graphs = StepGraphs(self.decoder, self._weighted, self.flat.grad, capture)

    def _weighted(self, batch: PackedBatch, rows: RowWeights) -> tuple[torch.Tensor, torch.Tensor]:
        """`loss` of rows whose weights are known."""
        return weighted_pass(self.decoder, batch, rows, self._stretch(batch), impl=self.execution.impl)

    def _stretch(self, batch: PackedBatch, cached: bool = True) -> Stretch:
        """The layers from the block on, and those below that they take keys and values of."""
        hidden = batch.hidden if cached else None
        if hidden is None:
            with torch.no_grad():
                hidden = self.decoder.run(batch, stop=self._start)
        return Stretch(self._start, hidden, self.execution.gradient_checkpointing)

    def _check_layer(self, batch: PackedBatch) -> None:
        if batch.hidden is not None and batch.layer != self._start:
            raise ValueError(
                f"the batch holds the input of layer {batch.layer}, the block begins at layer {self._start}"
            )

    @property
    def _start(self) -> int:
        return self.decoder.entry(self.block.start)

    @contextlib.contextmanager
    def _original(self) -> Iterator[None]:
        """Inside, the block has the original's weights."""
        active = {name: parameter.data for name, parameter in self.parameters.items()}
        try:
            for name, parameter in self.parameters.items():
                kept = self._kept[name][0]
                parameter.data = self._away[name].to(kept.device) if name in self._away else kept
            yield
        finally:
            for name, parameter in self.parameters.items():
                parameter.data = active[name]

    # ------------------------------------------------ state

    def tensors(self) -> dict[str, torch.Tensor]:
        """The block's present weights by name (views, not copies)."""
        return {name: parameter.data for name, parameter in self.parameters.items()}

    def state(self) -> dict[str, torch.Tensor]:
        inner = self.optimizer.state[self.flat.param].items()
        inner = {f"optimizer.{key}": torch.as_tensor(value) for key, value in inner}
        found = {**self.flat.state(), **inner, **self.criterion.state()}
        return found if self.adversary is None else {**found, **self.adversary.state()}

    def load_state(self, state: Mapping[str, torch.Tensor], steps: int) -> None:
        self.flat.load(state)
        self.optimizer.reset_flags()
        self.criterion.load_state(state)
        if self.adversary is not None:
            self.adversary.load_state(state)
        param, prefix = self.flat.param, "optimizer."
        inner = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        self.optimizer.state[param] = {k: v.to(param.device, copy=True) for k, v in inner.items()}  # changed in place
        self.steps = steps

    @torch.no_grad()
    def _send_away(self) -> None:
        """The original's own block to the host, which frees its storages until `take_out`. A storage that another
        tensor may share, or that is no memory of torch's own (a mapped file), stays."""
        for name, (data, _) in self._kept.items():
            storage = data.untyped_storage()
            if storage.resizable() and storage.nbytes() == data.nbytes and data.is_contiguous():
                self._away[name] = data.to("cpu", copy=True)
                storage.resize_(0)

    def take_out(self) -> None:
        """Gives every parameter of the original its own storage and gradient again."""
        self.graphs = self.adversary_graphs = None  # they hold this object's own method, and memory of their own
        for name in list(self._away):
            data = self._kept[name][0]
            data.untyped_storage().resize_(data.numel() * data.itemsize)
            data.copy_(self._away[name])
            del self._away[name]
        for name, parameter in self.parameters.items():
            parameter.data, parameter.grad = self._kept[name]

    def settle(self) -> None:
        """`take_out`, and then writes the trained weights into the original's own storage."""
        trained = self.tensors()
        self.take_out()
        self.decoder.place(trained)
