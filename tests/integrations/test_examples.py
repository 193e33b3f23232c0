"""Examples of TRL, PEFT and Lightning run, train the same weights, and cost less than what they stand in for.
What any example imports from the package is there."""

import ast
import importlib
import re
import subprocess
import sys

import pytest

from kunbr_fast.checkout import ROOT

LINE = re.compile(
    r"^(.+): MFLOP of a step: .* ratio ([\d.]+) to the model and ([\d.]+) to the block; weights apart (\S+)$",
    re.MULTILINE,
)
CASES = {
    "trl_sft": ("trl", ["SFTTrainer", "SFTTrainer with LoRA"]),
    "trl_dpo": ("trl", ["DPOTrainer", "DPOTrainer, precomputed", "DPOTrainer with LoRA"]),
    "lightning_module": ("lightning", ["Lightning, kf.patched", "Lightning, kf.reinserted"]),
}


def test_what_examples_import_is_there():
    """Without running them: most need minutes, or packages that CI lacks."""
    imports = [
        (path.name, node.module, alias.name)
        for path in (ROOT / "examples").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module.startswith("kunbr_fast")
        for alias in node.names
    ]
    assert len(imports) > 10
    assert not [found for found in imports if not hasattr(importlib.import_module(found[1]), found[2])]


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_example(name):
    package, expected = CASES[name]
    for needed in (package, "peft", "datasets"):
        pytest.importorskip(needed, reason="CI installs no .[examples]")
    done = subprocess.run([sys.executable, ROOT / "examples" / f"{name}.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = {case: [float(x) for x in numbers] for case, *numbers in LINE.findall(done.stdout)}
    assert list(found) == expected
    for case, (model, block, apart) in found.items():
        assert model < 0.75 and apart < 1e-3, case
        # plain autograd ends at the block, but where checkpointing has the embeddings' output require grad
        assert block == 1.0 if case == "Lightning, kf.patched" else block < 0.9, case
