"""OpenUnlearning's trainers on our engine: the same weights. Its own code runs where KUNBR_OPEN_UNLEARNING names a
checkout; everywhere else trainers with its interface, written here, take its place."""

import copy
import dataclasses
import functools
import importlib.util
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
import yaml
from helpers import rarely
from open_unlearning_package import FinetuneTrainer, load, packages
from tiny_models import random_samples, tiny_model

from kunbr_fast.integrations import labelled_rows, open_unlearning, open_unlearning_kunbr
from kunbr_fast.integrations.open_unlearning import Options, Refused, adapted, arguments
from kunbr_fast.integrations.open_unlearning_kunbr import LISTS
from kunbr_fast.integrations.open_unlearning_machine import Output
from kunbr_fast.integrations.open_unlearning_patched import READ_LOSSES_ONLY, Patched
from kunbr_fast.integrations.open_unlearning_trainers import get_tokenizer
from kunbr_fast.model import compat
from kunbr_fast.run.config import KUnBRConfig

ROOT = Path(__file__).resolve().parents[2]


# ---------------------------------------------------------------- trainers with OpenUnlearning's interface


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


@pytest.fixture
def trainer(monkeypatch):
    return packages(monkeypatch, Difference, Preference, Steering)


def train(trainer, folder, name, options, model=None, method_args=None, **args):
    args = dict(
        logging_dir=str(folder / "logs"), max_steps=3, gradient_accumulation_steps=2, learning_rate=0.02, optim="sgd"
    ) | args  # fmt: skip
    forget, retain = random_samples(4), random_samples(6, seed=1)
    data = [{"forget": forget[i % 4], "retain": retain[i % 6]} for i in range(12)]
    made = load(trainer, name, folder, model or tiny_model(), data, options, method_args, args)
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


def test_gradient_accumulation_divides_the_loss(trainer, tmp_path, monkeypatch):
    """A release that believes the loss to be divided already must not be believed."""
    own, seen = Difference.compute_loss, []

    def compute_loss(self, model, inputs, return_outputs=False):
        seen.append(inputs)
        return own(self, model, inputs, return_outputs)

    monkeypatch.setattr(Difference, "compute_loss", compute_loss)
    made = train(trainer, tmp_path, "GradDiff", None, max_steps=1, gradient_accumulation_steps=2, max_grad_norm=0.0)
    assert made.model_accepts_loss_kwargs is False and len(seen) == 2
    start = tiny_model()
    (sum(own(made, start, inputs) for inputs in seen) / 2).backward()
    for p, trained in zip(start.parameters(), made.model.parameters()):
        torch.testing.assert_close(trained, p - 0.02 * p.grad, rtol=1e-9, atol=1e-9)


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
def test_our_trainer_is_registered(trainer, tmp_path, caplog):
    """And takes an experiment that was written for another one, as stock WMDP's for RMU."""
    config = dict(
        num_blocks=3, top_k=1, skip_last_layers=2, warmup_epochs=1, block_epochs=1, block_lr=1e-3, warmup_lr=1e-3
    )
    start = tiny_model(dtype=torch.float32)
    made = train(
        trainer, tmp_path, "KUnBR", {"patch": True}, model=copy.deepcopy(start),
        method_args={"config": config, "gamma": 1.0},
        max_steps=-1, max_grad_norm=0.0, learning_rate=1e-3,
    )  # fmt: skip
    assert made.config.top_k == 1 and len(made.blocks) == 1
    assert "trainer.method_args: gamma: of another trainer, not read by KUnBR" in caplog.text
    assert any(not torch.equal(a, b) for a, b in zip(made.model.parameters(), start.parameters()))


def test_a_method_or_a_statistic_beside_the_lines_of_our_yaml():
    """KUnBR.yaml lists settings of blocks, and takes both learning rates from trainer.args."""
    path = Path(open_unlearning.__file__).parent / "open_unlearning_configs" / "trainer" / "KUnBR.yaml"
    rate = "${trainer.args.learning_rate}"
    lines = yaml.safe_load(path.read_text())["method_args"]["config"] | {"seed": 0, "weight_decay": 0.0}
    lines = {name: 1e-3 if value == rate else value for name, value in lines.items()}

    def made(**chosen):
        return KUnBRConfig.from_dict(open_unlearning_kunbr.chosen(lines | chosen))

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
    assert not issubclass(adapted(FinetuneTrainer, Options()), Patched)


# ---------------------------------------------------------------- the command line


def test_our_configs_are_on_the_search_path():
    ours = open_unlearning.CONFIGS
    given = ["--config-name=unlearn.yaml", "trainer=KUnBR", "--cfg", "job"]  # Hydra takes one row of overrides
    assert arguments(given) == [*given[:2], f"hydra.searchpath=[{ours}]", *given[2:]]
    assert arguments(["--cfg", "job"]) == ["--cfg", "job", f"hydra.searchpath=[{ours}]"]
    assert arguments(["hydra.searchpath=[file://a,file://b]", "x=1"]) == [
        "x=1",
        f"hydra.searchpath=[file://a,file://b,{ours}]",
    ]
    folder = importlib.util.find_spec(ours.removeprefix("pkg://")).submodule_search_locations[0]
    assert (Path(folder) / "trainer" / "KUnBR.yaml").is_file()


