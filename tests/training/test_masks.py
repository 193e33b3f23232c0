"""A mask on a block's update: what lies outside keeps its bits, what lies inside is trained as ever."""

import pytest
import torch
from reinsertion_problem import BLOCK, FORGET, RETAIN, equal, identity, in_block, touched_model, weights
from tiny_models import moved, random_samples, tiny_model

import kunbr_fast as kf
from kunbr_fast.kernels.optimizers.op import AdamW, Lion
from kunbr_fast.training.flat_buffer import FlatBuffer

MORE = [(random_samples(3, seed=10 + i), random_samples(3, seed=20 + i)) for i in range(3)]


def random_mask(model, share=0.4, seed=3, leave_out=("norm",)):
    """Of every parameter of the block but some, with one that is all True and one that is all False."""
    generator = torch.Generator().manual_seed(seed)
    mask = {
        name: torch.rand(p.shape, generator=generator) < share
        for name, p in model.named_parameters()
        if in_block(name) and not any(part in name for part in leave_out)
    }
    names = list(mask)
    mask[names[0]].fill_(True)
    mask[names[1]].fill_(False)
    return mask


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
@pytest.mark.parametrize("optimizer", ["lion", "adamw"])
@pytest.mark.parametrize(
    "dtype, master",
    [(torch.float64, "fp32"), pytest.param(torch.float32, "fp32", marks=pytest.mark.slow), (torch.bfloat16, "fp32"),
     (torch.bfloat16, "stochastic"), pytest.param(torch.bfloat16, "none", marks=pytest.mark.slow)],
)  # fmt: skip
def test_what_lies_outside_keeps_its_bits(dtype, master, optimizer, weight_decay):
    original = tiny_model(dtype=dtype)
    start, mask = weights(moved(original)), random_mask(original)
    name = "model.layers.3.mlp.up_proj.weight"
    start[name][~mask[name]] = -0.0  # a bit of its own
    settings = {"lr": 1e-2, "optimizer": optimizer, "weight_decay": weight_decay, "master_weights": master}
    found = {}
    for kind, given in (("masked", mask), ("free", None)):
        found[kind] = dict(start)
        with kf.reinserted(original, found[kind], BLOCK, mask=given, **settings) as training:
            for batch in MORE:
                training.step(*batch)
            state = training.state()
            if given is not None and optimizer == "adamw":
                size = training.flat.numel
                outside = torch.cat([(~mask[n]).flatten() if n in mask else torch.zeros(p.numel(), dtype=torch.bool)
                                     for n, p in training.parameters.items()])  # fmt: skip
                for key in ("optimizer.exp_avg", "optimizer.exp_avg_sq"):
                    assert state[key].numel() == size and not state[key][outside].any() and state[key].any()
    bits = {torch.float64: torch.int64, torch.float32: torch.int32, torch.bfloat16: torch.int16}[dtype]
    for name, value in found["masked"].items():
        if not in_block(name):
            assert torch.equal(value, start[name])
            continue
        keep = ~mask[name] if name in mask else torch.zeros_like(value, dtype=torch.bool)
        assert torch.equal(value.view(bits)[keep], start[name].view(bits)[keep]), name
        if not keep.all():
            assert (value != start[name])[~keep].float().mean() > 0.5, name
            assert not torch.equal(found["free"][name], start[name])


