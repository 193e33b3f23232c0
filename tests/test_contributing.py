"""What CONTRIBUTING.md shows, applied to a copy of the tree, works."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
KEPT = ("benchmarks", "csrc", "docs", "kernels", "kunbr_fast", "tests", "README.md", "CONTRIBUTING.md", "CHANGELOG.md",
        "CITATION.cff", "constraints.txt", "pyproject.toml", ".pre-commit-config.yaml")  # fmt: skip


def edited(text, diff):
    """`text` with one block of a diff applied: its old lines must be there exactly once."""
    lines = diff.rstrip("\n").splitlines()
    old = "\n".join(line[1:] for line in lines if not line.startswith("+")) + "\n"
    new = "\n".join(line[1:] for line in lines if not line.startswith("-")) + "\n"
    assert text.count(old) == 1, f"{text.count(old)} times in the file:\n{old}"
    return text.replace(old, new)


def changes():
    """{path: its text after all blocks} of what CONTRIBUTING.md shows."""
    found = {}
    for language, block in re.findall(r"^```(diff|python|cpp)\n(.*?)^```$", TEXT, re.M | re.S):
        first, _, rest = block.partition("\n")
        mark, path = first.split(" ", 1)
        if language == "diff":
            assert mark == "---"
            found[path] = edited(found.get(path) or (ROOT / path).read_text(), rest)
        else:
            assert not (ROOT / path).exists()
            found[path] = rest
    return found


def test_what_is_shown_fits_the_tree():
    found = changes()
    assert {path.split("/")[0] for path in found} == {"csrc", "docs", "kernels", "kunbr_fast", "tests"}


@pytest.mark.slow
def test_what_is_shown_works(tmp_path):
    for name in KEPT:
        if (ROOT / name).is_dir():  # a library that was built before has no relu2
            shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(ROOT / name, tmp_path / name)
    for path, text in changes().items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)

    def run(*words):
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        environment.pop("TRITON_INTERPRET", None)  # the ahead-of-time check compiles; conftest sets it for the tests
        done = subprocess.run([sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    code = (
        "from kunbr_fast.kernels import aot\n"
        "import kunbr_fast.kernels.relu2.cuda\n"
        "aot.MODULES = ('relu2',)\n"
        "print(*(aot.compile_call(*job).problem for job in aot.jobs((80, 90, 100))))"
    )
    assert set(run("-c", code).split()) == {"None"}
    for words in re.findall(r"`pytest ([^`]+)`", TEXT):
        paths, _, chosen = words.partition(" -k ")
        select = ["-k", chosen.strip('"')] if chosen else []
        out = run("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not slow", *paths.split(), *select)
        assert " passed" in out
    found = run("-m", "kunbr_fast", "doctor")
    assert "relu2" in found
    for tool in ("check", "format --check"):
        paths = ["kernels/relu2", "tests/kernels/test_relu2.py"]
        ruff = shutil.which("ruff", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        if ruff:
            done = subprocess.run([ruff, *tool.split(), *paths], cwd=tmp_path, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout
