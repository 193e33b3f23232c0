"""The harness of `kunbr-fast bench`: the gate, what a row says, what a run keeps, and the command."""

import csv
import dataclasses
import functools
import json
import re
import statistics
from types import SimpleNamespace

import pytest
import torch

from kunbr_fast.benchmarks import bench, gate, harness, measure, rows
from kunbr_fast.benchmarks.rows import Measured, is_wrong
from kunbr_fast.benchmarks.suites import SUITES, density, norms
from kunbr_fast.cli import command as cli
from kunbr_fast.kernels import dispatch
from kunbr_fast.kernels.grad_density import kinds
from kunbr_fast.kernels.proof import gate as proof
from kunbr_fast.kernels.proof.cases import Target, named


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Doubling(harness.Case):
    """y = 2 x, with variants that are right, a little off, wrong, missing, or broken."""

    ours: dict
    rivals: dict

    flops = 10**9
    nbytes = 2**20

    def draw(self):
        return torch.arange(1.0, 9.0, dtype=self.dtype)

    def small(self):
        return self

    def truth(self, data):
        return {"y": 2 * data.double()}

    def variants(self, data):
        def make(factor):
            if isinstance(factor, Exception):
                raise factor
            return lambda: {"y": data * factor}

        found = [harness.Variant("eager", lambda: make(2.0))]
        for variants, ours in ((self.ours, True), (self.rivals, False)):
            found += [harness.Variant(n, lambda f=f: make(f), ours=ours) for n, f in variants.items()]
        return found


def case(ours=None, rivals=None, baseline="eager", **options):
    options = harness.Options(**{"quick": True, **options})
    return Doubling(
        suite="test", model="none", label="doubling", tokens=8, options=options, baseline=baseline, ours=ours or {},
        rivals=rivals or {},
    )  # fmt: skip


def test_ours_beyond_its_limit_gives_no_numbers():
    with pytest.raises(harness.Wrong, match=r"mine is 1\.0e-05 from fp64 \(limit .*\): no numbers"):
        case(ours={"mine": 2.00002}).rows()
    ((_, rows, why),) = harness.run([case(ours={"mine": 2.00002})])
    assert isinstance(why, harness.Wrong)
    assert [(row["variant"], row["ours"], row["ms"]) for row in rows] == [("eager", 0, ""), ("mine", 1, "")]
    assert all(row["note"] == f"not run: {why}" for row in rows)


def test_the_limit_of_ours_is_twice_the_error_of_plain_torch_and_a_few_roundings():
    eps = torch.finfo(torch.float32).eps
    errors, _ = case(ours={"mine": 2 * (1 + 3 * eps)}).gate()
    assert errors["eager"] == 0 and 0 < errors["mine"] <= 4 * eps
    with pytest.raises(harness.Wrong):
        case(ours={"mine": 2 * (1 + 6 * eps)}).gate()


@pytest.mark.slow
def test_one_of_ours_that_is_wrong_costs_itself_alone():
    rows = {row["variant"]: row for row in case(ours={"mine": 2.0, "other": 2.00002}).rows()}
    assert rows["mine"]["ms"] and rows["eager"]["ms"] and rows["other"]["ms"] == ""
    assert re.fullmatch(r"not run: wrong: 1\.0e-05 from fp64 \(limit .*\)", rows["other"]["note"])
    assert [name for name, row in rows.items() if is_wrong(row)] == ["other"]


@pytest.mark.slow
def test_a_wrong_baseline_costs_itself_alone():
    rows = {row["variant"]: row for row in case({"mine": 2.0}, {"theirs": 2.0, "plain": 3.0}, baseline="plain").rows()}
    assert rows["plain"]["note"] == "not run: wrong: 5.0e-01 from fp64" and not is_wrong(rows["plain"])
    assert rows["mine"]["ms"] and rows["theirs"]["ms"] and rows["mine"]["baseline"] == rows["mine"]["speedup"] == ""
    with pytest.raises(harness.Wrong):  # with no baseline ours may have a few roundings, no more
        case({"mine": 2.00002}, {"plain": 3.0}, baseline="plain").gate()


