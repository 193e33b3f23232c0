"""All that is read, damaged and hostile: one line that names the file, in little time and memory; or it is taken, and
what is then done with it works."""

import json
import os

import fuzz
import pytest
import yaml
from helpers import python

from kunbr_fast.benchmarks import compare, report
from kunbr_fast.benchmarks.rows import COLUMNS, read_rows, write_rows
from kunbr_fast.cli import rtt
from kunbr_fast.data import load_records, question_prompt
from kunbr_fast.density.measure import Density
from kunbr_fast.density.select import select_blocks
from kunbr_fast.evaluation.rtt import Fold, RTTConfig, RTTResult, finished_attacks
from kunbr_fast.files import checksums, merge
from kunbr_fast.files.merge_folder import PARTIAL, MergeFolder
from kunbr_fast.files.shown import plain
from kunbr_fast.kernels import verdicts
from kunbr_fast.run.config import KUnBRConfig
from kunbr_fast.run.state import RunState

RECORDS = [
    {"question": "q?", "choices": ["a", 2, 3.5], "answer": 0, "split": "kept"},
    {"text": "a line é", "_more": {"input_ids": [1, 2]}},
    {"prompt": "p", "completion": "c", "alternate": "d"},
    {"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": "x"}], "_where": 3},
]
SETTINGS = KUnBRConfig(objective="npo", objective_options={"beta": 0.2}, seed=3, cache_bytes="8GiB").to_dict()
DENSITY = {
    "per_layer": [0.5, 1.5, 0.25],
    "per_module": {"model.layers.0.mlp.up_proj.weight": 0.5, "b": None},
    "num_weights": [64, 64, 64],
    "num_samples": 7,
    "modules": "mlp",
    "statistic": "grad_l1",
    "reduction": "sample",
    "sample_fraction": None,
    "standard_error": [0.1, 0.1, 0.2],
    "alignment": None,
}
ATTACK = RTTConfig(lrs=(1e-3,), epochs=1)
FOLDS = [Fold("a", [{}], [{}]), Fold("b", [{}], [{}])]
BELONGS = {"epochs": 1, "run": "abc"}
CURVES = {
    "belongs_to": BELONGS,
    "curves": [
        {"fold": fold, "lr": 1e-3, "epoch": epoch, "plain": 0.25, "calibrated": 0.5}
        for fold in ("a", "b")
        for epoch in (0, 1)
    ],
}
JOB = {"mode": "negate", "inputs": [{"directory": str(i), "files": [["m.safetensors", 8, 1, "00"]]} for i in range(2)]}
COUNTS = {"entries": 4, "agreed_share": 0.5, "changed_share": 1.0, "task_vector_norms": [2.0], "merged_norm": 1.0}
MERGE = {"job": JOB, "files": {"m.safetensors": {"sha256": "00", "tensors": {"w": COUNTS}}}}
ROW = dict.fromkeys(COLUMNS) | {
    "suite": "norms", "model": "m", "case": "8 x 8", "tokens": 8, "dtype": "float32", "variant": "ours", "ours": 1,
    "ms": 1.5, "p20_ms": 1.0, "p80_ms": 2.0, "rounds": 7, "speedup": 2.0, "gflop": 0.5, "note": "",
}  # fmt: skip
ROWS = [ROW, ROW | {"variant": "eager", "ours": 0, "ms": 3.0}, ROW | {"case": "9 x 9", "ms": None, "note": "not run"}]
LOSSES = {"forget_loss": 1.5, "retain_loss": None}
STATE = {
    "format": 2, "identity": "run", "config": KUnBRConfig().to_dict(), "progress": {}, "kept": {},
    "stages": {
        "begin": {"unlearned_given": False},
        "density": {"density": DENSITY, "seconds": 1.5},
        "selection": {"blocks": [[0, 2]]},
        "blocks.0.0-2": {"epochs": [LOSSES], "file": "blocks.0.0-2.safetensors", "sha256": ""},
        "rtt.a.0.001": {"rows": CURVES["curves"][:2], "seconds": 1.0},
        "rtt.b.0.001": {"rows": CURVES["curves"][2:], "seconds": 1.0},
    },
}  # fmt: skip
VERDICT = verdicts.Verdict(
    verdicts.Target("lion", "triton", "bf16", "all"), None, 0.1, 0.2, (verdicts.Timing(10, "eager", 2, 1),), {"g": "x"}
)


