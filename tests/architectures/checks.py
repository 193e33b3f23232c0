"""What a model has to give, beside the oracle: `examine` says of an architecture which verdict it gets, and why.

EXACT: everything is the oracle's. REFUSED: in one line, the model, or weights that its layers share. All else is
a fault: WRONG (another result, or something left behind), CRASHED (an error that the package did not raise itself),
MIXED (some calls refused, some not), NOT BUILT (by transformers).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
import traceback
from pathlib import Path

import torch
import torch.nn.functional as F
from architectures import oracle
from architectures.configurations import made
from architectures.oracle import LR, copied

import kunbr_fast as kf
from kunbr_fast.data import pack
from kunbr_fast.kernels import dispatch
from kunbr_fast.model.decoder import Decoder
from kunbr_fast.model.layers import find_layers

ROOT = Path(__file__).resolve().parents[2]
LIMIT, LIMIT_FP32 = 1e-9, 1e-4
LIMITS = {"xlstm": 1e-6, "recurrent_gemma": 1e-7}  # their own states are in fp32, whatever the model is in
INERT = 1e-6  # of a gradient's root mean square: below it, its sign is rounding
ISLANDS = ("kunbr_fast.model.attention", "kunbr_fast.model.rotary")  # what is in fp32 there, whatever the model is in
LENGTHS = {"forget": (3, 7, 12), "retain": (13, 2, 5)}


def samples(lengths, seed):
    """Some tokens without a label; the last one has one."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for length in lengths:
        ids = torch.randint(3, 100, (length,), generator=generator)
        labels = torch.where(torch.rand(length, generator=generator) < 0.3, -100, ids)
        labels[-1] = ids[-1]
        found.append({"input_ids": ids, "labels": labels})
    return found


SETTINGS = kf.KUnBRConfig(  # a step of each kind
    warmup_epochs=1, block_epochs=1, num_blocks=2, top_k=1, skip_last_layers=0, batch_size=3, retain_batch_size=3,
    warmup_lr=LR, block_lr=LR, rtt=False,
)  # fmt: skip
FORGET, RETAIN = samples(LENGTHS["forget"], 1), samples(LENGTHS["retain"], 2)


@dataclasses.dataclass
class Result:
    """way: how its batches run, `Decoder.way`; fused: parts that `patched` replaces; refused: by call, the error's
    message; faults: each in words."""

    name: str
    verdict: str = "EXACT"
    way: str = ""
    fused: str = ""
    refused: dict[str, str] = dataclasses.field(default_factory=dict)
    faults: list[str] = dataclasses.field(default_factory=list)
    crashed: bool = False

    @property
    def reason(self) -> str:
        return next(iter(self.refused.values()), "")


class Crash(Exception):
    """Not an error that the package raised itself."""


def refusal(error):
    """The message of an error that the package raised. Errors: Crash."""
    frames = traceback.extract_tb(error.__traceback__)
    own = any(Path(frames[-1].filename).is_relative_to(ROOT / room) for room in ("kunbr_fast", "kernels"))
    kinds = (ValueError, RuntimeError, dispatch.Unavailable)
    if not (isinstance(error, kinds) and own and frames[-1].line.startswith("raise")):
        where = " < ".join(f"{Path(f.filename).name}:{f.lineno}" for f in reversed(frames[-3:]))
        raise Crash(f"{type(error).__name__}: {error} ({where})") from error
    return str(error)


