"""What ranks send each other: tensors and JSON, never pickles. Two gloo processes on a CPU."""

import ast
import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import environment

ROOT = Path(__file__).resolve().parent.parent.parent
PICKLING = ("_object", "_object_list", "pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal")

PEER = """
import json, sys
import torch
import kunbr_fast.parallel.group as group_module
from kunbr_fast.parallel.group import joined

def told(call):
    try:
        return call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"

with joined() as group:
    first = {"none": None, "real": 0.1 + 0.2, "big": 2**62, "text": "\\u00fc\\n", "list": [1, [2]]}
    mine = [first, "x" * 70000][group.rank]
    found = {"values": group.gather(mine), "empty": group.gather(None), "apart": group.gather([[], {}][group.rank])}
    found["unequal"] = told(lambda: group.check_same({"a": (1, 2), "b": group.rank}))
    group.check_same({"a": (1, 2), "none": None, "real": 1e-300})
    found["bits"] = told(lambda: group.check_same_bits("w", {"w": torch.full((3,), 1.0 + group.rank)}))
    group_module.LONGEST = 1000
    found["long"] = told(lambda: group.gather("x" * 2000 * group.rank))
    dumps, json.dumps = json.dumps, lambda value, **how: value  # a rank of another version, say
    found["no JSON"] = told(lambda: group.gather(["[1]", "[1, NaN]"][group.rank]))
    json.dumps = dumps
    found["after"] = group.gather(group.rank)  # nobody is out of step
print(json.dumps(found))
"""


def test_two_ranks_gather_json():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    started = [
        subprocess.Popen(
            [sys.executable, "-c", PEER], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=environment(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=port
            ),
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=120) for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], [error[-2000:] for _, error in said]
    both = [json.loads(out) for out, _ in said]
    assert both[0] == both[1]
    found = both[0]
    first = {"none": None, "real": 0.1 + 0.2, "big": 2**62, "text": "\u00fc\n", "list": [1, [2]]}
    assert found["values"] == [first, "x" * 70000]
    assert found["empty"] == [None, None] and found["apart"] == [[], {}] and found["after"] == [0, 1]
    assert found["unequal"].startswith("ValueError: b: rank 1 has 1, rank 0 0: start all processes")
    assert found["bits"].startswith("RuntimeError: w: w differs between rank 0 and rank 1")
    assert found["long"].startswith("ValueError: a rank sends 2002 bytes, expected at most 1000")
    assert found["no JSON"].startswith("ValueError: what rank 1 has sent") and "\n" not in found["no JSON"]


@pytest.mark.parametrize("top", ["kernels", "kunbr_fast", "benchmarks"])
def test_nothing_of_ours_pickles(top):
    """No object collective, no torch.save or torch.load, no pickle: what another sends or left is data alone."""
    for file in sorted((ROOT / top).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            where = f"{file}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Attribute):
                assert not node.attr.endswith(PICKLING[:2]), where
                # training_args.bin, as Trainer itself writes it beside a saved model; nothing here reads it
                if file.name == "hf_trainer.py" and ast.unparse(node) == "torch.save":
                    continue
                ours = isinstance(node.value, ast.Name) and node.value.id == "torch" and node.attr in ("save", "load")
                assert not ours, where
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            module = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.partition(".")[0] for name in (*names, *module)} & set(PICKLING[2:]), where
