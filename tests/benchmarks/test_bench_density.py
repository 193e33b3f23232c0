"""The density suite: its FLOPs and bytes, its gate, its rivals. Shapes are tiny and nothing is timed for its time."""

import dataclasses
import importlib.util
import sys

import pytest
import torch

import kunbr_fast as kf
from kunbr_fast.benchmarks import harness, measure, per_sample
from kunbr_fast.benchmarks.shapes import Shape
from kunbr_fast.benchmarks.suites import density
from kunbr_fast.kernels import dispatch
from kunbr_fast.kernels.grad_density import op as operators

GPU = torch.device("cuda")
TRITON = dispatch.why_not("grad_density", "triton", "cpu") is None  # the interpreter
TINY = Shape(hidden=32, intermediate=80, layers=2, heads=2, key_value_heads=1, vocabulary=96)


def weight(lengths=(5, 17, 3), N=48, K=32, statistic="grad_l1", **options):
    options = harness.Options(quick=True, **options)
    return density.Weight(
        suite="density", model="tiny", label="up", tokens=8, options=options, N=N, K=K, lengths=tuple(lengths),
        statistic=statistic,
    )  # fmt: skip


def model(lengths=(3, 9, 6), shape=TINY, layers=2, batch_tokens=12, **options):
    options = harness.Options(quick=True, **options)
    return density.Model(
        suite="density", model="tiny", label="model", tokens=6, options=options, shape=shape, layers=layers,
        lengths=tuple(lengths), batch_tokens=batch_tokens,
    )  # fmt: skip


class Tiny(density.Model):
    """Its own sibling: models of the table, narrowed, are too wide for Triton's interpreter."""

    def small(self):
        return self


def tiny(**options):
    case = model(**options)
    return Tiny(**{field.name: getattr(case, field.name) for field in dataclasses.fields(case)})


def variants(case, data):
    return {variant.name: variant for variant in case.variants(data)}


# ---------------------------------------------------------------- what is needed


