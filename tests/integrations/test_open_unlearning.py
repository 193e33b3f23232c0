"""OpenUnlearning's trainers on our engine: the same weights. Its own code runs where KUNBR_OPEN_UNLEARNING names a
checkout; everywhere else trainers with its interface, written here, take its place."""

import copy
import dataclasses
import importlib.util
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
import yaml
from helpers import rarely, relative
from tiny_models import VOCAB, random_samples, tiny_model

from kunbr_fast.integrations import labelled_rows, open_unlearning
from kunbr_fast.integrations.open_unlearning import Options, Refused, adapted, arguments
from kunbr_fast.model import compat
from kunbr_fast.run.config import KUnBRConfig

ROOT = Path(__file__).resolve().parents[2]
FP64 = 1e-6  # transformers computes an fp64 model's loss in fp32


def padded(samples, side="right"):
    width = max(len(sample["input_ids"]) for sample in samples)

    def pad(x, value):
        around = (0, width - len(x)) if side == "right" else (width - len(x), 0)
        return F.pad(x, around, value=value)

    ids = torch.stack([pad(sample["input_ids"], 0) for sample in samples])
    mask = torch.stack([pad(torch.ones_like(sample["input_ids"]), 0) for sample in samples]).bool()
    labels = torch.stack([pad(sample["labels"], -100) for sample in samples])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def sums(logits, labels):
    """(B,) sums of NLL, written plainly."""
    nll = F.cross_entropy(logits[:, :-1].double().flatten(0, 1), labels[:, 1:].flatten(), reduction="none")
    return nll.view(len(labels), -1).sum(1)