@pytest.mark.parametrize("result", [float("nan"), float("inf")])
def test_a_result_that_is_not_finite_is_wrong(result):
    with pytest.raises(harness.Wrong):
        case(ours={"mine": result}).gate()


def test_a_bug_in_ours_is_a_wrong_result_and_the_next_case_still_runs(caplog):
    broken = case(ours={"mine": RuntimeError("a bug")})
    with pytest.raises(RuntimeError, match="a bug"):
        broken.gate()
    (_, _, why), (_, rows, none) = harness.run([broken, case(ours={"mine": 2.0})])
    assert isinstance(why, harness.Wrong) and str(why) == "RuntimeError: a bug" and "Traceback" in caplog.text
    assert none is None and all(row["ms"] for row in rows)


@pytest.fixture
def table(monkeypatch):
    """The proof's table, in which density's "long" and Lion are wrong; yields what was judged, in order."""
    judged = []

    def targets(device, dtypes, operations, impls):
        names = ("short", "long", "any") if operations == ["grad_density"] else ("all",)
        return [Target(operations[0], impls[0], dtype, name) for dtype in dtypes if dtype for name in names]

    def judge(target, dtype, device):
        judged.append(target)
        return proof.Found("wrong values: y is off" if target.kind == "long" or target.operation == "lion" else None)

    monkeypatch.setattr(gate, "cases", SimpleNamespace(targets=targets, kind_of=lambda target: target, named=named))
    monkeypatch.setattr(proof, "judge", judge)
    gate.why_wrong.cache_clear()
    yield judged
    gate.why_wrong.cache_clear()


def test_the_table_judges_a_kernel_once_a_process_and_the_kinds_that_count(table):
    gpu = torch.device("cuda", 0)
    why = [gate.why_wrong("lion", "triton", torch.float32, gpu) for _ in range(2)]
    assert why == ["lion triton fp32: wrong values: y is off"] * 2 and len(table) == 1
    assert gate.why_wrong("lion", "triton", torch.bfloat16, gpu) is not None and len(table) == 2
    assert gate.why_wrong("rms_norm", "triton", torch.bfloat16, gpu, ("short", "portable")) is None and len(table) == 3
    table.clear()
    density = functools.partial(gate.why_wrong, "grad_density", "triton", torch.bfloat16, gpu)
    assert density(("short", "hopper")) is None and [target.kind for target in table] == ["short"]
    assert density() == "grad_density triton bf16 long: wrong values: y is off"
    assert [target.kind for target in table] == ["short", "short", "long"]
    assert gate.why_wrong("lion", "triton", torch.float64, gpu) is None  # not in the table
    assert gate.why_wrong("lion", "triton", torch.float32, torch.device("cpu")) is None  # where it takes minutes
    assert len(table) == 3


def test_the_proof_s_own_table_is_asked_as_it_wants_to_be(monkeypatch):
    judged = []
    monkeypatch.setattr(dispatch, "why_not", lambda *_: None)  # as if there were a GPU
    monkeypatch.setattr(proof, "judge", lambda kind, dtype, device: judged.append((kind, dtype)) or proof.Found(None))
    gate.why_wrong.cache_clear()
    for operation, impl in (("rms_norm", "triton"), ("lion", "cuda"), ("grad_density", "triton")):
        assert gate.why_wrong(operation, impl, torch.bfloat16, torch.device("cuda", 0)) is None
    gate.why_wrong.cache_clear()
    asked = [(kind.operation, kind.impl) for kind, _ in judged]
    assert asked[:2] == [("rms_norm", "triton"), ("lion", "cuda")] and len(asked) > 4  # density has several kinds
    assert set(asked[2:]) == {("grad_density", "triton")} and {dtype for _, dtype in judged} == {torch.bfloat16}