def state(model):
    """All that must be as before."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    modules = [
        (name, module.training, sorted(vars(module)), [len(getattr(module, hook)) for hook in hooks])
        for name, module in model.named_modules()
    ]
    parameters = [(n, p.requires_grad, p.data_ptr(), p.grad is None) for n, p in model.named_parameters()]
    config = model.config.get_text_config()
    options = (config._attn_implementation, getattr(config, "_experts_implementation", None))
    return modules, parameters, options, [p.detach().clone() for p in model.parameters()]


def changed(before, after):
    """What is not as before, in words."""
    names = ("modules", "parameters", "options")
    found = [f"{name} {[y for x, y in zip(a, b) if x != y][:2]}" for name, a, b in zip(names, before, after) if a != b]
    same = all(torch.equal(a, b) for a, b in zip(before[3], after[3]))
    return found + ([] if same else ["weights"])


def relative(ours, truth):
    ours, truth = ours.detach().double(), truth.detach().double()
    return float((ours - truth).norm() / truth.norm())


class Subject:
    """A model that is examined."""

    def __init__(self, name, result, blocks=()):
        self.name, self.result, self.blocks, self.limit = name, result, blocks, LIMITS.get(name, LIMIT)
        self.model = made(name)
        with oracle.fp64_throughout(self.model), torch.no_grad():
            oracle.forward(self.model, FORGET[0]["input_ids"])  # some models change themselves when they first run
        self.prefix = ""

    def blame(self, what, *words):
        self.result.faults.append(f"{what}: {' '.join(map(str, words))}")

    def weights_of(self, block):
        inside = tuple(f"{self.prefix}.{index}." for index in block)
        return {name for name, _ in self.model.named_parameters() if name.startswith(inside)}

    # ------------------------------------------------ the calls

    def decoder(self):
        found = Decoder(self.model)
        self.prefix, self.layers = found.layer_path(0).rpartition(".")[0], found.num_layers
        self.result.way = found.way.name
        one = samples([1], 3)[0]
        single = {"input_ids": one["input_ids"], "labels": one["labels"] * 0 - 100}
        for group in ([*FORGET, *RETAIN], [FORGET[2], single, RETAIN[0]], [RETAIN[1]], [FORGET[1], FORGET[1]]):
            with torch.no_grad():
                ours = found.logits(pack(group)).split([len(sample["input_ids"]) for sample in group])
            for logits, sample in zip(ours, group):
                error = relative(logits, oracle.logits(self.model, sample))
                if not error <= self.limit:
                    lengths = [len(s["input_ids"]) for s in group]
                    self.blame("logits", f"{error:.1e} of {len(sample['input_ids'])} tokens among {lengths}")

    def density(self):
        for modules, reduction in (("mlp", "sample"), ("mlp", "mean"), ("attention", "sample"), ("all", "sample")):
            try:
                found = kf.knowledge_density(self.model, FORGET, modules, "grad_l1", reduction)
            except Exception as error:
                self.result.refused[f"density of {modules}"] = message = refusal(error)
                if modules == "mlp" and "no layer has parameters" not in message:
                    raise
                continue
            self.compare_density(found, modules, self.truths(self.model, reduction), self.limit)

    def truths(self, model, reduction):
        """{weight in a layer: mean over samples of the gradient's absolute values, or those of the mean gradient}."""
        each = [oracle.gradients(model, sample) for sample in FORGET]
        found = {}
        for name in (name for name in each[0] if name.startswith(f"{self.prefix}.")):
            values = torch.stack([gradients[name].double() for gradients in each])
            found[name] = values.abs().mean(0) if reduction == "sample" else values.mean(0).abs()
        return found

    def compare_density(self, found, modules, truths, limit):
        sums, by_module = {name: float(value.sum()) for name, value in truths.items()}, {}
        for path, value in found.per_module.items():
            name, expert = re.fullmatch(r"(.*?)(?:\[(\d+)\])?", path).groups()
            by_module.setdefault(name, {})[int(expert or 0)] = value
        least = max(sums.values()) * (1e-3 if limit == LIMIT_FP32 else INERT)
        worst = (0.0, "")
        for name, values in by_module.items():
            parts = truths[name].flatten().unflatten(0, (len(values), -1)).sum(1).tolist()
            errors = [abs(values[e] - part) / max(part, least) for e, part in enumerate(parts)]
            worst = max(worst, (max(errors), name))
        if not worst[0] <= limit:
            self.blame(f"density of {modules}", f"{worst[0]:.1e} at {worst[1]}")
        wanted = {name for name in truths if sums[name] > least and self.counts(name, modules)}
        for words, names in (("measures", set(by_module) - wanted), ("leaves out", wanted - set(by_module))):
            names = {re.sub(r"\.\d+\.", ".*.", name) for name in names if sums[name] > least}
            if names:
                self.blame(f"density of {modules}", words, *sorted(names)[:4])
        layers = torch.zeros(self.layers, dtype=torch.float64)
        for name in by_module:
            layers[int(name[len(self.prefix) + 1 :].split(".")[0])] += sums[name]
        error = float(((found.per_layer - layers).abs() / layers.clamp(min=least)).max())
        if not error <= limit:
            self.blame(f"density of {modules}", f"{error:.1e} of a layer")

    def counts(self, name, modules):
        """Whether a weight is one of `modules`, by the oracle's reading."""
        if modules == "all":
            return True
        index, _, path = name[len(self.prefix) + 1 :].partition(".")
        weight = self.model.get_parameter(name)
        matrix = weight.dim() >= 2 and not name.endswith("bias")
        mixing = oracle.mixes_tokens(self.model.get_submodule(f"{self.prefix}.{index}"), path)
        return matrix and mixing == (modules == "attention")

    def reinserted(self):
        blocks = self.blocks or [*(range(i, i + 1) for i in range(self.layers)), range(1, 3)]
        again = dict(gradient_checkpointing=True, micro_batch_tokens=16)
        for block, execution in [*((block, {}) for block in blocks), (blocks[-1], again)]:
            original, unlearned = copied(self.model), moved(self.model)
            first = {name: p.detach().clone() for name, p in unlearned.named_parameters()}
            names = self.weights_of(block)
            truth, gradients = oracle.reinserted(original, unlearned, names, FORGET, RETAIN)
            before, what = state(original), f"reinserted {block.start}:{block.stop} {' '.join(execution)}".strip()
            if not any(bool(gradient.any()) for gradient in gradients.values()):  # the model does not run it on text
                self.refuse(what, functools.partial(self.enter, kf.reinserted(original, unlearned, block=block, lr=LR)))
                continue
            with kf.reinserted(original, unlearned, block=block, lr=LR, **execution) as training:
                training.accumulate(training.criterion.step_batch(pack(FORGET + RETAIN), len(FORGET)))
                ours = {name: p.grad.detach().clone() for name, p in training.parameters.items()}
                training.drop_gradient()
                training.step(FORGET, RETAIN)
            self.unchanged(what, before, original)
            if left := set(gradients) - set(ours):  # what it has beside them must not change
                self.blame(what, "leaves out", *sorted(left)[:3])
            norm = sum(float(g.square().sum()) for g in gradients.values()) ** 0.5
            errors = [
                (float((ours[name] - g).norm()) / max(float(g.norm()), INERT * norm), name)
                for name, g in gradients.items() if name in ours
            ]  # fmt: skip
            if not max(errors)[0] <= self.limit:
                self.blame(what, f"gradient {max(errors)[0]:.1e} at {max(errors)[1]}")
            expected = dict(truth.named_parameters())
            self.same_weights(
                what, unlearned, {n: expected[n] if n in names else w for n, w in first.items()}, gradients
            )

    def same_weights(self, what, model, expected, *steps):
        """But where the sign of a step's gradient is rounding."""
        inert = {name: torch.zeros_like(w, dtype=torch.bool) for name, w in expected.items()}
        for gradients in steps:
            count = sum(g.numel() for g in gradients.values())
            rms = (sum(float(g.square().sum()) for g in gradients.values()) / count) ** 0.5
            for name, gradient in gradients.items():
                inert[name] |= gradient.abs() < INERT * rms
        for name, parameter in model.named_parameters():
            differs = ((parameter - expected[name]).abs() > LR * 1e-3) & ~inert[name]
            if bool(differs.any()):
                self.blame(what, f"{int(differs.sum())} of {differs.numel()} weights of {name} differ")
                return

    def refused_too(self):
        """What `Decoder` refuses, every call refuses."""
        self.refuse("density", lambda: kf.knowledge_density(self.model, FORGET))
        block = range(1, 2)
        self.refuse("reinserted", lambda: self.enter(kf.reinserted(self.model, moved(self.model), block=block, lr=LR)))
        model = copied(self.model)
        self.refuse("unlearn", lambda: kf.unlearn(model, FORGET, RETAIN, SETTINGS, progress=False))

    def refused_in_other_dtypes(self):
        for dtype in (torch.float32, torch.bfloat16):
            for noise in (0.0, 0.1):
                model = made(self.name, dtype, own=True, noise=noise)
                try:
                    oracle.logits(model, FORGET[0])
                except RuntimeError:  # it knows no such dtype
                    continue
                self.refuse(f"{dtype}, noise {noise}", functools.partial(Decoder, model))

    def refuse(self, what, call):
        try:
            call()
        except Exception as error:
            refusal(error)
        else:
            self.blame(what, "is let through, although the model is refused")

    @staticmethod
    def enter(context):
        with context:
            pass

    def patched(self):
        if not self.prefix and not self.guessed():
            return self.enter(kf.patched(self.model))
        model, block = copied(self.model), range(1, 3)
        inside, batch = self.weights_of(block), self.batch(model)
        own = {name: "forward" in module.__dict__ for name, module in model.named_modules()}

        def run(model):
            logits = oracle.output(model, **batch["inputs"])
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)
            weights = [p for name, p in model.named_parameters() if name in inside and p.requires_grad]
            found = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
            return logits.detach()[batch["real"]], torch.cat([g.flatten() for g in found])

        frozen = copied(model)
        for name, parameter in frozen.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and name in inside)
        try:
            truth = run(frozen)
        except Exception:  # it does not train so by itself
            return
        before, trainable = state(model), {name for name, p in model.named_parameters() if p.requires_grad}
        with kf.patched(model, active_block=block):
            replaced = [m for name, m in model.named_modules() if "forward" in m.__dict__ and not own[name]]
            self.result.fused = parts(replaced)
            if {name for name, p in model.named_parameters() if p.requires_grad} != inside & trainable:
                self.blame("patched", "freezes other weights than those outside the block")
            for what, ours, own_result in zip(("logits", "gradient"), run(model), truth):
                if not relative(ours, own_result) <= self.limit:
                    self.blame("patched", f"{what} {relative(ours, own_result):.1e}")
        self.unchanged("patched", before, model)
        if not relative(run(model)[0], truth[0]) <= self.limit:
            self.blame("patched", "the model is another one afterwards")

    def guessed(self):
        """Where the layers of a refused model are, if anywhere."""
        with contextlib.suppress(ValueError):
            self.prefix, _ = find_layers(self.model)
        return self.prefix

    def measured(self):
        """The modules whose density a run selects by: some models have nothing beside what mixes tokens."""
        return "attention" if "density of mlp" in self.result.refused else "mlp"

    def batch(self, model):
        """Padded samples, or one alone for a model that takes no padding."""
        try:
            batch = padded(RETAIN)
            with torch.no_grad():
                if bool(oracle.output(model, **batch["inputs"])[batch["real"]].isfinite().all()):
                    return batch
        except (TypeError, ValueError):
            pass
        alone = padded(RETAIN[:1])
        return alone | {"inputs": {"input_ids": alone["inputs"]["input_ids"]}}

    def unlearn(self):
        model = copied(self.model)
        report = kf.unlearn(
            model, FORGET, RETAIN, dataclasses.replace(SETTINGS, modules=self.measured()), progress=False
        )
        warm, trainable = copied(self.model), {n for n, p in self.model.named_parameters() if p.requires_grad}
        first = oracle.step_gradients(warm, FORGET, RETAIN)
        oracle.lion(warm, first, trainable)
        (block,) = report.blocks
        names = self.weights_of(block)
        trained, second = oracle.reinserted(self.model, warm, names, FORGET, RETAIN)
        trained = {name: p for name, p in trained.named_parameters() if name in names}
        expected = dict(warm.named_parameters()) | trained
        self.same_weights("unlearn", model, expected, first, second)

    def as_loaded(self):
        """As somebody loads it: in fp32, and in bf16, with transformers' own choices."""
        model = made(self.name, torch.float32, own=True)
        found = kf.knowledge_density(model, FORGET, self.measured())
        self.compare_density(found, self.measured(), self.truths(model, "sample"), LIMIT_FP32)
        for noise in (0.0, 0.02):
            Decoder(made(self.name, torch.bfloat16, own=True, noise=noise))

    def unchanged(self, what, before, model):
        if left := changed(before, state(model)):
            self.blame(what, "leaves behind", *left)


