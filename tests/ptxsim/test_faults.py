"""Small kernels, right ones and the same with one fault planted: each fault is seen, and the right ones run through."""

import re

import numpy as np
import pytest

from ptxsim import Fault, Global, Kernel, Machine, pack

THREADS = 64
# every kernel: i = the thread, p = whether it is the first, in and out at i's place, s = i's place in shared memory
HEAD = """
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 1024 .b8 smem[];
.visible .entry kernel(.param .u64 in, .param .u64 out, .param .u64 map)
.reqntid {threads}
{{
  .reg .pred %p<9>;
  .reg .b16 %h<9>;
  .reg .b32 %r<99>;
  .reg .f32 %f<99>;
  .reg .b64 %rd<20>;
  ld.param.b64 %rd1, [in];
  ld.param.b64 %rd2, [out];
  ld.param.b64 %rd9, [map];
  mov.u32 %r1, %tid.x;
  mul.wide.u32 %rd3, %r1, 4;
  add.s64 %rd4, %rd1, %rd3;
  add.s64 %rd5, %rd2, %rd3;
  mov.b32 %r3, smem;
  shl.b32 %r4, %r1, 2;
  add.s32 %r2, %r3, %r4;
  xor.b32 %r5, %r4, 128;
  add.s32 %r5, %r3, %r5; // the place of the thread in the other warp
  setp.eq.s32 %p1, %r1, 0;
{body}
  ret;
}}
"""


def run(body, x=None, out_size=THREADS, shared=4096, threads=THREADS, grid=1, tensor_map=None, seed=0):
    """What the kernel leaves in `out`: fp32, NaN where it writes nothing."""
    x = np.arange(THREADS, dtype=np.float32) if x is None else x
    out = np.full(out_size, np.nan, np.float32)
    memory = Global()
    addresses = [memory.add(array.view(np.uint8)) for array in (x, out)]
    addresses.append(memory.add(tensor_map(addresses[0])) if tensor_map else 0)
    kernel = Kernel(HEAD.format(body=body, threads=threads))
    Machine(kernel, shared, seed=seed).launch(grid, pack(kernel, addresses), memory)
    return out


def without(body, line, instead=""):
    """The kernel with the first instruction that begins so taken out."""
    changed = re.sub(rf"^\s*(@!?%p\d )?{re.escape(line)}.*$", instead, body, count=1, flags=re.M)
    assert changed != body
    return changed


COPY = "ld.global.b32 %r9, [%rd4]; st.global.b32 [%rd5], %r9;"


def test_a_copy():
    assert np.array_equal(run(COPY), np.arange(THREADS))


@pytest.mark.parametrize(
    "body, message",
    [
        ("ld.global.b32 %r9, [%rd4]; st.global.b32 [%rd5+4], %r9;", "thread 63 of program 0 writes 4 bytes beyond"),
        ("ld.global.b32 %r9, [%rd4+-4];", "thread 0 of program 0 reads 4 bytes beyond a tensor"),
        ("ld.global.b64 %rd8, [%rd4];", "not aligned"),
        ("ld.global.b32 %r9, [%rd4+536870912];", "outside of device memory"),
        ("ld.global.v4.b32 {%r9, %r10, %r11, %r12}, [%rd2+240]; ld.global.b32 %r9, [%rd2+256];", "thread 0"),
        ("st.shared.b32 [%r2+3900], %r1;", "writes beyond shared memory"),
        ("st.shared.b64 [%r2], %rd3;", "not aligned"),
        ("what.is.this %r1;", "not an instruction that is known"),
    ],
)
def test_an_access_outside(body, message):
    with pytest.raises(Fault, match=message):
        run(body)


def test_between_the_rows_of_a_tensor():
    memory, array = Global(), np.zeros(4 * THREADS, np.uint8)
    elements = np.ones(array.size, bool)
    elements[40:44] = False
    kernel = Kernel(HEAD.format(body=COPY, threads=THREADS))
    addresses = memory.add(array, elements), memory.add(array.copy()), 0
    with pytest.raises(Fault, match="thread 10 of program 0 reads 4 bytes beyond a tensor"):
        Machine(kernel).launch(1, pack(kernel, addresses), memory)


