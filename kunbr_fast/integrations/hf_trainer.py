"""KUnBR inside Hugging Face's Trainer (transformers 5): its loop, logs, checkpoints and processes around our stages.

    trainer = KUnBRTrainer(model, args, config=config, forget_dataset=forget, retain_dataset=retain)
    trainer.train()                # resume_from_checkpoint=True goes on where a run was killed
    trainer.save_model()

One `train()` is all stages in one row of Trainer's steps: the warm-up's epochs, then those of each visit of a block. All
of what a stage is comes from `kunbr_fast.unlearn.Stages`, and each step sees the samples that it sees in `kunbr_fast.unlearn`,
so the weights come out the same. Of Trainer's internals this relies on `_wrap_model` alone (called once before training;
what it returns, if not `self.model`, is not put into DistributedDataParallel), on `callback_handler.callbacks`, and on
trainer_state.json being the last file of a checkpoint.

Who computes what with several processes: each holds the whole model and prefix cache, takes its part of every step's
samples, and sums the gradients of what is trained (for a block one vector). The main process writes the stages' results
to `output_dir/kunbr`, a folder that all must see.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import itertools
import json
import logging
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import is_accelerate_available

if not is_accelerate_available():
    raise ImportError("KUnBRTrainer needs accelerate, as every Trainer does: pip install 'kunbr-fast[trainer]'")
from transformers import Trainer, TrainerCallback

from kunbr_fast.data import pack
from kunbr_fast.density.measure import Density
from kunbr_fast.files.tensors import WeightSnapshot
from kunbr_fast.model.frozen import frozen
from kunbr_fast.model.patch import fused
from kunbr_fast.model.prefix_cache import PrefixCache
from kunbr_fast.objectives.batch import Shares
from kunbr_fast.parallel.group import Group
from kunbr_fast.run.config import KUnBRConfig
from kunbr_fast.run.stages import Stages
from kunbr_fast.run.state import RunState, SharedState
from kunbr_fast.training.block import BlockTraining, block_tensors
from kunbr_fast.training.full import FullTraining
from kunbr_fast.training.shared import SharedStep

logger = logging.getLogger(__name__)


# ---------------------------------------------------------------- the stages


@dataclasses.dataclass(frozen=True)
class _Stage:
    """Trainer's steps `first` to `stop` (exclusive). Number 0 is the warm-up, n the n-th visit of a block."""

    number: int
    first: int
    stop: int


