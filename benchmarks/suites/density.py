"""Statistics of each sample's weight gradient: one weight at a time, and the knowledge density of a whole model.

One weight (N, K) of a linear layer, samples of T tokens packed one after the other, 2048 tokens and more (256 on a
CPU), grad_l1:

  torch, triton, cuda   ours
  tile csrc ...         each kernel of csrc/ (portable, hopper), where --variants names it, or with --tiles
  tile ...              each candidate of kernels/tiles.py's table, with --tiles
  bare                  each sample's product written to memory, no statistic: what the others are to be compared with;
                        on a GPU the fastest of single, batched and grouped products
  loop                  the baseline: a backward per sample (its forward untimed), then .grad.abs().sum()
  grouped_mm            all gradients in memory, then abs and sum; grouped_norm: the same, reduced in one pass
  func                  torch.func's per-sample gradients, which run the layer's forward too
  torch.compile         of bmm, abs and sum

and grad_l2sq ("L2"; of up alone, as down costs the same): ours with dW formed in tiles, `gram` by way of
<X X^T, dY dY^T>, `opacus`, whose ghost norm is the same, and the loop. Samples are padded for func, opacus and
torch.compile before the clock starts. Needed: 2*T*N*K FLOPs over all samples, and one reading of the inputs; the Gram
form gets along with fewer FLOPs where samples are short, and may be beyond the roofline.

A whole model, random weights, random tokens of the lengths that questions have, loss on every token:

  torch, triton   ours: kf.knowledge_density of the MLP's weights, grad_l1, packed batches
  loop            the baseline: for each sample the model's own forward and backward, gradients for the MLP's weights
                  only, .grad.abs().sum()
  plain           ours without the statistics: the same packed passes, no gradient of any weight
  products        dy_i.T @ x_i of each sample, layer and MLP weight, written to memory (`bare`)

On a GPU the default is one model, and of down two lengths; --models and --tokens ask for more. The whole model comes
last, as it takes longer than all weights together; where --tokens names lengths there are weights alone.

Goals on an H200: loop / ours at least 5; ours / (plain + products) at most 1.15; memory beyond plain's under 1 % of the
weights' (`mib`).
"""

import copy
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F

import kunbr_fast as kf
from kunbr_fast.benchmarks import per_sample
from kunbr_fast.benchmarks.harness import Case, Options, Skip, Variant, compiled, need
from kunbr_fast.benchmarks.models import build, causal_pairs, exact_norms, matrices
from kunbr_fast.benchmarks.per_sample import Packed, bare
from kunbr_fast.benchmarks.shapes import MODELS, Shape, equal, ragged, samples
from kunbr_fast.data import pack
from kunbr_fast.data.schedule import token_batches
from kunbr_fast.kernels import dispatch
from kunbr_fast.kernels.grad_density import cuda
from kunbr_fast.kernels.grad_density import op as operators
from kunbr_fast.kernels.grad_density.kinds import kinds_of_launch
from kunbr_fast.kernels.tiles import TABLE, architecture
from kunbr_fast.model.decoder import Decoder, Stretch
from kunbr_fast.model.frozen import frozen
from kunbr_fast.objectives import losses

MEAN_RAGGED = 44  # tokens of a sample in `ragged`
ALIGNED = ("short", "long", "fp32", "hopper", "portable")  # kinds of launch that a whole model's sums lead to


class _PerSample(Case):
    """Judged by its worst entry, a sample's or a layer's: a mistake in one of many must not drown."""

    def error(self, found, truth):
        return max(_worst(found[name].double(), truth[name].double()) for name in found)


def _worst(found, truth):
    return float(((found - truth).abs() / truth).max()) if found.isfinite().all() else float("inf")