def read_records(path):
    for record in load_records(path):
        assert "question" not in record or question_prompt(record)


def read_density(path):
    found = Density.load(path)
    if found.per_layer.sum() > 0 and found.statistic == "grad_l1":
        select_blocks(found, 1, 1, 0)


def read_curves(path):
    rows = rtt._finished_attacks(path, BELONGS, FOLDS, ATTACK)
    if len(rows) == 4:
        RTTResult(rows).to_dict()


def read_partial(path):
    merge._summary(merge.MergeSettings("negate"), [path, path], MergeFolder(path.parent, JOB, True).done)


def read_bench(path):
    rows = read_rows(path)
    report.table(rows)
    compare.compare(ROWS, rows)


def read_verdicts(path):
    for verdict in verdicts.read(path):
        assert f"{verdict}" and verdict.speed(5, "eager") is not None or not verdict.times


def read_state(path):
    state = RunState(path.parent, "run", KUnBRConfig(), resume=True)
    results = state.results()
    if (found := state.result("density")) is not None:
        Density.from_dict(found["density"], f"{path}: density")
    rows = [row for name in results if name.group == "rtt" for row in results[name]["rows"]]
    finished_attacks(rows, FOLDS, ATTACK, f"{path}: ")


def json_lines(records):
    return b"\n".join(map(fuzz.as_json, records))


def sealed(body):
    return fuzz.as_json({"format": 1, "checksum": verdicts._checksum(body), "verdicts": body})


def with_checksum(state):
    """As `write_sealed` does, of what it would not write too."""
    text = json.dumps(state, indent=2).removesuffix("\n}")
    return f'{text},\n  "sha256": "{checksums._digest(text)}"\n}}\n'.encode()


def as_yaml(settings):
    return yaml.safe_dump(settings, allow_unicode=True).encode("utf-8", "surrogatepass")


KINDS = {  # file name: how it is read, a good value, how that is written
    "records.jsonl": (read_records, RECORDS, json_lines),
    "run.yaml": (KUnBRConfig.load, SETTINGS, as_yaml),
    "density.json": (read_density, DENSITY, fuzz.as_json),
    "rtt.json": (read_curves, CURVES, with_checksum),
    "merge.partial.json": (read_partial, MERGE, fuzz.as_json),
    "state.json": (read_state, STATE, with_checksum),
    "rows.json": (read_bench, ROWS, fuzz.as_json),
    "verdicts.json": (read_verdicts, [VERDICT.as_json()], sealed),
}
SILENT = ("verdicts.json",)  # proven again, with a warning: a cache is not worth an error


def tried(path, read):
    """Whether it was taken. Messages about a merge or a run may name its folder."""
    name = str(path.parent if path.name in (PARTIAL, "state.json") else path)
    try:
        read(path)
    except ValueError as error:
        assert path.name not in SILENT
        fuzz.one_line(error, name)
        return False
    return True


@pytest.mark.parametrize("name", KINDS)
def test_fuzz(tmp_path, name):
    read, value, written = KINDS[name]
    path = tmp_path / name
    path.write_bytes(written(value))
    read(path)
    texts = [*fuzz.mutated(path.read_bytes(), 1, 400)]
    for changed in fuzz.replaced(value, 2, 400):
        try:
            texts.append(written(changed))
        except (TypeError, ValueError):  # no lines, or nothing that YAML writes
            texts.append(fuzz.as_json(changed))
    taken = 0
    for text in texts:
        path.write_bytes(text)
        taken += tried(path, read)
    assert 0 < taken < len(texts) or name in SILENT


@pytest.mark.parametrize("name", KINDS)
def test_hostile(tmp_path, name):
    path = tmp_path / name
    for text in (fuzz.HOSTILE_YAML if name.endswith("yaml") else fuzz.HOSTILE_JSON).values():
        path.write_bytes(text)
        empty = name.endswith("yaml") and not text.strip()
        assert not tried(path, KINDS[name][0]) or empty or name in SILENT


