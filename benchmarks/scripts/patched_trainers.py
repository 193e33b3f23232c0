"""A training step of OpenUnlearning's trainers, plain and with +kunbr_fast.patch=true, in turn, and of fine-tuning
with and without `kf.patched`.

    python benchmarks/scripts/patched_trainers.py --checkout open-unlearning [--cases NPO RMU] [--csv FILE]
    python benchmarks/scripts/patched_trainers.py --checkout open-unlearning --weights [--csv FILE]

Real `train()` calls of `load_trainer`'s trainers, on a Llama with random weights (Llama-3.2-1B's shapes on a GPU, tiny
ones on a CPU) and batches of TOFU's form: 4 + 4 questions, prompts of 30 to 50 tokens, answers of 40 to 60, padded.
bf16 weights under autocast, AdamW, clipping, as its stock configuration; SDPA for FlashAttention. A round is one
`train()` of each side, the first is thrown away; ms is the median step (forward, backward, clipping, optimiser), ratio
the median over rounds of patched over plain. FLOPs, bytes kept for the backward pass and the peak above what was there
before are those of +kunbr_fast.measure=true. "first epoch": the reference model has not seen the sequences.

--weights instead: how far apart trained weights are, over how far training moved them: patched from plain, both in
bf16, and plain in bf16 from plain in fp32 (TF32 off). Without --checkout only fine-tuning is run, in HF's Trainer.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import gc
import importlib
import importlib.machinery
import importlib.util
import json
import statistics
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Any

import torch
import transformers

import kunbr_fast as kf
from kunbr_fast.benchmarks.measure import add_rows, percentile, script_parser
from kunbr_fast.benchmarks.models import build
from kunbr_fast.benchmarks.shapes import MODELS, Shape
from kunbr_fast.integrations import labelled_rows, open_unlearning

DOWN_PROJ = {"trainable_params_regex": [r"model\.layers\.(5|6|7)\.mlp\.down_proj\.weight"]}
RMU = {"module_regex": r"model\.layers\.7", "steering_coeff": 2, "retain_loss_type": "EMBED_DIFF"}
ALL = {"trainable_params_regex": [".*"]}
BLOCK = range(4, 8)


@dataclasses.dataclass(frozen=True)
class Case:
    """handler: of TRAINER_REGISTRY, None for fine-tuning: of `block` where one is given, of all weights otherwise."""

    handler: str | None
    method: dict[str, Any] = dataclasses.field(default_factory=dict)
    args: dict[str, Any] = dataclasses.field(default_factory=dict)
    first_epoch: bool = False
    block: range | None = None


CASES = {
    "GradAscent": Case("GradAscent"),
    "GradDiff": Case("GradDiff"),
    "GradDiff, KL": Case("GradDiff", {"retain_loss_type": "KL"}),
    "NPO": Case("NPO", {"beta": 0.1}),
    "NPO, first epoch": Case("NPO", {"beta": 0.1}, first_epoch=True),
    "SimNPO": Case("SimNPO", {"beta": 4.5, "gamma": 0.125}),
    "DPO": Case("DPO", {"beta": 0.1}),
    "RMU": Case("RMU", RMU | ALL),
    "RMU, 3 weights": Case("RMU", RMU | DOWN_PROJ, {"max_grad_norm": 0.0}),
    "UNDIAL": Case("UNDIAL", {"beta": 10.0}),
    "CEU": Case("CEU"),
    "SatImp": Case("SatImp"),
    "WGA": Case("WGA"),
    "PDU": Case("PDU"),
    "fine-tuning": Case(None),
    "fine-tuning, layers 4 to 7": Case(None, block=BLOCK),
}
TINY = Shape(64, 160, 10, 4, 2, 512, tied=True)
SMALL = Shape(256, 704, 8, 4, 2, 4096, tied=True)  # for --weights


# ---------------------------------------------------------------- data


def texts(rows: int, shape: Shape, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """A batch of prompts and answers, padded to the right."""
    draw = functools.partial(torch.randint, generator=generator)
    prompts, answers = draw(30, 51, (rows,)), draw(40, 61, (rows,))
    place = torch.arange(int((prompts + answers).max())).expand(rows, -1)
    mask = place < (prompts + answers)[:, None]
    ids = draw(3, shape.vocabulary, place.shape) * mask
    labels = torch.where(mask & (place >= prompts[:, None]), ids, -100)
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}


def batches(case: Case, count: int, rows: int, shape: Shape) -> list[dict]:
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(count):
        forget, retain = (texts(rows, shape, generator) for _ in range(2))
        if case.handler == "DPO":
            forget = {"original": forget, "alternate": texts(rows, shape, generator)}
        fine_tuning = case.handler is None
        found.append(texts(2 * rows, shape, generator) if fine_tuning else {"forget": forget, "retain": retain})
    return found


# ---------------------------------------------------------------- trainers


def registered(checkout: Path) -> types.ModuleType:
    """Its `trainer` package, as our launcher prepares it. RMU's file imports DeepSpeed for one isinstance."""
    if importlib.util.find_spec("deepspeed") is None:
        stand_in = types.ModuleType("deepspeed")
        stand_in.__spec__ = importlib.machinery.ModuleSpec("deepspeed", None)
        stand_in.DeepSpeedEngine = type("DeepSpeedEngine", (), {})
        sys.modules["deepspeed"] = stand_in
    sys.path.insert(0, str(checkout / "src" if (checkout / "src").is_dir() else checkout))
    package = importlib.import_module("trainer")
    open_unlearning.register(package)
    return package