def grads(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# ---------------------------------------------------------------- labelled rows


@pytest.mark.parametrize(
    "architecture, side",
    [("llama", "right"), ("llama", "left"), ("gemma2", "right"), ("phi3", "right"), ("gpt2", "left")],
)
def test_loss_and_gradients_are_the_models_own(architecture, side):
    model, batch = tiny_model(architecture), padded(random_samples(4), side)
    own = model(**batch)
    own.loss.backward()
    truth, _ = grads(model), model.zero_grad()
    rows = labelled_rows.install(model)
    with rows.want("loss"):
        ours = model(**batch)
    ours.loss.backward()
    assert ours.logits is None and relative(ours.loss, own.loss) < FP64
    found = grads(model)
    assert found.keys() == truth.keys()
    assert all(relative(found[name], value) < 100 * FP64 for name, value in truth.items() if value.abs().max() > 1e-6)
    assert torch.equal(model(**batch).logits, own.logits)  # nothing asked: its own forward


def test_sequence_sums():
    model, batch = tiny_model(), padded(random_samples(4))
    rows = labelled_rows.install(model)
    truth = sums(model(**batch).logits, batch["labels"])
    assert relative(labelled_rows.sequence_nll(model, batch), truth) < 1e-12
    assert rows.wanted is None


def test_layers_above_are_not_run():
    model, batch = tiny_model(), padded(random_samples(3))
    layers, ran, seen = labelled_rows.layers(model), [], []
    for number, layer in enumerate(layers):
        layer.register_forward_hook(lambda *_, number=number: ran.append(number))
    layers[2].register_forward_hook(lambda module, args, out: seen.append(out[0] if isinstance(out, tuple) else out))
    rows = labelled_rows.install(model)
    model(**batch)
    rows.stop, ran[:] = 3, []
    with rows.want("layers"):
        model(**batch)
    assert ran == [0, 1, 2] and torch.equal(seen[-2], seen[-1])
    assert labelled_rows.layers(model) is layers and len(layers) == 6


def test_a_reference_model_is_asked_once_for_each_sequence():
    model, samples = tiny_model(), random_samples(5)
    rows = labelled_rows.install(model)
    rows.known, sizes = {}, []
    model.get_input_embeddings().register_forward_hook(lambda module, args, out: sizes.append(len(out)))
    first, second = padded(samples[:3]), padded(samples[1:])
    with torch.no_grad():
        ours = [labelled_rows.sequence_nll(model, batch) for batch in (first, second, first)]
        assert sizes == [3, 2]
        truth = [sums(model(**batch).logits, batch["labels"]) for batch in (first, second, first)]
    assert all(relative(a, b) < 1e-12 for a, b in zip(ours, truth))
    other = {**first, "labels": torch.where(first["labels"] == first["labels"][0, 1], -100, first["labels"])}
    with torch.no_grad():
        labelled_rows.sequence_nll(model, other)
    assert len(sizes) == 6 and len(rows.known) == 6  # other labels are another question


def test_install_and_copies(caplog):
    model = tiny_model()
    rows = labelled_rows.install(model)
    assert labelled_rows.install(model) is rows and labelled_rows.of(SimpleNamespaceModule(model)) is rows
    twin = copy.deepcopy(model)
    assert labelled_rows.of(twin) is not rows and twin.forward.__self__ is twin
    model = tiny_model()
    model.forward = lambda **_: None
    assert labelled_rows.install(model) is None and "its own forward" in caplog.text


class SimpleNamespaceModule(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.module = model


def test_a_model_with_another_loss_is_refused(caplog):
    model = tiny_model()
    model.loss_function = lambda logits, labels, **_: logits.float().square().mean()
    assert labelled_rows.install(model) is None
    assert "its loss differs" in caplog.text and "forward" not in model.__dict__


# ---------------------------------------------------------------- trainers with OpenUnlearning's interface


class FinetuneTrainer(tf.Trainer):
    def __init__(self, evaluators=None, template_args=None, *args, **kwargs):
        super().__init__(*args, **kwargs)


class Difference(FinetuneTrainer):
    """Its compute_loss knows no num_items_in_batch."""

    retain_loss_type = "NLL"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.ref_model = None

    def compute_retain_loss(self, model, retain_inputs):
        return model(**retain_inputs).loss

    def compute_loss(self, model, inputs, return_outputs=False):
        loss = self.compute_retain_loss(model, inputs["retain"]) - model(**inputs["forget"]).loss
        return (loss, None) if return_outputs else loss


class Preference(Difference):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.ref_model = copy.deepcopy(self.model).eval()

    def compute_loss(self, model, inputs, return_outputs=False):
        utils = sys.modules["trainer.utils"]
        now, _ = utils.compute_batch_nll(model, inputs["forget"])
        with torch.no_grad():
            then, _ = utils.compute_batch_nll(self.ref_model, inputs["forget"])
        return self.compute_retain_loss(model, inputs["retain"]) - 20 * F.logsigmoid(0.1 * (now - then)).mean()


class Steering(Difference):
    """RMU's interface; trains two weights and makes everybody's gradient."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.ref_model = copy.deepcopy(self.model).eval()
        self.model_module, self.ref_module = (labelled_rows.layers(m)[3] for m in (self.model, self.ref_model))

    def create_optimizer(self):
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad = name.endswith(("2.mlp.down_proj.weight", "3.mlp.down_proj.weight"))
        super().create_optimizer()
        for parameter in self.model.parameters():
            parameter.requires_grad = True

    def forward_with_cache(self, model, inputs, module, no_grad=True):
        seen = []
        hook = module.register_forward_hook(
            lambda module, args, out: seen.append(out[0] if type(out) is tuple else out)
        )
        with torch.set_grad_enabled(not no_grad):
            model(**inputs)
        hook.remove()
        return seen[0], None

    def compute_loss(self, model, inputs, return_outputs=False):
        forget, _ = self.forward_with_cache(model, inputs["forget"], self.model_module, no_grad=False)
        retain, _ = self.forward_with_cache(model, inputs["retain"], self.model_module, no_grad=False)
        truth, _ = self.forward_with_cache(self.ref_model, inputs["retain"], self.ref_module)
        return (forget - 1).square().mean() + (retain - truth).square().mean()


Difference.__name__, Preference.__name__, Steering.__name__ = "GradDiff", "NPO", "RMU"


def collate(items):
    return {part: padded([item[part] for item in items]) for part in ("forget", "retain")}


class Node(dict):
    """Enough of an OmegaConf node: `get`, and the way to its parent."""

    parent = None

    def __init__(self, values, parent=None):
        super().__init__({k: Node(v, self) if isinstance(v, dict) else v for k, v in values.items()})
        self.parent = parent


@pytest.fixture
def trainer(monkeypatch):
    """A stand-in for its package `trainer`, with ours registered."""
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
    package._register_trainer = lambda kind: package.TRAINER_REGISTRY.update({kind.__name__: kind})

    def load_trainer(trainer_cfg, **kwargs):
        args = package.TrainingArguments(**trainer_cfg["args"])
        made = package.TRAINER_REGISTRY[trainer_cfg.get("handler")]
        return made(args=args, **kwargs, **trainer_cfg.get("method_args", {})), args

    package.load_trainer = load_trainer
    for kind in (FinetuneTrainer, Difference, Preference, Steering):
        package._register_trainer(kind)
    open_unlearning.register(package)
    return package


def train(trainer, folder, name, options, model=None, method_args=None, **args):
    model = model or tiny_model(dtype=torch.float64)
    args = dict(
        output_dir=str(folder), logging_dir=str(folder / "logs"), max_steps=3, per_device_train_batch_size=2,
        gradient_accumulation_steps=2, learning_rate=0.02, optim="sgd", use_cpu=True, report_to="none",
        remove_unused_columns=False, save_strategy="no", disable_tqdm=True, lr_scheduler_type="constant",
    ) | args  # fmt: skip
    config = Node({"kunbr_fast": options, "trainer": {"handler": name, "args": args, "method_args": method_args or {}}})
    forget, retain = random_samples(4), random_samples(6, seed=1)
    data = [{"forget": forget[i % 4], "retain": retain[i % 6]} for i in range(12)]
    made, _ = trainer.load_trainer(
        trainer_cfg=config["trainer"], model=model, train_dataset=data, eval_dataset=None, tokenizer=None,
        data_collator=collate, evaluators=None, template_args=None,
    )  # fmt: skip
    made.train()
    return made


@pytest.mark.parametrize("clipping", rarely([1.0, 0.0], [1.0]))
@pytest.mark.parametrize("name", ["GradDiff", "NPO", "RMU"])
def test_patched_trainers_give_the_same_weights(trainer, tmp_path, name, clipping):
    start = dict(tiny_model().named_parameters())
    costs, results = [], []
    for patch in (False, True):
        options = {"patch": patch, "measure": True, "impl": "torch"}
        made = train(trainer, tmp_path / str(patch), name, options, max_grad_norm=clipping)
        results.append(dict(made.model.named_parameters()))
        costs.append(json.loads((tmp_path / str(patch) / "kunbr_fast.json").read_text()))
        assert type(made).__name__ == name and trainer.TRAINER_REGISTRY[name].__bases__ != type(made).__bases__
        assert all(p.requires_grad for p in made.model.parameters())
        assert not any(
            "forward" in module.__dict__ for layer in labelled_rows.layers(made.model) for module in layer.modules()
        )
    moved = [key for key, value in results[0].items() if not torch.equal(value, start[key])]
    assert len(moved) == (2 if name == "RMU" else len(start))
    plain, ours, before = (torch.cat([x[key].flatten() for key in moved]).detach() for x in (*results, start))
    assert float(torch.linalg.vector_norm(ours - plain) / torch.linalg.vector_norm(plain - before)) < 1e-5
    assert all(torch.equal(results[1][key], start[key]) for key in start if key not in moved)
    for key in ("flops", "saved_bytes", "peak_bytes"):
        assert 0 < costs[1][key] < costs[0][key], key
    assert costs[1]["patch"] and costs[1]["versions"]["transformers"] == tf.__version__


def test_gradient_accumulation_divides_the_loss(trainer, tmp_path):
    """A release that believes the loss to be divided already must not be believed."""
    one = train(trainer, tmp_path, "GradDiff", None, max_steps=1, gradient_accumulation_steps=1, max_grad_norm=0.0)
    assert one.model_accepts_loss_kwargs is False
    start, batch = (
        tiny_model(),
        collate([{"forget": a, "retain": b} for a, b in zip(random_samples(4), random_samples(6, 1))]),
    )
    assert one.compute_loss(start, batch, num_items_in_batch=7).shape == ()


def test_kl_runs_the_model_once(trainer, tmp_path, monkeypatch):
    runs = []

    def kl(model, reference, inputs):
        runs.append("kl")
        return model(**inputs).logits.log_softmax(-1).square().mean(), None

    sys.modules["trainer.utils"].compute_kl_divergence = kl
    monkeypatch.setattr(Difference, "retain_loss_type", "KL")
    made = train(trainer, tmp_path, "GradDiff", {"patch": True}, max_steps=1, gradient_accumulation_steps=1)
    assert runs == ["kl"] and made.state.global_step == 1


def test_trainers_that_read_logits_keep_their_head(trainer, tmp_path):
    class Entropy(Difference):
        def compute_loss(self, model, inputs, return_outputs=False):
            return model(**inputs["forget"]).logits.log_softmax(-1).mean()

    trainer._register_trainer(Entropy)
    truth = train(trainer, tmp_path, "Entropy", {"patch": False}).model
    ours = train(trainer, tmp_path, "Entropy", {"patch": True}).model
    assert labelled_rows.of(ours) is None
    start = tiny_model()
    for (name, a), b, c in zip(ours.named_parameters(), truth.parameters(), start.parameters()):
        assert (a - b).norm() <= 1e-5 * (b - c).norm() + 1e-12, name


@pytest.mark.skipif(compat.VERSION < compat.PACKED_SINCE, reason=f"packed samples need {compat.PACKED_SINCE}")
def test_our_trainer_is_registered(trainer, tmp_path):
    config = dict(
        num_blocks=3, top_k=1, skip_last_layers=2, warmup_epochs=1, block_epochs=1, block_lr=1e-3, warmup_lr=1e-3
    )
    start = tiny_model(dtype=torch.float32)
    made = train(
        trainer, tmp_path, "KUnBR", {"patch": True}, model=copy.deepcopy(start), method_args={"config": config},
        max_steps=-1, max_grad_norm=0.0, learning_rate=1e-3,
    )  # fmt: skip
    assert made.config.top_k == 1 and len(made.blocks) == 1
    assert any(not torch.equal(a, b) for a, b in zip(made.model.parameters(), start.parameters()))


def test_a_method_or_a_statistic_beside_the_lines_of_our_yaml():
    """KUnBR.yaml lists settings of blocks, and takes both learning rates from trainer.args."""
    path = Path(open_unlearning.__file__).parent / "open_unlearning_configs" / "trainer" / "KUnBR.yaml"
    rate = "${trainer.args.learning_rate}"
    lines = yaml.safe_load(path.read_text())["method_args"]["config"] | {"seed": 0}
    lines = {name: 1e-3 if value == rate else value for name, value in lines.items()}

    def made(**chosen):
        return KUnBRConfig.from_dict(open_unlearning._chosen(lines | chosen))

    assert (made().top_k, made().block_lr, made(top_k=2).top_k) == (6, 1e-3, 2)
    for config in (made(method="npo"), made(objective="npo", top_k=0)):
        assert (config.objective, config.top_k, config.warmup_lr) == ("npo", 0, 1e-3)
    blocks = made(method="robust_blocks", statistic="fisher_ratio")
    assert (blocks.top_k, blocks.num_blocks, blocks.block_lr, blocks.statistic) == (1, 2, 1e-3, "fisher_ratio")
    with pytest.raises(ValueError, match="block_lr=0.01: no block is trained"):
        made(method="npo", block_lr=1e-2)


def test_our_trainer_needs_packed_samples(trainer, tmp_path):
    trainer.TRAINER_REGISTRY.pop("KUnBR", None)
    with pytest.raises(Refused, match=f"needs transformers >= {compat.PACKED_SINCE}.*found {tf.__version__}"):
        train(trainer, tmp_path, "KUnBR", None)


def test_names_and_bases():
    made = adapted(Difference, Options(patch=True, measure=True))
    assert made.__name__ == "GradDiff" and issubclass(made, Difference) and made.reads_losses_only
    assert not issubclass(adapted(FinetuneTrainer, Options()), open_unlearning._Patched)


# ---------------------------------------------------------------- the command line


def test_our_configs_are_on_the_search_path():
    ours = open_unlearning.CONFIGS
    assert arguments(["trainer=KUnBR"]) == ["trainer=KUnBR", f"hydra.searchpath=[{ours}]"]
    assert arguments(["hydra.searchpath=[file://a,file://b]", "x=1"]) == [
        "x=1",
        f"hydra.searchpath=[file://a,file://b,{ours}]",
    ]
    folder = importlib.util.find_spec(ours.removeprefix("pkg://")).submodule_search_locations[0]
    assert (Path(folder) / "trainer" / "KUnBR.yaml").is_file()


def test_the_config_holds_settings_that_exist():
    path = Path(open_unlearning.__file__).with_name("open_unlearning_configs") / "trainer" / "KUnBR.yaml"
    found = yaml.safe_load(path.read_text())
    assert found["handler"] == "KUnBR" and found["defaults"] == ["finetune"]
    config = {
        k: 1e-5 if k.endswith("lr") else 0 if k == "seed" else v for k, v in found["method_args"]["config"].items()
    }
    defaults = KUnBRConfig.from_dict({})
    made = KUnBRConfig.from_dict(config)
    assert dataclasses.replace(made, block_lr=defaults.block_lr, warmup_lr=defaults.warmup_lr) == defaults


def test_options():
    assert Options.of(None) == Options() == Options(False, "auto", False)
    assert Options.of({"patch": True, "impl": "torch"}) == Options(True, "torch")
    for values, message in (
        ({"patched": True}, "unknown setting kunbr_fast.patched: known are patch, impl, measure"),
        ({"patch": "yes"}, "kunbr_fast.patch='yes': expected true or false"),
        ({"impl": "numpy"}, "kunbr_fast.impl='numpy': expected one of auto, "),
    ):
        with pytest.raises(Refused, match=message):
            Options.of(values)


@pytest.fixture
def empty_checkout(tmp_path, monkeypatch):
    for name in ("src/train.py", "src/trainer/__init__.py", "configs/unlearn.yaml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


def test_outside_a_checkout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Refused, match=r"is no checkout of OpenUnlearning \(src/train.py is not there\)"):
        open_unlearning.main(["trainer=KUnBR"])


@pytest.mark.slow
def test_its_command_outside_a_checkout(tmp_path):
    command = [sys.executable, "-m", "kunbr_fast.integrations.open_unlearning", "trainer=KUnBR"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"{tmp_path} is no checkout of OpenUnlearning (src/train.py is not there)" in done.stderr


def test_without_hydra(empty_checkout, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Refused, match=r"hydra-core is not installed: pip install 'kunbr-fast\[open-unlearning\]'"):
        open_unlearning.main([])


def test_without_what_it_imports(empty_checkout, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    (empty_checkout / "src/trainer/__init__.py").write_text("import a_package_that_nobody_has")
    with pytest.raises(Refused, match="cannot be imported .No module named 'a_package_that_nobody_has'"):
        open_unlearning.main([])
    assert sys.path[0] == str(empty_checkout / "src")


def test_its_main_runs_with_our_arguments(empty_checkout, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    for name in ("trainer", "model"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    (empty_checkout / "src/model").mkdir()
    (empty_checkout / "src/model/__init__.py").write_text("get_tokenizer = None")
    seen = []
    monkeypatch.setattr(open_unlearning, "register", lambda module: seen.append(module.__file__))
    monkeypatch.setattr(open_unlearning, "_get_tokenizer", lambda own: own)
    monkeypatch.setattr(runpy, "run_path", lambda path, run_name: seen.append((path, run_name, sys.argv[1])))
    monkeypatch.setattr(sys, "argv", ["x", "trainer=NPO"])
    open_unlearning.main()
    train_py = str(empty_checkout / "src/train.py")
    assert seen == [str(empty_checkout / "src/trainer/__init__.py"), (train_py, "__main__", "trainer=NPO")]
    for name in ("trainer", "model"):
        sys.modules.pop(name, None)


def test_a_tokenizer_gives_ids():
    from tiny_text import tokenizer

    made = open_unlearning._get_tokenizer(tokenizer)()
    ids = made.apply_chat_template([{"role": "user", "content": "Ada Ek"}], tokenize=True)
    assert type(ids) is list and all(type(i) is int for i in ids)
    assert max(ids) < 400 and VOCAB


# ---------------------------------------------------------------- the real thing


@pytest.fixture
def checkout():
    folder = os.environ.get("KUNBR_OPEN_UNLEARNING")
    if not folder:
        pytest.skip("KUNBR_OPEN_UNLEARNING names no checkout of OpenUnlearning")
    for name in ("hydra", "datasets", "deepspeed", "lm_eval", "rouge_score"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed: pip install 'kunbr-fast[open-unlearning]'")
    return Path(folder)


def test_a_real_checkout(checkout, tmp_path):
    """Minutes: each trainer is a process or two, and imports all that OpenUnlearning imports."""
    packed = [] if compat.VERSION >= compat.PACKED_SINCE else ["--no-kunbr"]
    command = [sys.executable, ROOT / "examples" / "open_unlearning.py", "--checkout", checkout, "--out", tmp_path]
    command += ["--cases", "GradDiff", "NPO", "RMU, 3 weights", "--no-eval", *packed]
    before = subprocess.run(["git", "status", "--short"], cwd=checkout, capture_output=True, text=True).stdout
    done = subprocess.run([str(x) for x in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ("trainer=KUnBR: weights moved by" in done.stdout) == (not packed)
    for case in ("GradDiff", "NPO", "RMU, 3 weights"):
        assert f"| {case} |" in done.stdout
    after = subprocess.run(["git", "status", "--short"], cwd=checkout, capture_output=True, text=True).stdout
    assert after == before
