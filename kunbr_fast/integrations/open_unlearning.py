"""OpenUnlearning (github locuslab/open-unlearning) on our engine, with no edit to its tree. From its checkout:

    python -m kunbr_fast.integrations.open_unlearning --config-name=unlearn.yaml trainer=KUnBR ...
    python -m kunbr_fast.integrations.open_unlearning --config-name=unlearn.yaml trainer=GradDiff \
        +kunbr_fast.patch=true ...
    python -m kunbr_fast.integrations.open_unlearning eval --config-name=eval.yaml ...

The first two are its `python src/train.py` (unlearn.yaml or train.yaml; with trainer.args.do_train=false an evaluation
alone), the last its `python src/eval.py`. Every argument is Hydra's, as there; our trainer is in TRAINER_REGISTRY and
our configs on Hydra's search path. Settings of ours, all optional:

    +kunbr_fast.patch=true      its own trainers train with fused layers (`kunbr_fast.patched`); and, where their losses
                                read no more than that (GradAscent, GradDiff, NPO, SimNPO, DPO, SatImp, WGA, CEU, PDU,
                                RMU), without logits of all positions, without the layers above the one that RMU reads,
                                and without asking the reference model twice about one sequence. UNDIAL and a KL retain
                                loss read all logits: there the reference model's layers run once for each sequence.
                                Same weights as without, up to rounding. At its end a line says what was saved.
    +kunbr_fast.impl=torch      who runs that: auto, triton or torch
    +kunbr_fast.measure=true    writes kunbr_fast.json into the output directory: FLOPs of one training step, bytes
                                kept for its backward pass, and the peak of memory above what was there before it

RMU with chosen weights (`trainable_params_regex`) makes gradients of all others too, and its clipping counts them in
the norm. With patch, one process and `trainer.args.max_grad_norm=0` those gradients are not made; with clipping they
must be.

Its code was written for transformers 4.45. What later releases changed is put right in subclasses of its trainers
(`open_unlearning_trainers`): `tokenizer` became `processing_class`, `compute_loss` is given num_items_in_batch (and a
loss that does not use it must say so, or gradient accumulation multiplies it), TrainingArguments has no logging_dir,
and `apply_chat_template` gives a dict; and an eval_strategy wants an eval_dataset, which its evaluators have no use
for. On a machine without a GPU its warm-up of the learning rate divides by the number of GPUs
(`open_unlearning_machine`).
docs/integrations.md says with which versions this was run.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
import logging
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from kunbr_fast.integrations.open_unlearning_kunbr import kunbr_trainer
from kunbr_fast.integrations.open_unlearning_machine import Output, get_model, load_hf_dataset, load_trainer_args
from kunbr_fast.integrations.open_unlearning_options import Options, Refused
from kunbr_fast.integrations.open_unlearning_patched import put_in
from kunbr_fast.integrations.open_unlearning_trainers import adapted, get_tokenizer, training_arguments
from kunbr_fast.model import compat

logger = logging.getLogger(__name__)
CONFIGS = "pkg://kunbr_fast.integrations.open_unlearning_configs"
SCRIPTS = ("train", "eval")
USAGE = __doc__.partition("\nIts code was written")[0]


def arguments(given: Sequence[str]) -> list[str]:
    """The command line for `src/train.py`: `given`, with our configs on Hydra's search path."""
    name = "hydra.searchpath="
    others = [item for item in given if not item.startswith(name)]
    paths = [item[len(name) :].strip().removeprefix("[").removesuffix("]") for item in given if item.startswith(name)]
    ours = f"{name}[{','.join([*(path for path in paths if path), CONFIGS])}]"
    # among the overrides, where there are some: Hydra's parser takes one row of them, and `--cfg job` may come after it
    place = next((i + 1 for i, item in enumerate(others) if "=" in item and not item.startswith("-")), len(others))
    return [*others[:place], ours, *others[place:]]


# ---------------------------------------------------------------- into its packages


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
                f"{compat.VERSION} is +kunbr_fast.patch=true with its own trainers"
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
    trainer.TrainingArguments = training_arguments(trainer.TrainingArguments)
    trainer.load_trainer_args = load_trainer_args(trainer.load_trainer_args)
    put_in(trainer.__name__)


def adapt(model: ModuleType, data: ModuleType) -> None:
    """Its packages `model` and `data`, as this machine and this release of transformers want them."""
    if compat.VERSION.major >= 5:
        model.get_tokenizer = get_tokenizer(model.get_tokenizer)
    model.get_model = get_model(model.get_model)
    everywhere(data, "load_hf_dataset", load_hf_dataset)


def everywhere(package: ModuleType, name: str, change: Callable) -> None:
    """Changes a function of a package's `utils` for all its modules, which have imported it by name."""
    own = getattr(package.utils, name)
    ours = change(own)
    for path, module in list(sys.modules.items()):
        if path.partition(".")[0] == package.__name__ and getattr(module, name, None) is own:
            setattr(module, name, ours)


# ---------------------------------------------------------------- the command


def checkout(folder: Path, script: str = SCRIPTS[0]) -> Path:
    """`folder`, if it is a checkout of OpenUnlearning."""
    needed = (f"src/{script}.py", "src/trainer/__init__.py", "configs/unlearn.yaml")
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        raise Refused(
            f"{folder} is no checkout of OpenUnlearning ({missing[0]} is not there): run this from one, after "
            "`git clone https://github.com/locuslab/open-unlearning && cd open-unlearning`"
        )
    return folder


def main(given: Sequence[str] | None = None) -> None:
    """`python -m kunbr_fast.integrations.open_unlearning [eval]`, from a checkout of OpenUnlearning."""
    given = list(sys.argv[1:] if given is None else given)
    if {"-h", "--help"} & set(given):
        print(USAGE)
        return
    script = given.pop(0) if given and given[0] in SCRIPTS else SCRIPTS[0]
    folder = checkout(Path.cwd(), script)
    if importlib.util.find_spec("hydra") is None:
        raise Refused("hydra-core is not installed: pip install 'kunbr-fast[open-unlearning]'")
    source = str(folder / "src")
    sys.path[:] = [source, *(path for path in sys.path if path not in ("", str(folder), source))]
    try:
        trainer, model, data = map(importlib.import_module, ("trainer", "model", "data"))
    except ImportError as error:
        raise Refused(
            f"OpenUnlearning cannot be imported ({error}): it needs what its requirements.txt names, and lm-eval; "
            "pip install 'kunbr-fast[open-unlearning]' brings that in releases for transformers 5"
        ) from error
    register(trainer)
    adapt(model, data)
    sys.argv = [f"src/{script}.py", *arguments(given)]
    runpy.run_path(str(folder / "src" / f"{script}.py"), run_name="__main__")


if __name__ == "__main__":
    Output.install()
    main()
