"""Lion against its formula, AdamW against torch's, and the flat buffer."""

import pytest
import torch
from helpers import rarely
from reference_procedure import ReferenceLion
from torch import nn

from kunbr_fast.kernels import dispatch
from kunbr_fast.kernels.optimizers.op import BETAS, AdamW, Lion
from kunbr_fast.training.flat_buffer import FlatBuffer, make_optimizer


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def plain_lion(p, m, g, lr, b1, b2, wd):
    """Algorithm 2 of arXiv 2302.06675, element by element in Python floats."""
    for i in range(len(p)):
        c = b1 * m[i] + (1 - b1) * g[i]
        sign = (c > 0) - (c < 0)
        p[i] -= lr * (sign + wd * p[i])
        m[i] = b2 * m[i] + (1 - b2) * g[i]


@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.95, 0.98), (0.0, 0.0)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_lion_is_the_papers_formula(betas, weight_decay):
    param = nn.Parameter(random(37))
    values, momentum = param.tolist(), [0.0] * 37
    optimizer = Lion([param], lr=1e-2, betas=betas, weight_decay=weight_decay)
    for step in range(60):
        gradient = random(37, seed=step + 1)
        gradient[step % 37] = 0.0
        param.grad = gradient.clone()
        optimizer.step()
        plain_lion(values, momentum, gradient.tolist(), 1e-2, *betas, weight_decay)
        assert torch.equal(param.grad, gradient)  # the gradient is read, not used as scratch space
    torch.testing.assert_close(param.detach(), torch.tensor(values, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(
        optimizer.state[param]["momentum"], torch.tensor(momentum, dtype=torch.float64), rtol=0, atol=1e-14
    )


def test_lion_is_the_reference_procedures_and_skips_what_has_no_gradient():
    ours = [nn.Parameter(random(4, 3)), nn.Parameter(random(5, seed=1)), nn.Parameter(random(2, seed=2))]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    optimizer, truth = Lion(ours, lr=1e-3), ReferenceLion(theirs, lr=1e-3)
    untouched = ours[2].detach().clone()
    for step in range(30):
        for a, b in zip(ours[:2], theirs):
            a.grad = random(*a.shape, seed=step)
            b.grad = a.grad.clone()
        optimizer.step()
        truth.step()
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=0, atol=1e-14)
    assert torch.equal(ours[2], untouched) and ours[2] not in optimizer.state


def test_lions_step_has_one_size_and_no_step_for_no_gradient():
    param = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer = make_optimizer("lion", [param], lr=0.25)
    param.grad = torch.tensor([1e-300, -1e300, 0.0, 3.0], dtype=torch.float64)
    optimizer.step()
    assert param.tolist() == [-0.25, 0.25, 0.0, -0.25]
    assert optimizer.step(lambda: param.sum() * 2) is not None  # a closure's loss is handed back


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lion_keeps_the_parameters_dtype(dtype):
    param = nn.Parameter(random(8, dtype=dtype))
    param.grad = random(8, seed=1, dtype=dtype)
    optimizer = Lion([param], lr=0.5)
    optimizer.step()
    assert param.dtype == optimizer.state[param]["momentum"].dtype == dtype


@pytest.mark.parametrize("betas, weight_decay", [(None, 0.0), ((0.8, 0.95), 0.1), ((0.0, 0.0), 0.1)])
@pytest.mark.parametrize("eps", [1e-8, 1e-2])
def test_adamw_is_torchs(betas, weight_decay, eps):
    """Ours, and what `make_optimizer` takes."""
    mine, made, theirs = (nn.Parameter(random(50)) for _ in range(3))
    betas = betas or BETAS["adamw"]
    optimizers = [
        AdamW([mine], 1e-2, betas, weight_decay, eps=eps),
        make_optimizer("adamw", [made], 1e-2, betas, weight_decay),
    ]
    truth = torch.optim.AdamW(
        [theirs], lr=1e-2, betas=betas, eps=eps, weight_decay=weight_decay, foreach=False, fused=False
    )
    for step in range(40):
        for param in (mine, made, theirs):
            param.grad = random(50, seed=step)
        for optimizer in (*optimizers, truth):
            optimizer.step()
        assert torch.equal(mine.grad, random(50, seed=step))
    torch.testing.assert_close(mine.detach(), theirs.detach(), rtol=1e-12, atol=1e-12)
    for name in ("exp_avg", "exp_avg_sq"):
        ours, torchs = optimizers[0].state[mine][name], truth.state[theirs][name]
        torch.testing.assert_close(ours, torchs, rtol=1e-12, atol=1e-12)
    if eps == 1e-8:
        torch.testing.assert_close(made.detach(), theirs.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_adamw_and_torchs_go_on_from_each_others_state(dtype):
    """As a resumed run takes it up: tensors by name."""
    params = [nn.Parameter(random(50, dtype=dtype)) for _ in range(3)]
    kinds = [AdamW, lambda p, lr: torch.optim.AdamW(p, lr, fused=True, weight_decay=0.0)]
    truth = kinds[1]([params[0]], 1e-2)
    first = [kind([p], 1e-2) for kind, p in zip(kinds, params[1:])]
    then = [kind([p], 1e-2) for kind, p in zip(kinds[::-1], params[1:])]
    for step in range(10):
        if step == 5:
            for before, after, param in zip(first, then, params[1:]):
                after.state[param] = {k: torch.as_tensor(v).clone() for k, v in before.state[param].items()}
        for param in params:
            param.grad = random(50, seed=step, dtype=dtype)
        for optimizer in (truth, *(first if step < 5 else then)):
            optimizer.step()
    for param in params[1:]:
        torch.testing.assert_close(param, params[0], rtol=50 * torch.finfo(dtype).eps, atol=50 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("kind", [Lion, AdamW])
def test_dtypes_of_state_and_gradient(kind):
    param = nn.Parameter(random(8, dtype=torch.bfloat16))
    optimizer = kind([param], 1e-2, state_dtype=torch.float32)
    optimizer.update(random(8, seed=1))
    state = [value for value in optimizer.state[param].values() if isinstance(value, torch.Tensor)]
    assert len(state) == (1 if kind is Lion else 2) and all(value.dtype == torch.float32 for value in state)
    assert param.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", [Lion, AdamW])
def test_stochastic_rounding_in_torch(kind):
    """Reproducible, another at each step, and of a step far below bf16's last place right on average."""
    runs = []
    for seed in (0, 0, 1):
        param = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
        optimizer = kind([param], 2.0**-10, seed=seed, state_dtype=torch.float32)
        for _ in range(2):
            param.grad = torch.ones_like(param)
            optimizer.step()
        runs.append(param.detach())
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])
    # two draws of 1/4 between neighbours 2^-8 apart
    allowed = 4 * (2 * 0.25 * 0.75 / 4096) ** 0.5 * 2**-8
    assert abs(float(runs[0].double().mean()) - (1 - 2 * 2.0**-10)) <= allowed
    assert sorted(set(runs[0].tolist())) == [1 - 2 * 2.0**-8, 1 - 2.0**-8, 1.0]


def test_stochastic_rounding_is_for_bf16():
    with pytest.raises(TypeError, match="seed=1: stochastic rounding is for bfloat16 parameters, this one is"):
        Lion([nn.Parameter(torch.zeros(3))], 1e-3, seed=1)
    with pytest.raises(ValueError, match="seed=-1: expected 0 to"):
        AdamW([nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))], 1e-3, seed=-1)
    with pytest.raises(ValueError, match="eps=-1.0: expected at least 0"):
        AdamW([nn.Parameter(torch.zeros(3))], 1e-3, eps=-1.0)


