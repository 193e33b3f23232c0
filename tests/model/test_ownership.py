"""What a user owns stays as it is: frozen parameters, adapters, and weights that are elsewhere. `model.ownership`."""

import copy
import json

import pytest
import torch
from patch_problem import batch_of_ids
from tiny_models import random_samples, tiny_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import kunbr_fast as kf
from kunbr_fast.data import pack
from kunbr_fast.evaluation.rtt import Attack, Fold, RTTConfig
from kunbr_fast.integrations.deep_unl import DEEP_UNL
from kunbr_fast.model import ownership
from kunbr_fast.model.decoder import Decoder

FORGET, RETAIN = random_samples(4, seed=0), random_samples(4, seed=1)
BLOCK = range(2, 4)
CONFIG = kf.KUnBRConfig(
    num_blocks=3, top_k=1, warmup_epochs=1, block_epochs=1, batch_size=4, warmup_lr=1e-3, block_lr=1e-3, rtt=False
)


def state(model):
    return {name: (p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}


def unlearn(model, **options):
    return kf.unlearn(model, FORGET, RETAIN, CONFIG, progress=False, **options)


def reinsert(original, unlearned, **settings):
    with kf.reinserted(original, unlearned, BLOCK, lr=1e-3, **settings) as training:
        training.step(FORGET, RETAIN)


def train(model, folder):
    tf = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from kunbr_fast.integrations import KUnBRTrainer

    args = tf.TrainingArguments(
        output_dir=str(folder), report_to=[], save_strategy="no", disable_tqdm=True, logging_strategy="no", use_cpu=True
    )
    trainer = KUnBRTrainer(model, args, config=CONFIG, forget_dataset=FORGET, retain_dataset=RETAIN)
    trainer.train()
    return trainer


def attack(model):
    fold = Fold("one", [], [])
    Attack(Decoder(model), None, [fold, fold], RTTConfig())


def deep_unl(model, folder):
    class Base:
        lr = 1e-3

    Base.model = model
    DEEP_UNL(Base, 3, compare_model_path=str(folder), num_layers=6)


def freeze(model, which):
    for name, parameter in model.named_parameters():
        if which in name:
            parameter.requires_grad_(False)
    return model


# ---------------------------------------------------------------- frozen by hand


@pytest.mark.parametrize("which", ["embed_tokens", "layers.2.mlp.down_proj", "norm", ""])
def test_what_is_frozen_is_not_trained(which, tmp_path):
    """One parameter, some, or all: the call says which, how many and the cure, and has touched nothing."""
    model = freeze(tiny_model(), which)
    before = state(model)
    number = sum(not flag for _, flag in before.values())
    first = next(name for name, (_, flag) in before.items() if not flag)
    for call in (unlearn, lambda m: train(m, tmp_path / "t"), lambda m: deep_unl(m, tmp_path)):
        with pytest.raises(ValueError, match="frozen") as error:
            call(model)
        said = str(error.value)
        assert first in said and f"{number} of {len(before)}" in said and "requires_grad_(True)" in said
        assert "\n" not in said
    after = state(model)
    assert all(torch.equal(a, after[name][0]) and flag == after[name][1] for name, (a, flag) in before.items())
    assert list(tmp_path.iterdir()) == [] and all(p.grad is None for p in model.parameters())


def test_frozen_models_are_measured_and_attacked():
    """Neither leaves a weight changed."""
    model = tiny_model()
    truth = kf.knowledge_density(model, FORGET)
    model.requires_grad_(False)
    assert torch.equal(kf.knowledge_density(model, FORGET).per_layer, truth.per_layer)
    assert not any(p.requires_grad for p in model.parameters())
    ownership.no_adapter(model, "the RTT attack")


def test_reinsertion_goes_by_what_it_changes():
    """The original is read from, and may be frozen whole; what is frozen within the block is not trained."""
    original, start = tiny_model(), tiny_model(seed=1)
    unlearned = copy.deepcopy(start)
    reinsert(original, unlearned)
    truth = state(unlearned)
    for prepare in (lambda m: m.requires_grad_(False), lambda m: freeze(m, "embed_tokens")):
        unlearned = copy.deepcopy(start)
        reinsert(prepare(copy.deepcopy(original)), unlearned)
        assert all(torch.equal(value, truth[name][0]) for name, (value, _) in state(unlearned).items())
    unlearned = freeze(copy.deepcopy(start), "layers.0.")  # not in the block
    reinsert(original, unlearned)
    assert all(torch.equal(value, truth[name][0]) for name, (value, _) in state(unlearned).items())
    for one, other, settings in (
        (freeze(copy.deepcopy(original), "layers.2.mlp"), start, {}),
        (freeze(copy.deepcopy(original), "layers.3.input_layernorm"), dict(start.state_dict()), {}),
        (original, freeze(copy.deepcopy(start), "layers.3.self_attn.q_proj"), {}),
        (original, copy.deepcopy(start).requires_grad_(False), {}),
        (copy.deepcopy(original).requires_grad_(False), start, {"insertion": "cumulative"}),
    ):
        with pytest.raises(ValueError, match=r"kf.reinserted trains model.layers.[23].*which is frozen"):
            reinsert(one, other, **settings)


def test_an_unlearned_model_that_is_only_read_may_be_frozen():
    ours, truth = tiny_model(), tiny_model()
    unlearn(truth, unlearned=tiny_model(seed=1))
    unlearn(ours, unlearned=tiny_model(seed=1).requires_grad_(False))
    truth = state(truth)
    assert all(torch.equal(value, truth[name][0]) for name, (value, _) in state(ours).items())


def test_patched_trains_nothing_that_is_frozen():
    model = freeze(freeze(tiny_model(), "layers.2.mlp"), "embed_tokens")
    flags = {name: flag for name, (_, flag) in state(model).items()}
    ids = batch_of_ids()["input_ids"]
    with kf.patched(model, active_block=BLOCK):
        model(input_ids=ids, labels=ids).loss.backward()
        got = {name for name, p in model.named_parameters() if p.grad is not None}
    assert got == {n for n in flags if flags[n] and n.startswith(("model.layers.2.", "model.layers.3."))}
    assert flags == {name: p.requires_grad for name, p in model.named_parameters()}


# ---------------------------------------------------------------- adapters


@pytest.fixture
def peft():
    return pytest.importorskip("peft", reason="peft is not installed")


def adapters(peft):
    """Models with an adapter of each way to put one in."""
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    yield peft.get_peft_model(tiny_model(), lora)
    yield peft.get_peft_model(tiny_model(), lora).requires_grad_(True)
    yield peft.get_peft_model(tiny_model(), peft.IA3Config(task_type="CAUSAL_LM"))
    yield peft.get_peft_model(tiny_model(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    yield peft.inject_adapter_in_model(lora, tiny_model())
    model = tiny_model()
    model.add_adapter(lora)
    yield model


def test_adapters_are_refused_where_weights_are_trained(peft, tmp_path):
    for model in adapters(peft):
        calls = [unlearn, lambda m: train(m, tmp_path / "t"), lambda m: deep_unl(m, tmp_path)]
        calls += [attack, lambda m: reinsert(m, tiny_model()), lambda m: reinsert(tiny_model(), m)]
        calls += [lambda m: unlearn(tiny_model(), unlearned=m)]
        for call in calls:
            with pytest.raises(ValueError, match=r"PEFT adapter.*merge_and_unload\(\)"):
                call(model)
    assert list(tmp_path.iterdir()) == []
    words = "its own states before the layers are .*puts tokens in.*or load the model without it"
    with pytest.raises(ValueError, match=words):
        Decoder(list(adapters(peft))[3])


def test_a_merged_adapter_is_none(peft):
    """The cure that the error names."""
    model = next(adapters(peft)).merge_and_unload().requires_grad_(True)
    ownership.trainable(model, "kf.unlearn")
    before = state(model)
    unlearn(model)
    assert not all(torch.equal(value, before[name][0]) for name, (value, _) in state(model).items())


def test_density_beside_an_adapter(peft):
    model = tiny_model()
    truth = kf.knowledge_density(model, FORGET)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    ours = kf.knowledge_density(peft.get_peft_model(model, lora), FORGET)
    assert torch.allclose(ours.per_layer, truth.per_layer, rtol=1e-12)


def test_no_module_with_an_adapter_is_measured(peft):
    """Of any kind: LoRA's layers are plain linear ones inside. Nor is a model that an adapter changes around them."""
    said = r"PEFT adapter \(.*merge_and_unload\(\).*or load the model without"
    lora = dict(r=2, task_type="CAUSAL_LM")
    for config, modules in (
        (peft.LoraConfig(target_modules="all-linear", **lora), "mlp"),
        (peft.LoraConfig(target_modules=["up_proj"], layers_to_transform=[4], **lora), "mlp"),
        (peft.LoraConfig(target_modules=["q_proj"], **lora), "attention"),
        (peft.LoraConfig(target_modules=["q_proj"], **lora), "all"),
        (peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], **lora), "mlp"),
        (peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["up_proj"], **lora), "mlp"),
        (peft.IA3Config(task_type="CAUSAL_LM"), "mlp"),
        (peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2), "mlp"),
    ):
        model = peft.get_peft_model(tiny_model(), config)
        for call in (kf.knowledge_density, lambda m, f, modules: kf.attribute(m, f, method="grad", modules=modules)):
            with pytest.raises(ValueError, match=said) as error:
                call(model, FORGET, modules=modules)
            assert "\n" not in str(error.value)


