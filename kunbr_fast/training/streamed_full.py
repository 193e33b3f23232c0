"""Full-parameter training whose steps go layer by layer: for models that are streamed.

up      for each layer: the layer comes, all micro-batches pass it; between two layers their activations wait
top     loss, and back through head and top layer
down    for each layer: weights and optimiser state come, all micro-batches pass it backward, then it is updated,
        and both go back (`model.layer_store`)
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from kunbr_fast.memory import LESS, gibibytes, is_out_of_memory
from kunbr_fast.model.weights import finite
from kunbr_fast.objectives import losses
from kunbr_fast.objectives.batch import PartLoss, StepBatch
from kunbr_fast.training.diverged import UPDATE
from kunbr_fast.training.full import VANISH, FullTraining
from kunbr_fast.training.streamed import GradientsOnTheWay
from kunbr_fast.training.updates import Updates


class StreamedFullTraining(GradientsOnTheWay, FullTraining):
    """`FullTraining` of a streamed model, inside `writable` of its weights. Made by `full_training`.

    A layer's gradient is whole when all micro-batches have left the layer on their way down; there and then the layer
    is updated. No gradient of a second layer is ever there. Weights come twice a step (the top layer's once) and go
    once, the optimiser's state comes once and goes once; of resident layers nothing comes or goes. What is outside of
    the layers (embedding, final norm, head) stays on the device, with its gradient and state.

    The bits are those of `FullTraining` with the same micro_batch_tokens, and so are a checkpoint's tensors. But where
    a loss or a gradient is not finite, or memory runs out on the way down, layers above have been updated: the error
    leaves a training that goes on from a checkpoint alone. Where the weights begin anew (`writable`), make another one.

    ValueError for an adversary: it would need a second model, and AdamW's moments of it.
    """

    def _begin(self) -> None:
        decoder, settings = self.decoder, self.settings
        self.weights = decoder.weights
        if not decoder.streamed:
            raise ValueError(f"{decoder.name} is not streamed: take FullTraining (`full_training` chooses)")
        if self.weights.store is None:
            raise ValueError(
                f"{decoder.name} is streamed: train it inside `with decoder.weights.writable(directory):`, which says "
                "where the trained layers lie"
            )
        if settings.adversary is not None:
            raise ValueError(
                f"adversary_every={settings.adversary_every}: an adversary of all parameters is a second model, which "
                "a streamed one's training does not hold: take 0, or give an M_u made elsewhere (unlearned=)"
            )
        paths = [f"{decoder.layer_path(i)}." for i in range(decoder.num_layers)]
        inside = [{n: p for n, p in self.parameters.items() if n.startswith(path)} for path in paths]
        outside = {n: p for n, p in self.parameters.items() if not any(n in layer for layer in inside)}
        below = self._below(outside)
        above = {n: p for n, p in outside.items() if n not in below}
        self.layers = [self._updates(layer) for layer in inside]
        # of what is outside of the layers: that the input of layer 0 depends on, and the rest
        self.below, self.above = (self._updates(part) if part else None for part in (below, above))
        self.optimizer = self.layers[0].optimizer
        for updates in (*self.layers, *self._outside()):
            updates.share_flags(self.layers[0])
        if settings.master_weights == "none":
            settings.warn_if_updates_vanish([self.weights[name] for name in inside[0]], VANISH)

    def _updates(self, parameters: Mapping[str, nn.Parameter]) -> Updates:
        return Updates(parameters, self.settings, self.execution.impl, self._numbers())

    def _outside(self) -> list[Updates]:
        return [updates for updates in (self.below, self.above) if updates is not None]

    def _below(self, outside: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """Those that the input of layer 0 depends on."""
        with torch.enable_grad():
            embedded = self.decoder.embed(self.decoder.probe).sum()
            found = torch.autograd.grad(embedded, list(outside.values()), allow_unused=True)
        return {name: outside[name] for name, gradient in zip(outside, found) if gradient is not None}

    # ------------------------------------------------ a step

    def step_packed(self, step: StepBatch, relearned: Sequence[StepBatch] = ()) -> dict[str, float | None]:
        if self.torn:
            raise RuntimeError(f"{self.where()}: a step has ended in the middle of its updates: load a checkpoint")
        self.relearn(relearned)  # for its error
        before = [flag.clone() for flag in self.flags()]
        part = self.accumulate(step)
        good = finite(part.loss).to(self._good.device) & self._good
        for flag in before:
            good = good & (flag[0] == 0)
        metrics = losses.metrics(step, part)
        if not bool(good):
            self.torn = True
            if any(int(flag) for flag in before):
                raise self.diverged(UPDATE, metrics)
            self.optimizer.reset_flags()  # those of this step, which no update is the cause of
            self.judge(metrics, False)
        self.criterion.advance(part.retain_term)
        self.steps += 1
        return metrics

    def _passes(self, steps: list[StepBatch]) -> list[PartLoss]:
        try:
            found = self._through(steps, update=True)
            self.torn = False
            return found
        except BaseException as error:
            if not (self.torn and is_out_of_memory(error)):
                raise
            said = str(error)
        self.drop_gradient()
        raise self._refusal(None, said)

    def _probe(self, step: StepBatch) -> PartLoss:
        return self._through([step], update=False)[0]

    def _through(self, steps: list[StepBatch], update: bool) -> list[PartLoss]:
        """Up, and down to the embeddings, with each parameter updated when its gradient is whole, or else looked at."""
        top = self.decoder.num_layers - 1 if self.criterion.layer is None else self.criterion.layer
        tied = self._kept_apart(steps)

        def enter(layer: int) -> None:
            if update and layer not in self.weights.resident:
                self.weights.traffic["state_in"] += self.weights.store.expect_state(layer)

        def leave(layer: int) -> None:
            self._leave(self.layers[layer], layer, update)
            if layer == top and self.above is not None:
                self._leave(self.above, None, update)

        found, passes = self._layer_by_layer(steps, 0, enter, leave, tied.take, need_first=True)
        for number, step in enumerate(steps):
            tied.put(number)
            self.decoder.embed(step.packed).backward(passes.gradient(number))
            tied.add()
        tied.end()
        if self.below is not None:
            self._leave(self.below, None, update)
        return found

    def _kept_apart(self, steps: Sequence[StepBatch]) -> _PerMicroBatch:
        shared = [] if self.below is None or len(steps) == 1 else self.below.parameters.values()
        return _PerMicroBatch(list(shared))

    @torch.no_grad()
    def _leave(self, updates: Updates, layer: int | None, update: bool) -> None:
        """The gradients of these parameters are whole. layer: whose they are, None outside of the layers."""
        parameters, weights = updates.parameters.values(), self.weights
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        self._look(gradients)
        if not update:
            for parameter in parameters:
                parameter.grad = None
            return
        self.torn = True
        moves = layer is not None and layer not in weights.resident
        if moves:
            updates.take(weights.store.state(layer))
        updates.step()
        if layer is None:
            weights.changed_others()
            return
        weights.write(layer)
        if moves:
            weights.traffic["state_out"] += weights.store.write_state(layer, updates.tensors())
            updates.let_go()

    # ------------------------------------------------ of each kind of training

    def _memory(self) -> tuple[str, list[str]]:
        outside = sum(p.nbytes for updates in self._outside() for p in updates.parameters.values())
        what = (
            f"all parameters, layer by layer: outside of the layers {gibibytes(outside)}, gradient as much, and in "
            f"buffers for layers {gibibytes(self.weights.nbytes)}"
        )
        cures = ["shorter samples (max_length)", "micro_batch_tokens", LESS]
        return what, cures + ["fewer resident layers (resident_layers)"] * bool(self.weights.resident)

    def state(self) -> Mapping[str, torch.Tensor]:
        """Of a layer that no step has reached, as above a criterion's layer, each tensor is read when it is asked
        for."""
        found: dict[str, torch.Tensor] = {}
        for layer, updates in enumerate(self.layers):
            found |= updates.state() | self.weights.store.stored_state(layer)
        for updates in self._outside():
            found |= updates.state()
        return ChainMap(found | self.criterion.state(), self.weights.views())

    @torch.no_grad()
    def load_state(self, state: Mapping[str, torch.Tensor], steps: int) -> None:
        weights, store, device = self.weights, self.weights.store, self.decoder.device
        store.reset()  # of a layer that the state says nothing of, nothing is left
        for layer, updates in enumerate(self.layers):
            mine = updates.begin(state)
            weights.put(layer, state)
            if layer in weights.resident:
                updates.take({name: state[name].to(device, copy=True) for name in mine})
            elif mine:
                store.put_state(layer, {name: state[name] for name in mine})
        for updates in self._outside():
            for name, parameter in updates.parameters.items():
                parameter.copy_(state[name])
            updates.take({name: state[name].to(device, copy=True) for name in updates.begin(state)})
        weights.changed_others()
        self.criterion.load_state(state)
        self.optimizer.reset_flags()
        self.steps, self.torn = steps, False


class _PerMicroBatch:
    """Gradients of tied weights, kept apart by micro-batch until both uses have given theirs: a model in memory adds
    the two of one micro-batch first, and this order of sums is part of the bits. They wait in main memory.

    parameters: none where there is one micro-batch.
    """

    def __init__(self, parameters: Sequence[nn.Parameter]):
        self._parameters = parameters
        self._waiting: list[list[torch.Tensor | None]] = []
        self._sums: list[torch.Tensor | None] = [None] * len(parameters)

    def take(self, number: int) -> None:
        """After the head of a micro-batch."""
        gradients = [parameter.grad for parameter in self._parameters]
        self._waiting.append([None if gradient is None else gradient.cpu() for gradient in gradients])
        for parameter in self._parameters:
            parameter.grad = None

    def put(self, number: int) -> None:
        """Before the backward pass of its embeddings."""
        for parameter, waiting in zip(self._parameters, self._waiting[number]):
            parameter.grad = None if waiting is None else waiting.to(parameter.device)
        self._waiting[number] = []

    @torch.no_grad()
    def add(self) -> None:
        """After it."""
        for i, parameter in enumerate(self._parameters):
            if parameter.grad is not None:
                self._sums[i] = parameter.grad if self._sums[i] is None else self._sums[i].add_(parameter.grad)
                parameter.grad = None

    def end(self) -> None:
        for parameter, total in zip(self._parameters, self._sums):
            parameter.grad = total
