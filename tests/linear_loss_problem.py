"""Arguments of the kernel of head and loss, and how near to fp64 it has to be."""

import torch
import torch.nn.functional as F
from torch import nn

from kunbr_fast.kernels.linear_loss import cases

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("loss", "nll", "d_hidden", "d_weight", "d_bias")


def problem(rows=9, width=16, vocab=63, dtype=torch.bfloat16, bias=True, capped=False, seed=0, size=1.0):
    """The arguments of linear_loss up to bias, and nll_cap."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * size).to(DEVICE, dtype)

    hidden, weight = random(rows, width), random(vocab, width) / 2
    targets = torch.randint(0, vocab, (rows,), generator=generator).to(DEVICE)
    row_weights = torch.randn(rows, generator=generator, dtype=torch.float64).to(DEVICE)  # both signs
    b = random(vocab) if bias else None
    cap = None
    if capped:
        nll = F.cross_entropy(F.linear(hidden, weight, b).float(), targets, reduction="none")
        cap = (nll + torch.tensor([-0.5, 0.5, torch.inf], device=DEVICE).repeat(rows)[:rows]).double()
    return (hidden, weight, targets, row_weights, b), cap


def autograd(arguments, scale, softcap, nll_cap, wide):
    """What torch makes of it: in fp64 (wide), the truth, or as a model does it in its own dtype."""
    hidden, weight, targets, row_weights, bias = arguments
    leaves = [
        None if t is None else (t.double() if wide else t).detach().requires_grad_() for t in (hidden, weight, bias)
    ]
    logits = F.linear(*leaves)
    logits = (logits if wide else logits.float()) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    nll = F.cross_entropy(logits, targets, reduction="none")
    weights = row_weights.to(nll.dtype)
    if nll_cap is None:
        loss = (weights * nll).sum()
    else:
        loss = (weights * nll.minimum(nll_cap.to(nll.dtype))).sum()
    grads = torch.autograd.grad(loss, [leaf for leaf in leaves if leaf is not None])
    return [loss.detach(), nll.detach(), *grads, *([None] if bias is None else [])]


def check(ours, arguments, scale=1.0, softcap=None, nll_cap=None):
    """Error at most twice torch's own in the same dtype, plus the proof's floor, by the norm of each result."""
    hidden, weight, targets, row_weights, bias = arguments
    truth = autograd(arguments, scale, softcap, nll_cap, True)
    torchs = autograd(arguments, scale, softcap, nll_cap, False)
    given = dict(hidden=hidden, weight=weight, row_weights=row_weights)
    there = {name: true for name, true in zip(NAMES, truth) if true is not None}
    floors = cases.floors(cases.Head(*hidden.shape, len(weight), scale=scale, softcap=softcap), given, there)
    for name, mine, other, true in zip(NAMES, ours, torchs, truth):
        if true is None:
            assert mine is None
            continue
        assert mine.shape == true.shape
        assert mine.dtype == (torch.float32 if name in ("loss", "nll") else hidden.dtype)
        error, torchs_error = float((mine.double() - true).norm()), float((other.double() - true).norm())
        assert error <= 2 * torchs_error + floors[name], (name, error, torchs_error, floors[name])


def module(weight, bias):
    linear = nn.Linear(*weight.shape[::-1], bias=bias is not None, dtype=weight.dtype, device=DEVICE)
    with torch.no_grad():
        linear.weight.copy_(weight)
        if bias is not None:
            linear.bias.copy_(bias)
    return linear
