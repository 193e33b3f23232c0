"""What is imported when: counted in modules, of a fresh process."""

import ast
import dataclasses
import importlib
import pickle
from pathlib import Path

import pytest
import torch
from helpers import python

import kunbr_fast as kf
from kunbr_fast.cli.arguments import THEME, THEMES
from kunbr_fast.cli.command import COMMANDS, parser

HEAVY = {"torch", "transformers", "numpy", "matplotlib", "safetensors", "triton", "yaml"}
COMMAND = "import sys; from kunbr_fast.cli.command import main\ntry:\n    main({})\nexcept SystemExit:\n    pass"


def loaded(code: str) -> set[str]:
    """The modules that a fresh interpreter holds after `code`."""
    code += "\nimport sys\nprint('\\nMODULES', *sys.modules)"
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("MODULES")[2].split())


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["doctor", "--help"]], ids=" ".join)
def test_help_loads_no_command_and_no_torch(arguments):
    found = loaded(COMMAND.format(arguments))
    assert not found & HEAVY
    commands = {f"kunbr_fast.cli.{name}" for name in COMMANDS} - {f"kunbr_fast.cli.{arguments[0]}"}
    assert not found & commands


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch is asked about the devices")
def test_doctor_loads_no_torch_where_there_is_no_device():
    assert not loaded(COMMAND.format(["doctor"])) & HEAVY


def test_the_package_is_free_until_it_is_used():
    assert not loaded("import kunbr_fast") & HEAVY
    every = "; ".join(f"kf.{name}" for name in kf.__all__)
    assert "transformers" not in loaded(f"import kunbr_fast as kf; {every}")


@pytest.mark.parametrize("name", kf.__all__)
def test_public_names(name):
    assert name in dir(kf)
    value = getattr(kf, name)
    if name != "__version__":
        assert value is getattr(importlib.import_module(value.__module__), name)
        assert pickle.loads(pickle.dumps(value)) is value


def test_an_unknown_name():
    with pytest.raises(AttributeError, match="module 'kunbr_fast' has no attribute 'unlern'"):
        _ = kf.unlern
    with pytest.raises(ImportError, match="cannot import name 'unlern'"):
        from kunbr_fast import unlern  # noqa: F401


def test_editors_know_the_public_names():
    """The imports under TYPE_CHECKING are those of HOMES."""
    tree = ast.parse(Path(kf.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    told = {node.module.partition(".")[2]: " ".join(alias.name for alias in node.names) for node in block.body}
    assert told == kf.HOMES
    assert sorted(kf.__all__) == sorted(["__version__", *(n for names in kf.HOMES.values() for n in names.split())])


def test_every_setting_has_a_theme():
    assert [field.name for field in dataclasses.fields(kf.KUnBRConfig) if field.name not in THEME] == []
    assert sorted(THEME) == sorted(field.name for field in dataclasses.fields(kf.KUnBRConfig))


@pytest.mark.parametrize("command", ["unlearn", "density", "rtt", "plan"])
def test_help_has_a_group_for_each_theme(command, capsys):
    with pytest.raises(SystemExit):
        parser([command]).parse_args([command, "--help"])
    text = capsys.readouterr().out
    themes = {theme for theme in THEMES if f"\n{theme}:\n" in text}
    expected = {"density": {"data", "selection", "execution"}, "rtt": {"data", "attack", "execution"}}
    assert themes == expected.get(command, set(THEMES))