def moved(model):
    """A stand-in for an unlearned model: a copy with every weight moved."""
    other, generator = copied(model), torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in other.parameters():
            change = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.02
            parameter.add_(change.to(parameter.dtype))
    return other


def padded(data):
    """Right-padded, for a model's own forward, with which tokens are real."""
    shape = len(data), max(len(sample["input_ids"]) for sample in data)
    ids, labels = torch.zeros(shape, dtype=torch.long), torch.full(shape, -100)
    for i, sample in enumerate(data):
        ids[i, : len(sample["input_ids"])], labels[i, : len(sample["labels"])] = sample["input_ids"], sample["labels"]
    real = torch.arange(shape[1]) < torch.tensor([[len(sample["input_ids"])] for sample in data])
    return {"inputs": dict(input_ids=ids, attention_mask=real.long(), use_cache=False), "labels": labels, "real": real}


def parts(modules):
    """The kinds of modules, in words."""
    kinds = {"norms": "Norm", "MLP": "MLP|Mlp|FeedForward", "attention": "Attention", "layers": "(Layer|Block)$"}
    names = {type(module).__name__ for module in modules}
    known = [word for word, pattern in kinds.items() if any(re.search(pattern, name) for name in names)]
    other = sorted(n for n in names if not any(re.search(pattern, n) for pattern in kinds.values()))
    return ", ".join(known + other)


