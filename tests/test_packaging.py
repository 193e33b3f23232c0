"""Both kinds of installation: where the packages land, and that Hugging Face's `kernels` is not shadowed."""

import os
import shutil
import subprocess
import sys
import textwrap
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from kunbr_fast.version import __version__

ROOT = Path(__file__).resolve().parent.parent


def python(code: str, *flags: str, cwd: Path, **environment: str) -> str:
    """What `code` prints in a fresh interpreter."""
    command = [sys.executable, *flags, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module", params=["plain", pytest.param("editable", marks=pytest.mark.slow)])
def installed(request, tmp_path_factory):
    """(site-packages folder, checkout) of a copy of this checkout, installed with pip and no network."""
    pytest.importorskip("pip")
    folder = tmp_path_factory.mktemp(request.param)
    checkout = folder / "checkout"
    shutil.copytree(
        ROOT,
        checkout,
        ignore=shutil.ignore_patterns(".*", "build", "runs", "*.egg-info", "__pycache__"),
    )
    # Where things are is tested here, in interpreters without third-party packages: nothing to import.
    (checkout / "kunbr_fast" / "__init__.py").write_text("")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    # --ignore-installed leaves alone the installation that these tests run from.
    command += ["--no-build-isolation", "--ignore-installed", "--prefix", str(folder / "prefix")]
    command += ["-e", "."] if request.param == "editable" else ["."]
    done = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (info,) = (folder / "prefix").rglob("kunbr_fast-*.dist-info")
    return info.parent, checkout


def imported(installed, code: str, cwd: Path) -> str:
    """What `code` prints with that installation and no other (-S: not the site-packages of these tests)."""
    prologue = f"import site; site.addsitedir({str(installed[0])!r})\n"
    return python(prologue + textwrap.dedent(code), "-S", cwd=cwd)


def test_kernels_are_a_subpackage_only(installed, tmp_path):
    code = """
    import importlib.util, kunbr_fast.kernels
    print(kunbr_fast.kernels.__doc__[:11], kunbr_fast.kernels.__name__, importlib.util.find_spec("kernels"))
    """
    assert imported(installed, code, cwd=tmp_path) == "The kernels kunbr_fast.kernels None"


def test_every_module_is_installed(installed, tmp_path):
    """All that lies in the folders of the three packages, py.typed too; in a wheel, scripts of a checkout aside."""
    code = """
    import pathlib, kunbr_fast, kunbr_fast.kernels, kunbr_fast.benchmarks
    for package in (kunbr_fast, kunbr_fast.kernels, kunbr_fast.benchmarks):
        root = pathlib.Path(package.__path__[0])
        for path in root.rglob("*"):
            if path.suffix in (".py", ".typed"):
                print(package.__name__.replace(".", "/"), path.relative_to(root))
    """
    found = {"/".join(line.split()) for line in imported(installed, code, cwd=tmp_path).splitlines()}
    expected = {path.relative_to(ROOT).as_posix() for path in (ROOT / "kunbr_fast").rglob("*") if path.suffix == ".py"}
    for top in ("kernels", "benchmarks"):
        expected |= {f"kunbr_fast/{p.relative_to(ROOT).as_posix()}" for p in (ROOT / top).rglob("*.py")}
    expected.add("kunbr_fast/py.typed")
    if installed[1].parent.name.startswith("plain"):
        assert "kunbr_fast/benchmarks/reference_procedure.py" in found - expected
        missing = {path.removeprefix("kunbr_fast/benchmarks/").removesuffix(".py") for path in expected - found}
        assert missing == {
            "scripts/__init__",
            "scripts/bench_pipelines",
            "scripts/bench_plan",
            "scripts/check_cost",
            "scripts/count_step",
            "scripts/cover_precision",
            "scripts/demo_seeds",
            "scripts/evaluation",
            "scripts/evaluation_passes",
            "scripts/fused_layers",
            "scripts/generation",
            "scripts/hidden_layers",
            "scripts/host_cost",
            "scripts/launch_each",
            "scripts/patched_trainers",
            "scripts/proven",
            "scripts/robust_step",
            "scripts/streamed_step",
            "scripts/wide_demo",
            "test_regression",
        }
        expected = expected & found | {"kunbr_fast/benchmarks/reference_procedure.py"}
    assert found == expected


def test_hugging_face_kernels_is_not_shadowed(installed, tmp_path):
    """Not elsewhere, and not in the checkout, where `python -c` finds kernels/ before site-packages."""
    site_packages, checkout = installed
    theirs = site_packages / "kernels"
    theirs.mkdir()
    try:
        (theirs / "__init__.py").write_text("from kernels.layer import whose\n")
        (theirs / "layer.py").write_text("whose = 'Hugging Face'\n")
        code = "from kernels import whose; import kernels.layer; print([whose, kernels.layer.whose])"
        for cwd in (tmp_path, checkout):
            assert imported(installed, code, cwd=cwd) == "['Hugging Face', 'Hugging Face']"
    finally:
        shutil.rmtree(theirs)


def test_editable_installation_runs_the_checkout(installed, tmp_path):
    _, checkout = installed
    place = Path(imported(installed, "import kunbr_fast.kernels as k; print(k.__file__)", cwd=tmp_path))
    assert place.is_relative_to(checkout) == (checkout.parent.name.startswith("editable"))


def test_kernels_in_the_checkout(installed):
    """Python started there takes kunbr_fast/ from there, also after a plain installation, or without any."""
    _, checkout = installed
    code = "import kunbr_fast.kernels as k; print(k.__file__, k.__name__, *k.__path__)"
    expected = f"{checkout / 'kernels' / '__init__.py'} kunbr_fast.kernels {checkout / 'kernels'}"
    assert imported(installed, code, cwd=checkout) == expected
    assert python(code, "-S", cwd=checkout) == expected


def test_metadata(installed):
    (found,) = (d for d in metadata.distributions(path=[str(installed[0])]) if d.name == "kunbr-fast")
    assert found.version == __version__
    assert {e.name: e.value for e in found.entry_points} == {"kunbr-fast": "kunbr_fast.cli.entry:main"}
    assert found.read_text("top_level.txt").split() == ["kunbr_fast"]


@pytest.mark.parametrize("python_version", ["3.10", "3.11", "3.13"])
def test_constraints_meet_the_requirements(installed, python_version):
    """Each requirement has one pin on each Python, and the pin is allowed."""
    (found,) = (d for d in metadata.distributions(path=[str(installed[0])]) if d.name == "kunbr-fast")
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    environment = {"python_version": python_version, "sys_platform": "linux"}
    pins = [pin for pin in pins if pin.marker is None or pin.marker.evaluate(environment)]
    for text in found.requires:
        requirement = Requirement(text)
        versions = [pin for pin in pins if pin.name.lower() == requirement.name.lower()]
        if requirement.name == "matplotlib" and python_version == "3.10":
            assert versions == []  # a plotting library: whatever is there
            continue
        assert len(versions) == 1, (text, versions)
        (exactly,) = versions[0].specifier
        assert exactly.operator == "==" and requirement.specifier.contains(exactly.version), (text, versions)


def test_triton_interpreter_works_with_this_numpy(tmp_path):
    """Triton 3.6.0 with numpy 2.4 fails on a loop with a run-time bound; what is pinned must not, and Triton 3.6.0 does
    not once it is repaired."""
    pytest.importorskip("triton")
    (tmp_path / "kernel.py").write_text(
        textwrap.dedent(
            """
            import torch, triton, triton.language as tl, triton_interpreter

            triton_interpreter.repair()  # does nothing to a Triton that needs none

            @triton.jit
            def kernel(x, first, out, rows, BLOCK: tl.constexpr):
                columns = tl.arange(0, BLOCK)
                total = tl.zeros((BLOCK,), tl.float32)
                for row in range(tl.load(first), rows):
                    total += tl.load(x + row * BLOCK + columns)
                tl.store(out + columns, total)

            x, out = torch.arange(40.0).reshape(5, 8), torch.full((8,), float("nan"))
            kernel[(1,)](x, torch.tensor([2]), out, 5, BLOCK=8)
            assert torch.equal(out, x[2:].sum(0)), out
            """
        )
    )
    python("import kernel", cwd=tmp_path, TRITON_INTERPRET="1", PYTHONPATH=str(ROOT / "tests"))


def test_hydra_finds_our_configs_once_installed(installed, tmp_path):
    code = """
    import pathlib, kunbr_fast.integrations.open_unlearning_configs as configs
    print(*sorted(path.relative_to(configs.__path__[0]) for path in pathlib.Path(configs.__path__[0]).rglob("*.yaml")))
    """
    assert imported(installed, code, cwd=tmp_path) == "trainer/KUnBR.yaml"
