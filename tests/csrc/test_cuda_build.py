"""csrc/ as nvcc builds it: no spills, the matrix instructions that were meant; and what setup.py does without nvcc."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from cuda_build import ROOT, build_module, built


def kernels(said):
    """{(mangled name, architecture): (registers, bytes of spills and stack)}"""
    found = {}
    for part in said.split("ptxas info    : Compiling entry function")[1:]:
        name, architecture = re.match(r" '(\S+)' for '(sm_\w+)'", part).groups()
        stack = [int(n) for n in re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", part)]
        assert len(stack) == 3, part
        found[name, architecture] = int(re.search(r"Used (\d+) registers", part)[1]), sum(stack)
    return found


def test_no_spills():
    _, said = built()
    found = kernels(said)
    for architecture in ("sm_80", "sm_90a"):
        mine = {name: used for (name, built_for), used in found.items() if built_for == architecture}
        assert sum("density_kernel" in name for name in mine) == 3  # types
        assert sum("update_kernel" in name for name in mine) == 4  # two optimisers, each with the flag and without
        assert sum("hopper_kernel" in name for name in mine) == (2 if architecture == "sm_90a" else 0)
        assert all(0 < registers <= 255 and spilled == 0 for registers, spilled in mine.values()), mine
    # wgmma that the compiler runs one by one (C7510), setmaxnreg that it ignores (C7508), anything else it minds
    assert not re.search(r"\bwarning\b|C75\d\d", said, re.IGNORECASE), said


def sass(library):
    """{architecture: {mangled kernel name: instructions}}"""
    tool = shutil.which("cuobjdump")
    if tool is None:
        triton = pytest.importorskip("triton", reason="no cuobjdump: neither on the path nor in triton's wheel")
        tool = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    if not Path(tool).is_file():
        pytest.skip("no cuobjdump: neither on the path nor in triton's wheel")
    text = subprocess.run([tool, "--dump-sass", str(library)], capture_output=True, text=True, check=True).stdout
    found, architecture, name = {}, None, None
    for line in text.splitlines():
        if match := re.search(r"arch = (sm_\w+)", line):
            architecture = match[1]
        elif match := re.search(r"Function : (\S+)", line):
            name = match[1]
        elif name is not None and (match := re.search(r"/\*[0-9a-f]{4,}\*/\s+([^;]+);", line)):
            found.setdefault(architecture, {}).setdefault(name, []).append(match[1])
    return found


def test_machine_code():
    library, _ = built()
    found = sass(library)
    assert set(found) == {"sm_80", "sm_90a"}
    for architecture, functions in found.items():
        for name, instructions in functions.items():
            text = "\n".join(instructions)
            assert not re.search(r"\b(STL|LDL)\b", text), (architecture, name)  # nothing in local memory
            if "density_kernel" in name and "IfE" not in name:  # not fp32
                assert "HMMA.16816.F32" in text and "LDSM.16.MT88.4" in text and "LDGSTS" in text, name
            if "density_kernel" in name and "IfE" in name:
                assert "FFMA" in text and "HMMA" not in text, name
            if "hopper_kernel" in name:
                products = [line for line in instructions if "HGMMA" in line]
                assert len(products) == 2 * (4 + 3 + 2 + 1) and all("64x128x16.F32" in line for line in products)
                assert all(".tnspA.tnspB" in line for line in products)  # both operands as they lie
                assert "HMMA" not in text and "UTMALDG.2D" in text and "USETMAXREG" in text
                assert "BRA.U.ANY" not in text  # no loop over lanes around each UTMALDG: one lane is known to ask
            if "update_kernel" in name:
                assert {"LDG.E.128", "STG.E.128"} <= set(re.findall(r"(?:LDG|STG)\.E\.128", text))
    assert sum("hopper_kernel" in name for name in found["sm_90a"]) == 2


def test_ptx_for_gpus_to_come():
    """Of every kernel but those of sm_90a alone."""
    library, _ = built()
    assert b"compute_80" in library.read_bytes() or b".target sm_80" in library.read_bytes()


# ---------------------------------------------------------------- with and without nvcc


@pytest.fixture
def checkout(tmp_path):
    """A copy of what setup.py needs, with nothing built."""
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc", ignore=shutil.ignore_patterns("__pycache__"))
    for package in ("kunbr_fast", "kernels", "benchmarks", "benchmarks/suites"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("")
    shutil.copy(ROOT / "kunbr_fast" / "version.py", tmp_path / "kunbr_fast")
    (tmp_path / "tests").mkdir()
    shutil.copy(ROOT / "tests" / "reference_procedure.py", tmp_path / "tests")
    return tmp_path


def fake_nvcc(folder, compile_with):
    """An nvcc of CUDA 13.0 that runs `compile_with`, a line of sh, with its last argument in $last."""
    path = folder / "fake-nvcc"
    path.write_text(
        "#!/bin/sh\n"
        'if [ "$1" = --version ]; then echo "release 13.0, V13.0.0"; exit 0; fi\n'
        'for last in "$@"; do :; done\n' + compile_with + "\n"
    )
    path.chmod(0o755)
    return str(path)


def setup(checkout, *arguments, nvcc):
    environment = {k: v for k, v in os.environ.items() if k not in ("CUDA_HOME", "CUDA_PATH", "KUNBR_BUILD_CUDA")}
    command = [sys.executable, "setup.py", *arguments]
    done = subprocess.run(command, cwd=checkout, env=environment | {"KUNBR_NVCC": nvcc}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.mark.parametrize(
    "nvcc, reason",
    [
        (None, "is not there"),
        ("echo cannot compile >&2; exit 3", "failed with 3:\ncannot compile"),
        ("kill -9 $$", "failed with -9"),
    ],
)
def test_installation_goes_on_without_nvcc(checkout, nvcc, reason):
    stderr = setup(checkout, "bdist_wheel", nvcc="/none/nvcc" if nvcc is None else fake_nvcc(checkout, nvcc))
    assert 'WARNING: installed without impl="cuda" (csrc/ is not built): ' in stderr and reason in stderr
    (wheel,) = (checkout / "dist").iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert not any("libkunbr" in name for name in names)
    # what `kunbr-fast bench` measures against comes from tests/
    assert {"kunbr_fast/benchmarks/suites/__init__.py", "kunbr_fast/benchmarks/reference_procedure.py"} <= set(names)


def test_a_wheel_with_the_library_is_for_its_platform_and_any_python(checkout):
    stderr = setup(checkout, "bdist_wheel", nvcc=fake_nvcc(checkout, 'echo made > "$last"'))
    assert "csrc/ is in " in stderr and "WARNING: installed" not in stderr
    (wheel,) = (checkout / "dist").iterdir()
    assert wheel.name.endswith(f"-py3-none-linux_{os.uname().machine}.whl")
    assert zipfile.ZipFile(wheel).read("kunbr_fast/kernels/libkunbr_cuda.so") == b"made\n"


def test_sources_are_in_the_source_distribution(checkout):
    setup(checkout, "egg_info", nvcc="/none/nvcc")
    listed = (checkout / "kunbr_fast.egg-info" / "SOURCES.txt").read_text().split()
    assert {"csrc/kunbr.h", "csrc/build.py", "csrc/grad_density_sm90.cu", "csrc/statistics.cuh"} <= set(listed)
    assert "tests/reference_procedure.py" in listed


def test_what_was_built_is_not_built_again(tmp_path, monkeypatch):
    build = build_module()
    library = tmp_path / build.LIBRARY
    assert not build.is_current(library)
    library.write_bytes(b"...kunbr-source-hash:" + build.source_hash().encode() + b"...")
    monkeypatch.setenv("KUNBR_NVCC", "/none/nvcc")
    assert build.build(library) == ""
    library.write_bytes(b"...kunbr-source-hash:0123456789abcdef...")
    with pytest.raises(build.Skipped, match="KUNBR_NVCC=/none/nvcc is not there"):
        build.build(library)


@pytest.mark.parametrize(
    "environment, reason",
    [
        ({"KUNBR_BUILD_CUDA": "0"}, "KUNBR_BUILD_CUDA=0 is set"),
        ({"KUNBR_NVCC": "/none/nvcc"}, "KUNBR_NVCC=/none/nvcc is not there"),
        ({"KUNBR_NVCC": "old"}, "is of CUDA 12.1: 12.4 or newer is needed"),
        ({"KUNBR_NVCC": "mute"}, "names no release"),
    ],
)
def test_why_it_is_not_built(environment, reason, monkeypatch, tmp_path):
    for name, says in (("old", "release 12.1, V12.1.66"), ("mute", "hello")):
        (tmp_path / name).write_text(f"#!/bin/sh\necho {says}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    build = build_module()
    with pytest.raises(build.Skipped, match=re.escape(reason)):
        build.nvcc_version(build.find_nvcc())