@pytest.mark.slow
def test_a_kernel_that_the_table_finds_wrong_is_left_out(monkeypatch):
    asked, device = [], torch.device("cpu")

    def why_wrong(operation, impl, dtype, device, kinds):
        asked.append((operation, impl, dtype, device, kinds))
        return "lion triton fp32: wrong values: y is off" if operation == "lion" and impl == "triton" else None

    monkeypatch.setattr(harness, "why_wrong", why_wrong)  # triton runs here: in the interpreter

    class Implemented(Doubling):
        def variants(self, data):
            mine = self.implemented(
                lambda impl: lambda: {"y": 2 * data}, *self.ours["operations"], kinds=lambda: ("short",)
            )
            return [harness.Variant("eager", lambda: lambda: {"y": 2 * data}), *mine]

    def rows_of(*operations):
        parts = {field.name: getattr(case(), field.name) for field in dataclasses.fields(Doubling)}
        return {row["variant"]: row for row in Implemented(**{**parts, "ours": {"operations": operations}}).rows()}

    found = rows_of("rms_norm", "lion")
    assert found["triton"]["note"] == "not run: wrong: lion triton fp32: wrong values: y is off"
    assert is_wrong(found["triton"]) and not found["triton"]["ms"] and found["torch"]["ms"] and found["eager"]["ms"]
    assert ("rms_norm", "triton", torch.float32, device, ("short",)) in asked
    assert rows_of("rms_norm")["triton"]["ms"]


def test_density_names_the_kind_that_it_launches(monkeypatch):
    """Of a kernel of csrc/ by its name; of ours by its inputs, which only a GPU is asked about."""
    asked = []
    monkeypatch.setattr(harness, "why_wrong", lambda *arguments: asked.append(arguments) or "off")
    monkeypatch.setattr(dispatch, "_registry", dict(dispatch._registry))
    dispatch.register("grad_density", "cuda", lambda device: None)
    monkeypatch.setattr(harness.Options, "gpu", True)
    monkeypatch.setattr(kinds, "_is_hopper", lambda device: True)
    options = harness.Options(dtype=torch.bfloat16)
    weight = density.Weight(suite="density", model="none", label="weight", tokens=32, options=options, N=64, K=32,
                            lengths=(32, 32))  # fmt: skip
    variants = {variant.name: variant for variant in weight.variants(weight.draw())}
    for name, expected in (("tile csrc hopper", {"hopper"}), ("tile csrc portable", {"portable"}),
                           ("cuda", {"short", "hopper"}), ("triton", {"short", "hopper"})):  # fmt: skip
        with pytest.raises(harness.Skip, match="^wrong: off$"):
            variants[name].make()
        assert asked[-1][0] == "grad_density" and asked[-1][2] == torch.bfloat16 and set(asked[-1][4]) == expected


class Later(Doubling):
    """What is given as `ours` and `rivals` shows at the timed shape; the small one is all right."""

    def small(self):
        return case(ours=dict.fromkeys(self.ours, 2.0), rivals=dict.fromkeys(self.rivals, 2.0))


def later(ours=None, rivals=None):
    parts = {field.name: getattr(case(), field.name) for field in dataclasses.fields(Doubling)}
    return Later(**{**parts, "ours": ours or {}, "rivals": rivals or {}})


@pytest.mark.slow
def test_a_rival_that_breaks_at_the_timed_shape_is_left_out():
    rows = {row["variant"]: row for row in later({"mine": 2.0}, {"theirs": RuntimeError("too large")}).rows()}
    assert rows["theirs"]["note"] == "not run: too large" and rows["mine"]["ms"] and rows["eager"]["ms"]
    with pytest.raises(RuntimeError, match="mine too"):
        later({"mine": RuntimeError("mine too")}).rows()


