"""KUnBR from start to end, stage by stage, against the reference procedure: random weights, data of WMDP's size.

785 questions to forget with WMDP's lengths and as many samples to retain as an epoch takes, 6 + 6 in a step; a
warm-up of 3 epochs; 8 blocks, of which those without one of the last two layers are visited, 3 times for an epoch
each: of Llama-3-8B 7 blocks and 3144 steps. Accuracy and the RTT attack are left out: they prove a result and make
none.

Ours is `kf.unlearn` itself, with clocks on its steps (from a step's samples to the update), its density and its
prefix cache. The last stage, "rest", is all other time: models and blocks written to disk and checked, checks, what
moves weights in and out. Checkpoints within a stage are off. While it runs, a folder in TMPDIR takes twice the weights'
bytes, of Llama-3-8B in bf16 32 GB; a process that is killed leaves it there. The reference procedure holds two models
in memory and writes nothing. It publishes no density; the one here, one sample's backward pass after the other, is
ours to say.

Triton's on a GPU runs on all questions; other sides run on as many as 60 seconds allow (--seconds, which is for rounds,
has no say here), at least two steps an epoch: a first run of two steps tells the pace, a second one makes as many as
fit. Such questions are spread evenly over all lengths. The clocks' seconds are then extrapolated, and `note` says from
how many: a visit's first step (kernels are loaded, memory is found) counts once, and the others for all that follow;
density and prefix cache go by tokens. The rest is not extrapolated: next to none of it grows with the
questions. `rounds` is what was measured. On a GPU ours by torch is run where --variants names it.

The gate, before anything is timed: whole runs of a small sibling by both sides in fp64, warm-up, density and all
visits, change the weights by the same to 1e-9. Triton's kernels know no fp64: they are held against it in fp32, by
the reference's own error there. `error`, in the row of the total, is this small model's.

FLOPs are those of the products with weights that have to be made (no padding, no layer below a block twice).

Predicted for Llama-3-8B on an H200, by these FLOPs at 55 % of 790 TFLOP/s (`EndToEnd.predicted`), in seconds: warm-up
38.2, density 5.9, prefix cache 3.0, layers 0-3 26.9, layers 4-7 23.9, layers 8-11 21.0, layers 12-15 18.0, layers 16-19
15.0, layers 20-23 12.1, layers 24-27 9.1; together 173.1, of a goal of 3 minutes. Updates and the rest come on top.
"""

import copy
import dataclasses
import functools
import itertools
from collections.abc import Sequence
from contextlib import nullcontext

import torch

import kunbr_fast as kf
from kunbr_fast.benchmarks import measure
from kunbr_fast.benchmarks.clock import Clock, Side, StageTime
from kunbr_fast.benchmarks.harness import Case, Options, Skip, Variant, forgiving, measure_rounds
from kunbr_fast.benchmarks.models import build, matrices
from kunbr_fast.benchmarks.reference import procedure
from kunbr_fast.benchmarks.rows import Measured
from kunbr_fast.benchmarks.shapes import MODELS, Shape, samples, wmdp
from kunbr_fast.data.schedule import Schedule
from kunbr_fast.files.scratch import scratch
from kunbr_fast.memory import release
from kunbr_fast.model.blocks import selectable_blocks
from kunbr_fast.model.frozen import frozen
from kunbr_fast.run.reporter import Reporter
from kunbr_fast.run.visits import DENSITY, MERGE, Stage, layers

