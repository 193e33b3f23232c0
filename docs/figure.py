"""The README's picture, drawn from committed rows of `kunbr-fast bench`: python docs/figure.py

The numbers drawn are in the PNG's Description too, where tests/test_readme.py compares them with the rows.
"""

import json
from pathlib import Path

from kunbr_fast.benchmarks.rows import outcomes, read_rows
from kunbr_fast.evaluation import figures
from kunbr_fast.files.atomic import atomic_write

ROOT = Path(__file__).resolve().parent.parent
STEP, RUN = ROOT / "benchmarks" / "results" / "h200.csv", ROOT / "benchmarks" / "results" / "cpu.csv"
PICTURE = ROOT / "docs" / "step.png"
REFERENCE, RIVAL, OURS = "reference procedure", "fastest rival", "kunbr-fast"
COLOURS = {REFERENCE: "#1B3A57", RIVAL: "#56B4E9", OURS: figures.ORANGE}
STAGES = {"warm-up": "#0072B2", "density": "#E69F00", "prefix cache": "#CC79A7", "re-insertion": figures.GREEN}


def steps(rows):
    """({case: {side: ms}}, {case: how much faster}) of one re-insertion step."""
    found, faster = {}, {}
    for case in outcomes(rows):
        if case.suite == "step" and case.ours:
            times = {row["variant"]: row["ms"] for row in case.rivals}
            block, _, loss = case.case.split(", ")
            reference = times.pop("reference")
            name = f"{block},\nloss on {loss}"
            found[name] = {REFERENCE: reference, RIVAL: min(times.values()), OURS: case.ours["ms"]}
            faster[name] = case.ours["speedup"]
    return found, faster


def stages(rows):
    """{side: {stage: minutes}} of a whole run, the blocks as one stage."""
    found = {REFERENCE: {}, OURS: {}}
    for case in outcomes(rows):
        if case.suite != "end_to_end" or case.case == "total":
            continue
        stage = "re-insertion" if case.case.startswith("layers") else case.case
        for side, row in ((REFERENCE, case.rivals[:1]), (OURS, [case.ours])):
            for one in row:
                found[side][stage] = found[side].get(stage, 0.0) + one["ms"] / 6e4
    return found


def where(rows, suite):
    row = next(row for row in rows if row["suite"] == suite and row["ms"])
    device = row["device"] if row["cuda"] else f"{row['device']}, {row['threads']} cores"
    return f"{row['model']}, {row['dtype']}, {device}"


def draw(step_rows, run_rows, path=PICTURE):
    (one, faster), run = steps(step_rows), stages(run_rows)
    figure = figures.canvas((11.5, 4.6))
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    left, right = figure.subplots(1, 2, width_ratios=(1.3, 1))

    figures.style(left, "x")
    for group, (case, times) in enumerate(one.items()):
        for index, (side, ms) in enumerate(times.items()):
            y = group + (index - 1) * 0.26
            left.barh(y, ms, 0.24, color=COLOURS[side], label=side if group == 0 else None)
            text = f" {ms:.0f} ms" + (f", {faster[case]:.1f}x faster" if side == OURS else "")
            left.text(ms, y, text, va="center", fontsize=10, fontweight="bold" if side == OURS else None)
    left.set_yticks(range(len(one)), one)
    left.set_ylim(len(one) - 0.5, -0.5)
    left.set_xlim(0, 1.15 * max(max(times.values()) for times in one.values()))
    left.set_xlabel("milliseconds")
    left.set_title(f"One re-insertion step\n{where(step_rows, 'step')}", loc="left", fontsize=12, pad=26)
    figures.legend(left, ncols=3, handlelength=1.2).set_in_layout(False)

    figures.style(right, "x")
    for y, (side, minutes) in enumerate(run.items()):
        begin = 0.0
        for stage, colour in STAGES.items():
            value = minutes.get(stage, 0.0)
            right.barh(
                y, value, 0.5, left=begin, color=colour, edgecolor="white", label=stage if side == OURS else None
            )
            if value > 20:
                right.text(begin + value / 2, y, f"{value:.0f}", ha="center", va="center", color="white", fontsize=10)
            begin += value
        right.text(begin + 6, y, f"{sum(minutes.values()):.0f} min", va="center", fontsize=11, fontweight="bold")
    right.set_yticks(range(len(run)), [side.replace(" ", "\n") for side in run])
    right.set_ylim(len(run) - 0.4, -0.6)
    right.set_xlim(0, 1.3 * max(sum(minutes.values()) for minutes in run.values()))
    right.set_xlabel("minutes, extrapolated")
    right.set_title(f"A whole run\n{where(run_rows, 'end_to_end')}", loc="left", fontsize=12, pad=26)
    figures.legend(right, "lower right", (1.0, 0.02), handlelength=1.2)

    numbers = json.dumps({"steps": one, "faster": faster, "stages": run})
    with atomic_write(path) as file:
        figure.savefig(file, format="png", facecolor="white", metadata={"Software": None, "Description": numbers})


if __name__ == "__main__":
    draw(read_rows(STEP), read_rows(RUN))