def test_programs_do_not_touch_what_others_wrote():
    with pytest.raises(Fault, match="program 1 writes what program 0 wrote"):
        run(COPY, grid=2)
    with pytest.raises(Fault, match="program 1 reads what program 0 wrote"):
        mine = "mov.u32 %r9, %ctaid.x; setp.eq.s32 %p2, %r9, 0; @%p2 st.global.b32 [%rd5], %r9;"
        run(mine + "@!%p2 ld.global.b32 %r9, [%rd5];", grid=2)


def test_a_register_that_nothing_wrote_is_nan():
    assert np.isnan(run("add.f32 %f2, %f1, %f1; st.global.b32 [%rd5], %f2;")).all()


# ---------------------------------------------------------------- shared memory and barriers

EXCHANGE = """
  st.shared.b32 [%r2], %r1;
  bar.sync 0;
  ld.shared.b32 %r9, [%r5];
  cvt.rn.f32.s32 %f1, %r9;
  st.global.b32 [%rd5], %f1;
"""


@pytest.mark.parametrize("seed", range(3))
def test_warps_exchange_values(seed):
    assert np.array_equal(run(EXCHANGE, seed=seed), np.arange(THREADS) ^ 32)


def test_a_missing_barrier():
    with pytest.raises(Fault, match="race: warp 0 reads shared byte 128, written by warp 1|which nothing wrote"):
        run(without(EXCHANGE, "bar.sync"))
    again = EXCHANGE + "st.shared.b32 [%r2], %r1;"  # while the other warp may still read
    with pytest.raises(Fault, match="race: warp . writes shared byte .*, read by warp"):
        run(again)
    assert np.array_equal(run(again.replace("st.global", "bar.sync 0; st.global")), np.arange(THREADS) ^ 32)


def test_a_barrier_of_others_orders_nothing():
    """Each warp waits at a barrier of its own 32 threads."""
    own = "shr.u32 %r8, %r1, 5; add.s32 %r8, %r8, 1; bar.sync %r8, 32;"
    with pytest.raises(Fault, match="race|which nothing wrote"):
        run(without(EXCHANGE, "bar.sync", own))
    assert np.array_equal(run(without(EXCHANGE, "bar.sync", "bar.sync 3, 64;")), np.arange(THREADS) ^ 32)


def test_shared_memory_that_nothing_wrote():
    with pytest.raises(Fault, match="warp 0 reads shared byte 128, which nothing wrote"):
        run(EXCHANGE.replace("st.shared.b32 [%r2]", "@%p1 st.shared.b32 [%r2]"))


@pytest.mark.parametrize("body", ["@%p1 bar.sync 0;", "setp.lt.s32 %p2, %r1, 32; @%p2 ret; bar.sync 0;"])
def test_a_barrier_that_never_fills(body):
    with pytest.raises(Fault, match="deadlock|a barrier that some threads wait for no more"):
        run(body)


def test_too_many_at_a_barrier():
    with pytest.raises(Fault, match="64 threads at a barrier of 32"):
        run("bar.sync 1, 32;")


def test_a_part_of_a_warp():
    with pytest.raises(Fault, match="a part of a warp"):
        run("@%p1 shfl.sync.bfly.b32 %r9, %r1, 1, 31, -1;")


def test_branches_meet_again():
    """Threads that loop a different number of times are together afterwards: the exchange within a warp works."""
    body = """
      mov.b32 %r9, 0;
    again:
      add.s32 %r9, %r9, 1;
      setp.le.s32 %p2, %r9, %r1;
      @%p2 bra again;
      shfl.sync.bfly.b32 %r9, %r9, 1, 31, -1;
      cvt.rn.f32.s32 %f1, %r9;
      st.global.b32 [%rd5], %f1;
    """
    assert np.array_equal(run(body), (np.arange(THREADS) ^ 1) + 1)


# ---------------------------------------------------------------- copies in the background

BACKGROUND = """
  cp.async.ca.shared.global [%r2], [%rd4], 0x4, 0x4;
  cp.async.commit_group;
  cp.async.wait_group 0;
  bar.sync 0;
  ld.shared.b32 %r9, [%r5];
  st.global.b32 [%rd5], %r9;
"""


def test_a_copy_in_the_background():
    assert np.array_equal(run(BACKGROUND), np.arange(THREADS) ^ 32)
    none = BACKGROUND.replace("0x4, 0x4", "0x4, %r99").replace("cp.async.ca", "mov.b32 %r98, 0; cp.async.ca")
    assert not run(none.replace("%r99", "%r98")).any()  # none of its bytes: zeros


