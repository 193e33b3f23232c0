"""Re-insertion: the original comes back bit for bit, only the block trains, and no more is in memory than said."""

import copy

import pytest
import torch
from helpers import rarely
from reference_procedure import left_padded, padded, reference_block
from reinsertion_problem import BLOCK, FORGET, RETAIN, equal, identity, in_block, touched_model, weights
from tiny_models import ARCHITECTURES, live_tensor_bytes, moved, peak_bytes, random_samples, tiny_model

import kunbr_fast as kf
from kunbr_fast.data import pack
from kunbr_fast.data.batch import join
from kunbr_fast.files.tensors import WeightSnapshot
from kunbr_fast.model.calls import hidden_of
from kunbr_fast.model.decoder import Decoder
from kunbr_fast.training import flat_buffer
from kunbr_fast.training.block import block_tensors

# ---------------------------------------------------------------- what comes back


@pytest.mark.parametrize("optimizer", ["lion", "adamw"])
def test_the_original_comes_back_and_the_unlearned_gets_the_block(optimizer):
    original = touched_model()
    unlearned = moved(original)
    before, start, grads = (
        weights(original),
        weights(unlearned),
        [None if p.grad is None else p.grad.clone() for p in original.parameters()],
    )
    was, other = identity(original), identity(unlearned)
    with kf.reinserted(original, unlearned, BLOCK, lr=1e-3, optimizer=optimizer) as training:
        assert not original.training
        for name, parameter in original.named_parameters():
            assert parameter.requires_grad == in_block(name)
            assert torch.equal(parameter.detach(), start[name] if in_block(name) else before[name])
        for _ in range(3):
            training.step(FORGET, RETAIN)
        assert equal(weights(unlearned), start)  # until the block is done
        inside = {name: tensor.clone() for name, tensor in training.tensors().items()}
    assert identity(original) == was and identity(unlearned) == other
    assert equal(weights(original), before)
    for parameter, grad in zip(original.parameters(), grads):
        assert (parameter.grad is None) == (grad is None) and (grad is None or torch.equal(parameter.grad, grad))
    now = weights(unlearned)
    for name in now:
        assert torch.equal(now[name], inside[name] if in_block(name) else start[name]), name
        if in_block(name):
            assert not torch.equal(now[name], start[name]), name


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, GeneratorExit])
@pytest.mark.parametrize("insertion", ["independent", "cumulative"])
def test_an_exception_puts_all_back(error, insertion):
    original = touched_model()
    unlearned = moved(original)
    before, start, was = weights(original), weights(unlearned), identity(original)
    with pytest.raises(error):
        with kf.reinserted(original, unlearned, BLOCK, lr=1e-3, insertion=insertion) as training:
            training.step(FORGET, RETAIN)
            raise error
    assert identity(original) == was and equal(weights(original), before) and equal(weights(unlearned), start)


