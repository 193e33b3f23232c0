"""One update of the active block's weights by Lion and AdamW, bound by memory.

The block is that of four layers of the model (two on a CPU). Kinds, and the needed bytes a weight of (Lion, AdamW):

    fp32         20, 28   gradient read; weight and state read and written, all in fp32
    fp32 master  20, 28   what half precision trains with: gradient read in it and the weight's copy written in it
    stochastic   14, 22   no master: bf16 weights, rounded stochastically, and bf16 gradient; state in fp32

Ours update one vector in one launch; "torch" is what training runs without a kernel, which of AdamW is torch's own
fused one over that vector (but for stochastic rounding). Rivals: the plain formula, tensor by tensor ("eager");
torch.compile of it over the whole vector; torch.optim.AdamW in its other form, foreach, and lion-pytorch's Lion, over
the tensors. Rivals, and torch's fused AdamW, need the gradient in fp32 beside a master, and a copy after the update. No
rival rounds stochastically but the plain formula.

Each variant has a weight and a state of its own, which `standing_mib` counts; the gradient is shared and stays the
same. The gate compares three updates from one start. Lion's update is a sign: inputs are drawn so that in none of these
updates an entry is within a twentieth of where it would turn, but momentum and gradient decide it by turns. Steps are
as large as weights, so that a wrong one shows. Stochastic rounding: steps are far below bf16's last place, and the way
that weights went on average counts too, which rounding to nearest would lose. At the timed shape ours are held against
each other in a sample after the first update.
"""

import dataclasses

import torch

from kunbr_fast.benchmarks.harness import Case, Options, Skip, Variant, compiled, implementations, imported, need
from kunbr_fast.benchmarks.shapes import MODELS, Shape
from kunbr_fast.kernels.optimizers.op import BETAS, AdamW, Lion
from kunbr_fast.training.flat_buffer import make_optimizer

WEIGHT_DECAY, EPS = 0.1, 1e-8
STEPS_BEFORE = 10  # that the state comes from
SAMPLE = 1 << 20  # entries of a vector that are compared, about


