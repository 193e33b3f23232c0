"""Every option of every command gets every kind of bad value: one line that names it, at once, and no work begun."""

import argparse
import importlib
import re
import time

import pytest
import tiny_text

from kunbr_fast.cli import arguments as shared
from kunbr_fast.cli import command as cli
from kunbr_fast.run.config import KUnBRConfig
from kunbr_fast.run.setting import NUMBERS, RATES
from kunbr_fast.values import FLOAT32, SEED, Bytes, Real, Whole, check, parse_bytes

WORK = {  # what begins in each command once its arguments are read
    "unlearn": ("open_model", "reader", "read_folds"), "density": ("open_model", "reader"),
    "rtt": ("open_model", "read_folds"), "plan": ("plan",), "merge": ("merge_models",), "bench": ("_measure",),
    "demo": ("demo",), "prove": ("_prove",),
}  # fmt: skip
# No number, whatever its limits.
WORDS = [
    "", " ", "x", "1_000", " 1", "1 ", "０", "１２", "²", "0x10", "1e", "nan", "NaN", "inf", "Infinity", "true",
    "True", "None", "null", "1,5", "1;2", "1\n", "\x1b[31m1", "\u202e1", "1" * 400, "1" * 5000, "1e400", "1e999999",
    "1e9999999",
]  # fmt: skip
# Too large or too small for some kinds.
BEYOND = [
    "-1", "-0.5", "0", "1e39", "1e300", "1e-46", "1e-400", "0." + "0" * 400 + "1", "2147483648", "4294967296", "1" * 20,
    "9223372036854775808", "18446744073709551616", "1000000000", "1.5", "1e9", "9" * 25 + ".5", "-1e-5", "-inf",
]  # fmt: skip
SIZES = ["-1GiB", "1e400GiB", "NaNGiB", "infGiB", "GiB", "1 parsec", "9" * 400 + "GiB", "1_0GiB", "１GiB", "8388608TiB"]
WITH = {
    **{
        (command, "--rtt-lora-rank"): ["--rtt-attacks", "lora"] for command in ("unlearn", "rtt", "plan")
    },  # what an option goes with
    ("unlearn", "--mask-ratio"): ["--mask", "wagle"],
    ("plan", "--mask-ratio"): ["--mask", "wagle"],
    ("unlearn", "--retain-layers"): ["--retain-loss", "hidden_layers"],
    ("plan", "--retain-layers"): ["--retain-loss", "hidden_layers"],
    **{
        (command, option): ["--adversary-every", "3"]
        for command in ("unlearn", "plan")
        for option in ("--adversary-steps", "--adversary-lrs")
    },
    **{(command, "--block-hidden-coeff"): ["--retain-loss", "hidden_layers"] for command in ("unlearn", "plan")},
    **{(command, "--threshold"): ["--rule", "threshold"] for command in ("unlearn", "density", "plan")},
    ("unlearn", "--stream-cache"): ["--stream", "--unlearned", "."],
    ("density", "--stream-cache"): ["--stream"],
}


def options():
    """(command, option, kind) of all that is a number."""
    for command in WORK:
        parser = argparse.ArgumentParser()
        importlib.import_module(f"kunbr_fast.cli.{command}").add_arguments(parser)
        for action in parser._actions:
            kind = getattr(action.type, "kind", None)
            if action.option_strings and kind is not None:
                yield command, action.option_strings[0], kind


def required(command, root):
    """The words that a command cannot go without."""
    model, data = str(root / "model"), [str(root / "f0.jsonl"), str(root / "f1.jsonl")]
    return [command] + {
        "unlearn": ["--model", model, "--forget", *data, "--retain", str(root / "r.jsonl"), "--out", str(root / "o")],
        "density": ["--model", model, "--forget", *data],
        "rtt": ["--model", model, "--forget", *data],
        "plan": ["--model", model, "--gpu-memory", "24GiB"],
        "merge": ["--base", model, "--models", str(root / "other"), "--mode", "add", "--out", str(root / "o")],
    }.get(command, [])


class Begun(BaseException):
    """Work has begun."""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny_text.workspace(tmp_path_factory.mktemp("numbers"))


