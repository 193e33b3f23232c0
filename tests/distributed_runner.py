"""Several processes of one run, as `torchrun` starts them. Usage: python distributed_runner.py DIR JOB...

Each JOB is a JSON object and runs after the one before it, on all processes:
{"name", "config": {...}, "given": bool, "resume": bool, "layers", "differs": {...}, "at": {"rank", "step", "does"}}
unlearns a small model; without "given" it makes its own M_u. "differs": settings that rank 1 has otherwise. "at":
what happens
on a rank before one of its updates: "kill" (SIGKILL) or "fail" (OSError).
{"density": [arguments of knowledge_density, ...], "attribute": [...], "name"} measures.

Writes DIR/NAME.safetensors (the weights) or DIR/NAME.RANK.json: {"updates", "error"} or what was measured.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny_models import random_samples, tiny_model

import kunbr_fast as kf
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


def run(job, out, group=ALONE):
    """(the model, how many updates this process has made of each stage)"""
    updates = []
    owners = {training.FullTraining: lambda t: "warmup", reinsertion.BlockTraining: lambda t: t.block.start}
    real = {owner: owner.update for owner in owners}
    at = job.get("at", {"rank": -1})

    def update(self, *args):
        updates.append(next(stage(self) for owner, stage in owners.items() if isinstance(self, owner)))
        if at["rank"] == group.rank and at["step"] == len(updates):
            if at["does"] == "fail":
                raise OSError("the disk of this machine is full")
            os.kill(os.getpid(), signal.SIGKILL)
        real[next(owner for owner in owners if isinstance(self, owner))](self, *args)

    config = CONFIG | job["config"] | (job.get("differs", {}) if group.rank == 1 else {})
    layers = {"num_hidden_layers": job.get("layers", 6)}
    model = tiny_model(**layers)
    try:
        for owner in owners:
            owner.update = update
        kf.unlearn(
            model,
            *data(config.get("objective") == "dpo"),
            kf.KUnBRConfig(**config),
            unlearned=tiny_model(seed=1, **layers) if job.get("given") else None,
            output_dir=Path(out) / job["name"],
            resume=job.get("resume", False),
            progress=False,
            group=group,
        )
    finally:
        for owner in owners:
            owner.update = real[owner]
    return model, updates


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
                    model, results[-1]["updates"] = run(job, out, group)
                except ValueError as error:
                    results[-1]["error"] = str(error)
                    continue
                if group.first:
                    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
                    save_file(weights, f"{out}/{job['name']}.safetensors")
    except (ProcessGone, OSError) as error:
        results[-1]["error"] = f"{type(error).__name__}: {error}"
    keep()


if __name__ == "__main__":
    main()
