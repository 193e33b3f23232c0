"""What people do with models, inside `patched`: the same as without it."""

import copy
import logging

import pytest
import torch
import transformers as tf
from helpers import rarely, relative
from patch_problem import FUSED, batch_of_ids, block_parameters, own_loss, results
from tiny_models import VOCAB, random_samples, tiny_model

import kunbr_fast as kf
from kunbr_fast.data import pack
from kunbr_fast.model import compat, patch
from kunbr_fast.model.decoder import Decoder, Stretch

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")

FP32_NORMS = 1e-5  # an fp64 model's own norms are fp32, the fused ones are not: 2 to 6 in each of 6 layers
BLOCK = range(2, 4)


def freeze_all_but(model, block):
    inside = {id(p) for p in block_parameters(model, block).values()}
    for p in model.parameters():
        p.requires_grad_(id(p) in inside)
    return model


# ---------------------------------------------------------------- generation


@pytest.mark.parametrize(
    "how", rarely(["greedy", "sampled", "beams", "static cache", "no cache"], ["beams", "static cache"])
)
@pytest.mark.parametrize("architecture", FUSED)
def test_generate(architecture, how):
    model = tiny_model(architecture, torch.float32)
    ids = torch.randint(3, VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    arguments = {
        "greedy": {"do_sample": False},
        "sampled": {"do_sample": True, "top_k": 0},
        "beams": {"num_beams": 3, "do_sample": False},
        "static cache": {"cache_implementation": "static", "do_sample": False, "disable_compile": True},
        "no cache": {"use_cache": False, "do_sample": False},
    }[how]

    def tokens():
        torch.manual_seed(1)
        return model.generate(ids, attention_mask=mask, max_new_tokens=8, pad_token_id=0, eos_token_id=-1, **arguments)

    truth = tokens()
    with kf.patched(model, active_block=BLOCK):
        ours = tokens()
    assert truth.shape == (2, 17) and torch.equal(ours, truth)


@pytest.mark.parametrize("architecture", FUSED)
def test_hidden_states_and_attention_weights_are_captured(architecture):
    model = tiny_model(architecture)
    model.set_attn_implementation("eager")
    ids = batch_of_ids()["input_ids"]

    def all_of_it():
        out = model(ids, output_hidden_states=True, output_attentions=True)
        return [*out.hidden_states, *out.attentions]

    with torch.no_grad():
        truth = all_of_it()
        with kf.patched(model):
            ours = all_of_it()
        again = all_of_it()
    assert len(ours) == len(truth) == 6 + 1 + 6
    assert all(relative(a, b) < FP32_NORMS for a, b in zip(ours, truth))
    assert all(torch.equal(a, b) for a, b in zip(again, truth))


# ---------------------------------------------------------------- training loops


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("architecture", FUSED)
def test_gradient_checkpointing(architecture, reentrant, caplog):
    patch.say_once.cache_clear()
    model = tiny_model(architecture).train()
    layer = patch._layers(model)[3]
    calls = []
    layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    block = BLOCK if not reentrant else range(0, 6)
    if reentrant:
        model.enable_input_require_grads()  # as everybody must for this kind, also without a patch
    parameters = block_parameters(model, block)
    with kf.patched(model, active_block=block):
        truth = results(lambda: own_loss(model), parameters)
        assert len(calls) == 1
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        logits, loss = own_loss(model)
        loss.backward()
        ours = {"logits": logits, "loss": loss, **{name: p.grad for name, p in parameters.items()}}
        assert len(calls) == 3
        for key, value in truth.items():
            assert relative(ours[key], value) < 1e-12, key
        with caplog.at_level(logging.WARNING, logger="kunbr_fast.model.patch"):
            for _ in range(2):  # a cache must not be written to twice
                cache = tf.DynamicCache(config=model.config)
                model(**batch_of_ids() | {"past_key_values": cache})
                assert cache.get_seq_length() == 0
        ours = [r.message for r in caplog.records if r.name == patch.__name__]
        said = f"{type(layer).__name__}: no cache is kept under gradient checkpointing"
        theirs = (
            architecture == "olmo2" or compat.CALL_CHECKPOINTS
        )  # it is transformers that drops the cache and says so
        assert ours == ([] if theirs else [said])
    model.zero_grad()
    logits, loss = own_loss(model)
    assert relative(logits, truth["logits"]) < FP32_NORMS


@pytest.mark.parametrize("reentrant", [False, True])
def test_backward_ends_at_the_block(reentrant):
    """Also where the embeddings' output requires grad, as TRL has it with PEFT and by its default checkpointing."""
    model, calls = tiny_model().train(), []
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    freeze_all_but(model, BLOCK)

    def gradients():
        model.zero_grad()
        own_loss(model)[1].backward()
        return {name: p.grad.clone() for name, p in block_parameters(model, BLOCK).items()}

    truth = gradients()
    patch._layers(model)[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    with kf.patched(model, active_block=BLOCK):
        ours = gradients()
    around = reentrant and compat.CALL_CHECKPOINTS  # transformers 5.0 recomputes around what is patched
    assert len(calls) == 1 + around  # not again in a backward pass
    assert all(relative(ours[key], value) < FP32_NORMS for key, value in truth.items())


def test_parameters_that_others_make_trainable_inside(caplog):
    """As PEFT's set_adapter does."""
    model = tiny_model()
    with kf.patched(model, active_block=BLOCK):
        pass
    assert not caplog.records
    with kf.patched(model, active_block=BLOCK):
        for layer in patch._layers(model)[:1]:
            layer.requires_grad_(True)
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("model.layers.0.") and said.endswith("LoraConfig(layers_to_transform=[2, 3])")


def test_gradients_of_ones_own_input_embeddings():
    model = tiny_model()
    batch = {"attention_mask": torch.ones(1, 6), "labels": torch.ones(1, 6, dtype=torch.long)}

    def gradient():
        start = model.get_input_embeddings()(torch.arange(3, 9)[None]).detach().requires_grad_()
        return torch.autograd.grad(model(inputs_embeds=start, **batch).loss, start)[0]

    truth = gradient()
    with kf.patched(model, active_block=BLOCK):
        assert relative(gradient(), truth) < FP32_NORMS


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("architecture", ["llama", "phi3", "gemma3"])
def test_dropout_draws_the_same_numbers(architecture, attention):
    model = tiny_model(architecture, torch.float32)
    model.set_attn_implementation(attention)
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.2
        elif isinstance(module, torch.nn.Dropout):  # Phi-3 has two in a layer
            module.p = 0.3
    model.train()

    def run():
        torch.manual_seed(11)
        return own_loss(model)

    truth = results(run, block_parameters(model, BLOCK))
    with kf.patched(model, active_block=BLOCK):
        ours = results(run, block_parameters(model, BLOCK))
    assert relative(truth["logits"], model.eval()(**batch_of_ids()).logits) > 1e-2
    for key, value in truth.items():
        assert relative(ours[key], value) < 1e-5, key


@pytest.mark.parametrize("architecture", ["llama", "phi3", "gemma2"])
def test_a_graph_that_is_kept_and_used_again(architecture):
    """Backward passes write over what they have saved, but not where somebody may need it once more."""
    model = tiny_model(architecture)
    parameters = block_parameters(model, BLOCK)
    with kf.patched(model, active_block=BLOCK):
        truth = results(lambda: own_loss(model), parameters)
        loss = own_loss(model)[1]
        for _ in range(2):
            grads = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True)
            assert all(relative(g, truth[name]) < 1e-12 for name, g in zip(parameters, grads))


@pytest.mark.parametrize("architecture", FUSED)
def test_layers_that_run_again_in_the_backward_pass_on_packed_samples(architecture):
    model = tiny_model(architecture)
    decoder, batch = Decoder(model), pack(random_samples(3))
    parameters = block_parameters(model, BLOCK)
    with kf.patched(model, active_block=BLOCK):
        found = [
            results(lambda: ((h := decoder.run(batch, Stretch(recompute=flag))), h.square().mean()), parameters)  # noqa: B023
            for flag in (False, True)
        ]
    assert all(relative(found[1][name], value) < 1e-12 for name, value in found[0].items())


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "qwen3", "olmo2", "phi3"])
def test_autocast(architecture):
    """fp32 weights, bf16 products: as near to fp32 as without a patch."""
    model = tiny_model(architecture, torch.float32)
    parameters = block_parameters(model, BLOCK)

    def low():
        with torch.autocast("cpu", torch.bfloat16):
            return own_loss(model)

    truth, native = results(lambda: own_loss(model), parameters), results(low, parameters)
    with kf.patched(model, active_block=BLOCK):
        ours = results(low, parameters)
    squares = {}
    for key, value in truth.items():
        assert ours[key].dtype == native[key].dtype
        both = squares.setdefault(key.split(".layers.")[-1].partition(".")[2], [0.0, 0.0])
        both[0] += relative(ours[key], value) ** 2
        both[1] += relative(native[key], value) ** 2
    for kind, (mine, own) in squares.items():
        assert 0 < own < 0.1 and mine <= 4 * own, kind


