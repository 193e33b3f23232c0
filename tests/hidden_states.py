"""The outputs of a model's layers by its own forward, one sample at a time."""

import torch
import torch.nn.functional as F


def forward(model, sample):
    """(mean NLL, [(t, D) output of each layer]); transformers' last hidden state is the one after the norm."""
    last = []
    handle = model.model.layers[-1].register_forward_hook(
        lambda m, a, out: last.append(out[0] if isinstance(out, tuple) else out)
    )
    out = model(input_ids=sample["input_ids"][None], output_hidden_states=True)
    handle.remove()
    nll = F.cross_entropy(out.logits[0, :-1], sample["labels"][1:])
    return nll, [*(h[0] for h in out.hidden_states[1:-1]), last[0].reshape(out.hidden_states[-1][0].shape)]


def spreads(original, samples):
    with torch.no_grad():
        each = [torch.cat(states) for states in zip(*(forward(original, s)[1] for s in samples))]
    return [(h - h.mean(0)).square().sum(1).mean() for h in each]
