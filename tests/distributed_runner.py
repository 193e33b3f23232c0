"""Several processes of one run, as `torchrun` starts them. Usage: python distributed_runner.py DIR JOB...

Each JOB is a JSON object and runs after the one before it, on all processes:
{"name", "config": {...}, "given": bool, "resume": bool, "layers", "differs": {...}, "at": {"rank", "step", "does"}}
unlearns a small model; without "given" it makes its own M_u. "differs": settings that rank 1 has otherwise. "at":
what happens
on a rank before one of its updates: "kill" (SIGKILL) or "fail" (OSError).
{"density": [arguments of knowledge_density, ...], "attribute": [...], "name"} measures.

Writes DIR/NAME.safetensors (the weights) or DIR/NAME.RANK.json: {"updates", "error", ...} or what was measured.
"""

import json
import operator
import os
import signal
import sys
from pathlib import Path

import tiny_text
import torch
from safetensors.torch import save_file
from tiny_models import random_samples, tiny_model

import kunbr_fast as kf
from kunbr_fast.evaluation.rtt import Fold
from kunbr_fast.memory import OutOfMemory
from kunbr_fast.model.ownership import has_hooks
from kunbr_fast.parallel.group import ALONE, ProcessGone, joined
from kunbr_fast.training import block as reinsertion
from kunbr_fast.training import full as training

CONFIG = dict(
    batch_size=6, retain_batch_size=4, retain_coeff=1.5, warmup_epochs=1, warmup_lr=1e-3, num_blocks=3, top_k=2,
    skip_last_layers=1, block_epochs=2, block_lr=1e-3, max_retain_loss=1e9, checkpoint_every=1, seed=3, rtt=False,
)  # fmt: skip
MEASURES = [{}, {"sample_fraction": 0.4, "statistic": "grad_l2sq"}, {"reduction": "mean"}, {"statistic": "cosine"}]


def data(alternates=False):
    forget, retain = random_samples(10, seed=1, low=6), random_samples(9, seed=2, low=6)
    if alternates:
        forget = [{**f, "alternate": a} for f, a in zip(forget, random_samples(10, seed=4, low=6))]
    return forget, retain


def text(config):
    """(model, data and keywords of `unlearn`) of questions."""
    folds = [[tiny_text.question(n) for n in tiny_text.NAMES[i : i + 4]] for i in (0, 4)]
    retain = [tiny_text.question(n) for n in tiny_text.NAMES[12:18]]
    given = {"tokenizer": tiny_text.tokenizer(), "folds": [Fold(f"fold {i}", f, f) for i, f in enumerate(folds)]}
    return tiny_text.model(dtype=torch.float64), (sum(folds, []), retain), given


def run(job, out, group=ALONE):
    """(the model, how many updates this process has made of each stage)"""
    model, found = carry_out(job, out, group)
    return model, found["updates"]


def carry_out(job, out, group=ALONE):
    """(the model, what this process has seen)"""
    updates, held, weights, stop = [], [], [], kf.Stop()
    owners = {training.FullTraining: lambda t: "warmup", reinsertion.BlockTraining: lambda t: t.block.start}
    real, real_loss = {owner: owner.update for owner in owners}, training.FullTraining.loss
    at = job.get("at", {"rank": -1})

    def update(self, *args):
        updates.append(next(stage(self) for owner, stage in owners.items() if isinstance(self, owner)))
        if at["rank"] == group.rank and at["step"] == len(updates):
            if at["does"] == "fail":
                raise OSError("the disk of this machine is full")
            if at["does"] == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            stop.requested = at["does"] == "stop"
        real[next(owner for owner in owners if isinstance(self, owner))](self, *args)
        state = [x for values in self.optimizer.state.values() for x in values.values()]
        held.append(sum(x.numel() for x in state if torch.is_tensor(x) and x.dim()))
        weights.append(sum(getattr(p, "_local_tensor", p).numel() for p in model.parameters()))

    def loss(self, step):
        if at["rank"] == group.rank and at["does"] == "memory" and at["step"] == len(updates):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real_loss(self, step)

    config = CONFIG | job["config"] | (job.get("differs", {}) if group.rank == 1 else {})
    layers, more = {"num_hidden_layers": job.get("layers", 6)}, {}
    if job.get("text"):
        model, sets, more = text(config)
    else:
        model, sets = tiny_model(**layers), data(config.get("objective") == "dpo")
    parameters = list(model.parameters())
    try:
        for owner in owners:
            owner.update = update
        training.FullTraining.loss = loss
        report = kf.unlearn(
            model,
            *sets,
            kf.KUnBRConfig(**config),
            unlearned=tiny_model(seed=1, **layers) if job.get("given") else None,
            output_dir=Path(out) / job["name"],
            resume=job.get("resume", False),
            progress=False,
            group=group,
            stop=stop,
            **more,
        )
    except kf.Stopped:  # before any block is in place
        assert all(map(torch.equal, model.parameters(), tiny_model(**layers).parameters()))
        raise
    finally:
        for owner in owners:
            owner.update = real[owner]
        training.FullTraining.loss = real_loss
        assert all(map(operator.is_, model.parameters(), parameters)) and not any(map(has_hooks, model.modules()))
    rows = report.rtt.curves if report.rtt else None
    return model, {"updates": updates, "held": held, "weights": weights, "rtt": rows, "accuracy": report.accuracy}


def measure(job, group=ALONE):
    model, (forget, retain) = tiny_model(), data()
    forget = forget[: job.get("samples", 10)]
    found = []
    for settings in job["density"]:
        more = {"retain": retain} if settings.get("statistic") == "cosine" else {}
        density = kf.knowledge_density(model, forget, **settings, **more, group=group)
        found.append({k: v for k, v in density.to_dict().items() if k in ("per_layer", "per_module", "standard_error")})
    scores = kf.attribute(model, forget, retain, "wagle", blocks=[range(2, 4)], group=group).scores
    return found, {path: value.double().sum().item() for path, value in scores.items()}


def main():
    torch.set_num_threads(1)
    out, *jobs = sys.argv[1:]
    jobs, results = [json.loads(job) for job in jobs], []

    def keep():
        for job, result in zip(jobs, results):
            Path(out, f"{job['name']}.{os.environ['RANK']}.json").write_text(json.dumps(result))

    try:
        with joined() as group:
            for job in jobs:
                keep()
                results.append({})
                if "density" in job:
                    results[-1]["density"], results[-1]["attribute"] = measure(job, group)
                    continue
                try:
                    model, results[-1] = carry_out(job, out, group)
                except (ValueError, kf.Stopped) as error:
                    results[-1]["error"] = str(error) or type(error).__name__
                    continue
                if group.first:
                    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
                    save_file(weights, f"{out}/{job['name']}.safetensors")
    except (ProcessGone, OSError, OutOfMemory) as error:
        results[-1]["error"] = f"{type(error).__name__}: {error}"
    keep()


if __name__ == "__main__":
    main()