@pytest.mark.parametrize(
    "architecture, backend",
    [
        pytest.param("llama", "aot_eager", marks=pytest.mark.slow),
        ("gemma3", "eager"),
        pytest.param("phi3", "eager", marks=pytest.mark.slow),
        ("olmo2", "eager"),
    ],
)
def test_compiled(architecture, backend):
    """The outer model, as one graph; what was compiled inside is not what runs afterwards."""
    torch.compiler.reset()
    layers = 2 if backend == "aot_eager" else 1
    model, block = tiny_model(architecture, num_hidden_layers=layers), range(layers - 1, layers)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    parameters = block_parameters(model, block)
    truth = results(lambda: own_loss(model), parameters)
    with kf.patched(compiled, active_block=block) as same:
        assert same is compiled and "forward" in patch._layers(model)[0].mlp.__dict__
        eager = results(lambda: own_loss(model), parameters)
        ours = results(lambda: own_loss(compiled), parameters)
    for key, value in truth.items():
        assert relative(ours[key], value) < FP32_NORMS, key
        assert relative(ours[key], eager[key]) < 1e-12, key
    after = results(lambda: own_loss(compiled), parameters)
    assert all(relative(after[key], value) < 1e-12 for key, value in truth.items())


def steps(model, tmp_path, **arguments):
    samples = [{"input_ids": ids, "labels": ids} for ids in batch_of_ids()["input_ids"].repeat(2, 1)]
    arguments = dict(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=3, learning_rate=1e-2, use_cpu=True,
        report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True, seed=0,
    ) | arguments  # fmt: skip
    trainer = tf.Trainer(model=model, args=tf.TrainingArguments(**arguments), train_dataset=samples)
    trainer.train()
    assert trainer.state.global_step == 2
    return model


