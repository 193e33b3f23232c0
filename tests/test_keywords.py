"""Keywords that are a dataclass' fields: shown in signatures, refused and missed as Python's own."""

import dataclasses
import inspect

import pytest

import kunbr_fast as kf
from kunbr_fast.keywords import named_by, taken


@dataclasses.dataclass(frozen=True)
class Kind:
    mode: str
    size: int = 3
    names: list = dataclasses.field(default_factory=list)


def test_a_signature_shows_the_fields():
    @named_by(Kind)
    def function(x, size=4, **keywords):
        return taken(Kind, keywords, "function")

    assert str(inspect.signature(function)) == "(x, size=4, *, mode: 'str', names: 'list' = [])".replace("'", "")
    assert function(1, mode="a") == Kind("a")


@pytest.mark.parametrize(
    "given, message",
    [
        ({"mode": "a", "sise": 1}, r"function\(\) got an unexpected keyword argument 'sise': did you mean 'size'\?"),
        ({"size": 1}, r"function\(\) missing 1 required keyword-only argument: 'mode'"),
    ],
)
def test_wrong_keywords(given, message):
    with pytest.raises(TypeError, match=message):
        taken(Kind, given, "function")


@pytest.mark.parametrize(
    "function, names",
    [
        ("unlearn", {"tokenizer", "output_dir", "resume", "folds"}),
        ("reinserted", {"lr", "objective", "cuda_graphs"}),
        ("knowledge_density", {"batch_tokens", "impl"}),
        ("attribute", {"mu", "impl"}),
        ("merge_models", {"mode", "alpha"}),
        ("KUnBRConfig", {"block_lr", "top_k"}),
    ],
)
def test_the_front_doors_show_theirs(function, names):
    parameters = inspect.signature(getattr(kf, function)).parameters
    assert names <= parameters.keys()
    assert not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
