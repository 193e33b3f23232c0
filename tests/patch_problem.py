"""A loss and its gradients, by a model's own forward: what a patched model has to give too."""

import torch
from tiny_models import ARCHITECTURES, MORE, VOCAB

from kunbr_fast.model import patch

FUSED = [name for name in [*ARCHITECTURES, *MORE] if name not in ("gpt2", "gpt_neox")]  # beside their norms


def batch_of_ids():
    """(3, 12) with padding on the right, so that there is a mask; 12 exceeds the windows of 7."""
    ids = torch.randint(3, VOCAB, (3, 12), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100), "use_cache": False}


def own_loss(model):
    out = model(**batch_of_ids())
    return out.logits, out.loss


def block_parameters(model, block):
    """By name, those of a block (None: all)."""
    inside = {id(p) for i in block or [] for p in patch._layers(model)[i].parameters()}
    return {name: p for name, p in model.named_parameters() if block is None or id(p) in inside}


def results(run, parameters):
    logits, loss = run()
    grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {"logits": logits.detach(), "loss": loss.detach(), **dict(zip(parameters, grads))}
