"""Whether a model taken apart is the model: embeddings, each layer and what comes after, against its own forward.

Each layer is run on the input that it has in the model's own forward, from the last to the first. So a layer that
needs what an earlier one has left behind (shared keys and values) is found out, and rounding does not add up. Where one
does, passes begin no higher than they must (`Decoder.entry`). Windows and chunks are narrowed meanwhile, so that
samples of a few tokens are longer than all of them.

Half precision rounds by as much as an unknown step may change. There a copy in fp32 decides, of the first layer of each
kind, and of every layer that is off by more than rounding. In fp32 a copy in fp64 does, for the latter.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator, MutableMapping
from typing import Any, NamedTuple

import torch
from torch import nn

from kunbr_fast.data import PackedBatch
from kunbr_fast.data.trees import Trees
from kunbr_fast.memory import is_out_of_memory
from kunbr_fast.model.calls import Call, Seen, hidden_of
from kunbr_fast.model.ways import Way
from kunbr_fast.model.weights import DAMAGED, all_zero, check_finite

NARROW = 3  # tokens
_WINDOW = re.compile(r"window|^attention_chunk_size$|^local_attention$")
# Largest relative error of what a layer adds to its input, and of logits, that is taken for rounding. What the layers
# of transformers have in fp32 of an fp64 model (softmax, norms) rounds by 1e-7.
LIMITS = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 8e-3, torch.float16: 2e-3}
_WIDER = {torch.float32: torch.float64, torch.bfloat16: torch.float32, torch.float16: torch.float32}
_ROUNDED = 16 * torch.finfo(torch.float32).eps  # of a layer's output, by steps that it takes in fp32
FAILURES = (TypeError, AttributeError, LookupError, NotImplementedError, ValueError, RuntimeError, AssertionError)


@contextlib.contextmanager
def narrowed(model: nn.Module) -> Iterator[None]:
    """Inside, the model's windows and chunks of attention are of `NARROW` tokens: in its configurations and as numbers
    that its modules hold."""
    owners = {id(x): x for module in model.modules() for x in (module, getattr(module, "config", None))}
    changed: list[tuple[dict, str, int]] = []
    try:
        for owner in owners.values():
            values = vars(owner) if hasattr(owner, "__dict__") else {}
            for name, value in list(values.items()):
                if type(value) is int and value > NARROW and _WINDOW.search(name) and "layer" not in name:
                    changed.append((values, name, value))
                    values[name] = NARROW
        yield
    finally:
        for values, name, value in changed:
            values[name] = value


def difference(ours: torch.Tensor, truth: torch.Tensor) -> float:
    return float((ours.double() - truth.double()).norm())


class Disagreement(Exception):
    """Why a model cannot be run in some way; the message is about the model."""


class _Shares(Disagreement):
    """A layer did not find what an earlier one leaves behind."""


def sound(decoder: Any, native: list[torch.Tensor]) -> None:
    """ValueError where a model's own logits are not finite, or all 0, which weights are blamed for."""
    if not all(bool(logits.isfinite().all()) for logits in native):
        check_finite(decoder.model)
        raise ValueError(f"{decoder.name}: logits are not finite although all weights are: try a wider dtype")
    if not any(bool(logits.any()) for logits in native):
        raise ValueError(f"{decoder.name}: all its logits are 0{all_zero(decoder.weights)}: {DAMAGED}")


@torch.no_grad()
def compare_head(decoder: Any, seen: Seen) -> None:
    """`Disagreement` where what comes after the layers is not what a `Decoder` makes of it: logits of the last layer's
    own output."""
    try:
        ours = decoder.head(decoder.final(torch.cat(seen.outputs[max(seen.outputs)])))
    except FAILURES as error:
        raise _raised("its head does not take what its last layer gives", error) from error
    truth, limit = torch.cat(seen.logits), LIMITS[decoder.dtype]
    if ours.shape != truth.shape:
        raise Disagreement(f"its own logits are {tuple(truth.shape)}, those of its head {tuple(ours.shape)}")
    off, size = difference(ours, truth), float(truth.double().norm())
    if not off <= limit * size:
        raise Disagreement(
            f"taken apart, its logits differ from its own by {off / size:.1e} relative (limit {limit:.1e}): it does "
            "something around its layers that kunbr_fast does not know"
        )


class Agreed(NamedTuple):
    """entry: the last layer at which a pass may begin. trees: whether samples may be trees (`data.trees`)."""

    entry: int
    trees: bool