class Steps(transformers.TrainerCallback):
    """Seconds of each step. forget: what a reference model has said of sequences is forgotten before each."""

    def __init__(self, trainer: transformers.Trainer, forget: bool):
        self.trainer, self.forget, self.seconds = trainer, forget, []

    @staticmethod
    def _now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_step_begin(self, *_, **__) -> None:
        reference = getattr(self.trainer, "ref_model", None)
        rows = None if reference is None else labelled_rows.of(reference)
        if self.forget and rows is not None and rows.known is not None:
            rows.known = labelled_rows.Known()
        self.begin = self._now()

    def on_step_end(self, *_, **__) -> None:
        self.seconds.append(self._now() - self.begin)


class Side:
    """One trainer, plain or patched, on a copy of `model`."""

    def __init__(self, package: Any, case: Case, patch: bool, model: Any, data: list, folder: Path, **args: Any):
        self.case, self.patch, self.model, self.folder = case, patch, copy.deepcopy(model), folder
        args = dict(
            output_dir=str(folder), per_device_train_batch_size=1, max_steps=len(data), remove_unused_columns=False,
            report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=not torch.cuda.is_available(),
            bf16=next(model.parameters()).dtype == torch.bfloat16, learning_rate=1e-5, weight_decay=0.01,
            lr_scheduler_type="constant", logging_strategy="no",
        ) | case.args | args  # fmt: skip
        given = dict(train_dataset=data, data_collator=lambda items: items[0])
        folder.mkdir(parents=True, exist_ok=True)
        if case.handler is None:
            if case.block is not None and not patch:
                self._freeze()
            kind = open_unlearning.adapted(transformers.Trainer, open_unlearning.Options(measure=True))
            self.trainer = kind(model=self.model, args=transformers.TrainingArguments(**args), **given)
        else:
            self.trainer = self._loaded(package, args, given)
        self.steps = Steps(self.trainer, case.first_epoch)
        self.trainer.add_callback(self.steps)

    def _loaded(self, package: Any, args: dict, given: dict) -> Any:
        from omegaconf import OmegaConf

        trainer = {"handler": self.case.handler, "args": args, "method_args": self.case.method}
        options = {"patch": self.patch, "measure": True}
        config = OmegaConf.create({"trainer": trainer, "kunbr_fast": options})
        return package.load_trainer(config.trainer, model=self.model, **given)[0]

    def _freeze(self) -> None:
        self.model.requires_grad_(False)
        for index in self.case.block:
            self.model.model.layers[index].requires_grad_(True)

    def train(self) -> float:
        """One run; its median step in seconds."""
        before = len(self.steps.seconds)
        with contextlib.ExitStack() as stack:
            if self.patch and self.case.handler is None:
                stack.enter_context(kf.patched(self.model, active_block=self.case.block))
            self.trainer.train()
        return statistics.median(self.steps.seconds[before:])

    def costs(self) -> dict[str, float]:
        return json.loads((self.folder / "kunbr_fast.json").read_text(encoding="utf-8"))

    def weights(self) -> torch.Tensor:
        return torch.cat([p.detach().flatten().double().cpu() for p in self.model.parameters()])


# ---------------------------------------------------------------- rows

NAMES = {"plain": False, "patched": True}
COSTS = (("flops", "tflop", 1e12), ("saved_bytes", "kept_mib", 2**20), ("peak_bytes", "peak_mib", 2**20))


