"""Every Python that pyproject.toml names: the sources compile there, and all that they take of its library is there."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
CHECK = """
import ast, importlib, pathlib, sys

def there(module, name):
    if hasattr(importlib.import_module(module), name):
        return True
    try:
        return importlib.import_module(f"{module}.{name}") is not None
    except ImportError:
        return False

files = [path for top in sys.argv[2:] for path in pathlib.Path(sys.argv[1], top).rglob("*.py")]
assert len(files) > 100, len(files)
for path in files:
    tree = ast.parse(path.read_bytes(), str(path))
    compile(tree, str(path), "exec")
    modules = {}  # what `import` gave: name -> module of the library
    wanted = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] in sys.stdlib_module_names:
                    importlib.import_module(alias.name)
                    modules[alias.asname or alias.name] = alias.name
        elif isinstance(node, ast.ImportFrom) and not node.level:
            if node.module.partition(".")[0] in sys.stdlib_module_names:
                wanted |= {(node.module, alias.name) for alias in node.names}
    for node in ast.walk(tree):  # annotations are texts: nothing looks them up
        if isinstance(node, (ast.arg, ast.AnnAssign)):
            node.annotation = None
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            wanted.add((modules[node.value.id], node.attr))
    for module, name in sorted(wanted):
        if not there(module, name):
            print(f"{path.relative_to(sys.argv[1])}: {module} has no {name}")
import kunbr_fast, kunbr_fast.kernels.dispatch, kunbr_fast.kernels.verdicts, kunbr_fast.cli.entry
"""


def interpreter(version):
    """The path of a Python of that version, None where there is none."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for path in (shutil.which(f"python{version}"), *sorted(pyenv.glob(f"{version}.*/bin/python"))):
        if path and not subprocess.run([path, "-c", ""], capture_output=True).returncode:  # a shim may not run
            return path
    return None


@pytest.mark.parametrize("version", [PYTHONS[0], *(pytest.param(v, marks=pytest.mark.slow) for v in PYTHONS[1:])])
def test_sources_need_no_newer_python(version):
    path = interpreter(version)
    if path is None:
        pytest.skip(f"no Python {version} on this machine")
    command = [path, "-S", "-c", CHECK, str(ROOT), "kunbr_fast", "kernels", "benchmarks", "csrc", "examples"]
    done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0 and done.stdout == "", done.stdout + done.stderr


def test_those_that_are_named():
    """pyproject.toml names what was seen, from the oldest that it allows on."""
    text = (ROOT / "pyproject.toml").read_text()
    assert tuple(re.findall(r'"Programming Language :: Python :: (3\.\d+)"', text)) == PYTHONS
    assert f'requires-python = ">={PYTHONS[0]}"' in text


def test_the_oldest_versions_are_those_that_are_allowed():
    """Of what constraints-oldest.txt installs, all that has a minimum in pyproject.toml is at it."""
    required = (ROOT / "pyproject.toml").read_text().partition("dependencies = [")[2].partition("\n]")[0]
    minima = dict(re.findall(r'"(\w+)>=([\d.]+)', required))
    pins = dict(re.findall(r"^(\w+)==([\d.]+)", (ROOT / "constraints-oldest.txt").read_text(), re.M))
    assert minima.keys() == {"torch", "triton", "transformers"}
    assert all(Version(pins[name]) == Version(minimum) for name, minimum in minima.items())
