"""Where each package lives, and the CUDA library. All else (name, dependencies, entry point) is in pyproject.toml.

The top-level directory kernels/ installs as `kunbr_fast.kernels` (Hugging Face publishes a package called `kernels`,
which ours must not shadow), benchmarks/ as `kunbr_fast.benchmarks`. Because of that mapping an editable installation
gets an import finder that knows `kunbr_fast` and these two. Without it, or with `editable_mode=compat`, the repository
root would be on sys.path, and `kernels` with it.

Python that is started in the checkout finds kunbr_fast/ there, not the installed one: kunbr_fast/checkout.py.

The reference procedure is written once, in tests/, as the truth for the fast path. `kunbr-fast bench` measures against
it, so a wheel has it too.

nvcc, where there is one, builds csrc/ into kernels/libkunbr_cuda.so: in the wheel, or in the checkout for an editable
installation. Without nvcc, or if it fails, the installation goes on and says that `impl="cuda"` is missing. The library
needs neither torch nor Python, so one wheel a platform serves all of their versions; without the library the wheel is
for every platform. Nothing is downloaded. csrc/build.py names the environment variables.
"""

import importlib.util
import sys
from pathlib import Path

from setuptools import Command, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
BESIDE = {"kunbr_fast.kernels": "kernels", "kunbr_fast.benchmarks": "benchmarks"}  # package: its folder

# their own packages, but for scripts, which need a checkout
INSIDE = [f"{name}.{part}" for name, folder in BESIDE.items() for part in find_packages(ROOT / folder, ["scripts"])]


def build_module():
    """csrc/build.py; not imported by name: `build` is also a package that people have installed."""
    spec = importlib.util.spec_from_file_location("kunbr_csrc_build", ROOT / "csrc" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class build_cuda(Command):
    """A step of `build`, as setuptools' SubCommand protocol has it."""

    description = "build csrc/ with nvcc, where there is one"
    user_options = []

    def initialize_options(self):
        self.build_lib = None
        self.editable_mode = False

    def finalize_options(self):
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    def run(self):
        how = build_module()
        output = how.DEFAULT if self.editable_mode else Path(self.build_lib) / "kunbr_fast" / "kernels" / how.LIBRARY
        try:
            if output != how.DEFAULT and how.is_current(how.DEFAULT):  # built in the checkout before
                self.copy_file(str(how.DEFAULT), str(output))
            else:
                how.build(output)
        except (how.Skipped, OSError) as reason:  # a disk that is full, a folder that is read-only
            # what an earlier version left behind is not this version's
            output.unlink(missing_ok=True)
            print(f'kunbr-fast: WARNING: installed without impl="cuda" (csrc/ is not built): {reason}', file=sys.stderr)
        else:
            print(f"kunbr-fast: csrc/ is in {output}", file=sys.stderr)

    def get_source_files(self):
        return [str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").rglob("*")) if path.suffix in SOURCES]

    def get_outputs(self):
        library = Path(self.build_lib) / "kunbr_fast" / "kernels" / build_module().LIBRARY
        return [str(library)] if library.is_file() else []

    def get_output_mapping(self):
        return {}


SOURCES = (".cu", ".cuh", ".cpp", ".h", ".py")
build.sub_commands.append(("build_cuda", None))


class build_modules(build_py):
    """With tests/reference_procedure.py in kunbr_fast.benchmarks, and without what needs a checkout."""

    def find_package_modules(self, package, package_dir):
        found = super().find_package_modules(package, package_dir)
        if package == "kunbr_fast.benchmarks":
            found = [module for module in found if module[1] != "test_regression"]
            found.append((package, "reference_procedure", str(Path("tests") / "reference_procedure.py")))
        return found


class wheel(bdist_wheel):
    """For this platform where the library is in it; for any Python, as nothing here is compiled against Python."""

    def get_tag(self):
        has_library = any(Path(self.bdist_dir).rglob("libkunbr_cuda.so"))
        platform = super().get_tag()[2]
        if has_library and platform == "any":
            platform = (self.plat_name or "linux_x86_64").replace("-", "_").replace(".", "_")
        return "py3", "none", platform


setup(
    packages=[*find_packages(include=["kunbr_fast", "kunbr_fast.*"]), *BESIDE, *INSIDE],
    package_dir=BESIDE,
    cmdclass={"build_cuda": build_cuda, "build_py": build_modules, "bdist_wheel": wheel},
)
