"""The C interface of csrc/ through ctypes, with no GPU: every argument is checked, and errors are clear in Python."""

import ctypes
import re

import pytest
import torch
from cuda_build import ROOT, build_module, built

from kunbr_fast.cli import doctor
from kunbr_fast.kernels import c_arguments, cuda_library, dispatch
from kunbr_fast.kernels.grad_density import cuda as cuda_density
from kunbr_fast.kernels.grad_density import op as operators
from kunbr_fast.kernels.optimizers import cuda as cuda_optimizers
from kunbr_fast.kernels.optimizers import op as optim

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.fixture(scope="module")
def library():
    """The installed one if it was built from these sources, else one that is built here."""
    installed = build_module().is_current(cuda_library.PATH)
    return cuda_library.open_library(cuda_library.PATH if installed else built()[0])


@pytest.fixture
def loaded(library, monkeypatch):
    """`cuda_library` with that library, whether or not one is installed."""
    monkeypatch.setattr(cuda_library, "_load", lambda: library)
    cuda_library._device.cache_clear()
    yield library
    cuda_library._device.cache_clear()


# ---------------------------------------------------------------- one interface, three texts


def test_ctypes_signatures_are_the_headers():
    """kunbr.h and the Python side name the same functions, with as many arguments of the same kinds."""
    header = re.sub(r"/\*.*?\*/", "", (ROOT / "csrc" / "kunbr.h").read_text(), flags=re.DOTALL)
    kinds = {"int": ctypes.c_int, "int64_t": ctypes.c_int64, "uint32_t": ctypes.c_uint32, "uint64_t": ctypes.c_uint64}
    kinds |= {"double": ctypes.c_double, "const char *": ctypes.c_char_p}

    def kind(text):
        text = re.sub(r"\s+", " ", text.strip())
        if "*" in text:
            return "pointer"
        return kinds[text.split(" ")[0]]

    found = {}
    for result, name, arguments in re.findall(r"KUNBR_API ([\w ]+?[ *]+)kunbr_(\w+)\(([^)]*)\);", header):
        types = [] if arguments.strip() == "void" else [kind(text) for text in arguments.split(",")]
        found[name] = kinds[result.strip().replace("char*", "char *")], types
    assert set(found) == set(cuda_library._SIGNATURES)
    pointers = {ctypes.c_void_p, cuda_library._SIZES, cuda_library._POINTERS, ctypes.POINTER(ctypes.c_int)}
    for name, (result, types) in cuda_library._SIGNATURES.items():
        assert result is found[name][0], name
        assert ["pointer" if t in pointers else t for t in types] == found[name][1], name


def test_constants_are_the_headers():
    header = (ROOT / "csrc" / "kunbr.h").read_text()
    values = {name: int(value) for name, value in re.findall(r"\b(KUNBR_\w+) = (\d+)", header)}
    assert int(re.search(r"#define KUNBR_ABI_VERSION (\d+)", header)[1]) == cuda_library.ABI_VERSION
    names = {torch.float32: "FP32", torch.bfloat16: "BF16", torch.float16: "FP16"}
    names |= {torch.int32: "INT32", torch.int64: "INT64"}
    assert c_arguments.TYPES == {dtype: values[f"KUNBR_{name}"] for dtype, name in names.items()}
    assert list(cuda_density.STATISTICS.values()) == [values[f"KUNBR_{name}"] for name in ("L1", "L2SQ", "LINF")]
    assert list(cuda_density.ALONG.values()) == [values[f"KUNBR_{name}"] for name in ("ALL", "ROW")]
    variants = ("FASTEST", "PORTABLE", "HOPPER")
    assert list(cuda_density.VARIANTS.values()) == [values[f"KUNBR_{name}"] for name in variants]
    assert (cuda_library.OLD_GPU, cuda_library.CUDA) == (values["KUNBR_OLD_GPU"], values["KUNBR_CUDA"])


def test_what_the_library_says_of_itself(library):
    assert library.kunbr_abi_version() == cuda_library.ABI_VERSION
    assert re.fullmatch(r"nvcc \d+\.\d+: sm_80 sm_90a, PTX for later ones", library.kunbr_build().decode())
    header = (ROOT / "csrc" / "kunbr.h").read_text()
    status = re.search(r"enum kunbr_status \{(.*?)\};", header, re.DOTALL)[1]
    texts = {library.kunbr_message(int(value)) for value in re.findall(r"= (\d+)", status)}
    assert len(texts) == len(re.findall(r"= (\d+)", status))  # each has a text of its own
    assert library.kunbr_message(-1) == library.kunbr_message(99) == b"an unknown code"
    assert b"an illegal memory access" in library.kunbr_message(1700)


