"""Models that do not fit, opened from their safetensors files without ever being in memory whole.

    model = open_streamed("Llama-3-70B", "cuda")
    decoder = Decoder(model)              # and everything that takes one: PrefixCache, choice_accuracy, ...

Embeddings, final norm and head are in memory; a decoder layer's weights are read from the files into one of a few
buffers when it runs (`layer_stream`). Opening finds out which tensors of the files are which parameters, checks that
all are there in the right shapes, and fills the buffers that no file holds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kunbr_fast.files.models import DTYPES, attention_of, model_directory
from kunbr_fast.files.tensors import Shards, open_tensors
from kunbr_fast.model import compat
from kunbr_fast.model.decoder import find_layers
from kunbr_fast.model.layer_stream import LayerStream, Piece
from kunbr_fast.model.streamed import StreamedDecoder
from kunbr_fast.model.weights import owners


def open_streamed(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: str | None = None,
    *,
    buffers: int = 2,
    host_bytes: int = 0,
) -> nn.Module:
    """A causal language model from a local directory, in eval mode, whose layers are read when they run.

    Equals `load_model(path, dtype, device)`: the same outputs, bit for bit (but a CPU's matrix products may round fp64
    differently for weights at other alignments, and those that transformers maps from a file lie anywhere). dtype: a
    name of `files.models.DTYPES` (default: as saved). Nothing requires grad. Files must stay as and where they are. In
    memory, on `device`: what is outside the decoder's layers, and `buffers` times the largest layer; on a GPU as much
    again in pinned main memory. host_bytes: the most main memory (for a GPU, pinned) in which layers stay after their
    first reading, in the model's dtype; those that do not fit are read from the files each time.

    A backward pass needs a layer's weights once more: run it layer by layer (`Decoder.passes`) or with gradient
    checkpointing, else it raises RuntimeError ("modified by an inplace operation").

    Errors: ValueError that names the directory or file for a model that is unknown, not whole, of other shapes,
    damaged, or quantised; weights that are not finite are met at a layer's first load.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    path = model_directory(path)
    if compat.VERSION.major < 5:
        raise ValueError(
            f"streaming needs transformers >= 5 (this is {compat.VERSION}): install it, or load the model whole"
        )
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: expected one of {', '.join(DTYPES)}")
    shards = Shards(path)
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        wanted = DTYPES[dtype] if dtype else _saved_dtype(config, shards)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=wanted, trust_remote_code=False, attn_implementation=attention_of(config)
            )
    except (ValueError, OSError) as error:
        raise ValueError(f"{path}: {error}") from error
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(f"{path}: its weights are quantised: streaming takes plain ones")
    half = wanted in (torch.float16, torch.bfloat16)
    if half and (kept := getattr(model, "_keep_in_fp32_modules_strict", None)):
        raise ValueError(
            f"{path}: {type(model).__name__} keeps {', '.join(kept)} in float32: open it with dtype='float32'"
        )
    model.requires_grad_(False).eval()
    model.tie_weights()
    layers = find_layers(model)[1]
    sources = _sources(model, shards)
    device = torch.device(device)
    _make_buffers(model, device, path)
    inside = {id(parameter) for parameter in layers.parameters()}
    _load_others(model, inside, shards, sources, device)
    LayerStream(model, layers, shards, sources, buffers, host_bytes).decoder_class = StreamedDecoder
    for name, module in model.named_modules():
        for key, value in (vars(module) | module._parameters | module._buffers).items():
            if isinstance(value, torch.Tensor) and value.is_meta:
                raise ValueError(f"{path}: nothing fills in {name}.{key}: this architecture cannot be streamed")
    return model


def _saved_dtype(config: Any, shards: Shards) -> torch.dtype:
    """As transformers' "auto": what the configuration says, else the dtype of the first floating-point tensor."""
    found = getattr(config, "dtype", None)
    if isinstance(found, torch.dtype):
        return found
    for name in shards.files:
        if (value := shards[name]).is_floating_point():
            return value.dtype
    raise ValueError("it holds no floating-point weights")