@pytest.mark.parametrize("checkpointing", rarely([False, True], [True]))
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "olmo2"])
def test_trainer(architecture, checkpointing, tmp_path):
    pytest.importorskip("accelerate")
    start = tiny_model(architecture, torch.float32)
    truth = steps(freeze_all_but(copy.deepcopy(start), BLOCK), tmp_path, gradient_checkpointing=checkpointing)
    ours = copy.deepcopy(start)
    with kf.patched(ours, active_block=BLOCK):
        steps(ours, tmp_path, gradient_checkpointing=checkpointing)
    moved = block_parameters(ours, BLOCK)
    truth, start = dict(truth.named_parameters()), dict(start.named_parameters())
    for name, p in ours.named_parameters():
        if name in moved:
            # AdamW's first steps are lr * sign(gradient), nearly: where a gradient is at rounding level it may differ
            assert relative(p - start[name], truth[name] - start[name]) < 1e-2, name
        else:
            assert torch.equal(p, start[name]) and torch.equal(truth[name], start[name])
    assert not any("forward" in module.__dict__ for module in patch._layers(ours).modules())


# ---------------------------------------------------------------- this package's own


@pytest.mark.parametrize("architecture", ["llama", "phi3", "gemma3"])
def test_decoder_and_density_inside(architecture):
    """Density watches single modules through hooks; a `Decoder` checks itself when it is made."""
    model, samples = tiny_model(architecture), random_samples(3)
    truth = kf.knowledge_density(model, samples, modules="all")
    with kf.patched(model):
        decoder = Decoder(model)
        logits = decoder.logits(pack(samples)).detach()
        ours = kf.knowledge_density(model, samples, modules="all")
    assert relative(logits, decoder.logits(pack(samples))) < FP32_NORMS
    assert relative(ours.per_layer, truth.per_layer) < FP32_NORMS
    assert not any("forward" in module.__dict__ for module in model.modules())


