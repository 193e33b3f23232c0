"""OpenUnlearning's trainers that read more than a loss, patched: the same weights, and what they say they saved. Its
losses are written here plainly, as its code has them; examples/open_unlearning.py runs its own."""

import copy
import logging
import sys
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from open_unlearning_package import FinetuneTrainer, load, packages
from tiny_models import random_samples, tiny_model

from kunbr_fast.integrations import labelled_rows
from kunbr_fast.integrations.open_unlearning_options import Refused
from kunbr_fast.model.flops import flop_counter


def labelled(model, inputs):
    """Logits of all labelled tokens, and the tokens."""
    targets = inputs["labels"][:, 1:]
    return model(**inputs).logits[:, :-1][targets != -100], targets[targets != -100]


def compute_satimp_loss(model, inputs, beta1, beta2):
    nll = F.cross_entropy(*labelled(model, inputs), reduction="none")
    p = (-nll).exp().detach()
    return -(p**beta1 * (1 - p) ** beta2 * nll).mean(), None


def compute_wga_loss(model, inputs, beta):
    nll = F.cross_entropy(*labelled(model, inputs), reduction="none")
    return -((-nll).exp().detach() ** beta * nll).mean(), None


def compute_batch_ceu(model, inputs, ignore_first_n_answer_tokens=1):
    labels = inputs["labels"].clone()
    for row in labels:
        row[(row != -100).nonzero()[:ignore_first_n_answer_tokens, 0]] = -100
    logits, targets = labelled(model, {**inputs, "labels": labels})
    q = logits.detach().scatter(1, targets[:, None], -torch.inf).softmax(1)
    return F.cross_entropy(logits, q), None


def compute_undial_loss(model, ref_model, inputs, beta):
    """Over all positions; a label of -100 lowers the token that this index means."""
    logits, targets = model(**inputs).logits[:, :-1], inputs["labels"][:, 1:]
    with torch.no_grad():
        teacher = ref_model(**inputs).logits[:, :-1]
    lowered = teacher - beta * F.one_hot(targets % teacher.shape[-1], teacher.shape[-1])
    return F.cross_entropy(logits.flatten(0, 1), lowered.softmax(-1).flatten(0, 1)), None


def compute_kl_divergence(model, target_model, inputs):
    with torch.no_grad():
        truth = target_model(**inputs).logits.log_softmax(-1).flatten(0, 1)
    ours = model(**inputs).logits.log_softmax(-1).flatten(0, 1)
    return F.kl_div(ours, truth, reduction="batchmean", log_target=True), None


def utils():
    return sys.modules["trainer.utils"]


class Ceu(FinetuneTrainer):
    ignore_first_n_answer_tokens = 1

    def compute_loss(self, model, inputs, return_outputs=False):
        return utils().compute_batch_ceu(model, inputs["forget"], self.ignore_first_n_answer_tokens)[0]


class Weighted(FinetuneTrainer):
    """The interface of its GradDiff."""

    gamma = alpha = beta = beta2 = 1.0
    beta1 = 0.5

    def __init__(self, retain_loss_type="NLL", alpha=1.0, **kwargs):
        super().__init__(**kwargs)
        self.retain_loss_type, self.alpha = retain_loss_type, alpha
        self.ref_model = self._prepare_ref_model(self.model)

    def _prepare_ref_model(self, model):
        return copy.deepcopy(model).eval()

    def compute_retain_loss(self, model, retain_inputs):
        loss = model(**retain_inputs).loss
        if self.retain_loss_type == "KL":
            loss = utils().compute_kl_divergence(self.model, self.ref_model, retain_inputs)[0]
        return loss

    def forget(self, model, inputs):
        return -model(**inputs).loss

    def compute_loss(self, model, inputs, return_outputs=False):
        return self.forget(model, inputs["forget"]) + self.alpha * self.compute_retain_loss(model, inputs["retain"])


class SatImp(Weighted):
    def forget(self, model, inputs):
        return utils().compute_satimp_loss(model=model, inputs=inputs, beta1=self.beta1, beta2=self.beta2)[0]


class Wga(Weighted):
    def forget(self, model, inputs):
        return utils().compute_wga_loss(model=model, inputs=inputs, beta=self.beta)[0]