def test_the_half_precision_copy_is_written():
    param, half = nn.Parameter(random(20, dtype=torch.float32)), torch.full((20,), torch.nan, dtype=torch.float16)
    for optimizer in (Lion([param], 1e-2), AdamW([param], 1e-2)):
        optimizer.update(random(20, seed=1, dtype=torch.float16), half)
        assert torch.equal(half, param.detach().half()) and param.grad is None


def test_names_and_defaults():
    param = nn.Parameter(random(3))
    assert make_optimizer("lion", [param], 1.0).param_groups[0]["betas"] == BETAS["lion"] == (0.9, 0.99)
    assert make_optimizer("adamw", [param], 1.0).param_groups[0]["betas"] == BETAS["adamw"] == (0.9, 0.999)
    with pytest.raises(ValueError, match="optimizer='sgd': expected one of lion, adamw"):
        make_optimizer("sgd", [param], 1.0)
    for name in ("lion", "adamw"):
        with pytest.raises(dispatch.Unavailable, match=f'{name}: impl="cuda" cannot run on cpu'):
            make_optimizer(name, [param], 1.0, impl="cuda")
        with pytest.raises(ValueError, match="unknown impl 'fast'"):
            make_optimizer(name, [param], 1.0, impl="fast")


@pytest.mark.parametrize("name", ["lion", "adamw"])
@pytest.mark.parametrize(
    "setting, value",
    [("lr", -1e-3), ("lr", float("nan")), ("betas", (1.0, 0.9)), ("betas", (0.9, -0.1)), ("weight_decay", -1.0)],
)
def test_settings_that_cannot_be(name, setting, value):
    with pytest.raises(ValueError, match="(?i)invalid|expected"):
        make_optimizer(name, [nn.Parameter(random(3))], **{"lr": 1e-3, setting: value})