def test_an_exception_in_the_setup_puts_all_back(monkeypatch):
    original = touched_model()
    unlearned = moved(original)
    before, start, was = weights(original), weights(unlearned), identity(original)
    for settings in ({"betas": (2.0, 0.9)}, {"lr": -1.0}, {"weight_decay": -1.0}):
        for optimizer in ("lion", "adamw"):
            with pytest.raises(ValueError):
                with kf.reinserted(original, unlearned, BLOCK, **{"lr": 1e-3, "optimizer": optimizer, **settings}):
                    pass
            assert identity(original) == was and equal(weights(original), before)

    def out_of_memory(*args, **kwargs):
        raise torch.OutOfMemoryError("for the optimiser")

    monkeypatch.setattr(flat_buffer, "make_optimizer", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        with kf.reinserted(original, unlearned, BLOCK, lr=1e-3):
            pass
    assert identity(original) == was and equal(weights(original), before) and equal(weights(unlearned), start)


@pytest.mark.parametrize("insertion", ["independent", "cumulative"])
def test_an_exception_while_the_block_is_moved_back_puts_all_back(insertion):
    class Full(dict):
        def __setitem__(self, name, value):
            raise OSError("disk full")

    original = touched_model()
    before, was = weights(original), identity(original)
    unlearned = Full(weights(moved(original)))
    with pytest.raises(OSError, match="disk full"):
        with kf.reinserted(original, unlearned, BLOCK, lr=1e-3, insertion=insertion) as training:
            training.step(FORGET, RETAIN)
    assert identity(original) == was and equal(weights(original), before)


def test_cumulative_leaves_the_block_in_its_own_storage():
    original = touched_model()
    unlearned = moved(original)
    before, was = weights(original), identity(original)
    with kf.reinserted(original, unlearned, BLOCK, lr=1e-3, insertion="cumulative") as training:
        training.step(FORGET, RETAIN)
    assert identity(original) == was
    trained, now = weights(unlearned), weights(original)
    for name in now:
        assert torch.equal(now[name], trained[name] if in_block(name) else before[name])
    assert not equal(now, before)


def test_nested_blocks_of_one_model():
    """A block inside the visit of another: the inner one leaves the outer as it was."""
    original = tiny_model()
    unlearned, before = moved(original), weights(original)
    with kf.reinserted(original, unlearned, range(1, 2), lr=1e-3) as outer:
        outer.step(FORGET, RETAIN)
        kept = {name: tensor.clone() for name, tensor in outer.tensors().items()}
        with kf.reinserted(original, unlearned, range(3, 4), lr=1e-3) as inner:
            inner.step(FORGET, RETAIN)
        assert equal(outer.tensors(), kept)
        outer.step(FORGET, RETAIN)
        assert not equal(outer.tensors(), kept)
    assert equal(weights(original), before)


@pytest.mark.parametrize("kind", ["state dict", "only the block", "snapshot-like"])
def test_unlearned_as_a_mapping(kind):
    original = tiny_model()
    model = moved(original)
    with kf.reinserted(original, copy.deepcopy(model), BLOCK, lr=1e-3) as training:
        training.step(FORGET, RETAIN)
        truth = {name: tensor.clone() for name, tensor in training.tensors().items()}
    mapping = weights(model)
    if kind == "only the block":
        mapping = {name: value for name, value in mapping.items() if in_block(name)}
    start = {name: value.clone() for name, value in mapping.items()}
    with kf.reinserted(original, mapping, BLOCK, lr=1e-3) as training:
        training.step(FORGET, RETAIN)
        assert equal(mapping, start)
    assert set(mapping) == set(start)
    for name in mapping:
        assert torch.equal(mapping[name], truth[name] if in_block(name) else start[name])


# ---------------------------------------------------------------- what is trained


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_only_the_block_gets_a_gradient_and_its_input_none(architecture):
    original = tiny_model(architecture)
    decoder = Decoder(original)
    inputs = {}

    def keep(index):
        def hook(module, args, output):
            # a layer is called twice: once replaced by a recorder, which hands its input through
            inputs[index] = inputs.get(index, False) or hidden_of(output).requires_grad

        return hook

    with kf.reinserted(decoder, moved(original), BLOCK, lr=1e-3) as training:
        handles = [layer.register_forward_hook(keep(i)) for i, layer in enumerate(decoder.layers)]
        loss = training.loss(training.criterion.pack(FORGET, RETAIN)).loss
        for handle in handles:
            handle.remove()
        # the block's input has no graph below it, so no gradient of it is computed
        assert inputs == {i: i >= BLOCK.start for i in range(6)}
        loss.backward()
        path = decoder.layer_path(0)[:-2]
        for name, parameter in original.named_parameters():
            assert (parameter.grad is not None) == in_block(name, BLOCK, path), name
        assert any(bool(p.grad.any()) for p in training.parameters.values())


def saved_bytes(training, batch):
    """{storage address: bytes} of all that autograd keeps between the forward and the backward pass."""
    saved = {}

    def pack_hook(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda tensor: tensor):
        training.loss(batch)
    return saved


def test_nothing_is_kept_for_gradients_that_nobody_asked_for():
    """A cover layer's down_proj input (T, 48) is what only its dW would need; a block layer's must be kept."""
    original = tiny_model()
    decoder = Decoder(original)
    kept = {}
    with kf.reinserted(decoder, moved(original), range(3, 4), lr=1e-3) as training:
        handles = []
        for i, layer in enumerate(decoder.layers):

            def hook(module, args, i=i):
                kept[i] = args[0].untyped_storage()  # holds the storage, so that its address stays its own

            handles.append(layer.mlp.down_proj.register_forward_pre_hook(hook))
        saved = saved_bytes(training, training.criterion.pack(FORGET, RETAIN))
        for handle in handles:
            handle.remove()
    assert kept[3].data_ptr() in saved
    assert not any(kept[i].data_ptr() in saved for i in (0, 1, 2, 4, 5))


@pytest.mark.parametrize(
    "dtype, optimizer, vectors",
    # bytes for each block weight: weights + gradient + optimiser state (+ master copy)
    [
        (torch.float32, "lion", 4 + 4 + 4),
        (torch.float32, "adamw", 4 + 4 + 8),
        (torch.bfloat16, "lion", 2 + 2 + 4 + 4),
    ],
)
def test_memory_is_the_block_and_not_a_second_model(dtype, optimizer, vectors, tmp_path):
    original = tiny_model(dtype=dtype)
    unlearned = WeightSnapshot.save(moved(original), tmp_path / "u.safetensors")

    class Values(dict):  # M_u on disk, as in a run
        __contains__ = unlearned.__contains__
        __getitem__ = unlearned.__getitem__

    decoder, result = Decoder(original), Values()
    size = sum(p.numel() for p in block_tensors(decoder, BLOCK).values())
    base = live_tensor_bytes()
    with kf.reinserted(decoder, result, BLOCK, lr=1e-3, optimizer=optimizer) as training:
        training.step(FORGET, RETAIN)
        training.check()  # which lets go of the step's batch
        extra = live_tensor_bytes() - base
        del training
    assert vectors * size <= extra <= vectors * size + 200, (extra / size, vectors)
    result.clear()
    assert live_tensor_bytes() - base <= 200


@pytest.mark.parametrize("architecture", rarely(["llama", "gemma2", "gpt2"], ["gemma2"]))
def test_checkpointing_lowers_the_peak_and_keeps_the_bits(architecture):
    original = tiny_model(architecture)
    decoder, values = Decoder(original), dict(moved(original).named_parameters())
    forget, retain = random_samples(6, low=12, high=12), random_samples(6, seed=1, low=12, high=12)
    weights, peaks = [], []
    for flag in (False, True):
        with kf.reinserted(decoder, dict(values), range(1, 3), lr=1e-3, gradient_checkpointing=flag) as training:
            training.step(forget, retain)
            peaks.append(peak_bytes(lambda training=training: training.step(forget, retain)))
            weights.append({name: value.clone() for name, value in training.tensors().items()})
    assert peaks[1] < 0.7 * peaks[0], peaks
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


# ---------------------------------------------------------------- the same step from any batch


def test_every_form_of_batch_gives_the_same_step(tmp_path):
    original = tiny_model()
    unlearned = weights(moved(original))
    decoder = Decoder(original)
    cache = kf.PrefixCache(decoder, FORGET + RETAIN, "file", tmp_path)
    cache.advance(BLOCK.start)

    def hf(samples, side):
        ids, mask, labels = side(samples, 3)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    forms = {
        "samples": (FORGET, RETAIN),
        "packed": (pack(FORGET), pack(RETAIN)),
        "right": (hf(FORGET, padded), [hf(RETAIN, padded)]),
        "left": ([hf(FORGET[:2], left_padded), hf(FORGET[2:], left_padded)], hf(RETAIN, left_padded)),
        "cache": (cache.batch(range(4)), cache.batch(range(4, 9))),
    }
    results = {}
    for name, (forget, retain) in forms.items():
        with kf.reinserted(decoder, dict(unlearned), BLOCK, lr=1e-3, retain_coeff=2.0, optimizer="adamw") as training:
            metrics = [training.step(forget, retain) for _ in range(3)]
            results[name] = metrics, {n: t.clone() for n, t in training.tensors().items()}
            assert training.steps == 3
    truth_metrics, truth = results["samples"]
    assert truth_metrics[0]["tokens"] == sum(len(s["input_ids"]) for s in FORGET + RETAIN)
    assert (
        abs(truth_metrics[0]["loss"] - (-truth_metrics[0]["forget_loss"] + 2 * truth_metrics[0]["retain_loss"])) < 1e-12
    )
    for name, (metrics, tensors) in results.items():
        for ours, theirs in zip(metrics, truth_metrics):
            assert ours == pytest.approx(theirs, rel=1e-10), name
        for key in truth:
            torch.testing.assert_close(tensors[key], truth[key], rtol=1e-9, atol=1e-10, msg=f"{name} {key}")


def test_forget_alone():
    original = tiny_model()
    with kf.reinserted(original, moved(original), BLOCK, lr=1e-4) as training:
        first = training.step(FORGET)
        for _ in range(5):
            last = training.step(FORGET)
    assert first["retain_loss"] is None and first["loss"] == pytest.approx(-first["forget_loss"])
    assert last["forget_loss"] > first["forget_loss"]  # it forgets


def test_the_retain_set_is_learned_and_the_forget_set_unlearned():
    original = tiny_model()
    with kf.reinserted(original, moved(original), BLOCK, lr=1e-4, retain_coeff=2.0) as training:
        first = training.step(FORGET, RETAIN)
        for _ in range(8):
            last = training.step(FORGET, RETAIN)
    assert last["forget_loss"] > first["forget_loss"] and last["retain_loss"] < first["retain_loss"]


def test_weight_decay_and_betas_reach_the_optimiser():
    original = tiny_model()
    results = []
    for settings in ({}, {"weight_decay": 0.5}, {"betas": (0.1, 0.2)}, {"retain_coeff": 3.0}, {"forget_loss_cap": 1.0}):
        unlearned = moved(original)
        with kf.reinserted(original, unlearned, BLOCK, lr=1e-2, **settings) as training:
            for _ in range(4):
                training.step(FORGET, RETAIN)
        results.append(unlearned.model.layers[2].mlp.up_proj.weight.detach())
    for i in range(1, 5):
        assert not torch.equal(results[0], results[i])


def test_batches_that_do_not_fit():
    original = tiny_model()
    decoder = Decoder(original)
    cache = kf.PrefixCache(decoder, FORGET + RETAIN)
    cache.advance(1)
    with kf.reinserted(decoder, moved(original), BLOCK, lr=1e-3) as training:
        start = {name: tensor.clone() for name, tensor in training.tensors().items()}
        with pytest.raises(ValueError, match="the batch holds the input of layer 1, the block begins at layer 2"):
            training.step(cache.batch([0]), cache.batch([5]))
        with pytest.raises(ValueError, match="comes from a prefix cache and the other does not"):
            training.step(cache.batch([0]), RETAIN)
        one = cache.batch([0])
        cache.advance(2)
        with pytest.raises(ValueError, match="different layers"):
            join(one, cache.batch([1]))
        blank = [{"input_ids": torch.tensor([4, 5, 6]), "labels": torch.tensor([4, -100, -100])}]
        with pytest.raises(ValueError, match="sample 4 of the batch has no token with a loss"):
            training.step(FORGET, blank)
        with pytest.raises(ValueError, match="an empty batch|no samples"):
            training.step([], RETAIN)
        assert equal(training.tensors(), start) and training.steps == 0 and not training.flat.grad.any()


# ---------------------------------------------------------------- named errors


def test_refusals_name_the_weight(monkeypatch):
    original = tiny_model()
    before, was = weights(original), identity(original)
    name = "model.layers.3.mlp.up_proj.weight"

    def attempt(unlearned, message, model=original, block=BLOCK, **settings):
        with pytest.raises(ValueError, match=message):
            with kf.reinserted(model, unlearned, block, lr=1e-3, **settings):
                raise AssertionError("the block was taken")

    good = weights(moved(original))
    attempt({k: v for k, v in good.items() if k != name}, f"^the unlearned model has no {name}")
    attempt({**good, name: good[name][:-1]}, rf"^{name}: \(47, 32\) in the unlearned model, \(48, 32\) in the original")
    for value in (torch.nan, torch.inf):
        bad = good[name].clone()
        bad[3, 4] = value
        attempt({**good, name: bad}, f"^{name}: the unlearned model holds NaN or infinite values")
    attempt(tiny_model("gpt2"), "the unlearned model has no model.layers.2")
    attempt(
        tiny_model("qwen2"),
        "the unlearned model has no model.layers.2.self_attn.qkv_proj.weight",
        model=tiny_model("phi3"),
    )
    attempt(good, r"block=range\(4, 7\): expected a range of layers within range\(6\)", block=range(4, 7))
    attempt(good, "insertion='both': expected one of", insertion="both")
    attempt(original, "is the original", model=original)
    assert identity(original) == was and equal(weights(original), before)

    tied = tiny_model()
    tied.model.layers[3].mlp.up_proj.weight = tied.model.layers[5].mlp.up_proj.weight
    attempt(good, f"^{name} is tied to model.layers.5.mlp.up_proj.weight", model=tied)
    tied = tiny_model()
    tied.model.layers[2].self_attn = tied.model.layers[3].self_attn
    attempt(good, "model.layers.2.self_attn.q_proj.weight is tied to model.layers.3.self_attn", model=tied)


def test_a_tied_head_is_no_obstacle():
    """Embeddings and head are both cover: Gemma-2 ties them."""
    original = tiny_model("gemma2")
    assert original.lm_head.weight is original.model.embed_tokens.weight
    before = weights(original)
    with kf.reinserted(original, moved(original), BLOCK, lr=1e-3) as training:
        training.step(random_samples(3, low=6), random_samples(3, low=6))
    assert equal(weights(original), before) and original.lm_head.weight is original.model.embed_tokens.weight


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_a_loss_that_is_not_finite(how):
    original = tiny_model()
    unlearned, before = moved(original), weights(original)
    with pytest.raises(kf.Diverged, match="diverged at block 2-3, step 1 .*lower the learning rate") as error:
        with kf.reinserted(original, unlearned, BLOCK, lr=1e-3) as training:
            training.step(FORGET, RETAIN)
            good = {name: tensor.clone() for name, tensor in training.tensors().items()}
            state = {name: tensor.clone() for name, tensor in training.state().items()}
            if how == "loss":
                handle = original.model.layers[5].register_forward_hook(lambda m, args, out: out * torch.nan)
            else:
                handle = original.model.layers[3].mlp.register_full_backward_hook(
                    lambda m, grad_in, grad_out: tuple(None if g is None else g * torch.inf for g in grad_in)
                )
            try:
                training.step(FORGET, RETAIN)
            except kf.Diverged:
                assert equal(training.tensors(), good) and equal(training.state(), state)
                assert training.steps == 1 and not training.flat.grad.any()
                handle.remove()
                raise
    assert error.value.metrics["tokens"] > 0
    assert equal(weights(original), before)


# ---------------------------------------------------------------- state


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("optimizer", ["lion", "adamw"])
def test_a_resumed_block_goes_on_with_the_same_bits(dtype, optimizer):
    original = tiny_model(dtype=dtype)
    unlearned = weights(moved(original))
    options = {"lr": 1e-3, "optimizer": optimizer, "weight_decay": 0.1}
    batches = [(random_samples(3, seed=10 + i), random_samples(3, seed=20 + i)) for i in range(6)]
    with kf.reinserted(original, dict(unlearned), BLOCK, **options) as training:
        for batch in batches:
            training.step(*batch)
        truth = {name: tensor.clone() for name, tensor in training.state().items()}
    with kf.reinserted(original, dict(unlearned), BLOCK, **options) as training:
        for batch in batches[:3]:
            training.step(*batch)
        saved = {name: tensor.clone() for name, tensor in training.state().items()}
    kept = {name: tensor.clone() for name, tensor in saved.items()}
    for attempt in range(2):  # the saved state is not used up by the first who takes it
        with kf.reinserted(original, dict(unlearned), BLOCK, **options) as training:
            if attempt:  # nor does what was trained before matter
                training.step(*batches[5])
            training.load_state(saved, 3)
            for batch in batches[3:]:
                training.step(*batch)
            assert training.steps == 6 and equal(training.state(), truth)
        assert equal(saved, kept)


def test_a_state_before_the_first_step():
    original = tiny_model()
    with kf.reinserted(original, moved(original), BLOCK, lr=1e-3) as training:
        empty = {name: tensor.clone() for name, tensor in training.state().items()}
        training.step(FORGET, RETAIN)
        once = {name: tensor.clone() for name, tensor in training.state().items()}
        training.load_state(empty, 0)
        training.step(FORGET, RETAIN)
        assert equal(training.state(), once)


def test_master_weights_keep_small_updates(caplog, monkeypatch):
    monkeypatch.setattr(flat_buffer, "_warned", set())
    original = tiny_model(dtype=torch.bfloat16)
    moves = {}
    for master in ("fp32", "stochastic", "none"):
        caplog.clear()
        unlearned = moved(original)
        start = weights(unlearned)
        with kf.reinserted(original, unlearned, BLOCK, lr=2e-6, master_weights=master) as training:
            for _ in range(60):
                training.step(FORGET, RETAIN)
        assert ("take master_weights fp32 (or, in bf16, stochastic)" in caplog.text) == (master == "none")
        name = "model.layers.2.input_layernorm.weight"  # values near 1, where bf16 steps are 8e-3
        moves[master] = int((weights(unlearned)[name] != start[name]).sum())
        total = sum(int((v != start[n]).sum()) for n, v in weights(unlearned).items())
        moves[master, "all"] = total
    assert moves["none"] == 0
    for master in ("fp32", "stochastic"):
        assert moves[master, "all"] > moves["none", "all"]


def test_two_visits_are_the_reference_procedures():
    """The same block twice, the optimiser started anew: as in the published code."""
    original = tiny_model()
    unlearned = moved(original)
    truth_original, truth = copy.deepcopy(original), copy.deepcopy(unlearned)
    for _ in range(2):
        reference_block(truth_original, truth, "model.layers", BLOCK, [(FORGET, RETAIN)] * 3, 1e-3, 1.0)
        with kf.reinserted(original, unlearned, BLOCK, lr=1e-3) as training:
            for _ in range(3):
                training.step(FORGET, RETAIN)
    for (name, ours), theirs in zip(unlearned.named_parameters(), truth.parameters()):
        assert float((ours - theirs).detach().norm()) <= 1e-9 * float(theirs.detach().norm()), name


# ---------------------------------------------------------------- every implementation


@pytest.mark.parametrize("optimizer", rarely(["lion", "adamw"], ["lion"]))
def test_the_kernels_train_the_same_block(optimizer):
    """impl="triton" in the interpreter (on the GPU where there is one): loss, gradient and update of the torch form."""
    pytest.importorskip("triton", reason="triton is made for Linux only")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    original = tiny_model(dtype=torch.float32, num_hidden_layers=3).to(device)
    values = {name: p.detach().clone() for name, p in moved(original).named_parameters()}
    forget, retain, found = FORGET[:2], RETAIN[:1], {}
    for impl in ("torch", "triton"):
        with kf.reinserted(original, dict(values), range(1, 2), lr=1e-3, optimizer=optimizer, impl=impl) as training:
            packed = pack(forget + retain).to(device)
            part = training.loss(training.criterion.step_batch(packed, len(forget))).backward()
            grad = training.flat.grad.clone()
            training.flat.grad.zero_()
            training.step(forget, retain)
            found[impl] = part.loss, part.nll, grad, training.flat.param.detach().clone()
    (loss, nll, grad, weights), (loss_t, nll_t, grad_t, weights_t) = found["torch"], found["triton"]
    torch.testing.assert_close(loss_t, loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(nll_t, nll, rtol=1e-5, atol=1e-6)
    assert float((grad_t - grad).norm() / grad.norm()) < 1e-5
    # the first step of both optimisers is the gradient's sign, which rounding decides where the gradient is nearly 0
    clear = grad.abs() > 1e-4 * grad.abs().max()
    assert clear.float().mean() > 0.9
    torch.testing.assert_close(weights_t[clear], weights[clear], rtol=0, atol=1e-5)