# ---------------------------------------------------------------- weights that are elsewhere


class Rounded(nn.Linear):
    """Computes with an int8 copy of its weight."""

    def forward(self, x):
        scale = self.weight.detach().abs().max() / 127
        return x @ (self.weight / scale).round().to(torch.int8).to(x.dtype).T * scale


def elsewhere(tmp_path):
    """(what an error names, a model whose weights are not in memory as they are)."""
    yield "has no weights.*open_streamed", tiny_model().to("meta")
    model = tiny_model()
    model.model.layers[3].mlp.to("meta")
    yield r"model.layers.3.mlp.gate_proj.weight.*\(3 of", model
    model = tiny_model()
    model.model.norm.weight.ds_id = 3
    yield "ZeRO-3", model
    model = tiny_model()
    model._tp_size = 2  # as from_pretrained(tp_plan="auto") does on two processes
    yield "in parts.*tp_plan", model
    model = tiny_model()
    model.model.layers[1].mlp.up_proj.weight = nn.Parameter(torch.zeros(48, 32, dtype=torch.int8), requires_grad=False)
    yield "quantised.*layers.1.mlp.up_proj.weight is int8", model
    model = tiny_model()
    model.model.layers[1].mlp.up_proj.register_buffer("qweight", torch.zeros(4, 4, dtype=torch.int32))
    yield "quantised.*layers.1.mlp.up_proj.qweight", model
    model = tiny_model()
    model.model.layers[1].mlp.up_proj.register_buffer("w_q", torch.zeros(4, 4, dtype=torch.int8))
    yield "quantised.*layers.1.mlp.up_proj.w_q", model
    model = tiny_model()
    linear = model.model.layers[1].mlp.up_proj
    weight = linear.weight.detach()
    del linear.weight
    linear.register_buffer("weight", weight)
    yield "layers.1.mlp.up_proj.weight of .*LlamaForCausalLM is a buffer, which has no gradient", model
    model = tiny_model()
    model.model.layers[1].mlp.up_proj.__class__ = Rounded
    yield "layers.1.mlp.up_proj: Rounded gives its weight no gradient", model
    model = tiny_model()
    kind = type("Linear4bit", (nn.Linear,), {"__module__": "bitsandbytes.nn.modules"})
    model.model.layers[1].mlp.up_proj.__class__ = kind
    yield "quantised.*layers.1.mlp.up_proj is a Linear4bit", model
    model = tiny_model()
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.model.layers[5].mlp.up_proj.weight = nn.Parameter(torch.empty(48, 32, device="cuda:1"))
    yield "2 devices.*on cpu, model.layers.5.mlp.up_proj.weight on cuda:1", model
    yield r"DataParallel is a wrapper.*model\.module", nn.DataParallel(tiny_model())
    with torch.inference_mode():
        model = tiny_model()
    yield "inference_mode", model