def _sources(model: nn.Module, shards: Shards) -> dict[str, list[Piece]]:
    """{parameter or saved buffer: its pieces}. ValueError unless all are there, in the right shapes."""
    tensors, uses = model.state_dict(keep_vars=True), owners(model)
    named = _named_by_the_model(model, shards)
    found, missing = {}, []
    for name, tensor in tensors.items():
        names = (name, *uses.get(id(tensor), ()))  # a tied weight is kept under one of its names
        pieces = next((named[n] for n in names if n in named), None)
        if pieces is None:
            missing.append(name)
        else:
            found[name] = pieces
    if missing:
        raise ValueError(
            f"{shards.directory}: has no weights for {missing[0]} ({len(missing)} missing): this checkpoint is "
            "not whole, or it keeps its weights in another form than the model does, which streaming cannot follow"
        )
    for path in shards.paths:
        with open_tensors(path) as file:
            for name, tensor in tensors.items():
                for piece in found[name]:
                    if shards.files[piece.stored] == path:
                        _check_piece(path, file.get_slice(piece.stored), piece, name, tensor)
    return found


def _check_piece(path: Path, part: Any, piece: Piece, name: str, tensor: torch.Tensor) -> None:
    shape, expected = tuple(part.get_shape()), tuple(tensor[piece.index].shape)
    if shape != expected:
        raise ValueError(
            f"{path}: {piece.stored} is {shape}, expected {expected} for the model's {name}: the configuration is not "
            "this checkpoint's"
        )
    if tensor.is_floating_point() and part.get_dtype() not in ("F64", "F32", "BF16", "F16"):
        raise ValueError(f"{path}: {piece.stored} is {part.get_dtype()}: expected plain floating-point weights")


def _named_by_the_model(model: nn.Module, shards: Shards) -> dict[str, list[Piece]]:
    """The stored tensors by the model's names. transformers knows which checkpoints use other names, and which store
    each expert's matrices apart. The file of a base model lacks the prefix of the model around it."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightRenaming
    except ImportError:  # early releases of transformers 5: the names as they are
        transforms = []
    else:
        transforms = get_model_conversion_mapping(model)
    known = dict((*model.named_parameters(remove_duplicate=False), *model.named_buffers()))
    prefix = f"{model.base_model_prefix}."
    experts: dict[str, dict[str, list[str]]] = {}  # of each stacked parameter, those that each pattern matched
    named: dict[str, list[Piece]] = {}
    for stored in shards.files:
        name, converter = stored, None
        for transform in transforms:
            if isinstance(transform, WeightRenaming):
                name = transform.rename_source_key(name)[0]
            elif isinstance(transform, WeightConverter) and converter is None:
                name, pattern = transform.rename_source_key(name)
                converter = None if pattern is None else transform
        name, own = (n if n in known or prefix + n not in known else prefix + n for n in (name, stored))
        if converter is None or name not in known:
            named[name if name in known else own] = [Piece(stored)]
        elif [(type(step), getattr(step, "dim", None)) for step in converter.operations] in (
            [(MergeModulelist, 0)],
            [(MergeModulelist, 0), (Concatenate, 1)],
        ):
            of = experts.setdefault(name, {pattern: [] for pattern in converter.source_patterns})
            of[pattern].append(stored)
    for name, of in experts.items():
        by_pattern = [sorted(found, key=lambda n: [int(k) for k in re.findall(r"\d+", n)]) for found in of.values()]
        if any(len(found) != len(known[name]) for found in by_pattern):
            continue  # some expert's are missing
        rows = known[name].shape[1] // len(by_pattern)
        named[name] = [
            Piece(stored, (expert, slice(number * rows, (number + 1) * rows)))
            for number, found in enumerate(by_pattern)
            for expert, stored in enumerate(found)
        ]
    return named


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