# ---------------------------------------------------------------- adapters


@pytest.fixture
def peft():
    return pytest.importorskip("peft")


def with_lora(peft, model, **arguments):
    torch.manual_seed(3)
    arguments = {"target_modules": "all-linear", "r": 2, "lora_alpha": 4} | arguments
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **arguments))
    return model.double()


@pytest.mark.parametrize(
    "arguments", [{}, {"target_modules": ["q_proj", "up_proj", "qkv_proj"]}, {"use_dora": True}], ids=str
)
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2", "phi3"])
def test_lora(peft, architecture, arguments):
    """Adapters inside the block train, those outside are frozen; a model that was wrapped before it is patched."""
    if architecture == "phi3" and "use_dora" in arguments:
        pytest.skip("one DoRA model with separate projections is enough")
    model = with_lora(peft, tiny_model(architecture), **arguments)
    asked = {name for name, p in model.named_parameters() if p.requires_grad}
    inside = {name: p for name, p in block_parameters(model, BLOCK).items() if name in asked}
    truth = results(lambda: own_loss(model), inside)
    with kf.patched(model, active_block=BLOCK):
        assert {name for name, p in model.named_parameters() if p.requires_grad} == set(inside)
        ours = results(lambda: own_loss(model), inside)
        with model.disable_adapter():
            bare = own_loss(model)[0]
    assert {name for name, p in model.named_parameters() if p.requires_grad} == asked
    for key, value in truth.items():
        assert relative(ours[key], value) < FP32_NORMS, key
    with model.disable_adapter():
        assert relative(bare, own_loss(model)[0]) < FP32_NORMS < relative(bare, truth["logits"])


def test_lora_put_in_and_merged_while_patched(peft):
    model = tiny_model("llama")
    with kf.patched(model):
        wrapped = with_lora(peft, model)
        inside = own_loss(wrapped)[0]
        merged = wrapped.merge_and_unload()
        assert relative(own_loss(merged)[0], inside) < 1e-12
    assert relative(own_loss(merged)[0], inside) < FP32_NORMS


def test_trainer_with_lora(peft, tmp_path):
    start = with_lora(peft, tiny_model("llama")).float()
    truth = steps(freeze_lora(copy.deepcopy(start)), tmp_path)
    ours = copy.deepcopy(start)
    with kf.patched(ours, active_block=BLOCK):
        steps(ours, tmp_path)
    truth, before = dict(truth.named_parameters()), dict(start.named_parameters())
    moved = [name for name, p in ours.named_parameters() if not torch.equal(p, before[name])]
    assert moved and moved == [name for name in truth if not torch.equal(truth[name], before[name])]
    for name, p in ours.named_parameters():
        if name in moved:
            assert relative(p - before[name], truth[name] - before[name]) < 1e-2, name


def freeze_lora(model):
    inside = {id(p) for p in block_parameters(model, BLOCK).values()}
    for p in model.parameters():
        p.requires_grad_(p.requires_grad and id(p) in inside)
    return model