def test_what_does_not_fit_beside_the_others_is_left_out_largest_first(monkeypatch):
    rounds = harness.measure_rounds

    def too_many(running, options):
        if len(running) > 2:
            raise torch.OutOfMemoryError("no room")
        return rounds(running, options)

    sizes = iter([10, 30, 20])
    monkeypatch.setattr(measure, "peak_memory", lambda run, device: next(sizes))
    monkeypatch.setattr(harness, "measure_rounds", too_many)
    rows = {row["variant"]: row for row in case({"mine": 2.0}, {"theirs": 2.0}).rows()}
    assert rows["mine"]["note"] == "not run: out of memory beside the others" and rows["mine"]["ms"] == ""
    assert rows["eager"]["ms"] and rows["theirs"]["ms"]


def test_rivals_that_are_wrong_or_missing_are_rows_that_say_why():
    rivals = {"off": 2.2, "broken": RuntimeError("no such GPU\nmore"), "missing": harness.Skip("not installed")}
    rows = {row["variant"]: row for row in case(ours={"mine": 2.0}, rivals=rivals).rows()}
    assert list(rows) == ["eager", "mine", "off", "broken", "missing"]
    notes = {name: row["note"] for name, row in rows.items()}
    assert notes["off"] == "not run: wrong: 1.0e-01 from fp64"
    assert notes["broken"] == "not run: no such GPU" and notes["missing"] == "not run: not installed"
    assert notes["eager"] == notes["mine"] == ""
    assert rows["mine"]["ours"] == 1 and rows["eager"]["ours"] == 0
    for name, row in rows.items():
        assert list(row) == list(harness.COLUMNS)
        assert (row["ms"] == "") == (name not in ("eager", "mine"))


@pytest.mark.slow
def test_two_of_ours_that_differ_at_the_timed_shape_give_no_numbers():
    with pytest.raises(harness.Wrong, match="two and those before it are .* apart"):
        later({"one": 2.0, "two": 2.001}).rows()


def test_what_was_measured_once_has_no_band():
    row = case().row("mine", True, Measured([2.0], [4.0]))
    assert row["ms"] == 2.0 and row["p20_ms"] == row["p80_ms"] == "" and row["rounds"] == 1 and row["speedup"] == 2.0


def test_disturbed_blocks_of_rounds_are_left_out(monkeypatch):
    """On a CPU: those in which others used more cores than are to spare, unless there are no others."""
    shares = iter([0.0, 9.0, 0.0, 0.05])

    def block(variants):
        share = next(shares)
        return [{"a": share}] * 2, share

    monkeypatch.setattr(measure, "_block", block)
    times, others = measure.interleaved({"a": None}, "cpu", repeats=5, seconds=60)
    assert times == {"a": [0.0, 0.0, 0.0, 0.0, 0.05, 0.05]} and others == pytest.approx(0.05 / 3)
    shares = iter([9.0, 8.0, 9.0, 9.0])
    times, others = measure.interleaved({"a": None}, "cpu", repeats=5, seconds=0)
    assert times == {"a": [8.0, 8.0, 9.0, 9.0]} and others == 8.5


def test_what_a_row_is_computed_from(monkeypatch):
    times = {"eager": [4.0, 8.0, 6.0], "mine": [2.0, 2.0, 4.0]}
    monkeypatch.setattr(harness, "measure_rounds", lambda running, options: (times, (1e12, 1e9), 0.25))
    eager, mine = case(ours={"mine": 2.0}).rows()
    assert mine["ms"] == 2.0 and mine["p20_ms"] == 2.0 and mine["p80_ms"] == 4.0 and mine["rounds"] == 3
    assert mine["baseline"] == "eager" and mine["speedup"] == statistics.median([2, 4, 1.5]) and eager["speedup"] == 1
    assert mine["gflop"] == 1 and mine["mib"] == 1
    assert mine["tflop_per_s"] == pytest.approx(1e9 / 2e-3 / 1e12)
    assert mine["gb_per_s"] == pytest.approx(2**20 / 2e-3 / 1e9, rel=1e-3)
    # 1 GFLOP at 1 TFLOP/s take 1 ms, 1 MiB at 1 GB/s 1.05 ms: memory is the roof
    assert mine["roofline_percent"] == pytest.approx(100 * 2**20 / 1e9 * 1e3 / 2.0, abs=0.1)
    assert mine["matmul_tflop_per_s"] == 1 and mine["copy_gb_per_s"] == 1 and mine["others_cores"] == 0.25


