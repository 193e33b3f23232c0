"""Plots and the report: whole files, made of what was given, with nothing of the caller's plotting state
changed.
"""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from kunbr_fast.density.measure import Density
from kunbr_fast.evaluation import figures
from kunbr_fast.evaluation.accuracy import Accuracy
from kunbr_fast.evaluation.attacks import ATTACKS
from kunbr_fast.evaluation.curves import RTTResult
from kunbr_fast.evaluation.plots import plot_density, plot_pareto, plot_relearning
from kunbr_fast.evaluation.report import table, write_report


def density(shares, standard_error=None):
    """Twice the shares, as per_layer is not normalised."""
    return Density(
        2 * torch.tensor(shares, dtype=torch.float64),
        {},
        torch.ones(len(shares), dtype=torch.int64),
        1,
        sample_fraction=None if standard_error is None else 0.1,
        standard_error=None if standard_error is None else torch.tensor(standard_error, dtype=torch.float64),
    )


EIGHT = [0.09, 0.12, 0.17, 0.16, 0.11, 0.08, 0.12, 0.15]


def result(curves):
    """{lr: [mean accuracy per epoch]} -> a result of two folds with these means."""
    return RTTResult(
        [
            {"fold": fold, "lr": lr, "epoch": epoch, "plain": value + shift, "calibrated": None}
            for lr, values in curves.items()
            for fold, shift in (("a", 0.05), ("b", -0.05))
            for epoch, value in enumerate(values)
        ]
    )


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, in order, still as matplotlib objects."""
    found, save = [], figures.save
    monkeypatch.setattr(figures, "save", lambda figure, path: (found.append(figure), save(figure, path)))
    return found


def read_png(path):
    from matplotlib import image

    return image.imread(path)


def assert_all_text_is_inside(figure):
    """Every text of the figure lies on the picture, legends included."""
    from matplotlib.text import Text

    renderer = figure.canvas.get_renderer()
    width, height = figure.canvas.get_width_height()
    beyond = set()  # matplotlib keeps some ticks beyond the axis' ends, and does not draw them
    for axes in figure.axes:
        for axis, place in ((axes.xaxis, 0), (axes.yaxis, 1)):
            low, high = sorted(axis.get_view_interval())
            ticks = [*axis.get_ticklabels(), *axis.get_ticklabels(minor=True)]
            beyond |= {label for label in ticks if not low <= label.get_position()[place] <= high}
    shown = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text() and t not in beyond]
    assert shown
    for text in shown:
        box = text.get_window_extent(renderer)
        assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1, text.get_text()


def texts(figure):
    from matplotlib.text import Text

    return [text.get_text() for text in figure.findobj(Text)]


# ----------------------------------------------------------------------------------------------- density


def test_density_bars_are_the_shares_and_the_blocks_are_marked(tmp_path, drawn):
    plot_density(density(EIGHT), [range(2, 4), range(4, 5)], tmp_path / "density.png")
    axes = drawn[0].axes[0]
    bars = {round(bar.get_x() + bar.get_width() / 2): bar for group in axes.containers for bar in group}
    assert [bars[i].get_height() for i in range(8)] == pytest.approx([100 * share for share in EIGHT])
    looks = {i: (bar.get_facecolor(), bar.get_hatch()) for i, bar in bars.items()}
    assert looks[2] == looks[3] == looks[4] != looks[0] == looks[1] == looks[5]
    assert looks[6] == looks[7] and looks[6][1] and not any(looks[i][1] for i in range(6))
    shown = texts(drawn[0])
    assert {"2–3", "4", "decoder layer", "re-inserted and trained", "not chosen"} <= set(shown)
    assert any("(%)" in text for text in shown)


def test_an_estimate_has_error_bars(tmp_path, drawn):
    errors = [0.02, 0.0, 0.04, 0.02, 0.0, 0.02, 0.02, 0.02]  # of per_layer: half as much of the shares
    plot_density(density(EIGHT, errors), [range(2, 4)], tmp_path / "density.png")
    (axes,) = drawn[0].axes
    (bars,) = axes.containers[-1].lines[2]
    spans = [(100 * (share - error / 2), 100 * (share + error / 2)) for share, error in zip(EIGHT, errors)]
    assert [tuple(segment[:, 1]) for segment in bars.get_segments()] == [pytest.approx(span) for span in spans]
    assert "standard error" in axes.get_ylabel()
    assert_all_text_is_inside(drawn[0])
    plot_density(density(EIGHT), [], tmp_path / "exact.png")
    assert "standard error" not in drawn[1].axes[0].get_ylabel()


def test_density_of_many_layers_and_of_one(tmp_path, drawn):
    plot_density(density([1 / 80] * 80), [range(0, 10), range(68, 78)], tmp_path / "many.png")
    plot_density(density([1.0]), [range(1)], tmp_path / "one.png", skip_last_layers=0)
    plot_density(density(EIGHT), [], tmp_path / "none.png")
    for figure in drawn:
        assert_all_text_is_inside(figure)
    with pytest.raises(ValueError, match="8 layers does not have"):
        plot_density(density(EIGHT), [range(7, 9)], tmp_path / "wrong.png")
    assert not (tmp_path / "wrong.png").exists()


def test_statistics_without_shares_are_drawn_as_they_are(tmp_path, drawn):
    values = torch.tensor([0.3, -0.2, 0.1, 0.05], dtype=torch.float64)
    for statistic, label in (
        ("cosine", "cosine of the mean"),
        ("slug", "importance"),
        ("fisher_ratio", "forget / retain"),
    ):
        raw = dataclasses.replace(density([0.25] * 4), per_layer=values, statistic=statistic)
        blocks = [] if statistic == "cosine" else [range(0, 1)]
        plot_density(raw, blocks, tmp_path / "raw.png")
        (axes,) = drawn[-1].axes
        bars = {round(bar.get_x() + bar.get_width() / 2): bar for group in axes.containers for bar in group}
        assert [bars[i].get_height() for i in range(4)] == values.tolist()
        assert label in axes.get_ylabel() and axes.get_ylim()[0] < -0.2
        assert (axes.get_legend() is None) == (not blocks)
        assert_all_text_is_inside(drawn[-1])


def slug(importance, alignment):
    one = density([1.0] * len(importance))
    per_layer, alignment = (torch.tensor(x, dtype=torch.float64) for x in (importance, alignment))
    return dataclasses.replace(one, per_layer=per_layer, statistic="slug", alignment=alignment)


def test_the_pareto_front_is_marked(tmp_path, drawn):
    plot_pareto(slug([5, 5, 1, 4, 3, 9], [0.5, -0.2, 0.3, 0.1, 0.15, -0.9]), tmp_path / "pareto.png")
    (axes,) = drawn[0].axes
    front, others = axes.lines
    assert list(zip(*front.get_data())) == [(0.1, 4), (0.2, 5), (0.9, 9)]  # joined from low to high alignment
    assert sorted(zip(*others.get_data())) == [(0.15, 3), (0.3, 1), (0.5, 5)]
    assert front.get_marker() != others.get_marker() and front.get_color() != others.get_color()
    labels = {text.get_text(): text for text in axes.texts}
    assert set(labels) == set("012345")
    assert {n for n, text in labels.items() if text.get_fontweight() == "bold"} == {"1", "3", "5"}
    assert {"Pareto front", "other layers"} <= set(texts(drawn[0]))
    assert_all_text_is_inside(drawn[0])


def test_a_pareto_front_of_many_layers_of_one_and_of_zeros(tmp_path, drawn):
    generator = torch.Generator().manual_seed(0)
    importance, alignment = torch.rand(80, generator=generator), torch.rand(80, generator=generator) ** 6
    plot_pareto(slug(importance.tolist(), alignment.tolist()), tmp_path / "many.png")
    plot_pareto(slug([0.5], [-0.1]), tmp_path / "one.png")
    plot_pareto(slug([0.0, 0.0], [0.0, 0.0]), tmp_path / "zeros.png")
    for figure in drawn:
        assert_all_text_is_inside(figure)
    (many,) = drawn[0].axes
    assert many.get_xscale() == "log" and len(many.texts) == len(many.lines[0].get_xdata()) < 20
    assert drawn[1].axes[0].get_xscale() == "linear"
    with pytest.raises(ValueError, match="this density has no alignment"):
        plot_pareto(density(EIGHT), tmp_path / "none.png")


# -------------------------------------------------------------------------------------------- relearning


METHODS = {
    "gradient difference": result({1e-4: [0.3, 0.5, 0.7], 4e-4: [0.3, 0.9, 0.8]}),
    "KUnBR": result({1e-4: [0.26, 0.3, 0.4], 4e-4: [0.26, 0.5, 0.6]}),
}


def test_relearning_shows_every_curve_the_best_one_strong(tmp_path, drawn):
    plot_relearning(METHODS, tmp_path / "relearning.png", chance=0.2)
    axes = drawn[0].axes[0]
    lines = {tuple(line.get_ydata()): line.get_linewidth() for line in axes.lines if len(line.get_ydata()) == 3}
    for method in METHODS.values():
        best = method.best[0]
        for lr in method.lrs:
            curve = [100 * value for value in method.curve(lr)]
            widths = [width for values, width in lines.items() if list(values) == pytest.approx(curve)]
            assert len(widths) == 1
            assert (widths[0] > 2) == (lr == best)
    labels = texts(drawn[0])
    assert "gradient difference: 30 % → 90 % (lr 0.0004)" in labels
    assert "KUnBR: 26 % → 60 % (lr 0.0004)" in labels
    assert "chance (20 %)" in labels
    assert [20.0, 20.0] in [list(line.get_ydata()) for line in axes.lines]
    assert axes.get_ylim()[0] == 0 and axes.get_ylim()[1] >= 100
    rings = [(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines if len(line.get_ydata()) == 1]
    assert sorted(rings) == [(1, pytest.approx(90.0)), (2, pytest.approx(60.0))]


def test_methods_differ_by_more_than_colour(tmp_path, drawn):
    methods = {f"method {i}": result({1e-5: [0.3, 0.4 + i / 20]}) for i in range(6)}
    plot_relearning(methods, tmp_path / "six.png")
    strong = [line for line in drawn[0].axes[0].lines if len(line.get_ydata()) == 2 and line.get_linewidth() > 2]
    assert len({line.get_marker() for line in strong}) == len({line.get_color() for line in strong}) == 6
    assert_all_text_is_inside(drawn[0])
    with pytest.raises(ValueError, match="no methods"):
        plot_relearning({}, tmp_path / "none.png")


def test_long_runs_and_long_names_fit(tmp_path, drawn):
    name = "KUnBR, cumulative, 8 blocks, then 2 epochs"
    plot_relearning({name: result({5e-7: [0.3] * 60, 1e-5: [0.3, *[0.5] * 59]})}, tmp_path / "long.png")
    assert_all_text_is_inside(drawn[0])
    assert "lr 1e-5" in " ".join(texts(drawn[0]))


def test_attacks_on_one_model_have_a_line_each(tmp_path, drawn):
    rows = [
        {"attack": attack, "fold": "a", "lr": lr, "epoch": epoch, "plain": value, "calibrated": None}
        for attack, kind in ATTACKS.items()
        for lr in kind.lrs((1e-3, 2e-3))
        for epoch, value in zip(kind.measured(8), [0.2, *[0.3 + (0.1 if attack == "lion" else lr)] * 8])
    ]
    attacks = RTTResult(rows)
    plot_relearning({"a model with a long name, of which a part is shown": attacks}, tmp_path / "a.png")
    axes = drawn[0].axes[0]
    strong = {line.get_label().partition(":")[0]: line for line in axes.lines if ": " in line.get_label()}
    assert set(strong) == {f"{name}, epochs x 4" if name == "long" else name for name in ATTACKS}
    assert len({(line.get_marker(), line.get_color()) for line in strong.values()}) == len(ATTACKS)
    assert len(strong["long, epochs x 4"].get_ydata()) == len(strong["full"].get_ydata()) == 9
    assert list(strong["int8"].get_ydata()) == [30.0] and list(strong["int8"].get_xdata()) == [0]
    (ring,) = [line for line in axes.lines if line.get_markersize() == 14]
    assert (list(ring.get_xdata()), list(ring.get_ydata())) == ([1], [40.0]), "the strongest of all, and no other"
    assert_all_text_is_inside(drawn[0])


# ------------------------------------------------------------------------------------------------- files


def test_pictures_are_readme_sized_and_the_same_each_time(tmp_path):
    for name in ("first", "second"):
        plot_density(density(EIGHT), [range(2, 4)], tmp_path / f"{name}-density.png")
        plot_relearning(METHODS, tmp_path / f"{name}-relearning.png")
    for kind in ("density", "relearning"):
        picture = read_png(tmp_path / f"first-{kind}.png")
        assert picture.shape[:2] == (960, 1800)
        assert picture[..., :3].std() > 0.05, "a blank picture"
        assert (tmp_path / f"first-{kind}.png").read_bytes() == (tmp_path / f"second-{kind}.png").read_bytes()
    assert len(list(tmp_path.iterdir())) == 4, "no temporary files left"


def test_the_callers_plotting_state_stays(tmp_path):
    import matplotlib
    import matplotlib.pyplot as plt

    backend, settings, figures = matplotlib.get_backend(), dict(matplotlib.rcParams), plt.get_fignums()
    plot_density(density(EIGHT), [range(2, 4)], tmp_path / "density.png")
    plot_relearning(METHODS, tmp_path / "relearning.png")
    assert (matplotlib.get_backend(), dict(matplotlib.rcParams), plt.get_fignums()) == (
        backend,
        settings,
        figures,
    )


# ------------------------------------------------------------------------------------------------ report


def test_table():
    rows = [
        {"method": "original model", "forget": 0.97, "retain": 0.98},
        {
            "method": "gradient difference",
            "forget": 0.3,
            "retain": 0.965,
            "rtt": 0.94,
            "seconds": {"warm-up": 12.34, "RTT": 60},
        },
        {
            "method": "KUnBR",
            "forget": 0.26,
            "retain": 0.91,
            "rtt": 0.25,
            "seconds": {"warm-up": 12.34, "density": 0.5},
        },
    ]
    lines = table(rows).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == [
        "method",
        "forget",
        "retain",
        "RTT",
        "recovery",
        "warm-up (s)",
        "RTT (s)",
        "density (s)",
    ]
    assert cells[2] == ["original model", "97.0 %", "98.0 %", "-", "-", "-", "-", "-"]
    assert cells[3] == ["gradient difference", "30.0 %", "96.5 %", "94.0 %", "+64.0", "12.3", "60.0", "-"]
    assert cells[4] == ["KUnBR", "26.0 %", "91.0 %", "25.0 %", "-1.0", "12.3", "-", "0.5"]
    assert len({len(line) for line in lines}) == 1, "columns are aligned"
    with pytest.raises(ValueError, match="empty"):
        table([])


def test_report_takes_results_and_is_written_whole(tmp_path):
    path = tmp_path / "report.json"
    accuracy = Accuracy(plain=0.5, calibrated=None, predictions=[0, 3], num_questions=2)
    report = {
        "methods": {"KUnBR": {"forget": accuracy, "rtt": METHODS["KUnBR"]}},
        "density": torch.tensor([0.25, 0.75], dtype=torch.float64),
        "block": range(2, 4),
        "model": Path("some") / "dir",
        "lrs": (1e-4, 4e-4),
    }
    write_report(path, report)
    read = json.loads(path.read_text())
    assert read["density"] == [0.25, 0.75] and read["block"] == [2, 3] and read["model"] == "some/dir"
    assert Accuracy(**read["methods"]["KUnBR"]["forget"]) == accuracy
    assert RTTResult.from_dict(read["methods"]["KUnBR"]["rtt"]) == METHODS["KUnBR"]

    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"report.methods.KUnBR\[1\] is nan"):
        write_report(path, {"methods": {"KUnBR": [0.1, math.nan]}})
    with pytest.raises(TypeError, match=r"report.model is a object"):
        write_report(path, {"model": object()})
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
