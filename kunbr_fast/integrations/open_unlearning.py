"""OpenUnlearning (github locuslab/open-unlearning) on our engine, with no edit to its tree. From its checkout:

    python -m kunbr_fast.integrations.open_unlearning --config-name=unlearn.yaml trainer=KUnBR ...
    python -m kunbr_fast.integrations.open_unlearning --config-name=unlearn.yaml trainer=GradDiff \
        +kunbr_fast.patch=true ...

Every argument is Hydra's, as for its own `python src/train.py`, which this runs after it has put our trainer into
TRAINER_REGISTRY and our configs onto Hydra's search path. Settings of ours, all optional:

    +kunbr_fast.patch=true      its own trainers train with fused layers (`kunbr_fast.patched`); and, where their losses
                                read no more than that (GradAscent, GradDiff, NPO, SimNPO, DPO, RMU), without logits of
                                all positions, without the layers above the one that RMU reads, and without asking the
                                reference model twice about one sequence. Same weights as without, up to rounding.
    +kunbr_fast.impl=torch      who runs that: auto, triton or torch
    +kunbr_fast.measure=true    writes kunbr_fast.json into the output directory: FLOPs of one training step, bytes
                                kept for its backward pass, and the peak of memory above what was there before it

RMU with chosen weights (`trainable_params_regex`) makes gradients of all others too, and its clipping counts them in
the norm. With patch and `trainer.args.max_grad_norm=0` those gradients are not made; with clipping they must be.

Its code was written for transformers 4.45. What later releases changed is put right here, in subclasses of its
trainers: `tokenizer` became `processing_class`, `compute_loss` is given num_items_in_batch (and a loss that does not
use it must say so, or gradient accumulation multiplies it), TrainingArguments has no logging_dir, and
`apply_chat_template` gives a dict; and an eval_strategy wants an eval_dataset, which its evaluators have no use for.
docs/integrations.md says with which versions this was run. Several processes, DeepSpeed and FSDP were not run.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import inspect
import json
import logging
import os
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers
from torch import nn

from kunbr_fast.integrations.open_unlearning_options import Options, Refused
from kunbr_fast.integrations.open_unlearning_patched import READ_LOSSES_ONLY, _batch_nll, _Patched
from kunbr_fast.model import compat
from kunbr_fast.model.flops import flop_counter

logger = logging.getLogger(__name__)
CONFIGS = "pkg://kunbr_fast.integrations.open_unlearning_configs"


def arguments(given: Sequence[str]) -> list[str]:
    """The command line for `src/train.py`: `given`, with our configs on Hydra's search path."""
    name = "hydra.searchpath="
    others = [item for item in given if not item.startswith(name)]
    paths = [item[len(name) :].strip().removeprefix("[").removesuffix("]") for item in given if item.startswith(name)]
    return [*others, f"{name}[{','.join([*(path for path in paths if path), CONFIGS])}]"]


# ---------------------------------------------------------------- its trainers, as later releases want them


class _Releases:
    """Before one of its trainers in the order of bases: takes its arguments in any release of transformers."""

    def __init__(self, *args: Any, tokenizer: Any = None, eval_dataset: Any = None, **kwargs: Any):
        name = "processing_class"
        if name not in inspect.signature(transformers.Trainer.__init__).parameters:
            name = "tokenizer"
        # Its evaluators bring their own data; later releases want some where eval_strategy is set.
        stand_in = [] if eval_dataset is None else eval_dataset
        super().__init__(*args, **{name: tokenizer}, eval_dataset=stand_in, **kwargs)
        self.eval_dataset = eval_dataset
        if not hasattr(self, "tokenizer"):  # its evaluations read it
            self.tokenizer = tokenizer


class _OwnLoss:
    """For a `compute_loss` that knows no num_items_in_batch: what it gives is a mean over its batch."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # otherwise 4.46 to 4.5x leave out the division by accumulation steps

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None):
        return super().compute_loss(model, inputs, return_outputs)


def _training_arguments(own: Callable) -> Callable:
    """TrainingArguments without logging_dir, where a release has none: TensorBoard is told by the environment."""

    @functools.wraps(own, updated=())
    def make(**kwargs: Any) -> Any:
        if "logging_dir" in kwargs and "logging_dir" not in {field.name for field in dataclasses.fields(own)}:
            os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(kwargs.pop("logging_dir")))
        return own(**kwargs)

    return make


def _get_tokenizer(own: Callable) -> Callable:
    """A tokenizer whose `apply_chat_template` gives a list of ids, as transformers 4's."""

    @functools.wraps(own)
    def get(*args: Any, **kwargs: Any) -> Any:
        tokenizer = own(*args, **kwargs)
        tokenizer.apply_chat_template = functools.partial(tokenizer.apply_chat_template, return_dict=False)
        return tokenizer

    return get


# ---------------------------------------------------------------- what a step costs