@torch.no_grad()
def compare(decoder: Any, way: Way, seen: Seen) -> Agreed:
    """What way samples may run in else. `Disagreement` where the embeddings or a layer of a `Decoder`, run in
    this way, do something else than in the model's own runs on the decoder's probe."""
    batch, limit = decoder.probe, LIMITS[decoder.dtype]
    try:
        embedded, calls = decoder.layer_calls(batch, way)
    except FAILURES as error:
        raise _raised("its layers' arguments cannot be made", error) from error
    own = torch.cat(seen.inputs[min(seen.inputs)])
    if embedded.shape != own.shape:  # PEFT's prompt tuning puts tokens in front
        raise Disagreement(
            f"its own states before the layers are {tuple(own.shape)}, ours {tuple(embedded.shape)}: it puts tokens in"
        )
    if not difference(embedded, own) <= limit * float(own.double().norm()):
        error = difference(embedded, own) / float(own.double().norm())
        raise Disagreement(f"the states before its first layer differ from its own by {error:.1e} relative")
    order = sorted(seen.inputs, reverse=True)
    try:
        return Agreed(order[0], _compare_layers(decoder, way, seen, order, calls))
    except _Shares as shares:
        if decoder.streamed:  # one layer at a time
            raise
        why = shares
    for start in order[1:]:
        with contextlib.suppress(_Shares):
            calls = decoder.layer_calls(batch, way)[1]
            return Agreed(start, _compare_layers(decoder, way, seen, range(start, order[0] + 1), calls))
    raise why


def _compare_layers(decoder: Any, way: Way, seen: Seen, order: Iterable[int], calls: list[dict[int, Call]]) -> bool:
    """Whether samples may be trees."""
    half, kinds = decoder.dtype in (torch.bfloat16, torch.float16), set()
    trees = _AsTrees.of(decoder, way)
    for index in decoder.visit([index for index in order if index in seen.inputs]):
        kind = _kind(decoder.layers[index]) if half else ""
        _compare_layer(decoder, way, seen, index, [each[index] for each in calls], half and kind not in kinds)
        kinds.add(kind)
        if trees is not None and not trees.agree(index, torch.cat(seen.inputs[index])):
            trees = None
    return trees is not None


class _AsTrees(NamedTuple):
    """Two texts that begin alike, as a tree and one after the other, on their way through a decoder's layers. places:
    of the texts' tokens in the tree."""

    decoder: Any
    way: Way
    batches: tuple[PackedBatch, PackedBatch]
    calls: tuple[list[dict[int, Call]], list[dict[int, Call]]]
    places: list[int]

    @classmethod
    def of(cls, decoder: Any, way: Way) -> _AsTrees | None:
        """None where samples cannot be trees: they do not run packed, or their angles depend on their lengths."""
        if way.name != "packed" or way.rotary.same_up_to != float("inf"):
            return None
        trees, ids = Trees(), (torch.arange(1, 11) % decoder.config.vocab_size).tolist()
        texts = [trees.add([*ids[:5], *ids[5:7]], 0), trees.add([*ids[:5], *ids[7:]], 0)]
        (grown,) = trees.grown()
        batches = tuple(trees.pack(*how).to(decoder.device) for how in (([grown], True), (texts, False)))
        try:
            calls = tuple(decoder.layer_calls(batch, way)[1] for batch in batches)
        except FAILURES as error:
            if is_out_of_memory(error):
                raise
            return None
        return cls(decoder, way, batches, calls, [grown.index(node) for text in texts for node in text])

    def agree(self, index: int, hidden: torch.Tensor) -> bool:
        """hidden: states before the layer, as many as the tree has tokens or more."""
        layer, hidden = self.decoder.layers[index], hidden[: self.batches[0].num_tokens]
        given = hidden, hidden[self.places]
        try:
            tree, texts = (
                self.decoder.apply(layer, index, x, batch, [each[index] for each in calls], self.way)
                for x, batch, calls in zip(given, self.batches, self.calls)
            )
        except FAILURES as error:
            if is_out_of_memory(error):
                raise
            return False
        added = float((texts.double() - given[1].double()).norm())
        return difference(tree[self.places], texts) <= LIMITS[self.decoder.dtype] * added


def _kind(layer: nn.Module) -> str:
    """What tells layers of one kind from those of another: their modules, and the settings that these hold."""
    plain = (int, float, str, bool, type(None))
    settings = [
        (name, type(module), sorted((k, v) for k, v in vars(module).items() if isinstance(v, plain) and "idx" not in k))
        for name, module in layer.named_modules()
    ]
    return repr(settings)