@dataclasses.dataclass
class _Block:
    """A variant's own weights and state, each one vector. moments: momentum, or exp_avg and exp_avg_sq."""

    param: torch.Tensor
    moments: list[torch.Tensor]
    half: torch.Tensor | None

    def copy(self, dtype=None):
        """dtype: of weights and state, theirs where None."""
        param, *moments = (t.to(dtype or t.dtype, copy=True) for t in (self.param, *self.moments))
        return _Block(param, moments, None if self.half is None else self.half.clone())

    @property
    def nbytes(self):
        return sum(t.nbytes for t in (self.param, *self.moments, self.half) if t is not None)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Update(Case):
    shape: Shape
    layers: int
    operation: str  # "lion" or "adamw"
    kind: str  # "fp32", "fp32 master" or "stochastic"
    half: torch.dtype = torch.bfloat16
    updates: int = 1  # of a run

    flops = 0

    @property
    def dtype(self):
        return torch.float32 if self.kind == "fp32" else self.half

    @property
    def sizes(self):
        """Of the block's tensors."""
        s = self.shape
        narrow = s.key_value_heads * s.hidden // s.heads
        layer = [(s.hidden, s.hidden), (narrow, s.hidden), (narrow, s.hidden), (s.hidden, s.hidden)]
        layer += [(s.intermediate, s.hidden)] * 2 + [(s.hidden, s.intermediate), (s.hidden,), (s.hidden,)]
        return layer * self.layers

    @property
    def numel(self):
        return sum(torch.Size(size).numel() for size in self.sizes)

    def cut(self, flat):
        """Views of the vector as the block's tensors."""
        parts = flat.split([torch.Size(size).numel() for size in self.sizes])
        return [part.view(size) for part, size in zip(parts, self.sizes)]

    @property
    def nbytes(self):
        moments = 1 if self.operation == "lion" else 2
        weight = {"fp32": 8, "fp32 master": 8 + self.half.itemsize, "stochastic": 2 * self.half.itemsize}[self.kind]
        return self.numel * (self.dtype.itemsize + weight + 8 * moments)

    @property
    def lr(self):
        return 2e-5 if self.kind == "stochastic" else 1e-2

    @property
    def betas(self):
        return BETAS[self.operation]

    def floor(self):
        # a master: fp32, but a few entries of its copy may be rounded the other way
        return 2**-12 if self.kind == "fp32 master" else super().floor()

    def draw(self):
        """(gradient, `_Block` to start from, the signs of the first update where rounding is stochastic)"""
        generator = torch.Generator(self.device).manual_seed(0)

        def random(scale):
            return torch.randn(self.numel, generator=generator, device=self.device).mul_(scale)

        weight_dtype = self.half if self.kind == "stochastic" else torch.float32
        param, grad, momentum = random(0.02).to(weight_dtype), random(9e-3).to(self.dtype), random(1e-3)
        beta, decay = self.betas[0], self.betas[-1]
        for update in range(3):
            share = beta * decay**update if self.operation == "lion" else beta ** (update + 1)  # of the momentum
            old, new = share * momentum, (1 - share) * grad.float()
            near = (old + new).abs_() < 0.05 * (old.abs_() + new.abs_())
            # of one sign they cannot cancel, in no update
            grad = torch.where(near, grad.abs().copysign(momentum).to(grad.dtype), grad)
        signs = None
        if self.kind == "stochastic":
            signs = (beta * momentum + (1 - beta) * grad.float()).sign_().neg_()
        moments = [momentum] if self.operation == "lion" else [momentum, random(1e-3).square_().add_(1e-7)]
        half = param.to(self.half) if self.kind == "fp32 master" else None
        return grad, _Block(param, moments, half), signs

    def small(self):
        odd = Shape(hidden=96, intermediate=123, layers=1, heads=6, key_value_heads=2, vocabulary=64)
        return dataclasses.replace(self, shape=odd, layers=1, updates=3)

    def truth(self, data):
        grad, start, _ = data
        wide = start.copy(torch.float64)
        return self._once(data, wide, lambda step: self._formula(wide.param, grad, wide.moments, wide.half, step))()

    def _formula(self, param, grad, moments, half, step):
        """Plain torch, in place; step: from 1, a number or a tensor."""
        (beta1, beta2), grad = self.betas, grad.to(moments[0].dtype)
        wide = param.to(moments[0].dtype)
        if self.operation == "lion":
            (m,) = moments
            update = self.lr * (beta1 * m + (1 - beta1) * grad).sign()
            m.mul_(beta2).add_(grad, alpha=1 - beta2)
        else:
            m, v = moments
            m.mul_(beta1).add_(grad, alpha=1 - beta1)
            v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
            update = self.lr / (1 - beta1**step) * m / (v.sqrt() / (1 - beta2**step) ** 0.5 + EPS)
        wide.mul_(1 - self.lr * WEIGHT_DECAY).sub_(update)
        if param.dtype == torch.bfloat16:  # stochastically:
            # random bits below bf16's last place, and what is below it cut off
            noise = torch.randint(1 << 16, wide.shape, dtype=torch.int32, device=wide.device)
            param.copy_(((wide.view(torch.int32) + noise) & -65536).view(torch.float32))
        if half is not None:
            half.copy_(param)

    def _once(self, data, block, update):
        """update(step): one update of the block. The first run says what came out: whole in the gate, else a sample."""
        start, signs = data[1:]
        steps, stride = iter(range(STEPS_BEFORE + 1, 1 << 62)), self.numel // SAMPLE | 1
        first = iter([True])

        def run():
            for _ in range(self.updates):
                update(next(steps))
            if not next(first, False):
                return None
            found = {"weight": block.param} | {f"moment {i}": moment for i, moment in enumerate(block.moments)}
            found |= {} if block.half is None else {"copy": block.half}
            found = {name: tensor[::stride].clone() for name, tensor in found.items()}
            if self.kind == "stochastic":
                moved = found["weight"].double() - start.param[::stride].double()
                found["mean move"] = (moved * signs[::stride]).mean()
            return found

        return run

    def variants(self, data):
        def variant(name, update_of, ours=False):
            def make():
                block = data[1].copy()
                return torch.no_grad()(self._once(data, block, update_of(block, data[0])))

            standing = data[1].nbytes
            if ours and name == "torch" and (self.operation, self.kind) == ("adamw", "fp32 master"):
                standing += 4 * self.numel  # the gradient in fp32, which `FlatBuffer.step` keeps
            return Variant(name, make, ours=ours, standing_bytes=standing)

        found = [
            variant(impl, lambda *known, impl=impl: self._ours(impl, *known), ours=True)
            for impl in implementations(self.operation)
        ]
        found += [variant("eager", self._eager), variant("torch.compile", self._compiled)]
        if self.kind == "stochastic":
            return found
        if self.operation == "adamw":
            return [*found, variant("torch.optim foreach", self._foreach)]
        for way in ("", " foreach", " triton"):
            found.append(variant(f"lion-pytorch{way}", lambda *known, way=way: self._lion_pytorch(way, *known)))
        return found

    def _ours(self, impl, block, grad):
        """As `FlatBuffer.step` makes the update."""
        need(self.operation, impl, self.device, block.param.dtype)
        settings = dict(lr=self.lr, betas=self.betas, weight_decay=WEIGHT_DECAY, impl=impl)
        if self.kind == "stochastic":
            optimizer = {"lion": Lion, "adamw": AdamW}[self.operation]([block.param], seed=0, **settings)
        else:
            optimizer = make_optimizer(self.operation, [block.param], **settings)
        fused = isinstance(optimizer, torch.optim.AdamW)  # torch's, which counts on the device
        count = torch.tensor(float(STEPS_BEFORE), device=self.device) if fused else float(STEPS_BEFORE)
        names = ["momentum"] if self.operation == "lion" else ["exp_avg", "exp_avg_sq"]
        optimizer.state[block.param] = dict(zip(names, block.moments), step=count)
        return lambda step: optimizer.update(grad, block.half)

    def _eager(self, block, grad):
        halves = [None] * len(self.sizes) if block.half is None else self.cut(block.half)
        moments = zip(*(self.cut(moment) for moment in block.moments))
        tensors = list(zip(self.cut(block.param), self.cut(grad), moments, halves))

        def update(step):
            for param, gradient, its_moments, half in tensors:
                self._formula(param, gradient, its_moments, half, step)

        return update

    def _compiled(self, block, grad):
        run = compiled(self.options, self._formula)
        # counted on the device, as torch.optim's fused AdamW does: a number would be compiled anew at each step
        count = torch.tensor(float(STEPS_BEFORE), device=self.device)
        return lambda step: run(block.param, grad, block.moments, block.half, count.add_(1))

    def _optimizer(self, optimizer, params, block, grad):
        """A rival's over the tensors; a gradient in half precision is made wide, as it asks."""

        def update(step):
            for param, gradient in zip(params, self.cut(grad.to(block.param.dtype))):
                param.grad = gradient
            optimizer.step()
            for param in params:
                param.grad = None
            if block.half is not None:
                block.half.copy_(block.param)

        return update

    def _foreach(self, block, grad):
        params = [torch.nn.Parameter(param) for param in self.cut(block.param)]
        optimizer = torch.optim.AdamW(params, self.lr, self.betas, EPS, WEIGHT_DECAY, foreach=True)
        for param, exp_avg, exp_avg_sq in zip(params, *(self.cut(moment) for moment in block.moments)):
            step = torch.tensor(float(STEPS_BEFORE))
            optimizer.state[param] = {"step": step, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
        return self._optimizer(optimizer, params, block, grad)

    def _lion_pytorch(self, way, block, grad):
        if way == " triton" and not self.options.gpu:
            raise Skip("its kernel needs a GPU")
        module = imported("lion_pytorch.foreach" if way == " foreach" else "lion_pytorch", "lion-pytorch")
        params = [torch.nn.Parameter(param) for param in self.cut(block.param)]
        options = {"use_triton": True} if way == " triton" else {}
        optimizer = module.Lion(params, self.lr, self.betas, WEIGHT_DECAY, **options)
        for param, momentum in zip(params, self.cut(block.moments[0])):
            optimizer.state[param] = {"exp_avg": momentum}
        return self._optimizer(optimizer, params, block, grad)


def cases(options: Options) -> list[Case]:
    layers = options.choose(1, 2, 4)
    kinds = [(operation, kind) for operation in ("lion", "adamw") for kind in ("fp32", "fp32 master", "stochastic")]
    found = []
    for model in options.the_models():
        for operation, kind in options.choose([kinds[0], kinds[4]], kinds, kinds):
            label = f"{'Lion' if operation == 'lion' else 'AdamW'}, {kind}, {layers} layer{'s' * (layers > 1)}"
            common = dict(suite="optimizer", model=model, label=label, tokens=0, options=options)
            found.append(Update(shape=MODELS[model], layers=layers, operation=operation, kind=kind, **common))
    return [case for case in found if options.dtype in (None, case.dtype)]