@pytest.mark.parametrize("optimizer", ["lion", "adamw"])
def test_the_rest_is_trained_as_by_a_plain_loop(optimizer):
    """In fp64: the gradient outside set to 0, the update made, and the weights outside put back."""
    original = tiny_model()
    start, mask = weights(moved(original)), random_mask(original)
    ours = dict(start)
    with kf.reinserted(original, ours, BLOCK, lr=1e-2, optimizer=optimizer, weight_decay=0.1, mask=mask) as training:
        for batch in MORE:
            training.step(*batch)
    theirs = {n: torch.nn.Parameter(v.clone()) for n, v in start.items() if in_block(n)}
    kind = Lion if optimizer == "lion" else torch.optim.AdamW
    plain = kind(theirs.values(), lr=1e-2, weight_decay=0.1)
    for forget, retain in MORE:
        with kf.reinserted(
            original, {**start, **{n: p.detach().clone() for n, p in theirs.items()}}, BLOCK, lr=1.0
        ) as at:
            loss = at.loss(at.criterion.pack(forget, retain)).loss
            loss.backward()
            for name, parameter in theirs.items():
                keep = ~mask[name] if name in mask else torch.zeros_like(parameter, dtype=torch.bool)
                parameter.grad = at.parameters[name].grad.masked_fill(keep, 0.0)
        plain.step()
        for name, parameter in theirs.items():
            keep = ~mask[name] if name in mask else torch.zeros_like(parameter, dtype=torch.bool)
            parameter.data[keep] = start[name][keep]
    for name, parameter in theirs.items():
        torch.testing.assert_close(ours[name], parameter.detach(), rtol=1e-9, atol=1e-9)


def test_all_true_is_no_mask():
    original = tiny_model(dtype=torch.bfloat16)
    start = weights(moved(original))
    results = []
    for mask in (None, {}, {n: torch.ones_like(v, dtype=torch.bool) for n, v in start.items()}):
        values = dict(start)
        with kf.reinserted(original, values, BLOCK, lr=1e-3, weight_decay=0.1, mask=mask) as training:
            training.step(FORGET, RETAIN)
        results.append(values)
    assert equal(results[0], results[1]) and equal(results[0], results[2])


def test_cumulative_insertion_and_the_original():
    original = touched_model()
    unlearned = moved(original)
    before, start, was = weights(original), weights(unlearned), identity(original)
    masks = random_mask(original) | {"model.layers.5.mlp.up_proj.weight": torch.zeros(48, 32, dtype=torch.bool)}
    for block in (BLOCK, range(5, 6)):
        with kf.reinserted(
            original, unlearned, block, lr=1e-3, insertion="cumulative", mask=masks, weight_decay=0.1
        ) as t:
            t.step(FORGET, RETAIN)
    assert identity(original) == was
    now, trained = weights(original), weights(unlearned)
    for name in now:
        if in_block(name) or in_block(name, range(5, 6)):
            assert torch.equal(now[name], trained[name])
            if name in masks:
                assert torch.equal(trained[name][~masks[name]], start[name][~masks[name]])
        else:
            assert torch.equal(now[name], before[name]) and torch.equal(trained[name], start[name])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("optimizer", ["lion", "adamw"])
def test_a_resumed_block_goes_on_with_the_same_bits(dtype, optimizer):
    original = tiny_model(dtype=dtype)
    start, mask = weights(moved(original)), random_mask(original)
    options = {"lr": 1e-3, "optimizer": optimizer, "weight_decay": 0.1, "mask": mask}
    with kf.reinserted(original, dict(start), BLOCK, **options) as training:
        for batch in MORE:
            training.step(*batch)
        truth = {name: tensor.clone() for name, tensor in training.state().items()}
    with kf.reinserted(original, dict(start), BLOCK, **options) as training:
        training.step(*MORE[0])
        saved = {name: tensor.clone() for name, tensor in training.state().items()}
    with kf.reinserted(original, dict(start), BLOCK, **options) as training:
        training.step(*MORE[2])
        training.load_state(saved, 1)
        for batch in MORE[1:]:
            training.step(*batch)
        assert equal(training.state(), truth)


def test_masks_of_an_attribution():
    """The whole way: scores, mask, block. Both blocks' names are in one mask."""
    original = tiny_model()
    unlearned = moved(original)
    start = weights(unlearned)
    blocks = [range(1, 2), range(3, 4)]
    mask = kf.attribute(original, FORGET, RETAIN, "wagle", "all", blocks=blocks).mask(ratio=0.3)
    for block in blocks:
        with kf.reinserted(original, unlearned, block, lr=1e-3, mask=mask) as training:
            training.step(FORGET, RETAIN)
    for name, value in weights(unlearned).items():
        changed = value != start[name]
        assert not changed.any() if name not in mask else not (changed & ~mask[name]).any()
    assert sum(int((v != start[n]).sum()) for n, v in weights(unlearned).items()) > 0.25 * sum(
        m.numel() for m in mask.values()
    )