BATCH, WARMUP_EPOCHS, NEVER = 6, 3, 10**9
SECONDS = 60.0  # of a side that is not run whole
SAME = 1e-9  # largest relative difference of the changed weights in fp64
TINY = Shape(hidden=64, intermediate=128, layers=4, heads=4, key_value_heads=2, vocabulary=512)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class EndToEnd(Case):
    shape: Shape
    questions: int = 785
    num_blocks: int = 8
    visits: int = 3
    lr: float = 2e-7
    stage: str = "total"
    baseline: str = "reference"

    # ------------------------------------------------ what is done

    @property
    def blocks(self) -> list[range]:
        return selectable_blocks(self.shape.layers, self.num_blocks, 1)

    @property
    def steps(self) -> int:
        """Of an epoch."""
        return -(-self.questions // BATCH)

    @property
    def stages(self) -> list[str]:
        return ["warm-up", "density", "prefix cache", *map(_layers, self.blocks), "merge", "rest"]

    def config(self, impl: str) -> kf.KUnBRConfig:
        return kf.KUnBRConfig(
            batch_size=BATCH, warmup_epochs=WARMUP_EPOCHS, warmup_lr=self.lr, num_blocks=self.num_blocks,
            top_k=len(self.blocks), rounds=self.visits, block_epochs=1, block_lr=self.lr, checkpoint_every=NEVER,
            rtt=False, impl=impl,
        )  # fmt: skip

    def lengths(self, steps: int | None = None) -> tuple[list[int], list[int]]:
        """Of the samples to forget and to retain, for epochs of `steps` steps."""
        lengths, count = wmdp(self.questions + self.steps * BATCH), (steps or self.steps) * BATCH
        forget, retain = lengths[: self.questions], lengths[self.questions :]
        return _spread(forget, min(self.questions, count)), _spread(retain, count)

    def samples(self, steps: int | None = None) -> tuple[list[dict], list[dict]]:
        forget, retain = self.lengths(steps)
        found = samples([*forget, *retain], self.shape.vocabulary)
        return found[: len(forget)], found[len(forget) :]

    def draw(self) -> torch.nn.Module:
        """The model. In fp64 it has the weights that it has in fp32."""
        torch.manual_seed(0)
        dtype = torch.float32 if self.dtype == torch.float64 else self.dtype
        return build(self.model, dtype, self.device, self.shape).to(self.dtype)

    # ------------------------------------------------ the two sides: (the unlearned model, its density)

    def ours(self, impl: str, model, steps: int, clock: Clock):
        forget, retain = self.samples(steps)
        begun: set[str] = set()

        def around(stage: str, part: str):
            if part == "step":
                block, first = Stage(stage).block, stage not in begun
                begun.add(stage)
                return clock("warm-up" if block is None else _layers(block), first)
            return clock(part or stage) if part == "prefix cache" or stage in (DENSITY, MERGE) else nullcontext()

        reporter = Reporter(say=lambda text: self.options.say(f"{self}: {impl}, {text}"), around=around)
        with scratch("kunbr-fast-") as folder, clock("all"):
            out = folder / "out"
            report = kf.unlearn(model, forget, retain, self.config(impl), output_dir=out, reporter=reporter)
        return model, report.density.per_layer

    def reference(self, model, steps: int, clock: Clock):
        them, (forget, retain) = procedure(), self.samples(steps)
        orders = [
            list(Schedule(len(forget), len(retain), BATCH, BATCH, epochs, number))
            for number, epochs in enumerate([WARMUP_EPOCHS] + [1] * (self.visits * len(self.blocks)))
        ]
        forget, retain = ([{k: v.to(self.device) for k, v in s.items()} for s in part] for part in (forget, retain))

        def batches(number: int, stage: str):
            self.options.say(f"{self}: reference, {stage}, training {number + 1} of {len(orders)}")
            for step, (f, r) in enumerate(orders[number]):
                with clock(stage, step == 0):
                    yield [forget[i] for i in f], [retain[i] for i in r]

        with clock("all"), torch.device(self.device):
            unlearned = copy.deepcopy(model)
            optimizer = them.ReferenceLion(unlearned.parameters(), self.lr)
            for f, r in batches(0, "warm-up"):
                them.reference_step(unlearned, optimizer, f, r, 1.0)
            optimizer.zero_grad()
            del optimizer
            self.options.say(f"{self}: reference, density")
            with clock("density"):
                density = _one_by_one(model, forget, them.padded_loss)
            for number, block in enumerate(self.visits * self.blocks, 1):
                steps = batches(number, _layers(block))
                them.reference_block(model, unlearned, "model.layers", block, steps, self.lr, 1.0)
        return unlearned, density

    # ------------------------------------------------ the gate

    def variants(self, data):
        def side(name):
            case = self.exact() if name == "torch" else self
            return functools.partial(case._result, name)

        return [Variant("reference", lambda: side("reference")), *self.implemented(side, "linear_loss")]

    def _work(self, name: str):
        return self.reference if name == "reference" else functools.partial(self.ours, name)

    def _result(self, name: str) -> dict[str, torch.Tensor]:
        """What a whole run makes of the weights, and the density."""
        before = torch.cat([p.detach().flatten() for p in self.draw().parameters()])
        after, density = self._work(name)(self.draw(), self.steps, Clock(self.device))
        return {"change": torch.cat([p.detach().flatten() for p in after.parameters()]) - before, "density": density}

    def small(self):
        """In fp32 also where this one is bf16: there only ours has master weights."""
        shape = Shape(
            hidden=32, intermediate=48, layers=4, heads=4, key_value_heads=2, vocabulary=97, tied=self.shape.tied
        )
        options = dataclasses.replace(self.options, dtype=torch.float32)
        return dataclasses.replace(self, shape=shape, questions=10, num_blocks=4, visits=2, lr=1e-3, options=options)

    def exact(self):
        return dataclasses.replace(self, options=dataclasses.replace(self.options, dtype=torch.float64))

    def truth(self, data):
        return self.exact()._result("reference")

    def floor(self):
        """Lion's update is a sign: where the gradient is about 0, rounding decides it."""
        return 0.02

    truth_is = "the reference"

    def allowed(self, variant, baseline):
        return SAME if variant.name == "torch" else super().allowed(variant, baseline)

    # ------------------------------------------------ time

    def rows(self):
        found, (errors, left_out) = {}, self.gate()
        if self.options.gpu and not self.options.quick and self.options.variants is None and "triton" in errors:
            left_out["torch"] = "on a GPU only the best of ours, unless variants names it"
        for variant in self.chosen(None):
            if variant.name in left_out:
                continue
            with forgiving(variant, left_out):
                try:
                    found[variant.name] = self._measured(variant.name)
                except OSError as reason:  # the disk is full
                    raise Skip(str(reason)) from None
            release()
        rates = measure_rounds({}, self.options)[1]
        rows = []
        for stage in [*self.stages, "total"]:
            case = dataclasses.replace(self, stage=stage, label=stage)
            rows += [case._row(variant, found, rates, errors, left_out) for variant in self.chosen(None)]
        return rows

    def _row(self, variant, found, rates, errors, left_out):
        name, side = variant.name, found.get(variant.name)
        if side is None:
            return self.row(name, variant.ours, note=f"not run: {left_out[name]}")
        mine, base = (found[n].stages.get(self.stage) if n in found else None for n in (name, self.baseline))
        if mine is None:
            return self.row(name, variant.ours, note="not run: the procedure has no such stage")
        whole, notes = {}, [mine.note] if mine.note else []
        if self.stage == "total":
            whole = dict(error=errors[name], peak_bytes=side.peak, standing_bytes=self.standing(name))
            checked = torch.float64 if name == "torch" else torch.float32
            notes += [f"error of a small model in {str(checked)[6:]}"] if checked != self.dtype else []
        baseline, rates = [base.ms] if base else None, rates if self.flops else None
        measured = Measured([mine.ms], baseline, rates, others=side.others, **whole)
        return self.row(name, variant.ours, measured, "; ".join(notes)) | {"rounds": mine.measured}

    def _measured(self, name: str) -> Side:
        if self.options.gpu and name == "triton":
            return self._run(name, self.steps)
        found = self._run(name, steps := min(2, self.steps))
        fit = 0 if self.options.quick else min(self.steps, int(steps * SECONDS / found.clocked))
        if fit > steps:
            release()
            found = self._run(name, fit)
        return found

    def _run(self, name: str, steps: int) -> Side:
        model, clock = self.draw(), Clock(self.device)
        release()

        run = functools.partial(self._work(name), model, steps, clock)
        before = measure.others_seconds()
        peak = measure.peak_memory(run, self.device)
        if "all" not in clock.first:  # no /proc to measure it by
            run()
        seconds = clock.total("all")
        others = None if self.options.gpu else max(0.0, measure.others_seconds() - before) / seconds
        stages = self._stages(clock, steps)
        clocked = sum(clock.total(stage) for stage in stages)
        stages["rest"] = StageTime(1e3 * (seconds - clocked))
        total = sum(stage.ms for stage in stages.values())
        stages["total"] = StageTime(total, steps, self.steps, "steps an epoch")
        return Side(stages, clocked, peak, others)

    def _stages(self, clock: Clock, steps: int) -> dict[str, StageTime]:
        (some, most), (all_, every) = self.lengths(steps), self.lengths()
        found = {}
        for stage in self.stages:
            if stage not in clock.first:
                continue
            if stage == "merge":
                found[stage] = StageTime(1e3 * clock.total(stage))
            elif stage == "density":
                ms = 1e3 * clock.total(stage) * sum(all_) / sum(some)
                found[stage] = StageTime(ms, len(some), len(all_), "samples")
            elif stage == "prefix cache":
                ms = 1e3 * clock.total(stage) * (sum(all_) + sum(every)) / (sum(some) + sum(most))
                found[stage] = StageTime(ms, len(some) + len(most), len(all_) + len(every), "samples")
            else:
                of = self.steps * (WARMUP_EPOCHS if stage == "warm-up" else self.visits)
                found[stage] = StageTime(1e3 * clock.extrapolated(stage, of), clock.steps(stage), of, "steps")
        return found

    # ------------------------------------------------ counts

    @property
    def flops(self) -> int:
        return sum(self.flops_of(stage) for stage in (self.stages if self.stage == "total" else [self.stage]))

    def flops_of(self, stage: str) -> int:
        shape, parts = self.shape, self.lengths()
        layer, layers = matrices(shape), shape.layers
        attention = layer - 3 * shape.hidden * shape.intermediate
        from_input = attention - shape.hidden**2  # q, k and v
        forget = sum(parts[0])
        tokens = forget + sum(parts[1])
        head = 2 * shape.hidden * shape.vocabulary  # of one row, one way
        forget_rows, rows = forget - len(parts[0]), tokens - len(parts[0]) - len(parts[1])
        if stage == "warm-up":
            return WARMUP_EPOCHS * (6 * layers * layer * tokens + 3 * head * rows)
        if stage == "density":  # the MLPs' gradients; the first layer passes none on to its attention
            below = attention + 2 * shape.hidden * shape.intermediate
            gradients = layers * (layer - attention)
            return 2 * (2 * layers * layer - below + gradients) * forget + 2 * head * forget_rows
        if stage == "prefix cache":
            return 2 * self.blocks[-1].start * layer * tokens
        for block in self.blocks:
            if stage == _layers(block):  # the block's first layer passes no gradient on
                above = layers - block.start
                each = 2 * (2 * above * layer - from_input + len(block) * layer) * tokens + 2 * head * rows
                return self.visits * each
        return 0

    nbytes = 0  # products bind these stages, and what else they read and write depends on the side

    def predicted(self, rate: float = 0.55 * 790e12) -> dict[str, float]:
        """Seconds of each stage at `rate` FLOP/s."""
        return {stage: self.flops_of(stage) / rate for stage in self.stages if self.flops_of(stage)}

    def standing(self, name: str) -> int:
        """Bytes between two steps of a visit (all blocks are as large), or of the warm-up if those are more."""
        shape, size = self.shape, self.dtype.itemsize
        each = matrices(shape) + 2 * shape.hidden
        every = shape.layers * each + shape.hidden * (1 + shape.vocabulary * (1 if shape.tied else 2))
        block = len(self.blocks[0]) * each
        if name == "reference":  # two models, gradient and momentum of what is trained
            return size * max(2 * every + 2 * block, 4 * every)
        cache = shape.hidden * sum(map(sum, self.lengths()))
        update = 2 * 4 * block if size == 2 else size * block  # master weights and momentum, or momentum alone
        return max(size * (every + 2 * block + cache) + update, 3 * size * every)


def _layers(block: range) -> str:
    return f"layers {layers(block)}"


def _spread(lengths: Sequence[int], count: int) -> list[int]:
    """`count` of them, evenly spread over them by size; all of them as they are."""
    if count == len(lengths):
        return list(lengths)
    ordered = sorted(lengths)
    return [ordered[(2 * i + 1) * len(ordered) // (2 * count)] for i in range(count)]


def _one_by_one(model, samples, loss) -> torch.Tensor:
    """(H,) float64: the mean over samples of the L1 norm of each one's gradient of a layer's MLP matrices."""
    layers = [[p for p in layer.mlp.parameters() if p.dim() == 2] for layer in model.model.layers]
    wide = torch.promote_types(model.dtype, torch.float32)
    sums = torch.zeros(len(layers), dtype=torch.float64)
    with frozen(model):
        for parameter in itertools.chain(*layers):
            parameter.requires_grad_()
        for sample in samples:
            loss(model, [sample]).backward()
            for index, layer in enumerate(layers):
                for parameter in layer:
                    sums[index] += torch.linalg.vector_norm(parameter.grad, 1, dtype=wide)
                    parameter.grad = None
    return (sums / len(samples)).cpu()


def cases(options: Options) -> list[Case]:
    found = []
    for model in options.the_models():
        sizes = dict(model=model, shape=MODELS[model])
        if options.quick:
            sizes = dict(model=f"{model}, narrow", shape=TINY, questions=12, num_blocks=4)
        case = EndToEnd(suite="end_to_end", label="total", tokens=0, options=options, **sizes)
        found.append(dataclasses.replace(case, tokens=sum(map(sum, case.lengths()))))
    return found