def test_a_weight_needs_one_product_and_one_reading_of_its_inputs():
    for dtype in (torch.float32, torch.bfloat16):
        case = weight(dtype=dtype)
        data = case.draw()
        run = variants(case, data)["bare"].make()
        with measure.flop_counter() as counter:
            run()
        assert counter.get_total_flops() == case.flops == 2 * 25 * 48 * 32
        assert data.x.nbytes + data.dy.nbytes == case.nbytes
        assert data.x.shape == (25, 32) and data.dy.shape == (25, 48) and data.x.dtype == dtype


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_needs_what_the_loop_spends_but_for_what_attention_and_head_waste(tied):
    case = model(shape=dataclasses.replace(TINY, tied=tied), layers=3, lengths=(3, 9, 6, 21))
    decoder, samples = data = case.draw()
    assert sum(p.nbytes for p in decoder.model.parameters() if p.dim() == 2) == case.nbytes
    run = variants(case, data)["loop"].make()
    decoder.model.set_attn_implementation("eager")  # products that torch counts
    with measure.flop_counter() as counter:
        run()
    squares, pairs = (sum(f(n) for n in case.lengths) for f in (lambda n: n * n, lambda n: n * (n + 1) // 2))
    layer = 4 * TINY.hidden  # FLOPs of one pair, forward; twice that in the backward of all layers but the first
    later_tokens = (3 + 2 * 2) * layer * (squares - pairs)
    last_tokens = 2 * 2 * TINY.hidden * TINY.vocabulary * len(case.lengths)  # no label, forward and backward
    angles = TINY.hidden // TINY.heads * sum(case.lengths)  # rotary: an outer product, which some torch call no product
    assert counter.get_total_flops() - later_tokens - last_tokens - case.flops in (0, angles)


def test_the_parts_of_a_model_are_what_they_say():
    """plain runs forward and input gradients, products the MLP's weight gradients of each layer."""
    case = model()
    data = case.draw()
    tokens, found = sum(case.lengths), variants(case, data)
    with measure.flop_counter() as counter:
        assert found["products"].make()() is None
    assert counter.get_total_flops() == case.layers * 3 * 2 * tokens * TINY.hidden * TINY.intermediate
    run = found["plain"].make()
    with measure.flop_counter() as counter:
        assert run() is None
    key_value = TINY.hidden * TINY.key_value_heads // TINY.heads
    layer = 4 * TINY.hidden * (TINY.hidden + key_value) + 6 * TINY.hidden * TINY.intermediate
    head = 2 * (tokens - len(case.lengths)) * TINY.hidden * TINY.vocabulary
    least = 2 * (case.layers * tokens * layer + head)  # attention comes on top; a weight gradient would be half as much
    assert least <= counter.get_total_flops() < 1.2 * least
    assert all(p.grad is None and p.requires_grad for p in data[0].model.parameters())


# ---------------------------------------------------------------- the gate


@pytest.mark.parametrize("statistic", ["grad_l1", "grad_l2sq"])
@pytest.mark.parametrize("lengths", [(5, 17, 3), (16, 16, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_that_can_run_is_right(dtype, lengths, statistic):
    errors, left_out = weight(lengths, statistic=statistic, dtype=dtype).gate()
    l1 = statistic == "grad_l1"
    missing = {"cuda"} | ({"torch.compile"} if l1 else set())
    if not TRITON:
        missing.add("triton")
    if not l1 and importlib.util.find_spec("opacus") is None:
        missing.add("opacus")
    assert set(left_out) == missing
    ours = {"torch", "triton"} if l1 else {"torch", "triton", "gram"}
    assert all(errors[name] <= 1e-5 for name in ours - missing)
    rivals = {"loop", "func", "grouped_mm", "grouped_norm", "bare"} if l1 else {"loop", "opacus"}
    assert set(errors) == (ours | rivals) - missing
    assert errors.pop("bare", None) is None and all(error < 0.01 for error in errors.values())


@pytest.mark.skipif(not TRITON, reason="no triton")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_tile_is_a_variant(dtype):
    from kunbr_fast.kernels import tiles as config

    case = weight(dtype=dtype, tiles=True, variants=("torch",))
    errors, left_out = case.gate()
    kind = "fp32" if dtype == torch.float32 else "short 32"
    tiles = {f"tile {tile}" for tile in config.TABLE[config.architecture(case.device), kind]}
    assert set(errors) == {"torch", "loop"} | tiles and not left_out
    assert [v.ours for v in case.chosen(case.draw()) if v.name in tiles] == [True] * len(tiles)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_wrong_sample_of_many_is_found(monkeypatch, dtype):
    right = operators.grad_density

    def wrong(*args, **kwargs):
        (found,) = right(*args, **kwargs)
        found[2] *= 1 + 3e-5  # of a sample that is small beside the others
        return [found]

    case = weight((60, 60, 1), dtype=dtype, variants=("torch",))
    assert case.gate()[0]["torch"] < 1e-6
    monkeypatch.setattr(operators, "grad_density", wrong)
    with pytest.raises(harness.Wrong, match=r"^torch is 3\..e-05 from fp64 \(limit 1.0e-05\)"):
        case.rows()


@pytest.mark.skipif(not TRITON, reason="no triton")
def test_ours_have_to_agree_at_the_timed_shape(monkeypatch):
    case, right = weight((40, 40), variants=("torch", "triton")), operators.grad_density
    small = case.small().draw().x.shape

    def wrong(x, *args, impl, **kwargs):
        (found,) = right(x, *args, impl=impl, **kwargs)
        if x.shape != small and impl == "triton":
            found[1] *= 1.001
        return [found]

    monkeypatch.setattr(operators, "grad_density", wrong)
    with pytest.raises(harness.Wrong, match="triton and those before it are 1.0e-03 apart"):
        case.rows()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_is_right_and_a_wrong_layer_is_found(monkeypatch, dtype):
    case = tiny(dtype=dtype)
    errors, left_out = case.gate()
    assert set(errors) == {"torch", "loop", "plain", "products"} | ({"triton"} if TRITON else set())
    assert set(left_out) == (set() if TRITON else {"triton"})
    ours = max(errors["torch"], errors["triton"] if TRITON else 0)
    assert ours <= (1e-6 if dtype == torch.float32 else 4e-3)
    right = kf.knowledge_density

    def wrong(*args, **kwargs):
        found = right(*args, **kwargs)
        found.per_layer[1] *= 1 + (1e-4 if dtype == torch.float32 else 0.02)
        return found

    monkeypatch.setattr(kf, "knowledge_density", wrong)
    with pytest.raises(harness.Wrong, match="torch is .* from fp64"):
        dataclasses.replace(case, options=dataclasses.replace(case.options, variants=("torch",))).rows()


def test_a_kernel_of_csrc_is_timed_where_it_is_named():
    def names(**options):
        return [variant.name for variant in weight(device=GPU, **options).chosen(None)]

    hopper = ("torch", "tile csrc hopper")
    assert names(variants=hopper) == ["torch", "loop", "tile csrc hopper"]
    assert not any(name.startswith("tile") for name in names())
    every = [*names(), "tile csrc portable", "tile csrc hopper", "tile"]
    assert names(tiles=True) == every or TRITON
    case = weight(device=GPU, statistic="grad_l2sq", variants=hopper)
    assert [variant.name for variant in case.chosen(None)] == ["torch", "loop"]


@pytest.mark.gpu
@pytest.mark.compiles
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_all_that_a_gpu_runs_is_right():
    lengths = [1, 128, 33, 200]
    for case in (weight(lengths, 512, 256, device=GPU, tiles=True), weight((64,) * 4, 512, 256, device=GPU)):
        rows = {row["variant"]: row for row in case.rows()}
        assert all(rows[name]["ms"] > 0 for name in ("torch", "triton", "bare", "loop", "func"))
    rows = {row["variant"]: row for row in weight(lengths, 512, 256, "grad_l2sq", device=GPU).rows()}
    assert all(rows[name]["ms"] > 0 for name in ("torch", "triton", "gram", "loop"))
    assert all(row["ms"] > 0 for row in tiny(device=GPU).rows())


def test_longer_sums_may_round_more():
    assert [weight((5, T)).limit(0.0) for T in (32, 512, 2048)] == [1e-5, 1e-5, 4e-5]
    assert weight((2048,)).small().limit(0.0) == 4e-5


def test_the_siblings_are_small_and_of_the_same_kind():
    for case in density.cases(harness.Options(device=GPU)):
        small = case.small()
        assert small.dtype == case.dtype == torch.bfloat16 and small.flops < case.flops / 100
        if isinstance(case, density.Weight):
            assert small.N % 8 == small.K % 8 == 0 and small.lengths == case.lengths[:3]
            assert small.N < case.N / 16 and small.K < case.K / 16


# ---------------------------------------------------------------- rivals


def test_a_missing_rival_is_a_row_with_a_note(monkeypatch):
    monkeypatch.setitem(sys.modules, "opacus.grad_sample.linear", None)
    rows = weight(statistic="grad_l2sq", variants=("opacus",)).rows()
    rows += weight(variants=("torch", "torch.compile", "bare")).rows()
    rows = {row["variant"]: row for row in rows}
    assert set(rows) == {"torch", "bare", "loop", "opacus", "torch.compile"}
    for name, why in (("opacus", "opacus cannot be imported"), ("torch.compile", "--compile")):
        assert rows[name]["ms"] == rows[name]["error"] == "" and why in rows[name]["note"]
    assert all(tuple(row) == harness.COLUMNS for row in rows.values())
    assert rows["torch"]["ms"] > 0 and rows["torch"]["note"] == "" and rows["torch"]["baseline"] == "loop"
    assert rows["bare"]["error"] == "" and rows["bare"]["standing_mib"] == pytest.approx(48 * 32 * 4 / 2**20, rel=1e-3)
    assert rows["loop"]["speedup"] == 1 and rows["torch"]["ours"] == 1 and rows["loop"]["ours"] == 0


def test_rivals_may_hold_so_much(monkeypatch):
    case = weight((16, 16, 16, 16), compile=True)
    data = case.draw()
    found, needed = variants(case, data), 4 * 48 * 32 * 4
    assert data.dw_bytes == needed
    expected = case.truth(data)["grad_l1"]
    monkeypatch.setattr(per_sample, "CHUNK_CPU", needed // 2)
    assert case.error(found["func"].make()(), {"grad_l1": expected}) < 1e-6
    monkeypatch.setattr(per_sample, "DW_LIMIT_CPU", 2 * needed - 1)
    for name in ("grouped_mm", "grouped_norm"):
        with pytest.raises(harness.Skip, match="would hold"):
            found[name].make()
    found["torch.compile"].make()  # holds them once; compiles when it is first called
    monkeypatch.setattr(per_sample, "DW_LIMIT_CPU", needed - 1)
    with pytest.raises(harness.Skip, match="would hold"):
        found["torch.compile"].make()


def test_the_rows_of_a_model():
    case = tiny(variants=("torch", "plain", "products"))
    rows = {row["variant"]: row for row in case.rows()}
    assert set(rows) == {"torch", "loop", "plain", "products"}
    assert all(tuple(row) == harness.COLUMNS and row["ms"] > 0 for row in rows.values())
    assert rows["plain"]["error"] == rows["products"]["error"] == "" and float(rows["torch"]["error"]) < 1e-6
    assert rows["torch"]["mib"] == pytest.approx(case.nbytes / 2**20, rel=1e-3)


# ---------------------------------------------------------------- which cases


def test_the_choice_of_cases():
    def of(**options):
        return density.cases(harness.Options(**options))

    quick = of(quick=True)
    assert [type(case) for case in quick] == [density.Weight, density.Weight, density.Model]
    assert all(case.flops < 1e9 and "narrow" in case.label for case in quick)
    cpu, lengths = of(), ("T=32", "T=128", "T=512", "ragged")
    assert (cpu[-1].model, cpu[-1].label) == ("SmolLM2-135M", "whole model, 8 layers")
    assert [(c.model, c.label) for c in cpu[:-1]] == [
        (model, f"{what}, {T}")
        for model in ("Llama-3.2-1B", "SmolLM2-135M")
        for what in ("up", "up, L2")
        for T in lengths
    ]
    gpu = of(device=GPU)
    assert {case.model for case in gpu} == {"Llama-3-8B"}
    lengths = ("T=32", "T=128", "T=512", "T=2048", "ragged")
    labels = [f"{what}, {T}" for what in ("up", "up, L2") for T in lengths]
    labels += ["down, T=128", "down, ragged", "whole model, 32 layers"]
    assert [case.label for case in gpu] == labels
    assert {case.statistic for case in gpu if "down" in case.label} == {"grad_l1"}
    last = of(device=GPU, models=("Qwen2.5-7B",), tokens=("64",))[-1]
    assert (last.label, last.N, last.K, last.lengths) == ("down, T=64", 3584, 18944, (64,) * 32)
    ragged = of(tokens=("ragged",), models=("SmolLM2-135M",))
    assert [case.label for case in ragged] == ["up, ragged", "up, L2, ragged"]  # where lengths are named: weights alone
    assert all(case.tokens == round(sum(case.lengths) / len(case.lengths)) for case in cpu + gpu)
    names = [tuple(case.identity().values()) for case in gpu]
    assert len(set(names)) == len(names)
