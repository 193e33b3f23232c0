"""trainer=KUnBR in OpenUnlearning: `KUnBRTrainer` over its FinetuneTrainer, which brings its evaluations.

Its evaluators keep what they find in `checkpoint-STEP/evals`, and with overwrite=false a metric that is there is not
measured again. Training goes on to a stage, a merge or another run without the step changing. So here results are of
weights: `model.json` beside them says of which, and results of other weights are removed. An evaluation during a stage
sees no result, and has a folder of its own.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import transformers

from kunbr_fast.files.atomic import write_json
from kunbr_fast.files.documents import read_json
from kunbr_fast.integrations.open_unlearning_options import Refused
from kunbr_fast.model.fingerprint import model_fingerprint
from kunbr_fast.run.config import KUnBRConfig
from kunbr_fast.run.methods import settings_of
from kunbr_fast.run.visits import layers

logger = logging.getLogger(__name__)
MODEL = "model.json"  # in a folder of evaluations
LISTS = ("folds", "forget_questions", "retain_questions")


class _InFolder:
    """One of its evaluators, whose results go where `folder_of` says."""

    def __init__(self, own: Any, folder_of: Callable[[Path], Path]):
        self.own, self.folder_of = own, folder_of

    def evaluate(self, output_dir: str, **kwargs: Any) -> Any:
        return self.own.evaluate(output_dir=str(self.folder_of(Path(output_dir))), **kwargs)


def results_of(folder: Path, weights: str, model: str) -> Path:
    """`folder`, after which all results in it are of these weights."""
    try:
        found = read_json(folder / MODEL)
    except (OSError, ValueError):
        found = {}
    if not isinstance(found, dict) or found.get("weights") != weights:
        old = [path for kind in ("EVAL", "SUMMARY") for path in sorted(folder.glob(f"*_{kind}.json"))]
        if old:
            names = ", ".join(path.name for path in old)
            logger.warning("%s: %s not of these weights: removed, and measured anew", folder, names)
        for path in old:
            path.unlink()
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / MODEL, {"model": model, "weights": weights})
    return folder


def _plain(values: Any) -> Any:
    from omegaconf import OmegaConf

    return OmegaConf.to_container(values, resolve=True) if OmegaConf.is_config(values) else values


def _without_others(given: dict[str, Any], kinds: Sequence[type]) -> dict[str, Any]:
    """What one of `kinds` takes. An experiment's method_args are often of the trainer that it was written for."""
    known = {name for kind in kinds for name in inspect.signature(kind.__init__).parameters} | {"tokenizer"}
    if others := [name for name in given if name not in known]:
        logger.warning(
            "trainer.method_args: %s: of another trainer, not read by KUnBR: method_args.config says what it does",
            ", ".join(others),
        )
    return {name: value for name, value in given.items() if name in known}


def chosen(lines: dict[str, Any]) -> dict[str, Any]:
    """`method_args.config` without what nobody has chosen: lines of KUnBR.yaml, at their defaults, that a `method`
    sets; and block_lr, which is there the Trainer's learning rate, where no block is trained."""
    usual = KUnBRConfig().to_dict()
    method = settings_of(lines["method"]) if "method" in lines else {}
    found = {name: value for name, value in lines.items() if name not in method or value != usual[name]}
    if (method | found).get("top_k") == 0 and found.get("block_lr") == found.get("warmup_lr"):
        found.pop("block_lr", None)
    return found


def kunbr_trainer(finetune: type) -> type:
    """`KUnBRTrainer` over its FinetuneTrainer."""
    from kunbr_fast.integrations.hf_trainer import KUnBRMixin

    class KUnBR(KUnBRMixin, finetune):
        def __init__(self, *args: Any, config: Any = None, **kwargs: Any):
            kwargs = _without_others(kwargs, (KUnBRMixin, finetune, transformers.Trainer))
            kwargs |= {name: _plain(kwargs[name]) for name in LISTS if name in kwargs}
            config = _plain(config)
            try:
                super().__init__(*args, config=chosen(config) if isinstance(config, dict) else config, **kwargs)
            except ValueError as error:
                where = " (config is trainer.method_args.config)" if str(error).startswith("config") else ""
                raise Refused(f"trainer=KUnBR: {error}{where}") from error

        def train(self, *args: Any, **kwargs: Any) -> Any:
            try:
                return super().train(*args, **kwargs)
            except ValueError as error:
                logger.debug("where this is from", exc_info=error)
                raise Refused(str(error)) from error

        def evaluate(self, *args: Any, **kwargs: Any) -> Any:
            """As its own, of results that are of the present weights alone."""
            given = self.evaluators
            folder_of = functools.cache(self._results)  # the weights are read once for all evaluators
            self.evaluators = {name: _InFolder(own, folder_of) for name, own in (given or {}).items()}
            try:
                return super().evaluate(*args, **kwargs)
            finally:
                self.evaluators = given

        def _results(self, folder: Path) -> Path:
            model, stage = self._present()
            if stage is not None:
                with contextlib.suppress(OSError):
                    folder.rmdir()  # its own has just made it
                folder = folder.with_name(f"evals_stage_{stage}")
            step = self.state.global_step
            logger.info("evaluation at step %d is of %s; results in %s", step, model, folder)
            return results_of(folder, model_fingerprint(self.model), model)

        def _present(self) -> tuple[str, int | None]:
            """What the model is, and the number of the stage that it is in the middle of."""
            at = None if self._stages is None else self._stages.at
            if at is None:  # before training, or after it
                trained = "the unlearned model" if self._result.is_there else "the original"
                return trained if self.state.global_step else "the model as it was loaded", None
            if at.number:
                visit, all_visits = self._stages.visit, len(self._stages.order)
                inserted = f"the original with layers {layers(visit.block)} inserted"
                if self.config.insertion == "cumulative":
                    inserted += " beside the blocks trained before"
                return f"{inserted}, visit {at.number} of {all_visits}", at.number
            if self.state.global_step:
                done = self.state.global_step == at.stop
                return "M_u" if done else "M_u in the making, during the warm-up", 0
            return "the original", None

    return KUnBR
