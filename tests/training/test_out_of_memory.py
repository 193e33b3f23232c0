"""Memory runs out: the step goes on in smaller parts with the same result, or the error says what to change."""

import contextlib
import math

import pytest
import torch
from graph_emulator import capture
from helpers import rarely
from reinsertion_problem import BLOCK, FORGET, RETAIN, equal, weights
from tiny_models import moved, random_samples, tiny_model

import kunbr_fast as kf
from kunbr_fast.cli import command as cli
from kunbr_fast.data import pack
from kunbr_fast.density.attribution import attribute
from kunbr_fast.density.layer_kinds import How
from kunbr_fast.density.measure import knowledge_density
from kunbr_fast.density.passes import Measurement
from kunbr_fast.density.watch import watch_list
from kunbr_fast.memory import OutOfMemory, is_out_of_memory
from kunbr_fast.model.decoder import Decoder
from kunbr_fast.model.prefix_cache import PrefixCache
from kunbr_fast.objectives.criterion import Criterion
from kunbr_fast.objectives.original import OriginalValues
from kunbr_fast.training.block import BlockTraining
from kunbr_fast.training.full import FullTraining

SAYS = "CUDA out of memory. Tried to allocate 1.00 GiB"


@contextlib.contextmanager
def memory_for(tokens, decoder, layer=4, backward=False, error=torch.OutOfMemoryError):
    """Inside, a pass of more than `tokens` tokens through a layer raises an error, or its backward pass does, when the
    layers above have their gradients already. Yields the tokens of the passes that were tried."""
    tried, real, outer = [], decoder.run, decoder.__dict__.get("run")

    def run(batch, *args, **kwargs):
        tried.append(batch.num_tokens)
        return real(batch, *args, **kwargs)

    def raise_(*_):
        raise error(SAYS)

    def hook(module, args, output):
        output = output[0] if isinstance(output, tuple) else output
        if tried and tried[-1] > tokens:
            if not backward:
                raise_()
            elif output.requires_grad:
                output.register_hook(raise_)

    handle = decoder.layers[layer].register_forward_hook(hook)
    decoder.run = run
    try:
        yield tried
    finally:
        handle.remove()
        del decoder.run
        if outer is not None:
            decoder.run = outer


def with_alternates(samples, seed=9):
    return [{**s, "alternate": o} for s, o in zip(samples, random_samples(len(samples), seed=seed))]


OBJECTIVES = {
    "gradient_difference": dict(forget_loss_cap=4.0),
    "ga": {},
    "npo": dict(retain_loss="kl"),
    "simnpo": dict(retain_loss="hidden_mse"),
    "undial": dict(retain_loss="kl_all"),
    "dpo": {},
    "ceu": {},
    "pdu": dict(retain_loss="hidden_layers", objective_options={"retain_loss_eps": 0.3, "dual_step_size": 0.5}),
    "rmu": dict(objective_options={"layer": 4}),
}


@pytest.mark.parametrize("backward", rarely([False, True], [True]))
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_blocks_steps_in_parts_are_the_steps_of_the_whole(objective, backward, caplog):
    """The optimiser is AdamW: Lion's signs would hide what is wrong by a factor."""
    settings = dict(lr=1e-3, optimizer="adamw", retain_coeff=1.7, objective=objective, **OBJECTIVES[objective])
    forget = with_alternates(FORGET) if objective == "dpo" else FORGET
    whole = sum(len(s["input_ids"]) for s in forget + (RETAIN if objective != "none" else []))
    whole += sum(len(s["alternate"]["input_ids"]) for s in forget if "alternate" in s)
    results = []
    for short in (False, True):
        original = tiny_model()
        decoder, mine = Decoder(original), weights(moved(original))
        with kf.reinserted(decoder, mine, BLOCK, **settings) as training:
            layer = 3 if backward and objective != "rmu" else 4
            limit = memory_for(30 if short else math.inf, decoder, BLOCK.start if backward else layer, backward)
            with limit as tried:
                found = [training.step(forget, RETAIN) for _ in range(3)]
            assert training.halvings == (short and len({t for t in tried if t > 30}))
            assert not training.flat.grad.any()
            state = {name: value.clone() for name, value in training.state().items()}
        results.append((found, state, mine))
    (found, state, mine), (other, their_state, theirs) = results
    limit = training.micro_batch_tokens
    assert limit <= 30 and whole > 60 and max(tried[-3:]) <= 30
    for a, b in zip(found, other, strict=True):
        a, b = ({name: value for name, value in metrics.items() if value is not None} for metrics in (a, b))
        assert b == pytest.approx(a, rel=1e-12, abs=1e-13)
    for name in mine:
        torch.testing.assert_close(theirs[name], mine[name], rtol=1e-12, atol=1e-12)
    for name in state:
        torch.testing.assert_close(their_state[name], state[name], rtol=1e-10, atol=1e-13)
    (line,) = [r.getMessage() for r in caplog.records if "memory ran out" in r.getMessage()]
    assert line.startswith("block 2-3: memory ran out") and f"micro_batch_tokens: {limit}" in line


