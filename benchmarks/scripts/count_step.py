"""One re-insertion step, counted: FLOPs, bytes saved for the backward pass, peak bytes and kernel launches, of the
reference procedure and of ours, at several blocks of models by name. Nothing is timed and no weights are needed.

    python benchmarks/scripts/count_step.py                           # Llama-3-8B, blocks of 4, 6 + 6 samples
    python benchmarks/scripts/count_step.py --model SmolLM2-135M
    python benchmarks/scripts/count_step.py --csv benchmarks/results/counted.csv

Both sides run their own code on torch's meta device, where tensors have shapes and no values: forward and backward
pass of one step, without the update. Reference: tests/reference_procedure.py, two padded passes with full logits. Ours:
one packed pass from the prefix cache through fused layers, head on labelled rows. Counted from the operators that
torch dispatches: FLOPs by torch's FlopCounterMode (matrix products and attention); launches, every operator that writes
something; saved bytes, what autograd keeps between forward and backward, each storage once; peak bytes, the most
alive at any time above the models, gradients and cached activations, which are listed apart. With Triton's kernels a
fused operator is one launch; here it is as many as its torch form has, so launches are an upper limit.
"""

import contextlib
import weakref
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import register_flop_formula

from kunbr_fast.benchmarks.measure import add_rows, kept_bytes, script_parser
from kunbr_fast.benchmarks.models import build
from kunbr_fast.benchmarks.reference import procedure
from kunbr_fast.benchmarks.shapes import MODELS, questions
from kunbr_fast.data import pack
from kunbr_fast.kernels.linear_loss.triton_kernel import CHUNK_BYTES
from kunbr_fast.model.decoder import Decoder, Stretch
from kunbr_fast.model.flops import flop_counter
from kunbr_fast.model.patch import fused
from kunbr_fast.objectives import losses

ALLOCATIONS = ("aten::empty", "aten::new_empty", "aten::detach", "aten::lift_fresh", "aten::alias")


class Meter(TorchDispatchMode):
    """Launches, and bytes alive of what was made since."""

    def __init__(self):
        super().__init__()
        self.launches = self.alive = self.peak = 0
        self._known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        inputs = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        out = func(*args, **kwargs)
        made = [t for t in _tensors(out) if t.untyped_storage()._cdata not in inputs]
        name = func._schema.name
        if (made or func._schema.is_mutable) and not name.startswith(ALLOCATIONS):
            self.launches += 1
        for tensor in made:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._known:
                self._known.add(storage._cdata)
                self.alive += storage.nbytes()
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        inside = 0
        if name == "kunbr_fast::linear_loss":  # its own chunk of logits
            hidden, weight = args[:2]
            inside = min(hidden.shape[0] * weight.shape[0] * hidden.element_size(), CHUNK_BYTES)
        self.peak = max(self.peak, self.alive + inside)
        return out

    def _free(self, key, nbytes):
        self._known.discard(key)
        self.alive -= nbytes


class Answer(TorchDispatchMode):
    """Lets code that asks a meta tensor for its value go on: `truth` for booleans, 0 for numbers."""

    def __init__(self, truth):
        super().__init__()
        self._truth = truth

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default and args[0].device.type == "meta":
            return self._truth if args[0].dtype == torch.bool else 0
        return func(*args, **(kwargs or {}))


def _tensors(value):
    return [t for t in torch.utils._pytree.tree_leaves(value) if isinstance(t, torch.Tensor)]


@torch.library.custom_op("kunbr_count::attention", mutates_args=())
def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros_like(q), q.new_zeros(q.shape[:-1], dtype=torch.float32)


@torch.library.custom_op("kunbr_count::attention_backward", mutates_args=())
def _attention_backward(
    d_out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)


_attention.register_fake(lambda q, k, v: (torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)))
_attention_backward.register_fake(lambda d_out, q, k, v, out, lse: tuple(torch.empty_like(x) for x in (q, k, v)))
_attention.register_autograd(
    lambda ctx, d_out, d_lse: _attention_backward(d_out, *ctx.saved_tensors),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs, *output),
)


@register_flop_formula(torch.ops.kunbr_count.attention)
def _(q, k, v, out_shape=None, **_):
    return 4 * q[0] * q[1] * q[2] * k[2] * q[3]


@register_flop_formula(torch.ops.kunbr_count.attention_backward)
def _(d_out, q, k, v, *others, out_shape=None, **_):
    return 10 * q[0] * q[1] * q[2] * k[2] * q[3]


def fused_attention(q, k, v, *args, **kwargs):
    """Stands for F.scaled_dot_product_attention where only sizes count: its values are zeros."""
    return _attention(q, k, v)[0]


def count(step, known):
    """{"flops", "saved_bytes", "peak_bytes", "launches"} of `step()`, which returns a loss, and its backward."""
    with mock.patch("torch.nn.functional.scaled_dot_product_attention", fused_attention):
        return _count(step, known)


def _count(step, known):
    loss = []
    with flop_counter() as flops:
        saved_bytes = kept_bytes(lambda: loss.append(step()), known)
        loss.pop().backward()
    for parameter in known:
        parameter.grad = None if parameter.grad is None else parameter.grad.zero_()
    with Meter() as meter:
        step().backward()
    return dict(flops=flops.get_total_flops(), saved_bytes=saved_bytes, peak_bytes=meter.peak, launches=meter.launches)