CALLS = ("decoder", "density", "reinserted", "patched", "unlearn", "as_loaded")
NARROW = ("as_loaded", "refused_in_other_dtypes")  # not in fp64 throughout


def examine(name, calls=CALLS, blocks=()):
    """calls: which checks, the decoder's first; blocks: to re-insert, by default every layer, and two at once."""
    result = Result(name)
    try:
        subject = Subject(name, result, blocks)
    except Exception as error:
        result.verdict, result.refused["build"] = "NOT BUILT", str(error).strip().splitlines()[0]
        return result
    with oracle.fp64_throughout(subject.model, *ISLANDS):
        _tried(subject, "decoder")
        if result.crashed:
            calls = ("decoder",)
        elif "decoder" in result.refused:
            patched = [call for call in calls if call == "patched"]
            calls = ("decoder", "refused_too", *patched, "refused_in_other_dtypes")
        for call in calls[1:]:
            if call not in NARROW:
                _tried(subject, call)
    for call in NARROW:
        if call in calls:
            _tried(subject, call)
    if result.crashed:
        result.verdict = "CRASHED"
    elif result.faults:
        result.verdict = "WRONG"
    elif "decoder" in result.refused or set(result.refused) >= {"density", "reinserted", "unlearn"}:
        result.verdict = "REFUSED"
    elif set(result.refused) & set(CALLS):
        result.verdict = "MIXED"
    return result


def _tried(subject, call):
    before, result = state(subject.model), subject.result
    try:
        getattr(subject, call)()
    except Exception as error:
        try:
            result.refused[call] = message = refusal(error)
            if "\n" in message:
                subject.blame(call, f"its error has more than one line: {message}")
        except Crash as crash:
            subject.blame(call, f"crashes: {crash}")
            result.crashed = True
    subject.unchanged(call, before, subject.model)
