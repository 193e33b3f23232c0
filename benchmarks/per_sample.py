"""The gradients of one weight by packed samples: the inputs, and the ways to have their norms that are not ours."""

import contextlib
import dataclasses
import functools

import torch
import torch.nn.functional as F

from kunbr_fast.benchmarks.harness import Skip, imported
from kunbr_fast.benchmarks.measure import interleaved

DW_LIMIT_GPU, DW_LIMIT_CPU = 24 << 30, 2 << 30  # bytes of per-sample gradients that a rival may hold
CHUNK_GPU, CHUNK_CPU = 8 << 30, 1 << 30  # bytes of them that torch.func holds at a time


@dataclasses.dataclass(frozen=True, eq=False)
class Packed:
    """One layer's x (T, K) and dy (T, N), packed samples."""

    x: torch.Tensor
    dy: torch.Tensor
    lengths: tuple[int, ...]

    @classmethod
    def draw(cls, N, K, lengths, dtype, device):
        generator = torch.Generator(device).manual_seed(0)
        x, dy = (torch.randn(sum(lengths), n, generator=generator, device=device).to(dtype) for n in (K, N))
        return cls(x, dy, tuple(lengths))

    @functools.cached_property
    def cu_seqlens(self):
        return torch.tensor([0, *self.lengths]).cumsum(0).to(self.x.device, torch.int32)

    @property
    def dw_bytes(self):
        """Of all samples' gradients."""
        return len(self.lengths) * self.dy.shape[1] * self.x.shape[1] * self.x.element_size()

    @property
    def same_length(self):
        return len(set(self.lengths)) == 1

    def parts(self):
        return list(zip(self.x.split(self.lengths), self.dy.split(self.lengths)))

    @functools.cached_property
    def padded(self):
        """(B, L, K) and (B, L, N): views where samples are of one length, else zeros after each one's end."""
        if self.same_length:
            return tuple(t.unflatten(0, (len(self.lengths), -1)) for t in (self.x, self.dy))
        return tuple(
            torch.nn.utils.rnn.pad_sequence(t.split(self.lengths), batch_first=True) for t in (self.x, self.dy)
        )


def check_memory(data: Packed, copies: int = 1) -> None:
    nbytes = copies * data.dw_bytes
    if nbytes > (DW_LIMIT_GPU if data.x.is_cuda else DW_LIMIT_CPU):
        raise Skip(f"would hold {nbytes / 2**30:.0f} GiB")


def l1(gradients):
    return gradients.abs().sum((1, 2), dtype=torch.float32)


def bare(data: Packed):
    """On a GPU the fastest of three: one product a sample, one batched (equal samples), one grouped."""
    # On a CPU new memory costs more than the product of a short sample: one buffer for all.
    parts = data.parts()
    out = None if data.x.is_cuda else torch.empty(data.dy.shape[1], data.x.shape[1], dtype=data.dy.dtype)

    def one_by_one():
        for x, dy in parts:
            torch.mm(dy.t(), x, out=out)

    if not data.x.is_cuda:
        return one_by_one
    ways = [one_by_one]
    with contextlib.suppress(Skip):
        if data.same_length:
            check_memory(data)
            x, dy = data.padded
            ways.append(lambda: drop(torch.bmm(dy.mT, x)))
    with contextlib.suppress(Skip, RuntimeError):
        product = _grouped_products(data)
        ways.append(lambda: drop(product()))
    for run in ways:
        run()
    times, _ = interleaved(dict(enumerate(ways)), data.x.device, 3, 0)
    return ways[min(times, key=lambda way: min(times[way]))]


def drop(_):
    return None


def _grouped_products(data: Packed):
    """A function that returns all dW_i, (B, N, K); RuntimeError where the device has no grouped_mm."""
    check_memory(data, 2)  # and what is made of them
    product = functools.partial(F.grouped_mm, data.dy.t(), data.x, offs=data.cu_seqlens[1:])
    product()
    return product


def grouped(data: Packed, norm=l1):
    product = _grouped_products(data)
    return lambda: {"grad_l1": norm(product())}


def grouped_norm(data: Packed):
    return grouped(data, lambda gradients: torch.linalg.vector_norm(gradients, 1, (1, 2), dtype=torch.float32))


def loop(data: Packed, statistic: str = "grad_l1"):
    weight = torch.zeros(data.dy.shape[1], data.x.shape[1], dtype=data.x.dtype, device=data.x.device).requires_grad_()
    graphs = [(F.linear(x, weight), dy) for x, dy in data.parts()]

    def run():
        sums = []
        for y, dy in graphs:
            y.backward(dy, retain_graph=True)
            terms = weight.grad.abs() if statistic == "grad_l1" else weight.grad.square()
            sums.append(terms.sum(dtype=torch.float32))
            weight.grad = terms = None
        return {statistic: torch.stack(sums)}

    return run


def func(data: Packed):
    weight = torch.zeros(data.dy.shape[1], data.x.shape[1], dtype=data.x.dtype, device=data.x.device)
    x, dy = data.padded
    each = torch.func.vmap(lambda x, dy: torch.func.vjp(lambda w: F.linear(x, w), weight)[1](dy)[0])
    step = max(1, (CHUNK_GPU if x.is_cuda else CHUNK_CPU) * len(x) // data.dw_bytes)
    return lambda: {"grad_l1": torch.cat([l1(each(a, b)) for a, b in zip(x.split(step), dy.split(step))])}


def opacus(data: Packed):
    norms = imported("opacus.grad_sample.linear", "opacus").compute_linear_norm_sample
    layer = torch.nn.Linear(data.x.shape[1], data.dy.shape[1], bias=False, device="meta", dtype=data.x.dtype)
    x, dy = data.padded
    return lambda: {"grad_l2sq": norms(layer, [x], dy)[layer.weight].double().square()}