def test_the_config_holds_settings_that_exist():
    """Its values are the defaults, and what trainer.args say where both have a word for it."""
    path = Path(open_unlearning.__file__).with_name("open_unlearning_configs") / "trainer" / "KUnBR.yaml"
    found = yaml.safe_load(path.read_text())
    assert found["handler"] == "KUnBR" and found["defaults"] == ["finetune"]
    assert [name for name, value in found["method_args"].items() if value is None] == list(LISTS)
    args, config = {"seed": 3, "learning_rate": 1e-5, "weight_decay": 0.01}, found["method_args"]["config"]
    named = {k: v.removeprefix("${trainer.args.").rstrip("}") for k, v in config.items() if "$" in str(v)}
    assert set(named.values()) == set(args)
    made = KUnBRConfig.from_dict(config | {key: args[name] for key, name in named.items()})
    assert made == dataclasses.replace(KUnBRConfig(), **{key: args[name] for key, name in named.items()})


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
    """Enough of one that its two scripts can be begun."""
    for name in ("src/train.py", "src/eval.py", "configs/unlearn.yaml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    for name in ("trainer", "model", "data"):
        monkeypatch.delitem(sys.modules, name, raising=False)
        (tmp_path / "src" / name).mkdir()
        (tmp_path / "src" / name / "__init__.py").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in ("trainer", "model", "data"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("script, message", [([], "src/train.py"), (["eval"], "src/eval.py")])
def test_outside_a_checkout(tmp_path, monkeypatch, script, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Refused, match=rf"is no checkout of OpenUnlearning \({message} is not there\)"):
        open_unlearning.main([*script, "trainer=KUnBR"])


def test_help_tells_both_uses(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    open_unlearning.main(["--help"])
    said = capsys.readouterr().out
    assert "open_unlearning --config-name=unlearn.yaml trainer=KUnBR" in said and "+kunbr_fast.patch=true" in said
    assert "open_unlearning eval --config-name=eval.yaml" in said and "do_train=false" in said
    assert all(name in said for name in READ_LOSSES_ONLY)


@pytest.mark.slow
def test_a_reader_that_goes_ends_it_without_a_word():
    """As `| head` does."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb") as end:
        output = Output(end, encoding="utf-8", line_buffering=True)
        with pytest.raises(SystemExit) as stop:
            print("a line", file=output)
        assert stop.value.code == 141
        output.flush()  # what is left goes nowhere
        output.detach()


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


@pytest.mark.parametrize("given, script", [(["trainer=NPO"], "train"), (["eval", "trainer=NPO"], "eval")])
def test_its_scripts_run_with_our_arguments(empty_checkout, monkeypatch, given, script):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    seen = []
    monkeypatch.setattr(open_unlearning, "register", lambda module: seen.append(module.__file__))
    monkeypatch.setattr(open_unlearning, "adapt", lambda *modules: seen.extend(m.__name__ for m in modules))
    monkeypatch.setattr(runpy, "run_path", lambda path, run_name: seen.append((path, run_name, *sys.argv[:2])))
    monkeypatch.setattr(sys, "argv", ["x", *given])
    open_unlearning.main()
    path = str(empty_checkout / f"src/{script}.py")
    registered = str(empty_checkout / "src/trainer/__init__.py")
    assert seen == [registered, "model", "data", (path, "__main__", f"src/{script}.py", "trainer=NPO")]


def test_a_tokenizer_gives_ids():
    from tiny_text import tokenizer

    made = get_tokenizer(tokenizer)()
    ids = made.apply_chat_template([{"role": "user", "content": "Ada Ek"}], tokenize=True)
    assert type(ids) is list and all(type(i) is int for i in ids)
    assert max(ids) < 400


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


def run_example(checkout, out, name, *more):
    """What it prints."""
    command = [sys.executable, ROOT / "examples" / name, "--checkout", checkout, "--out", out, *more]
    done = subprocess.run([str(x) for x in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_measures_beside_a_real_checkouts(checkout, tmp_path):
    """A minute: the same figures, of every kind of which there are some."""
    said = run_example(checkout, tmp_path, "open_unlearning_measures.py")
    for name in ("probability", "truth_ratio", "rouge_l_recall", "extraction_strength", "mia_reference", "privleak"):
        assert f"\n| `{name}` | " in said
    for name in ("forget_quality", "model_utility", "verbatim_memorisation"):
        assert f"\n| `{name}` | " in said


@pytest.mark.slow
def test_a_real_checkout(checkout, tmp_path):
    """Minutes: each trainer is a process or two, and imports all that OpenUnlearning imports."""

    def status():
        return subprocess.run(["git", "status", "--short"], cwd=checkout, capture_output=True, text=True).stdout

    before, cases = status(), ("GradDiff", "NPO", "RMU, 3 weights")
    example = functools.partial(run_example, checkout, tmp_path)
    said = example("open_unlearning.py", "--cases", *cases)
    assert all(f"| {case} | float32 |" in said for case in cases)
    if compat.VERSION >= compat.PACKED_SINCE:
        said = example("open_unlearning_kunbr.py")
        for name in ("machine", "rate", "retain_model", "final_figures", "evaluation_alone", "harness", "max_steps"):
            assert f"\n{name}: " in f"\n{said}"
        assert "attack: recovery" in said
    assert status() == before
