"""A Hugging Face causal language model, taken apart without copying its source.

A model is: embeddings -> layer 0 ... layer H-1 -> final norm -> head. Re-insertion runs any stretch of the layers from
given activations, on packed samples, with logits at chosen positions only. The model's own forward, run with recorders
in place of its layers, gives the hidden state at the input of layer 0 and each layer's further arguments (rotary
angles, positions, masks); the layers are then called one by one. So what a model does before its layers (positions
added, embeddings scaled) is done by its own code (`calls`).

What comes after the layers is found by watching one real forward. A self-check compares embeddings, every layer and the
head with the model's own on two short samples (`self_check`). Samples are packed where that agrees, else padded, else
run one at a time (`ways`). An architecture that fits none of these is refused, not trained wrongly.

Attention of packed samples goes through transformers' attention interface (`attention`); the model's own choice is put
back after each call.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint as run_again

from kunbr_fast.data import PackedBatch, pack
from kunbr_fast.files.models import attention_of
from kunbr_fast.files.saving import save_model
from kunbr_fast.memory import Place, is_out_of_memory
from kunbr_fast.model import attention, calls, self_check
from kunbr_fast.model.calls import Call
from kunbr_fast.model.frozen import evaluating, frozen
from kunbr_fast.model.gather import take
from kunbr_fast.model.layers import find_layers
from kunbr_fast.model.ownership import bare_product, naming_adapters, uncompiled, whole
from kunbr_fast.model.rotary import RotaryByLength
from kunbr_fast.model.ways import Way, picks_keys, ways_of
from kunbr_fast.model.weights import Weights, weights_of

logger = logging.getLogger(__name__)

Turn = Callable[[int, "Stretch", int, torch.Tensor | None], None]  # see `Decoder.passes`
Tap = Callable[[torch.Tensor], torch.Tensor]  # see `Stretch`


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

    def setting(*names: str) -> float | None:
        return next((value for name in names if (value := getattr(config, name, None))), None)

    if divisor := setting("logits_scaling", "logits_mup_width_multiplier"):  # Granite and Inkling divide
        scale = 1.0 / divisor
    elif factor := setting("logit_scale"):  # Cohere multiplies
        scale = factor
    # Gemma, RecurrentGemma, xLSTM
    return Head(linear, scale, setting("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"))


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


@functools.cache
def _say_once(message: str) -> None:
    logger.warning("%s", message)


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

    way: how samples run, a `ways.Way` (`way.name` is packed, padded, picked or alone). trees: whether they may be
    trees (`data.trees`).

    Errors: ValueError, naming the module, if the model is not `whole`, its attention leaves out a softcap, if the model
    has no list of its layers, a head that is no nn.Linear, weights that are not finite, or embeddings, layers or logits
    that differ from this path's whichever way samples run.
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
            self.inner = calls.entry(model, self._layers_path)
            self.head = find_head(model)
            self.rotary = RotaryByLength(self.inner)
            self.way = self._find_way()
            bare_product(self.head.linear, self.name)
            self._windows = self._windows_in_masks(self.way)

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
    def state_dtype(self) -> torch.dtype:
        """Of the hidden states between layers: of a half-precision Mamba, float32."""
        return self._states.dtype

    @property
    def hidden_size(self) -> int:
        """D, of what the layers take."""
        return self._states.shape[-1]

    @property
    def max_positions(self) -> int | None:
        """The longest sample that the model takes; None: any. Dynamic NTK goes beyond `max_position_embeddings`."""
        if self.rotary.unlimited:
            return None
        limit = getattr(self.config, "max_position_embeddings", None)
        return limit if limit is not None and limit > 0 else None  # XLNet says -1

    def entry(self, layer: int) -> int:
        """The layer at which a pass through `layer` and those above may begin, from hidden states alone: `layer`, or
        one below where later layers take keys and values of earlier ones (Gemma-4)."""
        return min(layer, self._last_entry) if layer < self.num_layers else layer

    def runs(self, index: int) -> bool:
        """Whether the model's own forward on text runs a layer: cross-attention to images does not."""
        return index in self._forms

    def layer_path(self, index: int) -> str:
        """The module path of a layer, such as "model.layers.3"."""
        return f"{self._layers_path}.{index}"

    @property
    def probe(self) -> PackedBatch:
        """Two short samples for self-checks."""
        ids = torch.arange(1, 12) % self.config.vocab_size
        return pack([{"input_ids": part, "labels": part} for part in (ids[:7], ids[7:])]).to(self.device)

    @property
    def rounding(self) -> float:
        """The largest relative difference between two forms of a whole forward pass that is taken for rounding. Models
        use fp32 inside (norms, rotary angles) even where their weights are fp64; a fine-tuned SmolLM2-135M in fp32 came
        to 5e-4."""
        return {torch.float64: 1e-4, torch.float32: 5e-3}.get(self.dtype, 0.1)

    @torch.no_grad()
    def _find_way(self) -> Way:
        """The first way in which the model taken apart is the model."""
        reasons: list[self_check.Disagreement] = []
        with contextlib.ExitStack() as stack:
            if not picks_keys(self.config):  # such a model is padded only where a sample has fewer keys than it picks
                stack.enter_context(self_check.narrowed(self.model))
            try:
                with self.rotary.watching():
                    seen = calls.watch(self.model, self._layers_path, self.probe.input_ids.split(self.probe.lengths))
            except self_check.FAILURES as error:
                if is_out_of_memory(error):
                    raise
                raise self._refused(f"its own forward: {type(error).__name__}: {error}") from error
            self_check.sound(self, seen.logits)
            self._forms, self._tail = seen.forms, calls.tail_of(seen, self.head.linear)
            self._states = seen.outputs[max(seen.outputs)][0].new_empty(0, seen.inputs[min(seen.inputs)][0].shape[-1])
            try:
                self_check.compare_head(self, seen)
            except self_check.Disagreement as reason:
                raise self._refused(str(reason)) from reason
            for way in ways_of(self.config, self.rotary):  # which has watched
                self._windows = self._windows_in_masks(way)
                try:
                    self._last_entry, self.trees = self_check.compare(self, way, seen)
                except self_check.Disagreement as reason:
                    reasons.append(reason)
                else:
                    break
            else:
                raise self._refused(str(reasons[-1])) from reasons[-1]
        if way.lost:
            _say_once(f"{self.name}: {way.lost}")
        return way

    def _refused(self, why: str) -> ValueError:
        return ValueError(f"{self.name}: {why}: this architecture is not supported")

    def _windows_in_masks(self, way: Way) -> list[int | None]:
        """Each layer's sliding window. Some models (Phi-3.5-MoE, Qwen2-MoE) put it into their masks and nowhere else;
        attention of packed samples makes masks of its own."""
        none: list[int | None] = [None] * self.num_layers
        if way.name != "packed":
            return none
        batch = self.probe
        try:
            with attention.named(self.config, attention.MASKS), self.rotary.of(batch), torch.no_grad():
                found = calls.record(self.inner, self.layers, self._forms, way.inputs(batch))[1]
        except self_check.FAILURES:
            return none  # masks of its own making; the self-check says whether it runs at all
        windows = {i: attention.window_of((*call.args, *call.kwargs.values())) for i, call in found.items()}
        return [windows.get(index) for index in range(self.num_layers)]

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

    def layer_calls(self, batch: PackedBatch, way: Way | None = None) -> tuple[torch.Tensor, list[dict[int, Call]]]:
        """Hidden states (T, D) at the input of layer 0, and of each piece of the batch the layers' further arguments.

        way: another than the model's own."""
        way = way or self.way
        grids, found, pieces = [], [], way.pieces(batch)
        for piece in pieces:
            with way.running(piece):
                first, each = calls.record(self.inner, self.layers, self._forms, way.inputs(piece))
            if first.shape[:-1] != way.shape(piece):
                raise ValueError(f"its layers take {tuple(first.shape)} of {way.shape(piece)} tokens")
            grids.append(first)
            found.append(each)
        return way.rows(grids, pieces), found

    def apply(
        self, layer: nn.Module, index: int, hidden: torch.Tensor, batch: PackedBatch, given: Sequence[Call], way: Way
    ) -> torch.Tensor:
        """(T, D) -> (T, D) through `layer`, as layer `index`; given: its arguments for each piece of the batch."""
        pieces = way.pieces(batch)
        grids = way.grids(hidden, pieces)
        for number, (piece, call) in enumerate(zip(pieces, given)):
            with way.running(piece, self._windows[index]):
                grids[number] = calls.hidden_of(layer(grids[number], *call.args, **call.kwargs))
        return way.rows(grids, pieces)

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
        longest, limit = batch.longest, self.max_positions
        if limit is not None and longest > limit:
            raise ValueError(
                f"a sample of {longest} tokens: {self.name} has {limit} positions; shorten or leave it out"
            )
        self.way.check(batch, self.name)
        hidden, given = self.layer_calls(batch)
        hidden = hidden if stretch.hidden is None else stretch.hidden
        pieces = self.way.pieces(batch)
        grids, taken = self.way.grids(hidden, pieces), False
        for index in range(stretch.start, stop):
            if not self.runs(index):
                continue
            further = {}
            few = rows and index == stop - 1 and index not in stretch.taps and self.way.name == "packed"
            if few and getattr(self.layers[index].__dict__.get("forward"), "takes_rows", False):
                taken = 2 * len(batch.rows) <= batch.num_tokens
                further = {"kunbr_rows": batch.rows} if taken else {}
            for number, piece in enumerate(pieces):
                args, kwargs = given[number][index]
                call = Call(args, {**kwargs, **further})
                grids[number] = self._through(index, grids[number], piece, call, stretch.recompute)
            if index in stretch.taps:
                grids = self.way.grids(stretch.taps[index](self.way.rows(grids, pieces)), pieces)
        if taken:  # it has given nothing else
            return grids[0][0]
        hidden = self.way.rows(grids, pieces)
        return take(hidden, batch.rows) if rows else hidden

    def _through(self, index: int, grid: torch.Tensor, piece: PackedBatch, call: Call, recompute: bool) -> torch.Tensor:
        """A grid through a layer."""
        layer, running = self.layers[index], functools.partial(self.way.running, piece, self._windows[index])
        if not recompute:
            with running():
                return calls.hidden_of(layer(grid, *call.args, **call.kwargs))
        # The backward pass comes when the model's own attention is back. Nothing here is random.
        with running():
            out = run_again(
                layer,
                grid,
                *call.args,
                use_reentrant=False,
                preserve_rng_state=False,
                context_fn=lambda: (contextlib.nullcontext(), running()),
                **call.kwargs,
            )
        return calls.hidden_of(out)

    def embed(self, batch: PackedBatch) -> torch.Tensor:
        """Hidden states (T, D) at the input of layer 0."""
        return self.run(batch, stop=0)

    def final(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the model does after its layers, up to the head: (R, D) -> (R, K)."""
        return calls.through(self._tail, self.head.linear, hidden).to(self.head.linear.weight.dtype)

    def logits(
        self, batch: PackedBatch, rows: torch.Tensor | None = None, stretch: Stretch = FROM_EMBEDDINGS
    ) -> torch.Tensor:
        """Logits (R, V) at the packed positions `rows` (default: all T)."""
        out = self.run(batch, stretch)
        return self.head(self.final(out if rows is None else out[rows]))
