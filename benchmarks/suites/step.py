"""One re-insertion step (forward, backward, update by Lion) against the reference procedure's, at several blocks.

6 forget and 6 retain samples of WMDP's lengths, with a loss on all tokens or on the letter of the answer alone; random
weights. Every variant trains the same block by the same loss, gradient difference:

    reference               tests/reference_procedure.py: two whole models, two padded passes, full logits, plain Lion
    frozen eager            one model, Lion on lists of tensors, no cache of keys and values; else as the reference
    frozen, torch.compile   that, with torch.compile of each layer: of all of them at once it takes minutes longer
    frozen, liger           that, with Liger's RMSNorm, SwiGLU, rotary embedding and fused linear cross-entropy
    torch, triton           ours: one model and the block, one packed pass from the prefix cache, fused layers, head on
                            rows with a label
    torch, graph and triton, graph    that, as a CUDA graph

torch.compile, which still takes minutes, is measured at one block and batch; of 32 + 32 samples some variants are left
out for the memory that each would hold for itself. Ours is what its name says: a step that memory would have in parts,
or one that is no graph though it should be, is not timed.

In bf16 ours updates an fp32 copy of the block's weights; the others round each update to bf16, as published.

The gate is twofold. In fp64, where signs of rounding are no matter, three steps have to give the reference's weights to
1e-9. In the dtype that is timed Lion's sign turns a gradient that is rounding into a whole update, so there the block's
gradients of one step are compared, and the losses.

Needed FLOPs are those of ours without waste: matrix products, 2 T a weight for each of forward, dX and, in the block,
dW, from the block's first layer on; attention, 12 a pair of a query and a key that it sees and entry of a query; in the
last layer queries and MLP for labelled rows alone; the head twice for these. The prefix is no part: it is computed
once, not in a step. `spent_gflop` is what a variant does, counted (attention by its plain products). Needed bytes:
weights from the block on, read once forward and once backward; the update's reads and writes; the block's input; no
activations besides.

standing_mib: what a variant alone would hold between two steps: models, block, gradient, optimiser state, caches,
memory of CUDA graphs. Here variants share frozen weights, and the reference's second model, which no step touches, is
only counted. A graph's activations are part of it, and no part of its peak.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

import kunbr_fast as kf
from kunbr_fast.benchmarks import measure
from kunbr_fast.benchmarks.harness import Case, Options, Skip, Variant, Wrong, compiled
from kunbr_fast.benchmarks.models import build, causal_pairs, copied, exact_norms, liger, matrices, nbytes, with_liger
from kunbr_fast.benchmarks.reference import procedure
from kunbr_fast.benchmarks.rows import WRONG
from kunbr_fast.benchmarks.shapes import MODELS, Shape, questions
from kunbr_fast.data import PackedBatch, pack
from kunbr_fast.memory import release
from kunbr_fast.model.blocks import selectable_blocks
from kunbr_fast.model.decoder import Decoder
from kunbr_fast.objectives import losses

LR = 1e-5
EXACT = 1e-9  # largest relative difference of the weights after three fp64 steps


class Inputs(NamedTuple):
    model: nn.Module  # frozen; no variant writes to its weights
    values: dict[str, torch.Tensor]  # the unlearned model's block
    samples: list[dict[str, torch.Tensor]]  # first those to forget


# ---------------------------------------------------------------- the sides


class Reference:
    def __init__(self, case, data: Inputs):
        model, self.forget, self.retain = data.model, data.samples[: case.batch], data.samples[case.batch :]
        parameters = dict(model.named_parameters())
        self.model = copied(model, {parameters[name]: nn.Parameter(v.clone()) for name, v in data.values.items()})
        self.block = {name: p for name, p in self.model.named_parameters() if name in data.values}
        self.optimizer = self.make_optimizer(list(self.block.values()))

    def make_optimizer(self, params):
        return procedure().ReferenceLion(params, LR)

    def step(self):
        losses = procedure().reference_step(self.model, self.optimizer, self.forget, self.retain, 1.0)
        return {"losses": torch.tensor(losses)}

    def gradients(self):
        losses = self.step()  # which leaves the gradient there
        return losses | {name: p.grad for name, p in self.block.items()}

    def weights(self):
        return {name: p.detach() for name, p in self.block.items()}

    def standing(self):
        return nbytes(self.model.parameters()) + self._state()  # the second model's weights

    def _state(self):
        gradient = [p.grad for p in self.block.values() if p.grad is not None]
        return nbytes([*self.model.parameters(), *gradient, *self.optimizer.momentum])

    def flops(self):
        return measure.spent_flops(self.step)


class ListLion:
    """Lion by torch's operations on lists of tensors."""

    def __init__(self, params, lr):
        self.params, self.lr, self.momentum = params, lr, [torch.zeros_like(p) for p in params]

    @torch.no_grad()
    def step(self):
        grads = [p.grad for p in self.params]
        update = torch._foreach_lerp(self.momentum, grads, 0.1)
        torch._foreach_sign_(update)
        torch._foreach_add_(self.params, update, alpha=-self.lr)
        torch._foreach_lerp_(self.momentum, grads, 0.01)


