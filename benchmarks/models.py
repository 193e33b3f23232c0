"""Models of the named shapes with random weights, and copies of them that share these.

Variants of one case have modules of their own, so that what is put into one leaves the others alone, and share all
weights that none of them changes, so that a large model is on the device once.
"""

import copy
import functools
import inspect
import types
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from kunbr_fast.benchmarks.harness import Options, Skip, imported
from kunbr_fast.benchmarks.shapes import MODELS, Shape


def build(name: str, dtype: torch.dtype, device: torch.device | str = "meta", shape: Shape | None = None) -> nn.Module:
    """A causal language model of the architecture called `name`, of its shape or another one, in eval mode.

    Norms' weights and biases are random too: where they were 1 and 0, some mistakes would not show.
    """
    shape = shape or MODELS[name]
    config, model = (Qwen2Config, Qwen2ForCausalLM) if name.startswith("Qwen") else (LlamaConfig, LlamaForCausalLM)
    settings = dict(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.key_value_heads,
        tie_word_embeddings=shape.tied,
    )  # fmt: skip
    with torch.device(device):
        built = model(config(**settings)).to(dtype).eval()
    with torch.no_grad():
        for parameter in built.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return built


def matrices(shape: Shape) -> int:
    """Entries of a layer's weight matrices."""
    keys = shape.hidden // shape.heads * shape.key_value_heads
    return shape.hidden * (2 * shape.hidden + 2 * keys + 3 * shape.intermediate)


def causal_pairs(lengths: Iterable[int]) -> int:
    """Pairs of a query and a key that it sees, of samples of these lengths."""
    return sum(n * (n + 1) // 2 for n in lengths)


def nbytes(tensors: Iterable[torch.Tensor]) -> int:
    """Of their storages, each once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def copied(module: nn.Module, own: Mapping[nn.Parameter, nn.Parameter] | None = None) -> nn.Module:
    """A copy with modules of its own and the same parameters, except those that `own` gives it others for."""
    memo = {id(parameter): parameter for parameter in module.parameters()}
    memo |= {id(parameter): other for parameter, other in (own or {}).items()}
    return copy.deepcopy(module, memo)


@torch.no_grad()
def exact_norms(module: nn.Module) -> nn.Module:
    """Makes the norms of an fp64 copy fp64 inside, for the truth; transformers' own are fp32 there."""

    def forward(norm, x):
        return norm.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.variance_epsilon))

    for norm in module.modules():
        if type(norm).__name__.endswith("RMSNorm"):
            norm.forward = functools.partial(forward, norm)
    return module


def liger(module: str, options: Options) -> types.ModuleType:
    """A module of liger_kernel; `Skip` where it is not there or cannot run."""
    if not options.gpu:
        raise Skip("Liger's kernels need a GPU")
    return imported(f"liger_kernel.{module}", "liger-kernel")


def with_liger(module: nn.Module, options: Options) -> nn.Module:
    """Puts Liger's RMSNorm, SwiGLU and rotary embedding into the instances in `module`, which is returned.

    Liger's own call (`apply_liger_kernel_to_llama`) replaces classes and a function for the whole process even where it
    is given a model, and cannot be undone. What it does to a model's norms and MLPs is done here by its own functions
    for that. The attention keeps its class's code, bound to the instance with globals in which one name is Liger's.
    """
    found = liger("transformers.monkey_patch", options)
    for part in list(module.modules()):
        kind = type(part).__name__
        if kind.endswith("RMSNorm"):
            found._patch_rms_norm_module(part)
        elif kind.endswith("MLP"):
            found._patch_swiglu_module(part, found.LigerSwiGLUMLP)
        elif kind.endswith("Attention"):
            part.forward = types.MethodType(_rebound(type(part).forward, found.liger_rotary_pos_emb), part)
    return module


def _rebound(function: Callable, rotary: Callable) -> Callable:
    function, name = inspect.unwrap(function), "apply_rotary_pos_emb"
    if name not in function.__code__.co_names:
        raise Skip(f"this release of transformers' attention calls no {name}")
    names = {**function.__globals__, name: rotary}
    found = types.FunctionType(function.__code__, names, None, function.__defaults__, function.__closure__)
    found.__kwdefaults__ = function.__kwdefaults__
    return found
