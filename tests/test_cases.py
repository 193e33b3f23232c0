"""The cases in shared/cases: small inputs that once went wrong, each with a program that exits 0 when they do not.

They are run from copies, in which names are put right that have moved since they were written.
"""

import contextlib
import importlib
import io
import runpy
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CASES = next((f for f in (ROOT.parent / "shared/cases", ROOT / "shared/cases") if f.is_dir()), None)
MOVED = {
    'import_module("kunbr_fast.unlearn")': 'import_module("kunbr_fast.run.stages")',
    'sys.modules["kunbr_fast.unlearn"]': 'sys.modules["kunbr_fast.run.stages"]',
    "out/work": "out/kunbr-checkpoints",
}
NEEDED = {"02": "peft", "01": "peft", "17": "accelerate"}  # packages that users need not have
OTHER_PROCESSES = ("23",)


def cases() -> list:
    if CASES is None:
        return [pytest.param("", marks=pytest.mark.skip(reason=f"no cases: {ROOT.parent}/shared/cases is not there"))]
    names = sorted(path.name for path in CASES.iterdir() if (path / "run.py").is_file())
    return [pytest.param(n, marks=[pytest.mark.slow] if n[:2] in OTHER_PROCESSES else []) for n in names]


@pytest.fixture
def copied(tmp_path, monkeypatch) -> Path:
    """The cases' folder, copied; what a case changes in this process is put back."""
    clock = importlib.import_module("transformers.utils.chat_template_utils")
    monkeypatch.setattr(clock, "datetime", clock.datetime)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    shutil.copytree(CASES, tmp_path / "cases")
    yield tmp_path / "cases"
    sys.modules.pop("common", None)


@pytest.mark.parametrize("name", cases())
def test_case(name, copied, monkeypatch):
    if needed := NEEDED.get(name[:2]):
        pytest.importorskip(needed)
    program = copied / name / "run.py"
    program.parent.chmod(0o755)
    text = program.read_text()
    for old, new in MOVED.items():
        text = text.replace(old, new)
    program.chmod(0o644)
    program.write_text(text)
    monkeypatch.setattr(sys, "argv", [str(program)])
    said = io.StringIO()
    with pytest.raises(SystemExit) as ended, contextlib.redirect_stdout(said):
        runpy.run_path(str(program), run_name="__main__")
    assert ended.value.code == 0, said.getvalue()