def test_the_number_of_parts_is_as_expected():
    """16 samples of 5 tokens and room for 25: 80 and 40 do not fit, 20 do; the next step begins with 20."""
    samples = random_samples(16, low=5, high=5)
    original = tiny_model()
    decoder = Decoder(original)
    with kf.reinserted(decoder, weights(moved(original)), BLOCK, lr=1e-3) as training:
        batch = pack(samples)
        batch.hidden, batch.layer = decoder.run(batch, stop=BLOCK.start).detach(), BLOCK.start
        step = training.criterion.step_batch(batch, 8)
        with memory_for(25, decoder) as tried:
            training.step_packed(step)
            assert tried == [80, 40, 20, 20, 20, 20] and training.micro_batch_tokens == 20
            tried.clear()
            training.step_packed(step)
            assert tried == [20, 20, 20, 20] and training.halvings == 2
        assert training.steps == 2


@pytest.mark.parametrize("limit", [1, 17, 1000])
def test_parts_that_were_asked_for(limit):
    original = tiny_model()
    decoder = Decoder(original)
    found = []
    for tokens in (None, limit):
        mine = weights(moved(original))
        with kf.reinserted(decoder, mine, BLOCK, lr=1e-3, optimizer="adamw", micro_batch_tokens=tokens) as training:
            with memory_for(math.inf, decoder) as tried:
                training.step(FORGET, RETAIN)
        found.append(mine)
    longest = max(len(s["input_ids"]) for s in FORGET + RETAIN)
    assert max(tried) <= max(limit, longest) or limit == 1000
    assert limit > 1 or len(tried) == 2 * len(FORGET + RETAIN)  # to the block, and from it on
    for name in found[0]:
        torch.testing.assert_close(found[1][name], found[0][name], rtol=1e-12, atol=1e-12)
        assert limit < 1000 or torch.equal(found[1][name], found[0][name])
    with pytest.raises(ValueError, match="micro_batch_tokens=0: expected at least 1"):
        with kf.reinserted(decoder, mine, BLOCK, lr=1e-3, micro_batch_tokens=0):
            pass
    with pytest.raises(ValueError, match="micro_batch_tokens=0: expected a whole number from 1"):
        kf.KUnBRConfig(micro_batch_tokens=0)


@pytest.mark.parametrize("backward", rarely([False, True], [True]))
@pytest.mark.parametrize("form", ["capped", "gradient_difference", "npo"])
def test_full_training(form, backward, caplog):
    found = []
    for room in (math.inf, 25):
        model = tiny_model()
        decoder = Decoder(model)
        cap = {"forget_loss_cap": 4.0} if form == "capped" else {}
        criterion = Criterion("npo" if form == "npo" else "gradient_difference", retain_coeff=0.6, **cap)
        samples = {"forget": FORGET, "retain": RETAIN}
        original = OriginalValues.of(decoder, samples, criterion.needs) if criterion.needs else None
        training = FullTraining(decoder, lr=1e-3, optimizer="adamw", criterion=criterion)
        step = criterion.pack(FORGET, RETAIN, original)
        with memory_for(room, decoder, 2, backward):
            for _ in range(2):
                metrics = training.step_packed(step)
        assert all(p.grad is None for p in model.parameters())
        found.append((metrics, weights(model)))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-12)
    for name, value in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], value, rtol=1e-12, atol=1e-12)
    assert training.halvings == 2 and training.micro_batch_tokens <= 25
    assert len([r for r in caplog.records if "training of all parameters: memory ran out" in r.getMessage()]) == 1


@pytest.mark.parametrize("backward", rarely([False, True], [True]))
@pytest.mark.parametrize("objective", ["gradient_difference", "dpo"])
def test_one_sample_that_does_not_fit_says_what_to_change(objective, backward):
    original = tiny_model(dtype=torch.bfloat16)
    decoder = Decoder(original)
    forget = with_alternates(FORGET) if objective == "dpo" else FORGET
    with kf.reinserted(decoder, weights(moved(original)), BLOCK, lr=1e-3, objective=objective) as training:
        training.step(forget, RETAIN)
        before, steps = {n: v.clone() for n, v in training.state().items()}, training.steps
        with memory_for(1, decoder, BLOCK.start, backward), pytest.raises(OutOfMemory) as error:
            training.step(forget, RETAIN)
        assert equal(training.state(), before) and training.steps == steps and not training.flat.grad.any()
        training.step(forget, RETAIN)  # more memory: it goes on
    text = str(error.value)
    assert isinstance(error.value, torch.OutOfMemoryError) and SAYS in text
    for part in ("one sample of", "tokens alone", "weights 0.00 GiB", "gradient_checkpointing=True (the same result)"):
        assert part in text, part
    for part in ('optimizer_device="host"', 'master_weights="none"', "max_length", "open_streamed"):
        assert part in text, part
    settings = dict(lr=1e-3, gradient_checkpointing=True, optimizer_device="host", master_weights="none")
    with kf.reinserted(decoder, weights(moved(original)), BLOCK, **settings) as training:
        with memory_for(1, decoder, BLOCK.start), pytest.raises(OutOfMemory) as error:
            training.step(FORGET, RETAIN)
    for part in ("gradient_checkpointing", "optimizer_device", "master_weights"):
        assert part not in str(error.value)  # what is done already is no advice


def test_the_update_too_says_what_to_change(monkeypatch):
    original = tiny_model()
    with kf.reinserted(original, weights(moved(original)), BLOCK, lr=1e-3) as training:
        monkeypatch.setattr(
            training.optimizer, "update", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError(SAYS))
        )
        with pytest.raises(OutOfMemory, match='out of memory in the update .*optimizer_device="host"'):
            training.step(FORGET, RETAIN)


class Unknown(RuntimeError):
    pass


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, Unknown])
def test_other_errors_are_not_taken_for_it_and_leave_no_gradient(error):
    original = tiny_model()
    decoder = Decoder(original)
    with kf.reinserted(decoder, weights(moved(original)), BLOCK, lr=1e-3) as training:
        raised = (lambda text: error("something else")) if error is Unknown else error
        with memory_for(20, decoder, BLOCK.start, True, raised) as tried, pytest.raises(error):
            training.step(FORGET, RETAIN)
        assert not training.flat.grad.any() and training.halvings == 0 and len(set(tried)) <= 3


NOT_OFFERED = RuntimeError("could not create a primitive descriptor for a matmul primitive")


def test_what_is_out_of_memory():
    for error in (
        torch.OutOfMemoryError("x"),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
        RuntimeError("could not create a primitive"),
    ):
        assert is_out_of_memory(error)
    for error in (
        ValueError("out of memory"),
        RuntimeError("shape"),
        NOT_OFFERED,
        KeyboardInterrupt(),
        OSError(28, "no space"),
    ):
        assert not is_out_of_memory(error)
    try:  # a real one
        torch.empty(2**60)
    except RuntimeError as error:
        assert is_out_of_memory(error)
    later = RuntimeError("operation failed due to a previous error during capture")
    later.__context__ = torch.OutOfMemoryError("x")
    assert is_out_of_memory(later)
    later = KeyboardInterrupt()
    later.__context__ = torch.OutOfMemoryError("x")
    assert not is_out_of_memory(later)