class _Measured:
    """Before a trainer: costs of its first steps, to kunbr_fast.json in the output directory."""

    options = Options()

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        found, step = self.__dict__.setdefault("_costs", {}), functools.partial(super().training_step, *args, **kwargs)
        if "flops" not in found:
            return self._kept(found, step)
        return step() if "peak_bytes" in found else self._peak(found, step)

    def _kept(self, found: dict, step: Callable) -> Any:
        weights = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        kept: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with flop_counter() as counter, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out = step()
        found.update(flops=counter.get_total_flops(), saved_bytes=sum(kept.values()))
        return out

    def _peak(self, found: dict, step: Callable) -> Any:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            out = step()
            found["peak_bytes"] = torch.cuda.max_memory_allocated() - before
        else:
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as log:
                out = step()
            now = peak = 0
            events = [event for event in log.profiler.kineto_results.events() if event.name() == "[memory]"]
            for event in sorted(events, key=lambda event: event.start_ns()):
                now += event.nbytes()
                peak = max(peak, now)
            found["peak_bytes"] = peak
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        report = {"trainer": type(self).__name__, **dataclasses.asdict(self.options), **found, "versions": versions}
        Path(self.args.output_dir, "kunbr_fast.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        return out


# ---------------------------------------------------------------- into its registry


def adapted(own: type, options: Options) -> type:
    """Its trainer class with all that `options` and this release of transformers ask for; of the same name."""
    bases: list[type] = [_Releases]
    if options.measure:
        bases.append(_Measured)
    if options.patch:
        bases.append(_Patched)
    if "num_items_in_batch" not in inspect.signature(own.compute_loss).parameters:
        bases.append(_OwnLoss)
    settings = {"options": options, "reads_losses_only": own.__name__ in READ_LOSSES_ONLY}
    return type(own.__name__, (*bases, own), settings)


def kunbr_trainer(finetune: type) -> type:
    """`KUnBRTrainer` over its FinetuneTrainer (which brings its evaluations)."""
    from kunbr_fast.integrations.hf_trainer import KUnBRMixin

    class KUnBR(KUnBRMixin, finetune):
        def __init__(self, *args: Any, config: Any = None, **kwargs: Any):
            from omegaconf import OmegaConf

            if OmegaConf.is_config(config):
                config = _chosen(OmegaConf.to_container(config, resolve=True))
            super().__init__(*args, config=config, **kwargs)

    return KUnBR


def _chosen(lines: dict[str, Any]) -> dict[str, Any]:
    """`method_args.config` without what nobody has chosen: lines of KUnBR.yaml, at their defaults, that a `method`
    sets; and block_lr, which is there the Trainer's learning rate, where no block is trained."""
    from kunbr_fast.run.config import KUnBRConfig
    from kunbr_fast.run.methods import settings_of

    usual = KUnBRConfig().to_dict()
    method = settings_of(lines["method"]) if "method" in lines else {}
    found = {name: value for name, value in lines.items() if name not in method or value != usual[name]}
    if (method | found).get("top_k") == 0 and found.get("block_lr") == found.get("warmup_lr"):
        found.pop("block_lr", None)
    return found


def register(trainer: ModuleType) -> None:
    """Our trainer into the registry of its `trainer` package, and ours around its `load_trainer`."""
    from omegaconf import OmegaConf

    registry, load = trainer.TRAINER_REGISTRY, trainer.load_trainer
    if compat.AttentionInterface is not None:
        trainer._register_trainer(kunbr_trainer(trainer.FinetuneTrainer))

    @functools.wraps(load)
    def load_trainer(trainer_cfg: Any, *args: Any, **kwargs: Any) -> Any:
        options, name = Options.of(OmegaConf.select(trainer_cfg, "..kunbr_fast")), trainer_cfg.get("handler")
        if name == "KUnBR" and name not in registry:
            raise Refused(
                f"trainer=KUnBR needs transformers >= {compat.PACKED_SINCE} (tested) to run packed samples, found "
                f"{compat.VERSION}: pip install 'transformers>={compat.PACKED_SINCE}', better >= 5. What does run with "
                f"{compat.VERSION} is +kunbr_fast.patch=true with {', '.join(READ_LOSSES_ONLY)}"
            )
        if name == "KUnBR" and options.patch:
            logger.warning("kunbr_fast.patch: trainer=KUnBR always trains fused layers; this changes nothing")
            options = dataclasses.replace(options, patch=False)
        own = registry.get(name)
        if own is None:
            return load(trainer_cfg, *args, **kwargs)
        registry[name] = adapted(own, options)
        try:
            return load(trainer_cfg, *args, **kwargs)
        finally:
            registry[name] = own

    trainer.load_trainer = load_trainer
    trainer.TrainingArguments = _training_arguments(trainer.TrainingArguments)
    own, ours = trainer.utils.compute_batch_nll, _batch_nll(trainer.utils.compute_batch_nll)
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == trainer.__name__ and getattr(module, "compute_batch_nll", None) is own:
            module.compute_batch_nll = ours


# ---------------------------------------------------------------- the command


def checkout(folder: Path) -> Path:
    """`folder`, if it is a checkout of OpenUnlearning."""
    needed = ("src/train.py", "src/trainer/__init__.py", "configs/unlearn.yaml")
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        raise Refused(
            f"{folder} is no checkout of OpenUnlearning ({missing[0]} is not there): run this from one, after "
            "`git clone https://github.com/locuslab/open-unlearning && cd open-unlearning`"
        )
    return folder


def main(given: Sequence[str] | None = None) -> None:
    """`python -m kunbr_fast.integrations.open_unlearning`, from a checkout of OpenUnlearning."""
    folder = checkout(Path.cwd())
    if importlib.util.find_spec("hydra") is None:
        raise Refused("hydra-core is not installed: pip install 'kunbr-fast[open-unlearning]'")
    source = str(folder / "src")
    sys.path[:] = [source, *(path for path in sys.path if path not in ("", str(folder), source))]
    try:
        trainer, model = importlib.import_module("trainer"), importlib.import_module("model")
    except ImportError as error:
        raise Refused(
            f"OpenUnlearning cannot be imported ({error}): it needs what its requirements.txt names, and lm-eval; "
            "pip install 'kunbr-fast[open-unlearning]' brings that in releases for transformers 5"
        ) from error
    register(trainer)
    if compat.VERSION.major >= 5:
        model.get_tokenizer = _get_tokenizer(model.get_tokenizer)
    sys.argv = ["src/train.py", *arguments(sys.argv[1:] if given is None else given)]
    runpy.run_path(str(folder / "src" / "train.py"), run_name="__main__")


if __name__ == "__main__":
    main()
