"""Which tensors of a model's files are which of its parameters, before any of them is read.

transformers knows which checkpoints use other names than the model, and which keep each expert's matrices apart.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from kunbr_fast.files.headers import FLOATS, PLAIN
from kunbr_fast.files.shards import Shards
from kunbr_fast.files.shown import plain

# buffers that older releases of transformers saved, and that are made anew
REMADE = (r"rotary_emb\.inv_freq$", r"(^|\.)position_ids$", r"\.attn\.(masked_)?bias$", r"\.attention\.(masked_)?bias$")

LAYER = re.compile(r"(?:(?:model|transformer|gpt_neox|language_model|decoder)\.)*(?:layers|h)\.(\d{1,9})\.")

TIED = re.compile(r"(lm_head|embed_out|((model|transformer|gpt_neox)\.)?(embed_tokens|wte|embed_in))\.weight$")


@dataclasses.dataclass(frozen=True)
class Piece:
    """A tensor in the files, and the part of a parameter that it is (all of it, or one expert's matrix)."""

    stored: str
    index: tuple = ()


@dataclasses.dataclass
class Stored:
    """Where the parameters and saved buffers of a model are.

    sources: {parameter or saved buffer: its pieces}; missing: those that the files do not hold; unused: tensors of the
    files that no parameter has; followed: whether all conversions are known, else only transformers knows the names.
    """

    sources: dict[str, list[Piece]]
    missing: list[str]
    unused: list[str]
    followed: bool


def stored_parameters(model: nn.Module, shards: Shards) -> Stored:
    """model: on the meta device, its weights tied. ValueError for a tensor of another shape, for integers in place of
    floats, and for tied weights that differ."""
    tensors, uses = model.state_dict(keep_vars=True), _owners(model)
    named, followed = _named_by_the_model(model, shards)
    found, missing, used = {}, [], set()
    for name, tensor in tensors.items():
        names = dict.fromkeys((name, *uses.get(id(tensor), ())))  # a tied weight is kept under one of its names, or all
        there = [named[n] for n in names if n in named]
        if not there:
            missing.append(name)
            continue
        found[name] = there[0]
        used.update(piece.stored for pieces in there for piece in pieces)
        for pieces in there:
            for piece in pieces:
                _check_piece(shards, piece, name, tensor)
        _check_tied(shards, there)
    for parts in ("missing", "unexpected"):
        patterns = list(getattr(model, f"_keys_to_ignore_on_load_{parts}", None) or ())
        if parts == "missing":
            missing = without(missing, patterns)
        else:
            unused = without([name for name in shards.tensors if name not in used], [*patterns, *REMADE])
    return Stored(found, missing, unused, followed)


def check_all_used(stored: Stored, shards: Shards) -> None:
    """ValueError for parameters that the files do not hold, and for tensors that are none of the model's: transformers
    would fill in the ones and leave the others out."""
    if stored.missing:
        raise ValueError(
            f"{plain(shards.directory)}: has no weights for {stored.missing[0]} ({len(stored.missing)} missing): this "
            "checkpoint is not whole, or config.json is another model's"
        )
    if stored.unused:
        name = stored.unused[0]
        raise ValueError(
            f"{plain(shards.tensors[name].file)}: {name} is no tensor of the model that config.json describes "
            f"({len(stored.unused)} are not): it would be left out: copy the model's own config.json, or remove it"
        )


def without(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """The names in which none of the patterns is found."""
    pattern = "|".join(f"({pattern})" for pattern in patterns)
    return [name for name in names if not pattern or re.search(pattern, name) is None]


def _owners(model: nn.Module) -> dict[int, list[str]]:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names


def _check_piece(shards: Shards, piece: Piece, name: str, tensor: torch.Tensor) -> None:
    stored, expected = shards.tensors[piece.stored], tuple(tensor[piece.index].shape)
    if stored.shape != expected:
        raise ValueError(
            f"{plain(stored.file)}: {piece.stored} is {stored.shape}, expected {expected} for the model's {name}: the "
            "configuration is not this checkpoint's"
        )
    if tensor.is_floating_point() and stored.dtype not in FLOATS:
        raise ValueError(
            f"{plain(stored.file)}: {piece.stored} is {stored.dtype}: expected plain floating-point weights: {PLAIN}"
        )


def _check_tied(shards: Shards, there: list[list[Piece]]) -> None:
    """there: the pieces of each name that a tied weight has in the files."""
    for others in there[1:]:
        for one, other in zip(there[0], others):
            if one.stored != other.stored:
                _check_same(shards, one.stored, other.stored)


def check_tied_names(shards: Shards) -> None:
    """ValueError where head and embeddings differ, by the usual names: of a model that ties them."""
    there = [name for name in shards.tensors if TIED.match(name)]
    for name in there[1:]:
        _check_same(shards, there[0], name)


def _check_same(shards: Shards, first: str, second: str) -> None:
    if not shards.same(first, second):
        raise ValueError(
            f"{plain(shards.tensors[second].file)}: {second} and {first} differ, and config.json ties them into one: "
            "set tie_word_embeddings to false, or remove one of them"
        )


def _named_by_the_model(model: nn.Module, shards: Shards) -> tuple[dict[str, list[Piece]], bool]:
    """(the stored tensors by the model's names, whether all conversions of names are known). The file of a base model
    lacks the prefix of the model around it."""
    transforms, renaming, converter_type = _transforms(model)
    known = dict((*model.named_parameters(remove_duplicate=False), *model.named_buffers()))
    prefix = f"{model.base_model_prefix}."
    experts: dict[str, dict[str, list[str]]] = {}  # of each stacked parameter, those that each pattern matched
    named: dict[str, list[Piece]] = {}
    followed = True
    for stored in shards.tensors:
        name, converter = stored, None
        for transform in transforms:
            if isinstance(transform, renaming):
                name = transform.rename_source_key(name)[0]
            elif isinstance(transform, converter_type) and converter is None:
                name, pattern = transform.rename_source_key(name)
                converter = None if pattern is None else transform
        name, own = (n if n in known or prefix + n not in known else prefix + n for n in (name, stored))
        if converter is None or name not in known:
            named[name if name in known else own] = [Piece(stored)]
        elif _stacks(converter):
            of = experts.setdefault(name, {pattern: [] for pattern in converter.source_patterns})
            of[pattern].append(stored)
        else:
            followed = False
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
    return named, followed


def _transforms(model: nn.Module) -> tuple[list[Any], type, type]:
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming
    except ImportError:  # early releases of transformers 5: the names as they are
        return [], Piece, Piece
    return get_model_conversion_mapping(model), WeightRenaming, WeightConverter


def _stacks(converter: Any) -> bool:
    """Whether a conversion only stacks the experts' matrices."""
    from transformers.core_model_loading import Concatenate, MergeModulelist

    steps = [(type(step), getattr(step, "dim", None)) for step in converter.operations]
    return steps in ([(MergeModulelist, 0)], [(MergeModulelist, 0), (Concatenate, 1)])


def layers_in_files(names: Iterable[str]) -> Mapping[int, str]:
    """{layer: one of its tensors}, as the usual names of decoders say."""
    found: dict[int, str] = {}
    for name in names:
        if part := LAYER.match(name):
            found.setdefault(int(part[1]), name)
    return found