def timed(package: Any, name: str, model: Any, shape: Shape, options: Any, folder: Path) -> dict[str, Any]:
    case = CASES[name]
    data = batches(case, options.steps, options.rows, shape)
    sides = {patch: Side(package, case, patch, model, data, folder / f"{patch}") for patch in (False, True)}
    rounds: list[dict[bool, float]] = []
    for number in range(options.rounds + 1):
        found = {patch: sides[patch].train() for patch in ((False, True) if number % 2 else (True, False))}
        if number:  # the first one compiles, and is measured
            rounds.append(found)
    ratios = [found[True] / found[False] for found in rounds]
    before, after = sides[False].costs(), sides[True].costs()
    row: dict[str, Any] = {"benchmark": "patched_trainers", "trainer": name, "model": options.model}
    row |= {"dtype": str(model.dtype).removeprefix("torch."), "rows": options.rows, "rounds": len(rounds)}
    row |= {f"{side}_ms": round(1e3 * statistics.median(f[patch] for f in rounds), 3) for side, patch in NAMES.items()}
    row |= {"ratio": round(percentile(ratios, 0.5), 3), "ratio_p20": round(percentile(ratios, 0.2), 3)}
    row |= {"ratio_p80": round(percentile(ratios, 0.8), 3)}
    for key, unit, size in COSTS:
        row |= {f"plain_{unit}": round(before[key] / size, 6), f"patched_{unit}": round(after[key] / size, 6)}
        row |= {f"{unit}_ratio": round(after[key] / before[key], 3)}
    return row


def apart(package: Any, name: str, model: Any, shape: Shape, options: Any, folder: Path) -> dict[str, Any]:
    """model: in fp32, with weights that bf16 holds."""
    case, weights = CASES[name], {}
    data = batches(case, options.steps, options.rows, shape)
    start = torch.cat([p.detach().flatten().double().cpu() for p in model.parameters()])
    lower = copy.deepcopy(model).to(torch.bfloat16)
    how = {"optim": options.optim, "learning_rate": options.lr}
    for label, base, patch in (("fp32", model, False), ("bf16", lower, False), ("patched", lower, True)):
        torch.manual_seed(0)  # RMU draws its control vector, and the order of batches is drawn
        side = Side(package, case, patch, base, data, folder / label, **how)
        side.train()
        weights[label] = side.weights()
    moved = (weights["bf16"] - start).norm()
    distances = {"patched_from_plain": weights["patched"], "bf16_from_fp32": weights["fp32"]}
    row: dict[str, Any] = {"benchmark": "patched_weights", "trainer": name, "optim": options.optim, "lr": options.lr}
    row |= {"steps": options.steps, "moved": f"{moved:.2e}"}
    return row | {key: f"{float((x - weights['bf16']).norm() / moved):.1e}" for key, x in distances.items()}


def parsed(arguments: list[str] | None) -> Any:
    gpu = torch.cuda.is_available()
    parser = script_parser(__doc__)
    parser.add_argument("--checkout", type=Path, help="of OpenUnlearning, or its src/")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), metavar="CASE")
    parser.add_argument("--model", default="Llama-3.2-1B" if gpu else "tiny", choices=[*MODELS, "tiny", "small"])
    parser.add_argument("--rows", type=int, default=4, help="questions to forget in a batch, and as many to retain")
    parser.add_argument("--steps", type=int, default=6, help="of one train()")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--weights", action="store_true", help="how far apart weights in bf16 are")
    parser.add_argument("--optim", default="sgd", help="of --weights")
    parser.add_argument("--lr", type=float, default=1.0, help="of --weights")
    options = parser.parse_args(arguments)
    own = [name for name, case in CASES.items() if case.handler is None or options.checkout is not None]
    options.cases = options.cases or own
    if missing := [name for name in options.cases if name not in own]:
        parser.error(f"{missing[0]} is OpenUnlearning's: --checkout FOLDER names its checkout")
    return options


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    options = parsed(arguments)
    package = None if options.checkout is None else registered(options.checkout.resolve())
    shape = {"tiny": TINY, "small": SMALL}.get(options.model) or MODELS[options.model]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    wide = options.weights or device == "cpu"
    torch.manual_seed(0)
    name = options.model if options.model in MODELS else "Llama"
    model = build(name, torch.float32 if wide else torch.bfloat16, device, shape)
    if options.weights:
        model = model.to(torch.bfloat16).float()
    rows = []
    for case in options.cases:
        with tempfile.TemporaryDirectory() as folder:
            row = (apart if options.weights else timed)(package, case, model, shape, options, Path(folder))
        print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        rows.append(row)
        add_rows(options.csv, [row], device)
        gc.collect()
        torch.cuda.empty_cache()
    return rows


if __name__ == "__main__":
    main()