def test_graphs_are_dropped(caplog):
    """Captured steps hold memory; after the error they are captured anew, at sizes that fit."""
    samples, found = random_samples(12, low=5, high=9), []
    for room in (math.inf, 45):
        original = tiny_model()
        decoder, mine = Decoder(original), weights(moved(original))
        with kf.reinserted(decoder, mine, BLOCK, lr=1e-3, optimizer="adamw") as training:
            training.use_graphs(capture)
            graphs = training.graphs
            training.step(samples[:2], samples[2:4])
            assert graphs.captured == 1
            kept = list(graphs._held)
            with memory_for(room, decoder):
                for _ in range(2):
                    training.step(samples[:6], samples[6:])
            if room == 45:
                assert training.halvings >= 1 and kept[0] not in graphs._held
                assert 1 <= graphs.captured == len(graphs._held) and graphs._capture is not None
                assert all(bucket.tokens <= 48 for bucket in graphs._held)
        found.append(mine)
    for name in found[0]:
        torch.testing.assert_close(found[1][name], found[0][name], rtol=1e-12, atol=1e-12)
    assert not any("could not be captured" in r.getMessage() for r in caplog.records)


# ---------------------------------------------------------------- passes over all samples


@pytest.mark.parametrize("reduction, statistic", [("sample", "grad_l1"), ("mean", "grad_l1"), ("mean", "cosine")])
@pytest.mark.parametrize("backward", rarely([False, True], [True]))
@pytest.mark.parametrize("batch_tokens", [1000, 60])
def test_density_goes_on_in_smaller_batches(reduction, statistic, backward, batch_tokens, caplog):
    samples, retain = random_samples(12), random_samples(7, seed=4) if statistic == "cosine" else None
    settings = dict(statistic=statistic, reduction=reduction, retain=retain, batch_tokens=batch_tokens)
    decoder = Decoder(tiny_model())
    expected = knowledge_density(decoder, samples, **settings)
    with memory_for(25, decoder, 3, backward) as tried:
        found = knowledge_density(decoder, samples, **settings)
    torch.testing.assert_close(found.per_layer, expected.per_layer, rtol=1e-11, atol=1e-13)
    assert max(tried) > 25 and tried[-1] <= 25
    said = [r.getMessage() for r in caplog.records if r.getMessage().startswith("density: memory ran out")]
    assert len(said) == 1 if reduction == "sample" else said
    if reduction == "sample":  # what was measured stays: each sample once, and once more for each failure
        whole = sum(len(s["input_ids"]) for s in samples)
        fits = [t for t in tried[1:] if t <= 25]
        assert whole <= sum(fits) <= 2 * whole  # the layers below the first watched one are passes of their own
    with memory_for(1, decoder, 3, backward), pytest.raises(OutOfMemory, match="one sample of .* alone .density"):
        knowledge_density(decoder, samples, **settings)


def test_a_gradient_that_was_visited_before_memory_ran_out_is_not_visited_again():
    samples, decoder = random_samples(8), Decoder(tiny_model())
    watched, found = watch_list(decoder, "mlp"), []
    for room in (math.inf, 25):
        measurement, seen = Measurement(decoder, watched, How("grad_l1", "auto", {})), []
        with memory_for(room, decoder, 3, True), measurement.ready(8):
            measurement.gradients(samples, lambda path, gradient, seen=seen: seen.append((path, gradient.clone())))
        assert len(seen) == len(dict(seen)) == 18
        found.append(dict(seen))
    for path, gradient in found[0].items():
        torch.testing.assert_close(found[1][path], gradient, rtol=1e-11, atol=1e-13)
    assert list(found[0])[:3] == list(found[1])[:3] and measurement.batch_tokens <= 25


def test_attribution_goes_on_in_smaller_batches():
    samples, retain = random_samples(8), random_samples(7, seed=4)
    decoder = Decoder(tiny_model())
    expected = attribute(decoder, samples, retain, "wagle", "all", blocks=[BLOCK]).mask(ratio=0.3)
    with memory_for(25, decoder, 3, True) as tried:
        found = attribute(decoder, samples, retain, "wagle", "all", blocks=[BLOCK]).mask(ratio=0.3)
    assert max(tried) > 25 and equal(found, expected)


