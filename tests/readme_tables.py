"""The tables of docs/results.md of what `kunbr-fast bench` measured, made from the committed rows.

python tests/readme_tables.py          # prints them, to be pasted
"""

from pathlib import Path

from kunbr_fast.benchmarks.rows import outcomes, read_rows

CPU = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "cpu.csv"


def cases(suite, path=CPU):
    return [case for case in outcomes(read_rows(path)) if case.suite == suite]


def _ran(case):
    return {row["variant"]: row for row in case.ran}


def _slower(rival, ours):
    """How much slower the rival is than ours."""
    return f"{rival['ms'] / ours['ms']:.2f}x"


def step():
    found = []
    for case in cases("step"):
        ran = _ran(case)
        ours, reference = ran["torch"], ran["reference"]
        block, _, loss = case.case.split(", ")
        memory = [row["peak_mib"] + row["standing_mib"] for row in (ours, reference)]
        rival = min((row for row in case.rivals if row["variant"] != "reference"), key=lambda row: row["ms"])
        found.append(
            [
                block.removeprefix("layers "), loss, f"{reference['ms']:.0f} ms", f"{ours['ms']:.0f} ms",
                f"{ours['speedup']:.2f}x", f"{reference['spent_gflop'] / ours['spent_gflop']:.2f}x",
                f"{memory[0] / memory[1]:.2f}x", f"{rival['variant']}, {_slower(rival, ours)}",
            ]
        )  # fmt: skip
    return found


def density():
    found = []
    for case in cases("density"):
        weight, *rest = case.case.split(", ")
        if weight != "up" or rest[0] == "L2":
            continue
        ran = _ran(case)
        ours, rival = ran["torch"], min(case.rivals, key=lambda row: row["ms"])
        (l2,) = (c for c in cases("density") if c.model == case.model and c.case == case.case.replace("up,", "up, L2,"))
        l2 = _ran(l2)
        found.append(
            [
                f"{case.model} up", rest[-1].removeprefix("T="), f"{ours['ms']:.1f}", f"{ours['ms'] / ran['bare']['ms']:.2f}",
                f"{ours['roofline_percent']:.0f} %", f"{rival['variant']}, {_slower(rival, ours)}",
                _slower(ran["loop"], ours), f"{l2['gram']['ms']:.1f}, {l2['opacus']['ms']:.1f}",
            ]
        )  # fmt: skip
    return found


def whole_model():
    """A sentence."""
    (case,) = (case for case in cases("density") if case.case.startswith("whole model"))
    ran = _ran(case)
    floor = ran["plain"]["ms"] + ran["products"]["ms"]
    return (
        f"In a whole model (8 layers of SmolLM2's\nshapes) density takes {ran['torch']['ms'] / floor:.2f}x the time of a "
        f"backward pass without weight gradients plus the bare products, and the\nloop {_slower(ran['loop'], ran['torch'])} "
        "the time of density."
    )


ELSEWHERE = {  # suite: cases
    "linear_loss": ("head frozen, R=512, V=49152",),
    "norms": ("RMSNorm, frozen, T=512", "SwiGLU, T=512", "rotary, T=512"),
    "cover_layer": ("cover, T=512", "active, T=512"),
    "optimizer": ("Lion, fp32, 2 layers", "AdamW, fp32, 2 layers"),
}


def elsewhere():
    found = []
    for suite, wanted in ELSEWHERE.items():
        for name in wanted:
            (case,) = (case for case in cases(suite) if case.case == name)
            ran = _ran(case)
            ours, eager, rival = ran["torch"], ran["eager"], min(case.rivals, key=lambda row: row["ms"])
            kept = f"{ours['kept_mib'] / eager['kept_mib']:.2f}x" if ours["kept_mib"] and eager["kept_mib"] else "-"
            found.append(
                [
                    f"{suite}: {name}", f"{ours['ms']:.3g} ms", _slower(eager, ours),
                    f"{rival['variant']}, {_slower(rival, ours)}", f"{ours['peak_mib'] / eager['peak_mib']:.2f}x", kept,
                ]
            )  # fmt: skip
    return found


def end_to_end():
    found, blocks = {}, {}
    for case in cases("end_to_end"):
        for row in case.ran:
            where = blocks if case.case.startswith("layers") else found.setdefault(case.case, {})
            where[row["variant"]] = where.get(row["variant"], 0.0) + row["ms"] / 6e4
    total = found.pop("total")
    found = {**{name: found[name] for name in ("warm-up", "density", "prefix cache")}, "re-insertion": blocks,
             **{name: found[name] for name in ("merge", "rest")}, "total": total}  # fmt: skip
    return [
        [stage, *(f"{both[side]:.1f} min" if side in both else "-" for side in ("reference", "torch"))]
        for stage, both in found.items()
    ]


if __name__ == "__main__":
    for make in (step, density, elsewhere, end_to_end):
        print(make.__name__)
        for cells in make():
            print(f"| {' | '.join(cells)} |")
        print()