class Undial(Weighted):
    def forget(self, model, inputs):
        return 100 * utils().compute_undial_loss(model, self.ref_model, inputs, self.beta)[0]


class Rmu(Weighted):
    """Reads the first layer's output."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.model_module = labelled_rows.layers(self.model)[0]

    def forward_with_cache(self, model, inputs, module):
        seen = []
        with module.register_forward_hook(lambda module, args, out: seen.append(out[0] if type(out) is tuple else out)):
            model(**inputs)
        return seen[0], None

    def forget(self, model, inputs):
        return (self.forward_with_cache(model, inputs, self.model_module)[0] - 1).square().mean()


class Pdu(Weighted):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.preference = 1.0

    def final_loss_value(self, losses):
        return losses[0] + self.preference * losses[1]

    @torch.no_grad()
    def post_epoch_dual_param_update(self):
        self.model.eval()
        losses = [self.compute_retain_loss(self.model, batch["retain"]) for batch in self.get_train_dataloader()]
        self.preference += float(sum(losses) / len(losses))

    def compute_loss(self, model, inputs, return_outputs=False):
        logits, mask = model(**inputs["forget"]).logits, inputs["forget"]["labels"] != -100
        margin = (logits.max(-1).values - logits.mean(-1)).square()
        return self.final_loss_value([margin[mask].mean(), self.compute_retain_loss(model, inputs["retain"])])


class Epochs(tf.TrainerCallback):
    def __init__(self, trainer):
        self.trainer = trainer

    def on_epoch_end(self, *_, **__):
        self.trainer.post_epoch_dual_param_update()


Weighted.__name__ = "GradDiff"
Ceu.__name__, Wga.__name__, Undial.__name__, Pdu.__name__, Rmu.__name__ = "CEU", "WGA", "UNDIAL", "PDU", "RMU"
FUNCTIONS = (compute_satimp_loss, compute_wga_loss, compute_batch_ceu, compute_undial_loss, compute_kl_divergence)


@pytest.fixture
def trainer(monkeypatch):
    """Each function is in `trainer.utils` before ours are put in, and in a module that has imported it."""
    other = ModuleType("trainer.unlearn")
    monkeypatch.setitem(sys.modules, "trainer.unlearn", other)
    package = packages(monkeypatch, Ceu, Weighted, SatImp, Wga, Undial, Pdu, Rmu)
    for function in FUNCTIONS:
        setattr(package.utils, function.__name__, function)
        setattr(other, function.__name__, function)
    from kunbr_fast.integrations.open_unlearning_patched import put_in

    put_in("trainer")
    assert other.compute_wga_loss is package.utils.compute_wga_loss is not compute_wga_loss
    return package


def start_model():
    return tiny_model(num_hidden_layers=2)


def trained(trainer, folder, name, patch, method=None, **args):
    """The trainer after its training, and the FLOPs that this took."""
    forget, retain = random_samples(4), random_samples(4, seed=1)
    data = [{"forget": forget[i], "retain": retain[i]} for i in range(4)]
    model = start_model()
    model.set_attn_implementation("eager")  # torch counts no FLOPs of SDPA's kernel on a CPU
    args = dict(max_steps=4, learning_rate=0.02, optim="sgd") | args
    made = load(trainer, name, folder, model, data, {"patch": patch, "impl": "torch"}, method, args)
    if name == "PDU":
        made.add_callback(Epochs(made))
    with flop_counter() as counter:
        made.train()
    return made, counter.get_total_flops()


def apart(ours, truth):
    models = ours, truth, start_model()
    ours, truth, start = (torch.cat([p.detach().flatten() for p in m.parameters()]) for m in models)
    return float((ours - truth).norm() / (truth - start).norm())


NO_COPY = "no copy of the model, which nothing reads"
CASES = [
    ("CEU", {}, "head at "),
    ("SatImp", {}, NO_COPY),
    ("WGA", {}, NO_COPY),
    ("PDU", {}, "head at "),
    ("UNDIAL", {"alpha": 0.0}, "no backward pass of the retain loss, whose weight is 0"),
    ("GradDiff", {"retain_loss_type": "KL"}, "reference model not asked again for 50% of its sequences"),
    pytest.param("WGA", {"retain_loss_type": "KL"}, "reference model not asked again for 50%", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("name, method, said", CASES)
def test_the_same_weights_and_what_was_saved(trainer, tmp_path, caplog, name, method, said):
    caplog.set_level(logging.INFO, "kunbr_fast")
    plain, before = trained(trainer, tmp_path, name, False, method=method)
    ours, after = trained(trainer, tmp_path, name, True, method=method)
    assert labelled_rows.of(ours.model) is not None and apart(ours.model, plain.model) < 1e-5
    if name == "PDU":
        assert ours.preference == pytest.approx(plain.preference, rel=1e-6) != 1
    if said is NO_COPY:
        assert ours.ref_model is None and plain.ref_model is not None
    tally = ours._tally
    assert (
        after < before
        and tally.ours == pytest.approx(after, rel=0.02)
        and tally.plain == pytest.approx(before, rel=0.02)
    )
    (line,) = [record.getMessage() for record in caplog.records if "of the plain FLOPs" in record.getMessage()]
    assert line.startswith("kunbr_fast: fused layers; ") and said in line and "Not used" not in line
    assert f"about {after / before:.2f} of the plain FLOPs" in line


def test_weights_above_the_layer_that_rmu_reads_decay(trainer, tmp_path):
    """Of a retain loss of weight 0 they have a gradient of 0, not none."""
    how = {"method": {"alpha": 0.0}, "max_steps": 2, "weight_decay": 0.1}
    plain, ours = (trained(trainer, tmp_path, "RMU", patch, **how)[0].model for patch in (False, True))
    above = "model.layers.1.mlp.up_proj.weight"
    assert not torch.equal(plain.get_parameter(above), start_model().get_parameter(above))
    assert apart(ours, plain) < 1e-5


def doubled(model, inputs, beta):
    return 2 * compute_wga_loss(model, inputs, beta)[0], None


def with_other_arguments(model, inputs, beta):
    if not model.training:  # where it is compared
        raise TypeError("no argument 'beta'")
    return compute_wga_loss(model, inputs, beta)


@pytest.mark.parametrize(
    "now, why",
    [
        (doubled, "its compute_wga_loss differs from what it was derived from"),
        (
            with_other_arguments,
            "its compute_wga_loss cannot be asked as the one it was derived from (TypeError: no",
        ),
    ],
)
def test_a_checkout_whose_loss_has_changed_keeps_it(trainer, tmp_path, caplog, now, why):
    caplog.set_level(logging.INFO, "kunbr_fast")
    for module in ("trainer.utils", "trainer.unlearn"):
        sys.modules[module].compute_wga_loss.__wrapped__ = now
    made, _ = trained(trainer, tmp_path, "WGA", True, max_steps=1)
    assert labelled_rows.of(made.model) is None and "forward" not in made.model.__dict__
    assert f"WGA keeps its own head and loss: {why}" in caplog.text
    assert made.ref_model is not None  # which this one may read
    assert f"fused layers. Not used: labelled rows ({why}" in caplog.text


def test_several_gpus_in_one_process_are_refused(trainer, tmp_path, monkeypatch):
    monkeypatch.setattr(tf.TrainingArguments, "n_gpu", 2)
    with pytest.raises(Refused, match="2 GPUs in one process .DataParallel.: start it with torchrun"):
        trained(trainer, tmp_path, "GradDiff", True)


@pytest.mark.compiles
def test_torch_compile_keeps_them(trainer, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "kunbr_fast")
    for name in ("ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_DYNAMO_MODE"):
        monkeypatch.setenv(name, "no" if name.endswith("BACKEND") else "default")  # TrainingArguments sets them
    torch._dynamo.reset()
    made, plain = [], None
    for patch, more in ((False, {}), (True, {"torch_compile_backend": "eager"})):
        made.append(trained(trainer, tmp_path, "GradDiff", patch, max_steps=2, **more)[0])
    plain, ours = made
    assert type(ours.model_wrapped).__name__ == "OptimizedModule"
    assert apart(ours.model, plain.model) < 1e-5
    assert "head at " in caplog.text and "Not used" not in caplog.text
    torch._dynamo.reset()
