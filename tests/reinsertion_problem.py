"""A block and samples to train it on, and what has to be as before when it is over."""

import torch
from tiny_models import random_samples, tiny_model

BLOCK = range(2, 4)


FORGET, RETAIN = random_samples(4, seed=1), random_samples(5, seed=2)


def weights(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def in_block(name, block=BLOCK, path="model.layers"):
    return any(name.startswith(f"{path}.{i}.") for i in block)


def identity(model):
    """All that must be as before: objects, storages, gradients, flags, modes, hooks."""
    return (
        [
            (n, id(p), p.data_ptr(), p.requires_grad, None if p.grad is None else id(p.grad))
            for n, p in model.named_parameters()
        ],
        [(id(m), m.training, set(m.__dict__), len(m._forward_hooks), len(m._backward_hooks)) for m in model.modules()],
        [(n, b.data_ptr()) for n, b in model.named_buffers()],
        model.config._attn_implementation,
    )


def equal(a, b):
    return set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)


def touched_model():
    """Grads on some parameters, some frozen where nothing is trained, a mixture of training modes."""
    model = tiny_model()
    for number, (name, parameter) in enumerate(model.named_parameters()):
        parameter.requires_grad_(number % 3 > 0 or in_block(name) or in_block(name, range(5, 6)))
        parameter.grad = torch.full_like(parameter, number) if number % 2 else None
    model.train()
    model.model.layers[3].eval()
    return model
