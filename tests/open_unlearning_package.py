"""Trainers and packages with OpenUnlearning's interface, written here: its own code is not needed to test ours."""

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
import transformers as tf
from padded_batches import padded, sums

from kunbr_fast.integrations import open_unlearning


class FinetuneTrainer(tf.Trainer):
    """Its evaluations keep what they find in a folder that bears the step."""

    def __init__(self, evaluators=None, template_args=None, *args, **kwargs):
        self.evaluators, self.template_args = evaluators, template_args
        super().__init__(*args, **kwargs)

    def evaluate(self, *args, **kwargs):
        found = {}
        folder = Path(self._get_output_dir(trial=None), f"checkpoint-{self.state.global_step}", "evals")
        if self.evaluators:
            folder.mkdir(parents=True, exist_ok=True)
        for evaluator in (self.evaluators or {}).values():
            asked = {"template_args": self.template_args, "model": self.model, "tokenizer": self.tokenizer}
            found.update(evaluator.evaluate(output_dir=str(folder), **asked))
        self.log(dict(found))
        return found


def collate(items):
    return {part: padded([item[part] for item in items]) for part in ("forget", "retain")}


def load(package, name, folder, model, data, options=None, method_args=None, args=None, **given):
    """A trainer of the package, by its own `load_trainer`. args: of TrainingArguments."""
    args = dict(
        output_dir=str(folder), per_device_train_batch_size=2, use_cpu=True, report_to="none", save_strategy="no",
        disable_tqdm=True, remove_unused_columns=False, lr_scheduler_type="constant",
    ) | (args or {})  # fmt: skip
    config = Node({"kunbr_fast": options, "trainer": {"handler": name, "args": args, "method_args": method_args or {}}})
    others = dict(eval_dataset=None, tokenizer=None, data_collator=collate, evaluators=None, template_args=None)
    return package.load_trainer(trainer_cfg=config["trainer"], model=model, train_dataset=data, **others | given)[0]


class Evaluator:
    """With overwrite=false: what is in its file is not measured again."""

    def __init__(self, name="TOFU"):
        self.name, self.measured = name, 0

    def evaluate(self, model, output_dir, **_):
        file = Path(output_dir, f"{self.name}_EVAL.json")
        if not file.exists():
            self.measured += 1
            file.write_text(json.dumps({f"{self.name}_score": score(model)}))
            file.with_name(f"{self.name}_SUMMARY.json").write_text(file.read_text())
        return json.loads(file.read_text())


def score(model):
    return float(sum(p.detach().double().abs().sum() for p in model.parameters()))


def trainer_args(given, count):
    """Its own way to tell warmup_epochs, by the number of GPUs."""
    found = dict(given)
    if epochs := found.pop("warmup_epochs", None):
        at_once = found["per_device_train_batch_size"] * found["gradient_accumulation_steps"]
        found["warmup_steps"] = int(epochs * count // (at_once * torch.cuda.device_count()))
    return found


class Node(dict):
    """Enough of an OmegaConf node: `get`, and the way to its parent."""

    parent = None

    def __init__(self, values, parent=None):
        super().__init__({k: Node(v, self) if isinstance(v, dict) else v for k, v in values.items()})
        self.parent = parent


def packages(monkeypatch, *trainers):
    """A stand-in for its package `trainer`, with these trainers and ours registered."""
    omegaconf = ModuleType("omegaconf")
    omegaconf.OmegaConf = SimpleNamespace(
        select=lambda node, key: node.parent.get(key.removeprefix("..")), is_config=lambda node: isinstance(node, Node),
        to_container=lambda node, resolve: json.loads(json.dumps(node)),
    )  # fmt: skip
    package, utils = ModuleType("trainer"), ModuleType("trainer.utils")
    for module in (omegaconf, package, utils):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    utils.compute_batch_nll = lambda model, inputs: (sums((out := model(**inputs)).logits, inputs["labels"]), out)
    package.utils, package.TRAINER_REGISTRY = utils, {}
    package.FinetuneTrainer, package.TrainingArguments = FinetuneTrainer, tf.TrainingArguments
    package.load_trainer_args = lambda args, dataset: package.TrainingArguments(**trainer_args(args, len(dataset)))
    package._register_trainer = lambda kind: package.TRAINER_REGISTRY.update({kind.__name__: kind})

    def load_trainer(trainer_cfg, **kwargs):
        args = package.load_trainer_args(trainer_cfg["args"], kwargs["train_dataset"])
        made = package.TRAINER_REGISTRY[trainer_cfg.get("handler")]
        return made(args=args, **kwargs, **trainer_cfg.get("method_args", {})), args

    package.load_trainer = load_trainer
    for kind in (FinetuneTrainer, *trainers):
        package._register_trainer(kind)
    open_unlearning.register(package)
    return package