# ---------------------------------------------------------------- arguments
#
# Vectors are in host memory here: what passes all checks stops at the missing driver, before anything reads them.

MEMORY = (ctypes.c_char * 4096)()
AT = -(-ctypes.addressof(MEMORY) // 256) * 256
FP32, BF16, INT32 = 0, 1, 3

LION = dict(param=AT, param_type=FP32, grad=AT, grad_type=FP32, momentum=AT, momentum_type=FP32, half=None, half_type=0)
LION |= dict(size=8, lr=1e-3, beta1=0.9, beta2=0.99, weight_decay=0.0, stochastic=0, seed=0, step=0)
LION |= dict(bad=None, stream=None)
ADAMW = dict(param=AT, param_type=FP32, grad=AT, grad_type=FP32, exp_avg=AT, exp_avg_sq=AT, state_type=FP32)
ADAMW |= dict(half=None, half_type=0, size=8, step=1, lr=1e-3, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.0)
ADAMW |= dict(stochastic=0, seed=0, bad=None, stream=None)


def sizes(*values):
    return (ctypes.c_int64 * len(values))(*values)


def pointers(*values):
    return (ctypes.c_void_p * len(values))(*values)


DENSITY = dict(x=AT, x_strides=sizes(16, 1), tokens=4, K=16, projections=2, dys=pointers(AT, AT))
DENSITY |= dict(dy_strides=sizes(8, 1, 24, 1), sizes=sizes(8, 24), type=BF16, cu_seqlens=AT, index_type=INT32)
DENSITY |= dict(samples=2, statistic=0, along=0, outs=pointers(AT, AT), workspace=AT, workspace_bytes=1 << 30)
DENSITY |= dict(variant=0, stream=None)
GOOD = {"lion": LION, "adamw": ADAMW, "grad_density": DENSITY}

NULL, SIZE, STRIDE, TYPE, ALIGNMENT, VALUE, WORKSPACE, LARGE = range(1, 9)
BAD = [
    ("lion", dict(param=None), NULL, "param is NULL"),
    ("lion", dict(grad=None), NULL, "grad is NULL"),
    ("lion", dict(momentum=None), NULL, "momentum is NULL"),
    ("lion", dict(size=-1), SIZE, "size is -1"),
    ("lion", dict(size=1 << 62), LARGE, "size is"),
    ("lion", dict(param_type=INT32), TYPE, "param has type 3"),
    ("lion", dict(grad_type=-1), TYPE, "grad has type -1"),
    ("lion", dict(momentum=AT + 2), ALIGNMENT, "momentum is not aligned to its elements of 4 bytes"),
    ("lion", dict(half=AT + 1, half_type=BF16), ALIGNMENT, "half is not aligned"),
    ("lion", dict(half=AT, half_type=7), TYPE, "half has type 7"),
    ("lion", dict(lr=-1.0), VALUE, "lr=-1"),
    ("lion", dict(lr=float("nan")), VALUE, "lr=nan"),
    ("lion", dict(beta1=1.0), VALUE, "betas=(1, 0.99)"),
    ("lion", dict(weight_decay=-0.5), VALUE, "weight_decay=-0.5"),
    ("lion", dict(stochastic=1), TYPE, "stochastic rounding is for a bf16 param"),
    ("lion", dict(bad=AT + 2), ALIGNMENT, "bad is not aligned to its elements of 4 bytes"),
    ("adamw", dict(exp_avg=None), NULL, "exp_avg is NULL"),
    ("adamw", dict(exp_avg_sq=None), NULL, "exp_avg_sq is NULL"),
    ("adamw", dict(state_type=4), TYPE, "exp_avg has type 4"),
    ("adamw", dict(step=0), VALUE, "step=0"),
    ("adamw", dict(eps=-1.0), VALUE, "eps=-1"),
    ("grad_density", dict(projections=0), SIZE, "0 projections, expected 1 to 3"),
    ("grad_density", dict(projections=4), SIZE, "4 projections"),
    ("grad_density", dict(statistic=-1), VALUE, "statistic is -1"),
    ("grad_density", dict(statistic=3), VALUE, "statistic is 3"),
    ("grad_density", dict(along=2), VALUE, "along is 2"),
    ("grad_density", dict(variant=70), VALUE, "variant is 70"),
    ("grad_density", dict(type=INT32), TYPE, "type is 3"),
    ("grad_density", dict(index_type=FP32), TYPE, "index_type is 0"),
    ("grad_density", dict(cu_seqlens=None), NULL, "cu_seqlens is NULL"),
    ("grad_density", dict(cu_seqlens=AT + 2), ALIGNMENT, "cu_seqlens"),
    ("grad_density", dict(samples=-1), SIZE, "samples is -1"),
    ("grad_density", dict(tokens=-1), SIZE, "there are -1 tokens"),
    ("grad_density", dict(tokens=1 << 31), SIZE, "tokens, expected 0 to 1073741824"),
    ("grad_density", dict(dys=None), NULL, "dys, dy_strides, sizes or outs is NULL"),
    ("grad_density", dict(x=None), NULL, "x is NULL"),
    ("grad_density", dict(x_strides=None), NULL, "x has no strides"),
    ("grad_density", dict(x_strides=sizes(-16, 1)), STRIDE, "x has strides -16, 1"),
    ("grad_density", dict(dys=pointers(AT, None)), NULL, "dys[1] is NULL"),
    ("grad_density", dict(dys=pointers(AT, AT + 1)), ALIGNMENT, "dys[1]"),
    ("grad_density", dict(sizes=sizes(8, 0)), SIZE, "dys[1] has 0 columns"),
    ("grad_density", dict(K=0), SIZE, "x has 0 columns"),
    ("grad_density", dict(outs=pointers(AT, None)), NULL, "outs[1] is NULL"),
    ("grad_density", dict(outs=pointers(AT, AT + 4)), ALIGNMENT, "outs[1]"),
    ("grad_density", dict(workspace=None), NULL, "workspace is NULL"),
    ("grad_density", dict(workspace_bytes=100), WORKSPACE, "workspace has 100 bytes"),
    ("grad_density", dict(samples=1 << 30, K=1 << 20), LARGE, "split the batch"),
]


@pytest.mark.parametrize("name, wrong, code, detail", BAD, ids=lambda v: "-".join(v) if isinstance(v, dict) else None)
def test_every_argument_is_checked(library, name, wrong, code, detail):
    arguments = {**GOOD[name], **wrong}
    assert list(arguments) == list(GOOD[name])  # no name that is not there
    assert getattr(library, f"kunbr_{name}")(*arguments.values()) == code
    assert library.kunbr_detail().decode().startswith(f"{name}: ") and detail in library.kunbr_detail().decode()


@NO_GPU
@pytest.mark.parametrize("name", GOOD)
def test_good_arguments_end_at_the_missing_driver(library, name):
    assert getattr(library, f"kunbr_{name}")(*GOOD[name].values()) == cuda_library.INSUFFICIENT_DRIVER
    assert "CUDA error 35" in library.kunbr_detail().decode()


def test_nothing_to_do_needs_no_gpu(library):
    assert library.kunbr_grad_density(*{**DENSITY, "samples": 0}.values()) == 0


def test_workspace(library):
    whole = library.kunbr_grad_density_workspace(4096, 1, sizes(14336), 8, 0)
    row = library.kunbr_grad_density_workspace(4096, 1, sizes(14336), 8, 1)
    assert whole % 256 == 0 and whole < row < 8 * (2 * 4 * 14336 * 4 + 4096)  # kilobytes, not dW's 235 MB
    assert library.kunbr_grad_density_workspace(4096, 1, sizes(14336), 0, 0) == 0


# ---------------------------------------------------------------- in Python


def test_codes_become_exceptions(loaded):
    with pytest.raises(cuda_library.LibraryError, match=r"lion: param is NULL: a pointer is NULL \(code 1\)") as caught:
        cuda_library.check(loaded.kunbr_lion(*{**LION, "param": None}.values()))
    assert caught.value.code == 1
    cuda_library.check(0)


def test_capability_of_no_device(library):
    assert library.kunbr_device(0, None) == NULL


@NO_GPU
def test_no_device_is_a_clear_error(loaded):
    capability = ctypes.c_int()
    assert loaded.kunbr_device(0, ctypes.byref(capability)) == cuda_library.INSUFFICIENT_DRIVER
    reason = cuda_library.why_not(torch.device("cuda", 0))
    assert (
        reason.startswith("needs a CUDA device") and "no CUDA driver, or one older" in reason and "error 35" in reason
    )
    assert cuda_library.why_not(torch.device("cpu")) == "needs a CUDA device"
    for operation in dispatch.CUDA_OPERATIONS:
        with pytest.raises(
            dispatch.Unavailable, match=f'{operation}: impl="cuda" cannot run on cpu: needs a CUDA device'
        ):
            dispatch.resolve(operation, "cuda", "cpu")
        with pytest.raises(dispatch.Unavailable, match="CUDA error 35"):
            dispatch.resolve(operation, "cuda", "cuda:0")
        assert dispatch.resolve(operation, "auto", "cpu") == "torch"
    with pytest.raises(dispatch.Unavailable, match='impl="cuda" cannot run on cpu'):
        optim.Lion([torch.nn.Parameter(torch.zeros(3))], 1e-3, impl="cuda")
    x, cu = torch.zeros(2, 8), torch.tensor([0, 2])
    with pytest.raises(dispatch.Unavailable, match='grad_density: impl="cuda" cannot run on cpu'):
        operators.grad_density(x, [x], cu, impl="cuda")


def test_auto_passes_it_by_where_it_can_run(monkeypatch, loaded):
    monkeypatch.setattr(cuda_library, "why_not", lambda device: None)
    for operation in dispatch.CUDA_OPERATIONS:
        assert dispatch.why_not(operation, "cuda", "cuda:0") is None
        assert dispatch.why_not_auto(operation, "cuda", "cuda:0") == "proofs are off (KUNBR_PROVE=0)"
        assert dispatch.resolve(operation, "cuda", "cuda:0", torch.float32) == "cuda"
        assert dispatch.resolve(operation, "auto", "cuda:0", torch.float32) != "cuda"
        with pytest.raises(TypeError, match=f'{operation}: impl="cuda" does not serve float64'):
            dispatch.resolve(operation, "cuda", "cuda:0", torch.float64)


@pytest.mark.parametrize("operation", sorted(set(dispatch.OPERATIONS) - set(dispatch.CUDA_OPERATIONS)))
def test_operations_without_a_kernel(operation):
    assert dispatch.why_not(operation, "cuda", "cuda") == "not in this release"


def test_gpus_that_are_too_old(loaded, monkeypatch):
    def device(index, capability):
        capability._obj.value = 75
        return cuda_library.OLD_GPU

    monkeypatch.setattr(cuda_library, "library", lambda: type("Old", (), {"kunbr_device": staticmethod(device)}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert cuda_library.why_not(torch.device("cuda", 0)) == "needs compute capability 8.0 or newer, this is 7.5"


def test_a_library_that_is_not_there(tmp_path, monkeypatch):
    load = cuda_library._load.__wrapped__
    monkeypatch.setattr(cuda_library, "_load", load)
    monkeypatch.setattr(cuda_library, "PATH", tmp_path / "none.so")
    assert "csrc/ is not built: in a checkout with nvcc 12.4 or newer" in cuda_library.why_not(torch.device("cuda"))
    with pytest.raises(dispatch.Unavailable, match=r"python csrc/build\.py"):
        dispatch.resolve("lion", "cuda", "cuda")
    assert "csrc/ is not built" in doctor.format_doctor(doctor.doctor())
    (tmp_path / "none.so").write_bytes(b"not a library")
    assert "the library of csrc/ does not load: " in cuda_library.why_not(torch.device("cuda"))
    with pytest.raises(dispatch.Unavailable, match="does not load"):
        cuda_library.library()


def test_a_library_of_another_version(library, monkeypatch):
    monkeypatch.setattr(cuda_library, "ABI_VERSION", 999)
    with pytest.raises(OSError, match=r"has interface 3 and this Python code 999: .*python csrc/build\.py"):
        cuda_library.open_library(library._name)


def test_what_the_functions_refuse(loaded):
    p = torch.zeros(4)
    with pytest.raises(ValueError, match=r"lion: got \(3,\) .* beside \(4,\)"):
        cuda_optimizers.lion_(p, torch.zeros(3), p, 1e-3, 0.9, 0.99, 0.0)
    with pytest.raises(ValueError, match="give contiguous tensors"):
        cuda_optimizers.lion_(p, torch.zeros(8)[::2], p, 1e-3, 0.9, 0.99, 0.0)
    with pytest.raises(TypeError, match="exp_avg is torch.float32 and exp_avg_sq torch.bfloat16"):
        cuda_optimizers.adamw_(p, p, p, p.bfloat16(), 1, 1e-3, 0.9, 0.99, 1e-8, 0.0)
    with pytest.raises(TypeError, match='impl="cuda" does not serve torch.float64'):
        cuda_optimizers.lion_(p.double(), p, p, 1e-3, 0.9, 0.99, 0.0)


def test_shapes_through_torch_compile_are_the_operators(monkeypatch, loaded):
    """The fakes are the existing operators': impl="cuda" traces as any other."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x, cu = torch.empty(6, 8, dtype=torch.bfloat16), torch.empty(3, dtype=torch.int32)
        (out,) = torch.ops.kunbr_fast.grad_density(x, [x], cu, 4, "grad_linf", "row", "direct", "cuda")
        assert out.shape == (2, 8) and out.dtype == torch.float64