# ---------------------------------------------------------------- one weight


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Weight(_PerSample):
    """One weight, (N, K), and samples of `lengths`. statistic: grad_l1 or grad_l2sq."""

    N: int
    K: int
    lengths: tuple[int, ...]
    statistic: str = "grad_l1"
    baseline: str = "loop"

    @property
    def flops(self):
        return 2 * sum(self.lengths) * self.N * self.K

    @property
    def nbytes(self):
        return sum(self.lengths) * (self.N + self.K) * self.dtype.itemsize

    def draw(self):
        return Packed.draw(self.N, self.K, self.lengths, self.dtype, self.device)

    def small(self):
        # rows stay 16-byte aligned, or other kernels run than the timed ones; lengths stay, which choose kernels too
        N, K = (max(16, round(n / 32 / 8) * 8) for n in (self.N, self.K))
        return dataclasses.replace(self, N=N, K=K, lengths=self.lengths[:3])

    def truth(self, data):
        dw = [dy.double().T @ x.double() for x, dy in data.parts()]
        return {
            "grad_l1": torch.stack([g.abs().sum() for g in dw]),
            "grad_l2sq": torch.stack([g.square().sum() for g in dw]),
            "grad_linf": torch.stack([g.abs().max() for g in dw]),
        }

    def floor(self):
        return 1e-5 * max(1, max(self.lengths) / 512)  # products of inputs of any dtype are summed in fp32

    def limit(self, baseline):
        return self.floor()  # the loop rounds its gradients to their dtype, ours none

    def variants(self, data):
        def ours(impl, form="direct"):
            settings = dict(max_seqlen=max(data.lengths), statistic=self.statistic, form=form, impl=impl)
            inputs = data.x, [data.dy], data.cu_seqlens
            return lambda: {self.statistic: operators.grad_density(*inputs, **settings)[0]}

        def compiled_bmm():
            per_sample.check_memory(data)
            run, (x, dy) = compiled(self.options, lambda x, dy: per_sample.l1(torch.bmm(dy.mT, x))), data.padded
            return lambda: {"grad_l1": run(x, dy)}

        def kinds():
            if not self.options.gpu:
                return ()
            return tuple(kinds_of_launch(data.x, [data.dy], len(data.lengths), None).values())

        found = self.implemented(ours, "grad_density", kinds=kinds)
        found += self._csrc(data)
        found.append(Variant("loop", partial(per_sample.loop, data, self.statistic)))
        if self.statistic == "grad_l2sq":
            found.append(Variant("gram", lambda: ours("torch", form="gram"), ours=True))
            return [*found, Variant("opacus", partial(per_sample.opacus, data))]
        buffer = None if self.options.gpu else self.N * self.K * self.dtype.itemsize
        found.append(Variant("bare", partial(bare, data), standing_bytes=buffer))
        rivals = {"grouped_mm": per_sample.grouped, "grouped_norm": per_sample.grouped_norm, "func": per_sample.func}
        found += [Variant(name, partial(make, data)) for name, make in rivals.items()]
        return [*found, Variant("torch.compile", compiled_bmm)]

    def chosen(self, data):
        """A kernel of csrc/ where it was named; with --tiles each candidate, whatever variants were named."""
        tiles, named = self.options.tiles and self.statistic == "grad_l1", self.options.variants or ()
        found = [v for v in super().chosen(data) if not v.name.startswith("tile ")]
        found += [v for v in self._csrc(data) if tiles or v.name in named]
        return found + self._tiles(data) if tiles else found

    def _csrc(self, data):
        def make(kernel):
            need("grad_density", "cuda", self.device, self.dtype, (kernel,))
            if kernel == "hopper" and (self.dtype == torch.float32 or architecture(self.device) != 90):
                raise Skip("for bf16 and fp16 on compute capability 9.0")
            run = partial(cuda.grad_density, data.x, [data.dy], data.cu_seqlens, "grad_l1", variant=kernel)
            return lambda: {"grad_l1": run()[0]}

        kernels = ("portable", "hopper") if self.options.gpu and self.statistic == "grad_l1" else ()
        return [Variant(f"tile csrc {kernel}", partial(make, kernel), ours=True) for kernel in kernels]

    def _tiles(self, data):
        if dispatch.why_not("grad_density", "triton", self.device) is not None:
            return [Variant("tile", lambda: need("grad_density", "triton", self.device, self.dtype), ours=True)]
        from kunbr_fast.kernels.grad_density.triton_kernel import launch, table_kind

        inputs = data.x, [data.dy], data.cu_seqlens, "grad_l1"
        kind = table_kind(data.x, [data.dy], len(data.lengths), max(data.lengths))
        tiles = TABLE[architecture(self.device), kind]
        runs = {f"tile {tile}": partial(launch, *inputs, tile=tile) for tile in tiles}

        def make(run):
            return lambda: lambda: {"grad_l1": run()[0]}

        return [Variant(name, make(run), ours=True) for name, run in runs.items()]