@pytest.fixture
def run(monkeypatch, capsys, root):
    """(status, standard error) of a command line; status "begun" where the command would do its work."""

    def begin(*_, **__):
        raise Begun

    import torch

    for command, names in WORK.items():
        module = importlib.import_module(f"kunbr_fast.cli.{command}")
        for name in names:
            monkeypatch.setattr(module, name, begin)
    monkeypatch.setattr(importlib.import_module("kunbr_fast.cli.inputs"), "load_model", begin)

    def run(command, *words):
        if command == "prove":
            monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        begin_at = time.process_time()
        try:
            status = cli.main([*required(command, root), *words])
        except SystemExit as exit:
            status = exit.code
        except Begun:
            status = "begun"
        finally:
            monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert time.process_time() - begin_at < 2
        return status, capsys.readouterr().err

    return run


def allowed(kind, text):
    """Whether a word is one of this kind, by a second way of saying it."""
    if isinstance(kind, Bytes):
        return (
            text == "0" or text == "1000000000" or text in ("2147483648", "4294967296")
            if not kind.unit_needed
            else False
        )
    if not re.fullmatch(r"-?[0-9]+(\.[0-9]+)?(e-?[0-9]+)?", text):
        return False
    if isinstance(kind, Whole):
        return re.fullmatch("-?[0-9]+", text) is not None and kind.least <= int(text) <= kind.most
    value = float(text)
    inside = value > kind.least if kind.above else value >= kind.least
    exact = value != 0 or not re.search("[1-9]", text.partition("e")[0])
    return inside and value <= kind.most and exact and (value == 0 or FLOAT32[1] <= abs(value) <= FLOAT32[0])


ALL = list(options())


def test_there_is_a_kind_for_each_number():
    """No option reads numbers in a way of its own."""
    found = {(command, option) for command, option, _ in ALL}
    assert len(found) > 40 and {("plan", "--gpus"), ("bench", "--seconds"), ("merge", "--alpha")} <= found
    for command in WORK:
        parser = argparse.ArgumentParser()
        importlib.import_module(f"kunbr_fast.cli.{command}").add_arguments(parser)
        for action in parser._actions:
            assert action.type not in (int, float), (command, action.option_strings)
    hints = {field.name: str(field.type) for field in KUnBRConfig.__dataclass_fields__.values()}
    numbers = {name for name, hint in hints.items() if ("int" in hint or "float" in hint) and name != "cache_bytes"}
    assert numbers == set(NUMBERS)


@pytest.mark.parametrize("command, option, kind", ALL, ids=lambda value: value if isinstance(value, str) else "")
def test_bad_numbers(command, option, kind, run):
    bad = WORDS + [text for text in BEYOND if not allowed(kind, text)] + (SIZES if isinstance(kind, Bytes) else [])
    for text in bad:
        words = [f"{option}={text}"] if text.startswith("-") else [option, text]
        status, error = run(command, *words)
        line = error.splitlines()[-1]
        assert status == 2 and option in line and len(line) < 400, (text, error)
        assert "expected" in line and line.isprintable(), (text, line)
    good = {Whole: "1", Bytes: "8GiB", Real: "1"}[type(kind)]
    assert run(command, option, good, *WITH.get((command, option), []))[0] == "begun"


def test_numbers_of_the_config_file(run, tmp_path):
    """The same limits for what run.yaml says."""
    values = [
        ".nan", ".inf", "-1", "-1.5", "1e39", "1e300", "1.0e+300", "1e-400", "true", "'1_000'", "' 1'", "'０'", "[1]",
        "{a: 1}", "1" * 400, "'" + "1" * 400 + "'",
    ]  # fmt: skip
    for name in NUMBERS:
        for text in values:
            (tmp_path / "run.yaml").write_text(f"{name}: {text}\n")
            status, error = run("unlearn", "--config", str(tmp_path / "run.yaml"))
            if name == "adversary_lrs" and text == "[1]":
                assert status == 2 and "there is no adversary" in error
                continue
            if name in RATES and text == "[1]":
                assert status == "begun"
                continue
            assert status == 2 and error.count("\n") == 1 and "run.yaml" in error, (name, text, error)


def test_sizes_of_the_cache(run):
    """A setting that is a number of bytes or text."""
    for text in [*SIZES, "x", "-1", "1e9", "0x10", "1" * 400]:
        status, error = run("unlearn", f"--cache-bytes={text}")
        assert status == 2 and error.count("\n") == 1 and "cache_bytes" in error and "expected bytes" in error, error
    assert run("unlearn", "--cache-bytes", "8 GiB")[0] == "begun"