RUN = {"batch_size": 3, "num_blocks": 3, "top_k": 2, "block_epochs": 1, "block_lr": 1e-3, "rtt": False}


@pytest.mark.parametrize("settings", [{"mask": "wagle", "mask_ratio": 0.3}, {"mask": "sign_agreement"}])
def test_a_run_with_a_mask(settings):
    model = tiny_model()
    unlearned = moved(model)
    start, original = weights(unlearned), tiny_model()
    config = kf.KUnBRConfig(**RUN, **settings, weight_decay=0.1)
    blocks = kf.unlearn(model, FORGET, RETAIN, config, unlearned=unlearned, progress=False).blocks
    found = [kf.attribute(original, FORGET, RETAIN, config.mask, "all", blocks=[block]) for block in blocks]
    masks = {name: m for one in found for name, m in one.mask(ratio=config.mask_ratio).items()}
    changed = {name: value != start[name] for name, value in weights(model).items()}
    for name, where in changed.items():
        assert not where.any() if name not in masks else not (where & ~masks[name]).any(), name
    assert sum(int(c.sum()) for c in changed.values()) > 0.9 * sum(int(m.sum()) for m in masks.values()) > 0


def test_settings_of_a_mask():
    for settings, message in (
        ({"mask": "x"}, "mask='x': expected one of none, grad"),
        ({"mask_ratio": 0.5}, "mask_ratio=0.5: mask none takes none"),
        ({"mask": "memflex", "mask_ratio": 0.5}, "mask_ratio=0.5: mask memflex takes none"),
        ({"mask": "wagle", "mask_ratio": 1.5}, "mask_ratio=1.5: expected a number above 0 and at most 1"),
        ({"mask": "grad"}, "mask grad has no published ratio: give mask_ratio"),
    ):
        with pytest.raises(ValueError, match=message):
            kf.KUnBRConfig(**settings)


@pytest.mark.parametrize("kind", [Lion, AdamW])
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_stochastic_rounding(kind, impl):
    """By the kernels too."""
    if impl == "triton":
        pytest.importorskip("triton", reason="triton is made for Linux only")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    params = [
        torch.nn.Parameter(torch.randn(33, 5).bfloat16().to(device)),
        torch.nn.Parameter(torch.ones(7).bfloat16().to(device)),
    ]
    start = [p.detach().clone() for p in params]
    mask = [torch.rand(33, 5) < 0.5, None]
    flat = FlatBuffer(params, start, False, mask)
    optimizer = kind([flat.param], lr=1e-2, weight_decay=0.3, seed=1, impl=impl)
    for _ in range(3):
        flat.grad.normal_()
        flat.step(optimizer)
    assert torch.equal(params[0][~mask[0]], start[0][~mask[0]])
    assert (params[0] != start[0])[mask[0]].float().mean() > 0.8 and (params[1] != start[1]).any()
    assert not flat.grad.any()


def test_refusals():
    original = touched_model()
    unlearned, name = moved(original), "model.layers.3.mlp.up_proj.weight"
    before, was = weights(original), identity(original)

    def attempt(mask, error, message):
        with pytest.raises(error, match=message):
            with kf.reinserted(original, unlearned, BLOCK, lr=1e-3, mask=mask):
                raise AssertionError("the block was taken")
        assert identity(original) == was and equal(weights(original), before)

    attempt({"layers.3.up": torch.ones(2).bool()}, ValueError, "mask: LlamaForCausalLM has no parameter layers.3.up")
    attempt({name: torch.ones(48, 32)}, TypeError, f"mask of {name} is torch.float32: expected a torch.bool tensor")
    attempt({name: [True]}, TypeError, f"mask of {name} is list: expected a torch.bool tensor")
    attempt(
        {name: torch.ones(32, 48).bool()}, ValueError, rf"mask of {name} is \(32, 48\): expected \(48, 32\), its shape"
    )
    nothing = {n: torch.zeros_like(p, dtype=torch.bool) for n, p in original.named_parameters()}
    attempt(nothing, ValueError, "the mask lets no weight of block 2-3 change: leave the block out")
