"""What TrainingArguments, and a trainer's own methods, do for KUnBR: each field is in one of the lists below, which the
table in docs/integrations.md repeats for readers. A field of another release that is in none of them is Trainer's."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments, get_scheduler

from kunbr_fast.data import is_record
from kunbr_fast.integrations.stage_steps import epochs_of_stages
from kunbr_fast.kernels.optimizers.op import BETAS
from kunbr_fast.run.config import KUnBRConfig

BATCH = "per_device_train_batch_size x gradient_accumulation_steps x processes"

# Do what they always do. Those of evaluations, logs and the Hub among them; of checkpoints, which hold a stage.
HONOURED = set(
    """
    output_dir per_device_train_batch_size gradient_accumulation_steps max_grad_norm bf16 bf16_full_eval fp16_full_eval
    tf32 activation_checkpointing gradient_checkpointing use_cache full_determinism use_cpu
    logging_strategy logging_steps logging_first_step log_on_each_node logging_nan_inf_filter log_level
    log_level_replica disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id
    trackio_static_space_id skip_memory_metrics logging_dir
    eval_strategy eval_steps eval_delay per_device_eval_batch_size prediction_loss_only eval_on_start
    eval_do_concat_batches eval_use_gather_object eval_accumulation_steps include_for_metrics batch_eval_metrics
    label_names remove_unused_columns length_column_name metric_for_best_model greater_is_better
    save_only_model save_strategy save_steps save_on_each_node save_total_limit save_safetensors
    restore_callback_states_from_checkpoint
    hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision
    do_train do_eval do_predict resume_from_checkpoint local_rank ddp_backend ddp_timeout
    """.split()
)
# The stages share these, or each has its own.
BY_STAGE = {"max_steps", "warmup_steps", "warmup_ratio", "lr_scheduler_type", "lr_scheduler_kwargs"}
# Beside the config, and what a state holds anyway, the trained weights depend on these.
OF_WEIGHTS = ("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio", "max_grad_norm", "bf16")
# An error, with what to do instead.
REFUSED = {
    "fp16": "use bf16",
    "fsdp": "every process holds the model: leave it out, or take `kunbr-fast unlearn --sharding fsdp`",
    "deepspeed": "every process holds the model: leave it out, or take `kunbr-fast unlearn --sharding fsdp`",
    "parallelism_config": "every process holds the model: leave it out",
    "load_best_model_at_end": "a checkpoint holds a stage, not a result: leave it out. EarlyStoppingCallback needs "
    "metric_for_best_model and eval_strategy alone, and ends the present stage",
    "enable_jit_checkpoint": "it would end a stage: leave it out. What is killed goes on from the last of save_steps",
    "push_to_hub": "it would push stages in place of the result: take hub_strategy='end', and save_model() pushes",
    "label_smoothing_factor": "config.objective names the loss: leave it out",
    "neftune_noise_alpha": "the prefix cache holds each sample once: leave it out",
    "auto_find_batch_size": "a step's samples are part of the method: lower per_device_train_batch_size and raise "
    "gradient_accumulation_steps",
    "torch_compile": "steps run fused layers already, and it would compile the evaluations of each stage: leave it out",
    "use_liger_kernel": "steps run fused layers already: leave it out",
}
# These say more of some that are refused.
OF_REFUSED = {"fsdp_config", "torch_compile_backend", "torch_compile_mode", "liger_kernel_config"}
_RATES, _OPTIMIZERS = ("warmup_lr", "block_lr"), ("warmup_optimizer", "optimizer")
# Not read, and what counts in their place: settings of the config, or in words.
COUNTS: dict[str, tuple[str, ...]] = {
    "seed": ("seed",),
    "data_seed": ("seed",),
    "train_sampling_strategy": ("seed",),
    "group_by_length": ("seed",),
    "num_train_epochs": ("warmup_epochs", "block_epochs"),
    "learning_rate": _RATES,
    "weight_decay": ("weight_decay",),
    "optim": _OPTIMIZERS,
    "optim_args": _OPTIMIZERS,
    "optim_target_modules": _OPTIMIZERS,
    "adam_beta1": _OPTIMIZERS,
    "adam_beta2": _OPTIMIZERS,
    "adam_epsilon": _OPTIMIZERS,
    "activation_checkpointing_kwargs": ("gradient_checkpointing",),
    "gradient_checkpointing_kwargs": ("gradient_checkpointing",),
}
_EVALUATIONS, _NO_DDP = "of evaluations alone", "there is no DistributedDataParallel"
NOT_READ = {
    "dataloader_drop_last": "an epoch's last step takes what is left",
    "dataloader_num_workers": _EVALUATIONS,
    "dataloader_pin_memory": _EVALUATIONS,
    "dataloader_persistent_workers": _EVALUATIONS,
    "dataloader_prefetch_factor": _EVALUATIONS,
    "dataloader_multiprocessing_context": _EVALUATIONS,
    "dataloader_in_order": _EVALUATIONS,
    "accelerator_config": _EVALUATIONS,
    "ddp_find_unused_parameters": _NO_DDP,
    "ddp_bucket_cap_mb": _NO_DDP,
    "ddp_broadcast_buffers": _NO_DDP,
    "ddp_static_graph": _NO_DDP,
    "average_tokens_across_devices": "a step's loss is that of all processes' samples",
    "include_num_input_tokens_seen": "tokens are not counted",
    "torch_empty_cache_steps": "a stage's buffers stay",
    "ignore_data_skip": "a resumed training begins where it was",
    "debug": "fused layers run no hooks",
}
# Methods of a trainer that training does not call, and what counts in their place; those that one before the mixin in
# the order of bases would put in place of the mixin's.
_NOT_CALLED = {
    "compute_loss": "config.objective names the loss",
    "create_optimizer": "config.warmup_optimizer and config.optimizer name them",
    "get_optimizer_cls_and_kwargs": "config.warmup_optimizer and config.optimizer name them",
    "get_train_dataloader": "config.seed orders the samples",
    "_get_train_sampler": "config.seed orders the samples",
}
_BELOW_ONLY = {"training_step": "config.objective names the loss"}
_ABOVE_ONLY = {
    "create_scheduler": "each stage asks for its own steps where it is below: class Yours(KUnBRMixin, ThatTrainer)"
}


# ---------------------------------------------------------------- refused


def refuse_fields(given: Iterable[Any], name: str) -> None:
    """ValueError for what KUnBR cannot do of TrainingArguments that are among what a Trainer is given, so that nobody
    takes it for done; before Trainer begins with it (a repository on the Hub, a signal's handler)."""
    for args in given:
        for field, cure in REFUSED.items() if isinstance(args, TrainingArguments) else ():
            at_end = field == "push_to_hub" and getattr(args.hub_strategy, "value", args.hub_strategy) == "end"
            if getattr(args, field, None) and not at_end:
                raise ValueError(f"{name} does not support {field}: {cure}")


def refuse(trainer: Any, mixin: type) -> None:
    """The same for what else Trainer can do."""
    name, args = type(trainer).__name__, trainer.args
    for given, what in (
        (trainer.is_fsdp_enabled, f"fsdp: {REFUSED['fsdp']}"),  # by accelerate's own configuration
        (trainer.is_deepspeed_enabled, f"deepspeed: {REFUSED['deepspeed']}"),
        (args.n_gpu > 1, "several GPUs in one process: use accelerate launch, or set CUDA_VISIBLE_DEVICES"),
        (trainer.model_init is not None, "model_init: give the model"),
        (trainer.compute_loss_func is not None, "compute_loss_func: config.objective names the loss"),
        (
            trainer.optimizer is not None or trainer.optimizer_cls_and_kwargs is not None,
            "optimizers: config.warmup_optimizer and config.optimizer name them",
        ),
        (
            trainer.lr_scheduler is not None,
            "a scheduler in optimizers: args.lr_scheduler_type names it, and each stage has its own",
        ),
    ):
        if given:
            raise ValueError(f"{name} does not support {what}")
    _refuse_methods(type(trainer), mixin)


def refuse_settings(config: KUnBRConfig) -> None:
    """The same for settings that the loop of a Trainer cannot follow."""
    if config.micro_batch_tokens is not None:
        raise ValueError(
            f"micro_batch_tokens={config.micro_batch_tokens}: here per_device_train_batch_size is what goes through at "
            "once, gradient_accumulation_steps times in a step: leave it out"
        )
    if config.rule != "top_k":
        raise ValueError(
            f"rule={config.rule!r}: the Trainer's number of steps is fixed before the density says how many blocks "
            "there are: take rule='top_k', or kf.unlearn"
        )
    if config.sharding != "none":
        raise ValueError(f"sharding={config.sharding!r}: the Trainer's processes hold all of it: leave it out")


def _refuse_methods(kind: type, mixin: type) -> None:
    order = kind.__mro__
    above, below = order[: order.index(mixin)], order[order.index(mixin) + 1 : order.index(Trainer)]
    for classes, methods in ((above, _NOT_CALLED | _ABOVE_ONLY), (below, _NOT_CALLED | _BELOW_ONLY)):
        for name, cure in methods.items():
            owner = next((owner for owner in classes if name in vars(owner)), Trainer)
            if vars(owner).get(name) is not vars(Trainer).get(name):
                raise ValueError(
                    f"{kind.__name__} does not support {owner.__name__}.{name}, which its training would not call: "
                    f"{cure}. Leave it out ({name} = Trainer.{name} in your class takes it back)"
                )


# ---------------------------------------------------------------- not read


def not_read(args: Any, config: KUnBRConfig, warm_up: bool) -> str | None:
    """What to tell once of the settings whose owner has set them, and that nothing reads: None where there are none.
    warm_up: whether there is one."""
    entries = []
    for field in dataclasses.fields(args):
        value = getattr(args, field.name, None)
        if field.name == "num_train_epochs" and args.max_steps >= 0:  # which always wins over it
            continue
        if field.name in {*COUNTS, *NOT_READ} and _is_set(field, value, args):
            shown = getattr(value, "value", value)
            shown = "..." if field.name == "accelerator_config" else shown
            if field.name in NOT_READ:
                entries.append(f"{field.name}={shown} ({NOT_READ[field.name]})")
            elif counting := _counting(field.name, value, config, warm_up):
                entries.append(f"{field.name}={shown} ({', '.join(counting)})")
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    for name, unless, counts in (
        ("batch_size", (batch,), f"{BATCH} = {batch}"),
        ("checkpoint_every", (), "args.save_strategy and save_steps"),
        ("log_to", (), "args.report_to"),
        ("parallel", () if args.world_size > 1 else (config.parallel,), "all processes share each step"),
    ):
        if (value := getattr(config, name, None)) not in (getattr(KUnBRConfig(), name, None), *unless):
            entries.append(f"config.{name}={value} ({counts})")
    return f"not read, but what is in brackets: {'; '.join(entries)}" if entries else None


def _is_set(field: dataclasses.Field, value: Any, args: Any) -> bool:
    if field.name == "accelerator_config":
        return value is not None and value != type(value)()
    if field.name == "dataloader_pin_memory" and args.use_cpu:  # which has set it to False
        return False
    return value not in (field.default, None, "None", [], "")


def _counting(name: str, value: Any, config: KUnBRConfig, warm_up: bool) -> list[str]:
    """The settings that count in place of an argument; none where they say the same."""
    used = {"warmup_lr": warm_up, "warmup_epochs": warm_up, "warmup_optimizer": warm_up,
            "block_lr": config.top_k, "block_epochs": config.top_k, "optimizer": config.top_k}  # fmt: skip
    settings = {setting: getattr(config, setting) for setting in COUNTS[name] if used.get(setting, True)}
    if _agrees(name, value, config, list(settings.values()), warm_up):
        return []
    return [f"config.{setting}={found}" for setting, found in settings.items()]


def _agrees(name: str, value: Any, config: KUnBRConfig, settings: Sequence[Any], warm_up: bool) -> bool:
    if name == "num_train_epochs" and value == sum(epochs_of_stages(config, warm_up)):
        return True
    if name == "optim":
        named = str(getattr(value, "value", value))
        value = "lion" if named == "lion_32bit" else named.split("_")[0] if named.startswith("adamw_torch") else named
    elif name in ("adam_beta1", "adam_beta2"):
        settings = [BETAS[optimizer][int(name[-1]) - 1] for optimizer in settings]
    return all(setting == value for setting in settings)


def check_target(config: KUnBRConfig, *data: Sequence[Mapping]) -> None:
    """ValueError for a target that nothing reads."""
    if config.target != KUnBRConfig.target and not any(is_record(entry) for part in data for entry in part[:1]):
        raise ValueError(
            f"config.target={config.target!r}: the data are samples, whose labels say which tokens have a loss: leave "
            "it out, or give records and processing_class="
        )


@contextlib.contextmanager
def in_arguments() -> Iterator[None]:
    """Inside, errors that name what `kunbr_fast.unlearn` is given name what a Trainer is given in its place."""
    try:
        yield
    except ValueError as error:
        said = str(error)
        for theirs, ours in (
            ("resume out (resume=True)", "resume_from_checkpoint out"),
            ("another output directory", "another output_dir"),
            ("another directory", "another output_dir"),
            (": batch_size was", f": batch_size ({BATCH}) was"),
            ("(unlearned=, --unlearned)", "(unlearned=)"),
        ):
            said = said.replace(theirs, ours)
        if type(error) is not ValueError or said == str(error):
            raise
        raise ValueError(said) from error


# ---------------------------------------------------------------- by stages


def for_stage(args: Any, steps: int, whole: int) -> Any:
    """`args` with the warm-up of the learning rate of a stage of `steps` steps: of the same share as was asked of the
    `whole` run, so that each stage reaches its rate where the run would."""
    asked = args.get_warmup_steps(whole)
    own = min(args.get_warmup_steps(steps), -(-asked * steps // whole))
    args = copy.copy(args)
    args.warmup_steps = own if _is_whole(args, whole) else min(own, steps - 1)
    if hasattr(args, "warmup_ratio"):
        args.warmup_ratio = 0.0
    return args


def of_weights(args: Any) -> dict[str, str]:
    """What the trained weights depend on, by name; a resumed training looks whether it is the same."""
    found = {name: getattr(args, name, None) for name in OF_WEIGHTS}
    return {name: str(getattr(value, "value", value)) for name, value in found.items() if value is not None}


def unreached(args: Any, whole: int) -> str | None:
    """What to tell of a warm-up that is not over at the end."""
    if not _is_whole(args, whole):
        return None
    return (
        f"warmup_steps={args.get_warmup_steps(whole)} of {whole} steps in all: no stage reaches its learning rate. "
        "Give less, or a share (0.1), and each stage warms up for that share of its own steps"
    )


def check_schedules(args: Any, config: KUnBRConfig, planned: Mapping[int, int]) -> None:
    """ValueError for a schedule that a stage could not have: of a later one it would be seen after hours. planned: the
    stages' steps, by their numbers."""
    whole = sum(planned.values())
    steps = {"block_lr" if number else "warmup_lr": n for number, n in planned.items()}
    for name, own in steps.items():
        rate, of_stage = getattr(config, name), for_stage(args, own, whole)
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=rate)
        how = {"scheduler_specific_kwargs": args.lr_scheduler_kwargs}
        try:
            get_scheduler(args.lr_scheduler_type, optimizer, of_stage.get_warmup_steps(own), own, **how)
        except ValueError as error:
            kind = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
            raise ValueError(f"config.{name}={rate} does not go with lr_scheduler_type={kind}: {error}") from error


def _is_whole(args: Any, whole: int) -> bool:
    """Whether the warm-up, in steps and not as a share, has as many as the run."""
    return whole <= args.get_warmup_steps(whole) == args.get_warmup_steps(4 * whole)


def begin_anew(trainer: Any) -> None:
    """What is counted within a stage: the best metric, and the patience of EarlyStoppingCallback."""
    state = trainer.state
    state.best_metric = state.best_global_step = state.best_model_checkpoint = None
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, EarlyStoppingCallback):
            callback.early_stopping_patience_counter = 0


def take_up(trainer: Any) -> None:
    """What EarlyStoppingCallback had counted in the checkpoint that is resumed: it would not stop where it did."""
    for callback in trainer.callback_handler.callbacks:
        saved = trainer.state.stateful_callbacks.get(type(callback).__name__)
        if isinstance(callback, EarlyStoppingCallback) and isinstance(saved, Mapping):
            callback.early_stopping_patience_counter = saved["attributes"]["early_stopping_patience_counter"]