@pytest.mark.parametrize("line", ["cp.async.commit_group", "cp.async.wait_group", "bar.sync"])
def test_a_copy_that_is_not_waited_for(line):
    with pytest.raises(Fault, match="race: warp . reads shared byte .*, written by a copy of warp"):
        run(without(BACKGROUND, line))


def test_a_wait_that_lets_one_more_be_under_way():
    with pytest.raises(Fault, match="race"):
        run(BACKGROUND.replace("wait_group 0", "wait_group 1"))


def test_a_copy_beyond_a_tensor():
    with pytest.raises(Fault, match="a copy: reads beyond a tensor"):
        run(BACKGROUND.replace("[%rd4]", "[%rd4+4]"))


# ---------------------------------------------------------------- tensor copies (sm_90)

ROWS, COLUMNS = 8, 64  # of halves: a row is 128 bytes, the box has all of them
TENSOR = f"""
  @%p1 mbarrier.init.shared::cta.b64 [%r3+2048], 1;
  bar.sync 0;
  mov.b32 %r7, 0;
  @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r3+2048], {ROWS * COLUMNS * 2};
  @%p1 cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [%r3], [%rd9, {{%r7, %r7}}], [%r3+2048];
  {{
    .reg .pred complete;
  wait:
    mbarrier.try_wait.parity.shared::cta.b64 complete, [%r3+2048], %r7;
    @!complete bra wait;
  }}
  ld.shared.b32 %r9, [%r5];
  st.global.b32 [%rd5], %r9;
  @%p1 mbarrier.inval.shared::cta.b64 [%r3+2048];
"""


def box(address, rows=ROWS):
    """A map of `rows` rows of the tensor at `address`, as `ptxsim.tensors` writes it."""
    from ptxsim.tensors import _FIELDS

    raw = bytearray(128)
    fields = dict(global_address=[address], global_dim=[COLUMNS, rows], global_stride=[COLUMNS * 2], rank=[1])
    fields |= dict(box_dim=[COLUMNS, ROWS], element_stride=[1, 1], elemtype=[10], swizzle_mode=[0])
    for name, values in fields.items():
        offset, size = _FIELDS[name]
        for i, value in enumerate(values):
            raw[offset + i * size : offset + (i + 1) * size] = value.to_bytes(size, "little")
    return np.frombuffer(bytes(raw), np.uint8).copy()


def load_tensor(body, rows=ROWS, **options):
    x = np.arange(rows * COLUMNS // 2, dtype=np.float32)
    return run(body, x, tensor_map=lambda address: box(address, rows), **options)


@pytest.mark.parametrize("seed", range(3))
def test_a_tensor_copy(seed):
    assert np.array_equal(load_tensor(TENSOR, seed=seed), np.arange(THREADS) ^ 32)


def test_rows_beyond_the_tensor_are_zeros():
    """One row of 32 words is there: the second warp's own words are the first's."""
    assert np.array_equal(load_tensor(TENSOR, rows=1), [0] * 32 + list(range(32)))


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("mbarrier.try_wait.parity.shared::cta.b64 complete, [%r3+2048], %r7", "setp.eq.s32 complete, %r7, 0", "race"),
        ("[%r3+2048], %r7;", "[%r3+2048], 1;", "race: .* written by a tensor copy"),  # the phase before: over already
        ("bar.sync 0;", "", "no mbarrier|race: warp 1 uses an mbarrier"),
        (f"{ROWS * COLUMNS * 2};", f"{ROWS * COLUMNS * 2 + 16};", "deadlock"),
        (f"{ROWS * COLUMNS * 2};", f"{ROWS * COLUMNS * 2 - 16};", "deadlock"),
        ("], 1;\n", "], 2;\n", "deadlock"),
        ("[%r3], [%rd9", "[%r3+16], [%rd9", "not aligned"),
        ("[%r3], [%rd9", "[%r3+3968], [%rd9", "beyond shared memory"),
        ("ld.shared.b32 %r9", "st.shared.b32 [%r2], %r1; ld.shared.b32 %r9", "race"),
        ("bar.sync 0;", "bar.sync 0; @%p1 st.shared.b32 [%r3], %r1;", "race: a tensor copy writes"),  # no fence
    ],
)
def test_faults_of_a_tensor_copy(old, new, message):
    assert old in TENSOR
    with pytest.raises(Fault, match=message):
        load_tensor(TENSOR.replace(old, new, 1))