@pytest.mark.parametrize("name", KINDS)
def test_what_is_no_file(tmp_path, name):
    """A pipe would be waited for."""
    path = tmp_path / name
    for make in (os.mkfifo, os.mkdir, lambda p: os.symlink(p, p)):
        make(path)
        assert not tried(path, KINDS[name][0]) or name in SILENT
        path.rmdir() if path.is_dir() else path.unlink()


def test_rows_in_csv(tmp_path):
    write_rows(tmp_path / "rows.csv", tmp_path / "rows.json", ROWS)
    path = tmp_path / "rows.csv"
    data = path.read_bytes()
    for text in fuzz.mutated(data, 3, 400):
        path.write_bytes(text)
        tried(path, read_bench)


def test_what_a_terminal_would_obey_is_escaped(tmp_path):
    write_rows(tmp_path / "rows.csv", tmp_path / "rows.json", [ROW | {"variant": "a\x1b]0;x\x07b\u202e"}])
    found = read_rows(tmp_path / "rows.csv")[0]["variant"]
    assert found == r"a\x1b]0;x\x07b\u202e"


def test_records_are_told_from_samples(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_bytes(json_lines(RECORDS))
    from kunbr_fast.data import is_record

    records = load_records(path)
    assert all(map(is_record, records)) and [r["_where"].rpartition(":")[2] for r in records] == list("1234")
    assert not is_record({"input_ids": [1], "labels": [1]}) and not is_record({"original": {}, "alternate": {}})


WORST = {
    "records.jsonl": {
        "60 MB": lambda: b'{"text": "' + b"a" * 60_000_000 + b'"}',
        "keys": lambda: b'{"text": "x", ' + b", ".join(b'"%d": 1' % i for i in range(900_000)) + b"}",
        "brackets in text": lambda: b'{"text": "' + b"[" * 15_000_000 + b'"}',
        "deep": lambda: b'{"text": ' + b"[" * 10**6,
    },
    "run.yaml": {
        "aliases": lambda: fuzz.BOMB.encode(),
        "as a setting": lambda: fuzz.BOMB.encode() + b"warmup_lr: *i\n",
        "deep": lambda: b"seed: " + b"[" * 60_000,
        "a long key": lambda: b"s" * 60_000 + b": 1",
        "a long value": lambda: b"target: " + b"s" * 60_000,
    },
    "density.json": {
        "wide": lambda: fuzz.as_json(DENSITY | {"per_module": [0] * 5_000_000}),
        "one of many": lambda: fuzz.as_json(DENSITY | {"per_module": {str(i): 0 for i in range(10**6)} | {"x": ""}}),
        "digits": lambda: fuzz.as_json(DENSITY).replace(b"7", b"7" * 10**5),
    },
}


WORST_CODE = """
import pathlib, resource, sys, test_reading
own = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (own + 2**30,) * 2)
for path in map(pathlib.Path, sys.argv[1:]):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_utime
    try:
        test_reading.KINDS[path.name][0](path)
        said = "taken"
    except ValueError as error:
        said = str(error)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_utime - before, said)
"""


@pytest.mark.slow
def test_time_and_memory(tmp_path):
    """At most 2 s of the processor (4 here, where other tests run beside it), and 1 GiB beside what torch takes."""
    paths = []
    for name, texts in WORST.items():
        for what, data in texts.items():
            (tmp_path / what).mkdir(exist_ok=True)
            paths.append(tmp_path / what / name)
            paths[-1].write_bytes(data())
    done = python("-c", WORST_CODE, *paths)
    assert done.returncode == 0, done.stderr[-500:]
    lines = done.stdout.splitlines()
    assert len(lines) == len(paths)
    for path, line in zip(paths, lines):
        seconds, _, said = line.partition(" ")
        assert float(seconds) < 4 and len(said) < 400 + len(str(path)), (path, line[:500])


def test_a_message_shows_no_more_than_a_line(tmp_path):
    """Of any value in any place."""
    path = tmp_path / "\x1b[31mrecords.jsonl"
    for value in fuzz.VALUES:
        path.write_bytes(json.dumps({"question": value, "choices": value, "answer": value, "text": value}).encode())
        with pytest.raises(ValueError) as error:
            load_records(path)
        fuzz.one_line(error.value, plain(path))