def test_weights_that_are_elsewhere(tmp_path):
    for said, model in elsewhere(tmp_path):
        calls = [
            lambda m: kf.knowledge_density(m, FORGET),
            lambda m: kf.attribute(m, FORGET, method="grad"),
            lambda m: reinsert(m, dict(tiny_model().state_dict())),
            unlearn,
            lambda m: train(m, tmp_path / "t"),
        ]
        if "inference" not in said and "gives its" not in said:  # of an M_u that is only read it does not matter
            calls += [lambda m: reinsert(tiny_model(), m), lambda m: unlearn(tiny_model(), unlearned=m)]
        for call in calls:
            with pytest.raises(ValueError, match=said) as error:
                call(model)
            assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="q_proj.weight is on the meta device"):
        reinsert(tiny_model(), dict(tiny_model().to("meta").state_dict()))


def test_offloaded_by_accelerate(tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    cpu, ids = torch.device("cpu"), batch_of_ids()["input_ids"]
    for put in (
        lambda m: accelerate.cpu_offload(m, execution_device=cpu),
        lambda m: accelerate.disk_offload(m, str(tmp_path / "disk"), execution_device=cpu),
        lambda m: accelerate.dispatch_model(
            m, {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "model.rotary_emb": "cpu",
                "lm_head": "cpu"}, main_device="cpu", offload_dir=str(tmp_path / "some"),
        ),
    ):  # fmt: skip
        model = tiny_model()
        truth = model(input_ids=ids).logits
        put(model)
        for call in (lambda m: kf.knowledge_density(m, FORGET), unlearn, lambda m: train(m, tmp_path / "t")):
            with pytest.raises(ValueError, match="offloaded by Accelerate.*memory.*open_streamed"):
                call(model)
        with kf.patched(model):  # whose forwards keep Accelerate's own
            assert torch.allclose(model(input_ids=ids).logits, truth, rtol=1e-12)
        with pytest.raises(ValueError, match="layer 2 .*offloaded"), kf.patched(model, active_block=BLOCK):
            pass
    assert not (tmp_path / "t").exists()


def test_sharded_by_fsdp(tmp_path):
    from torch import distributed
    from torch.distributed.fsdp import fully_shard

    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = tiny_model()
        fully_shard(model)
        wrapped = nn.parallel.DistributedDataParallel(tiny_model())
        for said, given in (("in parts on several processes", model), (r"model\.module", wrapped)):
            with pytest.raises(ValueError, match=said):
                kf.knowledge_density(given, FORGET)
    finally:
        distributed.destroy_process_group()


# ---------------------------------------------------------------- compiled, and with hooks


def test_compiled_models(tmp_path):
    """torch.compile's wrapper has other names for the same weights: results have the model's own."""
    pytest.importorskip("accelerate")
    truth, ours = tiny_model(), tiny_model()
    unlearn(truth)
    unlearn(torch.compile(ours, backend="eager"))
    truth = state(truth)
    assert all(torch.equal(value, truth[name][0]) for name, (value, _) in state(ours).items())
    mixed, plain = tiny_model(seed=1), tiny_model(seed=1)
    reinsert(torch.compile(tiny_model(), backend="eager"), mixed)
    reinsert(tiny_model(), torch.compile(plain, backend="eager"))
    mixed = state(mixed)
    assert all(torch.equal(value, mixed[name][0]) for name, (value, _) in state(plain).items())
    compiled = torch.compile(tiny_model(), backend="eager")
    assert kf.attribute(compiled, FORGET, method="grad").scores.keys() < truth.keys()
    trainer = train(torch.compile(tiny_model(), backend="eager"), tmp_path / "t")
    trainer.save_model(str(tmp_path / "saved"))
    saved = json.loads(
        (tmp_path / "saved" / "model.safetensors").read_bytes()[8:].split(b"}}", 1)[0].decode() + "}}"
    ).keys()
    assert set(truth) <= saved


def layer_of(model):
    return model.model.layers[2]


HOOKS = {
    "a projection's output": lambda m: layer_of(m).mlp.up_proj.register_forward_hook(lambda m, a, o: o * 1.5),
    "a projection's input": lambda m: layer_of(m).mlp.up_proj.register_forward_pre_hook(lambda m, a: (a[0] * 1.5,)),
    "a projection's gradient": lambda m: layer_of(m).mlp.up_proj.register_full_backward_pre_hook(
        lambda m, dy: (dy[0] / 2,)
    ),
    "a norm's output": lambda m: layer_of(m).input_layernorm.register_forward_hook(lambda m, a, o: o * 1.5),
    "a norm's input": lambda m: layer_of(m).input_layernorm.register_forward_pre_hook(lambda m, a: (a[0] + 0.5,)),
    "a norm's gradient": lambda m: layer_of(m).input_layernorm.register_full_backward_pre_hook(
        lambda m, dy: (dy[0] / 2,)
    ),
    "a layer's output": lambda m: layer_of(m).register_forward_hook(lambda m, a, o: o * 1.5),
    "the final norm's output": lambda m: m.model.norm.register_forward_hook(lambda m, a, o: o * 1.5),
}


@pytest.mark.parametrize("where", HOOKS)
def test_density_with_hooks_of_the_users(where):
    """They change what the model computes; the gradient is that of what it computes."""
    model = tiny_model()
    HOOKS[where](model)
    sample = FORGET[0]
    model(input_ids=sample["input_ids"][None], labels=sample["labels"][None]).loss.backward()
    truth = {n: float(p.grad.abs().sum()) for n, p in model.named_parameters() if ".layers." in n}
    model.zero_grad()
    ours = kf.knowledge_density(model, [sample], "all").per_module
    assert ours.keys() == truth.keys()
    assert all(ours[name] == pytest.approx(value, rel=1e-4) for name, value in truth.items())


def test_a_hook_on_the_head():
    """Losses read its weight: a hook that changes the logits is refused, one that looks at them is not."""
    seen, truth = [], Decoder(tiny_model()).logits(pack(FORGET))
    model = tiny_model()
    model.lm_head.register_forward_hook(lambda *_: seen.append(1) and None)
    assert torch.equal(Decoder(model).logits(pack(FORGET)), truth) and seen
    for put in (
        lambda head: head.register_forward_hook(lambda m, a, o: o * 2),
        lambda head: head.register_forward_pre_hook(lambda m, a: (a[0] * 2,)),
        lambda head: head.register_full_backward_hook(lambda m, dx, dy: (dx[0] * 2,)),
        lambda head: setattr(head, "forward", lambda x: nn.Linear.forward(head, x) * 2),
    ):
        model = tiny_model()
        put(model.lm_head)
        with pytest.raises(ValueError, match="head"):
            kf.knowledge_density(model, FORGET)


@pytest.mark.parametrize("architecture, path", [("llama", "mlp.up_proj"), ("gpt2", "mlp.c_fc")])
def test_a_linear_layer_with_a_forward_of_its_own(architecture, path):
    """What is added to its product, as LoRA does, leaves its gradient; what is not a product is autograd's."""
    model = tiny_model(architecture)
    linear = Decoder(model).layers[2].get_submodule(path)
    kind, sample = type(linear), FORGET[0]
    for forward in (lambda x: kind.forward(linear, x) + x.sum(-1, keepdim=True), lambda x: kind.forward(linear, x) * 2):
        linear.forward = forward
        model(input_ids=sample["input_ids"][None], labels=sample["labels"][None]).loss.backward()
        truth = float(linear.weight.grad.abs().sum())
        model.zero_grad()
        ours = kf.knowledge_density(model, [sample]).per_module
        (name,) = (name for name in ours if name.endswith(f".2.{path}.weight"))
        assert ours[name] == pytest.approx(truth, rel=1e-4)
