"""The reference procedure (shared DESIGN.md, section 1), written plainly: the truth for the fast path.

What the authors' published code does, re-told: two whole models; a block's parameters are swapped between them by
name, before and after each visit; a new Lion for each visit; forget and retain as two padded forward passes through
the whole model with full logits; everything outside the block has requires_grad off. Used by tests, and by the
benchmark as the baseline. Nothing here calls kunbr_fast.
"""

import torch
import torch.nn.functional as F


class ReferenceLion:
    """Lion, betas (0.9, 0.99), no weight decay, as in the paper's pseudo-code; one loop over the parameters."""

    def __init__(self, params, lr, betas=(0.9, 0.99)):
        self.params, self.lr, self.betas = list(params), lr, betas
        self.momentum = [torch.zeros_like(p) for p in self.params]

    def zero_grad(self):
        for p in self.params:
            p.grad = None

    @torch.no_grad()
    def step(self):
        b1, b2 = self.betas
        for p, m in zip(self.params, self.momentum):
            if p.grad is None:
                continue
            update = torch.sign(b1 * m + (1 - b1) * p.grad)
            p.sub_(self.lr * update)
            m.copy_(b2 * m + (1 - b2) * p.grad)


def padded(samples, pad=0):
    """Samples to right-padded input_ids, attention_mask, labels of shape (B, Lmax)."""
    longest = max(len(s["input_ids"]) for s in samples)
    ids = torch.full((len(samples), longest), pad)
    mask = torch.zeros(len(samples), longest, dtype=torch.long)
    labels = torch.full((len(samples), longest), -100)
    for row, sample in enumerate(samples):
        n = len(sample["input_ids"])
        ids[row, :n], mask[row, :n], labels[row, :n] = sample["input_ids"], 1, sample["labels"]
    return ids, mask, labels


def left_padded(samples, pad=0):
    """`padded`, with the padding on the left."""
    ids, mask, labels = padded(samples, pad)
    shift = [ids.shape[1] - len(s["input_ids"]) for s in samples]
    return tuple(torch.stack([row.roll(n) for row, n in zip(x, shift)]) for x in (ids, mask, labels))


def padded_loss(model, samples):
    """Mean over samples of the mean NLL over each one's labelled tokens, from full logits of a padded batch."""
    ids, mask, labels = (x.to(model.device) for x in padded(samples))
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    wide = torch.promote_types(logits.dtype, torch.float32)
    target = labels[:, 1:]
    nll = F.cross_entropy(logits.flatten(0, 1).to(wide), target.flatten(), ignore_index=-100, reduction="none")
    counts = (target != -100).sum(1)
    return (nll.view(target.shape).sum(1) / counts).mean()


def block_names(model, layers_path, block):
    prefixes = tuple(f"{layers_path}.{i}." for i in block)
    return [name for name, _ in model.named_parameters() if name.startswith(prefixes)]


@torch.no_grad()
def swap(model, other, names):
    a, b = dict(model.named_parameters()), dict(other.named_parameters())
    for name in names:
        kept = a[name].clone()
        a[name].copy_(b[name])
        b[name].copy_(kept)


def reference_step(original, optimizer, forget, retain, retain_coeff):
    optimizer.zero_grad()
    forget_loss, retain_loss = padded_loss(original, forget), padded_loss(original, retain)
    (-forget_loss + retain_coeff * retain_loss).backward()
    optimizer.step()
    return float(forget_loss.detach()), float(retain_loss.detach())


def reference_block(original, unlearned, layers_path, block, batches, lr, retain_coeff, insertion="independent"):
    """One visit: swap in, train on `batches` (pairs of lists of samples), swap out. Both models change in place.

    insertion="cumulative": the trained block is also left in the original.
    """
    names = block_names(original, layers_path, block)
    swap(original, unlearned, names)
    inside = set(names)
    for name, parameter in original.named_parameters():
        parameter.requires_grad_(name in inside)
    optimizer = ReferenceLion([p for n, p in original.named_parameters() if n in inside], lr)
    for forget, retain in batches:
        reference_step(original, optimizer, forget, retain, retain_coeff)
    swap(original, unlearned, names)
    if insertion == "cumulative":
        source, target = dict(unlearned.named_parameters()), dict(original.named_parameters())
        with torch.no_grad():
            for name in names:
                target[name].copy_(source[name])
    for parameter in original.parameters():
        parameter.requires_grad_(True)
        parameter.grad = None