def _raised(what: str, error: BaseException) -> Disagreement:
    if is_out_of_memory(error):
        raise error
    said = " ".join(str(error).split())
    return Disagreement(f"{what} ({type(error).__name__}: {said[:200]})")


def _compare_layer(decoder: Any, way: Way, seen: Seen, index: int, calls: list[Call], widely: bool) -> None:
    """widely: by a copy in a wider dtype too, where memory is enough for one."""
    path, layer, batch = decoder.layer_path(index), decoder.layers[index], decoder.probe
    before, truth = torch.cat(seen.inputs[index]), torch.cat(seen.outputs[index])

    def ours(module: nn.Module, hidden: torch.Tensor, cast: torch.dtype | None = None) -> torch.Tensor:
        return decoder.apply(module, index, hidden, batch, [_cast(call, cast) for call in calls], way)

    try:
        found = ours(layer, before)
    except LookupError as error:
        takes = f"{path} does not run by itself: it takes states of an earlier layer, such as keys"
        raise _Shares(f"{takes} ({type(error).__name__}: {error})") from error
    except FAILURES as error:
        raise _raised(f"{path} does not run by itself", error) from error
    if found.shape != truth.shape:
        raise Disagreement(f"{path} gives {tuple(truth.shape)}, and by itself {tuple(found.shape)}")
    added = float((truth.double() - before.double()).norm())
    off = difference(found, truth)
    near = off <= LIMITS[decoder.dtype] * added
    wide = _WIDER.get(decoder.dtype)
    if near and not widely:
        return
    if wide is not None:
        try:
            module, hidden = _widened(layer, wide), before.to(wide)
            rows = hidden.split([len(x) for x in seen.inputs[index]])
            with decoder.rotary.alone():
                own = [_one(module, x, _cast(call, wide)) for x, call in zip(rows, seen.calls[index])]
            truth, found = torch.cat(own), ours(module, hidden, wide)
            off, added = difference(found, truth), float((truth - hidden).double().norm())
        except FAILURES as error:
            if near and is_out_of_memory(error):
                return
            raise _raised(f"{path} does not run in {wide}, to be compared", error) from error
        if _same_rows(found, truth, hidden, wide):
            return
    raise Disagreement(f"taken apart, the output of {path} differs from its own by {off / (added or 1):.1e} relative")


def _same_rows(found: torch.Tensor, truth: torch.Tensor, before: torch.Tensor, dtype: torch.dtype) -> bool:
    """Token by token: one with massive activations would hide what is wrong with the others."""
    off, added, size = (x.double().norm(dim=1) for x in (found - truth, truth - before, truth))
    return bool((off <= LIMITS[dtype] * added + _ROUNDED * size).all())


def _widened(module: nn.Module, dtype: torch.dtype, made: dict[nn.Module, nn.Module] | None = None) -> nn.Module:
    """A copy with weights in another dtype, without hooks and forwards that were put in, which would run the original;
    with the same configuration, which names the attention that runs."""
    made = {} if made is None else made
    if module not in made:
        made[module] = new = copy.copy(module)
        for name in [name for name in vars(new) if name.endswith("_hooks")]:
            vars(new)[name] = OrderedDict()
        vars(new).pop("forward", None)
        new._parameters = {
            name: p if p is None else nn.Parameter(_wide(p, dtype), False) for name, p in module._parameters.items()
        }
        new._buffers = {name: b if b is None else _wide(b, dtype) for name, b in module._buffers.items()}
        new._modules = {name: m if m is None else _widened(m, dtype, made) for name, m in module._modules.items()}
    return made[module]


def _wide(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x.detach().to(dtype) if x.is_floating_point() else x.detach()


def _one(layer: nn.Module, hidden: torch.Tensor, call: Call) -> torch.Tensor:
    return hidden_of(layer(hidden[None], *call.args, **call.kwargs))[0]


def _cast(call: Call, dtype: torch.dtype | None) -> Call:
    """The arguments' floating-point tensors in another dtype."""

    def cast(x: Any) -> Any:
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            return x.to(dtype)
        if type(x) in (tuple, list):
            return type(x)(map(cast, x))
        if isinstance(x, MutableMapping):  # which a layer may write to
            new = copy.copy(x)
            new.update({name: cast(value) for name, value in x.items()})
            return new
        return x

    return call if dtype is None else Call(cast(call.args), cast(call.kwargs))