def test_a_case_that_no_time_is_left_for_is_named():
    ((_, (row,), why),) = harness.run([case()], budget=-1.0)
    assert isinstance(why, harness.Skip) and "are over" in str(why) and row["note"] == f"not run: {why}"
    assert list(row) == [*harness.COLUMNS, *measure.about()]


def test_kept_bytes_counts_each_storage_once_and_no_weights():
    x, w = torch.randn(4, 8, requires_grad=True), torch.randn(8, 8, requires_grad=True)

    def run():
        y = x @ w
        return (y * y + y).sum().backward()

    assert measure.kept_bytes(run, [w]) == x.nbytes + 4 * 8 * 4  # x, and y for its square, twice the same storage
    assert measure.kept_bytes(run, [w, x]) == 4 * 8 * 4


@pytest.mark.parametrize("kind", ["RMSNorm, frozen", "RMSNorm, trained", "residual", "LayerNorm", "SwiGLU", "rotary"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_implementation_passes_the_gate_of_norms(kind, dtype):
    (found,) = (c for c in norms.cases(harness.Options(dtype=dtype)) if c.label.startswith(kind))
    errors, left_out = found.gate()
    assert {"torch", "triton", "eager"} <= set(errors)  # triton in the interpreter
    assert {name for name in left_out if "wrong" in left_out[name]} == set()


def test_needed_bytes_of_norms():
    shape = norms.MODELS["SmolLM2-135M"]
    found = {c.label.split(",")[0]: c.nbytes for c in norms.cases(harness.Options(tokens=("10",)))}
    assert found["RMSNorm"] == 5 * 10 * 576 * 4 and found["residual + RMSNorm"] == 8 * 10 * 576 * 4
    assert found["SwiGLU"] == 8 * 10 * shape.intermediate * 4
    assert found["rotary"] == 4 * 10 * (9 + 3) * 64 * 4


# ---------------------------------------------------------------- the command


@pytest.fixture
def compiled_kernels(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


QUICK = ["bench", "norms", "--quick", "--quiet", "--device", "cpu"]


def test_the_command_writes_results_report_and_plots(tmp_path, capsys, compiled_kernels):
    out = tmp_path / "out"
    assert cli.main([*QUICK, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "RMSNorm, frozen" in printed and "needs a CUDA device" in printed and str(out) in printed
    with open(out / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [*harness.COLUMNS, *measure.about()]
    assert {row["suite"] for row in rows} == {"norms"}
    assert all(float(row["ms"]) > 0 for row in rows if not row["note"])
    assert len(json.loads((out / "results.json").read_text())) == len(rows)
    page = (out / "report.html").read_text()
    assert "RMSNorm, frozen" in page and "data:image/png;base64," in page


def test_a_run_goes_on_where_it_was_killed(tmp_path, monkeypatch, capsys, compiled_kernels):
    out, killed = tmp_path / "out", []
    rows_of = norms.SwiGLU.rows

    def die(self):
        killed.append(str(self))
        raise KeyboardInterrupt

    monkeypatch.setattr(norms.SwiGLU, "rows", die)
    assert cli.main([*QUICK, "--out", str(out)]) == 130
    assert killed and "--resume goes on" in capsys.readouterr().err
    before = (out / "results.csv").read_text()
    assert cli.main([*QUICK, "--out", str(out)]) == 2 and "--resume" in capsys.readouterr().err
    monkeypatch.setattr(norms.SwiGLU, "rows", rows_of)
    assert cli.main([*QUICK, "--out", str(out), "--resume", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    after = (out / "results.csv").read_text()
    assert after.startswith(before) and len({row["case"] for row in result["rows"]}) == 3
    assert cli.main([*QUICK, "--seconds", "1", "--out", str(out), "--resume"]) == 2
    assert "was measured with settings quick, this is quick, seconds=1" in capsys.readouterr().err
    monkeypatch.setenv("KUNBR_COMMIT", "another")
    assert cli.main([*QUICK, "--out", str(out), "--resume"]) == 2
    assert "was measured with commit" in capsys.readouterr().err


@pytest.mark.slow
def test_rows_of_other_suites_stay_as_they_are(tmp_path, capsys, compiled_kernels):
    """device_suite.sh runs one suite after the other into one folder, each with settings of its own."""
    assert cli.main([*QUICK, "--out", str(tmp_path)]) == 0
    found = rows.read_rows(tmp_path / "results.csv")
    others = [row | {"suite": "optimizer", "settings": "another"} for row in found[:2]]
    others[1] |= {"ms": None, "ours": 1, "note": f"not run: {rows.WRONG}1e-2 from fp64"}
    rows.write_rows(tmp_path / "results.csv", tmp_path / "results.json", others)
    assert cli.main([*QUICK, "--out", str(tmp_path), "--resume"]) == 0
    after = rows.read_rows(tmp_path / "results.csv")
    assert after[:2] == others and {row["suite"] for row in after[2:]} == {"norms"}
    assert cli.main(["bench", "optimizer", *QUICK[2:], "--out", str(tmp_path), "--resume"]) == 2  # they are asked for
    assert "was measured with settings another, this is quick" in capsys.readouterr().err


def test_a_wrong_result_is_an_exit_status_and_no_row(tmp_path, monkeypatch, capsys, compiled_kernels):
    monkeypatch.setattr(norms.SwiGLU, "ours", staticmethod(lambda impl, gate, up: norms.SwiGLU.eager(gate, up) * 1.01))
    out, right = tmp_path / "out", norms.SwiGLU.eager
    assert cli.main([*QUICK, "--out", str(out)]) == 1
    assert "WRONG: norms: SmolLM2-135M, SwiGLU" in capsys.readouterr().err
    with open(out / "results.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if "SwiGLU" in row["case"]]
    assert rows and all(row["ms"] == "" and "from fp64" in row["note"] for row in rows)
    assert "from fp64" in (out / "report.html").read_text()
    monkeypatch.setattr(norms.SwiGLU, "ours", staticmethod(lambda impl, gate, up: right(gate, up)))
    assert cli.main([*QUICK, "--out", str(out), "--resume"]) == 0  # what gave no numbers is measured
    with open(out / "results.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if "SwiGLU" in row["case"]]
    assert [row["variant"] for row in rows if row["ms"]] == ["torch", "eager"]


def test_what_the_table_finds_wrong_is_an_exit_status(tmp_path, monkeypatch, capsys, compiled_kernels):
    why = "swiglu torch fp32: wrong values: y is off"
    monkeypatch.setattr(harness, "why_wrong", lambda operation, *others: why if operation == "swiglu" else None)
    assert cli.main([*QUICK, "--out", str(tmp_path)]) == 1
    assert re.search(f"WRONG: norms: SmolLM2-135M, SwiGLU.*: torch is {why}: no numbers", capsys.readouterr().err)


def test_a_wrong_variant_of_ours_is_an_exit_status_beside_the_others_numbers(
    tmp_path, monkeypatch, capsys, compiled_kernels
):
    """And measured again by --resume."""
    other = harness.Variant("other", lambda: lambda: {"output 0": torch.zeros(1)}, ours=True)
    variants, out = norms.SwiGLU.variants, tmp_path / "out"
    monkeypatch.setattr(norms.SwiGLU, "variants", lambda self, data: [*variants(self, data), other])
    assert cli.main([*QUICK, "--out", str(out)]) == 1
    assert re.search(r"WRONG: norms: SmolLM2-135M, SwiGLU.*, other: .* from fp64", capsys.readouterr().err)
    monkeypatch.setattr(norms.SwiGLU, "variants", variants)
    with open(out / "results.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if "SwiGLU" in row["case"]]
    assert [row["variant"] for row in rows if row["ms"]] == ["torch", "eager"]
    assert cli.main([*QUICK, "--out", str(out), "--resume"]) == 0
    assert "from fp64" not in (out / "results.csv").read_text()


def test_list_says_what_there_is_and_measures_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench", "--list"]) == 0
    printed = capsys.readouterr().out
    assert all(f"{suite}: " in printed for suite in SUITES)
    assert cli.main(["bench", "--list", "norms", "--quick", "--variants", "eager"]) == 0
    assert "norms: " in capsys.readouterr().out
    assert cli.main(["bench", "--list", "norms", "--quick", "--variants", "eager", "nosuch\x1b"]) == 2
    said = capsys.readouterr()
    assert "no variant 'nosuch\\x1b' in these suites: expected some of" in said.err and said.out == ""
    assert list(tmp_path.iterdir()) == []


def test_bad_input(tmp_path, capsys, monkeypatch):
    assert cli.main(["bench", "speed", "--out", str(tmp_path / "a")]) == 2
    assert f"unknown suite 'speed': expected some of {', '.join(SUITES)}" in capsys.readouterr().err
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert cli.main([*QUICK, "--out", str(tmp_path / "a")]) == 2
    assert "unset it" in capsys.readouterr().err
    monkeypatch.delenv("TRITON_INTERPRET")
    assert cli.main([*QUICK, "--variants", "tritn", "--out", str(tmp_path / "a")]) == 2
    assert "no variant 'tritn' in these suites: expected some of F.rms_norm, eager" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert cli.main([*QUICK, "--out", str(tmp_path / "file")]) == 2
    assert "file: is not a folder: name a folder" in capsys.readouterr().err
    for words in (
        ["--repeats", "0"],
        ["--seconds", "-1"],
        ["--tokens", "0"],
        ["--tokens", "x"],
        ["--list", "--report", "x"],
    ):
        with pytest.raises(SystemExit):
            cli.main([*QUICK, *words])
        assert words[0] in capsys.readouterr().err
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    assert cli.main(["bench", "--compare", str(tmp_path / "x.csv"), str(tmp_path / "x.csv")]) == 2
    assert "x.csv" in capsys.readouterr().err


def test_compare_is_an_exit_status(tmp_path, capsys, compiled_kernels):
    out = tmp_path / "out"
    bench.bench(["norms"], harness.Options(quick=True), out, progress=False)
    a = out / "results.csv"
    assert cli.main(["bench", "--compare", str(a), str(a)]) == 0
    with open(a, newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        if row["variant"] == "torch":  # beyond what a busy machine makes of quick rounds
            row.update({name: str(100 * float(row["p80_ms"])) for name in ("ms", "p20_ms", "p80_ms")})
    with open(tmp_path / "b.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    capsys.readouterr()
    assert cli.main(["bench", "--compare", str(a), str(tmp_path / "b.csv")]) == 1
    assert "torch" in capsys.readouterr().out
    assert cli.main(["bench", "--compare", str(tmp_path / "b.csv"), str(a)]) == 0


def test_report_of_a_file_and_no_report(tmp_path, capsys, compiled_kernels):
    out = tmp_path / "out"
    assert cli.main([*QUICK, "--out", str(out), "--no-report"]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["results.csv", "results.json"]
    capsys.readouterr()
    assert cli.main(["bench", "--report", str(out / "results.csv"), "--out", str(tmp_path / "report")]) == 0
    assert str(tmp_path / "report" / "report.html") in capsys.readouterr().out.splitlines()
    assert "RMSNorm, frozen" in (tmp_path / "report" / "report.html").read_text()


def test_a_budget_that_is_over_at_once_measures_nothing_and_says_so(tmp_path, capsys, compiled_kernels):
    assert cli.main([*QUICK, "--budget", "1e-9", "--out", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert "left out: norms: SmolLM2-135M, RMSNorm" in printed.err and "numbers of 0 cases" in printed.out
