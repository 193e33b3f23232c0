"""The truth about a model: one sample at a time, its own forward, plain autograd. Nothing here is of kunbr_fast.

Every sample runs through a copy of the model in its first state, since some rotary embeddings remember what they ran.
"""

from __future__ import annotations

import contextlib
import copy
import re
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

LR = 1e-3
BETA1, BETA2 = 0.9, 0.99


class Wide:
    """torch, for the models' own code: what they have in fp32 within an fp64 model is in fp64."""

    float32 = float = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


@contextlib.contextmanager
def fp64_throughout(model, *modules):
    """modules: further ones that have fp32 in them, by name."""
    names = {type(module).__module__ for module in model.modules()} | {"transformers.modeling_rope_utils", *modules}
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            if name.startswith("transformers.") or name in modules:
                if hasattr(sys.modules[name], "torch"):
                    patch.setattr(sys.modules[name], "torch", Wide())
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


def copied(model):
    """Without what some models keep of the graph of their last run."""
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor) and value.grad_fn is not None:
                setattr(module, name, value.detach())
    return copy.deepcopy(model)


def output(model, **inputs):
    """Its logits."""
    out = model(**inputs)
    return out.logits if hasattr(out, "logits") else out[0]


def forward(model, ids):
    """(T, V) logits of one sequence."""
    mask, cache = {"attention_mask": torch.ones_like(ids)[None]}, {"use_cache": False}
    first = None
    for options in (cache | mask, mask, cache, {}):
        try:
            return output(model, input_ids=ids[None], **options)[0]
        except TypeError as error:  # it does not know one of them
            first = first or error
    raise first


def logits(model, sample):
    with torch.no_grad():
        return forward(copied(model), sample["input_ids"])


def nll(model, sample):
    """The mean over the labelled tokens."""
    found, labels = forward(model, sample["input_ids"])[:-1], sample["labels"][1:]
    keep = labels != -100
    return F.cross_entropy(found[keep].to(torch.promote_types(found.dtype, torch.float32)), labels[keep])


def gradients(model, sample):
    """{parameter: gradient of the sample's nll}, 0 where there is none; frozen parameters too."""
    model = copied(model).requires_grad_(True)
    names, parameters = zip(*model.named_parameters())
    found = torch.autograd.grad(nll(model, sample), parameters, allow_unused=True, materialize_grads=True)
    return dict(zip(names, found))


def step_gradients(model, forget, retain):
    """Of gradient difference: minus the mean of the forget samples, plus that of the retain samples."""
    total = {}
    for samples, sign in ((forget, -1), (retain, 1)):
        for sample in samples:
            for name, gradient in gradients(model, sample).items():
                total[name] = total.get(name, 0) + gradient * (sign / len(samples))
    return total


def lion(model, gradient, names):
    """One step from no momentum, in place."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in names:
                parameter.sub_(LR * torch.sign((1 - BETA1) * gradient[name]))


def reinserted(original, unlearned, names, forget, retain):
    """(the original with these weights of the unlearned model, trained for one step; the step's gradients)."""
    model, source = copied(original), dict(unlearned.named_parameters())
    trainable = {name for name, p in original.named_parameters() if p.requires_grad and name in names}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in names:
                parameter.copy_(source[name])
    gradient = step_gradients(model, forget, retain)
    lion(model, gradient, trainable)
    return model, {name: gradient[name] for name in trainable}


# ---------------------------------------------------------------- which weights mix tokens

MIXER_NAMES = re.compile(r"attn|attention|self_att|mamba|linear_attn|^conv$|^mixer$|temporal_block|mlstm|^kda$", re.I)
MIXER_CLASSES = re.compile(
    r"Attention|Attn|Mamba|DeltaNet|ShortConv|RecurrentBlock|RgLru|mLSTM|Lightning|KDA|CCA|Indexer", re.I
)
CHANNELS = re.compile(r"MLP|FeedForward|FFN|MoE|Expert|SparseMoe|Router", re.I)


def mixes_tokens(layer: nn.Module, path: str) -> bool:
    """Whether the parameter at `path` within a layer belongs to attention, or to what a model has in its place: by the
    classes and names on the way down, the uppermost that says."""
    module = layer
    for part in path.split(".")[:-1]:
        module = module.get_submodule(part)
        kind = type(module).__name__
        if part in ("mlp", "feed_forward", "ffn", "block_sparse_moe") or (
            CHANNELS.search(kind) and not MIXER_CLASSES.search(kind)
        ):
            return False
        if kind.endswith(("Layer", "Block")) and "Recurrent" not in kind and not MIXER_NAMES.search(part):
            continue  # a container of both
        if MIXER_CLASSES.search(kind) or (MIXER_NAMES.search(part) and not kind.endswith("Norm")):
            return True
    return False
