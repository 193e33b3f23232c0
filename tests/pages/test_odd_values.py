"""Reports whose values are of other types than those that are written: a page, or one line that names the file."""

import copy
import json
import random

import folders
import pytest

from kunbr_fast.files.checksums import write_sealed
from kunbr_fast.pages.page import page_of
from kunbr_fast.pages.sources import read
from kunbr_fast.run.identity import report_digest

ODD = [None, "x", -1, 0, 2.5, 1e300, True, [], {}, ["x"], {"x": 1}, [[1, 2]], "9" * 400]


def places(value, path=()):
    """Paths to all values; of a list's entries the first and the last."""
    yield path
    if isinstance(value, dict):
        for key, each in value.items():
            yield from places(each, (*path, key))
    elif isinstance(value, list) and value:
        for number in {0, len(value) - 1}:
            yield from places(value[number], (*path, number))


def replaced(value, path, new):
    value = copy.deepcopy(value)
    here = value
    for key in path[:-1]:
        here = here[key]
    here[path[-1]] = new
    return value


def write(folder, name, value):
    if name == "report.json":
        if isinstance(value.get("result"), dict) and "report" in value["result"]:
            value["result"]["report"] = report_digest(value)
        (folder / name).write_text(json.dumps(value))
    else:
        value.pop("sha256", None)
        write_sealed(folder / name, value)


def tried(folder, name, every):
    """The places in a file at which an odd value is neither shown nor refused in one line."""
    original = json.loads((folder / name).read_text())
    cases = [(path, odd) for path in places(original) if path and path != ("sha256",) for odd in ODD]
    wrong = []
    for path, odd in cases if every else random.Random(0).sample(cases, 60):
        write(folder, name, replaced(original, path, odd))
        try:
            page_of([read(folder)])
        except ValueError as error:
            if name not in str(error) or "\n" in str(error):
                wrong.append((path, odd, error))
        except Exception as error:
            wrong.append((path, odd, repr(error)))
    return wrong


@pytest.fixture
def folder(tmp_path):
    return folders.whole(tmp_path / "OUT")


@pytest.mark.parametrize("name", ["report.json", "evaluation.json", "unlearning.json"])
def test_some(name, folder):
    assert tried(folder, name, every=name == "unlearning.json") == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["report.json", "evaluation.json"])
def test_every_one(name, folder):
    assert tried(folder, name, every=True) == []


def test_models_in_memory_have_no_path_and_no_fingerprint(folder):
    """As `Evaluation.write` has them, where `evaluate` was not given the folder."""
    value = json.loads((folder / "evaluation.json").read_text())
    value["models"] = {name: {"path": None, "fingerprint": None} for name in value["models"]}
    write(folder, "evaluation.json", value)
    assert "None" not in page_of([read(folder)])