class _Stages(Stages):
    """The stages of `unlearn.Stages`, entered and left one by one; another's loop calls `backward`, `gather` and the optimiser."""

    def __init__(
        self,
        model: nn.Module,
        forget: list,
        retain: list,
        config: KUnBRConfig,
        tokenizer: Any,
        unlearned: Mapping[str, torch.Tensor] | None,
        work: Path,
        resume: bool,
        writes: bool,
        wait: Callable[[], None],
        rank: int,
        processes: int,
        autocast: Callable[[], contextlib.AbstractContextManager],
        progress: bool,
    ):
        def open_state(*arguments: Any) -> RunState:
            return SharedState(writes, wait, *arguments)

        questions = {"forget": [], "retain": []}
        super().__init__(
            model, forget, retain, config, tokenizer, unlearned, questions, [], work, resume, progress, logger.info,
            open_state,
        )  # fmt: skip
        self.rank, self.processes, self.writes, self.wait, self.autocast = rank, processes, writes, wait, autocast
        begun = {"unlearned_given": unlearned is not None}
        if (found := self.state.result("begin")) is None:
            self.state.finish("begin", begun)  # from here on the settings of the data are fixed
        elif found != begun:
            raise ValueError(f"{work}: this run was begun {'with' if unlearned is None else 'without'} unlearned=")
        self.stages: list[_Stage] = []
        self.steps_per_epoch = self._schedule(1, 0).steps_per_epoch
        epochs = [0 if unlearned is not None else config.warmup_epochs]
        epochs += [config.block_epochs] * config.rounds * config.top_k
        for number, stop in enumerate(itertools.accumulate(epochs)):
            first = self.stages[-1].stop if self.stages else 0
            stop *= self.steps_per_epoch
            if stop > first:
                self.stages.append(_Stage(number, first, stop))
        self.stage: _Stage | None = None
        self.training: FullTraining | BlockTraining | None = None
        self.blocks: list[range] | None = None
        self.measured: Density | None = None
        self.trained: dict[range, Mapping[str, torch.Tensor]] = {}
        self.cache: PrefixCache | None = None
        self._outer, self._inner = contextlib.ExitStack(), contextlib.ExitStack()
        self._step: SharedStep | None = None
        self.gathered: SharedStep | None = None  # what the next update is made from
        self._since_log: list[dict[str, float]] = []

    # ------------------------------------------------ from stage to stage

    def begin(self, steps: int) -> None:
        """Enters the stage in which the last of `steps` steps was done. The model must be the original."""
        if self.writes:
            WeightSnapshot.save(self.decoder.model, self.work / "original.safetensors")
        self.wait()
        self._outer.enter_context(frozen(self.decoder.model))
        if steps > self.stages[-1].stop:
            raise ValueError(f"a checkpoint of step {steps}, in a run of {self.stages[-1].stop} steps")
        present = next(stage for stage in self.stages if steps <= stage.stop)
        if present.number == 0:  # what a run that had come further has left is made again
            stages = self.state.state["stages"]
            self.state.state["stages"] = {name: stages[name] for name in ("begin", "reference") if name in stages}
        with self.autocast():
            self.measure_reference()
        for stage in self.stages[: self.stages.index(present)]:
            if stage.number:
                name, block = self._visit(stage)
                self.trained[block] = WeightSnapshot(self.state.file(name))
                if self.config.insertion == "cumulative":
                    self._place(self.trained[block])
        self._enter(present)

    def advance(self) -> None:
        """From a stage whose steps are all done to the next one."""
        following = self.stages[self.stages.index(self.stage) + 1]
        self._leave(complete=True)
        self._enter(following)

    def _visit(self, stage: _Stage) -> tuple[str, range]:
        """The name of a visit, and its block; M_u and density are made first where they are not yet there."""
        if self.blocks is None:
            if self.state.result("warmup") is None:
                self._take_unlearned()
            self.measured = self.density()
            self.blocks = self.select(self.measured)
            with self.autocast():
                self.measure_reference(self.blocks)
        round_, index = divmod(stage.number - 1, len(self.blocks))
        block = self.blocks[index]
        return f"blocks.{round_}.{block.start}-{block.stop}", block

    @functools.cached_property
    def _unlearned_weights(self) -> WeightSnapshot:
        return WeightSnapshot(self.state.file("warmup"))  # once: its checksum reads the whole model

    def _take_unlearned(self) -> None:
        """M_u's weights to work/warmup.safetensors, where no stage has made them."""
        own = dict(self.decoder.model.named_parameters())
        if self.given is not None:
            values = {name: value.to(own[name].dtype) for name, value in self.given.items() if name in own}
        elif self.stages[0].number:  # no epoch of warm-up
            values = own
        else:
            raise ValueError(f"{self.work}: the warm-up's result is missing: resume from a checkpoint of the warm-up")
        self.state.finish("warmup", {}, values)

    def _enter(self, stage: _Stage) -> None:
        config, model = self.config, self.decoder.model
        with contextlib.ExitStack() as stack:
            if stage.number == 0:
                self.on_stage(f"warm-up on all parameters, {config.warmup_epochs} epochs")
                stack.enter_context(frozen(model))
                stack.enter_context(fused(model, config.impl))
                self.training = self.full_training()
                self.block = None
            else:
                _, self.block = self._visit(stage)
                self.on_stage(
                    f"re-insertion of layers {self.block.start}-{self.block.stop - 1}, visit {stage.number} of "
                    f"{config.rounds * len(self.blocks)}"
                )
                if self.cache is None:
                    self.cache = self.prefix_cache(self.cached())
                with self.autocast():
                    self.cache.advance(self.block.start)
                source = self.trained.get(self.block) or self._unlearned_weights
                self._values = {name: source[name] for name in block_tensors(self.decoder, self.block)}
                self.training = stack.enter_context(self.block_training(self._values, self.block))
                self._values.clear()  # to be filled when the block leaves
            self._inner = stack.pop_all()
        epochs = config.block_epochs if stage.number else config.warmup_epochs
        self.stage, self.schedule = stage, self._schedule(epochs, stage.number)
        self.extra = {"epochs": [], "sums": None, "recent": []}

    def _leave(self, complete: bool) -> None:
        """Out of the present stage; with complete=False its result is used, but not recorded as the stage's."""
        stage, self.stage, self.training = self.stage, None, None
        result = {"epochs": self.extra["epochs"]}
        if stage.number == 0:
            if complete:
                self.state.finish("warmup", result, dict(self.decoder.model.named_parameters()))
            self._inner.close()
            if complete:
                WeightSnapshot(self.work / "original.safetensors").restore(self.decoder.model)
            return
        name, block = self._visit(stage)
        self._inner.close()
        self.trained[block] = self._values
        if complete:
            self.state.finish(name, result, self._values)
            self.trained[block] = WeightSnapshot(self.state.file(name))

    def end(self, steps: int) -> None:
        """The model becomes M_u with the blocks trained so far; after a part of the warm-up it stays as it is."""
        warming, complete = self.stage.number == 0, steps == self.stage.stop
        self._leave(complete)
        if complete or not warming:
            self.merge(self.trained)
        self._outer.close()
        self._remove_original()

    def abort(self) -> None:
        """After an exception: the model is the original again."""
        self.stage = None
        self._inner.__exit__(*sys.exc_info())
        original = self.work / "original.safetensors"
        if original.is_file():
            WeightSnapshot(original).restore(self.decoder.model)
        self._outer.close()

    def _remove_original(self) -> None:
        self.wait()
        if self.writes:
            (self.work / "original.safetensors").unlink()

    # ------------------------------------------------ steps

    def backward(self, step: int, micro: int, accumulation: int) -> torch.Tensor:
        """Adds the gradient of one of a step's `accumulation` micro-batches on this process. Returns its loss; the sum of
        all of a step's on all processes is the loss of the step."""
        step_samples = self.schedule[step - self.stage.first]
        part, parts = micro * self.processes + self.rank, accumulation * self.processes
        forget, retain = (x[part * len(x) // parts : (part + 1) * len(x) // parts] for x in step_samples)
        # the shares of this part's means in the step's means
        shares = Shares(*(len(x) / len(whole) for x, whole in zip((forget, retain), step_samples)))
        indices = self.members(self.training.criterion, forget, retain)
        if not indices:
            return torch.zeros((), device=self.decoder.device)
        if self._step is None:
            self._step = SharedStep(self.training)
        if self.block is None:
            batch = pack([self.samples[i] for i in indices]).to(self.decoder.device)
        else:
            batch = self.cache.batch(indices)
        step_batch = self.training.criterion.step_batch(batch, len(forget), self.original.batch(indices), shares)
        return self._step.add(step_batch, self.autocast())

    def gather(self, step: int) -> None:
        """After the last micro-batch: sums the gradients over the processes. Raises `Diverged`, with the weights as they
        were, if something is not finite or the retain loss beyond its limit."""
        self.gathered, self._step = self._step or SharedStep(self.training), None
        name = "warm-up" if self.block is None else f"block {self.block.start}-{self.block.stop - 1}"
        number = step - self.stage.first
        metrics = self.gathered.gather(Group(self.rank, self.processes), f"{name}, step {number}")
        self._account(name, number, self.schedule, metrics, self.extra)
        self._since_log.append(metrics)

    def logged(self, losses_too: bool) -> dict[str, float]:
        """Numbers alone, which every logger takes: the stage (0 the warm-up), the block's first and last layer, and, of
        the steps since the last time, the mean losses."""
        found: dict[str, float] = {"stage": self.stage.number}
        if self.block is not None:
            found |= {"first_layer": self.block.start, "last_layer": self.block.stop - 1}
        if losses_too and self._since_log:
            for name in ("forget_loss", "retain_loss"):
                values = [metrics[name] for metrics in self._since_log if metrics[name] is not None]
                if values:
                    found[name] = sum(values) / len(values)
            self._since_log = []
        return found

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps of the present stage, beside the model's weights."""
        tensors = self.training.state()
        if self.block is None:  # the weights are in the model's file
            tensors = {name: value for name, value in tensors.items() if name not in self.training.parameters}
        return {
            "stage": self.stage.number,
            "steps": self.training.steps,
            "lr": [group["lr"] for group in self.training.optimizer.param_groups],
            "tensors": tensors,
            "extra": self.extra,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if state["stage"] != self.stage.number:
            raise ValueError(f"optimizer.pt is of stage {state['stage']}, trainer_state.json of {self.stage.number}")
        self.training.load_state({**self.training.state(), **state["tensors"]}, state["steps"])
        for group, lr in zip(self.training.optimizer.param_groups, state["lr"]):
            group["lr"] = lr
        self.extra = state["extra"]


class _StageOptimizer(torch.optim.Optimizer):
    """The optimiser that Trainer holds throughout: that of whatever stage it is."""

    def __init__(self, stages: _Stages):  # torch's own would want parameters
        self._stages = stages

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        training = self._stages.training
        return [] if training is None else training.optimizer.param_groups

    @property
    def state(self) -> Mapping[torch.Tensor, Any]:
        return self._stages.training.optimizer.state

    def step(self, closure: Any = None) -> None:
        self._stages.gathered.apply()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing: `step` has done it, and a block's gradients are views that stay."""

    def state_dict(self) -> dict[str, Any]:
        return self._stages.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._stages.load_state_dict(state_dict)


class _AsItIs(nn.Module):
    """Trainer takes a wrapped model for one that needs no wrapping of its own."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.module = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Nothing, as in `_StageOptimizer`."""


class _MergeAtEnd(TrainerCallback):
    """The first of the callbacks, so that all others see the result when the training ends."""

    def __init__(self, end: Callable[[], None]):
        self._end = end

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._end()


# ---------------------------------------------------------------- the trainer


def _items(data: Any) -> list[Any]:
    """A data set as a list; where an item has two answers, its own is on top and the other under "alternate"."""
    items = [data[i] for i in range(len(data))] if hasattr(data, "__len__") else list(data)
    pairs = [isinstance(item, Mapping) and "original" in item for item in items]
    return [{**item["original"], "alternate": item["alternate"]} if pair else item for item, pair in zip(items, pairs)]


def _apart(data: Any, collator: Callable[[list], Any] | None) -> tuple[list[Any], list[Any]]:
    """The forget and retain samples of a data set of pairs, each different one once."""
    found: dict[str, dict[tuple, Any]] = {"forget": {}, "retain": {}}
    for number, item in enumerate(_items(data)):
        whole = isinstance(item, Mapping) and {"forget", "retain"} <= set(item)
        pair = item if whole or collator is None else collator([item])
        if not isinstance(pair, Mapping) or not {"forget", "retain"} <= set(pair):
            raise ValueError(
                f'train_dataset[{number}]: expected {{"forget": ..., "retain": ...}}, from the item itself or from '
                "data_collator([item]); or give forget_dataset= and retain_dataset="
            )
        for name, samples in found.items():
            (sample,) = _items([pair[name]])
            key = tuple(torch.as_tensor(sample[k]).numpy().tobytes() for k in ("input_ids", "labels"))
            samples.setdefault(key, sample)
    return list(found["forget"].values()), list(found["retain"].values())


def _global_step(checkpoint: Path) -> int:
    return json.loads((checkpoint / "trainer_state.json").read_text())["global_step"]


def _last_checkpoint(directory: str) -> Path:
    """The last one that was written to its end."""
    numbered = [(folder.name.rpartition("-")[2], folder) for folder in Path(directory).glob("checkpoint-*")]
    for _, folder in sorted(((int(n), f) for n, f in numbered if n.isdigit()), reverse=True):
        with contextlib.suppress(OSError, ValueError, KeyError):
            _global_step(folder)
            return folder
    raise ValueError(f"{directory} holds no whole checkpoint to resume from: leave resume_from_checkpoint out")


class _Epoch(torch.utils.data.Dataset):
    """Each micro-batch's number in its epoch; which samples that means is the schedule's business."""

    def __init__(self, num_samples: int):
        self.num_samples = num_samples

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, number: int) -> dict[str, int]:
        return {"number": number}


class KUnBRMixin:
    """What makes KUnBR of a Trainer: `class KUnBR(KUnBRMixin, SomeTrainer)`. See `KUnBRTrainer`."""

    def __init__(
        self,
        *args: Any,
        config: KUnBRConfig | Mapping[str, Any] | None = None,
        forget_dataset: Any = None,
        retain_dataset: Any = None,
        unlearned: nn.Module | Mapping[str, torch.Tensor] | None = None,
        **kwargs: Any,
    ):
        self._stages: _Stages | None = None
        super().__init__(*args, **kwargs)
        if (forget_dataset is None) != (retain_dataset is None):
            raise ValueError("give both forget_dataset and retain_dataset, or a train_dataset that holds both")
        if forget_dataset is None and self.train_dataset is None:
            raise ValueError("no data: give forget_dataset= and retain_dataset=, or train_dataset=")
        self._refuse()
        self.config = KUnBRConfig.from_dict(dict(config)) if isinstance(config, Mapping) else config or KUnBRConfig()
        if self.config.micro_batch_tokens is not None:
            raise ValueError(
                f"micro_batch_tokens={self.config.micro_batch_tokens}: here per_device_train_batch_size is what goes through at "
                "once, gradient_accumulation_steps times in a step: leave it out"
            )
        self.forget_dataset, self.retain_dataset, self.unlearned = forget_dataset, retain_dataset, unlearned
        self.density: Density | None = None
        self.blocks: list[range] | None = None
        epochs = self.config.rounds * self.config.top_k * self.config.block_epochs
        self.args = copy.copy(self.args)
        self.args.num_train_epochs = epochs + (self.config.warmup_epochs if unlearned is None else 0)
        self.args.ignore_data_skip = False
        self.callback_handler.callbacks.insert(0, _MergeAtEnd(self._merge))

    def _refuse(self) -> None:
        """What Trainer can do and this cannot: an error, so that nobody takes it for done."""
        args = self.args
        for given, what in (
            (args.fp16, "fp16: use bf16"),
            (self.is_deepspeed_enabled or self.is_fsdp_enabled, "DeepSpeed and FSDP: every process holds the model"),
            (args.n_gpu > 1, "several GPUs in one process: use accelerate launch, or set CUDA_VISIBLE_DEVICES"),
            (args.load_best_model_at_end, "load_best_model_at_end: a checkpoint holds a stage, not a result"),
            (args.label_smoothing_factor, "label_smoothing_factor"),
            (args.neftune_noise_alpha, "neftune_noise_alpha"),
            (args.auto_find_batch_size, "auto_find_batch_size"),
            (self.model_init is not None, "model_init: give the model"),
            (self.compute_loss_func is not None, "compute_loss_func: config.objective names the loss"),
            (
                self.optimizer is not None or self.optimizer_cls_and_kwargs is not None,
                "optimizers: config.warmup_optimizer and config.optimizer name them",
            ),
        ):
            if given:
                raise ValueError(f"{type(self).__name__} does not support {what}")

    # ------------------------------------------------ Trainer's hooks

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trainer's `train`, after which the model is M_u with its trained blocks. After an exception it is the original.

        Errors: ValueError for data or settings that do not fit, before anything is computed; `Diverged`."""
        checkpoint, steps = None, 0
        if resume_from_checkpoint:
            if resume_from_checkpoint is True:
                checkpoint = _last_checkpoint(self.args.output_dir)
            else:
                checkpoint = Path(resume_from_checkpoint)
            steps = _global_step(checkpoint)
        self._stages = stages = self._open(checkpoint is not None)
        try:
            stages.begin(steps)
            return super().train(None if checkpoint is None else str(checkpoint), *args, **kwargs)
        except BaseException:
            stages.abort()
            raise
        finally:
            self._stages, self.model_wrapped, self.is_in_train = None, self.model, False

    def _open(self, resume: bool) -> _Stages:
        args, accelerator = self.args, self.accelerator
        if self.forget_dataset is not None:
            forget, retain = _items(self.forget_dataset), _items(self.retain_dataset)
        elif hasattr(self.train_dataset, "forget") and hasattr(self.train_dataset, "retain"):
            forget, retain = (_items(part or []) for part in (self.train_dataset.forget, self.train_dataset.retain))
        else:
            forget, retain = _apart(self.train_dataset, self.data_collator)
        batch_size = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        config = dataclasses.replace(
            self.config,
            batch_size=batch_size,
            gradient_checkpointing=self.config.gradient_checkpointing
            or any(getattr(args, f"{kind}_checkpointing", False) for kind in ("gradient", "activation")),
        )
        work = Path(args.output_dir) / "kunbr"
        if args.should_save and not resume:
            shutil.rmtree(work, ignore_errors=True)
        if args.should_save:
            work.mkdir(parents=True, exist_ok=True)
        stages = _Stages(
            accelerator.unwrap_model(self.model, keep_fp32_wrapper=False),  # which an evaluation may have put on
            forget,
            retain,
            config,
            self.processing_class,
            self._checked_unlearned(),
            work,
            resume,
            writes=args.should_save,
            wait=accelerator.wait_for_everyone,
            rank=args.process_index,
            processes=args.world_size,
            autocast=accelerator.autocast,
            progress=not args.disable_tqdm and args.should_save,
        )
        if args.max_steps > stages.stages[-1].stop:
            raise ValueError(
                f"max_steps={args.max_steps}: all stages have {stages.stages[-1].stop} steps; leave it out, or lower it "
                "to stop earlier"
            )
        return stages

    def _checked_unlearned(self) -> Mapping[str, torch.Tensor] | None:
        given = self.unlearned
        given = dict(given.named_parameters()) if isinstance(given, nn.Module) else given
        for name, parameter in () if given is None else self.model.named_parameters():
            if name not in given or given[name].shape != parameter.shape:
                found = tuple(given[name].shape) if name in given else "missing"
                raise ValueError(f"unlearned: {name} is {found}, the model's is {tuple(parameter.shape)}")
            if not bool(given[name].isfinite().all()):
                raise ValueError(f"unlearned: {name} holds NaN or infinite values; its training diverged")
        return given

    def _merge(self) -> None:
        self._stages.end(self.state.global_step)
        self.density, self.blocks = self._stages.measured, self._stages.blocks
        if self.args.save_strategy == "no" and self.args.should_save:  # else a checkpoint may be resumed
            shutil.rmtree(self._stages.work)

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        count = self._stages.steps_per_epoch * self.args.gradient_accumulation_steps
        return torch.utils.data.DataLoader(
            _Epoch(len(self._stages.forget)), batch_sampler=[[i] for i in range(count)], collate_fn=_only
        )

    def create_optimizer(self, *args: Any) -> torch.optim.Optimizer:
        self.optimizer = _StageOptimizer(self._stages)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """A new one for each stage, over that stage's steps; args.lr_scheduler_type says which."""
        self.lr_scheduler = None
        stage = self._stages.stage
        return super().create_scheduler(stage.stop - stage.first, optimizer)

    def _wrap_model(self, model: nn.Module, training: bool = True, **kwargs: Any) -> nn.Module:
        return _AsItIs(self.model) if training else super()._wrap_model(model, training=False, **kwargs)

    def training_step(self, model: nn.Module, inputs: Mapping[str, int], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Forward and backward of one micro-batch; at the first of a stage, the change of stages before it."""
        stages, step, accumulation = self._stages, self.state.global_step, self.args.gradient_accumulation_steps
        if step == stages.stage.stop:
            stages.advance()
            self.create_scheduler(0)
            self.callback_handler.lr_scheduler = self.lr_scheduler
        if self.model.training:
            self.model.eval()  # no dropout, so that runs can be repeated
        micro = inputs["number"] % accumulation
        loss = stages.backward(step, micro, accumulation)
        if micro == accumulation - 1:
            stages.gather(step)
        return loss * self.args.world_size  # Trainer takes the mean over the processes

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self._stages is not None and self._stages.stage is not None and "train_runtime" not in logs:
            logs.update(self._stages.logged("loss" in logs))
        super().log(logs, *args, **kwargs)


def _only(items: list[Any]) -> Any:
    (item,) = items
    return item


class KUnBRTrainer(KUnBRMixin, Trainer):
    """Hugging Face's Trainer that makes a model forget by KUnBR.

        trainer = KUnBRTrainer(model, args, config=config, forget_dataset=forget, retain_dataset=retain)
        trainer.train()

    config: a `KUnBRConfig`, or a mapping of its settings, says what is done: stages, epochs, learning rates, optimisers,
    objective, order of the data. args (`TrainingArguments`) says how: per_device_train_batch_size times
    gradient_accumulation_steps times the processes are the forget samples of a step (config.batch_size is not read, nor
    are args' num_train_epochs, learning_rate, optim and weight_decay); max_grad_norm and lr_scheduler_type, the latter
    anew in each stage, do what they always do. With max_grad_norm=0 and lr_scheduler_type="constant" the weights are
    those of `kunbr_fast.unlearn`.

    forget_dataset, retain_dataset: data sets of {"input_ids", "labels"}, or records and a tokenizer as processing_class.
    Or train_dataset: one with both as attributes `forget` and `retain` (OpenUnlearning's), else its items are read once,
    as {"forget": ..., "retain": ...} or after data_collator has made that of each; different samples count once. Batches
    are made from these in kunbr_fast's own order, so that the prefix cache holds what every step needs.
    unlearned: an M_u of any method, a model or a state dict; then there is no warm-up.

    After `train()` the model is M_u with its trained blocks, `density` and `blocks` hold what was measured and chosen.
    While it trains the model is what the stage has: M_u in the making, or the original with the active block; so are the
    checkpoints, and what evaluations and callbacks see. Logs have `stage` (0: the warm-up, n: the n-th visit of a block),
    `first_layer`, `last_layer`, `forget_loss` and `retain_loss`.

    train(resume_from_checkpoint=True) goes on from the last whole checkpoint, to the same bits as without; it needs the
    original model, the same data and settings, and `output_dir/kunbr` with the results of earlier stages, which is kept
    unless save_strategy="no". A new training replaces that folder.

    Precision: a bf16 model keeps fp32 copies of the active block (config.master_weights); its warm-up has none. An fp32
    model with bf16=True keeps fp32 weights and computes under autocast. fp16, DeepSpeed and FSDP are refused.

    Errors: ValueError for what is not supported, here; for data and settings that do not fit, from `train`.
    """
