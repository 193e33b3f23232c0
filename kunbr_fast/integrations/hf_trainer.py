"""KUnBR inside Hugging Face's Trainer (transformers 5): its loop, logs, checkpoints and processes around our stages.

One `train()` is all stages in one row of Trainer's steps: the warm-up's epochs, then those of each visit of a block, in
the order of `run.visits`. The stages are those of `kunbr_fast.unlearn` (`driven_stages`) and each step sees the same
samples, so the weights are the same. Trainer's internals that this relies on: `_wrap_model` (called once before
training; a model that it returns wrapped gets no DistributedDataParallel), `callback_handler.callbacks`,
`_maybe_log_save_evaluate` (after each step), `_save_checkpoint` and `_save`, and trainer_state.json being the last file
of a checkpoint. Beside this file: `trainer_arguments` (which of TrainingArguments do what), `trainer_data` (what is
given), `trainer_loop` (what stands in the loop), `trainer_checkpoints` (what is read of checkpoints).

With several processes each holds the whole model and prefix cache, takes its part of every step's samples, and sums the
gradients of what is trained (for a block one vector). The main process writes the stages' results to
`output_dir/kunbr-checkpoints`, a folder that all must see.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import is_accelerate_available

if not is_accelerate_available():
    raise ImportError("KUnBRTrainer needs accelerate, as every Trainer does: pip install 'kunbr-fast[trainer]'")
from transformers import PreTrainedModel, Trainer

from kunbr_fast.density.measure import Density
from kunbr_fast.evaluation.folds import Fold
from kunbr_fast.evaluation.report import Report
from kunbr_fast.files.lock import hold
from kunbr_fast.files.model_folder import within
from kunbr_fast.files.saving import save_model
from kunbr_fast.files.shown import plain, shown
from kunbr_fast.integrations.driven_stages import DrivenStages, StageOptimizer
from kunbr_fast.integrations.stage_steps import epochs_of_stages
from kunbr_fast.integrations.trainer_arguments import (
    begin_anew,
    check_schedules,
    check_target,
    for_stage,
    in_arguments,
    not_read,
    of_weights,
    refuse,
    refuse_fields,
    refuse_settings,
    take_up,
    unreached,
)
from kunbr_fast.integrations.trainer_checkpoints import Result, check_resumable, global_step, last_checkpoint
from kunbr_fast.integrations.trainer_data import (
    Asked,
    Records,
    as_config,
    as_named_here,
    check_tokenizer,
    forget_and_retain,
)
from kunbr_fast.integrations.trainer_loop import AsItIs, Epoch, First, Last
from kunbr_fast.model.ownership import check_data, no_adapter, trainable, uncompiled
from kunbr_fast.model.weights import weights_of
from kunbr_fast.parallel.group import Group
from kunbr_fast.run.config import KUnBRConfig
from kunbr_fast.run.context import RunContext, RunInputs
from kunbr_fast.run.folder import NAME, CheckpointFolder
from kunbr_fast.run.output import write_reports
from kunbr_fast.run.reporter import Reporter

logger = logging.getLogger(__name__)


def _owned(args: tuple, kwargs: dict[str, Any], name: str) -> tuple[tuple, dict[str, Any]]:
    """A Trainer's arguments, its model `trainable` and without torch.compile's wrapper, whose names of the weights
    would be those of the saved file."""
    model = args[0] if args else kwargs.get("model")
    if not isinstance(model, (nn.Module, str, Path)):
        return args, kwargs
    model = uncompiled(model)
    trainable(model, name)
    return ((model, *args[1:]), kwargs) if args else (args, {**kwargs, "model": model})


class KUnBRMixin:
    """What makes KUnBR of a Trainer: `class KUnBR(KUnBRMixin, SomeTrainer)`. See `KUnBRTrainer`."""

    _for_checkpoint = False  # whether a training's checkpoint is being saved

    def __init__(
        self,
        *args: Any,
        config: KUnBRConfig | Mapping[str, Any] | None = None,
        forget_dataset: Any = None,
        retain_dataset: Any = None,
        unlearned: nn.Module | Mapping[str, torch.Tensor] | None = None,
        folds: Sequence[Fold | str | Path] | None = None,
        forget_questions: Records | None = None,
        retain_questions: Records | None = None,
        **kwargs: Any,
    ):
        self._stages: DrivenStages | None = None
        self._folder: CheckpointFolder | None = None
        args, kwargs = _owned(args, as_named_here(kwargs), type(self).__name__)
        refuse_fields((*args, *kwargs.values()), type(self).__name__)
        super().__init__(*args, **kwargs)
        if (forget_dataset is None) != (retain_dataset is None):
            raise ValueError("give both forget_dataset and retain_dataset, or a train_dataset that holds both")
        if forget_dataset is not None and self.train_dataset is not None:
            raise ValueError("train_dataset beside forget_dataset and retain_dataset would not be read: leave it out")
        if forget_dataset is None and self.train_dataset is None:
            raise ValueError("no data: give forget_dataset= and retain_dataset=, or train_dataset=")
        refuse(self, KUnBRMixin)
        self.config = as_config(config)
        refuse_settings(self.config)
        self.forget_dataset, self.retain_dataset, self.unlearned = forget_dataset, retain_dataset, unlearned
        explicit = isinstance(config, Mapping) and "rtt" in config
        self.asked = Asked.of(folds, forget_questions, retain_questions, self.config, explicit)
        check_tokenizer(self.processing_class, self.asked.texts)
        self.report: Report | None = None
        self.density: Density | None = None
        self.blocks: list[range] | None = None
        self._result, self._told = Result(), set()
        self._warn(not_read(self.args, self.config, unlearned is None))
        self.args = copy.copy(self.args)
        self.args.num_train_epochs = sum(epochs_of_stages(self.config, unlearned is None))
        self.args.ignore_data_skip = False
        self.callback_handler.callbacks.insert(0, First(self._begun, self._merge))

    def _warn(self, text: str | None) -> None:
        if text and text not in self._told and self.is_world_process_zero():
            self._told.add(text)
            logger.warning("%s: %s", type(self).__name__, text)

    # ------------------------------------------------ Trainer's hooks

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trainer's `train`, after which the model is M_u with its trained blocks. After an exception, also one of a
        callback at the end, it is the original.

        Errors: ValueError for data or settings that do not fit, before anything is computed; `Diverged`."""
        checkpoint, steps, self.report = None, 0, None
        if resume_from_checkpoint:
            if resume_from_checkpoint is True:
                checkpoint = last_checkpoint(self.args.output_dir)
            else:
                checkpoint = Path(resume_from_checkpoint)
            steps = global_step(checkpoint)
            check_resumable(checkpoint)
        resume = checkpoint is not None
        with self._checkpoint_folder(resume) as self._folder:
            with in_arguments():
                self._stages = stages = self._open(resume)
            try:
                with self._result.awaited(lambda: self.state.global_step), self._stepping(steps):
                    with in_arguments():
                        stages.begin(steps)
                    output = super().train(None if checkpoint is None else str(checkpoint), *args, **kwargs)
            except BaseException:
                stages.abort()
                raise
            finally:
                self._stages, self.model_wrapped, self.is_in_train = None, self.model, False
            self._clean(stages)
        output.metrics.update({} if self.report is None else self.report.figures)
        return output

    @contextlib.contextmanager
    def _stepping(self, done: int) -> Iterator[None]:
        """Inside, Trainer's loop has as many steps as the stages, of which so many are done."""
        stages, args, last = self._stages, self.args, Last()
        check_schedules(args, self.config, stages.planned)
        self._warn(stages.shared)
        self._warn(unreached(args, sum(stages.planned.values())))
        if args.save_only_model and args.save_strategy != "no":
            self._warn("save_only_model=True: no checkpoint of this training can be resumed")
        steps, each, asked = stages.spans[-1].stop, stages.steps_per_epoch, (args.max_steps, args.num_train_epochs)
        # max_steps would make a loop of one more epoch, in which a training whose steps are all done makes another one
        args.max_steps = steps if steps % each and done < steps else -1
        args.num_train_epochs = steps // each + (args.max_steps > 0)
        self.callback_handler.callbacks.append(last)
        try:
            yield
        finally:
            self.callback_handler.callbacks.remove(last)
            args.max_steps, args.num_train_epochs = asked

    @contextlib.contextmanager
    def _checkpoint_folder(self, resume: bool) -> Iterator[CheckpointFolder | None]:
        """Of the process that writes."""
        if not self.args.should_save:
            yield None
            return
        with hold(self.args.output_dir, logger.info), CheckpointFolder(self.args.output_dir) as folder:
            with in_arguments():
                folder.begin(resume, forget=not resume)
            yield folder

    def _open(self, resume: bool) -> DrivenStages:
        args, accelerator = self.args, self.accelerator
        forget, retain = forget_and_retain(
            self.forget_dataset, self.retain_dataset, self.train_dataset, self.data_collator
        )
        check_target(self.config, forget, retain)
        if args.bf16_full_eval or args.fp16_full_eval:  # Trainer then moves no model before it trains
            self._move_model_to_device(self.model, args.device)
        check_tokenizer(self.processing_class, {"the forget set": forget, "the retain set": retain})
        asked = self.asked.questions(forget, retain, self.config)
        batch_size = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        config = dataclasses.replace(
            self.config,
            batch_size=batch_size,
            gradient_checkpointing=self.config.gradient_checkpointing
            or any(getattr(args, f"{kind}_checkpointing", False) for kind in ("gradient", "activation")),
        )
        reporter = Reporter(not args.disable_tqdm and args.should_save, logger.info)
        # an evaluation may have put a wrapper on
        model = accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        trainable(model, type(self).__name__)
        _apart(Path(args.output_dir), model, "output_dir")
        given = self.processing_class, self._checked_unlearned(), asked, self.asked.folds
        inputs = RunInputs(model, forget, retain, *given)
        sharing = {"writes": args.should_save, "wait": accelerator.wait_for_everyone}
        context = RunContext(Path(args.output_dir) / NAME, reporter=reporter, resume=resume, **sharing)
        ranks = Group(args.process_index, args.world_size)
        shared = None if args.max_steps < 0 else args.max_steps
        stages = DrivenStages(inputs, config, context, ranks, accelerator.autocast, shared, of_weights(args))
        if stages.changed:
            said = ", ".join(f"{name}={now} (it was {was})" for name, (was, now) in stages.changed.items())
            logger.warning("this training was begun with other arguments; from here on it goes on with %s", said)
        return stages

    def _checked_unlearned(self) -> Mapping[str, torch.Tensor] | None:
        given = self.unlearned
        if not isinstance(given, (nn.Module, Mapping, type(None))):
            raise ValueError(f"unlearned: got {shown(given)}, expected a model or its state dict: load it first")
        if isinstance(given, nn.Module):
            given = uncompiled(given)
            no_adapter(given, type(self).__name__, "the unlearned model")
            given = dict(given.named_parameters())
        for name, parameter in () if given is None else self.model.named_parameters():
            if name not in given or given[name].shape != parameter.shape:
                found = tuple(given[name].shape) if name in given else "missing"
                raise ValueError(
                    f"unlearned: {name} is {found}, the model's is {tuple(parameter.shape)}: give one that was made "
                    "from this model"
                )
            check_data(f"unlearned: {name}", given[name])
            if not bool(given[name].isfinite().all()):
                raise ValueError(f"unlearned: {name} holds NaN or infinite values; its training diverged")
        return given

    def _begun(self, state: Any) -> None:
        state.max_steps = self._stages.spans[-1].stop  # of one that is resumed, too
        (take_up if state.global_step else begin_anew)(self)

    def _merge(self) -> None:
        self._stages.end(self.state.global_step)
        self.density, self.blocks = self._stages.measured, self._stages.blocks
        self.report = self._stages.prove()
        self._result.there()
        if self.report is not None and (found := self.report.figures):
            self.log(found)

    def _take_stop(self) -> None:
        """Who stops the training ends its present stage."""
        control, stages, step = self.control, self._stages, self.state.global_step
        if control.should_epoch_stop:
            control.should_epoch_stop = False
            self._warn("a callback stops the epoch, which changes nothing: should_training_stop ends a stage")
        if control.should_training_stop:
            if stages.at.first < step < stages.at.stop:
                self._warn(stages.end_stage(step))
                self.state.max_steps = stages.spans[-1].stop
            control.should_training_stop = step >= self.state.max_steps

    def _clean(self, stages: DrivenStages) -> None:
        """What is left to remove when the result is there; files that stay are no reason to lose it."""
        try:
            stages.close()
            if self._folder is not None and self.args.save_strategy == "no":  # else a checkpoint may be resumed
                self._folder.end(logger.info)
        except OSError as error:
            logger.warning("the training is done, but %s could not be removed (%s): delete it", stages.work, error)

    def get_train_dataloader(self) -> torch.utils.data.DataLoader:
        count = self._stages.steps_per_epoch * self.args.gradient_accumulation_steps
        return torch.utils.data.DataLoader(
            Epoch(len(self._stages.samples.forget)),
            batch_sampler=[[i] for i in range(count)],
            collate_fn=lambda items: items[0],
        )

    def create_optimizer(self, *args: Any) -> torch.optim.Optimizer:
        self.optimizer = StageOptimizer(self._stages)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """A new one for each stage, over that stage's steps; args.lr_scheduler_type says which."""
        self.lr_scheduler, own = None, self.args
        steps, whole = self._stages.at.steps, sum(self._stages.planned.values())
        self.args = for_stage(own, steps, whole)
        try:
            return super().create_scheduler(steps, optimizer)
        finally:
            self.args = own

    def _wrap_model(self, model: nn.Module, training: bool = True, **kwargs: Any) -> nn.Module:
        return AsItIs(self.model) if training else super()._wrap_model(model, training=False, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's. The first one moves the model to accelerate's device, which for several processes on CPUs is
        "cpu:0" and so copies every weight: a block's, out of the buffer that its optimiser updates. While it trains the
        model is where it should be."""
        accelerator, training = self.accelerator, self._stages is not None
        placement = accelerator.device_placement
        accelerator.device_placement = placement and not training
        try:
            return super().evaluation_loop(*args, **kwargs)
        finally:
            accelerator.device_placement = placement

    def training_step(self, model: nn.Module, inputs: Mapping[str, int], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Forward and backward of one micro-batch; at the first of a stage, the change of stages before it."""
        stages, step, accumulation = self._stages, self.state.global_step, self.args.gradient_accumulation_steps
        if step == stages.at.stop:
            stages.advance()
            begin_anew(self)
            self.create_scheduler(stages.at.steps)
            self.callback_handler.lr_scheduler = self.lr_scheduler
        if self.model.training:
            self.model.eval()  # no dropout, so that runs can be repeated
        micro = inputs["number"] % accumulation
        loss = stages.backward(step, micro, accumulation)
        if micro == accumulation - 1:
            stages.gather(step)
        return loss * self.args.world_size  # Trainer takes the mean over the processes

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        if self._stages is not None:
            self._take_stop()  # so that the state knows of it before the checkpoint is there
            self._stages.check()
        super()._save_checkpoint(*args, **kwargs)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self._take_stop()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Trainer's `save_model`, by `files.saving.save_model`: in the form of the model's own folder, and read back
        before it takes its place, and beside it `report`, as `kunbr-fast unlearn` writes it. A ValueError leaves what
        is there as it was, and the model in memory; so does one for a model that is no result: of a training that did
        not come to its end."""
        self._for_checkpoint = _internal_call and output_dir is not None
        if not self._for_checkpoint:
            self._result.check(self.args.output_dir if output_dir is None else output_dir)
        try:
            super().save_model(output_dir, _internal_call)
        finally:
            self._for_checkpoint = False
        if self.report is not None and self.args.should_save and not _internal_call:
            name = getattr(self.model.config, "name_or_path", "") or type(self.model).__name__
            write_reports(output_dir or self.args.output_dir, self.report, name)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """What Trainer's `_save` writes. Checkpoints of a training are its own, and so is what is no plain model."""
        model = uncompiled(self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False))
        ours = isinstance(model, PreTrainedModel) and super()._save.__func__ is Trainer._save
        if self._for_checkpoint or state_dict is not None or not (ours and self.args.should_save):
            super()._save(output_dir, state_dict)
            return
        out = Path(self.args.output_dir if output_dir is None else output_dir)
        _apart(out, model, "save_model")
        tokenizer = self.processing_class or getattr(self.data_collator, "tokenizer", None)
        save_model(model, tokenizer, out, replace=True)
        torch.save(self.args, out / "training_args.bin")

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self._stages is not None and self._stages.at is not None and "train_runtime" not in logs:
            logs.update(self._stages.logged("loss" in logs))
        super().log(logs, *args, **kwargs)