def test_a_tensor_copy_after_a_fence():
    body = TENSOR.replace("bar.sync 0;", "bar.sync 0; @%p1 st.shared.b32 [%r3], %r1; fence.proxy.async.shared::cta;")
    assert np.array_equal(load_tensor(body), np.arange(THREADS) ^ 32)


def test_a_tensor_copy_that_nobody_waits_for():
    begun = TENSOR[: TENSOR.index("{\n    .reg")]
    with pytest.raises(Fault, match="ends with a tensor copy under way"):
        for seed in range(20):  # it may come before the end
            load_tensor(begun, seed=seed)


# ---------------------------------------------------------------- matrix products of a warpgroup (sm_90)

SUMS = ", ".join(f"%f{i}" for i in range(4))
# operands of ones everywhere: each sum is 16
DESCRIPTOR = (1 << 62) | (1 << 16) | (64 << 32)  # rows of 128 bytes, at shared byte 0
PRODUCT = f"""
  mov.b32 %r8, 0x3F803F80;
  st.shared.v4.b32 [%r6], {{%r8, %r8, %r8, %r8}};
  st.shared.v4.b32 [%r6+2048], {{%r8, %r8, %r8, %r8}};
  st.shared.v4.b32 [%r6+4096], {{%r8, %r8, %r8, %r8}};
  st.shared.v4.b32 [%r6+6144], {{%r8, %r8, %r8, %r8}};
  fence.proxy.async.shared::cta;
  bar.sync 0;
  mov.b64 %rd8, {DESCRIPTOR};
  setp.ne.s32 %p2, %r1, %r1;
  wgmma.fence.sync.aligned;
  wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {{{SUMS}}}, %rd8, %rd8, %p2, 1, 1, 0, 0;
  wgmma.commit_group.sync.aligned;
  wgmma.wait_group.sync.aligned 0;
  st.global.b32 [%rd5], %f1;
"""


def multiply(body):
    body = "shl.b32 %r6, %r1, 4; add.s32 %r6, %r6, %r3;\n" + body
    return run(body, np.zeros(128, np.float32), out_size=128, shared=8192, threads=128)


def test_a_product():
    assert (multiply(PRODUCT) == 16).all()


def test_a_product_adds():
    begin, end = PRODUCT.index("wgmma.mma"), PRODUCT.index("wgmma.commit")
    twice = PRODUCT[:end] + PRODUCT[begin:end].replace("%p2", "%p3") + PRODUCT[end:]
    assert (multiply("setp.eq.s32 %p3, %r1, %r1;" + twice) == 32).all()


def test_sums_that_are_moved_before_the_wait():
    """As LLVM does. Used before the wait they are NaN all the same; no product may add to what was moved."""
    moved = PRODUCT.replace("[%rd5], %f1", "[%rd5], %f9").replace("wgmma.wait", "mov.b32 %f9, %f1; wgmma.wait")
    assert (multiply(moved) == 16).all()
    assert np.isnan(multiply(moved.replace("wgmma.wait", "add.f32 %f9, %f9, %f9; wgmma.wait"))).all()
    begin, end = PRODUCT.index("wgmma.mma"), PRODUCT.index("wgmma.commit")
    with pytest.raises(Fault, match="adds to %f1, which was moved before it came"):
        multiply(PRODUCT[:end] + "mov.b32 %f9, %f1;" + PRODUCT[begin:end] + PRODUCT[end:])


@pytest.mark.parametrize("line", ["wgmma.wait_group", "wgmma.commit_group"])
def test_sums_that_are_used_too_early_are_nan(line):
    assert np.isnan(multiply(without(PRODUCT, line))).all()


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("fence.proxy.async.shared::cta;", "", "race: a product of warpgroup 0 reads .*, written by warp"),
        ("bar.sync 0;", "", "race: a product of warpgroup 0 reads .*, written by warp"),
        (
            "st.shared.v4.b32 [%r6+6144]",
            "@%p1 st.shared.v4.b32 [%r6+6144]",
            "reads shared byte .*, which nothing wrote",
        ),
        ("wgmma.wait_group", "st.shared.b32 [%r2], %r1; wgmma.wait_group", "race: warp 0 writes .*, read by a product"),
        ("wgmma.fence", "@%p1 wgmma.commit_group.sync.aligned; wgmma.fence", "a part of a warpgroup"),
    ],
)
def test_faults_of_a_product(old, new, message):
    assert old in PRODUCT
    with pytest.raises(Fault, match=message):
        multiply(PRODUCT.replace(old, new, 1))