# ---------------------------------------------------------------- flat buffer


def block(dtype=torch.float64):
    params = [nn.Parameter(random(*shape, seed=i, dtype=dtype)) for i, shape in enumerate([(3, 4), (5,), (2, 2, 2)])]
    params.append(nn.Parameter(random(4, 3, seed=9, dtype=dtype).t()))  # not contiguous
    return params, [random(*p.shape, seed=20 + i, dtype=dtype) for i, p in enumerate(params)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_parameters_are_views_of_one_vector(dtype):
    params, values = block(dtype)
    flat = FlatBuffer(params, values, master=True)
    assert flat.numel == 12 + 5 + 8 + 12 == flat.weights.numel() == flat.grad.numel()
    start = flat.weights.data_ptr()
    for param, value in zip(params, values):
        assert torch.equal(param.detach(), value)
        assert param.data_ptr() == start and param.grad.shape == param.shape
        start += param.numel() * param.element_size()
    sum((p**2).sum() for p in params).backward()  # accumulates into the flat gradient
    assert torch.equal(flat.grad, torch.cat([2 * v.flatten() for v in values]))
    for param, view in zip(params, flat.views(flat.grad)):
        assert param.grad.data_ptr() == view.data_ptr()


@pytest.mark.parametrize("name", ["lion", "adamw"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.2])
def test_the_flat_update_is_the_update_of_each_parameter(name, weight_decay):
    params, values = block()
    alone = [nn.Parameter(v.clone()) for v in values]
    flat = FlatBuffer(params, values, master=True)
    assert flat.master is None
    optimizer = make_optimizer(name, [flat.param], 1e-2, weight_decay=weight_decay)
    separate = make_optimizer(name, alone, 1e-2, weight_decay=weight_decay)
    for step in range(25):
        for i, (a, b) in enumerate(zip(params, alone)):
            gradient = random(*a.shape, seed=100 * step + i)
            a.grad.add_(gradient)
            b.grad = gradient
        flat.step(optimizer)
        separate.step()
        assert not flat.grad.any()
    for a, b in zip(params, alone):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", rarely([torch.bfloat16, torch.float16], [torch.bfloat16]))
@pytest.mark.parametrize("name", ["lion", "adamw"])
def test_small_updates_of_half_precision_weights_add_up(dtype, name):
    """A hundred steps of 1e-6 at weights of 1, where one step is far less than half a unit in the last place."""
    for master in (True, False):
        param = nn.Parameter(torch.ones(16, dtype=dtype))
        flat = FlatBuffer([param], [param.detach().clone()], master)
        optimizer = make_optimizer(name, [flat.param], 1e-6)
        for _ in range(6000):
            flat.grad.fill_(1.0)
            flat.step(optimizer)
        assert param.dtype == dtype
        if master:
            assert flat.master.dtype == torch.float32
            torch.testing.assert_close(flat.master, torch.full((16,), 1 - 6e-3), rtol=2e-4, atol=0)
            assert torch.equal(param.detach(), flat.master.to(dtype)) and bool((param != 1).all())
        else:
            assert flat.master is None and bool((param == 1).all())  # lost: what the master copy is for


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_round_trip(dtype):
    params, values = block(dtype)
    flat = FlatBuffer(params, values, master=True)
    optimizer = make_optimizer("lion", [flat.param], 1e-3)
    flat.grad.fill_(1.0)
    flat.step(optimizer)
    state = {key: value.clone() for key, value in flat.state().items()}
    assert set(state) == ({"weights"} if dtype == torch.float32 else {"weights", "master"})
    flat.grad.fill_(-1.0)
    flat.step(optimizer)
    assert not torch.equal(flat.param.detach(), state.get("master", state["weights"]))
    flat.load(state)
    for key, value in flat.state().items():
        assert torch.equal(value, state[key])
    assert params[0].data_ptr() == flat.weights.data_ptr()


def test_mixed_dtypes_are_refused():
    params = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))]
    with pytest.raises(ValueError, match="differ in dtype or device"):
        FlatBuffer(params, [p.detach() for p in params], True)
    assert all(p.grad is None for p in params)
