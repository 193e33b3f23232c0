"""A small `KUnBRTrainer` run, in the process of a test or in one that it starts.

Usage: python trainer_runner.py '{"out": DIR, "save": FILE, "kill_after": N, "arguments": {...}, "config": {...}}' ...

Runs one after the other. kill_after: the process kills itself (SIGKILL) before its N-th training step. save: where
the main process writes the trained weights.
"""

import json
import os
import signal
import sys
import time

import torch
from safetensors.torch import save_file
from tiny_models import random_samples, tiny_model
from transformers import TrainingArguments

import kunbr_fast as kf
from kunbr_fast.integrations.hf_trainer import KUnBRTrainer
from kunbr_fast.run.state import RunState

CONFIG = dict(
    warmup_lr=1e-3, block_lr=1e-3, retain_coeff=1.5, warmup_epochs=2, block_epochs=2, num_blocks=3, top_k=2,
    skip_last_layers=1, retain_batch_size=4, max_retain_loss=1e9, rtt=False,
)  # fmt: skip
ARGUMENTS = dict(
    per_device_train_batch_size=4, lr_scheduler_type="constant", max_grad_norm=0.0, use_cpu=True, report_to=[],
    save_strategy="no", logging_steps=1, disable_tqdm=True,
)  # fmt: skip
STEPS = 3 * (2 + 2 * 2)  # 10 forget samples: 3 steps an epoch; the last has 2 samples


def data():
    return random_samples(10, seed=1, low=6), random_samples(12, seed=2, low=6)


def trainer(out, model=None, config=None, arguments=None, kind=KUnBRTrainer, **more):
    forget, retain = data()
    more = {"forget_dataset": forget, "retain_dataset": retain} | more
    return kind(
        model=tiny_model() if model is None else model,
        args=TrainingArguments(output_dir=str(out), **ARGUMENTS | (arguments or {})),
        config=kf.KUnBRConfig(**CONFIG | (config or {})),
        **more,
    )


def run(settings):
    ours = trainer(settings["out"], config=settings.get("config"), arguments=settings.get("arguments"))
    calls, step = 0, ours.training_step

    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == settings.get("kill_after"):
            os.kill(os.getpid(), signal.SIGKILL)
        return step(*args, **kwargs)

    ours.training_step = counted
    ours.train()
    if "save" in settings and ours.args.should_save:
        save_file({name: p.detach().clone() for name, p in ours.model.named_parameters()}, settings["save"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    if os.environ.get("RANK", "0") != "0":  # slow to read what the main process has written
        read = RunState._read
        RunState._read = lambda self: time.sleep(0.1) or read(self)
    for argument in sys.argv[1:]:
        run(json.loads(argument))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
