"""OpenUnlearning's trainers as later releases of transformers want them, and what a step of each costs."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from kunbr_fast.integrations.open_unlearning_options import Options
from kunbr_fast.integrations.open_unlearning_patched import READ_LOSSES_ONLY, Patched
from kunbr_fast.model.flops import flop_counter

logger = logging.getLogger(__name__)


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


def training_arguments(own: Callable) -> Callable:
    """TrainingArguments without logging_dir, where a release has none: TensorBoard is told by the environment."""

    @functools.wraps(own, updated=())
    def make(**kwargs: Any) -> Any:
        if "logging_dir" in kwargs and "logging_dir" not in {field.name for field in dataclasses.fields(own)}:
            os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(kwargs.pop("logging_dir")))
        return own(**kwargs)

    return make


def get_tokenizer(own: Callable) -> Callable:
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
        bases.append(Patched)
    if "num_items_in_batch" not in inspect.signature(own.compute_loss).parameters:
        bases.append(_OwnLoss)
    settings = {"options": options, "reads_losses_only": own.__name__ in READ_LOSSES_ONLY}
    return type(own.__name__, (*bases, own), settings)
