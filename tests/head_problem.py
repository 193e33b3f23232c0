"""Labelled rows and a head, small enough for plain formulas."""

import torch
from torch import nn


def problem(rows=9, width=6, vocab=13, dtype=torch.float64, bias=True, seed=0, size=1.0):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * size).to(dtype)

    linear = nn.Linear(width, vocab, bias=bias, dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(random(vocab, width))
        if bias:
            linear.bias.copy_(random(vocab))
    targets = torch.randint(0, vocab, (rows,), generator=generator)
    weights = torch.randn(rows, generator=generator, dtype=torch.float64)  # both signs
    return random(rows, width), linear, targets, weights
