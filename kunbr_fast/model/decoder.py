"""A Hugging Face causal language model, taken apart without copying its source.

A model is: embeddings -> layer 0 ... layer H-1 -> final norm -> head. Re-insertion runs any stretch of the layers from
given activations, on packed samples, with logits at chosen positions only. The model's own forward, run with recorders
in place of its layers, gives the hidden state at the input of layer 0 and each layer's further arguments (rotary
angles, positions, masks); the layers are then called one by one. So what a model does before its layers (positions
added, embeddings scaled) is done by its own code.

The final norm is found by watching one real forward. A self-check compares the logits of this path with the model's
own on two short samples: an architecture that does not fit is refused, not trained wrongly.

Attention goes through transformers' attention interface (`attention`); the model's own choice is put back after each
call.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as run_again

from kunbr_fast.data import PackedBatch, pack
from kunbr_fast.files.models import attention_of
from kunbr_fast.files.saving import save_model
from kunbr_fast.memory import Place
from kunbr_fast.model import attention, compat
from kunbr_fast.model.frozen import evaluating, frozen
from kunbr_fast.model.gather import take
from kunbr_fast.model.layers import find_layers
from kunbr_fast.model.ownership import bare_product, naming_adapters, uncompiled, whole
from kunbr_fast.model.rotary import RotaryByLength
from kunbr_fast.model.weights import DAMAGED, Weights, all_zero, check_finite, weights_of

Turn = Callable[[int, "Stretch", int, torch.Tensor | None], None]  # see `Decoder.passes`
Tap = Callable[[torch.Tensor], torch.Tensor]  # see `Stretch`


class _Stop(Exception):
    """Ends the model's own forward once the last layer's arguments are known."""


@dataclasses.dataclass(frozen=True)
class Head:
    """final hidden states -> logits: `softcap * tanh(scale * (h @ weight.T + bias) / softcap)`."""

    linear: nn.Linear
    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self.linear(hidden) * self.scale if self.scale != 1.0 else self.linear(hidden)
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


def find_head(model: nn.Module) -> Head:
    config, linear = model.config.get_text_config(), model.get_output_embeddings()
    if type(linear) is not nn.Linear:
        raise ValueError(f"{type(model).__name__}: its head is {type(linear).__name__}, expected nn.Linear")
    scale = 1.0
    if getattr(config, "logits_scaling", None):  # Granite divides
        scale = 1.0 / config.logits_scaling
    elif getattr(config, "logit_scale", None):  # Cohere multiplies
        scale = config.logit_scale
    return Head(linear, scale, getattr(config, "final_logit_softcapping", None))


@dataclasses.dataclass(frozen=True)
class Stretch:
    """Where a forward pass begins: at layer `start`, with `hidden` (T, D) at its input.

    Without `hidden` it begins at the embeddings, and `start` must be 0. recompute: keep each layer's input only, and
    run the layer again in the backward pass. taps: of some layers, a function that gets the layer's output (T, D) and
    returns what goes on in its place.
    """

    start: int = 0
    hidden: torch.Tensor | None = None
    recompute: bool = False
    taps: Mapping[int, Tap] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if self.hidden is None and self.start != 0:
            raise ValueError(f"start={self.start} needs the hidden states at the input of that layer")


FROM_EMBEDDINGS = Stretch()


class Arrival(NamedTuple):
    """A batch on its way through the layers, which of the layers that were asked for come next, and where
    `Decoder.run` goes on with it."""

    number: int
    batch: PackedBatch
    layers: list[int]
    stretch: Stretch = FROM_EMBEDDINGS


class Decoder:
    """Runs stretches of a causal language model's layers on packed batches.

    Of a model that `open_streamed` has made, `Decoder(model)` is a `StreamedDecoder`, with the same methods. Runs need
    eval mode (no dropout), so that packed and unpacked runs, and a run and its resumption, agree.

    Errors: ValueError, naming the module, if the model is not `whole`, its attention leaves out a softcap, if the model
    has no list of `num_hidden_layers` layers, more than one module between the last layer and the head, a head that is
    no nn.Linear, weights that are not finite, or logits that differ from this path's.
    """

    def __new__(cls, model: nn.Module) -> Decoder:
        return super().__new__(weights_of(uncompiled(model)).decoder_class or cls)

    def __init__(self, model: nn.Module):
        self.model = model = uncompiled(model)
        whole(model)
        self.config = model.config.get_text_config()
        self.name = type(model).__name__
        if getattr(self.config, "_attn_implementation", None) == "sdpa" and attention_of(self.config) is not None:
            raise ValueError(
                f"{self.name}: SDPA leaves out the softcap of its attention ({self.config.attn_logit_softcapping}): "
                "load it with attn_implementation='eager'"
            )
        attention.register()
        with naming_adapters(model), evaluating(model):
            self._layers_path, self.layers = find_layers(model)
            self.inner = model.get_submodule(self._layers_path.rpartition(".")[0])
            self.head = find_head(model)
            self.rotary = RotaryByLength(self.inner)
            self._norm, native = self._watch_forward()
            self._windows = self._windows_in_masks()
            self._check(native)
            bare_product(self.head.linear, self.name)

    # ------------------------------------------------ structure

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def device(self) -> torch.device:
        return next(self.layers[0].parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.layers[0].parameters()).dtype

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @property
    def max_positions(self) -> int | None:
        """The longest sample that the model takes; None: any. Dynamic NTK goes beyond `max_position_embeddings`."""
        if self.rotary.unlimited:
            return None
        return getattr(self.config, "max_position_embeddings", None)

    def layer_path(self, index: int) -> str:
        """The module path of a layer, such as "model.layers.3"."""
        return f"{self._layers_path}.{index}"

    @property
    def probe(self) -> PackedBatch:
        """Two short samples for self-checks."""
        ids = torch.arange(1, 9) % self.config.vocab_size
        return pack([{"input_ids": part, "labels": part} for part in (ids[:5], ids[5:])]).to(self.device)

    @property
    def rounding(self) -> float:
        """The largest relative difference between two forms of one computation that is taken for rounding. An unknown
        step in a model changes a result by far more. Models use fp32 inside (norms, rotary angles) even where their
        weights are fp64; a fine-tuned SmolLM2-135M in fp32 came to 5e-4."""
        return {torch.float64: 1e-4, torch.float32: 5e-3}.get(self.dtype, 0.1)

    @torch.no_grad()
    def _watch_forward(self) -> tuple[nn.Module | None, list[torch.Tensor]]:
        """The module that runs after the last layer, and the model's own logits of the two probe samples."""
        after: list[nn.Module] = []
        hooks = [self.layers[-1].register_forward_hook(lambda *_: after.clear())]
        for child in self.inner.children():
            if child is not self.layers:
                hooks.append(child.register_forward_hook(lambda module, *_: after.append(module)))
        try:
            samples = self.probe.input_ids.split(self.probe.lengths)
            with self.rotary.watching():
                native = [self.model(input_ids=ids[None], use_cache=False).logits[0] for ids in samples]
        finally:
            for hook in hooks:
                hook.remove()
        if len(after) > 1:
            raise ValueError(f"{self.name}: {len(after)} modules run after the last layer, expected one final norm")
        if not all(bool(logits.isfinite().all()) for logits in native):
            check_finite(self.model)
            raise ValueError(f"{self.name}: logits are not finite although all weights are: try a wider dtype")
        if not any(bool(logits.any()) for logits in native):
            zeros = all_zero(self.weights)
            raise ValueError(f"{self.name}: all its logits are 0{zeros}: {DAMAGED}")
        return (after[0] if after else None), native

    def _windows_in_masks(self) -> list[int | None]:
        """Each layer's sliding window. Some models (Phi-3.5-MoE, Qwen2-MoE) put it into their masks and nowhere else;
        attention here makes masks of its own."""
        try:
            with self._attention(attention.MASKS), self.rotary.of(self.probe), torch.no_grad():
                calls = self.layer_calls(self.probe)[1]
        except (TypeError, AttributeError, LookupError, NotImplementedError, ValueError):
            return [None] * self.num_layers  # masks of its own making; `_check` says whether it runs at all
        return [attention.window_of((*args, *kwargs.values())) for args, kwargs in calls]

    @torch.no_grad()
    def _check(self, native: list[torch.Tensor]) -> None:
        try:
            ours, truth = self.logits(self.probe).double(), torch.cat(native).double()
        except (TypeError, AttributeError, LookupError, NotImplementedError) as error:
            raise ValueError(
                f"{self.name}: its layers do not run on packed samples ({type(error).__name__}: {error}): "
                "this architecture is not supported"
            ) from error
        if ours.shape != truth.shape:  # PEFT's prompt tuning puts tokens in front
            raise ValueError(
                f"{self.name}: its own logits are {tuple(truth.shape)}, those of its layers {tuple(ours.shape)}: it "
                "puts tokens in, or keeps its states in another form: this architecture is not supported"
            )
        error = float((ours - truth).norm() / truth.norm())
        if not error <= self.rounding:
            raise ValueError(
                f"{self.name}: taken apart, its logits differ from its own by {error:.1e} relative (limit "
                f"{self.rounding:.1e}): this architecture does something around its layers that kunbr_fast does not "
                "know"
            )

    # ------------------------------------------------ weights, and what a streamed model does otherwise

    @property
    def weights(self) -> Weights:
        """The model's weights by parameter name."""
        return weights_of(self.model)

    @property
    def streamed(self) -> bool:
        return self.weights.streamed

    def place(self, weights: Mapping[str, torch.Tensor]) -> None:
        """These tensors, by parameter name, become the model's weights. A stream keeps the mapping and reads it at
        each load."""
        self.weights.replace(weights)

    def save(self, directory: str | Path, replace: bool = False) -> None:
        """Writes the model (no tokenizer) to a directory. replace: as of `save_model`."""
        save_model(self.model, None, directory, replace)

    def held(self, layers: range) -> contextlib.AbstractContextManager:
        """Inside, these layers' parameters are the caller's: a stream does not touch them."""
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def instead(self, other: nn.Module) -> Iterator[Decoder]:
        """Inside, a decoder with the weights of `other`, a model of the same architecture, for evaluation."""
        with frozen(other):
            yield Decoder(other)

    def visit(self, order: Iterable[int]) -> Iterator[int]:
        """The layers of `order`, each with its weights in place."""
        return iter(order)

    def stretches(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Layers start...stop-1 as stretches (start, stop), each to be run for all samples before the next one."""
        yield start, stop

    def forward_to(
        self, batches: Iterable[PackedBatch], layers: Iterable[int], place: Place | None = None
    ) -> Iterator[Arrival]:
        """Forward passes by way of the inputs of `layers`: yields each batch until it has been there for all of them.

        A model in memory yields each batch once, at the embeddings, for all layers; a streamed one all batches for the
        lowest layer, then for the next, so that every layer is read once. place: where its activations wait.
        """
        layers = sorted(set(layers))
        for number, batch in enumerate(batches):
            yield Arrival(number, batch, layers)

    def groups(self, batches: Sequence[PackedBatch]) -> Sequence[Sequence[PackedBatch]]:
        """Which batches `passes` is to be given at once: those that share the reading of a layer."""
        return [[batch] for batch in batches]

    def passes(
        self,
        batches: Sequence[PackedBatch],
        start: int,
        turn: Turn,
        recompute: bool = False,
        place: Place | None = None,
    ) -> None:
        """A forward and backward pass of each batch through layers start...H-1.

        turn(number, stretch, stop, dy): batch `number`, forward from `stretch` to the input of layer `stop`, and
        backward: from dy, the gradient of that, or where dy is None from the loss. The stretch's hidden states
        require grad, and have one afterwards. A model in memory has one turn for each batch, a streamed one a turn
        for each of its layers, from high to low. recompute: of a stretch of several layers. place: as in `forward_to`.
        """
        for number, batch in enumerate(batches):
            with torch.no_grad():
                hidden = self.embed(batch)
                hidden = self.run(batch, Stretch(0, hidden), start) if start else hidden
            turn(number, Stretch(start, hidden.requires_grad_(), recompute), self.num_layers, None)
            del hidden  # before the next one is made

    # ------------------------------------------------ running

    @contextlib.contextmanager
    def _attention(self, name: str) -> Iterator[None]:
        before = self.config._attn_implementation
        self.config._attn_implementation = name
        try:
            yield
        finally:
            self.config._attn_implementation = before

    @contextlib.contextmanager
    def _packed(self, batch: PackedBatch) -> Iterator[None]:
        with self._attention(attention.ATTENTION), self.rotary.of(batch):
            yield

    def layer_calls(self, batch: PackedBatch) -> tuple[torch.Tensor, list[tuple[tuple, dict]]]:
        """The hidden state (1, T, D) at the input of layer 0, and each layer's further arguments."""
        calls: list[tuple[tuple, dict]] = []
        first: list[torch.Tensor] = []

        def recorder(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if not calls:
                first.append(hidden)
            calls.append((args, kwargs))
            if len(calls) == len(self.layers):
                raise _Stop
            return (hidden,) if compat.LAYERS_RETURN_TUPLES else hidden

        recorder.computes_nothing = True  # so that no weights are fetched for it (streaming)
        patched = {layer: layer.__dict__.get("forward") for layer in self.layers}  # by Accelerate, for example
        for layer in self.layers:
            layer.forward = recorder
        try:
            self.inner(
                input_ids=batch.input_ids[None],
                position_ids=batch.position_ids[None],
                use_cache=False,
                kunbr_batch=batch,
            )
        except _Stop:
            pass
        finally:
            for layer, forward in patched.items():
                del layer.forward
                if forward is not None:
                    layer.forward = forward
        return first[0], calls

    def run(
        self, batch: PackedBatch, stretch: Stretch = FROM_EMBEDDINGS, stop: int | None = None, rows: bool = False
    ) -> torch.Tensor:
        """Hidden states (T, D) at the input of layer `stop` (default: after the last layer, before the final norm).

        rows: return `batch.rows` only, (R, D), the positions with a label. A fused last layer (`patched`) then computes
        its queries and its MLP for these alone, if they are few.
        """
        stop = self.num_layers if stop is None else stop
        if self.model.training:
            raise ValueError(f"{self.name} is in training mode: call model.eval() first, so that dropout is off")
        longest, limit = max(batch.lengths), self.max_positions
        if limit is not None and longest > limit:
            raise ValueError(
                f"a sample of {longest} tokens: {self.name} has {limit} positions; shorten or leave it out"
            )
        attention.check_places(self.config, batch, self.name)
        with self._packed(batch):
            embedded, calls = self.layer_calls(batch)
            hidden = embedded if stretch.hidden is None else stretch.hidden[None]
            for index in range(stretch.start, stop):
                layer, (args, kwargs) = self.layers[index], calls[index]
                if self._windows[index] is not None:
                    kwargs = {**kwargs, "kunbr_window": self._windows[index]}
                few = rows and index == stop - 1 and index not in stretch.taps
                if few and getattr(layer.__dict__.get("forward"), "takes_rows", False):
                    if 2 * len(batch.rows) <= batch.num_tokens:
                        kwargs, rows = {**kwargs, "kunbr_rows": batch.rows}, False  # it gives nothing else
                if stretch.recompute:
                    # The backward pass comes when the model's own attention is back. Nothing here is random.
                    hidden = run_again(
                        layer,
                        hidden,
                        *args,
                        use_reentrant=False,
                        preserve_rng_state=False,
                        context_fn=lambda: (contextlib.nullcontext(), self._packed(batch)),
                        **kwargs,
                    )
                else:
                    hidden = layer(hidden, *args, **kwargs)
                hidden = hidden[0] if compat.LAYERS_RETURN_TUPLES else hidden
                if index in stretch.taps:
                    hidden = stretch.taps[index](hidden[0])[None]
        return take(hidden[0], batch.rows) if rows else hidden[0]

    def embed(self, batch: PackedBatch) -> torch.Tensor:
        """Hidden states (T, D) at the input of layer 0."""
        return self.run(batch, stop=0)

    def final(self, hidden: torch.Tensor) -> torch.Tensor:
        """The final norm, (R, D) -> (R, D)."""
        return hidden if self._norm is None else self._norm(hidden)

    def logits(
        self, batch: PackedBatch, rows: torch.Tensor | None = None, stretch: Stretch = FROM_EMBEDDINGS
    ) -> torch.Tensor:
        """Logits (R, V) at the packed positions `rows` (default: all T)."""
        out = self.run(batch, stretch)
        return self.head(self.final(out if rows is None else out[rows]))