class Frozen(Reference):
    def __init__(self, case, data):
        super().__init__(case, data)
        self.batches = [[x.to(case.device) for x in procedure().padded(part)] for part in (self.forget, self.retain)]
        self.prepare(case)

    def prepare(self, case):
        """What a rival puts into the model."""

    def make_optimizer(self, params):
        return ListLion(params, LR)

    def standing(self):
        return self._state() + nbytes(self.block.values())  # the original's own block

    def step(self):
        for parameter in self.block.values():
            parameter.grad = None
        forget, retain = (self.loss(*batch) for batch in self.batches)
        (retain - forget).backward()
        self.optimizer.step()
        return {"losses": torch.stack([forget, retain]).detach().cpu()}

    def loss(self, ids, mask, labels):
        """As the reference's `padded_loss`."""
        hidden = self.model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        target = labels[:, 1:]
        nll = self.nll(hidden, target.flatten()).view(target.shape)
        return (nll.sum(1) / (target != -100).sum(1)).mean()

    def nll(self, hidden, target):
        logits = self.model.lm_head(hidden)[:, :-1].flatten(0, 1)
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), target, reduction="none")


class Compiled(Frozen):
    def prepare(self, case):
        compiled(case.options, self.loss)  # never called: asks whether it may, and forgets what was compiled before
        for layer in self.model.model.layers:
            layer.compile(dynamic=True)


class Liger(Frozen):
    def prepare(self, case):
        with_liger(self.model, case.options)
        found = liger("transformers.fused_linear_cross_entropy", case.options)
        # a mean over samples of means is no reduction of Liger's
        self.linear_loss = found.LigerFusedLinearCrossEntropyLoss(reduction="none")

    def nll(self, hidden, target):
        return self.linear_loss(self.model.lm_head.weight, hidden[:, :-1].flatten(0, 1), target)


class Ours:
    def __init__(self, case, data, impl, graph=False):
        parameters = dict(data.model.named_parameters())
        # parameters of its own, which the block is put into, of the original's tensors
        own = {parameters[name]: nn.Parameter(parameters[name].data, requires_grad=False) for name in data.values}
        self.model, self.num_forget = copied(data.model, own), case.batch
        self.original = [p.data for p in self.model.parameters()]
        decoder = Decoder(self.model)
        self.cache = kf.PrefixCache(decoder, data.samples, "device" if case.options.gpu else "host")
        self.cache.advance(case.block.start)
        self.context = kf.reinserted(decoder, dict(data.values), case.block, lr=LR, impl=impl, cuda_graphs=graph)
        self.training = self.context.__enter__()

    def _batch(self):
        return self.training.criterion.step_batch(self.cache.batch(range(2 * self.num_forget)), self.num_forget)

    def step(self):
        found = self.training.step_packed(self._batch())
        self._check()
        return {"losses": torch.tensor([found["forget_loss"], found["retain_loss"]])}

    def gradients(self):
        training, batch = self.training, self._batch()
        part = training.accumulate(batch)
        self._check()
        found = losses.metrics(batch, part)
        gradient = training.flat.grad.clone()
        training.flat.grad.zero_()
        means = {"losses": torch.tensor([found["forget_loss"], found["retain_loss"]])}
        return means | dict(zip(training.parameters, training.flat.views(gradient)))

    def _check(self):
        """That the step was what the variant's name says."""
        if self.training.halvings:
            raise torch.OutOfMemoryError("the step did not fit whole: it went through in parts")
        graphs = self.training.graphs
        if graphs is not None and not graphs.captured:
            raise Skip("the step could not be captured")

    def weights(self):
        return self.training.tensors()

    def standing(self):
        flat, optimizer, graphs = self.training.flat, self.training.optimizer, self.training.graphs
        state = [x for x in optimizer.state[flat.param].values() if isinstance(x, torch.Tensor)]
        held = nbytes([*self.original, flat.weights, flat.grad, flat.param, *state]) + self.cache.nbytes
        if graphs is None:
            return held
        pool = [s["total_size"] for s in torch.cuda.memory_snapshot() if s["segment_pool_id"] == graphs.pool]
        return held + nbytes(graphs.inputs) + sum(pool)

    def flops(self):
        return measure.spent_flops(self.gradients)