def test_too_much_to_be_run(run):
    for words in (["--rounds", "999", "--top-k", "2"], ["--rounds", "1000"], ["--block-epochs", "1000001"]):
        status, error = run("unlearn", *words)
        assert status == 2 and "expected" in error, error


@pytest.mark.parametrize("text", [
    "banana", "mps", "meta", "cpu:0", "CUDA", "cuda:", "cuda:-1", "cuda:1x", "cuda:０", "", " cpu", "xpu:0", "cpu\n",
    "cuda:99999999999999999999", "cuda", "cuda:0", "cuda:7",
])  # fmt: skip
def test_devices(text, run):
    for command in ("unlearn", "density", "rtt", "bench"):
        status, error = run(command, "--device", text)
        if command in ("unlearn", "density", "rtt") and re.fullmatch("cuda(:[0-9])?", text):
            assert status == "begun"  # what is there is looked at with the model
            continue
        assert status == 2 and "--device" in error.splitlines()[-1], error


@pytest.mark.parametrize("count, text, right", [
    (0, "cuda", False), (1, "cuda:0", True), (1, "cuda:1", False), (2, "cuda:1", True), (2, "cuda:2", False),
    (0, "cpu", True),
])  # fmt: skip
def test_devices_that_are_there(count, text, right, monkeypatch):
    import torch

    from kunbr_fast.cli.inputs import choose_device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    if right:
        assert choose_device(argparse.Namespace(device=text)) == text
    else:
        with pytest.raises(ValueError, match=f"--device {text}: "):
            choose_device(argparse.Namespace(device=text))


def test_paths(run, root):
    """Each option that names a file or folder."""
    count = 0
    for command in WORK:
        parser = argparse.ArgumentParser()
        importlib.import_module(f"kunbr_fast.cli.{command}").add_arguments(parser)
        for action in parser._actions:
            if not action.option_strings or action.type is not shared.path_name:
                continue
            count += 1
            for text in ("", "  ", "a\0b", "n" * 300, "d/" * 3000):
                words = [text] * (action.nargs if isinstance(action.nargs, int) else 1)
                status, error = run(command, action.option_strings[0], *words)
                line = error.splitlines()[-1]
                assert status == 2 and action.option_strings[0] in line and line.isprintable(), (action, text, error)
                assert "given twice" not in line or action.required
    assert count > 20


@pytest.mark.parametrize("words", [
    ["rtt", "--rtt-lrs", "1e-5", "0.00001"], ["bench", "--tokens", "64", "64"], ["bench", "--tokens", "064", "64"],
    ["bench", "norms", "norms"], ["bench", "--models", "Llama-3-8B", "Llama-3-8B"], ["bench", "--variants", "a", "a"],
    ["prove", "--dtype", "bf16", "bf16"], ["prove", "--impl", "triton", "triton"], ["prove", "norms", "norms"],
    ["unlearn", "--objective-option", "beta=1", "--objective-option", "beta=2"],
    ["unlearn", "--rtt-lrs", "1", "--rtt-lrs", "2"],
])  # fmt: skip
def test_what_is_given_twice(words, run):
    status, error = run(*words)
    assert status == 2 and "given twice" in error.splitlines()[-1], error


def test_values():
    """What the Python API says, and by which name."""
    for value in (True, None, "1", 1.0, 2**70, -1, 10**5000, float("nan"), [1], {"a": 1}):
        with pytest.raises(ValueError, match=r"^x=.{1,80}: expected a whole number from 0 to 4294967295$"):
            check("x", value, SEED)
    for value in (True, None, "x", "1_0", 1e39, -1e39, 10**400, float("inf"), "1e-400", 1e-46, b"1", [1.0]):
        with pytest.raises(ValueError, match=r"^x=.{1,80}: expected a finite number"):
            check("x", value, Real())
    assert check("x", "1e-5", Real()) == 1e-5 and check("x", 3, Real()) == 3.0 and check("x", "0.0", Real()) == 0
    assert check("x", None, SEED, null=True) is None and check("x", 2**32 - 1, SEED) == 2**32 - 1
    for value in (True, -1, 2**63, 1.5, "-1", "8 TiBB", "8388608TiB", "1" * 400):
        with pytest.raises(ValueError, match=r"^x=.{1,80}: expected bytes, such as 8GiB"):
            parse_bytes(value, "x")