def freeze_but(model, block):
    names = set(procedure().block_names(model, "model.layers", block))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
        parameter.grad = torch.zeros_like(parameter) if name in names else None


def reference(model, block, forget, retain):
    freeze_but(model, block)
    forget, retain = ([{k: v.to(model.device) for k, v in s.items()} for s in part] for part in (forget, retain))

    def step():
        with torch.device(model.device):
            return -procedure().padded_loss(model, forget) + procedure().padded_loss(model, retain)

    with Answer(False):  # asked by transformers: whether no place is padded
        return count(step, list(model.parameters()))


def ours(model, block, forget, retain):
    freeze_but(model, block)
    # asked by the self-check, which has nothing to compare here: whether all is well. A decoder wants weights with data
    with Answer(True), mock.patch("kunbr_fast.model.decoder.whole"):
        decoder = Decoder(model)
    batch = pack([*forget, *retain]).to(model.device)
    hidden = torch.zeros(batch.num_tokens, decoder.hidden_size, dtype=decoder.dtype, device=model.device)

    def step():
        rows = losses.gradient_difference(batch, len(forget), 1.0)
        return losses.weighted_pass(decoder, batch, rows, Stretch(block.start, hidden))[0]

    with fused(model, "torch"):
        return count(step, [*model.parameters(), hidden])


def standing(model, block, dtype, tokens):
    """Bytes that stay: {side: {kind: bytes}}, with Lion."""
    weights = sum(p.numel() for p in model.parameters()) * dtype.itemsize
    names = set(procedure().block_names(model, "model.layers", block))
    entries = sum(p.numel() for name, p in model.named_parameters() if name in names)
    each = dict(weights=weights, gradient=entries * dtype.itemsize)
    master = 4 * entries if dtype.itemsize == 2 else 0
    return {
        "reference": {**each, "second model": weights, "momentum": entries * dtype.itemsize},
        "kunbr_fast": {
            **each, "block": entries * dtype.itemsize, "master": master, "momentum": master or entries * dtype.itemsize,
            "inputs of the step": tokens * model.config.hidden_size * dtype.itemsize,
        },
    }  # fmt: skip


def main():
    parser = script_parser(__doc__)
    parser.add_argument("--model", choices=list(MODELS), nargs="+", default=["Llama-3-8B"], help="[Llama-3-8B]")
    parser.add_argument("--layers", type=int, default=4, help="layers of a block [4]")
    parser.add_argument("--batch", type=int, default=6, help="forget samples of a step, and retain samples [6]")
    parser.add_argument("--target", choices=["all", "letter"], default="all", help="tokens whose loss counts [all]")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="[bfloat16]")
    arguments = parser.parse_args()
    rows = []
    for name in arguments.model:
        rows += table(name, arguments.layers, arguments.batch, arguments.target, getattr(torch, arguments.dtype))
    show(rows)
    add_rows(arguments.csv, rows)


def table(name, layers, batch, target, dtype):
    """Two rows, the reference's and ours, for each block that may be chosen (none with one of the two last layers)."""
    data = questions(2 * batch, MODELS[name].vocabulary, target)
    forget, retain = data[:batch], data[batch:]
    tokens = sum(len(s["input_ids"]) for s in data)
    in_grid = sum(procedure().padded(part)[0].numel() for part in (forget, retain))
    blocks = [range(i, i + layers) for i in range(0, MODELS[name].layers - layers + 1, layers)]
    blocks = [block for block in blocks if block.stop <= MODELS[name].layers - 2]
    rows = []
    for block in blocks:
        for side, run in (("reference", reference), ("kunbr_fast", ours)):
            model = build(name, dtype)
            found = run(model, block, forget, retain)
            stay = sum(standing(model, block, dtype, tokens)[side].values())
            rows.append(dict(
                benchmark="count_step", model=name, block=f"{block.start}-{block.stop - 1}", variant=side,
                target=target, dtype=str(dtype)[6:], batch=f"{batch}+{batch}", tokens=tokens, padded=in_grid,
                gflop=round(found["flops"] / 1e9, 1), saved_mib=round(found["saved_bytes"] / 2**20, 1),
                peak_mib=round(found["peak_bytes"] / 2**20, 1), standing_mib=round(stay / 2**20),
                launches=found["launches"],
            ))  # fmt: skip
    return rows


def show(rows):
    for theirs, mine in zip(rows[::2], rows[1::2]):
        print(f"{mine['model']}, layers {mine['block']}{'reference':>19}{'kunbr_fast':>12}")
        for name in ("gflop", "saved_mib", "peak_mib", "standing_mib", "launches"):
            print(f"  {name:<28}{theirs[name]:>12}{mine[name]:>12}{mine[name] / theirs[name]:>8.2f}x")
        whole = [row["peak_mib"] + row["standing_mib"] for row in (theirs, mine)]
        print(f"  {'memory in all, MiB':<28}{whole[0]:>12.1f}{whole[1]:>12.1f}{whole[1] / whole[0]:>8.2f}x")


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main()