OURS = {
    f"{impl}{', graph' * graph}": functools.partial(Ours, impl=impl, graph=graph)
    for graph in (False, True) for impl in ("torch", "triton")
}  # fmt: skip
SIDES = {"reference": Reference, "frozen eager": Frozen, "frozen, torch.compile": Compiled, "frozen, liger": Liger}
SIDES |= OURS
IN_FP64 = ("frozen eager", "torch", "torch, graph")
UNCOUNTED = ("frozen, torch.compile", "torch, graph", "triton, graph")  # no operator of theirs passes the counter


# ---------------------------------------------------------------- the case


def step_flops(shape: Shape, block: range, batch: PackedBatch, pairs: int, last_pairs: int) -> int:
    """pairs: of a query and a key, in each head; last_pairs: of the last layer, whose queries are labelled rows."""
    tokens, rows, layers = batch.num_tokens, len(batch.rows), shape.layers - block.start
    keys = 2 * shape.hidden * (shape.hidden // shape.heads) * shape.key_value_heads  # in the last layer for all tokens
    total = 4 * (layers - 1) * matrices(shape) * tokens + 2 * len(block) * matrices(shape) * tokens
    total += 4 * (keys * tokens + (matrices(shape) - keys) * rows)
    total += 12 * ((layers - 1) * pairs + last_pairs) * shape.hidden
    return total + 4 * rows * shape.hidden * shape.vocabulary


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Step(Case):
    """left_out: variants that are not run here, and why. For the gate: shorter, each sample is its last part of so
    many; gradients, variants give the gradients of one step."""

    shape: Shape
    block: range
    batch: int
    target: str
    left_out: Mapping[str, str] = dataclasses.field(default_factory=dict)
    shorter: int = 1
    gradients: bool = False
    baseline: str = "reference"

    @functools.cached_property
    def packed(self) -> PackedBatch:
        return pack(self.samples())

    def samples(self):
        found = questions(2 * self.batch, self.shape.vocabulary, self.target)
        return [{key: x[-(len(x) // self.shorter) :] for key, x in sample.items()} for sample in found]

    @property
    def flops(self):
        batch = self.packed
        last_pairs = int((batch.position_ids[batch.rows] + 1).sum())
        return step_flops(self.shape, self.block, batch, causal_pairs(batch.lengths), last_pairs)

    @property
    def nbytes(self):
        shape, size = self.shape, self.dtype.itemsize
        layer = matrices(shape) + 2 * shape.hidden
        read = (shape.layers - self.block.start) * layer + (1 + shape.vocabulary) * shape.hidden
        # gradient and weights written, gradient read; momentum and the weights that are updated read, momentum written
        update = 3 * size + (4 * 4 if size == 2 else 3 * size)  # a half-precision block's fp32 copy is written too
        return 2 * read * size + len(self.block) * layer * update + self.tokens * shape.hidden * size

    def draw(self):
        torch.manual_seed(0)
        model = build(self.model, self.dtype, self.device, self.shape).requires_grad_(False)
        inside = procedure().block_names(model, "model.layers", self.block)
        values = {name: p.detach() for name, p in model.named_parameters() if name in set(inside)}
        values = {name: p + 0.1 * p.std() * torch.randn_like(p) for name, p in values.items()}
        return Inputs(model, values, self.samples())

    def small(self):
        odd = Shape(
            hidden=48, intermediate=75, layers=4, heads=3, key_value_heads=1, vocabulary=211, tied=self.shape.tied
        )
        small = dataclasses.replace(self, shape=odd, block=range(1, 2), batch=2, shorter=4, gradients=True)
        return dataclasses.replace(small, tokens=small.packed.num_tokens)

    def truth(self, data):
        wide = {p: nn.Parameter(p.double(), requires_grad=False) for p in data.model.parameters()}
        values = {name: value.double() for name, value in data.values.items()}
        return Reference(self, Inputs(exact_norms(copied(data.model, wide)), values, data.samples)).gradients()

    def variants(self, data):
        return [self._variant(name, data) for name in SIDES]

    def _variant(self, name, data):
        made = []  # the side, which is held here alone

        def make():
            made.clear()
            release()  # what a variant that failed held
            if name in self.left_out:
                raise Skip(self.left_out[name])
            if self.gradients and name in IN_FP64:
                self.check_weights(name)
            made.append(SIDES[name](self, data))
            return run

        def run():
            try:
                return made[0].gradients() if self.gradients else made[0].step()
            except BaseException:
                made.clear()  # or its memory would be missing until the case is over
                raise

        spent = None if name in UNCOUNTED else lambda: made[0].flops()
        return Variant(name, make, name in OURS, standing_bytes=lambda: made[0].standing(), spent_flops=spent)

    def check_weights(self, name):
        """Three fp64 steps have to give the reference's weights."""
        case, data, truth = self._exact
        error = self.error(_three_steps(SIDES[name](case, data)), truth)
        if not error <= EXACT:
            what = "the reference's weights after three fp64 steps"
            raise Skip(f"{WRONG}{error:.1e} from {what} (limit {EXACT:.0e})")

    @functools.cached_property
    def _exact(self):
        """(this case in fp64, its inputs, the reference's weights after three steps)"""
        case = dataclasses.replace(self, options=dataclasses.replace(self.options, dtype=torch.float64))
        data = case.draw()
        truth = _three_steps(Reference(case, data))
        if any(weight.equal(data.values[name]) for name, weight in truth.items()):
            raise Wrong("the reference trained nothing: no numbers")
        return case, data, truth


def _three_steps(side):
    for _ in range(3):
        side.step()
    return side.weights()


def cases(options: Options) -> list[Case]:
    return [case for model in options.the_models() for case in _cases(model, options)]


def _cases(model: str, options: Options) -> Iterator[Case]:
    shape = MODELS[model]
    if options.quick:
        shape = dataclasses.replace(shape, layers=4, vocabulary=4096)
        first = middle = last = range(0, 2)
    else:
        blocks = selectable_blocks(shape.layers, num_blocks=8, top_k=1)
        first, middle, last = blocks[0], blocks[len(blocks) // 2], blocks[-1]
    quick = [(middle, 2, "all")]
    cpu = [(first, 6, "all"), (middle, 6, "all"), (last, 6, "all"), (last, 6, "letter")]
    gpu = [(middle, 6, "all"), (middle, 32, "all"), (first, 6, "all"), (last, 6, "all")]  # what counts most first
    gpu += [(block, 6, "letter") for block in (first, middle, last)] + [(middle, 32, "letter")]
    chosen = options.choose(quick, cpu, gpu)
    compiled_at = (middle, chosen[0][1], "all")
    for block, batch, target in chosen:
        left_out = {}
        if (block, batch, target) != compiled_at:
            left_out["frozen, torch.compile"] = f"takes minutes to compile: measured at {_label(*compiled_at)}"
        if batch > 6:  # what each of them holds for itself would not fit together
            left_out |= dict.fromkeys(("frozen eager", "torch", "torch, graph"), f"not at {batch}+{batch}, for memory")
        label = _label(block, batch, target) + ", narrow" * options.quick
        common = dict(suite="step", model=model, label=label, tokens=0, options=options)
        case = Step(shape=shape, block=block, batch=batch, target=target, left_out=left_out, **common)
        yield dataclasses.replace(case, tokens=case.packed.num_tokens)


def _label(block: range, batch: int, target: str) -> str:
    words = {"all": "all tokens", "letter": "the letter"}
    return f"layers {block.start}-{block.stop - 1}, {batch}+{batch}, {words[target]}"
