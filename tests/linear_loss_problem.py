"""Arguments of the kernel of head and loss, and how near to fp64 it has to be."""

import torch
import torch.nn.functional as F
from torch import nn

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
    """Error at most twice torch's own in the same dtype, plus a floor of fp32 roundings at the size of the largest
    logit, which is what exp and log work on: four for nll and the loss. A gradient is rounded once more, as stored."""
    hidden, weight, targets, row_weights, bias = arguments
    truth = autograd(arguments, scale, softcap, nll_cap, True)
    torchs = autograd(arguments, scale, softcap, nll_cap, False)
    size = float(hidden.double().norm(dim=1).max() * weight.double().norm(dim=1).max()) * scale
    floor = 4 * torch.finfo(torch.float32).eps * max(1.0, size if softcap is None else softcap)
    floors = {"nll": floor * len(hidden) ** 0.5, "loss": floor * len(hidden) ** 0.5 * float(row_weights.norm())}
    for name, mine, other, true in zip(NAMES, ours, torchs, truth):
        if true is None:
            assert mine is None
            continue
        assert mine.shape == true.shape
        assert mine.dtype == (torch.float32 if name in ("loss", "nll") else hidden.dtype)
        allowed = floors.get(name, (torch.finfo(hidden.dtype).eps + floor) * float(true.norm()))
        error, torchs_error = float((mine.double() - true).norm()), float((other.double() - true).norm())
        assert error <= 2 * torchs_error + allowed, (name, error, torchs_error, allowed)


def module(weight, bias):
    linear = nn.Linear(*weight.shape[::-1], bias=bias is not None, dtype=weight.dtype, device=DEVICE)
    with torch.no_grad():
        linear.weight.copy_(weight)
        if bias is not None:
            linear.bias.copy_(bias)
    return linear