# ---------------------------------------------------------------- a whole model


def narrow(shape: Shape) -> Shape:
    return dataclasses.replace(shape, hidden=16 * shape.heads, intermediate=40 * shape.heads, vocabulary=1024)


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Model(_PerSample):
    """The first `layers` layers of a model, with embeddings and head, and samples of `lengths`."""

    shape: Shape
    layers: int
    lengths: tuple[int, ...]
    batch_tokens: int = 2048
    baseline: str = "loop"

    @property
    def flops(self):
        """Forward, input gradients down to the first MLP's weights, the MLPs' products; attention of earlier tokens
        only, the head for rows that have a label."""
        shape, tokens = self.shape, sum(self.lengths)
        mlp = 6 * tokens * shape.hidden * shape.intermediate
        projections = 2 * tokens * matrices(shape) - mlp
        attention = 4 * shape.hidden * causal_pairs(self.lengths)
        head = 2 * (tokens - len(self.lengths)) * shape.hidden * shape.vocabulary
        forward = self.layers * (projections + attention + mlp) + head
        # nothing below the first MLP has a gradient that counts, and within it only down passes one on
        backward = (self.layers - 1) * (projections + 2 * attention + mlp) + mlp // 3 + head
        return forward + backward + self.layers * mlp

    @property
    def nbytes(self):
        """All matrices, once."""
        ends = self.shape.hidden * self.shape.vocabulary * (1 if self.shape.tied else 2)
        return (self.layers * matrices(self.shape) + ends) * self.dtype.itemsize

    def draw(self):
        """(decoder, samples)"""
        torch.manual_seed(0)
        shape = dataclasses.replace(self.shape, layers=self.layers)
        decoder = Decoder(build(self.model, self.dtype, self.device, shape))
        return decoder, samples(self.lengths, self.shape.vocabulary)

    def small(self):
        return dataclasses.replace(
            self, shape=narrow(self.shape), layers=min(2, self.layers), lengths=(3, 40, 17, 131), batch_tokens=100
        )

    def truth(self, data):
        decoder, samples = data
        wide = exact_norms(copy.deepcopy(decoder.model).double())
        return self._loop(Decoder(wide), samples)()

    def floor(self):
        # All sums of a model run in another order where samples are packed. fp32: thousands of terms; in half precision
        # the rounding of activations is what counts, and a sum of |gradients| is averaged over many.
        return 2e-5 if self.dtype == torch.float32 else torch.finfo(self.dtype).eps / 4

    def variants(self, data):
        decoder, samples = data

        def ours(impl):
            settings = dict(impl=impl, batch_tokens=self.batch_tokens)
            return lambda: {"density": kf.knowledge_density(decoder, samples, **settings).per_layer}

        return [
            *self.implemented(ours, "linear_loss", "grad_density", kinds=lambda: ALIGNED),  # csrc has no linear_loss
            Variant("loop", lambda: self._loop(decoder, samples)),
            Variant("plain", lambda: self._plain(decoder, samples)),
            Variant("products", lambda: self._products(decoder)),
        ]

    def _loop(self, decoder, samples):
        wide = torch.promote_types(decoder.dtype, torch.float32)
        weights = [[p for n, p in layer.named_parameters() if n.startswith("mlp.")] for layer in decoder.layers]
        inputs = [sample["input_ids"].to(decoder.device) for sample in samples]

        def run():
            sums = torch.zeros(len(weights), dtype=torch.float64, device=decoder.device)
            with frozen(decoder.model):
                for weight in itertools.chain.from_iterable(weights):
                    weight.requires_grad_()
                for ids in inputs:  # the model's own loss rounds logits to fp32, which would show in the truth
                    logits = decoder.model(input_ids=ids[None], use_cache=False).logits[0, :-1]
                    F.cross_entropy(logits.to(wide), ids[1:]).backward()
                    for index, layer in enumerate(weights):
                        for weight in layer:
                            sums[index] += weight.grad.abs().sum(dtype=wide)
                            weight.grad = None
            return {"density": sums.cpu() / len(samples)}

        return run

    def _batches(self):
        return token_batches(self.lengths, self.batch_tokens)

    def _plain(self, decoder, samples):
        triton = self.options.gpu and dispatch.why_not("linear_loss", "triton", self.device) is None
        impl, batches = "triton" if triton else "torch", [[samples[i] for i in part] for part in self._batches()]

        def run():
            with frozen(decoder.model):
                for group in batches:
                    batch = pack(group).to(decoder.device)
                    with torch.no_grad():
                        embedded = decoder.embed(batch)
                    hidden = decoder.run(batch, Stretch(0, embedded.requires_grad_()))
                    weight = losses.likelihood(batch).weight
                    final = decoder.final(hidden[batch.rows])
                    del hidden
                    loss, _ = losses.linear_loss(final, decoder.head, batch.targets, weight, impl=impl)
                    loss.backward(inputs=[embedded])

        return run

    def _products(self, decoder):
        """Of the same inputs for each layer: what they hold does not matter."""
        runs = []
        for indices in self._batches():
            lengths = [self.lengths[i] for i in indices]
            for name, count in (("up", 2), ("down", 1)):  # gate has up's shape
                N, K = self.shape.projections()[name]
                runs += [bare(Packed.draw(N, K, lengths, decoder.dtype, decoder.device))] * count
        return lambda: per_sample.drop([run() for _ in range(self.layers) for run in runs])


