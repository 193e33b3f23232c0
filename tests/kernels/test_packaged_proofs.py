"""The verdicts that the package brings: of GPUs that its developers had, for the kernels as they are now."""

import json

import pytest
from cuda_build import build_module

from kunbr_fast.kernels import verdicts

FILES = sorted(verdicts.PACKAGED.glob("*.json"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_they_are_of_these_kernels(path):
    """Where this fails a kernel was changed, and its verdicts count for nothing. Prove it again, or remove them."""
    found = verdicts.read(path)
    assert len(found) == len(json.loads(path.read_text())["verdicts"]) > 0
    for verdict in found:
        operation, impl = verdict.target.operation, verdict.target.impl
        assert verdict.right and verdict.times, verdict.target
        assert verdict.key["sources"] == verdicts.sources(verdicts.FOLDERS.get(operation, operation)), verdict.target
        assert impl != "cuda" or verdict.key["compiler"] == build_module().source_hash(), verdict.target


def test_no_other_file_is_packaged():
    assert {path.name for path in verdicts.PACKAGED.iterdir()} == {"README.md", *(path.name for path in FILES)}