def test_the_prefix_cache_goes_on_in_smaller_batches(caplog):
    decoder, samples = Decoder(tiny_model()), random_samples(12)
    expected = PrefixCache(decoder, samples)
    cache = PrefixCache(decoder, samples)
    expected.advance(3)
    with memory_for(25, decoder, 2) as tried:
        cache.advance(2)
        assert max(tried) <= 200 and cache.layer == 2
        cache.advance(3)
        assert max(tried) > 25 and tried[-1] <= 25 and cache.layer == 3
        tried.clear()
        cache.advance(4)  # as small as they had to be
        assert max(tried) <= 25
        with pytest.raises(OutOfMemory, match="alone .prefix cache"), memory_for(1, decoder, 5):
            cache.advance(6)
    assert cache.layer is None
    cache.advance(3)
    torch.testing.assert_close(cache.batch(range(12)).hidden, expected.batch(range(12)).hidden, rtol=1e-12, atol=1e-12)
    assert len([r for r in caplog.records if "prefix cache: memory ran out" in r.getMessage()]) == 2


# ---------------------------------------------------------------- a whole run

SETTINGS = dict(
    num_blocks=3, top_k=2, batch_size=3, warmup_epochs=1, warmup_lr=1e-3, block_epochs=2, block_lr=1e-3, rtt=False,
    skip_last_layers=1, optimizer="adamw", warmup_optimizer="adamw",
)  # fmt: skip


def little_memory(monkeypatch, tokens):
    monkeypatch.undo()
    real = Decoder.run

    def run(self, batch, *args, **kwargs):
        if batch.num_tokens > tokens:
            raise torch.OutOfMemoryError(SAYS)
        return real(self, batch, *args, **kwargs)

    monkeypatch.setattr(Decoder, "run", run)


def test_a_whole_run_with_little_memory(monkeypatch, caplog):
    forget, retain, found = random_samples(7, seed=1), random_samples(9, seed=2), []
    for room in (math.inf, 20):
        little_memory(monkeypatch, room)
        model = tiny_model()
        report = kf.unlearn(model, forget, retain, kf.KUnBRConfig(**SETTINGS), progress=False)
        found.append((report, weights(model)))
    (plain, expected), (short, ours) = found
    assert short.blocks == plain.blocks
    for name, losses_ in plain.losses.items():
        assert short.losses[name] == [pytest.approx(epoch, rel=1e-9) for epoch in losses_]
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-8, atol=1e-10)
    said = [r.getMessage().partition(": memory ran out")[0] for r in caplog.records if "ran out" in r.getMessage()]
    assert said[:2] == ["training of all parameters", "density"] and len(said) <= 7


def test_a_resumed_run_goes_on_with_parts_as_small_as_before(monkeypatch, tmp_path):
    """Other parts would have other bits."""
    forget, retain = random_samples(7, seed=1), random_samples(9, seed=2)
    config = kf.KUnBRConfig(**SETTINGS, checkpoint_every=1)
    little_memory(monkeypatch, 20)
    expected = tiny_model()
    kf.unlearn(expected, forget, retain, config, progress=False)
    step = BlockTraining.step_packed
    calls = []

    def interrupted(self, *args):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return step(self, *args)

    model = tiny_model()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(BlockTraining, "step_packed", interrupted)
        kf.unlearn(model, forget, retain, config, progress=False, output_dir=tmp_path)
    model = tiny_model()
    kf.unlearn(model, forget, retain, config, progress=False, output_dir=tmp_path, resume=True)
    assert equal(weights(model), weights(expected))


def test_the_command_line_says_it_in_one_line(monkeypatch, capsys):
    def fails(arguments):
        raise OutOfMemory("out of memory with one sample of 9 tokens alone. Cures: shorter samples")

    monkeypatch.setattr("kunbr_fast.cli.doctor.run", fails)
    assert cli.main(["doctor"]) == 2
    assert (
        capsys.readouterr().err
        == "kunbr-fast: out of memory with one sample of 9 tokens alone. Cures: shorter samples\n"
    )