def _apart(out: Path, model: nn.Module, what: str) -> None:
    """ValueError where `out` is the folder that the model was loaded from: the original would be lost."""
    source = weights_of(model).directory
    if source is not None and within(out, source):
        raise ValueError(
            f"{what}: {plain(out)} is the folder of the original model, or lies in it, which is never overwritten: "
            "give another one"
        )


class KUnBRTrainer(KUnBRMixin, Trainer):
    """Hugging Face's Trainer that makes a model forget by KUnBR.

        trainer = KUnBRTrainer(model, args, config=config, forget_dataset=forget, retain_dataset=retain)
        trainer.train()

    config: a `KUnBRConfig`, or a mapping of its settings, says what is done: stages, epochs, learning rates,
    optimisers, objective, order of the data. args (`TrainingArguments`) says how: per_device_train_batch_size times
    gradient_accumulation_steps times the processes are the forget samples of a step; max_steps is shared by the
    stages, and lr_scheduler_type begins anew in each, with its share of the warm-up. What is not read (learning_rate,
    optim, seed, ...) is told, with the setting that counts: docs/integrations.md has them all. With max_grad_norm=0 and
    lr_scheduler_type="constant" the weights are those of `kunbr_fast.unlearn`. A callback that stops ends its stage.

    forget_dataset, retain_dataset: data sets of {"input_ids", "labels"}, or records and a tokenizer as
    processing_class (or by its old name, tokenizer). Or train_dataset: a mapping with both as `forget` and `retain` (a
    DatasetDict), or with both as attributes (OpenUnlearning's), else its items are read once, as {"forget": ...,
    "retain": ...} or after data_collator has made that of each; different samples count once. Streams (IterableDataset)
    are read to their end. Batches are made from these in kunbr_fast's own order, so that the prefix cache holds what
    every step needs.
    unlearned: an M_u of any method, a model or a state dict; then there is no warm-up.
    folds: of the RTT attack on the result (config.rtt), two or more: `evaluation.rtt.Fold`s, or paths of files of
    records, each a fold with the questions in it. None: no attack.
    forget_questions, retain_questions: records, or paths of files of them, to measure accuracy on, of the original, the
    unlearned model and the result (default: the folds' questions, else those among the data; []: none).

    After `train()` the model is M_u with its trained blocks, `density` and `blocks` hold what was measured and chosen,
    `report` is the `Report` that `kunbr_fast.unlearn` returns (None where the warm-up was not finished), and its
    figures are logged and in TrainOutput.metrics: forget_accuracy, retain_accuracy, rtt_accuracy, recovery, and those
    of the other models, original_... and unlearned_...; of text without questions forget_probability and its like.
    While it trains the model is what the stage has: M_u in the making, or the original with the active block; so are
    the checkpoints, and what evaluations and callbacks see. Logs have `stage` (0: the warm-up, n: the n-th visit of a
    block: an independent block has all its rounds before the next block begins, cumulative ones go round by round),
    `first_layer`, `last_layer`, `forget_loss` and `retain_loss`.

    train(resume_from_checkpoint=True) goes on from the last whole checkpoint, to the same bits as without; it needs the
    original model, the same data and settings, and `output_dir/kunbr-checkpoints` with the results of earlier stages,
    which is kept unless save_strategy="no". A new training removes what another one has left there.

    Precision: a bf16 model keeps fp32 copies of the active block (config.master_weights), not of all parameters in its
    warm-up (config.warmup_master_weights). An fp32 model with bf16=True keeps fp32 weights and computes under autocast.
    fp16, DeepSpeed and FSDP are refused.

    Errors: ValueError for what is not supported, here, a model that is not all to be trained among it (PEFT, frozen
    parameters, offloaded weights, DistributedDataParallel); for data and settings that do not fit, from `train`.
    """
