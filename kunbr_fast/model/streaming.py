"""Models that do not fit, opened from their safetensors files without ever being in memory whole.

    model = open_streamed("Llama-3-70B", "cuda")
    decoder = Decoder(model)              # and everything that takes one: PrefixCache, choice_accuracy, ...

Embeddings, final norm and head are in memory; a decoder layer's weights are read from the files into one of a few
buffers when it runs (`layer_stream`). Opening finds out which tensors of the files are which parameters, checks that
all are there in the right shapes, and fills the buffers that no file holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from kunbr_fast.files.models import DTYPES, ModelFolder, held_back, known_dtype
from kunbr_fast.files.parameters import Piece, check_all_used
from kunbr_fast.files.shards import Shards
from kunbr_fast.model import compat
from kunbr_fast.model.layer_stream import LayerStream
from kunbr_fast.model.layers import find_layers
from kunbr_fast.model.streamed import StreamedDecoder


@held_back()
def open_streamed(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: str | None = None,
    *,
    buffers: int = 2,
    host_bytes: int | None = None,
    resident_layers: int = 0,
) -> nn.Module:
    """A causal language model from a local directory, in eval mode, whose layers are read when they run.

    Equals `load_model(path, dtype, device)`: the same outputs, bit for bit (but a CPU's matrix products may round fp64
    differently for weights at other alignments, and those that transformers maps from a file lie anywhere). dtype: a
    name of `files.models.DTYPES` (default: as saved). Nothing requires grad. Files must stay as and where they are: a
    change is an error at the next reading. In memory, on `device`: what is outside the decoder's layers, and `buffers`
    times the largest layer; on a GPU as much again in pinned main memory. host_bytes: the most main memory (for a GPU,
    pinned) in which layers stay after their first reading, in the model's dtype, or while they are trained what is
    trained; those that do not fit are read from the files each time, or trained in files (None: 0, and while they are
    trained half of what is free).
    resident_layers: how many of the first layers stay on the device, where they are read once.

    A backward pass needs a layer's weights once more: run it layer by layer (`Decoder.passes`) or with gradient
    checkpointing, else it raises RuntimeError ("modified by an inplace operation").

    Errors: ValueError that names the directory or file for a model that is unknown, not whole, of other shapes,
    damaged, or quantised; weights that are not finite are met at a layer's first load.
    """

    if compat.VERSION.major < 5:
        raise ValueError(
            f"streaming needs transformers >= 5 (this is {compat.VERSION}): install it, or load the model whole"
        )
    known_dtype(dtype)
    if host_bytes is not None and host_bytes < 0:
        raise ValueError(f"host_bytes={host_bytes}: expected 0 or more bytes, or None")
    folder = ModelFolder(path)
    path, shards, config = folder.path, folder.shards, folder.configuration()
    wanted = DTYPES[dtype] if dtype else folder.saved_dtype(config)
    model, stored = folder.on_meta(config, wanted)
    if not stored.followed:
        raise ValueError(
            f"{path}: keeps its weights in another form than the model does, which streaming cannot follow: load it "
            "whole"
        )
    check_all_used(stored, shards)
    half = wanted in (torch.float16, torch.bfloat16)
    if half and (kept := getattr(model, "_keep_in_fp32_modules_strict", None)):
        raise ValueError(
            f"{path}: {type(model).__name__} keeps {', '.join(kept)} in float32: open it with dtype='float32'"
        )
    layers, sources = find_layers(model)[1], stored.sources
    device = torch.device(device)
    _make_buffers(model, device, path)
    inside = {id(parameter) for parameter in layers.parameters()}
    _load_others(model, inside, shards, sources, device)
    stream = LayerStream(model, layers, shards, sources, buffers, host_bytes, resident_layers)
    stream.decoder_class = StreamedDecoder
    for name, module in model.named_modules():
        for key, value in (vars(module) | module._parameters | module._buffers).items():
            if isinstance(value, torch.Tensor) and value.is_meta:
                raise ValueError(f"{path}: nothing fills in {name}.{key}: this architecture cannot be streamed")
    return model


@torch.no_grad()
def _make_buffers(model: nn.Module, device: torch.device, where: Path) -> None:
    """Gives the buffers that are not saved (rotary frequencies and the like) their values.

    transformers 5 loads every model on the meta device and has `_init_weights` write these. To see whether it does, it
    writes over two different fillings.
    """
    for path, module in model.named_modules():
        names = [name for name in module._non_persistent_buffers_set if module._buffers.get(name) is not None]
        results = []
        for filling in (0, 1) if names else ():
            for name in names:
                module._buffers[name] = torch.full_like(module._buffers[name], filling, device="cpu")
            model._init_weights(module)
            results.append([module._buffers[name] for name in names])
        for name, first, second in zip(names, *results):
            if not torch.equal(first, second):
                raise ValueError(f"{where}: nothing fills in {path}.{name}: this architecture cannot be streamed")
            module._buffers[name] = second.to(device)


@torch.no_grad()
def _load_others(
    model: nn.Module, inside: set[int], shards: Shards, sources: Mapping[str, list[Piece]], device: torch.device
) -> None:
    """Loads what is no parameter of a layer; a tied weight once, for all its owners."""
    made: dict[int, nn.Parameter] = {}
    for path, module in list(model.named_modules()):
        for key, value in (*module._parameters.items(), *module._buffers.items()):
            name = f"{path}.{key}".lstrip(".")
            if value is None or id(value) in inside or not value.is_meta:
                continue
            if id(value) not in made:
                tensor = torch.empty_like(value, device=device)
                for piece in sources[name]:
                    tensor[piece.index].copy_(shards[piece.stored])
                is_parameter = isinstance(value, nn.Parameter)
                made[id(value)] = nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor
            setattr(module, key, made[id(value)])
