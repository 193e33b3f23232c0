"""Rows on disk, and what is made of them: the table, the pictures, the HTML."""

import base64
import json
import re

import pytest
from helpers import rarely

from kunbr_fast.benchmarks import harness, report
from kunbr_fast.benchmarks.charts import bars, roofline, stages, times
from kunbr_fast.benchmarks.rows import COLUMNS, outcomes, parsed, read_rows, write_rows
from kunbr_fast.evaluation import figures


def rows(suite="norms", case="RMSNorm, T=128", tokens=128, gflop=0.0, model="SmolLM2-135M", times=None, **others):
    """A case's rows. times: {variant: ms, or why it did not run}, ours first letter "*"."""
    found = []
    for name, ms in (times or {"*triton": 1.0, "eager": 2.0, "liger": "no GPU"}).items():
        row = dict.fromkeys(COLUMNS, "") | {
            "suite": suite, "model": model, "case": case, "tokens": tokens, "dtype": "float32",
            "variant": name.lstrip("*"), "ours": int(name[0] == "*"), "gflop": gflop, "mib": 8.0,
        }  # fmt: skip
        if isinstance(ms, str):
            row["note"] = f"not run: {ms}"
        else:
            row |= {
                "ms": ms, "p20_ms": 0.9 * ms, "p80_ms": 1.2 * ms, "rounds": 7, "baseline": "eager", "speedup": 2 / ms,
                "tflop_per_s": gflop / ms, "gb_per_s": 8.4 / ms, "roofline_percent": 40 / ms, "peak_mib": 3 * ms,
                "kept_mib": 0.5, "error": "1.2e-07", "matmul_tflop_per_s": 0.2, "copy_gb_per_s": 30.0,
            }  # fmt: skip
        found.append(
            row | {"device": "some CPU", "threads": 2, "commit": "abc", "command": "kunbr-fast bench"} | others
        )
    return found


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, by file name, still as matplotlib objects."""
    found, save = {}, figures.save
    monkeypatch.setattr(figures, "save", lambda figure, path: (found.update({path.name: figure}), save(figure, path)))
    return found


EXTRAPOLATED = "extrapolated from 2 of 131 steps"


def once(row):
    """As the harness writes what was measured once, and extrapolated."""
    return row | {"p20_ms": "", "p80_ms": "", "rounds": 2, "note": EXTRAPOLATED} if row["ms"] else row


def texts(axes):
    return [text.get_text() for text in axes.texts]


# ---------------------------------------------------------------- rows on disk


def test_rows_come_back_as_they_were(tmp_path):
    written = rows(case='of "two", lines\nand 100') + rows(case="512", tokens=0)
    write_rows(tmp_path / "a.csv", tmp_path / "a.json", written)
    found = read_rows(tmp_path / "a.csv")
    assert found == read_rows(tmp_path / "a.json") == [parsed(row) for row in written]
    first, last = found[0], found[-1]
    assert (first["ms"], first["error"], first["ours"], first["threads"]) == (1.0, 1.2e-7, 1, 2)
    assert (last["case"], last["tokens"], last["ms"], last["commit"]) == ("512", 0, None, "abc")
    write_rows(tmp_path / "b.csv", tmp_path / "b.json", found)  # rows that were read can be written again
    assert read_rows(tmp_path / "b.csv") == found


def test_fresh_rows_are_what_is_read_from_both_files(tmp_path, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # it would be timed
    cases = harness.all_cases(["norms"], harness.Options(quick=True, repeats=1))
    measured = [row for _, some, _ in harness.run(cases) for row in some]
    measured += [row for _, some, _ in harness.run(cases[:1], budget=-1.0) for row in some]
    assert {bool(row["ms"]) for row in measured} == {True, False}
    write_rows(tmp_path / "a.csv", tmp_path / "a.json", measured)
    fresh = [parsed(row) for row in measured]
    assert read_rows(tmp_path / "a.csv") == read_rows(tmp_path / "a.json") == fresh
    assert [list(row) for row in read_rows(tmp_path / "a.csv")] == [list(row) for row in fresh]
    write_rows(tmp_path / "b.csv", tmp_path / "b.json", fresh)
    for name in ("csv", "json"):
        assert (tmp_path / f"a.{name}").read_bytes() == (tmp_path / f"b.{name}").read_bytes()


def test_odd_values_are_the_same_fresh_and_read(tmp_path):
    odd = rows(ours=True, cuda=None, commit="0123", note="a\rb", ms=12345, error=None)
    write_rows(tmp_path / "a.csv", tmp_path / "a.json", odd)
    assert read_rows(tmp_path / "a.csv") == read_rows(tmp_path / "a.json") == [parsed(row) for row in odd]
    first = read_rows(tmp_path / "a.csv")[0]
    assert (first["ours"], first["cuda"], first["commit"], first["ms"]) == (1, "", "0123", 12345)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    write_rows(tmp_path / "a.csv", tmp_path / "a.json", rows())
    before = (tmp_path / "a.csv").read_bytes(), (tmp_path / "a.json").read_bytes()
    with pytest.raises(ValueError, match="ms is nan"):
        write_rows(tmp_path / "a.csv", tmp_path / "a.json", rows(times={"eager": float("nan")}))
    assert before == ((tmp_path / "a.csv").read_bytes(), (tmp_path / "a.json").read_bytes())


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("a.csv", lambda text: "", "line 1: no rows of benchmarks: there is no column suite"),
        ("a.csv", lambda text: text.replace(",p20_ms", ",p19_ms"), "line 1: .*no column p20_ms"),
        ("a.csv", lambda text: text.replace("\nnorms,", "\nextra,norms,", 1), "line 2: .* fields, expected"),
        ("a.csv", lambda text: re.sub(r"eager,0,2\.0", "eager,0,two", text), "line 3: ms is 'two', expected a number"),
        ("a.csv", lambda text: re.sub(r"eager,0,2\.0", "eager,0,inf", text), "line 3: ms is 'inf', expected a number"),
        ("a.json", lambda text: text[:-9], "not JSON .* at line"),
        ("a.json", lambda text: '{"rows": 3}', "expected a list"),
        ("a.json", lambda text: text.replace('"suite"', '"sweet"', 1), "row 1: .*no column suite"),
    ],
)  # fmt: skip
def test_a_file_that_is_none_is_named_with_its_line(tmp_path, name, change, said):
    write_rows(tmp_path / "a.csv", tmp_path / "a.json", rows())
    path = tmp_path / name
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=f"(?s){re.escape(str(path))}[,:] .*{said}"):
        read_rows(path)


@pytest.mark.parametrize(
    "column", rarely(["ms", "peak_mib", "speedup", "roofline_percent", "gflop", "tokens"], ["ms", "peak_mib"])
)
def test_a_number_is_refused_or_drawn(tmp_path, column):
    """Of any size: what no benchmark measures by its column, the rest in all pictures."""
    taken = []
    for value in (1e308, 10**18, 1e15, 1e-30, 5e-324, 0, -1, -1e300):
        some = [rows(gflop=2.0), rows(gflop=2.0, tokens=256), rows(case="x", model="y")]
        some[0][0][column] = value
        path = tmp_path / "a.json"
        path.write_text(json.dumps([row for case in some for row in case]))
        try:
            found = read_rows(path)
        except ValueError as error:
            assert str(error).startswith(f"{path}, row 1: {column} is {value}, expected a number of 0, or 1e-30 to")
        else:
            assert report.write_report(found, tmp_path / "out") and report.table(found)
            taken.append(value)
    assert taken == [1e15, 1e-30, 0] + ([-1] if column == "peak_mib" else [])


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not UTF-8 text"):
        read_rows(tmp_path / "a.csv")


def test_what_does_a_part_of_the_work_is_no_rival():
    some = rows(times={"*triton": 1.0, "bare": 0.5, "eager": 2.0})
    some[1]["error"] = ""
    (case,) = outcomes(some)
    assert [row["variant"] for row in case.ran] == ["bare", "triton", "eager"]
    assert [row["variant"] for row in case.rivals] == ["eager"] and case.ratio == 2.0
    assert "- bare" in report.table(some)


def test_candidates_are_not_the_best_of_ours(tmp_path):
    some = rows(times={"*triton": 1.0, "*tile 64x64": 0.5, "eager": 2.0, "*tile": "no GPU"})
    (case,) = outcomes(some)
    assert case.ours["variant"] == "triton" and case.ratio == 2.0 and len(case.rivals) == 1
    lines = report.table(some).splitlines()
    assert lines[2].split()[:2] == ["-", "tile"] and "best of ours: triton, 1 ms" in lines[-1]
    page = report.write_report(some, tmp_path)[0].read_text()
    assert "<tr class=less><td class=t>tile 64x64" in page and "<tr class=ours><td class=t>triton" in page


def test_an_extrapolated_time_marks_what_is_made_of_it():
    some = rows(times={"*triton": 1.0, "eager": 2.0, "liger": 4.0})
    assert not outcomes(some)[0].extrapolated and "~" not in report.table(some)
    for which, extrapolated in ((0, True), (1, True), (2, False)):  # liger is not the rival that is compared
        changed = [*some[:which], once(some[which]), *some[which + 1 :]]
        assert outcomes(changed)[0].extrapolated == extrapolated
        assert ("faster ~2.00x" if extrapolated else "faster 2.00x") in report.table(changed)
    text = report.table([some[0], once(some[1]), some[2]])
    ours, eager, liger = ([cell.strip() for cell in line.split("  ") if cell] for line in text.splitlines()[2:5])
    assert ours[1:4] == ["1", "0.9 .. 1.2", "~2.00x"]  # its speed-up is over what was extrapolated
    assert eager[1:4] == ["~2", "–", "~1.00x"] and liger[1:4] == ["4", "3.6 .. 4.8", "~0.50x"]
    assert text.endswith("best of ours: triton, 1 ms; best rival: eager, ~2 ms: faster ~2.00x\n\n~ extrapolated")


def test_a_case_without_numbers_is_in_all_tables(tmp_path):
    lost = rows(case="SwiGLU", times={"*torch": "torch is 1.0e-02 from fp64", "eager": "torch is 1.0e-02 from fp64"})
    text = report.table(lost)
    assert text.split("\n    ")[1:] == ["not run: torch, eager: torch is 1.0e-02 from fp64", "none of ours ran"]
    paths = report.write_report(rows() + lost, tmp_path)
    page = paths[0].read_text()
    summary = page[page.index("<h2>Summary") : page.index("<h2>Where")]
    losses = page[page.index("<h2>Where") : page.index("<h2>Pictures")]
    not_run = page[page.index("<h2>Not run") :]
    assert "SwiGLU" in summary and "Nowhere in the 1 case" in losses
    assert (
        "1 case without numbers of ours:" in losses and "SwiGLU (float32): torch: torch is 1.0e-02 from fp64" in losses
    )
    assert "norms: SmolLM2-135M, SwiGLU (float32): torch is 1.0e-02" in not_run and "liger (1 case): no GPU" in not_run
    assert len(report.write_report(lost, tmp_path)) == 1 and "No variant ran" in (tmp_path / "report.html").read_text()


# ---------------------------------------------------------------- the table


def test_table_sorts_marks_and_judges():
    text = report.table(
        rows() + rows(case="SwiGLU", times={"*torch": 3.0, "eager": 1.5, "liger": 0.75, "*cuda": "no nvcc"})
    )
    first, second = text.split("\n\n")
    names = [line.split()[0:2] for line in second.splitlines()[2:5]]
    assert names == [["liger", "0.75"], ["eager", "1.5"], ["*", "torch"]]
    assert "not run: liger: no GPU" in first and "not run: cuda: no nvcc" in second
    assert first.endswith("best of ours: triton, 1 ms; best rival: eager, 2 ms: faster 2.00x")
    assert second.endswith("best of ours: torch, 3 ms; best rival: liger, 0.75 ms: SLOWER 0.25x")
    for heading in ("0.9 .. 1.2", "GB/s", "% roof", "peak MiB", "kept MiB", "1.2e-07"):
        assert heading in first
    assert "TFLOP/s" not in first and "TFLOP/s" in report.table(rows(gflop=5.0)) and "standing" not in first


def test_table_is_at_most_120_columns_wide():
    some = rows(
        case="long " * 40, times={"*" + "t" * 60: 123456.7, "e" * 60: 0.0001234, "liger": "reason " * 60}, gflop=1
    )
    for row in some:
        row["standing_mib"] = 123456
    assert max(map(len, report.table(some).splitlines())) <= 120


def test_table_without_one_side():
    assert report.table(rows(times={"eager": 1.0})).endswith("none of ours ran")
    assert report.table(rows(times={"*torch": 1.0})).endswith("no rival ran")
    assert report.table(rows(times={"*torch": "broken"})).endswith("none of ours ran")


# ---------------------------------------------------------------- pictures


def test_only_what_the_rows_have_data_for_is_drawn(tmp_path):
    def names(some):
        return {path.name for _, path in report.draw(outcomes(some), tmp_path)}

    alone = [row | {"peak_mib": "", "roofline_percent": ""} for row in rows(times={"*torch": 1.0})]
    assert names(alone) == set() and names(rows(times={"*torch": "broken"})) == set()
    assert names(rows()) == {"roofline_memory_bound.png", "speedup_norms.png", "memory_norms.png"}


@pytest.mark.slow
def test_pictures_of_an_earlier_report_go_and_others_stay(tmp_path):
    for name in ("time_norms_2.png", "memory_step.png", "roofline_bfloat16.png"):
        figures.save(figures.single()[0], tmp_path / name)
    for name in ("mine.png", "memory_of_mine.png", "time_norms_3.png"):
        (tmp_path / name).write_bytes(b"not ours")
    first = report.draw(outcomes(rows("optimizer") + rows("density", gflop=1.0)), tmp_path)
    second = report.draw(outcomes(rows()), tmp_path)
    assert {path.name for _, path in first} > {"speedup_optimizer.png", "roofline_float32.png"}
    names = {path.name for _, path in second} | {"mine.png", "memory_of_mine.png", "time_norms_3.png"}
    assert {path.name for path in tmp_path.iterdir()} == names


@pytest.mark.slow
def test_all_can_be_drawn_of_times_that_were_measured_once(tmp_path, drawn):
    some = [once(row) for n in (64, 256) for row in rows("density", f"up, T={n}", n, gflop=2.0, standing_mib=1.0)]
    some += [once(row) for row in rows("end_to_end", "density")]
    names = {path.name for _, path in report.draw(outcomes(some), tmp_path)}
    assert {"time_density.png", "speedup_density.png", "end_to_end.png", "roofline_float32.png"} <= names
    axes = drawn["speedup_density.png"].axes[0]
    assert {"~2.00x", "SmolLM2-135M, up, T=64, float32: triton, ~1 ms"} <= set(texts(axes))
    assert axes.get_xlabel().endswith("; ~ extrapolated")
    report.draw(outcomes(rows()), tmp_path)
    assert (
        "~" not in "".join(texts(drawn["speedup_norms.png"].axes[0])) + drawn["speedup_norms.png"].axes[0].get_xlabel()
    )


def test_a_band_is_drawn_where_there_is_one(tmp_path, drawn):
    some = rows("density", "up, T=64", 64) + rows("density", "up, T=128", 128)
    some += [once(row) for row in rows("density", "up, T=256", 256)]
    list(times.times(outcomes(some), tmp_path))
    (panel,) = drawn["time_density.png"].axes
    assert [list(line.get_xdata()) for line in panel.get_lines()] == [[64, 128, 256]] * 2
    assert [max(band.get_paths()[0].vertices[:, 0]) for band in panel.collections] == [128, 128]


def test_roofline(tmp_path, drawn):
    some = [row for n in range(50) for row in rows("density", f"up, T={n}", n, gflop=0.1 * (1 + n % 30))]
    ((_, path),) = roofline.roofline(outcomes(some), tmp_path)
    axes, key = drawn[path.name].axes
    roof, ours, rival = axes.get_lines()[:3]
    assert max(roof.get_ydata()) == 0.2 and len(ours.get_xdata()) == len(rival.get_xdata()) == roofline.POINTS
    assert list(ours.get_ydata()) == pytest.approx([2 * y for y in rival.get_ydata()])
    assert "10 more in the CSV" in axes.get_title(loc="left") and len(key.texts) == roofline.POINTS
    renderer = drawn[path.name].canvas.get_renderer()
    boxes = sorted((text.get_window_extent(renderer) for text in axes.texts), key=lambda box: box.x0)
    assert len(boxes) > 5 and all(a.x1 < b.x0 for a, b in zip(boxes, boxes[1:]))
    assert boxes[0].x0 >= axes.bbox.x0 - 5 and boxes[-1].x1 <= axes.bbox.x1 + 5


def test_what_does_less_is_no_point_of_the_roofline(tmp_path, drawn):
    some = rows("density", "up", gflop=1.0, times={"*triton": 1.0, "bare": 0.01, "eager": 2.0})
    some[1]["error"] = ""
    ((_, path),) = roofline.roofline(outcomes(some), tmp_path)
    _, ours, rival, leader = drawn[path.name].axes[0].get_lines()
    assert (list(ours.get_ydata()), list(rival.get_ydata()), leader.get_ydata()[0]) == ([1.0], [0.5], 1.0)


def test_labels_are_moved_apart_and_stay_inside():
    for centres, width in (([0.5] * 7, 0.05), ([0.99] * 4, 0.1), ([0.0, 0.01, 0.9], 0.2), ([0.4] * 40, 0.05)):
        found = roofline.apart(centres, [width] * len(centres))
        width = min(width, 1 / len(centres))
        assert all(b - a >= width - 1e-9 for a, b in zip(found, found[1:]))
        assert found[0] >= width / 2 - 1e-9 and found[-1] <= 1 - width / 2 + 1e-9
    assert roofline.apart([0.2, 0.8], [0.1, 0.1]) == [0.2, 0.8]


def test_time_against_T(tmp_path, drawn):
    some = [row for n in (64, 256) for kind in ("up", "down") for row in rows("density", f"{kind}, T={n}", n)]
    some += rows("density", "up, ragged", 44) + rows("linear_loss", "head frozen, R=32, V=99", 32)
    some += rows("linear_loss", "head frozen, R=64, V=99", 64)
    found = [path.name for _, path in times.times(outcomes(some), tmp_path)]
    assert found == ["time_density.png", "time_linear_loss.png"]
    panels = [axes.get_title(loc="left") for axes in drawn["time_density.png"].axes]
    assert panels == ["SmolLM2-135M\nup, float32", "SmolLM2-135M\ndown, float32"]
    (panel,) = drawn["time_linear_loss.png"].axes
    assert panel.get_title(loc="left") == "SmolLM2-135M\nhead frozen, V=99, float32"
    assert [list(line.get_xdata()) for line in panel.get_lines()] == [[32, 64]] * 2


def test_lost_cases_have_another_colour_and_pages_end(tmp_path, drawn, monkeypatch):
    monkeypatch.setattr(bars, "BARS", 9)
    some = [
        row for n in range(20) for row in rows(case=f"case {n}", times={"*triton": 1.0, "eager": 2.0, "liger": 0.5})
    ]
    found = [path.name for _, path in bars.speedups(outcomes(some), tmp_path)]
    assert found == ["speedup_norms.png", "speedup_norms_2.png", "speedup_norms_3.png"]
    axes = drawn["speedup_norms.png"].axes[0]
    colours = {round(bar.get_width(), 3): bar.get_facecolor()[:3] for bar in axes.patches}
    assert set(colours) == {-0.5, 1.0} and colours[-0.5] != colours[1.0]
    assert {"0.50x", "2.00x", "SmolLM2-135M, case 0, float32: triton, 1 ms"} <= set(texts(axes))
    shown = sum(text.startswith("SmolLM2") for figure in drawn.values() for text in texts(figure.axes[0]))
    assert f"({20 - shown} more in the CSV)" in drawn["speedup_norms_3.png"].axes[0].get_title(loc="left")


def test_memory_stacks_what_stands_and_the_peak(tmp_path, drawn):
    some = rows("optimizer", standing_mib=9.0)
    assert [path.name for _, path in bars.memory(outcomes(some), tmp_path)] == ["memory_optimizer.png"]
    axes = drawn["memory_optimizer.png"].axes[0]
    assert [round(bar.get_width(), 1) for bar in axes.patches] == [60.0, 20.0, 60.0, 40.0]
    assert "12 MiB, 9 of it standing" in texts(axes) and "15 MiB, 9 of it standing" in texts(axes)


def test_end_to_end_is_stacked_by_stage(tmp_path, drawn):
    some = [
        row
        for stage, ours, theirs in (
            ("density", 1e3, 4e3), ("prefix cache", 5e2, "the procedure has no such stage"), ("layers 0-1", 1e3, 8e3),
            ("layers 2-3", 2e3, 8e3), ("total", 4.5e3, 2e4),
        )
        for row in rows("end_to_end", stage, times={"*triton": ours, "reference": theirs})
    ]  # fmt: skip
    some[1] = once(some[1])
    assert [path.name for _, path in stages.stages(outcomes(some), tmp_path)] == ["end_to_end.png"]
    axes = drawn["end_to_end.png"].axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["density", "prefix cache", "re-insertion"]
    assert [bar.get_width() for bar in axes.patches] == [1, 0.5, 3, 4, 0, 16]
    assert {"4.5 s", "20 s, extrapolated"} <= set(texts(axes))


# ---------------------------------------------------------------- HTML


def test_report_is_one_file_with_all_in_it(tmp_path):
    some = rows(times={"*triton": 2.0, "eager": 1.0, "<b>liger": "no <GPU> & none"}) + rows("density", "up", gflop=2.0)
    some += rows("density", "<down>", times={"*torch": "wrong"})
    paths = report.write_report([row | {"settings": "quick"} for row in some], tmp_path / "out")
    page = paths[0].read_text()
    assert paths[0].name == "report.html" and all(path.is_file() for path in paths)
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert [base64.b64decode(data) for data in pictures] == [path.read_bytes() for path in paths[1:]] and len(
        pictures
    ) > 3
    assert not re.search(r"<script|https?://|<link|@import|url\(", page) and "prefers-color-scheme: dark" in page
    assert "<b>" not in page and "no &lt;GPU&gt; &amp; none" in page
    assert "density: SmolLM2-135M, &lt;down&gt; (float32): wrong" in page and "<dt>settings</dt><dd>quick</dd>" in page
    lost = page[page.index("Where we lose") : page.index("<h2>Pictures")]
    assert "In 1 of 2 cases" in lost and ">0.50x" in lost and ", up" not in lost and "~" not in page
    for text in ("some CPU", "abc", "kunbr-fast bench", "&lt;b&gt;liger (1 case)"):
        assert text in page


def test_report_marks_what_is_extrapolated(tmp_path):
    some = rows(times={"*torch": 4.0, "eager": 2.0})
    page = report.write_report([some[0], once(some[1])], tmp_path)[0].read_text()
    summary = page[page.index("<h2>Summary") : page.index("<h2>Where")]
    losses = page[page.index("<h2>Where") : page.index("<h2>Pictures")]
    assert "<td>4</td><td>~2</td>" in summary and ">~0.50x<" in summary and "~ extrapolated" in summary
    assert "eager takes ~2 ms, our torch 4 ms" in losses and ">~0.50x<" in losses
    assert page.count(f"eager: {EXTRAPOLATED}") == 1


def test_what_auto_takes_is_said_of_kernels_on_a_gpu(tmp_path):
    def page(names, **others):
        return report.write_report(rows(times=dict.fromkeys(names, 1.0), **others), tmp_path)[0].read_text()

    said = "impl=&quot;auto&quot; takes a kernel where"
    assert said not in page(["*triton", "eager"], cuda="") and said not in page(["*torch", "triton"], cuda="13.0")
    assert said not in page(["*torch, graph"], cuda="13.0")
    assert said in page(["*triton, graph", "*torch"], cuda="13.0") and said in page(["*cuda"], cuda="13.0")


def test_same_rows_same_bytes(tmp_path):
    first, second = (report.write_report(rows(gflop=1.0), tmp_path / name) for name in "ab")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_report_takes_rows_from_the_harness_and_from_files(tmp_path):
    write_rows(tmp_path / "a.csv", tmp_path / "a.json", rows())
    direct, read = (
        report.write_report(some, tmp_path / "o")[0].read_text() for some in (rows(), read_rows(tmp_path / "a.csv"))
    )
    assert direct == read and report.table(rows()) == report.table(read_rows(tmp_path / "a.json"))
    assert json.loads((tmp_path / "a.json").read_text())[0]["ms"] == 1.0


def test_report_without_losses_or_rows(tmp_path):
    assert "Nowhere in the 1 case where" in report.write_report(rows(), tmp_path)[0].read_text()
    with pytest.raises(ValueError, match="no rows"):
        report.write_report([], tmp_path)