# ---------------------------------------------------------------- which


def cases(options: Options) -> list[Case]:
    return [*_weights(options), *_models(options)]


def _common(options: Options, name: str, label: str, lengths: Sequence[int]) -> dict:
    suffix = ", narrow" if options.quick else ""
    tokens = round(sum(lengths) / len(lengths))
    return dict(suite="density", model=name, label=label + suffix, options=options, tokens=tokens,
                lengths=tuple(lengths))  # fmt: skip


def _shape(options: Options, name: str) -> Shape:
    return narrow(MODELS[name]) if options.quick else MODELS[name]


def _models(options: Options) -> Iterator[Model]:
    if options.tokens is not None:
        return
    lengths = ragged(options.choose(4, 12, 96))
    for name in options.the_models():
        shape = _shape(options, name)
        layers = options.choose(2, min(8, shape.layers), shape.layers)
        common = _common(options, name, f"whole model, {layers} layers", lengths)
        yield Model(shape=shape, layers=layers, **common)


def _weights(options: Options) -> Iterator[Weight]:
    sizes = options.choose(["32"], ["32", "128", "512", "ragged"], ["32", "128", "512", "2048", "ragged"])
    sizes = options.tokens or sizes
    at_least = options.choose(64, 256, 2048)  # tokens of a batch
    kinds = [("up", "grad_l1", sizes), ("up", "grad_l2sq", sizes)]
    if options.gpu and not options.quick:  # on a CPU up alone: down is its transpose
        kinds.append(("down", "grad_l1", [T for T in sizes if options.tokens or T in ("128", "ragged")]))
    for name in options.the_models(cpu=["Llama-3.2-1B", "SmolLM2-135M"]):
        for projection, statistic, each in kinds:
            N, K = _shape(options, name).projections()[projection]
            what = f"{projection}, L2" if statistic == "grad_l2sq" else projection
            for T in each:
                lengths = ragged(max(3, round(at_least / MEAN_RAGGED))) if T == "ragged" else equal(int(T), at_least)
                label = f"{what}, {T if T == 'ragged' else f'T={T}'}"
                yield Weight(N=N, K=K, statistic=statistic, **_common(options, name, label, lengths))
