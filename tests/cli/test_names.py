"""Names of models, files, folds and settings on a terminal and in a picture: they show, and do nothing."""

import json
import logging
import shutil
import unicodedata

import pytest
import tiny_text
from helpers import rarely

from kunbr_fast.benchmarks import report as bench_report
from kunbr_fast.benchmarks.rows import COLUMNS
from kunbr_fast.cli import command as cli
from kunbr_fast.cli.terminal import PlainLines, say, show
from kunbr_fast.evaluation import figures
from kunbr_fast.evaluation.plots import plot_relearning
from kunbr_fast.evaluation.report import table
from kunbr_fast.evaluation.rtt import RTTResult

NAMES = [
    "m$x^{2$", "$", "$$", r"\$a$", "_hidden", "\x1b[2J\x1b[31mred", "two\nlines", "tab\tand\rreturn", "\u202egnp.exe",
    "bell\x07\x00", "\x9b31m", "n" * 5000, "名前", "a_b^c{d}\\frac", "%s {} {0}", "\ud800", "\u2028line",
]  # fmt: skip
ON_DISK = "m$x\x1b[2J\nred\u202e$y_"  # of a folder or file
RTT = RTTResult([{"fold": f, "lr": 1e-3, "epoch": e, "plain": 0.5, "calibrated": None} for f in "ab" for e in (0, 1)])


def harmless(text):
    """Whether a terminal shows all of it, in lines that we ended."""
    return all(c == "\n" or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Zl", "Zp") for c in text)


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name)[:20])
def test_a_line_is_a_line(name, capsys):
    say(f"writing to {name}")
    show(f"report.json is in {name}")
    record = logging.LogRecord("x", logging.WARNING, "", 0, "%s keeps its own", (name,), None)
    printed = capsys.readouterr()
    for text in (printed.out, printed.err, PlainLines("%(message)s").format(record)):
        assert harmless(text) and "\n" not in text.rstrip("\n") and len(text) < 4100
    rows = table([{"method": name, "forget": 0.5}, {"method": "KUnBR", "forget": 0.25}]).splitlines()
    assert len(rows) == 4 and len({len(row) for row in rows}) == 1 and harmless("".join(rows)) and len(rows[0]) < 200


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name)[:20])
def test_a_name_in_a_picture(name, tmp_path, monkeypatch):
    drawn = []
    save = figures.save
    monkeypatch.setattr(figures, "save", lambda figure, path: (drawn.append(figure), save(figure, path)))
    assert figures.drawn(tmp_path / "r.png", lambda: plot_relearning({name: RTT, "other": RTT}, tmp_path / "r.png"))
    assert (tmp_path / "r.png").read_bytes()[:4] == b"\x89PNG"
    from matplotlib.text import Text

    texts = [text.get_text() for text in drawn[0].findobj(Text) if "50 % →" in text.get_text()]
    assert len(texts) == 2 and all(harmless(text) and len(text) < 120 for text in texts)  # each method has its line
    for text in drawn[0].findobj(Text):
        assert not text.get_text() or not text._preprocess_math(text.get_text())[1]


DRAWN = [name for name in NAMES if "\x00" not in name and "\ud800" not in name]


@pytest.mark.parametrize("name", rarely(DRAWN, DRAWN[::3]))
def test_a_name_in_the_charts_of_bench(name, tmp_path):
    """A CSV of any origin: `bench --report FILE.csv`."""
    rows = []
    for column in ("suite", "model", "case", "variant", "note"):
        for ours, ms in ((1, 1.0), (0, 2.0)):
            row = dict.fromkeys(COLUMNS) | {
                "suite": "norms", "model": "Llama", "case": f"T {64 * (1 + ours)}", "tokens": 64, "dtype": "float32",
                "variant": "triton" if ours else "eager", "ours": ours, "baseline": 0, "ms": ms, "p20_ms": ms,
                "p80_ms": ms, "peak_mib": 1.0, "gflop": 1.0, "mib": 1.0, "copy_gbs": 10.0, "matmul_tflops": 1.0,
            }  # fmt: skip
            rows.append(row | {column: f"{name} {row[column]}"})
    files = bench_report.write_report(rows, tmp_path)
    assert any(path.suffix == ".html" for path in files)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A workspace whose model and files have such a name."""
    root = tiny_text.workspace(tmp_path_factory.mktemp("names"))
    shutil.move(root / "model", root / ON_DISK)
    for file in ("f0", "f1", "r"):
        shutil.move(root / f"{file}.jsonl", root / f"{file}{ON_DISK}.jsonl")
    return root


def command(root, name, *words):
    f0, f1, r = (str(root / f"{file}{ON_DISK}.jsonl") for file in ("f0", "f1", "r"))
    data = {"density": ["--forget", f0, "--num-blocks", "3", "--top-k", "1"], "rtt": ["--forget", f0, f1],
            "unlearn": ["--forget", f0, f1, "--retain", r, "--num-blocks", "3", "--top-k", "1", "--warmup-epochs", "0",
                        "--block-epochs", "1"]}  # fmt: skip
    attack = [] if name == "density" else ["--rtt-lrs", "1e-3", "--rtt-epochs", "1"]
    return [name, "--model", str(root / ON_DISK), *data[name], *attack, *words]


def test_a_run_with_progress_bars(root, tmp_path, capsys):
    out = tmp_path / f"out{ON_DISK}"
    assert cli.main(command(root, "unlearn", "--out", str(out))) == 0
    assert (out / "relearning.png").is_file() and (out / "density.png").is_file()
    assert cli.main(command(root, "rtt", "--plot", str(tmp_path / "r.png"), "--out", str(tmp_path / "r.json"))) == 0
    assert (tmp_path / "r.png").is_file()
    printed = capsys.readouterr()
    for text in (printed.out, printed.err):
        assert "[2J" in text and "\x1b[2J" not in text and "\u202e" not in text and "\nred" not in text
    bad = root / f"bad{ON_DISK}.jsonl"
    bad.write_text('{"text": 3}\n')
    for words in (["--config", str(bad)], ["--forget-questions", str(bad), str(root / ON_DISK)], ["--target", ON_DISK]):
        assert cli.main(command(root, "unlearn", "--out", str(tmp_path / "other"), *words)) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and harmless(error)


@pytest.fixture
def no_picture(monkeypatch, caplog):
    """matplotlib fails, as late as it can."""

    def fail(*_, **__):
        raise RuntimeError("no picture\ntoday\x1b[2J")

    monkeypatch.setattr(figures, "save", fail)
    return caplog


def test_a_picture_that_fails_costs_no_result(root, tmp_path, capsys, no_picture):
    density, attack = tmp_path / "d.json", tmp_path / "r.json"
    more = ["--plot", str(tmp_path / "p.png"), "--json", "--quiet"]
    assert cli.main(command(root, "density", "--out", str(density), *more)) == 1
    assert json.loads(capsys.readouterr().out)["per_layer"] == json.loads(density.read_text())["per_layer"]
    assert cli.main(command(root, "rtt", "--out", str(attack), *more)) == 1
    assert json.loads(capsys.readouterr().out)["curves"] == json.loads(attack.read_text())["curves"]
    out = tmp_path / "out"
    assert cli.main(command(root, "unlearn", "--out", str(out), "--quiet")) == 0
    assert (out / "report.json").is_file() and (out / "model.safetensors").is_file()
    said = [record.getMessage() for record in no_picture.records if "could not be drawn" in record.getMessage()]
    assert len(said) == 4 and all("no picture" in text and harmless(text) and "\n" not in text for text in said)
